"""Another method for mmfnet compare (--import): self-transfer without lowering the learning rate."""

import dataclasses

from keras_mmfnet.methods import METHODS, register_method

METHOD = METHODS["mmfnet_mlp_std_transfer"]

register_method(
    dataclasses.replace(
        METHOD,
        name="mmfnet_transfer_fast",
        title=f"{METHOD.title}, rate 0.01 throughout",
        changes={**METHOD.changes, "training.learning_rate": 1e-2},
    )
)
