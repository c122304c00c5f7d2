"""The dtype policy of a training."""

import keras


def dtype_policy(mixed_precision: str = "auto") -> str:
    """Returns the dtype policy for a recipe's `mixed_precision`.

    `"auto"` is bfloat16 on a GPU of compute capability 8 or more, float16 on an older GPU and float32 without a GPU.

    Args:
        mixed_precision: `"auto"`, `"off"`, `"float16"` or `"bfloat16"`.

    Returns:
        `"float32"`, `"mixed_float16"` or `"mixed_bfloat16"`.

    Raises:
        ValueError: The value is unknown, or TensorFlow cannot train in this precision on a CPU.
    """
    if mixed_precision not in ("auto", "off", "float16", "bfloat16"):
        raise ValueError(
            f"`mixed_precision` must be 'auto', 'off', 'float16' or 'bfloat16'. Received: {mixed_precision!r}"
        )
    if mixed_precision == "off":
        return "float32"
    capability = _gpu_capability()
    if mixed_precision == "auto":
        if capability is None:
            return "float32"
        return "mixed_bfloat16" if capability >= 8 else "mixed_float16"
    if capability is None and keras.backend.backend() == "tensorflow":
        raise ValueError(
            "`mixed_precision` must be 'auto' or 'off' on TensorFlow without a GPU, which has no 3D pooling in float16 "
            "and, without XLA, wrong gradients of 3D convolutions in bfloat16. Received: "
            f"{mixed_precision!r}"
        )
    return f"mixed_{mixed_precision}"


def _gpu_capability() -> float | None:
    """The compute capability of the backend's first GPU; `None` without a GPU."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        gpus = tf.config.list_physical_devices("GPU")
        if not gpus:
            return None
        major, minor = tf.config.experimental.get_device_details(gpus[0]).get("compute_capability", (0, 0))
        return major + minor / 10
    if backend == "torch":
        import torch

        if not torch.cuda.is_available():
            return None
        major, minor = torch.cuda.get_device_capability()
        return major + minor / 10
    import jax

    device = jax.devices()[0]
    return float(device.compute_capability) if device.platform == "gpu" else None
