import ast
import dataclasses
import os
import resource
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from patients import RAW, head, make_case, make_grid, only, write

from keras_mmfnet.data import cache as cache_files
from keras_mmfnet.data import preprocess
from keras_mmfnet.data.preprocess import preprocess_case
from keras_mmfnet.recipe import Recipe


def entries(cache):
    return sorted(path.name for path in cache.iterdir() if not path.name.startswith("."))


def assert_same(result, expected):
    for field in ("name", "grid", "source", "centre", "notes", "shape", "spacing"):
        assert getattr(result, field) == getattr(expected, field)
    assert list(result.images) == list(expected.images)
    arrays = zip([*result.images.values(), result.mask], [*expected.images.values(), expected.mask], strict=True)
    for array, other in arrays:
        assert array.dtype == other.dtype
        np.testing.assert_array_equal(array, other)


@pytest.fixture
def no_preprocessing(monkeypatch):
    """A function after whose call preprocessing fails, so that only the cache can answer."""

    def forbid():
        monkeypatch.setattr(preprocess, "_preprocess", lambda case, recipe: pytest.fail("not from the cache"))

    return forbid


def test_the_cache_gives_the_same_case(tmp_path, no_preprocessing):
    other = make_grid(spacing=(0.9, 0.9, 3.0))
    case, cache, recipe = make_case(tmp_path / "a", other_grid=other, mask_grid=other), tmp_path / "cache", Recipe()
    expected = preprocess_case(case, recipe.data)
    assert expected.notes
    assert_same(preprocess_case(case, recipe.data, cache), expected)
    (entry,) = entries(cache)
    assert sorted(os.listdir(cache / entry)) == [
        "case.json",
        "image_cet1.npy",
        "image_t1.npy",
        "image_t2.npy",
        "mask_tumour.npy",
    ]
    no_preprocessing()
    cached = preprocess_case(case, recipe.data, str(cache))
    assert_same(cached, expected)
    assert isinstance(cached.images["t1"], np.memmap)
    assert not cached.images["t1"].flags.writeable
    assert (cached.tumour_ml, cached.structures_ml) == (expected.tumour_ml, expected.structures_ml)
    assert expected.tumour_ml == np.count_nonzero(expected.mask) * np.prod(expected.spacing) / 1000
    renamed = preprocess_case(dataclasses.replace(case, name="bob"), recipe.data, cache)
    assert renamed.name == "bob"


def test_arrays_of_any_type_and_order_are_read_in_several_threads(make_case, tmp_path, monkeypatch):
    case = make_case()
    case.images["t1"] = np.asfortranarray(case.images["t1"].astype(np.float16))
    cache_files.store(case, tmp_path / "entry")
    cached = cache_files.load(tmp_path / "entry", case.name)
    # `np.load` parses a header as Python, which in several threads is now and then an error on Python 3.11.
    parse, parsed = ast.parse, []
    monkeypatch.setattr(ast, "parse", lambda *args, **kwargs: parsed.append(args) or parse(*args, **kwargs))
    with ThreadPoolExecutor(2) as pool:
        images = list(pool.map(cached.images.__getitem__, case.images))
    assert not parsed
    for image, expected in zip(images, case.images.values(), strict=True):
        assert image.dtype == np.float32
        np.testing.assert_array_equal(image, expected)


def test_the_cache_knows_content_and_recipe(tmp_path):
    case, cache = make_case(tmp_path / "a"), tmp_path / "cache"
    preprocess_case(case, RAW.data, cache)
    preprocess_case(
        case, RAW.replace({"training.seed": 5, "training.epochs": 7, "patches.shape": (16, 32, 32)}).data, cache
    )
    assert len(entries(cache)) == 1
    preprocess_case(case, RAW.replace({"data.spacing": 1.5}).data, cache)
    preprocess_case(case, RAW.replace({"data.normalised_scale": 100}).data, cache)
    preprocess_case(case, RAW.replace({"data.clip": {"t1": (-1, 1)}}).data, cache)
    preprocess_case(case, RAW.replace({"data.structures.tumour": (1,)}).data, cache)
    preprocess_case(only(case, "t1", "t2"), RAW.replace({"data.modalities": ("t1", "t2")}).data, cache)
    preprocess_case(dataclasses.replace(case, mask=None), RAW.data, cache)
    assert len(entries(cache)) == 7
    write(case.images["cet1"], make_grid(), head(make_grid(), seed=9))
    changed = preprocess_case(case, RAW.data, cache)
    assert len(entries(cache)) == 8
    assert_same(changed, preprocess_case(case, RAW.data))


@pytest.mark.parametrize("suffix", [".mhd", ".nhdr"])
def test_the_cache_sees_voxels_in_a_file_of_their_own(tmp_path, suffix):
    case, cache = make_case(tmp_path / "a", suffix=suffix), tmp_path / "cache"
    preprocess_case(case, RAW.data, cache)
    header = case.images["t1"].read_bytes()
    write(case.images["t1"], make_grid(), head(make_grid(), seed=9).astype(np.int16))
    assert case.images["t1"].read_bytes() == header
    assert_same(preprocess_case(case, RAW.data, cache), preprocess_case(case, RAW.data))
    assert len(entries(cache)) == 2


