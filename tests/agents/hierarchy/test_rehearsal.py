"""Rehearsal: what is drawn, what is made of it, and what it does for memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hiedit_agents.hierarchy.hypernetwork import Hypernetwork
from hiedit_agents.hierarchy.rehearsal import Rehearsal
from hiedit_agents.hierarchy.train_settings import TrainSettings
from hiedit_benchmarks.commands.train import train
from hiedit_benchmarks.commands.train_settings import TrainingRun
from hiedit_env.envs.accounting import StepError
from hiedit_env.envs.base import EditingEnv
from hiedit_env.errors import NonFiniteUpdateError, SettingsError
from hiedit_env.resident.capture import Capture, GradientRows
from tests.support.episodes import SELECTION, L, make, roll
from tests.support.models import mean_losses

ALL = np.ones(L, bool)
PROMPTS = 8


def probes(env: EditingEnv, count: int = PROMPTS) -> list[Capture]:
    """Captures of unrelated prompts at the unedited weights."""
    found = [p for request in env.requests for p in request.locality][:count]
    return [env.llm.read(env.llm.encode(p.prompt, p.answer)).capture() for p in found]


def rehearsing(env: EditingEnv, **settings: Any) -> Rehearsal:
    low = Rehearsal(env.llm, **{"rank": 2, "step_size": 1e-3, "ridge": 0.5, **settings})
    low.calibrate(probes(env))
    return low


# -- what is rehearsed --------------------------------------------------------------------------


def test_without_prompts_it_is_the_hypernetwork() -> None:
    env = make(SELECTION)
    env.reset(seed=0)
    one = rehearsing(env, facts=0, probes=0)
    two = Hypernetwork(
        env.llm.shapes, env.llm.device, form="decorrelated", rank=2, step_size=1e-3, ridge=0.5
    )
    two.calibrate(probes(env))
    for rule in (one, two):
        rule.observe(env.capture)
    for a, b in zip(one.propose(env.capture, ALL), two.propose(env.capture, ALL), strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a.dense(), b.dense())


def test_a_rehearsed_step_goes_down_the_rehearsed_loss() -> None:
    env = make(SELECTION, num_edits=4)
    low = rehearsing(env, facts=3, probes=0, step_size=1e-5)
    env.use_low_level(low)
    env.reset(seed=0)
    earlier = [fact.prompt for fact in env.episode.facts[1:]]
    for prompt in earlier:
        low.observe(env.llm.read(prompt).capture())
    capture = env.episode.observe()
    whole = low.propose(capture, ALL)
    alone = Hypernetwork.compute(low, capture, ALL)
    mended = []
    for a, b in zip(whole, alone, strict=True):
        assert a is not None
        assert b is not None
        rank = b.left.shape[0]
        torch.testing.assert_close(a.left[:rank], b.left)
        mended.append(type(a)(a.left[rank:], a.right[rank:]).detach())

    def loss() -> float:
        with torch.no_grad():
            batch = env.llm.batch(earlier)
            return mean_losses(env.llm.answer_logits(batch).float(), batch).item()

    before = loss()
    env.llm.commit(mended)
    assert loss() < before


def test_the_present_fact_is_not_rehearsed_and_memory_is_of_this_episode() -> None:
    env = make(SELECTION, num_edits=3)
    low = rehearsing(env, facts=5, probes=0)
    env.use_low_level(low)
    env.reset(seed=0)
    seen: list[list[str]] = []
    own = env.llm.gradients

    def noted(prompts: Any, loss: Any) -> GradientRows:
        seen.append([p.prompt for p in prompts])
        return own(prompts, loss)

    env.llm.gradients = noted  # type: ignore[method-assign]
    texts = [fact.prompt.prompt for fact in env.episode.facts]
    for _ in range(3):
        env.step(np.ones(L, np.int8))
    drawn = {tuple(sorted(group)) for group in seen}
    assert drawn == {(texts[0],), tuple(sorted(texts[:2]))}
    env.reset(seed=1)
    seen.clear()
    env.step(np.ones(L, np.int8))
    assert seen == []


def test_unrelated_prompts_are_pulled_back_to_the_unedited_model() -> None:
    """With nothing but probes rehearsed, their divergence from the unedited model is smaller."""
    found = []
    for count in (0, PROMPTS):
        env = make(SELECTION, num_edits=6, retention_window=0)
        low = rehearsing(env, facts=0, probes=count)
        env.use_low_level(low)
        env.reset(seed=2)
        for _ in range(6):
            env.step(np.ones(L, np.int8))
        total = 0.0
        for probe in low._bank:
            reference = low._unedited.log_probs((probe,))[probe]
            with torch.no_grad():
                now = env.llm.answer_logits(env.llm.batch([probe])).float().log_softmax(-1)
            total += F.kl_div(now, reference, log_target=True, reduction="batchmean").item()
        found.append(total / PROMPTS)
    assert found[1] < 0.7 * found[0]


def test_rehearsal_keeps_earlier_facts() -> None:
    retention = []
    for facts in (0, 4):
        env = make(SELECTION, num_edits=12, retention_window=12)
        env.use_low_level(rehearsing(env, facts=facts, probes=0))
        env.reset(seed=3)
        for _ in range(12):
            *_, info = env.step(np.ones(L, np.int8))
        retention.append(info["metrics"]["recent_retention"])
    assert retention[1] > retention[0]


# -- state --------------------------------------------------------------------------------------


def test_a_restored_episode_goes_on_as_before() -> None:
    env = make(SELECTION, num_edits=5)
    env.use_low_level(rehearsing(env))
    env.reset(seed=0)
    actions = [np.ones(L, np.int8)] * 5
    roll(env, actions[:2])
    state = env.save_state()
    first = roll(env, actions)
    env.restore_state(state)
    assert roll(env, actions) == first
    env.reset(seed=0)
    roll(env, actions[:2])
    assert roll(env, actions) == first


def test_what_is_rehearsed_is_saved(tmp_path: Path) -> None:
    env = make(SELECTION, num_edits=3)
    one = rehearsing(env)
    two = Rehearsal(env.llm, rank=2, step_size=1e-3, ridge=0.5)
    two.load_state_dict(one.state_dict())
    assert two._bank == one._bank
    assert [len(p.answer_ids) for p in one._bank] != []
    episodes = []
    for low in (one, two):
        env.use_low_level(low)
        env.reset(seed=0)
        episodes.append(roll(env, [np.ones(L, np.int8)] * 3))
    assert episodes[0] == episodes[1]


def test_gradients_reach_the_parameters_through_both_parts() -> None:
    env = make(SELECTION, num_edits=3)
    low = rehearsing(env)
    env.use_low_level(low)
    env.reset(seed=0)
    env.step(np.ones(L, np.int8))
    loss = env.loss(low.compute(env.episode.observe(), ALL))
    gradients = torch.autograd.grad(loss, low.parameters(), allow_unused=True)
    names = [name for name, _ in low.net.named_parameters()]
    for name, gradient in zip(names, gradients, strict=True):
        # B = 0: A has no slope yet, and scale none either.
        if name.rpartition(".")[2] not in ("a", "scale"):
            assert gradient is not None, name
            assert float(gradient.norm()) > 0, name


def test_gradients_against_finite_differences() -> None:
    """At rehearsed gradients that do not depend on the parameters: without looking ahead."""
    env = make(SELECTION, num_edits=3)
    low = rehearsing(env, largest=1e9)
    env.use_low_level(low)
    env.reset(seed=0)
    env.step(np.ones(L, np.int8))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in low.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    capture, state = env.episode.observe(), low.statistics()

    def loss() -> torch.Tensor:
        low.load_statistics(state)
        return env.loss(low.compute(capture, ALL))

    gradients = torch.autograd.grad(loss(), low.parameters(), allow_unused=True)
    checked = 0
    for parameter, gradient in zip(low.parameters(), gradients, strict=True):
        if gradient is None:
            continue
        # Along the gradient itself the slope is its norm.
        direction = gradient / gradient.norm().clamp_min(1e-12)
        slopes = []
        # By what the loss's float32 noise allows but its kinks do not show.
        step = min(1e-2, 2e-4 / float(gradient.norm().clamp_min(1e-3)))
        for size in (step, -step):
            with torch.no_grad():
                parameter.add_(size * direction)
                slopes.append(float(loss()) / size)
                parameter.sub_(size * direction)
        assert sum(slopes) / 2 == pytest.approx(float(gradient.norm()), rel=0.1, abs=1e-3)
        checked += 1
    assert checked >= 8


def test_an_update_that_is_not_finite_is_left_to_be_refused() -> None:
    env = make(SELECTION, num_edits=3)
    low = rehearsing(env, step_size=1e36, look_ahead=True)
    env.use_low_level(low)
    env.reset(seed=0)
    updates = low.compute(env.episode.observe(), ALL)
    with pytest.raises(NonFiniteUpdateError):
        env.apply(updates)
    _, reward, ended, _, info = env.apply(updates, rule_made=True)
    assert (reward, ended, info["error_type"]) == (-10.0, True, StepError.NON_FINITE_UPDATE)


def test_bad_settings_are_refused() -> None:
    env = make(SELECTION)
    with pytest.raises(SettingsError, match="facts and probes must be"):
        Rehearsal(env.llm, facts=-1)


def test_no_multiplier_no_update() -> None:
    env = make(SELECTION, num_edits=3)
    low = rehearsing(env)
    env.use_low_level(low)
    env.reset(seed=0)
    env.step(np.ones(L, np.int8))
    gates = torch.zeros(L)
    gates[2] = 1.0
    capture = env.episode.observe()
    random = low._rng.bit_generator.state
    gated = low.compute(capture, ALL, gates)
    low._rng.bit_generator.state = random
    plain = low.compute(capture, ALL)
    for layer, (one, two) in enumerate(zip(gated, plain, strict=True)):
        assert one is not None
        assert two is not None
        wanted = two.dense() if layer == 2 else torch.zeros_like(two.dense())
        torch.testing.assert_close(one.dense(), wanted)


def test_a_gate_of_zero_has_the_slope_of_the_whole_update() -> None:
    """Without looking ahead an update is linear in its gate, the rehearsed part and all."""
    env = make(SELECTION, num_edits=3)
    low = rehearsing(env, look_ahead=False)
    env.use_low_level(low)
    env.reset(seed=0)
    env.step(np.ones(L, np.int8))
    capture = env.episode.observe()
    random = low._rng.bit_generator.state
    gates = torch.zeros(L)
    gates[2] = 1.0
    gates.requires_grad_(True)
    made = low.compute(capture, ALL, gates)
    low._rng.bit_generator.state = random
    whole = low.compute(capture, ALL)
    total = torch.zeros(())
    wanted = []
    for layer, (one, two) in enumerate(zip(made, whole, strict=True)):
        assert one is not None
        assert two is not None
        weights = torch.randn(one.dense().shape, generator=torch.Generator().manual_seed(layer))
        total = total + (weights * one.dense()).sum()
        wanted.append((weights * two.dense()).sum().detach())
    (slopes,) = torch.autograd.grad(total, gates)
    torch.testing.assert_close(slopes, torch.stack(wanted), rtol=1e-4, atol=1e-8)


def test_a_prompt_is_rehearsed_with_its_latest_answer() -> None:
    env = make(SELECTION, num_edits=None)
    low = rehearsing(env)
    first, second = env.requests[:2]
    for request, answer in ((first, first.answer), (second, second.answer), (first, second.answer)):
        low.observe(env.llm.read(env.llm.encode(request.prompt, answer)).capture())
    found = [(prompt.prompt, prompt.answer) for prompt in low._past]
    encoded = env.llm.encode(first.prompt, second.answer)
    other = env.llm.encode(second.prompt, second.answer)
    assert found == [(other.prompt, other.answer), (encoded.prompt, encoded.answer)]


def test_what_is_rehearsed_follows_from_the_seed_of_the_episode() -> None:
    env = make(SELECTION, num_edits=None)
    low = rehearsing(env, probes=3)

    def drawn(seed: int) -> list[str]:
        low.seed(seed)
        low.reset()
        return [prompt.prompt for _ in range(3) for prompt in low._draw(low._bank, 3)]

    one, again, other = drawn(1), drawn(1), drawn(2)
    assert one == again
    assert one != other


def test_a_calibration_that_fails_leaves_the_old_one() -> None:
    env = make(SELECTION)
    low = rehearsing(env)
    before = {k: torch.as_tensor(v) for k, v in low.state_dict().items() if k != "bank"}

    def broken() -> Any:
        yield probes(env, 1)[0]
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        low.calibrate(broken())
    bank = low._bank
    assert bank
    assert all(
        torch.equal(before[name], torch.as_tensor(low.state_dict()[name])) for name in before
    )
    wrong = {**low.state_dict(), "bank": []}
    del wrong[next(name for name in before if not name.startswith("calibration"))]
    with pytest.raises(RuntimeError):
        low.load_state_dict(wrong)
    assert low._bank == bank


def test_training_leaves_out_what_an_evaluation_asks(tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    rows = [
        {"prompt": r.prompt, "answer": r.answer, "subject": r.subject}
        for r in make(SELECTION).requests[:30]
    ]
    kept.write_text(json.dumps(rows))
    seen: list[str] = []
    own = Rehearsal.calibrate

    def noted(self: Rehearsal, captures: Any) -> None:
        found = list(captures)
        seen.extend(capture.prompt.prompt for capture in found)
        own(self, found)

    run = TrainingRun(agent="random-layers+rehearsal", model="tiny", exclude=str(kept))
    settings = TrainSettings(
        episodes=1, edits_per_episode=2, evaluation_edits=0, calibration=500, held_out=0.0
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rehearsal, "calibrate", noted)
        train(run, settings, tmp_path / "out", progress=False)
    assert seen
    assert not {row["prompt"] for row in rows} & set(seen)


def test_options_tried_from_one_state_share_their_first_rehearsal() -> None:
    env = make(SELECTION, num_edits=3, max_steps_per_edit=1)
    low = rehearsing(env)
    env.use_low_level(low)
    env.reset(seed=0)
    calls = []
    own = env.llm.gradients

    def counted(prompts: Any, loss: Any) -> GradientRows:
        calls.append(len(prompts))
        return own(prompts, loss)

    env.llm.gradients = counted  # type: ignore[method-assign]
    env.step(np.ones(L, np.int8))
    state = env.save_state()
    masks = [np.eye(L, dtype=np.int8)[i] for i in range(3)]
    shared = []
    for mask in masks:
        env.restore_state(state)
        shared.append(roll(env, [mask]))
    assert len(calls) == 2
    for mask, wanted in zip(masks, shared, strict=True):
        env.restore_state(state)
        low._latest = None
        assert roll(env, [mask]) == wanted
    # Other weights, same prompts: computed again.
    assert len(calls) == 5


def test_looking_ahead_mends_what_the_facts_own_update_damages() -> None:
    """What is added is the correction found once the fact's own update was written."""
    env = make(SELECTION, num_edits=3)
    low = rehearsing(env, look_ahead=True, end_answers=True, largest=1e9)
    env.use_low_level(low)
    env.reset(seed=0)
    env.step(np.ones(L, np.int8))
    capture = env.episode.observe()
    asked: list[Any] = []
    own = env.llm.gradients

    def noted(prompts: Any, loss: Any, updates: Any = None) -> GradientRows:
        asked.append((prompts, loss))
        return own(prompts, loss, updates)

    env.llm.gradients = noted  # type: ignore[method-assign]
    whole = low.propose(capture, ALL)
    alone = [None if u is None else u.detach() for u in Hypernetwork.compute(low, capture, ALL)]
    ((prompts, loss),) = asked
    env.llm.commit(alone)
    wanted = low.correct(own(prompts, loss), ALL)
    for a, b, c in zip(whole, alone, wanted, strict=True):
        assert a is not None
        assert b is not None
        assert c is not None
        torch.testing.assert_close(a.dense() - b.dense(), c.dense().detach(), rtol=2e-3, atol=1e-6)


