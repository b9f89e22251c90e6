"""Trained agents are found by a model's weights and tokenizer, whatever it is called."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hiedit_agents.named.checkpoints import read_record
from hiedit_agents.named.fitting import SHIPPED, find_shipped
from hiedit_agents.registry import default_agent, explain, make_agent, spec_agent
from hiedit_benchmarks.commands.cli import main
from hiedit_env.errors import CheckpointError
from hiedit_env.model.architectures import find_candidates
from hiedit_env.model.loading import load_model
from hiedit_env.model.relatives import cosine, known_as
from hiedit_env.model.saving import find_folder
from hiedit_env.resident.resident import ResidentLLM

PLANTED = SHIPPED / "hiedit-planted"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The planted model as a folder of another name."""
    source = find_folder("planted")
    assert source is not None
    return Path(shutil.copytree(source, tmp_path / "mine"))


def change(folder: Path, how: Any) -> None:
    file = folder / "model.safetensors"
    save_file({k: how(k, v) for k, v in load_file(file).items()}, file, metadata={"format": "pt"})


def resident(folder: Path) -> ResidentLLM:
    loaded = load_model(str(folder), progress=False)
    layers = spec_agent("hiedit").candidate_layers("planted")
    return ResidentLLM(loaded.model, loaded.tokenizer, find_candidates(loaded.model, layers))


def test_the_same_weights_under_another_name(folder: Path) -> None:
    fit = find_shipped("hiedit", str(folder))
    assert fit is not None
    assert fit.folder.name == PLANTED.name
    assert fit.why == "the weights are those of planted, for which it was trained"
    assert default_agent(str(folder)) == "hiedit"
    assert known_as(str(folder)) == "planted"
    agent = make_agent("hiedit")
    assert explain(agent, str(folder)).endswith(fit.why)
    assert "hiedit-planted" in explain(agent, str(folder))


