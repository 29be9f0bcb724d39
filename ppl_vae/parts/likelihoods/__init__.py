"""Likelihoods p(x | h): from features to a distribution over pixels, one class per distribution.

Each class has

- ``event_shape``, and ``num_features``, the number of outputs that a network needs,
- ``support``, the values that a pixel can take, and ``support_words``, the same for messages,
- ``measure``, "mass" or "density": they are on different scales and are never compared,
- ``data_kind``, the kind of pixels, in the words of ``data``,
- ``floats_per_pixel``, about how many floats per pixel ``log_prob`` holds in memory,
- ``forward(h)``, which returns a distribution with batch shape ``h.shape[:-1]`` and the event shape, its pixels summed
  by ``to_event``,
- ``fit_marginals(x)``, which sets the likelihood's own parameters, if any, and returns the h of the pixels' marginal
  distributions, from which training starts.

Features come plane by plane: the first of every pixel, then the second.
"""

from ppl_vae.parts.likelihoods.counts import Bernoulli, NegativeBinomial, Poisson
from ppl_vae.parts.likelihoods.independent import fit_independent_pixels
from ppl_vae.parts.likelihoods.levels import Binomial, Categorical, DiscretizedLogistic
from ppl_vae.parts.likelihoods.mixture import DiscretizedLogisticMixture
from ppl_vae.parts.likelihoods.real import Laplace, Normal, NormalFixed, NormalOptimal, NormalPerPixel, StudentT
from ppl_vae.parts.likelihoods.unit_interval import Beta, ContinuousBernoulli, Logit, LogitNormal, has_quantiles

__all__ = [
    "Bernoulli",
    "Beta",
    "Binomial",
    "Categorical",
    "ContinuousBernoulli",
    "DiscretizedLogistic",
    "DiscretizedLogisticMixture",
    "Laplace",
    "Logit",
    "LogitNormal",
    "NegativeBinomial",
    "Normal",
    "NormalFixed",
    "NormalOptimal",
    "NormalPerPixel",
    "Poisson",
    "StudentT",
    "fit_independent_pixels",
    "has_quantiles",
]
