"""Splits, streams and fingerprints of data sets."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiedit_env.datasets.load import load_requests
from hiedit_env.datasets.requests import Probe, Request
from hiedit_env.datasets.streams import fingerprint, split_by_subject, stream, without
from hiedit_env.errors import DatasetError, SettingsError

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


def test_a_repetition_leaves_its_prompts_and_a_contradiction_nothing() -> None:
    prompt = "The capital of Peru is"
    probes = [Probe(f"Question {i}", str(i), "multi-hop") for i in range(3)]
    requests = [
        Request(prompt, "Cusco", "Peru", ("A",), (Probe("L", "x"),), portability=(probes[0],)),
        Request(prompt, "Piura", "Peru", ("no",), portability=(Probe("no", "no"),)),
        Request(
            prompt,
            "Cusco",
            "the Republic of Peru",
            ("B", "A", "B"),
            (Probe("L", "x"), Probe("M", "y")),
            portability=(probes[1], probes[0]),
            subject_aliases=("PE",),
        ),
        Request(prompt, "Cusco", "Peru", portability=(probes[2],), subject_aliases=("PE",)),
    ]
    (got,) = stream(requests, None, np.random.default_rng(0))
    assert got == Request(
        prompt,
        "Cusco",
        "Peru",
        ("A", "B"),
        (Probe("L", "x"), Probe("M", "y")),
        portability=tuple(probes),
        subject_aliases=("PE",),
    )


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
        replace(FULL, prompt_form="chat"),
        replace(FULL, system="Be short."),
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
