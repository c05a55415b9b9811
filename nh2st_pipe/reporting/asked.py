"""What a page shows beyond the maps of genes, where it is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nh2st_pipe.core.errors import UsageError
from nh2st_pipe.reporting.domains import check_domains
from nh2st_pipe.reporting.sets import GeneSet, read_gmt
from nh2st_pipe.store.read import Store, open_store

__all__ = ["Asked"]


@dataclass(frozen=True)
class Asked:
    """Everything that may be asked for, read and checked."""

    sets: Sequence[GeneSet] = ()
    regions: str | Path | None = None
    """Outlines: a folder with SLIDE.geojson, or a file for the only slide."""
    images: Mapping[str, Path] = field(default_factory=dict)
    """The slides, of which crops are shown."""
    domains: int | None = None
    """How many each slide is parted into."""
    store: Store | None = None
    """Whose embeddings are parted into domains too."""

    @classmethod
    def of(
        cls,
        gene_sets: str | Path | None,
        regions: str | Path | None,
        slides: str | Path | None,
        domains: int | None,
        embeddings: str | Path | None,
    ) -> Asked:
        """Read what is asked for. Raises UsageError, ManifestError or StoreError where that cannot be done."""
        if embeddings is not None and domains is None:
            raise UsageError("--embeddings says of what to find domains; --domains 5 says how many")
        images = dict[str, Path]()
        if slides is not None:
            from nh2st_pipe.tiles.manifest import slide_files

            images = slide_files(slides)
        return cls(
            () if gene_sets is None else read_gmt(gene_sets),
            regions,
            images,
            None if domains is None else check_domains(domains),
            None if embeddings is None else open_store(embeddings),
        )
