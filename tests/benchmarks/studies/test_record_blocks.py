"""Recording choices of a block on the tiny model: against single edits, after a kill, in parts."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hiedit_benchmarks.studies import record_blocks
from hiedit_benchmarks.studies.block_records import FactRecord, read_records
from hiedit_benchmarks.studies.record_blocks import BlockRecorder, Drawn, Options, main
from hiedit_env.datasets.load import load_requests
from hiedit_env.errors import DatasetError, HieditWarning, SettingsError
from hiedit_env.evaluation.metrics import evaluate
from hiedit_env.evaluation.unedited import UneditedModel

BLOCKS = (0, 1)  # what the last one writes at the subject nothing reads
FACTS = 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Facts whose subject does not begin the prompt, since what begins a text reads like all."""
    path = tmp_path_factory.mktemp("data") / "facts.json"
    rows = []
    for fact in load_requests("tiny-facts"):
        *others, prompt = (fact.prompt, *fact.paraphrases)
        locality = [{"prompt": p.prompt, "answer": p.answer} for p in fact.locality]
        rows.append(
            {
                **{"prompt": prompt, "answer": fact.answer, "subject": fact.subject},
                **{"paraphrases": others, "locality": locality, "relation": fact.relation},
            }
        )
    path.write_text(json.dumps(rows))
    return path


def options(data: Path, out: Path, **settings: Any) -> Options:
    given: dict[str, Any] = {"blocks": BLOCKS, "facts": FACTS, "controls": 10, "neighbours": 1}
    given |= {"train": str(data), "evaluate": str(data), "calibration": str(data)}
    return Options(model="tiny", out=out, **given | {"calibration_prompts": 60, **settings})


def words(given: Options) -> list[str]:
    names = ("train", "evaluate", "calibration", "model", "out")
    numbers = ("facts", "controls", "neighbours", "calibration_prompts", "part", "parts")
    found = [x for n in (*names, *numbers) for x in (f"--{n}", str(getattr(given, n)))]
    return [w.replace("_", "-") if w.startswith("--") else w for w in found] + [
        "--blocks",
        *map(str, given.blocks),
    ]


def lasting(record: FactRecord) -> Any:
    """A record without its seconds."""
    return record.key, record.role, record.seen_of_options, [o.measured for o in record.options]


@pytest.fixture(scope="module")
def recorded(
    data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Drawn, BlockRecorder, list[FactRecord]]:
    given = options(data, tmp_path_factory.mktemp("records"))
    drawn = Drawn(given)
    recorder = BlockRecorder(given, drawn)
    return drawn, recorder, [recorder.record(*pair) for pair in drawn.pairs(0, 1)]


def test_facts_of_both_kinds_alternate_and_share_nothing(
    recorded: tuple[Drawn, BlockRecorder, list[FactRecord]],
) -> None:
    drawn, _, records = recorded
    assert [r.role for r in records] == ["train", "evaluate"] * FACTS
    asked = [
        {t for r in side for t in (r.prompt, *r.paraphrases, *(p.prompt for p in r.locality))}
        for side in (drawn.train, drawn.evaluate, drawn.controls, drawn.calibration)
    ]
    assert all(not asked[i] & asked[j] for i in range(4) for j in range(i) if {i, j} != {0, 2})
    subjects = [{r.subject for r in side} for side in (drawn.train, drawn.evaluate, drawn.controls)]
    assert not subjects[0] & subjects[1]
    assert not subjects[1] & subjects[2]


def test_controls_can_come_from_other_facts(data: Path, tmp_path: Path) -> None:
    own = Drawn(options(data, tmp_path, controls=4))
    apart = Drawn(options(data, tmp_path, controls=4, control_facts="tiny-facts"))
    # No fact is spent on controls.
    assert len(apart.train) == len(apart.evaluate) == FACTS
    assert len(own.controls) == len(apart.controls) == 4
    built_in = {r.prompt for r in load_requests("tiny-facts")}
    assert {r.prompt for r in apart.controls} <= built_in
    recorded = {r.prompt for r in (*apart.train, *apart.evaluate)}
    assert not recorded & {r.prompt for r in apart.controls}
    assert not {r.prompt for r in apart.calibration} & {r.prompt for r in apart.controls}


def test_no_controls_are_refused_before_anything_is_loaded(data: Path, tmp_path: Path) -> None:
    used = Drawn(options(data, tmp_path, control_facts=str(data))).train
    same = tmp_path / "same.json"
    rows = [{"prompt": r.prompt, "answer": r.answer, "subject": r.subject} for r in used]
    same.write_text(json.dumps(rows))
    with pytest.raises(SettingsError, match=r"same\.json has no facts left as controls"):
        Drawn(options(data, tmp_path, control_facts=str(same)))
    with pytest.raises(DatasetError):
        Drawn(options(data, tmp_path, control_facts=""))


