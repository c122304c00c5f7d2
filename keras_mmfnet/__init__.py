"""MMFNet for Keras 3: fuses several MRI sequences of one patient into a tumour segmentation."""

from keras_mmfnet import layers, losses, metrics, models, recipe
from keras_mmfnet.version import __version__

__all__ = ["__version__", "layers", "losses", "metrics", "models", "recipe"]
