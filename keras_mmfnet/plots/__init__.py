from keras_mmfnet.plots._masks import ERROR_COLOURS, PREDICTION_COLOUR, TRUTH_COLOUR, structure_colours
from keras_mmfnet.plots.charts import (
    plot_attention,
    plot_boxes,
    plot_learning_curves,
    plot_methods,
    plot_reliability,
    plot_training,
)
from keras_mmfnet.plots.slices import plot_errors, plot_heat, plot_montage, plot_segmentation, slice_strips
from keras_mmfnet.plots.surfaces import plot_surfaces

__all__ = [
    "ERROR_COLOURS",
    "PREDICTION_COLOUR",
    "TRUTH_COLOUR",
    "plot_attention",
    "plot_boxes",
    "plot_errors",
    "plot_heat",
    "plot_learning_curves",
    "plot_methods",
    "plot_montage",
    "plot_reliability",
    "plot_segmentation",
    "plot_surfaces",
    "plot_training",
    "slice_strips",
    "structure_colours",
]
