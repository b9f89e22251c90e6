"""One episode: a step by hand, the way back, updates from outside, bookkeeping."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM

from hiedit_env.datasets.requests import Request
from hiedit_env.envs.scheduler import run
from hiedit_env.errors import NonFiniteUpdateError, SettingsError
from hiedit_env.resident.capture import Capture
from hiedit_env.rules.closed_form import OuterProductRule
from tests.support.episodes import (
    IDS,
    LIFELONG,
    SELECTION,
    STEP_SIZE,
    L,
    act,
    actions,
    bits,
    make,
    roll,
    same_bits,
    shown,
)
from tests.support.models import normal, random_updates, tokenizer

ALL = np.ones(L, bool)


# One step by hand


def rms_norm(x: NDArray[Any], weight: NDArray[Any], eps: float) -> NDArray[Any]:
    return weight * x / np.sqrt((x**2).mean() + eps)


def save_one_block_model(folder: Path) -> dict[str, NDArray[np.float64]]:
    """A Llama of one block; returns its weights."""
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        rms_norm_eps=1e-5,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(0.5 * normal(i, *parameter.shape))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return {name: value.double().numpy() for name, value in model.state_dict().items()}


class OneToken:
    """The forward pass of that model on one token, and its loss's gradient, by formula.

    On one token the softmax of the attention is 1, so attention is its value and output matrices,
    and a rotation by position 0 is none.
    """

    def __init__(self, weights: Mapping[str, NDArray[np.float64]], token: int) -> None:
        block = "model.layers.0."
        x = weights["model.embed_tokens.weight"][token]
        n = rms_norm(x, weights[block + "input_layernorm.weight"], 1e-5)
        attention = weights[block + "self_attn.o_proj.weight"] @ (
            weights[block + "self_attn.v_proj.weight"] @ n
        )
        self.before_mlp = x + attention
        m = rms_norm(self.before_mlp, weights[block + "post_attention_layernorm.weight"], 1e-5)
        gate = weights[block + "mlp.gate_proj.weight"] @ m
        self.key = gate / (1 + np.exp(-gate)) * (weights[block + "mlp.up_proj.weight"] @ m)
        self.norm, self.head = weights["model.norm.weight"], weights["lm_head.weight"]

    def loss_and_gradient(
        self, down: NDArray[np.float64], answer: int
    ) -> tuple[float, NDArray[np.float64]]:
        """−log p(answer), and its gradient at the output of the last matrix (``down``)."""
        z = self.before_mlp + down @ self.key
        r = np.sqrt((z**2).mean() + 1e-5)
        logits = self.head @ (self.norm * z / r)
        p = np.exp(logits) / np.exp(logits).sum()
        onehot = np.eye(len(p))[answer]
        g = self.norm * (self.head.T @ (p - onehot))
        return float(-np.log(p[answer])), g / r - z * (g @ z) / (len(z) * r**3)


def test_two_steps_by_hand(tmp_path: Path) -> None:
    weights = save_one_block_model(tmp_path)
    step = 0.05
    env = make(
        LIFELONG,
        model=str(tmp_path),
        dataset="tiny-facts",
        num_edits=1,
        max_steps_per_edit=2,
        layers="model.layers.0.mlp.down_proj",
        update_rule="gradient",
        step_size=step,
        reward_weights={"sparsity": 0.25},
    )
    env.reset(seed=0, options={"requests": [Request("w5", "w9", "w5")]})
    by_hand, name = OneToken(weights, 5), "model.layers.0.mlp.down_proj"
    down = weights[f"{name}.weight"]
    gained = 0.0
    for decades in (0.0, 0.5):
        loss, gradient = by_hand.loss_and_gradient(down, 9)
        capture = env.capture
        assert capture.loss == pytest.approx(loss, rel=1e-5)
        np.testing.assert_allclose(capture.keys[0].numpy(), by_hand.key[None], atol=1e-5)
        np.testing.assert_allclose(capture.value_gradients[0].numpy(), gradient[None], atol=1e-5)
        down = down - step * 10**decades * np.outer(gradient, by_hand.key)
        _, reward, _, _, info = env.step({"layers": [1], "step_size": [decades]})
        weight = env.llm.model.get_submodule(name).weight
        np.testing.assert_allclose(weight.numpy(), down, atol=1e-5)
        # No paraphrases, no unrelated prompts, no memory: only the loss, and no layer left alone.
        level = -by_hand.loss_and_gradient(down, 9)[0]
        assert reward == pytest.approx(level - gained, rel=1e-4)
        terms = info["reward_terms"]
        assert (terms["locality"], terms["sparsity"], terms["recent_retention"]) == (0, 0, 0)
        gained = level


# The way back


@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("name", IDS)
def test_a_saved_state_is_restored_bit_for_bit(name: str, stop: bool) -> None:
    settings: dict[str, Any] = {"high_level": "random-layers"} if name == STEP_SIZE else {}
    env = make(name, max_steps_per_edit=2, stop_when_answered=stop, **settings)
    env.reset(seed=0)
    chosen = actions(env, 6, 0)
    if name != STEP_SIZE:
        # Writing nothing must not make a difference either.
        chosen[2] = act(name, 0)
    expected, states = [], [(env.save_state(), bits(env), env.llm.weights_fingerprint())]
    statistics = [repr(env.episode.rule.statistics())]
    for action in chosen:
        expected.append(shown(env.step(action)))
        states.append((env.save_state(), bits(env), env.llm.weights_fingerprint()))
        statistics.append(repr(env.episode.rule.statistics()))
        if env.episode.ended:
            break
    assert env.episode.ended
    following = shown(env.reset())
    # Backwards across borders of facts, then from the end, then into an episode of another seed.
    for i in [*reversed(range(len(states))), 0, len(states) - 1, 1]:
        if i == 1:
            env.reset(seed=5)
        state, weights, fingerprint = states[i]
        env.restore_state(state)
        assert same_bits(bits(env), weights)
        assert env.llm.weights_fingerprint() == fingerprint
        assert repr(env.episode.rule.statistics()) == statistics[i]
        if i == len(states) - 1:
            with pytest.raises(ResetNeeded):
                env.step(chosen[0])
        assert roll(env, chosen[i : len(expected)]) == expected[i:]
        assert len(env.history.records) == 3
        assert shown(env.reset()) == following


def test_saving_and_restoring_at_every_step_changes_nothing() -> None:
    settings: dict[str, Any] = {"max_steps_per_edit": 2, "stop_when_answered": False}
    env, twin = make(LIFELONG, **settings), make(LIFELONG, **settings)
    env.reset(seed=0)
    twin.reset(seed=0)
    for mask in (1, 0, 0, 0, 0, 1):
        env.restore_state(env.save_state())
        assert shown(env.step(act(LIFELONG, mask))) == shown(twin.step(act(LIFELONG, mask)))


# Updates by hand


@pytest.mark.parametrize("name", IDS)
def test_applying_the_rules_updates_is_a_step(name: str) -> None:
    settings: dict[str, Any] = {"max_steps_per_edit": 2 if name != SELECTION else 1}
    env, twin = make(name, **settings), make(name, **settings)
    env.reset(seed=0)
    twin.reset(seed=0)
    mask = ALL if name == STEP_SIZE else np.array([1, 0, 1, 1, 0, 1], bool)
    for _ in range(3):
        wanted = twin.step(act(name, mask.astype(int).tolist()))
        got = env.apply(env.episode.propose(mask))
        assert shown(got) == shown(wanted)
        assert same_bits(bits(env), bits(twin))


def test_an_applied_update_is_added_to_the_weights() -> None:
    env = make(LIFELONG)
    env.reset(seed=0)
    before = bits(env)
    updates = random_updates(env.llm, scale=0.03)
    updates[1] = updates[4] = None
    observation, reward, ended, truncated, info = env.apply(updates)
    assert (type(reward), ended, truncated) == (float, False, False)
    assert info["layers"].tolist() == [1, 0, 1, 1, 0, 1]
    after = bits(env)
    for update, name in zip(updates, env.llm.names, strict=True):
        change = (after[f"{name}.weight"] - before[f"{name}.weight"]).double()
        dense = torch.zeros_like(change)
        if update is not None:
            dense = torch.einsum("ri,ro->oi", update.left.double(), update.right.double())
        torch.testing.assert_close(change, dense, rtol=0, atol=1e-6)


# Bookkeeping


class CountingRule(OuterProductRule):
    """Remembers the captures it observed."""

    def reset(self) -> None:
        super().reset()
        self.seen: tuple[int, ...] = ()

    def observe(self, capture: Capture) -> None:
        super().observe(capture)
        self.seen = (*self.seen, len(capture.prompt.answer_ids))

    def statistics(self) -> dict[str, Any]:
        return {**super().statistics(), "seen": self.seen}

    def load_statistics(self, statistics: Mapping[str, Any]) -> None:
        super().load_statistics(statistics)
        self.seen = statistics["seen"]


@pytest.mark.parametrize("intrinsic", [False, True])
def test_statistics_take_every_written_capture_in_once(intrinsic: bool) -> None:
    env = make(
        LIFELONG,
        update_rule="tests.hiedit_env.envs.test_episode:CountingRule",
        max_steps_per_edit=3,
        stop_when_answered=False,
        intrinsic=intrinsic,
    )
    env.reset(seed=0)
    for mask in (1, 0, 1):
        env.step(act(LIFELONG, mask))
    # The empty mask proposed nothing, so there was nothing to normalise.
    answer = len(env.episode.facts[0].prompt.answer_ids)
    assert env.episode.rule.seen == (answer, answer)  # type: ignore[attr-defined]


def test_a_capture_is_taken_in_once_however_often_it_is_used() -> None:
    env = make(LIFELONG, update_rule="tests.hiedit_env.envs.test_episode:CountingRule")
    env.reset(seed=0)
    first, *_ = env.episode.propose(ALL)
    again, *_ = env.episode.propose(np.array([1, 0, 0, 0, 0, 0], bool))
    assert first is not None
    assert again is not None
    assert torch.equal(first.right, again.right)
    with pytest.raises(NonFiniteUpdateError):
        env.apply([first.scaled(float("nan")), *[None] * 5])
    env.episode.propose(ALL)
    env.restore_state(env.save_state())
    env.episode.propose(ALL)
    assert len(env.episode.rule.seen) == 1  # type: ignore[attr-defined]
    env.step(act(LIFELONG))
    assert len(env.episode.rule.seen) == 1  # type: ignore[attr-defined]
    env.step(act(LIFELONG))
    assert len(env.episode.rule.seen) == 2  # type: ignore[attr-defined]


def test_an_episode_needs_a_request() -> None:
    env = make(LIFELONG)
    with pytest.raises(SettingsError, match="at least one"):
        run(env.episode.start([]))


def test_the_window_of_memory() -> None:
    env = make(SELECTION, num_edits=4, max_steps_per_edit=1, retention_window=2)
    env.reset(seed=0)
    facts = env.episode.facts
    seen = []
    for _ in range(4):
        seen.append(env.episode.remembered)
        env.step(act(SELECTION))
    assert seen == [(), facts[:1], (facts[1], facts[0]), (facts[2], facts[1])]
    assert env.episode.written_counts.tolist() == [4] * L
    assert [record.edit_index for record in env.history.records] == [0, 1, 2, 3]
