import dataclasses
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import SimpleITK as sitk

from keras_mmfnet import plan
from keras_mmfnet.data import CaseError, find_cases, patch_dataset, preprocess_case
from keras_mmfnet.data.fingerprint import CaseFingerprint
from keras_mmfnet.data.windows import window_starts
from keras_mmfnet.plan import StepCost, given_recipe, measure_cost, plan_recipe, recipe_to_check
from keras_mmfnet.recipe import Recipe, RecipeError


def make_patients(rng, count=6):
    """Fingerprints of patients of about one size, each with a structure anywhere."""
    size, spacing = (
        rng.integers((8, 40, 40), (120, 400, 400)),
        np.array([rng.uniform(0.5, 6), *[rng.uniform(0.4, 2)] * 2]),
    )
    patients = []
    for _ in range(count):
        shape = np.maximum(size + rng.integers(-5, 6, 3), 6)
        low = rng.integers(0, shape - 3)
        high = np.minimum(low + rng.integers(1, 60, 3), shape)
        box = tuple(low.tolist()), tuple(high.tolist())
        volume = float(np.prod((high - low) * spacing) / 2000)
        centre = tuple((shape // 2 + rng.integers(-3, 4, 3)).tolist())
        patients.append(
            CaseFingerprint(tuple(shape.tolist()), tuple(spacing.tolist()), centre, {"tumour": volume}, box)
        )
    return patients


def planned(patients, changes=None, memory=8e9, seconds=7200.0, cost=None):
    one = plan._Plan(changes or {}, memory, seconds, cost or StepCost())
    plan._plan_network(one, patients)
    return one.recipe(Recipe())


@pytest.mark.once
@pytest.mark.parametrize("seed", range(40))
def test_no_structure_lies_outside_all_windows_whatever_the_patients(seed):
    rng = np.random.default_rng(seed)
    patients = make_patients(rng)
    memory, seconds = rng.choice([3e8, 2e9, 1e10]), rng.choice([60, 3600, 36000])
    recipe = planned(patients, memory=memory, seconds=seconds)
    for patient in patients:
        starts = window_starts(patient.shape, recipe.patches.shape, recipe.patches.stride, patient.centre)
        for axis in range(3):
            low, high = (edge[axis] for edge in patient.box)
            covered = {voxel for s in starts for voxel in range(s[axis], s[axis] + recipe.patches.shape[axis])}
            assert covered >= set(range(low, high)), (axis, patient)
    assert recipe.reasons.keys() >= {"patches.shape", "patches.stride", "network.strides", "training.batch_size"}
    assert recipe.training.batch_size >= 2
    assert Recipe.from_json(recipe.to_json()) == recipe


@pytest.mark.once
def test_memory_and_time_are_kept_and_more_of_them_are_used(caplog):
    patients = make_patients(np.random.default_rng(3))

    def voxels(recipe):
        return recipe.training.batch_size * math.prod(recipe.patches.shape)

    little, much = (planned(patients, memory=memory) for memory in (1e9, 8e9))
    assert voxels(little) < voxels(much)
    for recipe, memory in ((little, 1e9), (much, 8e9)):
        cost = plan._load(recipe.network.filters, recipe.network.strides, 3) * StepCost.bytes
        assert voxels(recipe) * cost <= memory
    short, long = (planned(patients, seconds=seconds) for seconds in (900, 90000))

    def patches(recipe):
        training = recipe.training
        return (1 + 1.2 * training.self_transfer) * training.epochs * training.steps_per_epoch * voxels(recipe)

    assert 20 < patches(long) / patches(short) < 300
    assert planned(patients, cost=StepCost(seconds=1e-11)).network.filters[0] > 8, "a GPU has time for wider networks"
    assert not caplog.messages
    planned(patients, memory=1e6, seconds=1)
    assert "more than the 0.001 GB that it may take" in caplog.text
    assert "more than the 1 s that it may take" in caplog.text


@pytest.mark.once
@pytest.mark.parametrize(("modalities", "networks"), [(("t1", "t2"), 2.0), (("t1", "t2", "cet1", "flair"), 7 / 3)])
def test_the_time_of_self_transfer(modalities, networks):
    """A network of one sequence has an encoder and a decoder; MMFNet has fusion blocks and more encoders."""
    given = {"data.modalities": modalities, "training.steps_per_epoch": 30, "training.batch_size": 2}
    given |= {"patches.shape": (16, 64, 64), "network.filters": (8, 16, 32)}
    patients = make_patients(np.random.default_rng(3))
    alone, both = (
        planned(patients, {**given, "training.self_transfer": one}, seconds=450).training.epochs
        for one in (False, True)
    )
    assert alone < 100
    assert alone / both == pytest.approx(networks, rel=0.03)


@pytest.mark.once
@pytest.mark.parametrize(
    ("spacing", "shape", "strides", "kernels"),
    [
        # Slices of 5 mm are neither pooled nor convolved until the pixels have reached more than half of that.
        ((5, 1, 1), (16, 128, 128), ["122", "122", "222", "222"], ["133", "133", "333", "333"]),
        ((1, 1, 1), (64, 64, 64), ["222"] * 4, ["333"] * 4),
        ((3, 1, 1), (16, 64, 64), ["122", "222", "222", "122"], ["133", "333", "333", "333"]),
        ((7.5, 1.875, 1.875), (5, 96, 96), ["122"] * 4, ["133", "133", "333", "333"]),
        ((2, 2, 2), (6, 6, 6), ["111"], ["333"]),
    ],
)
def test_levels_by_the_spacing(spacing, shape, strides, kernels):
    found = plan._levels(plan._Plan({}, 8e9, 7200, 1.5e-8), spacing, shape)
    assert ["".join(map(str, level)) for level in found[1]] == strides
    assert ["".join(map(str, level)) for level in found[2]] == kernels
    assert found[0] == tuple(shape)


@pytest.mark.once
@pytest.mark.parametrize(
    ("left", "right", "axes", "reason"),
    [
        (0, 3, (2,), "too few patients off the centre (0 left, 3 right) to rule out a side"),
        (0, 10, (), "structures lie left of the centre in 0 patients and right in 10: one side is rare"),
        (3, 7, (2,), "structures lie left of the centre in 3 patients and right in 7: either side occurs"),
    ],
)
def test_flips_by_the_sides_that_structures_are_on(left, right, axes, reason):
    patient = CaseFingerprint((20, 80, 80), (2.0, 1.0, 1.0), (10, 40, 40), {"tumour": 5.0}, None)
    boxes = [((5, 30, 60), (9, 40, 70))] * left + [((5, 30, 10), (9, 40, 20))] * right
    recipe = planned([dataclasses.replace(patient, box=box) for box in boxes])
    assert recipe.patches.flip_axes == axes
    assert recipe.reasons["patches.flip_axes"] == reason


@pytest.mark.once
def test_what_is_given_stays_and_the_rest_is_planned_around_it():
    patients = make_patients(np.random.default_rng(0))
    given = {"patches.shape": (12, 40, 36), "training.epochs": 7, "training.self_transfer": False}
    recipe = planned(patients, given)
    assert (recipe.patches.shape, recipe.training.epochs) == ((12, 40, 36), 7)
    assert recipe.reasons.keys().isdisjoint(given)
    assert "training.warmup_epochs" not in recipe.reasons
    assert all(size % by == 0 for size, by in zip((12, 40, 36), recipe.network.reduction_zyx, strict=True))
    strides = ((1, 2, 2), (2, 2, 2))
    recipe = planned(patients, {"network.strides": strides, "network.filters": (4, 6)})
    assert (recipe.network.strides, recipe.network.filters, len(recipe.network.kernel_sizes)) == (strides, (4, 6), 2)
    # A reason is lost with the value that it was given for.
    assert "patches.shape" not in recipe.replace({"patches.shape": (160, 160, 160)}).reasons
    assert "network.kernel_sizes" in recipe.replace({"patches.shape": (160, 160, 160)}).reasons
    for changes in ({"training.epoch": 3}, {"data.spacing": -1}, {"network.strides": ((1, 3, 1),)}):
        with pytest.raises(RecipeError):
            given_recipe(changes)
    assert given_recipe({"patches.shape": (5, 7, 9)}).patches.shape == (5, 7, 9)
    assert planned(patients, {"patches.shape": (5, 63, 63)}).network.strides == ((1, 1, 1),)
    # Self-transfer that is given is planned for, however short the time.
    alone, both = (planned(patients, {"training.self_transfer": given}, seconds=60).training for given in (False, True))
    assert both.self_transfer
    assert both.learning_rate == 1e-3
    updates, twice = (one.epochs * one.steps_per_epoch * one.batch_size for one in (both, alone))
    assert updates <= twice
    long = planned(patients, {"training.steps_per_epoch": 500}).training
    assert long.steps_per_epoch == 500
    usual = planned(patients).training
    assert long.epochs * 500 == pytest.approx(usual.epochs * usual.steps_per_epoch, rel=0.5)


@pytest.fixture
def cohort(tiny_cohort, tmp_path):
    shutil.copytree(tiny_cohort, tmp_path / "cohort")
    return tmp_path / "cohort"


def plan_of(folder, changes=None, **options):
    return plan_recipe(find_cases(folder, given_recipe(changes or {}).data), changes, **options)


@pytest.mark.once
def test_sequences_that_are_missing(cohort):
    (cohort / "patient_02" / "t2.nii.gz").unlink()
    recipe = plan_of(cohort, {"data.align": "header", "patches.misalignment": (1, 1)})
    assert recipe.data.allow_missing
    assert recipe.network.modality_dropout == 0.3
    assert recipe.reasons["data.allow_missing"] == "missing: t2 in 1 of 6 patients"
    with pytest.raises(ValueError, match=r"must be sequences that patients have\. Received: flair"):
        plan_of(cohort, {"data.modalities": ("t1", "flair")})


@pytest.mark.once
def test_patients_who_moved_between_the_sequences(cohort):
    path = cohort / "patient_00" / "t2.nii.gz"
    image = sitk.ReadImage(str(path))
    image.SetOrigin(np.add(image.GetOrigin(), (6, 6, 0)).tolist())
    sitk.WriteImage(image, str(path))
    one = plan._Plan({}, 8e9, 7200, StepCost())
    plan._plan_data(one, find_cases(cohort, one.data())[:1])
    assert one.fields["data.align"][0] == "rigid"
    assert one.fields["data.align"][1].startswith("sequences lie 8.")
    assert one.fields["patches.misalignment"][0] == (1, 1)


@pytest.mark.once
def test_a_sequence_that_moved_too_far_to_be_sure_of_is_not_known(cohort, monkeypatch, caplog):
    moved = {"t2": (15.0, 1.0), "cet1": (0.5, 0.2)}
    monkeypatch.setattr(plan, "misalignment", lambda case, recipe: moved)
    one = plan._Plan({}, 8e9, 7200, StepCost())
    plan._plan_data(one, find_cases(cohort, one.data()))
    value, reason = one.fields["data.align"]
    assert value == "header"
    apart = "sequences lie 0.5 mm and 0.2 degrees apart, the median of 4 patients"
    assert reason == f"{apart}, not known of t2; registered from 2 mm on"
    assert "t2: more than 10 mm or 10 degrees from the reference modality" in caplog.text
    assert "data.align=rigid" in caplog.text


@pytest.mark.once
@pytest.mark.parametrize(
    "given",
    [
        {"patches.stride": (12, None, None)},
        {"patches.stride": (4, 90, None)},
        {"patches.stride": (300, 300, 300)},
        {"network.deep_supervision": True},
        {"network.deep_supervision": True, "patches.stride": (7, 9, 11)},
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_the_rest_is_planned_to_fit_what_is_given(given, seed):
    patients = make_patients(np.random.default_rng(seed))
    recipe = planned(patients, given, memory=3e8, seconds=60)
    assert recipe.patches.stride == given.get("patches.stride", recipe.patches.stride)
    assert not recipe.network.deep_supervision or len(recipe.network.filters) >= 3


@pytest.mark.once
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_the_dropout_of_one_sequence_where_others_are_missing(cohort, rate):
    (cohort / "patient_03" / "t2.nii.gz").unlink()
    given = {"network.modality_dropout.t1": rate}
    one = plan._Plan(given, 8e9, 7200, StepCost())
    plan._plan_data(one, find_cases(cohort, one.data()))
    rates = one.recipe(Recipe()).network.modality_dropout
    assert rates == {"t1": rate, "t2": 0.3, "cet1": 0.3}


@pytest.mark.once
def test_there_are_no_more_folds_than_groups(cohort):
    groups = {f"patient_{number:02}": "ab"[number % 2] if number < 4 else f"c{number}" for number in range(6)}
    given = {"data.align": "header", "patches.misalignment": (0, 0)}
    cases = find_cases(cohort, given_recipe(given).data)
    assert len(cases) == 6
    for recipe in (plan_recipe(cases, given, groups=groups), recipe_to_check(cases, given, groups=groups)):
        assert recipe.training.folds == 4
        assert recipe.reasons["training.folds"] == "there are 4 groups of patients"
    by_pattern = {**given, "training.group": r"_0[0-3]|_0[45]"}
    assert "training.folds" not in recipe_to_check(cases, by_pattern).reasons
    with pytest.raises(ValueError, match="must match the names"):
        plan_recipe(cases, {**given, "training.group": "nobody"})


@pytest.mark.once
def test_missing_sequences_that_are_allowed_though_nobody_lacks_one(cohort):
    given = {"data.align": "header", "patches.misalignment": (0, 0), "data.allow_missing": True}
    assert plan_of(cohort, given).network.modality_dropout == 0.3
    assert plan_of(cohort, {**given, "network.modality_dropout": 0.1}).network.modality_dropout == 0.1


@pytest.mark.once
def test_images_that_are_z_scores(cohort):
    for path in cohort.glob("*/*.nii.gz"):
        if "mask" not in path.name:
            array = sitk.GetArrayFromImage(image := sitk.ReadImage(str(path))).astype(float)
            array = (1000 * (array - array.mean()) / array.std()).astype(np.int16)
            scored = sitk.GetImageFromArray(array)
            scored.CopyInformation(image)
            sitk.WriteImage(scored, str(path))
    unmoved = {"data.align": "header", "patches.misalignment": (0, 0)}
    recipe = plan_of(cohort, unmoved)
    assert recipe.data.normalised_scale == 1000
    assert recipe.data.clip == {}
    cases = find_cases(cohort, recipe.data)[:4]
    check = recipe_to_check(cases, unmoved, voxels=True)
    assert check.data.model_copy(update={"allow_missing": False}) == recipe.data
    assert (check.training.folds, check.training.balance) == (4, "volume")
    assert set(check.reasons) == {"data.normalised_scale", "data.clip", "training.balance", "training.folds"}
    assert recipe_to_check(cases, {"training.folds": 3}) == given_recipe({"training.folds": 3})
    # One patient of raw intensities among them is refused, as in preprocessing.
    raw = sitk.GetImageFromArray(np.random.default_rng(0).normal(30000, 100, (20, 32, 32)).astype(np.float32))
    for name in ("t1", "t2", "cet1"):
        sitk.WriteImage(raw, str(cohort / "patient_05" / f"{name}.nii.gz"))
    sitk.WriteImage(
        sitk.GetImageFromArray(np.eye(32, dtype=np.uint8)[None].repeat(20, 0)),
        str(cohort / "patient_05" / "mask.nii.gz"),
    )
    with pytest.raises(CaseError, match=r"patient_05: .*must be z-scores times 1000"):
        plan_of(cohort, unmoved)
    errors = []
    plan_of(cohort, unmoved, on_error=errors.append)
    assert [error.patient for error in errors] == ["patient_05"]


@pytest.mark.once
@pytest.mark.filterwarnings("error")
def test_real_heads_are_all_within_the_windows_that_are_planned(test_data, tmp_path):
    patients = test_data / "lgg_patients"
    few = tmp_path / "few"
    few.mkdir()
    for folder in sorted(patients.iterdir())[::25]:
        (few / folder.name).symlink_to(folder)
    recipe = plan_of(
        few,
        {"data.modalities": ("flair", "t1", "cet1"), "data.align": "header", "patches.misalignment": (1, 1)},
        cache=tmp_path / "cache",
    )
    assert recipe.data.spacing is None, "all have the same pixels"
    assert -4 < recipe.data.clip["flair"][0] < -1
    assert 2 < recipe.data.clip["flair"][1] < 6
    # It warns where a structure lies outside all windows, or a volume is padded.
    cases = [preprocess_case(case, recipe.data, tmp_path / "cache") for case in find_cases(few, recipe.data)]
    images, _ = next(iter(patch_dataset(cases, recipe.patches, batch_size=2, training=False)))
    assert images["t1"].shape == (2, *recipe.patches.shape, 1)


@pytest.mark.once
@pytest.mark.parametrize("equal", [True, False])
def test_pixels_that_are_not_square(equal, cohort, caplog):
    """They are equal where both sides are, not where their areas are; and two patients are too few to train."""
    for number in range(2, 6):
        shutil.rmtree(cohort / f"patient_0{number}")
    for number, patient in enumerate(sorted(cohort.iterdir())):
        for path in patient.iterdir():
            image = sitk.ReadImage(str(path))
            image.SetSpacing((1.0, 4.0, 4.0) if equal or number % 2 else (4.0, 1.0, 4.0))
            sitk.WriteImage(image, str(path))
    recipe = plan_of(cohort, {"data.align": "header", "patches.misalignment": (0, 0)})
    assert (recipe.data.spacing is None) == equal
    assert not equal or recipe.reasons["data.spacing"].startswith("all images have pixels of 1 x 4 mm")
    assert "3 or more patients are needed to train: there are 2" in caplog.text


@pytest.mark.parametrize(
    ("before", "grown", "expected"), [(0, 10**6, 10**6 / (4 * 512 * 27)), (0, 0, 35), (10**9, 10**6, 35)]
)
def test_the_cost_of_a_step_on_this_machine(before, grown, expected, monkeypatch):
    """Four patches of 4x8x16 voxels more, of 8 features and 1 below, three times: encoder, fusion and decoder."""
    peaks = iter((before, 10**9, 10**9 + grown))
    monkeypatch.setattr(plan, "peak_memory", lambda: next(peaks))
    cost = measure_cost((4, 8, 16))
    assert 1e-12 < cost.seconds < 1e-3
    assert cost.bytes == pytest.approx(expected)


@pytest.mark.once
def test_less_memory_is_planned_where_a_step_takes_less():
    patients = make_patients(np.random.default_rng(3))
    half, usual = (planned(patients, memory=1e9, cost=StepCost(bytes=each)) for each in (17.5, 35.0))
    assert "of 1 GB" in half.reasons["training.batch_size"]
    sizes = [one.training.batch_size * math.prod(one.patches.shape) for one in (half, usual)]
    assert sizes[0] > sizes[1]


@pytest.mark.once
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_the_memory_that_a_process_took():
    """In a process of its own, whose peak is not that of other tests."""
    code = (
        "import numpy as np\nfrom keras_mmfnet._machine import peak_memory\nbefore = peak_memory()\n"
        "np.ones(10**8)\nprint(peak_memory() - before)"
    )
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True, text=True)
    assert 4e8 < int(done.stdout) < 9e8


@pytest.mark.once
def test_nothing_is_planned_for_patients_without_a_structure(cohort):
    for path in cohort.glob("*/mask.nii.gz"):
        image = sitk.ReadImage(str(path))
        sitk.WriteImage(image * 0, str(path))
    with pytest.raises(ValueError, match=r"a patient with a structure is expected\. Received: 6 patients, all without"):
        plan_of(cohort, {"data.allow_empty": True, "data.align": "header", "patches.misalignment": (0, 0)})


def test_given_strides_of_many_levels_need_no_shape():
    recipe = given_recipe({"network.strides": ((2, 2, 2),) * 6, "patches.stride": (80, None, 40)})
    assert recipe.patches.shape == (128, 64, 64)
