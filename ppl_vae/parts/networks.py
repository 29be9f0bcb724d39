"""Networks: tensors to tensors, with any leading dimensions (particles, batch) before the event.

Each ends in a layer ``output`` with a ``bias`` of one number per feature, from which training sets where it starts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ppl_vae.runtime.errors import ShapeError, Widths, check_widths
from ppl_vae.runtime.numerics import location_and_spread


def start_wide(net: nn.Module) -> None:
    """W ~ N(0, 1 / fan-in), b = 0, of every linear layer but the last: three times the variance of torch's own start.

    Signals then shrink less from layer to layer; of rectified and gated layers they still do.

    Reference: LeCun et al. 1998, Efficient BackProp, section 4.6. What keeps the size of rectified signals is twice
    that variance: He et al. 2015, arXiv 1502.01852, equation 10.
    """
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] != "output":
            nn.init.normal_(layer.weight, 0.0, layer.in_features**-0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _leading(x: Tensor, event_shape: tuple[int, ...]) -> torch.Size:
    """The dimensions before the event; raises where the trailing dimensions are not E."""
    leading = x.dim() - len(event_shape)
    if leading < 0 or tuple(x.shape[leading:]) != event_shape:
        raise ShapeError(
            f"network input: expected shape (..., {', '.join(map(str, event_shape))}), got {tuple(x.shape)}"
        )
    return x.shape[:leading]


def _flatten_event(x: Tensor, event_shape: tuple[int, ...]) -> Tensor:
    """(..., *E) -> (..., prod(E))."""
    return x.reshape(*_leading(x, event_shape), math.prod(event_shape))


class Standardized(nn.Module):
    """h = net((x - loc) / scale): a network that sees its input in the unit of the data, whatever that is.

    Args:
        net: (..., *E) -> (..., F).
        event_shape: E.

    ``loc`` (*E) and ``scale`` () are buffers, 0 and 1 until ``fit_marginals(x)`` sets them to the pixels' means and the
    root of the mean squared deviation from them.
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, net: nn.Module, event_shape: Sequence[int]) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("loc", torch.zeros(tuple(event_shape)))
        self.register_buffer("scale", torch.ones(()))

    def fit_marginals(self, x: Tensor) -> None:
        """Takes location and scale from images x, (N, *E). Constant images keep the scale."""
        loc, scale = location_and_spread(x)
        self.loc.copy_(loc)
        if scale > 0:
            self.scale.copy_(scale)

    def forward(self, x: Tensor) -> Tensor:
        _leading(x, tuple(self.loc.shape))
        return self.net((x - self.loc) / self.scale)


class MLP(nn.Module):
    """h = W_n a(... a(W_1 x + b_1)) + b_n: a multilayer perceptron over the flattened event.

    Args:
        event_shape: the input's event shape E; a number stands for a vector of that length.
        num_features: the length of the output.
        hidden: the widths of the hidden layers, one number for one layer; empty for an affine map.
        activation: a, applied after every hidden layer.

    ``forward`` takes (..., *E) and returns (..., num_features). The last layer is ``output``.

    Raises:
        ValueError: where the input's trailing shape is not E.
    """

    def __init__(
        self,
        event_shape: Widths,
        num_features: int,
        *,
        hidden: Widths,
        activation: type[nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        self.event_shape = check_widths("event_shape", event_shape)
        widths = [math.prod(self.event_shape), *check_widths("hidden", hidden)]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out), activation()]
        self.layers = nn.Sequential(*layers)
        self.output = nn.Linear(widths[-1], num_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.layers(_flatten_event(x, self.event_shape)))


class GatedMLP(nn.Module):
    """A multilayer perceptron whose hidden layers are (W x + b) * sigmoid(V x + c).

    The sigmoid is a gate: it lets a unit be switched off by the input while the other factor stays linear, so that
    gradients pass. Both factors are one matrix product. Arguments and shapes as ``MLP``.

    Reference: Dauphin et al. 2017, arXiv 1612.08083, equation 1; used for VAEs by Tomczak and Welling 2018, 1705.07120.
    """

    def __init__(self, event_shape: Widths, num_features: int, *, hidden: Widths) -> None:
        super().__init__()
        self.event_shape = check_widths("event_shape", event_shape)
        widths = [math.prod(self.event_shape), *check_widths("hidden", hidden)]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, 2 * width_out), nn.GLU(dim=-1)]
        self.layers = nn.Sequential(*layers)
        self.output = nn.Linear(widths[-1], num_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.layers(_flatten_event(x, self.event_shape)))


