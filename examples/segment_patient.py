"""Segments one patient with the networks of a run of train_npc.py.

python examples/segment_patient.py --run runs/20260101-120000 --patient DIR --out mask.nii.gz
"""

import argparse
import math
import sys
from pathlib import Path

import keras
import SimpleITK as sitk

from keras_mmfnet.data import preprocess_case, read_case_folder
from keras_mmfnet.inference import segment_case
from keras_mmfnet.recipe import Recipe


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="output folder of train_npc.py")
    parser.add_argument("--patient", type=Path, required=True, help="folder with the patient's images")
    parser.add_argument("--out", type=Path, required=True, help="file for the mask; must not exist")
    parser.add_argument("--fold", type=int, help="fold whose network is used (default: the first)")
    parsed = parser.parse_args()
    try:
        if parsed.out.exists():
            raise ValueError(f"--out: a file that does not exist is expected. Received: {parsed.out}")
        recipe = Recipe.load(parsed.run / "recipe.json")
        fold = "*" if parsed.fold is None else parsed.fold
        networks = sorted(parsed.run.glob(f"fold_{fold}/mmfnet.keras"))
        if not networks:
            raise ValueError(f"--run: a run with a trained fold is expected. Received: {parsed.run}, --fold {fold}")
        case = preprocess_case(read_case_folder(parsed.patient, recipe, require_mask=False), recipe)
        model = keras.models.load_model(networks[0], compile=False)
        mask, _ = segment_case(model, case, recipe)
        sitk.WriteImage(mask, str(parsed.out), useCompression=True)
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    voxels = sitk.GetArrayViewFromImage(mask).sum()
    volume = voxels * math.prod(mask.GetSpacing()) / 1000
    print("\n".join([*case.notes, f"{parsed.out}: {voxels} voxels of tumour, {volume:.1f} ml"]))


if __name__ == "__main__":
    main()
