"""Saving and restoring in any order; actions of any kind change nothing or are carried out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from hiedit_env.envs.base import EditingEnv
from hiedit_env.envs.state import EnvState
from hiedit_env.errors import ActionError
from tests.support.episodes import IDS, LIFELONG, L, act, make
from tests.support.fuzz import JSON, require_one_line
from tests.support.models import all_bits

Seen = tuple[Any, ...]
#: What follows a state: a step of all layers, and where it leads.
_ENVS: dict[str, EditingEnv] = {}


def env_of(name: str) -> EditingEnv:
    if name not in _ENVS:
        _ENVS[name] = make(name, num_edits=4, max_steps_per_edit=2, update_rule="decorrelated")
        _ENVS[name].reset(seed=0)
    return _ENVS[name]


def seen(env: EditingEnv) -> Seen:
    """Everything that can be seen of a state."""
    episode = env.episode
    return (
        env.llm.weights_fingerprint(),
        episode.position,
        episode.steps,
        episode.ended,
        tuple(episode.written.tolist()),
        tuple(sorted(episode.counted.items())),
        str(env.np_random.bit_generator.state),
        len(env.history.records),
    )


class Saving(RuleBasedStateMachine):
    """Steps, saves and restores; a state that is restored is the one that was saved."""

    states: Bundle[tuple[EnvState, Seen]] = Bundle("states")

    def __init__(self) -> None:
        super().__init__()
        self.env = env_of(LIFELONG)
        self.unedited: dict[str, bytes] | None = None

    @initialize(seed=st.integers(0, 3))
    def begin(self, seed: int) -> None:
        self.env.reset(seed=seed)
        self.unedited = all_bits(self.env.llm.model)

    @rule(mask=st.lists(st.sampled_from((0, 1)), min_size=L, max_size=L), size=st.floats(-1, 1))
    def step(self, mask: list[int], size: float) -> None:
        if not self.env.episode.ended:
            self.env.step(act(LIFELONG, mask, size))

    @rule()
    def draw(self) -> None:
        self.env.np_random.random()

    @rule(target=states)
    def save(self) -> tuple[EnvState, Seen]:
        return self.env.save_state(), seen(self.env)

    @rule(state=states)
    def restore(self, state: tuple[EnvState, Seen]) -> None:
        saved, wanted = state
        self.env.restore_state(saved)
        assert seen(self.env) == wanted

    @rule(state=states)
    def twice_the_same(self, state: tuple[EnvState, Seen]) -> None:
        """The same step from the same state leads to the same place, reward and observation."""
        saved, _ = state
        if saved.episode.ended:
            return
        found = []
        for _ in range(2):
            self.env.restore_state(saved)
            observation, reward, *_ = self.env.step(act(LIFELONG))
            found.append((observation.tobytes(), reward, seen(self.env)))
        assert found[0] == found[1]

    @invariant()
    def the_unedited_model_is_below(self) -> None:
        if self.unedited is not None:
            with self.env.llm.unedited():
                assert all_bits(self.env.llm.model) == self.unedited


TestSaving = Saving.TestCase
TestSaving.settings = settings(max_examples=12, stateful_step_count=12)

NUMBERS = st.one_of(
    JSON,
    arrays.arrays(
        st.sampled_from((np.float32, np.int8, np.bool_, np.complex64, np.uint8, np.float64)),
        arrays.array_shapes(min_dims=0, max_dims=2, max_side=L + 1),
    ),
    st.lists(st.sampled_from((0, 1, -1, 0.5, float("nan"), 2**70)), min_size=L, max_size=L),
)


@pytest.mark.parametrize("name", IDS)
@settings(max_examples=40)
@given(action=NUMBERS | st.fixed_dictionaries({"layers": NUMBERS, "step_size": NUMBERS}))
def test_any_action_is_carried_out_or_refused_and_nothing_changed(name: str, action: Any) -> None:
    env = env_of(name)
    env.reset(seed=0)
    before = seen(env)
    try:
        env.step(action)
    except ActionError as error:
        require_one_line(error)
        refused = True
    else:
        refused = False
    assert not refused or seen(env) == before
