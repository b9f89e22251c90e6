"""What a low level is shown at the unedited weights before its first edit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hiedit_agents.hierarchy.train_settings import TrainSettings
from hiedit_agents.hierarchy.trainer import Trainer
from hiedit_agents.registry import spec_agent
from hiedit_env.datasets.requests import Probe, Request
from hiedit_env.errors import SettingsError
from tests.support.episodes import SELECTION, make

SHORT = TrainSettings(episodes=0, edits_per_episode=2, retention_window=2, held_out=0.1)


def test_what_a_low_level_is_calibrated_on() -> None:
    """By hand: unrelated prompts once each, the facts' own for one that asks for all."""
    facts = [
        Request(f"w{i} is", "one", "w", locality=(Probe("same", "x"), Probe(f"near {i}", "y")))
        for i in range(3)
    ]
    unrelated = {"same", "near 0", "near 1", "near 2"}
    env = make(SELECTION)
    for name, size, wanted in (
        ("all-layers+anchored", 100, unrelated | {"w0 is", "w1 is", "w2 is"}),
        ("all-layers+hypernetwork,form=decorrelated", 100, unrelated),
        ("all-layers+hypernetwork,form=outer", 100, set()),
        ("all-layers+anchored", 5, None),
    ):
        agent = spec_agent(name).build(env.llm, "tiny", trained=False)
        settings = replace(SHORT, episodes=0, edits_per_episode=2, calibration=size)
        trainer = Trainer(env, agent, facts, settings)
        prompts = trainer.calibration_prompts()
        texts = [env.llm.encoder.decode(p.prompt_ids).strip() for p in prompts]
        if wanted is None:
            assert len(texts) == len(set(texts)) == 5
            continue
        assert sorted(texts) == sorted(wanted)
        trainer.calibrate()
        # Once.
        assert trainer.calibration_prompts() == []


def test_every_fourth_calibration_prompt_is_in_chat_where_there_is_a_template() -> None:
    facts = [Request(f"w{i} is", "one", "w", locality=(Probe(f"n{i} is", "x"),)) for i in range(6)]
    env = make(SELECTION)
    llm = env.llm
    llm.encoder.tokenizer.chat_template = (
        "CHAT {% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    agent = spec_agent("all-layers+anchored").build(llm, "tiny", trained=False)
    settings = replace(SHORT, episodes=0, edits_per_episode=2)
    prompts = Trainer(env, agent, facts, settings).calibration_prompts()
    in_chat = [llm.encoder.decode(p.prompt_ids).startswith("CHAT") for p in prompts]
    assert in_chat == [i % 4 == 0 for i in range(12)]


def test_the_model_writes_texts_that_go_on_with_what_stands_before_subjects() -> None:
    facts = [Request(f"w7 w{i} is", "one", f"w{i}") for i in range(6)]
    env = make(SELECTION)
    agent = spec_agent("all-layers+neuron").build(env.llm, "tiny", trained=False)
    settings = replace(SHORT, episodes=0, edits_per_episode=2, own_texts=7)
    trainer = Trainer(env, agent, facts, settings)
    texts = trainer.write_texts()
    assert [p.length + 1 for p in texts] == [env.llm.encoder.max_length] * 3 + [49] * 4
    (begin,) = {p.prompt_ids[0] for p in texts}
    opening = env.llm.encoder.tokenizer("w7", add_special_tokens=False)["input_ids"]
    assert all(p.prompt_ids[: 1 + len(opening)] == (begin, *opening) for p in texts[3:])
    assert trainer.write_texts() == texts
    shown: list[None] = []
    trainer.calibrate(lambda: shown.append(None), texts)
    assert len(shown) == 6 + 7
    # Once.
    assert trainer.write_texts() == []


def test_texts_for_a_low_level_that_reads_none_are_refused() -> None:
    env = make(SELECTION)
    facts = [Request(f"w7 w{i} is", "one", f"w{i}") for i in range(6)]
    settings = replace(SHORT, episodes=0, edits_per_episode=2, own_texts=7)
    for name in ("hypernetwork", "anchored"):
        agent = spec_agent(f"all-layers+{name}").build(env.llm, "tiny", trained=False)
        with pytest.raises(SettingsError, match=f"own_texts is 7, but the low level '{name}'"):
            Trainer(env, agent, facts, settings)
