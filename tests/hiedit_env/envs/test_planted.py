"""``hiedit/Planted-v1``: the oracle against plain trying, and what compare tells of it."""

from __future__ import annotations

import copy
import json
import pickle
from itertools import product
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import hiedit_env  # noqa: F401
from hiedit_agents.hierarchy.options import HierarchicalAgent, UntrainedChoice
from hiedit_agents.hierarchy.rehearsal import Rehearsal
from hiedit_agents.hierarchy.simple import OracleAgent
from hiedit_agents.registry import make_agent
from hiedit_benchmarks.comparison.compare import compare
from hiedit_benchmarks.comparison.episode import FinishedEdit, PlayedEpisode, play
from hiedit_benchmarks.comparison.settings import CompareSettings
from hiedit_env.datasets.load import load_requests
from hiedit_env.envs.planted import Oracle, Planted
from hiedit_env.errors import SettingsError
from hiedit_env.rules.base import UpdateRule
from hiedit_env.testing import assert_only_layers_changed, assert_reward_terms_sum


def make(**arguments: Any) -> Planted:
    env = gym.make("hiedit/Planted-v1", disable_env_checker=True, **{"num_edits": 6, **arguments})
    inner = env.unwrapped
    assert isinstance(inner, Planted)
    return inner


def true_layers(env: Planted) -> np.ndarray[Any, Any]:
    return np.array([n in env.episode.fact.request.true_layers for n in env.llm.names], np.int8)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"intrinsic": True}, {"update_rule": "decorrelated"}, {"max_steps_per_edit": 1}],
    ids=["plain", "intrinsic", "a rule with statistics", "one step"],
)
def test_the_oracle_says_what_every_option_is_paid(arguments: dict[str, Any]) -> None:
    env = make(**arguments)
    env.reset(seed=0)
    # From an edited model with statistics, not only from the first fact.
    for _ in range(2):
        env.step(np.array([0, 1, 0, 0, 1, 0], np.int8))
    oracle = env.oracle()
    state = env.save_state()
    gained = {}
    for option in product((0, 1), repeat=6):
        gained[option] = env.step(np.array(option, np.int8))[1]
        env.restore_state(state)
        assert oracle.reward_of(np.array(option)) == pytest.approx(gained[option], abs=1e-4)
    assert oracle.reward == pytest.approx(max(gained.values()), abs=1e-4)
    assert oracle.reward_of(oracle.layers) == oracle.reward


def test_the_oracle_is_exact_with_a_low_level_that_runs_the_model_itself() -> None:
    env = make(layers="model.layers.{2-4}.mlp.down_proj", max_steps_per_edit=3)
    low = Rehearsal(env.llm, facts=2, probes=0, step_size=0.02, end_answers=True)
    env.use_low_level(low)
    env.reset(seed=0)
    env.step(np.ones(3, np.int8))
    oracle, state = env.oracle(), env.save_state()
    several = 0
    for option in product((0, 1), repeat=3):
        _, gained, _, _, info = env.step(np.array(option, np.int8))
        env.restore_state(state)
        # What is rehearsed at a later step depends on what the steps before have written.
        several += info["edit_steps"] > 1
        assert oracle.reward_of(np.array(option)) == pytest.approx(gained, abs=1e-5)
    assert several >= 4


def test_among_equal_options_the_oracle_names_the_one_of_fewest_layers() -> None:
    # Layers that do not react cost nothing here, so that half of all options are equally good.
    env = make(reward_weights={"sparsity": 0.0}, num_edits=4)
    env.reset(seed=0)
    for _ in range(4):
        oracle, true = env.oracle(), true_layers(env)
        equal = oracle.rewards >= oracle.rewards.max() - 1e-5
        assert equal.sum() > 1
        assert (oracle.layers == true).all()
        env.step(true)


