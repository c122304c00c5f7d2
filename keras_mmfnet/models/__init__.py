import keras_mmfnet._backend  # noqa: F401  # isort: skip
from keras_mmfnet.models._network import load_network
from keras_mmfnet.models.mmfnet import MMFNet, MultiEncoderUNet3D
from keras_mmfnet.models.patch_cnn import PatchCNN, SiamesePatchCNN
from keras_mmfnet.models.slice_wise_3d import SliceWise3D
from keras_mmfnet.models.unet import SingleEncoderUNet3D, UNet2D, UNet3D

__all__ = [
    "MMFNet",
    "MultiEncoderUNet3D",
    "PatchCNN",
    "SiamesePatchCNN",
    "SingleEncoderUNet3D",
    "SliceWise3D",
    "UNet2D",
    "UNet3D",
    "load_network",
]
