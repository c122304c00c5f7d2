import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import SimpleITK as sitk

from keras_mmfnet.models._network import Network
from keras_mmfnet.recipe import Recipe

SERVE = Path(__file__).parents[2] / "examples" / "serve_onnx.py"

on_tensorflow = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="the backend that exports")


def serve(network, recipe, patient, out):
    """What examples/serve_onnx.py says where Keras cannot be imported."""
    code = (
        "import runpy, sys; sys.modules['keras'] = None; del sys.argv[0]; runpy.run_path(sys.argv[0], {}, '__main__')"
    )
    arguments = [SERVE, "--network", network, "--recipe", recipe, "--patient", patient, "--out", out]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )
    assert "Traceback" not in done.stderr
    return done


@on_tensorflow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_patient_is_served_by_onnxruntime(mmfnet, trained, tiny_cohort, tmp_path):
    mmfnet("segment", trained, tiny_cohort / "patient_00", "--out", tmp_path / "out", "--fold", 0)
    network, patient, recipe = tmp_path / "network.onnx", tiny_cohort / "patient_00", trained / "recipe.json"
    assert mmfnet("export", trained, "--out", network).stdout.splitlines()[-1] == str(network)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out", "network.onnx"}
    assert serve(network, recipe, patient, tmp_path / "b.nii").returncode == 0
    images = (sitk.ReadImage(str(tmp_path / name)) for name in ("out/patient_00.nii.gz", "b.nii"))
    one, other = map(sitk.GetArrayFromImage, images)
    assert np.count_nonzero(one) > 0
    assert np.mean(one != other) < 1e-3
    again = serve(network, recipe, patient, tmp_path / "b.nii")
    assert "a new file in a folder that exists is expected. Received: " in again.stderr
    recipe.write_text(Recipe.small().replace({"patches.shape": (16, 32, 16), "training.postprocess": True}).to_json())
    other = serve(network, recipe, patient, tmp_path / "c.nii")
    assert "network.onnx: a network over patches (16, 32, 16) of " in other.stderr
    assert "Received: {'cet1'" in other.stderr
    assert "not applied: the post-processing of the run" in other.stderr
    network.write_bytes(b"damaged")
    damaged = serve(network, recipe, patient, tmp_path / "c.nii")
    assert "network.onnx: an undamaged network as ONNX is expected. Received: " in damaged.stderr


def test_what_cannot_be_exported(mmfnet, trained, tmp_path):
    if (backend := keras.backend.backend()) != "tensorflow":
        done = mmfnet("export", trained, "--out", tmp_path / "n.xml", code=1)
        assert f"tensorflow is expected, which exports the networks of all backends. Received: {backend}" in done.stderr
    assert "ends with .onnx or .xml" in mmfnet("export", trained, "--out", tmp_path / "n.h5", code=1).stderr
    (tmp_path / "n.onnx").touch()
    assert "Received: " in mmfnet("export", trained, "--out", tmp_path / "n.onnx", code=1).stderr


@on_tensorflow
def test_an_interrupted_export_leaves_nothing(mmfnet, trained, tmp_path, monkeypatch):
    def export(network, path, **_):
        Path(path).write_bytes(b"a part")
        raise KeyboardInterrupt

    monkeypatch.setattr(Network, "export", export)
    mmfnet("export", trained, "--out", tmp_path / "out.onnx", code=130)
    assert not list(tmp_path.glob("*out.onnx*"))


def test_no_file_is_overwritten(mmfnet, trained, tmp_path):
    (tmp_path / "m.bin").write_text("the user's")
    assert "m.bin, which exists" in mmfnet("export", trained, "--out", tmp_path / "m.xml", code=1).stderr
    assert (tmp_path / "m.bin").read_text() == "the user's"


@on_tensorflow
def test_a_fold_that_is_not_trained(mmfnet, trained, tmp_path):
    done = mmfnet("export", trained, "--out", tmp_path / "m.onnx", "--fold", 4, code=1)
    assert "that is trained (0, 1) is expected. Received: 4" in done.stderr
