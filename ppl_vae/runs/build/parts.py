"""Words to parts: p(z), p(x | z) and q(z | x), and the VAE that they make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ppl_vae import data
from ppl_vae.conditional import Conditional
from ppl_vae.hierarchy import BottomUp, HierarchicalVAE, LayeredPrior, OfBottomLayer, TopDown
from ppl_vae.log_weights import is_deterministic
from ppl_vae.parts import flows, likelihoods, networks, posteriors, priors
from ppl_vae.runs.options import PLAIN, Options, default_hidden, default_objective, default_prior, flag
from ppl_vae.runtime.global_state import seeded, serialize_threads
from ppl_vae.vae import VAE

LIKELIHOODS: dict[str, Callable[..., Any]] = {
    "bernoulli": likelihoods.Bernoulli,
    "categorical": likelihoods.Categorical,
    "discretized-logistic": likelihoods.DiscretizedLogistic,
    "discretized-logistic-mixture": likelihoods.DiscretizedLogisticMixture,
    "binomial": likelihoods.Binomial,
    "continuous-bernoulli": likelihoods.ContinuousBernoulli,
    "beta": likelihoods.Beta,
    "logit-normal": likelihoods.LogitNormal,
    "normal": likelihoods.Normal,
    "normal-fixed": likelihoods.NormalFixed,
    "normal-optimal": likelihoods.NormalOptimal,
    "normal-per-pixel": likelihoods.NormalPerPixel,
    "laplace": likelihoods.Laplace,
    "student-t": likelihoods.StudentT,
    "poisson": likelihoods.Poisson,
    "negative-binomial": likelihoods.NegativeBinomial,
}


class Network(NamedTuple):
    """An encoder, its decoder, and what goes with them between further layers of latents.

    Args:
        encoder: (event_shape, num_features, *, channels, hidden) -> network, images to features.
        decoder: (latent_dim, event_shape, num_features, *, channels, hidden) -> network, latents to features; hidden
            in the encoder's order.
        dense: (num_inputs, num_features, *, hidden) -> network, vectors to features.
    """

    encoder: Callable[..., nn.Module]
    decoder: Callable[..., nn.Module]
    dense: Callable[..., nn.Module]


def _dense(network: Callable[..., nn.Module]) -> Network:
    """The same network both ways; it sees neither channels nor positions."""

    def encoder(event_shape: Any, num_features: int, *, channels: Any, hidden: Sequence[int]) -> nn.Module:
        return network(event_shape, num_features, hidden=hidden)

    def decoder(latent_dim: int, event_shape: Any, num_features: int, *, channels: Any, hidden: Any) -> nn.Module:
        return network(latent_dim, num_features, hidden=hidden[::-1])

    return Network(encoder, decoder, network)


def _convolutional(*, gated: bool, num_blocks: int) -> Network:
    def decoder(latent_dim: int, event_shape: Any, num_features: int, *, channels: Any, hidden: Any) -> nn.Module:
        return networks.ConvDecoder(
            latent_dim,
            event_shape,
            num_features,
            channels=channels,
            hidden=hidden[::-1],
            gated=gated,
            num_blocks=num_blocks,
        )

    encoder = partial(networks.ConvEncoder, gated=gated, num_blocks=num_blocks)
    return Network(encoder, decoder, networks.GatedMLP if gated else networks.MLP)


NETWORKS: dict[str, Network] = {
    "mlp": _dense(networks.MLP),
    "tanh": _dense(partial(networks.MLP, activation=nn.Tanh)),
    "gated": _dense(networks.GatedMLP),
    "conv": _convolutional(gated=False, num_blocks=0),
    "gated-conv": _convolutional(gated=True, num_blocks=0),
    "residual": _convolutional(gated=False, num_blocks=1),
    "gated-residual": _convolutional(gated=True, num_blocks=1),
}


def _standard_normal(options: Options, L: int, posterior: Any, event_shape: Sequence[int]) -> nn.Module:
    return priors.StandardNormal(L)


def _mixture(options: Options, L: int, posterior: Any, event_shape: Sequence[int]) -> nn.Module:
    return priors.Mixture(L, components=options.prior_components)


def _vamp(options: Options, L: int, posterior: Any, event_shape: Sequence[int]) -> nn.Module:
    return priors.VampPrior(posterior, event_shape, components=options.prior_components)


def _flow(options: Options, L: int, posterior: Any, event_shape: Sequence[int]) -> nn.Module:
    coupling = flows.COUPLINGS[options.prior_flow]
    found = flows.Flow.of_couplings(L, coupling=coupling, num_layers=options.prior_layers, hidden=options.prior_hidden)
    return priors.Flow(L, flow=found)


# (options, L, the guide's posterior, event_shape) -> the prior
PRIORS: dict[str, Callable[..., nn.Module]] = {
    "standard-normal": _standard_normal,
    "mixture": _mixture,
    "vamp": _vamp,
    "flow": _flow,
}


def _flow_posterior(options: Options, L: int, **scale_map: Any) -> nn.Module:
    kinds = {"iaf": posteriors.inverse_autoregressive_flow, "spline": posteriors.spline_flow}
    hidden = options.posterior_hidden
    return kinds[options.posterior_flow](
        L, context_dim=hidden[0], num_layers=options.posterior_layers, hidden=hidden, **scale_map
    )


# (options, L, scale map) -> the family of q(z | h)
POSTERIORS: dict[str, Callable[..., Any]] = {
    "diagonal": lambda options, L, **scale_map: posteriors.DiagonalNormal(L, **scale_map),
    "full": lambda options, L, **scale_map: posteriors.FullNormal(L, **scale_map),
    "flow": _flow_posterior,
    "delta": lambda options, L, **scale_map: posteriors.Delta(L),
}


def has_closed_form_kl(options: Options, *, by_latent: bool) -> bool:
    """Whether torch has a formula for KL(q(z | x) || p(z)), or for that of each latent.

    Args:
        options: ``decided``.
        by_latent: whether a formula for each latent is asked for, as ``objectives.free_bits`` needs it.
    """
    assert options.prior is not None
    L = (options.latent_dim, *(options.upper_latents or ()))[-1]
    with seeded(0, torch.device("cpu")):
        family = POSTERIORS[options.posterior](options, L)
        q = family(torch.zeros(1, family.num_features))
        p = PRIORS[options.prior](options, L, lambda u: family(torch.zeros(len(u), family.num_features)), (1,))()
    if by_latent and is_deterministic(q):
        return False
    if by_latent:
        q, p = (getattr(distribution, "base_dist", distribution) for distribution in (q, p))
    try:
        kl = torch.distributions.kl_divergence(q, p)
    except NotImplementedError:
        return False
    return tuple(kl.shape) == ((1, L) if by_latent else (1,))


SCALE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "bounded": posteriors.bounded_log_scale,
    "exp": posteriors.exponential_log_scale,
    "softplus": posteriors.softplus_log_scale,
}


@serialize_threads()
def vae(options: Options, event_shape: Sequence[int]) -> VAE:
    """The VAE that the options describe, for images of that shape, with fresh weights from torch's global generator.

    With several layers of latents it is a ``HierarchicalVAE``, which has the same parts and the same two programs.

    Raises:
        ValueError: an option of a part that was not chosen, or parts that do not go together.
    """
    options = decided(options)
    assert options.prior is not None
    _check_own_options(options)
    network, L = NETWORKS[options.network], options.latent_dim
    sizes = {"channels": options.channels, "hidden": options.hidden}
    family = likelihood(options, event_shape)

    def encoder(num_features: int) -> nn.Module:
        net = network.encoder(event_shape, num_features, **sizes)
        # Pixels may be in a unit of their own.
        return net if family.data_kind == data.BINARY else networks.Standardized(net, event_shape)

    def decoder(num_latents: int) -> nn.Module:
        return network.decoder(num_latents, event_shape, family.num_features, **sizes)

    if options.upper_latents:
        built = cast(VAE, _hierarchy(options, event_shape, encoder, decoder, family))
    else:
        posterior = POSTERIORS[options.posterior](options, L, **_scale_map(options))
        p_x_given_z = Conditional(decoder(L), family)
        q_z_given_x = Conditional(encoder(posterior.num_features), posterior)
        built = VAE(PRIORS[options.prior](options, L, q_z_given_x, event_shape), p_x_given_z, q_z_given_x)
    if options.initialization == "wide":
        for part in _dense_parts(built):
            networks.start_wide(part)
    return built


def _dense_parts(vae: Any) -> list[nn.Module]:
    """What starts wide: encoder and decoder; of several layers the prior's too, and what lies between features."""
    parts = [vae.likelihood, vae.posterior]
    if isinstance(vae, HierarchicalVAE):
        parts.append(vae.prior.layers)
    if isinstance(vae.posterior, TopDown):
        parts += [feature.output for feature in vae.posterior.features if hasattr(feature, "output")]
    return parts