def test_asking_leaves_no_trace() -> None:
    runs = []
    for asked in (False, True):
        env = make(update_rule="decorrelated")
        env.reset(seed=1)
        env.step(np.ones(6, np.int8))
        before = copy.deepcopy(env.np_random.bit_generator.state), env.llm.weights_fingerprint()
        if asked:
            first = env.oracle()
            assert env.oracle() is first  # kept until the weights change
        assert before == (env.np_random.bit_generator.state, env.llm.weights_fingerprint())
        runs.append(env.step(np.array([0, 1, 1, 0, 0, 0], np.int8)))
        if asked:
            assert env.oracle() is not first
    (seen, gained, _, _, told), (seen_asked, gained_asked, _, _, told_asked) = runs
    assert np.array_equal(seen, seen_asked)
    assert gained == gained_asked
    assert told["weights_fingerprint"] == told_asked["weights_fingerprint"]


def test_the_true_layer_is_the_best_option_and_others_are_far_worse() -> None:
    env = make(num_edits=12, dataset="planted-facts-test")
    _, info = env.reset(seed=2)
    assert info["true_layers"].tolist() == true_layers(env).tolist()
    best, lost, random = 0, [], []
    ended = False
    while not ended:
        true, oracle = true_layers(env), env.oracle()
        best += bool((oracle.layers == true).all())
        lost.append(oracle.reward - oracle.reward_of(true))
        singles = [oracle.reward_of(row) for row in np.eye(6)]
        random.append(oracle.reward - float(np.mean(singles)))
        step = env.step(true)
        assert_reward_terms_sum(step)
        # Those of the fact that the observation shows: the next one.
        assert step[4]["true_layers"].tolist() == true_layers(env).tolist()
        ended = step[2]
    assert best == 12
    assert np.mean(lost) == 0
    assert np.mean(random) > 1


def test_no_edit_at_home_overshoots() -> None:
    # Of this fact the gradient at home is so steep that larger steps would miss its answer.
    [request] = [r for r in load_requests("planted-facts-test") if r.prompt == "Galdis lives in"]
    env = make()
    env.reset(seed=0, options={"requests": [request]})
    oracle = env.oracle()
    assert (oracle.layers == true_layers(env)).all()
    assert oracle.reward > -0.5


def test_steps_mean_what_they_mean_elsewhere() -> None:
    env = make(num_edits=3)
    env.reset(seed=0)
    # Where a layer does not react, what is written is zero.
    assert_only_layers_changed(env, true_layers(env))
    check_env(make(num_edits=3), skip_render_check=True)
    sb3_check_env(make(num_edits=3))
    again = pickle.loads(pickle.dumps(make(num_edits=2)))
    assert again.reset(seed=5)[0].tolist() == make(num_edits=2).reset(seed=5)[0].tolist()


def test_episodes_of_the_vector_environment_have_oracles_of_their_own() -> None:
    envs = gym.make_vec("hiedit/Planted-v1", 2, "vector_entry_point", num_edits=2)
    envs.reset(seed=3)
    envs.step(np.array([[0, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]], np.int8))
    for i, episode in enumerate(envs.unwrapped.envs):
        alone = make(num_edits=2)
        alone.reset(seed=3 + i)
        alone.step(np.array([0, 1, 0, 0, 0, 0] if i == 0 else [1] * 6, np.int8))
        np.testing.assert_allclose(episode.oracle().rewards, alone.oracle().rewards, atol=1e-3)


def test_facts_without_a_true_layer_and_too_many_layers_are_refused() -> None:
    with pytest.raises(SettingsError, match="true_layers"):
        make(dataset="tiny-facts")
    env = make(layers="model.layers.*.mlp.*_proj")
    env.reset(seed=0)
    with pytest.raises(SettingsError, match="at most 12"):
        env.oracle()


def test_the_oracle_agent_needs_a_world_that_knows() -> None:
    agent = make_agent("oracle")
    assert isinstance(agent, OracleAgent)
    env = gym.make("hiedit/LayerSelection-v1", num_edits=2)
    with pytest.raises(SettingsError, match="--model planted"):
        agent.reset(env, seed=0)


def finished(reward: float, best: float, written: list[int], steps: int = 1) -> FinishedEdit:
    """An edit of a fact that lives in the second of two layers."""
    true = np.array([False, True])
    rewards = np.array([best - 3.0, best - 2.0, best, best - 1.0])
    return FinishedEdit(
        np.array(written, bool), steps, reward, {}, Oracle(true, best, rewards), true
    )


