"""Does a judge pay for length? Found in its own grades, without knowing which answers are right.

Answers to one problem that come to the same result differ in nothing that should matter, however long they are. Among
them, and only among them, grade is compared with length: over all answers longer ones may well be better.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


class Slope(NamedTuple):
    """Reward per unit of length, and its standard error; infinite where nothing can be compared."""

    value: float
    standard_error: float


class Graded(NamedTuple):
    """A reply as its judge sees it. `cell` is what has to be equal for two of them to be compared."""

    cell: tuple
    reply: str
    length: int
    reward: float


def slope_at_equal_answers(graded: Iterable[Graded]) -> Slope:
    """b = sum (l - l_c)(r - r_c) / sum (l - l_c)^2, with l_c and r_c the means of the cell: least squares with an
    intercept for each cell. Its variance is s^2 / sum (l - l_c)^2, s^2 = sum of squared residuals / degrees of freedom.

    A reply that stands twice in a cell counts once: a judge that is asked again says the same again.
    """
    cells: dict[tuple, dict[str, Graded]] = {}
    for one in graded:
        cells.setdefault(one.cell, {})[one.reply] = one
    length, reward = [], []
    for cell in cells.values():
        length.append(_centred([one.length for one in cell.values()]))
        reward.append(_centred([one.reward for one in cell.values()]))
    length_R = np.concatenate([np.zeros(0), *length])
    reward_R = np.concatenate([np.zeros(0), *reward])
    spread, degrees = float(length_R @ length_R), len(length_R) - len(cells) - 1
    if spread == 0 or degrees < 1:
        return Slope(0.0, float("inf"))
    value = float(length_R @ reward_R) / spread
    residual_R = reward_R - value * length_R
    return Slope(value, float(np.sqrt(residual_R @ residual_R / degrees / spread)))


def _centred(values: Sequence[float]) -> np.ndarray:
    array = np.array(values, dtype=np.float64)
    return array - array.mean()
