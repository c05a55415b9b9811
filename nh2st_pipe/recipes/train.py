"""One way of training as data (stages/train/*.yaml): targets, features, head, protocol, baselines.

Every field is checked when the value is made and saved with the run. Defaults are written here and nowhere else.
"""

from __future__ import annotations

import itertools
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import pydantic
import yaml
from pydantic import Discriminator, Field, Tag, model_validator

from nh2st_pipe.core.errors import RecipeError, TrainError, UsageError, listed, nearest
from nh2st_pipe.recipes import files, plugins
from nh2st_pipe.recipes.values import Strict, faults_in_words, validate

if TYPE_CHECKING:
    from nh2st_pipe.data.samples import Part

__all__ = [
    "HEADS",
    "CarryGrid",
    "CarryRecipe",
    "ContextFields",
    "DeepSpotHead",
    "HestRidgeHead",
    "MeanHead",
    "NBHead",
    "NH2STHead",
    "PlugInHead",
    "QueryHead",
    "RetrievalPart",
    "RidgeHead",
    "TargetRecipe",
    "TrainRecipe",
    "as_kept",
    "head_recipe",
    "load_train_recipe",
    "train_recipe_names",
    "with_settings",
]


class TargetRecipe(Strict):
    """What is predicted: which genes, and what is done to their counts (Qu et al. 2025)."""

    genes: Annotated[int, Field(gt=0)] | Literal["all"] | tuple[str, ...] = 250
    """Size of the panel chosen on the training slides among genes that all of them have, `all` of these, or the panel
    itself."""
    panel: Literal["mean", "dispersion"] = "mean"
    """Rule of the choice, over all training spots: the highest mean raw count, or the highest dispersion (variance over
    mean) of counts scaled to the spots' median sum, among genes seen in one spot of a hundred."""
    scale_to: float | None = Field(10_000.0, gt=0)
    """Each spot's counts are scaled to this sum; None leaves them."""
    scale_over: Literal["all", "panel"] = "all"
    """Which counts have that sum: those of `all` genes (that slides have in common, where they measure different ones),
    or of the `panel` alone, which ties its genes to each other; protocol `paper` takes the latter by default."""
    log: Literal["log10", "log1p", "none"] = "log10"
    """`log10(x + 1)`, `ln(x + 1)`, or nothing."""
    smooth: Literal["grid8", "none"] = "grid8"
    """`grid8` takes the mean over a spot and its neighbours with |Δrow| ≤ 1 and |Δcol| ≤ 1."""

    @model_validator(mode="after")
    def _genes_are_named_once(self) -> Self:
        names = self.genes if isinstance(self.genes, tuple) else ()
        if isinstance(self.genes, tuple) and not names:
            raise ValueError("genes names no genes; give a number, all, or at least one gene")
        twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        if twice:
            raise ValueError(f"genes names genes twice: {listed(twice)}")
        return self

    def unit(self) -> str:
        """Say in words what a target is a number of."""
        over = " over the panel" if self.scale_over == "panel" else ""
        counts = "counts" if self.scale_to is None else f"counts scaled to {self.scale_to:,.0f} per spot{over}"
        logged = {"log10": f"log10({counts} + 1)", "log1p": f"ln({counts} + 1)"}.get(self.log, counts)
        return logged + (", mean over a spot and its grid neighbours" if self.smooth == "grid8" else "")


class FeatureRecipe(Strict):
    """How kept embeddings reach a head."""

    scale: Literal["robust", "none"] = "robust"
    """`robust`: (x − mean) / max(std, 0.1 · median std), fitted on the training slides."""
    clip: float = Field(8.0, gt=0)
    """Scaled values are clipped at ± this."""
    views: Literal["all", "first"] = "all"
    """`all`: the dihedral views are augmentation in training and averaged at prediction."""
    neighbours: int = Field(9, ge=1)
    """Spots in a neighbourhood, the spot itself among them; at most what the store keeps."""


class FitRecipe(Strict):
    """How a head that learns by steps is trained."""

    epochs: int = Field(200, gt=0)
    """Most epochs, one of which shows every training spot once, in one view drawn at random."""
    patience: int = Field(20, gt=0)
    """Epochs without a better `select_by` on the held-out slides before training stops."""
    select_by: Literal["pcc", "mse"] = "pcc"
    """What the best epoch is the best of: mean per-gene PCC, or mean squared error."""
    batch_size: int = Field(8, gt=1)
    lr: float = Field(5e-4, gt=0)
    lr_step: int = Field(50, gt=0)
    """The learning rate is multiplied by `lr_gamma` every so many epochs."""
    lr_gamma: float = Field(0.9, gt=0, le=1)
    weight_decay: float = Field(0.0, ge=0)


