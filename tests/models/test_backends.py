import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from checks import fill, random_volume, to_numpy

from keras_mmfnet.models import MMFNet, SiamesePatchCNN, SingleEncoderUNet3D, SliceWise3D, UNet2D

BACKEND = keras.backend.backend()
OTHERS = [name for name in ("tensorflow", "torch", "jax") if name != BACKEND]


def run(script, *arguments, backend=BACKEND):
    """What the Python `script` prints on `backend`, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        # The flag is for JAX, which else spends its time on making fast what runs once.
        env={"XLA_FLAGS": "--xla_backend_optimization_level=0", **os.environ, "KERAS_BACKEND": backend},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
    ).stdout


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with networks as `.keras` and inputs for them, and the outputs here."""
    folder = tmp_path_factory.mktemp("saved")
    names, size = ("t1", "t2"), {"patch_shape": (4, 8, 8), "filters": (2, 3)}
    networks = {
        "mmfnet": MMFNet(names, **size, reduction=2),
        "single": SingleEncoderUNet3D(names, **size),
        "unet2d": UNet2D("t1", (8, 8), (2, 3), structures=("gtv", "node")),
        "patch_cnn": SliceWise3D(SiamesePatchCNN(names, (6, 6), (2, 3)), (4, 8, 8)),
    }
    levels = {"strides": ((1, 2, 2), (2, 2, 2)), "kernel_sizes": ((1, 3, 3), (3, 3, 3))}
    networks["levels"] = MMFNet(names, **size, **levels, normalization="instance", residual=True, reduction=2)
    inputs, outputs = {}, {}
    for name, network in networks.items():
        fill(network)
        network.save(folder / f"{name}.keras")
        volumes = {key: random_volume(2, *network.patch_shape, 1, seed=seed) for seed, key in enumerate(network.input)}
        inputs |= {f"{name}/{key}": volume for key, volume in volumes.items()}
        outputs[name] = to_numpy(network(volumes))
    np.savez(folder / "inputs.npz", **inputs)
    return folder, outputs


LOAD = """
import pathlib, sys
import keras, numpy, keras_mmfnet.models

folder, outputs = pathlib.Path(sys.argv[1]), {}
inputs = numpy.load(folder / "inputs.npz")
for path in folder.glob("*.keras"):
    network = keras.saving.load_model(path)
    found = network.predict_on_batch({name: inputs[f"{path.stem}/{name}"] for name in network.input})
    outputs[path.stem] = found
numpy.savez(sys.argv[2], **outputs)
print(keras.backend.backend())
"""


@pytest.mark.parametrize("backend", OTHERS)
def test_same_output_on_the_other_backends(backend, saved, tmp_path):
    folder, expected = saved
    assert run(LOAD, folder, tmp_path / "outputs.npz", backend=backend).split() == [backend]
    found = np.load(tmp_path / "outputs.npz")
    assert set(found) == set(expected)
    for name, output in expected.items():
        np.testing.assert_allclose(found[name], output, rtol=1e-4, err_msg=name)


IMPORT = """
import sys
import keras

before = set(sys.modules)
import keras_mmfnet, keras_mmfnet.layers, keras_mmfnet.models, keras_mmfnet.losses, keras_mmfnet.metrics

print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
print(*keras_mmfnet.__all__)
"""


def test_import_loads_neither_tensorflow_nor_simpleitk():
    added, public = (set(line.split()) for line in run(IMPORT).splitlines())
    assert "keras_mmfnet" in added
    assert {"layers", "losses", "metrics", "models", "recipe"} <= public
    assert not added & {"tensorflow", "SimpleITK", "sklearn", "matplotlib", "torch", "jax"}