def _hierarchy(
    options: Options,
    event_shape: Sequence[int],
    encoder: Callable[[int], nn.Module],
    decoder: Callable[[int], nn.Module],
    family: Any,
) -> HierarchicalVAE:
    """Several layers of latents, z_1 next to the image: see ``hierarchy``. The options are ``decided``."""
    assert options.upper_latents is not None
    assert options.hidden is not None
    assert options.prior is not None
    dims, hidden = (options.latent_dim, *options.upper_latents), options.upper_hidden
    dense = NETWORKS[options.network].dense

    def family_of(latent_dim: int) -> nn.Module:
        return posteriors.DiagonalNormal(latent_dim, **_scale_map(options))

    def conditional(num_inputs: int, latent_dim: int, widths: Sequence[int]) -> Conditional:
        return Conditional(dense(num_inputs, 2 * latent_dim, hidden=widths), family_of(latent_dim))

    top = PRIORS[options.prior](options, dims[-1], None, event_shape)
    prior = LayeredPrior(top, [conditional(above, L, hidden[::-1]) for L, above in pairwise(dims)])
    if options.inference == "bottom-up":
        first = Conditional(encoder(2 * dims[0]), family_of(dims[0]))
        guide: Any = BottomUp([first, *(conditional(L, above, hidden) for L, above in pairwise(dims))])
    else:
        widths = [options.hidden[-1]] + [hidden[-1]] * (len(dims) - 1)
        features = [encoder(widths[0]), *(dense(F, G, hidden=hidden[:-1]) for F, G in pairwise(widths))]
        guide = TopDown(features, [conditional(F, L, ()) for F, L in zip(widths, dims, strict=True)], prior)
    net = decoder(sum(dims)) if options.decoder_input == "all" else OfBottomLayer(decoder(dims[0]), dims)
    return HierarchicalVAE(prior, Conditional(net, family), guide)


