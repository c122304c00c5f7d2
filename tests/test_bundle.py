import hashlib
import json
import re
import shutil
import sys
import types
import zipfile

import numpy as np
import pytest
from checks import fill

from keras_mmfnet import bundle as bundles
from keras_mmfnet import run as runner
from keras_mmfnet.bundle import Bundle, is_bundle
from keras_mmfnet.evaluation import evaluate_case, summarise
from keras_mmfnet.methods import METHODS, method_of
from keras_mmfnet.models import MMFNet, SingleEncoderUNet3D, UNet3D, load_network
from keras_mmfnet.recipe import Recipe
from keras_mmfnet.run import Run, run_fold

RECIPE = Recipe.small().replace(
    {
        "data.modalities": ("t1", "t2"),
        "patches.shape": (4, 16, 16),
        "network.filters": (2,),
        "network.reduction": 2,
        "training.postprocess": True,
    }
)
RECIPE = RECIPE.model_copy(update={"reasons": {"patches.shape": "It holds the largest tumour."}})
PATIENTS = ("Xaver Secret", "Quentin Secret", "Wilhelm Secret", "Brunhild Secret")


OTHER = {"postprocess": {"structures": {"core": {}}}, "versions": {}}


def network(recipe=RECIPE, seed=0):
    shape, filters = recipe.patches.shape, recipe.network.filters
    model = MMFNet(recipe.data.modalities, shape, filters, reduction=2, structures=recipe.data.structure_names)
    fill(model, seed)
    return model


def make_run(folder, recipe=RECIPE):
    """A run as two finished folds of three leave it, each with two test patients."""
    rng = np.random.default_rng(1)
    for fold in (0, 2):
        (folder / f"fold_{fold}").mkdir(parents=True)
        network(recipe, fold).save(folder / f"fold_{fold}" / "mmfnet.keras")
        rows = []
        for name in PATIENTS[fold : fold + 2]:
            truth = np.zeros((4, 8, 8), np.uint8)
            truth[1:3, 2:6, 2:6] = 1
            probability = np.clip(0.4 * truth + rng.uniform(0, 0.6, truth.shape), 0, 1)
            rows += [
                {"patient": name, "structure": one, **evaluate_case(probability, truth, (4, 1, 1)), "seconds": 1.0}
                for one in recipe.data.structures
            ]
        rules = {name: {"threshold": 0.3 + fold / 10} for name in recipe.data.structures}
        result = {
            "method": "mmfnet",
            "fold": fold,
            "machine": {"processor": "secret", "system": "secret", "allocator": "secret", "keras": "3.12"},
            "patients": rows,
            "postprocess": {"rules": {"structures": rules}},
        }
        (folder / f"fold_{fold}" / "mmfnet.json").write_text(json.dumps(result))
    (folder / "recipe.json").write_text(recipe.to_json())
    return Run(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("Secret") / "run")


@pytest.fixture(scope="module")
def saved(run, tmp_path_factory):
    """The same bundle as a folder and as an archive."""
    folder = tmp_path_factory.mktemp("saved")
    for name in ("bundle", "bundle.zip"):
        run.save_bundle(folder / name, "Heads of one hospital. For research only.")
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved / "bundle", tmp_path / "bundle")


@pytest.mark.parametrize("name", ["bundle", "bundle.zip"])
def test_what_segments_comes_back(run, saved, name):
    bundle = Bundle(saved / name)
    assert bundle.recipe == run.recipe == RECIPE
    assert bundle.recipe.reasons == RECIPE.reasons
    assert bundle.trained_folds() == run.trained_folds() == [0, 2]
    for folds, threshold in (([0], 0.3), ([2], 0.5), ([0, 2], 0.4)):
        assert bundle.postprocessing(folds) == run.postprocessing(folds)
        assert bundle.postprocessing(folds).structures["tumour"].threshold == pytest.approx(threshold)
    for fold in (0, 2):
        assert bundle.network(fold).read_bytes() == run.network(fold).read_bytes()
    assert str(bundle) == str(saved / name)
    assert is_bundle(saved / name)
    assert not is_bundle(run.folder)


