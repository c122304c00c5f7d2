import itertools

import numpy as np
import pytest
import SimpleITK as sitk
from sklearn.discriminant_analysis import QuadraticDiscriminantAnalysis

from keras_mmfnet import synthetic
from keras_mmfnet.synthetic import make_synthetic_cohort

MODALITIES = ("t1", "t2", "cet1")
PATIENTS = 4


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """The patients' folders and, of each, the images by name."""
    folders = make_synthetic_cohort(tmp_path_factory.mktemp("cohort") / "new", patients=PATIENTS, seed=1)
    names = (*MODALITIES, "mask")
    return folders, [{name: sitk.ReadImage(folder / f"{name}.nii.gz") for name in names} for folder in folders]


def test_it_says_how_far_it_is(tmp_path, caplog):
    with caplog.at_level("DEBUG", "keras_mmfnet.progress"):
        make_synthetic_cohort(tmp_path, patients=1)
    assert caplog.messages == ["making patients: 1 of 1"]


def geometry(image):
    return np.concatenate([image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection()])


def extent(array):
    return np.array([np.any(array, axis=others).sum() for others in ((1, 2), (0, 2), (0, 1))])


def dice(a, b):
    return 2 * np.sum(a & b) / (np.sum(a) + np.sum(b))


def body(image):
    """The head's silhouette, without holes."""
    otsu = sitk.OtsuThresholdImageFilter()
    otsu.Execute(image)
    bright = sitk.BinaryMorphologicalClosing(image > otsu.GetThreshold() / 2, [4, 4, 0])
    return sitk.BinaryFillhole(bright)


def coarse(image):
    return sitk.BinShrink(sitk.Cast(image, sitk.sitkFloat32), [4, 4, 1])


def onto(mask, reference):
    """A mask's array on the grid of another image, by position."""
    return sitk.GetArrayFromImage(sitk.Resample(mask, reference, sitk.Transform(), sitk.sitkNearestNeighbor)) > 0


def test_folders_and_files(cohort):
    folders, _ = cohort
    assert [folder.name for folder in folders] == [f"patient_{index:02d}" for index in range(PATIENTS)]
    assert sorted(folders[0].parent.iterdir()) == folders  # nothing temporary is left
    for folder in folders:
        assert {path.name for path in folder.iterdir()} == {f"{name}.nii.gz" for name in (*MODALITIES, "mask")}


def test_geometry(cohort):
    _, patients = cohort
    for images in patients:
        for name in MODALITIES:
            size, spacing = np.array(images[name].GetSize()), np.array(images[name].GetSpacing())
            assert images[name].GetPixelID() == sitk.sitkInt16
            assert 20 <= size[2] <= 28
            assert 3.5 <= spacing[2] <= 5.5
            assert spacing[0] == spacing[1]
            assert 0.33 <= spacing[0] <= 0.69
            assert np.all((size * spacing)[:2] > 175)
            assert np.all((size * spacing)[:2] <= 220)
    oblique = [not np.allclose(images["t1"].GetDirection(), np.eye(3).ravel()) for images in patients]
    assert any(oblique)
    assert not all(oblique)


def test_grids_differ_in_every_second_patient_and_the_anatomy_stays(cohort):
    for index, images in enumerate(cohort[1]):
        t1 = coarse(images["t1"])
        for name in ("t2", "cet1"):
            differ = ~np.isclose(geometry(images[name]), geometry(images["t1"]), atol=1e-4)[:9]  # all but the direction
            assert np.all(differ[[0, 1, 3, 4, 5, 6, 7, 8]]) if index % 2 else not np.any(differ)
            other = coarse(images[name])
            seen = onto(sitk.Cast(other * 0 + 1, sitk.sitkUInt8), t1)  # compared where both images have slices
            assert np.mean(seen) > 0.6
            assert dice((sitk.GetArrayFromImage(body(t1)) > 0) & seen, onto(body(other), t1)) > 0.97


def test_mask_is_one_tumour_on_the_grid_of_t1(cohort):
    for images in cohort[1]:
        mask = images["mask"]
        np.testing.assert_allclose(geometry(mask), geometry(images["t1"]), atol=1e-5)
        assert mask.GetPixelID() == sitk.sitkUInt8
        array = sitk.GetArrayFromImage(mask)
        assert set(np.unique(array)) == {0, 1}
        assert sitk.GetArrayFromImage(sitk.ConnectedComponent(mask)).max() == 1
        assert extent(array)[0] >= 5
        across = extent(array)[1:] * mask.GetSpacing()[0]
        assert np.all((across > 24) & (across < 46))
        middle = mask.TransformContinuousIndexToPhysicalPoint(np.argwhere(array).mean(axis=0)[::-1].tolist())
        head = coarse(images["t1"])
        centre = head.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in head.GetSize()])
        assert np.all(np.abs(np.subtract(middle, centre)) < (31, 33, 20))


