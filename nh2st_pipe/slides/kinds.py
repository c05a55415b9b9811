"""How files of slides are called: the one list of endings, for whoever looks for an image before it is opened."""

from __future__ import annotations

from pathlib import Path

__all__ = ["IMAGES", "is_image", "refused_kind"]

IMAGES = (
    ".tif",
    ".tiff",
    ".btf",
    ".tf2",
    ".tf8",
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".bmp",
    ".jp2",
    ".svs",
    ".ndpi",
    ".mrxs",
    ".scn",
    ".bif",
    ".vms",
    ".dcm",
    ".qptiff",
    ".czi",
    ".zarr",
)
"""Endings, in small letters, of what the readers open; what it is then is decided by content."""

_ELSEWHERE = {
    ".vsi": "Olympus and Evident write",
    ".lif": "Leica's microscopes write",
    ".nd2": "Nikon writes",
    ".isyntax": "Philips writes",
    ".mds": "Motic writes",
    ".kfb": "KFBIO writes",
    ".sdpc": "Sqray writes",
    ".tmap": "UNIC writes",
    ".ets": "Olympus and Evident write beside a .vsi",
    ".lsm": "Zeiss writes of fluorescence",
}
_HOW = "export it from QuPath as OME-TIFF, or convert it with bioformats2raw and raw2ometiff"


def is_image(path: Path) -> bool:
    """Whether something is called as images are that can be read; folders are of OME-Zarr alone."""
    return path.suffix.lower() in IMAGES and (path.is_dir() == (path.suffix.lower() == ".zarr"))


def refused_kind(path: Path) -> str | None:
    """Return what to do with a file of a format that no reader here opens, by its ending; None for others."""
    whose = _ELSEWHERE.get(path.suffix.lower())
    return None if whose is None else f"{path.name} is of the format that {whose}, which is not read here: {_HOW}"
