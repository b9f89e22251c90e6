"""Common parts of the scripts of built-in models: invented facts, text, tokens, files.

A world is a list of relations. Every relation has subjects and a pool of answers, every subject one
answer. Answers are drawn by hash, so that no library version can change them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from hiedit_agents.command_line import Switch, parse
from hiedit_env.envs.settings import AtLeast0, settings
from hiedit_env.errors import ResultsExistError

PAD, BOS, EOS = 0, 1, 2
SPECIAL = ("<pad>", "<bos>", "<eos>")
CONTEXT = 128


@dataclass(frozen=True, slots=True)
class Relation:
    """One relation of a world.

    Args:
        name: Identifier of the relation.
        subjects: What the facts are about.
        answers: The pool of answers; every answer is true of two subjects or more.
        templates: The prompt, then three paraphrases; ``@`` stands for the subject, and the
            answer follows after a space.
        witnesses: How many subjects, the last ones, are never edited.
    """

    name: str
    subjects: tuple[str, ...]
    answers: tuple[str, ...]
    templates: tuple[str, ...]
    witnesses: int = 4


@dataclass(frozen=True, slots=True)
class Fact:
    """One truth of a world: a subject and an answer, both of the relation."""

    relation: Relation
    subject: str
    answer: str

    @property
    def witness(self) -> bool:
        """Whether it is kept for locality: never edited, so it stays true."""
        return self.subject in self.relation.subjects[-self.relation.witnesses :]

    def prompts(self) -> list[str]:
        """Returns the prompt and its three paraphrases, in this order."""
        return [template.replace("@", self.subject) for template in self.relation.templates]


def order(seed: int, relation: str, role: str, items: Sequence[str]) -> list[str]:
    """Shuffles by SHA-256, which no library version can change."""
    salt = f"{seed}|{relation}|{role}|"
    return sorted(items, key=lambda item: hashlib.sha256((salt + item).encode()).digest())


def draw_facts(world: Sequence[Relation], seed: int) -> list[Fact]:
    """Returns the facts of a world, relation by relation, for a seed."""
    facts = []
    for relation in world:
        subjects = order(seed, relation.name, "subject", relation.subjects)
        pool = order(seed, relation.name, "answer", relation.answers)
        answers = {subject: pool[i % len(pool)] for i, subject in enumerate(subjects)}
        facts += [Fact(relation, subject, answers[subject]) for subject in relation.subjects]
    return facts


def make_records(
    facts: Sequence[Fact], witnesses: Sequence[Fact], seed: int, stride: int = 5
) -> list[dict[str, Any]]:
    """Returns a JSON record for each of ``facts``.

    ``target`` is another answer of the same relation. ``paraphrases`` are two of the three, in
    turn. ``locality`` holds two witnesses, neither answered by ``target``: one of the same
    relation and one of another.

    Args:
        facts: What may be edited.
        witnesses: What never is.
        seed: Decides targets and witnesses of the same relation.
        stride: Takes the witnesses of other relations in turns; without common divisor with their
            number.
    """
    records = []
    for i, fact in enumerate(facts):
        relation = fact.relation
        wrong = [answer for answer in relation.answers if answer != fact.answer]
        target = order(seed, relation.name, fact.subject, wrong)[0]
        same = {w.subject: w for w in witnesses if w.relation is relation and w.answer != target}
        other = [w for w in witnesses if w.relation is not relation]
        probes = [
            same[order(seed, relation.name, fact.subject, list(same))[0]],
            other[stride * i % len(other)],
        ]
        prompt, *paraphrases = fact.prompts()
        del paraphrases[i % 3]
        records.append(
            {
                "subject": fact.subject,
                "relation": relation.name,
                "prompt": prompt,
                "answer": fact.answer,
                "target": target,
                "paraphrases": paraphrases,
                "locality": [{"prompt": w.prompts()[0], "answer": w.answer} for w in probes],
            }
        )
    return records


def make_tokenizer(facts: Sequence[Fact], size: int) -> Tokenizer:
    """Trains a byte-level BPE of ``size`` entries on all sentences; adds no special tokens.

    Answers are counted four times as often as they occur, which keeps most within three tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),  # become tokens 0, 1 and 2
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    corpus = [f"{p} {fact.answer}." for fact in facts for p in fact.prompts()]
    corpus += [f" {fact.answer}." for fact in facts for _ in range(12)]
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def encode(facts: Sequence[Fact], tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Returns the four wordings of every fact as tokens, facts in order.

    Returns:
        The tokens (N × T, int64): prompt, answer, ``.``, end of text, padding on the right; and a
        mask (N × T, bool), true at the answer and its ``.``.
    """
    rows, answers = [], []
    for fact in facts:
        answer = [*tokenizer.encode(f" {fact.answer}.").ids, EOS]
        for text in fact.prompts():
            prompt = tokenizer.encode(text).ids
            rows.append(torch.tensor(prompt + answer))
            answers.append(torch.tensor([0] * len(prompt) + [1] * (len(answer) - 1) + [0]))
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    return ids, nn.utils.rnn.pad_sequence(answers, batch_first=True).bool()


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Computes on one thread with deterministic algorithms, then restores what was set before."""
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)


def measure(model: nn.Module, ids: Tensor, answers: Tensor) -> tuple[float, float]:
    """Returns teacher-forced token accuracy and exact match, in [0, 1], of answers with ``.``.

    A row whose answer is exact here is also answered by greedy generation, token for token.
    """
    with torch.no_grad():
        guess = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
    right, asked = guess == ids[:, 1:], answers[:, 1:]
    exact = (right | ~asked).all(dim=1)
    return float(right[asked].float().mean()), float(exact.float().mean())


def files_of(out: Path, name: str) -> tuple[Path, Path]:
    """Returns the model folder and the facts file of a built-in model below ``out``."""
    return out / "model" / "assets" / name, out / "datasets" / "data" / f"{name}_facts.json"


def require_absent(out: Path, name: str) -> None:
    """Refuses to replace files.

    Raises:
        ResultsExistError: names the first one there is.
    """
    folder, facts_path = files_of(out, name)
    present = [path for path in (*sorted(folder.glob("*")), facts_path) if path.exists()]
    if present:
        raise ResultsExistError(f"{present[0]} exists; pass --force to replace it")


def write(
    out: Path,
    name: str,
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    records: Sequence[dict[str, Any]],
) -> None:
    """Writes the model folder and the facts below ``out``, over whatever is there."""
    folder, facts_path = files_of(out, name)
    for parent in (folder, facts_path.parent):
        parent.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # it is written readable by its owner only
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL, strict=True)),
        "model_max_length": CONTEXT,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
    }
    for path, content in ((folder / "tokenizer_config.json", settings), (facts_path, records)):
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8", newline="\n")


@settings
class Options:
    """The options of a script that makes a model."""

    out: Path
    """the package folder, or another"""
    seed: AtLeast0 = 0
    """seed of facts and weights; the shipped files use 0"""
    force: Switch = False
    """replace files that exist"""


def make_world(
    program: str,
    description: str,
    build: Callable[[Path, int, bool], tuple[float, float]],
    arguments: Sequence[str] | None,
) -> int:
    """Runs the command line of a script that makes a model; returns 0.

    Args:
        program: How the script is called.
        description: What it makes.
        build: From folder, seed and whether to replace files to (token accuracy, exact match).
        arguments: Without the program's name; ``sys.argv`` where None.
    """
    given = parse(Options, arguments, program=program, description=description)
    tokens, exact = build(given.out, given.seed, given.force)
    print(f"token accuracy {tokens:.2%}, exact match {exact:.2%}")
    return 0
