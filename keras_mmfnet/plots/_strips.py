"""The slices of each test patient about the tumour, encoded to fit in one page together."""

import functools
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from matplotlib.image import imsave

from keras_mmfnet._parallel import map_patients
from keras_mmfnet.data.case import PreprocessedCase
from keras_mmfnet.inference import read_segmentation
from keras_mmfnet.plots.slices import slice_strips

# Of all strips together, which gives a page of about 5 MB; of many patients 24 kB each, up to a page of about 17 MB.
_BYTES, _OF_A_PATIENT, _MOST_BYTES = 3_300_000, 24_000, 12_000_000
# Pixels of a slice's side; and to how few slices their number is reduced, even if they take more bytes.
_SMALLEST, _LARGEST, _FEWEST = 72, 200, 4


def encoded_strips(
    patients: Sequence[tuple[PreprocessedCase, Mapping[str | None, Path]]], structures: Mapping[str, Any]
) -> Iterator[dict]:
    """What `slice_strips` draws of each patient.

    Args:
        patients: Each patient and the files of its predicted masks, as from `Run.masks`.
        structures: `DataRecipe.structures`.

    Yields:
        A dict: the JPEG `strip` and the PNG `marks`, the numbers of the `slices`, which of them has the largest masks
        (`start`), the `width` and the `height` of a slice of all modalities, and the `depth` of the volume.
    """
    total = max(_BYTES, min(_MOST_BYTES, _OF_A_PATIENT * len(patients)))
    draw = functools.partial(_encoded, structures=structures, most_bytes=total / max(len(patients), 1))
    return map_patients(draw, patients, [patient.name for patient, _ in patients], "drawing the slices")


def _encoded(pair, structures, most_bytes):
    patient, files = pair
    predicted = {
        name: patient.grid.resample(sitk.Cast(mask, sitk.sitkFloat32)) >= 0.5
        for name, mask in read_segmentation(files, structures).items()
    }

    def draw(side, most=64):
        strip, marks, numbers = slice_strips(
            patient.images, predicted, patient.masks, patient.spacing, side=side, most=most
        )
        jpeg, png = io.BytesIO(), io.BytesIO()
        imsave(jpeg, strip, format="jpeg", pil_kwargs={"quality": 65})
        imsave(png, marks, format="png", pil_kwargs={"optimize": True})
        return strip, jpeg, png, numbers

    drawn = draw(_SMALLEST)
    share = most_bytes / _size(drawn)
    if share < 1:
        slices = len(drawn[-1])
        drawn = draw(_SMALLEST, max(_FEWEST, int(share * slices))) if slices > _FEWEST else drawn
    else:
        side = min(_LARGEST, _SMALLEST * share**0.6)  # the bytes grow a bit less than the area, as a rule
        while side > _SMALLEST and _size(larger := draw(round(side))) > most_bytes:
            side *= 0.9
        drawn = larger if side > _SMALLEST else drawn
    strip, jpeg, png, numbers = drawn
    anything = np.any([*predicted.values(), patient.mask > 0], axis=0)
    return {
        "strip": jpeg,
        "marks": png,
        "slices": numbers,
        "start": int(np.count_nonzero(anything[numbers], axis=(1, 2)).argmax()),
        "depth": patient.shape[0],
        "width": strip.shape[1],
        "height": strip.shape[0] // len(numbers),
    }


def _size(drawn):
    """Bytes of the two images."""
    _, jpeg, png, _ = drawn
    return len(jpeg.getvalue()) + len(png.getvalue())
