"""Which way to run a model: the cheapest that gives the model's own logits, found by trying.

Every way is compared with the model's own forward on prompts of different length, past a window or
an original context length where the configuration has one and the model is small enough to try.
Where padding changes a model's own logits, prompts run alone, and a line says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from hiedit_env.errors import LayerError, ModelError
from hiedit_env.model.architectures import CandidateLayer
from hiedit_env.model.structure import text_config
from hiedit_env.resident.capture import LayerRecorder
from hiedit_env.resident.forward import Forward, forget_lengths, own_logits, ways

#: Lengths of the prompts that every model is tried on, in tokens.
LENGTHS = (2, 7)

#: Parameters × tokens, and tokens, up to which lengths beyond a boundary are tried too.
LONG_CHECK = {"cpu": (3e9, 600), "cuda": (1e13, 8200), "mps": (1e11, 2100)}

#: Configuration fields: from this many tokens on, attention looks elsewhere or positions change.
_BOUNDARIES = (
    "sliding_window",
    "sliding_window_size",
    "attention_window_size",
    "attention_chunk_size",
    "local_attention",
    "window_size",
    "index_topk",
    "original_max_position_embeddings",
)

#: Of these, what prompts see depends on the longest of their batch, or on its padding.
_DEPEND_ON_BATCH = ("index_topk",)

#: Kinds of rotary positions that depend on the longest prompt of a batch.
_LENGTH_DEPENDENT = ("dynamic", "longrope")


def find_forward(
    model: PreTrainedModel, layers: Sequence[CandidateLayer], first_block: int
) -> Forward:
    """The cheapest way to run a model that gives its own logits.

    Args:
        model: Causal LM in eval mode whose parameters require no gradients.
        layers: Its candidate layers.
        first_block: Index of the first block that holds one.

    Raises:
        LayerError: a candidate does not see every token exactly once, so that its update is not
            defined.
        ModelError: the model's logits are not finite, differ from run to run, or have no gradient.
    """
    forget_lengths(model)
    check = _Check(model, layers)
    way = check.first_right_way(first_block)
    check.batches(way)
    check.generation(way)
    return way


class _Check:
    """Compares ways to run a model with its own forward."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[CandidateLayer]) -> None:
        self.model, self.layers = model, layers
        self.name = type(model).__name__
        self.config = text_config(model.config)
        weight = cast(Tensor, layers[0].module.weight)
        self.device = weight.device
        self.tolerance = 2e-4 if weight.dtype in (torch.float32, torch.float64) else 5e-2
        self.boundaries = self._affordable()
        self.rows = [self._ids(length, row) for row, length in enumerate(LENGTHS)]
        self.long_rows = [self._ids(b + 5, 2 + i) for i, b in enumerate(self.boundaries)]
        with torch.inference_mode():
            self.own = [self._own(ids) for ids in self.rows]
            self.long_own = [self._own(ids) for ids in self.long_rows]

    def first_right_way(self, first_block: int) -> Forward:
        """The first way that gives the model's own logits of prompts that run alone."""
        reasons: dict[str, list[str]] = {}  # what is wrong → with which ways
        for name, make in ways(self.model, first_block):
            # Whatever a model's code raises in parts means only that it cannot be run like this.
            try:
                way = make()
                error = max(
                    self._error(self._captured(way), self.own[-1]),
                    self._alone_error(way, self.long_rows, self.long_own),
                )
                self.batch_error = self._batch_error(way, self.rows, self.own)
                if self.batch_error > self.tolerance:
                    # Is it the padding, or the way itself?
                    error = max(error, self._alone_error(way, self.rows[:1], self.own[:1]))
            except (LayerError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as problem:
                kind = "" if isinstance(problem, ModelError) else f"{type(problem).__name__}: "
                reasons.setdefault(f"{kind}{problem}", []).append(name)
                continue
            if error <= self.tolerance:
                return way
            reason = f"its logits change by a relative {error:.2g}"
            reasons.setdefault(reason, []).append(name)
        told = "; ".join(f"{' and '.join(names)}, {reason}" for reason, names in reasons.items())
        raise ModelError(f"{self.name} cannot be edited; {_one_line(told)}")

    @torch.inference_mode(False)
    def _captured(self, way: Forward) -> Tensor:
        """Logits of the longer prompt, run forward and backward as a capture does."""
        self.hidden = [way.halves.prefix(ids)[0] for ids in self.rows]
        recorder = LayerRecorder(self.layers, 1, LENGTHS[-1])
        with torch.enable_grad(), recorder.attached():
            logits = way.head(way.halves.suffix(self.hidden[-1][None])[0])
        self.inputs = [rows[0].detach() for rows in recorder.inputs()]
        total = logits.float().logsumexp(-1).sum()
        if not total.requires_grad:
            raise ModelError("its logits have no gradient at its layers, by which they are edited")
        torch.autograd.grad(total, recorder.outputs)
        return logits.detach()

    @torch.inference_mode()
    def _alone_error(self, way: Forward, rows: Sequence[Tensor], own: Sequence[Tensor]) -> float:
        """Error of prompts without gradients, one by one."""
        pairs = zip(rows, own, strict=True)
        errors = [
            self._error(way.head(way.halves.suffix(way.halves.prefix(ids))[0]), wanted)
            for ids, wanted in pairs
        ]
        return max(errors, default=0.0)

    @torch.inference_mode()
    def batches(self, way: Forward) -> None:
        """Finds from which length on prompts of different length must not share a batch."""
        error = self.batch_error
        if error > self.tolerance:
            way.alone_beyond = -1
            way.notes.append(
                f"{self.name}: padding a batch changes its logits"
                f"{f' by a relative {error:.2g}' if error < 1e9 else ''}, so prompts run one by one"
            )
            return
        short, own = self.rows[0], self.own[0]
        limits = dict(self._known_limits())
        for boundary, ids, wanted in zip(
            self.boundaries, self.long_rows, self.long_own, strict=True
        ):
            if self._batch_error(way, [short, ids], [own, wanted]) > self.tolerance:
                limits[boundary] = "padding a batch changes their logits"
        if limits:
            way.alone_beyond = min(limits)
            way.notes.append(
                f"{self.name}: prompts longer than {way.alone_beyond} tokens run one by one "
                f"({limits[way.alone_beyond]})"
            )

    @torch.inference_mode()
    def generation(self, way: Forward) -> None:
        """Compares the logits that ``generate`` uses in a padded batch with the model's own."""
        # Masks of padded batches take other kernels, whose rounding differs by as much as 1e-4.
        tolerance = max(self.tolerance, 1e-3)
        if self._generation_error(self.rows) <= tolerance:
            return
        way.generates_alone = True
        if self._generation_error(self.rows[1:]) <= tolerance:
            way.notes.append(
                f"{self.name}: padding a batch changes what it generates, so texts are generated "
                "one by one"
            )
            return
        way.generates_whole = True
        way.notes.append(
            f"{self.name}: its cache changes what it generates, so every token is generated from "
            "the whole text, one text at a time"
        )

    # -- inside -------------------------------------------------------------------------------

    def _ids(self, length: int, row: int) -> Tensor:
        """1 × T different tokens from all over the vocabulary."""
        embeddings = cast(nn.Embedding, self.model.get_input_embeddings())
        vocabulary = int(embeddings.weight.shape[0])
        places = torch.arange(length, dtype=torch.int64) * 7919 + 31 * row
        ids = places % max(1, vocabulary - 4) + min(4, vocabulary - 1)
        return ids.to(self.device)[None]

    def _own(self, ids: Tensor) -> Tensor:
        """The model's own logits of one prompt, T × vocabulary."""
        # Anything may come out of a model that wants more than tokens.
        try:
            logits = own_logits(self.model, ids)[0]
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as problem:
            raise ModelError(
                f"{self.name} does not read text by itself: "
                f"{type(problem).__name__}: {_one_line(str(problem))}"
            ) from problem
        if not bool(logits.isfinite().all()):
            raise ModelError(
                f"{self.name} gives logits that are not finite: its weights hold NaN or infinity, "
                "or its dtype is too small for it; try dtype='float32' or another copy"
            )
        return logits

    def _error(self, ours: Tensor, own: Tensor) -> float:
        """Largest difference, relative to the largest logit; infinite if not a number."""
        ours, own = ours.float(), own.float()
        error = float((ours - own).abs().max() / own.abs().max().clamp_min(1e-6))
        return error if error == error else float("inf")

    @torch.inference_mode()
    def _batch_error(self, way: Forward, rows: Sequence[Tensor], own: Sequence[Tensor]) -> float:
        """Error of prompts in one batch, padded on the right; of the layers' inputs as well."""
        lengths = [ids.shape[1] for ids in rows]
        recorder = LayerRecorder(self.layers, len(rows), max(lengths))
        try:
            is_short = rows is self.rows
            hidden = self.hidden if is_short else [way.halves.prefix(ids)[0] for ids in rows]
            with recorder.attached():
                features = way.halves.suffix(nn.utils.rnn.pad_sequence(hidden, batch_first=True))
            seen = recorder.inputs()
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:
            return float("inf")  # a batch is more than this model takes
        errors = [
            self._error(way.head(features[i, :length]), wanted)
            for i, (length, wanted) in enumerate(zip(lengths, own, strict=True))
        ]
        if is_short:
            # Tokens in another order than prompt after prompt would be other tokens' keys.
            pairs = zip(seen, self.inputs, strict=True)
            errors += [self._error(given[-1, : lengths[-1]], alone) for given, alone in pairs]
        return max(errors)

    def _generation_error(self, rows: Sequence[Tensor]) -> float:
        """Error of the logits of two generated tokens of the last prompts, padded on the left."""
        longest = max(ids.shape[1] for ids in rows)
        ids = torch.cat([nn.functional.pad(row, (longest - row.shape[1], 0)) for row in rows])
        mask = torch.cat(
            [nn.functional.pad(torch.ones_like(row), (longest - row.shape[1], 0)) for row in rows]
        )
        config = cast(Any, GenerationConfig)(
            do_sample=False,
            max_new_tokens=2,
            min_new_tokens=2,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        model = cast(Any, self.model)
        own, model.generation_config = model.generation_config, cast(Any, GenerationConfig)()
        try:
            result = model.generate(ids, attention_mask=mask, generation_config=config)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:
            return float("inf")  # this model cannot generate like this
        finally:
            model.generation_config = own
        # The first token of all, and the second of the shortest, which has the most padding.
        errors = [
            self._error(result.logits[0][i], own[-1])
            for i, own in enumerate(self.own[-len(rows) :])
        ]
        text = torch.cat([rows[0], result.sequences[:1, longest : longest + 1]], 1)
        wanted = own_logits(self.model, text)[0, -1]
        return max(*errors, self._error(result.logits[1][0], wanted))

    def _affordable(self) -> list[int]:
        """Boundaries that are worth a check, rising."""
        parameters = sum(p.numel() for p in self.model.parameters())
        most, longest = LONG_CHECK.get(self.device.type, LONG_CHECK["cpu"])
        context = getattr(self.config, "max_position_embeddings", None) or 10**9
        settings = [vars(self.config), *_rope_settings(self.config)]
        found = {
            value
            for fields in settings
            for key in _BOUNDARIES
            if isinstance(value := fields.get(key), int) and not isinstance(value, bool)
        }
        return [
            b
            for b in sorted(found)
            if 0 < b <= min(context, longest) - 5 and parameters * (b + 5) <= most
        ]

    def _known_limits(self) -> Iterable[tuple[int, str]]:
        """Lengths from which on the configuration says that a prompt depends on its batch."""
        context = getattr(self.config, "max_position_embeddings", None)
        for fields in _rope_settings(self.config):
            kind = fields.get("rope_type", fields.get("type"))
            own = fields.get("original_max_position_embeddings") or getattr(
                self.config, "original_max_position_embeddings", None
            )
            if kind in _LENGTH_DEPENDENT and (limit := own or context):
                yield limit, f"rope_type {kind!r} depends on the longest prompt of a batch"
        for key in _DEPEND_ON_BATCH:
            limit = getattr(self.config, key, None)
            if isinstance(limit, int) and limit not in self.boundaries:
                yield limit, f"{key} {limit} chooses among the tokens of a batch"


def _rope_settings(config: Any) -> list[Mapping[str, Any]]:
    """What a configuration says about rotary positions: one mapping, or one per kind of layer."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(found, Mapping):
        return []
    inner = [value for value in found.values() if isinstance(value, Mapping)]
    return inner or [found]


def _one_line(text: str) -> str:
    return " ".join(text.split())[:400]
