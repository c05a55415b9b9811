"""One picture in every layout and with every property that files of slides come in: what a row of the table is."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import zarr
from numpy.typing import NDArray
from PIL import Image

__all__ = ["CELLS", "LAYOUTS", "PROPERTIES", "picture", "smooth"]

WIDTH, HEIGHT = 200, 150


def smooth() -> NDArray[np.uint8]:
    """Tissue on glass, h × w × 3: colours that change slowly, so that lossy codecs and rounding stay small."""
    y, x = np.mgrid[:HEIGHT, :WIDTH] / 20.0
    waves = [np.sin(x + 1.3 * colour) * np.cos(y * 0.8 + colour) for colour in range(3)]
    tissue = np.stack([150 + 40 * wave for wave in waves], axis=2)
    inside = np.clip(3 - 3 * np.hypot((y - 3.75) / 3.2, (x - 5) / 4.3), 0, 1)[..., None]
    pixels: NDArray[np.uint8] = (tissue * inside + 244.0 * (1 - inside)).round().astype(np.uint8)
    return pixels


@dataclass(frozen=True)
class Property:
    """How px are stored: `make` gives h × w × s samples, `shown` what of the picture they show."""

    make: Callable[[NDArray[np.uint8]], NDArray[Any]]
    shown: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] = lambda pixels: pixels
    options: dict[str, Any] = field(default_factory=dict)
    """tifffile's."""
    refused: str | None = None
    """What is said of it, where it is not read."""


