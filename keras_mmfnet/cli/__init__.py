"""The command `mmfnet`: only here is anything printed or parsed; the package's functions do the work."""

import os
import signal
import sys
from typing import Annotated

import typer

from keras_mmfnet.cli import (
    check,
    compare,
    demo,
    evaluate,
    explain,
    export,
    node,
    plan,
    report,
    review,
    segment,
    status,
    train,
)
from keras_mmfnet.version import __version__

app = typer.Typer(
    name="mmfnet",
    help="Segments tumours in several MRI sequences of one patient. First try: mmfnet demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_EXAMPLES = {
    demo.demo: "mmfnet demo",
    check.check: "mmfnet check PATIENTS --csv patients.csv",
    plan.plan: "mmfnet plan PATIENTS --out recipe.json --memory 8GB --time 2h",
    train.train: "mmfnet train PATIENTS --out RUN --set training.epochs=20 --fold all",
    status.status: "mmfnet status RUN --watch",
    segment.segment: "mmfnet segment RUN PATIENTS --out CONTOURS --rtstruct --picture",
    evaluate.evaluate: "mmfnet evaluate CONTOURS EXPERT --csv dice.csv",
    review.review: "mmfnet review CONTOURS --reviewer NAME",
    compare.compare: "mmfnet compare PATIENTS --out RUN --methods multi_encoder,mmfnet_mlp_std",
    explain.explain: "mmfnet explain RUN PATIENT --out PICTURES",
    report.report: "mmfnet report RUN",
    export.export: "mmfnet export RUN --out network.onnx",
}
for _function, _example in _EXAMPLES.items():
    app.command(epilog=f"Example: {_example}")(_function)
app.add_typer(node.node)


def _version(wanted: bool):
    if wanted:
        typer.echo(f"mmfnet {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
):
    pass


def main() -> None:
    """The command `mmfnet`."""
    try:
        app()
    except SystemExit as end:
        if sys.argv[1:2] == ["segment"]:
            # SimpleITK may loop for ever in its destructors after it has read compressed DICOM files.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code if isinstance(end.code, int) else 0)
        raise
    finally:
        # Ctrl-C while TensorFlow is taken down ends the process at once, without a word.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