def test_an_archive_is_unpacked_for_as_long_as_it_is_used(saved):
    bundle = Bundle(saved / "bundle.zip")
    folder = bundle.folder
    assert folder.is_dir()
    del bundle
    assert not folder.exists()


def test_nobody_is_named(run, saved):
    """Neither a patient nor a path nor a machine, in any file or in the archive's own directory."""
    parts = [path.read_bytes() for path in (saved / "bundle").rglob("*") if path.is_file()]
    with zipfile.ZipFile(saved / "bundle.zip") as archive:
        parts += [archive.read(name) for name in archive.namelist()]
        assert sorted(archive.namelist()) == sorted(
            path.relative_to(saved / "bundle").as_posix() for path in (saved / "bundle").rglob("*.*")
        )
    for network in (saved / "bundle").rglob("*.keras"):
        with zipfile.ZipFile(network) as archive:
            parts += [archive.read(name) for name in archive.namelist()]
    parts.append((saved / "bundle.zip").read_bytes())
    assert len(parts) > 12
    for word in ("secret", *(name.split()[0] for name in PATIENTS), str(run.folder), str(saved)):
        assert not [part for part in parts if word.lower().encode() in part.lower()]


def test_the_numbers_of_the_patients(run, saved):
    """By numbers that say nothing of the order of the names."""
    metrics = json.loads((saved / "bundle" / "metrics.json").read_text())
    before = run.rows("mmfnet")
    assert [row["patient"] for row in metrics["patients"]] == [1, 2, 3, 4]
    scores = [round(row["dsc"], 4) for row in before]
    assert scores not in (sorted(scores), sorted(scores)[::-1])
    assert [row["dsc"] for row in metrics["patients"]] == sorted(scores)
    assert metrics["summary"]["dsc"]["mean"] == pytest.approx(summarise(before)["dsc"]["mean"], abs=1e-4)
    about = json.loads((saved / "bundle" / "bundle.json").read_text())
    assert about["folds"]["2"]["versions"] == {"keras": "3.12"}


def test_the_card(saved):
    card = (saved / "bundle" / "README.md").read_text()
    headings = re.findall("^## (.*)$", card, re.MULTILINE)
    assert headings == ["Data and terms", "Results", "What it must not be used for"]
    assert "Heads of one hospital. For research only." in card
    assert "mmfnet segment bundle PATIENTS --out FOLDER" in card
    assert "- tumour: from a probability of 0.4" in card
    summary = json.loads((saved / "bundle" / "metrics.json").read_text())["summary"]["dsc"]
    interval = f"{summary['mean']:.4f} ({summary['low']:.4f} to {summary['high']:.4f})"
    assert f"| tumour | 4 | {interval} |" in card
    assert len({line.count("|") for line in card.splitlines() if line.startswith("|")}) == 1


def test_several_structures(tmp_path):
    recipe = RECIPE.replace({"data.structures": {"core": (1,), "rim": (2,)}})
    run = make_run(tmp_path / "run", recipe)
    # The patients of one fold have no core.
    result = json.loads((file := tmp_path / "run" / "fold_0" / "mmfnet.json").read_text())
    nothing = np.zeros((2, 4, 4))
    for row in result["patients"]:
        row |= evaluate_case(nothing, nothing, (4, 1, 1)) if row["structure"] == "core" else {}
    file.write_text(json.dumps(result))
    run.save_bundle(tmp_path / "bundle.zip")
    bundle = Bundle(tmp_path / "bundle.zip")
    assert bundle.recipe.data.structure_names == ("core", "rim")
    assert list(bundle.postprocessing([0]).structures) == ["core", "rim"]
    card = (bundle.folder / "README.md").read_text()
    assert "| structure | patients with it | DSC | " in card
    assert "Means over 4 test patients" in card
    assert "| core | 2 | " in card
    assert "| rim | 4 | " in card
    assert "The training data were not described." in card


