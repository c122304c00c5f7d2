"""Every block of Python in the README and the docs is run; command lines are parsed, and run where that is short."""

import argparse
import importlib
import inspect
import itertools
import pkgutil
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import SimpleITK as sitk
import typer.core
import typer.main
from checks import fill
from dicom_files import find_series, write_series
from scipy import ndimage
from typer.testing import CliRunner

import keras_mmfnet
from keras_mmfnet import plan
from keras_mmfnet.cli import app, memory
from keras_mmfnet.cli._options import parse_changes, parse_structures
from keras_mmfnet.data import Grid
from keras_mmfnet.export import write_rtstruct
from keras_mmfnet.methods import METHODS
from keras_mmfnet.models import MMFNet
from keras_mmfnet.recipe import Recipe
from keras_mmfnet.review.corrections import Correction
from keras_mmfnet.review.patients import find_reviewed

ROOT = Path(__file__).parents[1]
DOCS = sorted(path.relative_to(ROOT) for path in (ROOT / "docs").glob("*.md"))
BENCHMARKS = sorted(path.relative_to(ROOT) for path in (ROOT / "benchmarks").glob("*.md"))
PAGES = [Path("README.md"), Path("CONTRIBUTING.md"), *BENCHMARKS, *DOCS]
COMMANDS = typer.main.get_command(app).commands
# Not for a test: they install, run the tests, or run elsewhere.
NOT_PARSED = {
    "pip install .[tensorflow]",
    "pip install -e .[test]",
    "pip install -e .[tensorflow,benchmarks]",
    "pip install -e .[tensorflow,peers]",
    "pip install .[torch]",
    "pip install .[torch,cluster]",
    "pip install .[review]",
    "pip install .[tensorflow,node]",
    "pip install .[tensorboard]",
    "tensorboard --logdir run",
    "pip install .[docs]",
    "pip install blosc2 zarr grain",
    "pip install -e .[dev]",
    "pre-commit install",
    "python -m pytest -n 2 --dist worksteal",
    "python -m pytest tests/layers -m not slow",
    "python -m pytest -m gpu",
    "export KERAS_BACKEND=torch",
    "export KERAS_DISTRIBUTION_JOB_ADDRESSES=node1:29500,node2:29500 KERAS_DISTRIBUTION_NUM_PROCESSES=2",
    "export KERAS_DISTRIBUTION_PROCESS_ID=0",
    "torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint node1:29500 -m keras_mmfnet.cli train "
    "patients --out run --devices all",
    "python -m sphinx -W docs docs/_build",
}
TINY = {
    "data.spacing": 4.0,
    "patches.shape": (16, 16, 16),
    "network.filters": (2,),
    "network.reduction": 2,
    "training.folds": 3,
    "training.batch_size": 1,
    "training.epochs": 1,
    "training.warmup_epochs": 1,
    "training.steps_per_epoch": 1,
}
# Only TensorFlow exports networks, see `test_export_command.py`.
ON_TENSORFLOW = "network.onnx"
NAMES = ("anna", "bert", "carl", "dora", "emil", "faye")


def blocks(page, language):
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        code
        for found, code in re.findall(r"^```(\S*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        if found == language
    ]


def commands(page):
    """The command lines of a page, as lists of words, without what is set before them."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            for words in " ".join(shlex.quote(word) for word in shlex.split(line, comments=True)).split("'&&'"):
                words = shlex.split(words)
                while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                    words = words[1:]
                if words:
                    yield words


README = blocks("README.md", "python")


def test_every_block_is_of_a_kind_that_is_run():
    kinds = {
        kind
        for page in PAGES
        for kind in re.findall(r"^```(\S+)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert kinds == {"bash", "python", "{toctree}"}
    assert len(README) == 3  # which the next tests run


def test_the_layer_runs_as_the_readme_has_it():
    names = {}
    exec(README[0], names)
    assert names["model"].output_shape == (None, 1)


@pytest.fixture
def tiny_recipe(monkeypatch):
    """Makes the recipe that pages start from small enough for a test."""
    small = Recipe.small.__func__
    monkeypatch.setattr(Recipe, "small", classmethod(lambda cls: small(cls).replace(TINY)))


@pytest.mark.filterwarnings("ignore:part of the tumour lies outside:UserWarning")  # the patches are small
@pytest.mark.once
def test_the_training_runs_as_the_readme_has_it(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(README[1], names)
    assert names["mask"].GetSize() == names["cases"][names["fold"].test[0]].source.size


def test_a_method_of_ones_own_as_the_readme_has_it():
    try:
        exec(README[2], {})
        method = METHODS["wide_unet"]
        network = method.build(method.adapt(Recipe.small()), "float32")
        assert (network.filters, list(network.input)) == ((16, 32, 64), ["t1"])
    finally:
        METHODS.pop("wide_unet", None)


@pytest.fixture
def readers_folder(tiny_cohort, tmp_path, monkeypatch):
    """The current folder as the docs' reader has it: with patients, and a run with a trained network."""
    monkeypatch.chdir(tmp_path)
    Path("patients").mkdir()
    for name, patient in zip(NAMES, sorted(tiny_cohort.iterdir()), strict=True):
        Path("patients", name).symlink_to(patient)
    recipe = Recipe.small().replace(
        {"patches.shape": (4, 16, 16), "network.filters": (2, 3), "network.reduction": 2, "data.spacing": None}
    )
    model = MMFNet(recipe.data.modalities, recipe.patches.shape, recipe.network.filters, recipe.network.reduction)
    fill(model)
    Path("run/fold_0").mkdir(parents=True)
    model.save("run/fold_0/mmfnet.keras")
    Path("run/recipe.json").write_text(recipe.to_json())


