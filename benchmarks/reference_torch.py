"""MMFNet in plain, idiomatic PyTorch: the baseline for the speed of this package.

It shares no code with the package. With the same weights, which `load_keras_weights` copies, both give the same output,
which tests both.
"""

import torch
from torch import nn


class ConvBlock(nn.Module):
    """A 3x3x3 convolution, batch normalization and ReLU."""

    def __init__(self, inputs, filters):
        super().__init__()
        self.conv = nn.Conv3d(inputs, filters, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm3d(filters, eps=1e-5, momentum=0.1)

    def forward(self, x):
        return torch.relu_(self.norm(self.conv(x)))


class Encoder(nn.Module):
    """The features of each level before its pooling, then those after the last one (section III-A)."""

    def __init__(self, filters):
        super().__init__()
        self.first, self.second = nn.ModuleList(), nn.ModuleList()
        for inputs, count in zip((1, *filters), filters, strict=False):
            self.first.append(ConvBlock(inputs, count))
            self.second.append(ConvBlock(count, count))
        self.bottom = ConvBlock(filters[-1], filters[-1])
        self.pool = nn.MaxPool3d(2)

    def forward(self, x):
        features = []
        for first, second in zip(self.first, self.second, strict=True):
            features.append(second(first(x)))
            x = self.pool(features[-1])
        return [*features, self.bottom(x)]


class MLP(nn.Module):
    def __init__(self, channels, hidden):
        super().__init__()
        self.hidden, self.scores = nn.Linear(channels, hidden), nn.Linear(hidden, channels)

    def forward(self, x):
        return self.scores(torch.relu(self.hidden(x)))


class FusionBlock(nn.Module):
    """Channel attention, spatial attention and residual fusion of the concatenated features (section III-B)."""

    def __init__(self, channels, filters, reduction, attention=True):
        super().__init__()
        self.attention = attention
        if attention:
            self.channel = nn.ModuleDict({name: MLP(channels, channels // reduction) for name in ("avg", "max", "std")})
            self.spatial = nn.Conv3d(3, 1, 3, padding=1)
        self.reduce = nn.Conv3d(channels, filters, 1)
        self.refine1 = nn.Conv3d(filters, filters, (1, 3, 3), padding=(0, 1, 1), bias=False)
        self.norm = nn.BatchNorm3d(filters, eps=1e-5, momentum=0.1)
        self.refine2 = nn.Conv3d(filters, filters, (1, 3, 3), padding=(0, 1, 1))

    def forward(self, features):
        x = torch.cat(features, dim=1)
        if self.attention:
            x = self.recalibrate(x) + x
        reduced = self.reduce(x)
        return reduced + self.refine2(torch.relu_(self.norm(self.refine1(reduced))))

    def recalibrate(self, x):
        variance, mean = torch.var_mean(x, dim=(2, 3, 4), correction=0)
        pooled = {"avg": mean, "max": x.amax(dim=(2, 3, 4)), "std": (variance + 1e-6).sqrt()}
        weights = torch.sigmoid(sum(mlp(pooled[name]) for name, mlp in self.channel.items()))
        x = x * weights[:, :, None, None, None]
        variance, mean = torch.var_mean(x, dim=1, keepdim=True, correction=0)
        pooled = torch.cat([mean, x.amax(dim=1, keepdim=True), (variance + 1e-6).sqrt()], dim=1)
        return x * torch.sigmoid(self.spatial(pooled))


class MMFNet(nn.Module):
    """MMFNet with the paper's defaults.

    Args:
        modalities: Number of modalities.
        filters: Filters of each encoder's blocks.
        reduction: Ratio of the channel attention's hidden layer.
        attention: Whether the fusion blocks have channel and spatial attention.
    """

    def __init__(self, modalities=3, filters=(8, 16, 32, 64), reduction=12, attention=True):
        super().__init__()
        self.encoders = nn.ModuleList(Encoder(filters) for _ in range(modalities))
        self.fusions = nn.ModuleList(
            FusionBlock(modalities * count, count, reduction, attention) for count in (*filters, filters[-1])
        )
        self.ups = nn.ModuleList(
            nn.ConvTranspose3d(below, count, 2, stride=2)
            for count, below in zip(filters, (*filters[1:], filters[-1]), strict=True)
        )
        self.blocks = nn.ModuleList(ConvBlock(2 * count, count) for count in filters)
        self.head = nn.Conv3d(filters[0], 1, 1)

    def forward(self, inputs):
        """Probabilities `(batch, 1, depth, height, width)` from a tensor of that shape per modality."""
        levels = zip(*(encoder(x) for encoder, x in zip(self.encoders, inputs, strict=True)), strict=True)
        *skips, x = [fuse(list(features)) for fuse, features in zip(self.fusions, levels, strict=True)]
        for up, block, skip in zip(reversed(self.ups), reversed(self.blocks), reversed(skips), strict=True):
            x = block(torch.cat([up(x), skip], dim=1))
        return torch.sigmoid(self.head(x).float())


def dice_loss(truth, probability):
    """The Dice loss over the whole batch (eq. 1)."""
    return 1 - (2 * (truth * probability).sum() + 1) / (truth.sum() + probability.sum() + 1)


def load_keras_weights(network, weights, modalities=("t1", "t2", "cet1")):
    """Copies the weights of a `keras_mmfnet.models.MMFNet`.

    Args:
        network: The `MMFNet` above.
        weights: `{Keras path: array}`.
        modalities: Names of the modalities, in order.

    Raises:
        ValueError: The weights do not match the network.
    """
    used = set()

    def fill(parameter, path):
        array = torch.as_tensor(weights[path])
        # The output channels of a kernel are last in Keras and first in PyTorch (inputs for a transposed convolution).
        array = array.permute(4, 3, 0, 1, 2) if array.ndim == 5 else array.T if array.ndim == 2 else array
        parameter.data.copy_(array)
        used.add(path)

    for path, layer in named_layers(network, modalities):
        if isinstance(layer, nn.BatchNorm3d):
            fill(layer.weight, f"{path}/gamma")
            fill(layer.running_mean, f"{path}/moving_mean")
            fill(layer.running_var, f"{path}/moving_variance")
        else:
            fill(layer.weight, f"{path}/kernel")
        if layer.bias is not None:
            fill(layer.bias, f"{path}/beta" if isinstance(layer, nn.BatchNorm3d) else f"{path}/bias")
    if used != set(weights):
        raise ValueError(f"the weights must be those of this network. Received: also {sorted(set(weights) - used)}")


def named_layers(network, modalities):
    """Yields the Keras path of each layer with weights, and the layer."""
    blocks = {}
    for modality, encoder in zip(modalities, network.encoders, strict=True):
        for level, (first, second) in enumerate(zip(encoder.first, encoder.second, strict=True), start=1):
            blocks |= {f"{modality}_block{level}_1": first, f"{modality}_block{level}_2": second}
        blocks[f"{modality}_bottom"] = encoder.bottom
    for level, (up, block) in enumerate(zip(network.ups, network.blocks, strict=True), start=1):
        blocks[f"decoder_block{level}"] = block
        yield f"decoder_block{level}_up", up
    for name, block in blocks.items():
        yield f"{name}_conv", block.conv
        yield f"{name}_norm", block.norm
    names = [*(f"fusion{level}" for level in range(1, len(network.fusions))), "fusion_bottom"]
    for name, fusion in zip(names, network.fusions, strict=True):
        if fusion.attention:
            for statistic, mlp in fusion.channel.items():
                yield f"{name}/channel_attention/{statistic}_hidden", mlp.hidden
                yield f"{name}/channel_attention/{statistic}_scores", mlp.scores
            yield f"{name}/spatial_attention/conv", fusion.spatial
        for layer in ("reduce", "refine1", "norm", "refine2"):
            yield f"{name}/residual_fusion/{layer}", getattr(fusion, layer)
    yield "probability", network.head
