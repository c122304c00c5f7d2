import keras
import numpy as np
import pytest

from keras_mmfnet import _precision
from keras_mmfnet.losses import DiceLoss
from keras_mmfnet.metrics import DiceScore
from keras_mmfnet.models import MMFNet

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_precision._gpu_capability() is None, reason="the backend has no GPU"),
]


@pytest.mark.parametrize("mixed_precision", ["auto", "off", "float16", "bfloat16"])
def test_training_in_mixed_precision(mixed_precision):
    keras.utils.set_random_seed(0)
    model = MMFNet(patch_shape=(16, 32, 32), dtype=_precision.dtype_policy(mixed_precision))
    model.compile(keras.optimizers.Adam(1e-2), DiceLoss(), metrics=[DiceScore()])
    rng = np.random.default_rng(0)
    mask = np.zeros((4, 16, 32, 32, 1), np.uint8)
    mask[:, 4:12, 8:24, 8:24] = 1
    images = {name: mask + rng.normal(0, 0.1, mask.shape).astype("float32") for name in model.modalities}
    losses = model.fit(images, mask, batch_size=2, epochs=15, verbose=0).history["loss"]
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.7 * losses[0]