def test_edited_weights_fit_and_it_is_said(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)

    def edit(name: str, value: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(value.shape, generator=generator)
        return value + 0.05 * value.std() * noise if "down_proj" in name else value

    change(folder, edit)
    fit = find_shipped("hiedit", str(folder))
    assert fit is not None
    assert "edited, fine-tuned or rounded (cosine 0.99" in fit.why


def test_rows_that_were_written_anew_do_not_hide_the_model(folder: Path) -> None:
    """As an agent writes them that gives a neuron to each fact: many times larger than others."""
    rows = read_record(PLANTED)["model"]["shapes"][0][0] // 16

    def edit(name: str, value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        if "mlp" in name:
            value[:rows] = 40 * value.std()
        return value

    change(folder, edit)
    fit = find_shipped("hiedit", str(folder))
    assert fit is not None
    assert "edited, fine-tuned or rounded (cosine " in fit.why
    assert known_as(str(folder)) == "planted"


def test_half_precision_fits(folder: Path) -> None:
    change(folder, lambda _, value: value.bfloat16())
    assert default_agent(str(folder)) == "hiedit"


def test_a_stranger_of_the_same_shape_does_not_fit(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    change(
        folder,
        lambda _, value: torch.randn(value.shape, generator=generator) * value.std(correction=0),
    )
    assert find_shipped("hiedit", str(folder)) is None
    assert default_agent(str(folder)) == "all-layers"
    assert known_as(str(folder)) == str(folder)
    assert "no trained agent that fits" in explain(make_agent("all-layers"), str(folder))


def test_more_tokens_do_not_matter(folder: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.add_tokens(["<one>", "<two>", "<three>"]) == 3
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert default_agent(str(folder)) == "hiedit"
    assert known_as(str(folder)) == "planted"
    spec_agent("hiedit").build(resident(folder), str(folder))


def test_another_tokenizer_does_not_fit(folder: Path) -> None:
    file = folder / "tokenizer.json"
    text = json.loads(file.read_text())
    text["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {},
    }
    vocabulary = text["model"]["vocab"]
    if isinstance(vocabulary, dict):
        words = sorted(vocabulary, key=vocabulary.__getitem__)
        text["model"]["vocab"] = {word: len(words) - 1 - i for i, word in enumerate(words)}
    file.write_text(json.dumps(text))
    assert find_shipped("hiedit", str(folder)) is None


def test_a_folder_goes_before_a_built_in_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the model is loaded."""
    shutil.copytree(folder, tmp_path / "smollm2-135m")
    monkeypatch.chdir(tmp_path)
    fit = find_shipped("hiedit", "smollm2-135m")
    assert fit is not None
    assert fit.folder.name == PLANTED.name


@pytest.mark.parametrize("model", ["", "nobody/nothing", "no-such-folder"])
def test_what_is_not_here_fits_nothing(model: str) -> None:
    assert find_shipped("hiedit", model) is None


def test_the_same_result_by_name_and_by_path(tmp_path: Path) -> None:
    source = find_folder("tiny")
    assert source is not None
    shutil.copytree(source, tmp_path / "mine")
    facts = tmp_path / "facts.json"
    fact = {"subject": "Belka", "prompt": "Belka lives in", "answer": "Averlund"}
    facts.write_text(json.dumps([fact]))
    for model, out in (("tiny", "a"), (str(tmp_path / "mine"), "b")):
        command = ["edit", "--facts", str(facts), "--model", model, "--out", str(tmp_path / out)]
        assert main(command) == 0
    one, two = ((tmp_path / out / "model.safetensors").read_bytes() for out in "ab")
    assert one == two


def test_an_agent_that_does_not_fit_is_refused_before_anything_is_generated(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing may be generated")

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == "llama"
    other = json.loads((PLANTED / "agent.json").read_text())
    other["model"]["tokenizer"][1] += 1
    shutil.copytree(PLANTED, tmp_path / "agent")
    (tmp_path / "agent" / "agent.json").write_text(json.dumps(other))
    monkeypatch.setattr(ResidentLLM, "generate", forbidden)
    facts = tmp_path / "facts.json"
    facts.write_text(json.dumps([{"subject": "a", "prompt": "the a is", "answer": "b"}]))
    words = ["edit", "--facts", str(facts), "--model", str(folder), "--out", str(tmp_path / "out")]
    assert main([*words, "--agent", str(tmp_path / "agent")]) == 2
    assert "does not fit this model" in capsys.readouterr().err
    assert len(tokenizer) == other["model"]["tokenizer"][0]
    assert not (tmp_path / "out").exists()


def test_fewer_tokens_are_refused(folder: Path, tmp_path: Path) -> None:
    record = json.loads((PLANTED / "agent.json").read_text())
    record["model"]["tokenizer"][0] += 1
    shutil.copytree(PLANTED, tmp_path / "agent")
    (tmp_path / "agent" / "agent.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="a tokenizer that has so many tokens"):
        spec_agent(str(tmp_path / "agent")).build(resident(folder), str(folder))


def test_earlier_facts_are_rehearsed(folder: Path) -> None:
    llm = resident(folder)
    low: Any = spec_agent("all-layers+rehearsal").build(llm, "planted").low
    facts = [llm.encode("a b", "c"), llm.encode("d", "e")]
    low.remember(facts)
    low.reset()
    assert list(low.statistics()["past"]) == facts


def test_cosine_of_nothing() -> None:
    assert cosine([0.0, 0.0], [1.0, 0.0]) == 0.0


def test_layers_or_a_rule_that_are_asked_for_are_used(folder: Path) -> None:
    """A trained agent has its own, so it would refuse them."""
    assert default_agent(str(folder), ("model.layers.1.mlp.up_proj",)) == "all-layers"
    assert default_agent("planted", None, "ridge") == "all-layers"
    assert default_agent("planted", None, None) == "hiedit"


def test_the_cache_folder_of_the_demo_model_is_the_demo_model() -> None:
    folder = find_folder("smollm2-135m")
    if folder is None:
        pytest.skip("the demo model has not been made on this machine")
    fit = find_shipped("hiedit", str(folder))
    assert fit is not None
    assert fit.folder.name == "hiedit-smollm2-135m"
    assert known_as(str(folder)) == "smollm2-135m"