class HeadRecipe(Strict):
    """What every head's fields have in common."""

    model: ClassVar[str]
    """The head's class, "module:class"; imported when it is built or loaded."""
    by_epochs: ClassVar[bool] = False
    """Whether it is trained by `fit`, its number of epochs chosen on slides held out of the training slides."""
    learns_raw: ClassVar[bool] = False
    """Whether it learns from the target before smoothing, so that its predictions are smoothed by every protocol."""
    found_on: ClassVar[str] = ""
    """On which sections the numbers in its recipe were found, for whoever reads figures on those."""
    reads: ClassVar[tuple[Literal["counts", "slide_vector"], ...]] = ()
    """What it reads of a slide beside embeddings and targets, by the names of `data.samples.Part`: raw counts in
    training, the vector of a whole slide always."""
    takes_queries: ClassVar[bool] = False
    """Whether genes can be asked for that it was not trained on (`heads.query`)."""
    distribution: ClassVar[str] = ""
    """The distribution whose parameters it predicts beside a value (`heads.base.Distribution.kind`)."""

    @classmethod
    def check_slides(cls, parts: Sequence[Part], *, training: bool) -> None:
        """Raise TrainError where slides lack what the head `reads`."""
        for name in cls.reads if training else set(cls.reads) - {"counts"}:
            lacking = [part.name for part in parts if getattr(part, name) is None]
            if lacking:
                words = {"counts": "raw counts", "slide_vector": "a vector of the whole slide"}[name]
                raise TrainError(f"the head reads {words}, and there is none of {listed(lacking)}")

    def idle_features(self) -> dict[str, str]:
        """Return the fields of `features` that the head does not read, each with what does nearly the same."""
        return {}

    def idle_fields(self) -> dict[str, str]:
        """Return the head's own fields that nothing reads as the others are, each with why."""
        return {}

    def in_brief(self) -> HeadRecipe | None:
        """Return the head as it is trained where it has to be many times over; None where that takes too long."""
        return None if self.by_epochs else self

    def in_small(self) -> HeadRecipe | None:
        """Return the head as it is trained where its predictions of slides left out are wanted; None where that takes
        too long.
        """
        return self.in_brief()

    def uses_stain_shift(self) -> bool:
        """Whether it learns from how embeddings move under other stains."""
        return False


class MeanHead(HeadRecipe):
    """Predict each gene's mean over the training spots: the floor under every error."""

    model: ClassVar[str] = "nh2st_pipe.heads.linear:Mean"
    kind: Literal["mean"]

    def idle_features(self) -> dict[str, str]:
        """See HeadRecipe."""
        return dict.fromkeys(("scale", "clip", "neighbours"), "it looks at no embedding")


class KNNHead(HeadRecipe):
    """Retrieval: the mean target of the training spots whose embeddings are most alike."""

    model: ClassVar[str] = "nh2st_pipe.heads.retrieval:KNN"
    kind: Literal["knn"]
    k: int = Field(50, ge=1)
    """Training spots that a spot is predicted from."""

    def idle_features(self) -> dict[str, str]:
        """See HeadRecipe."""
        return {"neighbours": _OWN_SPOT}


class RidgeHead(HeadRecipe):
    """Ridge regression in closed form."""

    model: ClassVar[str] = "nh2st_pipe.heads.linear:Ridge"
    kind: Literal["ridge"]
    context: bool = False
    """Whether the mean embedding of the spot's neighbourhood stands beside its own."""
    alpha: float = Field(3000.0, gt=0)
    """Penalty per view: the objective is Σ‖y − xW‖² + alpha · views · ‖W‖² over all spots and views."""

    def idle_features(self) -> dict[str, str]:
        """See HeadRecipe."""
        return {} if self.context else {"neighbours": "head.context=true reads them"}


class HestRidgeHead(HeadRecipe):
    """HEST-Benchmark's probe: standardised principal components, ridge without an intercept."""

    model: ClassVar[str] = "nh2st_pipe.heads.hest_ridge:HestRidge"
    kind: Literal["hest-ridge"]
    components: int = Field(256, gt=0)
    """Principal components; fewer where there are fewer values or spots."""

    def idle_features(self) -> dict[str, str]:
        """See HeadRecipe."""
        scaled = "it standardises embeddings itself, as the benchmark does; ridge scales as features says"
        return {"scale": scaled, "clip": scaled, "neighbours": _OWN_SPOT}


