"""Every number of a run, in four parts; each function of the package takes the part that it needs."""

import difflib
import json
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


def _distinct(names: tuple) -> tuple:
    if not names or len(set(names)) != len(names):
        raise ValueError("must be one or more distinct names")
    return names


def _pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"must be a regular expression ({error})") from error
    return pattern


def _patterns(patterns: Mapping[str, str]) -> Mapping[str, str]:
    for pattern in patterns.values():
        _pattern(pattern)
    return patterns


def _rising(limits: Mapping[str, tuple[float, float]]) -> Mapping[str, tuple[float, float]]:
    if any(low >= high for low, high in limits.values()):
        raise ValueError("must be (lowest, highest) by modality")
    return limits


def _labels(labels: tuple[int, ...]) -> tuple[int, ...]:
    if 0 in labels:
        raise ValueError("must be label values other than 0, the background")
    return _distinct(labels)


# One value stands for a tuple of it.
_SEVERAL = BeforeValidator(lambda value: (value,) if isinstance(value, str | int) else value)
_Positive = Annotated[int, Field(ge=1)]
_Rate = Annotated[float, Field(gt=0)]
_Fraction = Annotated[float, Field(ge=0, le=1)]
_Counts = Annotated[tuple[_Positive, ...], _SEVERAL, Field(min_length=1)]
# Names of files, of layers and of folders.
_Name = Annotated[str, Field(pattern=r"^[\w-]+$")]
_Names = Annotated[tuple[_Name, ...], _SEVERAL, AfterValidator(_distinct)]
# The paper's.
_CLIP = {"t1": (-2.0, 1.0), "t2": (-3.0, 2.0), "cet1": (-2.0, 3.5)}
_Statistics = Annotated[tuple[Literal["avg", "max", "std"], ...], _SEVERAL, AfterValidator(_distinct)]


