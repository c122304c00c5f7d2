import argparse
import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

_STATISTICS = ("avg", "max", "std")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Every number of a run, from the reading of the images to the last epoch; the defaults are the paper's.

    A run writes its recipe as JSON beside its results, and is repeated, resumed and applied from that file. Lengths
    in voxels are `(depth, height, width)`.

    Args:
        modalities: Names of the image sequences; the first one's grid is the patient's grid.
        mask: Name of the mask's file.
        series: Regular expressions by modality for what its DICOM series or its channel of a dataset is called,
            where the usual names do not fit; searched in any case in the series' folder and description.
        mask_labels: Values of the mask that count as tumour. `None`: the mask has one value besides 0, and that
            counts.
        mask_from: Which mask counts where each modality has one of its own: a modality's, `"union"` or
            `"intersection"`; `None` for the first modality's or the only one there is. Also the modality that a mask
            was drawn on whose name does not say so; `None` for the first.
        align: How the other modalities come onto the first one's grid: `"header"`, by position and orientation, or
            `"rigid"`, by the rigid motion from there that fits best, for patients who moved between the sequences.
        spacing: In-plane pixel size in mm after resampling; `None` keeps the first modality's. The distance between
            slices is always kept.
        normalised_scale: `None`: each image is z-scored inside the body and clipped. A number: the images hold
            z-scores times this number and are only divided by it.
        clip: Lowest and highest z-score by modality; a modality not named here is not clipped.
        patch_shape: Voxels of one patch, each a multiple of `2 ** len(filters)`.
        window_stride: Step between windows; `None` for one window about the body's centre.
        offset_fraction: Largest random shift of a training patch, as a fraction of `patch_shape`. The paper's
            `(4, 32, 32)` voxels.
        max_rotation: Largest random in-plane rotation, in degrees.
        flip_axis: Axis mirrored with probability one half: 1 (vertical), 2 (left to right) or `None`.
        filters: Filters of the encoder's blocks; the decoder mirrors them.
        reduction: Ratio `r` of the hidden layer in the channel attention.
        channel_statistics: Statistics of the channel attention, of `"avg"`, `"max"` and `"std"`.
        spatial_statistics: The same for the spatial attention.
        shared_mlp: One MLP for all statistics (CBAM) in place of one each.
        bottleneck: How the encoders' last features are joined: `"fusion"` or `"concat"`.
        modality_dropout: Probability with which each modality of a training patch is blanked, at least one excepted; a
            network trained so segments patients of whom some are missing.
        self_transfer: Train one network per modality first and start from their encoders.
        batch_size: Patches per update.
        steps_per_epoch: Updates per epoch.
        epochs: Most epochs of each training.
        warmup_epochs: Epochs with frozen encoders after self-transfer.
        pretrain_learning_rate: Adam's learning rate for the single-modality networks, and for a network trained
            without self-transfer.
        warmup_learning_rate: The same while the encoders are frozen.
        learning_rate: The same afterwards.
        schedule: How the learning rate goes on in the last stage of each training: `"constant"` as in the paper, or
            `"cosine"`, falling to 0 at the last epoch, for trainings of few epochs.
        patience: Epochs without a better validation loss before a training ends.
        folds: Folds of the cross-validation, by patient.
        validation_fraction: Share of a fold's training patients that chooses the best epoch.
        mixed_precision: `"auto"`, `"off"`, `"float16"` or `"bfloat16"`.
        seed: Seed of everything random.

    Raises:
        ValueError: A value is outside its range.

    Reference: Chen et al., MMFNet, sections III and IV.
    """

    modalities: tuple[str, ...] = ("t1", "t2", "cet1")
    mask: str = "mask"
    series: Mapping[str, str] = dataclasses.field(default_factory=dict)
    mask_labels: tuple[int, ...] | None = None
    mask_from: str | None = None

    align: str = "header"
    spacing: float | None = 0.5
    normalised_scale: float | None = None
    clip: Mapping[str, tuple[float, float]] = dataclasses.field(
        default_factory=lambda: {"t1": (-2.0, 1.0), "t2": (-3.0, 2.0), "cet1": (-2.0, 3.5)}
    )

    patch_shape: tuple[int, int, int] = (16, 256, 256)
    window_stride: tuple[int | None, int | None, int | None] = (4, None, None)
    offset_fraction: tuple[float, float, float] = (0.25, 0.125, 0.125)
    max_rotation: float = 5.0
    flip_axis: int | None = 1

    filters: tuple[int, ...] = (8, 16, 32, 64)
    reduction: int = 12
    channel_statistics: tuple[str, ...] = _STATISTICS
    spatial_statistics: tuple[str, ...] = _STATISTICS
    shared_mlp: bool = False
    bottleneck: str = "fusion"
    modality_dropout: float = 0.0
    self_transfer: bool = True

    batch_size: int = 8
    steps_per_epoch: int = 75
    epochs: int = 100
    warmup_epochs: int = 5
    pretrain_learning_rate: float = 1e-3
    warmup_learning_rate: float = 1e-3
    learning_rate: float = 1e-4
    schedule: str = "constant"
    patience: int = 10
    folds: int = 5
    validation_fraction: float = 0.25
    mixed_precision: str = "auto"
    seed: int = 0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
        object.__setattr__(self, "clip", {name: tuple(limits) for name, limits in self.clip.items()})

        def check(name, holds, expected):
            if not holds:
                raise ValueError(f"`{name}` must be {expected}. Received: {name}={getattr(self, name)!r}")

        def counts(values, smallest=1):
            return all(isinstance(value, int) and value >= smallest for value in values)

        check("modalities", self.modalities and len(set(self.modalities)) == len(self.modalities), "distinct names")
        check("mask", self.mask and self.mask not in self.modalities, "a name that is no modality's")
        for pattern in self.series.values():
            check("series", _is_pattern(pattern), "regular expressions by modality")
        sources = (None, "union", "intersection", *self.modalities)
        check("mask_from", self.mask_from in sources, "'union', 'intersection' or a modality")
        check("mask_labels", self.mask_labels is None or self.mask_labels, "None or one or more label values")
        check("align", self.align in ("header", "rigid"), "'header' or 'rigid'")
        check("spacing", self.spacing is None or self.spacing > 0, "positive, in mm, or None")
        check("normalised_scale", self.normalised_scale is None or self.normalised_scale > 0, "positive or None")
        check("clip", all(len(c) == 2 and c[0] < c[1] for c in self.clip.values()), "(lowest, highest) by modality")
        check("filters", self.filters and counts(self.filters), "one or more positive counts")
        factor = 2 ** len(self.filters)
        check(
            "patch_shape",
            len(self.patch_shape) == 3 and counts(self.patch_shape) and all(n % factor == 0 for n in self.patch_shape),
            f"(depth, height, width), each a positive multiple of {factor}: the network halves it "
            f"{len(self.filters)} times",
        )
        check(
            "window_stride",
            len(self.window_stride) == 3 and counts(step for step in self.window_stride if step is not None),
            "three positive counts or None",
        )
        check(
            "offset_fraction",
            len(self.offset_fraction) == 3 and all(0 <= f <= 1 for f in self.offset_fraction),
            "three numbers from 0 to 1",
        )
        check("max_rotation", 0 <= self.max_rotation <= 180, "from 0 to 180 degrees")
        check("flip_axis", self.flip_axis in (1, 2, None), "1, 2 or None")
        for name in ("channel_statistics", "spatial_statistics"):
            check(name, getattr(self, name) and set(getattr(self, name)) <= set(_STATISTICS), f"of {_STATISTICS}")
        check("bottleneck", self.bottleneck in ("fusion", "concat"), "'fusion' or 'concat'")
        check("modality_dropout", 0 <= self.modality_dropout < 1, "from 0 up to, but not, 1")
        for name in ("reduction", "batch_size", "steps_per_epoch", "epochs", "patience"):
            check(name, counts([getattr(self, name)]), "a positive count")
        check("warmup_epochs", counts([self.warmup_epochs], smallest=0), "0 or a positive count")
        for name in ("pretrain_learning_rate", "warmup_learning_rate", "learning_rate"):
            check(name, getattr(self, name) > 0, "positive")
        check("schedule", self.schedule in ("constant", "cosine"), "'constant' or 'cosine'")
        check("folds", counts([self.folds], smallest=2), "2 or more")
        check("validation_fraction", 0 < self.validation_fraction < 1, "between 0 and 1")
        check("mixed_precision", self.mixed_precision in ("auto", "off", "float16", "bfloat16"), "a known policy")
        check("seed", counts([self.seed], smallest=0), "0 or a positive count")

    @classmethod
    def small(cls, **changes):
        """A recipe for a computer without a GPU: the paper's field of view in patches of 16x64x64 voxels of 2 mm.

        Args:
            **changes: Fields that differ from it.

        Returns:
            The recipe.
        """
        defaults = {
            "spacing": 2.0,
            "patch_shape": (16, 64, 64),
            "flip_axis": 2,
            "batch_size": 4,
            "steps_per_epoch": 50,
            "epochs": 40,
            "warmup_epochs": 3,
            "learning_rate": 1e-3,
        }
        return cls(**(defaults | changes))

    @property
    def max_offset(self):
        """Largest random shift of a training patch, in voxels `(depth, height, width)`."""
        return tuple(round(f * n) for f, n in zip(self.offset_fraction, self.patch_shape, strict=True))

    def to_json(self):
        """The recipe as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text):
        """The recipe that `to_json` wrote.

        Raises:
            ValueError: The text is not JSON, or names a field that no recipe has.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"a recipe must be JSON: {error}. Received: {text[:80]!r}") from error
        if not isinstance(values, dict):
            raise ValueError(f"a recipe must be a JSON object. Received: {text[:80]!r}")
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"a recipe has no such fields. Received: {unknown}")
        return cls(**values)

    @classmethod
    def load(cls, path: str | os.PathLike):
        """The recipe in the JSON file `path`."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _is_pattern(text):
    try:
        re.compile(text)
    except (re.error, TypeError):
        return False
    return True