def test_regret_is_what_the_oracles_episode_was_paid_more() -> None:
    edits = (
        finished(0.0, 1.0, [1, 1]),
        finished(1.0, 1.0, [0, 1]),
        finished(-1.0, -1.0, [1, 0]),  # in a ruined episode nothing helps
        finished(1.0, 1.0, [0, 0], steps=0),  # was answered: no choice to be made
    )
    told = PlayedEpisode((), edits, None, 1.0).against_oracle([1.0, 2.0, 1.0, 1.0])
    assert told == {
        "regret": pytest.approx((1 + 1 + 2 + 0) / 4),
        "one_step_regret": pytest.approx(1 / 4),
        "true_layer_share": pytest.approx(200 / 3),
        "true_layer_exact_share": pytest.approx(100 / 3),
        "true_layer_best_share": 100.0,
    }
    assert PlayedEpisode((), edits, None, 1.0).against_oracle(None) == {}


def test_ending_an_episode_early_lowers_no_regret() -> None:
    edits = (finished(1.0, 1.0, [0, 1]),)
    told = PlayedEpisode((), edits, "numerical_collapse", 1.0, -10.0).against_oracle(
        [1.0, 1.0, 1.0]
    )
    assert told["regret"] == pytest.approx((0 + 11 + 11) / 3)
    told = PlayedEpisode((), (), "numerical_collapse", 1.0, -10.0).against_oracle([1.0, 1.0])
    assert told["regret"] == pytest.approx(11.0)
    assert np.isnan(told["one_step_regret"])


class Exploding(UpdateRule):
    """Writes what is not finite from the second fact on."""

    name = "exploding"
    default_step_size = 1.0

    def reset(self) -> None:
        self.seen = 0

    def observe(self, capture: Any) -> None:
        self.seen += 1

    def statistics(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_statistics(self, statistics: Any) -> None:
        self.seen = statistics["seen"]

    def _factors(self, group: int, places: list[int], keys: Any, gradients: Any) -> Any:
        return keys, gradients * (0.0 if self.seen == 1 else np.inf)


def test_an_episode_that_ends_early_is_played_with_what_was_paid_there() -> None:
    env = gym.make("hiedit/Planted-v1", num_edits=4, max_steps_per_edit=1)
    inner = env.unwrapped
    assert isinstance(inner, Planted)
    rule = Exploding(inner.llm.shapes, inner.llm.device)
    agent = HierarchicalAgent("exploding", UntrainedChoice("all-layers", 6), rule)
    episode = play(env, agent, 0, progress=False)
    assert (len(episode.edits), episode.error_type) == (1, "non_finite_update")
    assert episode.ending == -10.0
    best = [0.0] * 4
    assert episode.against_oracle(best)["regret"] > 7.5


def test_compare_reports_regret_and_the_true_layer(tmp_path: Path) -> None:
    settings = CompareSettings(
        model="planted",
        dataset="planted-facts-test",
        num_edits=5,
        update_rule="gradient",
    )
    compare(settings, ["oracle", "all-layers"], [0], tmp_path / "out", progress=False)
    rows = [json.loads(x) for x in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    found = {row["agent"]: row["metrics"] for row in rows}
    assert found["oracle"]["regret"] == pytest.approx(0.0, abs=1e-4)
    assert found["oracle"]["true_layer_exact_share"] == 100.0
    assert found["all-layers"]["true_layer_share"] == 100.0
    assert found["all-layers"]["true_layer_exact_share"] == 0.0
    assert found["all-layers"]["regret"] > 1.0
    for metrics in found.values():
        # Nothing is better than the best at one's own states.
        assert metrics["one_step_regret"] > -1e-4
    edits = {
        name: json.loads((tmp_path / "out" / "runs" / f"{name}-seed0.json").read_text())["edits"]
        for name in found
    }
    gained = {name: np.mean([edit["reward"] for edit in rows]) for name, rows in edits.items()}
    assert found["oracle"]["true_layer_best_share"] == 100.0
    for name, metrics in found.items():
        assert metrics["regret"] == pytest.approx(gained["oracle"] - gained[name], abs=1e-6)