class NH2STHead(HeadRecipe):
    """NH2ST (Qu et al., MICCAI 2025, arXiv 2506.23827) on frozen embeddings."""

    model: ClassVar[str] = "nh2st_pipe.heads.nh2st:NH2ST"
    by_epochs: ClassVar[bool] = True
    kind: Literal["nh2st"]
    width: int = Field(512, gt=0)
    """d: size of the embeddings that are compared."""
    hidden: int = Field(1024, gt=0)
    """Size between the two hypergraph convolutions."""
    decoder_hidden: int = Field(256, gt=0)
    heads: int = Field(8, gt=0)
    depth: int = Field(1, gt=0)
    """Cross-attention blocks, shared by the query and the neighbour pair."""
    mlp_ratio: float = Field(1.0, gt=0)
    dropout: float = Field(0.5, ge=0, lt=1)
    """In the attention and its MLP."""
    similar: int = Field(3, ge=1)
    """Most similar spots that join a spot's hyperedge."""
    temperature: float = Field(0.05, gt=0)
    off_diagonal: float = Field(0.1, ge=0)
    """Factor on the logits of pairs that do not belong together."""
    query_weight: float = Field(1.0, ge=0)
    neighbour_weight: float = Field(0.5, ge=0)

    @model_validator(mode="after")
    def _every_attention_head_is_as_wide(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) has to be a multiple of heads ({self.heads})")
        return self


class DeepSpotHead(HeadRecipe):
    """DeepSpot's head on kept embeddings: neighbours through a shared network, pooled."""

    model: ClassVar[str] = "nh2st_pipe.heads.deepspot:DeepSpot"
    by_epochs: ClassVar[bool] = True
    kind: Literal["deepspot"]
    width: int = Field(512, gt=0)
    networks: int = Field(10, gt=0)
    """How many φ, of which the median is taken, and how many ρ, of which the mean is."""
    dropout: float = Field(0.3, ge=0, lt=1)
    output_dropout: float = Field(0.1, ge=0, lt=1)


class KernelPart(Strict):
    """Kernel ridge regression on blocks of features; see `heads.kernel`."""

    ridge: float = Field(0.2, gt=0)
    """a: penalty."""
    low_count: float = Field(0.4, ge=0)
    """h: a spot of N counts weighs 1 / (1 + h · median(N) / N)."""
    rank: int = Field(8, gt=0)
    """Directions over the genes that are predicted."""
    stain_directions: int = Field(16, ge=0)
    """Directions along which other stains move the training slides' embeddings that are left out; at most half
    as many as the embedding has values, 0 leaves all in."""
    exact_up_to: int = Field(3000, gt=0)
    """Training spots up to which every one of them is compared with; beyond, `landmarks` stand in for them."""
    landmarks: int = Field(1000, gt=0)
    """Spots drawn at random that stand in for all."""


class AttentionPart(Strict):
    """Cross-attention from a spot to its nearest, biased by distance; see `heads.attention`."""

    neighbours: int = Field(25, ge=1)
    """Spots that are looked at, the spot itself among them."""
    components: int = Field(64, gt=0)
    """Leading principal components of the spot's own block that it sees and is seen by."""
    heads: int = Field(4, gt=0)
    key: int = Field(16, gt=0)
    value: int = Field(32, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1)


class ContrastPart(Strict):
    """A contrastive loss between image and expression, as an auxiliary; see `heads.contrast`."""

    weight: float = Field(0.1, gt=0)
    width: int = Field(64, gt=0)
    temperature: float = Field(0.1, gt=0)