def test_the_card_tells_of_a_donor(run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "run")
    (tmp_path / "run" / "donor.keras").touch()
    (tmp_path / "run" / "cohort.json").write_text(json.dumps({"donor": {"modalities": ["t2"]}}))
    Run(tmp_path / "run").save_bundle(tmp_path / "bundle", "Ours.")
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert "Ours.\n\nThe encoders of t2 started from those of another network" in card


def test_the_card_may_be_changed_and_files_added(copy):
    (copy / "README.md").write_text("Mine.")
    (copy / "metrics.json").unlink()
    (copy / "LICENSE").write_text("Mine.")
    assert Bundle(copy).trained_folds() == [0, 2]


def test_it_is_written_whole_or_not_at_all(run, tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    (tmp_path / "old.zip").touch()
    for name in ("old", "old.zip"):
        with pytest.raises(FileExistsError, match=f"{name}: a new one is expected"):
            run.save_bundle(tmp_path / name)

    def stop(*args):
        raise OSError("the disk is full")

    monkeypatch.setattr(bundles, "_card", stop)
    for name in ("new", "new.zip"):
        with pytest.raises(OSError, match="full"):
            run.save_bundle(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "old.zip"]
    assert not any((tmp_path / "old").iterdir())


def test_a_run_that_is_not_finished(run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "run")
    (tmp_path / "run" / "fold_2" / "mmfnet.json").unlink()
    with pytest.raises(ValueError, match=r"finished folds are expected.*Received: trained 0, 2, finished 0$"):
        Run(tmp_path / "run").save_bundle(tmp_path / "bundle")
    shutil.rmtree(tmp_path / "run" / "fold_0")
    (tmp_path / "run" / "fold_2" / "mmfnet.keras").unlink()
    with pytest.raises(ValueError, match=r"finished folds are expected.*Received: trained none, finished none$"):
        Run(tmp_path / "run").save_bundle(tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("name", ["recipe.json", "fold_2/mmfnet.keras"])
def test_a_file_that_is_damaged_or_gone(copy, name):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"bundle: {name}: the file whose SHA-256 .* Received: a damaged one"):
        Bundle(copy)
    (copy / name).unlink()
    with pytest.raises(ValueError, match=f"bundle: {name}: .* Received: none"):
        Bundle(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"format": 2, "written_by": "keras-mmfnet 9"},
            "format 1 is expected; update .* Received: 2, of keras-mmfnet 9",
        ),
        ({"format": None}, "must be that of a bundle. Received: format None"),
        ({"folds": {}}, "must be that of a bundle. Received: folds: "),
        ({"folds": {"0": {}}}, "must be that of a bundle. Received: folds.0.postprocess: "),
        ({"files": {"../recipe.json": "0"}}, "must be that of a bundle. Received: files."),
        ({"files": {"/recipe.json": "0"}}, "must be that of a bundle. Received: files."),
        ({"files": {}}, "must list "),
        ({"folds": {"0": OTHER, "2": OTHER}}, "must have post-processing for the recipe's tumour. Received: "),
    ],
)
def test_contents_that_are_not_understood(copy, change, message):
    about = json.loads((copy / "bundle.json").read_text())
    (copy / "bundle.json").write_text(json.dumps(about | change))
    with pytest.raises(ValueError, match=f"^{copy}: .*{message}"):
        Bundle(copy)


def test_what_is_no_bundle(run, tmp_path):
    with pytest.raises(ValueError, match="nowhere: a folder or file that exists is expected"):
        Bundle(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"with a bundle.json, is expected. Received: a folder without"):
        Bundle(run.folder)
    (tmp_path / "text.zip").write_text("no archive")
    with pytest.raises(ValueError, match=r"text.zip: must be an undamaged zip archive. Received: "):
        Bundle(tmp_path / "text.zip")


