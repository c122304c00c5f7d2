import logging
from pathlib import Path
from typing import Annotated

import typer

from keras_mmfnet.cli import _options as options
from keras_mmfnet.cli._process import start_backend
from keras_mmfnet.cli._terminal import session

_log = logging.getLogger(__name__)


def explain(
    run: options.RunFolder,
    patient: options.Patient,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="New folder for the pictures.")],
    fold: Annotated[int, typer.Option(metavar="N", help="Fold whose network is asked.")] = 0,
    methods: Annotated[
        str, typer.Option(help="Gradient maps, on TensorFlow only: gradcam, gradcam++, saliency; separated by commas.")
    ] = "gradcam",
    device: options.Device = None,
    quiet: options.Quiet = False,
):
    """Draws what a network of a run looks at in one patient."""
    with session(quiet) as terminal:
        options.require_folder(run, "RUN")
        options.require_new(out, "--out")
        _log.info("Computing with %s", start_backend(device))
        from keras_mmfnet.data import find_patients, preprocess_case
        from keras_mmfnet.explain import METHODS

        chosen = methods.split(",") if methods else []
        if not set(chosen) <= set(METHODS):
            raise ValueError(f"--methods: names of {', '.join(METHODS)} are expected. Received: {methods}")
        opened = options.open_run(run)
        (network,) = options.load_networks(opened, [fold])
        cases = find_patients(patient, opened.recipe.data)
        if len(cases) > 1:
            raise ValueError(f"PATIENT: one patient is expected. Received: {patient} with {len(cases)} patients")
        for path in draw_explanations(
            network, preprocess_case(cases[0], opened.recipe.data), opened.recipe, out, chosen
        ):
            terminal.say(path, always=True)


def draw_explanations(model, case, recipe, out: Path, methods: list[str]):
    """Writes a picture of each map of attention and of gradients, and yields its path."""
    import keras
    import numpy as np

    from keras_mmfnet.data.windows import cut
    from keras_mmfnet.explain import fusion_attention, gradient_maps, spatial_attention, tumour_window
    from keras_mmfnet.inference import predict_volume
    from keras_mmfnet.plots import plot_attention, plot_heat

    images = case.images_of(recipe.data.modalities)

    def whole(call):
        return predict_volume(call, images, recipe.patches.shape, recipe.patches.stride, case.centre)

    def save(figure, name):
        figure.savefig(path := out / f"{name}.png", dpi=110)
        return path

    probability = whole(model)
    tumour = probability >= 0.5
    batch, start = tumour_window(images, tumour, recipe.patches.shape, case.centre)
    depth = int(np.argmax(probability.sum(axis=(1, 2))))
    out.mkdir()
    share = fusion_attention(model, batch)[2]
    yield save(plot_attention(share), "attention")
    for block in share:
        heat = whole(spatial_attention(model, block))
        maps, title = dict.fromkeys(images, heat), f"Spatial attention of {block}"
        yield save(plot_heat(images, maps, case.spacing, depth, title, case.mask, tumour), f"spatial_{block}")
    if methods and keras.backend.backend() != "tensorflow":
        _log.warning("gradient maps need TensorFlow: start this again with KERAS_BACKEND=tensorflow")
        return
    if methods and not tumour.any():
        _log.warning("no tumour is predicted: the mean probability of the whole window is explained")
    for method in methods:
        maps = {name: heat[0] for name, heat in gradient_maps(model, batch, method).items()}
        inside = min(max(depth - start[0], 0), recipe.patches.shape[0] - 1)
        window = {name: image[0, ..., 0] for name, image in batch.items()}
        masks = [mask if mask is None else cut(mask, start, recipe.patches.shape, 0) for mask in (case.mask, tumour)]
        title = f"{method}: what the predicted tumour depends on"
        yield save(plot_heat(window, maps, case.spacing, inside, title, *masks), method.replace("+", "p"))
