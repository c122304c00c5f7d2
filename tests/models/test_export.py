import numpy as np
import pytest
from checks import BACKEND, fill, random_volume, to_numpy

from keras_mmfnet.models import MMFNet

pytestmark = [
    pytest.mark.skipif(BACKEND != "tensorflow", reason="the backend that exports to all formats"),
    # Of the converters themselves.
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]


def run_onnx(path, inputs):
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    assert {value.name for value in session.get_inputs()} == set(inputs)
    return session.run(None, inputs)[0]


def run_openvino(path, inputs):
    import openvino

    # On processors that multiply bfloat16, OpenVINO would compute in it.
    return openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(inputs)[0]


def run_saved_model(path, inputs):
    import tensorflow as tf

    program = tf.saved_model.load(str(path))
    return program.serve(inputs).numpy()


EVERYTHING = {
    "filters": (2, 3, 4),
    "structures": ("wt", "tc"),
    "exclusive": False,
    "strides": ((1, 2, 2), (2, 2, 2), (2, 2, 2)),
    "kernel_sizes": ((1, 3, 3), (3, 3, 3), (3, 3, 3)),
    "normalization": "instance",
    "residual": True,
    "deep_supervision": True,
}


@pytest.mark.parametrize(
    ("form", "name", "run", "options"),
    [
        ("onnx", "network.onnx", run_onnx, {}),
        ("onnx", "network.onnx", run_onnx, {"structures": ("edema", "core")}),
        ("onnx", "network.onnx", run_onnx, EVERYTHING),
        ("openvino", "network.xml", run_openvino, {}),
        ("tf_saved_model", "network", run_saved_model, {}),
    ],
)
def test_an_exported_network_gives_the_same(form, name, run, options, tmp_path):
    options = {"filters": (2, 3)} | options
    model = MMFNet(("t1", "t2"), (4, 8, 8), reduction=2, modality_dropout=0.5, **options)
    fill(model)
    model.export(tmp_path / name, format=form, verbose=False)
    for batch in (1, 3):
        inputs = {name: random_volume(batch, 4, 8, 8, 1, seed=seed) for seed, name in enumerate(model.modalities)}
        expected = to_numpy(model(inputs))
        assert expected.shape[-1] == len(options.get("structures", "1"))
        assert np.ptp(expected) > 0.01
        np.testing.assert_allclose(run(tmp_path / name, inputs), expected, rtol=1e-4, atol=1e-5)
