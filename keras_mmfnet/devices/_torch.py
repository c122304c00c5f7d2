import atexit
import contextlib
import datetime
import os
import subprocess
import sys
import tempfile
import time

import torch
from torch import distributed

from keras_mmfnet.devices import Devices, choose

# A process waits for the next training while the first one reads patients and segments.
_PATIENCE = datetime.timedelta(days=7)
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

    def sum(self, x):
        return _Sum.apply(x)

    def broadcast(self, value=None):
        values = [value]
        distributed.broadcast_object_list(values, device=torch.device("cpu"))
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

    @contextlib.contextmanager
    def scope(self):
        try:
            yield
        except RuntimeError:
            _require_alive(self.followers)
            raise

    def close(self):
        super().close()
        distributed.destroy_process_group()
        for process, _ in self.followers:
            process.wait()


def make_devices(number, sync_batch_norm):
    """Returns the devices; see `set_devices`."""
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if "WORLD_SIZE" in os.environ:
        # One of several processes, started by `torchrun` or by `_start`.
        if not distributed.is_initialized():
            _join(gpus)
        if number not in ("all", distributed.get_world_size()):
            raise ValueError(
                f"`number` must be 'all' or {distributed.get_world_size()}, that of the processes. Received: {number}"
            )
        return _Processes(sync_batch_norm)
    if not gpus:
        # Several processes can share a CPU: slower than one, and the same otherwise.
        number = 1 if number == "all" else number
    number = len(choose(number, gpus)) if gpus else number
    return _Processes(sync_batch_norm, _start(number, gpus)) if number > 1 else Devices()


def _start(number, gpus):
    """Starts the processes of all devices but the first, which run this process's command; connects to them."""
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    followers = []
    for rank in range(1, number):
        address = {_STORE: str(store.port), "WORLD_SIZE": str(number), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        output = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the process runs)
        command = [sys.executable, *sys.orig_argv[1:]]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output, "start_new_session": True}
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
        rank = int(os.environ["RANK"])
        store = distributed.TCPStore("127.0.0.1", int(port), is_master=False)
        store.set(f"process {rank}", "there")
        options = {"store": store, "rank": rank, "world_size": int(os.environ["WORLD_SIZE"])}
    _connect(gpus, **options)


def _connect(gpus, **options):
    if gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    distributed.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=_PATIENCE, **options)


def _require_alive(followers):
    """Raises `RuntimeError` with the last words of a process that ended."""
    for rank, (process, output) in enumerate(followers, start=1):
        if process.poll() is not None:
            output.seek(0)
            words = output.read().decode(errors="replace").strip().splitlines()
            raise RuntimeError(
                f"the process of device {rank} must run as long as the first. Received: its end with status "
                f"{process.returncode}: {' '.join(words[-1:])}"
            )
