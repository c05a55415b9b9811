"""What of a head's predictions carries over to a slide of someone new, and how loud it may be there.

Seen in the principal factors of the training targets, predictions on another patient's slide follow the truth in the
first ones and may run against it in others: patterns of the training patient. Two signals that need no truth tell:

- Amplitude. A factor that is louder on a new slide than it ever was on held-out ones is extrapolation:
  w_k = min(1, A_k / a_k)^q, A_k being the standard deviation over spots of factor k in predictions of training slides
  that were left out, mean over slides, and a_k the same on the new slide.
- Reliability. ρ_k is the PCC of factor k on slides that were left out, mean over slides, not below 0: w_k is multiplied
  by ρ_k^p.

What the training spots most alike express (`heads.alike`) never extrapolates, and may have a share of the mixture
before it is weighed. How much all of it decides (`Strength`) follows how like the slide is to the training spots, as
far as the head can tell (`likeness`): with g = 1, like, the first of each pair q, p and share holds and what lies
outside the factors is kept; with g = 0 the second, and it is dropped; between them straight lines. Where training
slides are of several patients it is chosen by leaving patients out instead (`training.carrying`), and is the same for
every slide. The slide's own mean is never touched.

It is applied after smoothing, by any head, and saved beside it: a model without it predicts as it is.

Letters: n spots of a slide, G genes, r factors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.core.errors import RunError, reason_of
from nh2st_pipe.heads.alike import Alike
from nh2st_pipe.heads.factors import axes, centred

if TYPE_CHECKING:
    from nh2st_pipe.recipes.train import CarryRecipe

__all__ = ["CARRY", "CUT", "Carried", "Carry", "Strength", "Weighed"]

CARRY = "carry.safetensors"
CUT = 0.5
"""Share of a gene's variation over a slide, taken away, beyond which its map rests on what does not carry over."""

_AT_ONCE = 1 << 22  # values that are weighed at a time
_DOUBLE = 20_000_000  # values up to which it is done in double precision
_NOTHING = 1e-14  # of a gene's mean squared: a variance below is rounding

_ALIKE = tuple(field.name for field in fields(Alike))


@dataclass(frozen=True)
class Strength:
    """How much the signals decide."""

    q: float
    """Power of the amplitude's."""
    p: float
    """Power of the reliability's."""
    share: float
    """Of the mixture, which what is expressed by spots alike has."""
    outside: float
    """What is kept of what lies outside the factors."""


@dataclass(frozen=True)
class Carried:
    """What was found of one slide's predictions."""

    strength: Strength
    weights: NDArray[np.float32]
    """r: what is kept of each factor."""
    louder: NDArray[np.float32]
    """r: a / A, how loud each factor is here beside what it was on slides left out; NaN where it was silent there."""
    reliability: NDArray[np.float32]
    """r: ρ."""
    lives: NDArray[np.float32]
    """G × r: the share of each gene's variation over the slide that lies in each factor; the rest lies outside."""
    cut: NDArray[np.float32]
    """G: which share of each gene's variation over the slide was taken away, by standard deviations."""

    @classmethod
    def mean(cls, of: Iterable[tuple[float, Carried]]) -> Carried:
        """Return the mean of several slides, or parts of one, each with its weight."""
        weights, parts = zip(*of, strict=True)

        def mean(each: Callable[[Carried], Any]) -> Any:
            return np.average([each(part) for part in parts], axis=0, weights=weights)

        strength = Strength(*mean(lambda part: astuple(part.strength)).tolist())
        names = ("weights", "louder", "reliability", "lives", "cut")
        return cls(strength, *(mean(attrgetter(name)).astype(np.float32) for name in names))

    def words(self, columns: NDArray[np.int64] | slice = slice(None)) -> str | None:
        """Say how many genes, of those in `columns`, rest on patterns that do not carry over, if some do."""
        of = self.cut[columns]
        rest = int((of > CUT).sum())
        if not rest:
            return None
        return (
            f"on this slide {rest:,} of {len(of):,} genes rest mostly on patterns that do not carry over "
            '(var["cut"]); they are not trusted here'
        )


