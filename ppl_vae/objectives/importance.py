"""Pyro losses from log-weights: the importance-weighted bound, and gradients that lose their noise near the optimum.

``num_particles`` is S, the draws of z per image.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO
from pyro.infer.util import torch_item
from pyro.poutine import Trace
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger, unwrap
from pyro.poutine.runtime import Message
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn

from ppl_vae.enumeration import Dims, enumerated_dims, is_enumerated, sum_out
from ppl_vae.protocols import StochasticFunction
from ppl_vae.runtime.capture import replace_tensors
from ppl_vae.runtime.errors import check_count
from ppl_vae.runtime.numerics import log_mean_exp
from ppl_vae.runtime.records import Records
from ppl_vae.support import find_module
from ppl_vae.weights import (
    check_densities,
    check_sites,
    latent_sites,
    observed_sites,
    sampled_sites,
    site_log_prob,
    trace_guide,
    trace_programs,
)


class STL(Trace_ELBO):
    """Pyro's ``Trace_ELBO``, except that its gradient omits d log q(z | x) / d phi at a fixed z.

        sum_b (1/S) sum_s log q(z_s | x_b) - log p(x_b, z_s),   z_s ~ q(z | x_b)

    The omitted term, a score, has expectation 0, so the gradient is unbiased for every S; its noise vanishes as the
    guide nears the exact posterior, where log p(x, z) - log q(z | x) no longer depends on z. Inside an
    importance-weighted bound the score's expectation is not 0, and omitting it would be biased: use ``DReG`` there.

    The guide runs a second time on the same draws, with its parameters held constant. A top-down guide's density also
    uses parameters of the prior. Those are not held: where the guide adds nothing to the prior, their scores in log q
    and in log p cancel, and each alone has a noise of 1 / scale (ours).

    >>> svi = SVI(*vae.programs(), pyro.optim.Adam({"lr": 1e-3}), loss=STL())  # doctest: +SKIP

    Raises:
        ValueError: When it is taken: the guide is no module, method of one, or program of ``register_programs``, whose
            parameters can be held; a latent site of it is not reparametrized; or as ``log_weight_terms``.

    Reference: Roeder et al. 2017, arXiv 1703.09194; the bias inside a bound: Tucker et al. 2019, arXiv 1810.04152.
    """

    def __init__(self, num_particles: int = 1) -> None:
        super().__init__(check_count("num_particles", num_particles), max_plate_nesting=1, vectorize_particles=True)

    def _get_trace(
        self, model: StochasticFunction, guide: StochasticFunction, args: tuple, kwargs: dict
    ) -> tuple[Trace, Trace]:
        module = module_of(guide)
        drawn = poutine.trace(guide).get_trace(*args, **kwargs)
        check_guide(drawn)
        _check_parameters(drawn, module)
        # New tensors of the same values: a transform returns the noise of its own draw from a cache, without gradients.
        values = {name: drawn.nodes[name]["value"].view_as(drawn.nodes[name]["value"]) for name in latent_sites(drawn)}
        with _hold_parameters(module, free=_parameters_of_prior_alone(module)):
            q = poutine.trace(_UseValues(values)(guide)).get_trace(*args, **kwargs)
            q.compute_score_parts()
        p = poutine.trace(poutine.replay(model, trace=q)).get_trace(*args, **kwargs)
        check_sites(p, q)
        p.compute_log_prob()
        return prune_subsample_sites(p), prune_subsample_sites(q)


class DifferentiableLoss(ELBO):
    """A Pyro loss whose value and gradient are those of one differentiable function of model, guide and images."""

    def __init__(self, num_particles: int = 1) -> None:
        super().__init__(check_count("num_particles", num_particles))

    def differentiable_loss(
        self, model: StochasticFunction, guide: StochasticFunction, x: Tensor, *further: Tensor
    ) -> Tensor:
        """A 0-d tensor to minimize: nats, the sum over the images x, (B, *E). ``further`` are as in ``Records``."""
        raise NotImplementedError

    def loss(self, model: StochasticFunction, guide: StochasticFunction, *args: Tensor) -> float:
        """The value of ``differentiable_loss`` for images x, (B, *E), and the further arguments of the programs."""
        return float(torch_item(self.differentiable_loss(model, guide, *args)))

    def loss_and_grads(self, model: StochasticFunction, guide: StochasticFunction, *args: Tensor) -> float:
        """The value for images x, (B, *E), and the further arguments; adds the gradient to the parameters'."""
        loss = self.differentiable_loss(model, guide, *args)
        loss.backward()
        return float(torch_item(loss))

    def _get_trace(
        self, model: StochasticFunction, guide: StochasticFunction, args: tuple, kwargs: dict
    ) -> tuple[Trace, Trace]:
        return trace_programs(model, guide, Records(*args), self.num_particles)


