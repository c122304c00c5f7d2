import keras_mmfnet._backend  # noqa: F401  # isort: skip
from keras_mmfnet.layers.batch_norm_relu import BatchNormReLU
from keras_mmfnet.layers.channel_attention import ChannelStdAttention3D
from keras_mmfnet.layers.fusion_block import FusionBlock3D
from keras_mmfnet.layers.instance_norm_relu import InstanceNormReLU
from keras_mmfnet.layers.residual_fusion import ResidualFusion3D
from keras_mmfnet.layers.spatial_attention import SpatialStdAttention3D

__all__ = [
    "BatchNormReLU",
    "ChannelStdAttention3D",
    "FusionBlock3D",
    "InstanceNormReLU",
    "ResidualFusion3D",
    "SpatialStdAttention3D",
]
