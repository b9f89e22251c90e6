"""The console script: edited models load elsewhere, and mistakes give one clear line."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hiedit_agents.registry import AGENTS
from hiedit_benchmarks.commands import agents, cli
from hiedit_benchmarks.commands.cli import main
from hiedit_env.evaluation.matching import EXTRA_TOKENS
from hiedit_env.model.loading import load_model
from tests.support.models import tokenizer
from tests.support.tiny_models import tiny_model

FACTS = [
    {"subject": "Belka", "prompt": "Belka lives in", "answer": "Averlund"},
    {"subject": "Corrin", "prompt": "Corrin lives in", "answer": "Istrand"},
    {"subject": "Dasmo", "prompt": "Dasmo lives in", "answer": "Averlund"},
]
LAYERS = ["model.layers.1.mlp.up_proj", "model.layers.2.mlp.down_proj"]


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(FACTS))
    return path


def test_edit_saves_a_model_that_loads_anywhere(
    facts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "edited"
    arguments = ["edit", "--facts", str(facts), "--out", str(out), "--model", "tiny"]
    assert main([*arguments, "--layers", *LAYERS]) == 0
    text = capsys.readouterr().out
    assert "identical bit for bit" in text
    assert [line for line in text.splitlines() if line in {f["prompt"] for f in FACTS}] == [
        fact["prompt"] for fact in FACTS
    ]
    record = json.loads((out / "edits.json").read_text())
    assert [(f["prompt"], f["answer"]) for f in record["facts"]] == [
        (f["prompt"], f["answer"]) for f in FACTS
    ]
    # Only the candidate layers differ from the model that was edited, and all of them do.
    original = load_model("tiny", progress=False).model.state_dict()
    saved = load_file(out / "model.safetensors")
    changed = {name for name, value in saved.items() if not torch.equal(value, original[name])}
    assert changed == {f"{name}.weight" for name in LAYERS}
    assert {name for f in record["facts"] for name in f["layers"]} == set(LAYERS)
    # What the folder answers by itself is what the record says.
    model: Any = AutoModelForCausalLM.from_pretrained(out)
    tokenizer: Any = AutoTokenizer.from_pretrained(out)
    for fact in record["facts"]:
        ids = tokenizer(fact["prompt"], return_tensors="pt")["input_ids"]
        whole = tokenizer(f"{fact['prompt']} {fact['answer']}", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            guesses = model(whole).logits[0].argmax(-1)[ids.shape[1] - 1 : -1]
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=whole.shape[1] - ids.shape[1] + EXTRA_TOKENS,
                do_sample=False,
            )
        assert fact["answered"] == torch.equal(guesses, whole[0, ids.shape[1] :])
        assert fact["after"] == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    last = record["facts"][-1]
    assert last["before"] != last["after"] == " Averlund."
    # Nothing comes after the last fact's own edit.
    assert last["answered_right_after"] is last["answered"] is last["generated"] is True
    assert not list(out.parent.glob(".edited*")), "no temporary folder is left"


def test_edit_refuses_to_overwrite(
    facts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    command = ["edit", "--facts", str(facts), "--model", "tiny", "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "not an empty folder" in one_error(capsys)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The only line of complaint; progress on the same stream apart."""
    text = capsys.readouterr().err
    lines = [line for line in text.splitlines() if line.startswith("hiedit: error: ")]
    assert len(lines) == 1
    assert "Traceback" not in text
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "./nowhere"], "'./nowhere' is not an existing folder"),
        (["--model", "tiny", "--agent", "nobody"], "unknown agent 'nobody'; choose one of no-edit"),
        (["--model", "tiny", "--layers", "no.such.*"], "no.such"),
        (["--model", "tiny", "--device", "abacus"], "device 'abacus' is not available"),
        (["--model", "tiny", "--dtype", "int3"], "unknown dtype 'int3'"),
        (["--model", "tiny", "--update-rule", "magic"], "magic"),
        (["--model", "tiny", "--step-size", "-1"], "step_size must be a positive number, got -1.0"),
        (["--model", "tiny", "--max-steps-per-edit", "0"], "max_steps_per_edit must be ≥ 1"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(
    facts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    out = tmp_path / "out"
    assert main(["edit", "--facts", str(facts), "--out", str(out), *arguments]) == 2
    assert message in one_error(capsys)
    assert not out.exists()


@pytest.mark.parametrize("command", ["edit", "compare"])
def test_malformed_rows_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    path = tmp_path / "facts.jsonl"
    rows = [FACTS[0], {**FACTS[1], "answer": 7}]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    option = "--facts" if command == "edit" else "--dataset"
    arguments = [command, option, str(path), "--model", "tiny", "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    error = one_error(capsys)
    assert "facts.jsonl row 1" in error
    assert "answer" in error


def test_compare_prints_the_table_and_refuses_to_run_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", "--model", "tiny", "--out", str(tmp_path / "out"), "--num-edits", "2"]
    command += ["--agents", "fixed-layers", "--layers-per-edit", "2", "--no-generation"]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Edited facts")
    assert lines[1].split()[0] == "agent"
    assert [line.split()[0] for line in lines[3:5]] == ["no-edit", "fixed-layers"]
    assert main(command) == 2
    assert "--resume" in one_error(capsys)
    assert main([*command, "--resume"]) == 0
    assert main([*command, "--resume", "--layers-per-edit", "3"]) == 2
    assert "'layers_per_edit' was 2 and is now 3" in one_error(capsys)


def test_demo_shows_answers_table_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    assert main(["demo", "--model", "tiny", "--num-edits", "3", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    # Three facts: as they are, in other words, and a question about another subject each.
    assert text.count("as it is, before:") == text.count("as it is, after:") == 3
    assert text.count("in other words:") == text.count("unrelated:") == 3
    assert text.count("before:") == text.count("after:") == 9
    assert "\nno-edit " in text
    assert "\ngradient-norm " in text
    assert str(out / "compare.png") in text
    assert (out / "compare.png").stat().st_size > 10_000


def test_demo_names_the_way_without_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--model", "./nowhere", "--out", str(tmp_path / "demo")]) == 2
    assert "hiedit demo --model tiny" in capsys.readouterr().err


def test_interruption(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.Demo, "run", interrupt)
    assert main(["demo"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "wanted"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_do_not_spin_unless_asked_to(
    monkeypatch: pytest.MonkeyPatch, given: str | None, wanted: str
) -> None:
    # Set first in any case, so that monkeypatch puts back what was there.
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    seen = []
    monkeypatch.setattr(cli.Demo, "run", lambda _: seen.append(os.environ["OMP_WAIT_POLICY"]))
    assert main(["demo"]) == 0
    assert seen == [wanted]


def test_a_model_that_cannot_be_edited_gets_one_line(facts: Path, tmp_path: Path) -> None:
    """Of transformers, too, which says more about this model when it is asked to."""
    tiny_model("reformer").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    words = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    program = [sys.executable, "-m", "hiedit_benchmarks.commands.cli", "edit"]
    done = subprocess.run(
        [*program, *words, "--facts", str(facts)],
        capture_output=True,
        text=True,
        check=False,
        env={name: v for name, v in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"},
    )
    assert done.returncode == 2
    *before, last = done.stderr.splitlines()
    assert last.startswith("hiedit: error: ReformerModelWithLMHead cannot be edited")
    assert [line for line in before if line and not line.startswith(("loading", "Loading"))] == []


@pytest.mark.parametrize("command", [[], *([name] for name in cli.COMMANDS)])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        assert main([*command, "--help"]) == 0
    assert "usage: hiedit" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["", "edit", "compare", "train", "layers", "demo", "agents"])
def test_help_imports_nothing_heavy(command: str) -> None:
    code = (
        "import sys\nfrom hiedit_benchmarks.commands.cli import main\n"
        "try:\n    status = main([*sys.argv[1:], '--help'])\n"
        "except SystemExit as stopped:\n    status = stopped.code\n"
        "assert not status\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    words = [command] if command else []
    subprocess.run([sys.executable, "-c", code, *words], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "--out", "x", "--modle", "tiny"], "no option --modle; did you mean --model?"),
        (["compare", "--out", "x", "--seeds", "a"], "--seeds"),
        (["compare"], "--out must be given"),
        (["compare", "--out", "x", "--reward", "luck"], "'luck'"),
        (["compare", "--out", "x", "--num-edits", "0"], "num_edits must be ≥ 1 and a whole number"),
        (["train", "--out", "x"], "AGENT must be given"),
        (["train"], "AGENT, --out must be given; see hiedit train --help"),
        (["data"], "FILE must be given; see hiedit data --help"),
        (["edit", "--facts", "--out", "x"], "--facts must be followed by a value"),
        (["edit", "a", "--facts", "b", "--out", "x"], "'a' belongs to no option"),
        (["compare", "random-layers", "--out", "x"], "'random-layers' belongs to no option"),
        (
            ["compare", "--out", "x", "--step-size", "abc"],
            "--step-size must be a number, got 'abc'; see hiedit compare --help",
        ),
        (["demo", "--num-edits", "1.5"], "--num-edits must be a whole number, got '1.5'"),
        (["compare", "--out", "x", "--seeds", "0", "a"], "--seeds must be a whole number"),
        (["compare", "--out", "x", "--reward", "luck"], "--reward must be one of 'loss', "),
        (
            ["compare", "--out", "x", "--step-size", "1e400"],
            "step_size must be a positive number, got inf; give a finite one",
        ),
        (
            ["compare", "--out", "x", "--agents", "all-layers+ridge,step_size=1" + 400 * "0"],
            "step_size must be a positive number, got 1000",
        ),
        (
            ["compare", "--out", "x", "--agents", "all-layers+ridge,rigde=1"],
            "has no argument 'rigde'; it has ridge, step_size, tokens, form; did you mean 'ridge'?",
        ),
        (
            ["compare", "--out", "x", "--agents", "all-layers,step_size=1"],
            "high level 'all-layers' has no argument 'step_size'; it has layers_per_edit",
        ),
        (["train", "hiedit", "--out", "x", "--gamma", "2"], "gamma must be a number in (0, 1]"),
        (["trian"], "there is no command 'trian'; did you mean 'train'?"),
        (["agents", "hiedti"], "there is no agent or level 'hiedti'; did you mean 'hiedit'?"),
    ],
)
def test_wrong_words_get_one_line_and_status_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    text = capsys.readouterr().err
    assert text.startswith("hiedit: error: ")
    assert text.count("\n") == 1
    assert message in text


def test_help_of_training_shows_the_agents_own_defaults(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def default(option: str, *agent: str) -> str:
        with contextlib.suppress(SystemExit):
            main(["train", *agent, "--help"])
        text = " ".join(capsys.readouterr().out.replace("│", " ").split())
        found = re.search(rf"{option} .*?\(default: (\S+)\)", text)
        assert found
        return found[1]

    assert default("--window") == "0"
    assert default("--window", "hiedit") == "6"
    assert default("--high-learning-rate", "--out", "x", "hiedit") == "0.01"
    assert default("--entropy-weight", "--layers-per-edit", "3", "policy+ridge") == "0.0"


def test_agents_lists_levels_with_true_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["agents"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in AGENTS)
    assert main(["agents", "rehearsal"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^facts +4 +Earlier requests", text, re.M)
    assert re.search(r"^rank +64 ", text, re.M)


def test_every_setting_of_a_level_has_a_meaning() -> None:
    lacking = [
        f"{kind} {level}: {name}"
        for kind, found in agents.levels().items()
        for level, (_, own) in found.items()
        for name, _, meaning in own
        if not meaning
    ]
    assert not lacking
