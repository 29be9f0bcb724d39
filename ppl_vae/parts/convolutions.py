"""Layers of convolutional networks: halve and double the size of images, residual blocks, and the last layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad, pixel_shuffle, pixel_unshuffle

_KERNEL, _PADDING = 5, 2  # with stride 2 they halve every size, rounded up


class HalvingConv(nn.Conv2d):
    """A 5x5 convolution of stride 2: (N, width_in, H, W) -> (N, width_out, H / 2, W / 2), rounded up.

    One plane on a CPU: with s_a[m] = x[2 m + a], a = 0, 1, in each direction,

        sum_k w[k] x[2 m + k - 2] = sum_{d, a} w[2 d + a] s_a[m + d - 1],  d = 0, 1, 2,  w[5] = 0,

    a 3x3 convolution of the four planes s. Compiled, it and its gradient took 0.3 to 0.9 times as long on two cores
    (batches of 100 and 128 images of 28x28, 16 to 64 channels). Not measured on a GPU.
    """

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(width_in, width_out, _KERNEL, stride=2, padding=_PADDING)

    def forward(self, x: Tensor) -> Tensor:
        if self.in_channels > 1 or x.device.type != "cpu" or not len(x):
            return super().forward(x)
        squares = pixel_unshuffle(pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2)), 2)
        weight = pad(self.weight, (0, 1, 0, 1)).reshape(-1, 3, 2, 3, 2).permute(0, 2, 4, 1, 3).reshape(-1, 4, 3, 3)
        return conv2d(channels_last(squares), weight, self.bias, padding=1)


class DoublingConv(nn.ConvTranspose2d):
    """A transposed 5x5 convolution of stride 2, from images of half the size, rounded up, to images of ``size``.

    At most four planes on a CPU: pixel 2 m + a, a = 0, 1, in each direction is

        y[2 m + a] = sum_d w[a + 2 - 2 d] x[m + d],  d = -1, 0, 1,  w[5] = 0,

    a 3x3 convolution to four planes for each, which ``pixel_shuffle`` interleaves. It took 0.3 to 0.5 times as long on
    two cores, and compiled with its gradient 0.6 to 0.8 times (1 to 4 planes of 28x28). Not measured on a GPU.
    """

    def __init__(self, width_in: int, width_out: int, *, size: tuple[int, int], bias: bool = True) -> None:
        extra = (1 - size[0] % 2, 1 - size[1] % 2)  # without it, ceil(n / 2) becomes 2 ceil(n / 2) - 1
        super().__init__(width_in, width_out, _KERNEL, 2, _PADDING, output_padding=extra, bias=bias)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        if output_size is not None or self.out_channels > 4 or x.device.type != "cpu":
            return super().forward(x, output_size)
        # g = (0, w[4], ..., w[0]) has g[j] = w[5 - j], so w[a + 2 - 2 d] = g[2 (d + 1) + (1 - a)].
        weight = pad(self.weight.flip(2, 3), (1, 0, 1, 0)).reshape(-1, self.out_channels, 3, 2, 3, 2).flip(3, 5)
        weight = weight.permute(1, 3, 5, 0, 2, 4).reshape(4 * self.out_channels, -1, 3, 3)
        bias = None if self.bias is None else self.bias.repeat_interleave(4)
        y = pixel_shuffle(conv2d(x, weight, bias, padding=1), 2)
        return y[..., : 2 * x.shape[-2] - 1 + self.output_padding[0], : 2 * x.shape[-1] - 1 + self.output_padding[1]]


class ResidualBlock(nn.Module):
    """x + W_2 * a(W_1 * a(x)), with 3x3 convolutions W; gated: x + u sigmoid(v), (u, v) = W_2 * a(W_1 * a(x)).

    (N, width, H, W) -> the same shape. There is no normalization: with statistics of a batch, an image's features would
    depend on the other images.

    Reference: He et al. 2016, arXiv 1603.05027, equation 4 (pre-activation); the gate as in ``networks.GatedMLP``.
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


class PixelOutput(nn.Module):
    """h = W * x + b: a transposed convolution to planes of pixels, flattened, with a bias b for every pixel.

    Training can then start from the marginal distribution of every pixel.
    """

    def __init__(self, width_in: int, planes: int, *, size: tuple[int, int]) -> None:
        super().__init__()
        self.up = DoublingConv(width_in, planes, size=size, bias=False)
        self.bias = nn.Parameter(torch.zeros(planes * size[0] * size[1]))

    def forward(self, x: Tensor) -> Tensor:
        """(N, width_in, H / 2, W / 2) -> (N, planes H W)."""
        return self.up(x).flatten(1) + self.bias


def channels_last(x: Tensor) -> Tensor:
    """The same images (N, C, H, W) with channels innermost in memory, for which convolutions on CPUs are fastest.

    Weights keep torch's layout: ``pyro.module`` would copy others, and plain SVI would train the copies.
    """
    return x.contiguous(memory_format=torch.channels_last)