class MembersRecipe(Strict):
    """A small network, several members in one batched model; see `heads.members`."""

    width: int = Field(256, gt=0)
    members: int = Field(1, gt=0)
    input_dropout: float = Field(0.1, ge=0, lt=1)
    dropout: float = Field(0.5, ge=0, lt=1)
    output_scale: float = Field(0.3, gt=0)
    """Factor on the output layer's first weights."""
    epochs: int = Field(50, gt=0)
    """Fixed: nothing is held out to choose it."""
    batch_size: int = Field(64, gt=0)
    lr: float = Field(5e-4, gt=0)
    """At its highest: it rises over `warmup` steps and falls to 0 as a cosine."""
    warmup: int = Field(20, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    contrast: ContrastPart | None = None
    """None leaves the contrastive loss out."""


class NetworkPart(MembersRecipe):
    """The network part of nh2st-context."""

    components: int = Field(256, gt=0)
    """Principal components of each block; at most the embedding's dimension."""
    members: int = Field(4, gt=0)
    low_count: float = Field(0.2, ge=0)
    """A spot of N counts weighs 1 / (1 + low_count · median(N) / N)."""
    stain_directions: int = Field(0, ge=0)
    """As the kernel part's."""
    attention: AttentionPart | None = None
    """None leaves cross-attention to the neighbours out."""


class MLPHead(HeadRecipe):
    """A network of one hidden layer on the spot's own embedding."""

    model: ClassVar[str] = "nh2st_pipe.heads.mlp:MLP"
    kind: Literal["mlp"]
    network: MembersRecipe = MembersRecipe()

    def idle_features(self) -> dict[str, str]:
        """See HeadRecipe."""
        return {"neighbours": _OWN_SPOT}


class ContextFields(HeadRecipe):
    """A kernel part and a network part on a spot and what surrounds it, mixed."""

    learns_raw: ClassVar[bool] = True
    found_on: ClassVar[str] = "four her2st sections (C2 to C5)"
    kind: str
    centring: float = Field(0.5, ge=0, le=1)
    """Share of a slide's own mean embedding that is taken off its embeddings."""
    sigmas: tuple[Annotated[float, Field(gt=0)], ...] = (1.0, 2.0, 4.0)
    """Widths of the Gaussian means beside the spot itself, in spot pitches."""
    hypergraph: bool = False
    """Whether NH2ST's hypergraph over a spot's neighbourhood, without weights to learn, makes one more block."""
    kernel: KernelPart | None = KernelPart()
    """None leaves the network part alone."""
    network: NetworkPart | None = NetworkPart()
    """None leaves the kernel part alone."""
    rank: int | None = Field(256, gt=0)
    """Leading factors of the targets that are learnt in place of more genes; None learns genes in any case."""
    kernel_share: float = Field(0.5, ge=0, le=1)
    """The kernel part's share of the output on a slide that is like the training slides."""
    gate_from: float = 0.3
    """Likeness (median best kernel similarity of a slide's spots to the training spots) up to which it has none."""
    gate_to: float = 0.5
    """Likeness from which it has `kernel_share`."""

    def in_brief(self) -> Self:
        """See HeadRecipe: the kernel part, which is solved, or a single member."""
        if self.kernel is not None:
            return self.model_copy(update={"network": None})
        return self.in_small()

    def in_small(self) -> Self:
        """See HeadRecipe: with a single member."""
        if self.network is None:
            return self
        return self.model_copy(update={"network": self.network.model_copy(update={"members": 1})})

    def uses_stain_shift(self) -> bool:
        """See HeadRecipe."""
        return any(part is not None and part.stain_directions > 0 for part in (self.kernel, self.network))

    def idle_features(self) -> dict[str, str]:
        """See HeadRecipe."""
        around = "head.sigmas and head.network.attention.neighbours say what surrounds a spot"
        centred = "head.centring says how far a slide's own mean is taken off"
        return {"scale": centred, "clip": centred, **({} if self.hypergraph else {"neighbours": around})}

    def idle_fields(self) -> dict[str, str]:
        """See HeadRecipe."""
        if self.kernel is not None and self.network is not None:
            return {}
        left = "kernel" if self.network is None else "network"
        return dict.fromkeys(("kernel_share", "gate_from", "gate_to"), f"the {left} part is alone; leave it out")

    @model_validator(mode="after")
    def _something_is_left(self) -> Self:
        if self.kernel is None and self.network is None:
            raise ValueError("kernel and network are both left out; one of them has to predict")
        if self.gate_to <= self.gate_from:
            raise ValueError(f"gate_to ({self.gate_to:g}) has to lie above gate_from ({self.gate_from:g})")
        return self


class ContextHead(ContextFields):
    """nh2st-context, the default head."""

    model: ClassVar[str] = "nh2st_pipe.heads.context:Context"
    kind: Literal["nh2st-context"]


class QueryHead(ContextFields):
    """nh2st-query: nh2st-context by a vector for each gene, so that genes it never saw can be asked for."""

    model: ClassVar[str] = "nh2st_pipe.heads.query:Query"
    takes_queries: ClassVar[bool] = True
    kind: Literal["nh2st-query"]
    rank: int = Field(256, gt=0)
    """Leading factors of the targets that are learnt; as many as genes, where those are fewer."""
    vectors: str | None = None
    """File of gene vectors, from which genes are predicted that the head never saw (`data.gene_vectors`); None knows
    no others than it is trained on."""
    vectors_sha256: str | None = None
    """Of that file; filled in when training starts."""

    @model_validator(mode="after")
    def _a_hash_is_of_a_file(self) -> Self:
        if self.vectors is None and self.vectors_sha256 is not None:
            raise ValueError("vectors_sha256 has no effect without vectors; leave it out")
        return self


class PlugInHead(HeadRecipe):
    """What the fields of every head of others have in common: a subclass has more, typed and with their defaults."""

    kind: str
    """By which it is known: the name it is registered by, "package.module:Class" or "file.py:Class"."""


class NBHead(HeadRecipe):
    """nh2st-nb: raw counts as they are, negative binomial, on the features of nh2st-context."""

    model: ClassVar[str] = "nh2st_pipe.heads.negative_binomial:NegativeBinomial"
    reads: ClassVar[tuple[Literal["counts", "slide_vector"], ...]] = ("counts",)
    distribution: ClassVar[str] = "negative binomial"
    learns_raw: ClassVar[bool] = True
    kind: Literal["nh2st-nb"]
    centring: float = Field(0.5, ge=0, le=1)
    """As nh2st-context's."""
    sigmas: tuple[Annotated[float, Field(gt=0)], ...] = (1.0, 2.0, 4.0)
    """As nh2st-context's."""
    network: NetworkPart = NetworkPart(low_count=0.0, attention=AttentionPart())

    def features(self) -> dict[str, Any]:
        """Return the fields of the nh2st-context whose features these are."""
        own = self.model_dump(mode="json", include={"centring", "sigmas", "network"})
        return {**own, "kind": "nh2st-context", "kernel": None}

    def in_small(self) -> NBHead:
        """See HeadRecipe: with a single member."""
        return self.model_copy(update={"network": self.network.model_copy(update={"members": 1})})

    def in_brief(self) -> NBHead:
        """See HeadRecipe."""
        return self.in_small()

    def uses_stain_shift(self) -> bool:
        """See HeadRecipe."""
        return self.network.stain_directions > 0

    def idle_features(self) -> dict[str, str]:
        """See HeadRecipe."""
        around = "head.sigmas and head.network.attention.neighbours say what surrounds a spot"
        centred = "head.centring says how far a slide's own mean is taken off"
        return {"scale": centred, "clip": centred, "neighbours": around}

    @model_validator(mode="after")
    def _every_setting_of_the_network_acts(self) -> Self:
        if self.network.low_count:
            raise ValueError("network.low_count has no effect: the likelihood weighs spots of few counts by itself")
        if self.network.contrast is not None:
            raise ValueError("network.contrast has no effect on raw counts; leave it out")
        return self


Ours = (
    MeanHead
    | RidgeHead
    | HestRidgeHead
    | KNNHead
    | MLPHead
    | DeepSpotHead
    | NH2STHead
    | ContextHead
    | QueryHead
    | NBHead
)
_OWN_SPOT = "it looks at the spot's own embedding alone; ridge-context and nh2st-context look around it"

HEADS: dict[str, type[HeadRecipe]] = {
    typing.get_args(head.model_fields["kind"].annotation)[0]: head for head in typing.get_args(Ours)
}
"""Every head of ours by its kind."""

_PLUG_IN = "plug-in"


def head_recipe(kind: str) -> type[HeadRecipe]:
    """Return the recipe of heads of `kind`: ours, or those of others (`recipes.plugins`).

    Raises RecipeError where there is none, or it cannot be loaded.
    """
    if kind in HEADS:
        return HEADS[kind]
    found = plugins.plugged(plugins.HEADS, kind, HEADS)
    if found is None:
        known = [*HEADS, *plugins.registered(plugins.HEADS, HEADS)]
        raise RecipeError(f"no head is called '{kind}'{nearest(kind, known)} (there are {', '.join(known)})")
    recipe = getattr(found.what, "recipe", None)
    if not (isinstance(recipe, type) and issubclass(recipe, PlugInHead)):
        raise RecipeError(
            f"{kind} has no `recipe`, a subclass of nh2st_pipe.recipes.train.PlugInHead with its fields; "
            "docs/templates/head.py shows one"
        )
    return recipe


def _kind(value: Any) -> str:
    """Return which part of the union a head is."""
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return kind if kind in HEADS else _PLUG_IN


def _of_others(value: Any) -> HeadRecipe:
    """Return the recipe of a head of others, checked by its own class."""
    if isinstance(value, PlugInHead):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"should be a group of keys (got {value!r})")
    kind = value.get("kind")
    if not isinstance(kind, str):
        raise ValueError("kind: is missing" if kind is None else f"kind: should be a name (got {kind!r})")
    try:
        recipe = head_recipe(kind)
        return recipe.model_validate(value)
    except pydantic.ValidationError as error:
        raise ValueError(faults_in_words(error, recipe)) from None
    except RecipeError as error:
        raise ValueError(str(error)) from error


