"""Trains one network on several devices, each with its share of every batch (data parallelism).

The gradients are averaged over the devices. The sums of the losses and the moments of batch normalization are those of
the whole batch, so the weights equal those of training on one device, up to rounding.

| backend | by | processes |
|---|---|---|
| TensorFlow | `tf.distribute.MirroredStrategy` | one |
| JAX | `keras.distribution.DataParallel` | one for each machine |
| PyTorch | `torch.distributed` | one for each device |

Only the first process writes the files of a run. The others take part in its trainings by
`keras_mmfnet.training.follow`.
"""

import contextlib
import importlib
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import keras

if TYPE_CHECKING:
    from keras_mmfnet.recipe import Recipe, TrainingRecipe


class Devices:
    """The devices of a training; this class is one device. The backends' modules have subclasses of it.

    Args:
        sync_batch_norm: Whether the moments of batch normalization are those of the whole batch.
    """

    number = 1
    """Devices of all processes together."""
    process, processes = 0, 1
    """Number of this process, and how many there are."""
    shares = False
    """Whether the layers and losses see a device's share of a batch instead of the whole."""

    def __init__(self, sync_batch_norm: bool = True):
        self.sync_batch_norm, self.ended = sync_batch_norm, False

    def scope(self) -> contextlib.AbstractContextManager:
        """The context in which a network is built and trained."""
        return contextlib.nullcontext()

    def sum(self, x: Any) -> Any:
        """The sum of a tensor over the devices, with its gradient."""
        return x

    def broadcast(self, value: Any = None) -> Any:
        """Broadcasts an object from the first process. Every process returns it."""
        return value

    def mean(self, value: float) -> float:
        """The mean of a number over the processes."""
        return value

    def check(self, settings: "TrainingRecipe") -> None:
        """Raises `ValueError` if the backend cannot train with these settings."""

    def average_gradients(self, model: keras.Model) -> None:
        """Makes each backward pass average the gradients over the processes, where the backend's trainer does not."""

    def close(self) -> None:
        """Ends `follow` in the other processes, if this is the first process and no training failed."""
        if self.processes > 1 and self.process == 0 and not self.ended:
            self.broadcast(None)


_chosen, _inside = Devices(), False


def set_devices(number: int | str = "all", sync_batch_norm: bool = True) -> Devices:
    """Sets the devices that the networks of this process are trained on.

    On PyTorch it starts a process for each further device, which runs the same script from its start, unless `torchrun`
    started this one. On JAX it connects to the processes of other machines if the environment variables of
    `keras.distribution.initialize` are set; call it before the backend is used.

    Args:
        number: How many devices, or `"all"`: all GPUs of all processes, or one CPU.
        sync_batch_norm: Whether the moments of batch normalization are those of the whole batch, instead of those of
            each device's share of it. On JAX they always are.

    Returns:
        The `Devices`.

    Raises:
        ValueError: There are not as many devices, or the backend cannot do what is asked for.
    """
    global _chosen
    if number != "all" and (not isinstance(number, int) or number < 1):
        raise ValueError(f"`number` of devices must be 'all' or an integer of 1 or more. Received: {number!r}")
    _chosen.close()
    _chosen = Devices()
    if number == 1:
        return _chosen
    module = importlib.import_module(f"{__name__}._{keras.backend.backend()}")
    _chosen = module.make_devices(number, sync_batch_norm)
    return _chosen


def connect() -> None:
    """Connects to the processes of other machines on JAX, which must be done before the backend is used.

    It does so if the environment variables of `keras.distribution.initialize` are set.
    """
    if keras.backend.backend() == "jax" and started_with_others():
        importlib.import_module(f"{__name__}._{keras.backend.backend()}").connect()


def started_with_others() -> bool:
    """Whether `torchrun` or the variables of `keras.distribution.initialize` make this process one of several."""
    name = {"torch": "WORLD_SIZE", "jax": "KERAS_DISTRIBUTION_NUM_PROCESSES"}.get(keras.backend.backend())
    return int(os.environ.get(name, 1)) > 1 if name else False


def choose(number: int | str, names: Sequence[str]) -> Sequence[str]:
    """Chooses devices by their number.

    Args:
        number: How many, or `"all"`.
        names: Names of the devices that there are.

    Returns:
        The first of the names.

    Raises:
        ValueError: There are not as many.
    """
    if number == "all":
        return names
    if number > len(names):
        raise ValueError(f"`number` must be at most {len(names)} ({', '.join(names)}). Received: {number}")
    return names[:number]


def get_devices() -> Devices:
    """Returns the devices that are set; without `set_devices`, one."""
    return _chosen


def in_use() -> Devices:
    """Returns the devices of the training that is under way; one outside of `scope`."""
    return _chosen if _inside else Devices()


@contextlib.contextmanager
def scope() -> Iterator[Devices]:
    """The context in which a network is built and trained on the devices that are set."""
    global _inside
    with _chosen.scope():
        _inside = True
        try:
            yield _chosen
        except BaseException:
            _chosen.ended = True
            raise
        finally:
            _inside = False


def sum_over_devices(x: Any) -> Any:
    """Sums a tensor of each device's share of a batch over the devices, with its gradient.

    Args:
        x: A tensor.

    Returns:
        The sum; `x` where it is of the whole batch.
    """
    return _chosen.sum(x) if _inside and _chosen.shares else x


def mean_over_devices(x: Any) -> Any:
    """The mean over the devices, see `sum_over_devices`."""
    return _chosen.sum(x) / _chosen.number if _inside and _chosen.shares else x


def synchronises_batch_norm() -> bool:
    """Whether the moments of batch normalization are computed over the devices."""
    return _inside and _chosen.shares and _chosen.sync_batch_norm


def check_recipe(recipe: "Recipe") -> None:
    """Raises `ValueError` if the devices that are set cannot train a recipe."""
    size = recipe.training.batch_size
    if size % _chosen.number:
        raise ValueError(
            f"`training.batch_size` must be a multiple of the {_chosen.number} devices, which share each batch. "
            f"Received: {size}"
        )
    _chosen.check(recipe.training)
