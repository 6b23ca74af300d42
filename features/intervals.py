"""Intervals over prompts, for figures that are made of sums over completions.

Completions of one prompt are not independent. So prompts are dealt into groups, what a figure is made of is summed up
for each group, and the figure's 95 % interval is from how it changes where one group is left out (the delete-a-group
jackknife, Kott 2001). That holds for a mean, a ratio or a correlation alike. Shape letter: G groups.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

GROUPS = 16
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
# the 97.5 % points of Student's t with 1, 2, ... degrees of freedom


def groups_of(prompts: Sequence[Hashable]) -> tuple[list[int], int]:
    """The group of each completion, by its prompt, and how many groups there are: one for each prompt, or GROUPS."""
    numbers = {prompt: number % GROUPS for number, prompt in enumerate(dict.fromkeys(prompts))}
    return [numbers[prompt] for prompt in prompts], min(GROUPS, len(numbers))


def with_interval(sums: np.ndarray, statistic: Callable[[np.ndarray], Any]) -> tuple[np.ndarray, np.ndarray]:
    """`statistic` of the sums [...] over all prompts, and the half-width of its 95 % interval; NaN for one group.

    `sums` [G, ...] are those of each group.
    """
    total, count = sums.sum(0), len(sums)
    value = np.asarray(statistic(total))
    if count < 2:
        return value, np.full(value.shape, np.nan)
    without = np.stack([np.asarray(statistic(total - own)) for own in sums])
    error = np.sqrt((count - 1) / count * np.square(without - without.mean(0)).sum(0))
    return value, T_95[count - 2] * error


def ratio(above: Any, below: Any) -> np.ndarray:
    """above / below; NaN over 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.asarray(below) == 0, np.nan, np.divide(above, below))
