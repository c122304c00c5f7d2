from keras_mmfnet.models.mmfnet import MMFNet, MultiEncoderUNet3D
from keras_mmfnet.models.unet import SingleEncoderUNet3D, UNet2D, UNet3D

__all__ = ["MMFNet", "MultiEncoderUNet3D", "SingleEncoderUNet3D", "UNet2D", "UNet3D"]
