"""The study of constant policies plays every mask, and reports what ``step`` gives."""

from __future__ import annotations

import json
from functools import partial

import gymnasium as gym
import numpy as np
import pytest

from hiedit_agents.bandits.worlds import masks_of
from hiedit_benchmarks.studies.constant_policies import Options, main, play
from hiedit_benchmarks.worlds.headroom import play as play_one
from hiedit_env.errors import SettingsError


def test_every_subset_is_played_once_and_nothing_first() -> None:
    masks = masks_of(3)
    assert masks.shape == (8, 3)
    assert masks[0].sum() == 0
    assert masks[-1].sum() == 3
    assert len({tuple(mask) for mask in masks}) == 8


@pytest.mark.parametrize("version", [1, 2])
def test_a_policy_is_rewarded_what_its_own_episode_gives(version: int) -> None:
    masks, found = play(Options(num_edits=2), version, 1)  # type: ignore[arg-type]
    env = gym.make(f"hiedit/LayerSelection-v{version}", num_edits=2).unwrapped
    for i in (0, 9, 63):
        env.reset(seed=1)
        steps = [env.step(masks[i]) for _ in range(2)]
        assert found["reward"][i] == pytest.approx(np.mean([s[1] for s in steps]), abs=1e-3)
        shares = [s[4]["metrics"]["efficacy"] for s in steps]
        assert found["efficacy"][i] == pytest.approx(np.mean(shares))


def test_an_outcome_is_what_version_1_pays_with_the_prices_of_version_2() -> None:
    masks, one = play(Options(num_edits=3), 1, 0)
    _, two = play(Options(num_edits=3), 2, 0)
    count = masks.sum(1)
    # Version 1 pays final terms, and 0.1 for the share of the six layers that is left alone. The
    # prices of version 2 are 0.1 for a layer and 0.3 for a step that writes.
    written = np.where(count > 0, one["steps"], 0)
    expected = one["reward"] - 0.1 * (1 - count / 6) - 0.1 * count - 0.3 * written
    assert not one["collapsed"].any()
    np.testing.assert_allclose(two["outcome"], expected, atol=2e-3)
    # Rewards of version 2 count from the state before, so they say something else.
    assert np.abs(two["reward"] - two["outcome"]).min() > 1


def test_what_is_lost_counts_as_unedited_minus_the_price(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gym, "make_vec", partial(gym.make_vec, step_size=1e30))
    masks, found = play(Options(num_edits=3), 2, 0)
    assert found["collapsed"].sum() == len(masks) - 1
    # Version 1 pays the final terms of facts that are left alone, and 0.1 for the layers.
    alone = gym.make("hiedit/LayerSelection-v1", num_edits=3)
    alone.reset(seed=0)
    untouched = [float(alone.step(masks[0])[1]) - 0.1 for _ in range(3)]
    assert found["outcome"][0] == pytest.approx(np.mean(untouched), abs=1e-3)
    np.testing.assert_allclose(found["outcome"][1:], np.mean(untouched) - 10, atol=1e-3)
    env = gym.make("hiedit/LayerSelection-v2", num_edits=3, step_size=1e30)
    turns = iter([masks[0], masks[63]])
    outcomes = play_one(env, lambda inner, seen: next(turns), 0)
    assert outcomes == pytest.approx(np.array(untouched) - [0, 10, 10], abs=1e-3)


def test_it_reports_rankings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--num-edits", "1", "--seeds", "1", "--top", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["policies"] == 64
    for name in ("v1", "outcome_v2"):
        ranks = [row[f"rank_{name}"] for row in found[f"best_{name}"]]
        assert ranks[0] == 1
        assert len(ranks) == 2
    assert found["nothing"]["layers"] == "000000"
    assert found["nothing"]["reward_v2"] == pytest.approx(0.0, abs=1e-3)
    # Of one fact nothing but the reward for the layers left alone differs.
    assert found["nothing"]["outcome_v2"] == pytest.approx(found["nothing"]["v1"] - 0.1, abs=2e-3)
    lost = {"v1": -10.0, "outcome_v2": found["nothing"]["outcome_v2"] - 10}
    assert found["collapse_at_once"] == pytest.approx(lost, abs=2e-3)


def test_too_many_layers_are_refused() -> None:
    with pytest.raises(SettingsError, match="candidate layers"):
        masks_of_smollm()


def masks_of_smollm() -> None:
    import hiedit_benchmarks.studies.constant_policies as study

    old, study.MOST_LAYERS = study.MOST_LAYERS, 5
    try:
        play(Options(num_edits=1), 1, 0)
    finally:
        study.MOST_LAYERS = old