def damage_byte(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("image_t2.npy", damage_byte),
        ("mask_tumour.npy", damage_byte),
        ("image_t1.npy", lambda path: os.truncate(path, 1000)),
        ("image_t1.npy", lambda path: os.truncate(path, 0)),
        ("image_t1.npy", Path.unlink),
        ("case.json", Path.unlink),
        ("case.json", lambda path: os.truncate(path, 100)),
        ("case.json", lambda path: path.write_text("{}")),
        ("case.json", lambda path: path.write_text("[1]")),
        ("case.json", lambda path: path.write_bytes(b"\xff\xfe")),
    ],
)
def test_a_damaged_entry_is_rebuilt(tmp_path, no_preprocessing, file, damage):
    case, cache = make_case(tmp_path / "a"), tmp_path / "cache"
    preprocess_case(case, RAW.data, cache)
    (entry,) = entries(cache)
    damage(cache / entry / file)
    expected = preprocess_case(case, RAW.data)
    assert_same(preprocess_case(case, RAW.data, cache), expected)
    assert entries(cache) == [entry]
    no_preprocessing()
    assert_same(preprocess_case(case, RAW.data, cache), expected)


def age(*paths):
    """Makes files older than what may still change within a step of the clock."""
    for path in paths:
        os.utime(path, ns=(0, path.stat().st_mtime_ns - 60 * 10**9))


def test_files_of_the_same_size_and_time_are_not_read_again(tmp_path, monkeypatch):
    case, folder = make_case(tmp_path / "a", suffix=".mha"), tmp_path / "cache"
    files = [*case.images.values(), case.mask]
    age(*files)
    preprocess_case(case, RAW.data, folder)
    (entry,) = entries(folder)
    for module, name in ((cache_files.hashlib, "file_digest"), (cache_files.zlib, "crc32")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("a file was read"))
    preprocess_case(case, RAW.data, folder)
    monkeypatch.undo()
    # Moved patients and a copied cache are recognised by their content.
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    moved = dataclasses.replace(
        case, images={m: tmp_path / "b" / f.name for m, f in case.images.items()}, mask=tmp_path / "b" / case.mask.name
    )
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    for path in (tmp_path / "copy" / entry).iterdir():
        age(path)
    preprocess_case(moved, RAW.data, tmp_path / "copy")
    assert entries(tmp_path / "copy") == [entry]
    # A change that leaves size and time as they were is found on request.
    for path in (case.images["t1"], folder / entry / "image_t2.npy"):
        before = path.stat()
        damage_byte(path)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    preprocess_case(case, RAW.data, folder)
    assert entries(folder) == [entry]
    assert cache_files.verify(folder) == [entry]
    assert_same(preprocess_case(case, RAW.data, folder), preprocess_case(case, RAW.data))


def test_more_patients_than_files_may_be_open(tmp_path, no_preprocessing):
    case, folder = make_case(tmp_path / "a"), tmp_path / "cache"
    preprocess_case(case, RAW.data, folder)
    no_preprocessing()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = len(os.listdir("/proc/self/fd")) + 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
    try:
        cases = [preprocess_case(case, RAW.data, folder) for _ in range(20)]
        arrays = [case.images["t1"].sum() for case in cases]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(set(arrays)) == 1


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    case, cache = make_case(tmp_path / "a"), tmp_path / "cache"
    save, saved = np.save, []

    def interrupted(file, array):
        if saved:
            raise KeyboardInterrupt
        saved.append(file)
        save(file, array)

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            preprocess_case(case, RAW.data, cache)
    assert entries(cache) == []
    assert_same(preprocess_case(case, RAW.data, cache), preprocess_case(case, RAW.data))


def test_a_full_disk(tmp_path, full_disk):
    case, cache = make_case(tmp_path / "a"), tmp_path / "cache"
    with (
        full_disk(1000),
        pytest.raises(OSError, match=r"a disk with room for the preprocessed patients\. Received: "),
    ):
        preprocess_case(case, RAW.data, cache)
    assert entries(cache) == []
    assert_same(preprocess_case(case, RAW.data, cache), preprocess_case(case, RAW.data))


def test_several_at_once_end_with_one_entry(tmp_path):
    case, cache = make_case(tmp_path / "a"), tmp_path / "cache"
    expected = preprocess_case(case, RAW.data)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: preprocess_case(case, RAW.data, cache), range(8)))
    for result in results:
        assert_same(result, expected)
    assert len(entries(cache)) == 1


def test_an_entry_that_appears_meanwhile_is_kept(tmp_path, monkeypatch):
    case, cache = make_case(tmp_path / "a"), tmp_path / "cache"
    build = preprocess._preprocess

    def slow(case, recipe):
        monkeypatch.setattr(preprocess, "_preprocess", build)
        preprocess_case(case, recipe, cache)
        return build(case, recipe)

    monkeypatch.setattr(preprocess, "_preprocess", slow)
    assert_same(preprocess_case(case, RAW.data, cache), preprocess_case(case, RAW.data))
    assert len(entries(cache)) == 1
