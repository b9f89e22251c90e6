"""Names of planted worlds, their difficulties, and the seeds to train and to test on."""

from __future__ import annotations

import pytest

from hiedit_env.datasets.difficulty import (
    FIRST_TEST_SEED,
    LEVELS,
    Difficulty,
    WorldName,
    is_world,
    read_difficulty,
    require_apart,
    world_seeds,
)
from hiedit_env.datasets.load import load_requests
from hiedit_env.datasets.planted import World, make_world, subject_name
from hiedit_env.errors import SettingsError
from hiedit_env.model.built_in import built_in
from hiedit_env.model.relatives import environment_for


def world(name: str) -> World:
    return make_world(WorldName.read(name))


@pytest.mark.parametrize("name", LEVELS)
def test_a_level_is_read_back_from_its_words(name: str) -> None:
    assert read_difficulty(name) == LEVELS[name]
    assert LEVELS[name].words == name


def test_fields_are_read_and_written() -> None:
    given = read_difficulty("crowded,capacity=None,wording=0.25")
    assert (given.capacity, given.wording, given.homes) == (None, 0.25, 2)
    assert read_difficulty(given.words) == given
    assert given.words == "plain,homes=2,home_layers=3,wording=0.25"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("easy", "there is no difficulty 'easy'"),
        ("plain,depth=3", "has no field 'depth'"),
        ("plain,layers=many", "field 'layers' of a difficulty must be a number, got 'many'"),
        ("plain,layers=0", "layers must be ≥ 1"),
        ("plain,subjects=9", "subjects must be ≥ 10"),
        ("plain,needed=2", "needed is 2, but there are only 1 homes"),
        ("plain,homes=7,home_layers=7", "home_layers is 7, but there are only 6 layers"),
        ("plain,decoys=6", "decoys is 6, but there are only 5 layers that are no home"),
        ("plain,wording=2", "wording must be a number from 0 to 1, got 2.0"),
    ],
)
def test_a_wrong_difficulty_is_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read_difficulty(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["planted:plain", "planted:plain:x", "planted::3", "planted:"])
def test_a_wrong_name_is_refused(name: str) -> None:
    assert is_world(name)
    with pytest.raises(SettingsError):
        WorldName.read(name)


def test_worlds_to_train_on_and_to_test_on_never_meet() -> None:
    train, test = world_seeds("train", 50, 10), world_seeds("test", 50)
    assert not set(train) & set(test)
    assert WorldName(Difficulty(), train[-1]).split == "train"
    assert WorldName(Difficulty(), test[0]).split == "test"
    require_apart(train, test)
    with pytest.raises(SettingsError, match="world 12 is trained on and tested on"):
        require_apart(train, range(12, 14))
    with pytest.raises(SettingsError, match="kept for tests"):
        world_seeds("train", 2, FIRST_TEST_SEED - 1)


def test_relations_have_the_homes_and_decoys_that_were_asked_for() -> None:
    for level in LEVELS.values():
        for seed in range(20):
            found = make_world(WorldName(level, seed))
            assert found.homes.shape == (level.relations, level.homes)
            assert len({*found.homes.ravel().tolist()}) <= level.home_layers
            for home, decoy in zip(found.homes.tolist(), found.decoys.tolist(), strict=True):
                assert len({*home, *decoy}) == level.homes + level.decoys
                assert {*home, *decoy} <= set(range(level.layers))


def test_homes_are_dealt_evenly() -> None:
    # Five relations with two homes each, over three layers: 3, 3 and 4 times.
    counts = sorted((world("planted:crowded:4").homes == layer).sum() for layer in range(6))
    assert counts == [0, 0, 0, 3, 3, 4]


def test_seeds_differ_in_which_layers_hold_which_facts() -> None:
    homes = {str(make_world(WorldName(LEVELS["plain"], seed)).homes.tolist()) for seed in range(30)}
    assert len(homes) >= 28


def test_a_fact_is_changed_to_something_else_and_asked_nowhere_else() -> None:
    found = world("planted:hard:3")
    controls = {probe.prompt for probe in found.controls()}
    prompts = {record["prompt"] for record in found.records()}
    assert not controls & prompts
    for record in found.records():
        assert record["target"] != record["answer"]
        asked = {probe["prompt"] for probe in record["locality"]}
        assert not asked & (controls | prompts)
        relation = record["prompt"].split()[1]
        assert [p["prompt"].split()[1] == relation for p in record["locality"]] == [True, False]


def test_names_of_subjects_are_all_different() -> None:
    assert len({subject_name(i) for i in range(20_000)}) == 20_000


def test_the_facts_of_a_world_are_a_data_set() -> None:
    requests = load_requests("planted:plain:3")
    assert len(requests) == 5 * 16
    assert all(len(request.true_layers) == 1 for request in requests)
    assert requests == load_requests("planted:plain:3") != load_requests("planted:plain:4")
    known = built_in("planted:plain:3")
    assert (known.rule, known.layers) == ("gradient", (("down_proj", 1, 6),))
    assert environment_for("planted:plain:3") == "hiedit/Planted-v1"
    assert environment_for("planted:plain:3", "tiny-facts") == "hiedit/LayerSelection-v1"
