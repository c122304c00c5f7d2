import csv
import gzip
import json
import multiprocessing
import os
import platform
import re
import shutil
import types

import keras
import numpy as np
import pytest
import SimpleITK as sitk

from keras_mmfnet import run as run_module
from keras_mmfnet import training
from keras_mmfnet._start import check_start
from keras_mmfnet.data import CaseError, preprocess_case, read_case_folder
from keras_mmfnet.data.folds import Fold
from keras_mmfnet.evaluation import metrics_json
from keras_mmfnet.inference import segment_case
from keras_mmfnet.methods import METHODS, Method, method_of
from keras_mmfnet.models import MMFNet
from keras_mmfnet.postprocess import PostProcessing
from keras_mmfnet.recipe import Recipe
from keras_mmfnet.report import write_comparison, write_report
from keras_mmfnet.report._comparison import compare_results
from keras_mmfnet.run import Run, RunLocked, compare_methods, cross_validate, modalities_of, run_fold

# For the patients in files, in voxels of 4 mm.
COARSE = Recipe().replace(
    {
        "data.spacing": 4.0,
        "patches.shape": (16, 16, 16),
        "network.filters": (2,),
        "training.batch_size": 2,
        "training.steps_per_epoch": 2,
        "training.epochs": 2,
        "training.warmup_epochs": 1,
        "training.learning_rate": 1e-3,
        "training.folds": 3,
    }
)


def cross(folder, data, recipe=COARSE, folds=None, **options):
    return cross_validate(Run.start(folder, data, recipe, **options), method_of(recipe), folds)


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(training._Trainer, "fit", lambda *_, **__: pytest.fail("the training started"))


def test_an_unknown_loss_is_refused_before_the_patients_are_read(tmp_path):
    with pytest.raises(ValueError, match=r"`training.loss`, must be one of dice, .*Received: 'hinge'$"):
        Run.start(tmp_path / "run", tmp_path / "nowhere", COARSE.replace({"training.loss": "hinge"}))
    assert not (tmp_path / "run").exists()


def test_a_run_keeps_the_groups_and_the_folds_it_was_given(tiny_cohort, tmp_path):
    names = sorted(path.name for path in tiny_cohort.iterdir())
    groups = {**dict.fromkeys(names, "others"), names[0]: "a", names[5]: "b", "somebody else": "c"}
    splits = [Fold(tuple(names[1:5]), (names[5],), (names[0],)), Fold(tuple(names[:1]), (names[5],), tuple(names[1:5]))]
    grouped = Run.start(tmp_path / "grouped", tiny_cohort, COARSE, groups=groups)
    assert sorted(len(fold.test) for fold in grouped.folds) == [1, 1, 4]
    own = Run.start(tmp_path / "own", tiny_cohort, COARSE, splits=splits)
    part = Run.start(tmp_path / "part", tiny_cohort, COARSE, splits=[Fold(tuple(names[1:4]), (), (names[0],))])
    assert own.folds == splits
    assert list(part.cases) == list(part.cohort["patients"]) == names[:4]
    for run in (grouped, own, part):
        cohort = run.cohort_file.read_text()
        Run.start(run.folder, tiny_cohort, COARSE, resume=True)
        assert run.cohort_file.read_text() == cohort
    Run.start(grouped.folder, tiny_cohort, COARSE, resume=True, groups=groups)
    Run.start(own.folder, tiny_cohort, COARSE, resume=True, splits=splits)
    with pytest.raises(ValueError, match=r"groups or folds. Received: groups.patient_00: a before, z now"):
        Run.start(grouped.folder, tiny_cohort, COARSE, resume=True, groups={**groups, names[0]: "z"})
    with pytest.raises(ValueError, match=r"groups or folds. Received: folds: .*; splits"):
        Run.start(own.folder, tiny_cohort, COARSE, resume=True, splits=splits[::-1])


