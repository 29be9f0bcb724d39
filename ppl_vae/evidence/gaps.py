"""Split log p(x) - ELBO into the approximation gap and the amortization gap.

    log p(x) - ELBO[q*]        approximation: KL(q*(z) || p(z | x)), with q* the best of the guide's family for this x
    ELBO[q*] - ELBO[q(z | x)]  amortization: the cost of one encoder for all images

A richer family reduces the first, a larger or longer trained encoder the second. Neither contains what the model itself
lacks, which lowers log p(x).
"""

from __future__ import annotations

from dataclasses import dataclass

import pyro
from torch import Tensor

from ppl_vae.evidence.importance import importance
from ppl_vae.evidence.proposals import replace_guide
from ppl_vae.evidence.refinement import refine_proposal
from ppl_vae.protocols import LatentModel
from ppl_vae.runtime.global_state import evaluation_mode, serialize_threads


@dataclass(frozen=True)
class Gaps:
    """Each image's nats; every field and property is (N,), float64.

    ``log_evidence`` is the best estimate of log p(x), ``elbo`` the guide's, and ``refined_elbo`` that of the best q of
    the guide's family that was found. A loose bound for log p(x) makes the approximation gap too small; a refinement
    that stopped early makes it too large.
    """

    log_evidence: Tensor
    elbo: Tensor
    refined_elbo: Tensor

    @property
    def approximation(self) -> Tensor:
        """log p(x) - ELBO[q*]."""
        return self.log_evidence - self.refined_elbo

    @property
    def amortization(self) -> Tensor:
        """ELBO[q*] - ELBO[q]: not below 0 in expectation; noise can make it negative for an image."""
        return self.refined_elbo - self.elbo

    @property
    def total(self) -> Tensor:
        """log p(x) - ELBO[q] = KL(q(z | x) || p(z | x))."""
        return self.log_evidence - self.elbo


@serialize_threads()
def gaps(
    vae: LatentModel,
    x: Tensor,
    log_evidence: Tensor,
    *,
    steps: int = 300,
    num_particles: int = 8,
    evaluation_particles: int = 1000,
    compile: bool = False,
) -> Gaps:
    """The two gaps of each image, by refining its q within the guide's family.

    Both ELBOs are means over fresh particles. What other layers of a flow guide would gain for an image counts as
    approximation gap. Draws come from torch's global generator.

    Args:
        vae: A VAE with a guide ``Conditional(net, family)``, so with one layer of latents.
        x: Images (N, *E).
        log_evidence: (N,) nats, from annealed importance sampling or a tight bound.
        steps, num_particles, compile: As in ``refine_proposal``, whose errors are these too.
        evaluation_particles: The particles of each of the two ELBOs.

    Raises:
        ValueError: ``log_evidence`` is not (N,).

    Reference: Cremer et al. 2018, arXiv 1801.03558, equations 4 to 6.
    """
    if tuple(log_evidence.shape) != (len(x),):
        raise ValueError(f"log_evidence: expected shape ({len(x)},), got {tuple(log_evidence.shape)}")
    q = refine_proposal(vae, x, steps=steps, num_particles=num_particles, compile=compile)
    with evaluation_mode(vae), pyro.validation_enabled(False):
        elbos = [
            importance(guided.model, guided.guide, x, num_particles=evaluation_particles).elbo
            for guided in (vae, replace_guide(vae, q))
        ]
    return Gaps(log_evidence.to(elbos[0]), *elbos)
