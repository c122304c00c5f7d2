"""Measures a training step and a prediction of MMFNet on each backend, against plain PyTorch and without attention.

    python benchmarks/step.py                                   # two CPU cores: TensorFlow and PyTorch
    python benchmarks/step.py --check                           # fails if a ratio is 20% worse than the stored one
    python benchmarks/step.py --baseline ../before              # beside another checkout of this package
    python benchmarks/step.py --each-kernel --name kernels      # what each of the fast kernels gains
    python benchmarks/step.py --backends torch jax --name a100 --shape 8 16 256 256 --policy mixed_bfloat16     # a GPU

Each contender runs in its own process, and they take turns, so that other load on the machine affects all of them. The
results are medians over the turns of the ratios within a turn.
"""

import argparse
import dataclasses
import importlib
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path

from machine import machine, report

RESULTS = Path(__file__).parent / "results" / "step"
WORSE = 1.2
# Plain PyTorch with the memory settings of this package, which few users know, and compiled.
KEPT, COMPILED = "plain with memory kept, channels last", "plain, compiled"
# These make the C library keep freed memory, as in the command mmfnet.
MEMORY_KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1", "MALLOC_TOP_PAD_": str(2**28)}
# Names in the ratios.
MEMORY = {"peak_mib": "memory", "peak_tensors_mib": "tensors"}
# Operations that have a fast implementation.
_BOTH = ("statistics_over_space", "statistics_over_channels", "weighted_reduction", "batch_norm_relu")
FAST = {"tensorflow": _BOTH, "torch": (*_BOTH, "conv", "max_pool")}


@dataclasses.dataclass(frozen=True)
class Contender:
    """One implementation: `backend` is Keras', or `None` for plain PyTorch."""

    name: str
    backend: str | None = None
    attention: bool = True
    policy: str = "float32"
    channels_last: bool = False
    compiled: bool = False
    memory_kept: bool = True
    kernels: str | None = None
    plain_kernel: str | None = None
    checkout: str | None = None


def choose_contenders(backends, policy, gpu, baseline=None, each_kernel=False):
    """The contenders of one run: the variants of plain PyTorch and of each backend.

    The variants of a backend are without attention, with plain kernels, with one plain kernel among the fast ones
    (`each_kernel`), and from the checkout `baseline` if it is set.
    """
    plain = [
        Contender("plain", policy=policy, memory_kept=False),
        Contender("plain, channels last", policy=policy, channels_last=True, memory_kept=False),
    ]
    if gpu:
        plain.append(Contender(COMPILED, policy=policy, compiled=True))
    else:
        plain.append(Contender(KEPT, policy=policy, channels_last=True))
    ours = []
    for backend in backends:
        ours.append(Contender(backend, backend, policy=policy))
        ours.append(Contender(f"{backend} without attention", backend, attention=False, policy=policy))
        ours.append(Contender(f"{backend}, plain kernels", backend, policy=policy, kernels="plain"))
        for kernel in FAST.get(backend, ()) if each_kernel else ():
            name = f"{backend}, plain {kernel}"
            ours.append(Contender(name, backend, policy=policy, kernels="fast", plain_kernel=kernel))
        if baseline:
            ours.append(Contender(f"{backend}, baseline", backend, policy=policy, checkout=str(baseline)))
        if policy != "float32":
            ours.append(Contender(f"{backend} in float32", backend))
    return plain + ours


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--backends", nargs="+", default=["tensorflow", "torch"], choices=("tensorflow", "torch", "jax"), metavar="NAME"
    )
    add("--shape", nargs=4, type=int, default=(2, 16, 128, 128), metavar="N", help="batch, depth, height, width")
    add("--policy", default="float32", help="dtype policy: float32, mixed_float16 or mixed_bfloat16")
    add("--turns", type=int, default=10, help="measured steps of each contender (10)")
    add("--name", default="cpu", help="name of the machine, for the file of results (cpu)")
    add("--check", action="store_true", help="compare with the stored results of that name")
    add("--baseline", type=Path, metavar="DIR", help="another checkout of this package, which is measured too")
    add("--each-kernel", action="store_true", help="measure the step with each of the fast kernels made plain, too")
    add("--out", type=Path, help=f"JSON file for the results (default: {RESULTS}/<name>.json, not with --check)")
    parsed = parser.parse_args()
    kept = RESULTS / f"{parsed.name}.json"
    if parsed.check and not kept.is_file():
        parser.error(f"--check: stored results are expected. Received: {kept}, which does not exist")

    result = measure(parsed)
    if parsed.check:
        print(json.dumps(result["ratios"], indent=2))
        messages = worse(result["ratios"], json.loads(kept.read_text(encoding="utf-8"))["ratios"])
        sys.exit("\n".join(messages) if messages else 0)
    report(result, parsed.out or kept)