if TYPE_CHECKING:
    Head = Ours  # a head of others has a kind that is no literal, by which mypy could tell ours apart
else:
    Head = Annotated[
        Annotated[MeanHead, Tag("mean")]
        | Annotated[RidgeHead, Tag("ridge")]
        | Annotated[HestRidgeHead, Tag("hest-ridge")]
        | Annotated[KNNHead, Tag("knn")]
        | Annotated[MLPHead, Tag("mlp")]
        | Annotated[DeepSpotHead, Tag("deepspot")]
        | Annotated[NH2STHead, Tag("nh2st")]
        | Annotated[ContextHead, Tag("nh2st-context")]
        | Annotated[QueryHead, Tag("nh2st-query")]
        | Annotated[NBHead, Tag("nh2st-nb")]
        | Annotated[pydantic.SerializeAsAny[PlugInHead], pydantic.BeforeValidator(_of_others), Tag(_PLUG_IN)],
        Discriminator(_kind),
    ]
"""A head of ours, or of others."""


class RetrievalPart(Strict):
    """What training spots that look alike express, as a part of the prediction; see `heads.alike`."""

    share: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = (0.0, 0.25)
    """Of the mixture, on slides that are like the training slides and on those that are not."""
    k: int = Field(100, ge=1)
    """Training spots that a spot is likened to."""
    sigmas: tuple[Annotated[float, Field(gt=0)], ...] = (1.0, 2.0)
    """Widths of the Gaussian means that are compared beside the spots themselves, in spot pitches."""
    components: int = Field(64, ge=1)
    """Principal components that embeddings are compared in, and of all that is compared."""
    most: int = Field(20_000, ge=1)
    """Training spots that are kept with the model, evenly over slides, in half precision; fewer where their targets
    would take more than 100 MB."""


