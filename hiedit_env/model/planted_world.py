"""The model of a planted world: a small Llama whose weights are computed, not trained.

Every subject is one token and stands at the end of its prompt, so block 0 has nothing to read but
how the prompt is worded. The candidate layers, ``mlp.down_proj`` of the blocks behind it, are
linear memories: at the subject's token the MLP's gates are open for the relations that have a home
or a decoy there, and the key is the one that the world gives the fact; elsewhere the key is 0. What
a layer writes is added to the logits of the answers, in nats, and no layer reads what another
writes. So the effect of an edit can be computed by hand: a gradient step Δ = −s kᵀ (p − y) changes
the logits of another fact whose key is k' by −s (k' · k) (p − y).

Files are written without torch, from NumPy's generator: same name and versions, same bytes.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from hiedit_env.datasets.difficulty import WorldName
from hiedit_env.datasets.planted import ANSWERS, WORDINGS, World, make_world
from hiedit_env.errors import OutputError

#: Changes whenever the same name would give other weights.
RECIPE = 1
#: Logit of the true answer over all others, before any edit.
GAP = 5.0
#: By how much one gradient step of size 1 raises the new answer's logit over the old one's: in the
#: one home that is needed, and in a decoy. Half of it is more than the gap, so that a write to a
#: decoy breaks the other facts of the relation.
CHANGE = 14.0
#: The same where several homes are needed, over the gap: all of them suffice, one less does not.
TOGETHER = (1.6, 1.35)
#: Squared length of a home's keys, and of a decoy's, relative to that: drawn from here.
HOME_STRENGTH, DECOY_STRENGTH = (0.95, 1.15), (1.0, 1.8)
#: Logit of all words that are no answers.
NEVER = -20.0
#: What the stream holds of a subject and of a constant, large beside what layers write, so that its
#: norm hardly changes.
LARGE = 200.0
#: Weight of the gates; silu(GATE · …) is then linear to seven digits.
GATE = 2.0
#: Standard deviation of the rest of a candidate matrix.
NOISE = 0.02

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
Array = NDArray[np.float64]


def make_keys(world: World) -> tuple[Array, Array]:
    """The key of every fact in every layer, and what each wording adds to it.

    Returns:
        L × M × S float64, columns in the order of relations, then subjects; and L × M × wordings,
        0 for the first wording.
    """
    given = world.difficulty
    generator = np.random.default_rng([world.name.seed, 2])
    homes = _enough(given.needed) / 2 * generator.uniform(*HOME_STRENGTH, world.homes.shape)
    decoys = CHANGE / 2 * generator.uniform(*DECOY_STRENGTH, world.decoys.shape)
    sizes = [int((world.homes == layer).sum()) * given.subjects for layer in range(given.layers)]
    width = max([given.capacity or 0, *(sizes if given.capacity is None else ())], default=0)
    keys = np.zeros((given.layers, width + given.relations, given.relations * given.subjects))
    wordings = np.zeros((given.layers, width + given.relations, len(WORDINGS)))
    for layer in range(given.layers):
        place = 0
        for relation in range(given.relations):
            columns = slice(relation * given.subjects, (relation + 1) * given.subjects)
            for lengths in homes[relation][world.homes[relation] == layer]:
                if given.capacity is None:
                    own = np.eye(width)[:, place : place + given.subjects]
                    place += given.subjects
                else:
                    own = generator.standard_normal((width, given.subjects))
                    own /= np.linalg.norm(own, axis=0)
                keys[layer, :width, columns] = np.sqrt(lengths) * own
            for lengths in decoys[relation][world.decoys[relation] == layer]:
                keys[layer, width + relation, columns] = np.sqrt(lengths)
        other = generator.standard_normal((width, len(WORDINGS) - 1))
        other *= given.wording * np.sqrt(homes.mean()) / np.linalg.norm(other, axis=0).clip(1e-9)
        wordings[layer, :width, 1:] = other
    return keys, wordings


def make_tensors(world: World) -> tuple[dict[str, NDArray[np.float32]], dict[str, Any], list[str]]:
    """Weights by name, configuration and vocabulary of a world's model."""
    given = world.difficulty
    keys, wordings = make_keys(world)
    count, width = keys.shape[2], keys.shape[1]
    words = vocabulary(world)
    index = {word: i for i, word in enumerate(words)}
    # Entries of the residual stream: subjects, a constant, wordings, answers.
    one, said = count, count + 1
    out = said + len(WORDINGS)
    size = out + len(ANSWERS)
    answers = np.array([index[word] for word in ANSWERS])
    subjects = np.array([index[world.subject(*divmod(i, given.subjects))] for i in range(count)])

    down = _memories(world, keys)
    known = GAP * np.eye(len(ANSWERS))[world.answers.ravel()]
    embedding = np.zeros((len(words), size))
    embedding[:, one] = LARGE
    embedding[subjects, np.arange(count)] = LARGE
    # What the layers do not say of a fact is said here, so that the model knows every fact alike.
    embedding[subjects, out:] = known - np.einsum("lam,lms->sa", down, keys)
    for place, (first, _) in enumerate(WORDINGS):
        embedding[index[first], said + place] = LARGE
    # Root mean square of the stream at a subject's token, and what is read there of LARGE.
    scale = np.sqrt(2 * LARGE**2 / size)
    read = LARGE / scale
    head = np.zeros((len(words), size))
    head[:, one] = NEVER * scale / LARGE
    head[answers, one] = 0.0
    head[answers, out + np.arange(len(ANSWERS))] = scale

    heads = len(WORDINGS)
    tensors: dict[str, Array] = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": np.ones(size),
        "lm_head.weight": head,
    }
    for block in range(1 + given.layers):
        name = f"model.layers.{block}"
        for part, shape in (
            ("self_attn.q_proj", (heads, size)),
            ("self_attn.k_proj", (heads, size)),
            ("self_attn.v_proj", (heads, size)),
            ("self_attn.o_proj", (size, heads)),
            ("mlp.gate_proj", (width, size)),
            ("mlp.up_proj", (width, size)),
            ("mlp.down_proj", (size, width)),
        ):
            tensors[f"{name}.{part}.weight"] = np.zeros(shape)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}.{norm}.weight"] = np.ones(size)
    places = np.arange(heads)
    # Attention without queries is a mean over the tokens, here four; the first word's code is read.
    length = len(world.prompts(0, 0)[0].split())
    tensors["model.layers.0.self_attn.v_proj.weight"][places, said + places] = length
    tensors["model.layers.0.self_attn.o_proj.weight"][said + places, places] = 1.0
    opened = GATE * read
    # The stream's code of a wording is read by v_proj at a token whose norm is a subject's too.
    code = read / scale
    for layer in range(given.layers):
        name = f"model.layers.{layer + 1}.mlp"
        tensors[f"{name}.gate_proj.weight"][:, :count] = GATE * _open(world, layer, width)
        tensors[f"{name}.up_proj.weight"][:, :count] = keys[layer] / (opened * read)
        tensors[f"{name}.up_proj.weight"][:, said:out] = wordings[layer] / (opened * code)
        tensors[f"{name}.down_proj.weight"][out:] = down[layer]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": size,
        "intermediate_size": width,
        "num_hidden_layers": 1 + given.layers,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": heads,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": len(words),
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }
    return {name: value.astype(np.float32) for name, value in tensors.items()}, config, words


