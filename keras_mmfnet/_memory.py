import ctypes
import functools
import platform

import keras

# From glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


@functools.cache
def keep_freed_memory():
    """Lets the C library keep what one step frees for the next, where PyTorch computes on a processor and Linux.

    It would give every large tensor back to the system and ask for it anew, and the system clears each page of it
    again, which takes longer than most operations on the tensor. TensorFlow and JAX keep theirs by themselves.

    Returns:
        Whether it does so from now on.
    """
    if keras.backend.backend() != "torch" or platform.libc_ver()[0] != "glibc":
        return False
    import torch

    if torch.cuda.is_available():
        return False
    set_option = ctypes.CDLL(None).mallopt
    # -1 stands for never; 1 is success.
    return all([set_option(_MMAP_MAX, 0), set_option(_TRIM_THRESHOLD, -1), set_option(_TOP_PAD, 2**28)])
