from keras_mmfnet.cli import _options as options


def compare(data: options.Data):
    """TODO."""
