"""Objectives from log-weights: the importance-weighted bound, and gradients that lose their noise near the optimum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from ppl_vae.protocols import StochasticFunction
from ppl_vae.runtime.capture import replace_tensors
from ppl_vae.runtime.errors import check_count
from ppl_vae.runtime.global_state import serialize_threads
from ppl_vae.runtime.numerics import log_mean_exp
from ppl_vae.weights import latent_sites, log_weight_terms


@serialize_threads()
def iwae(
    model: StochasticFunction,
    guide: StochasticFunction,
    x: Tensor,
    *,
    beta: float | Tensor = 1.0,
    num_particles: int,
) -> Tensor:
    """-(1/B) sum_b log (1/S) sum_s w_s, log w_s = log p(x | z_s) + beta (log p(z_s) - log q(z_s | x)), z_s ~ q(z | x).

    At beta = 1 this is minus the importance-weighted bound, L_S <= log p(x), whose expectation does not fall with S;
    S = 1 is the ELBO with a sampled KL.

    Args:
        model, guide: Pyro programs over x with one data plate at dim=-1, and the same latent sites.
        x: Images (B, *E).
        beta: The weight of the latent sites' log-densities, a number or a 0-d tensor, 0 included.
        num_particles: S, draws of z per image.

    Returns:
        A 0-d tensor to minimize, nats per image. Log-weights belong to the bare programs: a scale that the user puts
        around a site, or the subsampling scale of a plate, is ignored.

    Raises:
        ValueError: A latent site of the guide is not reparametrized; or as ``log_weight_terms``.

    Reference: Burda et al. 2016, arXiv 1509.00519, equation 8.
    """
    traced = poutine.trace(guide)
    log_w = _log_weights(model, traced, x, beta, num_particles)
    _check_reparametrized(traced.trace)
    return -log_mean_exp(log_w).mean()


@serialize_threads()
def dreg(
    model: StochasticFunction,
    guide: StochasticFunction,
    x: Tensor,
    *,
    beta: float | Tensor = 1.0,
    num_particles: int,
) -> Tensor:
    """The value of ``iwae``; the guide's gradient is sum_s v_s^2 (d log w_s / d z_s) (d z_s / d phi), v = w / sum w.

    It has the expectation of ``iwae``'s gradient, and its noise vanishes as the guide nears the exact posterior, where
    log w no longer depends on z. phi are all parameters with which z is drawn. How q's density changes with its
    parameters at a fixed z, a score, is left out; v_s^2 instead of v_s makes up for it. The model's gradient is that of
    ``iwae``, sum_s v_s d log w_s, also for parameters of the guide that the prior uses too.

    At another beta the score has the weight beta, and v_s^2 becomes (1 - beta) v_s + beta v_s^2 (ours).

    The guide runs a second time on the same draws, with its parameters fixed. With several latent sites, each density
    still depends on the draws of the others.

    Args:
        model, guide: As ``iwae``; the guide is a module or a method of one.
        x: Images (B, *E).
        beta: As ``iwae``.
        num_particles: S, draws of z per image.

    Returns:
        A 0-d tensor to minimize, nats per image, as ``iwae``.

    Raises:
        ValueError: As ``iwae``, and for a guide whose parameters are not those of a module.

    Reference: Tucker et al. 2019, arXiv 1810.04152 (IWAE-DReG); Bauer and Mnih 2021, arXiv 2101.11046 (several sites).
    """
    guide_context, z = _fix_parameters(guide), _sample_latents(guide, x, num_particles)

    def negative_bound(fixed: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        log_w = _log_weights(model, _UseValues(fixed)(guide), x, beta, num_particles, guide_context=guide_context)
        return -log_mean_exp(log_w).mean(), log_w

    fixed = {name: value.detach() for name, value in z.items()}
    # slopes are -v_s (d log w_s / d z_s) / B
    slopes, (loss, log_w) = torch.func.grad_and_value(negative_bound, has_aux=True)(fixed)
    factor = 1 - beta + beta * log_w.detach().softmax(0)  # (S, B)
    for name, slope in slopes.items():
        # z - fixed is 0, and carries the gradient of z
        loss = loss + (_align_left(factor, slope) * slope.detach() * (z[name] - fixed[name])).sum()
    return loss


@serialize_threads()
def stl(
    model: StochasticFunction,
    guide: StochasticFunction,
    x: Tensor,
    *,
    beta: float | Tensor = 1.0,
    num_particles: int = 1,
) -> Tensor:
    """-(1/B) sum_b (1/S) sum_s log w_s, as ``elbo``; its gradient omits d log q(z | x) / d phi at a fixed z.

    The omitted term, a score, has expectation 0, so the gradient is unbiased for every S; its noise vanishes as the
    guide nears the exact posterior, where log w no longer depends on z. Inside an importance-weighted bound of several
    particles the score's expectation is not 0, and omitting it would be biased: use ``dreg`` there.

    As in ``dreg``, the guide runs a second time on the same draws with its parameters fixed, except parameters of a
    prior that the guide's density uses, as a top-down guide's does. Their score in log q cancels the one in log p where
    the guide adds nothing to the prior; each alone has a noise of 1 / scale (ours).

    Args:
        model, guide: As ``iwae``; the guide is a module or a method of one.
        x: Images (B, *E).
        beta: The weight of the KL, as ``elbo``.
        num_particles: S, draws of z per image.

    Returns:
        A 0-d tensor to minimize, nats per image.

    Raises:
        ValueError: As ``dreg``.

    Reference: Roeder et al. 2017, arXiv 1703.09194; the bias inside a bound: Tucker et al. 2019, arXiv 1810.04152.
    """
    guide_context = _fix_parameters(guide, free=_parameters_of_prior_alone)
    z = _sample_latents(guide, x, num_particles)
    # New tensors of the same values: a transform that recognizes z would return its inverse without a gradient.
    values = {name: value.view_as(value) for name, value in z.items()}
    return -_log_weights(model, _UseValues(values)(guide), x, beta, num_particles, guide_context=guide_context).mean()


def _log_weights(
    model: StochasticFunction,
    guide: StochasticFunction,
    x: Tensor,
    beta: float | Tensor,
    num_particles: int,
    *,
    guide_context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Tensor:
    """log p(x | z) + beta (log p(z) - log q(z | x)), (S, B) nats."""
    terms = log_weight_terms(model, guide, x, num_particles, guide_context=guide_context)
    log_p_x_given_z, log_p_z_over_q_z = terms
    return log_p_x_given_z + beta * log_p_z_over_q_z


def _sample_latents(guide: StochasticFunction, x: Tensor, num_particles: int) -> dict[str, Tensor]:
    """z_s ~ q(z | x) at every latent site, (S, B, *event)."""
    num_particles = check_count("num_particles", num_particles)
    particles = pyro.plate("_particles", num_particles, dim=-2)
    q = poutine.trace(particles(guide)).get_trace(x)
    _check_reparametrized(q)
    for name in q.param_nodes:
        raise ValueError(f"pyro.param {name!r}: expected the guide's parameters in its module, where they can be held")
    return {name: q.nodes[name]["value"] for name in latent_sites(q)}


def _check_reparametrized(q: Trace) -> None:
    for name in latent_sites(q):
        fn = q.nodes[name]["fn"]
        if not fn.has_rsample:
            raise ValueError(f"site {name!r}: expected a reparametrized guide, got {type(fn).__name__}")


class _UseValues(Messenger):
    """Gives latent sites these values instead of draws."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True


