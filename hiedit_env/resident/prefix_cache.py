"""A bounded memory of tensors that never change over an episode.

Above all the activations below the first candidate block, once per prompt: nothing below the first
candidate is ever edited.
"""

from __future__ import annotations

from collections.abc import Hashable
from operator import attrgetter

from cachetools import LRUCache
from torch import Tensor


class TensorCache(LRUCache[Hashable, Tensor]):
    """Key → tensor; the least recently used tensors are evicted first. Not for several threads.

    ``get`` gives None for an unknown key, ``currsize`` is the memory in use in bytes.

    Args:
        max_bytes: Memory bound.
    """

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes, getsizeof=attrgetter("nbytes"))

    def put(self, key: Hashable, value: Tensor) -> None:
        """Keeps a tensor; one that is larger than the whole memory bound is not kept."""
        self.pop(key, None)
        if value.nbytes <= self.maxsize:
            self[key] = value
