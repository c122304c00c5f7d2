from keras_mmfnet.layers.batch_norm_relu import BatchNormReLU
from keras_mmfnet.layers.instance_norm_relu import InstanceNormReLU


def norm_relu(normalization, axis, relu=True, **options):
    """The layer of a `normalization`, `"batch"` or `"instance"`, with the numbers of this package."""
    if normalization not in ("batch", "instance"):
        raise ValueError(f"`normalization` must be 'batch' or 'instance'. Received: {normalization!r}")
    if normalization == "instance":
        return InstanceNormReLU(axis, epsilon=1e-5, relu=relu, **options)
    return BatchNormReLU(axis, momentum=0.9, epsilon=1e-5, relu=relu, **options)