@pytest.mark.filterwarnings(  # the patients are small
    "ignore:part of the tumour lies outside:UserWarning", "ignore:volumes smaller than the patch:UserWarning"
)
@pytest.mark.once
@pytest.mark.parametrize("page", [page for page in DOCS if blocks(page, "python")], ids=lambda page: page.stem)
def test_python_runs_as_the_docs_have_it(readers_folder, page, request):
    """One block after the other, as a reader would; what they assert holds."""
    if page.stem == "own_data":  # which trains
        request.getfixturevalue("tiny_recipe")
    known = dict(METHODS)
    try:
        names = {}
        for block in blocks(page, "python"):
            exec(block, names)
    finally:
        for name in METHODS.keys() - known.keys():
            del METHODS[name]


def test_every_subcommand_is_in_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"mmfnet {name}" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_mmfnet_takes_the_arguments_it_is_shown_with(page):
    for program, *arguments in commands(page):
        if program == "mmfnet":
            name, *arguments = arguments
            # Another option than those it has is an error.
            command = COMMANDS[name]
            if isinstance(command, typer.core.TyperGroup):
                command, *arguments = command.commands[arguments[0]], *arguments[1:]
            options = command.make_context(name, arguments).params
            structures = options.get("structure")
            structures = parse_structures(structures) if isinstance(structures, list | tuple) else {}
            Recipe.small().replace({**parse_changes(options.get("changes")), **structures})


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_fields_of_the_recipe_take_the_values_they_are_shown_with(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for shown in re.findall(r"`(--set [^`]+)`", text):
        Recipe.small().replace(parse_changes(shlex.split(shown)[1::2]))


class Parsed(Exception):
    """The arguments as a script's parser has read them; ends the script there."""


@pytest.mark.once
@pytest.mark.parametrize("page", PAGES, ids=str)
def test_scripts_take_the_arguments_they_are_shown_with(page, monkeypatch):
    parse_args = argparse.ArgumentParser.parse_args

    def parse(self, *args, **kwargs):
        raise Parsed(parse_args(self, *args, **kwargs))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    for words in commands(page):
        if " ".join(words) in NOT_PARSED or words[0] == "mmfnet":
            continue
        interpreter, script, *arguments = words
        assert interpreter == "python", words
        source = (ROOT / script).read_text(encoding="utf-8")
        if "typer.run(compare)" in source:
            options = COMMANDS["compare"].make_context("compare", arguments).params
            Recipe.small().replace(parse_changes(options["changes"]))
            continue
        if "parse_args" not in source:
            assert not arguments, words
            continue
        monkeypatch.syspath_prepend((ROOT / script).parent)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        # Another argument than those it knows is a SystemExit.
        with pytest.raises(Parsed):
            runpy.run_path(str(ROOT / script), run_name="__main__")


# Small enough for a test; the rest of the recipe is as the commands say.
@pytest.fixture
def users_folder(tiny_recipe, tiny_cohort, tmp_path, monkeypatch):
    """The current folder as the commands have it: cohorts in several layouts, and recipes small enough for a test."""
    monkeypatch.chdir(tmp_path)
    series = {"t1_tra": "t1", "t2_tse": "t2", "t1_gd": "cet1", "flair": "t2"}
    for name, folder in zip(
        ("anna", "bert", "carl", "dora", "emil", "faye"), sorted(tiny_cohort.iterdir()), strict=True
    ):
        images = {path.name.split(".")[0]: sitk.ReadImage(str(path)) for path in folder.iterdir()}
        for description, modality in series.items():
            array, grid = sitk.GetArrayFromImage(images[modality]) + 100, Grid.from_image(images[modality])
            write_series(Path("patients", name, description), grid, description, patient=name, array=array)
        shutil.copy(folder / "mask.nii.gz", Path("patients", name))
        t1 = next(one for one in find_series(Path("patients", name), name) if series[one.description] == "t1")
        write_rtstruct(images["mask"], t1, Path("patients", name, "structures.dcm"), "GTV", reviewed_by="an expert")
        Path("prostates", name).mkdir(parents=True)
        for source, target in (("t1", "t2"), ("t2", "adc"), ("mask", "mask")):
            shutil.copy(folder / f"{source}.nii.gz", Path("prostates", name, f"{target}.nii.gz"))
        Path("brats", name).mkdir(parents=True)
        for source, target in (("t1", "t1"), ("t2", "t2"), ("cet1", "t1ce"), ("t2", "flair")):
            shutil.copy(folder / f"{source}.nii.gz", Path("brats", name, f"{name}_{target}.nii.gz"))
        whole = sitk.GetArrayFromImage(images["mask"])
        core, inner = (ndimage.binary_erosion(whole, iterations=n) for n in (1, 2))
        labels = np.select([inner, core, whole > 0], [4, 1, 2]).astype(np.uint8)
        labels = Grid.from_image(images["mask"]).image(labels)
        sitk.WriteImage(labels, str(Path("brats", name, f"{name}_seg.nii.gz")))
    # A plan of the same size, and of this machine's speed without measuring it.
    monkeypatch.setattr(plan, "measure_cost", lambda: plan.StepCost(1e-8))
    monkeypatch.setattr(plan, "plan_recipe", lambda cases, given, **_: Recipe.small().replace(given))
    monkeypatch.setattr(memory, "keep_freed_memory", lambda: False)  # it would last
    return tmp_path


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("page", ["README.md", "docs/own_data.md", "docs/other_tumours.md", "docs/seeing.md"])
def test_commands_run_as_they_are_shown(users_folder, page, monkeypatch):
    """In the order of the page, as written, with a tiny default recipe; a page may use the run of another one."""
    if page == "docs/other_tumours.md":
        Path("mine.py").write_text(blocks(page, "python")[-1])
    shown = list(commands(page))
    if page == "docs/seeing.md":
        shown.insert(0, ["mmfnet", "train", "patients", "--out", "run"])
    known = dict(METHODS)
    try:
        for words in shown:
            if " ".join(words) in NOT_PARSED or words == ["mmfnet", "demo"] or ON_TENSORFLOW in words:
                continue
            if words[1] == "node":  # for tests/cli/test_node_command.py
                continue
            if words[1] == "review":
                accept_all(words[2])
                continue
            out = dict(itertools.pairwise(words)).get("--out")
            if out and "--resume" not in words and Path(out).exists():
                # Nothing is overwritten; a reader would choose another name.
                shutil.rmtree(out) if Path(out).is_dir() else Path(out).unlink()
            run_command(words, monkeypatch)
            if page == "README.md" and words[1] == "train":
                # One step does not find a tumour; with these weights there is a contour to write.
                for path in Path("run").glob("fold_*/mmfnet.keras"):
                    network = keras.models.load_model(path, compile=False)
                    fill(network)
                    network.save(path)
            assert not out or Path(out).exists(), words
    finally:
        for name in METHODS.keys() - known.keys():
            del METHODS[name]


def accept_all(folder):
    """What a reviewer does in the browser who agrees with all masks."""
    for patient in find_reviewed(folder):
        correction = Correction(patient, Path(folder, "corrections"))
        correction.save("me", correction.state)


def run_command(words, monkeypatch):
    """Runs a command or script in this process."""
    program, *arguments = words
    if program == "mmfnet":
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, (words, result.output)
    else:
        monkeypatch.syspath_prepend((ROOT / arguments[0]).parent)
        monkeypatch.setattr(sys, "argv", arguments)
        runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_file_a_page_names_is_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / page).parent.joinpath(link).exists(), link
    for script in re.findall(r"((?:examples|benchmarks|tests)/\w+\.(?:py|md))", text):
        assert (ROOT / script).exists(), script


@pytest.mark.once
def test_the_docs_are_built_without_a_warning_and_describe_everything_public(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    described = set()
    for page in (tmp_path / "api").glob("*.html"):
        described |= set(re.findall(r'id="keras_mmfnet\.[\w.]*?(\w+)"', page.read_text(encoding="utf-8")))
    public = set()
    for module in pkgutil.walk_packages(keras_mmfnet.__path__, "keras_mmfnet."):
        # Not interfaces: the command line, and the implementations of what `kernels` declares.
        if "._" not in module.name and not module.name.startswith(("keras_mmfnet.cli", "keras_mmfnet.kernels.")):
            for name, value in vars(importlib.import_module(module.name)).items():
                ours = getattr(value, "__module__", None) == module.name
                if ours and name[0] != "_" and (inspect.isclass(value) or inspect.isfunction(value)):
                    public.add(name)
    assert len(public) > 60
    assert public <= described, public - described
