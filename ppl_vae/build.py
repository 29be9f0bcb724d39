"""Options to parts: the one place where a word becomes an object."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from ppl_vae import capture, data, flows, likelihoods, networks, objectives, posteriors, priors, runs, schedules
from ppl_vae.conditional import Conditional
from ppl_vae.hierarchy import BottomUp, HierarchicalVAE, LayeredPrior, OfBottomLayer, TopDown
from ppl_vae.options import Options, compiling_pays, default_hidden, default_warmup, flag, from_json, to_json
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
    """An encoder and its decoder.

    Args:
        encoder: (event_shape, num_features, *, channels, hidden) -> network, images to features.
        decoder: (latent_dim, event_shape, num_features, *, channels, hidden) -> network, latents to features; hidden
            in the encoder's order.
    """

    encoder: Callable[..., nn.Module]
    decoder: Callable[..., nn.Module]


def _dense(network: Callable[..., nn.Module]) -> Network:
    """The same network both ways; it sees neither channels nor positions."""

    def encoder(event_shape: Any, num_features: int, *, channels: Any, hidden: Sequence[int]) -> nn.Module:
        return network(event_shape, num_features, hidden=hidden)

    def decoder(latent_dim: int, event_shape: Any, num_features: int, *, channels: Any, hidden: Any) -> nn.Module:
        return network(latent_dim, num_features, hidden=hidden[::-1])

    return Network(encoder, decoder)


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

    return Network(partial(networks.ConvEncoder, gated=gated, num_blocks=num_blocks), decoder)


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
SCALE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "bounded": posteriors.bounded_log_scale,
    "exp": posteriors.exponential_log_scale,
    "softplus": posteriors.softplus_log_scale,
}
KLS: dict[str, type[ELBO]] = {"sampled": Trace_ELBO, "analytic": TraceMeanField_ELBO}


def _elbo(options: Options) -> Callable[..., Tensor]:
    return partial(objectives.elbo, estimator=KLS[options.kl], num_particles=options.num_particles)


def _free_bits(options: Options) -> Callable[..., Tensor]:
    return partial(objectives.free_bits, free_nats=options.free_bits, num_particles=options.num_particles)


def _cosine(options: Options) -> Callable[..., float]:
    return partial(schedules.cosine, start=options.decay_start)


def _stages(options: Options) -> Callable[..., float]:
    return schedules.stages


RATES: dict[str, Callable[[Options], Callable[..., float]]] = {"cosine": _cosine, "stages": _stages}


def _importance(objective: Callable[..., Tensor]) -> Callable[[Options], Callable[..., Tensor]]:
    return lambda options: partial(objective, num_particles=options.num_particles)


OBJECTIVES: dict[str, Callable[[Options], Callable[..., Tensor]]] = {
    "elbo": _elbo,
    "free-bits": _free_bits,
    "iwae": _importance(objectives.iwae),
    "dreg": _importance(objectives.dreg),
    "stl": _importance(objectives.stl),
}


def vae(options: Options, event_shape: Sequence[int]) -> VAE:
    """The VAE that the options describe, for images of that shape, with fresh weights from torch's global generator.

    With several layers of latents it is a ``HierarchicalVAE``, which has the same parts and the same two programs.

    Raises:
        ValueError: an option of a part that was not chosen, or parts that do not go together.
    """
    _check_own_options(options)
    network, L = NETWORKS[options.network], options.latent_dim
    sizes = {"channels": options.channels, "hidden": options.hidden or default_hidden(options.network)}
    family = likelihood(options, event_shape)

    def encoder(num_features: int) -> nn.Module:
        net = network.encoder(event_shape, num_features, **sizes)
        # Pixels may be in a unit of their own.
        return net if family.asks_for == data.BINARY else networks.Standardized(net, event_shape)

    def decoder(num_latents: int) -> nn.Module:
        return network.decoder(num_latents, event_shape, family.num_features, **sizes)

    if options.upper_latents:
        built = cast(VAE, _hierarchy(options, event_shape, encoder, decoder, family))
    else:
        posterior = POSTERIORS[options.posterior](options, L, **_scale_map(options))
        likelihood_of_z, guide = (
            Conditional(decoder(L), family),
            Conditional(encoder(posterior.num_features), posterior),
        )
        built = VAE(PRIORS[options.prior](options, L, guide, event_shape), likelihood_of_z, guide)
    if options.initialization == "wide":
        for part in (built.likelihood, built.posterior):
            networks.start_wide(cast(nn.Module, part))
    return built


def _hierarchy(
    options: Options,
    event_shape: Sequence[int],
    encoder: Callable[[int], nn.Module],
    decoder: Callable[[int], nn.Module],
    family: Any,
) -> HierarchicalVAE:
    """Several layers of latents, z_1 next to the image: see ``hierarchy``."""
    assert options.upper_latents is not None
    dims, hidden = (options.latent_dim, *options.upper_latents), options.upper_hidden
    dense = _DENSE.get(options.network, networks.MLP)

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
        widths = [(options.hidden or default_hidden(options.network))[-1]] + [hidden[-1]] * (len(dims) - 1)
        features = [encoder(widths[0]), *(dense(F, G, hidden=hidden[:-1]) for F, G in pairwise(widths))]
        guide = TopDown(features, [conditional(F, L, ()) for F, L in zip(widths, dims, strict=True)], prior)
    net = decoder(sum(dims)) if options.decoder_input == "all" else OfBottomLayer(decoder(dims[0]), dims)
    return HierarchicalVAE(prior, Conditional(net, family), guide)


_DENSE: dict[str, Callable[..., nn.Module]] = {
    "tanh": partial(networks.MLP, activation=nn.Tanh),
    "gated": networks.GatedMLP,
    "gated-conv": networks.GatedMLP,
    "gated-residual": networks.GatedMLP,
}  # of further layers of latents, by the network next to the image; rectified MLPs beside the others

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
    """Raises ValueError for an option of a part that was not chosen, which would do nothing, and for parts at odds."""
    for name, (of, words) in _OF_WORDS.items():
        if getattr(options, name) != getattr(Options(), name) and getattr(options, of) not in words:
            raise ValueError(
                f"{flag(name)}: expected {flag(of)} {' or '.join(words)}, which it is of, got {getattr(options, of)}"
            )
    if options.upper_latents is None:
        for name in ("upper_hidden", "inference", "decoder_input"):
            if getattr(options, name) != getattr(Options(), name):
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


def is_autoencoder(options: Options) -> bool:
    """A deterministic guide: there are reconstructions, and no ELBO, KL or log-likelihood."""
    return options.posterior == "delta"


def _check_objective(options: Options) -> None:
    """Raises ValueError for an objective that the posterior cannot have, or an option of another objective."""
    if options.objective in ("iwae", "dreg", "stl") and options.kl != Options().kl:
        raise ValueError(f"--kl: {options.objective} samples the KL; expected no --kl beside it")
    if options.objective == "free-bits" and options.kl != Options().kl:
        raise ValueError("--kl: free-bits takes the KL of each latent in closed form; expected no --kl beside it")
    closed = options.objective == "free-bits" or options.kl == "analytic"
    if closed and options.upper_latents and options.inference == "bottom-up":
        raise ValueError(
            "--inference bottom-up: expected a sampled KL (no --kl analytic, no free-bits), got one in closed form, "
            "which a guide that draws against the model's order has not"
        )
    if is_autoencoder(options) and options.objective != "elbo":
        raise ValueError(f"--objective {options.objective}: expected --posterior diagonal, got {options.posterior}")
    if is_autoencoder(options) and options.beta != 0:
        raise ValueError(
            "--posterior delta: expected --beta 0 (a deterministic guide has no KL: it makes a plain autoencoder), got "
            f"--beta {options.beta:g}"
        )


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
    if family.asks_for != data.REAL or not likelihoods.has_quantiles(family):
        raise ValueError(
            "--transform logit: expected a density of real numbers with quantiles (a normal, or laplace), got "
            f"--likelihood {options.likelihood}"
        )
    return likelihoods.Logit(family)


def data_options(options: Options) -> dict[str, Any]:
    """What decides the data set, as ``data.load`` takes it."""
    names = ("dataset", "data_dir", "protocol", "image_size", "fit", "color")
    return {name: getattr(options, name) for name in names}


def splits(options: Options) -> data.Splits:
    """The data set that the options ask for. Raises ValueError as ``data.load``."""
    return data.load(**data_options(options))


def pixels(options: Options, seen: data.Splits) -> str:
    """How the model sees pixels: the word of ``data.PIXELS`` for the options (resolved) and the data."""
    assert options.binarization is not None
    if options.binarization != "none" or seen.kind != data.LEVELS:
        return options.binarization
    if options.dequantization == "uniform":
        return "dequantized"
    return "levels" if likelihood(options, seen.event_shape).asks_for in (data.LEVELS, data.COUNTS) else "none"


def evaluated_pixels(options: Options, seen: data.Splits) -> str:
    """How images are evaluated: as the model sees them, but for dequantized levels, whose mass is evaluated."""
    word = pixels(options, seen)
    return "levels" if word == "dequantized" else word


def scale(options: Options, seen: data.Splits) -> str:
    """What the reported nats are of, in words: numbers with other words are on another scale, and never compared."""
    word = evaluated_pixels(options, seen)
    if word == "levels":
        return "mass of 8-bit levels"
    measure = likelihood(options, seen.event_shape).measure
    if word != "none" or seen.kind == data.BINARY:
        return f"{measure} of binary pixels"
    if seen.kind == data.LEVELS:
        return f"{measure} of level / 255"
    return f"{measure} of {seen.kind}"


_LEAST_SPREAD = 1e-15  # of real pixels: a density squares deviations and scales, in float32


def check_support(options: Options, seen: data.Splits) -> None:
    """Refuses data that the likelihood has no probability for, as the options (resolved) bring it to the model.

    Raises:
        ValueError: pixels off the support, zeros and ones under anything that asks for gray or real pixels, or, for a
            density, one image again and again.
    """
    family = likelihood(options, seen.event_shape)
    word = f"--likelihood {options.likelihood}"
    if options.binarization != "none":
        if family.asks_for != data.BINARY:
            raise ValueError(
                f"{word}: expected --binarization none, got {options.binarization}: it asks for {family.asks_for}, and "
                "has no use for pixels that were made zeros and ones"
            )
        return
    _check_kind(word, family, seen)
    # Levels are on the support of whatever takes levels, and dequantized ones are between 0 and 1.
    for split in ("train", "validation", "test") if pixels(options, seen) == "none" else ():
        if not family.support.check(data.probabilities(seen, split)).all():
            raise ValueError(
                f"{word}: expected pixels that are {family.support_words}, got {seen.kind} in {split}; "
                f"{_cure(seen, family)}"
            )
    if family.measure == "density":
        spread = seen.spread
        if spread == 0:
            raise ValueError(f"{word}: expected training images that differ, got {len(seen.train):,} of one image")
        if not _LEAST_SPREAD <= spread <= 1 / _LEAST_SPREAD:
            raise ValueError(
                f"{word}: expected pixels that spread by {_LEAST_SPREAD:g} to {1 / _LEAST_SPREAD:g}, got "
                f"{spread:.3g}; in another unit their squares can be computed in single precision"
            )


def _check_kind(word: str, family: Any, seen: data.Splits) -> None:
    """Refuses data whose values may lie on the support, but are of something else."""
    if family.asks_for == data.LEVELS and seen.kind != data.LEVELS:
        raise ValueError(f"{word}: expected {data.LEVELS} (uint8, or pictures), got {seen.kind}; {_cure(seen, family)}")
    if family.asks_for == data.UNIT_INTERVAL and seen.kind == data.BINARY:
        raise ValueError(f"{word}: expected {data.UNIT_INTERVAL}, got zeros and ones, which no density is of")


def _cure(seen: data.Splits, family: Any) -> str:
    """What takes such pixels, or brings them where this likelihood takes them."""
    if family.asks_for == data.BINARY and seen.kind in (data.LEVELS, data.PROBABILITIES):
        return "another --binarization makes them so"
    if isinstance(family, likelihoods.Logit):
        return "--transform none takes them"
    cures = {
        data.BINARY: "--likelihood bernoulli takes them",
        data.LEVELS: "--dequantization uniform makes them so",
        data.PROBABILITIES: "--likelihood continuous-bernoulli or normal takes them",
        data.REAL: "--likelihood normal takes them",
        data.COUNTS: "--likelihood negative-binomial takes them",
    }
    is_bytes = seen.kind == data.COUNTS and seen.train.max() <= 255 and family.asks_for == data.LEVELS
    as_bytes = "; saved as uint8 they are 8-bit levels" if is_bytes else ""
    return cures[seen.kind] + as_bytes


def _resolve_dequantization(options: Options, seen: data.Splits, binarization: str, measure: str) -> str:
    if seen.kind == data.LEVELS and binarization == "none" and measure == "density":
        return options.dequantization or "uniform"
    if options.dequantization == "uniform":
        kind = seen.kind if binarization == "none" else data.BINARY
        raise ValueError(
            f"--dequantization: expected none for a {measure} of {kind}, got uniform: it makes 8-bit levels "
            "fit for a density"
        )
    return "none"


def resolve(options: Options, seen: data.Splits) -> Options:
    """The options with every default that depends on others or on the data decided, and with absolute paths.

    Raises:
        ValueError: a binarization, dequantization or transform that the data, the likelihood or the protocol cannot
            have, or a compiler or a precision that this machine has not.
    """
    family = likelihood(options, seen.event_shape)
    default = "dynamic" if family.asks_for == data.BINARY else "none"
    found = data.resolve_binarization(seen, options.binarization, default=default)
    if options.protocol == "iwae" and found != "dynamic":
        raise ValueError(f"--protocol iwae: expected --binarization dynamic, which it is a protocol of, got {found}")
    warmup = options.warmup_epochs
    if warmup is None:
        warmup = 0 if options.start_from else default_warmup(options.epochs)
    named = options.dataset in data.DATASETS
    check_precision(options)
    _check_objective(options)
    compiled = compiles(options.compile, planned_steps(options, len(seen.train)), device(options.device))
    return replace(
        options,
        compile="on" if compiled else "off",
        binarization=found,
        dequantization=_resolve_dequantization(options, seen, found, family.measure),
        warmup_epochs=warmup,
        keep=options.keep or ("best" if options.beta == 1 or is_autoencoder(options) else "last"),
        hidden=options.hidden or default_hidden(options.network),
        dataset=options.dataset if named else str(Path(options.dataset).resolve()),
        data_dir=str(Path(options.data_dir).resolve()) if options.data_dir else None,
        start_from=str(Path(options.start_from).resolve()) if options.start_from else None,
    )


def planned_steps(options: Options, num_images: int) -> int:
    """The steps of a training on so many images."""
    return options.epochs * math.ceil(num_images / options.batch_size)


def compiles(word: str, num_runs: int, place: torch.device) -> bool:
    """Whether a graph that will run so many times is compiled, by the word of --compile.

    Raises:
        ValueError: it is "on", and nothing can be compiled for that device.
    """
    if word == "on":
        check_compiler(place)
    return word == "on" or (word == "auto" and compiling_pays(num_runs) and capture.why_not(place) is None)


def why_not_compiled(options: Options, num_images: int) -> str | None:
    """Why ``--compile auto`` became off although compiling would pay; None where it did not, or would not."""
    pays = options.compile == "off" and compiling_pays(planned_steps(options, num_images))
    return capture.why_not(device(options.device)) if pays else None


def check_compiler(place: torch.device) -> None:
    """Raises ValueError where nothing can be compiled for that device."""
    reason = capture.why_not(place)
    if reason is not None:
        raise ValueError(f"--compile on: {reason}; --compile off does without")


def check_precision(options: Options) -> None:
    """Raises ValueError where the device has no arithmetic of that precision, and would emulate it at a crawl."""
    place = device(options.device)
    recent_gpu = place.type == "cuda" and torch.cuda.get_device_capability(place) >= (8, 0)
    bf16_cpu = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if options.precision == "tf32" and not recent_gpu:
        raise ValueError(f"--precision tf32: expected an NVIDIA GPU since Ampere, got {place}")
    if options.precision == "bf16" and not (recent_gpu or (place.type == "cpu" and bf16_cpu)):
        raise ValueError(
            "--precision bf16: expected hardware for it (a CPU with AVX512-BF16 or AMX, or a recent GPU), "
            f"got {place} without"
        )


def config(options: Options, seen: data.Splits) -> dict[str, Any]:
    """What config.json holds of a run with these options (resolved) on this data."""
    return {
        "options": to_json(options),
        "data": {"kind": seen.kind, "event_shape": list(seen.event_shape), "sha256": seen.sha256},
    }


def start_from_marginals(vae: VAE, x: Tensor) -> None:
    """Sets the decoder's output bias, and units where there are any, so that training starts from the marginals.

    Args:
        x: (N, *E) training images as the model sees them, or their expectation.

    Source: Burda et al. 2016, arXiv 1509.00519, released code (output bias from the training pixels' means).
    """
    decoder: Any = vae.likelihood
    encoder: Any = vae.posterior
    prior: Any = vae.prior
    with torch.no_grad():
        decoder.net.output.bias.copy_(decoder.family.fit_marginals(x))
        if isinstance(encoder.net, networks.Standardized):
            encoder.net.fit_marginals(x)
        if isinstance(prior, priors.VampPrior):
            prior.start_from(x)


def start_from_run(vae: VAE, run_dir: str) -> None:
    """Puts another run's evaluated weights into a VAE of the same model. Raises ValueError where they do not fit."""
    path = Path(run_dir) / runs.MODEL
    weights, _ = runs.load_tensors(path)
    load_weights(vae, path, weights)


def objective(options: Options) -> Callable[..., Tensor]:
    """(model, guide, x, *, beta) -> loss, nats an image."""
    found = OBJECTIVES[options.objective](options)
    return objectives.autocast(found, torch.bfloat16) if options.precision == "bf16" else found


def schedule(options: Options) -> dict[str, Any]:
    """What ``fit`` takes of the options (resolved), beside the objective, the images and whether it is compiled."""
    return {
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "rate": RATES[options.schedule](options),
        "beta": options.beta,
        "warmup_epochs": options.warmup_epochs or 0,
        "clip_norm": options.clip_norm,
        "skip_norm": options.skip_norm,
        "average_decay": options.average_decay,
        "keep_last": options.keep == "last",
        "seed": options.seed,
    }


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """TF32 for the matrix products and convolutions of a GPU where that is the word, else float32; then as before."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def device(word: str) -> torch.device:
    """Raises ValueError where there is no such device here, or one whose random numbers are not kept for resuming."""
    try:
        found = torch.device(word)
        if found.type not in ("cpu", "cuda"):
            raise RuntimeError
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError):
        choices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
        raise ValueError(f"--device: expected a device of this machine ({', '.join(choices)}), got {word!r}") from None
    return found


def read_config(run_dir: Path) -> tuple[Options, dict[str, Any]]:
    """A run's options, and what its data was: event_shape (a tuple) and sha256.

    Raises:
        ValueError: the folder is no run, or its config is damaged.
    """
    path = run_dir / runs.CONFIG
    config = runs.read_json(path)
    try:
        data = config["data"]
        shape = data["event_shape"]
        if not (shape and all(type(size) is int and size > 0 for size in shape)):
            raise ValueError(f"event_shape: expected whole numbers, got {shape}")
        options = from_json(config["options"])
        if options.binarization is None or options.warmup_epochs is None:
            raise ValueError("expected binarization and warmup_epochs as they were resolved, got null")
        if options.dequantization is None:
            raise ValueError("expected dequantization as it was resolved, got null")
        return options, {"sha256": data["sha256"], "event_shape": tuple(shape)}
    except KeyError as error:
        raise ValueError(f"{path}: damaged: missing {error}") from None
    except TypeError:
        raise ValueError(f"{path}: damaged: expected the objects options and data") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load_weights(vae: VAE, path: Path, weights: dict[str, Tensor]) -> None:
    """Puts weights into a VAE of the same architecture. Raises ValueError where they do not fit."""
    try:
        vae.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise ValueError(f"{path}: the weights do not fit the run's config: {first}") from None


# In config.json, of a run folder without its training: what ``save`` made, and what came with the package.
_FROM_PYTHON, SHIPPED = "from Python", "shipped"


def save(trained: VAE, run_dir: str | Path, options: Options, *, metrics: Sequence[dict[str, Any]] = ()) -> Path:
    """Makes a run folder of a VAE that was trained from Python; ``load`` and the scripts take it, but for resuming.

    Args:
        trained: as ``build.vae(options, event_shape)`` makes it, with whatever weights.
        run_dir: a new or empty folder.
        options: what the VAE is made of, and the data that it is evaluated on, as it was trained: a density of 8-bit
            levels is taken for one of (level + u) / 256 unless ``dequantization`` is "none".
        metrics: the records that ``fit`` gave to ``on_epoch``, for the training curves.

    Returns:
        The folder.

    Raises:
        ValueError: options that describe another VAE, data that cannot be read or is off the likelihood's support,
            records without a step, or a folder that is not empty; nothing is written.
    """
    seen = splits(options)
    options = resolve(options, seen)
    check_support(options, seen)
    if not all(type(record.get("step")) is int for record in metrics):
        raise ValueError("metrics: expected records with a whole number under 'step', as fit gives them to on_epoch")
    with torch.device("meta"):  # shapes without numbers
        fresh = vae(options, seen.event_shape).state_dict()
    weights = trained.state_dict()
    if {name: w.shape for name, w in fresh.items()} != {name: w.shape for name, w in weights.items()}:
        raise ValueError("options: expected those that the VAE was built with, got others (weights differ in shape)")
    folder = runs.new_run_dir(str(run_dir), dataset=options.dataset, likelihood=options.likelihood)
    runs.write_json(folder / runs.CONFIG, config(options, seen) | {"trained": _FROM_PYTHON})
    runs.record_environment(folder, options.device)
    for record in metrics:
        runs.append_metrics(folder, record)
    runs.save_tensors(folder / runs.MODEL, weights, {"step": metrics[-1]["step"] if metrics else 0})
    return folder


def is_from_python(run_dir: Path) -> bool:
    """The folder was made by ``save``, or is a pretrained run: there is no training to go on with."""
    return runs.read_json(run_dir / runs.CONFIG).get("trained") in (_FROM_PYTHON, SHIPPED)


PRETRAINED = Path(__file__).parent / "pretrained"


def run_folder(run_dir: str | Path) -> Path:
    """The folder itself, or where there is none, that of the pretrained run with this name, in the package.

    Raises:
        ValueError: a single word that is neither.
    """
    folder = Path(run_dir)
    names = sorted(path.parent.name for path in PRETRAINED.glob(f"*/{runs.CONFIG}"))
    if folder.exists() or len(folder.parts) > 1 or not names:
        return folder
    if folder.name not in names:
        raise ValueError(f"{folder}: expected a run folder, or a pretrained run ({', '.join(names)}), got neither")
    return PRETRAINED / folder.name


def load(run_dir: str | Path) -> VAE:
    """The trained VAE of a run folder, or of a pretrained run by its name, on the CPU, in evaluation mode.

    It sees pixels as its training did. One of a density of 8-bit levels is a density of (level + u) / 256, which takes
    any numbers without a word: ``dequantized(load(run))`` is the mass of levels, and what the run's evaluation reports.

    Raises:
        ValueError: the folder is no run, has no weights yet, or is damaged.
    """
    folder = run_folder(run_dir)
    options, seen = read_config(folder)
    with torch.random.fork_rng(devices=[]):  # fresh weights are drawn, and replaced
        model = vae(options, seen["event_shape"])
    weights, _ = runs.load_tensors(folder / runs.MODEL)
    load_weights(model, folder / runs.MODEL, weights)
    return model.eval()
