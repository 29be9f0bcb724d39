"""The ELBO of a model and a guide: with the weight beta of its KL as an effect handler, with free bits, in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from pyro.distributions import Independent
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.scale_messenger import ScaleMessenger
from torch import Tensor
from torch.distributions import kl_divergence

from ppl_vae.objectives.importance import STL, DifferentiableLoss, check_guide
from ppl_vae.protocols import StochasticFunction
from ppl_vae.runtime.capture import is_capturing
from ppl_vae.runtime.errors import CannotCapture, check_count
from ppl_vae.runtime.global_state import serialize_threads
from ppl_vae.runtime.ranks import mean_over_batch
from ppl_vae.runtime.records import Data, arguments_of, join_arguments
from ppl_vae.weights import latent_sites


class Temper(ScaleMessenger):
    """Scales log p(z) and log q(z | x) by beta: ``poutine.scale``'s messenger, narrowed to the latent sites.

    It goes around model *and* guide: around one of them only, a sampled KL is scaled in part, and an analytic one not
    at all.

    Args:
        beta: A number or a 0-d tensor, at least 0. ``poutine.scale`` refuses 0, with which a warm-up starts.
    """

    def __init__(self, beta: float | Tensor) -> None:
        Messenger.__init__(self)  # not ScaleMessenger's own, which raises for a scale of 0
        self.scale = beta

    def _process_message(self, msg: Message) -> None:
        if msg["type"] == "sample" and not msg["is_observed"]:
            super()._process_message(msg)


# A loss is one of Pyro's, or a function (model, guide, x) -> nats, the sum over the images, a 0-d tensor to minimize.
# After x it is given the further tensors of ``Records``.
Loss: TypeAlias = ELBO | Callable[..., Tensor]


def elbo(estimator: type[ELBO] = Trace_ELBO, num_particles: int = 1) -> ELBO:
    """Pyro's own ELBO, sum_b E_q[log q(z | x_b) - log p(x_b, z)], of programs with one plate of images at dim=-1.

    >>> svi = SVI(*vae.programs(), pyro.optim.Adam({"lr": 1e-3}), loss=elbo())  # doctest: +SKIP

    ``Trace_ELBO`` samples the KL, with all draws of z per image, ``num_particles``, at once. ``TraceMeanField_ELBO``
    takes it in closed form, by torch's ``kl_divergence``; it needs a guide that draws several sites in the model's
    order, and Pyro warns otherwise.
    """
    # The nesting is given, since Pyro would run the guide once more to find it, which would break exact resuming.
    num_particles = check_count("num_particles", num_particles)
    return estimator(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)


@serialize_threads()
def loss_per_image(
    loss: Loss, model: StochasticFunction, guide: StochasticFunction, x: Data, *, beta: float | Tensor = 1.0
) -> Tensor:
    """A Pyro loss of the two programs, with the weight beta on their KL, divided by the number of images.

    With ``elbo()`` this is -(E_q[log p(x | z)] - beta KL(q(z | x) || p(z))), minus an ELBO only at beta = 1. A beta
    above 1 is beta-VAE's objective; one that rises from 0 is a warm-up.

    Args:
        loss: Such as ``elbo()``, ``STL()``, ``IWAE(5)``, ``pyro.infer.Trace_ELBO()``, or a function.
        model, guide: Pyro programs over x with one data plate at dim=-1.
        x: Images (B, *E), or ``Records``.
        beta: The weight of the KL, 0 included; a tensor is 0-d.

    Returns:
        A 0-d tensor to minimize, nats per image (the mean over the batch; pixels are summed). A plate of the user's
        that subsamples, of size N, multiplies it by N / B.

    Raises:
        ValueError: ``TraceMeanField_ELBO`` with a KL that has no registered formula, which Pyro by itself would sample
            without a warning, or with a guide that is not reparametrized; or as the loss.

    Reference: Higgins et al. 2017 (beta-VAE), equation 4; Sønderby et al. 2016 (warm-up), arXiv 1602.02282.
    """
    return loss_of_batch(loss, Temper(beta)(model), Temper(beta)(guide), x) / len(x)


def loss_of_batch(loss: Loss, model: StochasticFunction, guide: StochasticFunction, x: Data) -> Tensor:
    """A loss of the images x, (B, *E), in a form that a compiled graph can hold where it is captured: 0-d, nats."""
    if not isinstance(loss, ELBO):
        return loss(model, guide, *arguments_of(x))
    if type(loss) is TraceMeanField_ELBO or (is_capturing() and type(loss) in (Trace_ELBO, STL)):
        return _loss_of_traces(loss, model, guide, x)
    if is_capturing() and not isinstance(loss, DifferentiableLoss):
        raise CannotCapture(
            f"objective: expected Trace_ELBO, TraceMeanField_ELBO or a loss of ppl_vae, got {type(loss).__name__}"
        )
    return loss.differentiable_loss(model, guide, *arguments_of(x))


def _loss_of_traces(loss: ELBO, model: StochasticFunction, guide: StochasticFunction, x: Data) -> Tensor:
    """Compute ``loss.differentiable_loss`` from the same two traces, without reading a number of a tensor.

    Pyro's losses read a number at every site, which no graph can hold. They also sample a KL that has no formula, and
    add score-function terms for sites that are not reparametrized; both are refused here.
    """
    analytic = isinstance(loss, TraceMeanField_ELBO)
    total = torch.zeros((), dtype=x.dtype, device=x.device)
    for p, q in loss._get_traces(model, guide, arguments_of(x), {}):
        for name, site in [*p.nodes.items(), *q.nodes.items()]:
            if site["type"] == "param" and is_capturing():
                raise CannotCapture(f"pyro.param {name!r}: parameters belong to modules")
        for name, site in q.nodes.items():
            if site["type"] == "sample" and not site["is_observed"] and not site["fn"].has_rsample:
                error = CannotCapture if is_capturing() else ValueError
                raise error(f"site {name!r}: {type(site['fn']).__name__} is not reparametrized")
        total = total + _elbo_of_traces(p, q, analytic=analytic)
    return -total / loss.num_particles


def _elbo_of_traces(p: Trace, q: Trace, *, analytic: bool) -> Tensor:
    """Sum log p - log q over sites; if analytic, log p over observed sites minus the KL of latent ones."""
    sites = {name: site for name, site in p.nodes.items() if site["type"] == "sample"}
    proposed = {name: site for name, site in q.nodes.items() if site["type"] == "sample"}
    terms = []
    for name, site in sites.items():
        if analytic and name in proposed and not site["is_observed"]:
            terms.append(-_kl(name, proposed.pop(name), site))
        else:
            terms.append(site["log_prob_sum"])
    terms += [-site["score_parts"].entropy_term.sum() for site in proposed.values()]
    return torch.stack([torch.as_tensor(term) for term in terms]).sum()


def _kl(name: str, q: dict[str, Any], p: dict[str, Any]) -> Tensor:
    """KL(q || p) of a site, nats, with the scale and mask of the guide's site."""
    try:
        kl = kl_divergence(q["fn"], p["fn"])
    except NotImplementedError:
        kinds = " and ".join(type(getattr(site["fn"], "base_dist", site["fn"])).__name__ for site in (q, p))
        raise ValueError(
            f"site {name!r}: expected a guide and a prior whose KL has a formula, got {kinds}; Trace_ELBO samples it"
        ) from None
    return scale_and_mask(kl, scale=q["scale"], mask=q["mask"]).sum()