def _fix_parameters(
    guide: StochasticFunction, *, free: Callable[[nn.Module], set[int]] = lambda module: set()
) -> Callable[[], AbstractContextManager[Any]]:
    """A context in which the parameters of the guide's module are constants; gradients pass through its sites' values.

    A flow's density uses the parameters of its layers when it is evaluated, after the guide has run: both belong in it.

    Args:
        guide: A module or a method of one.
        free: A module -> the identities of parameters that are not fixed.
    """
    module = guide if isinstance(guide, nn.Module) else getattr(guide, "__self__", None)
    if not isinstance(module, nn.Module):
        raise ValueError(
            "guide: expected a module or a method of one, whose parameters can be held, got "
            f"{getattr(guide, '__name__', type(guide).__name__)}"
        )

    def fixed() -> AbstractContextManager[Any]:
        kept = free(module)
        return replace_tensors(module, {name: w.detach() for name, w in module.named_parameters() if id(w) not in kept})

    return fixed


def _parameters_of_prior_alone(module: nn.Module) -> set[int]:
    """The identities of a VAE's prior's parameters that its posterior does not have."""
    prior, posterior = getattr(module, "prior", None), getattr(module, "posterior", None)
    if not isinstance(prior, nn.Module) or not isinstance(posterior, nn.Module):
        return set()
    return {id(w) for w in prior.parameters()} - {id(w) for w in posterior.parameters()}


def _align_left(tensor: Tensor, like: Tensor) -> Tensor:
    """(S, B) with further dimensions of size 1 on the right, as many as ``like`` has."""
    return tensor.reshape(*tensor.shape, *[1] * (like.dim() - tensor.dim()))
