import json
import sys

import numpy as np
import pytest

from keras_mmfnet.data import preprocess_case
from keras_mmfnet.recipe import Recipe


@pytest.fixture
def monai_preprocessing(benchmarks):
    pytest.importorskip("monai")
    import preprocessing

    return preprocessing


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_both_ways_of_preprocessing_see_the_same_patient(monai_preprocessing, tmp_path):
    recipe = Recipe().replace({"data.spacing": 1.0})
    files = monai_preprocessing.write_patient(tmp_path, slices=6)
    ours = preprocess_case(files, recipe.data)
    theirs = monai_preprocessing.monai_transform(recipe)(files)
    for name, image in ours.images.items():
        other = np.asarray(theirs[name])[0].T
        assert abs(np.subtract(other.shape, image.shape)).max() <= 1
        inner = tuple(slice(min(4, n // 4), n - min(4, n // 4)) for n in np.minimum(other.shape, image.shape))
        assert np.corrcoef(image[inner].ravel(), other[inner].ravel())[0, 1] > 0.9, name


def test_our_batches(benchmarks):
    import pipeline

    recipe = Recipe().replace({"training.batch_size": 2})
    images, mask = next(pipeline.ours(pipeline.make_cases(1), recipe))
    assert mask.shape == (2, 16, 256, 256, 1)
    assert set(images) == {"t1", "t2", "cet1"}


def test_alignment_of_an_image_that_was_moved(benchmarks, tiny_cohort, tmp_path, monkeypatch):
    import registration

    patient = sorted(tiny_cohort.iterdir())[0]
    monkeypatch.setattr(registration, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["registration.py", "--patient", str(patient), "--turns", "1"])
    registration.main()
    result = json.loads((tmp_path / f"{patient.name}_t2.json").read_text(encoding="utf-8"))
    assert result["seconds"] > 0
    assert 0 < result["largest_error_mm"] < 3


def test_grain_would_augment_as_the_pipeline_does(benchmarks):
    import loaders

    loaders.check(loaders.make_cases(1), Recipe().replace({"patches.shape": (16, 32, 32)}).patches)


def test_the_pages_that_a_box_is_read_from(benchmarks):
    import storage

    array, box = np.zeros((4, 60, 70), np.float32), (slice(1, 3), slice(10, 40), slice(5, 65))
    addresses = 4 * np.arange(array.size).reshape(array.shape)[box]
    pages = len(np.unique(addresses // 4096))
    assert storage.Npy(np.float32).read_mb(array, box) == pages * 4096 / 1e6
