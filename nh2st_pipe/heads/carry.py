"""What of a head's predictions carries over to a slide of someone new, and how loud it may be there.

Seen in the principal factors of the training targets, predictions on another patient's slide follow the truth in the
first ones and may run against it in others: patterns of the training patient. Two signals that need no truth tell:

- Amplitude. A factor that is louder on a new slide than it ever was on held-out ones is extrapolated:
  w_k = min(1, A_k / a_k)^q, A_k being the standard deviation over spots of factor k in predictions of training slides
  that were left out, mean over slides, and a_k the same on the new slide.
- Reliability. ρ_k is the PCC of factor k on slides that were left out, mean over slides, not below 0: w_k is multiplied
  by ρ_k^p.

How much they decide follows how like the slide is to the training spots, as far as the head can tell (`likeness`):
with g = 1, like, the first of each pair q and p holds and what lies outside the factors is kept; with g = 0 the second,
and it is dropped; between them straight lines. The slide's own mean is never touched.

It is applied after smoothing, by any head, and saved beside it: a model without it predicts as it is.

Letters: n spots of a slide, G genes, r factors.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nh2st_pipe.core.errors import RunError

if TYPE_CHECKING:
    from nh2st_pipe.recipes.train import CarryRecipe

__all__ = ["CARRY", "CUT", "Carried", "Carry"]

CARRY = "carry.safetensors"
CUT = 0.5
"""Share of a gene's variation over a slide, taken away, beyond which its map rests on what does not carry over."""


@dataclass(frozen=True)
class Carried:
    """One slide's predictions, weighed."""

    values: NDArray[np.float32]
    """n × G."""
    weights: NDArray[np.float32]
    """r: what is kept of each factor."""
    cut: NDArray[np.float32]
    """G: which share of each gene's variation over the slide, as the head predicted it, was taken away."""


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

    @classmethod
    def learn(cls, recipe: CarryRecipe, truth: Sequence[NDArray[Any]], predicted: Sequence[NDArray[Any]]) -> Carry:
        """Return the factors of the targets `truth`, n × G a slide, and how `predicted` fared, of heads that had not
        seen the slide. Genes that a slide lacks (NaN) take no part on it.
        """
        real, said = ([_centred(values) for values in of] for of in (truth, predicted))
        basis = _axes(np.concatenate(real), recipe.rank)
        factors = [(t @ basis, p @ basis) for t, p in zip(real, said, strict=True)]
        amplitude = np.mean([p.std(axis=0) for _, p in factors], axis=0)
        reliability = np.mean([_pcc(t, p) for t, p in factors], axis=0)
        kinds = (np.asarray(each, np.float32) for each in (basis, amplitude, np.maximum(reliability, 0)))
        return cls(recipe, *kinds)

    def gate(self, likeness: NDArray[Any] | None) -> float:
        """Return g, from 0 on a slide unlike the training slides to 1 on one that is like them, or where the head
        cannot tell.
        """
        if likeness is None or not len(likeness):
            return 1.0
        low, high = self.recipe.gate_from, self.recipe.gate_to
        return float(np.clip((np.median(likeness) - low) / (high - low), 0, 1))

    def weights(self, amplitude: NDArray[Any], gate: float) -> NDArray[np.float64]:
        """Return w, r, for factors of this `amplitude` (r) on a slide."""
        q, p = (like * gate + unlike * (1 - gate) for like, unlike in (self.recipe.q, self.recipe.p))
        with np.errstate(divide="ignore", invalid="ignore"):
            louder = np.where(amplitude > 0, self.amplitude / amplitude, 1.0)
        return np.asarray(np.minimum(1.0, louder) ** q * self.reliability.astype(np.float64) ** p)

    def weigh(self, values: NDArray[Any], gate: float) -> Carried:
        """Weigh the predictions of one slide, n × G."""
        mean = values.mean(axis=0, dtype=np.float64)
        apart = values - mean
        factors = apart @ self.basis.astype(np.float64)
        weights = self.weights(factors.std(axis=0), gate)
        inside = factors @ self.basis.T
        kept = (factors * weights) @ self.basis.T + gate * (apart - inside)
        with np.errstate(divide="ignore", invalid="ignore"):
            cut = np.where(apart.std(axis=0) > 0, (apart - kept).std(axis=0) / apart.std(axis=0), 0.0)
        out = (mean + kept).astype(np.float32)
        return Carried(out, weights.astype(np.float32), np.minimum(cut, 1.0).astype(np.float32))

    def save(self, folder: Path) -> None:
        """Write it beside a model's weights."""
        from safetensors.numpy import save_file

        arrays = {"basis": self.basis, "amplitude": self.amplitude, "reliability": self.reliability}
        kept = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
        save_file(kept, folder / CARRY, metadata={"recipe": json.dumps(self.recipe.model_dump(mode="json"))})

    @classmethod
    def load(cls, folder: Path, genes: int) -> Carry:
        """Read what `save` wrote. Raises RunError where it is not there, or not of `genes` genes."""
        from safetensors import safe_open

        from nh2st_pipe.recipes.train import CarryRecipe

        path = folder / CARRY
        if not path.is_file():
            raise RunError(f"{path} is missing: without it the head would predict otherwise than it was judged")
        try:
            with safe_open(path, "numpy") as file:
                recipe = CarryRecipe.model_validate(json.loads(file.metadata()["recipe"]))
                found = cls(recipe, *(file.get_tensor(name) for name in ("basis", "amplitude", "reliability")))
            if found.basis.shape[0] != genes:
                raise ValueError(f"it is of {found.basis.shape[0]} genes, and the head of {genes}")
        except Exception as error:  # whatever is wrong with it; a changed file has been told apart before
            raise RunError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error
        return found


def _centred(values: NDArray[Any]) -> NDArray[np.float64]:
    """Return a slide's values less their mean over spots; 0 for genes that it lacks."""
    known = np.where(np.isfinite(values), values, 0.0).astype(np.float64)
    return np.asarray(known - known.mean(axis=0))


def _axes(values: NDArray[np.float64], rank: int) -> NDArray[np.float64]:
    """Return the leading right singular vectors of N × G, G × r, by the smaller of the two products."""
    n, genes = values.shape
    if genes <= n:
        spread, axes = np.linalg.eigh(values.T @ values)
    else:
        spread, left = np.linalg.eigh(values @ values.T)
        with np.errstate(divide="ignore", invalid="ignore"):
            axes = values.T @ left / np.sqrt(np.maximum(spread, 0))
    there = int((spread > 1e-9 * max(float(spread[-1]), 1e-300)).sum())
    return np.asarray(axes[:, ::-1][:, : max(1, min(rank, there))])


def _pcc(one: NDArray[np.float64], two: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the correlation of each column; 0 where one does not vary."""
    a, b = (values - values.mean(axis=0) for values in (one, two))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = (a * b).sum(axis=0) / np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
    return np.where(np.isfinite(found), found, 0.0)
