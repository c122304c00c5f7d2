import keras_mmfnet._backend  # noqa: F401  # isort: skip
from keras_mmfnet.layers.channel_std_attention_3d import ChannelStdAttention3D
from keras_mmfnet.layers.fusion_block_3d import FusionBlock3D
from keras_mmfnet.layers.residual_fusion_3d import ResidualFusion3D
from keras_mmfnet.layers.spatial_std_attention_3d import SpatialStdAttention3D

__all__ = ["ChannelStdAttention3D", "FusionBlock3D", "ResidualFusion3D", "SpatialStdAttention3D"]