def test_folds_balanced_by_the_tumours_volume(tmp_path, tiny_cohort):
    shutil.copytree(tiny_cohort, tmp_path / "data")
    for number, patient in enumerate(sorted((tmp_path / "data").iterdir())):
        mask = sitk.ReadImage(str(patient / "mask.nii.gz"))
        if number % 2:  # Only half of the tumour.
            mask[:, : mask.GetSize()[1] // 2] = 0
            sitk.WriteImage(mask, str(patient / "mask.nii.gz"))
    run = Run.start(tmp_path / "run", tmp_path / "data", COARSE.replace({"training.balance": "volume"}))
    volumes = {patient.name: patient.tumour_ml for patient in run.patients(run.cases)}
    smaller = set(sorted(volumes, key=volumes.get)[:3])
    assert [len(smaller & set(fold.test)) for fold in run.folds] == [1, 1, 1]


def test_patients_who_lack_sequences(tiny_cohort, tmp_path, caplog):
    data, lacking = tmp_path / "data", {"patient_00": "t1", "patient_03": "t2", "patient_04": "t1"}
    shutil.copytree(tiny_cohort, data)
    for name, modality in lacking.items():
        (data / name / f"{modality}.nii.gz").unlink()
    splits = [Fold(("patient_01", "patient_03", "patient_04"), ("patient_02",), ("patient_00", "patient_05"))]
    recipe = COARSE.replace({"data.allow_missing": True, "network.modality_dropout": 0.3, "training.epochs": 1})
    methods = [METHODS["unet3d_t1"], METHODS["mmfnet_t1_t2"]]
    with caplog.at_level("INFO"):
        run = Run.start(tmp_path / "run", data, recipe, splits=splits, methods=methods)
        results = compare_methods(run, methods)
    assert [row["patient"] for row in results["unet3d_t1"][0]["patients"]] == ["patient_05"]
    assert [row["patient"] for row in results["mmfnet_t1_t2"][0]["patients"]] == ["patient_00", "patient_05"]
    assert all(np.isfinite(row["dsc"]) for row in results["mmfnet_t1_t2"][0]["patients"])
    assert "3D U-net (T1), fold 0: passed over, without its sequences: patient_04, patient_00" in caplog.text
    assert "Training 3D U-net (T1) on 2 patients, validating on 1" in caplog.text
    assert "Training 3D U-net (T2) on 2 patients, validating on 1" in caplog.text
    page = write_comparison(run, "unet3d_t1").read_text(encoding="utf-8")
    subsets = re.findall(r"<td>([^<]*)</td><td>([t1-2, ce]+)</td>(?:<td[^>]*>[\d.-]+</td>){3}<td[^>]*>(\d)</td>", page)
    assert {title[:8]: found for title, *found in subsets if "U-net" in title} == {"3D U-net": ["t1, t2, cet1", "1"]}
    assert [found for title, *found in subsets if "U-net" not in title] == [["t1, t2, cet1", "1"], ["t2, cet1", "1"]]
    assert [row["difference_patients"] for row in compare_results(results, "unet3d_t1")] == [None, 1]
    Run.start(tmp_path / "run", data, recipe, resume=True)
    # Before the long work: nobody to train the network of a sequence on.
    splits = [Fold(("patient_00", "patient_04"), ("patient_02",), ("patient_05",))]
    expected = (
        r"fold 0: 3D U-net \(T1\) must have a patient with t1 for train; .*Received: patient_00, patient_04 without"
    )
    with pytest.raises(ValueError, match=expected):
        Run.start(tmp_path / "other", data, recipe, splits=splits)
    assert not (tmp_path / "other").exists()
    Run.start(tmp_path / "other", data, recipe.replace({"training.self_transfer": False}), splits=splits)
    with pytest.raises(ValueError, match=r"must have patients with t1 to train .*Received: 0 and 1 of 2 and 1$"):
        training.train_method(
            METHODS["unet3d_t1"],
            run.patients(["patient_00", "patient_04"]),
            run.patients(["patient_02"]),
            recipe,
            tmp_path / "alone",
        )


def test_patients_without_tumour(tiny_cohort, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(tiny_cohort, data)
    for name in ("patient_00", "patient_01", "patient_02"):
        _rewrite(data / name / "mask.nii.gz", lambda array: array.fill(0))
    names = sorted(path.name for path in data.iterdir())
    splits = [Fold((names[0], names[3]), (names[1], names[4]), (names[2], names[5]))]
    recipe = COARSE.replace({"training.self_transfer": False, "training.epochs": 1})
    with pytest.raises(CaseError, match=r"3 of 6 patients cannot be used.*\n.*must have a voxel"):
        Run.start(tmp_path / "run", data, recipe, splits=splits)
    recipe = recipe.replace({"data.allow_empty": True})
    with pytest.raises(
        ValueError, match=r"fold 0: MMFNet must have a patient with tumour for validation.*: patient_01, all wit"
    ):
        Run.start(tmp_path / "run", data, recipe, splits=[Fold(tuple(names[2:]), (names[1],), (names[0],))])
    assert not (tmp_path / "run" / "recipe.json").exists()
    # Of the patients with T1 alone as well, on whom the network of T1 is trained.
    shutil.copytree(data, tmp_path / "less")
    (tmp_path / "less" / names[3] / "t1.nii.gz").unlink()
    less = recipe.replace({"data.allow_missing": True, "network.modality_dropout": 0.3, "training.self_transfer": True})
    expected = r"fold 0: 3D U-net \(T1\) must have a patient with tumour for train; .*: patient_00, all without"
    with pytest.raises(ValueError, match=expected):
        Run.start(tmp_path / "run", tmp_path / "less", less, splits=splits)
    run = Run.start(tmp_path / "run", data, recipe, splits=splits)
    without, tumour = cross_validate(run, method_of(recipe))
    assert np.isnan([without[key] for key in ("dsc", "hd95", "assd", "dice_loss", "detection_sensitivity")]).all()
    assert without["false_positive_ml"] == without["predicted_ml"]
    assert without["detection_specificity"] == float(not without["predicted_ml"])
    assert 0 <= tumour["dsc"] <= 1
    assert np.isnan(tumour["detection_specificity"])
    summary = json.loads((run.folder / "metrics.json").read_text(encoding="utf-8"))["summary"]
    assert {key: summary[key]["patients"] for key in ("dsc", "false_positive_ml", "detection_specificity")} == {
        "dsc": 1,
        "false_positive_ml": 2,
        "detection_specificity": 1,
    }
    page = re.sub(r"<[^>]+>", " ", write_report(run).read_text(encoding="utf-8"))
    assert re.search(r"Without tumour\s+1\s", page)
    assert re.search(r"6 patients, 3 of them without tumour\.", page)
    assert re.search(r"Share with nothing found.*\s+MMFNet\s+1\s+[01]\.00\s+1\s+[01]\.00\s+[\d.]+", page)
    assert page.index(f"{names[5]}, fold 0") < page.index(f"{names[2]}, fold 0")
    write_comparison(run, "mmfnet")


@pytest.fixture(scope="module")
def run(tiny_cohort, tmp_path_factory):
    """The folder and the rows of a cross-validation, one fold of three."""
    folder = tmp_path_factory.mktemp("run")
    return folder, cross(folder, tiny_cohort, folds=[1])


def test_a_run_leaves_what_is_needed(run, tiny_cohort):
    folder, result = run
    assert Recipe.load(folder / "recipe.json") == COARSE
    fold = json.loads((folder / "cohort.json").read_text(encoding="utf-8"))["folds"][1]
    assert [row["patient"] for row in result] == fold["test"]
    names = {path.name for path in (folder / "fold_1").iterdir()}
    networks = ("unet3d_t1", "unet3d_t2", "unet3d_cet1", "mmfnet")
    expected = {f"{n}.keras" for n in networks} | {f"{n}_history.csv" for n in networks} | {"masks", "mmfnet.json"}
    assert {name for name in names if not name.endswith(".lock")} == expected
    model = keras.models.load_model(folder / "fold_1" / "mmfnet.keras")
    assert isinstance(model, MMFNet)
    assert (folder / "metrics.json").read_text(encoding="utf-8") == metrics_json(result)
    assert [
        row["patient"] for row in csv.DictReader((folder / "metrics.csv").read_text(encoding="utf-8").splitlines())
    ] == fold["test"]
    for row in result:
        own = sitk.ReadImage(str(tiny_cohort / row["patient"] / "t1.nii.gz"))
        mask = sitk.ReadImage(str(folder / "fold_1" / "masks" / "mmfnet" / f"{row['patient']}.nii.gz"))
        assert mask.GetSize() == own.GetSize()
        np.testing.assert_allclose(mask.GetOrigin(), own.GetOrigin(), atol=1e-3)
        np.testing.assert_allclose(mask.GetSpacing(), own.GetSpacing(), rtol=1e-5)


def test_the_numbers_are_those_of_the_written_masks(run, tiny_cohort):
    folder, result = run
    for row in result:
        mask, truth = (
            sitk.GetArrayFromImage(sitk.ReadImage(str(path))) > 0
            for path in (
                folder / "fold_1" / "masks" / "mmfnet" / f"{row['patient']}.nii.gz",
                tiny_cohort / row["patient"] / "mask.nii.gz",
            )
        )
        assert row["dsc"] == pytest.approx(2 * (mask & truth).sum() / (mask.sum() + truth.sum()))


def test_a_new_patient_can_be_segmented_later(run, tiny_cohort):
    folder, result = run
    recipe = Recipe.load(folder / "recipe.json")
    case = preprocess_case(
        read_case_folder(tiny_cohort / result[0]["patient"], recipe.data, require_mask=False), recipe.data
    )
    mask = segment_case(keras.models.load_model(folder / "fold_1" / "mmfnet.keras"), case, recipe).label_image
    written = sitk.ReadImage(str(folder / "fold_1" / "masks" / "mmfnet" / f"{result[0]['patient']}.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(mask), sitk.GetArrayFromImage(written))


def test_a_finished_fold_is_not_done_again(run, tiny_cohort, no_training):
    folder, result = run
    assert cross(folder, tiny_cohort, folds=[1], resume=True) == result


def test_masks_of_a_finished_fold_that_are_gone(run, tiny_cohort, tmp_path, no_training, caplog):
    folder, result = run
    copy = Run(shutil.copytree(folder, tmp_path / "run"))
    masks = {path: read_array(path) for path in copy.fold_folder(1).glob("masks/mmfnet/*")}
    first = next(iter(masks))
    first.unlink()
    again = cross(copy.folder, tiny_cohort, folds=[1], resume=True)
    assert [{**row, "seconds": 0} for row in again] == [{**row, "seconds": 0} for row in result]
    np.testing.assert_array_equal(read_array(first), masks[first])
    assert (
        f"MMFNet, fold 1: the masks of {first.name.partition('.')[0]} are gone; segmenting the patients again"
        in caplog.text
    )
    first.unlink()
    copy.network(1).unlink()
    assert cross(copy.folder, tiny_cohort, folds=[1], resume=True) == again
    assert f"and so is the network; the fold is computed again once {copy.result(1, 'mmfnet')} is del" in caplog.text
    assert f"because their masks are gone: {first.name.partition('.')[0]}" in write_report(copy).read_text("utf-8")


def read_array(path):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def test_a_run_is_not_overwritten(run, tiny_cohort, no_training):
    folder, _ = run
    with pytest.raises(ValueError, match=r"must hold no run.*Received: .*recipe\.json"):
        cross(folder, tiny_cohort)


def test_results_that_are_left_in_a_folder_are_refused(run, tiny_cohort, tmp_path, no_training):
    left = shutil.copytree(run[0], tmp_path / "left")
    for name in ("recipe.json", "cohort.json"):
        (left / name).unlink()
    with pytest.raises(ValueError, match=r"no results of another run. Received: a folder with .*fold_1"):
        Run.start(left, tiny_cohort, Run(run[0]).recipe)


def test_a_start_that_was_killed_is_started_again(tiny_cohort, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Recipe, "to_json", lambda self: (tmp_path / "nowhere" / "killed").read_text())
        with pytest.raises(FileNotFoundError):
            Run.start(tmp_path / "run", tiny_cohort, COARSE)
    assert (tmp_path / "run" / "cohort.json").exists()
    run = Run.start(tmp_path / "run", tiny_cohort, COARSE)
    assert run.recipe_file.read_text() == COARSE.to_json()


def test_a_start_is_checked_and_nothing_is_written(run, tiny_cohort, tmp_path, monkeypatch):
    monkeypatch.setattr("keras_mmfnet.run.preprocess_case", lambda *_: pytest.fail("preprocessed"))
    new = Run(tmp_path / "run")
    start = check_start(new, tiny_cohort, COARSE)
    assert [case.name for case in start.cases] == sorted(path.name for path in tiny_cohort.iterdir())
    assert not start.bad
    with pytest.raises(ValueError, match="patients"):
        check_start(new, tiny_cohort, COARSE.replace({"training.folds": 9}))
    with pytest.raises(ValueError, match="another recipe"):
        check_start(Run(run[0]), tiny_cohort, COARSE.replace({"training.epochs": 7}), resume=True)
    shutil.copytree(tiny_cohort, tmp_path / "patients")
    (tmp_path / "patients" / "patient_00" / "mask.nii.gz").unlink()
    start = check_start(new, tmp_path / "patients", COARSE)
    assert [len(start.cases), *(error.patient for error in start.bad)] == [5, "patient_00"]
    assert not new.folder.exists()


def test_duplicates_are_looked_for_once(run, tiny_cohort, tmp_path, monkeypatch):
    monkeypatch.setattr("keras_mmfnet._start.find_duplicates", lambda cases: [("patient_00", "patient_01")])
    assert len(check_start(Run(run[0]), tiny_cohort, COARSE, resume=True).cases) == 6
    with pytest.raises(ValueError, match="patient_00 = patient_01"):
        check_start(Run(tmp_path / "run"), tiny_cohort, COARSE, resume=True)


def test_a_run_that_jobs_are_making_is_not_started(tiny_cohort, tmp_path, no_training):
    run = Run(tmp_path / "run")
    run.jobs.mkdir(parents=True)
    run.scheduler.write_text(f"process {os.getpid()} on {platform.node()} since 2026-01-01 00:00:00")
    with pytest.raises(ValueError, match=rf"that jobs are making. Received: jobs scheduled by process {os.getpid()}"):
        Run.start(run.folder, tiny_cohort, COARSE)
    assert not run.cache.exists()


def test_another_recipe_is_not_resumed(run, tiny_cohort, no_training):
    folder, _ = run
    other = COARSE.replace({"training.epochs": 7, "data.spacing": 3.0})
    with pytest.raises(
        ValueError, match=r"another recipe\. Received: data.spacing: 4.0 before, 3.0 now; training.epochs: 2 before, 7"
    ):
        Run.start(folder, tiny_cohort, other, resume=True)


def test_other_patients_are_not_resumed(run, tiny_cohort, tmp_path, no_training):
    folder, _ = run
    shutil.copytree(tiny_cohort, tmp_path / "fewer")
    shutil.rmtree(tmp_path / "fewer" / "patient_00")
    with pytest.raises(ValueError, match=r"must be as they were at its start.* Received: no files of patient_00$"):
        Run.start(folder, tmp_path / "fewer", COARSE, resume=True)
    shutil.copytree(tiny_cohort, tmp_path / "more")
    shutil.copytree(tiny_cohort / "patient_00", tmp_path / "more" / "another")
    with pytest.raises(ValueError, match="other patients"):
        Run.start(folder, tmp_path / "more", COARSE, resume=True)


@pytest.mark.parametrize("on_error", [None, lambda error: None])
def test_a_file_that_was_damaged_meanwhile_is_named(run, tiny_cohort, tmp_path, no_training, on_error):
    """Whether bad patients are left out or not: this one is in the folds."""
    folder, _ = run
    shutil.copytree(tiny_cohort, tmp_path / "damaged")
    path = tmp_path / "damaged" / "patient_01" / "t2.nii.gz"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(
        ValueError, match=r"must be as they were at its start.* Received: patient_01: .*t2.nii.gz"
    ) as error:
        Run.start(folder, tmp_path / "damaged", COARSE, resume=True, on_error=on_error)
    assert "skip-bad" not in str(error.value)


def test_images_that_changed_are_not_resumed(run, tiny_cohort, tmp_path, no_training):
    folder, _ = run
    shutil.copytree(tiny_cohort, tmp_path / "changed")
    shutil.copy(tmp_path / "changed" / "patient_01" / "t2.nii.gz", tmp_path / "changed" / "patient_00" / "t2.nii.gz")
    with pytest.raises(
        ValueError, match=r"must be as they were at its start; .* Received: other images of patient_00$"
    ):
        Run.start(folder, tmp_path / "changed", COARSE, resume=True)


def test_an_unknown_fold_is_refused(tiny_cohort, tmp_path, no_training):
    with pytest.raises(ValueError, match=r"from 0 to 2\. Received: 3"):
        cross(tmp_path, tiny_cohort, folds=[3])


# --- bad patients


def _rewrite(path, change):
    image = sitk.ReadImage(str(path))
    array = sitk.GetArrayFromImage(image).astype(np.float32)
    change(array)
    changed = sitk.GetImageFromArray(array)
    changed.CopyInformation(image)
    sitk.WriteImage(changed, str(path))


def _with_nan(array):
    array[3, 10, 10] = np.nan


def _constant(array):
    array[:] = 7


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _truncate_whole_stream(path):
    """Half of the voxels in a gzip stream that is whole."""
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(content[: len(content) // 2], 1))


BAD = {
    "lacks a modality": ("cet1", lambda path: path.unlink()),
    "lacks the mask": ("mask", lambda path: path.unlink()),
    "NaN": ("t2", lambda path: _rewrite(path, _with_nan)),
    "constant": ("t1", lambda path: _rewrite(path, _constant)),
    "truncated": ("t2", _truncate),
    "truncated inside": ("cet1", _truncate_whole_stream),
    "empty mask": ("mask", lambda path: _rewrite(path, lambda array: array.fill(0))),
}


@pytest.fixture(params=BAD)
def bad_cohort(request, tiny_cohort, tmp_path):
    """A copy of the cohort in which one file of patient_03 is bad, and that file's name."""
    folder = tmp_path / "cohort"
    shutil.copytree(tiny_cohort, folder)
    file, spoil = BAD[request.param]
    spoil(folder / "patient_03" / f"{file}.nii.gz")
    return folder, file


def test_a_bad_patient_stops_the_run_with_its_name(bad_cohort, tmp_path, no_training):
    folder, file = bad_cohort
    with pytest.raises(CaseError, match=rf"^patient_03: .*{file}.*Received: "):
        Run.start(tmp_path / "run", folder, COARSE)


def test_a_bad_patient_can_be_left_out(bad_cohort, tmp_path):
    folder, file = bad_cohort
    errors = []
    run = Run.start(tmp_path / "run", folder, COARSE, on_error=errors.append)
    assert "patient_03" not in {name for fold in run.folds for name in (*fold.train, *fold.validation, *fold.test)}
    assert list(run.cohort["skipped"]) == ["patient_03"]
    assert len(errors) == 1
    assert file in str(errors[0])


def test_all_bad_patients_are_listed(tiny_cohort, tmp_path):
    folder = tmp_path / "cohort"
    shutil.copytree(tiny_cohort, folder)
    for name in ("patient_01", "patient_04"):
        _rewrite(folder / name / "t2.nii.gz", _with_nan)
    with pytest.raises(CaseError, match=r"(?s)^2 of 6 patients cannot be used.*--skip-bad.*patient_01: .*patient_04"):
        Run.start(tmp_path / "run", folder, COARSE)
    # Only the cache of the others is there, so that the same command can be started again.
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["cache"]


def test_a_start_that_fails_leaves_nothing(tiny_cohort, tmp_path, monkeypatch):
    recipe = COARSE.replace({"training.folds": 7})
    with pytest.raises(ValueError, match=r"7 folds.*Received: 6"):
        Run.start(tmp_path / "run", tiny_cohort, recipe)
    with pytest.raises(ValueError, match=r"one folder per patient.*Received: "):
        Run.start(tmp_path / "run", tmp_path, COARSE)
    assert not (tmp_path / "run").exists()


# --- sharing the work


def hold(folder, held, done):
    with Run(folder).claim(0, "mmfnet"):
        held.set()
        done.wait(120)


def test_a_network_is_trained_by_one_process(run, tmp_path):
    folder, _ = run
    shutil.copytree(folder, tmp_path / "run")
    copy = Run(tmp_path / "run")
    context = multiprocessing.get_context("spawn")
    held, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(copy.folder, held, done))
    other.start()
    assert held.wait(120)
    with pytest.raises(RunLocked, match=rf"fold 0, mmfnet: is being computed by process {other.pid} on .* since"):
        run_fold(copy, method_of(COARSE), 0)
    other.kill()  # a process that dies gives its claim up
    other.join()
    with copy.claim(0, "mmfnet", wait=True):
        pass


def test_methods_share_the_single_modality_networks(run, tmp_path, monkeypatch):
    folder, _ = run
    shutil.copytree(folder, tmp_path / "run")
    copy, fitted, fit = Run(tmp_path / "run"), [], training._Trainer.fit

    def watch(self, model, **kwargs):
        fitted.append(type(model).__name__)
        return fit(self, model, **kwargs)

    monkeypatch.setattr(training._Trainer, "fit", watch)
    results = compare_methods(copy, [METHODS["unet3d_t1"], METHODS["mmfnet_t1_t2"]], folds=[1])
    assert fitted == ["MMFNet", "MMFNet"]
    assert list(results) == ["unet3d_t1", "mmfnet_t1_t2", "mmfnet"]
    assert set(results["mmfnet_t1_t2"][0]["shares"]["fusion1"]) == {"t1", "t2"}


def test_a_network_of_another_library(run, tmp_path):
    folder, _ = run
    shutil.copytree(folder, tmp_path / "run")

    def train(method, training, validation, recipe, directory):
        history = [{"epoch": 0, "loss": 0.5, "val_loss": 0.5, "seconds": 1.0}]
        return lambda images: 1.0 * (images["t1"] > 0), 7, history

    result = run_fold(Run(tmp_path / "run"), Method("other", "Other", train=train, library="scipy"), 1)
    assert "scipy" in result["machine"]
    assert keras.backend.backend() not in result["machine"]
    assert (result["parameters"], result["updates"], result["training_seconds"]) == (7, 2, 1.0)
    assert all(row["dsc"] > 0 for row in result["patients"])


def test_post_processing_is_chosen_on_validation_patients(tiny_cohort, tmp_path):
    def faint(images):
        # The tumour's probability never reaches 0.5.
        return 0.05 + 0.4 * (images["t1"] > 0.9)

    recipe = COARSE.replace({"training.postprocess": True})
    method = Method("mmfnet", "Faint", train=lambda *_: (faint, 0, [{"seconds": 1.0}]))
    run, paper = Run.start(tmp_path / "run", tiny_cohort, recipe), Run.start(tmp_path / "paper", tiny_cohort, COARSE)
    result, plain = run_fold(run, method, 0), run_fold(paper, method, 0)
    assert all(row["dsc"] == 0 for row in plain["patients"])
    assert "postprocess" not in plain
    gain = result["postprocess"]["gains"]["tumour"]
    assert (gain["patients"], gain["before"]) == (len(run.folds[0].validation), 0)
    assert gain["after"] > 0.3
    run.result(0, "other").write_text(
        json.dumps({"postprocess": {"rules": PostProcessing.default(["tumour"]).model_dump()}})
    )
    assert run.postprocessing([0], "other") == PostProcessing.default(["tumour"])
    run.result(0, "other").unlink()
    rules = run.postprocessing([0])
    assert rules == PostProcessing(**result["postprocess"]["rules"])
    assert rules.structures["tumour"].threshold < 0.45
    # It is applied to the test patients, whose probabilities stay what they are.
    for row, before in zip(result["patients"], plain["patients"], strict=True):
        assert row["dsc"] > 0.2
        assert (row["ap"], row["dice_loss"]) == (before["ap"], before["dice_loss"])
        (patient,) = run.patients([row["patient"]])
        found = segment_case(faint, patient, recipe, rules)
        written = run.read_masks(0, "mmfnet", patient.name)["tumour"]
        np.testing.assert_array_equal(*map(sitk.GetArrayViewFromImage, (written, found.masks["tumour"])))
    with pytest.raises(ValueError, match=r"fold_1.mmfnet.json: a finished fold is expected"):
        run.postprocessing([0, 1])
    assert f"<td>{rules.structures['tumour']}</td>" in write_report(run).read_text(encoding="utf-8")


def test_methods_of_other_modalities_need_no_image_that_none_of_them_uses():
    method = Method("flair", "FLAIR", METHODS["unet3d_t1"].build, {"data.modalities": ("flair",)})
    assert modalities_of([METHODS["unet3d_t2"], method], Recipe()) == ("t2", "flair")
    assert modalities_of([METHODS["unet3d_t2"]], Recipe()) == ("t1", "t2", "cet1")


@pytest.mark.parametrize(
    ("structures", "labels"),
    [({"edge": 2, "middle": 1}, {0, 1, 2}), ({"whole": (1, 2), "middle": 1}, {0, 1, 2}), (None, None)],
)
def test_several_structures(structures, labels, tiny_cohort, tmp_path):
    """Label values that exclude each other, regions that overlap, and a file for each structure."""
    data = tmp_path / "data"
    shutil.copytree(tiny_cohort, data)
    for patient in data.iterdir():
        mask = sitk.ReadImage(str(patient / "mask.nii.gz"))
        middle = sitk.BinaryErode(mask, (2, 2, 1))
        sitk.WriteImage(middle + 2 * (mask - middle), str(patient / "mask.nii.gz"))
        if structures is None:
            sitk.WriteImage(mask, str(patient / "gtv.nii.gz"))
            sitk.WriteImage(middle, str(patient / "boost.nii.gz"))
            (patient / "mask.nii.gz").unlink()
    structures = structures or {"gtv": "gtv", "boost": "boost"}
    recipe = COARSE.replace({"data.structures": structures, "training.self_transfer": False, "training.epochs": 1})
    rows = cross(tmp_path / "run", data, recipe, folds=[0])
    run = Run(tmp_path / "run")
    assert [(row["patient"], row["structure"]) for row in rows] == [
        (name, structure) for name in run.folds[0].test for structure in structures
    ]
    patient = run.folds[0].test[0]
    files = run.masks(0, "mmfnet", patient)
    assert list(files) == ([None] if labels else list(structures))
    if labels:
        assert set(np.unique(read_array(files[None]))) <= labels
    (case,) = run.patients([patient])
    for structure, image in run.read_masks(0, "mmfnet", patient).items():
        (row,) = [row for row in rows if (row["patient"], row["structure"]) == (patient, structure)]
        voxels = np.prod(image.GetSpacing()) / 1000
        assert row["predicted_ml"] == pytest.approx(sitk.GetArrayFromImage(image).sum() * voxels)
        assert row["volume_ml"] > 0
        assert 0 <= row["ap"] <= 1
    assert case.masks["middle" if labels else "boost"].sum() < case.mask.sum()
    page = write_report(run).read_text(encoding="utf-8")
    assert all(structure in page for structure in structures)


def test_only_the_folds_that_are_trained_must_have_each_structure(tiny_cohort, tmp_path):
    changes = {"data.structures": {"gtv": (1,), "enh": (4,)}, "training.self_transfer": False}
    recipe, run = COARSE.replace(changes), Run(tmp_path / "run")
    division = check_start(run, tiny_cohort, recipe).divide()
    rare = division[0].test[0]

    def divide(folds, *have):
        start = check_start(run, tiny_cohort, recipe, folds=folds)
        volumes = {case.name: {"gtv": 2.0, "enh": float(case.name in have)} for case in start.cases}
        return start.divide({n: types.SimpleNamespace(tumour_ml=2.0, structures_ml=ml) for n, ml in volumes.items()})

    for folds in (None, [0], [2, 0]):
        with pytest.raises(ValueError, match=r"^fold 0: .* enh for train; 1 of 6 patients has enh; only folds that"):
            divide(folds, rare)
    trained = [number for number, fold in enumerate(division) if rare in fold.train]
    assert trained
    assert divide(trained, rare) == division
    with pytest.raises(ValueError, match="enh for train; 0 of 6"):
        Run.start(tmp_path / "started", tiny_cohort, recipe, folds=[1])
    assert Run.start(tmp_path / "started", tiny_cohort, recipe, folds=[]).folds == division
    with pytest.raises(ValueError, match=r"; 2 of 6 patients have enh; `training.balance=volume` or --splits may help"):
        divide(None, *division[0].test)
    start = check_start(run, tiny_cohort, recipe)
    volumes = {case.name: {"gtv": float(case.name == rare), "enh": 0.0} for case in start.cases}
    patients = {n: types.SimpleNamespace(tumour_ml=ml["gtv"], structures_ml=ml) for n, ml in volumes.items()}
    with pytest.raises(ValueError, match="1 of 6 patients has tumour; two are needed, to train and to validate"):
        start.divide(patients)


def test_structures_that_cannot_be_trained_or_kept_apart(tiny_cohort, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(tiny_cohort, data)
    recipe = COARSE.replace({"data.structures": {"gtv": (1,), "node": (7,)}, "training.self_transfer": False})
    with pytest.raises(ValueError, match=r"fold 0: MMFNet must have a patient with node for train; 0 of 6 .*, all wit"):
        Run.start(tmp_path / "run", data, recipe)
    for patient in data.iterdir():
        for name in ("gtv", "b_gtv"):
            shutil.copy(patient / "mask.nii.gz", patient / f"{name}.nii.gz")
        (patient / "mask.nii.gz").unlink()
    (data / "patient_05").rename(data / "patient_00_b")
    recipe = COARSE.replace({"data.structures": {"gtv": "gtv", "b_gtv": "b_gtv"}})
    with pytest.raises(ValueError, match=r"same name of a file\. Received: patient_00_b_gtv twice$"):
        Run.start(tmp_path / "run", data, recipe)
    assert not (tmp_path / "run" / "recipe.json").exists()


@pytest.mark.once
@pytest.mark.parametrize("there", [0.6, 0.75])
def test_regions_are_post_processed_as_they_fit_together(there, monkeypatch):
    """A higher threshold of the whole removes what is false, and the core where the whole is less probable there."""
    truth, probability = np.zeros((2, 8, 40, 40, 2), np.float32)
    truth[:, 5:25, 5:25, 0] = truth[:, 10:16, 10:16, 1] = 1
    probability[:] = 0.9 * truth
    probability[:, 10:16, 10:16, 0], probability[:, 26:38, :, 0] = there, 0.65
    monkeypatch.setattr(run_module, "_examples", lambda *_: iter([(probability, truth, (1, 1, 1))]))
    recipe = Recipe().replace({"data.structures": {"whole": (1, 2), "core": (1,)}})
    chosen = run_module._choose_rules(None, None, None, recipe)["postprocess"]
    higher = there > 0.7
    assert chosen["rules"]["structures"]["whole"]["threshold"] == (0.7 if higher else 0.5)
    assert chosen["gains"]["core"] == {"patients": 1, "before": 1.0, "after": 1.0}
    assert (chosen["gains"]["whole"]["after"] > chosen["gains"]["whole"]["before"]) == higher
