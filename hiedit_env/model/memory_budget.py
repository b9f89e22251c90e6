"""How much memory editing a model takes, and how much there is."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from hiedit_env.datasets.requests import Request
from hiedit_env.errors import HieditWarning, LayerError, NotEnoughMemoryError, SettingsError
from hiedit_env.model.architectures import find_candidates

#: Tokens of the longest prompt that every estimate has room for.
TOKENS = 256

#: What is done when a model seems not to fit; ``$HIEDIT_MEMORY_CHECK`` sets the default.
MEMORY_CHECKS = ("refuse", "warn", "off")


def estimate_memory(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    *,
    layers: str | Sequence[str] | None = None,
    tokens: int = TOKENS,
    answer: int = 0,
    trust_remote_code: bool = False,
) -> int:
    """About how many bytes it takes to edit a model with the default update rule.

    The sum, with b bytes per number of the model's dtype and 4 per float32, of

    - the model: b per parameter;
    - activations of one pass: b (d_in + d_out) per weight matrix, for 256 tokens, and twice that
      for every further token of the longest prompt, which is rehearsed beside other prompts;
    - six numbers per word of the vocabulary and token of the longest answer (logits, their
      gradients, and the distributions they are compared with), so far as these are more;
    - the candidate layers: b per weight for the unedited copy, and twice 4 for the accumulated
      change, before and after the step under way, which may be undone;
    - the ``decorrelated`` rule's statistics: 4 d_in² per candidate layer, four times: kept, kept
      from before the step, and two temporary copies for the factorisation.

    Where no layers are given and no default is known, they are taken to be square matrices and a
    quarter of the model. Nothing is loaded: the model is built on the meta device.

    Args:
        config: The model's configuration.
        dtype: Of its weights.
        layers: Candidate layers as in :func:`.architectures.find_candidates`.
        tokens: Length of the longest prompt with its answer.
        answer: Length of the longest answer.
        trust_remote_code: Whether code that comes with the model may run.

    Raises:
        LayerError: ``layers`` are given and are none of this model's.
    """
    with torch.device("meta"):
        model: PreTrainedModel = auto_class(config).from_config(
            config, trust_remote_code=trust_remote_code
        )
    parameters = sum(p.numel() for p in model.parameters())
    try:
        found = find_candidates(model, layers, name=config.name_or_path)
        candidates = sum(layer.d_in * layer.d_out for layer in found)
        statistics = sum(layer.d_in**2 for layer in found)
    except LayerError:
        if layers is not None:
            raise
        candidates = statistics = parameters // 4
    in_dtype = parameters + _of_a_pass(model, tokens, answer) + candidates
    return in_dtype * dtype.itemsize + (2 * candidates + 4 * statistics) * 4


def _of_a_pass(model: PreTrainedModel, tokens: int, answer: int) -> int:
    """Numbers that a pass takes beside the weights; see :func:`estimate_memory`."""
    matrices = (m.weight for m in model.modules() if isinstance(m, nn.Linear | Conv1D))
    activations = sum(sum(weight.shape) for weight in matrices)
    passes = TOKENS + 2 * max(0, tokens - TOKENS)
    text = model.config.get_text_config(decoder=True)
    vocabulary = int(getattr(text, "vocab_size", 0) or 0)
    return passes * activations + vocabulary * max(0, 6 * answer - passes)


def require_room(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    request: Request,
    check: str | None = None,
) -> None:
    """Checks that a fact which was not known when the model was loaded fits beside it.

    What loading left room for, a prompt of :data:`TOKENS` tokens, is not looked at. A longer one
    needs its pass, as :func:`estimate_memory` counts it, in what is free now.

    Args:
        model: As it is loaded.
        tokenizer: Its own.
        request: The fact, with all that judges it.
        check: As for :func:`memory_check`.

    Raises:
        NotEnoughMemoryError: more is needed than is free, and ``check`` is ``"refuse"``.
    """
    chosen = memory_check(check)
    tokens, answer = (0, 0) if chosen == "off" else longest_texts(tokenizer, [request])
    if tokens <= TOKENS:
        return
    needed = _of_a_pass(model, tokens, answer) * model.dtype.itemsize
    free = available_memory(model.device)
    if free is None or needed <= free:
        return
    text = (
        f"{request.source}: its longest prompt of {tokens:,} tokens needs about "
        f"{needed / 1e9:.2g} GB, and {free / 1e9:.2g} GB are free; shorten it"
    )
    if chosen == "refuse":
        raise NotEnoughMemoryError(
            f"{text}, free some memory, or go on all the same with --memory-check warn (or "
            "HIEDIT_MEMORY_CHECK=warn)"
        )
    warnings.warn(text, HieditWarning, stacklevel=2)


def longest_texts(
    tokenizer: PreTrainedTokenizerBase, requests: Sequence[Request]
) -> tuple[int, int]:
    """Tokens of the longest prompt with its answer, and of the longest answer, probes included.

    A token is taken to hold at least one byte of UTF-8, so that only long texts are tokenised.

    Args:
        tokenizer: The model's.
        requests: Any number of facts.

    Returns:
        Both numbers; the first is at least :data:`TOKENS`.
    """
    pairs = {
        (f"{request.system or ''}{prompt} ", answer)
        for request in requests
        for prompt, answer in (
            (request.prompt, request.answer),
            *((paraphrase, request.answer) for paraphrase in request.paraphrases),
            *((probe.prompt, probe.answer) for probe in request.locality),
            *((probe.prompt, probe.answer) for probe in request.portability),
        )
    }
    whole = _most_tokens(tokenizer, {prompt + answer for prompt, answer in pairs}, TOKENS)
    return whole, _most_tokens(tokenizer, {answer for _, answer in pairs}, 0)


def _most_tokens(tokenizer: PreTrainedTokenizerBase, texts: AbstractSet[str], least: int) -> int:
    """Tokens of the text that has most of them, or ``least`` if that is more."""
    sized = sorted(((len(text.encode(errors="replace")), text) for text in texts), reverse=True)
    for size, text in sized:
        if size <= least:
            break
        least = max(least, len(tokenizer.encode(text, add_special_tokens=False, verbose=False)))
    return least


def auto_class(config: PreTrainedConfig) -> Any:
    """The class of transformers that opens a model of this configuration whole.

    Models that read images or sounds beside text are opened with all their parts, so that none is
    lost when they are saved.
    """
    kind = config.model_type
    remote = getattr(config, "auto_map", None) or {}
    multimodal = cast(Mapping[str, Any], modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)
    names = multimodal.get(kind, ())
    names = (names,) if isinstance(names, str) else names
    own = (getattr(config, "architectures", None) or [""])[0]
    is_causal = (
        kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "AutoModelForCausalLM" in remote
    )
    if names and (own in names or not is_causal):
        return transformers.AutoModelForMultimodalLM
    return transformers.AutoModelForCausalLM


def available_memory(device: torch.device) -> int | None:
    """Bytes free on a device, or None where the system does not say.

    In a container, what its limit leaves may be less than what the machine has.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    rooms = [room for room in (_machine_memory(), _container_memory()) if room is not None]
    return min(rooms, default=None)