def measure(parsed):
    """Starts the contenders, measures them in turns and compares them."""
    import torch

    gpu = torch.cuda.is_available()
    context = multiprocessing.get_context("spawn")
    contenders = choose_contenders(parsed.backends, parsed.policy, gpu, parsed.baseline, parsed.each_kernel)
    results, seconds = {}, {}
    # One at a time on a GPU, whose memory is too small for all of them.
    groups = [[contender] for contender in contenders] if gpu else [contenders]
    for group in groups:
        workers = {}
        for contender in group:
            here, there = context.Pipe()
            os.environ["KERAS_BACKEND"] = contender.backend or "torch"
            keeps = contender.memory_kept and os.environ["KERAS_BACKEND"] == "torch" and not gpu
            for name, value in MEMORY_KEPT.items():
                os.environ.pop(name, None)
                os.environ |= {name: value} if keeps else {}
            process = context.Process(target=work, args=(there, contender, tuple(parsed.shape), gpu), daemon=True)
            process.start()
            # Close the other end here, so that `recv` raises EOFError when the process ends.
            there.close()
            workers[contender.name] = here
            try:
                results[contender.name] = here.recv()
            except EOFError:
                sys.exit(f"{contender.name}: its process ended; see its messages above")
            print(f"{contender.name}: {results[contender.name]}", flush=True)
        for what in ("train", "predict"):
            for _ in range(parsed.turns):
                for name, connection in workers.items():
                    connection.send(what)
                    seconds.setdefault((name, what), []).append(connection.recv())
        for name, connection in workers.items():
            connection.send("memory")
            results[name] |= connection.recv()
            for what in ("train", "predict"):
                results[name][f"{what}_seconds"] = round(statistics.median(seconds[name, what]), 4)
            print(f"{name}: {results[name]}", flush=True)
            connection.send("end")
    bandwidth, traffic = memory_bandwidth(gpu), least_traffic(tuple(parsed.shape))
    for result in results.values():
        result["share_of_bandwidth"] = round(traffic / result["train_seconds"] / bandwidth, 3)
    return {
        "bandwidth_gb_per_second": round(bandwidth / 1e9, 1),
        "machine": machine("keras", "torch", *({"tensorflow", "jax"} & set(parsed.backends))),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "shape": parsed.shape,
        "policy": parsed.policy,
        "turns": parsed.turns,
        "contenders": results,
        "ratios": compare(results, seconds, parsed.backends),
    }


def worse(now, before):
    """A message for each ratio that is more than 20% worse than before."""
    return [
        f"worse: {name} is {ratio:.2f}, and was {before[name]:.2f}"
        for name, ratio in now.items()
        if name in before and ratio > WORSE * before[name]
    ]


