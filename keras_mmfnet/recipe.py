"""Every number of a run, in four parts; each function of the package takes the part that it needs."""

import difflib
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import AfterValidator, BeforeValidator, Field

# Version of the JSON files.
_FORMAT = 1
# Name of the file in a run's folder.
RECIPE_FILE = "recipe.json"


class RecipeError(ValueError):
    """A value of a recipe is outside its range.

    Args:
        problems: By the path of the field, such as `training.epochs`, what was expected and received.
    """

    def __init__(self, problems: Mapping[str, str]):
        self.problems = dict(problems)
        super().__init__("\n".join(f"`{path}` {text}" for path, text in self.problems.items()))


def _distinct(values: tuple) -> tuple:
    if len(set(values)) != len(values):
        raise ValueError("must be distinct")
    return values


def _rates(rates: Any) -> float | dict[str, float]:
    by_name = rates if isinstance(rates, dict) else {"": rates}
    if not all(isinstance(rate, int | float) and 0 <= rate < 1 for rate in by_name.values()):
        raise ValueError("must be in [0, 1), or such numbers by modality")
    return {name: float(rate) for name, rate in by_name.items()} if by_name is rates else float(rates)


def _name(name: str) -> str:
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError("must be a name of letters, digits, _ and -")
    return name


def _structure_name(name: str) -> str:
    if re.search(r"(^|_)(probability|disagreement)(_|$)", name, re.IGNORECASE):
        raise ValueError("must be a name without the words probability and disagreement, which name other files")
    return name


def _pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"must be a regular expression ({error})") from error
    return pattern


def _rising(limits: tuple[float, float]) -> tuple[float, float]:
    if limits[0] >= limits[1]:
        raise ValueError("must be (lowest, highest)")
    return limits


def _structure(value: Any) -> tuple[int, ...] | str | None:
    if isinstance(value, str) and value:
        return _pattern(value)
    labels = (value,) if isinstance(value, int) else value
    if labels is not None and not (
        isinstance(labels, list | tuple)
        and labels
        and all(isinstance(label, int) and label != 0 for label in labels)
        and len(set(labels)) == len(labels)
    ):
        raise ValueError("must be distinct label values other than 0, the background, or a name")
    return labels if labels is None else tuple(labels)


def _structures(structures: Mapping[str, tuple[int, ...] | str | None]) -> Mapping[str, tuple[int, ...] | str | None]:
    if len({name.casefold() for name in structures}) < len(structures):
        raise ValueError("must be names that differ in more than upper and lower case, as they become names of files")
    kinds = {type(value) for value in structures.values()}
    if len(kinds) != 1 or (None in structures.values() and len(structures) > 1):
        raise ValueError("must give label values for each structure, or a name for each; one alone may have none")
    return structures


def _leaves(value: Any) -> list:
    """What tuples and lists hold, or the value itself if it is neither."""
    return [leaf for one in value for leaf in _leaves(one)] if isinstance(value, tuple | list) else [value]


# A single value is taken as a tuple of one.
_SEVERAL = BeforeValidator(lambda value: (value,) if isinstance(value, str | int) else value)
_Positive = Annotated[int, Field(ge=1)]
_Rate = Annotated[float, Field(gt=0)]
_Fraction = Annotated[float, Field(ge=0, le=1)]
_Strength = Annotated[float, Field(ge=0, le=10)]
_Counts = Annotated[tuple[_Positive, ...], _SEVERAL, Field(min_length=1)]
# Names of files, of layers and of folders.
_Name = Annotated[str, AfterValidator(_name)]
_StructureName = Annotated[_Name, AfterValidator(_structure_name)]
_Names = Annotated[tuple[_Name, ...], _SEVERAL, AfterValidator(_distinct), Field(min_length=1)]
# The paper's.
_CLIP = {"t1": (-2.0, 1.0), "t2": (-3.0, 2.0), "cet1": (-2.0, 3.5)}
_Stride, _KernelSize = Literal[1, 2], Literal[1, 3]
_Statistics = Annotated[
    tuple[Literal["avg", "max", "std"], ...], _SEVERAL, AfterValidator(_distinct), Field(min_length=1)
]


