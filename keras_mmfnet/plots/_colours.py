"""Colours that people with any colour vision tell apart (Okabe and Ito)."""

TRUTH_COLOUR = "#E69F00"
PREDICTION_COLOUR = "#56B4E9"
# What a prediction gets right, what it adds and what it misses.
ERROR_COLOURS = {"true positive": "#56B4E9", "false positive": "#D55E00", "false negative": "#F0E442"}
# Dark enough for lines and marks on white.
LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
