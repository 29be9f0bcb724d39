"""Objectives: (model, guide, x) -> loss, nats an image. What changes only training is here, never in the programs."""

from __future__ import annotations

from typing import Any

from pyro.infer import ELBO, Trace_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.scale_messenger import ScaleMessenger
from torch import Tensor

from ppl_vae.weights import Program


class Temper(ScaleMessenger):
    """``poutine.scale``'s messenger, narrowed to the latent sites: scales log p(z) and log q(z | x) by beta.

    It goes around model *and* guide: with only one of them, a sampled KL is not scaled as a whole and an analytic one
    not at all.

    Args:
        beta: a number or a 0-d tensor, at least 0. ``poutine.scale`` refuses 0, from which a warm-up starts; here it
            is the weight of a KL and means what it says.
    """

    def __init__(self, beta: float | Tensor) -> None:
        Messenger.__init__(self)  # not ScaleMessenger's own, which raises for a scale of 0
        self.scale = beta

    def _process_message(self, msg: Any) -> None:
        if msg["type"] == "sample" and not msg["is_observed"]:
            super()._process_message(msg)


def elbo(
    model: Program,
    guide: Program,
    x: Tensor,
    *,
    beta: float | Tensor = 1.0,
    estimator: type[ELBO] = Trace_ELBO,
    num_particles: int = 1,
) -> Tensor:
    """-(E_q[log p(x | z)] - beta KL(q(z | x) || p(z))) an image: Pyro's ELBO between two tempered programs.

    It is minus an ELBO only at beta = 1. Above 1 it is beta-VAE's objective, and from 0 rising a warm-up.

    Args:
        model, guide: Pyro programs over x with one data plate at dim=-1.
        x: images (B, *E).
        beta: the weight of the KL, a number or a 0-d tensor, 0 included.
        estimator: Pyro's ``Trace_ELBO`` samples the KL. ``TraceMeanField_ELBO`` takes it in closed form, and falls back
            to sampling, without a word, where none is registered for the pair of distributions.
        num_particles: draws of z an image.

    Returns:
        A 0-d tensor to minimize, nats an image (the mean over the batch; pixels are summed). A plate of the user's
        that subsamples, of size N, multiplies it by N / B.

    Reference: Higgins et al. 2017 (beta-VAE), equation 4; Sønderby et al. 2016 (warm-up), arXiv 1602.02282.
    """
    # The nesting is given: to guess it, Pyro would run the guide once more, and exact resuming would be lost.
    bound = estimator(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)
    return bound.differentiable_loss(Temper(beta)(model), Temper(beta)(guide), x) / len(x)
