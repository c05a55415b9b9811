"""What every head shares: scaling of features, prediction over views, saving and loading.

Letters: N spots (of all slides at hand), V dihedral views, d values per embedding, G genes, b spots in a batch.

This module imports torch, numpy, scipy and huggingface_hub alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from numpy.typing import NDArray
from torch import nn

from nh2st_pipe.core.errors import UsageError, listed
from nh2st_pipe.data.samples import Part, Samples
from nh2st_pipe.heads.alike import Expressing
from nh2st_pipe.heads.blocked import Blocked, Distribution, LowRank, Prediction
from nh2st_pipe.heads.carry import CARRY, Carried, Carry

if TYPE_CHECKING:
    from nh2st_pipe.recipes.train import FitRecipe, TrainRecipe

__all__ = [
    "Blocked",
    "Distribution",
    "FeatureScaler",
    "Fit",
    "HeadModel",
    "LowRank",
    "Plan",
    "Prediction",
]

Smooth = Callable[[NDArray[Any]], NDArray[Any]]


@dataclass(frozen=True)
class Plan:
    """How a head is to be trained, besides what it is."""

    seed: int
    steps: FitRecipe | None = None
    """For heads whose number of epochs is chosen (`HeadRecipe.by_epochs`)."""
    epochs: int | None = None
    """Exactly so many; None where they are chosen on `watched`, or are the head's own."""
    watched: Samples | None = None
    """Samples on which the best epoch is chosen."""
    on_epoch: Callable[[int], None] | None = None


@dataclass(frozen=True)
class Fit:
    """How training went: the epoch the head was left at, and one record per epoch (none where it was solved)."""

    best_epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    notice: str = ""
    """What has to be known of it: that it ended early, and why."""


class FeatureScaler(nn.Module):
    """Centre, scale and clip embeddings; fitted on training slides, saved with the head.

    The scale of a value is max(its standard deviation, 0.1 × the median of all): values that hardly vary are
    not blown up. Clipping bounds what a tile of a kind never seen can do.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, dim: int, clip: float) -> None:
        super().__init__()
        self.clip = clip
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    def fit(self, samples: Samples) -> None:
        """Take mean and scale from all spots and views of `samples`."""
        total = torch.zeros_like(self.mean, dtype=torch.float64)
        squares = torch.zeros_like(total)
        shift = samples.gather(torch.zeros(1, dtype=torch.int64, device=samples.device), 0)[
            0
        ].double()  # keeps the sum of squares from swallowing a small variance
        count = 0
        for part in samples.chunks():
            rows = torch.arange(part.start, part.stop, device=samples.device)
            values = samples.gather(rows, slice(None)).flatten(0, 1).double().sub_(shift)
            total += values.sum(0)
            count += len(values)
            squares += values.square_().sum(0)
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=0).sqrt()
        floor = 0.1 * std.quantile(0.5)
        self.mean.copy_(mean + shift)
        self.scale.copy_(torch.maximum(std, floor).clamp(min=1e-6))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Return … × d, float32, from … × d of any float type."""
        return ((values.float() - self.mean) / self.scale).clamp(-self.clip, self.clip)


