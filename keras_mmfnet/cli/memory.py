import ctypes
import functools
import platform

import keras

# From glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


@functools.cache
def keep_freed_memory() -> bool:
    """Lets the C library keep what one step frees for the next, for PyTorch on a CPU under Linux.

    Otherwise every large tensor is returned to the system and requested again, and the system clears its pages, which
    takes longer than most operations on the tensor. TensorFlow and JAX have allocators of their own. The command
    `mmfnet` calls this by itself; a training loop of one's own may call it before the first step.

    Returns:
        Whether the C library does so, until the end of the process.
    """
    if keras.backend.backend() != "torch" or platform.libc_ver()[0] != "glibc":
        return False
    import torch

    if torch.cuda.is_available():
        return False
    set_option = ctypes.CDLL(None).mallopt
    # -1 stands for never; 1 is success.
    return all([set_option(_MMAP_MAX, 0), set_option(_TRIM_THRESHOLD, -1), set_option(_TOP_PAD, 2**28)])
