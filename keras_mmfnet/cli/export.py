import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from keras_mmfnet.cli import _options as options
from keras_mmfnet.cli._process import silenced, start_backend
from keras_mmfnet.cli._terminal import session

_FORMATS = {".onnx": "onnx", ".xml": "openvino", "": "tf_saved_model"}


def export(
    run: options.RunFolder,
    out: Annotated[
        Path,
        typer.Option(
            metavar="PATH",
            help=".onnx, .xml (OpenVINO) or a folder (SavedModel); with --bundle a folder or .zip.",
        ),
    ],
    fold: Annotated[
        int | None, typer.Option(metavar="N", help="Fold whose network is written.", show_default="the first trained")
    ] = None,
    bundle: Annotated[
        bool, typer.Option("--bundle", help="Write a bundle: the networks of all folds, recipe and results.")
    ] = False,
    about: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Markdown on the data and the terms of use, for the model card."),
    ] = None,
    quiet: options.Quiet = False,
):
    """Writes a trained network as ONNX, OpenVINO or SavedModel, for use without Keras, or a bundle to share.

    The output of the network has a channel for each structure, in the order of the recipe.
    """
    with session(quiet) as terminal:
        options.recipe_of_run(run)
        for path in (out, out.with_suffix(".bin")) if out.suffix == ".xml" else (out,):
            options.require_new(path, "--out")
        if bundle and (fold is not None or out.suffix not in (".zip", "")):
            raise ValueError(f"--bundle: all folds, and a folder or .zip as --out, are expected. Received: {out}")
        if about and not (bundle and about.is_file()):
            raise ValueError(f"--about: a file that exists, with --bundle, is expected. Received: {about}")
        if not bundle and out.suffix not in _FORMATS:
            raise ValueError(f"--out: a name that ends with .onnx or .xml, or a folder, is expected. Received: {out}")
        start_backend()
        import keras

        from keras_mmfnet.run import Run

        if not bundle and (backend := keras.backend.backend()) != "tensorflow":
            expected = "tensorflow is expected, which exports the networks of all backends"
            raise ValueError(f"KERAS_BACKEND: {expected}. Received: {backend}")

        opened = Run(run)
        if bundle:
            opened.save_bundle(out, about and about.read_text(encoding="utf-8"))
            if not about:
                terminal.say('Fill in "Data and terms" of the model card, README.md')
            return terminal.say(out, always=True)
        folds = options.choose_trained(opened, None if fold is None else [fold])[:1]
        (network,) = options.load_networks(opened, folds)
        try:
            with silenced(), tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as hidden:
                network.export(Path(hidden, out.name), format=_FORMATS[out.suffix], verbose=False)
                for path in sorted(Path(hidden).iterdir()):  # OpenVINO's .xml is the last of two
                    os.rename(path, out.parent / path.name)
        except ImportError as error:
            needed = f"{_FORMATS[out.suffix]} needs the extra: pip install 'keras-mmfnet[export]'"
            raise ImportError(f"{needed}. Received: {error}") from error
        terminal.say(f"Use it with {opened.recipe_file}, as examples/serve_onnx.py does")
        if opened.recipe.training.postprocess:
            for name, rule in opened.postprocessing(folds).structures.items():
                terminal.say(f"Not in the file is the post-processing, {name}: {rule}")
        terminal.say(out, always=True)
