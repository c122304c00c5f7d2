import re
from pathlib import Path

import keras
import pytest

from keras_mmfnet.models import METHODS
from keras_mmfnet.recipe import Recipe

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_layer_runs_as_the_readme_has_it():
    names = {}
    exec(BLOCKS[0], names)
    assert names["model"].output_shape == (None, 1)


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="takes too long on a CPU with the other backends")
def test_the_training_runs_as_the_readme_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(BLOCKS[1], names)
    assert names["mask"].GetSize() == names["cases"][names["fold"].test[0]].source.size


def test_a_method_of_ones_own_as_the_readme_has_it():
    try:
        exec(BLOCKS[2], {})
        method = METHODS["wide_unet"]
        network = method.build(method.adapt(Recipe.small()), "float32")
        assert (network.filters, list(network.input)) == ((16, 32, 64), ["t1"])
    finally:
        METHODS.pop("wide_unet", None)


def test_every_file_the_readme_names_is_there():
    for name in re.findall(r"\]\(([^)#:]+)\)|python (examples/\S+\.py)", README):
        assert (Path(__file__).parents[1] / "".join(name)).exists(), name
