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

_AT_ONCE = 2048  # genes that are weighed at a time, so that little is in double precision

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
        blocks = [slice(start, start + _AT_ONCE) for start in range(0, values.shape[1], _AT_ONCE)]

        def apart(genes: slice) -> NDArray[np.float64]:
            found = values[:, genes] - values[:, genes].mean(axis=0, dtype=np.float64)
            if expressed is not None:
                shown = expressed[:, genes] - expressed[:, genes].mean(axis=0, dtype=np.float64)
                found = (1 - strength.share) * found + strength.share * shown
            return np.asarray(found)

        basis = self.basis.astype(np.float64)
        factors = np.sum([apart(genes) @ basis[genes] for genes in blocks], axis=0)
        amplitude = factors.std(axis=0)
        weights = self.weights(amplitude, strength)
        out = np.empty(values.shape, np.float32)
        lives, cut = basis**2 * amplitude**2, np.zeros(values.shape[1])
        with np.errstate(divide="ignore", invalid="ignore"):
            louder = np.where(self.amplitude > 0, amplitude / self.amplitude, np.nan)
            for genes in blocks:
                whole = apart(genes)
                outside = whole - factors @ basis[genes].T
                kept = (factors * weights) @ basis[genes].T + strength.outside * outside
                out[:, genes] = values[:, genes].mean(axis=0, dtype=np.float64) + kept
                spread, total = whole.std(axis=0), lives[genes].sum(axis=1) + outside.var(axis=0)
                cut[genes] = np.where(spread > 0, (whole - kept).std(axis=0) / spread, 0.0)
                lives[genes] = np.where(total[:, None] > 0, lives[genes] / total[:, None], 0.0)
        found = (weights, louder, self.reliability, lives, np.minimum(cut, 1))
        return Weighed(out, Carried(strength, *(np.asarray(each, np.float32) for each in found)))

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


def _pcc(one: NDArray[np.float64], two: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the correlation of each column; 0 where one does not vary."""
    a, b = (values - values.mean(axis=0) for values in (one, two))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = (a * b).sum(axis=0) / np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
    return np.where(np.isfinite(found), found, 0.0)
