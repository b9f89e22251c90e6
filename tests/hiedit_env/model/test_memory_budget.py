"""Memory: the estimate by hand, and what a machine and a container say is free."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hiedit_env.datasets.requests import Probe, Request
from hiedit_env.errors import HieditWarning, LayerError, NotEnoughMemoryError, SettingsError
from hiedit_env.model import loading, memory_budget
from hiedit_env.model.loading import load_model
from hiedit_env.model.memory_budget import (
    available_memory,
    estimate_memory,
    longest_texts,
    require_room,
)
from tests.hiedit_env.model.test_loading import CONFIG, PARAMETERS, forbidden, save_model
from tests.support.models import byte_tokenizer
from tests.support.models import tokenizer as word_tokenizer

CPU = torch.device("cpu")
MEMINFO = "MemTotal:  900 kB\nMemFree:   100 kB\nMemAvailable:    300 kB\n"


def test_estimate_by_hand() -> None:
    # Default layers of 3 blocks: one gate and one up projection, 16 × 24 each.
    candidates = 2 * 16 * 24
    # Per block four 16 → 16, three between 16 and 24; the head 16 → 8.
    activations = 3 * (4 * 32 + 3 * 40) + 24
    in_dtype = PARAMETERS + candidates + 256 * activations
    # Change and change before, then four matrices of 16 × 16 for either layer.
    in_float32 = 2 * candidates + 4 * 2 * 16**2
    assert estimate_memory(CONFIG, torch.float32) == 4 * in_dtype + 4 * in_float32
    assert estimate_memory(CONFIG, torch.bfloat16) == 2 * in_dtype + 4 * in_float32


def test_large_inputs_cost_more() -> None:
    """Keys of down projections are longer, and their statistics grow with the square."""
    usual = estimate_memory(CONFIG, torch.float32)
    down = estimate_memory(CONFIG, torch.float32, layers="*layers.{0,1}.mlp.down_proj")
    assert down - usual == 4 * 4 * 2 * (24**2 - 16**2)


def test_the_layers_asked_for_are_counted() -> None:
    usual = estimate_memory(CONFIG, torch.float32)
    one = estimate_memory(CONFIG, torch.float32, layers=["model.layers.2.mlp.up_proj"])
    # One layer of 16 × 24 less: 12 bytes per weight, and four float32 matrices of 16 × 16.
    assert usual - one == 12 * 16 * 24 + 16 * 16**2
    with pytest.raises(LayerError, match="matches no module"):
        estimate_memory(CONFIG, torch.float32, layers="model.layers.9.mlp.up_proj")


def test_one_matrix_of_a_7b_needs_little_more_than_the_model() -> None:
    config = LlamaConfig(num_hidden_layers=32)  # Llama-2-7B's sizes
    one = estimate_memory(config, torch.bfloat16, layers="model.layers.12.mlp.up_proj")
    assert 13.5e9 < one < 15.5e9


def test_long_prompts_cost_more() -> None:
    usual = estimate_memory(CONFIG, torch.float32)
    assert estimate_memory(CONFIG, torch.float32, tokens=256) == usual
    # Two numbers of 4 bytes per column of every matrix and further token; columns as above.
    columns = 3 * (4 * 32 + 3 * 40) + 24
    assert estimate_memory(CONFIG, torch.float32, tokens=2000) - usual == 8 * 1744 * columns


def test_long_answers_cost_their_logits() -> None:
    long = estimate_memory(CONFIG, torch.float32, tokens=2000)
    # A head of 8 words; 256 + 2 × 1744 positions of it are counted already, six for each token.
    assert CONFIG.vocab_size == 8
    counted = 256 + 2 * 1744
    for answer, more in ((0, 0), (624, 0), (625, 6 * 625 - counted), (1990, 6 * 1990 - counted)):
        found = estimate_memory(CONFIG, torch.float32, tokens=2000, answer=answer)
        assert found - long == 4 * 8 * max(0, more)


def test_the_longest_prompt_is_counted_in_the_models_own_tokens() -> None:
    # One token per byte; two bytes per letter, and one space in front of the answer.
    tokenizer = byte_tokenizer()
    fact = Request(prompt="ж" * 200, answer="ответ", subject="ж")
    assert longest_texts(tokenizer, [fact]) == (400 + 1 + 10, 10)
    # The probes count as well, with their own answers, and the system message in front of a chat.
    probe = Probe("p" * 900, "a" * 99)
    for field in ("locality", "portability"):
        assert longest_texts(tokenizer, [fact, replace(fact, **{field: (probe,)})]) == (1000, 99)
    assert longest_texts(tokenizer, [replace(fact, paraphrases=("q" * 700,))]) == (711, 10)
    assert longest_texts(tokenizer, [replace(fact, system="s" * 100)]) == (511, 10)
    # Every estimate has room for this many; a tokenizer with long tokens has fewer than bytes.
    assert longest_texts(tokenizer, [Request(prompt="a", answer="b", subject="a")]) == (256, 1)
    assert longest_texts(tokenizer, []) == (256, 0)
    words = Request(prompt=" ".join(["w5"] * 300), answer="w6", subject="w5")
    assert longest_texts(word_tokenizer(), [words]) == (301, 1)


def test_a_prompt_that_does_not_fit_is_refused_before_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    long = Request(prompt=" ".join(["w5"] * 5000), answer="w6", subject="w5")
    short = Request(prompt="w5", answer="w6", subject="w5")
    free = estimate_memory(CONFIG, torch.float32) + 1000
    monkeypatch.setattr(memory_budget, "available_memory", lambda _: free)
    load_model(str(tmp_path), progress=False, requests=[short])
    monkeypatch.setattr(loading, "_read_weights", forbidden)
    with pytest.raises(
        NotEnoughMemoryError, match=r"its longest prompt of 5,001 tokens .* shorter prompts"
    ):
        load_model(str(tmp_path), progress=False, requests=[short, long])


@pytest.mark.parametrize("way", ["argument", "environment"])
def test_the_check_can_be_overridden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], way: str
) -> None:
    save_model(tmp_path)
    monkeypatch.setattr(memory_budget, "available_memory", lambda _: 1)

    def load(check: str) -> None:
        monkeypatch.setenv("HIEDIT_MEMORY_CHECK", check if way == "environment" else "refuse")
        argument = {"memory": check} if way == "argument" else {}
        capfd.readouterr()
        load_model(str(tmp_path), progress=False, **argument)

    load("warn")
    assert "needs about 0.00083 GB; 0.0 GB free" in capfd.readouterr().err
    load("off")
    assert capfd.readouterr().err == ""
    with pytest.raises(NotEnoughMemoryError, match="HIEDIT_MEMORY_CHECK=warn"):
        load("refuse")
    with pytest.raises(SettingsError, match=r"refuse, warn, off.*got 'no'"):
        load("no")


def test_too_little_memory_is_found_before_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path)
    needed = estimate_memory(CONFIG, torch.float32)
    for enough in (needed, None):
        monkeypatch.setattr(memory_budget, "available_memory", lambda _, free=enough: free)
        load_model(str(tmp_path), progress=False)
    monkeypatch.setattr(memory_budget, "available_memory", lambda _: needed - 1)
    monkeypatch.setattr(loading, "_read_weights", forbidden)
    with pytest.raises(NotEnoughMemoryError, match=r"0\.00083 GB but cpu has 0\.0 GB free"):
        load_model(str(tmp_path), progress=False)


@pytest.mark.parametrize("progress", [False, True])
@pytest.mark.parametrize(("spare", "tight"), [(0, False), (-1, True), (None, False)])
def test_what_is_needed_is_said_when_it_is_much(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    progress: bool,
    spare: int | None,
    tight: bool,
) -> None:
    save_model(tmp_path)
    capfd.readouterr()
    free = None if spare is None else 2 * estimate_memory(CONFIG, torch.float32) + spare
    monkeypatch.setattr(memory_budget, "available_memory", lambda _: free)
    load_model(str(tmp_path), progress=progress)
    out, err = capfd.readouterr()
    assert out == ""
    assert ("needs about 0.00083 GB" in err) is (progress or tight)
    assert progress or err.count("\n") == tight


def system(monkeypatch: pytest.MonkeyPatch, files: Mapping[str, str]) -> None:
    """A machine with these files only."""

    def read_text(self: Path, encoding: str) -> str:
        if str(self) not in files:
            raise FileNotFoundError(str(self))
        return files[str(self)]

    monkeypatch.setattr(Path, "read_text", read_text)


def test_the_machines_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    system(monkeypatch, {"/proc/meminfo": MEMINFO})
    assert available_memory(CPU) == 300 * 1024
    system(monkeypatch, {"/proc/meminfo": ""})
    pages = {"SC_AVPHYS_PAGES": 7, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    assert available_memory(CPU) == 7 * 4096
    monkeypatch.delattr(os, "sysconf")
    assert available_memory(CPU) is None


ROOT = "/sys/fs/cgroup"


def group(path: str, limit: str, used: int, stat: str = "anon 5\nfile 99\n") -> dict[str, str]:
    return {
        f"{ROOT}{path}/memory.max": f"{limit}\n",
        f"{ROOT}{path}/memory.current": f"{used}\n",
        f"{ROOT}{path}/memory.stat": stat,
    }


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        # In a container of its own name space, and on a machine with nested groups.
        ({"/proc/self/cgroup": "0::/\n", **group("", "1000", 300)}, 700),
        ({"/proc/self/cgroup": "0::/a/b\n", **group("/a/b", "1000", 300)}, 700),
        (
            {
                "/proc/self/cgroup": "0::/a/b\n",
                **group("/a/b", "1000", 300),
                **group("/a", "500", 400),
            },
            100,
        ),
        ({"/proc/self/cgroup": "0::/a\n", **group("/a", "max", 3), **group("", "50", 30)}, 20),
        # What files only are cached for is as good as free.
        (
            {
                "/proc/self/cgroup": "0::/\n",
                **group("", "1000", 900, "inactive_anon 7\ninactive_file 30\nactive_file 20\n"),
            },
            150,
        ),
        ({"/proc/self/cgroup": "0::/\n", **group("", "1000", 1200)}, 0),
        # No limit, one above what the machine has, version 1, and nothing to read.
        ({"/proc/self/cgroup": "0::/\n", **group("", "max", 3)}, 300 * 1024),
        ({"/proc/self/cgroup": "0::/\n", **group("", "999999999", 3)}, 300 * 1024),
        ({"/proc/self/cgroup": "4:memory:/a\n", **group("/a", "10", 3)}, 300 * 1024),
        ({"/proc/self/cgroup": "0::/a\n"}, 300 * 1024),
    ],
)
def test_a_containers_limit_counts(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, str], wanted: int
) -> None:
    system(monkeypatch, {"/proc/meminfo": MEMINFO, **files})
    assert available_memory(CPU) == wanted


def test_a_model_without_known_layers_counts_a_quarter(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: Any, **__: Any) -> None:
        raise memory_budget.LayerError("none")

    config = LlamaConfig.from_dict(CONFIG.to_dict())
    usual = estimate_memory(config, torch.float32)
    monkeypatch.setattr(memory_budget, "find_candidates", nothing)
    # Instead of 2 · 16 · 24 weights (12 bytes each) and 2 · 16² numbers of statistics (16 bytes).
    quarter = PARAMETERS // 4
    wanted = usual - 12 * 2 * 16 * 24 - 16 * 2 * 16**2 + 28 * quarter
    assert estimate_memory(config, torch.float32) == wanted


def test_a_fact_that_comes_later_is_refused_where_its_pass_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = LlamaForCausalLM(CONFIG)

    def fact(words: int) -> Request:
        return Request("w5 " * (words - 1) + "w5", "w6", "w5", source="line 3")

    # 2,000 tokens with the answer: 256 once and 1,744 twice, as many numbers as columns, above.
    needed = 4 * (256 + 2 * 1744) * (3 * (4 * 32 + 3 * 40) + 24)
    for free in (needed, None):
        monkeypatch.setattr(memory_budget, "available_memory", lambda _, free=free: free)
        require_room(model, word_tokenizer(), fact(1999), "refuse")
    monkeypatch.setattr(memory_budget, "available_memory", lambda _: needed - 1)
    with pytest.raises(NotEnoughMemoryError, match=r"^line 3: its longest prompt of 2,000 tokens"):
        require_room(model, word_tokenizer(), fact(1999))
    with pytest.warns(HieditWarning, match="2,000 tokens needs about 0.012 GB"):
        require_room(model, word_tokenizer(), fact(1999), "warn")
    require_room(model, word_tokenizer(), fact(1999), "off")
    # 256 tokens are in the estimate of the loading.
    monkeypatch.setattr(memory_budget, "available_memory", lambda _: 1)
    require_room(model, word_tokenizer(), fact(255))
    with pytest.raises(NotEnoughMemoryError):
        require_room(model, word_tokenizer(), fact(256))


def test_the_facts_of_an_environment_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([{"prompt": "and " * 40 + "Tarn lies in", "answer": "Norland"}]))
    monkeypatch.setattr(memory_budget, "TOKENS", 10)
    seen: list[int] = []
    monkeypatch.setattr(loading, "require_memory", lambda *given: seen.append(given[-1]))
    gymnasium.make("hiedit/LifelongEdit-v1", model="tiny", dataset=str(path), num_edits=1).close()
    assert seen
    assert min(seen) > 40
