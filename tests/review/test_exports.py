import dataclasses
import json
import shutil

import numpy as np
import pytest
import SimpleITK as sitk
from review_patients import make_patient

from keras_mmfnet.data import find_cases, find_patients, preprocess_case
from keras_mmfnet.data.preprocess import key_of_images
from keras_mmfnet.review.corrections import Correction
from keras_mmfnet.review.exports import export_corrections


def corrected(patient, folder):
    """Adds a corner to the first structure and saves it; the masks."""
    correction = Correction(patient, folder)
    masks = correction.classes.split(correction.drawing)
    masks[0][0, 0, :2] = True
    correction.draw(correction.replacing(0, masks[0]), correction.state)
    correction.save("me", correction.state)
    return correction.classes.split(correction.drawing)


@pytest.mark.parametrize(
    "structures", [{"tumour": None}, {"tumour": (4,)}, {"tumour": (300,)}, {"tumour": "tum.*"}, None]
)
def test_a_folder_to_train_on(tmp_path, structures):
    source = make_patient(tmp_path, None if structures else {"wt": (1, 2, 4), "tc": (1, 4), "et": (4,)})
    structures = structures or source.recipe.structures
    one = dataclasses.replace(source, recipe=source.recipe.model_copy(update={"structures": structures}))
    masks = corrected(one, tmp_path / "corrections")
    written = export_corrections([one], tmp_path / "corrections", tmp_path / "out")
    assert sorted(path.name for path in written) == ["anna.nii.gz", "masks.json"]
    [case] = find_cases(tmp_path / "out", one.recipe)
    found = preprocess_case(case, one.recipe)
    for name, mask in zip(structures, masks, strict=True):
        np.testing.assert_array_equal(found.masks[name], mask)
    assert [case.name for case in find_patients(tmp_path / "out", one.recipe)] == ["anna"]


def test_a_file_for_each_structure(regions, tmp_path):
    """Masks that overlap in any way."""
    recipe = regions.recipe.model_copy(update={"structures": {"gtv": "g.*", "cord": "c.*"}})
    masks = {name: tmp_path / f"{name}.nii.gz" for name in recipe.structures}
    for number, path in enumerate(masks.values()):
        inside = sitk.ReadImage(str(regions.masks[None])) > number
        sitk.WriteImage(inside, str(path))
    one = dataclasses.replace(regions, recipe=recipe, masks=masks)
    expected = corrected(one, tmp_path / "corrections")
    export_corrections([one], tmp_path / "corrections", tmp_path / "out")
    [case] = find_cases(tmp_path / "out", recipe)
    found = preprocess_case(case, recipe)
    for name, mask in zip(recipe.structures, expected, strict=True):
        np.testing.assert_array_equal(found.masks[name], mask)


def test_what_is_refused(patient, tmp_path):
    with pytest.raises(ValueError, match="accepted or corrected are expected"):
        export_corrections([patient], tmp_path / "corrections", tmp_path / "out")
    corrected(patient, tmp_path / "corrections")
    export_corrections([patient], tmp_path / "corrections", tmp_path / "out")
    with pytest.raises(FileExistsError, match=r"out: a new one is expected"):
        export_corrections([patient], tmp_path / "corrections", tmp_path / "out")
    file = tmp_path / "out" / "masks.json"
    about = json.loads(file.read_text())
    for changes, message in (
        ({"masks": {"bert": "anna.nii.gz"}}, "masks.json: masks of patients in .* Received: .*bert"),
        ({"masks": {"anna": "gone.nii.gz"}}, "files of masks are expected. Received: .*gone.nii.gz, which does not"),
        ({"masks": None}, "`masks`, an object, are expected"),
    ):
        file.write_text(json.dumps(about | changes))
        with pytest.raises(ValueError, match=message):
            find_cases(tmp_path / "out", patient.recipe)


def test_other_images_than_those_that_were_segmented(patient, tmp_path):
    one = dataclasses.replace(patient, images=key_of_images(patient.case, patient.recipe))
    corrected(one, tmp_path / "corrections")
    export_corrections([one], tmp_path / "corrections", tmp_path / "out")
    shutil.copy(patient.case.images["t2"], patient.case.images["t1"])
    later = dataclasses.replace(one)  # as another process finds it
    with pytest.raises(ValueError, match=r"anna: .*the images that were segmented are expected"):
        export_corrections([later], tmp_path / "corrections", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_patients_of_a_dataset_with_images_to_segment(tmp_path):
    source = make_patient(tmp_path)
    dataset = tmp_path / "dataset"
    for folder, name in (("imagesTr", "anna"), ("imagesTs", "carl")):
        (dataset / folder).mkdir(parents=True)
        for channel, path in enumerate(source.case.images.values()):
            shutil.copy(path, dataset / folder / f"{name}_{channel:04d}.nii.gz")
    (dataset / "labelsTr").mkdir()
    shutil.copy(source.case.mask, dataset / "labelsTr" / "anna.nii.gz")
    (dataset / "dataset.json").write_text(
        json.dumps({"channel_names": {"0": "T1", "1": "T2"}, "file_ending": ".nii.gz"})
    )
    [case] = [case for case in find_cases(dataset, source.recipe, require_mask=False) if case.name == "anna"]
    one = dataclasses.replace(source, case=case, place=dataset)
    [mask] = corrected(one, tmp_path / "corrections")
    export_corrections([one], tmp_path / "corrections", tmp_path / "out")
    [case] = find_cases(tmp_path / "out", source.recipe)
    np.testing.assert_array_equal(preprocess_case(case, source.recipe).mask, mask)
