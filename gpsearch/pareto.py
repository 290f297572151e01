"""Pareto fronts of an array of costs: a row a candidate, a column an objective, all minimised."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float


def non_dominated(costs: Float[np.ndarray, "n m"]) -> Bool[np.ndarray, " n"]:
    """Say of every row whether no other row is at least as good everywhere and better somewhere.

    Equal rows do not dominate each other, so all of them stay. A row with a NaN is never on the
    front and keeps nobody off it.
    """
    known = ~np.isnan(costs).any(axis=1)
    # [i, j]: row i against row j.
    no_worse = (costs[:, None] <= costs[None]).all(axis=2)
    better = (costs[:, None] < costs[None]).any(axis=2)
    dominated = (no_worse & better & known[:, None]).any(axis=0)
    result: Bool[np.ndarray, " n"] = known & ~dominated
    return result


def hypervolume(costs: Float[np.ndarray, "n m"], reference: Float[np.ndarray, " m"]) -> float:
    """Return the volume between the rows and ``reference``, the worst costs of interest.

    Exact for any number of objectives: each row adds the box it spans less what the rows after it
    cover of that box (While, Bradstreet and Barone 2012, "WFG"). Meant for fronts of some dozens.
    """
    inside = costs[(costs < reference).all(axis=1)]
    front = np.unique(inside[non_dominated(inside)], axis=0)
    volume = 0.0
    for index, row in enumerate(front):
        covered = np.maximum(front[index + 1 :], row)
        volume += float(np.prod(reference - row)) - hypervolume(covered, reference)
    return volume
