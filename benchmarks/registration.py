"""Measures the time and the accuracy of the registration of two images of a patient.

    python benchmarks/registration.py --patient DIR --modality t2

The patient has an image of t1 and one of the modality, which are aligned. Before each registration, the second one is
displaced by a known rigid transform.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from machine import machine, report

from keras_mmfnet.data import read_case_folder
from keras_mmfnet.data.image_io import read_image
from keras_mmfnet.data.registration import RigidTransform, apply_transform, register_rigid
from keras_mmfnet.recipe import Recipe

RESULTS = Path(__file__).parent / "results" / "registration"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patient", type=Path, required=True, help="folder with the patient's images")
    parser.add_argument("--modality", default="t2", metavar="NAME", help="the image that is displaced (t2)")
    parser.add_argument("--turns", type=int, default=5, help="registrations (5)")
    parsed = parser.parse_args()
    recipe = Recipe().replace({"data.modalities": ("t1", parsed.modality)})
    files = read_case_folder(parsed.patient, recipe.data, require_mask=False)
    fixed, moving = (read_image(files.images[name], files.name, sitk.sitkFloat32) for name in recipe.data.modalities)
    size = np.array(fixed.GetSize()) - 1.0
    # The middle, and halfway from it to the corners: inside the head.
    places = [fixed.TransformContinuousIndexToPhysicalPoint((size * share).tolist()) for share in np.ndindex(2, 2, 2)]
    centre = fixed.TransformContinuousIndexToPhysicalPoint((size / 2).tolist())
    places = [(np.add(place, centre) / 2).tolist() for place in [*places, centre]]

    start = register_rigid(fixed, moving)[0].to_sitk()
    rng, seconds, errors = np.random.default_rng(0), [], []
    for _ in range(parsed.turns):
        transform = RigidTransform(tuple(rng.uniform(-0.15, 0.15, 3)), tuple(rng.uniform(-10, 10, 3)), centre).to_sitk()
        back = sitk.Euler3DTransform(transform.GetInverse())
        shifted = apply_transform(
            moving, RigidTransform(back.GetParameters()[:3], back.GetParameters()[3:], back.GetCenter())
        )
        begin = time.perf_counter()
        found = register_rigid(fixed, shifted)[0].to_sitk()
        seconds.append(time.perf_counter() - begin)
        wanted = [transform.TransformPoint(start.TransformPoint(place)) for place in places]
        errors.append(
            max(np.linalg.norm(np.subtract(found.TransformPoint(p), w)) for p, w in zip(places, wanted, strict=True))
        )
    result = {
        "machine": machine("SimpleITK"),
        "voxels": {
            name: list(image.GetSize()) for name, image in zip(recipe.data.modalities, (fixed, moving), strict=True)
        },
        "turns": parsed.turns,
        "seconds": round(statistics.median(seconds), 2),
        "largest_error_mm": round(float(max(errors)), 3),
    }
    report(result, RESULTS / f"{parsed.patient.resolve().name}_{parsed.modality}.json")


if __name__ == "__main__":
    main()