def compare(results, seconds, backends):
    """The ratios as medians over the turns. "plain" is the better of its two memory layouts."""
    others = [name for name in (KEPT, COMPILED) if name in results]
    plain = [name for name in results if name.startswith("plain") and name not in others]

    def ratio(one, other, what):
        pairs = zip(seconds[one, what], seconds[other, what], strict=True)
        return round(statistics.median(a / b for a, b in pairs), 3)

    def best(what):
        return min(plain, key=lambda name: results[name][f"{what}_seconds"])

    def memory(backend, what):
        leanest = min(plain, key=lambda name: results[name][what])
        return {f"{backend}, {MEMORY[what]} / plain": round(results[backend][what] / results[leanest][what], 3)}

    def beside(backend, variant):
        other, found = f"{backend}, {variant}", {}
        if other in results:
            found = {f"{backend}, {what} / {variant}": ratio(backend, other, what) for what in ("train", "predict")}
            for what in MEMORY.keys() & results[other].keys():
                found[f"{backend}, {MEMORY[what]} / {variant}"] = round(
                    results[backend][what] / results[other][what], 3
                )
        return found

    ratios = {}
    for backend in backends:
        for what in ("train", "predict"):
            ratios[f"{backend}, {what} / plain"] = ratio(backend, best(what), what)
            for other in others:
                ratios[f"{backend}, {what} / {other}"] = ratio(backend, other, what)
        ratios |= memory(backend, "peak_mib")
        if "peak_tensors_mib" in results[backend]:
            ratios |= memory(backend, "peak_tensors_mib")
        ratios[f"{backend}, train with / without attention"] = ratio(backend, f"{backend} without attention", "train")
        for variant in ("plain kernels", *(f"plain {kernel}" for kernel in FAST.get(backend, ())), "baseline"):
            ratios |= beside(backend, variant)
        if f"{backend} in float32" in results:
            ratios[f"{backend}, train / in float32"] = ratio(backend, f"{backend} in float32", "train")
    return ratios


def work(connection, contender, shape, gpu):
    """The process of one contender: builds its step, and runs it on request."""
    if contender.kernels:
        os.environ["MMFNET_KERNELS"] = contender.kernels
    if contender.checkout:
        sys.path.insert(0, contender.checkout)
    if contender.plain_kernel:
        # Where the backend's module lacks an operation, the reference is used.
        delattr(importlib.import_module(f"keras_mmfnet.kernels.{contender.backend}"), contender.plain_kernel)
    start = time.perf_counter()
    train, predict, memory = (make_keras if contender.backend else make_plain)(contender, shape)
    built = time.perf_counter()
    train()
    first = time.perf_counter()
    predict()
    for _ in range(2):
        train(), predict()
    connection.send({"build_seconds": round(built - start, 1), "first_step_seconds": round(first - built, 1)})
    run = {"train": train, "predict": predict}
    while (what := connection.recv()) != "end":
        if what == "memory":
            peak = {"peak_mib": memory()}
            if contender.backend in (None, "torch") and not gpu:
                peak["peak_tensors_mib"] = memory_of_tensors(train)
            connection.send(peak)
            continue
        start = time.perf_counter()
        run[what]()
        connection.send(time.perf_counter() - start)


def make_arrays(shape):
    """Three modalities and a mask."""
    import numpy as np

    rng = np.random.default_rng(0)
    images = {name: rng.normal(size=(*shape, 1)).astype("float32") for name in ("t1", "t2", "cet1")}
    return images, (images["t1"] > 1).astype("uint8")


def make_keras(contender, shape):
    """Returns functions for a training step, a prediction and the peak memory of this package's MMFNet."""
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    import keras

    from keras_mmfnet.losses import DiceLoss
    from keras_mmfnet.models import MMFNet, mmfnet

    images, mask = make_arrays(shape)
    memory = memory_since_now(contender.backend)
    if not contender.attention:
        mmfnet.FusionBlock3D = fusion_without_attention
    model = MMFNet(patch_shape=shape[1:], dtype=contender.policy)
    model.compile(keras.optimizers.Adam(1e-4), DiceLoss())
    model.optimizer.build(model.trainable_variables)
    images = {name: keras.ops.convert_to_tensor(image) for name, image in images.items()}
    mask = keras.ops.convert_to_tensor(mask)
    return lambda: float(model.train_on_batch(images, mask)), lambda: model.predict_on_batch(images), memory