class _Part(pydantic.BaseModel):
    """A validated, frozen model whose errors name the field by its path."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, /, **values: Any):
        try:
            super().__init__(**values)
        except pydantic.ValidationError as error:
            problems = {}
            for detail in error.errors():
                path = ".".join(map(str, detail["loc"])).removesuffix(".[key]")
                cause = detail.get("ctx", {}).get("error")
                if isinstance(cause, RecipeError):  # of one part of the recipe, or of several
                    problems |= {f"{path}.{inner}".lstrip("."): text for inner, text in cause.problems.items()}
                elif detail["type"] == "extra_forbidden":
                    problems[path] = _unknown(path, type(self).model_fields)
                else:
                    text = re.sub(
                        "^(Value error, )?((Input|Value|String|Field) (should be|should)?)?", "", detail["msg"]
                    ).strip()
                    text = text if text.startswith("must") else f"must {'' if text.startswith('have') else 'be '}{text}"
                    problems[path] = f"{text}. Received: {detail['input']!r}"
            raise RecipeError(problems) from None

    def __hash__(self):
        # Without the fields that hold values by modality, which have no hash.
        return hash(tuple(value for value in self.__dict__.values() if not isinstance(value, dict)))

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _refuse_bool(cls, value, info):
        by_name = info.field_name in ("clip", "structures", "modality_dropout") and isinstance(value, dict)
        several = value.values() if by_name else [value]
        several = [] if cls.model_fields[info.field_name].annotation is bool else several
        if any(isinstance(one, bool) for some in several for one in _leaves(some)):
            raise ValueError("must not be true or false")
        return value


def _unknown(path, known):
    near = difflib.get_close_matches(path, known, 1)
    near = near or [name for name in known if name.rpartition(".")[2] == path.rpartition(".")[2]]
    hint = f"did you mean `{near[0]}`?" if near else f"there are {', '.join(known)}."
    return f"is no field of a recipe; {hint} Received: {path}"


class DataRecipe(_Part):
    """What the images of a patient are and how they are preprocessed (section IV-A).

    Args:
        modalities: Names of the image sequences; the first one is the reference modality, whose grid is the patient's.
        mask: Name of the mask's file.
        series: Regular expressions by modality for the name of its DICOM series or its channel of a dataset, where
            the usual names do not fit; searched, ignoring case, in the series' folder and description, and with its
            number, time and echo after them.
        structures: What is segmented, by name. Integers are the label values of a structure in the mask. A string is a
            regular expression for the whole name of its own mask file, or of its structures in a DICOM structure set
            or segmentation, ignoring case. `None`: the mask has one label or structure. Structures with label values of
            their own exclude each other; those that share some, or are named by strings, may overlap.
        mask_from: Which mask counts where each modality has its own: a modality's, `"union"` or `"intersection"`;
            `None` for the reference modality's or the only one. Also the modality that a mask was drawn on whose name
            does not say so; `None` for the reference modality.
        allow_missing: Whether patients may lack some of the sequences, which are then zeros as in modality dropout. A
            network that is to segment them must be trained for it by `network.modality_dropout`.
        allow_empty: Whether patients may be without tumour, their masks empty; otherwise an empty mask is refused.
        align: How the other modalities are brought onto the reference grid: `"header"`, by position and orientation,
            or `"rigid"`, by the rigid transform that fits best from there, for patients who moved.
        spacing: In-plane pixel size in mm after resampling; `None` keeps the reference modality's. The distance
            between slices is always kept.
        normalised_scale: `None`: each image is z-scored inside the body and clipped. A number: the images hold
            z-scores times this number and are only divided by it.
        clip: Lowest and highest z-score by modality; a modality not named here is not clipped.
    """

    modalities: _Names = ("t1", "t2", "cet1")
    mask: Annotated[str, Field(min_length=1)] = "mask"
    series: dict[str, Annotated[str, AfterValidator(_pattern)]] = {}
    structures: Annotated[
        dict[_StructureName, Annotated[Any, AfterValidator(_structure)]], AfterValidator(_structures)
    ] = {"tumour": None}
    mask_from: str | None = None
    allow_missing: bool = False
    allow_empty: bool = False
    align: Literal["header", "rigid"] = "header"
    spacing: _Rate | None = 0.5
    normalised_scale: _Rate | None = None
    clip: dict[str, Annotated[tuple[float, float], AfterValidator(_rising)]] = _CLIP

    @property
    def structure_names(self) -> tuple[str, ...]:
        """The names of the structures: what the channels of a network are."""
        return tuple(self.structures)

    @property
    def named_structures(self) -> dict[str, str]:
        """The name of the file or the DICOM pattern of each structure; empty where structures are label values."""
        return {name: value for name, value in self.structures.items() if isinstance(value, str)}

    @property
    def mask_files(self) -> tuple[str | None, ...]:
        """What a patient's predicted masks are files of: each structure that is named, or `None`, all as labels."""
        return self.structure_names if len(self.named_structures) > 1 else (None,)

    @property
    def exclusive(self) -> bool:
        """Whether no voxel can belong to two structures, because they share no label value."""
        labels = [label for values in self.structures.values() if isinstance(values, tuple) for label in values]
        return len(self.structures) == 1 or (bool(labels) and len(set(labels)) == len(labels))

    @pydantic.field_validator("mask")
    @classmethod
    def _check_mask(cls, mask, info):
        if mask in info.data.get("modalities", ()):
            raise ValueError("must be a name that is no modality's")
        return mask

    @pydantic.field_validator("mask_from")
    @classmethod
    def _check_mask_from(cls, source, info):
        known = ("union", "intersection", *info.data.get("modalities", ()))
        if source is not None and source not in known:
            raise ValueError(f"must be one of {', '.join(known)}")
        return source

    @pydantic.model_validator(mode="after")
    def _check_names(self):
        # The default's limits may be of modalities that there are not.
        own = [name for name, limits in self.clip.items() if _CLIP.get(name) != limits]
        for field, names, known in (
            ("series", self.series, (*self.modalities, self.mask)),
            ("clip", own, self.modalities),
        ):
            if unknown := [name for name in names if name not in known]:
                expected = f"must be one of {', '.join(known)}"
                raise RecipeError({f"{field}.{name}": f"{expected}. Received: {name}" for name in unknown})
        return self


