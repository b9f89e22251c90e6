"""Runs a causal LM's own modules in two halves, cut in front of one block.

The model itself computes masks, positions and rotary embeddings, so nothing here knows an
architecture: stand-ins in place of its blocks note what each block would have been given, once per
shape, and the real blocks are then called with just that. The stand-ins sit in shallow copies that
share every parameter with the model; no hook stays registered and nothing in the model is replaced.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from hiedit_env.errors import ModelError

#: Shapes whose block arguments are kept; the least recently used are noted again.
_SHAPES = 256


class _PrefixReady(Exception):
    """Carries the hidden states out of the first half."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class BlockArguments(NamedTuple):
    """What a model gives to one of its blocks besides the hidden states."""

    positional: tuple[Any, ...]
    keyword: Mapping[str, Any]

    def depend_on_batch(self) -> bool:
        """Whether any tensor among them has a first dimension other than 1."""
        return any(t.ndim and t.shape[0] != 1 for t in _tensors((self.positional, self.keyword)))


class _StandIn(nn.Module):
    """Takes a block's place; attributes the model reads from its blocks are the real block's."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        # Kept out of the module tree: the stand-in owns no parameter.
        object.__setattr__(self, "block", block)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def hidden_first(self, given: tuple[Any, ...]) -> Tensor:
        """The first argument of a block, which must be the hidden states."""
        if given and isinstance(given[0], Tensor):
            return given[0]
        raise ModelError("its blocks are not called with the hidden states first")


class _Stop(_StandIn):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        raise _PrefixReady(self.hidden_first(args))


class _Note(_StandIn):
    """Notes its arguments and gives back its input, or the hidden states it was told to."""

    returns_tuple = False
    noted: BlockArguments | None = None
    instead: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, None]:
        hidden = self.hidden_first(args)
        self.noted = BlockArguments(args[1:], kwargs)
        output = hidden if self.instead is None else self.instead
        return (output, None) if self.returns_tuple else output


class SplitModel:
    """The two halves of a causal LM around block ``first``.

    Args:
        base: The decoder without its vocabulary projection (``model.base_model``), in eval mode.
        blocks_name: Dotted name of the list of blocks, relative to ``base``.
        first: Index of the first block of the second half.
    """

    def __init__(self, base: nn.Module, blocks_name: str, first: int) -> None:
        self.base = base
        blocks = list(cast(nn.ModuleList, base.get_submodule(blocks_name)))
        #: The blocks of the second half, and the index of its first.
        self.blocks, self.first = blocks[first:], first
        self._prefix = _shallow_copy(base, blocks_name, [*blocks[:first], _Stop(blocks[first])])
        returns_tuple, self._norm = _probe(base, blocks_name, blocks[-1])
        self._notes = [_Note(block) for block in blocks]
        for note in self._notes:
            note.returns_tuple = returns_tuple
        self._skeleton = _shallow_copy(base, blocks_name, self._notes)
        self._arguments: OrderedDict[tuple[int, int], list[BlockArguments]] = OrderedDict()

    def prefix(self, input_ids: Tensor) -> Tensor:
        """Hidden states entering block ``first``.

        Args:
            input_ids: B × T int64, right-padded.

        Returns:
            B × T × hidden size, no gradient.
        """
        # Never an inference tensor, wherever this is called from: it later enters autograd graphs.
        with torch.inference_mode(False), torch.no_grad():
            try:
                self._prefix(input_ids=input_ids, use_cache=False)
            except _PrefixReady as ready:
                return ready.hidden
        raise AssertionError("the model did not run its blocks")

    def suffix(self, hidden: Tensor) -> Tensor:
        """Final hidden states (after the last norm) from those entering block ``first``.

        Args:
            hidden: B × T × hidden size.

        Returns:
            B × T × hidden size; differentiable with respect to overlays and captured outputs.
        """
        arguments = self._arguments_for(hidden)
        return self.finished(through(self.blocks, arguments, hidden))

    def block(self, index: int) -> nn.Module:
        """A block of the second half by its index in the model."""
        return self.blocks[index - self.first]

    def finished(self, hidden: Tensor) -> Tensor:
        """Final hidden states (after the last norm) from those behind the last block.

        Args:
            hidden: B × T × hidden size.
        """
        if self._norm is not None:
            return cast(Tensor, self._norm(hidden))
        last = self._notes[-1]
        last.instead = hidden
        try:
            ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
            return cast(Tensor, self._skeleton(input_ids=ids, use_cache=False)[0])
        finally:
            last.instead = None

    def noted(self, ids: Tensor, **settings: Any) -> list[BlockArguments]:
        """What the blocks of the second half are given in a pass; no block is run.

        Args:
            ids: B × T int64.
            **settings: Anything else that the model's own forward takes.
        """
        with torch.inference_mode(False), torch.no_grad():
            self._skeleton(input_ids=ids, **settings)
        arguments = [cast(BlockArguments, note.noted) for note in self._notes[self.first :]]
        for note in self._notes:
            note.noted = None
        return arguments

    def _arguments_for(self, hidden: Tensor) -> list[BlockArguments]:
        """What the blocks of the second half are given for hidden states of this shape."""
        batch, length = hidden.shape[:2]
        # 0 stands for any batch of two or more, where the arguments are the same for all rows.
        keys = [(1, length)] if batch == 1 else [(0, length), (batch, length)]
        for key in keys:
            known = self._arguments.get(key)
            if known is not None:
                self._arguments.move_to_end(key)
                return known
        # Tokens, not embeddings: some models project or scale these before the blocks.
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        arguments = self.noted(ids, use_cache=False)
        shared = batch > 1 and not any(given.depend_on_batch() for given in arguments)
        self._arguments[(0, length) if shared else (batch, length)] = arguments
        while len(self._arguments) > _SHAPES:
            self._arguments.popitem(last=False)
        return arguments


def through(
    blocks: Sequence[nn.Module], arguments: Sequence[BlockArguments], hidden: Tensor
) -> Tensor:
    """Hidden states behind the last of some blocks, from those that enter the first."""
    for block, given in zip(blocks, arguments, strict=True):
        output = block(hidden, *given.positional, **given.keyword)
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden


def _shallow_copy(base: nn.Module, name: str, blocks: Iterable[nn.Module]) -> nn.Module:
    """``base`` with other blocks: every other module and all parameters are the same objects."""
    twin = copy.copy(base)
    twin.__dict__["_modules"] = dict(base._modules)
    first, _, rest = name.partition(".")
    child = cast(nn.Module, base._modules[first])
    twin.__dict__["_modules"][first] = (
        _shallow_copy(child, rest, blocks) if rest else nn.ModuleList(blocks)
    )
    return twin


def _probe(base: nn.Module, blocks_name: str, last: nn.Module) -> tuple[bool, nn.Module | None]:
    """Runs one token to learn whether blocks return tuples, and which module is the final norm.

    The final norm is the one that is given the last block's output and gives the model's; None if
    there is no such module, and the model then finishes by itself.
    """
    seen: dict[str, Any] = {}
    after: list[tuple[nn.Module, Tensor]] = []

    def at_last(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen["tuple"] = isinstance(output, tuple)
        seen["hidden"] = output[0] if isinstance(output, tuple) else output

    def at_any(module: nn.Module, inputs: Any, output: Any) -> None:
        if inputs and inputs[0] is seen.get("hidden") and isinstance(output, Tensor):
            after.append((module, output))

    owner = base.get_submodule(blocks_name.rpartition(".")[0])
    handles = [last.register_forward_hook(at_last)]
    handles += [child.register_forward_hook(at_any) for child in owner.children()]
    try:
        with torch.inference_mode():
            ids = torch.zeros(1, 1, dtype=torch.int64, device=next(base.parameters()).device)
            final = base(input_ids=ids, use_cache=False)[0]
    finally:
        for handle in handles:
            handle.remove()
    norms = [module for module, output in after if torch.equal(output, final)]
    return bool(seen["tuple"]), norms[0] if len(norms) == 1 else None


def _tensors(value: Any) -> Iterable[Tensor]:
    """All tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