def _grey(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(np.repeat(pixels[..., 1:2], 3, axis=2), np.uint8)


def _opaque(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Opacity: a soft circle."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    far = np.hypot(y - HEIGHT / 2, x - WIDTH / 2)
    return np.asarray(np.clip((70 - far) * 8, 0, 255)[..., None], np.uint8)


def _over_white(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    alpha = _opaque(pixels) / 255
    return np.asarray((pixels * alpha + 255 * (1 - alpha)).round(), np.uint8)


def _straight(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    alpha = _opaque(pixels)
    return np.concatenate([np.where(alpha > 0, pixels, 0), alpha], axis=2).astype(np.uint8)


def _premultiplied(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    alpha = _opaque(pixels)
    return np.concatenate([(pixels * (alpha / 255)).round(), alpha], axis=2).astype(np.uint8)


def _cmyk(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    ink = 255 - pixels
    return np.concatenate([ink, np.zeros_like(ink[..., :1])], axis=2)


def _deep(shift: int) -> Callable[[NDArray[np.uint8]], NDArray[np.uint16]]:
    def make(pixels: NDArray[np.uint8]) -> NDArray[np.uint16]:
        return np.asarray((pixels.astype(np.uint16) << shift) + (1 << shift) - 1, np.uint16)

    return make


_RGB: dict[str, Any] = {"photometric": "rgb"}
_UNKNOWN = "whose white is not known"

PROPERTIES: dict[str, Property] = {
    "8 bits": Property(lambda p: p, options=_RGB),
    "10 bits in 16": Property(_deep(2), options=_RGB),
    "12 bits in 16": Property(_deep(4), options=_RGB),
    "16 bits": Property(_deep(8), options=_RGB),
    "8 bits in 16": Property(lambda p: p.astype(np.uint16), options=_RGB),
    "floating point": Property(lambda p: (p / 255).astype(np.float32), options=_RGB, refused=_UNKNOWN),
    "32 bits": Property(lambda p: p.astype(np.uint32) << 24, options=_RGB, refused=_UNKNOWN),
    "signed": Property(lambda p: p.astype(np.int16), options=_RGB, refused=_UNKNOWN),
    "grey": Property(lambda p: p[..., 1:2], _grey, {"photometric": "minisblack"}),
    "grey, 12 bits in 16": Property(lambda p: _deep(4)(p[..., 1:2]), _grey, {"photometric": "minisblack"}),
    "white is zero": Property(lambda p: 255 - p[..., 1:2], _grey, {"photometric": "miniswhite"}),
    "opacity": Property(_straight, _over_white, {**_RGB, "extrasamples": ["unassalpha"]}),
    "opacity, multiplied": Property(_premultiplied, _over_white, {**_RGB, "extrasamples": ["assocalpha"]}),
    "opacity, 16 bits": Property(
        lambda p: _straight(p).astype(np.uint16) * 257, _over_white, {**_RGB, "extrasamples": ["unassalpha"]}
    ),
    "a fourth sample": Property(_premultiplied, _over_white, {**_RGB, "extrasamples": ["unspecified"]}),
    "a fourth sample, empty": Property(
        lambda p: np.concatenate([p, np.zeros_like(p[..., :1])], axis=2),
        options={**_RGB, "extrasamples": ["unspecified"]},
    ),
    "CMYK": Property(_cmyk, options={"photometric": "separated"}),
}

Write = Callable[[Path, NDArray[Any], dict[str, Any]], None]


def _planes(values: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(np.moveaxis(values, 2, 0))


def _squeezed(values: NDArray[Any]) -> NDArray[Any]:
    return values[..., 0] if values.shape[2] == 1 else values


def _tiff(**more: Any) -> Write:
    def write(path: Path, values: NDArray[Any], options: dict[str, Any]) -> None:
        axes = (
            {"metadata": {"axes": "YX" if values.shape[2] == 1 else "YXS"}} if more.get("ome") else {"metadata": None}
        )
        tifffile.imwrite(path, _squeezed(values), **axes, **more, **options)

    return write


def _planar(**more: Any) -> Write:
    def write(path: Path, values: NDArray[Any], options: dict[str, Any]) -> None:
        tifffile.imwrite(path, _planes(values), planarconfig="separate", metadata=None, **more, **options)

    return write


def _pyramid(ome: bool) -> Write:
    def write(path: Path, values: NDArray[Any], options: dict[str, Any]) -> None:
        levels = [_squeezed(values[::step, ::step]) for step in (1, 2, 4)]
        axes = {"axes": "YX" if values.shape[2] == 1 else "YXS"}
        with tifffile.TiffWriter(path, ome=ome) as file:
            for number, level in enumerate(levels):
                file.write(
                    level,
                    tile=(64, 64),
                    compression="zlib",
                    subifds=2 if ome and number == 0 else 0,
                    subfiletype=1 if number else 0,
                    metadata=axes if ome and number == 0 else None,
                    **options,
                )

    return write


def _pages(kind: str) -> Write:
    """Three pages, of one colour each."""

    def write(path: Path, values: NDArray[Any], options: dict[str, Any]) -> None:
        planes = _planes(values)
        if kind == "ImageJ":
            tifffile.imwrite(path, planes, imagej=True, metadata={"axes": "CYX", "mode": "composite"})
        elif kind == "OME":
            tifffile.imwrite(path, planes, ome=True, photometric="minisblack", metadata={"axes": "CYX"})
        elif kind == "tifffile":
            tifffile.imwrite(path, planes, photometric="minisblack", tile=(64, 64), compression="zlib")
        else:
            with tifffile.TiffWriter(path) as file:
                for plane in planes:
                    file.write(plane, photometric="minisblack", metadata=None, rowsperstrip=40)

    return write


def _ome_zarr(version: int, axes: str) -> Write:
    def write(path: Path, values: NDArray[Any], options: dict[str, Any]) -> None:
        root = zarr.open_group(path, mode="w", zarr_format=2 if version == 2 else 3)
        levels: list[Any] = []
        for number, step in enumerate((1, 2, 4)):
            level = values[::step, ::step]
            level = _planes(level) if axes == "cyx" else level
            chunks = tuple(level.shape[axes.index("c")] if axis == "c" else 64 for axis in axes)
            array: Any = root.create_array(str(number), shape=level.shape, chunks=chunks, dtype=level.dtype)
            array[:] = level
            scale = [1.0 if axis == "c" else 0.5 * step for axis in axes]
            levels.append({"path": str(number), "coordinateTransformations": [{"type": "scale", "scale": scale}]})
        named = [{"name": axis, "type": "channel" if axis == "c" else "space"} for axis in axes]
        scales = [{"version": "0.4", "axes": named, "datasets": levels}]
        root.attrs.update(
            {"multiscales": scales} if version == 2 else {"ome": {"version": "0.5", "multiscales": scales}}
        )

    return write


def _plain(format: str, **more: Any) -> Write:
    def write(path: Path, values: NDArray[Any], options: dict[str, Any]) -> None:
        if values.dtype == np.uint16:
            import imagecodecs

            encode: Any = {"PNG": imagecodecs.png_encode, "JPEG2000": imagecodecs.jpeg2k_encode}[format]
            path.write_bytes(encode(np.ascontiguousarray(_squeezed(values))))
            return
        mode = {1: "L", 3: "RGB", 4: "CMYK" if options["photometric"] == "separated" else "RGBA"}[values.shape[2]]
        Image.frombytes(mode, (WIDTH, HEIGHT), np.ascontiguousarray(values).tobytes()).save(path, format, **more)

    return write


def czi(path: Path, values: NDArray[Any], options: dict[str, Any]) -> None:
    """Three levels, in pieces of 64 px whose first lies at (-7, 5), as stages of microscopes do."""
    from pylibCZIrw.czi import create_czi

    steps = list[int]()
    with create_czi(str(path)) as file:
        for step in options.get("levels", (1, 2, 4)):
            level = values[::step, ::step, ::-1]
            for y in range(0, level.shape[0] if step != options.get("cut") else 1, 64):
                for x in range(0, level.shape[1] if step != options.get("cut") else 65, 64):
                    file.write(np.ascontiguousarray(level[y : y + 64, x : x + 64]), (x * step - 7, y * step + 5))
                    steps.append(step)
        file.write_metadata(**{"scale_x": 0.5e-6, "scale_y": 0.5e-6, **options.get("czi", {})})
    _made_smaller(path, steps, (WIDTH, HEIGHT))


def _made_smaller(path: Path, steps: Sequence[int], size: tuple[int, int]) -> None:
    """Make pieces those of levels, which libCZI does not write: they span `steps` times what they hold.

    The entries of a CZI's directory, which stand before each piece as well: "DV", and from byte 28 the number of
    dimensions and for each its name, start, size, a coordinate and the size that is stored.
    """
    data = bytearray(path.read_bytes())
    at = data.find(b"DV")
    while at >= 0:
        (count,) = struct.unpack_from("<i", data, at + 28)
        where = {bytes(data[i : i + 1]): i for i in range(at + 32, at + 32 + 20 * count, 20)} if 0 < count < 9 else {}
        if {b"X", b"Y", b"M"} <= set(where):
            number = struct.unpack_from("<i", data, where[b"M"] + 4)[0]
            for name, side, corner in ((b"X", size[0], -7), (b"Y", size[1], 5)):
                start, _, _, stored = struct.unpack_from("<iifi", data, where[name] + 4)
                span = min(stored * steps[number], side + corner - start)
                struct.pack_into("<i", data, where[name] + 8, span)
        at = data.find(b"DV", at + 2)
    path.write_bytes(data)


LAYOUTS: dict[str, tuple[str, Write]] = {
    "strips": ("a.tif", _tiff(rowsperstrip=40)),
    "one strip, LZW": ("a.tif", _tiff(rowsperstrip=HEIGHT, compression="lzw")),
    "strips, LERC": ("a.tif", _tiff(rowsperstrip=40, compression="lerc")),
    "tiles": ("a.tif", _tiff(tile=(64, 64), compression="zlib")),
    "tiles, big-endian": ("a.tif", _tiff(tile=(64, 64), byteorder=">")),
    "tiles, zstd": ("a.tif", _tiff(tile=(64, 64), compression="zstd")),
    "tiles, JPEG 2000": ("a.tif", _tiff(tile=(64, 64), compression="jpeg2000")),
    "BigTIFF, tiles": ("a.btf", _tiff(tile=(64, 64), compression="zlib", bigtiff=True)),
    "pyramid of pages": ("a.tif", _pyramid(ome=False)),
    "planar strips": ("a.tif", _planar(rowsperstrip=40)),
    "planar tiles": ("a.tif", _planar(tile=(64, 64), compression="zlib")),
    "OME-TIFF, tiles": ("a.ome.tif", _tiff(ome=True, tile=(64, 64), compression="zlib")),
    "OME-TIFF, strips": ("a.ome.tif", _tiff(ome=True, rowsperstrip=40)),
    "OME-TIFF, pyramid": ("a.ome.tif", _pyramid(ome=True)),
    "OME-TIFF, CYX": ("a.ome.tif", _pages("OME")),
    "ImageJ hyperstack": ("a.tif", _pages("ImageJ")),
    "three grey pages": ("a.tif", _pages("plain")),
    "three grey pages, tiles": ("a.tif", _pages("tifffile")),
    "OME-Zarr 0.4, CYX": ("a.zarr", _ome_zarr(2, "cyx")),
    "OME-Zarr 0.5, YXC": ("a.zarr", _ome_zarr(3, "yxc")),
    "PNG": ("a.png", _plain("PNG")),
    "WebP": ("a.webp", _plain("WEBP", lossless=True)),
    "JPEG": ("a.jpg", _plain("JPEG", quality=100, subsampling=0, keep_rgb=True)),
    "JPEG 2000": ("a.jp2", _plain("JPEG2000")),
    "BMP": ("a.bmp", _plain("BMP")),
    "CZI": ("a.czi", czi),
}

_OF_COLOURS = ("8 bits", "10 bits in 16", "12 bits in 16", "16 bits", "8 bits in 16")
_NOT_OF_TIFF = ("white is zero", "opacity, multiplied", "a fourth sample", "a fourth sample, empty", "CMYK")


def _has(layout: str, name: str) -> bool:
    """Whether files of a layout can have a property at all."""
    of = PROPERTIES[name]
    if layout in ("OME-TIFF, CYX", "ImageJ hyperstack") or "grey pages" in layout:
        return name in _OF_COLOURS
    if "planar" in layout:
        return "grey" not in name and name != "white is zero"
    if "LERC" in layout:
        return name in ("8 bits", "16 bits", "12 bits in 16", "grey", "opacity")
    if "JPEG 2000" in layout and layout.startswith("tiles"):
        return name in ("8 bits", "16 bits", "grey")
    if "Zarr" in layout:
        return name not in _NOT_OF_TIFF
    deep = of.make(np.zeros((1, 1, 3), np.uint8)).dtype != np.uint8
    if layout in ("PNG", "JPEG 2000"):
        return name not in _NOT_OF_TIFF and of.refused is None and not ("JPEG" in layout and "opacity" in name)
    if layout == "CZI":
        return name in (*_OF_COLOURS, "floating point", "grey", "grey, 12 bits in 16")
    if layout in ("WebP", "JPEG", "BMP"):
        kinds = {"WebP": ("8 bits", "opacity"), "JPEG": ("8 bits", "grey", "CMYK"), "BMP": ("8 bits", "grey")}
        return not deep and name in kinds[layout]
    return True


CELLS = [(layout, name) for layout in LAYOUTS for name in PROPERTIES if _has(layout, name)]


def picture(folder: Path, layout: str, name: str) -> tuple[Path, NDArray[np.uint8]]:
    """Write the picture to `folder`, and return where and what it shows."""
    file, write = LAYOUTS[layout]
    of, pixels = PROPERTIES[name], smooth()
    write(folder / file, of.make(pixels), of.options)
    return folder / file, of.shown(pixels)
