import json
import re
import shutil

import filelock
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_files import find_series, write_series

from keras_mmfnet.data import Grid
from keras_mmfnet.data.labels import split_labels
from keras_mmfnet.data.structures import DicomStructures, read_structures
from keras_mmfnet.models import load_network
from keras_mmfnet.recipe import Recipe

GRID = Grid((24, 20, 6), (2.0, 2.0, 4.0), (-20.0, -20.0, 0.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))


def read(path):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def test_a_dicom_patient_is_segmented(mmfnet, trained, tmp_path):
    patient, out = tmp_path / "Zoë", tmp_path / "out"
    for seed, name in enumerate(("T1", "T2", "T1 Gd")):
        write_series(patient, GRID, name, prefix=name, seed=seed, patient="Secret^Name")
    for path in patient.glob("T2*"):
        one = pydicom.dcmread(path)
        one.FrameOfReferenceUID = "1.2.826.0.1.3680043.2.1125.99"
        one.save_as(path)
    flags = ("--rtstruct", "--seg", "--probability", "--disagreement", "--mirror", "--gaussian")
    done = mmfnet("segment", trained, patient, "--out", out, *flags)
    assert re.search(r"1 of 1: Zoë.*; [1-9]\d* voxels of tumour, \d+\.\d ml", done.stderr)
    assert done.stdout == f"{out}\n"
    notes = json.loads((out / "Zoë.json").read_text(encoding="utf-8"))["about"]["notes"]
    assert any("t2: in another frame of reference than t1" in note for note in notes), "for mmfnet node status"
    ends = (".json", ".nii.gz", "_disagreement.nii.gz", "_probability.nii.gz", "_rtstruct.dcm", "_seg.dcm")
    assert sorted(path.name for path in out.iterdir()) == sorted(f"Zoë{end}" for end in ends)
    assert Grid.from_image(sitk.ReadImage(str(out / "Zoë.nii.gz"))).matches(GRID)
    np.testing.assert_array_equal(read(out / "Zoë_probability.nii.gz") >= 0.5, read(out / "Zoë.nii.gz") > 0)
    assert read(out / "Zoë_disagreement.nii.gz").max() > 0.01
    assert [pydicom.dcmread(out / f"Zoë_{kind}.dcm").Modality for kind in ("rtstruct", "seg")] == ["RTSTRUCT", "SEG"]
    assert "Segmented already: 1 of 1" in mmfnet("segment", trained, patient, "--out", out, *flags).stderr
    for options in (("--structure", "GTV"), ("--tolerance", 0.5)):
        other = mmfnet("segment", trained, patient, "--out", out, *flags, *options, code=1)
        assert re.search(r"Zoë_rtstruct.dcm: must be made with .* as now; .* Received: a file made with", other.stderr)
    # Interrupted before it was known what was found.
    record = json.loads((out / "Zoë.json").read_text(encoding="utf-8"))
    found = record["about"].pop("found")
    (out / "Zoë.json").write_text(json.dumps(record), encoding="utf-8")
    assert "1 of 1: Zoë" in mmfnet("segment", trained, patient, "--out", out, *flags).stderr
    assert json.loads((out / "Zoë.json").read_text(encoding="utf-8"))["about"]["found"] == found
    limits = ("--rtstruct", "--tolerance", 0.5, "--max-points", 3)
    refused = mmfnet("segment", trained, patient, "--out", tmp_path / "few", *limits, code=1)
    assert re.search(r"at most 3 points with a tolerance of 0.5 mm. Received: \d+ points in slice", refused.stderr)
    assert not any("Secret" in path.name for path in tmp_path.rglob("*"))
    assert "Secret" not in done.output


