"""The registry of methods: the rows of the paper's Tables I and II, and methods of your own."""

import dataclasses
from collections.abc import Callable, Mapping
from os import PathLike

import keras

from keras_mmfnet.models import (
    MMFNet,
    MultiEncoderUNet3D,
    PatchCNN,
    SiamesePatchCNN,
    SingleEncoderUNet3D,
    SliceWise3D,
    UNet2D,
    UNet3D,
)
from keras_mmfnet.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of a table: a network and how it is trained.

    Args:
        name: Name in the registry, in file names and on the command line.
        title: Name in a table.
        build: Function `build(recipe, dtype, encoders)` that returns the network to be trained. `dtype` is a dtype
            policy, `encoders` the pretrained networks by modality or `None`. The network is a `keras.Model` from
            `{modality: (batch, depth, height, width, 1)}` to probabilities of the same shape, or a classifier of 2D
            patches.
        changes: The recipe's fields that differ for this method, `{path: value}`, such as `data.modalities`.
        encoders: By modality, the name of the method whose encoder is copied; empty without self-transfer.
        samples: The training samples: `"volumes"`, 3D patches and their masks, or `"centres"`, 2D patches and the class
            of their centre.
        paper: `dsc`, `ap` and `dice_loss` in the paper, if it has them.
        train: In place of `build`, trains a network of another library: `train(method, training, validation, recipe,
            folder)` returns `(predict, parameters, history)`, that is a callable for `predict_volume`, the number of
            weights and a dict of numbers for each epoch.
        library: The package that `train` computes with, whose version is written beside the results.
    """

    name: str
    title: str
    build: Callable[..., keras.Model] | None = None
    changes: Mapping = dataclasses.field(default_factory=dict)
    encoders: Mapping[str, str] = dataclasses.field(default_factory=dict)
    samples: str = "volumes"
    paper: Mapping[str, float] = dataclasses.field(default_factory=dict)
    train: Callable | None = None
    library: str | None = None

    def __post_init__(self):
        if not (self.build or self.train):
            raise ValueError(f"a method must have `build` or `train`. Received: {self.name!r} with neither")
        if self.samples not in ("volumes", "centres"):
            raise ValueError(f"`samples` must be 'volumes' or 'centres'. Received: {self.samples!r}")

    def adapt(self, recipe: Recipe) -> Recipe:
        """The recipe with the changes of this method."""
        return recipe.replace(self.changes)

    def over_volumes(self, network: keras.Model, recipe: Recipe) -> keras.Model:
        """The trained network as a network over volumes, for `predict_volume`."""
        return SliceWise3D(network, recipe.patches.shape) if self.samples == "centres" else network


METHODS: dict[str, Method] = {}
# Prefix of the single-modality networks of self-transfer, before the modality.
_SINGLE = "unet3d_"


def register_method(method: Method) -> Method:
    """Adds a method to the registry `METHODS`.

    Args:
        method: A `Method`.

    Returns:
        The method.

    Raises:
        ValueError: The name is taken, or a method in `encoders` is not registered.
    """
    if method.name in METHODS:
        raise ValueError(f"a method's name must be new. Received: {method.name!r}")
    unknown = sorted(set(method.encoders.values()) - set(METHODS))
    if unknown:
        raise ValueError(f"`encoders` must name methods that are registered already. Received: {unknown}")
    METHODS[method.name] = method
    return method


def method_of(recipe: Recipe) -> Method:
    """The method that a recipe describes: MMFNet, with self-transfer if `training.self_transfer` is set.

    Args:
        recipe: The `Recipe`.

    Returns:
        A `Method` for the recipe's modalities; it is not registered.
    """
    names = recipe.data.modalities if recipe.training.self_transfer else ()
    return Method("mmfnet", "MMFNet", build_mmfnet, encoders={name: f"{_SINGLE}{name}" for name in names})


def find_method(name: str) -> Method:
    """Finds a method by name.

    Args:
        name: Name of a registered method, or `unet3d_<modality>` for the 3D U-net of any modality.

    Returns:
        The `Method`.

    Raises:
        ValueError: There is no such method.
    """
    if name in METHODS:
        return METHODS[name]
    modality = name.removeprefix(_SINGLE)
    if modality == name or not modality:
        raise ValueError(f"a method's name must be one of {', '.join(METHODS)}. Received: {name!r}")
    return Method(name, f"3D U-net ({modality})", _unet3d, {"data.modalities": (modality,)})


def build_mmfnet(
    recipe: Recipe, dtype: str, encoders: Mapping[str, keras.Model | str | PathLike] | None = None
) -> MMFNet:
    """Builds the MMFNet of a recipe, with pretrained encoders if there are any.

    Args:
        recipe: The `Recipe`.
        dtype: Dtype policy of the layers.
        encoders: As for `MMFNet.from_pretrained_encoders`, or `None`.

    Returns:
        The `MMFNet`.
    """
    settings = {
        "modalities": recipe.data.modalities,
        "patch_shape": recipe.patches.shape,
        **recipe.network.model_dump(),
        "dtype": dtype,
    }
    return MMFNet.from_pretrained_encoders(encoders, **settings) if encoders else MMFNet(**settings)


def _patch_cnn(recipe, dtype, encoders=None):
    return PatchCNN(recipe.data.modalities[0], dtype=dtype)


def _siamese_patch_cnn(recipe, dtype, encoders=None):
    return SiamesePatchCNN(recipe.data.modalities, dtype=dtype)


def _unet2d(recipe, dtype, encoders=None):
    network = UNet2D(recipe.data.modalities[0], recipe.patches.shape[1:], recipe.network.filters, dtype=dtype)
    return SliceWise3D(network, recipe.patches.shape)


def _unet3d(recipe, dtype, encoders=None):
    return UNet3D(recipe.data.modalities[0], recipe.patches.shape, recipe.network.filters, dtype=dtype)


def _single_encoder(recipe, dtype, encoders=None):
    return SingleEncoderUNet3D(recipe.data.modalities, recipe.patches.shape, recipe.network.filters, dtype=dtype)


def _multi_encoder(recipe, dtype, encoders=None):
    return MultiEncoderUNet3D(recipe.data.modalities, recipe.patches.shape, recipe.network.filters, dtype=dtype)


def _register_rows():
    every = ("t1", "t2", "cet1")
    both, std = ("avg", "max"), ("avg", "max", "std")

    def row(name, title, build, modalities, paper, encoders=(), samples="volumes", **changes):
        numbers = dict(zip(("dsc", "ap", "dice_loss"), paper, strict=True))
        donors = {modality: f"{_SINGLE}{modality}" for modality in encoders}
        changes = {f"network.{field}": value for field, value in changes.items()}
        register_method(
            Method(name, title, build, {"data.modalities": modalities, **changes}, donors, samples, numbers)
        )

    single = (
        # By modality: the paper's patch CNN, 2D and 3D U-net.
        ("t1", (0.5195, 0.5320, 0.4818), (0.5895, 0.6169, 0.4119), (0.6817, 0.7202, 0.3361)),
        ("t2", (0.4939, 0.4984, 0.5074), (0.5589, 0.5777, 0.4422), (0.6589, 0.6920, 0.3610)),
        ("cet1", (0.5693, 0.5828, 0.4314), (0.6012, 0.6142, 0.3995), (0.6222, 0.6456, 0.3921)),
    )
    for modality, paper, _, _ in single:
        title = f"Patch-based CNN ({modality.upper()})"
        row(f"patch_cnn_{modality}", title, _patch_cnn, (modality,), paper, samples="centres")
    title = "Multi-modality patch-based CNN"
    row("siamese_patch_cnn", title, _siamese_patch_cnn, every, (0.6083, 0.6307, 0.3930), samples="centres")
    for modality, _, paper, _ in single:
        row(f"unet2d_{modality}", f"U-net ({modality.upper()})", _unet2d, (modality,), paper)
    for modality, _, _, paper in single:
        row(f"unet3d_{modality}", f"3D U-net ({modality.upper()})", _unet3d, (modality,), paper)
    title = "Single-encoder multi-modality network"
    row("single_encoder", title, _single_encoder, every, (0.6552, 0.6954, 0.3556))
    title = "Multi-encoder multi-modality network"
    row("multi_encoder", title, _multi_encoder, every, (0.7005, 0.7439, 0.3141))

    # The fusion blocks of the ablation: shared or separate MLPs, and the statistics of the two attentions.
    base = {"shared_mlp": True, "channel_statistics": both, "spatial_statistics": both}
    mlp = {**base, "shared_mlp": False}
    full = {"shared_mlp": False, "channel_statistics": std, "spatial_statistics": std}
    channel, spatial = {**mlp, "channel_statistics": std}, {**mlp, "spatial_statistics": std}
    rows = (
        ("mmfnet_base", "Base MMFNet", base, every, False, (0.7007, 0.7494, 0.3129)),
        ("mmfnet_mlp", "MMFNet + multi-MLP", mlp, every, False, (0.7083, 0.7508, 0.3046)),
        ("mmfnet_mlp_std_channel", "MMFNet + multi-MLP + stdPool (channel attention)", channel, every, False,
         (0.7095, 0.7602, 0.3015)),
        ("mmfnet_mlp_std_spatial", "MMFNet + multi-MLP + stdPool (spatial attention)", spatial, every, False,
         (0.7010, 0.7482, 0.3123)),
        ("mmfnet_mlp_std", "MMFNet + multi-MLP + stdPool", full, every, False, (0.7189, 0.7648, 0.2938)),
        ("mmfnet_base_transfer", "Base MMFNet + self-transfer", base, every, True, (0.7095, 0.7589, 0.3018)),
        ("mmfnet_mlp_transfer", "MMFNet + multi-MLP + self-transfer", mlp, every, True, (0.7128, 0.7659, 0.2971)),
        ("mmfnet_mlp_std_transfer", "MMFNet + multi-MLP + stdPool + self-transfer", full, every, True,
         (0.7191, 0.7721, 0.2907)),
        ("mmfnet_t1_t2", "MMFNet + multi-MLP + stdPool + self-transfer (T1 & T2)", full, ("t1", "t2"), True,
         (0.7098, 0.7598, 0.3026)),
        ("mmfnet_t1_cet1", "MMFNet + multi-MLP + stdPool + self-transfer (T1 & CET1)", full, ("t1", "cet1"), True,
         (0.7034, 0.7542, 0.3079)),
        ("mmfnet_t2_cet1", "MMFNet + multi-MLP + stdPool + self-transfer (T2 & CET1)", full, ("t2", "cet1"), True,
         (0.6943, 0.7372, 0.3189)),
    )  # fmt: skip
    for name, title, block, modalities, transfer, paper in rows:
        row(name, title, build_mmfnet, modalities, paper, encoders=modalities if transfer else (), **block)


_register_rows()