def archive(path, folder, top="", **others):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for source in folder.rglob("*.*"):
            file.write(source, top + source.relative_to(folder).as_posix())
        for name, content in others.items():
            file.writestr(name, content)
    return path


def test_an_archive_that_was_made_by_hand(copy, tmp_path):
    """Compressed, in a folder, with files of the system's."""
    path = archive(tmp_path / "own.zip", copy, "my bundle/", **{"__MACOSX/my bundle/._recipe.json": "x"})
    assert Bundle(path).trained_folds() == [0, 2]
    assert not list(Bundle(path).folder.rglob("*MACOSX*"))


@pytest.mark.parametrize("name", ["../out.json", "/out.json", "a/../../out.json", "C:/out.json", "..\\out.json"])
def test_an_archive_whose_files_would_lie_elsewhere(copy, tmp_path, name):
    with pytest.raises(ValueError, match=r"inside the archive are expected. Received: "):
        Bundle(archive(tmp_path / "bad.zip", copy, **{name: "x"}))
    assert not list(tmp_path.rglob("out.json"))


def test_an_archive_that_is_damaged_or_too_large(copy, saved, tmp_path, monkeypatch):
    content = bytearray((saved / "bundle.zip").read_bytes())
    content[content.index(b"PK", 4) - 40] ^= 1
    (tmp_path / "bad.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad.zip: must be an undamaged zip archive. Received: Bad CRC"):
        Bundle(tmp_path / "bad.zip")
    with zipfile.ZipFile(tmp_path / "lzma.zip", "w", zipfile.ZIP_LZMA) as packed:
        packed.writestr("bundle.json", "{}" * 1000)
    content = bytearray((tmp_path / "lzma.zip").read_bytes())
    content[60:64] = b"\xff" * 4
    (tmp_path / "lzma.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"lzma.zip: must be an undamaged zip archive. Received: "):
        Bundle(tmp_path / "lzma.zip")
    with pytest.raises(ValueError, match=r"with one bundle.json is expected. Received: one with 2"):
        Bundle(archive(tmp_path / "two.zip", copy, **{"other/bundle.json": "{}"}))
    monkeypatch.setattr(bundles, "_LARGEST", 1000)
    with pytest.raises(ValueError, match=r"at most 1000 bytes are expected. Received: \d+"):
        Bundle(saved / "bundle.zip")


# --- presets


@pytest.fixture
def hub(monkeypatch):
    """The client of the Hugging Face Hub, with repositories by name."""
    repositories = {}
    client = types.ModuleType("huggingface_hub")
    client.snapshot_download = lambda repo_id: str(repositories[repo_id])
    monkeypatch.setitem(sys.modules, "huggingface_hub", client)
    return repositories


def same(one, other):
    for a, b in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    return type(one) is type(other)


@pytest.mark.parametrize("model", [network(), UNet3D("t1", (4, 8, 8), (2,))], ids=lambda model: type(model).__name__)
def test_a_preset_comes_back(model, tmp_path):
    model.save_to_preset(tmp_path / "preset")
    files = ["config.json", "metadata.json", "model.weights.h5"]
    assert sorted(path.name for path in (tmp_path / "preset").iterdir()) == files
    found = type(model).from_preset(str(tmp_path / "preset"))
    assert same(found, model)
    assert found.get_config() == model.get_config()
    larger = type(model).from_preset(tmp_path / "preset", patch_shape=(8, 32, 32))
    assert same(larger, model)
    assert larger.patch_shape == (8, 32, 32)
    with pytest.raises(FileExistsError, match="a new one is expected"):
        model.save_to_preset(tmp_path / "preset")


def test_presets_that_are_refused(tmp_path):
    network().save_to_preset(tmp_path / "preset")
    with pytest.raises(ValueError, match=r"config.json: must be of the class UNet3D. Received: MMFNet"):
        UNet3D.from_preset(tmp_path / "preset")
    with pytest.raises(ValueError, match=r"must be an undamaged preset that fits \{'patch_shape': .*\}. Received: "):
        MMFNet.from_preset(tmp_path / "preset", patch_shape=(5, 8, 8))
    with pytest.raises(ValueError, match="a folder or file that exists is expected"):
        MMFNet.from_preset(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"config.json: a preset with such a file, or a bundle, is expected"):
        MMFNet.from_preset(tmp_path)
    path = tmp_path / "preset" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"registered_name": "Lambda"}))
    with pytest.raises(ValueError, match=r"must be of the class MMFNet. Received: None"):
        MMFNet.from_preset(tmp_path / "preset")
    layers = {"name": "m", "layers": [], "input_layers": [], "output_layers": []}
    path.write_text(json.dumps(config | {"config": layers}))
    with pytest.raises(ValueError, match=r"must be an undamaged preset"):
        MMFNet.from_preset(tmp_path / "preset")


