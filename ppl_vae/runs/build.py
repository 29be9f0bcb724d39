"""From options to a VAE: every word becomes the part that it names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from itertools import pairwise
from typing import cast

import torch
from torch import nn

from ppl_vae import data
from ppl_vae.conditional import Conditional
from ppl_vae.hierarchy import BottomLayerOnly, BottomUp, HierarchicalVAE, LayeredPrior, TopDown
from ppl_vae.labels import ConditionalVAE, SemiSupervisedVAE
from ppl_vae.parts import likelihoods, networks
from ppl_vae.parts.incomplete import IncompleteVAE, ZeroFilled
from ppl_vae.parts.labelled import Classes, ClassFlow, LabelledDecoder, LabelledEncoder, SharedPrior
from ppl_vae.parts.registry import DENSE_NETWORKS, LIKELIHOODS, NETWORKS, POSTERIORS, PRIORS, find_owners
from ppl_vae.protocols import Likelihood
from ppl_vae.runs.options import PLAIN, Options, default_objective, format_flag
from ppl_vae.runtime.global_state import serialize_threads
from ppl_vae.vae import VAE

_OF_SEVERAL_LAYERS = ("upper_hidden", "inference", "decoder_input")


@serialize_threads()
def build_vae(options: Options, event_shape: Sequence[int]) -> VAE:
    """Builds the VAE that the options describe, with fresh weights from torch's global generator.

    With several layers of latents it is a ``HierarchicalVAE``, which has the same parts and the same two programs; with
    labels a ``ConditionalVAE``, whose parts and programs take the label too. The event shape is that of one image,
    (C, H, W), or of one row, (D,).
    """
    options = resolve_parts(options)
    assert options.prior is not None
    check_parts(options)
    network = NETWORKS[options.network].load()
    family = build_likelihood(options, event_shape)

    is_incomplete, with_mask = options.missing == "train", options.missing_mask == "on"

    def make_encoder(num_features: int, hidden: Sequence[int] = options.hidden or ()) -> nn.Module:
        first, *others = event_shape
        shape = (2 * first, *others) if with_mask else event_shape
        net = network.encoder(shape, num_features, channels=options.channels, hidden=hidden)
        if is_incomplete:
            net = ZeroFilled(net, with_mask=with_mask, event_dims=len(event_shape))
        # Pixels that are not zeros and ones may be in any unit.
        return net if family.data_kind == data.BINARY else networks.Standardized(net, event_shape)

    def make_decoder(num_latents: int) -> nn.Module:
        return network.decoder(
            num_latents,
            event_shape,
            family.num_features,
            channels=options.channels,
            hidden=options.hidden,
            dropout=options.dropout,
        )

    if options.upper_latents:
        built = cast(VAE, _build_hierarchy(options, event_shape, make_encoder, make_decoder, family))
    elif options.condition == "labels":
        built = cast(VAE, _build_conditional(options, make_encoder, make_decoder, family))
    else:
        guide = POSTERIORS[options.posterior].build(options, latent_dim=options.latent_dim)
        likelihood = Conditional(make_decoder(options.latent_dim), family)  # the order of fresh weights
        posterior = Conditional(make_encoder(guide.num_features), guide)
        context = {"latent_dim": options.latent_dim, "posterior": posterior, "event_shape": event_shape}
        kind = IncompleteVAE if is_incomplete else VAE
        built = kind(PRIORS[options.prior].build(options, **context), likelihood, posterior)
    if options.initialization == "wide":  # encoder and decoder, and with several layers also the prior
        parts = [built.get_submodule("likelihood"), built.get_submodule("posterior")]
        if isinstance(built, HierarchicalVAE):
            parts.append(built.prior.layers)
        if isinstance(built, ConditionalVAE):  # the last layer of the image's network is within the encoder
            net = built.get_submodule("posterior.net.net")
            parts.append(net.get_submodule("net.output" if isinstance(net, networks.Standardized) else "output"))
        if isinstance(built, SemiSupervisedVAE):
            parts.append(built.get_submodule("classifier"))
        if isinstance(built.posterior, TopDown):
            outputs = (getattr(feature, "output", None) for feature in built.posterior.features)
            parts += [output for output in outputs if isinstance(output, nn.Module)]
        for part in parts:
            networks.start_wide(part)
    return built


def build_meta_vae(options: Options, event_shape: Sequence[int]) -> VAE:
    """``build_vae`` on the meta device: weights have shapes and no numbers, and take no memory. Raises as it does."""
    with torch.device("meta"):
        return build_vae(options, event_shape)


def count_weights(options: Options, event_shape: Sequence[int]) -> int:
    """The number of weights of the VAE that the options describe."""
    return sum(w.numel() for w in build_meta_vae(options, event_shape).parameters())


def _build_hierarchy(
    options: Options,
    event_shape: Sequence[int],
    make_encoder: Callable[[int], nn.Module],
    make_decoder: Callable[[int], nn.Module],
    family: Likelihood,
) -> HierarchicalVAE:
    """Builds a VAE of several latent layers, with z_1 next to the image. The options are resolved."""
    assert options.upper_latents is not None
    assert options.hidden is not None
    assert options.prior is not None
    dims, hidden = (options.latent_dim, *options.upper_latents), options.upper_hidden
    dense = NETWORKS[options.network].load().dense

    def make_conditional(num_inputs: int, latent_dim: int, widths: Sequence[int]) -> Conditional:
        normal = POSTERIORS["diagonal"].build(options, latent_dim=latent_dim)
        return Conditional(dense(num_inputs, normal.num_features, hidden=widths), normal)

    top = PRIORS[options.prior].build(options, latent_dim=dims[-1], posterior=None, event_shape=event_shape)
    prior = LayeredPrior(top, [make_conditional(above, L, hidden[::-1]) for L, above in pairwise(dims)])
    if options.inference == "bottom-up":
        normal = POSTERIORS["diagonal"].build(options, latent_dim=dims[0])
        first = Conditional(make_encoder(normal.num_features), normal)
        guide: BottomUp | TopDown = BottomUp(
            [first, *(make_conditional(L, above, hidden) for L, above in pairwise(dims))]
        )
    else:
        widths = [options.hidden[-1]] + [hidden[-1]] * (len(dims) - 1)
        features = [make_encoder(widths[0]), *(dense(F, G, hidden=hidden[:-1]) for F, G in pairwise(widths))]
        guide = TopDown(features, [make_conditional(F, L, ()) for F, L in zip(widths, dims, strict=True)], prior)
    net = make_decoder(sum(dims)) if options.decoder_input == "all" else BottomLayerOnly(make_decoder(dims[0]), dims)
    return HierarchicalVAE(prior, Conditional(net, family), guide)


def _build_conditional(
    options: Options,
    make_encoder: Callable[..., nn.Module],
    make_decoder: Callable[[int], nn.Module],
    family: Likelihood,
) -> ConditionalVAE:
    """Builds a VAE of labelled images whose classes are equally probable. The options are resolved.

    The label joins the image's features before the last hidden layer of the encoder, and z before the decoder.
    """
    assert options.classes is not None
    assert options.hidden is not None
    assert options.prior is not None
    K, L, width = options.classes, options.latent_dim, options.hidden[-1]
    guide = POSTERIORS[options.posterior].build(options, latent_dim=L)
    likelihood = Conditional(LabelledDecoder(make_decoder(L + K), K), family)
    head = NETWORKS[options.network].load().dense(width + K, guide.num_features, hidden=(width,))
    encoder = LabelledEncoder(make_encoder(width, options.hidden[:-1]), head, K)
    prior, class_probs = PRIORS[options.prior].build(options, latent_dim=L), torch.full((K,), 1 / K)
    posterior = Conditional(encoder, guide)
    if options.labels is not None:
        classifier = Conditional(make_encoder(K, options.hidden), Classes(K))
        return SemiSupervisedVAE(SharedPrior(prior), likelihood, posterior, class_probs, classifier)
    prior = ClassFlow(K, prior.flow, L) if options.prior == "flow" else SharedPrior(prior)
    return ConditionalVAE(prior, likelihood, posterior, class_probs)


def build_likelihood(options: Options, event_shape: Sequence[int]) -> Likelihood:
    """Builds the likelihood that the options name, with fresh parameters. Refuses an option of another likelihood."""
    _check_owners(options, "likelihood")
    family = LIKELIHOODS[options.likelihood].build(options, event_shape=event_shape)
    if options.transform == "none":
        return family
    if family.data_kind != data.REAL or not likelihoods.has_quantiles(family):
        raise ValueError(
            "--transform logit: expected a density of real numbers with quantiles (a normal, or laplace), got "
            f"--likelihood {options.likelihood}"
        )
    return likelihoods.Logit(family)


def check_parts(options: Options) -> None:
    """Raises ValueError for an option of a part that was not chosen, and for parts at odds. The parts are resolved."""
    for choice in ("prior", "posterior", "objective", "schedule"):
        _check_owners(options, choice)
    if is_autoencoder(options) and options.prior != "standard-normal":
        raise ValueError(
            f"--posterior delta: expected --prior standard-normal, got {options.prior}: without a KL nothing trains a "
            "prior"
        )
    if options.condition == "labels":
        _check_condition(options)
    elif options.classes is not None:
        raise ValueError(f"--classes: expected it together with --condition labels, got {options.classes} alone")
    if options.missing_mask == "on" and options.missing != "train":
        raise ValueError(f"--missing-mask: expected off without --missing train, got {options.missing_mask}")
    if options.missing == "train" and options.upper_latents is not None:
        raise ValueError("--missing train: expected one layer of latents, got --upper-latents")
    if options.upper_latents is None:
        usual = Options()
        for name in _OF_SEVERAL_LAYERS:
            if getattr(options, name) != getattr(usual, name):
                raise ValueError(f"{format_flag(name)}: expected it together with --upper-latents, got it alone")
        return
    if options.posterior != "diagonal":
        raise ValueError(f"--upper-latents: expected --posterior diagonal at every layer, got {options.posterior}")
    if options.prior == "vamp":
        raise ValueError(
            "--upper-latents: expected a --prior with a density of its own, got vamp (the guide's density of the top "
            "layer alone has no formula)"
        )


def _check_condition(options: Options) -> None:
    """Raises ValueError for options that a VAE of labelled images does not have."""
    if options.classes is None:
        raise ValueError("--condition labels: expected --classes, the number of classes, got none")
    for name, refused in (("prior", ("vamp",)), ("posterior", ("delta",)), ("missing", ("train",))):
        if getattr(options, name) in refused:
            raise ValueError(f"--condition labels: expected another {format_flag(name)}, got {getattr(options, name)}")
    if options.upper_latents is not None:
        raise ValueError("--condition labels: expected one layer of latents, got --upper-latents")


def _check_owners(options: Options, choice: str) -> None:
    """Raises ValueError for an option of a part that was not chosen."""
    usual = Options()
    for name in (spec.name for spec in fields(options)):
        owners = find_owners(name)
        if owners is None or owners[0] != choice:
            continue
        is_default = getattr(options, name) in (getattr(usual, name), PLAIN.get(name))
        if not is_default and getattr(options, choice) not in owners[1]:
            raise ValueError(
                f"{format_flag(name)}: expected {format_flag(choice)} {' or '.join(owners[1])}, got "
                f"{getattr(options, choice)}"
            )


def resolve_parts(options: Options) -> Options:
    """The options with the defaults filled in that depend on other options alone.

    Widths are two layers of 300 (Tomczak and Welling 2018), or one of 256 next to convolutions. The prior is a flow, or
    N(0, I) if the KL is in closed form or absent, or there is a single latent.
    """
    has_closed_form = options.kl == "analytic" or options.objective == "free-bits"
    top = (options.upper_latents or (options.latent_dim,))[-1]
    is_plain = has_closed_form or is_autoencoder(options) or top == 1 or options.labels is not None
    return replace(
        options,
        condition="labels" if options.labels is not None else options.condition,
        hidden=options.hidden or ((300, 300) if options.network in DENSE_NETWORKS else (256,)),
        prior=options.prior or ("standard-normal" if is_plain else "flow"),
        objective=options.objective or default_objective(options),
    )


def is_autoencoder(options: Options) -> bool:
    """Whether the guide is deterministic, so that there are reconstructions but no ELBO, KL or log-likelihood."""
    return options.posterior == "delta"