def test_several_structures(mmfnet, regions, tmp_path):
    patient, out, options = tmp_path / "ann", tmp_path / "out", ("--rtstruct", "--seg", "--probability", "--picture")
    for seed, name in enumerate(("T1", "T2", "T1 Gd")):
        write_series(patient, GRID, name, prefix=name, seed=seed)
    names, labels = ("whole", "core", "enhancing"), np.zeros(GRID.shape, np.uint8)
    labels[2:4, 5:15, 5:15] = 2
    labels[2:4, 8:12, 8:12] = 1
    sitk.WriteImage(GRID.image(labels), str(patient / "mask.nii.gz"))
    done = mmfnet("segment", regions, patient, "--out", out, *options)
    ends = (".json", ".nii.gz", ".png", "_rtstruct.dcm", "_seg.dcm", *(f"_probability_{name}.nii.gz" for name in names))
    assert sorted(path.name for path in out.iterdir()) == sorted(f"ann{end}" for end in ends)
    record = json.loads((out / "ann.json").read_text(encoding="utf-8"))
    assert record["mask"] == "mask", "for evaluate"
    assert record["labels"].keys() == set(names)
    # One label image holds all of them; a region within another has the inner one's label.
    masks = split_labels(read(out / "ann.nii.gz"), Recipe.load(regions / "recipe.json").data.structures)
    assert masks["enhancing"].any()
    assert (masks["core"] >= masks["enhancing"]).all()
    assert (masks["whole"] >= masks["core"]).all()
    for name in names:
        assert f"{masks[name].sum()} voxels of {name}, " in done.stderr
        assert read(out / f"ann_probability_{name}.nii.gz")[masks[name]].max() >= 0.5
    assert re.search(r"whole DSC \d\.\d{4}, HD95 \d.*core DSC .*the expert's mask of enhancing is empty", done.stderr)
    structure_set, segments = (pydicom.dcmread(out / f"ann_{kind}.dcm") for kind in ("rtstruct", "seg"))
    assert [one.ROIName for one in structure_set.StructureSetROISequence] == list(names)
    assert [one.SegmentLabel for one in segments.SegmentSequence] == list(names)
    colours = {tuple(one.ROIDisplayColor) for one in structure_set.ROIContourSequence}
    assert len(colours) == 3
    (series,) = [one for one in find_series(patient, "ann") if one.description == "T1"]
    for path in (out / "ann_rtstruct.dcm", out / "ann_seg.dcm"):
        for name in names:
            written = read_structures(DicomStructures(path, series, name), "ann")
            np.testing.assert_array_equal(sitk.GetArrayFromImage(written) > 0, masks[name])
    assert "Segmented already: 1 of 1 patient" in mmfnet("segment", regions, patient, "--out", out, *options).stderr
    renamed = mmfnet("segment", regions, patient, "--out", tmp_path / "b", "--structure", "GTV", code=1)
    assert "for a network of one structure, are expected. Received: GTV for whole, core, enhancing" in renamed.stderr


def test_structures_with_a_file_each(mmfnet, regions, tiny_cohort, tmp_path):
    recipe = Recipe.load(regions / "recipe.json")
    named = {"whole": "wt", "core": "tc", "enhancing": "et"}
    (regions / "recipe.json").write_text(recipe.replace({"data.structures": named}).to_json())
    arguments = "segment", regions, tiny_cohort / "patient_00", "--out", tmp_path / "out", "--probability"
    mmfnet(*arguments)
    files = {f"patient_00{what}_{name}.nii.gz" for name in named for what in ("", "_probability")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"patient_00.json", *files}
    whole = tmp_path / "out" / "patient_00_whole.nii.gz"
    before = read(whole)
    assert set(np.unique(before)) == {0, 1}
    whole.unlink()
    mmfnet(*arguments)
    np.testing.assert_array_equal(read(whole), before)
    assert "Segmented already: 1 of 1 patient" in mmfnet(*arguments).stderr


def test_what_cannot_be_done_is_said_before_any_work(mmfnet, trained, tiny_cohort, tmp_path, monkeypatch):
    monkeypatch.setattr("keras_mmfnet.inference.segment_ensemble", lambda *_, **__: pytest.fail("it was segmented"))
    patient = tiny_cohort / "patient_00"

    def refused(*arguments):
        return mmfnet("segment", *arguments, "--out", tmp_path / "out", code=1).stderr

    assert re.search(r"that is trained \(0, 1\) is expected. Received: 7", refused(trained, patient, "--fold", 7))
    assert re.search("recipe.json, is expected. Received: .*nowhere", refused(tmp_path / "nowhere", patient))
    assert re.search("recipe.json, is expected. Received: ", refused(tiny_cohort, patient))
    assert "two or more folds" in refused(trained, patient, "--disagreement", "--fold", 1, "--fold", 1)
    assert "two or more folds" in refused(trained, patient, "--disagreement", "--fold", 1)
    assert "--structure" in refused(trained, patient, "--rtstruct", "--structure", "a\\b")
    lines = refused(trained, tiny_cohort, "--rtstruct").splitlines()
    assert [line for line in lines if "DICOM" in line] == [
        "  patient_00: must be DICOM series for --rtstruct and --seg. Received: image files (likewise for 5 others: "
        "patient_01, patient_02, patient_03, patient_04, patient_05)"
    ]
    assert not list((tmp_path / "out").glob("*"))


