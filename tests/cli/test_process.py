"""What the command changes in its own process, and what importing the package does not."""

import os
import subprocess
import sys

import pytest

import keras_mmfnet
from keras_mmfnet.cli import _process
from keras_mmfnet.cli._process import silenced, start_backend


def python(code, **environment):
    environment = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, encoding="utf-8", timeout=120, check=False
    )


MMFNET = "import sys; sys.argv[0] = 'mmfnet'; from keras_mmfnet.cli import main; main()"


def test_a_misspelt_backend_is_one_line():
    environment = {"KERAS_BACKEND": "tensorfow"}
    for code in ("import keras_mmfnet.layers", "import keras_mmfnet.losses", "import keras_mmfnet.models"):
        *_, last = python(code, **environment).stderr.splitlines()
        assert last.startswith("ImportError: KERAS_BACKEND must be one of tensorflow, torch, jax")
        assert all(f"keras-mmfnet[{name}]" in last for name in ("tensorflow", "torch", "jax"))
        assert last.endswith("Received: 'tensorfow'")
    done = python(f"import sys; sys.argv = ['', 'demo', '--out', 'nowhere']; {MMFNET}", **environment)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: KERAS_BACKEND must be")


def test_without_a_backend_the_extras_are_named(tmp_path):
    (tmp_path / "keras.json").write_text('{"backend": "jax"}')
    code = "import sys; sys.modules['jax'] = None; import keras_mmfnet.layers"
    done = python(code, KERAS_BACKEND="", KERAS_HOME=str(tmp_path))
    *_, last = done.stderr.splitlines()
    assert last.startswith("ImportError: Keras needs a backend, which is not installed: pip install")
    assert last.endswith("Received: 'jax'")


def test_the_modules_are_loaded_when_they_are_asked_for():
    code = """
import sys
import keras_mmfnet
assert 'keras' not in sys.modules
import pydoc
text = pydoc.plain(pydoc.render_doc(keras_mmfnet))
assert all(name in text for name in ('layers', 'models', 'data', 'run', 'MMFNet(')), text
assert 'keras' not in sys.modules
keras_mmfnet.recipe.Recipe
import keras_mmfnet.data, keras_mmfnet.inference, keras_mmfnet.cli
print([name for name in ('keras', 'tensorflow', 'torch', 'matplotlib') if name in sys.modules])
"""
    done = python(code)
    assert done.stdout == "[]\n", done.stderr
    assert "mmfnet --help" in keras_mmfnet.__doc__
    with pytest.raises(AttributeError, match="no attribute 'layer'"):
        _ = keras_mmfnet.layer


def test_patients_are_prepared_and_segmented_without_keras():
    code = "import sys; sys.modules['keras'] = None; import keras_mmfnet.data, keras_mmfnet.inference, "
    done = python(code + "keras_mmfnet.recipe, keras_mmfnet.evaluation, keras_mmfnet.export")
    assert done.returncode == 0, done.stderr


def test_the_terminal_is_quiet_when_the_backend_starts():
    code = "from keras_mmfnet.cli._process import start_backend; print(start_backend('cpu'))"
    done = python(code)
    assert done.stderr == ""
    assert " on the CPU, " in done.stdout
    assert done.stdout.count("\n") == 1


def test_what_fails_is_shown_after_all(capfd):
    with silenced():
        os.write(2, b"chatter\n")

    def fail():
        with silenced():
            os.write(2, b"the reason\n")
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    assert capfd.readouterr().err == "the reason\n"


def test_log_lines_of_c_code_are_left_out():
    code = """
import os, sys
from keras_mmfnet.cli._process import without_chatter
with without_chatter():
    os.write(2, b"E0000 00:00:1795881826.091027   22653 util.cc:131] oneDNN supports DT_HALF only\\n")
    os.write(2, b"the last words\\n")
    print("of Python", file=sys.stderr)
print("afterwards", file=sys.stderr)
with without_chatter():
    os.write(2, b"before a crash\\n")
    os.abort()
"""
    assert sorted(python(code).stderr.splitlines()) == ["afterwards", "before a crash", "of Python", "the last words"]


def test_a_process_that_goes_on_is_not_waited_for():
    code = """
import subprocess, sys
from keras_mmfnet.cli._process import without_chatter
with without_chatter():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=subprocess.DEVNULL)
    print("the last words", end="", file=sys.stderr)
assert process.poll() is None
process.kill()
"""
    done = python(code)
    assert (done.returncode, done.stderr) == (0, "the last words")


def test_the_device(monkeypatch):
    environment = {}
    monkeypatch.setattr(_process.os, "environ", environment)
    _process._choose_device("gpu", "torch")
    assert environment == {}
    _process._choose_device("gpu:1", "torch")
    assert environment == {"CUDA_VISIBLE_DEVICES": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = "4,7"
    _process._choose_device("gpu:1", "torch")
    assert environment == {"CUDA_VISIBLE_DEVICES": "7"}
    with pytest.raises(ValueError, match=r"--device: a GPU of CUDA_VISIBLE_DEVICES=7 is expected. Received: gpu:1"):
        _process._choose_device("gpu:1", "torch")
    _process._choose_device("cpu", "jax")
    assert environment == {"CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu"}
    for wrong in ("tpu", "gpu:x", "cpu:0"):
        with pytest.raises(ValueError, match="--device: cpu, gpu or gpu:<number> is expected"):
            _process._choose_device(wrong, "torch")


def test_a_gpu_that_is_not_used_is_named(monkeypatch):
    monkeypatch.setattr("keras_mmfnet.cli.memory.keep_freed_memory", lambda: False)
    monkeypatch.setattr(_process, "_gpu_name", lambda backend: None)
    monkeypatch.setattr(_process, "_has_gpu", lambda: True)
    assert start_backend().endswith("there is a GPU, which it does not use")
    with pytest.raises(ValueError, match=r"--device: a GPU that .* can use is expected. Received: gpu"):
        start_backend("gpu")
    monkeypatch.setattr(_process, "_gpu_name", lambda backend: "H200")
    assert start_backend().endswith(" on H200")


def test_tensorflow_leaves_the_gpu_to_the_backend(monkeypatch):
    import keras
    import tensorflow as tf

    hidden = []
    monkeypatch.setattr("keras_mmfnet.cli.memory.keep_freed_memory", lambda: False)
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda *devices: hidden.append(devices))
    start_backend()
    assert hidden == ([] if keras.backend.backend() == "tensorflow" else [([], "GPU")])
