"""Which other neurons stand in for one that is written anew.

Neurons of an MLP are given up in a fixed order. When neuron k goes, its activation is told from
those of the neurons behind it in the order by least squares over everything that is read, and they
take over that part of what it wrote: their columns become w_r + b_kr w_k. This is the optimal brain
surgeon (Hassibi and Stork, NIPS 1992) for whole neurons; all regressions together are one
triangular factor of the second moment of the activations.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Number of neurons above which an MLP has no substitutes: their table grows with its square, and
#: one neuron of so many matters little.
MOST_NEURONS = 4096

#: Share of the mean square that is added to the second moment.
RIDGE = 1e-3


def substitutes(second: Tensor, order: Tensor) -> Tensor:
    """Coefficients b of all neurons.

    Args:
        second: I × I, second moment of the activations.
        order: I integers, in which neurons are given up.

    Returns:
        I (I − 1) / 2 float16: for every neuron in order, one number for each neuron behind it.
    """
    last_first = order.long().flip(0)
    ordered = second.double()[last_first][:, last_first]
    noise = RIDGE * ordered.diagonal().mean().clamp_min(1e-30)
    eye = torch.eye(len(ordered), dtype=torch.float64, device=second.device)
    lower = torch.linalg.cholesky(ordered + noise * eye)
    # Row i of the inverse of the unit factor is neuron i less its regression on those before.
    unit = lower / lower.diagonal()
    inverse = torch.linalg.solve_triangular(unit, eye, upper=False, unitriangular=True)
    found = -inverse.flip(0, 1)
    rows, columns = torch.triu_indices(len(found), len(found), 1, device=found.device)
    table: Tensor = found[rows, columns].half()
    return table


def of_neuron(table: Tensor, order: Tensor, place: int) -> Tensor:
    """The coefficients of one neuron, by neuron: I float32, 0 for itself and those before it.

    Args:
        table: From :func:`substitutes`.
        order: As there.
        place: Of the neuron in the order.
    """
    count = len(order)
    start = place * (count - 1) - place * (place - 1) // 2
    found = torch.zeros(count, device=table.device)
    found[order[place + 1 :].long()] = table[start : start + count - 1 - place].float()
    return found