class CarryGrid(Strict):
    """What is chosen from where training slides are of several patients."""

    q: tuple[Annotated[float, Field(ge=0)], ...] = Field((0.0, 0.5, 1.0, 2.0), min_length=1)
    p: tuple[Annotated[float, Field(ge=0)], ...] = Field((0.0, 0.5, 1.0), min_length=1)


class CarryRecipe(Strict):
    """What of predictions carries over to another patient's slide; see `heads.carry`. Pairs: like and unlike slides."""

    rank: int = Field(16, gt=0)
    """r: principal factors of the training targets that are told apart."""
    q: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] = (0.5, 2.0)
    """Power of min(1, A / a), for factors that are louder than they ever were on slides left out."""
    p: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] = (0.0, 1.0)
    """Power of the reliability."""
    retrieval: RetrievalPart | None = RetrievalPart()
    """None retrieves nothing, and keeps no training spots with the model."""
    gate_from: float = 0.3
    """Likeness up to which a slide is unlike."""
    gate_to: float = 0.5
    """Likeness from which it is like."""
    grid: CarryGrid | None = CarryGrid()
    """Where training slides are of several patients, powers that are chosen from by leaving patients out, in place of
    the likeness: one of each, with either end of `retrieval.share`, and what lies outside the factors kept or dropped.
    None leaves it to the likeness."""

    @model_validator(mode="after")
    def _the_gate_opens(self) -> Self:
        if self.gate_to <= self.gate_from:
            raise ValueError(f"gate_to ({self.gate_to:g}) has to lie above gate_from ({self.gate_from:g})")
        return self


class _OfHead(Strict):
    head: Head


