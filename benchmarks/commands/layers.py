"""Candidate layers for a model that nobody tuned: ``hiedit layers``."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hiedit_benchmarks.comparison.episode import bar
from hiedit_benchmarks.comparison.report import as_text, show
from hiedit_benchmarks.comparison.results import versions
from hiedit_benchmarks.layers.facts import prompts_of, spread
from hiedit_benchmarks.layers.report import draw, table
from hiedit_benchmarks.layers.scan import not_given, scan
from hiedit_benchmarks.layers.scores import FLOOR, LayerScore, propose
from hiedit_benchmarks.layers.settings import LayerScanSettings
from hiedit_env.datasets.load import load_requests
from hiedit_env.datasets.streams import fingerprint
from hiedit_env.envs.settings import rule_settings
from hiedit_env.errors import (
    DatasetError,
    LayerError,
    MissingLibraryError,
    OutputError,
    ResultsExistError,
)
from hiedit_env.evaluation.unedited import UneditedModel
from hiedit_env.files import write_bytes
from hiedit_env.model.architectures import (
    CandidateLayer,
    all_candidates,
    find_candidates,
    model_structure,
)
from hiedit_env.model.layer_files import SUFFIX, write_layers
from hiedit_env.model.loading import LoadedModel, load_model
from hiedit_env.model.relatives import belongings, known_as
from hiedit_env.resident.resident import ResidentLLM
from hiedit_env.rules.base import UpdateRule
from hiedit_env.rules.names import check_rule, make_rule

SCORE = f"mean effect / (mean damage + {FLOOR}), nats per token"


@dataclass(frozen=True, slots=True)
class FoundLayers:
    """The outcome of :func:`find_layers`.

    Args:
        scores: Of every measured layer, in forward order.
        chosen: Names of the proposed layers, in forward order.
        defaults: Names of the layers that are edited by default; empty where there are none.
        content: What the file of layers holds.
    """

    scores: list[LayerScore]
    chosen: list[str]
    defaults: tuple[str, ...]
    content: dict[str, Any]

    @property
    def text(self) -> str:
        """The table as plain text."""
        return as_text(table(self.scores, self.chosen, self.defaults))

    def draw(self) -> bytes:
        """The picture as PNG; raises MissingLibraryError."""
        model, facts = self.content["model"], self.content["facts"]
        title = (
            f"{model['name']}: {len(self.scores)} layers, {facts['count']} facts, "
            f"rule {self.content['rule']['name']}; dark: the {len(self.chosen)} proposed"
        )
        return draw(self.scores, self.chosen, title)


def find_layers(settings: LayerScanSettings, *, progress: bool = True) -> FoundLayers:
    """Measures layers of a model and proposes candidates; the model is thrown away unedited.

    Args:
        settings: What is measured, and on which facts.
        progress: Whether to show progress on standard error.

    Raises:
        LayerError: nothing can be edited, or no layer gains anything.
        DatasetError: no facts that the model does not give already.
        ModelError, SettingsError, PromptError, DeviceError, NotEnoughMemoryError: as elsewhere.
    """
    rule = settings.update_rule or belongings(settings.model).rule
    own = rule_settings(settings.model, rule)
    check_rule(rule, own)
    dataset = settings.facts or belongings(settings.model).dataset
    requests = load_requests(dataset)
    loaded = load_model(
        settings.model,
        device=settings.device,
        dtype=settings.dtype,
        trust_remote_code=settings.trust_remote_code,
        progress=progress,
        layers=settings.layers,
        requests=requests,
        memory=settings.memory_check,
    )
    if settings.layers is None:
        layers = all_candidates(loaded.model)
    else:
        layers = find_candidates(loaded.model, settings.layers, known_as(settings.model))
    defaults: tuple[str, ...] = ()
    with suppress(LayerError):
        found = find_candidates(loaded.model, None, known_as(settings.model))
        defaults = tuple(layer.name for layer in found)

    rng = np.random.default_rng(settings.seed)
    ordered = spread(requests, rng)
    # Any layer will do: nothing is edited here.
    llm = _first_resident(loaded, layers)
    prompts = prompts_of(ordered, requests, llm.encoder, rng)
    facts = list(islice(not_given(UneditedModel(llm), prompts), settings.num_facts))
    if not facts:
        raise DatasetError(
            f"the model gives all {len(requests)} facts of {dataset} already, so nothing can be "
            "measured; give facts that it does not know"
        )

    def make(resident: ResidentLLM) -> UpdateRule:
        return make_rule(rule, resident.shapes, resident.device, own)

    with bar("measuring layers", len(layers) * len(facts), progress) as shown:
        scores = scan(
            loaded,
            layers,
            facts,
            make,
            steps=settings.max_steps_per_edit,
            progress=shown.update,
            skipped=partial(_skipped, shown),
        )
    # At most half of what was measured: else nothing was chosen.
    wanted = settings.count or max(4, round(0.4 * len({score.block for score in scores})))
    count = wanted if settings.count else min(wanted, max(1, len(scores) // 2))
    chosen = propose(scores, count)
    content = {
        "model": {
            "name": settings.model,
            "type": loaded.model.config.model_type,
            "structure": model_structure(loaded.model),
        },
        "layers": chosen,
        "choice": f"the {len(chosen)} layers of the highest score above 0",
        "score": SCORE,
        "rule": {"name": rule, "settings": own, "steps": settings.max_steps_per_edit},
        "facts": {
            "dataset": dataset,
            "fingerprint": fingerprint(requests),
            "count": len(facts),
            "seed": settings.seed,
            "prompts": [fact.prompt.prompt for fact in facts],
        },
        "measured": [_plain(asdict(score)) for score in scores],
        "machine": {
            "device": settings.device,
            "dtype": settings.dtype,
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
        },
        "versions": versions(),
    }
    return FoundLayers(scores, chosen, defaults, content)


def _first_resident(loaded: LoadedModel, layers: Sequence[CandidateLayer]) -> ResidentLLM:
    """A resident model of any one layer that can be edited, the last ones first.

    Raises:
        LayerError: there is none; the reason of the first layer.
    """
    reason = LayerError("there is no layer to measure")
    for layer in reversed(layers):
        try:
            return ResidentLLM(loaded.model, loaded.tokenizer, [layer])
        except LayerError as error:
            reason = error
    raise reason


def _skipped(shown: Any, reason: str) -> None:
    shown.write(f"hiedit: not measured: {reason}", file=sys.stderr)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """The same for JSON, which has no NaN; six digits are more than a few facts are worth."""
    return {
        key: (float(f"{value:.6g}") if np.isfinite(value) else None)
        if isinstance(value, float)
        else value
        for key, value in values.items()
    }


def _check_place(path: Path | None, suffix: str, option: str) -> None:
    """Refuses a place for a file before anything is measured.

    Raises:
        OutputError: another ending, or no folder to write to.
        ResultsExistError: the file is there.
    """
    if path is None:
        return
    if path.suffix != suffix:
        raise OutputError(f"{option} must end in {suffix}, got {path}")
    if path.is_file():
        raise ResultsExistError(f"{path} exists; give another {option}")
    if path.is_dir() or not path.parent.is_dir():
        raise OutputError(f"{path} cannot be written: its folder must exist; make it first")


def main(settings: LayerScanSettings, out: Path | None, picture: Path | None) -> int:
    """``hiedit layers``: measures, prints the table, and writes file and picture."""
    _check_place(out, SUFFIX, "--out")
    _check_place(picture, ".png", "--picture")
    found = find_layers(settings)
    encoding = sys.stdout.encoding
    show(table(found.scores, found.chosen, found.defaults, encoding=encoding))
    write: Callable[[str], Any] = partial(print, file=sys.stderr)
    if out is not None:
        write_layers(out, found.content)
        write(f"proposed layers: {out}; --layers {out} of every command takes them")
    if picture is not None:
        try:
            write_bytes(picture, found.draw())
            write(f"picture: {picture}")
        except MissingLibraryError as error:
            write(f"hiedit: no picture: {error}")
    print(f"Proposed: {found.content['choice']} ({SCORE}):")
    print(json.dumps(found.chosen, ensure_ascii=False)[1:-1].replace('"', "").replace(",", ""))
    return 0
