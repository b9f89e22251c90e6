"""The study of constant policies plays every mask, and reports what ``step`` gives."""

from __future__ import annotations

import json

import gymnasium as gym
import numpy as np
import pytest

from hiedit_agents.bandits.worlds import masks_of
from hiedit_benchmarks.studies.constant_policies import Options, main, play
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


def test_it_reports_rankings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--num-edits", "1", "--seeds", "1", "--top", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["policies"] == 64
    for version in (1, 2):
        ranks = [row[f"rank_v{version}"] for row in found[f"best_v{version}"]]
        assert ranks[0] == 1
        assert len(ranks) == 2
    assert found["nothing"]["layers"] == "000000"
    assert found["nothing"]["v2"] == pytest.approx(0.0, abs=1e-3)
    assert found["collapse_at_once"] == {"v1": -10.0, "v2": -10.0}


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
