"""What is asked of a tile's values: `ERBB2 > p90 and trusted and unlike < 95`.

condition   or, and, not, ( ); the usual order
comparison  VALUE > < >= <= NUMBER, or pNN: the NNth percentile of that value over all tiles that are searched
VALUE       a gene: its predicted value; low:GENE, high:GENE the ends of its interval; measured:GENE what was
            measured; "quoted" where a name has other signs than letters, digits, _ . and -
unlike      per cent of the training tiles that lie nearer to other slides' than this tile to them
trusted     whether every gene that the condition names is trusted on the slide
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.core.errors import UsageError
from nh2st_pipe.exporting.view import PredictionView

__all__ = ["Where"]

_TOKEN = re.compile(r'\s*(?:(?P<text>(?:\w+:)?"[^"]*")|(?P<op>>=|<=|>|<|\(|\))|(?P<word>[\w.:\-]+))')
_LAYERS = {"low": "low", "high": "high", "measured": "target"}
_UNLIKE = "unlike"
_OPS: dict[str, Callable[[Any, Any], Any]] = {
    ">": np.greater,
    "<": np.less,
    ">=": np.greater_equal,
    "<=": np.less_equal,
}


@dataclass(frozen=True)
class _Value:
    """A gene's values, or those of its layer; or how unlike tiles are."""

    name: str
    layer: str = ""

    def of(self, view: PredictionView) -> NDArray[np.float64]:
        """Return it for every tile of a view that holds all genes; NaN where it is not known."""
        unknown = np.full(len(view), np.nan)
        if self.name == _UNLIKE and not self.layer:
            return unknown if view.percentile is None else view.percentile
        names = view.genes
        if self.name not in names or (self.layer and self.layer not in view.layers):
            return unknown
        place = names.index(self.name)
        return view.values(self.layer, of=slice(place, place + 1))[:, 0].astype(np.float64)


@dataclass(frozen=True)
class _Node:
    """A part of the condition: `kind` is and, or, not, compare or trusted."""

    kind: str
    parts: tuple[_Node, ...] = ()
    value: _Value | None = None
    op: str = ""
    bound: float = 0.0
    percentile: bool = False