@pytest.mark.parametrize(
    ("name", "value", "received"),
    [
        ("modalities", ("a", "b", "c", "d"), r'\["a", "b", "c", "d"\]'),
        ("filters", (3,), r"\[3\]"),
        ("structures", ("gtv", "node"), r'\["gtv", "node"\]'),
        ("residual", True, "true"),
    ],
)
def test_the_weights_of_a_preset_are_of_its_own_arguments(saved, tmp_path, name, value, received, monkeypatch):
    model = network()
    model.save_to_preset(tmp_path / "preset")
    equal = {name: list(found) if isinstance(found := getattr(model, name), tuple) else found}
    assert same(MMFNet.from_preset(tmp_path / "preset", **equal), model)
    for method in ("set_weights", "load_weights"):
        monkeypatch.setattr(MMFNet, method, lambda *_: pytest.fail("weights were set"))
    for preset in (tmp_path / "preset", saved / "bundle"):
        with pytest.raises(ValueError, match=rf": `{name}` must be the preset's, .+\. Received: {received}$"):
            MMFNet.from_preset(preset, **{name: value})


def test_the_network_of_a_fold_of_a_bundle(run, saved, hub):
    hub["me/tumours"] = saved / "bundle"
    first, last = (load_network(run.network(fold)) for fold in (0, 2))
    assert same(MMFNet.from_preset(saved / "bundle"), first)
    assert same(MMFNet.from_preset("hf://me/tumours", fold=0), first)
    larger = MMFNet.from_preset(str(saved / "bundle.zip"), fold=2, patch_shape=(8, 32, 32))
    assert same(larger, last)
    assert larger.patch_shape == (8, 32, 32)
    assert Bundle("hf://me/tumours").recipe == RECIPE
    with pytest.raises(ValueError, match=r"dtype, .+, trainable is expected\. Received: deep_supervision$"):
        MMFNet.from_preset(saved / "bundle", deep_supervision=True)
    with pytest.raises(ValueError, match=r"`fold` must be one of the bundle's, 0, 2. Received: 1"):
        MMFNet.from_preset(saved / "bundle", fold=1)
    with pytest.raises(ValueError, match=r"must be of the class UNet3D. Received: MMFNet"):
        UNet3D.from_preset(saved / "bundle")


def test_the_hub_without_its_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"hf://me/tumours: hf:// needs the extra: pip install 'keras-mmfnet\[hub\]'"):
        MMFNet.from_preset("hf://me/tumours")


# --- fine-tuning

TINY = Recipe.small().replace(
    {
        "data.modalities": ("t1", "cet1"),
        "data.spacing": 4.0,
        "patches.shape": (16, 16, 16),
        "network.filters": (2,),
        "network.reduction": 2,
        "training.batch_size": 1,
        "training.steps_per_epoch": 1,
        "training.epochs": 1,
        "training.folds": 3,
    }
)