def autocast(loss: Loss, dtype: torch.dtype) -> Loss:
    """The loss with matrix products and convolutions in a narrower type, such as bfloat16; so are its gradients.

    Distributions keep the type of the data (see ``Conditional``). Evaluations never use it.
    """

    def narrowed(model: StochasticFunction, guide: StochasticFunction, x: Tensor, *further: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=dtype):
            return loss_of_batch(loss, model, guide, join_arguments([x, *further]))

    return narrowed


class FreeBits(DifferentiableLoss):
    """The ELBO with a KL that costs nothing below lambda nats per latent, as a Pyro loss.

        -sum_b E_q[log p(x_b | z)] + B sum_l max(lambda, KL_l),   KL_l = mean_b KL(q(z_l | x_b) || p(z_l))

    No latent is lost early in training. lambda = 0 is the ELBO with its KL in closed form. Minus the loss is a lower
    bound on the sum of log p(x_b), and never tighter than the ELBO, since max(lambda, KL_l) >= KL_l. With ``Temper``
    the second term has the weight beta, and only beta < 1 can break the bound. Reports never use it.

    Args:
        num_particles: Draws of z per image.
        free_nats: lambda, nats per latent.

    Raises:
        ValueError: When it is taken: a site of the guide is deterministic, not reparametrized, of dependent latents or
            without a formula for its KL; or the guide draws several sites in another order than the model.

    Reference: Kingma et al. 2016, arXiv 1606.04934, equation 15, with each latent a group of its own.
    """

    def __init__(self, num_particles: int = 1, *, free_nats: float) -> None:
        super().__init__(num_particles)
        self.free_nats = free_nats

    def differentiable_loss(
        self, model: StochasticFunction, guide: StochasticFunction, x: Tensor, *further: Tensor
    ) -> Tensor:
        """The loss of the images x, (B, *E): a 0-d tensor, nats."""
        p, q = self._get_trace(model, guide, (x, *further), {})
        check_guide(q)
        latents = latent_sites(p)
        of_model, of_guide = ([name for name in trace.nodes if name in latents] for trace in (p, q))
        if of_model != of_guide:
            # E_q[log q(z_1 | x) - log p(z_1 | z_2)] is the mean of a KL only if z_2 does not depend on z_1.
            raise ValueError(f"guide: expected latent sites in the model's order {of_model}, got {of_guide}")
        p.compute_log_prob(lambda name, site: site["is_observed"])
        reconstruction = torch.stack([p.nodes[name]["log_prob_sum"] for name in p.observation_nodes]).sum()
        kl = torch.stack([_free_kl(name, q, p, self.free_nats) for name in latents]).sum()
        return len(x) * kl - reconstruction / self.num_particles


def _free_kl(name: str, q: Trace, p: Trace, free_nats: float) -> Tensor:
    """sum_l max(lambda, mean_n KL(q(z_l | x_n) || p(z_l))) of one site times its scale, nats."""
    proposed, prior = q.nodes[name], p.nodes[name]["fn"]
    factors = [fn.base_dist if isinstance(fn, Independent) else fn for fn in (proposed["fn"], prior)]
    try:
        kl = kl_divergence(*factors)  # (S, B, L)
    except NotImplementedError:
        kl = None
    if kl is None or kl.shape != proposed["value"].shape:
        words = " and ".join(type(fn).__name__ for fn in factors)
        raise ValueError(f"site {name!r}: expected independent latents whose KL has a formula, got {words}")
    kl = scale_and_mask(kl.movedim(-1, 0), mask=proposed["mask"]).flatten(1).mean(1)
    # The mean over the whole batch decides which latents are free; the ranks' losses add up to the formula's value.
    return proposed["scale"] * torch.where(mean_over_batch(kl) < free_nats, free_nats, kl).sum()