class Where:
    """A condition on tiles. Raises UsageError where it cannot be understood, with the place."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._tokens = list(self._read())
        self._at = 0
        if not self._tokens:
            raise UsageError("--where says nothing")
        self._node = self._or()
        if self._at < len(self._tokens):
            self._fail("nothing more is expected")

    def __str__(self) -> str:
        return self.text

    @property
    def genes(self) -> list[str]:
        """The genes that it names, in their order."""
        return list(dict.fromkeys(value.name for value in self._values() if value.name != _UNLIKE))

    def bounds(self, views: Iterable[PredictionView]) -> dict[tuple[str, str, float], float]:
        """Return what percentiles come to over all tiles: `mask` takes them. Tiles without a value do not count."""
        wanted = {
            (node.value, node.bound) for node in self._nodes(self._node) if node.percentile and node.value is not None
        }
        if not wanted:
            return {}
        of: dict[_Value, list[NDArray[np.float64]]] = {value: [] for value, _ in wanted}
        for view in views:
            for value, held in of.items():
                values = value.of(view)
                held.append(values[np.isfinite(values)])
        found = {}
        for value, bound in wanted:
            every = np.concatenate(of[value]) if of[value] else np.zeros(0)
            found[value.name, value.layer, bound] = float(np.percentile(every, bound)) if len(every) else np.nan
        return found

    def untrusted(self, views: Iterable[PredictionView]) -> list[str]:
        """Return the genes that it names and no view trusts, where it asks for trust: no tile is trusted of those."""
        if not any(node.kind == "trusted" for node in self._nodes(self._node)):
            return []
        trusted = {gene for view in views for gene, good in zip(view.genes, view.trusted, strict=True) if good}
        return [gene for gene in self.genes if gene not in trusted]

    def mask(self, view: PredictionView, bounds: Mapping[tuple[str, str, float], float]) -> NDArray[np.bool_]:
        """Return which tiles of a view that holds all genes meet it; one without a value meets no comparison."""
        trusted = {gene for gene, verdict in zip(view.genes, view.trusted, strict=True) if verdict}
        return self._mask(self._node, view, bounds, all(gene in trusted for gene in self.genes))

    def _mask(
        self, node: _Node, view: PredictionView, bounds: Mapping[tuple[str, str, float], float], trusted: bool
    ) -> NDArray[np.bool_]:
        if node.kind == "trusted":
            return np.full(len(view), trusted)
        if node.kind == "not":
            return ~self._mask(node.parts[0], view, bounds, trusted)
        if node.kind in ("and", "or"):
            masks = [self._mask(part, view, bounds, trusted) for part in node.parts]
            return np.asarray(np.all(masks, axis=0) if node.kind == "and" else np.any(masks, axis=0), np.bool_)
        assert node.value is not None
        bound = bounds[node.value.name, node.value.layer, node.bound] if node.percentile else node.bound
        with np.errstate(invalid="ignore"):
            return np.asarray(_OPS[node.op](node.value.of(view), bound), np.bool_)

    def _values(self) -> list[_Value]:
        return [node.value for node in self._nodes(self._node) if node.value is not None]

    def _nodes(self, node: _Node) -> list[_Node]:
        return [node, *(each for part in node.parts for each in self._nodes(part))]

    def _read(self) -> Iterable[tuple[str, str, int]]:
        at = 0
        while self.text[at:].strip():
            found = _TOKEN.match(self.text, at)
            if found is None:
                at += len(self.text[at:]) - len(self.text[at:].lstrip())
                raise UsageError(
                    f"--where: {self.text[at]!r} is not understood, at character {at + 1} of {self.text!r}"
                )
            kind = found.lastgroup or ""
            yield kind, found[kind], found.start(kind)
            at = found.end()

    def _fail(self, expected: str) -> NoReturn:
        if self._at < len(self._tokens):
            _, token, place = self._tokens[self._at]
            raise UsageError(f"--where: {expected} at character {place + 1} of {self.text!r}, where {token!r} stands")
        raise UsageError(f"--where: {expected} at the end of {self.text!r}")

    def _next(self, *words: str) -> bool:
        """Whether the next token is one of these words; then it is taken."""
        if self._at < len(self._tokens):
            kind, token, _ = self._tokens[self._at]
            if kind != "text" and token.lower() in words:
                self._at += 1
                return True
        return False

    def _or(self) -> _Node:
        parts = [self._and()]
        while self._next("or"):
            parts.append(self._and())
        return parts[0] if len(parts) == 1 else _Node("or", tuple(parts))

    def _and(self) -> _Node:
        parts = [self._not()]
        while self._next("and"):
            parts.append(self._not())
        return parts[0] if len(parts) == 1 else _Node("and", tuple(parts))

    def _not(self) -> _Node:
        if self._next("not"):
            return _Node("not", (self._not(),))
        if self._next("("):
            inner = self._or()
            if not self._next(")"):
                self._fail("a ) is expected")
            return inner
        if self._next("trusted"):
            return _Node("trusted")
        return self._comparison()

    def _comparison(self) -> _Node:
        value = self._value()
        if self._at >= len(self._tokens) or self._tokens[self._at][1] not in _OPS:
            self._fail("one of > < >= <= is expected")
        op = self._tokens[self._at][1]
        self._at += 1
        bound, percentile = self._bound()
        return _Node("compare", value=value, op=op, bound=bound, percentile=percentile)

    def _value(self) -> _Value:
        if self._at >= len(self._tokens) or self._tokens[self._at][0] == "op":
            self._fail("a gene, unlike, trusted, not or ( is expected")
        kind, token, _ = self._tokens[self._at]
        if kind == "word" and token.lower() in ("and", "or"):
            self._fail("a gene, unlike, trusted, not or ( is expected")
        self._at += 1
        layer, colon, rest = token.partition(":")
        if colon and layer.lower() in _LAYERS and rest:
            return _Value(rest.strip('"'), _LAYERS[layer.lower()])
        if kind == "text":
            return _Value(token.strip('"'))
        return _Value(_UNLIKE) if token.lower() == _UNLIKE else _Value(token)

    def _bound(self) -> tuple[float, bool]:
        if self._at < len(self._tokens):
            _, token, _ = self._tokens[self._at]
            percentile = re.fullmatch(r"[pP](\d+(?:\.\d+)?)", token)
            try:
                found = (float(percentile[1]), True) if percentile else (float(token), False)
            except ValueError:
                self._fail("a number or p90 is expected")
            if not np.isfinite(found[0]) or (percentile and found[0] > 100):
                self._fail("a number or p0 to p100 is expected")
            self._at += 1
            return found
        return self._fail("a number or p90 is expected")
