"""log w = log p(x, z) - log q(z | x), from which every reported number is computed."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppl_vae.enumeration import Dims, check_enumeration, enumerate_sites, enumerated_dims, is_enumerated, sum_out
from ppl_vae.protocols import StochasticFunction
from ppl_vae.runtime.errors import check_count
from ppl_vae.runtime.global_state import serialize_threads
from ppl_vae.runtime.records import Data, arguments_of
from ppl_vae.support import check_support, explain_program, trial_run
from ppl_vae.vae import NO_AUTOGUIDE

NO_DIMS: Dims = {}
_PARTICLES = "_importance_particles"  # the name of a plate


class DeterministicGuide(ValueError):
    """The guide is deterministic, and the result needs a density q(z | x)."""


def site_log_prob(name: str, site: dict[str, Any], shape: tuple[int, int], dims: Dims = NO_DIMS) -> Tensor:
    """The log-density of a site, (*K, S, B) nats; ``dims`` as ``enumerated_dims``. Masks apply, scales do not.

    Raises:
        ValueError: The site is not in the images' plate, or does not have one number per particle and image.
    """
    check_plates(name, site, shape[1])
    _check_value_shape(name, site)
    log_prob = scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"])
    extra = log_prob.shape[:-2]
    known = all(size in (1, dims.get(i - len(extra) - 2)) for i, size in enumerate(extra)) and (dims or not extra)
    if tuple(log_prob.shape[-2:]) != shape or not known:
        raise ValueError(
            f"site {name!r}: expected one log-probability per particle and image, {shape}, got "
            f"{tuple(log_prob.shape)}; every site belongs in the images' plate at dim=-1, with all other dimensions in "
            "its event (to_event)"
        )
    return log_prob


def check_plates(name: str, site: dict[str, Any], num_images: int) -> None:
    """Raise ValueError unless the plate of all images of the batch is the only one around a site."""
    plates = {frame.name: frame for frame in site["cond_indep_stack"] if frame.name != _PARTICLES}
    images = [plate for plate in plates.values() if plate.dim == -1]
    # Checked by the plate and not by the shape alone, which one image would satisfy.
    if not any(plate.size == num_images for plate in images):
        other = images[0] if images else None
        got = "" if other is None else f", got the plate {other.name!r} of size {other.size}"
        raise ValueError(
            f"site {name!r}: expected it in the images' plate, of size {num_images} at dim=-1{got}; write "
            'pyro.plate("images", len(x), dim=-1) around every site, and leave batches to fit'
        )
    others = [plate.name for plate in plates.values() if plate.dim != -1]
    if others:
        raise ValueError(
            f"site {name!r}: expected the images' plate alone, got the plate {others[0]!r} too; make its dimension "
            "part of the distribution's event (to_event)"
        )


def _check_value_shape(name: str, site: dict[str, Any]) -> None:
    """Refuse a value that the density would broadcast: each of its numbers would be counted several times.

    Values (36, 1) under a distribution of event shape (1, 36) have a log-probability of 36 x 36 numbers. A parameter
    that all numbers of a value share is no such case.
    """
    event = tuple(site["fn"].event_shape)
    value = tuple(site["value"].shape)[-len(event) :] if event else ()
    fits = value == event or (  # the event may be broadcast to the value, and not the value to it
        len(value) == len(event) and all(size in (1, given) for size, given in zip(event, value, strict=True))
    )
    if not fits:
        raise ValueError(
            f"site {name!r}: expected values of the event shape {event} of its distribution, got {value}, which would "
            "be broadcast or fits nowhere; reshape one of them"
        )


def _log_densities(trace: poutine.Trace, names: list[str], shape: tuple[int, int], dims: Dims) -> list[Tensor]:
    """The log-densities of these sites, (*K, S, B), nats."""
    return [site_log_prob(name, trace.nodes[name], shape, dims) for name in names]


def observed_sites(trace: poutine.Trace) -> list[str]:
    """The names of observed sites and factors; a pyro.deterministic site has no density and is left out."""
    return [name for name in trace.observation_nodes if not trace.nodes[name]["infer"].get("_deterministic")]


def is_deterministic(distribution: object) -> bool:
    """Whether a distribution is a point mass (Delta), possibly wrapped. It has no density."""
    while hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    return isinstance(distribution, dist.Delta)


def latent_sites(trace: poutine.Trace) -> list[str]:
    """The names of a trace's sampled sites in alphabetical order, without those of plates."""
    return sorted(name for name in trace.stochastic_nodes if not site_is_subsample(trace.nodes[name]))


