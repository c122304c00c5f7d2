"""Segments one patient with the networks of a run, on the grid of the patient's reference modality.

    python examples/segment_patient.py RUN PATIENT mask.nii.gz

Several structures must be given by label values, so that one mask can hold them. The command `mmfnet segment` does the
same for many patients and any structures, and also writes DICOM, probabilities and images.
"""

import math
import os
import sys

# Off by default on some processors; a training step is three times faster with it.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import SimpleITK as sitk

from keras_mmfnet.data import preprocess_case, read_case_folder
from keras_mmfnet.export import write_image
from keras_mmfnet.inference import segment_ensemble
from keras_mmfnet.models import load_network
from keras_mmfnet.run import Run


def main(folder, patient, out):
    run = Run(folder)
    folds = run.trained_folds()
    networks = [load_network(run.network(fold), run.recipe) for fold in folds]
    case = preprocess_case(read_case_folder(patient, run.recipe.data, require_mask=False), run.recipe.data)
    found = segment_ensemble(networks, case, run.recipe, run.postprocessing(folds))
    write_image(found.label_image, out)
    for name, mask in found.masks.items():
        voxels = sitk.GetArrayViewFromImage(mask).sum()
        print(f"{out}: {voxels} voxels of {name}, {voxels * math.prod(mask.GetSpacing()) / 1000:.1f} ml")


if __name__ == "__main__":
    main(*sys.argv[1:])
