"""Segments a patient with onnxruntime, without Keras and its backends.

Export a network of a run once, on the TensorFlow backend:

    mmfnet export run --out network.onnx

Then, on any machine with onnxruntime:

    python examples/serve_onnx.py --network network.onnx --recipe run/recipe.json --patient DIR --out mask.nii.gz
"""

import argparse
import sys
from pathlib import Path

import onnxruntime
import SimpleITK as sitk

from keras_mmfnet.data import preprocess_case, read_case_folder
from keras_mmfnet.data.image_io import write_image
from keras_mmfnet.inference import segment_case
from keras_mmfnet.recipe import Recipe


def open_network(path, recipe):
    """Opens a network from the recipe's modalities to its structures in onnxruntime."""
    try:
        session = onnxruntime.InferenceSession(path)
    except Exception as error:  # the errors of onnxruntime have no common base class
        raise ValueError(f"{path}: an undamaged network as ONNX is expected. Received: {error}") from error
    found = {tensor.name: tensor.shape[1:] for tensor in session.get_inputs()}
    [channels], structures = {tensor.shape[-1] for tensor in session.get_outputs()}, recipe.data.structure_names
    wanted = {name: [*recipe.patches.shape, 1] for name in recipe.data.modalities}
    if found != wanted or channels != len(structures):
        expected = f"a network over patches {recipe.patches.shape} of {', '.join(recipe.data.modalities)} is expected"
        expected += f", with a channel for each of {', '.join(structures)}"
        raise ValueError(f"{path}: {expected}. Received: {found} and {channels} channels")
    return session


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", type=Path, required=True, help="network exported as ONNX")
    parser.add_argument("--recipe", type=Path, required=True, help="recipe.json of its run")
    parser.add_argument("--patient", type=Path, required=True, help="folder with the patient's images")
    parser.add_argument("--out", type=Path, required=True, help="file for the mask; must not exist")
    parsed = parser.parse_args()
    try:
        if parsed.out.exists() or not parsed.out.parent.is_dir():
            raise ValueError(f"--out: a new file in a folder that exists is expected. Received: {parsed.out}")
        if not parsed.network.is_file():
            raise ValueError(f"--network: a network exported as ONNX is expected. Received: {parsed.network}")
        recipe = Recipe.load(parsed.recipe)
        if recipe.training.postprocess:
            print("not applied: the post-processing of the run, which `mmfnet export` prints", file=sys.stderr)
        session = open_network(parsed.network, recipe)
        case = preprocess_case(read_case_folder(parsed.patient, recipe.data, require_mask=False), recipe.data)
        found = segment_case(lambda batch: session.run(None, batch)[0], case, recipe)
        if found.label_image is None:
            names = ", ".join(recipe.data.structures)
            raise ValueError(f"--recipe: structures given by label values are expected. Received: {names}, by name")
        write_image(found.label_image, parsed.out)
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    voxels = {name: sitk.GetArrayViewFromImage(mask).sum() for name, mask in found.masks.items()}
    print(f"{parsed.out}: {', '.join(f'{count} voxels of {name}' for name, count in voxels.items())}")


if __name__ == "__main__":
    main()