def sampled_sites(trace: poutine.Trace) -> list[str]:
    """The names of ``latent_sites`` without those that are enumerated."""
    return [name for name in latent_sites(trace) if not is_enumerated(trace.nodes[name])]


@serialize_threads()
def is_autoencoder(guide: StochasticFunction, x: Data) -> bool:
    """Whether the guide is deterministic at a latent site. Then there are reconstructions, but no log-weights.

    The guide runs once, on the first image, and draws from torch's global generator. x: (B, *E).
    """
    trace = poutine.trace(guide).get_trace(*arguments_of(x[:1]))
    return any(is_deterministic(trace.nodes[name]["fn"]) for name in latent_sites(trace))


@serialize_threads()
def log_reconstruction(model: StochasticFunction, guide: StochasticFunction, x: Data) -> Tensor:
    """log p(x | z) for one z ~ q(z | x) per image. It needs no density of the guide, and is no bound.

    Args: As ``log_weight_terms``.

    Returns:
        (B,) nats.

    Raises:
        ValueError: As ``log_weight_terms``, except that the guide may be deterministic.
    """
    p, _ = trace_programs(model, guide, x, 1)
    if enumerated_dims(p):
        raise ValueError("model: expected no enumerated sites beside a deterministic guide, got some")
    return _sum(_log_densities(p, observed_sites(p), (1, len(x)), NO_DIMS), (1, len(x)), x.device)[0]


@serialize_threads()
def log_weight_terms(
    model: StochasticFunction, guide: StochasticFunction, x: Data, num_particles: int
) -> tuple[Tensor, Tensor]:
    """Compute log p(x | z) and log p(z) - log q(z | x), for z ~ q(z | x); their sum is log w.

    Sites marked infer={"enumerate": "parallel"} are summed exactly. For one of the model, p(x, z) is sum_y p(x, y, z).
    For one of the guide, z_y is drawn for every y, and w = sum_y p(x, y, z_y) / q(z_y | x, y), without q(y | x).

    ``poutine.scale`` and the subsampling scale of a plate are ignored: log-weights belong to the bare programs.

    Args:
        model: A Pyro program over x with one data plate at dim=-1.
        guide: A Pyro program over x that samples every latent site of the model.
        x: Images (B, *E), or ``Records``.
        num_particles: S.

    Returns:
        Two tensors (S, B), nats.

    Raises:
        ValueError: A latent site of one program is missing in the other; a site does not give one number per image in
            the images' plate; or the guide has observed sites or factors.
        DeterministicGuide: A ValueError: the guide is deterministic at a latent site.
    """
    p, q = trace_programs(model, guide, x, num_particles)
    dims, shape = enumerated_dims(p), (num_particles, len(x))
    check_densities(q)
    log_p_x = _log_densities(p, observed_sites(p), shape, dims)
    log_p_z = _log_densities(p, latent_sites(p), shape, dims)
    log_q_z = _log_densities(q, sampled_sites(q), shape, dims)
    if not dims:
        log_p_z_over_q_z = _sum(log_p_z, shape, x.device) - _sum(log_q_z, shape, x.device)
        return _sum(log_p_x, shape, x.device), log_p_z_over_q_z
    ratios = [*log_p_z, *(-term for term in log_q_z)]
    log_p_z_over_q_z = sum_out(ratios, dims).expand(shape)
    return sum_out([*log_p_x, *ratios], dims) - log_p_z_over_q_z, log_p_z_over_q_z


def _sum(terms: list[Tensor], shape: tuple[int, int], device: torch.device) -> Tensor:
    return sum(terms, torch.zeros(shape, device=device))


