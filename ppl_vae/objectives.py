"""Objectives: (model, guide, x) -> loss, nats an image. What changes only training is here, never in the programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Independent
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.scale_messenger import ScaleMessenger
from torch import Tensor
from torch.distributions import kl_divergence

from ppl_vae.capture import CannotCapture, is_capturing
from ppl_vae.weights import Program, is_deterministic, latent_sites


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
    programs = Temper(beta)(model), Temper(beta)(guide)
    if is_capturing():
        return _loss_of_traces(bound, *programs, x) / len(x)
    return bound.differentiable_loss(*programs, x) / len(x)


def _loss_of_traces(bound: ELBO, model: Program, guide: Program, x: Tensor) -> Tensor:
    """What ``bound.differentiable_loss`` returns, from the same two traces, without reading a number on the way.

    Pyro's losses read one of every site, which no graph can hold; and they add the score-function terms of sites that
    are not reparametrized, which are refused here.
    """
    if type(bound) not in (Trace_ELBO, TraceMeanField_ELBO):
        raise CannotCapture(f"estimator: expected Trace_ELBO or TraceMeanField_ELBO, got {type(bound).__name__}")
    analytic = isinstance(bound, TraceMeanField_ELBO)
    total = torch.zeros((), dtype=x.dtype, device=x.device)
    for p, q in bound._get_traces(model, guide, (x,), {}):
        for name, site in [*p.nodes.items(), *q.nodes.items()]:
            if site["type"] == "param":
                raise CannotCapture(f"pyro.param {name!r}: parameters belong to modules")
        for name, site in q.nodes.items():
            if site["type"] == "sample" and not site["is_observed"] and not site["fn"].has_rsample:
                raise CannotCapture(f"site {name!r}: {type(site['fn']).__name__} is not reparametrized")
        total = total + _elbo_of_traces(p, q, analytic=analytic)
    return -total / bound.num_particles


def _elbo_of_traces(p: Trace, q: Trace, *, analytic: bool) -> Tensor:
    """Sum over sites of log p - log q, or of log p of observed sites and minus the KL of latent ones."""
    sites = {name: site for name, site in p.nodes.items() if site["type"] == "sample"}
    proposed = {name: site for name, site in q.nodes.items() if site["type"] == "sample"}
    terms = []
    for name, site in sites.items():
        kl = _kl(proposed[name], site) if analytic and name in proposed and not site["is_observed"] else None
        if kl is not None:
            terms.append(-kl)
            del proposed[name]
        else:
            terms.append(site["log_prob_sum"])
    terms += [-site["score_parts"].entropy_term.sum() for site in proposed.values()]
    return torch.stack([torch.as_tensor(term) for term in terms]).sum()


def _kl(q: dict[str, Any], p: dict[str, Any]) -> Tensor | None:
    """KL(q || p), scaled and masked as the guide's site is; None where no formula is registered."""
    try:
        kl = kl_divergence(q["fn"], p["fn"])
    except NotImplementedError:
        return None
    return scale_and_mask(kl, scale=q["scale"], mask=q["mask"]).sum()


def free_bits(
    model: Program,
    guide: Program,
    x: Tensor,
    *,
    beta: float | Tensor = 1.0,
    free_nats: float,
    num_particles: int = 1,
) -> Tensor:
    """-(E_q[log p(x | z)] - beta sum_l max(lambda, KL_l)), KL_l = mean_n KL(q(z_l | x_n) || p(z_l)) over the batch.

    A latent whose mean KL is below lambda is not pushed further down, so that it is not lost early in training. What
    it learns to carry costs nothing until then. lambda = 0 at beta = 1 is the ELBO with its KL in closed form. At
    beta >= 1 minus the loss is a lower bound on the mean log p(x) that is never tighter than the ELBO, as max(lambda,
    KL_l) >= KL_l; only beta < 1 can break the bound. Reports never use it.

    Args:
        model, guide: Pyro programs over x with one data plate at dim=-1; every latent site is a vector (L,) of
            independent latents whose KL is known in closed form, like that of two normals.
        x: images (B, *E).
        beta: the weight of the KL, a number or a 0-d tensor.
        free_nats: lambda, nats a latent.
        num_particles: draws of z an image.

    Returns:
        A 0-d tensor to minimize, nats an image.

    Raises:
        ValueError: a guide with a site whose latents are not independent, not reparametrized, deterministic, or without
            such a KL.

    Reference: Kingma et al. 2016, arXiv 1606.04934, equation 15, with each latent a group of its own.
    """
    particles = pyro.plate("_particles", num_particles, dim=-2)
    q = poutine.trace(particles(guide)).get_trace(x)
    p = poutine.trace(poutine.replay(particles(model), trace=q)).get_trace(x)
    p.compute_log_prob(lambda name, site: site["is_observed"])
    reconstruction = torch.stack([p.nodes[name]["log_prob_sum"] for name in p.observation_nodes]).sum()
    kl = torch.stack([_free_kl(name, q, p, free_nats) for name in latent_sites(p)]).sum()
    return -(reconstruction / (num_particles * len(x)) - beta * kl)


def _free_kl(name: str, q: Trace, p: Trace, free_nats: float) -> Tensor:
    """sum_l max(lambda, mean_n KL(q(z_l | x_n) || p(z_l))) of one site."""
    proposed, prior = q.nodes[name], p.nodes[name]["fn"]
    posterior = proposed["fn"]
    if is_deterministic(posterior):
        raise ValueError(f"site {name!r}: expected a guide with a density, got a deterministic one (Delta)")
    if not posterior.has_rsample:
        raise ValueError(f"site {name!r}: expected a reparametrized guide, got {type(posterior).__name__}")
    factors = [fn.base_dist if isinstance(fn, Independent) else fn for fn in (posterior, prior)]
    try:
        kl = kl_divergence(*factors)  # (S, B, L)
    except NotImplementedError:
        kl = None
    if kl is None or kl.shape != proposed["value"].shape:
        words = " and ".join(type(fn).__name__ for fn in factors)
        raise ValueError(f"site {name!r}: expected independent latents whose KL has a formula, got {words}")
    kl = scale_and_mask(kl.movedim(-1, 0), scale=proposed["scale"], mask=proposed["mask"])
    return kl.flatten(1).mean(1).clamp(min=free_nats).sum()


def autocast(objective: Callable[..., Tensor], dtype: torch.dtype) -> Callable[..., Tensor]:
    """The objective with matrix products and convolutions in a narrower type: its gradients are rounded, too.

    Distributions stay in the type of the data (see ``Conditional``). Only training sees it.
    """

    def narrowed(model: Program, guide: Program, x: Tensor, *, beta: float | Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=dtype):
            return objective(model, guide, x, beta=beta)

    return narrowed
