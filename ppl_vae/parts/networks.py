"""Networks: tensors to tensors, with any leading dimensions (particles, batch) before the event.

Each has a last layer ``output``, whose ``bias`` holds one number per feature; training starts by setting it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from ppl_vae.parts.convolutions import DoublingConv, HalvingConv, PixelOutput, ResidualBlock, channels_last
from ppl_vae.runtime.errors import ShapeError, Widths, check_widths
from ppl_vae.runtime.numerics import location_and_spread


def start_wide(net: nn.Module) -> None:
    """W ~ N(0, 1 / fan-in) and b = 0 in every linear layer but the last: three times the variance of torch's default.

    Signals then shrink less from layer to layer. Rectified signals would keep their size with twice this variance
    (He et al. 2015, arXiv 1502.01852, equation 10).

    Reference: LeCun et al. 1998, Efficient BackProp, section 4.6.
    """
    for name, layer in net.named_modules():
        # On the meta device there are no numbers, and drawing them would import torch's compiler.
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] != "output" and not layer.weight.is_meta:
            nn.init.normal_(layer.weight, 0.0, layer.in_features**-0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _leading_shape(x: Tensor, event_shape: tuple[int, ...]) -> torch.Size:
    """The dimensions before the event. Raises ShapeError unless x is (..., *E)."""
    leading = x.dim() - len(event_shape)
    if leading < 0 or tuple(x.shape[leading:]) != event_shape:
        expected = ", ".join(map(str, event_shape))
        raise ShapeError(f"network input: expected shape (..., {expected}), got {tuple(x.shape)}")
    return x.shape[:leading]


class Standardized(nn.Module):
    """h = net((x - loc) / scale): a network whose input does not depend on the unit of the data.

    The net maps (..., *E) to (..., F). The buffers ``loc`` (*E) and ``scale`` () are 0 and 1 until ``fit_marginals``
    sets them.
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, net: nn.Module, event_shape: Sequence[int]) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("loc", torch.zeros(tuple(event_shape)))
        self.register_buffer("scale", torch.ones(()))

    def fit_marginals(self, x: Tensor) -> None:
        """Set loc to the mean image of x (N, *E), and scale to the standard deviation of all pixels if it is not 0."""
        loc, scale = location_and_spread(x)
        self.loc.copy_(loc)
        if scale > 0:
            self.scale.copy_(scale)

    def forward(self, x: Tensor) -> Tensor:
        _leading_shape(x, tuple(self.loc.shape))
        return self.net((x - self.loc) / self.scale)


def _drop_after(activation: nn.Module, dropout: float) -> nn.Module:
    """The activation, followed in training by dropout.

    Each unit is 0 with probability ``dropout``, and otherwise divided by 1 - dropout. Both are one module, so that the
    names of weights do not depend on it.

    Reference: Srivastava et al. 2014, Dropout, Journal of Machine Learning Research 15, section 4.
    """
    return nn.Sequential(activation, nn.Dropout(dropout)) if dropout else activation


class _Dense(nn.Module):
    """Affine hidden layers with an activation, then an affine ``output``: abstract.

    The activation takes ``inputs`` numbers per unit: 1, or 2 for a gate.
    """

    def __init__(
        self,
        event_shape: Widths,
        num_features: int,
        hidden: Widths,
        activation: Callable[[], nn.Module],
        dropout: float,
        *,
        inputs: int = 1,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a number, 0 or more and below 1, got {dropout}")
        self.event_shape = check_widths("event_shape", event_shape)
        widths = [math.prod(self.event_shape), *check_widths("hidden", hidden)]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, inputs * width_out), _drop_after(activation(), dropout)]
        self.layers = nn.Sequential(*layers)
        self.output = nn.Linear(widths[-1], num_features)

    def forward(self, x: Tensor) -> Tensor:
        """(..., *E) -> (..., num_features)."""
        flat = x.reshape(*_leading_shape(x, self.event_shape), math.prod(self.event_shape))
        return self.output(self.layers(flat))