class TrainRecipe(Strict):
    """One way of training: targets, features, head, protocol, and the baselines reported beside it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Letters, digits and ._-; a run is called after it where no --out is given."""
    about: str = ""
    targets: TargetRecipe = Field(default_factory=TargetRecipe)
    features: FeatureRecipe = Field(default_factory=FeatureRecipe)
    head: Head
    choose: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = Field(default_factory=dict)
    """Fields of the head that are chosen inside the training slides, each with the values to choose from
    ("head.alpha": [300, 3000]): the best mean PCC where training slides are left out in turn."""
    carry: CarryRecipe | None = None
    """How predictions are weighed by what carried over between training slides; None leaves them as they are."""
    fit: FitRecipe | None = None
    """For heads that are trained by steps (`nh2st`); the others' numbers stand in `head`."""
    protocol: Literal["nested", "paper"] = "nested"
    """`nested`: panel, scaling and epochs come from the training slides alone. `paper`: the panel comes from
    all slides and the best epoch from the test fold, as in published tables."""
    baselines: tuple[str, ...] = ()
    """Names of recipes trained on the same folds and targets, for comparison."""
    folds: str = "patient"
    """What is left out in turn: `patient`, `slide`, a column of the manifest, or `block` (a quarter of every slide).
    With `:K` behind it K folds of whole groups; a number alone is of patients. `none` judges nothing."""
    leave_genes_out: int | None = Field(None, ge=2)
    """Folds of genes, for heads that take genes by query: in each fold of slides genes are left out in turn too, and
    predicted as those that the head never saw; see `training.genes_out`. None leaves no genes out."""
    trust_from: float = Field(0.2, ge=0, lt=1)
    """PCC from which on a gene counts as usefully predicted: that of a trusted gene lies above (`evaluation.trust`)."""
    seed: int = Field(2021, ge=0, lt=1 << 32)

    @model_validator(mode="after")
    def _heads_have_one_name_each(self) -> Self:
        names = [self.name, *self.baselines]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"{' and '.join(twice)} would stand twice in one table, as head or baseline; give each once"
            )
        return self

    @model_validator(mode="after")
    def _choices_are_of_the_head(self) -> Self:
        for key in self.choose:
            if not key.startswith("head."):
                raise ValueError(f"choose.{key}: only fields of the head can be chosen, for example head.alpha")
        for choice in self.choices() if self.choose else ():
            try:
                self.chosen(choice)
            except pydantic.ValidationError as error:
                made = ", ".join(f"{key}={value}" for key, value in choice.items())
                raise ValueError(f"choose: {made} cannot be: {faults_in_words(error, TrainRecipe)}") from None
            except KeyError as error:
                raise ValueError(f"choose: '{error.args[0]}' is a value, not a group of keys") from None
        return self

    @model_validator(mode="after")
    def _every_setting_acts(self) -> Self:
        """Refuse what is set and read by nothing, with the nearest that works."""
        defaults = FeatureRecipe()
        for key, instead in self.head.idle_features().items():
            if getattr(self.features, key) != getattr(defaults, key):
                raise ValueError(f"features.{key} has no effect on a head of kind {self.head.kind}: {instead}")
        for key, why in self.head.idle_fields().items():
            if getattr(self.head, key) != type(self.head).model_fields[key].default:
                raise ValueError(f"head.{key} has no effect: {why}")
        if self.features.scale == "none" and self.features.clip != defaults.clip:
            raise ValueError("features.clip has no effect with features.scale=none: scaled values alone are clipped")
        if isinstance(self.targets.genes, tuple) and self.targets.panel != "mean":
            raise ValueError("targets.panel has no effect where targets.genes names the genes; give a number of them")
        if self.targets.scale_to is None and self.targets.scale_over != "all" and self.protocol == "nested":
            raise ValueError("targets.scale_over has no effect with targets.scale_to=null: nothing is scaled")
        if self.carry is not None and self.head.in_small() is None:
            raise ValueError(
                "carry needs predictions of training slides that are left out, and a head of kind "
                f"{self.head.kind} takes too long for that; leave it out"
            )
        if self.head.takes_queries:
            if self.carry is not None:
                raise ValueError(
                    "carry is learnt gene by gene, and there is none of genes that the head never saw; leave it out"
                )
            if self.targets.scale_over != "all" and self.targets.scale_to is not None:
                raise ValueError(
                    f"a head of kind {self.head.kind} needs targets.scale_over=all: values of a panel's genes that are "
                    "scaled over the panel are others with every gene that is asked for"
                )
        if self.leave_genes_out is not None:
            if not self.head.takes_queries:
                raise ValueError(
                    f"leave_genes_out has no effect on a head of kind {self.head.kind}, which predicts the genes that "
                    "it is trained on alone; nh2st-query takes others"
                )
            if self.folds == "none":
                raise ValueError("leave_genes_out has no effect without folds: no gene is judged")
        if self.folds == "none" and self.trust_from != type(self).model_fields["trust_from"].default:
            raise ValueError("trust_from has no effect without folds: no gene is judged")
        return self

    def __reduce__(self) -> Any:
        """Be made again from values where a head is of others: its class may not be there yet in another process."""
        if isinstance(self.head, PlugInHead):
            return TrainRecipe.model_validate, (self.model_dump(),)
        return super().__reduce__()

    def protocol_in_words(self) -> str:
        """Say what the run of this recipe chooses and on what, and what is fixed."""
        named = isinstance(self.targets.genes, tuple)
        if self.protocol == "paper":
            said = ["gene panel named beforehand" if named else "gene panel from all slides, as in published tables"]
            if self.head.by_epochs:
                said.append("best epoch chosen ON THE TEST FOLD, as in published tables: optimistic")
            else:
                said.append(f"a head of kind {self.head.kind} has no epochs to choose on the test fold")
        else:
            inside = [] if named else ["gene panel"]
            if not {"scale", "clip"} & self.head.idle_features().keys() and self.features.scale != "none":
                inside.append("scaling")
            inside += ["epochs"] if self.head.by_epochs else []
            inside += sorted(self.choose)
            said = [f"{_and(inside)} chosen on training slides alone"] if inside else ["nothing is chosen"]
            said += ["genes named beforehand"] if named else []
            said.append("each test fold touched once")
        if self.head.found_on:
            said.append(f"the head's numbers are fixed, and were found on {self.head.found_on}")
        return "; ".join(said)

    def choices(self) -> list[dict[str, Any]]:
        """Return every combination of the values in `choose`, as {key: value}; one that is empty without any."""
        return [dict(zip(self.choose, values, strict=True)) for values in itertools.product(*self.choose.values())]

    def chosen(self, choice: Mapping[str, Any]) -> TrainRecipe:
        """Return the recipe with the values of `choice`, and nothing left to choose."""
        values: dict[str, Any] = {"head": self.head.model_dump()}
        for key, value in choice.items():
            set_in(values, key, value)
        # The head alone: a baseline has the features and targets of the run's own head, which may not all act on it.
        return self.model_copy(update={"head": _OfHead.model_validate(values).head, "choose": {}})

    def smooths_predictions(self) -> bool:
        """Whether predictions are smoothed as the target is: those of every head, so that none has it alone.

        `paper` repeats what papers did: the predictions of a head that learns from smoothed targets stay as they are.
        """
        return self.targets.smooth != "none" and (self.protocol == "nested" or self.head.learns_raw)

    @model_validator(mode="before")
    @classmethod
    def _scaled_as_the_protocol_does(cls, values: Any) -> Any:
        """Give `targets.scale_over` the protocol's default where it is not said."""
        targets = values.get("targets", {}) if isinstance(values, dict) else None
        if isinstance(targets, dict) and "scale_over" not in targets and values.get("protocol") == "paper":
            return {**values, "targets": {**targets, "scale_over": "panel"}}
        return values

    @model_validator(mode="before")
    @classmethod
    def _dotted_choices(cls, values: Any) -> Any:
        """Take `choose: {head: {alpha: [...]}}`, as --set choose.head.alpha=[...] makes it, for "head.alpha"."""
        if isinstance(values, dict) and isinstance(values.get("choose"), dict):
            return {**values, "choose": dict(_flat(values["choose"]))}
        return values

    @model_validator(mode="before")
    @classmethod
    def _fit_where_it_acts(cls, values: Any) -> Any:
        """Give heads trained by steps their defaults, and refuse `fit` where nothing would read it."""
        head = values.get("head") if isinstance(values, dict) else None
        kind = head.get("kind") if isinstance(head, dict) else getattr(head, "kind", None)
        try:
            by_epochs = head_recipe(kind).by_epochs if isinstance(kind, str) else None
        except RecipeError:
            by_epochs = None
        if by_epochs is None:  # the head's own check says what is wrong
            return values
        if by_epochs and values.get("fit") is None:
            return {**values, "fit": {}}
        if not by_epochs and values.get("fit") is not None:
            if values["fit"] == FitRecipe().model_dump():  # as recipe.yaml of earlier versions has it
                return {**values, "fit": None}
            raise ValueError(f"fit has no effect on a head of kind {kind}, whose numbers stand in head; leave it out")
        return values


