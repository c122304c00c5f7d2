import numpy as np
from matplotlib.path import Path

from keras_mmfnet.data.polygons import fill_nested, rasterise

SQUARE = np.array([(0.5, 0.5), (4.5, 0.5), (4.5, 3.5), (0.5, 3.5)])


def test_pixels_whose_centres_are_inside():
    np.testing.assert_array_equal(rasterise([SQUARE], (5, 6)), np.pad(np.ones((3, 4), bool), ((1, 1), (1, 1))))
    assert rasterise([SQUARE + np.array([0.4, -0.4])], (5, 6)).sum() == 12
    assert rasterise([SQUARE / 100 + 0.1], (5, 6)).sum() == 0
    assert rasterise([], (5, 6)).sum() == 0


def test_a_polygon_within_another_is_a_hole_and_one_may_leave_the_image():
    hole = np.array([(1.5, 1.5), (3.5, 1.5), (3.5, 2.5), (1.5, 2.5)])
    assert rasterise([SQUARE, hole], (5, 6)).sum() == 12 - 2
    corner = rasterise([SQUARE - np.array([3, 2])], (5, 6))
    assert corner[:2, :2].all()
    assert corner.sum() == 4
    assert rasterise([SQUARE * 100 - 50], (5, 6)).all()
    assert not rasterise([SQUARE + 100], (5, 6)).any()


def test_as_matplotlib_does():
    rng = np.random.default_rng(0)
    pixels = np.moveaxis(np.indices((20, 30))[::-1], 0, -1).reshape(-1, 2)
    for _ in range(50):
        polygons = [rng.uniform(-5, 35, (rng.integers(3, 9), 2)) for _ in range(3)]
        expected = np.logical_xor.reduce([Path(polygon).contains_points(pixels) for polygon in polygons])
        np.testing.assert_array_equal(rasterise(polygons, (20, 30)).ravel(), expected)


def box(low, high):
    return np.array([(low, low), (high, low), (high, high), (low, high)], float)


def test_nested_polygons_are_holes_and_islands():
    expected = np.zeros((20, 20), bool)
    for low, high, value in ((2, 18, True), (5, 15, False), (8, 12, True)):
        expected[low:high, low:high] = value
    nested = [box(low - 0.5, high - 0.5) for low, high in ((8, 12), (2, 18), (5, 15))]
    np.testing.assert_array_equal(fill_nested(nested, (20, 20)), expected)
    # One that is drawn twice, the other way round, counts once.
    np.testing.assert_array_equal(fill_nested([*nested, nested[1][::-1] + 0.1], (20, 20)), expected)


def test_polygons_that_cross_are_joined_unless_one_is_a_hole():
    expected = np.zeros((20, 20), bool)
    expected[2:10, 2:10] = expected[6:14, 6:14] = True
    np.testing.assert_array_equal(fill_nested([box(1.5, 9.5), box(5.5, 13.5)], (20, 20)), expected)
    assert fill_nested([box(1.5, 13.5), box(4.5, 9.5), box(7.5, 17.5)], (20, 20)) is None
