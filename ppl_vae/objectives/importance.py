"""Objectives of log-weights: the importance-weighted bound, and gradients that lose their noise near the optimum."""

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

from ppl_vae.runtime.capture import replace_tensors
from ppl_vae.runtime.errors import check_count
from ppl_vae.runtime.global_state import serialize_threads
from ppl_vae.runtime.numerics import log_mean_exp
from ppl_vae.weights import Program, latent_sites, log_weight_terms


@serialize_threads()
def iwae(model: Program, guide: Program, x: Tensor, *, beta: float | Tensor = 1.0, num_particles: int) -> Tensor:
    """-(1/B) sum_b log (1/S) sum_s w_s, log w_s = log p(x | z_s) + beta (log p(z_s) - log q(z_s | x)), z_s ~ q(z | x).

    At beta = 1 it is minus the importance-weighted bound, L_S <= log p(x), which never falls with S; S = 1 is the ELBO
    with its KL sampled.

    Args:
        model, guide: Pyro programs over x with one data plate at dim=-1, and the same latent sites, one or several.
        x: images (B, *E).
        beta: the weight of the latent sites' log-densities, a number or a 0-d tensor, 0 included.
        num_particles: S, draws of z an image.

    Returns:
        A 0-d tensor to minimize, nats an image. The log-weights are those of the bare programs: a scale that the user
        puts around a site, or a plate that subsamples, does not enter.

    Raises:
        ValueError: a latent site of the guide that is not reparametrized, and all that ``log_weights`` refuses, such as
            a deterministic one.

    Reference: Burda et al. 2016, arXiv 1509.00519, equation 8.
    """
    drawn = poutine.trace(guide)
    log_w = _log_w(model, drawn, x, beta, num_particles)
    _check_reparametrized(drawn.trace)
    return -log_mean_exp(log_w).mean()


