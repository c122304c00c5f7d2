"""Trains a small classifier with an attention layer of this package on random volumes.

python examples/reuse_layers.py
"""

import keras
import numpy as np

from keras_mmfnet.layers import ChannelStdAttention3D


def make_volumes(count, seed):
    """Volumes of noise; those with label 1 have a larger standard deviation."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    scale = np.where(labels, 1.6, 1.0).reshape(-1, 1, 1, 1, 1)
    return (rng.normal(size=(count, 8, 16, 16, 1)) * scale).astype("float32"), labels


def main():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 16, 16, 1))
    x = keras.layers.Conv3D(8, 3, padding="same", activation="relu")(inputs)
    x = ChannelStdAttention3D(reduction=2)(x)
    x = keras.layers.GlobalAveragePooling3D()(x)
    model = keras.Model(inputs, keras.layers.Dense(1, activation="sigmoid")(x))
    model.compile(keras.optimizers.Adam(0.02), loss="binary_crossentropy", metrics=["accuracy"])

    volumes, labels = make_volumes(128, seed=1)
    unseen = make_volumes(64, seed=2)
    before = model.evaluate(*unseen, verbose=0)[1]
    model.fit(volumes, labels, batch_size=16, epochs=8, verbose=2)
    after = model.evaluate(*unseen, verbose=0)[1]
    print(f"accuracy on unseen volumes: {before:.2f} before, {after:.2f} after")


if __name__ == "__main__":
    main()
