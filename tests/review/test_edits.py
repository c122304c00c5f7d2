import numpy as np
import pytest

from keras_mmfnet.review.edits import Classes, difference, grow, interpolate_slices

EXCLUSIVE = {"gtv": (1,), "node": (2, 3)}
REGIONS = {"wt": (1, 2, 4), "tc": (1, 4), "et": (4,)}
FILES = {"gtv": "GTV.*", "cord": "cord"}


@pytest.mark.parametrize("structures", [{"tumour": None}, EXCLUSIVE, REGIONS, FILES])
def test_a_drawing_holds_every_combination_the_structures_allow(structures):
    classes = Classes(structures)
    everything = np.arange(len(classes.members), dtype=np.uint8).reshape(1, 1, -1)
    masks = classes.split(everything)
    np.testing.assert_array_equal(classes.join(masks), everything)
    assert not classes.members[0].any()


def members(classes, value):
    return [name for name, inside in zip(classes.structures, classes.members[value], strict=True) if inside]


@pytest.mark.parametrize(
    ("structures", "before", "structure", "drawn", "erased"),
    [
        ({"tumour": None}, [], 0, ["tumour"], []),
        (EXCLUSIVE, ["gtv"], 1, ["node"], ["gtv"]),
        (EXCLUSIVE, ["gtv"], 0, ["gtv"], []),
        (REGIONS, [], 1, ["wt", "tc"], []),
        (REGIONS, ["wt", "tc", "et"], 0, ["wt", "tc", "et"], []),
        (REGIONS, ["wt", "tc", "et"], 1, ["wt", "tc", "et"], ["wt"]),
        (REGIONS, ["wt", "tc", "et"], 2, ["wt", "tc", "et"], ["wt", "tc"]),
        (FILES, ["gtv"], 1, ["gtv", "cord"], ["gtv"]),
        (FILES, ["gtv", "cord"], 1, ["gtv", "cord"], ["gtv"]),
    ],
)
def test_drawing_keeps_structures_as_they_must_be(structures, before, structure, drawn, erased):
    classes = Classes(structures)
    [value] = [n for n in range(len(classes.members)) if members(classes, n) == before]
    assert members(classes, classes.drawn[structure][value]) == drawn
    assert members(classes, classes.erased[structure][value]) == erased
    drawing = np.full((1, 1, 2), value, np.uint8)
    after = classes.replace(drawing, structure, np.array([[[True, False]]])).ravel()
    assert [members(classes, one) for one in after] == [drawn, erased]


def test_what_cannot_be_drawn():
    with pytest.raises(ValueError, match=r"at most 8 structures that may overlap can be drawn. Received: 9"):
        Classes({f"s{n}": f"s{n}" for n in range(9)})
    with pytest.raises(ValueError, match=r"overlap as their labels do are expected. Received: 1 voxels"):
        Classes(EXCLUSIVE).join([np.ones((1, 1, 1)), np.ones((1, 1, 1))])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_between_are_interpolated(axis):
    """A cone of which two slices were drawn: the radius between is the mean, and the slices beyond stay empty."""
    y, x = np.mgrid[-20:21, -20:21]
    mask = np.zeros((9, 41, 41), bool)
    mask[2], mask[6] = np.hypot(y, x) <= 6, np.hypot(y, x) <= 14
    found = np.moveaxis(interpolate_slices(np.moveaxis(mask, 0, axis), axis), axis, 0)
    assert [int(one.any()) for one in found] == [0, 0, 1, 1, 1, 1, 1, 0, 0]
    np.testing.assert_array_equal(found[[2, 6]], mask[[2, 6]])
    for number, radius in ((3, 8), (4, 10), (5, 12)):
        assert np.sqrt(found[number].sum() / np.pi) == pytest.approx(radius, abs=0.4)


def test_interpolation_measures_in_millimetres():
    """Squares that move along x: with long pixels along y, only x counts."""
    mask = np.zeros((3, 9, 30), bool)
    mask[0, 2:7, 2:10], mask[2, 2:7, 6:14] = True, True
    found = interpolate_slices(mask, 0, (5.0, 100.0, 1.0))
    np.testing.assert_array_equal(np.flatnonzero(found[1, 4]), np.arange(4, 12))
    assert (found[1].any(axis=1) == mask[0].any(axis=1)).all()


def test_growing_stays_with_the_structure():
    probability = np.zeros((1, 3, 9))
    probability[0, 1] = [0.9, 0.8, 0.3, 0, 0, 0.7, 0.9, 0, 0]
    seed = np.zeros(probability.shape, bool)
    assert grow(probability, 0.5, seed)[0, 1].tolist() == [1, 1, 0, 0, 0, 1, 1, 0, 0]
    seed[0, 1, 0] = True
    assert grow(probability, 0.5, seed)[0, 1].tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert grow(probability, 0.2, seed)[0, 1].tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert grow(probability, 0.95, seed).sum() == 0


def test_the_difference_turns_one_drawing_into_the_other():
    one, other = np.random.default_rng(0).integers(0, 3, (2, 4, 5, 6)).astype(np.uint8)
    indices, values = difference(one, other)
    assert (indices.dtype, values.dtype) == (np.uint32, np.uint8)
    one.reshape(-1)[indices] = values
    np.testing.assert_array_equal(one, other)
