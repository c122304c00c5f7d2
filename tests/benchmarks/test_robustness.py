import importlib
import json
import sys

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import special

from keras_mmfnet.recipe import Recipe
from keras_mmfnet.run import Run


@pytest.fixture
def robustness(benchmarks, monkeypatch, tmp_path):
    script = importlib.import_module("robustness")
    monkeypatch.syspath_prepend(benchmarks / "peers")
    monkeypatch.setattr(script, "RESULTS", tmp_path / "results")
    return script


@pytest.fixture
def run(tiny_cohort, tmp_path):
    changes = {"data.modalities": ("t1", "t2"), "data.spacing": None, "training.folds": 3}
    folder = tmp_path / "out" / "planned_40" / "seed_0"
    return Run.start(folder, tiny_cohort, Recipe.small().replace(changes))


def test_an_image_is_moved_by_as_much_as_is_said(robustness):
    image = sitk.Image([20, 24, 10], sitk.sitkInt16)
    image.SetSpacing((1.0, 1.5, 4.0))
    image.SetOrigin((-7.0, 3.0, 11.0))
    moved = robustness.displace(image, 8, np.random.default_rng(0))
    middle = ((np.array(image.GetSize()) - 1) / 2).tolist()
    centres = [np.array(one.TransformContinuousIndexToPhysicalPoint(middle)) for one in (image, moved)]
    assert np.linalg.norm(centres[1] - centres[0]) == pytest.approx(8)
    rotation = np.reshape(moved.GetDirection(), (3, 3)) @ np.reshape(image.GetDirection(), (3, 3)).T
    assert np.degrees(np.arccos((np.trace(rotation) - 1) / 2)) == pytest.approx(8)
    assert moved.GetSpacing() == image.GetSpacing()


def test_a_network_loses_by_what_it_looks_at(robustness, run, tmp_path, monkeypatch, capsys):
    def bright(images):
        """Tumour is where t2 is bright."""
        return special.expit(40 * (np.asarray(images["t2"]) - 1.0))

    monkeypatch.setattr(robustness, "LEVELS", (2, 8))
    asked = []
    monkeypatch.setattr(robustness, "load_network", lambda path: asked.append(path) or bright)
    monkeypatch.setattr(sys, "argv", ["robustness.py", "--run", str(run.folder)])
    robustness.main()
    assert asked == [run.network(0)]
    [data] = (tmp_path / "results").iterdir()
    path = data / "planned_40" / "seed_0" / "fold_0" / "mmfnet.json"
    found = {name: np.mean([*one["tumour"].values()]) for name, one in json.loads(path.read_text()).items()}
    assert list(found) == [
        *("as they are", "as they are, registered", "without t1", "without t2", "moved by 2 mm and degrees"),
        *("moved by 2 mm and degrees, registered", "moved by 8 mm and degrees"),
        "moved by 8 mm and degrees, registered",
    ]
    assert found["as they are"] > 0.85
    assert found["without t1"] == found["as they are"]
    assert found["without t2"] == 0
    assert found["as they are"] > found["moved by 2 mm and degrees"] > found["moved by 8 mm and degrees"]
    assert found["moved by 8 mm and degrees, registered"] > found["moved by 8 mm and degrees"] + 0.1
    # What is there is not measured again, and another method is compared with it.
    rival = {"as they are": {"tumour": dict.fromkeys(run.folds[0].test, 0.5) | {"another": float("nan")}}}
    path.with_name("nnunet_scaled.json").write_text(json.dumps(rival))
    capsys.readouterr()
    robustness.main()
    assert len(asked) == 1
    less = 0.5 - found["as they are"]
    table = capsys.readouterr().out
    assert (data / "chart.png").stat().st_size > 1000
    assert f"| tumour | as they are | planned_40 | nnunet_scaled | 0.500 |  | {less:+.3f} [" in table
    less = found["without t2"] - found["as they are"]
    assert f"| tumour | without t2 | planned_40 | mmfnet | 0.000 | {less:+.3f} [" in table


def test_nnunet_gets_zeros_and_moved_images_on_the_grid_of_the_first_sequence(robustness, run, tmp_path, monkeypatch):
    nnunet, seen = importlib.import_module("nnunet"), {}

    def predict(run, space, setting, images, out):
        found = {}
        for path in sorted(images.glob("*_0000.nii.gz")):
            name = path.name.removesuffix("_0000.nii.gz")
            t1, t2 = (sitk.ReadImage(str(images / f"{name}_{n:04d}.nii.gz")) for n in range(2))
            seen.setdefault((space.fold, name), []).append(sitk.GetArrayFromImage(t2))
            mask = sitk.ReadImage(str(run.cases[name].mask))
            assert t1.GetSize() == t2.GetSize() == mask.GetSize()
            assert t1.GetOrigin() == t2.GetOrigin() == mask.GetOrigin()
            values = sitk.GetArrayFromImage(mask)
            found[name] = values, values[None].astype(np.float32), 1.0
        return found

    monkeypatch.setattr(nnunet, "predict", predict)
    for fold in range(2):
        found = robustness.measure(run, fold, "nnunet_scaled", tmp_path / "conditions")
        assert not any("registered" in name for name in found)
        for one in found.values():
            assert one["tumour"] == dict.fromkeys(run.folds[fold].test, 1.0)
    for module in ("nnunet", "handover"):
        del sys.modules[module]
    still, _, without, *moved = seen[0, run.folds[0].test[0]]
    assert not without.any()
    differences = [np.abs(image - still).mean() for image in moved]
    assert differences == sorted(differences)
    assert differences[0] > 0