class IWAE(DifferentiableLoss):
    """The importance-weighted bound of every image, as a Pyro loss.

        -sum_b log (1/S) sum_s w_bs,   w_bs = p(x_b, z_s) / q(z_s | x_b),   z_s ~ q(z | x_b)

    L_S <= log p(x) in expectation, and does not fall with S; S = 1 is the ELBO with a sampled KL. Pyro's ``RenyiELBO``
    has one weight for a whole batch, and one particle soon takes all of it; this has one for each image.

    A site's density is raised to the power of its scale, so that ``Temper`` gives log p(x | z) + beta (log p(z) -
    log q(z | x)). The subsampling scale of a plate multiplies the bound instead. Enumerated sites are summed as in
    ``log_weight_terms``. If y is enumerated in the guide, q(y | x) is not in the weight and gets no gradient.

    Raises:
        ValueError: When it is taken: a latent site of the guide is not reparametrized, or as ``log_weight_terms``.

    Reference: Burda et al. 2016, arXiv 1509.00519, equation 8.
    """

    def __init__(self, num_particles: int) -> None:
        super().__init__(num_particles)

    def differentiable_loss(
        self, model: StochasticFunction, guide: StochasticFunction, x: Tensor, *further: Tensor
    ) -> Tensor:
        """Minus the bound of the images x, (B, *E): a 0-d tensor, nats. ``further`` are as in ``Records``."""
        p, q = self._get_trace(model, guide, (x, *further), {})
        check_guide(q)
        shape, dims = (self.num_particles, len(x)), enumerated_dims(p)
        log_q = log_joint(q, sampled_sites(q), shape, dims)
        log_w = log_ratio(log_joint(p, sites_of_model(p), shape, dims), log_q, dims)
        return -plate_scale(p) * log_mean_exp(log_w).sum()


