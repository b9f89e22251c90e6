"""lm-evaluation-harness reads the adapter, where it is installed (``pip install lm-eval peft``)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hiedit_agents import Editor
from hiedit_env.evaluation.matching import starts_with
from hiedit_env.model.saving import find_folder
from tests.support.editors import FACTS, NONE

pytest.importorskip("lm_eval")
pytest.importorskip("peft")

TASK = """
task: edited_facts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4, do_sample: false}}
filter_list:
  - name: first-word
    filter: [{{function: regex, regex_pattern: '(\\w+)'}}, {{function: take_first}}]
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def score(place: Path, model_args: str) -> float:
    """Share of the facts that the harness finds given."""
    words = ["run", "--model", "hf", "--model_args", model_args, "--tasks", "edited_facts"]
    words += ["--include_path", str(place / "tasks"), "--device", "cpu", "--batch_size", "1"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(place / "home")}
    subprocess.run(
        [sys.executable, "-m", "lm_eval", *words, "--output_path", str(place / "found.json")],
        env={**os.environ, **offline},
        check=True,
        capture_output=True,
    )
    [file] = place.glob("found*.json")
    results = json.loads(file.read_text())["results"]["edited_facts"]
    file.unlink()
    found: float = results["exact_match,first-word"]
    return found


def test_the_harness_finds_the_edits_in_the_adapter(tmp_path: Path) -> None:
    facts = FACTS[:6]
    with Editor.from_pretrained("tiny", checks=NONE) as editor:
        editor.edit(facts)
        editor.save_adapter(tmp_path / "adapter")
        said = editor.ask([fact.prompt for fact in facts])
    given = sum(starts_with(text, f.answer) for text, f in zip(said, facts, strict=True))
    data = tmp_path / "facts.jsonl"
    rows = ({"prompt": fact.prompt, "answer": fact.answer} for fact in facts)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "edited_facts.yaml").write_text(TASK.format(data=data))
    base = f"pretrained={find_folder('tiny')}"
    assert score(tmp_path, base) == 0
    with_adapter = score(tmp_path, f"{base},peft={tmp_path / 'adapter'}")
    assert with_adapter == pytest.approx(given / len(facts))
    assert given >= 4
