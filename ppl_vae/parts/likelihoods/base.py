"""What likelihoods share: features of pixels, independent pixels, one-pixel distributions, and fits of marginals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints
from torch.distributions.utils import broadcast_all

from ppl_vae.data import NUM_LEVELS
from ppl_vae.runtime.capture import is_capturing

_LARGEST_SHARE = 0.98  # of a limit, up to which a fit may go: the map's slope there is still 0.04


def planes(h: Tensor, num: int, event_shape: Sequence[int]) -> tuple[Tensor, ...]:
    """h: (..., num prod(E)) -> num tensors (..., *E): the first feature of every pixel, then the second, and so on.

    This is the order of a convolutional decoder's planes.
    """
    # Not unbind: its gradient is a stack, which interleaves the planes once compiled and slows down the decoder.
    return tuple(plane.unflatten(-1, tuple(event_shape)) for plane in h.chunk(num, dim=-1))


def unbounded(value: Tensor, limit: float) -> Tensor:
    """The inverse of ``numerics.bounded``, for values of any shape, clamped to 0.98 of the limit."""
    return limit * (value / limit).clamp(-_LARGEST_SHARE, _LARGEST_SHARE).atanh()


def independent_pixels(p_x: dist.TorchDistribution, because: str) -> dist.Independent:
    """Return p(x | z). Raises ValueError, with the words ``because``, unless pixels are independent given z."""
    if not isinstance(p_x, dist.Independent) or p_x.base_dist.event_shape:
        raise ValueError(
            f"likelihood: expected pixels that are independent given z (Independent over the whole image), got "
            f"{type(p_x).__name__} with event shape {tuple(p_x.event_shape)}; {because}"
        )
    return p_x


def mask_missing(p_x: dist.TorchDistribution, x: Tensor) -> dist.Independent:
    """p(x_observed | z): p(x | z) without the densities of pixels that are NaN in x, (B, *E).

    Raises ValueError unless pixels are independent given z.
    """
    p_x = independent_pixels(p_x, "missing pixels cannot be left out")
    # Without an observed pixel there may be no value to evaluate.
    mask: Tensor | bool = ~x.isnan() if is_capturing() or not x.isnan().all() else False
    return p_x.base_dist.mask(mask).to_event(p_x.reinterpreted_batch_ndims)


class Pixels(nn.Module):
    """p(x | h) = prod_d p(x_d; h_d), abstract: pixels that are independent given h.

    A subclass sets ``features_per_pixel``, F, and the attributes that the package's docstring names. Its ``pixel`` maps
    F features, each (..., *E), to the distribution of all pixels with batch shape (..., *E).

    Args:
        event_shape: E, the shape of an image.
    """

    features_per_pixel = 1
    floats_per_pixel = 6
    pixel: Callable[..., dist.TorchDistribution]
    fit_marginals: Callable[[Tensor], Tensor]

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__()
        self.event_shape = tuple(event_shape)
        self.num_features = self.features_per_pixel * math.prod(self.event_shape)

    def forward(self, h: Tensor) -> dist.Independent:
        """h: (..., F prod(E)), the first feature of all pixels, then the second -> batch shape (...), event shape E."""
        return self.pixel(*planes(h, self.features_per_pixel, self.event_shape)).to_event(len(self.event_shape))


class Pixel(dist.TorchDistribution):
    """A distribution of one pixel, abstract: parameters of one common shape, the batch's, and an empty event shape.

    A subclass has ``support``, ``mean``, ``sample`` and ``log_prob``, and names its parameters in
    ``arg_constraints``, in the order of its constructor.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012, the name and type that torch asks for

    def __init__(self, *parameters: Tensor) -> None:
        for name, value in zip(self.arg_constraints, broadcast_all(*parameters), strict=True):
            setattr(self, name, value)
        super().__init__(getattr(self, next(iter(self.arg_constraints))).shape)

    def expand(self, batch_shape: Sequence[int], _instance: Distribution | None = None) -> Pixel:
        new = type(self)(*(getattr(self, name).expand(torch.Size(batch_shape)) for name in self.arg_constraints))
        new._validate_args = self._validate_args
        return new

    def uniform(self, sample_shape: Sequence[int]) -> Tensor:
        """u ~ Uniform[0, 1) for each pixel of each sample, (*sample_shape, *batch_shape), from torch's generator."""
        some = getattr(self, next(iter(self.arg_constraints)))
        return torch.rand(self.shape(torch.Size(sample_shape)), dtype=some.dtype, device=some.device)


# --- Marginals: each pixel's statistics over the images, and a fit ---


def mean_logs(x: Tensor) -> tuple[Tensor, Tensor]:
    """mean_n log x_nd and mean_n log(1 - x_nd). x: (N, *E), strictly inside (0, 1) -> (prod(E),) and (prod(E),)."""
    parts = x.flatten(1).split(1000)
    log_x = sum(part.log().sum(0, dtype=torch.double) for part in parts)
    log_rest = sum(torch.log1p(-part).sum(0, dtype=torch.double) for part in parts)
    return torch.as_tensor(log_x / len(x)), torch.as_tensor(log_rest / len(x))


def level_counts(x: Tensor) -> Tensor:
    """How many images have level v at pixel d. x: (N, *E), levels -> (prod(E), 256), float64."""
    x = x.flatten(1)
    D = x.shape[1]
    offset = NUM_LEVELS * torch.arange(D, device=x.device)
    counts = torch.zeros(D * NUM_LEVELS, dtype=torch.double, device=x.device)
    for part in x.split(1000):
        counts += (part.long() + offset).flatten().bincount(minlength=D * NUM_LEVELS)
    return counts.reshape(D, NUM_LEVELS)


def median_and_deviation(x: Tensor) -> tuple[Tensor, Tensor]:
    """median_n x_nd and mean_n |x_nd - median_n x_nd|. x: (N, *E) -> (prod(E),) and (prod(E),), float64."""
    medians, deviations = [], []
    for columns in x.flatten(1).split(64, dim=1):
        part = columns.T.contiguous()
        medians.append(part.median(dim=1, keepdim=True).values)
        deviations.append(part.sub(medians[-1]).abs().mean(1, dtype=torch.double))
    return torch.cat(medians).flatten().double(), torch.cat(deviations)


@torch.enable_grad()
def ascend(log_p: Callable[[Tensor], Tensor], start: Tensor, *, steps: int = 60) -> Tensor:
    """A maximum of log_p near ``start`` for each pixel, (F, D), without gradients, by Adam with a cosine schedule.

    log_p maps features (F, D) of D pixels to (D,) nats, those of a pixel by its own features alone. A pixel that is not
    better for it keeps its start.
    """
    h = start.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([h], lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        (-log_p(h).sum()).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return torch.where(log_p(h) > log_p(start), h, start).detach()
