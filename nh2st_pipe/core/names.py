"""What a slide, or a block of one, is called: in keys and in messages, and never read back from there."""

from __future__ import annotations

__all__ = ["part_name"]


def part_name(slide_id: str, block: int | None) -> str:
    """Return the slide's name, with the number of the block where it is one."""
    return slide_id if block is None else f"{slide_id}, block {block}"
