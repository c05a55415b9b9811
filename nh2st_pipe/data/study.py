"""The slides a run learns from: what is known of their spots, and their embeddings on the device, once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from nh2st_pipe.core.errors import TrainError
from nh2st_pipe.data.blocks import cut, part_of
from nh2st_pipe.data.budget import share_of_free
from nh2st_pipe.data.samples import Cache, ResidentCache, Samples
from nh2st_pipe.data.streamed import LEAST_KEPT, scratch_file, scratch_folders
from nh2st_pipe.data.targets import StreamedTargets, Targets
from nh2st_pipe.data.targets import targets as targets_of
from nh2st_pipe.recipes.train import TrainRecipe
from nh2st_pipe.store.format import Contract
from nh2st_pipe.store.read import SlideData, Store

__all__ = ["Study"]

_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Study:
    """Slides by name, their embeddings behind each other in one cache. Nothing of it is copied per head or fold."""

    path: str
    contract: Contract
    slides: dict[str, SlideData]
    places: dict[str, NDArray[np.int64]]
    """Each slide's rows of the cache."""
    cache: Cache
    targets_kept: int | None = None
    """How many bytes of targets may lie in memory at once; None for all of them."""
    spare: int | None = None
    """How many bytes a head may keep beside embeddings and targets, before it uses a file; None as many as it wants."""
    found: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)
    """What was found on a fold and is the same for every head (`Study.once`)."""

    @classmethod
    def load(
        cls,
        store: Store,
        names: Sequence[str],
        *,
        first_view_only: bool = False,
        device: torch.device | None = None,
        shared: bool = False,
        max_memory: int | None = None,
        targets: int | None = None,
        spare: int | None = None,
        say: Callable[[str], None] = lambda words: None,
    ) -> Study:
        """Read the slides `names` of `store`, each straight into its place in the cache.

        `shared` puts the cache where other processes that get this study can read it. Where it would take more than
        `max_memory` bytes (None: of what is free on the device) it is streamed from a file on a local disk; `say` hears
        it. With `targets`, as many bytes of them may lie in memory, and counts are left in the store; `spare` is what a
        head may keep. Raises TrainError where there is too little memory of that kind, or no such disk.
        """
        device = device or torch.device("cpu")
        sizes = [store.tiles(name) for name in names]
        ends = np.cumsum(sizes).tolist()
        places = {name: np.arange(end - n, end) for name, n, end in zip(names, sizes, ends, strict=True)}
        n_views = 1 if first_view_only else store.contract.views
        shape = (sum(sizes), n_views, store.contract.dim)
        wanted = 2 * shape[0] * shape[1] * shape[2]
        allowed = share_of_free(device) if max_memory is None else max_memory
        if wanted > allowed:
            beside = [store.location.path.absolute().parent] if store.location.path is not None else []
            cache: Cache = scratch_file(shape, device, max(LEAST_KEPT, allowed // 4), scratch_folders(*beside))
            have = f"{allowed / 1e9:.2f} GB of memory are for them"
            say(f"{wanted / 1e9:.2f} GB of embeddings are streamed from disk: {have}")
        else:
            cache = ResidentCache(_in_memory(shape, device, shared))
        slides = {}
        for name, n, end in zip(names, sizes, ends, strict=True):
            with cache.place(end - n, end) as place:
                if place.device.type == "cpu":
                    slide = store.read(
                        name, first_view_only=first_view_only, into=place.numpy(), leave_counts=targets is not None
                    )
                else:
                    slide = store.read(name, first_view_only=first_view_only, leave_counts=targets is not None)
                    place.copy_(torch.from_numpy(slide.views))
            slides[name] = replace(slide, views=slide.views[:0])  # they lie in the cache
        return cls(str(store.location), store.contract, slides, places, cache, targets, spare)

    def only(self, names: Sequence[str]) -> Study:
        """Return the study of some of its slides, on the same cache."""
        return replace(
            self,
            slides={name: self.slides[name] for name in names},
            places={name: self.places[name] for name in names},
        )

    def in_blocks(self) -> Study:
        """Return the same study with each slide's blocks in its place, on the same cache; see `data.blocks`."""
        slides, places = {}, {}
        for slide_id, slide in self.slides.items():
            for number, rows in enumerate(cut(slide), start=1):
                block = part_of(slide, rows, number)
                slides[block.name], places[block.name] = block, self.places[slide_id][rows]
        return replace(self, slides=slides, places=places)

    @property
    def device(self) -> torch.device:
        """Where the embeddings lie."""
        return self.cache.device

    def once(self, key: Hashable, find: Callable[[], _Found]) -> _Found:
        """Return what `find` finds, which is kept under `key` for the next who asks."""
        if key not in self.found:
            self.found[key] = find()
        found: _Found = self.found[key]
        return found

    @cached_property
    def common_genes(self) -> tuple[str, ...] | None:
        """The genes that all slides measure, in the first one's order; None where all measure the same.

        What a slide measures is known before any of its values is.
        """
        first, *others = self.slides.values()
        if all(slide.genes == first.genes or set(slide.genes) == set(first.genes) for slide in others):
            return None
        common = set(first.genes).intersection(*(slide.genes for slide in others))
        return tuple(gene for gene in first.genes if gene in common)

    def targets(self, names: Sequence[str], panel: Sequence[str], recipe: TrainRecipe) -> Mapping[str, Targets]:
        """Return the targets of slides by name; made when they are asked for where not all may lie in memory."""
        over = self.common_genes
        if self.targets_kept is not None:
            slides = {name: self.slides[name] for name in names}
            depths: dict[str, NDArray[np.float64]] = self.once(
                ("depths", over, recipe.targets.scale_to, recipe.targets.scale_over), dict
            )
            return StreamedTargets(slides, panel, recipe.targets, over, self.targets_kept, depths)
        return {name: targets_of(self.slides[name], panel, recipe.targets, over) for name in names}

    def samples(self, names: Sequence[str], recipe: TrainRecipe, target: Mapping[str, Targets] | None) -> Samples:
        """Return the spots of slides, with their targets where they are given."""
        return Samples.of(
            [self.slides[name] for name in names],
            target if isinstance(target, StreamedTargets) or target is None else [target[each] for each in names],
            neighbours=recipe.features.neighbours,
            cache=self.cache,
            places=[self.places[name] for name in names],
            smoothed=recipe.targets.smooth != "none",
            spare=self.spare,
        )


def _in_memory(shape: tuple[int, int, int], device: torch.device, shared: bool) -> torch.Tensor:
    views = torch.empty(shape, dtype=torch.float16, device=device)
    if shared:
        try:
            views.share_memory_()
        except RuntimeError as error:
            raise TrainError(
                f"{views.numel() * 2 / 1e9:.1f} GB of embeddings do not fit into shared memory (/dev/shm); "
                "enlarge it, or train with --jobs 1"
            ) from error
    return views