def test_a_folder_of_patients(mmfnet, trained, tiny_cohort, tmp_path, monkeypatch):
    """One bad patient does not stop the others; networks are loaded once; what is done is not done again."""
    patients, out, loaded = tmp_path / "patients", tmp_path / "out", []
    shutil.copytree(tiny_cohort, patients)
    (patients / "patient_01" / "t2.nii.gz").write_bytes(b"no image")
    (patients / "patient_04" / "cet1.nii.gz").unlink()
    (patients / "patient_05" / "mask.nii.gz").unlink()

    def load(path, recipe):
        loaded.append(path)
        return load_network(path, recipe)

    monkeypatch.setattr("keras_mmfnet.models.load_network", load)
    done = mmfnet("segment", trained, patients, "--out", out, "--picture", code=1)
    names = ["patient_00", "patient_02", "patient_03", "patient_05"]
    assert sorted(path.name for path in out.glob("*.nii.gz")) == [f"{name}.nii.gz" for name in names]
    assert all((out / f"{name}.png").stat().st_size > 1000 for name in names)
    assert len(loaded) == 2
    *_, headline, first, second = done.stderr.splitlines()
    assert headline == "error: not segmented: 2 of 6 patients"
    assert {line.split(":")[0].strip() for line in (first, second)} == {"patient_01", "patient_04"}
    # The expert's mask is compared with where there is one.
    compared = [line for line in done.stderr.splitlines() if re.search(r"DSC \d\.\d{4}, HD95 \d+\.\d mm", line)]
    assert [line.split(": ")[1].split(";")[0] for line in compared] == names[:3]

    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    shutil.rmtree(patients / "patient_01")
    shutil.rmtree(patients / "patient_04")
    (out / "patient_02.png").unlink()
    again = mmfnet("segment", trained, patients, "--out", out, "--picture")
    assert "Segmented already: 3 of 4 patients" in again.stderr
    changed = {path.name for path in out.iterdir() if path.stat().st_mtime_ns != before.get(path)}
    assert changed == {"patient_02.json", "patient_02.png"}

    # Masks of other networks, options or images are neither kept as if they were of these nor overwritten.
    other = mmfnet("segment", trained, patients, "--out", out, "--picture", "--fold", 0, code=1)
    assert "error: not segmented: 4 of 4 patients" in other.stderr
    assert "made from the same images, networks and options" in other.stderr
    assert "Received: a file made with another folds, source" in other.stderr
    shutil.copy(patients / "patient_02" / "t1.nii.gz", patients / "patient_00" / "t1.nii.gz")
    other = mmfnet("segment", trained, patients, "--out", out, "--picture", code=1)
    assert "error: not segmented: 1 of 4 patients" in other.stderr


def test_a_patient_whom_another_process_segments(mmfnet, trained, tiny_cohort, tmp_path):
    patient, out = tiny_cohort / "patient_00", tmp_path / "out"
    out.mkdir()
    with filelock.FileLock(out / ".patient_00.lock"):
        refused = mmfnet("segment", trained, patient, "--out", out, code=1).stderr
        assert "patient_00: no other `mmfnet segment` may write the same files at the same time" in refused
        assert not list(out.glob("patient_00*"))
    mmfnet("segment", trained, patient, "--out", out)
    assert {path.name for path in out.iterdir()} == {"patient_00.nii.gz", "patient_00.json"}


def test_patients_whose_files_would_have_one_name(mmfnet, trained, tiny_cohort, tmp_path):
    for name in ("anna", "anna_probability"):
        shutil.copytree(tiny_cohort / "patient_00", tmp_path / "patients" / name)
    refused = mmfnet("segment", trained, tmp_path / "patients", "--out", tmp_path / "out", code=1).stderr
    assert "different names are expected. Received: anna_probability.nii.gz of two patients" in refused


def test_a_structures_file_would_have_another_patients_name(mmfnet, regions, tiny_cohort, tmp_path):
    recipe = Recipe.load(regions / "recipe.json")
    named = {"node": "node", "l_node": "l_node", "gtv": "gtv"}
    (regions / "recipe.json").write_text(recipe.replace({"data.structures": named}).to_json())
    for name in ("a", "a_l"):
        shutil.copytree(tiny_cohort / "patient_00", tmp_path / "patients" / name)
    refused = mmfnet("segment", regions, tmp_path / "patients", "--out", tmp_path / "out", code=1).stderr
    assert "a_l_node.nii.gz of two patients" in refused
    assert not (tmp_path / "out").exists()


