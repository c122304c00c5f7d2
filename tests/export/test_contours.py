import numpy as np
import pytest
from scipy import ndimage

from keras_mmfnet.data.polygons import rasterise
from keras_mmfnet.export.contours import contours, simplified


def area(polygon):
    x, y = polygon.T
    return (x * np.roll(y, -1) - y * np.roll(x, -1)).sum() / 2


def crossings(polygons):
    """Pairs of edges that cross or touch, but for neighbours at their common point; by orientations."""
    start = np.concatenate(polygons)
    end = np.concatenate([np.roll(polygon, -1, axis=0) for polygon in polygons])

    def side(a, b, c):
        return np.sign(np.round((b - a)[..., 0] * (c - a)[..., 1] - (b - a)[..., 1] * (c - a)[..., 0], 12))

    a, b, c, d = start[:, None], end[:, None], start[None], end[None]
    low, high = np.minimum(start, end), np.maximum(start, end)
    near = (low[:, None] <= high[None]).all(-1) & (low[None] <= high[:, None]).all(-1)
    meet = near & (side(a, b, c) * side(a, b, d) <= 0) & (side(c, d, a) * side(c, d, b) <= 0)
    neighbours = (start[:, None] == end[None]).all(-1)
    return np.count_nonzero(meet & ~neighbours & ~neighbours.T & ~np.eye(len(start), dtype=bool))


def fields(number):
    """Random fields, from noise with every kind of contact to smooth ones."""
    rng = np.random.default_rng(0)
    for _ in range(number):
        field = rng.random(rng.integers(1, 14, 2))
        if smooth := rng.choice([0, 0.7, 1.5]):
            field = ndimage.gaussian_filter(field, smooth)
        yield (field - field.min()) / max(np.ptp(field), 1e-9), rng.choice([0.3, 0.5, 0.6])


@pytest.mark.parametrize("with_probability", [False, True])
def test_contours_are_simple_and_enclose_the_mask(with_probability):
    for field, level in fields(150):
        mask = field >= level
        polygons = contours(mask, field if with_probability else None)
        np.testing.assert_array_equal(rasterise(polygons, mask.shape), mask)
        assert len(polygons) == ndimage.label(mask)[1]
        assert all(len(polygon) >= 4 and area(polygon) > 0 for polygon in polygons)
        if not with_probability:
            assert sum(map(area, polygons)) == pytest.approx(mask.sum(), rel=0.06)
        for tolerance in (0, 0.1, 0.6, 2.0):
            fewer = simplified(polygons, tolerance)
            assert len(fewer) == len(polygons)
            assert not polygons or crossings(fewer) == 0
            for before, after in zip(polygons, fewer, strict=True):
                assert 3 <= len(after) <= len(before)
                start, line = after, np.roll(after, -1, axis=0) - after
                away = before[:, None] - start
                share = np.clip((away * line).sum(-1) / (line * line).sum(-1), 0, 1)
                assert np.linalg.norm(away - share[..., None] * line, axis=-1).min(axis=1).max() <= tolerance + 1e-9


def test_by_hand():
    mask = np.zeros((6, 7), bool)
    mask[2, 3:5] = True
    [polygon] = contours(mask)
    assert {tuple(point) for point in polygon} == {(2.5, 1.5), (4.5, 1.5), (4.5, 2.5), (2.5, 2.5)}
    # The level of 0.5 between 0.9 and 0.1, 0.7 and 0.1, 0.9 and 0.3, 0.7 and 0.3; the border of the image.
    probability = np.array([[0.1, 0.9, 0.7, 0.1], [0.3, 0.3, 0.3, 0.3]])
    [polygon] = contours(probability >= 0.5, probability)
    expected = {(0.5, 0), (1, -0.5), (2, -0.5), (2 + 1 / 3, 0), (2, 0.5), (1, 2 / 3)}
    assert {tuple(point) for point in polygon.round(6)} == {tuple(np.round(point, 6)) for point in expected}


def test_a_hole_is_joined_to_the_outline():
    mask = np.ones((9, 12), bool)
    mask[2:5, 2:5] = mask[4, 7] = mask[5, 8] = False  # the second: two pixels that touch at a corner
    mask[3, 3] = True  # an island in the first
    outline, island = sorted(contours(mask), key=area, reverse=True)
    assert area(island) == pytest.approx(1)
    assert area(outline) == pytest.approx(mask.sum() - 1, rel=0.01)
    assert crossings([outline, island]) == 0


def test_where_a_probability_disagrees_the_mask_counts():
    probability = np.full((9, 9), 0.1)
    probability[1:4, 1:4] = probability[6:8, 6:8] = 0.8
    mask = probability >= 0.5
    mask[6:8, 6:8] = False  # an island that was removed
    mask[2, 5] = True  # a pixel that was added
    polygons = contours(mask, probability)
    assert len(polygons) == 2
    np.testing.assert_array_equal(rasterise(polygons, mask.shape), mask)


@pytest.mark.parametrize(("spacing", "tolerance"), [(0.47, 0.01), (1.9, 0.03)])
def test_the_volume_of_a_ball_of_16_mm(spacing, tolerance):
    count = round(24 / spacing)
    z, y, x = np.ogrid[-12:12.1:1.5, 0:count, 0:count]
    middle = (count - 1.3) / 2
    inside = 8 - np.sqrt(z**2 + ((y - middle) * spacing) ** 2 + ((x - middle) * spacing) ** 2)
    mask, probability = inside >= 0, 1 / (1 + np.exp(-inside))
    by_edges = sum(area(polygon) for plane in mask for polygon in contours(plane))
    assert by_edges == pytest.approx(mask.sum(), rel=tolerance)
    # By a probability, they are those of the ball itself, whatever pixels it happens to cover.
    by_level = sum(area(p) for plane, values in zip(mask, probability, strict=True) for p in contours(plane, values))
    assert by_level * spacing**2 == pytest.approx((np.pi * np.maximum(64 - z**2, 0)).sum(), rel=tolerance)


def test_a_circle_in_fewer_points():
    y, x = np.indices((60, 60)) - 29.7
    probability = 1 / (1 + np.exp(np.hypot(x, y) - 20))
    [circle] = contours(probability >= 0.5, probability)
    [fewer] = simplified([circle], 0.2)
    assert len(circle) > 150
    assert len(fewer) < 40
    assert area(fewer) == pytest.approx(np.pi * 400, rel=0.02)


@pytest.mark.parametrize("tolerance", [1, 2])
@pytest.mark.parametrize("radius", [12, 20])
def test_fewer_points_keep_the_area(radius, tolerance):
    y, x = np.indices((60, 60)) - 29.7
    mask = np.hypot(x, y) < radius * (1 + 0.15 * np.sin(5 * np.arctan2(y, x)))
    polygons = contours(mask)
    fewer = simplified(polygons, tolerance)
    assert sum(map(len, fewer)) < 0.9 * sum(map(len, polygons))
    assert sum(map(area, fewer)) == pytest.approx(sum(map(area, polygons)), rel=0.0101)