class HeadModel(nn.Module, PyTorchModelHubMixin, library_name="nh2st-pipe", license="apache-2.0"):
    """A trained head. It holds all it needs to predict from the embeddings of `about`'s encoder.

    `genes` are the names of what it predicts, in order. `about` says which encoder, tile geometry and targets
    it was made for, and is saved beside the weights.
    """

    genes: list[str]
    about: dict[str, Any]
    kind: str
    carry: Carry | None = None
    """What of its predictions carries over to a new slide; None leaves them as they are."""
    streams: ClassVar[bool] = False
    """Whether `fit` asks for targets by `Samples.targets` and `raws` alone; else they are brought into memory first."""
    keeps_tiles: ClassVar[str | None] = None
    """The buffer (… × tiles × values) that holds embeddings of training tiles, where a head keeps some."""

    @classmethod
    def build(cls, recipe: TrainRecipe, dim: int, genes: list[str], about: dict[str, Any]) -> Self:
        """Return an untrained head for embeddings of `dim` values, as `recipe` describes it."""
        raise NotImplementedError

    def fit(self, train: Samples, plan: Plan) -> Fit:
        """Train on `train`, in place."""
        raise NotImplementedError

    @classmethod
    def fit_each(
        cls, recipes: Sequence[TrainRecipe], train: Samples, genes: list[str], about: dict[str, Any], plan: Plan
    ) -> Iterator[HeadModel]:
        """Yield a trained head for each of `recipes`, which differ in fields of the head alone.

        For comparing them: a head may be changed once the next is asked for. Heads whose work can be shared do.
        """
        for recipe in recipes:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(plan.seed)
                model = cls.build(recipe, train.dim, genes, about).to(train.device)
                model.fit(train, plan)
            yield model

    def asking(self, genes: Sequence[str]) -> HeadModel:
        """Return the same head, which predicts `genes` too, whether it was trained on them or not.

        Raises UsageError where it was not, and cannot say anything of them.
        """
        own = set(self.genes)
        strangers = [gene for gene in genes if gene not in own]
        if strangers:
            raise UsageError(
                f"a head of kind {self.kind} predicts the genes that it was trained on alone, and not "
                f"{listed(strangers)}; nh2st-query takes others"
            )
        return self

    def training_tiles(self) -> int:
        """Return how many tiles that were trained on its weights hold the embeddings of, as far as it says so."""
        heads = [part for part in self.modules() if isinstance(part, HeadModel)]
        held = [dict(head.named_buffers()).get(head.keeps_tiles or "") for head in heads]
        return max((int(each.shape[-2]) for each in held if each is not None), default=0)

    @classmethod
    def _load_as_safetensor(  # type: ignore[override]
        cls, model: HeadModel, model_file: str, map_location: str, strict: bool
    ) -> HeadModel:
        """Load weights strictly, always: a head with some of its weights missing would predict, and wrongly."""
        loaded: HeadModel = super()._load_as_safetensor(model, model_file, map_location, True)
        return loaded

    @classmethod
    def _load_as_pickle(  # type: ignore[override]
        cls, model: HeadModel, model_file: str, map_location: str, strict: bool
    ) -> HeadModel:
        """Refuse weights in a pickle, which could run code and load in part."""
        raise ValueError("weights are read from model.safetensors alone")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """Load a head from a run, its `model/`, or a repository of the hub; see the hub's mixin for `options`.

        `load_model` does the same for a head of any kind, and checks its files.
        """
        inside = Path(pretrained_model_name_or_path) / "model"
        found = inside if (inside / "config.json").is_file() else pretrained_model_name_or_path
        loaded: Self = super().from_pretrained(str(found).removeprefix("hf-hub:"), **options)
        return loaded

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> Self:
        """Load weights, and what predictions are weighed by where the head says that they are."""
        loaded: Self = super()._from_pretrained(model_id=model_id, **options)
        if loaded.about.get("carry"):
            folder = Path(model_id)
            if not folder.is_dir():
                asked = ("revision", "cache_dir", "force_download", "local_files_only", "token")
                folder = Path(hf_hub_download(model_id, CARRY, **{key: options[key] for key in asked})).parent
            loaded.carry = Carry.load(folder, len(loaded.genes))
        return loaded

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write weights, and what predictions are weighed by."""
        super()._save_pretrained(save_directory)
        if self.carry is not None:
            self.carry.save(save_directory)

    def weigh_by(self, carry: Carry | None) -> None:
        """Weigh predictions by `carry` from now on; kept in `about` too, so that the head never loads without it."""
        self.carry = carry
        if carry is not None:
            self.about["carry"] = True

    def forward_view(self, samples: Samples, rows: torch.Tensor, view: int) -> torch.Tensor:
        """Return predictions b × G for the spots `rows` in one view."""
        raise NotImplementedError

    def caution(self, predicted: Prediction | Blocked) -> str | None:
        """Return in words why a slide's prediction should be believed less than the folds' figures say, if so."""
        return None

    def predict(self, samples: Samples) -> NDArray[np.float32]:
        """Return predictions N × G."""
        return self.predict_spots(samples).values

    @property
    def smooths(self) -> bool:
        """Whether predictions are smoothed as the target is. Models of earlier versions do not say, and did so where
        they learnt from what was not smoothed.
        """
        from nh2st_pipe.recipes.train import head_recipe

        known = self.about.get("smooth_predictions")
        return bool(head_recipe(self.kind).learns_raw) if known is None else bool(known)

    def predict_spots(self, samples: Samples) -> Prediction:
        """Return predictions with what the head can say about them, smoothed over a slide's spots as the target is."""
        return self.predict_blocked(samples).dense()

    def predict_blocked(self, samples: Samples) -> Blocked:
        """Return the same by blocks of genes, so that those of all genes need not be in memory at once.

        This is the one place where predictions are smoothed and weighed, so that a head and its baselines are alike.
        """
        from nh2st_pipe.recipes.train import head_recipe

        head_recipe(self.kind).check_slides(samples.parts, training=False)
        said = self._own_blocks(samples)
        if self.smooths and samples.smoothed:
            said = _smoothed(said, samples)
        return said if self.carry is None else self._carried(said, samples, self.carry)

    def blocked_unsmoothed(self, samples: Samples) -> Blocked:
        """Return what `predict_unsmoothed` does, by blocks of genes: for heads whose values are made of less."""
        return Blocked.of(self.predict_unsmoothed(samples))

    def _own_blocks(self, samples: Samples) -> Blocked:
        """Return the prediction by blocks, unless a class derived from the one that makes those says otherwise."""
        for each in type(self).__mro__:
            if "blocked_unsmoothed" in vars(each):
                return self.blocked_unsmoothed(samples)
            if "predict_unsmoothed" in vars(each) or "forward_view" in vars(each):
                break
        return Blocked.of(self.predict_unsmoothed(samples))

    def _carried(self, said: Blocked, samples: Samples, carry: Carry) -> Blocked:
        """Return predictions slide by slide as far as they carry over."""
        weighed, carried = list[Callable[[slice], NDArray[np.float32]]](), list[tuple[float, Carried]]()
        for part in samples.parts or (Part("", 0, len(samples), np.zeros((len(samples), 2))),):
            strength = carry.strength(None if said.likeness is None else said.likeness[part.rows])
            expressed: Expressing | None = None
            slide = samples.of_part(part) if samples.parts else None
            # Without slides there are no surroundings to compare, and nothing is retrieved.
            if strength.share and slide is not None and carry.alike is not None and carry.recipe.retrieval is not None:
                expressed = carry.alike.expressing(carry.recipe.retrieval, slide)
            shape = part.stop - part.start, said.shape[1]
            smooth = slide.smooth if slide is not None and self.smooths else None
            known = None
            if said.low_rank is not None and len(said.low_rank.scores) == shape[0]:
                known = _factors(said.low_rank, expressed, strength.share, carry.basis.astype(np.float64), smooth)
            shown = None if expressed is None else _of_slide(expressed, smooth)
            values, found = carry.weighing(_of_rows(said.values, part.rows), shape, strength, shown, known)
            weighed.append(values)
            carried.append((1.0, found))

        def of_genes(genes: slice) -> NDArray[np.float32]:
            if len(weighed) == 1:
                return weighed[0](genes)
            return np.concatenate([values(genes) for values in weighed])

        return replace(said, values=of_genes, carried=Carried.mean(carried), low_rank=None)

    @torch.inference_mode()
    def predict_unsmoothed(self, samples: Samples) -> Prediction:
        """Return predictions spot by spot, with what the head can say about them: the mean over the views at hand."""
        self.eval()
        out = []
        for part in samples.chunks():
            rows = torch.arange(part.start, part.stop, device=samples.device)
            views = range(samples.n_views)
            total = sum((self.forward_view(samples, rows, view) for view in views), torch.zeros(()))
            out.append((total / len(views)).float().cpu().numpy())
        return Prediction(np.concatenate(out) if out else np.empty((0, len(self.genes)), np.float32))