def test_an_option_is_one_edit_from_the_unedited_model(
    recorded: tuple[Drawn, BlockRecorder, list[FactRecord]],
) -> None:
    drawn, recorder, records = recorded
    llm, low = recorder.llm, recorder.low
    fingerprint = llm.weights_fingerprint()
    written = 0
    pairs = zip(drawn.train, drawn.evaluate, strict=True)
    for request, record in zip((r for pair in pairs for r in pair), records, strict=True):
        for i, (mlp, tried) in enumerate(zip(low.mlps, record.options, strict=True)):
            assert mlp.block == BLOCKS[i]
            low.reset()
            prompt = llm.encode(request.prompt, request.answer)
            prompt = llm.encoder.with_subject(prompt, request.prompt, request.subject)
            layers = np.zeros(len(llm.layers), bool)
            layers[list(mlp.layers)] = True
            steps = 0
            while steps < 3 and not (reading := llm.read(prompt)).answered:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", HieditWarning)
                    llm.commit(low.propose(reading.capture(), layers))
                steps += 1
            if llm.weights_fingerprint() == fingerprint:
                # A subject that cannot be told from the rest: nothing is written.
                assert tried.steps == 0
                assert tried.measured == record.before
                continue
            written += 1
            assert tried.steps == steps
            found = evaluate(llm, [request], UneditedModel(llm)).per_fact
            llm.restore_unedited()
            low.reset()
            own = tried.measured
            assert [x[1] for x in own.fact] == [found["efficacy"]["generation"][0] / 100]
            paraphrases = [x[0][1] for x in own.paraphrases]
            assert 100 * np.mean(paraphrases) == found["generalization"]["generation"][0]
            kept = [x[0][1] for x in own.neighbours]
            assert 100 * np.mean(kept) == pytest.approx(
                found["specificity"]["agreement"][0], abs=1e-3
            )
            assert own.fact[0][0] < record.before.fact[0][0] - 1
    assert written >= 4
    assert llm.weights_fingerprint() == fingerprint


def test_the_unedited_model_keeps_all_its_answers(
    recorded: tuple[Drawn, BlockRecorder, list[FactRecord]],
) -> None:
    for record in recorded[2]:
        assert all(x == [0.0, 1.0] for forms in record.before.neighbours for x in forms)


def test_what_is_seen_is_the_same_for_all_options_and_known_by_hand(
    recorded: tuple[Drawn, BlockRecorder, list[FactRecord]],
) -> None:
    drawn, recorder, records = recorded
    llm, request, record = recorder.llm, drawn.train[0], records[0]
    assert record.seen["nats"] == pytest.approx(record.before.fact[0][0], abs=2e-5)
    prompt = llm.encode(request.prompt, request.answer)
    prompt = llm.encoder.with_subject(prompt, request.prompt, request.subject)
    capture = llm.read(prompt).capture()
    for mlp, seen in zip(recorder.low.mlps, record.seen_of_options, strict=True):
        matrices = [capture.keys[i].mT @ capture.value_gradients[i] for i in mlp.layers]
        norm = float(sum(m.square().sum() for m in matrices) ** 0.5)
        assert seen["weight_gradient"] == pytest.approx(np.log10(norm), abs=1e-4)
        push = capture.value_gradients[mlp.back][prompt.positions("subject")[0]].norm()
        assert seen["push"] == pytest.approx(np.log10(float(push)), abs=1e-4)
        assert seen["alignment"] == pytest.approx(1, abs=1e-4)
        assert 0 <= seen["fires"] <= 1
        assert set(seen) == set(record.seen_of_options[0])


def test_a_killed_recording_goes_on_where_it_was(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = options(data, tmp_path / "whole"), options(data, tmp_path / "broken")
    assert main(words(whole)) == 0
    done: list[object] = []
    record = BlockRecorder.record

    def once(self: BlockRecorder, *pair: Any) -> FactRecord:
        if done:
            raise KeyboardInterrupt
        done.append(pair)
        return record(self, *pair)

    monkeypatch.setattr(BlockRecorder, "record", once)
    with pytest.raises(KeyboardInterrupt):
        main(words(broken))
    monkeypatch.setattr(BlockRecorder, "record", record)
    assert len(read_records([broken.out / "part-0.jsonl"])[1]) == 1
    assert main(words(broken)) == 0
    paths = [one.out / "part-0.jsonl" for one in (whole, broken)]
    settings, expected = read_records(paths[:1])
    assert [lasting(r) for r in read_records(paths[1:])[1]] == [lasting(r) for r in expected]
    assert settings["blocks"] == list(BLOCKS)
    assert "out" not in settings
    # Two processes share the facts, and both files are of one study.
    for part in (0, 1):
        main(words(options(data, tmp_path / "parts", part=part, parts=2)))
    both = [tmp_path / "parts" / f"part-{part}.jsonl" for part in (0, 1)]
    assert [len(read_records([path])[1]) for path in both] == [2, 2]
    found = {r.key: lasting(r) for r in read_records(both)[1]}
    assert found == {r.key: lasting(r) for r in expected}
    with pytest.raises(SettingsError, match=r"facts=2, not 1"):
        main(words(options(data, tmp_path / "whole", facts=1)))


def test_bad_input_is_told(data: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="part must be below --parts 1, got 1"):
        main(words(options(data, tmp_path, part=1)))
    with pytest.raises(SettingsError, match="no facts to evaluate on with 9"):
        Drawn(options(data, tmp_path, paraphrases=9))
    given = options(data, tmp_path, blocks=(1, 1))
    with pytest.raises(SettingsError, match="blocks must be different ones"):
        BlockRecorder(given, Drawn(given))
    assert record_blocks.PROGRAM.endswith("record_blocks")
