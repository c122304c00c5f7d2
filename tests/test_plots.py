import numpy as np
import pytest
from matplotlib import colors

from keras_mmfnet.plots import (
    PREDICTION_COLOUR,
    TRUTH_COLOUR,
    plot_learning_curves,
    plot_methods,
    plot_segmentation,
)


def patient():
    rng = np.random.default_rng(0)
    images = {name: rng.normal(size=(6, 40, 30)).astype(np.float32) for name in ("t1", "t2")}
    truth, prediction = np.zeros((2, 6, 40, 30), np.uint8)
    truth[3, 10:20, 5:15] = 1
    prediction[3, 10:20, 10:20] = 1
    return images, prediction, truth


def test_one_panel_per_modality_with_both_contours():
    images, prediction, truth = patient()
    figure = plot_segmentation(images, prediction, truth, spacing=(4.0, 0.5, 0.5))
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
    figure = plot_segmentation(images, prediction, spacing=(4.0, 1.0, 2.0))
    left, right, bottom, top = figure.axes[0].images[0].get_extent()
    assert (right - left, bottom - top) == (60, 40)


def test_the_surroundings_of_the_contours():
    images, prediction, truth = patient()
    figure = plot_segmentation(images, prediction, truth, spacing=(4.0, 0.5, 0.5), margin=1)
    np.testing.assert_allclose(figure.axes[0].get_xlim(), (3 / 2 - 0.25, 21 / 2 + 0.25))
    np.testing.assert_allclose(figure.axes[0].get_ylim(), (21 / 2 + 0.25, 8 / 2 - 0.25))


def test_an_empty_prediction_is_drawn(tmp_path):
    images, prediction, _ = patient()
    plot_segmentation(images, 0 * prediction).savefig(tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 0


def test_other_shapes_are_refused():
    images, prediction, _ = patient()
    with pytest.raises(ValueError, match=r"one shape\. Received: "):
        plot_segmentation(images, prediction[1:])


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