@dataclass(frozen=True)
class Weighed:
    """One slide's predictions, weighed."""

    values: NDArray[np.float32]
    """n × G."""
    carried: Carried


@dataclass(frozen=True)
class Carry:
    """Factors of the training targets, and how predictions fared in them where slides were left out."""

    recipe: CarryRecipe
    basis: NDArray[np.float32]
    """G × r, orthonormal."""
    amplitude: NDArray[np.float32]
    """r: A."""
    reliability: NDArray[np.float32]
    """r: ρ."""
    chosen: Strength | None = None
    """What was chosen by leaving patients out; None where likeness decides."""
    alike: Alike | None = None
    """Training spots; None where nothing is retrieved."""

    @classmethod
    def learn(cls, recipe: CarryRecipe, truth: Sequence[NDArray[Any]], predicted: Sequence[NDArray[Any]]) -> Carry:
        """Return the factors of the targets `truth`, n × G a slide, and how `predicted` fared, of heads that had not
        seen the slide. Genes that a slide lacks (NaN) take no part on it.
        """
        basis = axes([centred(values) for values in truth], recipe.rank)
        factors = [(centred(t) @ basis, centred(p) @ basis) for t, p in zip(truth, predicted, strict=True)]
        amplitude = np.mean([p.std(axis=0) for _, p in factors], axis=0)
        reliability = np.mean([_pcc(t, p) for t, p in factors], axis=0)
        kinds = [np.asarray(each, np.float32) for each in (basis, amplitude, np.maximum(reliability, 0))]
        return cls(recipe, kinds[0], kinds[1], kinds[2])

    def gate(self, likeness: NDArray[Any] | None) -> float:
        """Return g, from 0 on a slide unlike the training slides to 1 on one that is like them, or where the head
        cannot tell.
        """
        if likeness is None or not len(likeness):
            return 1.0
        low, high = self.recipe.gate_from, self.recipe.gate_to
        return float(np.clip((np.median(likeness) - low) / (high - low), 0, 1))

    def strength(self, likeness: NDArray[Any] | None) -> Strength:
        """Return how much the signals decide on a slide whose spots have this `likeness`."""
        return self.chosen or self.strength_at(self.gate(likeness))

    def strength_at(self, gate: float) -> Strength:
        """Return how much the signals decide at g."""
        q, p, share = (
            like * gate + unlike * (1 - gate)
            for like, unlike in (
                self.recipe.q,
                self.recipe.p,
                (0.0, 0.0) if self.recipe.retrieval is None else self.recipe.retrieval.share,
            )
        )
        return Strength(q, p, share, gate)

    def weights(self, amplitude: NDArray[Any], strength: Strength) -> NDArray[np.float64]:
        """Return w, r, for factors of this `amplitude` (r) on a slide."""
        with np.errstate(divide="ignore", invalid="ignore"):
            louder = np.where(amplitude > 0, self.amplitude / amplitude, 1.0)
        return np.asarray(np.minimum(1.0, louder) ** strength.q * self.reliability.astype(np.float64) ** strength.p)

    def weigh(self, values: NDArray[Any], strength: Strength, expressed: NDArray[Any] | None = None) -> Weighed:
        """Weigh the predictions of one slide, n × G; `expressed`, the same, is what spots alike express, where it has
        a share.
        """
        out = np.empty(values.shape, np.float32)
        shown = None if expressed is None else lambda genes: expressed[:, genes]
        return Weighed(out, self._weigher(lambda genes: values[:, genes], values.shape, strength, shown).carried(out))

    def weighing(
        self,
        values: Callable[[slice], NDArray[Any]],
        shape: tuple[int, int],
        strength: Strength,
        expressed: Callable[[slice], NDArray[Any]] | None = None,
        factors: NDArray[np.float64] | None = None,
    ) -> tuple[Callable[[slice], NDArray[np.float32]], Carried]:
        """Return the same by blocks of genes: what gives the weighed values of some, n × g, and what was found.

        `values` and `expressed` give those of a slide of `shape` (n × G), and are asked for three times; twice where
        the `factors` (n × r) of their mixture are known.
        """
        weigher = self._weigher(values, shape, strength, expressed, factors)
        return weigher.values, weigher.carried()

    def _weigher(
        self,
        values: Callable[[slice], NDArray[Any]],
        shape: tuple[int, int],
        strength: Strength,
        expressed: Callable[[slice], NDArray[Any]] | None,
        factors: NDArray[np.float64] | None = None,
    ) -> _Weigher:
        step = max(1, _AT_ONCE // max(1, shape[0]))
        blocks = [slice(start, min(start + step, shape[1])) for start in range(0, shape[1], step)]
        kind = np.dtype(np.float64 if shape[0] * shape[1] <= _DOUBLE else np.float32)
        basis = self.basis.astype(np.float64)
        made = partial(_apart, values, expressed, strength.share, kind)
        if factors is None:
            factors = np.zeros((shape[0], basis.shape[1]))
            for genes in blocks:
                factors += made(genes)[1] @ basis[genes].astype(kind)
        weights = self.weights(factors.std(axis=0), strength)
        return _Weigher(self, made, blocks, basis, factors, weights, strength)

    def save(self, folder: Path) -> None:
        """Write it beside a model's weights."""
        from safetensors.numpy import save_file

        arrays: dict[str, NDArray[Any]] = {
            "basis": self.basis,
            "amplitude": self.amplitude,
            "reliability": self.reliability,
        }
        if self.alike is not None:
            arrays |= {f"alike.{name}": getattr(self.alike, name) for name in _ALIKE}
        kept = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
        said = {
            "recipe": json.dumps(self.recipe.model_dump(mode="json")),
            "chosen": json.dumps(None if self.chosen is None else asdict(self.chosen)),
        }
        save_file(kept, folder / CARRY, metadata=said)

    @classmethod
    def load(cls, folder: Path, genes: int) -> Carry:
        """Read what `save` wrote. Raises RunError where it is not there, or not of `genes` genes, or lacks the spots
        that its recipe retrieves.
        """
        from safetensors import safe_open

        from nh2st_pipe.recipes.train import CarryRecipe

        path = folder / CARRY
        if not path.is_file():
            raise RunError(f"{path} is missing: without it the head would predict otherwise than it was judged")
        try:
            with safe_open(path, "numpy") as file:
                said = file.metadata()
                recipe = CarryRecipe.model_validate({"retrieval": None, **json.loads(said["recipe"])})
                chosen = json.loads(said.get("chosen", "null"))
                there = set(file.keys())
                alike = None
                if recipe.retrieval is not None:
                    if not there.issuperset(f"alike.{name}" for name in _ALIKE):
                        raise ValueError(
                            "its recipe retrieves training spots, and none are kept in it; train again, or with "
                            "--set carry.retrieval=null"
                        )
                    alike = Alike(*(file.get_tensor(f"alike.{name}") for name in _ALIKE))
                basis, amplitude, reliability = map(file.get_tensor, ("basis", "amplitude", "reliability"))
                strength = None if chosen is None else Strength(**chosen)
                found = cls(recipe, basis, amplitude, reliability, strength, alike)
            for held in (found.basis, *(() if alike is None else (alike.values.T,))):
                if held.shape[0] != genes:
                    raise ValueError(f"it is of {held.shape[0]} genes, and the head of {genes}")
        except Exception as error:  # whatever is wrong with it; a changed file has been told apart before
            raise RunError(f"{path} cannot be read: {reason_of(error)}") from error
        return found


@dataclass(frozen=True)
class _Weigher:
    """Weighs the predictions of one slide, block by block of the genes.

    With W what lies about the means of its genes, F = W B its factors in the basis B, w their weights and s what is
    kept outside, there is kept F diag(w) Bᵀ + s (W − F Bᵀ) = s W + F diag(w − s) Bᵀ. What share of a gene's variation
    that is follows from the variance of W and its covariance with F.
    """

    carry: Carry
    made: Callable[[slice], tuple[NDArray[Any], NDArray[Any]]]
    """The means of some genes' values, g, and what lies about them, n × g."""
    blocks: Sequence[slice]
    basis: NDArray[np.float64]
    factors: NDArray[np.float64]
    """n × r."""
    weights: NDArray[np.float64]
    strength: Strength

    def values(self, genes: slice) -> NDArray[np.float32]:
        """Return what is kept of some genes, n × g."""
        return self._kept(genes, *self.made(genes))

    def _kept(self, genes: slice, mean: NDArray[Any], whole: NDArray[Any]) -> NDArray[np.float32]:
        """Return what is kept of `whole`, which is changed in place, about `mean`."""
        turned = (self.factors * (self.weights - self.strength.outside)).astype(whole.dtype)
        whole *= self.strength.outside
        whole += turned @ self.basis[genes].T.astype(whole.dtype)
        whole += mean
        return np.asarray(whole, np.float32)

    def carried(self, out: NDArray[np.float32] | None = None) -> Carried:
        """Return what was found of all genes; with `out`, n × G, the values are put there on the way."""
        amplitude, before = self.factors.std(axis=0), self.carry.amplitude
        lives, cut = self.basis**2 * amplitude**2, np.zeros(len(self.basis))
        about = self.factors - self.factors.mean(axis=0)
        n, lost = max(1, len(about)), 1 - self.strength.outside
        covariance, apart = about.T @ about / n, self.strength.outside - self.weights  # W less what is kept of it
        with np.errstate(divide="ignore", invalid="ignore"):
            louder = np.where(before > 0, amplitude / before, np.nan)
            for genes in self.blocks:
                mean, whole = self.made(genes)
                basis, spread = self.basis[genes], np.einsum("ng,ng->g", whole, whole, dtype=np.float64) / n
                shared = (about.astype(whole.dtype).T @ whole).T.astype(np.float64) / n  # g × r
                inside, both = np.einsum("gr,rs,gs->g", basis, covariance, basis), (basis * shared).sum(axis=1)
                outside = np.maximum(spread - 2 * both + inside, 0)
                turned = basis * apart
                gone = lost**2 * spread + 2 * lost * (turned * shared).sum(axis=1)
                gone += np.einsum("gr,rs,gs->g", turned, covariance, turned)
                total = lives[genes].sum(axis=1) + outside
                varies = spread > _NOTHING * np.maximum(np.square(mean), 1)
                cut[genes] = np.where(varies, np.sqrt(np.maximum(gone, 0) / spread), 0.0)
                lives[genes] = np.where(total[:, None] > 0, lives[genes] / total[:, None], 0.0)
                if out is not None:
                    out[:, genes] = self._kept(genes, mean, whole)
        found = (self.weights, louder, self.carry.reliability, lives, np.minimum(cut, 1))
        return Carried(self.strength, *(np.asarray(each, np.float32) for each in found))


def _apart(
    values: Callable[[slice], NDArray[Any]],
    expressed: Callable[[slice], NDArray[Any]] | None,
    share: float,
    kind: np.dtype[Any],
    genes: slice,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the means of some genes' values, and what lies about them, a new array."""
    of_genes = values(genes)
    mean = of_genes.mean(axis=0, dtype=np.float64)
    found = np.subtract(of_genes, mean.astype(kind), dtype=kind)
    if expressed is not None:
        shown = expressed(genes)
        found *= 1 - share
        found += share * np.subtract(shown, shown.mean(axis=0, dtype=np.float64).astype(kind), dtype=kind)
    return mean, found


def _pcc(one: NDArray[np.float64], two: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the correlation of each column; 0 where one does not vary."""
    a, b = (values - values.mean(axis=0) for values in (one, two))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = (a * b).sum(axis=0) / np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
    return np.where(np.isfinite(found), found, 0.0)
