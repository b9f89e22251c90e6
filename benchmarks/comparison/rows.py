"""One run in the results folder: a row of numbers, and the details of every fact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hiedit_benchmarks.comparison.episode import FinishedEdit, PlayedEpisode
from hiedit_benchmarks.comparison.results import Row, versions
from hiedit_env.datasets.requests import PromptForm, Request
from hiedit_env.datasets.streams import fingerprint
from hiedit_env.evaluation.metrics import Evaluation
from hiedit_env.evaluation.names import metric_in
from hiedit_env.evaluation.questions import FORMS


def row_of(
    name: str,
    seed: int,
    episode: PlayedEpisode,
    evaluation: Evaluation,
    best: Sequence[float] | None,
    settings: Mapping[str, Any],
) -> Row:
    """The row of one run, for ``results.jsonl``.

    Args:
        name: The agent's label.
        seed: Of the run.
        episode: The episode.
        evaluation: The model after its last edit.
        best: Reward of the oracle for each fact; None where there is no oracle.
        settings: What the run was made with.
    """
    edits = episode.edits
    return {
        "agent": name,
        "seed": seed,
        "num_edits": len(edits),
        "error_type": episode.error_type,
        "metrics": {
            **evaluation.metrics,
            "efficacy_right_after": episode.right_after(),
            "forgetting": episode.forgetting(
                efficacy_as_edited(episode.requests, evaluation, settings.get("prompt_form"))
            ),
            **episode.against_oracle(best),
        },
        "layers_per_edit": _average([int(edit.layers.sum()) for edit in edits]),
        "steps_per_edit": _average([edit.steps for edit in edits]),
        "seconds_per_edit": episode.seconds / max(len(edits), 1),
        "stream_fingerprint": fingerprint(episode.requests),
        "settings": dict(settings),
        "versions": versions(),
    }


def efficacy_as_edited(
    requests: Sequence[Request],
    evaluation: Evaluation,
    form: PromptForm | None,
    reading: str = "token_accuracy",
) -> NDArray[np.float64]:
    """Efficacy of each fact in the forms in which it was edited: what its edit was judged by.

    Args:
        requests: F facts.
        evaluation: Of the same facts.
        form: The environment's form; a fact may say another.
        reading: Of the metric.

    Returns:
        F float64 in percent: the mean over the forms of a fact; NaN where one was not evaluated.
    """
    plain, chat = (
        evaluation.per_fact.get(metric_in(asked, "efficacy"), {}).get(reading) for asked in FORMS
    )
    nothing = np.full(len(requests), np.nan)
    plain = nothing if plain is None else plain
    if chat is None:
        chat = nothing
    else:
        # A prompt that a template wrote has one form, whatever is asked.
        chat = np.where(np.isnan(chat), plain, chat)
    shares = {"plain": plain, "chat": chat, "both": (plain + chat) / 2}
    forms = [request.prompt_form or form or "plain" for request in requests]
    return np.array([shares[asked][i] for i, asked in enumerate(forms)])


def _average(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0


def details_of(
    layer_names: Sequence[str], episode: PlayedEpisode, evaluation: Evaluation
) -> dict[str, Any]:
    """The details of one run, for ``runs/``.

    Args:
        layer_names: L names in forward order.
        episode: The episode.
        evaluation: The model after its last edit.
    """
    requests = episode.requests
    return {
        "layer_names": layer_names,
        "prompts": [request.prompt for request in requests],
        "wanted": [request.answer for request in requests],
        "answers": evaluation.answers,
        **({"chat_answers": evaluation.chat_answers} if evaluation.chat_answers else {}),
        "first_texts": dict(evaluation.first_texts),
        "paraphrases": [r.paraphrases[0] if r.paraphrases else "" for r in episode.requests],
        "unrelated": [r.locality[0].prompt if r.locality else "" for r in episode.requests],
        "per_fact": evaluation.per_fact,
        "edits": [
            {
                "layers": np.flatnonzero(edit.layers),
                "steps": edit.steps,
                "reward": edit.reward,
                "metrics": edit.metrics,
                **_oracle_details(edit),
            }
            for edit in episode.edits
        ],
    }


def _oracle_details(edit: FinishedEdit) -> dict[str, Any]:
    if edit.oracle is None or edit.true_layers is None:
        return {}
    return {
        "one_step_regret": edit.one_step_regret,
        "best_layers": np.flatnonzero(edit.oracle.layers),
        "true_layers": np.flatnonzero(edit.true_layers),
    }
