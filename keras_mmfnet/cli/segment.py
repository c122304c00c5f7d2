from keras_mmfnet.cli import _options as options


def segment(data: options.Data):
    """TODO."""
