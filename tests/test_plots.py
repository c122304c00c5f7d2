import numpy as np
import pytest
import SimpleITK as sitk
from matplotlib import colors

from keras_mmfnet.plots import (
    PREDICTION_COLOUR,
    TRUTH_COLOUR,
    _strips,
    plot_boxes,
    plot_errors,
    plot_learning_curves,
    plot_methods,
    plot_montage,
    plot_reliability,
    plot_segmentation,
    plot_surfaces,
    plot_training,
    slice_strips,
)
from keras_mmfnet.plots._masks import ERROR_COLOURS, STRUCTURE_COLOURS
from keras_mmfnet.plots.surfaces import voxel_faces


def patient():
    rng = np.random.default_rng(0)
    images = {name: rng.normal(size=(6, 40, 30)).astype(np.float32) for name in ("t1", "t2")}
    truth, prediction = np.zeros((2, 6, 40, 30), np.uint8)
    truth[3, 10:20, 5:15] = 1
    prediction[3, 10:20, 10:20] = 1
    return images, prediction, truth


def test_one_panel_per_modality_with_both_contours():
    images, prediction, truth = patient()
    figure = plot_segmentation(images, prediction, truth, spacing_zyx=(4.0, 0.5, 0.5))
    assert [axes.get_title() for axes in figure.axes] == ["t1", "t2"]
    assert figure.get_suptitle() == "slice 4 of 6, DSC 0.500"
    for axes in figure.axes:
        drawn = [tuple(line.get_edgecolor()[0]) for line in axes.collections]
        assert drawn == [colors.to_rgba(TRUTH_COLOUR), colors.to_rgba(PREDICTION_COLOUR)]
        # The contour of the prediction, in mm.
        low, high = axes.collections[1].get_datalim(axes.transData).get_points()
        np.testing.assert_allclose([low, high], [[4.75, 4.75], [9.75, 9.75]])
        assert [text.get_text() for text in axes.texts] == ["R", "L"]


def test_without_the_expert():
    images, prediction, _ = patient()
    figure = plot_segmentation(images, prediction)
    assert figure.get_suptitle() == "slice 4 of 6"
    assert len(figure.axes[0].collections) == 1


def test_pixels_are_shown_in_their_proportion():
    images, prediction, _ = patient()
    figure = plot_segmentation(images, prediction, spacing_zyx=(4.0, 1.0, 2.0))
    left, right, bottom, top = figure.axes[0].images[0].get_extent()
    assert (right - left, bottom - top) == (60, 40)


def test_the_surroundings_of_the_contours():
    images, prediction, truth = patient()
    figure = plot_segmentation(images, prediction, truth, spacing_zyx=(4.0, 0.5, 0.5), margin=1)
    np.testing.assert_allclose(figure.axes[0].get_xlim(), (3 / 2 - 0.25, 21 / 2 + 0.25))
    np.testing.assert_allclose(figure.axes[0].get_ylim(), (21 / 2 + 0.25, 8 / 2 - 0.25))