class _Part(pydantic.BaseModel):
    """A validated, frozen model whose errors name the field by its path."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, /, **values: Any):
        try:
            super().__init__(**values)
        except pydantic.ValidationError as error:
            problems = {}
            for detail in error.errors():
                path, cause = ".".join(map(str, detail["loc"])), detail.get("ctx", {}).get("error")
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
        several = value.values() if info.field_name == "clip" and isinstance(value, dict) else [value]
        numbers = [one for some in several for one in (some if isinstance(some, tuple | list) else [some])]
        if cls.model_fields[info.field_name].annotation is not bool and any(isinstance(one, bool) for one in numbers):
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
            the usual names do not fit; searched in any case in the series' folder and description, and with its
            number, time and echo after them.
        mask_labels: Values of the mask that count as tumour. `None`: the mask has one value besides 0, which counts.
        mask_structures: Regular expressions for the whole names of the structures that count in DICOM structure sets
            and segmentations, in any case; those of the n-th have the label n. None: each such file has one structure.
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
    series: Annotated[dict[str, str], AfterValidator(_patterns)] = {}
    mask_labels: Annotated[tuple[int, ...], _SEVERAL, AfterValidator(_labels)] | None = None
    mask_structures: Annotated[tuple[Annotated[str, AfterValidator(_pattern)], ...], _SEVERAL] = ()
    mask_from: str | None = None
    allow_missing: bool = False
    allow_empty: bool = False
    align: Literal["header", "rigid"] = "header"
    spacing: _Rate | None = 0.5
    normalised_scale: _Rate | None = None
    clip: Annotated[dict[str, tuple[float, float]], AfterValidator(_rising)] = _CLIP

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
                expected = f"must be of {' or '.join(known)}"
                raise RecipeError({f"{field}.{name}": f"{expected}. Received: {name}" for name in unknown})
        return self


class PatchRecipe(_Part):
    """The 3D patches that a network sees, and their augmentation (section IV-A).

    Lengths in voxels are `(depth, height, width)`.

    Args:
        shape: Voxels of one patch, each a multiple of `2 ** len(network.filters)`.
        stride: Step between windows in voxels; `None` for one window about the body's centre.
        offset_fraction: Largest random shift of a training patch, as a fraction of `shape`. The paper's
            `(4, 32, 32)` voxels.
        max_rotation: Largest random in-plane rotation, in degrees.
        flip_axis: Axis flipped with probability one half: 1 (vertical), 2 (left to right) or `None`.
    """

    shape: tuple[_Positive, _Positive, _Positive] = (16, 256, 256)
    stride: tuple[_Positive | None, _Positive | None, _Positive | None] = (4, None, None)
    offset_fraction: tuple[_Fraction, _Fraction, _Fraction] = (0.25, 0.125, 0.125)
    max_rotation: Annotated[float, Field(ge=0, le=180)] = 5.0
    flip_axis: Literal[1, 2] | None = 1

    @property
    def max_offset(self) -> tuple[int, int, int]:
        """Largest random shift of a training patch, in voxels `(depth, height, width)`."""
        return tuple(round(f * n) for f, n in zip(self.offset_fraction, self.shape, strict=True))


class NetworkRecipe(_Part):
    """The arguments of `MMFNet` (section III); other methods use what they have of it.

    Args:
        filters: Filters of the encoder's blocks, from the finest level; the decoder mirrors them.
        reduction: Ratio `r` of the hidden layer in the channel attention.
        channel_statistics: Statistics of the channel attention, of `"avg"`, `"max"` and `"std"`.
        spatial_statistics: Statistics of the spatial attention.
        shared_mlp: One MLP for all statistics (CBAM) instead of one each.
        bottleneck: How the encoders' last features are joined: `"fusion"` or `"concat"`.
        modality_dropout: Probability with which each modality of a training patch is set to zero, except one.
    """

    filters: _Counts = (8, 16, 32, 64)
    reduction: _Positive = 12
    channel_statistics: _Statistics = ("avg", "max", "std")
    spatial_statistics: _Statistics = ("avg", "max", "std")
    shared_mlp: bool = False
    bottleneck: Literal["fusion", "concat"] = "fusion"
    modality_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


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
        weight_average: The mean of the weights of so many last epochs competes with the best epoch on the validation
            patients; 0: it does not.
        choose_by: What chooses the best epoch and counts for `patience`: the validation `"loss"` or mean `"dsc"`.
        patience: Epochs without a better one before a training ends; `None`: it does not end early.
        folds: Folds of the cross-validation, by patient, unless a run is given folds of the user's own.
        validation_fraction: Share of a fold's training patients that chooses the best epoch.
        group: Regular expression; patients whose names match with the same first group (or whole match) are one
            person and stay in the same fold. `None`: no groups.
        balance: `"volume"`: every part of a fold covers the range of the tumours' volumes. `None`: by chance alone.
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

    @pydantic.model_validator(mode="after")
    def _check(self):
        problems = {}
        factor = 2 ** len(self.network.filters)
        if any(size % factor for size in self.patches.shape):
            problems["patches.shape"] = (
                f"must be (depth, height, width), each a positive multiple of {factor}: the network halves it "
                f"{len(self.network.filters)} times. Received: {self.patches.shape}"
            )
        if self.data.allow_missing and not self.network.modality_dropout:
            problems["data.allow_missing"] = (
                "must go with a `network.modality_dropout` above 0, which trains the network for missing sequences. "
                "Received: network.modality_dropout=0"
            )
        if problems:
            raise RecipeError(problems)
        return self

    @classmethod
    def small(cls) -> Self:
        """A recipe for a computer without a GPU: the paper's field of view in patches of 16x64x64 voxels of 2 mm."""
        return cls(
            data=DataRecipe(spacing=2.0),
            patches=PatchRecipe(shape=(16, 64, 64), flip_axis=2),
            training=TrainingRecipe(batch_size=4, steps_per_epoch=50, epochs=40, warmup_epochs=3, learning_rate=1e-3),
        )

    def replace(self, changes: Mapping[str, Any]) -> Self:
        """A recipe that differs in some fields.

        Modalities that it drops take with them what `data.series` and `data.clip` say of them.

        Args:
            changes: The new values by the path of the field: `"training.epochs"`, or `"data.series.t1"` for one entry
                of a field that holds values by modality.

        Returns:
            The new `Recipe`.

        Raises:
            RecipeError: There is no such field, or a value is outside its range.
        """
        values = self.model_dump()
        kept = changes.get("data.modalities", self.data.modalities)
        for name in set(self.data.modalities).difference(kept if isinstance(kept, tuple | list) else [kept]):
            values["data"]["series"].pop(name, None)
            if values["data"]["clip"].get(name) != _CLIP.get(name):
                values["data"]["clip"].pop(name, None)
        for path, value in changes.items():
            *above, last = path.split(".")
            inner = values
            for name in above:
                inner = inner.get(name) if isinstance(inner, dict) else None
            # Only the fields that hold values by modality take new names.
            if not (above and isinstance(inner, dict) and (len(above) > 1 or last in inner)):
                known = [f"{part}.{field}" for part, fields in self.model_dump().items() for field in fields]
                raise RecipeError({path: _unknown(path, known)})
            inner[last] = value
        return type(self)(**values)

    def to_json(self) -> str:
        """The recipe as JSON text, with the version of the format."""
        return json.dumps({"format": _FORMAT, **self.model_dump(mode="json")}, indent=2) + "\n"

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
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"{path}: the JSON file of a recipe is expected. Received: {error.strerror}") from error
        try:
            return cls.from_json(text)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
