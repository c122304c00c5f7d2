import atexit
import contextlib
import datetime
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time

import torch
from torch import distributed

from keras_mmfnet.devices import Devices, choose, started_with_others

_log = logging.getLogger(__name__)

# How long a process waits for the others: in a training, and for the next training, while the first one reads patients
# and segments.
_PATIENCE, _LONG_PATIENCE = datetime.timedelta(minutes=30), datetime.timedelta(days=7)
# The environment variable that tells a process started here where to find the first one.
_STORE = "MMFNET_STORE_PORT"


class _Sum(torch.autograd.Function):
    """The sum over the processes. Its gradient is the sum of theirs, as each has the sum in its own loss."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad_output):
        return _Sum.apply(grad_output)


class _Processes(Devices):
    """One device for each process."""

    shares = True

    def __init__(self, sync_batch_norm, followers=()):
        super().__init__(sync_batch_norm)
        self.process, self.processes = distributed.get_rank(), distributed.get_world_size()
        self.number, self.followers = self.processes, followers
        self.waiting = distributed.new_group(backend="gloo", timeout=_LONG_PATIENCE)
        # A script that chooses devices twice begins anew in the second ones' processes.
        self.sync_batch_norm = self.broadcast(sync_batch_norm)

    def sum(self, x):
        return _Sum.apply(x)

    def broadcast(self, value=None):
        if self.ended:
            raise RuntimeError("the processes of all devices must run; call `set_devices` again. Received: their end")
        values = [value]
        with self._watched():
            distributed.broadcast_object_list(values, device=torch.device("cpu"), group=self.waiting)
        return values[0]

    def mean(self, value):
        value = torch.tensor(float(value), dtype=torch.float64)
        distributed.all_reduce(value)
        return value.item() / self.processes

    def average_gradients(self, model):
        def average(weight):
            distributed.all_reduce(weight.grad)
            weight.grad /= self.processes

        for weight in model.trainable_weights:
            weight.value.register_post_accumulate_grad_hook(average)

    def scope(self):
        return self._watched()

    @contextlib.contextmanager
    def _watched(self):
        """Ends the other processes if this one fails, as they wait for it; says so if another one had ended before."""
        try:
            yield
        except BaseException as error:
            self.ended = True
            if isinstance(error, RuntimeError) and self.followers:
                time.sleep(1)  # A connection breaks a little before its process has ended.
                _require_alive(self.followers)
            raise
        finally:
            for process, _ in self.followers if self.ended else ():
                process.kill()

    def close(self):
        super().close()
        distributed.destroy_process_group()
        for process, _ in self.followers:
            process.wait()


def make_devices(number, sync_batch_norm):
    """Returns the devices; see `set_devices`."""
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if started_with_others():
        # One of several processes, started by `torchrun` or by `_start`.
        if not distributed.is_initialized():
            _join(gpus)
        if number not in ("all", distributed.get_world_size()):
            raise ValueError(
                f"`number` must be 'all' or {distributed.get_world_size()}, the number of processes. Received: {number}"
            )
        return _Processes(sync_batch_norm)
    if not gpus:
        number = 1 if number == "all" else number
        if number > 1:
            _log.warning("no GPU was found: %d processes share the CPU and are slower than one", number)
    number = len(choose(number, gpus)) if gpus else number
    return _Processes(sync_batch_norm, _start(number, gpus)) if number > 1 else Devices()


def _start(number, gpus):
    """Starts the processes of all devices but the first, which run this process's command; connects to them."""
    if not getattr(sys.modules["__main__"], "__file__", None):
        raise ValueError(
            "`set_devices` must be called by a script or by `mmfnet` on PyTorch, which starts it for each device. "
            "Received: a call from no file"
        )
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    followers = []
    for rank in range(1, number):
        address = {_STORE: str(store.port), "WORLD_SIZE": str(number), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        output = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the process runs)
        command = [sys.executable, *sys.orig_argv[1:]]
        quiet = {"stdin": subprocess.PIPE, "stdout": output, "stderr": output, "start_new_session": True}
        followers.append((subprocess.Popen(command, env=os.environ | address, **quiet), output))
        atexit.register(followers[-1][0].kill)
    while not store.check([f"process {rank}" for rank in range(1, number)]):
        _require_alive(followers)
        time.sleep(0.1)
    _connect(gpus, store=store, rank=0, world_size=number)
    return followers


def _join(gpus):
    """Connects to the first process."""
    options = {}
    if port := os.environ.get(_STORE):
        threading.Thread(target=_end_with_first, daemon=True).start()
        rank = int(os.environ["RANK"])
        store = distributed.TCPStore("127.0.0.1", int(port), is_master=False)
        store.set(f"process {rank}", "there")
        options = {"store": store, "rank": rank, "world_size": int(os.environ["WORLD_SIZE"])}
    _connect(gpus, **options)


def _end_with_first():
    """Ends this process when the first one ends, which holds the other end of the pipe."""
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGKILL)  # It may wait for the first one in a computation that no exception ends.


def _connect(gpus, **options):
    if gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    distributed.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=_PATIENCE, **options)


def _require_alive(followers):
    """Raises `RuntimeError` with the last line of output of a process that ended."""
    for rank, (process, output) in enumerate(followers, start=1):
        if process.poll() is not None:
            output.seek(0)
            words = output.read().decode(errors="replace").strip().splitlines()
            raise RuntimeError(
                f"the process of device {rank} must run until the end. Received: status {process.returncode}: "
                f"{' '.join(words[-1:])}"
            )
