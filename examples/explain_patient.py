"""Shows what a network of a run of train_npc.py looks at in one patient.

python examples/explain_patient.py --run runs/20260101-120000 --patient DIR --out FOLDER
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import keras
import numpy as np

from keras_mmfnet.data import preprocess_case, read_case_folder
from keras_mmfnet.explain import METHODS, fusion_attention, gradient_maps, spatial_attention, tumour_window
from keras_mmfnet.inference import predict_volume
from keras_mmfnet.models import load_network
from keras_mmfnet.plots import plot_attention, plot_heat
from keras_mmfnet.recipe import Recipe


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", type=Path, required=True, help="output folder of train_npc.py")
    add("--patient", type=Path, required=True, help="folder with the patient's images")
    add("--out", type=Path, required=True, help="folder for the pictures, a new one")
    add("--fold", type=int, default=0, metavar="N", help="fold whose network is asked")
    add("--methods", nargs="*", choices=METHODS, default=["gradcam"], help="gradient maps, on TensorFlow only")
    parsed = parser.parse_args()
    if parsed.out.exists() or not parsed.out.parent.is_dir():
        raise ValueError(f"a new folder in a folder that exists is expected. Received: {parsed.out}")
    return parsed


def main():
    try:
        parsed = parse_arguments()
        path = parsed.run / f"fold_{parsed.fold}" / "mmfnet.keras"
        if not path.is_file():
            expected = "--run: a run with trained folds is expected"
            raise ValueError(f"{expected}. Received: {parsed.run}, --fold {parsed.fold}")
        recipe = Recipe.load(parsed.run / "recipe.json")
        case = preprocess_case(read_case_folder(parsed.patient, recipe.data, require_mask=False), recipe.data)
        model = load_network(path, recipe)
        explain(model, case, recipe, parsed)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        sys.exit(f"error: {error}")


def explain(model, case, recipe, parsed):
    images = case.images_of(recipe.data.modalities)

    def whole(call):
        return predict_volume(call, images, recipe.patches.shape, recipe.patches.stride, case.centre)

    print("predicting")
    probability = whole(model)
    tumour = probability >= 0.5
    batch, start = tumour_window(images, tumour, recipe.patches.shape, case.centre)
    depth = int(np.argmax(probability.sum(axis=(1, 2))))
    parsed.out.mkdir()

    def save(figure, name):
        figure.savefig(parsed.out / f"{name}.png", dpi=110)
        print(parsed.out / f"{name}.png")

    share = fusion_attention(model, batch)[2]
    save(plot_attention(share), "attention")
    for block in share:
        heat = whole(spatial_attention(model, block))
        save(plot_heat(images, dict.fromkeys(images, heat), case.spacing, depth), f"spatial_{block}")
    if keras.backend.backend() != "tensorflow":
        print("gradient maps need TensorFlow: start this again with KERAS_BACKEND=tensorflow")
        return
    if not tumour.any():
        print("no tumour is predicted: the mean probability of the whole window is explained")
    for method in parsed.methods:
        maps = {name: heat[0] for name, heat in gradient_maps(model, batch, method).items()}
        inside = min(max(depth - start[0], 0), recipe.patches.shape[0] - 1)
        window = {name: image[0, ..., 0] for name, image in batch.items()}
        save(plot_heat(window, maps, case.spacing, inside), method.replace("+", "p"))


if __name__ == "__main__":
    main()