def trace_programs(
    model: StochasticFunction, guide: StochasticFunction, x: Data, num_particles: int
) -> tuple[poutine.Trace, poutine.Trace]:
    """Run the guide, and the model on the same draws, with S particles of every image x, (B, *E).

    Returns:
        The model's trace and the guide's, whose sites have the batch shape (*K, S, B): K for each enumerated site.

    Raises:
        ValueError: As ``check_sites``.
    """
    q = trace_guide(guide, x, num_particles)
    enumerated = enumerate_sites(particle_plate(num_particles)(model), after=True)
    p = _get_trace(poutine.replay(enumerated, trace=q), x)
    check_sites(p, q)
    return p, q


def trace_guide(guide: StochasticFunction, x: Data, num_particles: int) -> poutine.Trace:
    """Run the guide alone with S particles of every image x, (B, *E); its sites have the batch shape (S, B)."""
    return _get_trace(enumerate_sites(particle_plate(check_count("num_particles", num_particles))(guide)), x)


def particle_plate(num_particles: int) -> pyro.plate:
    """The plate of particles, to the left of the images' plate."""
    return pyro.plate(_PARTICLES, num_particles, dim=-2)


def _get_trace(program: StochasticFunction, x: Data) -> poutine.Trace:
    """The trace of a program within a plate of particles; another plate at that dimension raises ValueError."""
    with explain_program():
        return poutine.trace(program).get_trace(*arguments_of(x))


@serialize_threads()
def count_branches(model: StochasticFunction, guide: StochasticFunction, x: Data) -> int:
    """The number of joint values of all enumerated sites, the most that a particle's tensors hold; 1 without any.

    The programs run once, on the first image of x, (B, *E), and no random numbers are consumed.
    """
    with trial_run(x.device, model, guide):
        p, _ = trace_programs(model, guide, x[:1], 1)
    return math.prod(enumerated_dims(p).values())


def check_sites(p: poutine.Trace, q: poutine.Trace) -> None:
    """Check that the model's and the guide's trace have the same latent sites, and the guide no observed ones.

    Raises:
        ValueError: They have not.
    """
    proposed = latent_sites(q)
    latents = [name for name in latent_sites(p) if name in proposed or not is_enumerated(p.nodes[name])]
    if any(q.nodes[name]["infer"].get("is_auxiliary") for name in proposed):
        raise ValueError(f"guide: expected the model's latent sites {latents}, got {proposed}; {NO_AUTOGUIDE}")
    if latents != proposed:
        raise ValueError(
            f"guide: expected the model's latent sites {latents}, got {proposed}; "
            "a latent site of only one of them would leave its density out of the weight; a discrete site of the model "
            "is summed with infer={'enumerate': 'parallel'}"
        )
    check_enumeration(p)
    check_enumeration(q)
    stray = observed_sites(q)
    if stray:
        raise ValueError(f"guide: expected sampled sites only, got observed sites or factors {stray}")


def check_densities(q: poutine.Trace) -> None:
    """Raise DeterministicGuide unless every latent site of the guide has a density."""
    for name in latent_sites(q):
        if is_deterministic(q.nodes[name]["fn"]):
            raise DeterministicGuide(
                f"guide: expected a density at site {name!r}, got a deterministic one (Delta): an autoencoder has "
                "reconstructions, and neither an ELBO nor a log-likelihood"
            )


@serialize_threads()
def log_weights(model: StochasticFunction, guide: StochasticFunction, x: Data, num_particles: int) -> Tensor:
    """log w_s = log p(x, z_s) - log q(z_s | x), for z_s ~ q(z | x), s = 1..S.

    Every call draws anew from torch's global generator. The encoder runs once per image, not once per particle.

    Args: As ``log_weight_terms``.

    Returns:
        (S, B) nats, one row per particle.

    Raises:
        ValueError: As ``log_weight_terms``, and for an image off the support.

    Reference: Burda et al. 2016, arXiv 1509.00519, equation 8.
    """
    check_support(model, x)
    log_p_x_given_z, log_p_z_over_q_z = log_weight_terms(model, guide, x, num_particles)
    return log_p_x_given_z + log_p_z_over_q_z
