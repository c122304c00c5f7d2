"""Where the voxels of patients are while patches are made of them: in memory, or in the files of the cache."""

import functools
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from keras_mmfnet.data.case import PreprocessedCase
from keras_mmfnet.data.windows import crop


class Voxels:
    """The images and masks of patients, their slices one after another, as an array that boxes are cropped from.

    The values are the same whether the array is in memory (float16) or each box is read from the patients' arrays,
    which should then be memory-mapped.

    Args:
        cases: `PreprocessedCase`s with a mask.
        modalities: Names of the modalities, whose channels come first; then those of the structures.
        corners: The first voxel of each patient `(z, y, x)` that the array holds; negative before the patient's own.
        slices: Slices of each patient.
        plane: `(height, width)` of the array.
        slices_first: Whether boxes are `(depth, height, width, channels)`, or `(height, width, depth, channels)`, in
            which all slices of a pixel are contiguous.
        memory: Bytes that the array may take; if it is larger, it is not in memory.

    Attributes:
        tops: The first slice of each patient in the array.
        volume: The array, or `None` if it is not in memory.
    """

    def __init__(
        self,
        cases: Sequence[PreprocessedCase],
        modalities: Sequence[str],
        corners: Sequence[Sequence[int]],
        slices: np.ndarray,
        plane: Sequence[int],
        slices_first: bool,
        memory: float,
    ):
        self.cases, self.modalities, self.corners, self.slices_first = cases, modalities, corners, slices_first
        self.tops = np.cumsum(slices) - slices
        self.channels = len(modalities) + len(cases[0].masks)
        self.shape = (int(slices.sum()), *map(int, plane))
        self.background = functools.cache(self._background)
        self.volume = None
        if 2 * np.prod(self.shape, dtype=np.int64) * self.channels <= memory:
            depth, height, width = self.shape
            volume = np.empty((depth, height, width, self.channels), np.float16)
            if not slices_first:
                volume = np.empty((height, width, depth, self.channels), np.float16).transpose(2, 0, 1, 3)
            for patient, (top, count) in enumerate(zip(self.tops, slices, strict=True)):
                self._fill(volume[top : top + count], patient, corners[patient])
            self.volume = tf.constant(volume if slices_first else volume.transpose(1, 2, 0, 3))

    def crop(self, patient: tf.Tensor, start: tf.Tensor, shape: Sequence[int]) -> tf.Tensor:
        """Crops a box that lies within the array.

        Args:
            patient: Number of the patient, beyond whose slices the values are of no meaning.
            start: First voxel `(z, y, x)` in the array, int32.
            shape: `(depth, height, width)` of the box.

        Returns:
            Float16, in the order of `slices_first`.
        """
        order = (0, 1, 2) if self.slices_first else (1, 2, 0)
        if self.volume is not None:
            box = self.volume[tuple(slice(start[axis], start[axis] + shape[axis]) for axis in order)]
        else:
            box = tf.numpy_function(functools.partial(self._read, shape=tuple(shape)), [patient, start], tf.float16)
        return tf.ensure_shape(box, (*(shape[axis] for axis in order), self.channels))

    def around(self, patient: tf.Tensor, middle: tf.Tensor, shape: Sequence[int]) -> tuple[tf.Tensor, tf.Tensor]:
        """A box about a voxel, of this shape or larger, as far as the array goes; and its first voxel in the array.

        Args:
            patient: Number of the patient, beyond whose slices the values are of no meaning.
            middle: The voxel `(z, y, x)` in the array, int32.
            shape: `(depth, height, width)` of the box.

        Returns:
            Float16 `(depth, height, width, channels)` and int32 `(3,)`.
        """
        if self.volume is not None:
            return self.volume, tf.zeros(3, tf.int32)
        shape = np.minimum(shape, self.shape)
        start = tf.clip_by_value(middle - shape // 2, 0, np.subtract(self.shape, shape))
        return self.crop(patient, start, shape.tolist()), start

    def _read(self, patient, start, shape):
        """A box as a NumPy array; its start is in the whole array."""
        depth, height, width = shape
        box = np.empty((depth, height, width, self.channels), np.float16)
        self._fill(box, int(patient), np.subtract(start, (self.tops[patient], 0, 0)) + self.corners[patient])
        return box if self.slices_first else np.ascontiguousarray(box.transpose(1, 2, 0, 3))

    def _fill(self, box, patient, start):
        """Fills a box `(depth, height, width, channels)` from a voxel of the patient on."""
        inside = all(0 <= a <= n - b for a, b, n in zip(start, box.shape[:3], self.cases[patient].shape, strict=True))
        for channel, array in enumerate(self._arrays(patient)):
            fill = 0 if inside else self.background(patient, channel)
            box[..., channel] = crop(array, start, box.shape[:3], fill)

    def _arrays(self, patient):
        case = self.cases[patient]
        return [*case.images_of(self.modalities).values(), *case.masks.values()]

    def _background(self, patient, channel):
        """The value outside of a patient's image."""
        return self._arrays(patient)[channel].min() if channel < len(self.modalities) else 0
