"""Trains and compares the methods of the paper's Tables I and II, and MONAI's networks, on a folder of patients.

    python benchmarks/reproduce_tables.py DATA --out DIR
    python benchmarks/reproduce_tables.py DATA --out DIR --methods multi_encoder,mmfnet_mlp_std --fold 0 --fold 1

This is the command `mmfnet compare`, with MONAI's networks if MONAI is installed: all methods have the same folds,
patches and number of updates. A second call with the same --out resumes. Two processes with the same --out share the
work.
"""

import importlib.util
import sys
from pathlib import Path

import typer

from keras_mmfnet.cli.compare import compare


def main():
    if importlib.util.find_spec("monai"):
        sys.argv += ["--import", str(Path(__file__).with_name("monai_peers.py"))]
    typer.run(compare)


if __name__ == "__main__":
    main()
