"""The paper's equations in NumPy and plain PyTorch, without Keras: what layers and networks must equal.

Volumes are `(batch, depth, height, width, channels)`, or `(batch, channels, depth, height, width)` in PyTorch. `w` has
Keras' weights by their path inside the layer or network.
"""

import numpy as np
import torch
import torch.nn.functional as F

EPSILON = 1e-6  # under the root of a standard deviation
NORM_EPSILON = 1e-5


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def statistic(name, x, axes):
    """AvgPool, MaxPool or StdPool over `axes` (eq. 8-10)."""
    mean = x.mean(axes, keepdims=True)
    if name == "avg":
        return mean
    if name == "max":
        return x.max(axes, keepdims=True)
    return np.sqrt(((x - mean) ** 2).mean(axes, keepdims=True) + EPSILON)


def conv(x, kernel, bias=0.0):
    """A convolution that keeps the size, as a sum over the kernel's voxels."""
    sizes = kernel.shape[:3]
    padded = np.pad(x, [(0, 0), *((size // 2, size // 2) for size in sizes), (0, 0)])
    depth, height, width = x.shape[1:4]
    total = np.zeros((*x.shape[:4], kernel.shape[-1]))
    for i, j, k in np.ndindex(sizes):
        total += padded[:, i : i + depth, j : j + height, k : k + width] @ kernel[i, j, k]
    return total + bias


def channel_weights(w, x, statistics=("avg", "max", "std"), shared_mlp=False):
    """`W_c` of eq. 7."""
    logits = 0.0
    for name in statistics:
        mlp = "shared" if shared_mlp else name
        hidden = statistic(name, x, (1, 2, 3)) @ w[f"{mlp}_hidden/kernel"] + w[f"{mlp}_hidden/bias"]
        logits = logits + np.maximum(hidden, 0) @ w[f"{mlp}_scores/kernel"] + w[f"{mlp}_scores/bias"]
    return sigmoid(logits)


def spatial_weights(w, x, statistics=("avg", "max", "std")):
    """`W_s` of eq. 11."""
    stacked = np.concatenate([statistic(name, x, -1) for name in statistics], -1)
    return sigmoid(conv(stacked, w["conv/kernel"], w["conv/bias"]))


def residual_fusion(w, x, training=False):
    """`Res` of eq. 12-13."""
    reduced = conv(x, w["reduce/kernel"], w["reduce/bias"])
    refined = conv(reduced, w["refine1/kernel"])
    mean, variance = w["norm/moving_mean"], w["norm/moving_variance"]
    if training:
        mean, variance = refined.mean((0, 1, 2, 3)), refined.var((0, 1, 2, 3))
    normal = (refined - mean) / np.sqrt(variance + NORM_EPSILON) * w["norm/gamma"] + w["norm/beta"]
    return reduced + conv(np.maximum(normal, 0), w["refine2/kernel"], w["refine2/bias"])


def inside(w, part):
    """The weights of the layer `part`, by their path inside it."""
    return {path.removeprefix(f"{part}/"): value for path, value in w.items() if path.startswith(f"{part}/")}


def fusion_block(w, *features, channel_statistics, spatial_statistics, shared_mlp=False):
    """`F_fused`, `W_c` and `W_s` of eq. 4-6."""
    original = np.concatenate(features, -1)
    by_channel = channel_weights(inside(w, "channel_attention"), original, channel_statistics, shared_mlp)
    weighted = by_channel * original
    by_voxel = spatial_weights(inside(w, "spatial_attention"), weighted, spatial_statistics)
    fused = residual_fusion(inside(w, "residual_fusion"), by_voxel * weighted + original)
    return fused, by_channel, by_voxel


def torch_conv(w, name, x):
    kernel = w[f"{name}/kernel"].permute(4, 3, 0, 1, 2)
    return F.conv3d(x, kernel, w.get(f"{name}/bias"), padding="same")


def torch_norm(w, name, x):
    mean, variance = w[f"{name}/moving_mean"], w[f"{name}/moving_variance"]
    return F.batch_norm(x, mean, variance, w[f"{name}/gamma"], w[f"{name}/beta"], eps=NORM_EPSILON)


def torch_fusion_block(w, features):
    """The fusion block with all three statistics on PyTorch's own operations; `w` holds tensors."""
    original = torch.cat(features, dim=1)
    volume = (2, 3, 4)
    pooled = {
        "avg": original.mean(volume),
        "max": original.amax(volume),
        "std": (original.var(volume, correction=0) + EPSILON).sqrt(),
    }
    logits = 0
    for name, value in pooled.items():
        hidden, scores = (inside(w, f"channel_attention/{name}_{layer}") for layer in ("hidden", "scores"))
        value = F.relu(F.linear(value, hidden["kernel"].T, hidden["bias"]))
        logits = logits + F.linear(value, scores["kernel"].T, scores["bias"])
    weighted = original * logits.sigmoid()[:, :, None, None, None]
    stacked = [
        weighted.mean(1, keepdim=True),
        weighted.amax(1, keepdim=True),
        (weighted.var(1, correction=0, keepdim=True) + EPSILON).sqrt(),
    ]
    recalibrated = weighted * torch_conv(w, "spatial_attention/conv", torch.cat(stacked, dim=1)).sigmoid()
    reduced = torch_conv(w, "residual_fusion/reduce", recalibrated + original)
    refined = F.relu(torch_norm(w, "residual_fusion/norm", torch_conv(w, "residual_fusion/refine1", reduced)))
    return reduced + torch_conv(w, "residual_fusion/refine2", refined)
