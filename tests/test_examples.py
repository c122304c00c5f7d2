"""The examples as a user runs them: in processes of their own."""

import csv
import importlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from checks import fill
from dicom_files import write_series

from keras_mmfnet.data import Grid
from keras_mmfnet.models import MMFNet
from keras_mmfnet.recipe import Recipe

ROOT = Path(__file__).parents[1]
# Voxels of 4 mm and a few updates: the whole way, not a good network.
QUICK = "--spacing 4 --patch-shape 16 32 32 --batch-size 1 --steps-per-epoch 2 --epochs 2 --seed 3".split()


def command(example, *arguments):
    return [sys.executable, str(ROOT / "examples" / example), *map(str, arguments)]


def run(example, *arguments, timeout=900):
    done = subprocess.run(
        command(example, *arguments), capture_output=True, encoding="utf-8", timeout=timeout, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def histories(folder):
    return {path.name: path.read_text() for path in folder.glob("fold_*/*_history.csv")}


def masks(folder):
    return {path.name: sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in folder.glob("fold_*/masks/*")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "does not exist. Received: nowhere"),
        (["--data", "{cohort}", "--patch-shape", "16", "100", "64"], "`patch_shape` must be (depth, height, width)"),
        (["--modalities", "t1"], "two or more"),
        (["--resume"], "is expected as --out"),
    ],
)
def test_bad_arguments_are_named(tiny_cohort, tmp_path, arguments, message):
    arguments = [argument.format(cohort=tiny_cohort) for argument in arguments]
    done = run("train_npc.py", *arguments, *([] if "--resume" in arguments else ["--out", tmp_path / "run"]))
    assert done.returncode != 0
    assert message in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_recipe_of_the_arguments(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    train_npc = importlib.import_module("train_npc")

    def recipe(*arguments):
        parsed = train_npc.parse_arguments(list(arguments))
        return train_npc.choose_recipe(parsed, Path("nowhere"))

    assert recipe("--paper", "--data", "x") == Recipe()
    assert recipe("--data", "x") == Recipe.small()
    changed = recipe(
        *"--data x --modalities a b --mask-name gtv --mask-labels 1 4 --epochs 3 --steps-per-epoch 5".split(),
        *"--batch-size 2 --patch-shape 32 32 32 --seed 7 --mixed-precision bfloat16".split(),
        *"--normalised 1000 --spacing keep".split(),
    )
    assert changed == Recipe.small().replace(
        {
            "data.modalities": ("a", "b"),
            "data.mask": "gtv",
            "data.mask_labels": (1, 4),
            "training.epochs": 3,
            "training.steps_per_epoch": 5,
            "training.batch_size": 2,
            "patches.shape": (32, 32, 32),
            "training.seed": 7,
            "training.mixed_precision": "bfloat16",
            "data.normalised_scale": 1000.0,
            "data.spacing": None,
        }
    )


def test_a_folder_that_cannot_be_written(tiny_cohort, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    arguments = ("--data", tiny_cohort, "--out", tmp_path / "file" / "run")
    with pytest.raises(SystemExit, match=rf"error: .*Not a directory: '{tmp_path}/file/run'"):
        run_example(monkeypatch, "train_npc", *arguments)


def start_of_a_run(folder, **changes):
    """A folder with the recipe of a run that is to be resumed, of networks of a few weights."""
    numbers = {"filters": (2,), "reduction": 2, "folds": 3, "epochs": 2, "steps_per_epoch": 2, "warmup_epochs": 1}
    recipe = Recipe().replace({"spacing": 4.0, "patch_shape": (16, 16, 16), "batch_size": 2, **numbers, **changes})
    folder.mkdir()
    (folder / "recipe.json").write_text(recipe.to_json())
    return folder


@pytest.fixture
def trained(tmp_path):
    """The folder of a run with two folds, as far as segmenting needs it."""
    recipe = Recipe.small().replace(
        {"patches.shape": (4, 16, 16), "network.filters": (2, 3), "network.reduction": 2, "data.spacing": None}
    )
    folder = tmp_path / "run"
    for fold in range(2):
        model = MMFNet(recipe.data.modalities, recipe.patches.shape, recipe.network.filters, reduction=2)
        fill(model, seed=fold)
        (folder / f"fold_{fold}").mkdir(parents=True)
        model.save(folder / f"fold_{fold}" / "mmfnet.keras")
    (folder / "recipe.json").write_text(recipe.to_json())
    return folder


def run_example(monkeypatch, name, *arguments):
    """Runs an example in this process."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    importlib.import_module(name).main()


def test_a_dicom_patient_is_segmented(trained, tmp_path, monkeypatch, capsys):
    grid = Grid((24, 20, 6), (2.0, 2.0, 4.0), (-20.0, -20.0, 0.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
    patient = tmp_path / "Zoë"
    for seed, name in enumerate(("T1", "T2", "T1 Gd")):
        write_series(patient, grid, name, prefix=name, seed=seed, patient="Secret^Name")
    names = ("out.nii.gz", "rs.dcm", "seg.dcm", "probability.nii.gz", "disagreement.nii.gz")
    outputs = [tmp_path / name for name in names]
    flags = zip(("--out", "--rtstruct", "--seg", "--probability", "--disagreement"), outputs, strict=True)
    arguments = ("--run", trained, "--patient", patient, *(part for pair in flags for part in pair))
    run_example(monkeypatch, "segment_patient", *arguments, "--mirror", "--gaussian")
    assert re.search(r"out.nii.gz: [1-9]\d* voxels of tumour, \d+\.\d ml", capsys.readouterr().out)

    mask, probability, disagreement = (sitk.ReadImage(str(outputs[index])) for index in (0, 3, 4))
    assert Grid.from_image(mask).matches(grid)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(probability) >= 0.5, sitk.GetArrayFromImage(mask) > 0)
    assert sitk.GetArrayFromImage(disagreement).max() > 0.01
    assert [pydicom.dcmread(outputs[index]).Modality for index in (1, 2)] == ["RTSTRUCT", "SEG"]
    assert not any("Secret" in path.name for path in tmp_path.rglob("*"))

    # Nothing is overwritten, and what cannot be done is said before any work.
    with pytest.raises(SystemExit, match=r"a new file in a folder that exists is expected. Received: .*out.nii.gz"):
        run_example(monkeypatch, "segment_patient", *arguments)
    elsewhere = ("--run", trained, "--patient", patient, "--out", tmp_path / "other.nii.gz")
    with pytest.raises(SystemExit, match=r"a run with trained folds is expected. Received: .*--fold \[7\]"):
        run_example(monkeypatch, "segment_patient", *elsewhere, "--fold", 7)
    run_example(monkeypatch, "segment_patient", *elsewhere, "--fold", 1)
    for seed, name in enumerate(("t1", "t2", "cet1")):
        (tmp_path / "plain").mkdir(exist_ok=True)
        array = np.random.default_rng(seed).random(grid.shape)
        sitk.WriteImage(grid.image(array), str(tmp_path / "plain" / f"{name}.nii.gz"))
    plain = ("--run", trained, "--patient", tmp_path / "plain", "--out", tmp_path / "plain.nii.gz")
    with pytest.raises(SystemExit, match=r"DICOM series are expected as the patient. Received: .*t1.nii.gz"):
        run_example(monkeypatch, "segment_patient", *plain, "--rtstruct", tmp_path / "no.dcm")


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="takes too long on a CPU with the other backends")
def test_no_output_names_the_patient(tiny_cohort, tmp_path):
    """Of a run over DICOM series, one of which cannot be used: neither a file's name, nor text, nor what is printed."""
    for number, folder in enumerate(sorted(tiny_cohort.iterdir())):
        patient = tmp_path / "patients" / f"Zoë {number}"
        for name in ("t1", "t2", "cet1"):
            image = sitk.ReadImage(str(folder / f"{name}.nii.gz"))
            array = sitk.GetArrayFromImage(image) + 100
            write_series(patient / name, Grid.from_image(image), name, array=array, patient="Secret^Id")
            for path in (patient / name).iterdir():
                slice_ = pydicom.dcmread(path)
                slice_.PatientName, slice_.PatientBirthDate = "Secret^Name", "19700101"
                slice_.save_as(path)
        shutil.copy(folder / "mask.nii.gz", patient)
    (patient / "t2" / "slice_03.dcm").unlink()
    out = start_of_a_run(tmp_path / "run", self_transfer=False, epochs=1)
    done = run("train_npc.py", "--data", tmp_path / "patients", "--out", out, "--resume", "--skip-bad")
    assert done.returncode == 0, done.stderr
    assert list(json.loads((out / "cohort.json").read_text())["skipped"]) == ["Zoë 5"]
    assert len(masks(out)) == 2
    assert "Zoë" in (out / "report.html").read_text(encoding="utf-8")
    assert "a stack without a gap" in (out / "run.log").read_text(encoding="utf-8")
    written = [path for path in out.rglob("*") if path.is_file()]
    assert (out / "report.html") in written
    assert not [path for path in written if "secret" in str(path.relative_to(tmp_path)).lower()]
    assert not [path for path in written if b"secret" in path.read_bytes().lower() or b"19700101" in path.read_bytes()]
    assert "secret" not in (done.stdout + done.stderr).lower()


@pytest.mark.parametrize("example", ["segment_patient", "explain_patient"])
def test_a_network_that_is_damaged_or_of_another_recipe_is_named(example, trained, tiny_cohort, tmp_path, monkeypatch):
    network = trained / "fold_0" / "mmfnet.keras"
    arguments = ("--run", trained, "--patient", tiny_cohort / "patient_00", "--out", tmp_path / "out.nii", "--fold", 0)
    recipe = Recipe.load(trained / "recipe.json")
    (trained / "recipe.json").write_text(recipe.replace({"patches.shape": (4, 32, 16)}).to_json())
    with pytest.raises(
        SystemExit, match=rf"error: {network}: must be a network from patches \(4, 32, 16\).*Received: "
    ):
        run_example(monkeypatch, example, *arguments)
    network.write_bytes(network.read_bytes()[:-100])
    with pytest.raises(SystemExit, match=rf"error: {network}: must be an undamaged .keras file.*Received: "):
        run_example(monkeypatch, example, *arguments)
    assert not (tmp_path / "out.nii").exists()


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="the backend that exports to ONNX")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_patient_is_served_by_onnxruntime(trained, tiny_cohort, tmp_path, monkeypatch):
    run_example(
        monkeypatch,
        "segment_patient",
        "--run",
        trained,
        "--patient",
        tiny_cohort / "patient_00",
        "--out",
        tmp_path / "a.nii",
        "--fold",
        0,
    )
    network = keras.models.load_model(trained / "fold_0" / "mmfnet.keras", compile=False)
    network.export(tmp_path / "network.onnx", format="onnx", verbose=False)
    arguments = ["--network", tmp_path / "network.onnx", "--recipe", trained / "recipe.json"]
    arguments += ["--patient", tiny_cohort / "patient_00", "--out", tmp_path / "b.nii"]
    run_example(monkeypatch, "serve_onnx", *arguments)
    one, other = (sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / name))) for name in ("a.nii", "b.nii"))
    assert np.count_nonzero(one) > 0
    assert np.mean(one != other) < 1e-3
    with pytest.raises(SystemExit, match=r"a new file in a folder that exists is expected. Received: .*b.nii"):
        run_example(monkeypatch, "serve_onnx", *arguments)
    arguments[-1] = tmp_path / "c.nii"
    (trained / "recipe.json").write_text(Recipe.small().replace({"patches.shape": (16, 32, 16)}).to_json())
    with pytest.raises(SystemExit, match=r"network.onnx: a network over patches \(16, 32, 16\) of .*Received: {'cet1'"):
        run_example(monkeypatch, "serve_onnx", *arguments)
    (tmp_path / "network.onnx").write_bytes(b"damaged")
    with pytest.raises(SystemExit, match=r"network.onnx: an undamaged network as ONNX is expected. Received: "):
        run_example(monkeypatch, "serve_onnx", *arguments)


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="takes too long on a CPU with the other backends")
def test_a_killed_run_is_resumed_and_ends_with_the_same_files(cohort, tmp_path):
    arguments = ("--data", cohort, *QUICK, "--out")
    undisturbed = run("train_npc.py", *arguments, tmp_path / "undisturbed")
    assert undisturbed.returncode == 0, undisturbed.stderr

    # Killed in the second epoch of the second network, and then while MMFNet is warming up.
    folder = tmp_path / "killed"
    for moment in ("fold_0/.t2/all/epoch-00001", "fold_0/.mmfnet"):
        resume = ["--resume"] if folder.exists() else []
        process = subprocess.Popen(
            command("train_npc.py", *arguments, folder, *resume), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and not (folder / moment).exists():
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL

    # The recipe is the run's, so that it need not be said again.
    resumed = run("train_npc.py", "--data", cohort, "--out", folder, "--resume", "--quiet")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout == f"{folder / 'metrics.csv'}\n"
    names = [
        sorted(str(path.relative_to(top)) for path in top.rglob("*") if path.is_file() and "cache" not in path.parts)
        for top in (folder, tmp_path / "undisturbed")
    ]
    assert names[0] == names[1]
    for name, text in histories(folder).items():
        expected = list(csv.reader(histories(tmp_path / "undisturbed")[name].splitlines()))
        for row, other in zip(csv.reader(text.splitlines()), expected, strict=True):
            for column, value, reference in zip(expected[0], row, other, strict=True):
                if column == "seconds":
                    continue
                if reference[:1].isdigit():
                    assert float(value) == pytest.approx(float(reference), rel=1e-3)
                else:
                    assert value == reference
    for name, mask in masks(tmp_path / "undisturbed").items():
        assert np.mean(masks(folder)[name] != mask) < 1e-4

    # The page about the run is whole, and the log goes on where it was stopped.
    assert "Best, median and worst patient" in (folder / "report.html").read_text(encoding="utf-8")
    log = (folder / "run.log").read_text(encoding="utf-8")
    assert log.count("Preprocessed patient 1 of 6") == 3
    assert "Segmented patient 2 of 2: DSC" in log

    # Another recipe is refused.
    other = run("train_npc.py", "--data", cohort, "--out", folder, "--resume", "--epochs", 5)
    assert other.returncode != 0
    assert "another recipe. Received: epochs: 2 before, 5 now" in other.stderr
    # So is a run that would overwrite this one.
    again = run("train_npc.py", *arguments, folder)
    assert again.returncode != 0
    assert "must hold no run" in again.stderr

    # The folder is enough to segment a patient.
    patient = json.loads((folder / "metrics.json").read_text())["patients"][0]["patient"]
    out, picture = tmp_path / "mask.nii.gz", tmp_path / "picture.png"
    done = run("segment_patient.py", "--run", folder, "--patient", cohort / patient, "--out", out, "--picture", picture)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(out))), masks(folder)[f"{patient}.nii.gz"])
    assert picture.stat().st_size > 1000
    done = run("segment_patient.py", "--run", folder, "--patient", cohort / patient, "--out", out)
    assert done.returncode != 0
    assert f"Received: {out}" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="takes too long on a CPU with the other backends")
def test_the_demonstration_learns_to_segment(tmp_path):
    start = time.monotonic()
    done = run("train_npc.py", "--out", tmp_path / "run", timeout=1500)
    print(done.stdout[-1500:], f"{time.monotonic() - start:.0f} s")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "metrics.json").read_text())["summary"]
    assert summary["dsc"]["mean"] >= 0.75
    assert "mean" in done.stdout
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 7
    assert "http" not in page
    assert "Epoch 4 of 4" in (tmp_path / "run" / "run.log").read_text(encoding="utf-8")
