import itertools

import numpy as np
import pytest

from keras_mmfnet.data.labels import join_masks, split_labels

BRATS = {"whole": (1, 2, 4), "core": (1, 4), "enhancing": (4,)}


@pytest.mark.parametrize(
    ("structures", "labels"),
    [
        ({"tumour": None}, (0, 1)),
        ({"tumour": (1, 4)}, (0, 1)),
        ({"gtv": (1,), "node": (300,)}, (0, 1, 300)),
        (BRATS, (0, 1, 2, 4)),
        ({"a": (1, 2), "b": (2, 3)}, (0, 1, 2, 3)),
        ({"a": (-1,), "b": (3,)}, (0, -1, 3)),
        ({"a": (-1,), "b": (40000,)}, (0, -1, 40000)),
    ],
)
def test_labels_are_split_and_joined_again(structures, labels):
    values = np.random.default_rng(0).choice(labels, (3, 4, 5))
    masks = split_labels(values, structures)
    assert list(masks) == list(structures)
    np.testing.assert_array_equal(join_masks(masks, structures), values)


def test_a_structure_of_several_labels_gets_its_first_one():
    structures = {"gtv": (2, 3), "node": (1,)}
    joined = join_masks(split_labels(np.array([0, 1, 2, 3]), structures), structures)
    np.testing.assert_array_equal(joined, [0, 1, 2, 2])
    assert joined.dtype == np.uint8


def test_regions_that_do_not_fit_together_get_the_nearest_label():
    expected = {  # (whole, core, enhancing)
        (0, 0, 0): 0,
        (1, 0, 0): 2,
        (0, 1, 0): 0,
        (1, 1, 0): 1,
        (0, 0, 1): 0,
        (1, 0, 1): 2,
        (0, 1, 1): 4,
        (1, 1, 1): 4,
    }
    members = {label: tuple(label in labels for labels in BRATS.values()) for label in (0, 2, 1, 4)}
    for found in itertools.product((0, 1), repeat=3):
        masks = {name: np.array([inside], np.uint8) for name, inside in zip(BRATS, found, strict=True)}
        assert join_masks(masks, BRATS) == expected[found]
        differing = {label: sum(a != b for a, b in zip(found, of, strict=True)) for label, of in members.items()}
        assert differing[expected[found]] == min(differing.values())


def test_many_structures():
    structures = {f"organ {number}": (number,) for number in range(1, 41)}
    values = np.random.default_rng(0).integers(0, 41, (3, 4, 5))
    masks = split_labels(values, structures)
    np.testing.assert_array_equal(join_masks(masks, structures), values)
    # Where organs overlap, the first one counts.
    masks["organ 40"][:] = True
    np.testing.assert_array_equal(join_masks(masks, structures), np.where(values, values, 40))


def test_structures_with_files_of_their_own_have_no_label_image():
    masks = dict.fromkeys(("gtv", "ctv"), np.ones(3, np.uint8))
    assert join_masks(masks, {"gtv": "gtv", "ctv": "ctv"}) is None
    np.testing.assert_array_equal(join_masks({"gtv": masks["gtv"]}, {"gtv": "gtv"}), [1, 1, 1])
