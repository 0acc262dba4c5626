"""Divided differences of exp, exact at equal nodes and at nodes far apart."""

import math

import torch
from torch import Tensor

_SERIES_RANGE = 1.0
_NUM_TERMS = 18  # of the series: the first one left out is below 1e-16 of the sum over that range


def exp_difference(*nodes: Tensor) -> Tensor:
    """exp[x_0, .., x_n], the n-th divided difference of exp: the mean of exp over the simplex of its nodes, over n!.

    Args:
        nodes: fp64, of shapes that broadcast; any finite values, in any order, equal ones included.

    Returns:
        Their common shape, > 0; +inf where it overflows.
    """
    ascending = torch.stack(torch.broadcast_tensors(*nodes)).sort(dim=0).values
    top = ascending[-1]
    return _of_ascending(ascending - top) * top.exp()


def _of_ascending(nodes: Tensor) -> Tensor:
    """The same of nodes `[n + 1, ...]` in ascending order, none above 0."""
    if len(nodes) == 1:
        return nodes[0].exp()
    span = nodes[-1] - nodes[0]
    is_far = span > _SERIES_RANGE
    far, near = nodes[:, is_far], nodes[:, ~is_far]
    result = torch.empty_like(span)
    result[is_far] = (_of_ascending(far[1:]) - _of_ascending(far[:-1])) / span[is_far]
    result[~is_far] = _series(near - near[-1]) * near[-1].exp()
    return result


def _series(nodes: Tensor) -> Tensor:
    """sum_k h_k(nodes) / (k + n)!, h_k the complete homogeneous polynomial; for nodes in [-1, 0], the last one 0."""
    order = len(nodes) - 1
    partial = [torch.ones_like(nodes[0])] * order  # h_k of the first 1, 2, .. nodes; the last node adds nothing
    total = partial[-1] / float(math.factorial(order))
    for k in range(1, _NUM_TERMS):
        previous, partial = partial, []
        for node, last in zip(nodes, previous, strict=False):
            partial.append(torch.addcmul(partial[-1], node, last) if partial else node * last)
        total.add_(partial[-1], alpha=1 / math.factorial(k + order))
    return total
