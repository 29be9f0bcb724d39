"""What the likelihoods fit their marginals to, each pixel's moments and levels over the images, and a way to fit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ppl_vae.data import NUM_LEVELS


def mean_logs(x: Tensor, *, chunk: int = 1000) -> tuple[Tensor, Tensor]:
    """mean_n log x_nd and mean_n log(1 - x_nd). x: (N, *E), strictly inside (0, 1) -> (prod(E),) and (prod(E),).

    Args:
        chunk: images whose logarithms are held at once.
    """
    parts = x.flatten(1).split(chunk)
    log_x = sum(part.log().sum(0, dtype=torch.double) for part in parts)
    log_rest = sum(torch.log1p(-part).sum(0, dtype=torch.double) for part in parts)
    return torch.as_tensor(log_x / len(x)), torch.as_tensor(log_rest / len(x))


def level_counts(x: Tensor, *, chunk: int = 1000) -> Tensor:
    """How many images have level v at pixel d. x: (N, *E), levels -> (prod(E), 256), float64.

    Args:
        chunk: images whose levels are held as indices at once.
    """
    x = x.flatten(1)
    D = x.shape[1]
    offset = NUM_LEVELS * torch.arange(D, device=x.device)
    counts = torch.zeros(D * NUM_LEVELS, dtype=torch.double, device=x.device)
    for part in x.split(chunk):
        counts += (part.long() + offset).flatten().bincount(minlength=D * NUM_LEVELS)
    return counts.reshape(D, NUM_LEVELS)


def median_and_deviation(x: Tensor, *, chunk: int = 64) -> tuple[Tensor, Tensor]:
    """median_n x_nd and mean_n |x_nd - median_n x_nd|. x: (N, *E) -> (prod(E),) and (prod(E),), float64.

    Args:
        chunk: pixels that are sorted at once.
    """
    medians, deviations = [], []
    for columns in x.flatten(1).split(chunk, dim=1):
        part = columns.T.contiguous()
        medians.append(part.median(dim=1, keepdim=True).values)
        deviations.append(part.sub(medians[-1]).abs().mean(1, dtype=torch.double))
    return torch.cat(medians).flatten().double(), torch.cat(deviations)


@torch.enable_grad()
def ascend(log_p: Callable[[Tensor], Tensor], start: Tensor, *, steps: int = 60, rate: float = 0.3) -> Tensor:
    """A maximum of log_p near ``start`` for each pixel, where no formula gives it. Adam's steps, a cosine of them.

    Args:
        log_p: (F, D) features of D pixels -> (D,) nats, those of a pixel by its own features alone.
        start: (F, D).

    Returns:
        (F, D), without gradients; a pixel that is not better for it keeps its start.
    """
    h = start.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([h], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        (-log_p(h).sum()).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return torch.where(log_p(h) > log_p(start), h, start).detach()