# An option that is of some words of another option alone: the other, its words, and what they are called.
_OF_WORDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "prior_components": ("prior", ("mixture", "vamp")),
    "prior_flow": ("prior", ("flow",)),
    "prior_layers": ("prior", ("flow",)),
    "prior_hidden": ("prior", ("flow",)),
    "posterior_flow": ("posterior", ("flow",)),
    "posterior_layers": ("posterior", ("flow",)),
    "posterior_hidden": ("posterior", ("flow",)),
    "scale_map": ("posterior", ("diagonal", "full", "flow")),
    "decay_start": ("schedule", ("cosine",)),
    "free_bits": ("objective", ("free-bits",)),
}


def _check_own_options(options: Options) -> None:
    """Raises ValueError for an option of a part that was not chosen, which would do nothing, and for parts at odds.

    Args:
        options: ``decided``.
    """
    usual = Options()
    for name, (of, words) in _OF_WORDS.items():
        unsaid = (getattr(usual, name), PLAIN.get(name))
        if getattr(options, name) not in unsaid and getattr(options, of) not in words:
            raise ValueError(
                f"{flag(name)}: expected {flag(of)} {' or '.join(words)}, which it is of, got {getattr(options, of)}"
            )
    if is_autoencoder(options) and options.prior != "standard-normal":
        raise ValueError(
            f"--posterior delta: expected --prior standard-normal, got {options.prior}: without a KL nothing trains a "
            "prior"
        )
    if options.upper_latents is None:
        for name in ("upper_hidden", "inference", "decoder_input"):
            if getattr(options, name) != getattr(usual, name):
                raise ValueError(f"{flag(name)}: expected --upper-latents beside it, which it is of, got none")
        return
    if options.posterior != "diagonal":
        raise ValueError(f"--upper-latents: expected --posterior diagonal at every layer, got {options.posterior}")
    if options.prior == "vamp":
        raise ValueError(
            "--upper-latents: expected a --prior with a density of its own, got vamp (the guide's density of the top "
            "layer alone has no formula)"
        )


def _scale_map(options: Options) -> dict[str, Any]:
    return {"log_scale": SCALE_MAPS[options.scale_map]}


def decided(options: Options) -> Options:
    """The options with the words that depend on others alone, where they were left open."""
    return replace(
        options,
        hidden=options.hidden or default_hidden(options.network),
        prior=options.prior or default_prior(options),
        objective=options.objective or default_objective(options),
    )


def is_autoencoder(options: Options) -> bool:
    """A deterministic guide: there are reconstructions, and no ELBO, KL or log-likelihood."""
    return options.posterior == "delta"


# An option of one likelihood alone, and that class's argument.
OWN_OPTIONS = {
    "normal-fixed": ("likelihood_scale", "scale"),
    "discretized-logistic-mixture": ("likelihood_components", "components"),
}


def likelihood(options: Options, event_shape: Sequence[int]) -> Any:
    """The likelihood that the options name, with fresh parameters.

    Raises:
        ValueError: a transform that it cannot have, or an option of another likelihood.
    """
    own = {}
    for word, (name, argument) in OWN_OPTIONS.items():
        if options.likelihood == word:
            own[argument] = getattr(options, name)
        elif getattr(options, name) != getattr(Options(), name):
            raise ValueError(f"{flag(name)}: expected --likelihood {word}, which it is of, got {options.likelihood}")
    family = LIKELIHOODS[options.likelihood](event_shape, **own)
    if options.transform == "none":
        return family
    if family.data_kind != data.REAL or not likelihoods.has_quantiles(family):
        raise ValueError(
            "--transform logit: expected a density of real numbers with quantiles (a normal, or laplace), got "
            f"--likelihood {options.likelihood}"
        )
    return likelihoods.Logit(family)