class MLP(_Dense):
    """h = W_n a(... a(W_1 x + b_1)) + b_n: a multilayer perceptron over the flattened event.

    Args:
        event_shape: E, or the length of a vector; an input that is not (..., *E) raises ValueError.
        num_features: The length of the output.
        hidden: The widths of the hidden layers, or the width of the only one; () for an affine map.
        activation: a, applied after every hidden layer.
        dropout: The probability that training sets a hidden unit to 0, from 0 to below 1; another raises ValueError.
            Not for a guide under ``STL`` or ``DReG``, which run it twice.
    """

    def __init__(
        self,
        event_shape: Widths,
        num_features: int,
        *,
        hidden: Widths,
        activation: type[nn.Module] = nn.ReLU,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(event_shape, num_features, hidden, activation, dropout)


class GatedMLP(_Dense):
    """A multilayer perceptron with hidden layers (W x + b) * sigmoid(V x + c), computed by one matrix product each.

    The sigmoid can switch a unit off, while the other factor stays linear, so that gradients pass. Arguments, shapes
    and errors as ``MLP``.

    Reference: Dauphin et al. 2017, arXiv 1612.08083, equation 1; used for VAEs by Tomczak and Welling 2018, 1705.07120.
    """

    def __init__(self, event_shape: Widths, num_features: int, *, hidden: Widths, dropout: float = 0.0) -> None:
        super().__init__(event_shape, num_features, hidden, partial(nn.GLU, dim=-1), dropout, inputs=2)


# --- Convolutions ---


def _image_shape(event_shape: Sequence[int]) -> tuple[int, int, int]:
    event_shape = check_widths("event_shape", event_shape)
    if len(event_shape) != 3:
        raise ValueError(f"event_shape: expected images (C, H, W) for a convolutional network, got {event_shape}")
    channels, height, width = event_shape
    return channels, height, width


def _sizes(height: int, width: int, num_stages: int) -> list[tuple[int, int]]:
    """(height, width) before the first stage and after each, which halves them, rounded up."""
    return [(-(-height // 2**i), -(-width // 2**i)) for i in range(num_stages + 1)]


def _stage_end(width: int, *, gated: bool, num_blocks: int = 0, dropout: float = 0.0) -> list[nn.Module]:
    """The activation of a stage, its dropout, and its residual blocks."""
    blocks = [ResidualBlock(width, gated=gated) for _ in range(num_blocks)]
    return [_drop_after(nn.GLU(dim=-3) if gated else nn.SiLU(), dropout), *blocks]


class ConvEncoder(nn.Module):
    """h = MLP(a(W_n * ... a(W_1 * x))): stages of 5x5 convolutions of stride 2, then a dense network.

    A stage halves height and width, rounded up, and ends with ``num_blocks`` residual blocks. The dense network takes
    all channels of all remaining positions.

    Args:
        event_shape: (C, H, W); a ValueError refuses another, and inputs that are not (..., C, H, W).
        num_features: The length of the output.
        channels: The number of channels of each stage.
        hidden: The widths of the dense hidden layers.
        gated: Whether stages and hidden layers are u * sigmoid(v), as in ``GatedMLP``; otherwise SiLU follows a stage,
            and ReLU a hidden layer.
        num_blocks: The number of residual blocks per stage.
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
            stages.append(HalvingConv(width_in, wide))
            stages += _stage_end(width_out, gated=gated, num_blocks=num_blocks)
        self.stages = nn.Sequential(*stages)
        small = ([planes, *channels][-1], *_sizes(height, width, len(channels))[-1])
        self.dense = (GatedMLP if gated else MLP)(small, num_features, hidden=hidden)

    @property
    def output(self) -> nn.Linear:
        """The last layer."""
        return self.dense.output

    def forward(self, x: Tensor) -> Tensor:
        """(..., C, H, W) -> (..., num_features)."""
        leading = _leading_shape(x, self.event_shape)
        h = self.dense(self.stages(channels_last(x.reshape(-1, *self.event_shape))))
        return h.reshape(*leading, h.shape[-1])


class ConvDecoder(nn.Module):
    """The mirror of ``ConvEncoder``: a dense network, then stages of transposed convolutions of stride 2.

    The features are num_features / (H W) planes of pixels: the C channels of the first feature, then of the second.

    Args:
        latent_dim: L, the length of the input.
        event_shape: (C, H, W), the shape of the decoded image; a ValueError refuses another.
        num_features: A multiple of H W.
        channels: The number of channels of each stage of the encoder, in its order; at least one.
        hidden: The widths of the dense hidden layers, in this network's order.
        gated, num_blocks: As in ``ConvEncoder``.
        dropout: As in ``MLP``, of the dense hidden layers and after each stage's activation.
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
        dropout: float = 0.0,
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
        widths = channels[::-1]
        end = partial(_stage_end, gated=gated, num_blocks=num_blocks, dropout=dropout)
        stages = end(widths[0])[gated:]  # the dense network is not gated
        for i, (width_in, width_out) in enumerate(pairwise(widths)):
            stages.append(DoublingConv(width_in, 2 * width_out if gated else width_out, size=sizes[-2 - i]))
            stages += end(width_out)
        dense = GatedMLP if gated else MLP
        self.dense = dense(latent_dim, math.prod(self.small), hidden=hidden, dropout=dropout)
        self.stages = nn.Sequential(*stages)
        self.output = PixelOutput(widths[-1], num_features // (height * width), size=(height, width))

    def forward(self, z: Tensor) -> Tensor:
        """(..., L) -> (..., num_features)."""
        leading = _leading_shape(z, self.event_shape)
        small = channels_last(self.dense(z.reshape(-1, *self.event_shape)).reshape(-1, *self.small))
        h = self.output(self.stages(small))
        return h.reshape(*leading, h.shape[-1])


# --- Encoder and decoder ---


@dataclass(frozen=True)
class NetworkPair:
    """An encoder and its decoder: what a word of ``--network`` names.

    Args:
        dense: ``MLP`` or ``GatedMLP``, which is also the network between layers of latents.
        num_blocks: The residual blocks per stage of convolutions; None for a dense pair, which ignores channels.
    """

    dense: Callable[..., nn.Module]
    num_blocks: int | None = None

    def encoder(
        self, event_shape: Sequence[int], num_features: int, *, channels: Widths, hidden: Sequence[int]
    ) -> nn.Module:
        """A network (..., *E) -> (..., num_features)."""
        if self.num_blocks is None:
            return self.dense(event_shape, num_features, hidden=hidden)
        encoder = partial(ConvEncoder, gated=self.dense is GatedMLP, num_blocks=self.num_blocks)
        return encoder(event_shape, num_features, channels=channels, hidden=hidden)

    def decoder(
        self,
        latent_dim: int,
        event_shape: Sequence[int],
        num_features: int,
        *,
        channels: Widths,
        hidden: Sequence[int],
        dropout: float = 0.0,
    ) -> nn.Module:
        """A network (..., L) -> (..., num_features); channels and hidden widths in the encoder's order."""
        hidden = hidden[::-1]
        if self.num_blocks is None:
            return self.dense(latent_dim, num_features, hidden=hidden, dropout=dropout)
        decoder = partial(ConvDecoder, gated=self.dense is GatedMLP, num_blocks=self.num_blocks, dropout=dropout)
        return decoder(latent_dim, event_shape, num_features, channels=channels, hidden=hidden)


DENSE = NetworkPair(MLP)
DENSE_TANH = NetworkPair(partial(MLP, activation=nn.Tanh))
DENSE_GATED = NetworkPair(GatedMLP)
CONV = NetworkPair(MLP, num_blocks=0)
CONV_GATED = NetworkPair(GatedMLP, num_blocks=0)
RESIDUAL = NetworkPair(MLP, num_blocks=1)
RESIDUAL_GATED = NetworkPair(GatedMLP, num_blocks=1)
