from keras_mmfnet.cli import _options as options


def explain(data: options.Data):
    """TODO."""
