"""JPEG and JPEG 2000 pieces of slides decoded on an NVIDIA GPU, many at once, through nvImageCodec.

Decoders round differently: the first piece of each level is held against the CPU's (`TiffPieces.decode_with`), and the
record of a slide says which it was.
"""

from __future__ import annotations

import contextlib
import struct
import threading
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.core.errors import UsageError

__all__ = ["NvDecoder", "PieceDecoder", "check_decoder", "jpeg_stream", "the_decoder"]

_PACKAGE = "nvidia.nvimgcodec"
_SOI, _EOI, _JFIF, _ADOBE = b"\xff\xd8", b"\xff\xd9", b"\xff\xe0", b"\xff\xee"
_INSTALL = "pip install nvidia-nvimgcodec-cu13[all] (-cu12 beside CUDA 12)"


class PieceDecoder(Protocol):
    """Decodes pieces of slides, many at once. Safe to use from several threads."""

    name: str
    """The library, and its version."""

    def decode(self, streams: Sequence[bytes]) -> list[NDArray[np.uint8] | None]:
        """Return each stream's px, h × w × 3; None of one that cannot be decoded."""
        ...


class NvDecoder:
    """nvImageCodec on the process's GPU, or on the CPU, where what it does can be tried out."""

    def __init__(self, *, on_cpu: bool = False) -> None:
        self._codec = _package()
        self.name = f"nvimgcodec {self._codec.__version__}"
        options: dict[str, Any] = {}
        if on_cpu:
            options["device_id"] = self._codec.NVIMGCODEC_DEVICE_CPU_ONLY
            options["backends"] = [self._codec.Backend(self._codec.BackendKind.CPU_ONLY)]
        self._decoder = self._codec.Decoder(**options)
        self._as_rgb = self._codec.DecodeParams(apply_exif_orientation=False, color_spec=self._codec.ColorSpec.SRGB)
        self._lock = threading.Lock()

    def decode(self, streams: Sequence[bytes]) -> list[NDArray[np.uint8] | None]:
        """See `PieceDecoder.decode`."""
        with self._lock:
            sources = [self._codec.CodeStream(stream) for stream in streams]
            return [
                None if image is None else np.asarray(image.cpu())
                for image in self._decoder.decode(sources, params=self._as_rgb)
            ]


@cache
def the_decoder() -> PieceDecoder:
    """Return the decoder of this process, made when it is first asked for."""
    return NvDecoder()


def check_decoder() -> None:
    """Raise UsageError where nothing can be decoded on a GPU here: no package, or no GPU that it finds."""
    _package()
    import torch

    if not torch.cuda.is_available():
        raise UsageError("--decode gpu: there is no NVIDIA GPU here; leave the option out")


def _package() -> Any:
    try:
        return import_module(_PACKAGE)
    except ImportError as error:
        raise UsageError(f"--decode gpu needs nvImageCodec: {_INSTALL}; or leave the option out") from error


def jpeg_stream(data: bytes, tables: bytes | None, *, rgb: bool) -> bytes:
    """Return a piece of a TIFF as a JPEG that stands alone: with its tables, and a marker that says its colours.

    TIFF keeps tables once for all pieces, and says beside them whether samples are red, green and blue or to be turned
    into those: an Adobe marker says the same within the stream, where no JFIF marker stands before it.
    """
    if not data.startswith(_SOI):
        return data
    colours = _ADOBE + struct.pack(">H", 14) + b"Adobe" + struct.pack(">HHHB", 100, 0, 0, 0 if rgb else 1)
    own = b"" if tables is None else tables.removeprefix(_SOI)
    with contextlib.suppress(ValueError):
        own = own[: own.rindex(_EOI)]
    rest = data[len(_SOI) :]
    while rest.startswith(_JFIF):
        rest = rest[2 + int.from_bytes(rest[2:4]) :]
    return _SOI + colours + own + rest
