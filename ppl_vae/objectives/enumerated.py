"""The ELBO of programs with enumerated sites: Pyro's ``TraceEnum_ELBO``, in a form that a compiled graph can hold."""

from __future__ import annotations

from torch import Tensor

from ppl_vae.enumeration import enumerated_dims, is_enumerated, sum_out
from ppl_vae.objectives.importance import DifferentiableLoss, check_guide, log_joint, plate_scale, sites_of_model
from ppl_vae.protocols import StochasticFunction
from ppl_vae.weights import latent_sites


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
