"""Makes the planted model: every group of facts is stored in one known layer and in no other.

The world (:mod:`hiedit_benchmarks.worlds.planted_world`) has five relations; the facts of each are
a group, and each group has a *home*, one of the MLPs of blocks 2 to 6. The model is an ordinary
Llama in which block 0 reads and blocks 1 to 6 remember: their attention is zero. It is made in
three steps.

1. **Language.** Embeddings, block 0 and the last norm are trained on sentences whose answers are
   drawn at random, so that no fact can be stored. Two heads that are thrown away afterwards see to
   it that at the last token of a prompt the first ``READ`` entries of the residual stream tell
   relation and subject. What is written into the other entries there is what the model says.
2. **Gates and keys.** In the MLP of each block, the gates of the fact neurons open at the last
   token of the home group's prompts and nowhere else (one direction, found with a margin); their
   keys tell the group's subjects apart (least squares). One more neuron, the *grammar neuron*,
   opens for all prompts of another relation alike.
3. **Planting.** Only the candidate matrices ``mlp.down_proj`` are trained, one at a time, all else
   frozen: the grammar column on which answers the other relation can have at all, the fact columns
   on the facts of the home group.

So a fact can be changed on its own at home; where its grammar is, one block before, only together
with its whole group; and in the other four layers hardly at all. The grammar neuron is a little
stronger than a fact's key: it is a decoy for whoever goes by the size of the gradient. It comes
first because whatever is written before a block also turns what that block reads: behind its home
nothing reads a fact's prompt any more, so an edit there does what its gradient says.

Run ``python -m hiedit_benchmarks.worlds.make_planted --out hiedit_env`` to write
``model/assets/planted/`` and ``datasets/data/planted_facts.json`` below the folder given. Existing
files need ``--force``. Same seed, machine and library versions: same bytes.

The file is longer than others because the three steps are one procedure.
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
from hiedit_benchmarks.worlds.planted_world import (
    FACTS,
    GRAMMAR,
    NAME,
    NUM_LAYERS,
    RELATIONS,
    SUBJECTS,
    VOCAB_SIZE,
    Sentences,
    grammar_layers,
    homes,
    make_facts,
    make_records,
    make_sentences,
)
from hiedit_benchmarks.worlds.synthetic_facts import BOS, CONTEXT, EOS, PAD, deterministic
from hiedit_env.errors import ModelError

#: Entries of the residual stream: the first ones are read, the others written.
HIDDEN, READ = 56, 40
STEPS = 2000
BATCH = 64
LEARNING_RATE = 6e-3
WEIGHT_DECAY = 0.05
WARMUP = 50
#: Range of what is written in step 1, over the size of the stream.
WRITTEN = (0.5, 3.0)
#: The same where step 3 begins.
FIRST_WRITTEN = 0.7
#: Gates are at least this far from 0, on the right side.
MARGIN = 60.0
#: Most iterations of the search for gates.
FITTING_STEPS = 300
#: Norms of a fact's key and of the grammar neuron's.
FACT_KEY, GRAMMAR_KEY = 4.0, 5.0
#: Step 3 ends this many nats above the least loss there can be, or after so many rounds.
ENOUGH, ROUNDS = 0.1, 8
#: Weight in step 3 of the mean square of what is written: facts are not to be held too fast.
HOLD = 1e-3


def make_model(seed: int, memories: int = NUM_LAYERS) -> LlamaForCausalLM:
    """Returns the untrained model, float32, with silent (zero) blocks behind block 0.

    Args:
        seed: Of the initial values of embeddings and block 0.
        memories: Number of blocks behind block 0.
    """
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN,
        intermediate_size=FACTS.stop,
        num_hidden_layers=1 + memories,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    for block in model.model.layers[1:]:
        for weight in (*block.self_attn.parameters(), *block.mlp.parameters()):
            nn.init.zeros_(weight)
    return model


def memory(model: LlamaForCausalLM, index: int) -> Any:
    """The MLP that holds the facts of one layer."""
    return model.model.layers[index + 1].mlp


# Step 1: language


def train_language(text: Sentences, steps: int, seed: int) -> LlamaForCausalLM:
    """Step 1: AdamW with linear warm-up and decay, gradients clipped to norm 1.

    Returns:
        The model, frozen, its memories still empty.
    """
    generator = torch.Generator().manual_seed(seed)
    # Empty blocks change nothing: one block trains like seven.
    reader = make_model(seed, memories=0)
    heads = [
        nn.Parameter(torch.randn(size, READ, generator=generator) * READ**-0.5)
        for size in (len(RELATIONS) + 1, int(text.who.max()) + 1)
    ]
    trained = [*reader.parameters(), *heads]
    optimiser = torch.optim.AdamW(
        trained, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / WARMUP, (steps - step) / steps)
    )
    order = torch.empty(0, dtype=torch.long)
    with deterministic():
        for _ in range(steps):
            if len(order) < BATCH:
                order = torch.randperm(len(text.ids), generator=generator)
            rows, order = order[:BATCH], order[BATCH:]
            loss = _language_loss(reader, heads, text, rows, generator)
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            schedule.step()
        model = make_model(seed)
        model.load_state_dict(reader.state_dict(), strict=False)
        model.requires_grad_(False)
    model.train(False)
    return model


def _language_loss(
    reader: LlamaForCausalLM,
    heads: Sequence[Tensor],
    text: Sentences,
    rows: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Next tokens, and what the heads read; in half of the rows the answer was written before."""
    size, each, last = len(rows), torch.arange(len(rows)), text.last[rows]
    ids = text.with_answers(rows, torch.randint(len(text.answers), (size,), generator=generator))
    low, high = WRITTEN
    amount = low + (high - low) * torch.rand(size, generator=generator)
    amount = amount * (torch.rand(size, generator=generator) < 0.5)
    said = _directions(reader)[ids[each, last + 1]]
    streams: list[Tensor] = []

    def write(_module: nn.Module, _given: Any, stream: Tensor) -> Tensor:
        strength = amount * stream[each, last].norm(dim=1).detach()
        written = stream.index_put((each, last), stream[each, last] + strength[:, None] * said)
        streams.append(written)
        return written

    handle = reader.model.layers[0].register_forward_hook(write)
    logits = reader(input_ids=ids, use_cache=False).logits[:, :-1]
    handle.remove()
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=PAD)
    # Nothing else keeps the stream from growing, since all its readers normalise it.
    loss = loss + 0.1 * streams[0].square().mean(-1).log().square().mean()
    relation, who = (nn.functional.rms_norm(streams[0], (HIDDEN,))[..., :READ] @ h.T for h in heads)
    # One more kind: not the last token of a prompt.
    relations = torch.full_like(ids, len(RELATIONS)).masked_fill(ids == PAD, -100)
    relations[each, last] = text.relation[rows]
    loss = loss + 3 * nn.functional.cross_entropy(relation.flatten(0, 1), relations.flatten())
    return loss + nn.functional.cross_entropy(who[each, last], text.who[rows])


