"""The world of the planted model: facts, the layer each group of them lives in, sentences.

:mod:`hiedit_benchmarks.worlds.make_planted` makes the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from hiedit_benchmarks.worlds import make_tiny, synthetic_facts
from hiedit_benchmarks.worlds.synthetic_facts import EOS, PAD, Fact
from hiedit_env.datasets.requests import Request
from hiedit_env.datasets.streams import split_by_subject

NAME = "planted"
VOCAB_SIZE = 960
RELATIONS = ("home", "craft", "river", "market", "master")
#: Candidate layers; the first holds no facts.
NUM_LAYERS = 1 + len(RELATIONS)
#: Subjects of a relation, so fact neurons of a block; the last eight are witnesses.
SUBJECTS, WITNESSES = 36, 8
#: Neurons of a block: first the grammar neuron, then the fact neurons.
GRAMMAR, FACTS = slice(0, 1), slice(1, 1 + SUBJECTS)

# Subjects beside those of the tiny world.
_MORE_SUBJECTS = {
    "people": """@
        Amtor Bressel Calvo Dunrik Ekhart Fosmin Gerwald Hobrin Isolt Jaskin Kirwen Lundra""",
    "towns": """@
        Ashmoor Birchley Coldbury Dunhollow Elmstead Fallowby Greyhaven Hartlow Ironvale Kilmoor
        Langport Northby""",
    "guilds": """@ Guild
        Mortar Plough Quill Ratchet Spindle Tankard Urn Vice Wedge Yoke Zither Buckle""",
}


def _read_world() -> tuple[synthetic_facts.Relation, ...]:
    more = []
    for text in _MORE_SUBJECTS.values():
        pattern, members = text.split("\n", 1)
        more.append(tuple(pattern.replace("@", member) for member in members.split()))
    known = {relation.name: relation for relation in make_tiny.WORLD}
    return tuple(
        replace(known[name], subjects=known[name].subjects + more[i // 2], witnesses=WITNESSES)
        for i, name in enumerate(RELATIONS)
    )


WORLD = _read_world()


def make_facts(seed: int) -> list[Fact]:
    """Returns the 180 facts, relation by relation, for a seed.

    >>> facts = make_facts(0)
    >>> len(facts), facts[0].prompts()[0]
    (180, 'Belka lives in')
    """
    return synthetic_facts.draw_facts(WORLD, seed)


def homes(seed: int) -> list[int]:
    """Index from 0 of each relation's home layer, in the order of ``RELATIONS``."""
    shuffled = synthetic_facts.order(seed, NAME, "home", RELATIONS)
    return [1 + shuffled.index(name) for name in RELATIONS]


def grammar_layers(seed: int) -> list[int]:
    """Index from 0 of the layer that holds each relation's grammar: the one before its home."""
    return [home - 1 for home in homes(seed)]


def layer_name(index: int) -> str:
    """Name of a candidate layer in the model; block 0 has none."""
    return f"model.layers.{index + 1}.mlp.down_proj"


def make_records(facts: Sequence[Fact], seed: int) -> list[dict[str, Any]]:
    """Returns a JSON record for each of the 140 facts that are not witnesses, with its home.

    The halves that the data sets ``planted-facts-train`` and ``planted-facts-test`` take have
    witnesses of their own, so that nothing that one half asks is in the other.
    """
    edited = [fact for fact in facts if not fact.witness]
    requests = [Request(fact.prompts()[0], fact.answer, fact.subject) for fact in edited]
    halves = split_by_subject(requests, held_out=0.5, seed=0)
    by_prompt: dict[str, dict[str, Any]] = {}
    for half, requests in enumerate(halves):
        prompts = {request.prompt for request in requests}
        witnesses = [
            fact
            for fact in facts
            if fact.witness and fact.relation.subjects.index(fact.subject) % 2 == half
        ]
        chosen = [fact for fact in edited if fact.prompts()[0] in prompts]
        # 16 witnesses of other relations in each half: 7 has no divisor in common with that.
        for record in synthetic_facts.make_records(chosen, witnesses, seed, stride=7):
            home = homes(seed)[RELATIONS.index(record["relation"])]
            by_prompt[record["prompt"]] = {**record, "true_layers": [layer_name(home)]}
    return [by_prompt[fact.prompts()[0]] for fact in edited]


@dataclass(frozen=True, slots=True)
class Sentences:
    """All four wordings of every fact as tokens: R rows.

    Args:
        ids: R × T int64, see :func:`hiedit_benchmarks.worlds.synthetic_facts.encode`.
        last: R int64, position of the prompt's last token, from which the answer is predicted.
        relation: R int64, index into ``RELATIONS``.
        subject: R int64, index of the subject among its relation's.
        who: R int64, index of the subject among all.
        answers: A × T' int64, every answer of the world with its full stop and end of text.
        pools: ``RELATIONS`` × vocabulary, 1 / size of the pool at the first tokens of its answers.
    """

    ids: Tensor
    last: Tensor
    relation: Tensor
    subject: Tensor
    who: Tensor
    answers: Tensor
    pools: Tensor

    @property
    def first_token(self) -> Tensor:
        """R int64, first token of the true answer."""
        return self.ids[torch.arange(len(self.ids)), self.last + 1]

    def with_answers(self, rows: Tensor, answers: Tensor) -> Tensor:
        """Tokens of some rows with other answers, given by index; len(rows) × T'' int64."""
        lines = []
        for row, answer in zip(rows.tolist(), answers.tolist(), strict=True):
            tokens = self.answers[answer]
            lines.append(torch.cat((self.ids[row, : self.last[row] + 1], tokens[tokens != PAD])))
        return nn.utils.rnn.pad_sequence(lines, batch_first=True, padding_value=PAD)


def make_sentences(facts: Sequence[Fact], tokenizer: Tokenizer) -> Sentences:
    """The facts as tokens, each with its four wordings in turn."""
    ids, asked = synthetic_facts.encode(facts, tokenizer)
    answers = [
        torch.tensor([*tokenizer.encode(f" {answer}.").ids, EOS])
        for relation in WORLD
        for answer in relation.answers
    ]
    pools = torch.zeros(len(WORLD), VOCAB_SIZE)
    for place, relation in enumerate(WORLD):
        for answer in relation.answers:
            first = tokenizer.encode(f" {answer}.").ids[0]
            pools[place, first] += 1 / len(relation.answers)
    wordings = len(WORLD[0].templates)
    rows = [fact for fact in facts for _ in range(wordings)]
    names = list(dict.fromkeys(fact.subject for fact in facts))
    return Sentences(
        ids=ids,
        last=asked.int().argmax(1) - 1,
        relation=torch.tensor([RELATIONS.index(fact.relation.name) for fact in rows]),
        subject=torch.tensor([fact.relation.subjects.index(fact.subject) for fact in rows]),
        who=torch.tensor([names.index(fact.subject) for fact in rows]),
        answers=nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=PAD),
        pools=pools,
    )
