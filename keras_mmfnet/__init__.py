"""MMFNet for Keras 3: fuses several MRI sequences of one patient into a tumour segmentation."""

from keras_mmfnet.version import __version__

__all__ = ["__version__"]