@pytest.fixture(scope="module")
def donor(tmp_path_factory):
    """A network of other sequences and structures, whose encoders fit `TINY`."""
    path = tmp_path_factory.mktemp("donor") / "mmfnet.keras"
    network(TINY.replace({"data.modalities": ("t1", "t2"), "data.structures": {"a": (1,), "b": (2,)}})).save(path)
    return path


class Trained(Exception):
    """Ends a fold where its network would be trained."""


def test_a_run_starts_from_the_encoders_of_a_donor(tiny_cohort, tmp_path, donor, monkeypatch):
    """The others by self-transfer; a resumed run uses them again, other methods do without."""
    run = Run.start(tmp_path / "run", tiny_cohort, TINY, donor=donor)
    checksum = hashlib.sha256(donor.read_bytes()).hexdigest()
    # It learnt from no patient of a run.
    assert run.cohort["donor"] == {"modalities": ["t1"], "sha256": checksum, "learned": []}
    assert run.donor_file.read_bytes() == donor.read_bytes()
    run, asked = Run.start(run.folder, tiny_cohort, TINY, resume=True), []

    def train(method, training, validation, recipe, folder, encoders=None):
        asked.append((method.name, encoders))
        if not method.name.startswith("unet3d_"):
            raise Trained

    monkeypatch.setattr(runner, "train_method", train)
    for method in (method_of(TINY), METHODS["mmfnet_t1_cet1"]):
        with pytest.raises(Trained):
            run_fold(run, method, 0)
    encoders = {"t1": run.donor_file, "cet1": run.network(0, "unet3d_cet1")}
    assert asked == [
        ("unet3d_cet1", None),
        ("mmfnet", encoders),
        ("unet3d_t1", None),
        ("unet3d_cet1", None),
        ("mmfnet_t1_cet1", None),
    ]


def test_sequences_of_neither_a_donor_nor_self_transfer_start_at_random(tiny_cohort, tmp_path, donor, monkeypatch):
    recipe = TINY.replace({"training.self_transfer": False})
    run, asked = Run.start(tmp_path / "run", tiny_cohort, recipe, donor=donor), []

    def train(method, training, validation, recipe, folder, encoders=None):
        asked.append(encoders)
        raise Trained

    monkeypatch.setattr(runner, "train_method", train)
    with pytest.raises(Trained):
        run_fold(run, method_of(recipe), 0)
    assert asked == [{"t1": run.donor_file, "cet1": None}]


def test_another_donor_is_not_resumed(tiny_cohort, tmp_path, donor):
    recipe, other = TINY.replace({"training.self_transfer": False}), tmp_path / "other.keras"
    network(TINY, 7).save(other)
    for folder, first, second in (("a", donor, other), ("b", None, other)):
        Run.start(tmp_path / folder, tiny_cohort, recipe, donor=first)
        before = (tmp_path / folder / "cohort.json").read_bytes()
        with pytest.raises(ValueError, match=r"another donor, .* Received: donor"):
            Run.start(tmp_path / folder, tiny_cohort, recipe, resume=True, donor=second)
        assert (tmp_path / folder / "cohort.json").read_bytes() == before
    assert (tmp_path / "a" / "donor.keras").read_bytes() == donor.read_bytes()
    assert not (tmp_path / "b" / "donor.keras").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: network(TINY.replace({"data.modalities": ("flair", "t2")})),
            "one of t1, cet1. Received: one for flair",
        ),
        (lambda: network(TINY.replace({"network.filters": (3,)})), r"must have the filters \(2,\), .*Received: \(3,\)"),
        (lambda: SingleEncoderUNet3D(("t1", "t2"), (4, 8, 8), (2,)), "has no encoder for it"),
    ],
)
def test_a_donor_that_does_not_fit_is_refused_at_once(tiny_cohort, tmp_path, model, message):
    model().save(tmp_path / "donor.keras")
    with pytest.raises(ValueError, match=message):
        Run.start(tmp_path / "run", tiny_cohort, TINY, donor=tmp_path / "donor.keras")
    assert not (tmp_path / "run").exists()
