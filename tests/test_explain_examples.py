import re

import pytest
import SimpleITK as sitk
from checks import BACKEND, fill, random_volume
from test_examples import run_example

from keras_mmfnet.data import Grid
from keras_mmfnet.models import MMFNet
from keras_mmfnet.recipe import Recipe


@pytest.mark.filterwarnings("ignore:Please (import|use) `zoom` from the `scipy.ndimage`:DeprecationWarning")
def test_a_patient_of_a_run_is_explained(tmp_path, monkeypatch, capsys):
    recipe = Recipe.small().replace(
        {"patches.shape": (4, 16, 16), "network.filters": (2, 3), "network.reduction": 2, "data.spacing": None}
    )
    model = MMFNet(recipe.data.modalities, recipe.patches.shape, recipe.network.filters, reduction=2)
    fill(model)
    run, patient, out = (tmp_path / name for name in ("run", "patient", "out"))
    (run / "fold_0").mkdir(parents=True)
    patient.mkdir()
    model.save(run / "fold_0" / "mmfnet.keras")
    (run / "recipe.json").write_text(recipe.to_json())
    grid = Grid((24, 20, 6), (2.0, 2.0, 4.0), (-20.0, -20.0, 0.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
    for seed, name in enumerate(recipe.data.modalities):
        sitk.WriteImage(grid.image(abs(random_volume(*grid.shape, seed=seed))), str(patient / f"{name}.nii.gz"))
    arguments = ("--run", run, "--patient", patient, "--out", out)
    with pytest.raises(SystemExit, match=r"a run with trained folds is expected. Received: .*--fold 3"):
        run_example(monkeypatch, "explain_patient", *arguments, "--fold", 3)
    run_example(monkeypatch, "explain_patient", *arguments)
    names = {"attention", "spatial_fusion1", "spatial_fusion2", "spatial_fusion_bottom"}
    assert {path.stem for path in out.iterdir()} == names | ({"gradcam"} if BACKEND == "tensorflow" else set())
    assert BACKEND == "tensorflow" or "KERAS_BACKEND=tensorflow" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"a new folder in a folder that exists is expected. Received: .*out"):
        run_example(monkeypatch, "explain_patient", *arguments)


def test_a_layer_in_a_classifier_of_ones_own_learns(monkeypatch, capsys):
    run_example(monkeypatch, "reuse_layers")
    before, after = map(float, re.findall(r"(\d\.\d\d) (?:before|after)", capsys.readouterr().out))
    assert after > max(before, 0.9)
