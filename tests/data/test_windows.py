import numpy as np
import pytest

from keras_mmfnet.data.windows import crop, window_box, window_starts


def test_windows_slide_over_the_slices_about_the_centre():
    starts = window_starts((25, 40, 50), (16, 32, 32), (4, None, None), (12, 20, 25))
    assert starts == [(z, 4, 9) for z in (0, 4, 8, 9)]


def test_a_stride_that_ends_flush_repeats_no_window():
    assert window_starts((24, 32, 32), (16, 32, 32), (4, None, None), (12, 16, 16)) == [(z, 0, 0) for z in (0, 4, 8)]


@pytest.mark.parametrize(("centre", "expected"), [(0, 0), (10, 0), (16, 0), (20, 4), (39, 8), (100, 8)])
def test_a_single_window_is_moved_into_the_volume(centre, expected):
    assert window_starts((40,), (32,), (None,), (centre,)) == [(expected,)]


@pytest.mark.parametrize("stride", [None, 4])
def test_a_window_larger_than_the_volume_is_centred_on_it(stride):
    assert window_starts((10,), (16,), (stride,), (2,)) == [(-3,)]


def test_strides_in_plane_cover_the_volume():
    shape, patch = (16, 70, 90), (16, 32, 32)
    covered = np.zeros(shape, int)
    for start in window_starts(shape, patch, (4, 16, 16), (8, 35, 45)):
        covered[tuple(slice(a, a + n) for a, n in zip(start, patch, strict=True))] += 1
    assert covered.min() >= 1


@pytest.mark.parametrize("stride", [(4, None, None), (8, 16, 24)])
def test_the_box_holds_the_voxels_of_all_windows(stride):
    shape, patch, centre = (10, 40, 50), (16, 32, 32), (5, 30, 20)
    seen = np.zeros(shape, bool)
    for start in window_starts(shape, patch, stride, centre):
        seen[tuple(slice(max(a, 0), a + n) for a, n in zip(start, patch, strict=True))] = True
    boxed = np.zeros(shape, bool)
    boxed[window_box(shape, patch, stride, centre)] = True
    np.testing.assert_array_equal(boxed, seen)


def test_cut_inside_is_a_slice():
    volume = np.arange(4 * 5 * 6).reshape(4, 5, 6)
    np.testing.assert_array_equal(crop(volume, (1, 2, 3), (2, 3, 3), -1), volume[1:3, 2:5, 3:6])


@pytest.mark.parametrize("start", [(-2, 0, 1), (3, -1, -1), (2, 4, 5), (-9, 0, 0), (9, 9, 9)])
def test_cut_outside_is_filled(start):
    volume = np.random.default_rng(0).normal(size=(4, 5, 6))
    padded = np.pad(volume, 12, constant_values=-1)
    expected = padded[tuple(slice(a + 12, a + 12 + 4) for a in start)]
    np.testing.assert_array_equal(crop(volume, start, (4, 4, 4), -1), expected)
