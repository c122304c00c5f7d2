"""The registry of methods: the rows of the paper's Tables I and II, and methods of your own."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
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
        title: Name shown in tables.
        build: Function `build(recipe, dtype, encoders)` that returns the untrained network. `dtype` is a dtype policy;
            `encoders` is `{modality: pretrained network}` or `None`. The network is a `keras.Model` from
            `{modality: (batch, depth, height, width, 1)}` to probabilities `(batch, depth, height, width, structures)`,
            or a classifier of 2D patches.
        changes: The fields of the recipe that this method changes, `{path: value}`, such as `data.modalities`.
        encoders: `{modality: name of the method whose encoder is copied}`; empty without self-transfer.
        samples: The training samples: `"volumes"` for 3D patches and their masks, `"centres"` for 2D patches and the
            class of their centre pixel.
        paper: The paper's `dsc`, `ap` and `dice_loss`, if it reports this method.
        train: Replaces `build` for a network of another library. `train(method, training, validation, recipe, folder)`
            returns `(predict, parameters, history)`: a callable for `predict_volume`, the number of weights, and a
            dict of metrics per epoch.
        library: The package that `train` computes with; its version is saved with the results.
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
        """Returns the recipe with the changes of this method."""
        kept = (None, "union", "intersection", *self.changes.get("data.modalities", recipe.data.modalities))
        # The mask is the patient's, whatever a method takes.
        mask = {} if recipe.data.mask_from in kept else {"data.mask_from": None}
        return recipe.replace({**self.changes, **mask})

    def serves(self, images: Iterable[str], recipe: Recipe) -> bool:
        """Whether a patient with images of these modalities has one that the method takes."""
        return not set(self.changes.get("data.modalities", recipe.data.modalities)).isdisjoint(images)

    def over_volumes(self, network: keras.Model, recipe: Recipe) -> keras.Model:
        """Returns the trained network as one that `predict_volume` can call."""
        return SliceWise3D(network, recipe.patches.shape) if self.samples == "centres" else network


METHODS: dict[str, Method] = {}
# Prefix of the names of the single-modality networks of self-transfer.
_SINGLE = "unet3d_"


def register_method(method: Method) -> Method:
    """Adds a method to `METHODS`.

    Args:
        method: A `Method`.

    Returns:
        The method.

    Raises:
        ValueError: The name is already registered, or a method in `encoders` is not.
    """
    if method.name in METHODS:
        raise ValueError(f"a method's name must be new. Received: {method.name!r}")
    unknown = sorted(set(method.encoders.values()) - set(METHODS))
    if unknown:
        raise ValueError(f"`encoders` must name registered methods. Received: {unknown}")
    METHODS[method.name] = method
    return method


def method_of(recipe: Recipe) -> Method:
    """Returns the MMFNet of a recipe as a method, with self-transfer if `training.self_transfer` is set.

    Args:
        recipe: The `Recipe`.

    Returns:
        A `Method` over the recipe's modalities. It is not registered.

    Raises:
        ValueError: The recipe has one modality.
    """
    if len(recipe.data.modalities) < 2:
        [name] = recipe.data.modalities
        raise ValueError(
            "`data.modalities` must name two or more for MMFNet, which fuses them; a network of one alone is the class "
            f"UNet3D. Received: {name}"
        )
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
    recipe: Recipe, dtype: str, encoders: Mapping[str, keras.Model | str | PathLike | None] | None = None
) -> MMFNet:
    """Builds the MMFNet of a recipe.

    Args:
        recipe: The `Recipe`.
        dtype: Dtype policy of the layers.
        encoders: Pretrained encoders, as for `MMFNet.from_pretrained_encoders`, or `None`.

    Returns:
        The `MMFNet`.
    """
    settings = {
        "modalities": recipe.data.modalities,
        "patch_shape": recipe.patches.shape,
        **recipe.network.model_dump(),
        **_outputs(recipe, dtype),
    }
    return MMFNet.from_pretrained_encoders(encoders, **settings) if encoders else MMFNet(**settings)


def _outputs(recipe, dtype):
    """The arguments that every network has: what its channels are, and its dtype policy."""
    return {"structures": recipe.data.structure_names, "exclusive": recipe.data.exclusive, "dtype": dtype}


def _levels(recipe, dtype):
    """The arguments that every encoder-decoder network has."""
    fields = {"filters", "strides", "kernel_sizes", "normalization", "residual", "deep_supervision"}
    return recipe.network.model_dump(include=fields) | _outputs(recipe, dtype)


def _over_all(network):
    """A `build` function for a class of networks over all modalities."""

    def build(recipe, dtype, encoders=None):
        return network(recipe.data.modalities, recipe.patches.shape, **_levels(recipe, dtype))

    return build


def _unet3d(recipe, dtype, encoders=None):
    return UNet3D(recipe.data.modalities[0], recipe.patches.shape, **_levels(recipe, dtype))


def _unet2d(recipe, dtype, encoders=None):
    arguments = _levels(recipe, dtype)
    for name in ("strides", "kernel_sizes"):
        arguments[name] = arguments[name] and [level[1:] for level in arguments[name]]
    network = UNet2D(recipe.data.modalities[0], recipe.patches.shape[1:], **arguments)
    return SliceWise3D(network, recipe.patches.shape)


def _patch_cnn(recipe, dtype, encoders=None):
    return PatchCNN(recipe.data.modalities[0], **_outputs(recipe, dtype))


def _siamese_patch_cnn(recipe, dtype, encoders=None):
    return SiamesePatchCNN(recipe.data.modalities, **_outputs(recipe, dtype))


# fmt: off
def _register_rows():
    """Registers the rows of Tables I and II in their order, with the paper's DSC, AP and Dice loss."""

    def row(name, title, build, modalities, paper, samples="volumes", transfer=False, **network):
        changes = {"data.modalities": modalities, **{f"network.{field}": value for field, value in network.items()}}
        encoders = {modality: f"{_SINGLE}{modality}" for modality in modalities} if transfer else {}
        paper = dict(zip(("dsc", "ap", "dice_loss"), paper, strict=True))
        register_method(Method(name, title, build, changes, encoders, samples, paper))

    def single(name, title, build, t1, t2, cet1, samples="volumes"):
        for modality, paper in {"t1": t1, "t2": t2, "cet1": cet1}.items():
            row(f"{name}_{modality}", f"{title} ({modality.upper()})", build, (modality,), paper, samples)

    every, both, std = ("t1", "t2", "cet1"), ("avg", "max"), ("avg", "max", "std")
    single("patch_cnn", "Patch-based CNN", _patch_cnn, (0.5195, 0.5320, 0.4818), (0.4939, 0.4984, 0.5074),
           (0.5693, 0.5828, 0.4314), "centres")
    row("siamese_patch_cnn", "Multi-modality patch-based CNN", _siamese_patch_cnn, every, (0.6083, 0.6307, 0.3930),
        "centres")
    single("unet2d", "U-net", _unet2d, (0.5895, 0.6169, 0.4119), (0.5589, 0.5777, 0.4422), (0.6012, 0.6142, 0.3995))
    single("unet3d", "3D U-net", _unet3d, (0.6817, 0.7202, 0.3361), (0.6589, 0.6920, 0.3610), (0.6222, 0.6456, 0.3921))
    row("single_encoder", "Single-encoder multi-modality network", _over_all(SingleEncoderUNet3D), every,
        (0.6552, 0.6954, 0.3556))
    row("multi_encoder", "Multi-encoder multi-modality network", _over_all(MultiEncoderUNet3D), every,
        (0.7005, 0.7439, 0.3141))
    # The ablation of the fusion block: (shared MLP, statistics of the channel attention, of the spatial attention).
    base, mlp, full = (True, both, both), (False, both, both), (False, std, std)
    for name, title, block, modalities, transfer, paper in (
        ("base", "Base MMFNet", base, every, False, (0.7007, 0.7494, 0.3129)),
        ("mlp", "MMFNet + multi-MLP", mlp, every, False, (0.7083, 0.7508, 0.3046)),
        ("mlp_std_channel", "MMFNet + multi-MLP + stdPool (channel attention)", (False, std, both), every, False,
         (0.7095, 0.7602, 0.3015)),
        ("mlp_std_spatial", "MMFNet + multi-MLP + stdPool (spatial attention)", (False, both, std), every, False,
         (0.7010, 0.7482, 0.3123)),
        ("mlp_std", "MMFNet + multi-MLP + stdPool", full, every, False, (0.7189, 0.7648, 0.2938)),
        ("base_transfer", "Base MMFNet + self-transfer", base, every, True, (0.7095, 0.7589, 0.3018)),
        ("mlp_transfer", "MMFNet + multi-MLP + self-transfer", mlp, every, True, (0.7128, 0.7659, 0.2971)),
        ("mlp_std_transfer", "MMFNet + multi-MLP + stdPool + self-transfer", full, every, True,
         (0.7191, 0.7721, 0.2907)),
        ("t1_t2", "MMFNet + multi-MLP + stdPool + self-transfer (T1 & T2)", full, ("t1", "t2"), True,
         (0.7098, 0.7598, 0.3026)),
        ("t1_cet1", "MMFNet + multi-MLP + stdPool + self-transfer (T1 & CET1)", full, ("t1", "cet1"), True,
         (0.7034, 0.7542, 0.3079)),
        ("t2_cet1", "MMFNet + multi-MLP + stdPool + self-transfer (T2 & CET1)", full, ("t2", "cet1"), True,
         (0.6943, 0.7372, 0.3189)),
    ):
        shared, channel, spatial = block
        row(f"mmfnet_{name}", title, build_mmfnet, modalities, paper, transfer=transfer, shared_mlp=shared,
            channel_statistics=channel, spatial_statistics=spatial)


# fmt: on
_register_rows()
