"""The computed model of a planted world against arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import hiedit_env  # noqa: F401
from hiedit_env.datasets.difficulty import LEVELS, WorldName
from hiedit_env.datasets.planted import ANSWERS, WORDINGS, make_world
from hiedit_env.envs.planted import Planted
from hiedit_env.errors import OutputError, SettingsError
from hiedit_env.model.planted_world import GAP, make_keys, world_folder, write_world
from hiedit_env.resident.resident import ResidentLLM


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("HIEDIT_CACHE", str(tmp_path_factory.getbasetemp() / "worlds"))


def make(difficulty: str, seed: int = 0, **arguments: Any) -> Planted:
    env = gym.make(
        "hiedit/Planted-v2",
        disable_env_checker=True,
        world_seed=seed,
        difficulty=difficulty,
        **{"num_edits": 4, **arguments},
    )
    inner = env.unwrapped
    assert isinstance(inner, Planted)
    return inner


def logits(llm: ResidentLLM, prompt: str, answer: str) -> torch.Tensor:
    """Of all answers, in the order of ``ANSWERS``."""
    reading = llm.read(llm.encode(prompt, answer))
    return reading.logits[0][torch.tensor([llm.tokenizer.vocab[word] for word in ANSWERS])]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_same_name_same_bytes_and_other_seeds_differ(tmp_path: Path) -> None:
    made = []
    for place, name in enumerate(("planted:crowded:3", "planted:crowded:3", "planted:crowded:4")):
        folder = tmp_path / str(place)
        folder.mkdir()
        make_world.cache_clear()
        write_world(make_world(WorldName.read(name)), folder)
        made.append(bytes_of(folder))
    assert made[0] == made[1]
    assert made[0]["model.safetensors"] != made[2]["model.safetensors"]
    # Words are the same in all worlds, so a policy cannot tell worlds apart by them.
    assert made[0]["tokenizer.json"] == made[2]["tokenizer.json"]


def test_a_folder_is_made_once_and_a_broken_cache_is_named(tmp_path: Path) -> None:
    first = world_folder("planted:plain:1", tmp_path)
    stamp = (first / "config.json").stat().st_mtime_ns
    assert world_folder("planted:plain:1", tmp_path) == first
    assert (first / "config.json").stat().st_mtime_ns == stamp
    assert [path.name for path in first.parent.iterdir()] == ["planted-plain-1"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="HIEDIT_CACHE"):
        world_folder("planted:plain:1", tmp_path / "file")


@pytest.mark.parametrize("level", LEVELS)
def test_the_model_knows_every_fact_in_every_wording(level: str) -> None:
    env = make(level)
    world = make_world(name_of(env))
    for relation in range(world.difficulty.relations):
        for place in range(world.difficulty.subjects):
            answer = ANSWERS[world.answers[relation, place]]
            for prompt in world.prompts(relation, place):
                assert env.llm.read(env.llm.encode(prompt, answer)).answered


def name_of(env: Planted) -> WorldName:
    return WorldName.read(env.model_name)


def test_the_keys_that_the_layers_read_are_those_of_the_world() -> None:
    env = make("hard")
    world = make_world(name_of(env))
    keys, wordings = make_keys(world)
    count = world.difficulty.subjects
    for relation, place, wording in ((0, 0, 0), (2, 5, 1), (4, 23, 3)):
        prompt = world.prompts(relation, place)[wording]
        capture = env.llm.read(env.llm.encode(prompt, "amber")).capture()
        for layer, found in enumerate(capture.keys):
            # At every token but the subject's the key is 0.
            assert float(found[:-1].abs().max()) < 1e-5
            opened = (world.homes[relation] == layer).any()
            shift = wordings[layer, :, wording] if opened else 0.0
            expected = keys[layer, :, relation * count + place] + shift
            np.testing.assert_allclose(found[-1].numpy(), expected, rtol=0.01, atol=2e-3)


def test_a_paraphrase_moves_the_key_by_the_share_that_was_asked_for() -> None:
    keys, wordings = make_keys(make_world(WorldName.read("planted:plain,wording=0.2:0")))
    for layer in range(6):
        lengths = np.linalg.norm(keys[layer], axis=0)
        moved = np.linalg.norm(wordings[layer], axis=0)
        assert moved[0] == 0
        assert len(moved) == len(WORDINGS)
        if (lengths > 0).any() and moved[1] > 0:
            np.testing.assert_allclose(moved[1:], 0.2 * np.sqrt(7 * 1.05), rtol=0.1)


def test_one_step_changes_other_facts_by_the_product_of_their_keys() -> None:
    # One relation, one layer, four directions for 24 facts.
    difficulty = "plain,layers=1,relations=1,home_layers=1,decoys=0,capacity=4,wording=0"
    env = make(difficulty, max_steps_per_edit=1)
    world = make_world(name_of(env))
    keys, _ = make_keys(world)
    env.reset(seed=0)
    request = env.fact.request
    prompts = [world.prompts(0, place)[0] for place in range(24)]
    answers = [ANSWERS[i] for i in world.answers[0]]
    before = torch.stack([logits(env.llm, *pair) for pair in zip(prompts, answers, strict=True)])
    own = prompts.index(request.prompt)
    env.step(np.ones(1, np.int8))
    after = torch.stack([logits(env.llm, *pair) for pair in zip(prompts, answers, strict=True)])
    # The gradient at the logits: probabilities minus the new answer.
    wanted = torch.softmax(before[own], 0)
    wanted[ANSWERS.index(request.answer)] -= 1
    products = torch.tensor(keys[0].T @ keys[0][:, own]).float()
    expected = -products[:, None] * wanted
    np.testing.assert_allclose(after - before, expected, atol=0.15)
    assert float(before.max(1).values.mean()) == pytest.approx(GAP, abs=0.05)


def forgotten(difficulty: str) -> list[float]:
    """Share of the facts edited so far that are no longer answered, after each of 16 edits."""
    env = make(difficulty, num_edits=16)
    env.reset(seed=0)
    facts = [fact.request for fact in env.episode.facts]
    found = []
    for count in range(1, 17):
        env.step(np.ones(1, np.int8))
        known = [env.llm.read(env.llm.encode(f.prompt, f.answer)).answered for f in facts[:count]]
        found.append(1 - float(np.mean(known)))
    return found


def test_a_layer_that_stores_much_forgets_and_one_with_room_does_not() -> None:
    one = "plain,layers=1,relations=1,home_layers=1,decoys=0"
    assert max(forgotten(one)) == 0.0
    full = forgotten(f"{one},capacity=4")
    # The first facts fit, and the more there are, the more is lost.
    assert full[0] == 0.0
    assert full[-1] > 0.3
    assert np.mean(full[:5]) < np.mean(full[-5:])
    assert forgotten(f"{one},capacity=12")[-1] < full[-1]


def test_all_needed_homes_answer_in_one_step_and_one_less_does_not() -> None:
    env = make("pairs,wording=0")
    env.reset(seed=0)
    homes = np.array([name in env.fact.request.true_layers for name in env.llm.names])
    first = np.zeros(6, bool)
    first[np.flatnonzero(homes)[0]] = True
    tried = env.try_options(np.stack([homes, first]).astype(np.int8))
    assert homes.sum() == 2
    assert tried.edit_steps.tolist() == [1, 2]


def test_arguments_name_the_world_and_contradictions_are_refused() -> None:
    assert make("pairs", 7).model_name == "planted:pairs:7"
    assert make("pairs", 7).dataset == "planted:pairs:7"
    named = gym.make("hiedit/Planted-v2", model="planted:pairs:7", num_edits=2).unwrapped
    assert isinstance(named, Planted)
    assert len(named.controls) == 20
    fixed = gym.make("hiedit/Planted-v2", num_edits=2).unwrapped
    assert isinstance(fixed, Planted)
    assert fixed.model_name == "planted"
    assert not fixed.controls
    with pytest.raises(SettingsError, match="leave one out"):
        gym.make("hiedit/Planted-v2", model="planted:pairs:7", world_seed=8, difficulty="pairs")
    with pytest.raises(SettingsError, match="there is no difficulty 'easy'"):
        gym.make("hiedit/Planted-v2", world_seed=8, difficulty="easy")
