"""Proposals of each image's own: the guide refined, fitted to posterior draws, or defended, for importance sampling.

    q = refined(vae, x, family=FullNormal(L))                  # a normal for each image, no longer the encoder's
    evaluate(replace_guide(vae, defensive(q)), x, num_particles=5000, seed=0)

q is made with draws of its own, before the particles that L_S is made of: given q these are independent, so L_S stays a
lower bound on log p(x), whatever q is. The model p(x, z) is what it was.
"""

from ppl_vae.evidence.proposals.adaptation import Adaptive, adaptive
from ppl_vae.evidence.proposals.defense import Defensive, defensive
from ppl_vae.evidence.proposals.fitting import fitted
from ppl_vae.evidence.proposals.own import PerImageGuide, Proposal, replace_guide
from ppl_vae.evidence.proposals.refinement import OBJECTIVES, refined

__all__ = [
    "OBJECTIVES",
    "Adaptive",
    "Defensive",
    "PerImageGuide",
    "Proposal",
    "adaptive",
    "defensive",
    "fitted",
    "refined",
    "replace_guide",
]