# --- Convolutions ---

_KERNEL, _PADDING = 5, 2  # with stride 2 every size becomes half of itself, rounded up


def _image_shape(event_shape: Sequence[int]) -> tuple[int, int, int]:
    event_shape = check_widths("event_shape", event_shape)
    if len(event_shape) != 3:
        raise ValueError(f"event_shape: expected images (C, H, W) for a convolutional network, got {event_shape}")
    channels, height, width = event_shape
    return channels, height, width


def _sizes(height: int, width: int, num_stages: int) -> list[tuple[int, int]]:
    """The size of the image before the first stage and after each: every stage halves it, rounded up."""
    sizes = [(height, width)]
    for _ in range(num_stages):
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    return sizes


def _up(width_in: int, width_out: int, *, size: tuple[int, int], bias: bool = True) -> nn.ConvTranspose2d:
    """The transposed convolution of a stage of the encoder: to images of ``size`` from those of half of it."""
    odd = (size[0] % 2, size[1] % 2)  # a size n comes from ceil(n / 2), which gives 2 ceil(n / 2) - 1 without padding
    return nn.ConvTranspose2d(
        width_in,
        width_out,
        _KERNEL,
        stride=2,
        padding=_PADDING,
        output_padding=(1 - odd[0], 1 - odd[1]),
        bias=bias,
    )


def _channels_last(x: Tensor) -> Tensor:
    """Lays images out with the channels innermost, as convolutions on CPUs are fastest, and returns the same numbers.

    Weights keep torch's own layout: of others ``pyro.module`` makes copies, which plain SVI then trains in their place.
    """
    return x.contiguous(memory_format=torch.channels_last)


class ResidualBlock(nn.Module):
    """x + W_2 * a(W_1 * a(x)): two 3x3 convolutions beside an identity; gated: x + u sigmoid(v), (u, v) = W_2 * ...

    Without normalization: statistics of a batch would let images see each other. (..., width, H, W) to the same.

    Reference: He et al. 2016, arXiv 1603.05027, equation 4 (pre-activation); the gate as in ``GatedMLP``.
    """

    def __init__(self, width: int, *, gated: bool) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width if gated else width, 3, padding=1),
        )
        self.gate = nn.GLU(dim=-3) if gated else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate(self.branch(x))