class PatchRecipe(_Part):
    """The 3D patches that a network sees, and their augmentation (section IV-A).

    Lengths in voxels are `(depth, height, width)`. What follows `in_plane` goes beyond the paper and is off at 0.
    Factors up to `1 + f` are as often below 1, down to `1 / (1 + f)`.

    Args:
        shape: Voxels of one patch, each a multiple of the product of the network's strides along its axis.
        stride: Step between windows in voxels; `None` for one window about the body's centre.
        offset_fraction: Largest random shift of a training patch, as a fraction of `shape`. The paper's
            `(4, 32, 32)` voxels.
        max_rotation: Largest random rotation, in degrees.
        flip_axes: Axes, each flipped with probability one half: 0 (head to feet), 1 (front to back, the paper's
            vertical flip), 2 (left to right).
        in_plane: Whether rotation, scaling, misalignment, blur and low resolution stay within the slices, as they
            must where slices are thicker than pixels. Otherwise they are along and about all three axes.
        max_scaling: Largest random scaling: a factor up to 1 + this.
        misalignment: Largest random shift in mm and rotation in degrees of each sequence against the reference
            modality and the mask.
        blur: Largest standard deviation of a Gaussian blur, in voxels.
        low_resolution: Largest loss of resolution: voxels up to 1 + this times as large.
        bias_field: Largest natural logarithm of a smooth field that multiplies the image.
        gamma: Largest change of the contrast curve: a power up to 1 + this.
        contrast: Largest change of the contrast: a factor up to 1 + this.
        brightness: Largest value added, in standard deviations of the image, as is the next.
        noise: Largest standard deviation of Gaussian noise.
        intensity_probability: Probability with which each of `blur` to `noise` is applied to a sequence of a patch.
        foreground: Share of the training patches that are placed at a random voxel of a random structure of a random
            patient; the others are at the windows.
        memory: GB that the voxels of the patients may take; where they take more, each patch is read from the files of
            the preprocessed patients. `None`: a quarter of the machine's memory. The patches are the same.
    """

    shape: tuple[_Positive, _Positive, _Positive] = (16, 256, 256)
    stride: tuple[_Positive | None, _Positive | None, _Positive | None] = (4, None, None)
    offset_fraction: tuple[_Fraction, _Fraction, _Fraction] = (0.25, 0.125, 0.125)
    max_rotation: Annotated[float, Field(ge=0, le=180)] = 5.0
    flip_axes: Annotated[tuple[Literal[0, 1, 2], ...], _SEVERAL, AfterValidator(_distinct)] = (1,)
    in_plane: bool = True
    max_scaling: _Strength = 0.0
    misalignment: tuple[_Strength, Annotated[float, Field(ge=0, le=45)]] = (0.0, 0.0)
    blur: _Strength = 0.0
    low_resolution: _Strength = 0.0
    bias_field: _Strength = 0.0
    gamma: _Strength = 0.0
    contrast: _Strength = 0.0
    brightness: _Strength = 0.0
    noise: _Strength = 0.0
    intensity_probability: _Fraction = 0.2
    foreground: _Fraction = 0.0
    memory: Annotated[float, Field(ge=0)] | None = None

    @pydantic.model_validator(mode="after")
    def _check_stride(self):
        if any(step and step > size for step, size in zip(self.stride, self.shape, strict=True)):
            expected = f"must be at most `patches.shape` {self.shape}, for no voxel may lie between the windows"
            raise RecipeError({"stride": f"{expected}. Received: {self.stride}"})
        return self

    @classmethod
    def strong(cls, **values: Any) -> Self:
        """Patches with nnU-Net's kinds of augmentation, rotated and scaled less, a bias field, and these values."""
        strengths = {"max_rotation": 15.0, "max_scaling": 0.25, "blur": 1.0, "low_resolution": 1.0, "bias_field": 0.5}
        strengths |= {"gamma": 0.5, "contrast": 0.25, "brightness": 0.25, "noise": 0.25, "foreground": 1 / 3}
        return cls(**strengths | values)

    @property
    def max_offset(self) -> tuple[int, int, int]:
        """Largest random shift of a training patch, in voxels `(depth, height, width)`."""
        return tuple(round(f * n) for f, n in zip(self.offset_fraction, self.shape, strict=True))


