"""Likelihoods p(x | h): features to a distribution over pixels. One class a distribution.

Each has ``event_shape``, ``num_features`` (what the network's last layer must give), ``support`` (the values a pixel
can take) and ``support_words`` (the same for a person), ``measure`` ("mass" or "density": they are on different scales,
and never compared), ``data_kind`` (the kind of pixels that it is a likelihood of, in the words of ``data``),
``floats_per_pixel`` (about how many numbers of a pixel ``log_prob`` holds at once), ``forward(h)``, which returns a
distribution with batch shape ``h.shape[:-1]`` and the event shape, and ``fit_marginals(x)``, which sets the
likelihood's own parameters, if it has any, and returns the h of the pixels' marginals: training starts from there.
``to_event`` makes pixels independent and *summed*. Features come plane by plane: the first of every pixel, then the
second.
"""

from ppl_vae.parts.likelihoods.counts import Bernoulli, NegativeBinomial, Poisson
from ppl_vae.parts.likelihoods.independent import fit_independent_pixels
from ppl_vae.parts.likelihoods.levels import Binomial, Categorical, DiscretizedLogistic
from ppl_vae.parts.likelihoods.logit import Logit, LogitNormal, has_quantiles
from ppl_vae.parts.likelihoods.mixture import DiscretizedLogisticMixture
from ppl_vae.parts.likelihoods.real import Laplace, Normal, NormalFixed, NormalOptimal, NormalPerPixel, StudentT
from ppl_vae.parts.likelihoods.unit_interval import Beta, ContinuousBernoulli

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