class ConvEncoder(nn.Module):
    """h = MLP(a(W_n * ... a(W_1 * x))): stages of 5x5 convolutions that halve the image, then a dense network.

    Every stage halves height and width (rounded up: any size will do, also odd and non-square) and gives its number of
    channels; after it come ``num_blocks`` residual blocks. Widening the channels while the image shrinks keeps the work
    of the stages alike; 28x28 in two stages becomes 7x7. The dense network sees all that is left, position by position.

    Args:
        event_shape: (C, H, W).
        num_features: the length of the output.
        channels: of each stage.
        hidden: widths of the dense hidden layers.
        gated: every stage and hidden layer is u * sigmoid(v) (see ``GatedMLP``); else SiLU and ReLU follow them.
        num_blocks: residual blocks per stage.

    ``forward`` takes (..., C, H, W) and returns (..., num_features).

    Raises:
        ValueError: where the event shape is no image's, or the input's trailing shape is another.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        num_features: int,
        *,
        channels: Widths,
        hidden: Widths,
        gated: bool = False,
        num_blocks: int = 0,
    ) -> None:
        super().__init__()
        planes, height, width = _image_shape(event_shape)
        channels = check_widths("channels", channels)
        self.event_shape = (planes, height, width)
        stages: list[nn.Module] = []
        for width_in, width_out in pairwise([planes, *channels]):
            wide = 2 * width_out if gated else width_out
            stages.append(nn.Conv2d(width_in, wide, _KERNEL, stride=2, padding=_PADDING))
            stages.append(nn.GLU(dim=-3) if gated else nn.SiLU())
            stages += [ResidualBlock(width_out, gated=gated) for _ in range(num_blocks)]
        self.stages = nn.Sequential(*stages)
        small = _sizes(height, width, len(channels))[-1]
        dense = GatedMLP if gated else MLP
        self.dense = dense(([planes, *channels][-1], *small), num_features, hidden=hidden)

    @property
    def output(self) -> nn.Linear:
        """The last layer."""
        return self.dense.output

    def forward(self, x: Tensor) -> Tensor:
        leading = _leading(x, self.event_shape)
        h = self.dense(self.stages(_channels_last(x.reshape(-1, *self.event_shape))))
        return h.reshape(*leading, h.shape[-1])


class PixelOutput(nn.Module):
    """h = W * x + b: a transposed convolution to planes of pixels, flattened, with a bias for every pixel.

    A convolution's own bias is the same everywhere; one of each pixel can hold the pixels' marginals, from which
    training starts.
    """

    def __init__(self, width_in: int, planes: int, *, size: tuple[int, int]) -> None:
        super().__init__()
        self.up = _up(width_in, planes, size=size, bias=False)
        self.bias = nn.Parameter(torch.zeros(planes * size[0] * size[1]))

    def forward(self, x: Tensor) -> Tensor:
        """(N, width_in, H / 2, W / 2) -> (N, planes H W)."""
        return self.up(x).flatten(1) + self.bias


class ConvDecoder(nn.Module):
    """The mirror of ``ConvEncoder``: a dense network, then stages of transposed convolutions that double the image.

    The last stage gives planes of features, num_features / (H W) of them: for one feature per pixel, the planes are the
    image's channels; likelihoods with k features per pixel get k times as many, feature by feature.

    Args:
        latent_dim: L, the length of the input.
        event_shape: (C, H, W), of the image that is decoded.
        num_features: a multiple of H W.
        channels: of the stages, in the encoder's order.
        hidden: widths of the dense hidden layers, in this network's order.
        gated: as ``ConvEncoder``.
        num_blocks: as ``ConvEncoder``.

    ``forward`` takes (..., L) and returns (..., num_features), planes before pixels.

    Raises:
        ValueError: where the event shape is no image's, features are no planes of it, or the input is not (..., L).
    """

    def __init__(
        self,
        latent_dim: int,
        event_shape: Sequence[int],
        num_features: int,
        *,
        channels: Widths,
        hidden: Widths,
        gated: bool = False,
        num_blocks: int = 0,
    ) -> None:
        super().__init__()
        _, height, width = _image_shape(event_shape)
        if num_features % (height * width):
            raise ValueError(f"num_features: expected a multiple of {height} x {width} pixels, got {num_features}")
        channels = check_widths("channels", channels)
        if not channels:
            raise ValueError("channels: expected at least one stage, got none")
        sizes = _sizes(height, width, len(channels))
        self.event_shape = (latent_dim,)
        self.small = (channels[-1], *sizes[-1])
        dense = GatedMLP if gated else MLP
        stages: list[nn.Module] = [] if gated else [nn.SiLU()]
        widths = [*channels[::-1]]
        for i, (width_in, width_out) in enumerate(pairwise(widths)):
            stages += [ResidualBlock(width_in, gated=gated) for _ in range(num_blocks)]
            stages.append(_up(width_in, 2 * width_out if gated else width_out, size=sizes[-2 - i]))
            stages.append(nn.GLU(dim=-3) if gated else nn.SiLU())
        stages += [ResidualBlock(widths[-1], gated=gated) for _ in range(num_blocks)]
        self.dense = dense(latent_dim, math.prod(self.small), hidden=hidden)
        self.stages = nn.Sequential(*stages)
        self.output = PixelOutput(widths[-1], num_features // (height * width), size=(height, width))

    def forward(self, z: Tensor) -> Tensor:
        leading = _leading(z, self.event_shape)
        small = _channels_last(self.dense(z.reshape(-1, *self.event_shape)).reshape(-1, *self.small))
        h = self.output(self.stages(small))
        return h.reshape(*leading, h.shape[-1])