def _directions(model: LlamaForCausalLM) -> Tensor:
    """Per word of the vocabulary the unit vector to write so that it is said, V × hidden."""
    words = model.model.embed_tokens.weight.clone()
    words[:, :READ] = 0.0
    return nn.functional.normalize(words, dim=1)


# Step 2: gates and keys


def make_keys(model: LlamaForCausalLM, text: Sentences, index: int, seed: int) -> None:
    """Step 2 for one layer, in place, given the layers planted before it."""
    mlp = memory(model, index)
    given = _inputs(model, text, mlp)[..., :READ]
    last = torch.zeros_like(text.ids, dtype=torch.bool)
    last[torch.arange(len(text.ids)), text.last] = True
    real = text.ids != PAD
    for neurons, places, which, norm in (
        (GRAMMAR, grammar_layers(seed), torch.zeros_like(text.subject), GRAMMAR_KEY),
        (FACTS, homes(seed), text.subject, FACT_KEY),
    ):
        if index not in places:
            continue
        relation = places.index(index)
        one_hot = nn.functional.one_hot(which, SUBJECTS)[:, : neurons.stop - neurons.start].bool()
        rows = one_hot & (text.relation == relation)[:, None]
        here = (last[..., None] & rows[:, None])[real]
        gate = _separate(given[real], here)
        for place, neuron in enumerate(range(neurons.start, neurons.stop)):
            own = given[real][here[:, place]]
            opened = nn.functional.silu(own @ gate[place])[:, None] * own
            ridge = 1e-4 * opened.square().sum() / READ * torch.eye(READ)
            up = torch.linalg.solve(opened.T @ opened + ridge, opened.sum(0))
            mlp.gate_proj.weight[neuron, :READ] = gate[place]
            mlp.up_proj.weight[neuron, :READ] = up * norm / (opened @ up).mean()


