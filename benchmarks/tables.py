"""Writes the tables and charts of a comparison of methods from its results.

python benchmarks/tables.py DIR
"""

import argparse
import sys
from pathlib import Path

from keras_mmfnet.report import write_tables
from keras_mmfnet.run import Run


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with results, fold_<number>/<method>.json")
    parser.add_argument("--out", type=Path, help="folder for the tables and the charts (default: the same)")
    parser.add_argument("--baseline", default="multi_encoder", help="method that the others are compared with")
    parsed = parser.parse_args(arguments)
    results = Run(parsed.folder).results()
    if not results:
        sys.exit(f"error: a folder with results of a comparison is expected. Received: {parsed.folder}")
    write_tables(results, parsed.out or parsed.folder, parsed.baseline)


if __name__ == "__main__":
    main()
