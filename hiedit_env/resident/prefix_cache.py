"""A bounded memory of tensors that never change over an episode.

Above all the activations below the first candidate block, once per prompt: nothing below the first
candidate is ever edited.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from torch import Tensor


class TensorCache:
    """Key → tensor, least recently used evicted first.

    Args:
        max_bytes: Memory bound; entries beyond it are evicted, an entry larger than the whole
            bound is simply not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._entries: OrderedDict[Hashable, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> Tensor | None:
        """The tensor of a key, or None where it has to be computed."""
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def put(self, key: Hashable, value: Tensor) -> None:
        """Keeps a tensor, evicting the least recently used ones."""
        old = self._entries.pop(key, None)
        if old is not None:
            self.bytes -= old.nbytes
        if value.nbytes > self.max_bytes:
            return
        self._entries[key] = value
        self.bytes += value.nbytes
        while self.bytes > self.max_bytes:
            _, evicted = self._entries.popitem(last=False)
            self.bytes -= evicted.nbytes

    def clear(self) -> None:
        """Forgets everything."""
        self._entries.clear()
        self.bytes = 0
