"""The penalty for future damage: value, gradient, and the sample that it is measured on."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hiedit_agents.hierarchy.future_damage import FutureDamage
from hiedit_agents.hierarchy.hypernetwork import Hypernetwork
from hiedit_agents.hierarchy.train_settings import TrainSettings
from hiedit_agents.hierarchy.trainer import Trainer
from hiedit_agents.registry import spec_agent
from hiedit_benchmarks.commands.train_folder import TrainingFolder
from hiedit_env.envs.base import EditingEnv
from hiedit_env.errors import SettingsError
from hiedit_env.model.tokenization import EncodedPrompt
from hiedit_env.resident.low_rank import LowRankUpdate, Updates
from tests.support.episodes import SELECTION, L, make

SETTINGS = TrainSettings(
    edits_per_episode=4,
    future_damage=7.0,
    future_damage_prompts=2,
    locality_weight=3.0,
    retention_weight=0.5,
)


def random_updates(env: EditingEnv, seed: int = 0, size: float = 0.02) -> Updates:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        LowRankUpdate(
            size * torch.randn(2, d_in, generator=generator),
            torch.randn(2, d_out, generator=generator),
        )
        for d_in, d_out in env.llm.shapes
    )


def edited_episode(facts: int = 3) -> EditingEnv:
    """An episode with some facts edited, at weights that are not the unedited ones."""
    env = make(SELECTION, num_edits=None, reward_weights=SETTINGS.reward_weights())
    env.reset(seed=0, options={"requests": env.requests[: facts + 1]})
    for place in range(facts):
        env.apply(random_updates(env, place, 0.03))
        if env.episode.position == place:
            env.step(np.zeros(L, np.int8))
    assert env.episode.position == facts
    return env


def log_probs(env: EditingEnv, prompt: EncodedPrompt) -> torch.Tensor:
    """A full forward pass of one prompt at the weights as they are."""
    with torch.no_grad():
        logits = env.llm.model(input_ids=torch.tensor([prompt.input_ids])).logits[0]
    found: torch.Tensor = logits[prompt.first_position :].float().log_softmax(-1)
    return found


def nats(env: EditingEnv, prompt: EncodedPrompt) -> float:
    rows = log_probs(env, prompt)
    return float(-rows[range(len(rows)), list(prompt.answer_ids)].mean())


def test_the_penalty_is_the_sum_over_what_was_drawn() -> None:
    env = edited_episode()
    damage = FutureDamage(env, env.requests, SETTINGS)
    damage.draw(np.random.default_rng(1))
    probes, facts = list(damage._references), damage._facts
    assert len(probes) == len(facts) == 2
    assert all(fact.paraphrases for fact in facts)
    now = {probe: log_probs(env, probe) for probe in probes}
    remembered = np.mean(
        [(nats(env, f.prompt) + np.mean([nats(env, p) for p in f.paraphrases])) / 2 for f in facts]
    )
    with env.llm.unedited():
        divergence = np.mean(
            [
                float((before.exp() * (before - now[probe])).sum(1).mean())
                for probe, before in ((probe, log_probs(env, probe)) for probe in probes)
            ]
        )
    assert divergence > 1e-3
    wanted = 7.0 * (0.5 * remembered + 3.0 * divergence)
    assert float(damage.loss()) == pytest.approx(wanted, rel=1e-4)


def test_a_fact_without_paraphrases_counts_whole() -> None:
    env = edited_episode()
    env.episode.facts = tuple(replace(fact, paraphrases=()) for fact in env.episode.facts)
    damage = FutureDamage(env, [], SETTINGS)
    damage.draw(np.random.default_rng(1))
    wanted = 7.0 * 0.5 * np.mean([nats(env, fact.prompt) for fact in damage._facts])
    assert float(damage.loss()) == pytest.approx(float(wanted), rel=1e-4)


def test_what_is_drawn_is_not_the_present_fact() -> None:
    env = edited_episode()
    settings = replace(SETTINGS, future_damage_prompts=1000)
    damage = FutureDamage(env, env.requests, settings)
    damage.draw(np.random.default_rng(1))
    assert {fact.prompt for fact in damage._facts} == {f.prompt for f in env.episode.facts[:3]}
    probes = {p.prompt for request in env.requests for p in request.locality}
    present = {probe.prompt for probe in env.episode.fact.probes}
    assert present
    assert {probe.prompt for probe in damage._references} == probes - present


def test_nothing_to_measure_on_costs_nothing() -> None:
    env = make(SELECTION, num_edits=None, reward_weights=SETTINGS.reward_weights())
    env.reset(seed=0)
    damage = FutureDamage(env, [], SETTINGS)
    damage.draw(np.random.default_rng(1))
    assert float(damage.loss()) == 0.0


def test_its_gradient_is_that_of_central_differences() -> None:
    env = edited_episode()
    damage = FutureDamage(env, env.requests, SETTINGS)
    damage.draw(np.random.default_rng(1))
    updates = random_updates(env, 5)
    direction = random_updates(env, 6, 1.0)
    leaves = [u.left.requires_grad_() for u in updates if u is not None]
    gradients = torch.autograd.grad(damage.loss(updates), leaves)
    along = sum(
        float((g * d.left).sum())
        for g, d in zip(gradients, direction, strict=True)
        if d is not None
    )

    def moved(by: float) -> float:
        there = [
            LowRankUpdate(u.left.detach() + by * d.left, u.right)
            for u, d in zip(updates, direction, strict=True)
            if u is not None and d is not None
        ]
        return float(damage.loss(there))

    step = 1e-3
    assert along == pytest.approx((moved(step) - moved(-step)) / (2 * step), rel=0.02)


def trainer(agent: str, **changes: Any) -> Trainer:
    env = make(SELECTION, num_edits=None, reward_weights=SETTINGS.reward_weights())
    built = spec_agent(agent).build(env.llm, trained=False)
    settings = replace(SETTINGS, **changes)
    return Trainer(env, built, env.requests, settings)


def test_only_a_low_level_that_is_trained_is_penalised() -> None:
    for agent in ("policy", "straight-through", "straight-through+ridge"):
        assert trainer(agent)._future_damage is None
    assert trainer("policy+hypernetwork", train_low=False)._future_damage is None
    assert trainer("policy+hypernetwork", future_damage=0.0)._future_damage is None
    assert trainer("policy+hypernetwork")._future_damage is not None


def test_a_low_level_learns_from_both() -> None:
    """The gradient of an option's lesson is the objective's plus the penalty's."""
    one = trainer("all-layers+hypernetwork")
    env, low = one.env, one.agent.low
    assert isinstance(low, Hypernetwork)
    env.reset(seed=0, options={"requests": env.requests[:3]})
    env.apply(random_updates(env, 0, 0.03))
    env.step(np.zeros(L, np.int8))
    assert one._future_damage is not None
    one._future_damage.draw(np.random.default_rng(0))
    capture = env.episode.observe()

    def gradient(with_penalty: bool, with_objective: bool) -> torch.Tensor:
        for parameter in low.parameters():
            parameter.grad = None
        updates = low.compute(capture, np.ones(L, bool))
        total = torch.zeros(())
        if with_objective:
            total = total + env.loss(updates, l2=one.settings.l2)
        if with_penalty:
            assert one._future_damage is not None
            total = total + one._future_damage.loss(updates)
        torch.autograd.backward(total)
        return torch.cat([net.log_step.grad for net in low.net])  # type: ignore[misc]

    wanted = gradient(True, True)
    assert not torch.allclose(wanted, gradient(False, True), rtol=0.01)
    for parameter in low.parameters():
        parameter.grad = None
    lesson = one._lesson([low.compute(capture, np.ones(L, bool))])
    assert lesson is not None
    lesson.learn()
    found = torch.cat([net.log_step.grad for net in low.net])  # type: ignore[misc]
    assert torch.allclose(found, wanted, rtol=1e-3)
    # What is logged stays comparable, however large the penalty is.
    with torch.no_grad():
        objective = env.loss(low.compute(capture, np.ones(L, bool)), l2=one.settings.l2)
    assert lesson.loss == pytest.approx(float(objective), rel=1e-5)