def test_the_look_alikes_are_the_tumours_twins_but_for_one_modality():
    patient = synthetic._draw_patient(seed=1, index=2)
    tumour, *others = blobs = patient.shapes[-4:]
    assert tumour is patient.tumour
    assert [blob.layers[0][0] for blob in others] == list(MODALITIES)
    for modality, levels in patient.levels.items():
        for name in MODALITIES:
            ratio = levels[name] / levels["tumour"]
            assert abs(ratio - 1) > 0.4 if name == modality else ratio == 1
    inside = [synthetic._inside(blob, patient.grids["t1"]) for blob in blobs]
    assert np.max(np.sum(inside, axis=0)) == 1
    assert all(np.all(extent(one)[1:] * patient.grids["t1"].spacing[0] > 22) for one in inside)


def test_neither_size_nor_place_tells_the_tumour():
    larger, farther = [], []
    for seed in range(16):
        tumour, *others = synthetic._draw_blobs(np.random.default_rng(seed), np.zeros(3), thickness=4.0)
        larger.append(sum(np.linalg.det(tumour.stretch) > np.linalg.det(other.stretch) for other in others))
        farther.append(sum(np.linalg.norm(tumour.centre) > np.linalg.norm(other.centre) for other in others))
    # Of four blobs, it takes every rank, and no rank most of the time.
    for ranks in (np.bincount(larger, minlength=4), np.bincount(farther, minlength=4)):
        assert np.all((ranks > 0) & (ranks <= 8)), ranks


def features(images):
    """Smoothed, normalised voxels `(n, 3)` inside the body on a coarse version of T1's grid, and the mask there."""
    small = [coarse(images[name]) for name in MODALITIES]
    inside = sitk.GetArrayFromImage(body(small[0])) > 0
    voxels = np.stack([sitk.GetArrayFromImage(sitk.Resample(image, small[0]))[inside] for image in small], axis=1)
    return (voxels - voxels.mean(axis=0)) / voxels.std(axis=0), onto(images["mask"], small[0])[inside]


def test_only_all_three_modalities_tell_the_tumour(cohort):
    patients = [features(images) for images in cohort[1]]
    voxels, truth = (np.concatenate(arrays) for arrays in zip(*patients[:2], strict=True))

    def score(channels):
        """Mean Dice over the other patients, with the threshold that suits them best."""
        classifier = QuadraticDiscriminantAnalysis().fit(voxels[:, channels], truth)
        found = [(classifier.predict_proba(x[:, channels])[:, 1], y) for x, y in patients[2:]]
        return max(np.mean([dice(p > t, y) for p, y in found]) for t in (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9))

    scores = {n: [score(list(c)) for c in itertools.combinations(range(3), n)] for n in (1, 2, 3)}
    assert max(scores[1]) < 0.45
    assert max(scores[2]) < 0.8
    assert min(scores[3]) > 0.85


def test_a_second_call_completes_and_repeats(cohort, tmp_path):
    (tmp_path / "patient_00").mkdir()
    (tmp_path / "patient_00" / "note").write_text("mine")
    folders = make_synthetic_cohort(tmp_path, patients=2, seed=1)
    assert [path.name for path in folders[0].iterdir()] == ["note"]
    for path in folders[1].iterdir():  # the same patient, in a cohort of another size
        assert path.read_bytes() == (cohort[0][1] / path.name).read_bytes()


def test_another_seed_is_another_patient():
    one, other = (synthetic._draw_patient(seed, 0) for seed in (1, 2))
    assert not np.allclose(one.tumour.centre, other.tumour.centre)


def test_a_folder_appears_only_when_it_is_complete(tmp_path, monkeypatch):
    def fail(path, array, grid):
        path.write_bytes(b"half an image")
        raise OSError("the disk is full")

    monkeypatch.setattr(synthetic, "_write", fail)
    with pytest.raises(OSError, match="the disk is full"):
        make_synthetic_cohort(tmp_path, patients=1)
    assert not list(tmp_path.iterdir())


def test_some_modalities_only(tmp_path):
    (folder,) = make_synthetic_cohort(tmp_path, patients=1, seed=3, modalities=["t2"])
    images = {path.name: sitk.ReadImage(path) for path in folder.iterdir()}
    assert set(images) == {"t2.nii.gz", "mask.nii.gz"}
    np.testing.assert_allclose(geometry(images["t2.nii.gz"]), geometry(images["mask.nii.gz"]), atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patients": 0}, r"`patients` must be .* Received: patients=0$"),
        ({"patients": -2}, r"`patients` must be .* Received: patients=-2$"),
        ({"seed": -1}, r"`seed` must be .* Received: seed=-1$"),
        ({"modalities": ("t1", "flair")}, r"`modalities` must be .* Received: modalities=\('t1', 'flair'\)$"),
        ({"modalities": ("t1", "t1")}, r"`modalities` must be .* Received: modalities=\('t1', 't1'\)$"),
        ({"modalities": ()}, r"`modalities` must be .* Received: modalities=\(\)$"),
    ],
)
def test_errors(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_synthetic_cohort(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()
