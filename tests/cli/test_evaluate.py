import csv
import json
import shutil

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import find_series, write_series

from keras_mmfnet.data import Grid
from keras_mmfnet.export import Structure, write_rtstruct, write_segmentation

GRID = Grid((20, 16, 6), (1.0, 1.0, 3.0), (0.0, 0.0, 0.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))


def write(path, columns, label=1, grid=GRID):
    """A mask of a box of so many columns."""
    mask = np.zeros(grid.shape, np.uint8)
    mask[1:4, 2:10, 2 : 2 + columns] = label
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(grid.image(mask), str(path))


@pytest.fixture
def folders(tmp_path):
    for name, predicted, expert in (("ann", 4, 4), ("bob", 4, 8), ("eve", 0, 6)):
        write(tmp_path / "predicted" / f"{name}.nii.gz", predicted)
        write(tmp_path / "expert" / f"{name}.nii.gz", expert, label=3)
    probability = GRID.image(np.zeros(GRID.shape, np.float32))
    sitk.WriteImage(probability, str(tmp_path / "predicted" / "ann_probability.nii.gz"))
    return tmp_path


def test_patients_without_tumour(mmfnet, folders):
    for name, predicted in (("none", 0), ("false", 5)):
        write(folders / "predicted" / f"{name}.nii.gz", predicted)
        write(folders / "expert" / f"{name}.nii.gz", 0)
    done = mmfnet("evaluate", folders / "predicted", folders / "expert")
    lines = {" ".join(line.split()[:-8]): line.split()[-8:] for line in done.stdout.splitlines()}
    assert lines["none"] == ["-", "-", "-", "-", "-", "0.00", "-", "1.00"]
    assert lines["false"] == ["-", "-", "-", "-", "0.0000", "0.36", "-", "0.00"]
    assert lines["mean of 5"][-3:] == ["0.07", "0.67", "0.50"]
    assert lines["mean of 5"][0] == "0.5556"
    assert lines["patients"] == ["3", "3", "3", "3", "3", "5", "3", "2"]
    for name in ("ann", "bob", "eve"):
        (folders / "expert" / f"{name}.nii.gz").unlink()
    assert mmfnet("evaluate", folders / "predicted", folders / "expert", "--quiet").stdout == "-\n"