def fusion_without_attention(filters, data_format, dtype, name, **attention):
    """Replaces a fusion block by concatenation and residual fusion."""
    import keras

    from keras_mmfnet.layers import ResidualFusion3D

    concatenate = keras.layers.Concatenate(axis=-1 if data_format == "channels_last" else 1, dtype=dtype)
    fuse = ResidualFusion3D(filters, data_format=data_format, dtype=dtype, name=name)
    return lambda features: fuse(concatenate(features))


def make_plain(contender, shape):
    """Returns functions for a training step, a prediction and the peak memory of plain PyTorch's MMFNet."""
    import numpy as np
    import torch
    from reference_torch import MMFNet, dice_loss

    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, mask = make_arrays(shape)
    memory = memory_since_now("torch")
    layout = torch.channels_last_3d if contender.channels_last else torch.contiguous_format
    network = MMFNet(attention=contender.attention).to(device, memory_format=layout)
    forward = torch.compile(network) if contender.compiled else network
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    images = [
        torch.tensor(np.moveaxis(x, -1, 1).copy(), device=device).to(memory_format=layout) for x in images.values()
    ]
    mask = torch.tensor(np.moveaxis(mask, -1, 1).copy(), device=device).float()
    mixed = contender.policy.removeprefix("mixed_")
    autocast = torch.autocast(device, getattr(torch, mixed), enabled=mixed != "float32", cache_enabled=False)
    scaler = torch.amp.GradScaler(device, enabled=mixed == "float16")

    def train():
        network.train()
        optimizer.zero_grad(set_to_none=True)
        with autocast:
            loss = dice_loss(mask, forward(images))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.item()

    def predict():
        network.eval()
        with torch.inference_mode(), autocast:
            return forward(images).cpu().numpy()

    return train, predict, memory


def memory_bandwidth(gpu):
    """Bytes per second read and written by the copy of a large tensor."""
    import torch

    source = torch.ones(2**28 if gpu else 2**26, device="cuda" if gpu else "cpu")
    target = torch.empty_like(source)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        target.copy_(source)
        if gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(seconds)


def least_traffic(shape):
    """The minimum number of bytes that a training step in float32 reads and writes.

    Each output of a layer, and its gradient, is written once and read once.
    """
    import torch
    from reference_torch import MMFNet

    sizes = []
    with torch.device("meta"):
        network, images = MMFNet(), [torch.empty((shape[0], 1, *shape[1:])) for _ in range(3)]
    for layer in network.modules():
        if not list(layer.children()):
            layer.register_forward_hook(lambda layer, inputs, output: sizes.append(4 * output.numel()))
    network(images)
    return 4 * sum(sizes)


def memory_since_now(backend):
    """Returns a function that measures the peak memory from now on in MiB, of the GPU if there is one."""
    if backend == "torch":
        import torch

        if torch.cuda.is_available():
            return lambda: round(torch.cuda.max_memory_allocated() / 2**20)
    if backend == "jax":
        import jax

        device = jax.devices()[0]
        if device.platform != "cpu":
            return lambda: round(device.memory_stats()["peak_bytes_in_use"] / 2**20)

    def status(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) // 1024

    before = status("VmRSS")
    return lambda: max(status("VmHWM") - before, 0)  # the kernel updates the two at different times


def memory_of_tensors(run):
    """The peak memory of PyTorch's tensors during `run`, relative to before, in MiB.

    It does not include memory of PyTorch and its libraries, and fragmentation.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return round(max(itertools.accumulate(sizes)) / 2**20)


if __name__ == "__main__":
    main()
