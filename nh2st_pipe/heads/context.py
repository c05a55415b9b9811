"""nh2st-context: a kernel part and a network part on a spot and what surrounds it, mixed. The default head.

Ours, and not the published NH2ST: what that adds beside the tile itself (neighbours, ties between image and expression)
is here at prediction time, on frozen embeddings, with what was found to be worth it on real sections.

- Features: each slide's embeddings less half of the slide's own mean, and their Gaussian means at several widths
  (`blocks`). They need no expression, so they are the same for a slide that is predicted.
- Where the store knows how other stains move the training slides' embeddings, the kernel part leaves those directions
  out of every slide's (`stain_basis`).
- Targets: trained on the target before smoothing (predictions are smoothed, as every head's); each training slide's own
  weighted mean is taken off, and the mean over training slides is added to a prediction. Spots with few counts weigh
  less.
- Kernel part (`kernel`): closed form, on the mean over views, in float64.
- Many genes (`rank`): kernel and network learn the leading factors of the targets in place of genes, orthonormal
  directions over the genes, and what they say is turned back; what lies outside them is not learnt.
- Network part (`members`): the leading principal components of each block, one scale per block, a network of one
  hidden layer, several members in one batched model; a random view per spot and step, the mean over views at
  prediction. Beside the blocks a spot looks at its neighbours by cross-attention (`attention`).
- NH2ST's other ingredients, off by default: a hypergraph block (`blocks.hypergraph_mean`) and a contrastive loss
  (`contrast`).
- Output: the kernel part's share of the mean of the two follows how like the slide is to the training spots
  (`likeness`): where a slide resembles nothing the head was trained on, the kernel steps back.

Letters: N spots, n spots of a slide, V views, d values, B blocks, p components, G genes, Q genes or factors that are
learnt, m spots the kernel keeps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch

from nh2st_pipe.core.errors import TrainError
from nh2st_pipe.data.samples import Cache, Part, ResidentCache, Samples
from nh2st_pipe.data.streamed import LEAST_KEPT, scratch_file, scratch_folders
from nh2st_pipe.heads.attention import Nearest, nearest_of
from nh2st_pipe.heads.base import Blocked, Fit, HeadModel, LowRank, Plan, Prediction
from nh2st_pipe.heads.blocks import DENSE_SPOTS, Blur, centred_views, hypergraph_mean, stain_basis, without
from nh2st_pipe.heads.factors import loadings, scores
from nh2st_pipe.heads.kernel import Kernel, low_count_weights, solve, solve_landmarks
from nh2st_pipe.heads.members import Members, Surroundings, fit_members

if TYPE_CHECKING:
    from nh2st_pipe.recipes.train import ContextFields, KernelPart, NetworkPart, TrainRecipe

__all__ = ["Blurs", "Context"]

_AXES_FROM = 40_000  # spots times views from which principal axes are found, where there are more
_AT_ONCE = 1024  # spots whose predictions are taken to float64 at once
_DOUBLE_VALUES = 25_000_000  # of targets, up to which they are held in float64

_SIMILAR = 3  # most similar spots that join a spot's hyperedge, as in NH2ST


class Context(HeadModel):
    """The head; `head` is its recipe's fields (see `recipes.train.ContextHead`) as values."""

    keeps_tiles = "kernel_blocks"
    streams = True
    fitted: ClassVar[tuple[str, ...]] = (
        "target_mean",
        "kernel_blocks",
        "kernel_medians",
        "kernel_coefficients",
        "basis",
    )
    """Buffers whose size training decides."""
    factors: torch.Tensor
    target_mean: torch.Tensor
    target_scale: torch.Tensor
    kernel_blocks: torch.Tensor
    kernel_medians: torch.Tensor
    kernel_coefficients: torch.Tensor
    centre: torch.Tensor
    components: torch.Tensor
    component_scale: torch.Tensor
    basis: torch.Tensor

    def __init__(
        self,
        dim: int,
        genes: list[str],
        head: dict[str, Any],
        about: dict[str, Any] | None = None,
        kind: str = "nh2st-context",
    ) -> None:
        super().__init__()
        self.genes, self.about, self.kind = list(genes), about or {}, kind
        self.recipe = self._fields(head)
        n_blocks = 1 + len(self.recipe.sigmas) + self.recipe.hypergraph
        self.register_buffer("target_mean", torch.zeros(len(self.genes)))
        n_out = len(self.genes)
        if (rank := self._n_factors(n_out)) is not None:
            self.register_buffer("factors", torch.zeros(n_out, rank))
            n_out = rank
        self.register_buffer("target_scale", torch.ones(()))
        self.register_buffer("basis", torch.zeros(dim, 0))
        kernel, network = self.recipe.kernel, self.recipe.network
        if kernel is not None:
            self.register_buffer("kernel_blocks", torch.zeros(n_blocks, 0, dim))
            self.register_buffer("kernel_medians", torch.ones(n_blocks))
            self.register_buffer("kernel_coefficients", torch.zeros(0, n_out))
        if network is not None:
            kept = min(network.components, dim)
            self.register_buffer("centre", torch.zeros(n_blocks, dim))
            self.register_buffer("components", torch.zeros(n_blocks, dim, kept))
            self.register_buffer("component_scale", torch.ones(n_blocks))
            self.members = Members(
                network.members,
                n_blocks * kept,
                network.width,
                n_out,
                network.output_scale,
                (min(kept, network.attention.components), network.attention) if network.attention is not None else None,
                network.contrast,
            )

    @classmethod
    def build(cls, recipe: TrainRecipe, dim: int, genes: list[str], about: dict[str, Any]) -> Self:
        """See HeadModel."""
        return cls(dim, genes, head=recipe.head.model_dump(mode="json"), about=about)

    @classmethod
    def _fields(cls, head: dict[str, Any]) -> ContextFields:
        """Return the recipe of the head's fields."""
        from nh2st_pipe.recipes.train import ContextHead

        return ContextHead.model_validate({"rank": None, **head})  # heads of earlier versions learnt genes

    def _n_factors(self, genes: int) -> int | None:
        """Return how many factors are learnt in place of so many genes; None where genes are."""
        rank = self.recipe.rank
        return rank if rank is not None and rank < genes else None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take the sizes that training decides (how many spots the kernel keeps) from what is loaded."""
        for name in self.fitted:
            saved = state_dict.get(prefix + name)
            if saved is not None and name in self._buffers:
                setattr(self, name, torch.empty_like(saved))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    # ---- fitting

    def fit(self, train: Samples, plan: Plan) -> Fit:
        """See HeadModel. Panel, scaling and every number come from `train` alone."""
        means = [train.raws(part.rows).double().mean(0) for part in train.parts]
        self.target_mean = torch.stack(means).nanmean(0).to(self.target_mean)
        if self._in_factors:
            self.factors = loadings(train, self.target_mean, self.factors.shape[1], plan.seed)
        self._fit_basis(train)
        blurs = Blurs(train, self.recipe)
        learnt = self._learnt(train)
        if self.recipe.kernel is not None:
            self._fit_kernel(blurs, learnt, plan.seed)
        return self._fit_network(blurs, learnt, plan) if self.recipe.network is not None else Fit()

    @property
    def _in_factors(self) -> bool:
        """Whether factors are learnt in place of genes."""
        return "factors" in self._buffers

    def _learnt(self, train: Samples) -> torch.Tensor:
        """Return what is learnt of each spot, N × Q, float64 where it is not very large: targets before smoothing, or
        their factors.
        """
        n_out = self.factors.shape[1] if self._in_factors else train.n_genes
        dtype = torch.float64 if len(train) * n_out <= _DOUBLE_VALUES else torch.float32
        out = torch.empty(len(train), n_out, dtype=dtype, device=train.device)
        for part in train.parts:
            raw = train.raws(part.rows)
            out[part.rows] = scores(raw, self.target_mean, self.factors) if self._in_factors else raw
        return out

    def _fit_basis(self, train: Samples) -> None:
        """Find the directions along which other stains move the training slides."""
        shifts = [part.stain_shift for part in train.parts if part.stain_shift is not None]
        parts = [part for part in (self.recipe.kernel, self.recipe.network) if part is not None]
        wanted = max(part.stain_directions for part in parts)
        if shifts and wanted:
            basis = stain_basis(torch.from_numpy(np.concatenate(shifts)).double(), min(wanted, train.dim // 2))
            self.basis = basis.to(self.basis)

    def _fit_kernel(self, blurs: Blurs, learnt: torch.Tensor, seed: int) -> None:
        train = blurs.samples
        recipe = self.recipe.kernel
        assert recipe is not None
        assert train.depth is not None
        weights = low_count_weights(train.depth, recipe.low_count)
        weights = weights / weights.quantile(0.5)

        def y_of(part: Part) -> torch.Tensor:
            return _centred(learnt[part.rows].double(), weights[part.rows])

        if len(train) <= recipe.exact_up_to:
            blocks = torch.cat([torch.stack(b) for _, b in self._view_means(blurs)], 1)
            y = torch.cat([y_of(part) for part in train.parts])
            kernel = solve(blocks, y, weights, recipe.ridge, recipe.rank)
        else:
            draw = torch.Generator().manual_seed(seed)
            chosen = torch.randperm(len(train), generator=draw)[: recipe.landmarks].sort().values.to(train.device)
            marks = [torch.stack(b) for _, b in self._view_means(blurs, chosen)]
            spots = ((b, y_of(part), weights[part.rows]) for part, b in self._view_means(blurs))
            kernel = solve_landmarks(torch.cat(marks, 1), spots, recipe.ridge, recipe.rank)
        self.kernel_blocks = kernel.blocks.to(self.kernel_blocks)
        self.kernel_medians = kernel.medians.to(self.kernel_medians)
        self.kernel_coefficients = kernel.coefficients.to(self.kernel_coefficients)

    def _fit_network(self, blurs: Blurs, learnt: torch.Tensor, plan: Plan) -> Fit:
        """Train the network on what is `learnt`, which is changed in place."""
        train = blurs.samples
        recipe = self.recipe.network
        assert recipe is not None
        assert train.depth is not None
        weights = low_count_weights(train.depth, recipe.low_count)
        weights = weights / weights.mean()
        squares, known = 0.0, 0
        for part in train.parts:
            learnt[part.rows] = _centred(learnt[part.rows], weights[part.rows])
            smooth = train.of_part(part).smooth(learnt[part.rows].cpu().numpy())
            squares += float(np.nansum(np.square(smooth, dtype=np.float64)))
            known += int(np.isfinite(smooth).sum())
        scale = torch.tensor((squares / max(1, known)) ** 0.5)
        self.target_scale = (scale if scale > 0 else torch.ones_like(scale)).float().to(train.device)
        features, seen = self._network_features(blurs, plan.seed)
        target = learnt.div_(self.target_scale).float()
        return fit_members(
            self.members,
            train,
            lambda rows, views: features.gather(rows, views).float(),
            target,
            weights.float(),
            recipe,
            plan.seed,
            plan.on_epoch,
            self._around(seen, train.parts),
        )

    def _network_features(self, blurs: Blurs, seed: int) -> tuple[Cache, torch.Tensor]:
        """Find the components of the training spots' blocks, and return the spots in them, N × V × (B · p), and of each
        one's own block what attention sees, the mean over views.
        """
        train = blurs.samples
        self._fit_components(blurs, seed)
        width = self.components.shape[0] * self.components.shape[2]
        # Half precision, as the embeddings have it: of unit RMS, and the largest thing that training holds.
        shape = len(train), train.n_views, width
        features: Cache
        if train.spare is not None and 2 * len(train) * train.n_views * width > train.spare:
            keep = max(LEAST_KEPT, train.spare // 4)
            features = scratch_file(shape, train.device, keep, scratch_folders(), "features of the network")
        else:
            features = ResidentCache(torch.empty(shape, dtype=torch.float16, device=train.device))
        seen = torch.empty((len(train), self.members.seen), device=train.device)
        for part in train.parts:
            with features.place(part.start, part.stop) as place:
                for _, view, x, blur in self._each_view(blurs, [part]):
                    place[:, view] = self._project(x, blur).to(torch.float16)
                seen[part.rows] = place[..., : self.members.seen].float().mean(1)
        return features, seen

    def _around(self, own: torch.Tensor, parts: Sequence[Part]) -> Surroundings | None:
        """Return what attention sees of the spots of `parts`: each one's own block, N × p."""
        network = self.recipe.network
        if network is None or network.attention is None:
            return None
        near = [nearest_of(part.xy, network.attention.neighbours, own.device) for part in parts]
        starts = [part.start for part in parts]
        rows = torch.cat([each.rows + start for each, start in zip(near, starts, strict=True)])
        return Surroundings(own, Nearest(rows, torch.cat([each.distance for each in near])))

    def _fit_components(self, blurs: Blurs, seed: int) -> None:
        """Find each block's mean, leading principal axes and their scale over the training spots and views.

        Over a random part of the spots where there are very many: the axes are then as well known.
        """
        train = blurs.samples
        n_blocks, dim, kept = self.components.shape
        total = torch.zeros((n_blocks, dim), dtype=torch.float64, device=train.device)
        second = torch.zeros((n_blocks, dim, dim), device=train.device)
        most = max(_AXES_FROM // train.n_views, kept)
        chosen = None
        if len(train) > most:
            draw = torch.Generator().manual_seed(seed)
            chosen = torch.randperm(len(train), generator=draw)[:most].sort().values.to(train.device)
        for part, _, x, blur in self._each_view(blurs):
            for i, block in enumerate(blur(x, None if chosen is None else _inside(chosen, part))):
                total[i] += block.sum(0, dtype=torch.float64)
                second[i].addmm_(block.T, block)
        count = (len(train) if chosen is None else len(chosen)) * train.n_views
        mean = total / count
        for i in range(n_blocks):
            covariance = second[i].double() / count - torch.outer(mean[i], mean[i])
            values, vectors = torch.linalg.eigh(covariance)
            self.components[i] = vectors[:, -kept:].flip(1).float()
            rms = values[-kept:].clamp(min=0).mean().sqrt()  # what the components' is, over all spots and views
            self.component_scale[i] = 1 / rms if rms > 0 else torch.ones_like(rms)
        self.centre.copy_(mean)

    def _project(self, x: torch.Tensor, blur: Blur) -> torch.Tensor:
        """Return n × (B · p) from a slide's embeddings in one view."""
        parts = zip(blur.projected(x, self.components), self.centre, self.components, self.component_scale, strict=True)
        return torch.cat([(block - centre @ axes) * scale for block, centre, axes, scale in parts], 1)

    # ---- features

    def _view_means(self, blurs: Blurs, rows: torch.Tensor | None = None) -> Iterator[tuple[Part, list[torch.Tensor]]]:
        """Yield each slide's blocks of the mean over views, which the kernel compares; with `rows`, those spots' alone.

        In float64; in float32 on slides so large that means over them are sparse.
        """
        samples = blurs.samples
        for part in samples.parts:
            dtype = torch.float64 if part.stop - part.start <= DENSE_SPOTS else torch.float32
            each = centred_views(samples, part, self.recipe.centring, dtype)
            x = next(each)
            for view in each:
                x += view
            x = without(x.div_(samples.n_views), self._basis(self.recipe.kernel, dtype))
            yield part, blurs.of(part, dtype)(x, None if rows is None else _inside(rows, part))

    def _each_view(
        self, blurs: Blurs, parts: Sequence[Part] | None = None
    ) -> Iterator[tuple[Part, int, torch.Tensor, Blur]]:
        """Yield each slide's embeddings view by view, float32, and what makes the network's blocks of them."""
        samples, basis = blurs.samples, self._basis(self.recipe.network, torch.float32)
        for part in samples.parts if parts is None else parts:
            blur = blurs.of(part, torch.float32)
            for view, x in enumerate(centred_views(samples, part, self.recipe.centring, torch.float32)):
                yield part, view, without(x, basis), blur

    def _basis(self, part: KernelPart | NetworkPart | None, dtype: torch.dtype) -> torch.Tensor | None:
        """Return the directions that a part leaves out, d × r, None where there are none."""
        kept = 0 if part is None else min(part.stain_directions, self.basis.shape[1])
        return self.basis[:, :kept].to(dtype) if kept else None

    # ---- prediction

    def predict_unsmoothed(self, samples: Samples) -> Prediction:
        """See HeadModel. Each of `samples`' slides should be there whole: its spots are each other's surroundings."""
        return self.blocked_unsmoothed(samples).dense()

    @torch.inference_mode()
    def blocked_unsmoothed(self, samples: Samples) -> Blocked:
        """See HeadModel."""
        if not samples.parts:
            raise TrainError("nh2st-context predicts whole slides; these samples do not say which slide they are of")
        self.eval()
        blurs = Blurs(samples, self.recipe)
        n_out = self.factors.shape[1] if self._in_factors else len(self.genes)
        out = torch.zeros(len(samples), n_out, dtype=torch.float64, device=samples.device)
        likeness: np.ndarray[Any, np.dtype[np.float32]] | None = None
        share = torch.zeros(len(samples), 1, dtype=torch.float64, device=samples.device)
        if self.recipe.kernel is not None:
            kernel = Kernel(
                self.kernel_blocks.double(), self.kernel_medians.double(), self.kernel_coefficients.double()
            )
            best = torch.empty(len(samples), dtype=torch.float64, device=samples.device)
            for part, blocks in self._view_means(blurs):
                of_slide = out[part.rows]
                for rows, k in kernel.similarities(blocks):
                    best[part.rows][rows], of_slide[rows] = k.amax(1), k @ kernel.coefficients
                share[part.rows] = self._kernel_share(best[part.rows])
                of_slide *= share[part.rows]
                del blocks, k  # as large as all of the slide's embeddings several times over
            likeness = best.float().cpu().numpy()
        spread: torch.Tensor | None = None
        if self.recipe.network is not None:
            for part in samples.parts:
                own, apart = self._of_members(blurs, part, self._in_factors)
                rest = (1 - share[part.rows]) * self.target_scale
                for rows in torch.arange(len(own), device=own.device).split(_AT_ONCE):
                    out[part.start + rows] += rest[rows] * own[rows].double()
                if apart is not None:
                    if spread is None:
                        shape = (*apart.shape[:-2], len(samples), n_out)
                        spread = torch.empty(shape, device=samples.device)
                    spread[..., part.rows, :] = apart.mul_(rest)
                del own, apart
        if self._in_factors:
            made = LowRank(out.float(), self.factors, self.target_mean, spread)
            return Blocked.of_low_rank(made, likeness)
        out += self.target_mean
        said = Prediction(out.float().cpu().numpy(), likeness, None if spread is None else spread.cpu().numpy())
        return Blocked.of(said)

    def _of_members(self, blurs: Blurs, part: Part, each: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what the network's members say of a slide's spots, and how far they are apart (`Members.agreed`), or
        `each` is (`Members.apart`).
        """
        views = [self._project(x, blur) for _, _, x, blur in self._each_view(blurs, [part])]
        alone = replace(part, start=0, stop=part.stop - part.start)
        around = (
            self._around(torch.stack([view[:, : self.members.seen] for view in views], 1).mean(1), [alone])
            if self.members.attention is not None
            else None
        )
        return self.members.apart(views, around) if each else self.members.agreed(views, around)

    def caution(self, predicted: Prediction | Blocked) -> str | None:
        """See HeadModel."""
        if predicted.likeness is None or self.recipe.network is None:
            return None
        median = float(np.median(predicted.likeness))
        if median >= self.recipe.gate_to:
            return None
        share = self._kernel_share(torch.from_numpy(predicted.likeness)) / self.recipe.kernel_share
        return (
            f"unlike the training slides (likeness {median:.2f}, below {self.recipe.gate_to:g}; the kernel part has "
            f"{share:.0%} of its share): expect less than the folds' figures"
        )

    def _kernel_share(self, best: torch.Tensor) -> float:
        """Return the kernel part's share for a slide, from its spots' best similarities to the training spots."""
        recipe = self.recipe
        if recipe.network is None:
            return 1.0
        like = (float(best.quantile(0.5)) - recipe.gate_from) / (recipe.gate_to - recipe.gate_from)
        return recipe.kernel_share * min(1.0, max(0.0, like))


class Blurs:
    """What makes the blocks of the slides of `samples`; the last is kept, for the other part of the head."""

    def __init__(self, samples: Samples, recipe: ContextFields) -> None:
        self.samples, self._recipe = samples, recipe
        self._last: tuple[tuple[int, torch.dtype], Blur] | None = None

    def of(self, part: Part, dtype: torch.dtype) -> Blur:
        """Return what makes the blocks of one slide's embeddings, in `dtype`."""
        if self._last is None or self._last[0] != (part.start, dtype):
            around = hypergraph_mean(self.samples, part, _SIMILAR) if self._recipe.hypergraph else None
            blur = Blur(part, self._recipe.sigmas, self.samples.device, dtype, around)
            self._last = (part.start, dtype), blur
        return self._last[1]


def _inside(rows: torch.Tensor, part: Part) -> torch.Tensor:
    """Return those of the samples' `rows` that are of one slide, counted from its first."""
    return rows[(rows >= part.start) & (rows < part.stop)] - part.start


def _centred(y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return a slide's targets n × Q less their mean, spots weighing `weights`, n."""
    w = weights[:, None].to(y.dtype)
    return y - (w * y).sum(0) / w.sum()
