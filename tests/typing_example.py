"""The public functions and classes as a user calls them, for the type checker; nothing here is run."""

from pathlib import Path
from typing import Any, assert_type

import numpy as np
import SimpleITK as sitk

from keras_mmfnet.data import find_cases, five_folds, patch_dataset, preprocess_case
from keras_mmfnet.data.case import Case, PreprocessedCase
from keras_mmfnet.data.folds import Fold
from keras_mmfnet.data.registration import RigidTransform, register_rigid
from keras_mmfnet.data.windows import gaussian_weights
from keras_mmfnet.evaluation import evaluate_case, summarise
from keras_mmfnet.inference import predict_volume, segment_case, segment_ensemble
from keras_mmfnet.layers import FusionBlock3D
from keras_mmfnet.losses import DiceLoss
from keras_mmfnet.methods import METHODS, Method, method_of, register_method
from keras_mmfnet.metrics import DiceScore
from keras_mmfnet.models import MMFNet, load_network
from keras_mmfnet.recipe import Recipe
from keras_mmfnet.report import write_report
from keras_mmfnet.run import Run, cross_validate
from keras_mmfnet.synthetic import make_synthetic_cohort
from keras_mmfnet.training import train_method


def train_and_segment(folder: Path) -> sitk.Image:
    """Everything from files to a mask."""
    recipe = Recipe.small().replace({"training.epochs": 2, "data.spacing": None})
    assert_type(recipe.training.epochs, int)
    make_synthetic_cohort(folder, patients=10)
    found = find_cases(folder, recipe.data)
    assert_type(found, list[Case])
    cases = {case.name: preprocess_case(case, recipe.data, folder / "cache") for case in found}
    assert_type(cases, dict[str, PreprocessedCase])
    fold = five_folds(cases)[0]
    assert_type(fold, Fold)
    training, validation = ([cases[name] for name in names] for names in (fold.train, fold.validation))
    patch_dataset(training, recipe.patches, batch_size=recipe.training.batch_size)
    model = train_method(method_of(recipe), training, validation, recipe, folder)
    case = cases[fold.test[0]]
    weights = gaussian_weights(recipe.patches.shape)
    volume = predict_volume(model, case.images, recipe.patches.shape, (4, None, None), weights=weights)
    assert_type(volume, np.ndarray)
    mask = segment_case(model, case, recipe).label_image
    assert mask is not None
    segment_ensemble([model, load_network(folder / "mmfnet.keras", recipe)], case, recipe)
    numbers = evaluate_case(volume[..., 0], sitk.GetArrayFromImage(mask), (4.0, 1.0, 1.0))
    assert_type(numbers, dict[str, float])
    summarise([{"patient": case.name, **numbers}])
    return mask


def register(fixed: sitk.Image, moving: sitk.Image) -> float:
    """Rotation angle of the second image."""
    transform, gain = register_rigid(fixed, moving)
    assert_type(transform, RigidTransform)
    assert_type(gain, float)
    return transform.rotation


def run(folder: Path) -> list[dict[str, Any]]:
    """A run of a method of one's own."""
    run = Run.start(folder, "patients", Recipe())
    method = register_method(Method("mine", "Mine", lambda recipe, dtype, encoders: MMFNet(dtype=dtype)))
    assert_type(METHODS["mine"], Method)
    assert_type(method.adapt(Recipe()), Recipe)
    rows = cross_validate(run, method, folds=[0])
    assert_type(write_report(run), Path)
    return rows


def compile_a_model() -> None:
    """Layers, losses and metrics with their arguments."""
    FusionBlock3D(filters=8, reduction=12, channel_statistics=("avg", "std"))
    model = MMFNet(("t1", "t2"), patch_shape=(16, 64, 64), filters=(8, 16), modality_dropout=0.3)
    model.compile("adam", DiceLoss(smooth=1.0, formula="as_printed"), metrics=[DiceScore(threshold=0.5)])