def memory_check(chosen: str | None) -> str:
    """What is done when a model seems not to fit: the choice, else ``$HIEDIT_MEMORY_CHECK``.

    Raises:
        SettingsError: it is none of :data:`MEMORY_CHECKS`.

    >>> memory_check("warn")
    'warn'
    """
    found = chosen if chosen is not None else os.environ.get("HIEDIT_MEMORY_CHECK", "refuse")
    if found not in MEMORY_CHECKS:
        known = ", ".join(MEMORY_CHECKS)
        raise SettingsError(
            f"memory must be one of {known} (here or in HIEDIT_MEMORY_CHECK), got {found!r}"
        )
    return found


def require_memory(
    name: str,
    needed: int,
    device: torch.device,
    progress: bool,
    check: str = "refuse",
    tokens: int = TOKENS,
) -> None:
    """Checks that a model fits; says what it needs if asked to, or if that is more than half.

    Args:
        name: The model's name, for messages.
        needed: Bytes.
        device: Where it is to go.
        progress: Whether to say it on standard error in any case.
        check: ``"refuse"``, or ``"warn"`` to go on with a warning.
        tokens: Length of the longest prompt, which is named if it counts.

    Raises:
        NotEnoughMemoryError: more is needed than is free.
    """
    free = available_memory(device)
    room = "free memory unknown" if free is None else f"{free / 1e9:.1f} GB free"
    long = f" with its longest prompt of {tokens:,} tokens" if tokens > TOKENS else ""
    if progress or (free is not None and 2 * needed > free):
        print(f"loading {name} needs about {needed / 1e9:.2g} GB{long}; {room}", file=sys.stderr)
    if check == "refuse" and free is not None and needed > free:
        raise NotEnoughMemoryError(
            f"model {name!r} needs about {needed / 1e9:.2g} GB{long} but {device} has {room}; "
            f"choose a smaller model, fewer layers, shorter prompts, dtype='bfloat16', or another "
            f"device, free some memory, or go on all the same with --memory-check warn (or "
            f"HIEDIT_MEMORY_CHECK=warn)"
        )


def _machine_memory() -> int | None:
    """Bytes that programs can still have of the machine's main memory."""
    with suppress(OSError):
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        if (found := re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)) is not None:
            return int(found[1]) * 1024
    with suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _container_memory() -> int | None:
    """Bytes left under the tightest memory limit (cgroup v2) this process is under."""
    with suppress(OSError, ValueError):
        text = Path("/proc/self/cgroup").read_text(encoding="utf-8")
        if (own := re.search(r"^0::/(.*)$", text, re.MULTILINE)) is None:
            return None
        root = Path("/sys/fs/cgroup")
        groups = [root / own[1], *(root / own[1]).parents]
        rooms = [_room(group) for group in groups if group.is_relative_to(root)]
        return min((room for room in rooms if room is not None), default=None)
    return None


def _room(group: Path) -> int | None:
    """Limit of a control group minus its usage; file caches, given back when needed, are free."""
    with suppress(OSError, ValueError):
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        used = int((group / "memory.current").read_text(encoding="ascii"))
        statistics = (group / "memory.stat").read_text(encoding="ascii")
        caches = re.findall(r"^(?:in)?active_file (\d+)$", statistics, re.MULTILINE)
        return max(0, limit - used + sum(map(int, caches)))
    return None
