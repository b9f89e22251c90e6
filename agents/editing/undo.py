"""Taking edits back: the weights as the recorded updates of the remaining edits give them.

A weight with some edits in place is the unedited weight plus the sum of their recorded low-rank
updates, added in float32 in the order they were made, as when they were written. So

- *rewind* gives the weights of an earlier moment bit for bit, since it adds the same numbers in the
  same order; with no edit in place the weights are the unedited ones;
- *revoke* gives the weights that the remaining recorded updates give, as if the revoked one had
  never been written. The updates that were made after it were computed while it was in place, and
  stay as they are.

Another machine, or another number of threads, may round a sum differently in its last bits; the
fingerprint recorded with every event shows it.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from hiedit_agents.editing.ledger import Ledger
from hiedit_env.resident.low_rank import Updates
from hiedit_env.resident.weights import EditableWeights, WeightSnapshot, accumulated

#: Edits that are read before they are added.
_AHEAD = 4


def replay(weights: EditableWeights, ledger: Ledger, edits: Sequence[int]) -> None:
    """Makes the weights those with some edits of a ledger in place, and no others.

    Args:
        weights: Of the ledger's base model.
        ledger: Where the updates are recorded.
        edits: Ids of edits, in the order they were made.

    Raises:
        LedgerError: an edit cannot be read; the weights are as they were.
    """
    changes: list[Tensor | None] = [None] * len(weights.layers)
    with torch.inference_mode(False), torch.no_grad():
        for steps in _read_ahead(ledger, edits, weights.device):
            for updates in steps:
                for i, update in enumerate(updates):
                    if update is not None:
                        changes[i] = accumulated(
                            changes[i], update, weights.layers[i].is_transposed, in_place=True
                        )
    weights.restore(WeightSnapshot(dict(enumerate(changes))))


def _read_ahead(
    ledger: Ledger, edits: Sequence[int], device: torch.device
) -> Iterator[list[Updates]]:
    """The recorded updates of each edit; the next ones are read while one is added."""
    left, coming = iter(edits), deque[Future[list[Updates]]]()
    with ThreadPoolExecutor(1) as reader:
        for number in itertools.islice(left, _AHEAD):
            coming.append(reader.submit(ledger.steps, number, device))
        while coming:
            steps = coming.popleft().result()
            coming.extend(reader.submit(ledger.steps, n, device) for n in itertools.islice(left, 1))
            yield steps
