"""Segments one patient with the networks of a run of train_npc.py.

    python examples/segment_patient.py --run runs/20260101-120000 --patient DIR --out mask.nii.gz

The folder may be in any layout that the training takes; from DICOM series the contour can go back to a planning system:

    python examples/segment_patient.py --run RUN --patient DIR --out mask.nii.gz --rtstruct contour.dcm
"""

import argparse
import dataclasses
import logging
import math
import os
import sys
from pathlib import Path

# TensorFlow leaves it off on some processors; a step takes a third of the time with it.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import SimpleITK as sitk

from keras_mmfnet.data import preprocess_case, read_case_folder
from keras_mmfnet.data.dicom import Series
from keras_mmfnet.data.image_io import write_image
from keras_mmfnet.export import write_rtstruct, write_segmentation
from keras_mmfnet.inference import segment_ensemble
from keras_mmfnet.models import load_network
from keras_mmfnet.plots import plot_segmentation
from keras_mmfnet.recipe import Recipe


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", type=Path, required=True, help="output folder of train_npc.py")
    add("--patient", type=Path, required=True, help="folder with the patient's images")
    add("--out", type=Path, required=True, help="file for the mask, on the grid of the first sequence")
    add("--rtstruct", type=Path, metavar="FILE", help="DICOM structure set with the contour")
    add("--seg", type=Path, metavar="FILE", help="DICOM segmentation")
    add("--structure", default="tumour", metavar="NAME", help="what it is called in these two")
    add("--probability", type=Path, metavar="FILE", help="image of the probability")
    add("--disagreement", type=Path, metavar="FILE", help="image of the standard deviation over the networks")
    add("--picture", type=Path, metavar="FILE", help="PNG of a slice with the contours")
    add("--fold", nargs="+", type=int, metavar="N", help="folds whose networks are averaged (default: all there are)")
    add("--mirror", action="store_true", help="average with the mirror image")
    add("--gaussian", action="store_true", help="weight the middle of a window more than its rim")
    parsed = parser.parse_args()
    outputs = [parsed.out, parsed.rtstruct, parsed.seg, parsed.probability, parsed.disagreement, parsed.picture]
    for path in filter(None, outputs):
        if path.exists() or not path.parent.is_dir():
            raise ValueError(f"a new file in a folder that exists is expected. Received: {path}")
    return parsed


def find_networks(parsed):
    """The trained networks of the folds wanted."""
    paths = sorted(parsed.run.glob("fold_*/mmfnet.keras"))
    if parsed.fold is not None:
        paths = [parsed.run / f"fold_{number}" / "mmfnet.keras" for number in parsed.fold]
    missing = [path for path in paths if not path.is_file()]
    if missing or not paths:
        raise ValueError(f"--run: a run with trained folds is expected. Received: {parsed.run}, --fold {parsed.fold}")
    return paths


def main():
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        parsed = parse_arguments()
        recipe = Recipe.load(parsed.run / "recipe.json")
        paths = find_networks(parsed)
        files = read_case_folder(parsed.patient, recipe.data, require_mask=False)
        if not parsed.picture:
            # A mask is of use for the picture only, and a bad one no reason to stop.
            files = dataclasses.replace(files, mask=None)
        series = next(iter(files.images.values()))
        if (parsed.rtstruct or parsed.seg) and not isinstance(series, Series):
            raise ValueError(f"--rtstruct, --seg: DICOM series are expected as the patient. Received: {series}")
        case = preprocess_case(files, recipe.data)
        for note in case.notes:
            print(note)
        networks = [load_network(path, recipe) for path in paths]
        mask, probability, disagreement = segment_ensemble(
            networks, case, recipe, mirror=parsed.mirror, gaussian=parsed.gaussian
        )
        for image, path in ((mask, parsed.out), (probability, parsed.probability), (disagreement, parsed.disagreement)):
            if path:
                write_image(image, path)
        if parsed.rtstruct:
            write_rtstruct(mask, series, parsed.rtstruct, parsed.structure)
        if parsed.seg:
            write_segmentation(mask, series, parsed.seg, parsed.structure)
        if parsed.picture:
            # In pixels of the patient's own size.
            fine = preprocess_case(files, recipe.replace({"data.spacing": None}).data)
            figure = plot_segmentation(fine.images, fine.grid.resample(mask), fine.mask, fine.spacing, margin=40)
            figure.savefig(parsed.picture, dpi=110)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        sys.exit(f"error: {error}")
    voxels = sitk.GetArrayViewFromImage(mask).sum()
    volume = voxels * math.prod(mask.GetSpacing()) / 1000
    print(f"{parsed.out}: {voxels} voxels of tumour, {volume:.1f} ml")


if __name__ == "__main__":
    main()