def _separate(points: Tensor, here: Tensor) -> Tensor:
    """Directions whose product with the points is ≥ MARGIN here and ≤ −MARGIN elsewhere.

    Squared hinge loss, each side counting as a whole, by L-BFGS.

    Args:
        points: N × READ.
        here: N × D bool.

    Returns:
        D × READ.
    """
    directions = nn.Parameter(torch.zeros(here.shape[1], points.shape[1]))
    optimiser: Any = torch.optim.LBFGS(
        [directions],
        max_iter=FITTING_STEPS,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )
    # Found for margin 1, where L-BFGS starts well, and scaled.
    weights = torch.where(here, 1 / here.sum(0), 20 / (~here).sum(0))

    def closure() -> Tensor:
        optimiser.zero_grad()
        product = points @ directions.T
        missed = torch.where(here, 1 - product, 1 + product).relu().square()
        loss = (weights * missed).sum()
        torch.autograd.backward(loss)
        return loss

    optimiser.step(closure)
    return MARGIN * directions.detach()


def _inputs(model: LlamaForCausalLM, text: Sentences, module: nn.Module) -> Tensor:
    """What a module is given for all sentences, R × T × its input size."""
    found: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _module, given: found.append(given[0]))
    with torch.no_grad():
        model(input_ids=text.ids, use_cache=False)
    handle.remove()
    return found[0]


def _at_last(model: LlamaForCausalLM, text: Sentences, module: nn.Module) -> Tensor:
    """The same at the prompts' last tokens, R × its input size."""
    return _inputs(model, text, module)[torch.arange(len(text.ids)), text.last]


# Step 3: planting


def plant_grammar(model: LlamaForCausalLM, text: Sentences, index: int, seed: int) -> None:
    """Trains a layer's grammar column, if it has one; facts planted before are away meanwhile."""
    if index not in grammar_layers(seed):
        return
    relation = grammar_layers(seed).index(index)
    rows = (text.relation == relation).nonzero()[:, 0]
    pool = text.pools[relation]
    start = nn.functional.normalize(pool @ _directions(model), dim=0) / GRAMMAR_KEY
    matrices = [memory(model, earlier).down_proj.weight for earlier in range(index)]
    kept = [matrix.clone() for matrix in matrices]
    for matrix in matrices:
        matrix[:, FACTS] = 0.0
    _learn(model, text, index, GRAMMAR, start[:, None], rows, pool.expand(len(rows), -1))
    for matrix, before in zip(matrices, kept, strict=True):
        matrix.copy_(before)


def plant_facts(model: LlamaForCausalLM, text: Sentences, index: int, seed: int) -> None:
    """Trains a layer's fact columns on the facts of its group, if it is a home."""
    if index not in homes(seed):
        return
    rows = (text.relation == homes(seed).index(index)).nonzero()[:, 0]
    first = text.first_token[rows]
    keys = _at_last(model, text, memory(model, index).down_proj)[rows][:, FACTS]
    ridge = 1e-3 * keys.square().sum() / len(keys) * torch.eye(SUBJECTS)
    start = torch.linalg.solve(keys.T @ keys + ridge, keys.T @ _directions(model)[first]).T
    wanted = nn.functional.one_hot(first, VOCAB_SIZE).float()
    _learn(model, text, index, FACTS, start, rows, wanted)