class NetworkRecipe(_Part):
    """The arguments of `MMFNet` (section III); other methods use what they have of it, the patch CNNs nothing.

    Args:
        filters: Filters of the encoder's blocks, from the finest level; the decoder mirrors them.
        reduction: Ratio `r` of the hidden layer in the channel attention.
        channel_statistics: Statistics of the channel attention, of `"avg"`, `"max"` and `"std"`.
        spatial_statistics: Statistics of the spatial attention.
        shared_mlp: One MLP for all statistics (CBAM) instead of one each.
        bottleneck: How the encoders' last features are joined: `"fusion"` or `"concat"`.
        modality_dropout: Probability with which each modality of a training patch is set to zero, except one; or the
            probabilities by modality, 0 for those not named.
        strides: By how much each level is pooled, `(z, y, x)`, each 1 or 2; `None` for 2 everywhere. Slices thicker
            than the pixels should not be pooled before the pixels have their size.
        kernel_sizes: Kernel of each level's convolutions, `(z, y, x)`, each 1 or 3; `None` for 3 everywhere.
        normalization: `"batch"`, or `"instance"`: of each patch by itself.
        residual: Whether the input of an encoder's block is added to its output.
        deep_supervision: Whether the coarser levels of the decoder are trained to segment, too.
    """

    filters: _Counts = (8, 16, 32, 64)
    reduction: _Positive = 12
    channel_statistics: _Statistics = ("avg", "max", "std")
    spatial_statistics: _Statistics = ("avg", "max", "std")
    shared_mlp: bool = False
    bottleneck: Literal["fusion", "concat"] = "fusion"
    modality_dropout: Annotated[Any, AfterValidator(_rates)] = 0.0
    strides: tuple[tuple[_Stride, _Stride, _Stride], ...] | None = None
    kernel_sizes: tuple[tuple[_KernelSize, _KernelSize, _KernelSize], ...] | None = None
    normalization: Literal["batch", "instance"] = "batch"
    residual: bool = False
    deep_supervision: bool = False

    @property
    def reduction_zyx(self) -> tuple[int, int, int]:
        """By how much the network reduces a patch along each axis: the product of its strides."""
        strides = self.strides or ((2, 2, 2),) * len(self.filters)
        return tuple(math.prod(sizes) for sizes in zip(*strides, strict=True))

    @pydantic.model_validator(mode="after")
    def _check_levels(self):
        problems, count = {}, len(self.filters)
        for field in ("strides", "kernel_sizes"):
            values = getattr(self, field)
            if values is not None and len(values) != count:
                problems[field] = f"must have (z, y, x) for each of the {count} `network.filters`. Received: {values}"
        if self.deep_supervision and count < 3:
            problems["deep_supervision"] = f"must go with three or more `network.filters`. Received: {self.filters}"
        if problems:
            raise RecipeError(problems)
        return self


