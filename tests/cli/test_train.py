import json
import logging
import os
import re
import shutil
import signal
import sys

import pydicom
import pytest
import SimpleITK as sitk
from dicom_files import write_series

from keras_mmfnet import plan, training
from keras_mmfnet import run as runner
from keras_mmfnet.bundle import Bundle
from keras_mmfnet.cli._options import choose_recipe, parse_structures
from keras_mmfnet.data import Grid, read_case_folder
from keras_mmfnet.recipe import Recipe
from keras_mmfnet.run import Run


@pytest.fixture(scope="session")
def tiny(tiny):
    """The same without a plan, which has a test of its own."""
    return ["--small", *tiny]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "DATA: a folder is expected. Received: nowhere, which does not exist"),
        (["{cohort}", "--small", "--set", "patches.shape=16,100,64"], "`patches.shape` must be (depth, height, width)"),
        (["{cohort}", "--set", "training.epoch=3"], "did you mean `training.epochs`?"),
        (["{cohort}", "--set", "training.epochs"], "--set: FIELD=VALUE is expected"),
        (["{cohort}", "--small", "--set", "training.folds=7"], "7 folds need at least 7 patients"),
        (["{cohort}", "--fold", "5"], "--fold: numbers from 0 to 4, or all, are expected. Received: 5"),
        (["{cohort}", "--paper", "--recipe", "r.json"], "--recipe, --paper: one of the two"),
        (["{cohort}", "--paper", "--small"], "--recipe, --paper, --small: one of them is expected"),
        (["{cohort}", "--time", "2 weeks"], "--time: a number with one of s, min, h, d is expected. Received: 2 weeks"),
        (["{cohort}", "--memory", "0GB"], "--memory: a number with one of MB, GB, TB is expected. Received: 0GB"),
        (["{cohort}", "--splits", "{cohort}/folds.json"], "--splits: a file that exists is expected. Received: "),
        (["{cohort}", "--groups", "{cohort}/patient_00/t1.nii.gz"], "groups must be CSV in UTF-8"),
        ([], "DATA: a folder of patients is expected"),
        (["--resume"], "the folder of a run, with a recipe.json, is expected"),
        (["{cohort}", "--small", "--track", "wandb"], "--track: tensorboard or mlflow is expected. Received: wandb"),
        (["{cohort}", "--device", "tpu"], "--device: cpu, gpu or gpu:<number> is expected. Received: tpu"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(mmfnet, tiny_cohort, tmp_path, arguments, message):
    arguments = [argument.format(cohort=tiny_cohort) for argument in arguments]
    done = mmfnet("train", *arguments, "--out", tmp_path / "run", code=1)
    assert message in done.stderr
    assert [line for line in done.stderr.splitlines() if "error: " in line] == [done.stderr.splitlines()[-1]]
    assert done.stdout == ""
    assert not (tmp_path / "run").exists()


def test_a_loss_of_ones_own(mmfnet, tiny_cohort, tmp_path, monkeypatch):
    monkeypatch.setattr("keras_mmfnet.losses.LOSSES", losses := {})
    file = tmp_path / "mine.py"
    file.write_text(
        "from keras_mmfnet.losses import DiceLoss, register_loss\nregister_loss('mine', lambda _: DiceLoss())\n"
    )
    wrong = ["train", tiny_cohort, "--out", tmp_path / "run", "--small", "--set", "training.loss=mine"]
    assert "`training.loss`, must be one of " in mmfnet(*wrong, code=1).stderr
    folds = "--set", "training.folds=7"
    assert "7 folds need at least" in mmfnet(*wrong, *folds, "--import", file, code=1).stderr
    assert list(losses) == ["mine"]
    assert "--import: a Python file is expected" in mmfnet(*wrong, "--import", tmp_path / "no.py", code=1).stderr


def test_a_mistake_is_said_before_the_backend_starts(mmfnet, trained, tiny_cohort, tmp_path, monkeypatch):
    for name in ("train", "compare", "segment", "explain", "export", "report"):
        monkeypatch.setattr(sys.modules[f"keras_mmfnet.cli.{name}"], "start_backend", lambda *_: pytest.fail("started"))
    out = ("--out", tmp_path / "out")
    for arguments, message in (
        (("train", "nothere", *out), "DATA: a folder is expected. Received: nothere"),
        (("train", tiny_cohort, *out, "--recipe", "no.json"), "no.json: the JSON file of a recipe is expected"),
        (("train", tiny_cohort, *out, "--fold", 9), "--fold: numbers from 0 to 4"),
        (("compare", "nothere", *out), "DATA: a folder is expected. Received: nothere"),
        (("segment", trained, "nothere", *out), "nothere: does not exist"),
        (
            ("segment", tiny_cohort, trained, *out),
            "RUN: a bundle, or the folder of a run, with a recipe.json, is expected",
        ),
        (("explain", trained, "nothere", *out), "nothere: does not exist"),
        (("export", "nothere", *out), "RUN: the folder of a run, with a recipe.json, is expected"),
        (("report", "nothere"), "RUN: the folder of a run, with a recipe.json, is expected"),
    ):
        assert message in mmfnet(*arguments, code=1).stderr


def test_the_recipe_of_the_options(tmp_path):
    assert choose_recipe(None, True, None) == Recipe()
    assert choose_recipe(None, False, None) == Recipe.small()
    path = tmp_path / "recipe.json"
    path.write_text(Recipe().replace({"training.epochs": 9}).to_json())
    assert choose_recipe(path, False, ["training.seed=7"]).training.epochs == 9
    changes = """data.modalities=a,b data.mask=gtv data.structures.core=1,4 training.epochs=3 patches.shape=32,32,32
        patches.stride=4,none,none training.mixed_precision=bfloat16 data.normalised_scale=1000 data.spacing=none
        data.series.a="x,y" data.clip.a=-2,1.5 training.self_transfer=false""".split()
    assert choose_recipe(None, False, changes) == Recipe.small().replace(
        {
            "data.modalities": ("a", "b"),
            "data.mask": "gtv",
            "data.structures.core": (1, 4),
            "training.epochs": 3,
            "patches.shape": (32, 32, 32),
            "patches.stride": (4, None, None),
            "training.mixed_precision": "bfloat16",
            "data.normalised_scale": 1000.0,
            "data.spacing": None,
            "data.series.a": "x,y",
            "data.clip.a": (-2, 1.5),
            "training.self_transfer": False,
        }
    )


def test_the_structures_of_the_options():
    given = parse_structures(["core=1, 4", "low= -1", "gtv=GTV 1-3"])
    assert given == {"data.structures": {"core": (1, 4), "low": (-1,), "gtv": "GTV 1-3"}}
    assert choose_recipe(None, False, None, ["core=1, -4"]).data.structures == {"core": (1, -4)}
    for wrong in ("core=1-3", "core=1,", "core=1 4", "core= ", "1--2"):
        with pytest.raises(ValueError, match=rf"^--structure: label values .* are expected\. Received: {wrong}$"):
            parse_structures([wrong])


def test_a_folder_that_cannot_be_written(mmfnet, tiny_cohort, tmp_path, tiny):
    (tmp_path / "file").touch()
    done = mmfnet("train", tiny_cohort, "--out", tmp_path / "file" / "run", *tiny, code=1)
    assert f"Not a directory: '{tmp_path}/file/run" in done.stderr


@pytest.fixture(scope="module")
def first(mmfnet, tiny_cohort, tmp_path_factory, tiny):
    """The folder of a finished run of one fold, with planned patches, and what the command said."""
    out = tmp_path_factory.mktemp("train") / "run"
    options = [option for option in tiny if option != "--small"]
    options[options.index("patches.shape=16,16,16")] = "data.align=header"
    options += ["--set", "patches.misalignment=0,0", "--memory", "50MB", "--time", "10s"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "measure_cost", lambda: plan.StepCost(1e-8))
        return out, mmfnet("train", tiny_cohort, "--out", out, *options, "--fold", 1)


@pytest.fixture
def started(first):
    return first[0]


def test_a_run_says_how_far_it_is_and_what_comes_next(first):
    started, done = first
    assert "Computing with " in done.stderr
    assert "Preprocessed 6 of 6 patients" in done.stderr
    assert "Epoch 1 of 2: loss" in done.stderr
    assert "less than a minute left" in next(line for line in done.stderr.splitlines() if "Epoch 1" in line)
    assert "mean of 2" in done.stdout
    assert f"mmfnet segment {started} PATIENT --out" in done.stdout
    assert f"Report: {started / 'report.html'}" in done.stdout
    assert (started / "report.html").stat().st_size > 1000
    log = (started / "run.log").read_text(encoding="utf-8")
    assert "Command: mmfnet" in log
    assert "Segmented patient 2 of 2: DSC" in log


def test_a_run_without_a_recipe_is_planned(mmfnet, tiny_cohort, first):
    started, done = first
    recipe = Recipe.load(started / "recipe.json")
    assert {"patches.shape", "network.strides", "data.clip"} <= recipe.reasons.keys()
    assert "training.epochs" not in recipe.reasons, "it was given"
    assert recipe.patches.shape != Recipe.small().patches.shape
    assert "patches.shape" in done.stdout
    assert "warning" not in done.stderr, "part of a tumour outside the windows, or volumes that are padded"
    assert recipe.reasons["network.strides"] in (started / "report.html").read_text(encoding="utf-8")
    assert len(list((started / "cache").glob("*/case.json"))) == 6, (
        "the training finds the patients that the plan has read"
    )
    assert "must hold no run" in mmfnet("train", tiny_cohort, "--out", started, code=1).stderr


def test_a_finished_run_is_not_done_again(mmfnet, tiny_cohort, started, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(training._Trainer, "fit", lambda *_, **__: pytest.fail("the training started"))
    done = mmfnet("train", "--out", started, "--resume", "--quiet")
    assert done.stdout == f"{started / 'metrics.csv'}\n"
    assert done.stderr == ""
    assert "trained already: fold_1 mmfnet" in mmfnet("train", "--out", started, "--resume").stderr
    damaged = next((started / "cache").glob("*/image_t1.npy"))
    content, before = bytearray(damaged.read_bytes()), damaged.stat()
    content[-1] ^= 1
    damaged.write_bytes(content)
    os.utime(damaged, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "damaged" not in mmfnet("train", "--out", started, "--resume").stderr
    verified = mmfnet("train", "--out", started, "--resume", "--verify").stderr
    assert f"{damaged.parent}: is damaged and was removed; the patient is preprocessed again" in verified
    other = mmfnet("train", "--out", started, "--resume", "--set", "training.epochs=5", code=1)
    assert "another recipe. Received: training.epochs: 2 before, 5 now" in other.stderr
    # The patients' folder may have moved.
    shutil.copytree(tiny_cohort, tmp_path / "moved")
    mmfnet("train", tmp_path / "moved", "--out", started, "--resume")
    assert json.loads((started / "cohort.json").read_text(encoding="utf-8"))["data"] == str(tmp_path / "moved")
    mmfnet("train", tiny_cohort, "--out", started, "--resume")
    again = mmfnet("train", tiny_cohort, "--out", started, *tiny, code=1)
    assert "must hold no run" in again.stderr
    assert "--resume" in again.stderr
    ignored = mmfnet("train", tiny_cohort, "--out", tmp_path / "other", "--small", "--time", "1h", code=1)
    assert "--memory, --time: a training that is planned is expected. Received: --small" in ignored.stderr


def test_a_run_starts_from_a_bundle_or_another_run(mmfnet, tiny_cohort, started, tmp_path, monkeypatch):
    path, out, donated = tmp_path / "bundle.zip", tmp_path / "run", []
    before = Recipe.load(started / "recipe.json")
    mmfnet("export", started, "--bundle", "--out", path)
    assert Bundle(path).recipe == before
    assert before.reasons

    def cross_validate(run, method, folds):
        donated.append(list(run.donated(method)))
        raise ValueError("this is enough")

    monkeypatch.setattr(runner, "cross_validate", cross_validate)
    changes = ("--set", "data.modalities=cet1,t2", "--set", "training.self_transfer=true", "--structure", "gtv=1")
    done = mmfnet("train", tiny_cohort, "--out", out, "--from", path, *changes, code=1)
    assert f"Starting from the encoders of cet1, t2 of {path}, fold 1" in done.stderr
    assert "That network was trained on" not in done.stderr
    given = {"data.modalities": ("cet1", "t2"), "training.self_transfer": True, "data.structures": {"gtv": (1,)}}
    # The reasons of a plan are of other patients.
    assert Recipe.load(out / "recipe.json") == before.replace(given).model_copy(update={"reasons": {}})
    assert (out / "donor.keras").read_bytes() == (started / "fold_1" / "mmfnet.keras").read_bytes()
    path.unlink()  # which a resumed run does not need
    mmfnet("train", "--out", out, "--resume", code=1)
    (out / "donor.keras").write_bytes((started / "fold_1" / "mmfnet.keras").read_bytes() + b" ")
    changed = mmfnet("train", "--out", out, "--resume", code=1).stderr
    assert "donor.keras: must be the donor this run started from. Received: another or no file" in changed
    other = mmfnet("train", tiny_cohort, "--out", tmp_path / "other", "--from", started, code=1)
    assert donated == [["cet1", "t2"], ["cet1", "t2"], ["t1", "t2", "cet1"]]
    fold = json.loads((started / "cohort.json").read_text(encoding="utf-8"))["folds"][1]
    names = ", ".join(sorted(fold["train"] + fold["validation"]))
    assert f"warning: That network was trained on {names}: if they are test patients here" in other.stderr
    # Whatever they are called here, with fewer sequences, and if the network in between was trained on others.
    for number, name in enumerate(fold["train"] + fold["validation"] + fold["test"]):
        shutil.copytree(tiny_cohort / name, tmp_path / "renamed" / f"{number}")
    changes = ("--set", "data.modalities=t2,cet1")
    other = mmfnet("train", tmp_path / "renamed", "--out", tmp_path / "fewer", "--from", started, *changes, code=1)
    learned = range(len(fold["train"] + fold["validation"]))
    assert f"That network was trained on {', '.join(map(str, learned))}: if" in other.stderr
    between = Run(tmp_path / "fewer")
    case = read_case_folder(tmp_path / "renamed" / "0", Recipe().data)
    assert between.seen_in_training(case, []) == (
        "this patient was in the training set of the network that the training started from"
    )


def test_segmenting_a_patient_of_the_training_says_so(mmfnet, tiny_cohort, started, tmp_path):
    fold = json.loads((started / "cohort.json").read_text(encoding="utf-8"))["folds"][1]
    seen, unseen = tiny_cohort / fold["train"][0], tiny_cohort / fold["test"][0]
    renamed, redrawn, other = tmp_path / "renamed", tmp_path / "redrawn", tmp_path / seen.name
    shutil.copytree(seen, renamed)
    shutil.copytree(seen, redrawn)
    shutil.copy(unseen / "mask.nii.gz", redrawn)
    shutil.copytree(unseen, other)
    for name in ("t1", "t2", "cet1"):
        sitk.WriteImage(sitk.ReadImage(str(unseen / f"{name}.nii.gz")) * 2, str(other / f"{name}.nii.gz"))

    def said(patient):
        return mmfnet("segment", started, patient, "--out", tmp_path / "out" / patient.parent.name).stderr

    for patient in (seen, renamed, redrawn):
        assert re.search(r"DSC .* \(this patient was in the training set of fold 1\)", said(patient))
    assert re.search(r"DSC .* \(a patient of this name was in the training set of fold 1\)", said(other))
    assert re.search(r"DSC \S+ HD95 \S+ mm$", said(unseen).strip())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_how_to_resume(mmfnet, tiny_cohort, tmp_path, tiny, number, monkeypatch):
    out, log, before = tmp_path / "run", logging.getLogger("keras_mmfnet.progress"), signal.getsignal(signal.SIGINT)

    def interrupt(record):
        # At the last update of the second epoch of three.
        if record.what == out / "fold_0" / "mmfnet" and record.done == 4:
            signal.raise_signal(number)
        return True

    log.addFilter(interrupt)
    tiny = [*tiny, "--set", "training.epochs=3"]
    try:
        done = mmfnet("train", tiny_cohort, "--out", out, *tiny, "--fold", "all", code=128 + number)
    finally:
        log.removeFilter(interrupt)
    last = done.stderr.splitlines()[-1]
    assert last == f"stopped: fold 0, mmfnet, after epoch 1 of 3; resume with: mmfnet train --out {out} --resume"
    assert signal.getsignal(signal.SIGINT) is before
    # Before there is a run, the same command is run again.
    with monkeypatch.context() as patch:
        patch.setattr(runner.Run, "start", lambda *_, **__: signal.raise_signal(number))
        done = mmfnet("train", tiny_cohort, "--out", tmp_path / "other", *tiny, code=128 + number)
    assert done.stderr.splitlines()[-1] == "stopped; run the same command again to resume"
    # --resume knows all folds that were to run.
    asked = []

    def cross_validate(run, method, folds):
        asked.append(folds)
        raise ValueError("this is enough")

    monkeypatch.setattr(runner, "cross_validate", cross_validate)
    mmfnet("train", "--out", out, "--resume", code=1)
    assert asked == [[0, 1, 2]]


def test_a_run_that_another_process_computes(mmfnet, started, monkeypatch):
    def locked(*_, **__):
        raise runner.RunLocked("fold 0, mmfnet: is being computed by process 7 on here since noon")

    monkeypatch.setattr(runner, "run_fold", locked)
    done = mmfnet("train", "--out", started, "--resume", code=1)
    assert "error: fold 0, mmfnet: is being computed by process 7" in done.stderr


def test_no_output_names_the_patient(mmfnet, tiny_cohort, tmp_path, tiny):
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
                slice_.StudyInstanceUID += str(number)
                slice_.save_as(path)
        shutil.copy(folder / "mask.nii.gz", patient)
    (patient / "t2" / "slice_03.dcm").unlink()
    out = tmp_path / "run"
    refused = mmfnet("train", tmp_path / "patients", "--out", out, *tiny, code=1)
    assert "Zoë 5: " in refused.stderr
    assert "--skip-bad" in refused.stderr
    done = mmfnet("train", tmp_path / "patients", "--out", out, *tiny, "--skip-bad")
    assert "warning: Left out: Zoë 5: " in done.stderr
    assert list(json.loads((out / "cohort.json").read_text(encoding="utf-8"))["skipped"]) == ["Zoë 5"]
    assert "Left out: Zoë 5: " in mmfnet("train", "--out", out, "--resume").stderr
    assert len(list(out.glob("fold_*/masks/*/*"))) == 2
    assert "Zoë" in (out / "report.html").read_text(encoding="utf-8")
    assert "a stack without a gap" in (out / "run.log").read_text(encoding="utf-8")
    written = [path for path in out.rglob("*") if path.is_file()]
    assert (out / "report.html") in written
    assert not [path for path in written if "secret" in str(path.relative_to(tmp_path)).lower()]
    assert not [path for path in written if b"secret" in path.read_bytes().lower() or b"19700101" in path.read_bytes()]
    assert "secret" not in (done.output + refused.output).lower()


def test_groups_and_folds_of_the_users_own(mmfnet, tiny_cohort, tmp_path, tiny):
    names = sorted(path.name for path in tiny_cohort.iterdir())
    (tmp_path / "splits.json").write_text(json.dumps([{"train": names[:4], "val": names[4:]}]))
    (tmp_path / "groups.csv").write_text("patient,group\n" + "".join(f"{n},{n[-1] in '01'}{n[-1]}\n" for n in names))
    arguments = tiny_cohort, "--groups", tmp_path / "groups.csv", "--splits", tmp_path / "splits.json", *tiny
    done = mmfnet("train", *arguments, "--out", tmp_path / "run", "--fold", "1", code=1)
    assert "--fold: numbers from 0 to 0, or all" in done.stderr
    mmfnet("train", *arguments, "--out", tmp_path / "run", "--fold", "all")
    run = runner.Run(tmp_path / "run")
    assert [row["patient"] for row in run.results()["mmfnet"][0]["patients"]] == names[4:]
    assert run.trained_folds() == [0]
    assert "trained already: fold_0 mmfnet" in mmfnet("train", "--out", tmp_path / "run", "--resume").stderr
