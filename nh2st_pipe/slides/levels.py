"""Which levels of a pyramid show the whole slide made smaller, and how much: a tile of another would lie elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["Step", "area_step", "step_of", "true_levels"]

Size = tuple[int, int]
Step = tuple[float, float]
"""Level-0 px per px of a level, along x and along y."""
_ROUNDED = 2  # px by which the side of a level may be off: writers round up, down, or to even numbers
_CLOSE = 0.02


def area_step(step: Step) -> float:
    """Return how many times smaller a level is along either side, in the mean of the two."""
    return math.sqrt(step[0] * step[1])


def step_of(full: Size, level: Size, filled_up: int = 0) -> Step:
    """Return level-0 px per px of a level, from the two sizes (width, height).

    Where the sides are those of a whole number of times, rounded or `filled_up` by so many px, it is that number: px
    that a writer drops or adds at the edge move no other.
    """
    across, down = (of / side for of, side in zip(full, level, strict=True))
    for times in dict.fromkeys((round(math.sqrt(across * down)), round(across), round(down))):
        if times >= 1 and all(
            -_ROUNDED <= side - of / times <= _ROUNDED + filled_up for of, side in zip(full, level, strict=True)
        ):
            return float(times), float(times)
    return across, down


def true_levels(
    sizes: Sequence[Size], steps: Sequence[Step], filled_up: Sequence[int] | None = None, *, said: bool = True
) -> tuple[list[int], list[str]]:
    """Return which levels are level 0 made smaller, and in words which are not.

    `sizes` are the levels' width and height, the first that of level 0; `steps` level-0 px per px of each, `said` by
    the file or following from the sizes (then both sides have to agree); `filled_up` by how many px each may be too
    wide and high, where whole tiles are counted.
    """
    full = sizes[0]
    kept, words = [0], []
    for number, size in enumerate(sizes[1:], start=1):
        step = steps[number] if said else (area_step(steps[number]),) * 2
        more = _ROUNDED + (filled_up[number] if filled_up is not None else 0)
        good = min(step) > 0 and all(
            side * (1 - _CLOSE) / down - _ROUNDED <= of_level <= side * (1 + _CLOSE) / down + more
            for side, of_level, down in zip(full, size, step, strict=True)
        )
        if good:
            kept.append(number)
        else:
            told = f", said to be {area_step(step):.4g} times smaller," if said else ""
            words.append(
                f"level {number} of {size[0]:,} × {size[1]:,} px{told} is not the whole of {full[0]:,} × {full[1]:,} "
                "px made smaller: it is passed over"
            )
    return kept, words
