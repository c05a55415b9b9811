"""What a trained head says about itself: what it was made for, what it predicts, and what it was trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from nh2st_pipe.core.errors import RunError
from nh2st_pipe.evaluation.intervals import Intervals
from nh2st_pipe.recipes.train import FeatureRecipe, TargetRecipe, as_kept
from nh2st_pipe.recipes.values import faults_in_words
from nh2st_pipe.store.format import Contract

__all__ = ["MPP_TOLERANCE", "RUN_FORMAT", "About", "Seen", "TrainedOn", "hidden"]

RUN_FORMAT = 1


def hidden(name: str) -> str:
    """Return what stands for the name of a slide or patient where it is not to be told: whoever has it finds it again.

    Names can be tried one by one; it keeps them from being read, not from being guessed.
    """
    return f"sha256:{hashlib.sha256(name.encode()).hexdigest()[:16]}" if name else ""


class TrainedOn(BaseModel):
    """A slide that a head was trained on."""

    model_config = ConfigDict(frozen=True)
    slide_id: str
    patient: str
    image: str
    """Fingerprint of the image file; empty where it is not known."""
    mpp: float | None = None


class Seen(BaseModel):
    """What a head has seen when it predicted: kept with each prediction, so that whoever judges it can tell."""

    model_config = ConfigDict(frozen=True)
    images: tuple[str, ...] = ()
    """Fingerprints of the training slides' images."""
    patients: tuple[str, ...] = ()
    blocks: bool = False
    """Whether parts of slides were held out, and other parts of the same slides trained on."""

    @classmethod
    def of(cls, slides: Iterable[tuple[str, str]], blocks: bool = False) -> Seen:
        """Return what a head has seen that was trained on slides of these fingerprints and patients."""
        known = list(slides)
        images, patients = (tuple(sorted({each[i] for each in known} - {""})) for i in (0, 1))
        return cls(images=images, patients=patients, blocks=blocks)

    def words(self, image: str, patient: str) -> str | None:
        """Say in words how a slide was trained on; None where neither it nor its patient was, or nothing is known."""
        if image and image in self.images:
            return "trained on other blocks of this slide" if self.blocks else "trained on this slide"
        if patient in self.patients or hidden(patient) in self.patients:
            return f"trained on other slides of patient {patient}"
        return None


MPP_TOLERANCE = 0.05
"""By how much the resolution of a slide may leave that of the training slides, as a share."""


class About(BaseModel):
    """Kept in a model's config.json. Models of earlier versions lack what has a default here."""

    model_config = ConfigDict(frozen=True)  # what a later version adds is passed over
    format: int = 0
    recipe: str
    targets: TargetRecipe
    features: FeatureRecipe
    store: Contract
    """Encoder identity, weights, tile geometry, views and precision of the embeddings it was trained on."""
    unit: str = ""
    """What a prediction is a number of."""
    trained_on: tuple[TrainedOn, ...] = ()
    cv_pcc: dict[str, float | None] = Field(default_factory=dict)
    """Gene → PCC out of fold, the mean over units (patients, slides or blocks), None where it is not defined."""
    half_pcc: dict[str, float | None] = Field(default_factory=dict)
    """Gene → mean PCC between halves of the training tissue, which tells best which genes to trust on a new slide."""
    cv_low: dict[str, float] = Field(default_factory=dict)
    """Gene → lower end of the 95 % interval of its PCC over units, where there are several."""
    cv_high: dict[str, float] = Field(default_factory=dict)
    trusted: dict[str, bool] = Field(default_factory=dict)
    """Gene → whether it is trusted (see `evaluation.trust`); a gene that was not judged is not in it."""
    trusted_in_words: str = ""
    """What that verdict means, and what it rests on."""
    scale_genes: tuple[str, ...] = ()
    """The genes that counts were scaled over, where training slides measured different ones."""
    n_scale_genes: int = 0
    """How many genes counts were scaled over; 0 where an earlier version does not say."""
    smooth_predictions: bool | None = None
    """Whether predictions are smoothed as the targets are; None in models of earlier versions (`HeadModel.smooths`)."""
    carry: bool = False
    """Whether predictions are weighed by what carries over (`heads.carry`), which lies beside the weights."""
    intervals: Intervals = Field(default_factory=Intervals)
    """How far predictions were off on what was held out."""
    pitch: float | None = None
    """Median pitch of the training slides' spots in sides of a tile; None where it is not known."""
    likeness: dict[str, float] = Field(default_factory=dict)
    """slide_id → median likeness of a training slide to the others, when it was held out; where the head can tell."""
    version: str = ""

    @classmethod
    def of(cls, about: dict[str, Any], where: object) -> About:
        """Read what a head says. Raises RunError where it says too little, or is of a newer version."""
        if isinstance(about, dict) and "targets" in about:
            about = {**about, "targets": as_kept(about["targets"])}
        try:
            found = cls.model_validate(about)
        except pydantic.ValidationError as error:
            raise RunError(
                f"the model {where} does not say what it was trained for (config.json, about): "
                f"{faults_in_words(error, cls)}"
            ) from error
        if found.format > RUN_FORMAT:
            raise RunError(
                f"the model {where} has format {found.format}, and this version of nh2st-pipe reads {RUN_FORMAT} and "
                "older; a newer version may read it"
            )
        return found

    @classmethod
    def of_run(cls, run: Path) -> About | None:
        """Return what a run's model says of itself; None where none does, as in a run that was cut off."""
        path = run / "model" / "config.json"
        try:
            return cls.of(json.loads(path.read_text(encoding="utf-8"))["about"], path)
        except (OSError, ValueError, KeyError, TypeError, RunError):
            return None

    def seen(self) -> Seen:
        """Return which images and patients it was trained on."""
        return Seen.of((slide.image, slide.patient) for slide in self.trained_on)

    def refusal(self, slide_id: str, mpp: float | None) -> str | None:
        """Say why a slide of that µm per px cannot be predicted; None where it can.

        Tiles cut in px show another size of tissue at another resolution; tiles in µm show the same on every slide,
        and need to know it.
        """
        px = self.store.tile["size_level0_px"]
        if px is None:
            return None
        trained = self.mpp_range()
        if trained is None:
            return None
        low, high = trained[0] / (1 + MPP_TOLERANCE), trained[1] * (1 + MPP_TOLERANCE)
        if mpp is not None and low <= mpp <= high:
            return None
        have = "of unknown resolution" if mpp is None else f"of {mpp:g} µm per px"
        return (
            f"slide {slide_id} is {have}, and the model was trained with tiles of {px:g} px at {trained[0]:g} to "
            f"{trained[1]:g}: its tiles show another size of tissue. Give its mpp in the manifest, train with "
            "--tile-um, or predict all the same with --any-mpp"
        )

    def mpp_range(self) -> tuple[float, float] | None:
        """Return the lowest and highest µm per px of the training slides, None where one does not know it."""
        known = [slide.mpp for slide in self.trained_on]
        if not known or any(mpp is None for mpp in known):
            return None
        values = [mpp for mpp in known if mpp is not None]
        return min(values), max(values)