def test_a_patient_without_tumour(mmfnet, trained, tmp_path):
    for fold in range(2):
        path = trained / f"fold_{fold}" / "mmfnet.keras"
        network = load_network(path)
        kernel, bias = network.layers[-1].get_weights()
        network.layers[-1].set_weights([kernel * 0, bias * 0 - 5])
        network.save(path)
    patient, out = tmp_path / "Ann", tmp_path / "out"
    for seed, name in enumerate(("T1", "T2", "T1 Gd")):
        write_series(patient, GRID, name, prefix=name, seed=seed)
    done = mmfnet("segment", trained, patient, "--out", out, "--rtstruct")
    assert "no tumour was found, the mask is empty, no DICOM file was written" in done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["Ann.json", "Ann.nii.gz"]
    assert not read(out / "Ann.nii.gz").any()
    again = mmfnet("segment", trained, patient, "--out", out, "--rtstruct")
    assert "Segmented already: 1 of 1 patient" in again.stderr


def test_the_post_processing_of_the_run_is_applied(mmfnet, trained, tmp_path):
    patient, out = tmp_path / "Ann", tmp_path / "out"
    for seed, name in enumerate(("T1", "T2", "T1 Gd")):
        write_series(patient, GRID, name, prefix=name, seed=seed)
    recipe = Recipe.load(trained / "recipe.json").replace({"training.postprocess": True})
    (trained / "recipe.json").write_text(recipe.to_json())
    arguments = ("segment", trained, patient, "--out", out, "--fold", 0)
    assert "a finished fold is expected" in mmfnet(*arguments, code=1).stderr

    def choose(**rule):
        rules = {"rules": {"structures": {"tumour": rule}, "exclusive": True}}
        (trained / "fold_0" / "mmfnet.json").write_text(json.dumps({"postprocess": rules}))

    choose(threshold=0.9)
    done = mmfnet(*arguments, "--rtstruct", "--probability")
    assert "Post-processing, tumour: from a probability of 0.9" in done.stderr
    mask, probability = read(out / "Ann.nii.gz") > 0, read(out / "Ann_probability.nii.gz")
    np.testing.assert_array_equal(mask, probability >= 0.9)
    assert (mask != (probability >= 0.5)).any()
    assert "Segmented already: 1 of 1 patient" in mmfnet(*arguments).stderr
    choose(smallest_ml=1e6)
    assert "made from the same images, networks and options" in mmfnet(*arguments, code=1).stderr
    done = mmfnet("segment", trained, patient, "--out", tmp_path / "nothing", "--fold", 0)
    assert "no tumour was found, the mask is empty" in done.stderr


def test_every_layout_that_trains_is_segmented(mmfnet, trained, tiny_cohort, tmp_path):
    dataset = tmp_path / "Dataset001"
    (dataset / "imagesTs").mkdir(parents=True)
    (dataset / "dataset.json").write_text('{"channel_names": {"0": "T1", "1": "T2", "2": "CET1"}}')
    for name in ("patient_00", "patient_01"):
        for number, modality in enumerate(("t1", "t2", "cet1")):
            source = tiny_cohort / name / f"{modality}.nii.gz"
            shutil.copy(source, dataset / "imagesTs" / f"{name}_{number:04d}.nii.gz")
    mmfnet("segment", trained, dataset, "--out", tmp_path / "root", "--fold", 0)
    mmfnet("segment", trained, dataset / "imagesTs" / "patient_01_0000.nii.gz", "--out", tmp_path / "one", "--fold", 0)
    assert {path.name for path in (tmp_path / "root").glob("*.gz")} == {"patient_00.nii.gz", "patient_01.nii.gz"}
    assert [path.name for path in (tmp_path / "one").glob("*.gz")] == ["patient_01.nii.gz"]


@pytest.mark.parametrize("command", ["segment", "explain"])
def test_a_network_that_is_damaged_or_of_another_recipe_is_named(mmfnet, command, trained, tiny_cohort, tmp_path):
    network = trained / "fold_0" / "mmfnet.keras"
    arguments = (command, trained, tiny_cohort / "patient_00", "--out", tmp_path / "out", "--fold", 0)
    recipe = Recipe.load(trained / "recipe.json")
    (trained / "recipe.json").write_text(recipe.replace({"patches.shape": (4, 32, 16)}).to_json())
    done = mmfnet(*arguments, code=1)
    assert re.search(rf"error: {network}: must be a network from patches \(4, 32, 16\).*Received: ", done.stderr)
    network.write_bytes(network.read_bytes()[:-100])
    done = mmfnet(*arguments, code=1)
    assert re.search(rf"error: {network}: must be an undamaged .keras file.*Received: ", done.stderr)
    assert not (tmp_path / "out").exists()
