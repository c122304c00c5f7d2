from pathlib import Path
from typing import Annotated

import typer

from keras_mmfnet.cli import _options as options
from keras_mmfnet.cli._process import silenced, start_backend
from keras_mmfnet.cli._terminal import session

_FORMATS = {".onnx": "onnx", ".xml": "openvino", "": "tf_saved_model"}


def export(
    run: options.RunFolder,
    out: Annotated[Path, typer.Option(metavar="FILE", help="New file: .onnx, .xml (OpenVINO); a folder: SavedModel.")],
    fold: Annotated[int, typer.Option(metavar="N", help="Fold whose network is written.")] = 0,
    quiet: options.Quiet = False,
):
    """Writes a trained network for use without Keras, as ONNX, OpenVINO or SavedModel.

    Its output has a channel for each structure, in the order of the recipe.
    """
    with session(quiet) as terminal:
        options.recipe_of_run(run)
        options.require_new(out, "--out")
        if out.suffix not in _FORMATS:
            raise ValueError(f"--out: a name that ends with .onnx or .xml, or a folder, is expected. Received: {out}")
        start_backend()
        from keras_mmfnet.run import Run

        opened = Run(run)
        (network,) = options.load_networks(opened, [fold])
        try:
            with silenced():
                network.export(out, format=_FORMATS[out.suffix], verbose=False)
        except ImportError as error:
            raise ImportError(f"{_FORMATS[out.suffix]} needs the extra: pip install 'keras-mmfnet[export]'") from error
        terminal.say(f"Use it with {opened.recipe_file}, as examples/serve_onnx.py does")
        terminal.say(out, always=True)
