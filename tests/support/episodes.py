"""Helpers for tests of episodes: environments, episodes, and a plain model.

The plain model is the other route to every number: the whole network in float64, one text at a
time, dense weights, formulas written out. Nothing of hiedit runs in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import hiedit_env
from hiedit_env.datasets.requests import Request
from hiedit_env.envs.base import EditingEnv
from hiedit_env.evaluation.matching import is_match
from hiedit_env.evaluation.reward import Evaluator, evaluate_together
from hiedit_env.evaluation.reward_terms import Quality
from hiedit_env.model.tokenization import EncodedFact
from hiedit_env.resident.reading import Reading

LIFELONG, SELECTION, STEP_SIZE = IDS = (
    "hiedit/LifelongEdit-v1",
    "hiedit/LayerSelection-v1",
    "hiedit/StepSize-v1",
)
KINDS = ("loss", "token_accuracy", "generation")
#: A tenth of the tiny model's nominal step size: most facts then take several steps.
SMALL = 3e-4
TINY = Path(hiedit_env.__file__).parent / "model" / "assets" / "tiny"
L = 6


def make(name: str, **settings: Any) -> EditingEnv:
    """An environment on the tiny model without Gymnasium's wrappers."""
    defaults = {"num_edits": 3, "update_rule": "outer-product", "step_size": SMALL}
    env = gym.make(name, **(defaults | settings)).unwrapped
    assert isinstance(env, EditingEnv)
    return env


def act(name: str, layers: Sequence[int] | int = 1, size: float = 0.0) -> Any:
    """An action of any id: a mask (one number for all layers) and one step size for all."""
    mask = np.full(L, layers, np.int8) if isinstance(layers, int) else np.array(layers, np.int8)
    sizes = np.full(L, size, np.float32)
    return {LIFELONG: {"layers": mask, "step_size": sizes}, SELECTION: mask, STEP_SIZE: sizes}[name]


def actions(env: EditingEnv, count: int, seed: int) -> list[Any]:
    """Random actions."""
    env.action_space.seed(seed)
    return [env.action_space.sample() for _ in range(count)]


