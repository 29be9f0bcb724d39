"""Free bits: a KL that costs nothing below a given number of nats per latent."""

from __future__ import annotations

import torch
from pyro.distributions import Independent
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import kl_divergence

from ppl_vae.objectives.importance import DifferentiableLoss
from ppl_vae.protocols import StochasticFunction
from ppl_vae.runtime.ranks import mean_over_batch
from ppl_vae.weights import is_deterministic, latent_sites


class FreeBits(DifferentiableLoss):
    """The ELBO with a KL that costs nothing below lambda nats per latent, as a Pyro loss.

        -sum_b E_q[log p(x_b | z)] + B sum_l max(lambda, KL_l),   KL_l = mean_b KL(q(z_l | x_b) || p(z_l))

    No latent is lost early in training. lambda = 0 is the ELBO with its KL in closed form. Minus the loss is a lower
    bound on the sum of log p(x_b), and never tighter than the ELBO, since max(lambda, KL_l) >= KL_l. With ``Temper``
    the second term has the weight beta, of which only beta < 1 can break the bound. Reports never use it.

    Args:
        num_particles: Draws of z per image.
        free_nats: lambda, nats per latent.

    Raises:
        ValueError: When it is taken: a site of the guide is deterministic or not reparametrized, its latents are not
            independent, or its KL has no formula, such as that of two normals; or the guide draws several sites in
            another order than the model.

    Reference: Kingma et al. 2016, arXiv 1606.04934, equation 15, with each latent a group of its own.
    """

    def __init__(self, num_particles: int = 1, *, free_nats: float) -> None:
        super().__init__(num_particles)
        self.free_nats = free_nats

    def differentiable_loss(self, model: StochasticFunction, guide: StochasticFunction, x: Tensor) -> Tensor:
        """The loss of the images x, (B, *E): a 0-d tensor, nats."""
        p, q = self._get_trace(model, guide, (x,), {})
        _check_order(q, p)
        p.compute_log_prob(lambda name, site: site["is_observed"])
        reconstruction = torch.stack([p.nodes[name]["log_prob_sum"] for name in p.observation_nodes]).sum()
        kl = torch.stack([_free_kl(name, q, p, self.free_nats) for name in latent_sites(p)]).sum()
        return len(x) * kl - reconstruction / self.num_particles


def _check_order(q: Trace, p: Trace) -> None:
    """Raise ValueError if the guide draws latent sites in another order than the model.

    E_q[log q(z_1 | x) - log p(z_1 | z_2)] is the mean of KL(q(z_1 | x) || p(z_1 | z_2)) only if z_2 does not depend on
    z_1.
    """
    latents = set(latent_sites(p))
    of_model, of_guide = ([name for name in trace.nodes if name in latents] for trace in (p, q))
    if of_model != of_guide:
        raise ValueError(f"guide: expected latent sites in the model's order {of_model}, got {of_guide}")


def _free_kl(name: str, q: Trace, p: Trace, free_nats: float) -> Tensor:
    """sum_l max(lambda, mean_n KL(q(z_l | x_n) || p(z_l))) of one site times its scale, nats."""
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
    kl = scale_and_mask(kl.movedim(-1, 0), mask=proposed["mask"]).flatten(1).mean(1)
    # The mean over the whole batch decides which latents are free; the ranks' losses add up to the formula's value.
    return proposed["scale"] * torch.where(mean_over_batch(kl) < free_nats, free_nats, kl).sum()
