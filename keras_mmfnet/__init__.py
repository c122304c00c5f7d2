"""MMFNet for Keras 3: fuses several MRI sequences of one patient into contours of its tumours.

The modules, which are imported on first use:

    layers, models                   attention and fusion layers; MMFNet and the networks of the comparison
    losses, metrics                  Dice loss and metrics for model.fit
    recipe, plan                     all settings of a run; planned from the patients
    data                             finds patients, preprocesses them, makes patches
    methods, training, run           train networks, cross-validate, compare methods
    devices, jobs                    train one network on several devices, many networks as jobs
    status, tracking                 follow trainings
    inference, postprocess, export   segment, clean the masks, write files
    bundle                           networks to share, with their recipe and results
    evaluation, mask_folders         compare with the expert
    explain, plots, report           attention and gradient maps, figures, the HTML report
    review                           masks accepted or corrected in the browser
    node                             a DICOM node that segments what it is sent

Example:

    from keras_mmfnet.models import MMFNet
    model = MMFNet(("t1", "t2", "cet1"), patch_shape=(16, 256, 256))

The same from the command line: `mmfnet --help`. A saved network is loaded by `keras_mmfnet.models.load_network`, or by
`keras.models.load_model` once `keras_mmfnet.models` is imported.
"""

import importlib
import pkgutil

from keras_mmfnet.version import __version__

_MODULES = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
__all__ = ["__version__", *_MODULES]


def __getattr__(name):
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