@serialize_threads()
def dreg(model: Program, guide: Program, x: Tensor, *, beta: float | Tensor = 1.0, num_particles: int) -> Tensor:
    """``iwae``'s value; its gradient for the guide is sum_s v_s^2 (d log w_s / d z_s) (d z_s / d phi), v = w / sum w.

    That has the expectation of ``iwae``'s gradient, and loses all noise as the guide nears the exact posterior, where
    log w no longer depends on z. phi is all by which z was drawn; how q's density moves with its own parameters at a
    given z is left out, since its part, a score, is in v_s^2 instead of v_s. What the model owes to its parameters has
    the gradient of ``iwae``, sum_s v_s d log w_s, and that is so for parameters of the guide that the prior uses too.

    At another beta the score has the weight beta, and v_s^2 becomes (1 - beta) v_s + beta v_s^2 (ours).

    The guide runs a second time on the same draws, with its parameters held. Of several latent sites, each density
    still depends on the draws of the others.

    Args:
        model, guide: as ``iwae``; the guide is a module or a method of one.
        x: images (B, *E).
        beta: as ``iwae``.
        num_particles: S, draws of z an image.

    Returns:
        A 0-d tensor to minimize, nats an image, as ``iwae``.

    Raises:
        ValueError: as ``iwae``, and for a guide whose parameters are not those of a module that it belongs to.

    Reference: Tucker et al. 2019, arXiv 1810.04152 (IWAE-DReG); Bauer and Mnih 2021, arXiv 2101.11046 (several sites).
    """
    held, z = _held(guide), _draws(guide, x, num_particles)

    def minus_bound(at: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        log_w = _log_w(model, _At(at)(guide), x, beta, num_particles, held=held)
        return -log_mean_exp(log_w).mean(), log_w

    at = {name: value.detach() for name, value in z.items()}
    slopes, (loss, log_w) = torch.func.grad_and_value(minus_bound, has_aux=True)(at)  # -v_s (d log w_s / d z_s) / B
    factor = 1 - beta + beta * log_w.detach().softmax(0)  # (S, B)
    for name, slope in slopes.items():
        loss = loss + (_left(factor, slope) * slope.detach() * (z[name] - at[name])).sum()  # adds 0, and the path
    return loss


@serialize_threads()
def stl(model: Program, guide: Program, x: Tensor, *, beta: float | Tensor = 1.0, num_particles: int = 1) -> Tensor:
    """-(1/B) sum_b (1/S) sum_s log w_s, ``elbo``'s value; its gradient leaves out d log q(z | x) / d phi at a given z.

    What is left out, a score, has the expectation 0, so the gradient stays unbiased whatever S is; it loses all noise
    as the guide nears the exact posterior, where log w no longer depends on z. Inside an importance-weighted bound of
    more than one particle the score's expectation is not 0, and leaving it out would be biased: there ``dreg`` serves.

    The guide runs a second time on the same draws, with its parameters held, as in ``dreg``; but not those of a prior
    of which it makes its density, as a top-down guide does. Their score in log q is what cancels the one in log p where
    the guide adds nothing to the prior; each alone has a noise of 1 / scale (ours).

    Args:
        model, guide: as ``iwae``; the guide is a module or a method of one.
        x: images (B, *E).
        beta: the weight of the KL, as ``elbo``.
        num_particles: S, draws of z an image.

    Returns:
        A 0-d tensor to minimize, nats an image.

    Raises:
        ValueError: as ``dreg``.

    Reference: Roeder et al. 2017, arXiv 1703.09194; the bias inside a bound: Tucker et al. 2019, arXiv 1810.04152.
    """
    held, z = _held(guide, but=_of_the_prior_alone), _draws(guide, x, num_particles)
    # Other tensors of the same numbers: a transform that knows z again would give its inverse without a gradient.
    at = {name: value.view_as(value) for name, value in z.items()}
    return -_log_w(model, _At(at)(guide), x, beta, num_particles, held=held).mean()


def _log_w(
    model: Program,
    guide: Program,
    x: Tensor,
    beta: float | Tensor,
    num_particles: int,
    *,
    held: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Tensor:
    """(S, B) log p(x | z) + beta (log p(z) - log q(z | x)), nats."""
    log_p_x_given_z, log_p_z_over_q_z = log_weight_terms(model, guide, x, num_particles, held=held)
    return log_p_x_given_z + beta * log_p_z_over_q_z


def _draws(guide: Program, x: Tensor, num_particles: int) -> dict[str, Tensor]:
    """z_s ~ q(z | x) of every latent site, (S, B, *event)."""
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


class _At(Messenger):
    """Latent sites take the given values instead of drawing some."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True


def _nothing(module: nn.Module) -> set[int]:
    return set()


def _held(
    guide: Program, *, but: Callable[[nn.Module], set[int]] = _nothing
) -> Callable[[], AbstractContextManager[Any]]:
    """In which the parameters of the guide's module are constants: gradients pass through values of its sites alone.

    A flow's density asks for its layers' parameters when it is taken, after the guide has run: both belong in it.

    Args:
        guide: a module or a method of one.
        but: a module -> the identities of those of its parameters that stay as they are.
    """
    module = guide if isinstance(guide, nn.Module) else getattr(guide, "__self__", None)
    if not isinstance(module, nn.Module):
        raise ValueError(
            "guide: expected a module or a method of one, whose parameters can be held, got "
            f"{getattr(guide, '__name__', type(guide).__name__)}"
        )

    def held() -> AbstractContextManager[Any]:
        free = but(module)
        return replace_tensors(module, {name: w.detach() for name, w in module.named_parameters() if id(w) not in free})

    return held


def _of_the_prior_alone(module: nn.Module) -> set[int]:
    """The parameters of a VAE's prior that are not its posterior's as well."""
    prior, posterior = getattr(module, "prior", None), getattr(module, "posterior", None)
    if not isinstance(prior, nn.Module) or not isinstance(posterior, nn.Module):
        return set()
    return {id(w) for w in prior.parameters()} - {id(w) for w in posterior.parameters()}


def _left(tensor: Tensor, like: Tensor) -> Tensor:
    """(S, B) with dimensions of size 1 on the right, as many as ``like`` has more."""
    return tensor.reshape(*tensor.shape, *[1] * (like.dim() - tensor.dim()))
