"""A spot and what surrounds it, at several widths: the features of `nh2st-context`.

Each slide's embeddings less a share of the slide's own mean (what tissue it is made of stays in, what its stain adds
goes out in part), then Gaussian means over all spots of the slide.

Letters: n spots of a slide, V views, d values, B blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from nh2st_pipe.core.errors import TrainError
from nh2st_pipe.core.quiet import quiet_warnings
from nh2st_pipe.data.samples import Part, Samples
from nh2st_pipe.heads.hypergraph import incidence, operator
from nh2st_pipe.tiles.lattice import pitch_px

__all__ = ["DENSE_SPOTS", "Blur", "centred_views", "hypergraph_mean", "stain_basis", "without"]

DENSE_SPOTS = 4096
_CUT_SIGMAS = 3.0  # where the weights are sparse: what lies beyond weighs 1 % of the spot itself at most


class Blur:
    """Gaussian means over the spots of one slide: weights exp(−½ (distance / (σ · pitch))²), rows summing to 1.

    Every spot counts, the spot itself included; on slides of more than 4,096 spots, those within 3 σ. `further`, n × n,
    is another mean to take.
    """

    def __init__(
        self,
        part: Part,
        sigmas: Sequence[float],
        device: torch.device,
        dtype: torch.dtype,
        further: sp.csr_matrix | None = None,
    ) -> None:
        pitch = pitch_px(part.xy)
        if pitch == 0 and len(part.xy) > 1:
            raise TrainError(
                f"slide {part.slide_id}: half of its spots or more lie on top of another: there is no neighbourhood; "
                "obsm['spatial'] should hold each spot's own centre"
            )
        pitch = pitch or 1.0  # a single spot: its own mean
        self._device, self._dtype = device, dtype
        self._means: list[torch.Tensor | sp.csr_matrix] = []
        if len(part.xy) <= DENSE_SPOTS:
            self._means += [self._weights(part.xy, sigma * pitch) for sigma in sigmas]
        elif sigmas:
            self._means += _sparse_weights(part.xy, [sigma * pitch for sigma in sigmas])
        if further is not None:
            self._means.append(further)

    @cached_property
    def _whole(self) -> list[torch.Tensor]:
        return [self._on_device(mean) for mean in self._means]

    def _weights(self, xy: NDArray[np.float64], sigma_px: float) -> torch.Tensor:
        at = torch.from_numpy(xy).to(self._device)
        weights = torch.cdist(at, at, compute_mode="donot_use_mm_for_euclid_dist").div_(sigma_px).square_()
        weights = weights.mul_(-0.5).exp_()
        return (weights / weights.sum(1, keepdim=True)).to(self._dtype)

    def _on_device(self, mean: torch.Tensor | sp.csr_matrix) -> torch.Tensor:
        if isinstance(mean, torch.Tensor):
            return mean
        with quiet_warnings():  # torch calls its CSR tensors a beta
            return torch.sparse_csr_tensor(
                torch.from_numpy(mean.indptr.astype(np.int64)),
                torch.from_numpy(mean.indices.astype(np.int64)),
                torch.from_numpy(mean.data).to(self._dtype),
                size=mean.shape,
            ).to(self._device)

    def __call__(self, x_nd: torch.Tensor, rows: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Return the B blocks of n × d: `x_nd` itself, then its means; with `rows`, for those spots alone."""
        if rows is None:
            return [x_nd, *(mean @ x_nd for mean in self._whole)]
        of_rows = [
            self._on_device(mean[rows if isinstance(mean, torch.Tensor) else rows.cpu().numpy()])
            for mean in self._means
        ]
        return [x_nd[rows], *(mean @ x_nd for mean in of_rows)]

    def projected(self, x_nd: torch.Tensor, axes_bdp: torch.Tensor) -> list[torch.Tensor]:
        """Return the B blocks n × d, each times its axes d × p: projected first, so that less is averaged."""
        own, *others = axes_bdp
        return [x_nd @ own, *(mean @ (x_nd @ axes) for mean, axes in zip(self._whole, others, strict=True))]


def _sparse_weights(xy: NDArray[np.float64], sigmas_px: Sequence[float]) -> list[sp.csr_matrix]:
    """Return the weights of each σ, those within 3 σ; distances are found once, for the largest."""
    tree = cKDTree(xy)
    near = tree.sparse_distance_matrix(tree, _CUT_SIGMAS * max(sigmas_px), output_type="coo_matrix")
    found = []
    for sigma in sigmas_px:
        inside = near.data <= _CUT_SIGMAS * sigma
        values = np.exp(-0.5 * (near.data[inside] / sigma) ** 2)
        weights = sp.csr_matrix((values, (near.row[inside], near.col[inside])), shape=near.shape)
        weights.setdiag(1.0)  # scipy leaves distances of 0 out
        found.append(sp.csr_matrix(sp.diags(1 / np.asarray(weights.sum(axis=1)).ravel()) @ weights))
    return found


def hypergraph_mean(samples: Samples, part: Part, similar: int) -> sp.csr_matrix:
    """Return n × n: what NH2ST's neighbour branch passes on without its weights, on one slide.

    Two hypergraph convolutions over a spot's neighbourhood (each spot of it and its `similar` most similar make a
    hyperedge), then the mean over its nodes.
    """
    around = samples.neighbours[part.rows]
    n, k = around.shape
    passed = operator(incidence(samples.gather(around, 0), min(similar, k - 1)))
    weights = torch.bmm(passed, passed).mean(1)  # n × k: what each spot weighs in the mean of the nodes
    own = np.repeat(np.arange(n), k)
    others = (around - part.start).flatten().cpu().numpy()
    return sp.csr_matrix((weights.flatten().double().cpu().numpy(), (own, others)), shape=(n, n))


def centred_views(samples: Samples, part: Part, centring: float, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Yield one slide's embeddings view by view, n × d, less `centring` times their mean over spots and views.

    One view is held at a time, however many there are; where they come from a disk they are read once, and held in
    half precision.
    """
    rows = torch.arange(part.start, part.stop, device=samples.device)
    held = None if samples.resident else samples.gather(rows, slice(None))

    def each() -> Iterator[torch.Tensor]:
        for view in range(samples.n_views):
            x = samples.gather(rows, view) if held is None else held[:, view]
            yield x.to(dtype)

    means = [x.mean(0, dtype=torch.float64) for x in each()]
    centre = (centring * torch.stack(means).mean(0)).to(dtype)
    for x in each():
        yield x.sub_(centre)


def stain_basis(shifts_sd: torch.Tensor, directions: int) -> torch.Tensor:
    """Return d × r: the first right singular vectors of mean embedding shifts under synthetic stains, uncentred."""
    right: torch.Tensor = torch.linalg.svd(shifts_sd, full_matrices=False)[2]
    return right[:directions].T.contiguous()


def without(x: torch.Tensor, basis_dr: torch.Tensor | None) -> torch.Tensor:
    """Return … × d without its part along the basis: x − UUᵀx."""
    if basis_dr is None:
        return x
    along: torch.Tensor = torch.matmul(torch.matmul(x, basis_dr), basis_dr.T)
    return torch.sub(x, along)
