"""Segments one patient with the networks of a run of train_npc.py.

python examples/segment_patient.py --run runs/20260101-120000 --patient DIR --out mask.nii.gz
"""

import argparse
import dataclasses
import math
import os
import sys
from pathlib import Path

# TensorFlow leaves it off on some processors; a step takes a third of the time with it.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import keras
import SimpleITK as sitk

from keras_mmfnet.data import preprocess_case, read_case_folder
from keras_mmfnet.inference import segment_case
from keras_mmfnet.plots import plot_segmentation
from keras_mmfnet.recipe import Recipe


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="output folder of train_npc.py")
    parser.add_argument("--patient", type=Path, required=True, help="folder with the patient's images")
    parser.add_argument("--out", type=Path, required=True, help="file for the mask; must not exist")
    parser.add_argument("--picture", type=Path, help="PNG file for a slice with the contours; must not exist")
    parser.add_argument("--fold", type=int, help="fold whose network is used (default: the first)")
    parsed = parser.parse_args()
    try:
        for path in filter(None, (parsed.out, parsed.picture)):
            if path.exists() or not path.parent.is_dir():
                raise ValueError(f"a new file in a folder that exists is expected. Received: {path}")
        recipe = Recipe.load(parsed.run / "recipe.json")
        fold = "*" if parsed.fold is None else parsed.fold
        networks = sorted(parsed.run.glob(f"fold_{fold}/mmfnet.keras"))
        if not networks:
            raise ValueError(f"--run: a run with a trained fold is expected. Received: {parsed.run}, --fold {fold}")
        files = read_case_folder(parsed.patient, recipe, require_mask=False)
        if not parsed.picture:
            # A mask is of use for the picture only, and a bad one no reason to stop.
            files = dataclasses.replace(files, mask=None)
        case = preprocess_case(files, recipe)
        model = keras.models.load_model(networks[0], compile=False)
        mask, _ = segment_case(model, case, recipe)
        sitk.WriteImage(mask, str(parsed.out), useCompression=True)
        if parsed.picture:
            # In pixels of the patient's own size.
            fine = preprocess_case(files, dataclasses.replace(recipe, spacing=None))
            figure = plot_segmentation(fine.images, fine.grid.resample(mask), fine.mask, fine.spacing, margin=40)
            figure.savefig(parsed.picture, dpi=110)
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    voxels = sitk.GetArrayViewFromImage(mask).sum()
    volume = voxels * math.prod(mask.GetSpacing()) / 1000
    print("\n".join([*case.notes, f"{parsed.out}: {voxels} voxels of tumour, {volume:.1f} ml"]))


if __name__ == "__main__":
    main()
