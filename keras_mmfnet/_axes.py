"""Where the channels are: the one place that knows what `channels_first` means."""

import keras


def standardize(data_format):
    """The layout meant by `data_format`, with `None` for Keras' own setting."""
    if data_format is None:
        return keras.config.image_data_format()
    if data_format not in ("channels_last", "channels_first"):
        raise ValueError(f"`data_format` must be 'channels_last' or 'channels_first'. Received: {data_format!r}")
    return data_format


def channel_axis(data_format):
    """Axis of the channels in a batch."""
    return -1 if data_format == "channels_last" else 1


def with_channels(shape, channels, data_format):
    """A batch's shape with another number of channels."""
    shape = list(shape)
    shape[channel_axis(data_format)] = channels
    return tuple(shape)