def add_recipe_arguments(parser):
    """Adds to a command line what often differs from a recipe.

    Args:
        parser: An `argparse.ArgumentParser`.
    """
    group = parser.add_argument_group("what differs from the recipe (see keras_mmfnet.recipe.Recipe)")

    def add(flag, **options):
        group.add_argument(flag, default=argparse.SUPPRESS, **options)

    add("--mask-name", dest="mask", metavar="NAME", help="file name of the mask")
    add("--mask-labels", nargs="+", type=int, metavar="LABEL", help="values of the mask that count as tumour")
    add("--mask-from", metavar="MODALITY|union|intersection", help="which mask counts where each sequence has one")
    add("--series", nargs="+", action=_Pairs, metavar="MODALITY=PATTERN",
        help="regular expressions for the names of DICOM series")  # fmt: skip
    add("--align", choices=("header", "rigid"), help="trust the positions in the headers, or register from there")
    add("--normalised", dest="normalised_scale", type=float, nargs="?", const=1.0, metavar="SCALE",
        help="the images hold z-scores already, times SCALE (1)")  # fmt: skip
    add("--spacing", type=lambda text: None if text == "keep" else float(text), metavar="MM|keep",
        help="in-plane pixel size, or keep the images' own")  # fmt: skip
    add("--patch-shape", nargs=3, type=int, metavar=("D", "H", "W"), help="voxels of a patch")
    add("--epochs", type=int, metavar="N", help="most epochs of each training")
    add("--steps-per-epoch", type=int, metavar="N", help="updates per epoch")
    add("--batch-size", type=int, metavar="N", help="patches per update")
    add("--modality-dropout", type=float, metavar="P",
        help="train for patients of whom sequences are missing: blank each with probability P")  # fmt: skip
    add("--seed", type=int, metavar="N", help="seed of everything random")
    add("--mixed-precision", choices=("auto", "off", "float16", "bfloat16"), help="number format on a GPU")


class _Pairs(argparse.Action):
    """Texts such as `t1=PATTERN` as a dict."""

    def __call__(self, parser, namespace, values, option_string=None):
        pairs = dict(value.split("=", 1) for value in values if "=" in value)
        if len(pairs) != len(values):
            parser.error(f"{option_string}: MODALITY=PATTERN is expected. Received: {' '.join(values)}")
        setattr(namespace, self.dest, pairs)


def recipe_changes(parsed):
    """The fields of a recipe among parsed arguments, by name."""
    fields = {field.name for field in dataclasses.fields(Recipe)}
    return {name: value for name, value in vars(parsed).items() if name in fields}
