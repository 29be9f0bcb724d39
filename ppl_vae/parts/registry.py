"""Every word that names a part of a VAE, with the part that it names.

The table needs no torch: ``--help`` reads it, and a part is imported when it is first built. To add a likelihood, write
its class, add one line to ``LIKELIHOODS`` and one case to ``tests/likelihood_cases.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Part:
    """A word's class or function, one line of help, and the options that are its own.

    Args:
        target: "module:name", the module below ``ppl_vae``.
        help: What the part is, in a few words.
        options: Names of options, each with the keyword argument that it becomes.
        takes: The names of its positional arguments, which the caller of ``build`` gives.
    """

    target: str
    help: str
    options: Mapping[str, str] = field(default_factory=dict)
    takes: tuple[str, ...] = ()

    def load(self) -> Any:
        """Imports the class or the function."""
        module, name = self.target.split(":")
        return getattr(import_module(f"ppl_vae.{module}"), name)

    def arguments(self, options: object) -> dict[str, Any]:
        """Keyword arguments of the part, read from a run's options. A word among them becomes what it names."""
        values = {name: getattr(options, name) for name in self.options}
        return {
            argument: WORDS[name][values[name]].load() if name in WORDS else values[name]
            for name, argument in self.options.items()
        }

    def build(self, options: object, **context: object) -> Any:
        """The part itself. ``context`` holds what it may take: ``event_shape``, ``latent_dim``, ``posterior``."""
        return self.load()(*(context[name] for name in self.takes), **self.arguments(options))


def _part(target: str, help: str, *takes: str, **options: str) -> Part:
    return Part(target, help, options, takes)


def _likelihood(name: str, help: str, **options: str) -> Part:
    return _part(f"parts.likelihoods:{name}", help, "event_shape", **options)


def _posterior(name: str, help: str, **options: str) -> Part:
    return _part(f"parts.posteriors:{name}", help, "latent_dim", **options)


def _objective(name: str, help: str, **options: str) -> Part:
    return _part(f"objectives:{name}", help, **options, num_particles="num_particles")


LIKELIHOODS = {
    "bernoulli": _likelihood("Bernoulli", "zeros and ones"),
    "categorical": _likelihood("Categorical", "8-bit levels, 256 classes per pixel"),
    "discretized-logistic": _likelihood("DiscretizedLogistic", "8-bit levels, one logistic per pixel"),
    "discretized-logistic-mixture": _likelihood(
        "DiscretizedLogisticMixture", "8-bit levels, several logistics per pixel", likelihood_components="components"
    ),
    "binomial": _likelihood("Binomial", "8-bit levels, 255 trials per pixel"),
    "continuous-bernoulli": _likelihood("ContinuousBernoulli", "numbers in [0, 1], one parameter"),
    "beta": _likelihood("Beta", "numbers in (0, 1), two parameters"),
    "logit-normal": _likelihood("LogitNormal", "numbers in (0, 1), a normal after a logit"),
    "normal": _likelihood("Normal", "real numbers, one learned scale"),
    "normal-fixed": _likelihood("NormalFixed", "real numbers, a given scale", likelihood_scale="scale"),
    "normal-optimal": _likelihood("NormalOptimal", "real numbers, the best scale in closed form (sigma-VAE)"),
    "normal-per-pixel": _likelihood("NormalPerPixel", "real numbers, a scale for each pixel from the decoder"),
    "laplace": _likelihood("Laplace", "real numbers, heavier tails"),
    "student-t": _likelihood("StudentT", "real numbers, the heaviest tails"),
    "poisson": _likelihood("Poisson", "counts, variance equal to the mean"),
    "negative-binomial": _likelihood("NegativeBinomial", "counts, variance above the mean"),
}

NETWORKS = {
    "mlp": _part("parts.networks:DENSE", "dense, ReLU"),
    "tanh": _part("parts.networks:DENSE_TANH", "dense, tanh, as in older papers"),
    "gated": _part("parts.networks:DENSE_GATED", "dense, gated linear units"),
    "conv": _part("parts.networks:CONV", "convolutions of stride 2"),
    "gated-conv": _part("parts.networks:CONV_GATED", "gated convolutions of stride 2"),
    "residual": _part("parts.networks:RESIDUAL", "convolutions with residual blocks"),
    "gated-residual": _part("parts.networks:RESIDUAL_GATED", "gated convolutions with residual blocks"),
}
DENSE_NETWORKS = ("mlp", "tanh", "gated")