class TrainingRecipe(_Part):
    """How the networks are trained and validated (sections III-C and IV-C).

    Args:
        self_transfer: Train one network per modality first and start from their encoders.
        batch_size: Patches per update.
        steps_per_epoch: Updates per epoch.
        epochs: Most epochs of each training.
        warmup_epochs: Epochs with frozen encoders after self-transfer.
        pretrain_learning_rate: The learning rate for the single-modality networks, and for a network trained without
            self-transfer.
        warmup_learning_rate: The learning rate while the encoders are frozen.
        learning_rate: The learning rate afterwards.
        schedule: The learning rate in the last stage of each training: `"constant"` as in the paper, or one that falls
            to 0 at the last epoch, `"cosine"` or `"polynomial"` (power 0.9).
        loss: `"dice"`, `"dice_per_patch"`, `"dice_ce"` (with cross-entropy), `"tversky"`, `"focal_tversky"`, or a name
            from `register_loss`. Patch classifiers always learn by cross-entropy.
        optimizer: `"adam"`, `"adamw"` or `"sgd"` (Nesterov momentum 0.99).
        clip_norm: Largest norm of the gradients of all weights together; `None` for no limit.
        weight_average: Number of last epochs whose weights are averaged. The average is used if it is better than the
            best epoch on the validation patients. 0: no averaging.
        choose_by: What chooses the best epoch and counts for `patience`: the validation `"loss"`, or `"dsc"`, the mean
            DSC of the validation patches that have the structure.
        patience: Epochs without a better one before a training ends; `None`: it does not end early.
        folds: Folds of the cross-validation, by patient, unless a run is given folds of the user's own.
        validation_fraction: Share of the patients outside the test set on whom the best epoch is chosen.
        group: Regular expression; patients whose names match with the same first group (or whole match) are one
            person and stay in the same fold. `None`: no groups.
        balance: `"volume"`: every part of a fold covers the range of the tumours' volumes. `None`: by chance alone.
        postprocess: Whether a fold's thresholds, smallest components and holes are those that raise the DSC of its
            validation patients; otherwise 0.5 and nothing else, as in the paper.
        mixed_precision: `"auto"`, `"off"`, `"float16"` or `"bfloat16"`.
        seed: Seed of the folds, the initial weights and the patches.
    """

    self_transfer: bool = True
    batch_size: _Positive = 8
    steps_per_epoch: _Positive = 75
    epochs: _Positive = 100
    warmup_epochs: Annotated[int, Field(ge=0)] = 5
    pretrain_learning_rate: _Rate = 1e-3
    warmup_learning_rate: _Rate = 1e-3
    learning_rate: _Rate = 1e-4
    schedule: Literal["constant", "cosine", "polynomial"] = "constant"
    loss: _Name = "dice"
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    clip_norm: _Rate | None = None
    weight_average: Annotated[int, Field(ge=0)] = 0
    choose_by: Literal["loss", "dsc"] = "loss"
    patience: _Positive | None = 10
    folds: Annotated[int, Field(ge=2)] = 5
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.25
    group: Annotated[str, AfterValidator(_pattern)] | None = None
    balance: Literal["volume"] | None = None
    postprocess: bool = False
    mixed_precision: Literal["auto", "off", "float16", "bfloat16"] = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class Recipe(_Part):
    """Every number of a run; the defaults are the paper's.

    A run writes its recipe as JSON beside its results, and is repeated, resumed and applied from that file.

    Args:
        data: What preprocessing depends on.
        patches: The patches and their augmentation.
        network: The network.
        training: The training and the cross-validation.
        reasons: Why fields have the values they have, one sentence by the path of a planned field.

    Raises:
        RecipeError: A value is outside its range, or two do not fit together; a `ValueError`.

    Example:

    ```python
    recipe = Recipe().replace({"training.epochs": 20, "data.spacing": 1.0})
    ```
    """

    data: DataRecipe = DataRecipe()
    patches: PatchRecipe = PatchRecipe()
    network: NetworkRecipe = NetworkRecipe()
    training: TrainingRecipe = TrainingRecipe()
    reasons: dict[str, str] = {}

    @pydantic.model_validator(mode="after")
    def _check(self):
        problems = {}
        sizes = zip(("depth", "height", "width"), self.patches.shape, self.network.reduction_zyx, strict=True)
        if wrong := [(axis, factor) for axis, size, factor in sizes if size % factor]:
            multiples = " and ".join(f"the {axis} a multiple of {factor}" for axis, factor in wrong)
            problems["patches.shape"] = (
                f"must be (depth, height, width), {multiples}, by which the network reduces it. "
                f"Received: {self.patches.shape}"
            )
        rates = self.network.modality_dropout
        rates = rates if isinstance(rates, dict) else {self.data.modalities[0]: rates}
        for name in set(rates).difference(self.data.modalities):
            expected = f"must be one of {', '.join(self.data.modalities)}"
            problems[f"network.modality_dropout.{name}"] = f"{expected}. Received: {name}"
        if self.data.allow_missing and len(self.data.modalities) > 1 and not any(rates.values()):
            problems["data.allow_missing"] = (
                "must go with a `network.modality_dropout` above 0, which trains the network for missing sequences. "
                f"Received: network.modality_dropout={self.network.modality_dropout}"
            )
        if problems:
            raise RecipeError(problems)
        return self

    @classmethod
    def small(cls) -> Self:
        """A recipe for a computer without a GPU: the paper's field of view in patches of 16x64x64 voxels of 2 mm."""
        return cls(
            data=DataRecipe(spacing=2.0),
            patches=PatchRecipe(shape=(16, 64, 64), flip_axes=(2,), foreground=1 / 3),
            training=TrainingRecipe(batch_size=4, steps_per_epoch=50, epochs=40, warmup_epochs=3, learning_rate=1e-3),
        )

    def replace(self, changes: Mapping[str, Any]) -> Self:
        """A recipe that differs in some fields, of which it has no reasons.

        Modalities that it drops take with them what `data.series`, `data.clip` and `network.modality_dropout` say of
        them.

        Args:
            changes: The new values by the path of the field: `"training.epochs"`, or `"data.series.t1"` for one entry
                of a field that holds values by modality. `"network.modality_dropout.t1"` also where it is one number,
                which the other modalities keep.

        Returns:
            The new `Recipe`.

        Raises:
            RecipeError: There is no such field, or a value is outside its range.
        """
        values = self.model_dump()
        fields = [".".join(path.split(".")[:2]) for path in changes]
        values["reasons"] = {path: reason for path, reason in self.reasons.items() if path not in fields}
        kept = changes.get("data.modalities", self.data.modalities)
        kept = kept if isinstance(kept, tuple | list) else [kept]
        for name in set(self.data.modalities).difference(kept):
            values["data"]["series"].pop(name, None)
            if values["data"]["clip"].get(name) != _CLIP.get(name):
                values["data"]["clip"].pop(name, None)
            if isinstance(rates := values["network"]["modality_dropout"], dict) and rates.pop(name, None):
                # Of those that are left none may be missing.
                values["data"]["allow_missing"] &= any(rates.values())
        for path, value in changes.items():
            *above, last = path.split(".")
            if path.startswith("network.modality_dropout."):
                rates = values["network"]["modality_dropout"]
                values["network"]["modality_dropout"] = rates if isinstance(rates, dict) else dict.fromkeys(kept, rates)
            inner = values
            for name in above:
                inner = inner.get(name) if isinstance(inner, dict) else None
            # Only the fields that hold values by modality take new names.
            if not (above and isinstance(inner, dict) and (len(above) > 1 or last in inner)):
                parts = ("data", "patches", "network", "training")
                known = [f"{part}.{field}" for part in parts for field in values[part]]
                raise RecipeError({path: _unknown(path, known)})
            if path.startswith("data.structures.") and inner == {"tumour": None}:
                inner.clear()  # the default's only structure, which stands for all labels
            inner[last] = value
        return type(self)(**values)

    def to_json(self) -> str:
        """The recipe as JSON text, with the version of the format."""
        values = self.model_dump(mode="json", exclude=None if self.reasons else {"reasons"})
        return json.dumps({"format": _FORMAT, **values}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The recipe that `to_json` wrote.

        Raises:
            ValueError: The text is not JSON, is of another version, or has an unknown field or a value outside its
                range.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"a recipe must be JSON: {error}. Received: {text[:80]!r}") from error
        if not isinstance(values, dict) or values.pop("format", None) != _FORMAT:
            raise ValueError(f'a recipe must be a JSON object with "format": {_FORMAT}. Received: {text[:80]!r}')
        return cls(**values)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """The recipe in the JSON file `path`.

        Raises:
            ValueError: The file cannot be read or is no recipe; see `from_json`.
        """
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            received = getattr(error, "strerror", None) or error
            raise ValueError(f"{path}: the JSON file of a recipe is expected. Received: {received}") from error
        try:
            return cls.from_json(text)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
