"""Which levels of a pyramid show the whole slide made smaller: a tile cut from another one would lie elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["downsample_of", "true_levels"]

Size = tuple[int, int]
_ROUNDED = 2  # px by which the side of a level may be off: writers round up, down, or to even numbers
_CLOSE = 0.02


def downsample_of(full: Size, level: Size) -> float:
    """Return level-0 px per px of a level, from the two sizes (width, height)."""
    return (full[0] / level[0] + full[1] / level[1]) / 2


def true_levels(
    sizes: Sequence[Size], downsamples: Sequence[float] | None = None, filled_up: Sequence[int] | None = None
) -> tuple[list[int], list[str]]:
    """Return which levels are level 0 made smaller, and in words which are not.

    `sizes` are the levels' width and height, the first that of level 0; `downsamples` what the file says of them
    (level-0 px per px), where it says so; `filled_up` by how many px each may be too wide and high, where whole tiles
    are counted.
    """
    full = sizes[0]
    kept, words = [0], []
    for number, size in enumerate(sizes[1:], start=1):
        down = downsample_of(full, size) if downsamples is None else downsamples[number]
        more = _ROUNDED + (filled_up[number] if filled_up is not None else 0)
        good = down > 0 and all(
            side * (1 - _CLOSE) / down - _ROUNDED <= of_level <= side * (1 + _CLOSE) / down + more
            for side, of_level in zip(full, size, strict=True)
        )
        if good:
            kept.append(number)
        else:
            said = "" if downsamples is None else f", said to be {down:.4g} times smaller,"
            words.append(
                f"level {number} of {size[0]:,} × {size[1]:,} px{said} is not the whole of {full[0]:,} × {full[1]:,} "
                "px made smaller: it is passed over"
            )
    return kept, words