COUPLINGS = {
    "affine": _part("parts.flows:affine_coupling", "scale and shift"),
    "spline": _part("parts.flows:spline_coupling", "rational-quadratic splines"),
}
SCALE_MAPS = {
    "bounded": _part("parts.posteriors:bounded_log_scale", "exp(7 tanh(h / 7))"),
    "exp": _part("parts.posteriors:exponential_log_scale", "exp(h)"),
    "softplus": _part("parts.posteriors:softplus_log_scale", "log(1 + (e - 1) exp(h))"),
}
POSTERIOR_FLOWS = {
    "iaf": _part("parts.posteriors:inverse_autoregressive_flow", "inverse autoregressive"),
    "spline": _part("parts.posteriors:spline_flow", "coupled splines"),
}

_FLOW = {"prior_flow": "coupling", "prior_layers": "num_layers", "prior_hidden": "hidden"}
_VAMP = "a mixture of the guide's posteriors of learned pseudo-images"
PRIORS = {
    "standard-normal": _part("parts.priors:StandardNormal", "N(0, I)", "latent_dim"),
    "mixture": _part("parts.priors:Mixture", "a mixture of normals", "latent_dim", prior_components="components"),
    "vamp": _part("parts.priors:VampPrior", _VAMP, "posterior", "event_shape", prior_components="components"),
    "flow": _part("parts.priors:FlowPrior", "a normalizing flow of couplings", "latent_dim", **_FLOW),
}

_LAYERS = {"posterior_flow": "flow", "posterior_layers": "num_layers", "posterior_hidden": "hidden"}
POSTERIORS = {
    "diagonal": _posterior("DiagonalNormal", "independent normals", scale_map="log_scale"),
    "full": _posterior("FullNormal", "a normal with full covariance", scale_map="log_scale"),
    "flow": _posterior("flow_posterior", "a normal followed by a flow", **_LAYERS, scale_map="log_scale"),
    "delta": _posterior("Delta", "one point: a plain autoencoder, with --beta 0"),
}

KLS = {
    "sampled": _part("objectives:Trace_ELBO", "Pyro's Trace_ELBO"),
    "analytic": _part("objectives:TraceMeanField_ELBO", "Pyro's TraceMeanField_ELBO"),
}
OBJECTIVES = {
    "elbo": _objective("elbo", "Pyro's ELBO, --kl", kl="estimator"),
    "free-bits": _objective("FreeBits", "the ELBO, with free nats for each latent", free_bits="free_nats"),
    "iwae": _objective("IWAE", "the importance-weighted bound"),
    "dreg": _objective("DReG", "the same, doubly reparametrized gradients"),
    "semi-supervised": _objective(
        "SemiSupervisedELBO",
        "the ELBO, and the loss of the classifier of --labels",
        label_weight="label_weight",
        label_consistency="consistency",
    ),
    "stl": _objective("STL", "the ELBO, gradients without the guide's score"),
}
SCHEDULES = {
    "cosine": _part("training.settings:cosine", "flat, then to 0 on a cosine", decay_start="start"),
    "stages": _part("training.settings:stages", "the eight stages of Burda et al. 2016"),
}

# Options whose value is itself a word of a table.
WORDS: dict[str, Mapping[str, Part]] = {
    "kl": KLS,
    "posterior_flow": POSTERIOR_FLOWS,
    "prior_flow": COUPLINGS,
    "scale_map": SCALE_MAPS,
}

# Options that choose a part, each with its table.
TABLES: dict[str, Mapping[str, Part]] = {
    "likelihood": LIKELIHOODS,
    "network": NETWORKS,
    "objective": OBJECTIVES,
    "posterior": POSTERIORS,
    "prior": PRIORS,
    "schedule": SCHEDULES,
}


def find_owners(name: str) -> tuple[str, tuple[str, ...]] | None:
    """The option whose words an option belongs to, and those words; None for an option that every run may have.

    >>> find_owners("prior_layers")
    ('prior', ('flow',))
    """
    for choice, table in TABLES.items():
        words = tuple(word for word, part in table.items() if name in part.options)
        if words and len(words) < len(table):
            return choice, words
    return None