def test_an_empty_prediction_is_drawn(tmp_path):
    images, prediction, _ = patient()
    plot_segmentation(images, 0 * prediction).savefig(tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 0


def test_other_shapes_are_refused():
    images, prediction, _ = patient()
    with pytest.raises(ValueError, match=r"the same shape\. Received: "):
        plot_segmentation(images, prediction[1:])


def test_several_structures_have_a_colour_each():
    images, prediction, truth = patient()
    inner = {"whole": prediction, "core": prediction * (np.arange(30) > 14)}
    expert = {"whole": truth, "core": 0 * truth}
    figure = plot_segmentation(images, inner, expert)
    assert figure.get_suptitle() == "slice 4 of 6, DSC whole 0.500, core -"
    drawn = figure.axes[0].collections
    first, second = map(colors.to_rgba, STRUCTURE_COLOURS[:2])
    assert [tuple(line.get_edgecolor()[0]) for line in drawn] == [first, first, second]
    # The expert's is dotted; Matplotlib's dashes of a solid line are None.
    assert [line.get_linestyle()[0][1] is None for line in drawn] == [False, True, True]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["whole", "core", "expert", "prediction"]
    alone = plot_segmentation(images, {"whole": prediction}, {"whole": truth})
    assert alone.get_suptitle() == "slice 4 of 6, DSC 0.500"
    assert len(plot_montage(images["t1"], inner, expert).axes[3].collections) == 3
    _, marks, _ = slice_strips(images, inner, expert)
    shown = {tuple(color) for color in marks[marks[..., 3] > 0]}
    assert shown == {tuple(np.round(255 * np.array(color)).astype(int)) for color in (first, second)}
    _, both, _ = slice_strips(images, inner, inner)
    _, solid, _ = slice_strips(images, inner, dict.fromkeys(inner, 0 * truth))
    np.testing.assert_array_equal(both, solid)  # equal contours lie on each other
    # Equal contours of two structures show both.
    _, equal, _ = slice_strips(images, dict.fromkeys(inner, prediction), dict.fromkeys(inner, 0 * truth))
    assert {tuple(color) for color in equal[equal[..., 3] > 0]} == shown
    with pytest.raises(ValueError, match=r"the same structures are expected\. Received: whole; whole, core"):
        plot_segmentation(images, inner, {"whole": truth})


def test_methods_beside_the_paper():
    figure = plot_methods({"mine": ([0.2, 0.4, 0.6], None), "theirs": ([0.5, 0.5], 0.7)}, "AP")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["mine", "theirs"]
    assert axes.get_xlabel() == "AP"
    points = [tuple(map(float, line.get_xydata()[0])) for line in axes.lines if len(line.get_xydata()) == 1]
    np.testing.assert_allclose(points, [(0.4, 0), (0.5, 1), (0.7, 1)])
    intervals = [line.get_xdata() for line in axes.lines if len(line.get_xydata()) == 2]
    assert 0.2 <= intervals[0][0] < 0.4 < intervals[0][1] <= 0.6
    np.testing.assert_allclose(intervals[1], [0.5, 0.5])
    with pytest.raises(ValueError, match=r"Received: \['empty'\]"):
        plot_methods({"empty": ([], 0.7)})


def test_learning_curves():
    charts = {"base": {"without": ([1, 2], [0.9, 0.5]), "with": ([1, 2], [0.7, 0.4])}, "full": {"with": ([1], [0.6])}}
    figure = plot_learning_curves(charts)
    assert [axes.get_title() for axes in figure.axes] == ["base", "full"]
    drawn = [[line.get_ydata() for line in axes.lines if len(line.get_ydata())] for axes in figure.axes]
    assert [[list(y) for y in lines] for lines in drawn] == [[[0.9, 0.5], [0.7, 0.4]], [[0.6]]]
    # A curve has its colour in every panel.
    assert figure.axes[0].lines[1].get_color() == figure.axes[1].lines[0].get_color()
    with pytest.raises(ValueError, match="at least one panel"):
        plot_learning_curves({})


def test_errors_of_methods_side_by_side():
    images, prediction, truth = patient()
    figure = plot_errors(images, {"half": prediction, "all": truth}, truth, spacing_zyx=(4.0, 1.0, 2.0))
    assert [axes.get_title() for axes in figure.axes] == ["half\nDSC 0.500", "all\nDSC 1.000", "", ""]
    assert figure.get_suptitle() == "slice 4 of 6"
    layers = [image.get_array() for image in figure.axes[2].images[1:]]
    right = [truth[3] & prediction[3], ~truth[3] & prediction[3], truth[3] & ~prediction[3]]
    for layer, voxels, colour in zip(layers, right, ERROR_COLOURS.values(), strict=True):
        np.testing.assert_array_equal(layer[..., 3] > 0, voxels > 0)
        np.testing.assert_allclose(layer[voxels > 0], [colors.to_rgba(colour, 0.75)] * 50)
    assert not figure.axes[3].images[2].get_array().any()
    extents = {tuple(image.get_extent()) for axes in figure.axes for image in axes.images}
    assert extents == {(-1.0, 59.0, 39.5, -0.5)}
    assert [text.get_text() for text in figure.axes[0].texts] == ["R", "L", "t1"]
    with pytest.raises(ValueError, match=r"at least one method\. Received: \{\}"):
        plot_errors(images, {}, truth)
    with pytest.raises(ValueError, match=r"the same shape\. Received: .*'the expert': \(5,"):
        plot_errors(images, {"all": truth}, truth[1:])


def test_a_montage_shows_every_slice():
    images, prediction, truth = patient()
    figure = plot_montage(images["t1"], prediction, truth, spacing_zyx=(4.0, 0.5, 0.5), margin=1)
    assert len(figure.axes) == 6
    assert [axes.texts[-1].get_text() for axes in figure.axes] == list("123456")
    assert [len(axes.collections) for axes in figure.axes] == [0, 0, 0, 2, 0, 0]
    for number, axes in enumerate(figure.axes):
        np.testing.assert_array_equal(axes.images[0].get_array(), images["t1"][number])
        # All show the same part.
        np.testing.assert_allclose(axes.get_xlim(), (3 / 2 - 0.25, 21 / 2 + 0.25))
    with pytest.raises(ValueError, match="the same shape"):
        plot_montage(images["t1"], prediction[1:])


def test_strips_of_slices_and_what_to_mark():
    images, prediction, truth = patient()
    truth[4, 12, 7] = 1
    strip, marks, numbers = slice_strips(images, prediction, truth, spacing_zyx=(4.0, 0.5, 1.0), side=1000, margin=2)
    # Rows 10 to 19 with 4 about them, columns 5 to 19 with 2; a pixel of the strip is 0.5 mm.
    assert numbers == [1, 2, 3, 4, 5]
    assert strip.shape == (5 * 18, 2 * 2 * 19, 3)
    assert marks.shape == (5 * 36, 2 * 38, 4)
    slices = marks.reshape(5, 36, -1, 4)
    assert [bool(one[..., 3].any()) for one in slices] == [False, False, True, True, False]
    third = slices[2]

    def at(row, column):  # the middle of a voxel
        return third[int((row - 6 + 0.5) * 2), int((column - 3 + 0.5) * 4)]

    opaque = {name: (np.array(colors.to_rgb(colour)) * 255).round() for name, colour in ERROR_COLOURS.items()}
    np.testing.assert_allclose(at(14, 7)[:3], opaque["false negative"], atol=1)
    np.testing.assert_allclose(at(14, 17)[:3], opaque["false positive"], atol=1)
    assert at(14, 7)[3] == at(14, 17)[3] == round(0.45 * 255)
    assert at(14, 12)[3] == 0
    drawn = {tuple(pixel[:3]) for pixel in third[third[..., 3] == 255]}
    assert drawn == {tuple(np.round(np.multiply(colors.to_rgb(c), 255))) for c in (TRUTH_COLOUR, PREDICTION_COLOUR)}
    small, _, few = slice_strips(images, prediction, truth, side=10, most=3)
    assert few == [1, 3, 5]
    assert max(small.shape[0] / 3, small.shape[1] / 2) == 10
    assert slice_strips(images, prediction, truth, side=10, most=2)[2] == [3]  # the largest
    # Without any tumour, whole slices.
    assert slice_strips(images, 0 * prediction, 0 * truth)[2] == list(range(6))
    with pytest.raises(ValueError, match="the same shape"):
        slice_strips(images, prediction[1:], truth)


def test_strips_fit_in_the_bytes_they_may_take(make_case, tmp_path, monkeypatch):
    pairs, sizes = [], []
    for seed in range(3):
        case = make_case(f"patient {seed}", (40, 200, 200), seed=seed)
        case.masks["tumour"][:, :, 1::2] = 0
        predicted = np.roll(case.mask, 2, axis=0)
        predicted[17] |= np.roll(case.mask, 5, axis=2).max(axis=0)  # the largest slice
        path = tmp_path / f"{seed}.nii.gz"
        sitk.WriteImage(case.grid.image(predicted), str(path))
        pairs.append((case, {None: path}))
        sizes.append(np.count_nonzero(predicted | case.mask, axis=(1, 2)))
    monkeypatch.setattr(_strips, "_OF_A_PATIENT", 1)

    def strips(each):
        monkeypatch.setattr(_strips, "_BYTES", each * len(pairs))
        found = list(_strips.encoded_strips(pairs, {"tumour": None}))
        for one, areas in zip(found, sizes, strict=True):
            assert areas[one["slices"][one["start"]]] == areas.max()
        return found

    def size(strip):
        return len(strip["strip"].getvalue()) + len(strip["marks"].getvalue())

    whole = strips(10**9)
    for share in (0.8, 0.6):
        each = share * min(map(size, whole))
        for one, before in zip(strips(each), whole, strict=True):
            assert size(one) <= each
            assert 2 * 72 < one["width"] < before["width"]
            assert one["slices"] == before["slices"]
    for one, before in zip(strips(1), whole, strict=True):
        assert one["width"] == 2 * 72
        assert 2 <= len(one["slices"]) <= 4 < len(before["slices"])


def test_the_faces_of_voxels_enclose_their_volume():
    mask = np.random.default_rng(0).random((4, 5, 6)) < 0.5
    corners = voxel_faces(mask, (4.0, 0.5, 2.0))
    padded = np.pad(mask, 1).astype(int)
    assert len(corners) == sum(np.abs(np.diff(padded, axis=axis)).sum() for axis in range(3))
    # By the divergence theorem, in x, y, z; a face that turned the other way would count as negative.
    corners = corners[..., ::-1]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    volume = np.einsum("ij,ij->", corners.mean(axis=1), normals) / 3
    assert volume == pytest.approx(mask.sum() * 4.0)


def test_surfaces_in_space(tmp_path):
    _, prediction, truth = patient()
    figure = plot_surfaces(prediction, truth, spacing_zyx=(4.0, 0.5, 2.0))
    assert [axes.get_title() for axes in figure.axes] == ["expert", "prediction"]
    for axes in figure.axes:
        np.testing.assert_allclose([*axes.get_xlim(), *axes.get_ylim(), *axes.get_zlim()], [9, 39, 4.75, 9.75, 10, 14])
        assert len(axes.collections) == 1
    figure.savefig(tmp_path / "surfaces.png")
    assert [len(axes.collections) for axes in plot_surfaces(0 * prediction, truth).axes] == [1, 0]
    with pytest.raises(ValueError, match=r"not be empty\. Received: prediction of zeros"):
        plot_surfaces(0 * prediction)
    with pytest.raises(ValueError, match="the same shape"):
        plot_surfaces(prediction, truth[1:])


def test_the_curves_of_a_training():
    history = [
        {"epoch": "0", "loss": "0.9", "val_loss": "0.8", "dice_score": "0.1", "val_dice_score": "0.2"},
        {"epoch": "1", "loss": "0.5", "val_loss": "0.4", "dice_score": "0.5", "val_dice_score": "0.6"},
        {"epoch": "2", "loss": "0.4", "val_loss": "0.5", "dice_score": "0.6", "val_dice_score": "0.5"},
    ]
    stages = [("encoders frozen", "0.001"), ("all", "0.0001"), ("all", "0.0001")]
    rows = [row | {"stage": s, "learning_rate": r} for row, (s, r) in zip(history, stages, strict=True)]
    loss, dice, rate = plot_training(rows).axes
    assert [axes.get_title() for axes in (loss, dice, rate)] == ["loss", "DSC", "learning rate"]
    training, validation, best, end = loss.lines
    np.testing.assert_array_equal(training.get_xydata(), [(1, 0.9), (2, 0.5), (3, 0.4)])
    np.testing.assert_array_equal(validation.get_ydata(), [0.8, 0.4, 0.5])
    assert (best.get_xdata(), best.get_ydata()) == ([2], [0.4])
    by_dsc = [row | {"val_dice_score": value} for row, value in zip(rows, ["0.2", "0.6", "0.7"], strict=True)]
    assert plot_training(by_dsc, "dsc").axes[0].lines[2].get_xdata() == [3]
    assert list(end.get_xdata()) == [1.5, 1.5]
    np.testing.assert_array_equal(dice.lines[1].get_ydata(), [0.2, 0.6, 0.5])
    np.testing.assert_array_equal(rate.lines[0].get_ydata(), [1e-3, 1e-4, 1e-4])
    # Without a warm-up there is no end of it.
    assert len(plot_training(rows[1:]).axes[0].lines) == 3
    with pytest.raises(ValueError, match=r"at least one epoch\. Received: \[\]"):
        plot_training([])


def test_boxes_over_patients():
    (axes,) = plot_boxes({"mine": [0.1, 0.2, 0.6, None], "theirs": [0.5, float("nan")]}, "AP").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["mine (3)", "theirs (1)"]
    medians = [line.get_xdata()[0] for line in axes.lines if line.get_linewidth() == 2]
    assert medians == [0.2, 0.5]
    dots = [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "o"]
    assert dots == [[0.1, 0.2, 0.6], [0.5]]
    assert axes.get_xlabel() == "AP"
    with pytest.raises(ValueError, match=r"Received: \['empty'\]"):
        plot_boxes({"empty": [None]})


def test_the_reliability_of_probabilities():
    rng = np.random.default_rng(0)
    probability = rng.random((3, 10, 10)) ** 2
    probability[0, 0, :2] = 0, 1
    truth = rng.random(probability.shape) < probability**1.5
    curves, counts = plot_reliability({"network": (probability, truth)}, bins=4).axes
    expected, points, voxels = 0, [], []
    for low in (0, 0.25, 0.5, 0.75):
        inside = (probability >= low) & ((probability < low + 0.25) | (low == 0.75))
        points.append((probability[inside].mean(), truth[inside].mean()))
        voxels.append(inside.sum())
        expected += inside.sum() / truth.size * abs(probability[inside].mean() - truth[inside].mean())
    np.testing.assert_allclose(curves.lines[1].get_xydata(), points)
    np.testing.assert_array_equal(counts.patches[0].get_data().values, voxels)
    assert counts.get_ylim()[1] > max(voxels)
    assert curves.get_legend().get_texts()[0].get_text() == f"network, ECE {expected:.4f}"
    # A bin without voxels has no point and no part in the error.
    (curves, _) = plot_reliability({"sure": (np.array([0.0, 1.0, 1.0]), np.array([0, 1, 0]))}).axes
    assert curves.get_legend().get_texts()[0].get_text() == "sure, ECE 0.3333"
    with pytest.raises(ValueError, match=r"the same shape\. Received: \(3,\) and \(2,\)"):
        plot_reliability({"network": (np.zeros(3), np.zeros(2))})
    with pytest.raises(ValueError, match="at least one title"):
        plot_reliability({})