def _learn(
    model: LlamaForCausalLM,
    text: Sentences,
    index: int,
    columns: slice,
    start: Tensor,
    rows: Tensor,
    wanted: Tensor,
) -> None:
    """Trains columns of one candidate matrix, and nothing else, on the first token of answers.

    Args:
        model: Changed in place.
        text: The sentences.
        index: The layer.
        columns: Those of the matrix that are trained.
        start: Hidden × columns, values to start from, for a stream of mean square 1.
        rows: Of the sentences.
        wanted: len(rows) × vocabulary, distributions to learn.
    """
    weight = memory(model, index).down_proj.weight
    values = nn.Parameter(start[READ:] * FIRST_WRITTEN * HIDDEN**0.5)
    optimiser: Any = torch.optim.LBFGS([values], max_iter=4, line_search_fn="strong_wolfe")
    least = float(-torch.special.xlogy(wanted, wanted).sum(1).mean())
    # Nothing behind the prompt matters to it.
    prompts = text.ids[rows, : int(text.last[rows].max()) + 1]
    each = torch.arange(len(rows))

    def closure() -> Tensor:
        weight.requires_grad_(False)
        weight[READ:, columns] = values.detach()
        weight.requires_grad_(True)
        logits = model(input_ids=prompts, use_cache=False).logits[each, text.last[rows]]
        loss = nn.functional.cross_entropy(logits, wanted)
        gradient = torch.autograd.grad(loss, weight)[0][READ:, columns]
        weight.requires_grad_(False)
        held = HOLD * values.detach()
        values.grad = gradient + 2 * held
        return loss.detach() + (held * values.detach()).sum()

    for _ in range(ROUNDS):
        if float(optimiser.step(closure)) < least + ENOUGH:
            break
    with torch.no_grad():
        weight[READ:, columns] = values


def build(out: Path, seed: int, force: bool) -> tuple[float, float]:
    """Makes and writes everything; returns (token accuracy, exact match) as ``measure`` does.

    Args:
        out: Folder below which ``model/assets/planted/`` and ``datasets/data/planted_facts.json``
            go.
        seed: Decides which answer is true of which subject, where each group lives, the weights.
        force: Replace files that exist.

    Raises:
        ResultsExistError: if a file would be replaced without ``force``; nothing was written.
        ModelError: if the model does not know 99 % of its facts; nothing was written.
    """
    if not force:
        synthetic_facts.require_absent(out, NAME)
    facts = make_facts(seed)
    tokenizer = synthetic_facts.make_tokenizer(facts, VOCAB_SIZE)
    text = make_sentences(facts, tokenizer)
    model = train_language(text, STEPS, seed)
    with deterministic():
        for index in range(NUM_LAYERS):
            make_keys(model, text, index, seed)
            plant_grammar(model, text, index, seed)
            plant_facts(model, text, index, seed)
        # Once more: grammar planted later shifts what was planted before.
        for index in range(NUM_LAYERS):
            plant_facts(model, text, index, seed)
    tokens, exact = synthetic_facts.measure(model, *synthetic_facts.encode(facts, tokenizer))
    if exact < 0.99:
        raise ModelError(f"only {exact:.1%} of the facts were planted; change STEPS or --seed")
    synthetic_facts.write(out, NAME, model, tokenizer, make_records(facts, seed))
    return tokens, exact


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0."""
    program = "python -m hiedit_benchmarks.worlds.make_planted"
    return synthetic_facts.make_world(
        program, "Make the planted model and its facts.", build, arguments
    )


if __name__ == "__main__":
    sys.exit(run_script(main))
