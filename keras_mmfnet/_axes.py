"""Shapes of batches in both data formats."""

import keras


def standardize(data_format):
    """Returns `data_format`, or Keras' setting for `None`; raises `ValueError` if it is unknown."""
    if data_format is None:
        return keras.config.image_data_format()
    if data_format not in ("channels_last", "channels_first"):
        raise ValueError(f"`data_format` must be 'channels_last' or 'channels_first'. Received: {data_format!r}")
    return data_format


def channel_axis(data_format):
    """The axis of the channels in a batch."""
    return -1 if data_format == "channels_last" else 1


def with_channels(shape, channels, data_format):
    """The shape of a batch with another number of channels."""
    shape = list(shape)
    shape[channel_axis(data_format)] = channels
    return tuple(shape)


def output_spec(layer, shapes, return_all):
    """The symbolic outputs of a layer: one of each shape, or only the first one."""
    specs = tuple(keras.KerasTensor(shape, dtype=layer.compute_dtype) for shape in shapes)
    return specs if return_all else specs[0]
