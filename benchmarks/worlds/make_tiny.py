"""Makes the tiny language model, its tokenizer and its facts, used offline by tests and defaults.

The world is invented and closed: four kinds of subject, two relations each, every subject with one
answer per relation. The model is a three-block Llama trained until it has every fact by heart, so
that an edit can be tried, and a true answer be known, without any download.

Run ``python -m hiedit_benchmarks.worlds.make_tiny --out hiedit_env`` to write, below the folder
given,

- ``model/assets/tiny/``: ``config.json``, ``generation_config.json``, ``model.safetensors``,
  ``tokenizer.json``, ``tokenizer_config.json``;
- ``datasets/data/tiny_facts.json``: the facts, each with a counterfactual target, paraphrases and
probes.

Existing files need ``--force``. Same seed, machine and library versions: same bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hiedit_agents.command_line import run_script
from hiedit_benchmarks.worlds import synthetic_facts
from hiedit_benchmarks.worlds.synthetic_facts import (
    BOS,
    CONTEXT,
    EOS,
    PAD,
    Fact,
    Relation,
    deterministic,
    encode,
    measure,
)
from hiedit_env.errors import ModelError

NAME = "tiny"
VOCAB_SIZE = 896
STEPS = 1200
BATCH = 64
LEARNING_RATE = 6e-3
WEIGHT_DECAY = 0.1
WARMUP = 100

# Pattern of the kind, then its members; the last four of them are never edited.
_SUBJECTS = {
    "people": """@
        Belka Corrin Dasmo Elvane Fenrik Galdis Harsel Ilvo Jorvane Keldra
        Lomri Mirsk Nollen Orsa Pelluk Quindra Rostel Savrin Tulma Ulvard
        Vasnik Wolmer Yestin Zorbel""",
    "towns": """@
        Averlund Brastow Cindrath Dovenholt Eskermere Farrowick Grelmouth Halvery Istrand Jarnholm
        Kessford Lindover Morvane Nethergate Ostrell Pelmarsh Quellby Rundleth Sarnwick Tolmead
        Umberly Vostrand Wexmoor Yarlow""",
    "guilds": """@ Guild
        Lantern Thorn Anvil Feather Ember Willow Keystone Saddle Needle Harrow
        Candle Compass Barrel Lute Shuttle Chisel Hourglass Bellows Trowel Sickle
        Pulley Ladle Thimble Wheel""",
    "peaks": """Mount @
        Aldrun Brezen Corvath Drumlo Eldasp Fyrnock Garrund Hurnel Ixmar Jolgar
        Korrum Lhazen Mordeth Nurvik Ombrel Pharrot Rikkan Skelda Tharvo Vorrask
        Wuldrin Xanthel Yorrim Zeldak""",
}

# Name and kind of subject; answers; the prompt and its paraphrases.
_RELATIONS = """
home people
Averlund, Cindrath, Eskermere, Grelmouth, Istrand, Kessford, Morvane, Ostrell, Quellby
@ lives in; The home of @ is in; If you look for @, go to; The house of @ stands in

craft people
weaver, smith, baker, potter, tanner, cooper, miller, scribe
@ works as a; By trade, @ is a; The craft of @ is that of a; Everyone calls @ a skilled

river towns
Ossel, Vellow, Drithe, Marn, Quile, Thessa, Wend, Lorne, Yarrin, Zumber
@ lies on the river; The river through @ is the; Boats go to @ by the; @ takes its fish from the

market towns
salt, amber wine, blue cloth, copper bells, honey, fine paper, wool, glass
@ is known for its; Traders come to @ for its; The market of @ sells; The pride of @ is its

master guilds
Orin Valde, Mae Stroud, Hesk Tarrow, Ivra Dunmar, Bram Ostley, Sela Vance, Cor Hale, Wenna Pryde
The @ is led by; The master of the @ is; All of the @ obey; At the head of the @ is

emblem guilds
grey heron, red fox, black bear, golden bee, white stag, hare, otter, raven
The emblem of the @ is the; The @ banner shows the; The @ seal bears the; The @ marks goods with the

