"""Data sets: files and their errors, splits, streams, fingerprints, and the real data."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiedit_env.datasets import files
from hiedit_env.datasets.load import BUILT_IN, FORMATS, load_requests, read_dataset
from hiedit_env.datasets.requests import Probe, Request
from hiedit_env.datasets.streams import fingerprint, split_by_subject, stream, without
from hiedit_env.datasets.writing import MAX_CHARACTERS
from hiedit_env.errors import DatasetError, HieditWarning, SettingsError

REPOSITORY = Path(__file__).resolve().parents[3]
FACT = {"prompt": "My dog is called", "answer": "Rex"}


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


# Files.


def test_jsonl_counts_rows_not_lines(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    # U+2028 is a line break for str.splitlines, but not in JSON.
    first = json.dumps({"prompt": "A\u2028B", "answer": "1"}, ensure_ascii=False)
    path.write_text(f'{first}\r\n\n{{"prompt": "C", "answer": "2"}}\n', encoding="utf-8")
    got = load_requests(path)
    assert [r.prompt for r in got] == ["A\u2028B", "C"]
    assert got[1].source == f"{path} row 1"


def test_json_file_with_a_row_a_line(tmp_path: Path) -> None:
    path = tmp_path / "set.json"
    path.write_text(f"{json.dumps(FACT)}\n{json.dumps(FACT | {'answer': 'Bo'})}\n")
    with pytest.warns(HieditWarning, match="1 facts contradict"):
        assert [request.answer for request in load_requests(path)] == ["Rex", "Bo"]


def test_object_holding_one_list(tmp_path: Path) -> None:
    path = write(tmp_path / "set.json", {"license": "MIT", "facts": [FACT, FACT]})
    assert len(load_requests(path)) == 2


def test_a_single_row_is_a_set_of_one(tmp_path: Path) -> None:
    # Its only list is "paraphrases", which must not be taken for the rows.
    row = {"prompt": "P", "answer": "A", "paraphrases": ["Q"]}
    (got,) = load_requests(write(tmp_path / "set.json", row))
    assert got.paraphrases == ("Q",)


def test_byte_order_mark_and_text_path(tmp_path: Path) -> None:
    path = tmp_path / "set.JSON"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([FACT]).encode())
    assert load_requests(str(path))[0].answer == "Rex"


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_sets_load(name: str) -> None:
    requests = load_requests(name)
    assert requests[0].source == f"{name} row 0"
    assert all(request.old_answer not in (None, request.answer) for request in requests)


def test_no_torch() -> None:
    code = "import sys, hiedit_env.datasets.load; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


# Errors.


def test_row_that_is_no_object(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [FACT, ["x"]])
    with pytest.raises(DatasetError, match=r'a\.json row 1 must be an object, got \["x"\]$'):
        load_requests(path)


def test_unrecognised_fields_are_shown_beside_the_known_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [{"question": "Q", "gold": "A"}])
    with pytest.raises(DatasetError) as caught:
        load_requests(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: unknown format, row 0 has the fields question, gold;")
    for name, known in FORMATS.items():
        assert f"{name} ({', '.join(known.signature)})" in message


def test_forced_format_that_does_not_fit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [FACT])
    with pytest.raises(DatasetError, match=r"a\.json row 0: field 'src' is missing"):
        load_requests(path, format="zsre")


def test_unknown_format_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [FACT])
    with pytest.raises(DatasetError, match=r"unknown format 'zsREE'; known: counterfact, zsre,"):
        load_requests(path, format="zsREE")


def test_unknown_name_lists_built_in_names_and_paths() -> None:
    with pytest.raises(DatasetError) as caught:
        load_requests("wrold-facts")
    message = str(caught.value)
    assert "'wrold-facts'" in message
    assert "path" in message
    assert all(name in message for name in BUILT_IN)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "", "a.json holds no rows"),
        ("a.json", " \n", "a.json holds no rows"),
        ("a.json", "[]", "a.json holds no rows"),
        ("a.jsonl", "\n\n", "a.jsonl holds no rows"),
        (
            "a.json",
            '[{"prompt": "P",\n "answer": }]',
            "is not JSON at line 2, column 12: Expecting",
        ),
        ("a.jsonl", '{"prompt": "P"}\n\n{"x" 1}', "is not JSON at line 3, column 6: Expecting"),
        ("a.json", '{"prompt": "P"}\n{"x" 1}', "is not JSON at line 2, column 6: Expecting"),
        ("a.json", "[" * 100_000, "a.json cannot be read as JSON"),
        ("a.json", '"text"', 'a.json must hold a list of rows, got "text"'),
        ("a.json", '{"a": [], "b": []}', "it has 2 lists (fields: a, b)"),
        ("a.json", "{}", "it has 0 lists (fields: none)"),
        ("a.csv", "prompt,answer", "a.csv: a data set is a .json or .jsonl file"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DatasetError) as caught:
        load_requests(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_bytes_that_are_not_text_and_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'["\xff"]')
    with pytest.raises(DatasetError, match=r"a\.json is not UTF-8 text \(byte 2\)"):
        load_requests(path)
    folder = tmp_path / "b.json"
    folder.mkdir()
    with pytest.raises(DatasetError, match=r"b\.json cannot be read"):
        load_requests(folder)


@pytest.mark.parametrize(
    ("name", "start", "remedy"),
    [
        ("a.csv", "topic,subject,paraphrased_question\n", "of HalluEditBench); write it as one: "),
        ("a.csv", "prompt,answer\n", 'file; write it as one: pandas.read_csv(FILE).to_json("facts'),
        ("a.parquet", "PAR1", "pandas.read_parquet(FILE)"),
        ("a.txt", "x", "a data set is a .json or .jsonl file"),
    ],
)
def test_tables_are_refused_with_the_line_that_turns_them(
    tmp_path: Path, name: str, start: str, remedy: str
) -> None:
    path = tmp_path / name
    path.write_text(start)
    with pytest.raises(DatasetError, match=re.escape(remedy)):
        load_requests(path)


def test_an_object_of_rows_under_their_names(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", {"one": FACT, "two": FACT | {"prompt": "Q"}})
    assert [request.source.rpartition(" ")[2] for request in load_requests(path)] == ["0", "1"]


# Streams and sizes.


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("how", ["-", "/dev/stdin", "<(cat FILE)", "FIFO"])
def test_streams_are_read_by_their_content(tmp_path: Path, how: str, lines: bool) -> None:
    facts = [FACT, FACT | {"prompt": "My cat is called", "answer": "Bo"}]
    text = "\n".join(map(json.dumps, facts)) if lines else json.dumps(facts)
    path = tmp_path / "facts"
    path.write_text(text)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    given = {"FIFO": str(fifo), "<(cat FILE)": f"<(cat {path})"}.get(how, how)
    code = "import sys; from hiedit_env.datasets.load import load_requests as l; "
    code += "print(*[r.answer for r in l(sys.argv[1])])"
    feed = f"cat {path} > {fifo} & " if how == "FIFO" else ""
    command = f"{feed}{sys.executable} -c '{code}' {given} < {path}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("Rex Bo\n", "")


def test_large_files_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(files.MAX_FILE_BYTES + 1)  # sparse: nothing is on the disk
    with pytest.raises(DatasetError, match=r"a\.json has more than 2 GB, the most that is read"):
        load_requests(path)
    row = json.dumps(FACT)
    monkeypatch.setattr(files, "MAX_LINE_BYTES", len(row) + 1)
    path = tmp_path / "a.jsonl"
    path.write_text(f"{row}\n{row} \n{row}\n")
    with pytest.raises(DatasetError, match=r"a\.jsonl line 2 has more than .* MB"):
        load_requests(path)
    path.write_text(f"{row}\n{row}\n{row}")
    assert len(load_requests(path)) == 3


def test_a_stream_has_the_same_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 10)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(json.dumps([FACT]).encode())))
    with pytest.raises(DatasetError, match="- has more than 1e-08 GB"):
        load_requests("-")


def test_a_long_text_is_refused_with_row_and_field(tmp_path: Path) -> None:
    long = "x" * (MAX_CHARACTERS + 1)
    path = write(tmp_path / "a.json", [FACT, FACT | {"paraphrases": ["y", long]}])
    with pytest.raises(DatasetError, match=r"row 1: field 'paraphrases\[1\]' has 200001 char"):
        load_requests(path)


# The report.


def test_report_names_duplicates_and_contradictions(tmp_path: Path) -> None:
    rows = [FACT, FACT, {"prompt": "P", "answer": "1"}, {"prompt": "P", "answer": "2"}, FACT]
    report = read_dataset(write(tmp_path / "a.json", rows))
    assert len(report.requests) == report.rows == 5
    assert [str(found) for found in report.duplicates] == [
        "row 1 repeats row 0",
        "row 4 repeats row 0",
    ]
    (found,) = report.contradictions
    assert str(found) == "row 3 repeats row 2 with the answer '2' for '1'"
    assert report.counts["facts"] == 5
    assert report.counts["prompts"] == 2
    with pytest.warns(HieditWarning, match=r"a\.json: 1 facts contradict .*: row 3 repeats row 2"):
        load_requests(tmp_path / "a.json")


def test_report_of_a_clean_file_says_nothing_is_wrong(tmp_path: Path) -> None:
    row = FACT | {"paraphrases": ["Q"], "locality": [{"prompt": "L", "answer": "M"}]}
    assert read_dataset(write(tmp_path / "a.json", [row])).remarks() == []


def test_report_names_a_prompt_that_ends_in_a_space(tmp_path: Path) -> None:
    row = FACT | {"paraphrases": ["Q"], "locality": [{"prompt": "L", "answer": "M"}]}
    rows = [row | {"prompt": "A:\n"}, row | {"prompt": "B: "}]
    (line,) = read_dataset(write(tmp_path / "a.json", rows)).remarks()
    assert "1 prompts end in a space, which is kept as part of the text (first: row 1)" in line


# Splits.


def facts(*subjects: str) -> list[Request]:
    return [Request(f"Prompt {i} about {s}", str(i), s) for i, s in enumerate(subjects)]


@settings(max_examples=100, deadline=None)
@given(
    subjects=st.lists(
        st.sampled_from(["ß", "SS", "ss", "a", "A", "b", "c", "D", "d"]), max_size=30
    ),
    held_out=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 2**32),
)
def test_split_is_a_partition_with_no_subject_on_both_sides(
    subjects: list[str], held_out: float, seed: int
) -> None:
    requests = facts(*subjects)
    distinct = {s.casefold() for s in subjects}
    if held_out > 0 and len(distinct) < 2:
        with pytest.raises(DatasetError, match="at least 2"):
            split_by_subject(requests, held_out=held_out, seed=seed)
        return
    kept, held = split_by_subject(requests, held_out=held_out, seed=seed)
    kept_subjects = {r.subject.casefold() for r in kept}
    held_subjects = {r.subject.casefold() for r in held}
    assert not kept_subjects & held_subjects
    # Each side in the old order, and together everything once: answers are the old positions.
    for side in (kept, held):
        positions = [int(r.answer) for r in side]
        assert positions == sorted(positions)
    assert sorted(int(r.answer) for r in kept + held) == list(range(len(requests)))
    if held_out > 0:
        assert kept
        assert held
        assert abs(len(held_subjects) - held_out * len(distinct)) <= 1
    else:
        assert not held


def test_split_size_counts_subjects() -> None:
    # 10 subjects, one of them with 91 facts: 30 % are 3 subjects whatever they hold.
    requests = facts(*[f"s{i}" for i in range(10)], *["S0"] * 90)
    for seed in range(5):
        _, held = split_by_subject(requests, held_out=0.3, seed=seed)
        assert len({r.subject.casefold() for r in held}) == 3


def test_split_depends_on_seed_and_not_on_order() -> None:
    requests = facts(*[f"s{i}" for i in range(20)])
    sides = [
        frozenset(r.subject for r in split_by_subject(requests, held_out=0.5, seed=seed)[1])
        for seed in range(10)
    ]
    assert len(set(sides)) > 1
    again = split_by_subject(requests[::-1], held_out=0.5, seed=3)[1]
    assert frozenset(r.subject for r in again) == sides[3]


@pytest.mark.parametrize("held_out", [-0.1, 1, 1.5, float("nan"), True])
def test_split_refuses_shares_out_of_range(held_out: float) -> None:
    with pytest.raises(SettingsError, match="held_out must be at least 0 and below 1"):
        split_by_subject(facts("a", "b"), held_out=held_out, seed=0)


@pytest.mark.parametrize("seed", [-1, 0.5, True])
def test_split_refuses_seeds(seed: Any) -> None:
    with pytest.raises(SettingsError, match="seed must be a non-negative whole number"):
        split_by_subject(facts("a", "b"), held_out=0.5, seed=seed)


# Streams.


def test_stream_is_a_seeded_sample_without_replacement() -> None:
    requests = facts(*[f"s{i}" for i in range(50)])
    first = stream(requests, 20, np.random.default_rng(1))
    assert len({r.prompt for r in first}) == 20
    assert all(r in requests for r in first)
    assert first == stream(requests, 20, np.random.default_rng(1))
    assert first != stream(requests, 20, np.random.default_rng(2))
    assert [int(r.answer) for r in first] != sorted(int(r.answer) for r in first)
    everything = stream(requests, None, np.random.default_rng(1))
    assert sorted(r.prompt for r in everything) == sorted(r.prompt for r in requests)
    assert everything != requests
    assert everything[:20] == first  # a shorter stream is the start of a longer one


def test_stream_draws_every_fact_equally_often() -> None:
    requests = facts("a", "b", "c", "d")
    generator = np.random.default_rng(0)
    first = [int(stream(requests, 1, generator)[0].answer) for _ in range(2000)]
    # 500 expected of each; five standard deviations, sqrt(2000 / 4 * 3 / 4), are 97.
    assert all(abs(first.count(i) - 500) < 97 for i in range(4))


def test_stream_keeps_the_first_of_contradicting_facts() -> None:
    requests = [
        Request("The capital of Peru is", "Cusco", "Peru"),
        Request("The capital of Chile is", "Talca", "Chile"),
        Request("The capital of Peru is", "Piura", "Peru"),
        Request("The capital of Peru is", "Tacna", "the Republic of Peru"),
    ]
    for seed in range(5):
        got = stream(requests, None, np.random.default_rng(seed))
        assert sorted(r.answer for r in got) == ["Cusco", "Talca"]
    with pytest.raises(DatasetError, match=r"asked for 3 edits.* only 2 facts \(2 more repeat"):
        stream(requests, 3, np.random.default_rng(0))


def test_stream_refuses_more_than_there_are() -> None:
    with pytest.raises(DatasetError, match=r"asked for 4 edits, but there are only 3 facts$"):
        stream(facts("a", "b", "c"), 4, np.random.default_rng(0))
    with pytest.raises(DatasetError, match="no facts"):
        stream([], None, np.random.default_rng(0))


@pytest.mark.parametrize("num_edits", [0, -1, 1.0, True, "3"])
def test_stream_refuses_counts(num_edits: Any) -> None:
    with pytest.raises(SettingsError, match="num_edits must be a positive whole number or None"):
        stream(facts("a", "b"), num_edits, np.random.default_rng(0))


# Fingerprints.

FULL = Request("P", "A", "S", ("Q",), (Probe("L", "é"),), "O", "R", "one.json row 3")


def test_fingerprint_is_the_documented_hash() -> None:
    text = '["P","A","S",["Q"],[["L","\\u00e9"]],"O","R"]\n'
    assert fingerprint([FULL]) == hashlib.sha256(text.encode()).hexdigest()[:16]
    twice = hashlib.sha256((text + text).encode()).hexdigest()[:16]
    assert fingerprint([FULL, FULL]) == twice


def test_fingerprint_counts_portability_and_aliases_where_there_are_any() -> None:
    variants = [
        FULL,
        replace(FULL, portability=(Probe("Q", "A", "alias"),)),
        replace(FULL, portability=(Probe("Q", "A", "reversed"),)),
        replace(FULL, portability=(Probe("Q", "A", "alias", ("B",)),)),
        replace(FULL, subject_aliases=("T",)),
    ]
    assert len({fingerprint([variant]) for variant in variants}) == len(variants)


def test_fingerprint_sees_every_field_and_the_order_but_not_the_source() -> None:
    variants = [
        FULL,
        Request("p", "A", "S", ("Q",), (Probe("L", "é"),), "O", "R"),
        Request("P", "a", "S", ("Q",), (Probe("L", "é"),), "O", "R"),
        Request("P", "A", "s", ("Q",), (Probe("L", "é"),), "O", "R"),
        Request("P", "A", "S", ("Q", "Q"), (Probe("L", "é"),), "O", "R"),
        Request("P", "A", "S", ("Q",), (Probe("l", "é"),), "O", "R"),
        Request("P", "A", "S", ("Q",), (Probe("L", "e"),), "O", "R"),
        Request("P", "A", "S", ("Q",), (Probe("L", "é"),), None, "R"),
        Request("P", "A", "S", ("Q",), (Probe("L", "é"),), "O", None),
    ]
    assert len({fingerprint([variant]) for variant in variants}) == len(variants)
    moved = Request("P", "A", "S", ("Q",), (Probe("L", "é"),), "O", "R", "elsewhere.json row 0")
    assert fingerprint([moved]) == fingerprint([FULL])
    assert fingerprint(variants) != fingerprint(variants[::-1])


# Real data, where it is at hand; never copied into the project.


def shared(name: str) -> Path:
    chosen = os.environ.get("HIEDIT_SHARED_DATA")
    folder = Path(chosen) if chosen else REPOSITORY.parent / "shared" / "data"
    if not (folder / name).is_file():
        pytest.skip(f"no real data: {folder / name} is absent (set HIEDIT_SHARED_DATA)")
    return folder / name


@pytest.mark.filterwarnings("ignore:.*facts contradict:UserWarning")
@pytest.mark.parametrize(
    ("name", "rows", "probes"),
    [
        ("zsre/train.json", 454, 1),
        ("zsre/eval.json", 236, 1),
        ("relations/counterfact_train.json", 8611, 3),
        ("relations/counterfact_eval.json", 600, 3),
    ],
)
def test_real_files(name: str, rows: int, probes: int) -> None:
    requests = load_requests(shared(name))
    assert len(requests) == rows
    assert {len(request.locality) for request in requests} == {probes}
    assert all(request.paraphrases for request in requests)
    kept, held = split_by_subject(requests, held_out=0.2, seed=0)
    assert not {r.subject.casefold() for r in kept} & {r.subject.casefold() for r in held}


def test_real_zsre_by_eye() -> None:
    request = load_requests(shared("zsre/eval.json"))[0]
    assert request == Request(
        prompt="What company made Volvo B12M?",
        answer="Volkswagen Group",
        subject="Volvo B12M",
        paraphrases=("Volvo B12M's manufacturer was who?",),
        locality=(
            Probe("nq question: who sang it must have been love but its over now?", "Roxette"),
        ),
        source=request.source,
    )


def test_real_zsre_answers_agree_so_that_the_target_is_not_in_doubt() -> None:
    rows = json.loads(shared("zsre/train.json").read_text(encoding="utf-8"))
    assert all(row["ans"] == row["alt"] for row in rows)


@pytest.mark.filterwarnings("ignore:.*facts contradict:UserWarning")
def test_real_relations_have_one_fact_per_prompt_in_a_stream() -> None:
    path = shared("relations/counterfact_train.json")
    rows = json.loads(path.read_text(encoding="utf-8"))
    rewrites = [row["requested_rewrite"] for row in rows]
    prompts = {r["prompt"].replace("{}", r["subject"]) for r in rewrites}
    got = stream(load_requests(path), None, np.random.default_rng(0))
    assert len(got) == len(prompts) < len(rows)


def test_built_in_halves_share_nothing_that_is_asked() -> None:
    whole = load_requests("world-facts")
    train, test = load_requests("world-facts-train"), load_requests("world-facts-test")
    assert 0.9 * len(whole) < len(train) + len(test) <= len(whole)
    assert min(len(train), len(test)) > 0.4 * len(whole)
    subjects = [{request.subject.casefold() for request in half} for half in (train, test)]
    assert not subjects[0] & subjects[1]

    def asked(requests: list[Request]) -> set[str]:
        texts = [(r.prompt, *r.paraphrases, *(p.prompt for p in r.locality)) for r in requests]
        return {" ".join(text.casefold().split()) for group in texts for text in group}

    assert not asked(train) & asked(test)
    assert len(asked(train)) > 500


def test_nothing_that_is_kept_is_left() -> None:
    def fact(prompt: str, subject: str, paraphrases: tuple[str, ...], probe: str) -> Request:
        return Request(prompt, "X", subject, paraphrases, (Probe(probe, "Y"),))

    kept = [fact("Oslo is in", "Oslo", ("Oslo lies in",), "Rome is in")]
    requests = [
        fact("OSLO has", "oslo", (), "Bern is in"),  # its subject is kept
        fact("Rome  is in", "Rome", (), "Bern is in"),  # its prompt is asked
        fact("Kyiv is in", "Kyiv", ("oslo lies in", "Kyiv lies in"), "Oslo is in"),
    ]
    (left,) = without(requests, kept)
    assert left.prompt == "Kyiv is in"
    assert left.paraphrases == ("Kyiv lies in",)
    assert left.locality == ()
    assert without(requests, []) == requests
