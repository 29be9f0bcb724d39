"""log w = log p(x, z) - log q(z | x): the one quantity of which every reported number is a functional."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppl_vae.runtime.errors import check_count
from ppl_vae.runtime.global_state import serialize_threads
from ppl_vae.support import check_support
from ppl_vae.vae import NO_AUTOGUIDE

Program = Callable[[Tensor], Any]


class Deterministic(ValueError):
    """A deterministic guide was asked for what only a density has."""


def _log_prob(name: str, site: dict[str, Any], shape: tuple[int, int]) -> Tensor:
    """(S, B): the site's log-density as its distribution gives it, masked where a mask says so, never scaled."""
    if not any(frame.dim == -1 and frame.size == shape[1] for frame in site["cond_indep_stack"]):
        # Checked by the plate and not by the shape alone, which one image would satisfy.
        raise ValueError(f"site {name!r}: expected it in the images' plate, of size {shape[1]} at dim=-1")
    _check_value_shape(name, site)
    log_prob = scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"])
    if tuple(log_prob.shape) != shape:
        raise ValueError(
            f"site {name!r}: expected one log-probability a particle and image, {shape}, got {tuple(log_prob.shape)}; "
            "every site belongs in the images' plate at dim=-1, with all other dimensions in its event (to_event)"
        )
    return log_prob


def _check_value_shape(name: str, site: dict[str, Any]) -> None:
    """Refuse a value that the density would broadcast: each of its numbers would be counted several times.

    Values (36, 1) under a distribution of event shape (1, 36) have a log-probability of 36 x 36 numbers. A parameter
    that all numbers of a value share is no such case.
    """
    event = tuple(site["fn"].event_shape)
    value = tuple(site["value"].shape)[-len(event) :] if event else ()
    if value != event and tuple(torch.broadcast_shapes(value, event)) != value:
        raise ValueError(
            f"site {name!r}: expected values of the event shape {event} of its distribution, got {value}, which would "
            "be broadcast; reshape one of them"
        )


def _log_joint(trace: poutine.Trace, names: list[str], shape: tuple[int, int], device: torch.device) -> Tensor:
    """(S, B): the sum over these sites."""
    zero = torch.zeros(shape, device=device)
    return sum((_log_prob(name, trace.nodes[name], shape) for name in names), zero)


def _observed_sites(trace: poutine.Trace) -> list[str]:
    """The names of observed sites and factors; a pyro.deterministic site has no density and is none."""
    return [name for name in trace.observation_nodes if not trace.nodes[name]["infer"].get("_deterministic")]


def is_deterministic(distribution: Any) -> bool:
    """A point mass (Delta), whatever it is wrapped in: it has no density that a log-weight could hold."""
    while hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    return isinstance(distribution, dist.Delta)


def latent_sites(trace: poutine.Trace) -> list[str]:
    """The names of a trace's sampled sites in alphabetical order; a plate's own site is none."""
    return sorted(name for name in trace.stochastic_nodes if not site_is_subsample(trace.nodes[name]))


@serialize_threads()
def is_autoencoder(guide: Program, x: Tensor) -> bool:
    """The guide is deterministic at a latent site: there are reconstructions, and no log-weights.

    The guide runs once, on the first image, and draws from torch's global generator. x: (B, *E).
    """
    trace = poutine.trace(guide).get_trace(x[:1])
    return any(is_deterministic(trace.nodes[name]["fn"]) for name in latent_sites(trace))


@serialize_threads()
def log_reconstruction(model: Program, guide: Program, x: Tensor) -> Tensor:
    """log p(x | z) for one z ~ q(z | x) an image. It needs no density of the guide, and bounds nothing.

    Arguments as ``log_weight_terms``.

    Returns:
        (B,) nats.

    Raises:
        ValueError: as ``log_weight_terms``, but for what is deterministic.
    """
    _, p, _ = _traces(model, guide, x, 1)
    return _log_joint(p, _observed_sites(p), (1, len(x)), x.device)[0]


@serialize_threads()
def log_weight_terms(
    model: Program,
    guide: Program,
    x: Tensor,
    num_particles: int,
    *,
    held: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[Tensor, Tensor]:
    """log p(x | z) and log p(z) - log q(z | x), for z ~ q(z | x); their sum is log w.

    ``poutine.scale`` and a plate's subsampling scale do not enter: a log-weight is that of the bare programs.

    Args:
        model: a Pyro program over x with one data plate at dim=-1.
        guide: a Pyro program over x that samples every latent site of the model.
        x: images (B, *E).
        num_particles: S.
        held: what the guide runs in and its density is taken in, which is later and may ask for parameters again.

    Returns:
        Two tensors (S, B), nats.

    Raises:
        ValueError: where a latent site of one program is missing in the other, a site is not one number an image in
            the images' plate, or the guide observes or holds a factor.
        Deterministic: a ValueError: the guide is deterministic at a latent site.
    """

    def guide_held(x: Tensor) -> Any:
        with held():
            return guide(x)

    q, p, latents = _traces(model, guide_held, x, num_particles)
    for name in latents:
        if is_deterministic(q.nodes[name]["fn"]):
            raise Deterministic(
                f"guide: expected a density at site {name!r}, got a deterministic one (Delta): an autoencoder has "
                "reconstructions, and neither an ELBO nor a log-likelihood"
            )
    shape = (num_particles, len(x))
    log_p_x_given_z = _log_joint(p, _observed_sites(p), shape, x.device)
    log_p_z = _log_joint(p, latents, shape, x.device)
    with held():
        log_q_z = _log_joint(q, latents, shape, x.device)
    return log_p_x_given_z, log_p_z - log_q_z


def _traces(
    model: Program, guide: Program, x: Tensor, num_particles: int
) -> tuple[poutine.Trace, poutine.Trace, list[str]]:
    """The guide's trace, the model's on the same draws, and the latent sites that both have."""
    num_particles = check_count("num_particles", num_particles)
    particles = pyro.plate("_importance_particles", num_particles, dim=-2)
    q = poutine.trace(particles(guide)).get_trace(x)
    p = poutine.trace(poutine.replay(particles(model), trace=q)).get_trace(x)
    latents, proposed = latent_sites(p), latent_sites(q)
    if any(q.nodes[name]["infer"].get("is_auxiliary") for name in proposed):
        raise ValueError(f"guide: expected the model's latent sites {latents}, got {proposed}; {NO_AUTOGUIDE}")
    if latents != proposed:
        raise ValueError(
            f"guide: expected the model's latent sites {latents}, got {proposed}; "
            "a latent site of only one of them would leave its density out of the weight"
        )
    stray = _observed_sites(q)
    if stray:
        raise ValueError(f"guide: expected sampled sites only, got observed sites or factors {stray}")
    return q, p, latents


@serialize_threads()
def log_weights(model: Program, guide: Program, x: Tensor, num_particles: int) -> Tensor:
    """log w_s = log p(x, z_s) - log q(z_s | x), for z_s ~ q(z | x), s = 1..S.

    Fresh draws from torch's global generator at every call. The encoder runs once an image, never once a particle.

    Args: as ``log_weight_terms``, whose errors are these too; and an image off the support is a ValueError.

    Returns:
        (S, B) nats, one row a particle.

    Reference: Burda et al. 2016, arXiv 1509.00519, equation 8.
    """
    check_support(model, x)
    log_p_x_given_z, log_p_z_over_q_z = log_weight_terms(model, guide, x, num_particles)
    return log_p_x_given_z + log_p_z_over_q_z