def vocabulary(world: World) -> list[str]:
    """All words of a world, special ones first; the same for all worlds of a difficulty."""
    given = world.difficulty
    subjects = [world.subject(r, s) for r in range(given.relations) for s in range(given.subjects)]
    fillers = [word for pair in WORDINGS for word in pair]
    return [*SPECIAL, *fillers, *world.topics, *ANSWERS, *subjects]


def world_folder(name: str, cache: Path) -> Path:
    """The folder of a world's model, made if it is not there yet.

    Args:
        name: ``planted:DIFFICULTY:SEED``.
        cache: Where worlds are kept.

    Raises:
        SettingsError: a name of another form.
        OutputError: the folder cannot be written.
    """
    world = make_world(WorldName.read(name))
    home = cache / f"planted-worlds-{RECIPE}"
    folder = home / str(world.name).replace(":", "-").replace("=", "_")
    if folder.is_dir():
        return folder
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home, prefix=".making-") as making:
            made = Path(making, "world")
            made.mkdir()
            write_world(world, made)
            try:
                os.rename(made, folder)
            except OSError:
                # Another process was quicker; its files are the same.
                if not folder.is_dir():
                    raise
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written: {error}; name another cache in $HIEDIT_CACHE"
        ) from error
    return folder


def write_world(world: World, folder: Path) -> None:
    """Writes a world's model in the Hugging Face layout into an existing folder."""
    tensors, config, words = make_tensors(world)
    (folder / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": word,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i, word in enumerate(SPECIAL)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word: i for i, word in enumerate(words)},
            "unk_token": SPECIAL[3],
        },
    }
    names = zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict(names),
        "model_max_length": config["max_position_embeddings"],
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
    }
    files = {
        "config.json": config,
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": settings,
    }
    for file, content in files.items():
        text = json.dumps(content, indent=1) + "\n"
        (folder / file).write_text(text, encoding="utf-8", newline="\n")


def _enough(needed: int) -> float:
    """By how much one step on one home raises the new answer's logit over the old one's."""
    return CHANGE if needed == 1 else TOGETHER[min(needed, 3) - 2] * GAP / needed


def _memories(world: World, keys: Array) -> Array:
    """What every layer writes, L × answers × M: each home says its share of the facts' answers."""
    given = world.difficulty
    generator = np.random.default_rng([world.name.seed, 3])
    said = GAP / given.homes * np.eye(len(ANSWERS))[world.answers.ravel()].T
    found = NOISE * generator.standard_normal((len(keys), len(ANSWERS), keys.shape[1]))
    for layer, own in enumerate(keys):
        lives = np.repeat((world.homes == layer).any(1), given.subjects)
        used, wanted = own[:, lives], said[:, lives]
        if not lives.any():
            continue
        gram = used @ used.T
        ridge = 1e-3 * np.trace(gram) / len(gram) * np.eye(len(gram))
        found[layer] += np.linalg.solve(gram + ridge, used @ wanted.T).T
    return found


def _open(world: World, layer: int, width: int) -> Array:
    """M × S, 1 where a neuron is open for a subject: its relation has a home or a decoy there."""
    given = world.difficulty
    relations = np.arange(given.relations)
    opened = np.zeros((width, given.relations))
    opened[: width - given.relations] = (world.homes == layer).any(1)
    opened[width - given.relations + relations, relations] = (world.decoys == layer).any(1)
    return np.repeat(opened, given.subjects, axis=1)
