"""Data sets: files and their errors, streams of rows, the report, and the real data."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hiedit_env.datasets import files
from hiedit_env.datasets.load import BUILT_IN, FORMATS, load_requests, read_dataset
from hiedit_env.datasets.requests import Probe, Request
from hiedit_env.datasets.streams import split_by_subject, stream
from hiedit_env.datasets.writing import MAX_CHARACTERS
from hiedit_env.errors import DatasetError, HieditWarning

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
        (
            "a.json",
            "[]",
            "a.json holds no rows; a row is an object with prompt, answer and subject",
        ),
        ("a.jsonl", "\n\n", "a.jsonl holds no rows"),
        (
            "a.json",
            '[{"prompt": "P",\n "answer": }]',
            "is not JSON at line 2, column 12: Expecting",
        ),
        ("a.jsonl", '{"prompt": "P"}\n\n{"x" 1}', "is not JSON at line 3, column 6: Expecting"),
        ("a.json", '{"prompt": "P"}\n{"x" 1}', "is not JSON at line 2, column 6: Expecting"),
        ("a.json", "[" * 100_000, "its lists or objects are nested too deep"),
        ("a.json", '"text"', 'a.json must hold a list of rows, got "text"'),
        ("a.json", '{"a": [], "b": []}', "it has 2 lists (fields: a, b)"),
        ("a.json", "{}", "it has 0 lists (fields: none)"),
        ("a.csv", "prompt,answer", "a.csv: a data set is a .json or .jsonl file"),
        (
            "a.json",
            "prompt,answer\nP,A",
            "column 1: Expecting value; it begins with 'prompt,answer",
        ),
        (
            "a.json",
            '[{"prompt": "P", "answer": "A", "prompt": "Q"}]',
            """the field 'prompt' twice, {"prompt": "Q", "answer": "A"}; leave one""",
        ),
        ("a.jsonl", '{"prompt": "P"}\n{"x": {"y": 1, "y": 1}}', "has an object with the field 'y'"),
        ("a.json", f"[{'9' * 5000}]", "a number has more than 4300 digits; write it as text"),
        ("a.json", '[{"prompt": "\\u200b \\ufeff", "answer": "A"}]', "field 'prompt' is empty"),
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
        ("a.xlsx", "PK", "pandas.read_excel(FILE)"),
        ("a.json.gz", "x", "a data set is a .json or .jsonl file; unpack it first"),
        ("a.yaml", "- a: b", "write its rows as JSON"),
        ("a.txt", "x", "a data set is a .json or .jsonl file; if this one holds JSON, rename it"),
    ],
)
def test_tables_are_refused_with_the_line_that_turns_them(
    tmp_path: Path, name: str, start: str, remedy: str
) -> None:
    path = tmp_path / name
    path.write_text(start)
    with pytest.raises(DatasetError, match=re.escape(remedy)):
        load_requests(path)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize(
    ("data", "kind"),
    [
        # Without the time in its header, so that every test process collects the same name.
        (gzip.compress(b"[]", mtime=0), "compressed; unpack it first"),
        (lzma.compress(b"[]"), "compressed; unpack it first"),
        (bz2.compress(b"[]"), "compressed; unpack it first"),
        # An empty frame of Zstandard (RFC 8878, section 3.1.1).
        (b"\x28\xb5\x2f\xfd\x20\x00\x01\x00\x00", "compressed; unpack it first"),
        (b"ARROW1\x00\x00", "an Arrow table; write it as one: pandas.read_feather(FILE)"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "a pointer of Git LFS; fetch",
        ),
        (b"<!DOCTYPE html>\n<html>", "a page of HTML; download the file itself"),
        (b"SQLite format 3\x00", "a database of SQLite; write its rows as JSON"),
        (b"PAR1\x15\x04", "a Parquet table; write it as one: pandas.read_parquet(FILE)"),
        (b"PK\x03\x04\x14", "a zip archive or an Excel table"),
        ("[{}]".encode("utf-16"), "UTF-16 or UTF-32 text; save it as UTF-8"),
        (codecs.BOM_UTF16_BE + "[{}]".encode("utf-16-be"), "UTF-16 or UTF-32 text; save it"),
        ("[{}]".encode("utf-16-be"), "UTF-16 or UTF-32 text; save it as UTF-8"),
        ("[{}]".encode("utf-32"), "UTF-16 or UTF-32 text; save it as UTF-8"),
    ],
)
def test_what_is_no_json_under_such_a_name_is_called_what_it_is(
    tmp_path: Path, name: str, data: bytes, kind: str
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=re.escape(f"{path} is {kind}")):
        load_requests(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", "\n[{row},\n {row}]\n"),
        ("a.jsonl", "[{row}, {row}]"),
        ("a.ndjson", "{row}\n{row}\n"),
    ],
)
def test_a_list_among_lines_and_other_names_of_lines(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text.replace("{row}", json.dumps(FACT)))
    assert [request.prompt for request in load_requests(path)] == [FACT["prompt"]] * 2


@pytest.mark.parametrize(
    "table",
    [
        {"prompt": {"0": "Rome is in", "1": "Oslo is in"}, "answer": {"0": "Peru", "1": "Chad"}},
        {"prompt": ["Rome is in", "Oslo is in"], "answer": ["Peru", "Chad"]},
        {"src": ["Where?"], "rephrase": ["And where?"], "ans": ["Here"]},
        {"columns": ["prompt", "answer"], "index": [0], "data": [["Rome is in", "Peru"]]},
    ],
)
def test_tables_stored_by_columns_are_called_so(tmp_path: Path, table: object) -> None:
    path = write(tmp_path / "set.json", table)
    with pytest.raises(DatasetError, match=r"is a table stored by columns; .*orient=\"records\""):
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


@pytest.mark.parametrize("again", ["belka lives in", "Belka  lives in", "Belka lives in "])
def test_prompts_that_differ_in_case_and_white_space_are_one(tmp_path: Path, again: str) -> None:
    fact = {"prompt": "Belka lives in", "answer": "Istrand"}
    report = read_dataset(write(tmp_path / "set.json", [fact, {"prompt": again, "answer": "Tol"}]))
    assert [str(found) for found in report.contradictions] == [
        "row 1 repeats row 0 with the answer 'Tol' for 'Istrand'"
    ]


@pytest.mark.parametrize("prompt", ["Belka lives in", "{0} lives in", "[X] lives in"])
def test_report_names_a_subject_that_is_not_in_its_prompt(tmp_path: Path, prompt: str) -> None:
    rows = [
        {"prompt": "the home of corrin is", "answer": "Tol", "subject": "Corrin"},
        {"prompt": prompt, "answer": "Istrand", "subject": "Corrin"},
        {"prompt": "Where is it?", "answer": "Tol"},
    ]
    [line] = [
        r
        for r in read_dataset(write(tmp_path / "set.json", rows)).remarks()
        if "name a subject" in r
    ]
    assert "1 facts name a subject that is not in their prompt (first: row 1, 'Corrin')" in line


def test_characters_of_no_width_around_a_text_are_no_part_of_it(tmp_path: Path) -> None:
    row = {"prompt": "\ufeffBelka lives in\u200b", "answer": "\u200b Istrand\ufeff"}
    report = read_dataset(write(tmp_path / "set.json", [row]))
    [request] = report.requests
    assert (request.prompt, request.answer) == ("Belka lives in\u200b", "Istrand")
    assert "1 prompts end in a space" in report.remarks()[0]


def test_report_of_a_clean_file_says_nothing_is_wrong(tmp_path: Path) -> None:
    row = FACT | {"paraphrases": ["Q"], "locality": [{"prompt": "L", "answer": "M"}]}
    assert read_dataset(write(tmp_path / "a.json", [row])).remarks() == []


def test_report_names_a_prompt_that_ends_in_a_space(tmp_path: Path) -> None:
    row = FACT | {"paraphrases": ["Q"], "locality": [{"prompt": "L", "answer": "M"}]}
    rows = [row | {"prompt": "A:\n"}, row | {"prompt": "B: "}]
    (line,) = read_dataset(write(tmp_path / "a.json", rows)).remarks()
    assert "1 prompts end in a space, which is kept as part of the text (first: row 1)" in line


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