def _smoothed(said: Blocked, samples: Samples) -> Blocked:
    """Return predictions smoothed as the target is."""
    values, spread = said.values, said.spread
    # The mean of neighbours' spreads is never less than the spread of their mean.
    around = None if spread is None else lambda genes: samples.smooth(spread(genes))
    if said.low_rank is not None:
        made = said.low_rank.smoothed(samples.smooth)
        return replace(said, values=made.values, spread=around, low_rank=made)
    return replace(said, values=lambda genes: samples.smooth(values(genes)), spread=around)


def _of_rows(values: Callable[[slice], NDArray[np.float32]], rows: slice) -> Callable[[slice], NDArray[np.float32]]:
    return lambda genes: values(genes)[rows]


def _of_slide(expressed: Expressing, smooth: Smooth | None) -> Callable[[slice], NDArray[np.float32]]:
    return expressed if smooth is None else lambda genes: smooth(expressed(genes))


def _factors(
    made: LowRank, expressed: Expressing | None, share: float, basis: NDArray[np.float64], smooth: Smooth | None
) -> NDArray[np.float64] | None:
    """Return the factors of a slide's mixture, n × r, without making its values; None where they are needed for it."""
    own = made.onto(basis)
    if expressed is None:
        return own
    shown = expressed.onto(basis)
    if shown is None:
        return None
    shown = shown if smooth is None else smooth(shown)
    return np.asarray((1 - share) * own + share * (shown - shown.mean(axis=0, dtype=np.float64)))
