"""The vocabulary of a GGUF file: byte-level BPE, as llama.cpp reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gguf
from transformers import PreTrainedTokenizerBase

from hiedit_env.errors import SettingsError
from hiedit_env.files import parse_json

#: How text is cut before it is split into tokens, as ``tokenizer.json`` has it → llama.cpp's name.
_CUTS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
}
_REMEDY = "save it with --as folder and use llama.cpp's convert_hf_to_gguf.py"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A vocabulary in llama.cpp's terms.

    Args:
        cut: Name of how text is cut.
        tokens: Texts in the order of their ids.
        kinds: Kind of each, see ``gguf.TokenType``.
        merges: Pairs that are joined, first things first.
        specials: ``"bos"``, ``"eos"``, ``"unk"``, ``"pad"`` → id, where there is one.
        adds_bos: Whether the first special token is put in front of every text.
        chat_template: None where there is none.
    """

    cut: str
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    merges: tuple[str, ...]
    specials: dict[str, int]
    adds_bos: bool
    chat_template: str | None

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Adds it to a file."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.cut)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.kinds))
        writer.add_token_merges(list(self.merges))
        for name, index in self.specials.items():
            getattr(writer, f"add_{name}_token_id")(index)
        writer.add_add_bos_token(self.adds_bos)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """The vocabulary of a tokenizer.

    Args:
        tokenizer: A fast one.
        size: Rows of the model's embedding; ids without a token are filled up.

    Raises:
        SettingsError: it is no byte-level BPE that llama.cpp knows; says what else to do.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise SettingsError(f"GGUF needs a fast tokenizer, and the model has none; {_REMEDY}")
    described = parse_json(backend.to_str())
    model, cut = described["model"], _cut_of(described["pre_tokenizer"])
    if model["type"] != "BPE" or model.get("byte_fallback") or described["normalizer"] or not cut:
        raise SettingsError(
            "GGUF is written for byte-level BPE as of GPT-2 and SmolLM, and this tokenizer is "
            f"another; {_REMEDY}"
        )
    unused, normal = int(gguf.TokenType.UNUSED), int(gguf.TokenType.NORMAL)
    tokens = [f"[PAD{i}]" for i in range(size)]
    kinds = [unused] * size
    for text, index in model["vocab"].items():
        tokens[index], kinds[index] = text, normal
    for added in described["added_tokens"]:
        tokens[added["id"]] = added["content"]
        own = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        kinds[added["id"]] = int(own)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    named = {
        name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk", "pad")
    }
    specials = {name: int(index) for name, index in named.items() if index is not None}
    front = tokenizer.encode("a", verbose=False)[:1]
    return Vocabulary(
        cut,
        tuple(tokens),
        tuple(kinds),
        tuple(merges),
        specials,
        front == [specials.get("bos")],
        tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )


def _cut_of(described: Any) -> str | None:
    """llama.cpp's name for how text is cut; None where it has none that is known here."""
    if not described:
        return None
    parts = described["pretokenizers"] if described["type"] == "Sequence" else [described]
    for part in parts:
        if part["type"] == "ByteLevel" and (part["add_prefix_space"] or not part["use_regex"]):
            return None
        if part["type"] == "Digits" and not part["individual_digits"]:
            return None
    return _CUTS.get(tuple(part["type"] for part in parts))