def test_two_folders_of_masks(mmfnet, folders):
    write(folders / "predicted" / "new.nii.gz", 4)
    write(folders / "expert" / "old.mha", 4)
    arguments = ("evaluate", folders / "predicted", folders / "expert")
    done = mmfnet(*arguments, "--csv", folders / "numbers.csv", "--json", folders / "numbers.json")
    with open(folders / "numbers.csv", newline="") as file:
        rows = {row["patient"]: row for row in csv.DictReader(file)}
    assert {name: round(float(row["dsc"]), 4) for name, row in rows.items()} == {"ann": 1, "bob": 0.6667, "eve": 0}
    assert float(rows["bob"]["predicted_ml"]) == pytest.approx(3 * 8 * 4 * 3 / 1000)
    assert float(rows["ann"]["hd95"]) == 0
    assert "ap" not in rows["ann"]
    found = json.loads((folders / "numbers.json").read_text(encoding="utf-8"))
    dsc = found["summary"]["dsc"]
    assert dsc["mean"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert 0 <= dsc["low"] < dsc["mean"] < dsc["high"] <= 1
    assert found["patients"][2]["precision"] is None
    lines = [line.split() for line in done.stdout.splitlines()]
    lines = {" ".join(line[:-5]): line[-5] for line in lines if len(line) > 5}
    assert lines["bob"] == "0.6667"
    assert [lines[name] for name in ("mean of 3", "95% from", "to")] == [
        f"{dsc[key]:.4f}" for key in ("mean", "low", "high")
    ]
    assert "no mask of the expert of 1 patient: new" in done.stderr
    assert "no prediction of 1 patient: old" in done.stderr
    again = mmfnet(*arguments, "--csv", folders / "numbers.csv", code=1)
    assert f"Received: {folders / 'numbers.csv'}" in again.stderr
    assert float(mmfnet(*arguments, "--quiet").stdout) == pytest.approx(dsc["mean"])
    for name in ("bob", "eve"):
        (folders / "expert" / f"{name}.nii.gz").unlink()
    one = mmfnet(*arguments).stdout
    assert "ann" in one
    assert "95%" not in one


def test_the_expert_in_the_patients_folders(mmfnet, folders):
    for name in ("ann", "bob", "eve"):
        (folders / "patients" / name).mkdir(parents=True)
        shutil.move(folders / "expert" / f"{name}.nii.gz", folders / "patients" / name / f"{name}_seg.nii.gz")
        write(folders / "patients" / name / "t1.nii.gz", 3)
    done = mmfnet("evaluate", folders / "predicted", folders / "patients")
    assert "0.6667" in done.stdout
    write(folders / "patients" / "eve" / "mask.nii.gz", 3)
    twice = mmfnet("evaluate", folders / "predicted", folders / "patients", code=1)
    assert "eve: must hold one mask. Received: " in twice.stderr
    one = mmfnet("evaluate", folders / "predicted", folders / "patients", "--mask", "eve_seg")
    assert "no mask of the expert of 2 patients: ann, bob" in one.stderr


def test_what_cannot_be_compared_is_named(mmfnet, folders, tmp_path):
    def refused(*arguments):
        return mmfnet("evaluate", folders / "predicted", *arguments, code=1).stderr

    assert "a folder is expected. Received: " in refused(folders / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "must hold masks" in refused(tmp_path / "empty")
    write(tmp_path / "others" / "zoe.nii.gz", 3)
    assert "without a pair" in refused(tmp_path / "others")
    other = Grid((20, 16, 6), (1.0, 1.0, 2.5), GRID.origin, GRID.direction)
    write(folders / "expert" / "bob.nii.gz", 4, grid=other)
    assert "error: bob: both masks must lie on one grid. Received: " in refused(folders / "expert")


def test_several_labels(mmfnet, folders):
    image = sitk.ReadImage(str(folders / "expert" / "bob.nii.gz"))
    array = sitk.GetArrayFromImage(image)
    array[1] = array[1] * 0 + 4 * (array[1] > 0)
    sitk.WriteImage(GRID.image(array), str(folders / "expert" / "bob.nii.gz"))
    done = mmfnet("evaluate", folders / "predicted", folders / "expert", code=1)
    assert "--structure (`data.structures`) says which ones belong" in done.stderr
    done = mmfnet("evaluate", folders / "predicted", folders / "expert", "--structure", "1,3,4")
    assert "0.6667" in done.stdout
    assert "structure" not in done.stdout
    assert "a regular expression" in mmfnet("evaluate", folders, folders, "--structure", "a=(", code=1).stderr


def regions(path, columns, inner):
    """A label image of 2 with so many columns of 4 in it."""
    mask = np.zeros(GRID.shape, np.uint8)
    mask[1:4, 2:10, 2 : 2 + columns] = 2
    mask[1:4, 2:10, 2 : 2 + inner] = 4
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(GRID.image(mask), str(path))


def test_several_structures_by_labels(mmfnet, tmp_path):
    for name, predicted, expert in (("ann", (8, 4), (8, 4)), ("bob", (4, 2), (8, 4)), ("eve", (6, 2), (6, 0))):
        regions(tmp_path / "predicted" / f"{name}.nii.gz", *predicted)
        regions(tmp_path / "expert" / f"{name}.nii.gz", *expert)
        (tmp_path / "predicted" / f"{name}_probability_inner.nii.gz").touch()
    folders = tmp_path / "predicted", tmp_path / "expert"
    files = "--csv", tmp_path / "numbers.csv", "--json", tmp_path / "numbers.json"
    done = mmfnet("evaluate", *folders, "--structure", "whole=2,4", "--structure", "inner=4", *files)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[:3] for line in lines if line[:1] in (["ann"], ["bob"], ["eve"])] == [
        ["ann", "whole", "1.0000"],
        ["ann", "inner", "1.0000"],
        ["bob", "whole", "0.6667"],
        ["bob", "inner", "0.6667"],
        ["eve", "whole", "1.0000"],
        ["eve", "inner", "-"],
    ]
    means = {tuple(line[:4]): line[4] for line in lines if line[:2] == ["mean", "of"]}
    assert means[("mean", "of", "3", "whole")] == "0.8889"
    assert means[("mean", "of", "3", "inner")] == "0.8333"
    assert means[("mean", "of", "3", "all")] == "0.8889"  # of each patient's mean: 1, 2/3, 1
    with open(tmp_path / "numbers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["patient"], row["structure"]) for row in rows[:2]] == [("ann", "whole"), ("ann", "inner")]
    found = json.loads((tmp_path / "numbers.json").read_text(encoding="utf-8"))
    assert found["summary"]["inner"]["dsc"]["patients"] == 2
    quiet = mmfnet("evaluate", *folders, "--structure", "whole=2,4", "--structure", "inner=4", "--quiet").stdout
    assert float(quiet) == pytest.approx(found["mean_over_structures"]["dsc"]["mean"])
    named = mmfnet("evaluate", *folders, "--structure", "all=2,4", "--structure", "inner=4").stdout
    means = [line.split()[3:5] for line in named.splitlines() if "mean of 3" in line]
    assert means == [["all", "0.8889"], ["inner", "0.8333"], ["all", "0.8889"]]
    # Labels that nobody predicts are likely others.
    done = mmfnet("evaluate", *folders, "--structure", "whole=2,4", "--structure", "inner=3")
    assert "warning" not in done.stderr
    done = mmfnet("evaluate", *folders, "--structure", "whole=2", "--structure", "inner=3")
    assert "The expert's masks have labels that belong to no structure and are not compared: 4" in done.stderr
    regions(tmp_path / "predicted" / "ann.nii.gz", 8, 0)
    regions(tmp_path / "predicted" / "bob.nii.gz", 8, 0)
    regions(tmp_path / "predicted" / "eve.nii.gz", 8, 0)
    done = mmfnet("evaluate", *folders, "--structure", "inner=4")
    assert "no voxel of inner (label 4) in any mask of the prediction" in done.stderr


def test_masks_of_a_network_of_one_structure_are_of_0_and_1(mmfnet, tmp_path):
    regions(tmp_path / "expert" / "ann.nii.gz", 8, 4)
    write(tmp_path / "predicted" / "ann.nii.gz", 4)
    done = mmfnet("evaluate", tmp_path / "predicted", tmp_path / "expert", "--structure", "inner=4")
    assert ["ann", "1.0000"] in [line.split()[:2] for line in done.stdout.splitlines()]
    assert "The predictions have the values 0 and 1 alone: 1 is taken for inner" in done.stderr
    # What mmfnet segment writes beside a mask tells which values it has.
    for labels, dice, warned in (([1], "1.0000", False), ([4], "0.0000", True)):
        (tmp_path / "predicted" / "ann.json").write_text(json.dumps({"labels": {"inner": labels}}))
        done = mmfnet("evaluate", tmp_path / "predicted", tmp_path / "expert", "--structure", "inner=4")
        assert ["ann", dice] in [line.split()[:2] for line in done.stdout.splitlines()]
        assert ("warning" in done.stderr) == warned


def test_structures_with_a_file_each(mmfnet, tmp_path):
    for folder, patient, name, columns in (
        ("predicted", "ann", "gtv", 4),
        ("predicted", "ann", "ctv", 8),
        ("predicted", "bob", "gtv", 4),
        ("predicted", "bob", "ctv", 4),
        ("expert", "ann", "gtv", 4),
        ("expert", "ann", "ctv", 4),
        ("expert", "bob", "ctv", 4),
    ):
        write(tmp_path / folder / f"{patient}_{name}.nii.gz", columns)
        write(tmp_path / "patients" / patient / f"{name.upper()}1.nii.gz", columns) if folder == "expert" else None
    options = "--structure", "gtv=GTV.*", "--structure", "ctv=ctv."
    for truth in (tmp_path / "expert", tmp_path / "patients"):
        done = mmfnet("evaluate", tmp_path / "predicted", truth, *options)
        lines = [line.split()[:3] for line in done.stdout.splitlines()]
        assert [line for line in lines if line[:1] in (["ann"], ["bob"])] == [
            ["ann", "gtv", "1.0000"],
            ["ann", "ctv", "0.6667"],
            ["bob", "ctv", "1.0000"],
        ]
        assert "bob: no mask of the expert of gtv, which is not compared" in done.stderr


def test_the_experts_masks_may_be_structures(mmfnet, tmp_path):
    write_series(tmp_path / "patients" / "ann" / "T1", GRID)
    [series] = find_series(tmp_path / "patients" / "ann", "ann")
    for columns, name in ((4, "GTV"), (8, "CTV")):
        write(tmp_path / f"{name}.nii.gz", columns)
    write(tmp_path / "predicted" / "ann.nii.gz", 4)
    structures = [Structure(name, sitk.ReadImage(str(tmp_path / f"{name}.nii.gz"))) for name in ("GTV", "CTV")]
    for export in (write_rtstruct, write_segmentation):
        path = tmp_path / "patients" / "ann" / f"{export.__name__}.dcm"
        export(structures, series, path)
        for pattern, dsc in (("gtv", "1.0000"), ("C.*", "0.6667")):
            done = mmfnet("evaluate", tmp_path / "predicted", tmp_path / "patients", "--structure", pattern)
            assert ["ann", dsc] in [line.split()[:2] for line in done.stdout.splitlines()]
        done = mmfnet("evaluate", tmp_path / "predicted", tmp_path / "patients", code=1)
        assert "a file of one structure" in done.stderr
        for name in ("GTV", "CTV"):
            shutil.copy(tmp_path / f"{name}.nii.gz", tmp_path / f"ann_{name.lower()}.nii.gz")
        both = "--structure", "gtv=GTV", "--structure", "ctv=CTV"
        done = mmfnet("evaluate", tmp_path, tmp_path / "patients", *both)
        lines = [line.split()[:3] for line in done.stdout.splitlines()]
        assert ["ann", "gtv", "1.0000"] in lines
        assert ["ann", "ctv", "1.0000"] in lines
        path.unlink()