def shown(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """What ``reset`` or ``step`` returned, comparable bit for bit."""
    observation, *rest = result
    return observation.tobytes(), repr(rest)


def roll(env: EditingEnv, chosen: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Steps until the episode or the actions end; what was shown, comparable bit for bit."""
    results = []
    for action in chosen:
        result = env.step(action)
        results.append(shown(result))
        if result[2]:
            break
    return results


def known(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics that could be measured."""
    return {name: value for name, value in metrics.items() if np.isfinite(value)}


def bits(env: EditingEnv) -> dict[str, Tensor]:
    """A copy of all the model's parameters."""
    return {name: value.clone() for name, value in env.llm.model.state_dict().items()}


def same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two copies are equal bit for bit (NaN is not equal to itself)."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def judged(
    evaluator: Evaluator,
    fact: EncodedFact,
    remembered: Sequence[EncodedFact],
    reading: Reading | None = None,
) -> Quality:
    """The quality of one edit at the present weights."""
    return evaluate_together([(evaluator, [fact], remembered, reading)])[0]


def quality(env: EditingEnv) -> Quality:
    """The quality of the present fact's edit, without any book-keeping."""
    episode = env.episode
    return judged(episode.evaluator, episode.fact, episode.remembered, episode._reading)


class PlainModel:
    """The tiny model in float64 with given weights (its own by default), run whole."""

    def __init__(self, weights: Mapping[str, Tensor] | None = None) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float64).eval()
        if weights is not None:
            self.model.load_state_dict({k: v.double() for k, v in weights.items()})
        self.tokenizer = AutoTokenizer.from_pretrained(TINY)

    def ids(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        prompt_ids = self.tokenizer(prompt).input_ids
        both = self.tokenizer(f"{prompt} {answer}").input_ids
        assert both[: len(prompt_ids)] == prompt_ids
        return prompt_ids, both[len(prompt_ids) :]

    def log_probs(self, prompt: str, answer: str) -> tuple[NDArray[np.float64], list[int]]:
        """Answer tokens × vocabulary log-probabilities, and the answer's ids."""
        prompt_ids, answer_ids = self.ids(prompt, answer)
        with torch.no_grad():
            logits = self.model(torch.tensor([prompt_ids + answer_ids])).logits[0].numpy()
        rows = logits[len(prompt_ids) - 1 : -1]
        return rows - np.log(np.exp(rows).sum(1, keepdims=True)), answer_ids

    def nats(self, prompt: str, answer: str) -> float:
        """Negative log-likelihood per answer token."""
        rows, answer_ids = self.log_probs(prompt, answer)
        return float(-np.mean([row[i] for row, i in zip(rows, answer_ids, strict=True)]))

    def accuracy(self, prompt: str, answer: str) -> float:
        """Share of the answer's tokens that are the most probable ones."""
        rows, answer_ids = self.log_probs(prompt, answer)
        return float(np.mean(rows.argmax(1) == answer_ids))

    def text(self, prompt: str, answer: str) -> str:
        """Greedy continuation: the answer's number of tokens and five more."""
        ids, answer_ids = self.ids(prompt, answer)
        start = len(ids)
        for _ in range(len(answer_ids) + 5):
            with torch.no_grad():
                token = int(self.model(torch.tensor([ids])).logits[0, -1].argmax())
            if token == self.tokenizer.eos_token_id:
                break
            ids = [*ids, token]
        return str(self.tokenizer.decode(ids[start:]))


def plain_score(model: PlainModel, prompt: str, answer: str, kind: str) -> float:
    """How well an answer is given."""
    if kind == "loss":
        return -model.nats(prompt, answer)
    if kind == "token_accuracy":
        return model.accuracy(prompt, answer)
    return float(is_match(model.text(prompt, answer), answer))


def plain_likeness(
    reference: PlainModel, model: PlainModel, prompt: str, answer: str, kind: str
) -> float:
    """How little an unrelated answer differs from the reference model's."""
    p, _ = reference.log_probs(prompt, answer)
    q, _ = model.log_probs(prompt, answer)
    if kind == "loss":
        return -float((np.exp(p) * (p - q)).sum(1).mean())
    if kind == "token_accuracy":
        return float(np.mean(p.argmax(1) == q.argmax(1)))
    return float(reference.text(prompt, answer) == model.text(prompt, answer))


def plain_levels(
    reference: PlainModel,
    model: PlainModel,
    request: Request,
    remembered: Sequence[Request],
    kind: str = "loss",
    decay: float = 0.95,
) -> dict[str, float]:
    """Edit, locality and recent-retention terms by their definitions.

    Args:
        reference: Model the unrelated prompts are compared with.
        model: The edited model.
        request: The present fact.
        remembered: Facts edited before, latest first: the first is of age 1.
        kind: Unit of the levels.
        decay: μ, a remembered fact of age a weighs μ ** a.
    """
    perfect = 0.0 if kind == "loss" else 1.0
    edit = plain_score(model, request.prompt, request.answer, kind)
    if request.paraphrases:
        scores = [plain_score(model, text, request.answer, kind) for text in request.paraphrases]
        edit = (edit + sum(scores) / len(scores)) / 2
    probes = [(1 / len(request.locality), probe) for probe in request.locality]
    probes += [(decay**a, old.locality[0]) for a, old in enumerate(remembered, 1) if old.locality]
    locality = sum(
        weight * plain_likeness(reference, model, probe.prompt, probe.answer, kind)
        for weight, probe in probes
    )
    ages = [decay**a for a in range(1, len(remembered) + 1)]
    retention = sum(
        age * plain_score(model, old.prompt, old.answer, kind)
        for age, old in zip(ages, remembered, strict=True)
    )
    return {
        "edit": edit,
        "locality": locality / sum(w for w, _ in probes) if probes else perfect,
        "recent_retention": retention / sum(ages) if ages else perfect,
    }