def test_a_step_that_is_too_long_for_the_rest_of_the_episode_does_not_grow() -> None:
    found = []
    for future_damage in (0.0, 100.0):
        one = trainer(
            "all-layers+hypernetwork,step_size=1e-3",
            future_damage=future_damage,
            future_damage_prompts=4,
            edits_per_episode=12,
            window=3,
            low_learning_rate=3e-3,
        )
        for number in range(3):
            one.episode(number)
        low = one.agent.low
        assert isinstance(low, Hypernetwork)
        steps = [p.detach() for name, p in low.net.named_parameters() if name.endswith("log_step")]
        found.append(float(torch.cat(steps).mean()))
    without, penalised = found
    assert without > 0.1
    assert penalised < 0.05


def test_what_weighs_nothing_is_not_run() -> None:
    env = edited_episode()
    for term, left in (("locality", "_references"), ("recent_retention", "_facts")):
        env.weights_of_terms = {**SETTINGS.reward_weights(), term: 0.0}
        damage = FutureDamage(env, env.requests, SETTINGS)
        damage.draw(np.random.default_rng(1))
        assert len(getattr(damage, left)) == 0
        assert float(damage.loss().detach()) > 0


def test_the_penalty_is_not_for_the_other_levels_preset_to_say() -> None:
    assert spec_agent("hiedit").spec.train["future_damage"] == 100
    assert spec_agent("random-layers+hiedit").spec.train["future_damage"] == 100
    for agent in ("hiedit+rledit", "hiedit+hypernetwork"):
        train = spec_agent(agent).spec.train
        assert "future_damage" not in train
        assert "low_learning_rate" not in train
        assert train["high_learning_rate"] == 0.01
    assert "high_learning_rate" not in spec_agent("straight-through+hiedit").spec.train


def test_a_run_from_before_the_penalty_goes_on_without_it(tmp_path: Path) -> None:
    folder = TrainingFolder(tmp_path / "run", {"settings": asdict(SETTINGS)}, False)
    record = {"training": {"settings": asdict(SETTINGS)}}
    del record["training"]["settings"]["future_damage"]
    with pytest.raises(SettingsError, match=r"future_damage was 0.0 and is now 7.0"):
        folder._check_same(record)
    folder.settings["settings"]["future_damage"] = 0.0
    folder._check_same(record)


@pytest.mark.parametrize(("name", "value"), [("future_damage", -1.0), ("future_damage_prompts", 0)])
def test_wrong_settings_are_refused(name: str, value: float) -> None:
    changes: dict[str, Any] = {name: value}
    with pytest.raises(SettingsError, match=name):
        replace(SETTINGS, **changes)
