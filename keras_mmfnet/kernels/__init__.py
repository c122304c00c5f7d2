"""The operations of the layers, and the choice of their implementation.

`reference` implements each operation in plain Keras ops with automatic gradients. The modules named after a backend
have faster implementations of the same operations. The environment variable `MMFNET_KERNELS` (`plain` or `fast`) or
`set_kernels` chooses between them. The default is fast on a CPU and plain on a GPU and on JAX. Choose before a model is
built: a layer that is already traced keeps its implementation.

`axis` is the axis of the channels, -1 or 1.
"""

import functools
import importlib
import os
from collections.abc import Sequence
from typing import Any

import keras

from keras_mmfnet import devices
from keras_mmfnet.kernels import reference

STATISTICS = ("avg", "max", "std")
KERNELS = ("plain", "fast")
_chosen = None


def set_kernels(kernels: str | None) -> None:
    """Sets the implementation for this process.

    Args:
        kernels: `"plain"`, `"fast"`, or `None` for the environment variable or, if it is not set, the default.

    Raises:
        ValueError: `kernels` is none of these.
    """
    global _chosen
    _chosen = kernels if kernels is None else _checked("`kernels`", kernels)


def get_kernels() -> str:
    """Returns the implementation in use, `"plain"` or `"fast"`.

    Raises:
        ValueError: The environment variable `MMFNET_KERNELS` is neither.
    """
    if _chosen:
        return _chosen
    if kernels := os.environ.get("MMFNET_KERNELS"):
        return _checked("the environment variable MMFNET_KERNELS", kernels)
    return "plain" if keras.backend.backend() == "jax" or _on_gpu() else "fast"


def _checked(name, kernels):
    if kernels not in KERNELS:
        raise ValueError(f"{name} must be 'plain' or 'fast'. Received: {kernels!r}")
    return kernels


@functools.cache
def _on_gpu():
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return bool(tf.config.list_logical_devices("GPU"))
    if keras.backend.backend() == "torch":
        import torch

        return torch.cuda.is_available() or torch.backends.mps.is_available()
    return False


def _implementation(name):
    """The function `name` of the backend's module, or of `reference` if there is no faster one."""
    backend = keras.backend.backend()
    if backend in ("tensorflow", "torch") and get_kernels() == "fast":
        module = importlib.import_module(f"{__name__}.{backend}")
        return getattr(module, name, None) or getattr(reference, name)
    return getattr(reference, name)


def check_statistics(statistics: str | Sequence[str]) -> tuple[str, ...]:
    """Returns the names as a tuple; raises `ValueError` unless they are distinct and known."""
    names = (statistics,) if isinstance(statistics, str) else tuple(statistics)
    if not names or len(set(names)) != len(names) or not set(names) <= set(STATISTICS):
        raise ValueError(f"`statistics` must be one or more of {STATISTICS}, each once. Received: {statistics!r}")
    return names


def statistics_over_space(features: Sequence[Any], statistics: Sequence[str], axis: int, training: bool = False) -> Any:
    """Statistics of each channel over depth, height and width (eq. 8-10).

    The standard deviation is that of the population, `sqrt(var + 1e-6)`. Values that tie for the maximum share its
    gradient equally.

    Args:
        features: A list of 5D tensors, to be concatenated along the channels.
        statistics: Names of the statistics, of `STATISTICS`.
        axis: Axis of the channels.
        training: Whether the operation may be compiled. A compiled operation cannot be exported.

    Returns:
        A float32 tensor `(batch, statistics, channels)`.
    """
    return _implementation("statistics_over_space")(features, statistics, axis, training)


def statistics_over_channels(
    features: Sequence[Any], statistics: Sequence[str], axis: int, weights: Any = None, training: bool = False
) -> Any:
    """Statistics of each voxel over the channels of features times `weights` (eq. 11), see `statistics_over_space`.

    Args:
        features: A list of 5D tensors, to be concatenated along the channels.
        statistics: Names of the statistics, of `STATISTICS`.
        axis: Axis of the channels.
        weights: A factor per channel, of size 1 along depth, height and width, or `None`.
        training: Whether the operation may be compiled. A compiled operation cannot be exported.

    Returns:
        A float32 tensor of the features' shape, with the statistics in place of the channels.
    """
    return _implementation("statistics_over_channels")(features, statistics, axis, weights, training)


def weighted_reduction(
    features: Sequence[Any], channel_weights: Any, spatial_weights: Any, kernel: Any, axis: int
) -> Any:
    """The 1x1x1 convolution of `F (1 + W_s W_c)`, where `F` is the features (eq. 6 and 12).

    Args:
        features: A list of 5D tensors, to be concatenated along the channels.
        channel_weights: `W_c`, of size 1 along depth, height and width.
        spatial_weights: `W_s`, with 1 channel.
        kernel: Tensor `(channels, filters)`.
        axis: Axis of the channels.

    Returns:
        A tensor of the features' shape, with `filters` channels.
    """
    return _implementation("weighted_reduction")(features, channel_weights, spatial_weights, kernel, axis)


def batch_norm_relu(
    x: Any,
    gamma: Any,
    beta: Any,
    epsilon: float,
    axis: int,
    moments: tuple[Any, Any] | None = None,
    relu: bool = True,
) -> tuple[Any, Any, Any]:
    """Batch normalization and ReLU.

    Args:
        x: A tensor of any number of axes.
        gamma: Scale of each channel, float32.
        beta: Offset of each channel, float32.
        epsilon: Added to the variance.
        axis: Axis of the channels.
        moments: `(mean, variance)` of each channel; `None` computes them from `x`, over all devices if their batch
            normalization is synchronised.
        relu: `False` leaves ReLU out; only `reference` implements this.

    Returns:
        `(outputs, mean, variance)`: the outputs in the dtype of `x`, and the moments used (population variance),
        in float32 and without a gradient.
    """
    # Only `reference` computes moments over several devices.
    if not relu or (moments is None and devices.synchronises_batch_norm()):
        return reference.batch_norm_relu(x, gamma, beta, epsilon, axis, moments, relu)
    return _implementation("batch_norm_relu")(x, gamma, beta, epsilon, axis, moments)


def instance_norm(x: Any, gamma: Any, beta: Any, epsilon: float, axis: int) -> Any:
    """Instance normalization: each channel of each sample by its own mean and population variance.

    Args:
        x: A tensor of any number of axes, the first of which is the batch.
        gamma: Scale of each channel, float32.
        beta: Offset of each channel, float32.
        epsilon: Added to the variance.
        axis: Axis of the channels.

    Returns:
        A tensor of the shape and dtype of `x`.
    """
    return _implementation("instance_norm")(x, gamma, beta, epsilon, axis)


def conv(
    x: Any, kernel: Any, strides: Sequence[int], padding: str, data_format: str, dilation_rate: Sequence[int]
) -> Any:
    """A convolution, as `keras.ops.conv`."""
    kernel = keras.ops.convert_to_tensor(kernel)
    return _implementation("conv")(x, kernel, strides, padding, data_format, dilation_rate)


def max_pool(x: Any, pool_size: Sequence[int], strides: Sequence[int], padding: str, data_format: str) -> Any:
    """Max-pooling, as `keras.ops.max_pool`."""
    return _implementation("max_pool")(x, pool_size, strides, padding, data_format)
