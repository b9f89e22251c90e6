"""The bounded cache, against byte counts worked out by hand and a model of least recent use."""

from __future__ import annotations

import copy
import pickle

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hiedit_env.resident.prefix_cache import TensorCache


def rows(count: int, fill: float = 0.0) -> Tensor:
    """``count`` × 2 float32: 8 bytes a row."""
    return torch.full((count, 2), fill)


def test_gives_back_the_very_tensor() -> None:
    cache = TensorCache(100)
    kept = rows(3)
    assert cache.get((1, 2)) is None
    cache.put((1, 2), kept)
    assert cache.get((1, 2)) is kept
    assert cache.get((2, 1)) is None
    assert (len(cache), cache.currsize) == (1, 24)


def test_evicts_the_least_recently_used() -> None:
    cache = TensorCache(32)
    cache.put("a", rows(1))
    cache.put("b", rows(1))
    cache.put("c", rows(2))
    assert (len(cache), cache.currsize) == (3, 32)  # exactly full is not too full
    cache.get("a")
    cache.put("d", rows(1))
    assert [cache.get(key) is not None for key in "abcd"] == [True, False, True, True]
    assert cache.currsize == 32


def test_evicts_as_many_as_it_takes() -> None:
    cache = TensorCache(32)
    for key in "abc":
        cache.put(key, rows(1))
    cache.put("d", rows(3))
    assert [cache.get(key) is not None for key in "abcd"] == [False, False, True, True]
    assert cache.currsize == 32


def test_what_is_larger_than_the_bound_is_not_kept_and_evicts_nothing() -> None:
    cache = TensorCache(24)
    cache.put("a", rows(3))
    cache.put("b", rows(4))
    assert cache.get("b") is None
    assert cache.get("a") is not None
    cache.put("a", rows(4))  # the old value would be wrong now
    assert cache.get("a") is None
    assert (len(cache), cache.currsize) == (0, 0)


def test_a_second_value_replaces_the_first() -> None:
    cache = TensorCache(100)
    cache.put("a", rows(5, 1.0))
    cache.put("a", rows(2, 2.0))
    found = cache.get("a")
    assert found is not None
    assert found.tolist() == [[2, 2], [2, 2]]
    assert (len(cache), cache.currsize) == (1, 16)


def test_a_copy_keeps_its_bound() -> None:
    cache = TensorCache(16)
    cache.put("a", rows(1, 3.0))
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        twin.put("b", rows(2))
        assert (twin.get("a"), twin.currsize) == (None, 16)
    assert cache.get("a") is not None


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 4), st.integers(0, 6)), max_size=30),
    st.integers(0, 60),
)
def test_any_history(history: list[tuple[bool, int, int]], bound: int) -> None:
    cache = TensorCache(bound)
    known: list[tuple[int, int]] = []  # (key, rows), least recently used first
    for is_put, key, count in history:
        entry = next((e for e in known if e[0] == key), None)
        if not is_put:
            found = cache.get(key)
            assert (None if found is None else (key, len(found))) == entry
        if entry is not None:
            known.remove(entry)
        if is_put:
            cache.put(key, rows(count))
            entry = (key, count) if 8 * count <= bound else None
        if entry is not None:
            known.append(entry)
        while sum(8 * n for _, n in known) > bound:
            known.pop(0)
        assert (len(cache), cache.currsize) == (len(known), sum(8 * n for _, n in known))
        assert cache.currsize <= bound