class DReG(IWAE):
    """The value of ``IWAE``; the guide's gradient is sum_s v_s^2 (d log w_s / d z_s) (d z_s / d phi), v = w / sum w.

    It has the expectation of ``IWAE``'s gradient, and its noise vanishes as the guide nears the exact posterior, where
    log w no longer depends on z. phi are all parameters with which z is drawn. The score, d log q(z | x) / d phi at a
    fixed z, is left out, and v_s^2 instead of v_s makes up for it. The model's gradient is that of ``IWAE``,
    sum_s v_s d log w_s, also for parameters of the guide that the prior uses too.

    At another beta the score has the weight beta, and v_s^2 becomes (1 - beta) v_s + beta v_s^2 (ours).

    The guide runs a second time on the same draws, with its parameters held. With several latent sites, each density
    still depends on the draws of the others.

    Raises:
        ValueError: As ``IWAE``, for a guide whose parameters cannot be held, as ``STL``, and for one with an enumerated
            site.

    Reference: Tucker et al. 2019, arXiv 1810.04152 (IWAE-DReG); Bauer and Mnih 2021, arXiv 2101.11046 (several sites).
    """

    def differentiable_loss(
        self, model: StochasticFunction, guide: StochasticFunction, x: Tensor, *further: Tensor
    ) -> Tensor:
        """Minus the bound of the images x, (B, *E): a 0-d tensor, nats, as ``IWAE``'s; only the gradient differs."""
        module, shape = module_of(guide), (self.num_particles, len(x))
        drawn = trace_guide(guide, Records(x, *further), self.num_particles)
        check_guide(drawn)
        if enumerated_dims(drawn):
            raise ValueError("objective: expected EnumeratedELBO for a guide with enumerated sites, got DReG")
        _check_parameters(drawn, module)
        z = {name: drawn.nodes[name]["value"] for name in latent_sites(drawn)}

        def negative_bound(fixed: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            p, q = self._get_trace(model, _UseValues(fixed)(_hold_parameters(module)(guide)), (x, *further), {})
            dims = enumerated_dims(p)
            with _hold_parameters(module):
                log_q = log_joint(q, sampled_sites(q), shape, dims)
            log_w = log_ratio(log_joint(p, sites_of_model(p), shape, dims), log_q, dims)
            return -plate_scale(p) * log_mean_exp(log_w).sum(), log_w

        fixed = {name: value.detach() for name, value in z.items()}
        # slopes are -v_s d log w_s / d z_s
        slopes, (loss, log_w) = torch.func.grad_and_value(negative_bound, has_aux=True)(fixed)
        v = log_w.detach().softmax(0)  # (S, B)
        for name, slope in slopes.items():
            beta = _exponent(drawn.nodes[name])
            factor = (1 - beta + beta * v).reshape(*v.shape, *[1] * (slope.dim() - v.dim()))
            # z - fixed is 0, and carries the gradient of z
            loss = loss + (factor * slope.detach() * (z[name] - fixed[name])).sum()
        return loss


def log_joint(trace: Trace, names: Sequence[str], shape: tuple[int, int], dims: Dims) -> list[Tensor]:
    """The log-densities of sites times their exponents, (*K, S, B) each, nats; ``dims`` as ``enumerated_dims``."""
    sites = [(name, trace.nodes[name]) for name in names]
    return [_exponent(site) * site_log_prob(name, site, shape, dims) for name, site in sites]


def log_ratio(log_p: Sequence[Tensor], log_q: Sequence[Tensor], dims: Dims) -> Tensor:
    """log w, (S, B) nats, from the terms of the model and those of the guide's sampled sites."""
    return sum_out([*log_p, *(-term for term in log_q)], dims)


def sites_of_model(p: Trace) -> list[str]:
    """The names of all sites with a density in a model's trace."""
    return [*observed_sites(p), *latent_sites(p)]


def _exponent(site: dict[str, Any]) -> Tensor | float:
    """A site's scale without that of plates that subsample, such as ``Temper``'s beta."""
    return site["scale"] / prod(_subsampling_scale(frame) for frame in site["cond_indep_stack"])


def plate_scale(p: Trace) -> float:
    """N / B of the images' plate, above 1 if it subsamples."""
    frames = (frame for name in latent_sites(p) for frame in p.nodes[name]["cond_indep_stack"] if frame.dim == -1)
    return _subsampling_scale(next(frames))


def _subsampling_scale(frame: CondIndepStackFrame) -> float:
    return 1.0 if frame.full_size is None else frame.full_size / frame.size


def module_of(guide: StochasticFunction) -> nn.Module:
    """The module whose parameters the guide uses: itself, or the one whose method it is, within effect handlers.

    Raises:
        ValueError: There is no such module.
    """
    module = find_module(guide)
    if module is None:
        bare = unwrap(guide)
        raise ValueError(
            "guide: expected a module or a method of one, whose parameters can be held, got "
            f"{getattr(bare, '__name__', type(bare).__name__)}; PyroProgram(model, guide, x) is one"
        )
    return module


def _check_parameters(q: Trace, module: nn.Module) -> None:
    """Refuse parameters of the guide that are not the module's: they could not be held."""
    own = {id(w) for w in module.parameters()}
    for name in q.param_nodes:
        if id(q.nodes[name]["value"]) not in own:
            raise ValueError(
                f"pyro.param {name!r}: expected the guide's parameters in its module, where they can be held"
            )


@contextmanager
def _hold_parameters(module: nn.Module, *, free: Collection[int] = ()) -> Iterator[None]:
    """Hold the module's parameters constant, except those of the identities ``free``.

    A flow's density uses its parameters when it is evaluated, so the block contains that as well as the guide's run.
    """
    held = {name: w.detach() for name, w in module.named_parameters() if id(w) not in free}
    with replace_tensors(module, held):
        yield


def _parameters_of_prior_alone(module: nn.Module) -> set[int]:
    """The identities of a VAE's prior's parameters that its posterior does not have."""
    prior, posterior = getattr(module, "prior", None), getattr(module, "posterior", None)
    if not isinstance(prior, nn.Module) or not isinstance(posterior, nn.Module):
        return set()
    return {id(w) for w in prior.parameters()} - {id(w) for w in posterior.parameters()}


def check_guide(q: Trace) -> None:
    """Raise ValueError for a guide with a site that has no density, or whose draws have no gradient."""
    check_densities(q)
    for name in sampled_sites(q):
        fn = q.nodes[name]["fn"]
        if not fn.has_rsample:
            raise ValueError(f"site {name!r}: expected a reparametrized guide, got {type(fn).__name__}")


class _UseValues(Messenger):
    """Gives latent sites these values instead of draws."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Message) -> None:
        if msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True


class EnumeratedELBO(DifferentiableLoss):
    """The ELBO, exact in sites marked infer={"enumerate": "parallel"}, as a Pyro loss; ``fit`` takes it by default.

        -sum_b E_{q(y, z | x_b)}[log sum_u p(x_b, z, y, u) - log q(y, z | x_b)]

    y are the enumerated sites of the guide, over which the expectation is a sum with the weights q(y | x); u are those
    of the model alone. z are the other latents: ``num_particles`` draws per image, for each y if they depend on it.
    Without enumerated sites it is ``Trace_ELBO`` of reparametrized guides.

    A site's density is raised to the power of its scale, as in ``IWAE``, so that ``Temper``'s beta acts on p(u) too.

    >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), EnumeratedELBO())  # doctest: +SKIP

    Raises:
        ValueError: When it is taken: a sampled site of the guide is not reparametrized, or as ``log_weight_terms``.

    Reference: Kingma et al. 2014, arXiv 1406.5298, equation 7 (the sum over y); Pyro's ``TraceEnum_ELBO``.
    """

    def differentiable_loss(
        self, model: StochasticFunction, guide: StochasticFunction, x: Tensor, *further: Tensor
    ) -> Tensor:
        """Minus the ELBO of the images x, (B, *E): a 0-d tensor, nats. ``further`` are as in ``Records``."""
        p, q = self._get_trace(model, guide, (x, *further), {})
        check_guide(q)
        shape, dims, of_guide = (self.num_particles, len(x)), enumerated_dims(p), enumerated_dims(q)
        log_p = log_joint(p, sites_of_model(p), shape, dims)
        log_q = log_joint(q, latent_sites(q), shape, dims)
        elbo = sum_out(log_p, {dim: dims[dim] for dim in dims if dim not in of_guide}) - sum(log_q)
        if of_guide:
            names = [name for name in latent_sites(q) if is_enumerated(q.nodes[name])]
            weight = sum(q.nodes[name]["fn"].log_prob(q.nodes[name]["value"]) for name in names).exp()  # q(y | x)
            elbo = (weight * elbo).sum(dim=list(of_guide))
        return -plate_scale(p) * elbo.sum() / self.num_particles
