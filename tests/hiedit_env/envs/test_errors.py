"""What the environments refuse, in words, and that nothing has changed afterwards."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded

from hiedit_env.datasets.requests import Request
from hiedit_env.envs.lifelong_edit import LifelongEdit
from hiedit_env.envs.reward_weights import DEFAULT_WEIGHTS, reward_weights
from hiedit_env.errors import ActionError, DatasetError, HieditError, PromptError, SettingsError
from tests.support.episodes import IDS, LIFELONG, SELECTION, STEP_SIZE, L, act, make, roll, shown

# Actions

SIZES = np.zeros(L, np.float32)
MASK = np.ones(L, np.int8)
BAD_LAYERS: list[tuple[Any, str]] = [
    (np.ones(L - 1, np.int8), r"\(6,\).*\(5,\)"),
    (np.ones((1, L), np.int8), r"\(6,\).*\(1, 6\)"),
    (np.full(L, 2, np.int8), r"0 and 1.*\[2 2 2 2 2 2\]"),
    (np.full(L, -1, np.int8), r"0 and 1.*-1"),
    (np.full(L, 0.5, np.float32), r"0 and 1, got float32.*0\.5"),
    (3, r"\(6,\).*\(\)"),
    ("111111", "array of numbers.*111111"),
    (None, "array of numbers.*None"),
    ([[1], [1, 1]], "not an array of numbers"),
]
BAD_SIZES: list[tuple[Any, str]] = [
    (np.zeros(L + 1, np.float32), r"\(6,\).*\(7,\)"),
    (np.full(L, 1.5, np.float32), r"from -1 to 1.*1\.5"),
    (np.full(L, np.nan, np.float32), r"finite.*nan"),
    (np.full(L, -np.inf, np.float32), r"finite.*inf"),
    (np.zeros(L, bool), r"from -1 to 1.*bool"),
    (np.zeros(L, complex), r"array of numbers.*0\.j"),
    (torch.zeros(L, requires_grad=True), "not an array of numbers.*requires_grad"),
]
BAD_DICTS: list[tuple[Any, str]] = [
    (MASK, "'layers' and 'step_size'.*ndarray"),
    ({"layers": MASK}, r"'layers' and 'step_size'.*\['layers'\]"),
    ({"layers": MASK, "step_size": SIZES, "more": 1}, r"'layers' and 'step_size'.*'more'"),
    ({"layers": MASK, 3: SIZES}, r"'layers' and 'step_size'.*'3'"),
]


BOTH = {"layers": MASK, "step_size": SIZES}
#: Actions of another kind → the wrapper or id that takes them.
ADVICE: list[tuple[str, Any, str]] = [
    (SELECTION, np.full(L, 0.5, np.float32), "BoxLayers takes L numbers"),
    (SELECTION, 3, "DiscreteSubsets and SequentialSelection take one whole number"),
    (SELECTION, np.int64(3), "DiscreteSubsets and SequentialSelection take one whole number"),
    (SELECTION, BOTH, "hiedit/LifelongEdit-v1 takes layers and step sizes"),
    (SELECTION, np.zeros(2 * L, np.float32), "under hiedit_env.wrappers.FlattenAction"),
    (LIFELONG, MASK, "FixedStepSize takes the layers alone"),
    (LIFELONG, SIZES, "FixedLayers takes the step sizes alone"),
    (LIFELONG, 3, "FixedStepSize, and then DiscreteSubsets or SequentialSelection"),
    (LIFELONG, np.zeros(2 * L, np.float32), "FlattenAction takes one flat array"),
    (STEP_SIZE, BOTH, "hiedit/LifelongEdit-v1 takes layers and step sizes"),
    (STEP_SIZE, MASK.astype(bool), "hiedit/LayerSelection-v1 takes layers"),
    (STEP_SIZE, np.zeros(2 * L, np.float32), "under hiedit_env.wrappers.FlattenAction"),
]


@pytest.mark.parametrize("name", IDS)
def test_an_action_of_another_kind_is_told_where_it_fits(name: str) -> None:
    env = make(name)
    env.reset(seed=0)
    for _, action, words in (case for case in ADVICE if case[0] == name):
        with pytest.raises(ActionError, match=words):
            env.step(action)
    # An action that is merely wrong is not sent elsewhere.
    with pytest.raises(ActionError) as caught:
        env.step(np.ones((1, L), np.int8) if name != LIFELONG else {**BOTH, "layers": [1]})
    assert "wrappers" not in str(caught.value)


@pytest.mark.parametrize("name", IDS)
def test_bad_actions_are_refused_and_change_nothing(name: str) -> None:
    env = make(name)
    env.reset(seed=0)
    before = env.llm.weights_fingerprint()
    cases: dict[str, list[tuple[Any, str]]] = {
        LIFELONG: [
            *(({"layers": bad, "step_size": SIZES}, words) for bad, words in BAD_LAYERS),
            *(({"layers": MASK, "step_size": bad}, words) for bad, words in BAD_SIZES),
            *BAD_DICTS,
        ],
        SELECTION: BAD_LAYERS,
        STEP_SIZE: BAD_SIZES,
    }
    for action, words in cases[name]:
        with pytest.raises(ActionError, match=words):
            env.step(action)
    assert env.episode.steps == 0
    assert env.llm.weights_fingerprint() == before
    # Nor has what follows.
    again = make(name)
    again.reset(seed=0)
    assert roll(env, [act(name)]) == roll(again, [act(name)])


def test_plain_lists_and_booleans_are_actions_too() -> None:
    env = make(LIFELONG)
    results = []
    for layers in (MASK.tolist(), MASK.astype(bool), MASK.astype(np.int64), tuple(MASK)):
        env.reset(seed=0)
        results.append(shown(env.step({"layers": layers, "step_size": [0] * L})))
    assert results == results[:1] * 4


# Errors


@pytest.mark.parametrize("name", IDS)
def test_a_step_before_reset_and_after_the_end_is_refused(name: str) -> None:
    env = make(name, num_edits=1, max_steps_per_edit=1)
    doors = [
        lambda: env.step(act(name)),
        lambda: env.apply((None,) * L),
        lambda: env.loss((None,) * L),
        lambda: env.capture,
    ]
    for door in (*doors, env.save_state):
        with pytest.raises(ResetNeeded, match="reset"):
            door()
    env.reset(seed=0)
    _, _, terminated, _, info = env.step(act(name))
    assert terminated
    assert info["edit_over"]
    for door in doors:
        with pytest.raises(ResetNeeded, match="ended"):
            door()
    env.save_state()  # Looking back is allowed.
    env.reset(seed=0)
    env.step(act(name))


BAD_SETTINGS: list[tuple[dict[str, Any], type[HieditError], str]] = [
    ({"model": torch.nn.Linear(1, 1)}, SettingsError, "Linear.*live model"),
    ({"num_edits": 0}, SettingsError, "num_edits.*0"),
    ({"num_edits": 100_000}, DatasetError, "100000"),
    ({"dataset": 3}, SettingsError, "dataset.*name, a path or None.*3"),
    ({"max_steps_per_edit": 0}, SettingsError, "max_steps_per_edit.*≥ 1.*0"),
    ({"max_steps_per_edit": 2.5}, SettingsError, r"max_steps_per_edit.*whole.*2\.5"),
    ({"max_steps_per_edit": True}, SettingsError, "max_steps_per_edit.*whole.*True"),
    ({"retention_window": -1}, SettingsError, "retention_window.*≥ 0.*-1"),
    ({"retention_window": 1.5}, SettingsError, r"retention_window.*whole.*1\.5"),
    ({"retention_decay": 0.0}, SettingsError, r"retention_decay.*\(0, 1\].*0\.0"),
    ({"retention_decay": "a"}, SettingsError, r"retention_decay.*\(0, 1\].*'a'"),
    ({"reward": "luck"}, SettingsError, "reward.*'loss'.*'luck'"),
    ({"reward_weights": {"luck": 1.0}}, SettingsError, "'luck'.*collapse"),
    ({"reward_weights": {"edit": float("nan")}}, SettingsError, "'edit'.*≥ 0.*nan"),
    ({"reward_weights": {"edit": float("inf")}}, SettingsError, "'edit'.*finite.*inf"),
    ({"reward_weights": {"edit": -1.0}}, SettingsError, "'edit'.*-1"),
    ({"reward_weights": {"edit": "a"}}, SettingsError, "'edit'.*number.*'a'"),
    ({"reward_weights": {"edit": 10**400}}, SettingsError, "'edit'.*finite.*1000"),
    ({"step_size": 10**400}, SettingsError, "step_size.*positive number, got 1000.*finite"),
    (
        {"update_rule_settings": {"ridge": 10**400}, "update_rule": "ridge"},
        SettingsError,
        "1000.*;",
    ),
    ({"reward_weights": 3}, SettingsError, "reward_weights.*dict.*3"),
    ({"locality_reference": "next"}, SettingsError, "locality_reference.*'next'"),
    ({"intrinsic": "no"}, SettingsError, "intrinsic.*True or False.*'no'"),
    ({"shuffle": 1}, SettingsError, "shuffle.*True or False.*1"),
    ({"stop_when_answered": None}, SettingsError, "stop_when_answered.*True or False.*None"),
    ({"trust_remote_code": "False"}, SettingsError, "trust_remote_code.*True or False"),
    ({"update_rule": "magic"}, SettingsError, "'magic'.*decorrelated"),
    ({"update_rule": 3}, SettingsError, "update_rule.*'module:Class'.*3"),
    ({"update_rule": "no.such.module:Rule"}, SettingsError, "cannot be imported"),
    ({"update_rule": "hiedit_env.rules.base:NoRule"}, SettingsError, "cannot be imported"),
    ({"update_rule_settings": 3}, SettingsError, "update_rule_settings.*dict.*3"),
    ({"update_rule_settings": {"luck": 1}}, SettingsError, "'outer-product'.*luck"),
    ({"step_size": 0.0}, SettingsError, r"step_size.*0\.0"),
    (
        {"step_size": 0.1, "update_rule_settings": {"step_size": 0.2}},
        SettingsError,
        r"0\.1.*0\.2.*leave one",
    ),
]


@pytest.mark.parametrize(("settings", "error", "words"), BAD_SETTINGS)
def test_bad_settings_name_the_value_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    error: type[HieditError],
    words: str,
) -> None:
    monkeypatch.setattr("hiedit_env.envs.loading.load_model", forbidden)
    with pytest.raises(error, match=words):
        make(LIFELONG, **settings)


def forbidden(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("the model must not be loaded")


def test_good_settings_load_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hiedit_env.envs.loading.load_model", forbidden)
    numbers = {"max_steps_per_edit": np.int64(2), "retention_window": 0, "retention_decay": 1}
    switches = {"intrinsic": np.True_, "shuffle": False}
    with pytest.raises(AssertionError, match="must not be loaded"):
        make(LIFELONG, reward_weights={"edit": 0, "collapse": np.float32(2)}, **numbers, **switches)


def test_the_weights_of_terms_are_the_given_ones_and_the_rest_by_default() -> None:
    assert reward_weights(None) == DEFAULT_WEIGHTS
    assert reward_weights({"edit": 3}) == {**DEFAULT_WEIGHTS, "edit": 3.0}
    assert DEFAULT_WEIGHTS["edit"] == 1.0


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, 2e-3),  # tuned for the tiny model
        ({"step_size": 0.25}, 0.25),
        ({"update_rule_settings": {"step_size": 0.25}}, 0.25),
        ({"update_rule_settings": {"tokens": "answer"}}, 2e-3),
    ],
)
def test_an_explicit_step_size_wins(given: dict[str, Any], wanted: float) -> None:
    env = make(LIFELONG, **({"step_size": None} | given))
    assert env.episode.rule.step_size == wanted


def test_an_unknown_render_mode_is_refused() -> None:
    # Gymnasium's own "make" warns first.
    with pytest.raises(SettingsError, match=r"render_mode.*rgb_array.*'video'"):
        LifelongEdit(render_mode="video")


@pytest.mark.parametrize(
    "settings", [{"high_level": "magic"}, {"high_level": "random-layers", "layers_per_edit": 7}]
)
def test_bad_high_levels(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=r"magic|7"):
        make(STEP_SIZE, **settings)


@pytest.mark.parametrize(
    "settings", [{"high_level": "magic"}, {"high_level": "random-layers", "layers_per_edit": 0}]
)
def test_bad_high_levels_are_found_before_the_model_is_loaded(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("must not be called")

    monkeypatch.setattr("hiedit_env.envs.loading.load_model", forbidden)
    with pytest.raises(SettingsError, match=r"magic|layers_per_edit"):
        make(STEP_SIZE, **settings)


REQUEST = Request("Belka lives in", "Istrand", "Belka")


REFUSED: list[tuple[Any, type[HieditError], str]] = [
    ({"request": [REQUEST]}, SettingsError, "request.*'requests'"),
    ({"requests": []}, SettingsError, "at least one"),
    ({"requests": 5}, SettingsError, "list of hiedit Requests.*5"),
    ({"requests": REQUEST}, SettingsError, "list of hiedit Requests.*Belka"),
    (["requests"], SettingsError, r"dict.*\['requests'\]"),
    ({"requests": ["Belka lives in"]}, SettingsError, "Requests.*Belka"),
    (
        {"requests": [REQUEST, Request("Belka " * 100, "Istrand", "Belka", source="row 7")]},
        PromptError,
        "row 7.*128",
    ),
]


def test_a_refused_reset_changes_nothing() -> None:
    env, twin = (
        make(STEP_SIZE, high_level="random-layers", max_steps_per_edit=2, num_edits=2)
        for _ in range(2)
    )
    rest = [act(STEP_SIZE)] * 3
    for options, error, words in REFUSED:
        for seed in (None, 5):
            for one in (env, twin):
                one.reset(seed=0)
                one.step(act(STEP_SIZE))
            with pytest.raises(error, match=words):
                env.reset(seed=seed, options=options)
            assert roll(env, rest) == roll(twin, rest)
            assert shown(env.reset()) == shown(twin.reset())
