from keras_mmfnet.cli import _options as options


def check(data: options.Data):
    """Lists the patients of a folder."""