def test_rehearsed_answers_can_end() -> None:
    env = make(SELECTION, num_edits=3)
    low = rehearsing(env, facts=1, probes=1, end_answers=True)
    env.use_low_level(low)
    env.reset(seed=0)
    seen: list[Any] = []
    own = env.llm.gradients

    def noted(prompts: Any, loss: Any) -> GradientRows:
        seen.append(prompts)
        return own(prompts, loss)

    env.llm.gradients = noted  # type: ignore[method-assign]
    facts = [fact.prompt for fact in env.episode.facts]
    env.step(np.ones(L, np.int8))
    env.step(np.ones(L, np.int8))
    end = env.llm.tokenizer.eos_token_id
    first, last = seen[0], seen[-1]
    assert [p.answer_ids for p in first[:-1]] == [(*facts[0].answer_ids, end)]
    assert [p.answer_ids for p in last[:-1]] == [
        (*facts[1].answer_ids, end),
        (*facts[0].answer_ids, end),
    ]
    assert first[-1] in low._bank
    assert facts[0].answer_ids[-1] != end


def test_a_unit_is_remembered_prompt_by_prompt_and_not_rehearsed_while_it_is_edited() -> None:
    env = make(SELECTION, num_edits=4)
    low = rehearsing(env, facts=9, probes=0)
    env.use_low_level(low)
    env.reset(seed=0)
    prompts = [fact.prompt for fact in env.episode.facts]
    for unit in (prompts[:1], prompts[1:3], prompts[1:3], prompts[:2]):
        capture = env.llm.read(*unit).capture()
        low.observe(capture)
    assert list(low._past) == [prompts[2], *prompts[:2]]
    asked: list[Any] = []
    own = env.llm.gradients

    def noted(prompts: Any, loss: Any) -> GradientRows:
        asked.append(prompts)
        return own(prompts, loss)

    env.llm.gradients = noted  # type: ignore[method-assign]
    low.propose(capture, ALL)
    assert asked == [[prompts[2]]]


def test_what_is_rehearsed_is_never_much_larger_than_the_fact() -> None:
    """Ends of answers are far from what the tiny model gives: a bound keeps it in one piece."""
    env = make(SELECTION, num_edits=6)
    low = rehearsing(env, end_answers=True, ridge=0.1)
    env.use_low_level(low)
    env.reset(seed=0)
    for _ in range(6):
        capture = env.episode.observe()
        whole = low.propose(capture, ALL)
        alone = Hypernetwork.compute(low, capture, ALL)
        for a, b in zip(whole, alone, strict=True):
            assert a is not None
            assert b is not None
            rest = (a.dense() - b.dense()).detach()
            assert float(rest.norm()) <= 2.001 * float(b.dense().detach().norm())
        *_, info = env.step(np.ones(L, np.int8))
    assert info["metrics"]["efficacy"] == 1.0
    assert info["metrics"]["agreement"] > 0.5
