from keras_mmfnet.cli import _options as options


def evaluate(data: options.Data):
    """TODO."""
