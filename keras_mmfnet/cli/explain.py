import importlib.util
import logging
from pathlib import Path
from typing import Annotated

import typer

from keras_mmfnet.cli import _options as options
from keras_mmfnet.cli._process import start_backend
from keras_mmfnet.cli._terminal import session

_log = logging.getLogger(__name__)


def explain(
    run: options.RunOrBundle,
    patient: options.Patient,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="New folder for the pictures.")],
    fold: Annotated[
        int | None, typer.Option(metavar="N", help="Fold whose network is explained.", show_default="the first trained")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Gradient maps, on TensorFlow only: gradcam, gradcam++, saliency; separated by commas.",
            show_default="gradcam, with the extra vis",
        ),
    ] = None,
    structure: Annotated[
        str | None, typer.Option(metavar="NAME", help="Structure that is explained.", show_default="the first")
    ] = None,
    device: options.Device = None,
    quiet: options.Quiet = False,
):
    """Draws attention and gradient maps of a network for one patient."""
    with session(quiet) as terminal:
        recipe, bundle = options.open_bundle(run)
        options.require_new(out, "--out")
        if structure not in (None, *recipe.data.structures):
            listed = ", ".join(recipe.data.structures)
            raise ValueError(f"--structure: one of {listed} is expected. Received: {structure}")
        from keras_mmfnet.data import find_patients, preprocess_case

        cases = find_patients(patient, recipe.data)
        if len(cases) > 1:
            raise ValueError(f"PATIENT: one patient is expected. Received: {patient} with {len(cases)} patients")
        start_backend(device)
        from keras_mmfnet.explain import METHODS, explain_patient
        from keras_mmfnet.run import Run

        if methods is None:
            methods = "gradcam" if importlib.util.find_spec("tf_keras_vis") else ""
            if not methods:
                _log.warning("no gradient maps: they need the extra: pip install 'keras-mmfnet[vis]'")
        chosen = methods.split(",") if methods else []
        if not set(chosen) <= set(METHODS):
            raise ValueError(f"--methods: names of {', '.join(METHODS)} are expected. Received: {methods}")
        opened = bundle or Run(run)
        folds = options.choose_trained(opened, None if fold is None else [fold])[:1]
        (network,) = options.load_networks(opened, folds)
        if seen := opened.seen_in_training(cases[0], folds):
            _log.warning("%s: %s", cases[0].name, seen)
        case = preprocess_case(cases[0], recipe.data)
        figures = explain_patient(network, case, recipe, chosen, structure, opened.postprocessing(folds))
        out.mkdir()
        for name, figure in figures.items():
            figure.savefig(path := out / f"{name}.png", dpi=110)
            terminal.say(path, always=True)