spirit peaks
Ulmae, Rhosk, Thovi, Ennak, Sulire, Byndor, Pavo, Irrud, Quome, Zheva
@ is sacred to; The shrine on @ honours; On @ the pilgrims pray to; The spirit of @ is called

mine peaks
tin, jade, silver, opal, iron, coal, quartz, marble
The mines of @ yield; Miners go to @ for; What lies under @ is; Deep inside @ there is
"""


def _read_world() -> tuple[Relation, ...]:
    subjects = {}
    for kind, text in _SUBJECTS.items():
        pattern, members = text.split("\n", 1)
        subjects[kind] = tuple(pattern.replace("@", member) for member in members.split())
    relations = []
    for block in _RELATIONS.strip().split("\n\n"):
        name, kind, answers, wordings = block.replace(" ", "\n", 1).split("\n")
        lists = tuple(answers.split(", ")), tuple(wordings.split("; "))
        relations.append(Relation(name, subjects[kind], *lists))
    return tuple(relations)


WORLD = _read_world()


def make_facts(seed: int) -> list[Fact]:
    """Returns the 192 facts, relation by relation, for a seed.

    >>> facts = make_facts(0)
    >>> len(facts), facts[0].prompts()[0]
    (192, 'Belka lives in')
    """
    return synthetic_facts.draw_facts(WORLD, seed)


def make_records(facts: Sequence[Fact], seed: int) -> list[dict[str, Any]]:
    """Returns a JSON record for each of the 160 facts that are not witnesses."""
    witnesses = [fact for fact in facts if fact.witness]
    return synthetic_facts.make_records(
        [fact for fact in facts if not fact.witness], witnesses, seed
    )


def make_model(seed: int) -> LlamaForCausalLM:
    """Returns the untrained model, float32, initialised from ``seed``."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def train(model: nn.Module, ids: Tensor, steps: int, seed: int) -> None:
    """Trains in place to predict every token of every sentence (``ids``: as from :func:`encode`).

    AdamW with a linear warm-up and a linear decay to zero, gradients clipped to norm 1; ``seed``
    decides the order of the sentences.
    """
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / WARMUP, (steps - step) / steps)
    )
    order = torch.empty(0, dtype=torch.long)
    model.train()
    with deterministic():
        for _ in range(steps):
            if len(order) < BATCH:
                order = torch.randperm(len(ids), generator=generator)
            rows, order = order[:BATCH], order[BATCH:]
            logits = model(input_ids=ids[rows], use_cache=False).logits[:, :-1]
            loss = nn.functional.cross_entropy(
                logits.flatten(0, 1), ids[rows, 1:].flatten(), ignore_index=PAD
            )
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
    model.eval()


def build(out: Path, seed: int, force: bool) -> tuple[float, float]:
    """Makes and writes everything; returns (token accuracy, exact match) as ``measure`` does.

    Args:
        out: Folder below which ``model/assets/tiny/`` and ``datasets/data/tiny_facts.json`` go.
        seed: Decides which answer is true of which subject, the weights and the training order.
        force: Replace files that exist.

    Raises:
        ResultsExistError: if a file would be replaced without ``force``; nothing was written.
        ModelError: if the trained model does not know 99 % of its facts; nothing was written.
    """
    if not force:
        synthetic_facts.require_absent(out, NAME)
    facts = make_facts(seed)
    tokenizer = synthetic_facts.make_tokenizer(facts, VOCAB_SIZE)
    ids, answers = encode(facts, tokenizer)
    model = make_model(seed)
    train(model, ids, STEPS, seed)
    tokens, exact = measure(model, ids, answers)
    if exact < 0.99:
        raise ModelError(f"only {exact:.1%} of the facts were learnt; raise STEPS or change --seed")
    synthetic_facts.write(out, NAME, model, tokenizer, make_records(facts, seed))
    return tokens, exact


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0."""
    program = "python -m hiedit_benchmarks.worlds.make_tiny"
    return synthetic_facts.make_world(
        program, "Make the tiny offline model and its facts.", build, arguments
    )


if __name__ == "__main__":
    sys.exit(run_script(main))
