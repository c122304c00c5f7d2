"""Shared by the benchmarks of a trained network: loads a network of a run of mmfnet compare, and its patients."""

import itertools
import sys
from pathlib import Path

from keras_mmfnet.evaluation import evaluate_case
from keras_mmfnet.inference import predict_volume
from keras_mmfnet.models import load_network
from keras_mmfnet.run import Run


def add_arguments(parser):
    """Adds --run, --method and --fold."""
    add = parser.add_argument
    add("--run", type=Path, required=True, metavar="OUT", help="a run of mmfnet compare")
    add("--method", default="mmfnet_mlp_std", metavar="NAME", help="one of its MMFNets (mmfnet_mlp_std)")
    add("--fold", type=int, default=0, metavar="N", help="one of its folds (0)")


def open_run(parsed):
    """Returns a function that loads the network, the recipe, and the preprocessed validation and test patients."""
    run = Run(parsed.run)
    path = run.network(parsed.fold, parsed.method)
    if not path.is_file():
        sys.exit(f"error: --run, --method, --fold: a trained network is expected. Received: {path}, which is not there")
    if len(run.recipe.data.structures) > 1:
        sys.exit(f"error: --run: a run of one structure is expected. Received: {', '.join(run.recipe.data.structures)}")
    fold = run.folds[parsed.fold]
    validation, test = run.patients(fold.validation), run.patients(fold.test)
    return lambda: load_network(path), run.recipe, validation, test


def subsets(modalities):
    """The modalities that are left out, one choice after the other: some, but not all."""
    return itertools.chain.from_iterable(itertools.combinations(modalities, n) for n in range(1, len(modalities)))


def scores(predict, patients, recipe, missing=()):
    """The DSC of each patient with these modalities `missing`."""
    found = []
    for case in patients:
        # A missing modality is zeros, as in inference.
        images = {name: image * (name not in missing) for name, image in case.images.items()}
        volume = predict_volume(predict, images, recipe.patches.shape, recipe.patches.stride, case.centre)[..., 0]
        found.append(evaluate_case(volume, case.mask, case.spacing)["dsc"])
    return found
