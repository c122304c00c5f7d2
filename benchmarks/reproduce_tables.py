"""Trains and compares the methods of the paper's Tables I and II, and MONAI's networks, on a folder of patients.

    python benchmarks/reproduce_tables.py DATA --out DIR
    python benchmarks/reproduce_tables.py DATA --out DIR --methods multi_encoder,mmfnet_mlp_std --fold 0 --fold 1

It is the command `mmfnet compare`, with MONAI's networks where MONAI is installed: every method sees the same folds,
patches and number of updates. Started again with the same --out, it goes on where it was stopped; started twice at the
same time, the two share the work.
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