def load_train_recipe(name: str | Path, settings: Iterable[str] = ()) -> TrainRecipe:
    """Return the training recipe called `name` (or in the file `name`) with `settings` applied; see `with_settings`."""
    if (data := _of_head_alone(str(name))) is not None:
        return validate(TrainRecipe, with_settings(data, settings), str(name))
    path = files.find("stages/train", name)
    return validate(TrainRecipe, with_settings(files.load_yaml(path), settings), path.name)


def _of_head_alone(name: str) -> dict[str, Any] | None:
    """Return a recipe of the head of others called `name`, with our baselines; None where that is a recipe."""
    ours = name in files.names("stages/train") or name.endswith((".yaml", ".yml"))
    if ours or (not plugins.by_reference(name) and name not in plugins.registered(plugins.HEADS, HEADS)):
        return None
    called = re.sub("[^A-Za-z0-9._-]", "-", name.rpartition(":")[2])
    return {"name": called, "head": {"kind": name}, "baselines": ["mean", "ridge", "ridge-context"]}


def train_recipe_names() -> list[str]:
    """Return the names that `load_train_recipe` knows: our recipes, and heads that packages register."""
    return [*files.names("stages/train"), *plugins.registered(plugins.HEADS, HEADS)]


def as_kept(targets: Any) -> Any:
    """Return the values of a TargetRecipe that were kept with a run or a prediction: versions that kept no `scale_over`
    scaled over the panel.
    """
    return {"scale_over": "panel", **targets} if isinstance(targets, dict) else targets


def with_settings(data: dict[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """Return recipe values with `settings` applied, in place.

    A setting is "key=value" with a dotted key ("head.dropout=0.3"); the value is read as YAML.
    """
    for setting in settings:
        key, sign, value = setting.partition("=")
        if not sign or not key:
            raise UsageError(f"--set takes key=value (for example head.network.epochs=80), not '{setting}'")
        try:
            set_in(data, key.strip(), yaml.safe_load(value))
        except KeyError as error:
            raise UsageError(f"--set {setting}: '{error.args[0]}' is a value, not a group of keys") from error
        except yaml.YAMLError as error:
            raise UsageError(f"--set {setting}: '{value}' is not a YAML value") from error
    return data


def set_in(data: dict[str, Any], key: str, value: Any) -> None:
    """Set the dotted `key` of nested values, in place. Raises KeyError naming a parent that is not a group."""
    *parents, leaf = key.split(".")
    place = data
    for parent in parents:
        if place.get(parent) is None:
            place[parent] = {}
        place = place[parent]
        if not isinstance(place, dict):
            raise KeyError(parent)
    place[leaf] = value


def _and(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _flat(groups: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in groups.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
