"""Options with every default decided, and what follows from them: device, precision and the arguments of fit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ppl_vae import data, objectives
from ppl_vae.labels import ConditionalVAE
from ppl_vae.parts import likelihoods, networks, priors
from ppl_vae.parts.labelled import LabelledEncoder
from ppl_vae.parts.registry import OBJECTIVES, SCHEDULES
from ppl_vae.protocols import Likelihood
from ppl_vae.runs.build import build_likelihood, check_parts, is_autoencoder, resolve_parts
from ppl_vae.runs.files import JsonObject
from ppl_vae.runs.options import Options, default_objective
from ppl_vae.runtime import capture
from ppl_vae.runtime.global_state import serialize_threads
from ppl_vae.runtime.records import UNKNOWN, Data
from ppl_vae.training import Optimizer, Schedule, Validation
from ppl_vae.training.settings import default_warmup
from ppl_vae.vae import VAE

# A graph compiles in about 10 s, and each run of it saves some milliseconds.
_RUNS_THAT_PAY = 5000


def build_objective(options: Options) -> objectives.Loss:
    """The Pyro loss that the options name."""
    part = OBJECTIVES[options.objective or default_objective(options)]
    found = part.load()(**part.arguments(options))
    return objectives.autocast(found, torch.bfloat16) if options.precision == "bf16" else found


def check_objective(options: Options) -> None:
    """Raise ValueError for an objective that the chosen parts, which are resolved, do not have."""
    by_latent = options.objective == "free-bits"
    closed = by_latent or options.kl == "analytic"
    asked = "--objective free-bits" if by_latent else "--kl analytic"
    guides = ("diagonal",) if by_latent else ("diagonal", "full")
    if closed and options.prior != "standard-normal":
        raise ValueError(f"{asked}: expected --prior standard-normal, whose KL has a formula, got {options.prior}")
    if closed and options.posterior not in guides:
        words = " or ".join(guides)
        raise ValueError(f"{asked}: expected --posterior {words}, whose KL has a formula, got {options.posterior}")
    if closed and options.upper_latents and options.inference == "bottom-up":
        raise ValueError(
            "--inference bottom-up: expected a sampled KL (no --kl analytic, no free-bits), got one in closed form, "
            "which a guide that draws in the opposite order of the model does not have"
        )
    if (options.objective == "semi-supervised") != (options.labels is not None):
        labels = "no --labels" if options.labels is None else f"--labels {options.labels}"
        raise ValueError(
            f"--objective {options.objective}: expected semi-supervised with --labels, and only there, got {labels}"
        )
    if is_autoencoder(options) and options.objective != "elbo":
        raise ValueError(f"--objective {options.objective}: expected --posterior diagonal, got {options.posterior}")
    if is_autoencoder(options) and options.beta != 0:
        raise ValueError(
            "--posterior delta: expected --beta 0 (a deterministic guide has no KL: it makes a plain autoencoder), got "
            f"--beta {options.beta:g}"
        )


def fit_arguments(options: Options, validation: Data | None) -> JsonObject:
    """The arguments of ``fit`` that the (resolved) options name. validation: images as evaluated, or None."""
    rate = SCHEDULES[options.schedule]
    return {
        "epochs": options.epochs,
        "objective": build_objective(options),
        "optimizer": Optimizer(
            learning_rate=options.learning_rate,
            clip_norm=options.clip_norm,
            skip_norm=options.skip_norm,
            average_decay=options.average_decay,
        ),
        "schedule": Schedule(
            batch_size=options.batch_size,
            seed=options.seed,
            rate=partial(rate.load(), **rate.arguments(options)),
            beta=options.beta,
            warmup_epochs=options.warmup_epochs or 0,
        ),
        "validation": Validation(
            validation,
            num_particles=validation_particles(options),
            keep_last=options.keep == "last",
            keep_start=options.start_from is not None,
        ),
    }


def validation_particles(options: Options) -> int:
    """S of the bound that chooses the best weights: the objective's if it is importance-weighted, otherwise 1."""
    return options.num_particles if options.objective in ("iwae", "dreg") else 1


def set_class_probs(vae: ConditionalVAE, labels: Tensor) -> None:
    """Set p(y) to the frequencies of the training labels, (N,), that are known."""
    known = labels[labels != UNKNOWN]
    vae.class_probs.copy_(known.bincount(minlength=vae.num_classes) / len(known))


@serialize_threads()
def initialize_output_bias(vae: VAE, x: Tensor) -> None:
    """Set the decoder's output bias, and units if it has any, so that training starts from the pixels' marginals.

    x: (N, *E) training images as the model sees them, or their expectation.

    Source: Burda et al. 2016, arXiv 1509.00519, released code (output bias from the training pixels' means).
    """
    with torch.no_grad():
        vae.likelihood.net.output.bias.copy_(vae.likelihood.family.fit_marginals(x))  # type: ignore[attr-defined]
        net = getattr(vae.posterior, "net", None)
        net = net.net if isinstance(net, LabelledEncoder) else net
        classifier = getattr(vae, "classifier", None)
        for found in (net, getattr(classifier, "net", None)):
            if isinstance(found, networks.Standardized):
                found.fit_marginals(x)
        if isinstance(vae.prior, priors.VampPrior):
            vae.prior.start_from(x)


def count_steps(options: Options, num_images: int) -> int:
    """The number of steps of a training on this many images."""
    return options.epochs * math.ceil(num_images / options.batch_size)


def decide_compile(word: str, num_runs: int, device: torch.device) -> bool:
    """Whether a graph that will run this many times is compiled, by the word of --compile."""
    if word == "on":
        check_compiler(device)
    return word == "on" or (word == "auto" and num_runs >= _RUNS_THAT_PAY and capture.capture_obstacle(device) is None)


def explain_eager(options: Options, num_images: int) -> str | None:
    """Why ``--compile auto`` became off although compiling would pay; None otherwise."""
    pays = options.compile == "off" and count_steps(options, num_images) >= _RUNS_THAT_PAY
    return capture.capture_obstacle(find_device(options.device)) if pays else None


def check_compiler(device: torch.device) -> None:
    """Raise ValueError if nothing can be compiled for that device."""
    reason = capture.capture_obstacle(device)
    if reason is not None:
        raise ValueError(f"--compile on: {reason}; --compile off does without")


def check_precision(options: Options) -> None:
    """Raise ValueError if the device has no arithmetic of that precision, and would emulate it slowly."""
    device = find_device(options.device)
    recent_gpu = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    # Torch says by private names, which a version may lack, whether this CPU multiplies in bf16.
    tests = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    cpu_has_bf16 = device.type == "cpu" and any(test() for test in tests if test is not None)
    if options.precision == "tf32" and not recent_gpu:
        raise ValueError(f"--precision tf32: expected an NVIDIA GPU since Ampere, got {device}")
    if options.precision == "bf16" and not (recent_gpu or cpu_has_bf16):
        raise ValueError(
            "--precision bf16: expected hardware for it (a CPU with AVX512-BF16 or AMX, or a recent GPU), "
            f"got {device} without"
        )


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Use TF32 for matrix products and convolutions on a GPU if asked, for the length of a block; otherwise float32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def find_device(word: str) -> torch.device:
    """Return the device of that name; auto is a GPU where there is one. Raises ValueError for one that is not here."""
    if word == "auto":
        word = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(word)
        if found.type not in ("cpu", "cuda"):
            raise RuntimeError
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError):
        choices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
        raise ValueError(f"--device: expected a device of this machine ({', '.join(choices)}), got {word!r}") from None
    return found


def resolve(options: Options, splits: data.Splits) -> Options:
    """The options with every default filled in that depends on others or on the data, and with absolute paths.

    Raises ValueError for options at odds with the data, with each other, or with this machine.
    """
    options = resolve_parts(options)
    options = replace(options, classes=resolve_classes(options, splits))
    family = build_likelihood(options, splits.event_shape)
    default = "dynamic" if family.data_kind == data.BINARY else "none"
    found = data.resolve_binarization(splits, options.binarization, default=default)
    if options.protocol == "iwae" and found != "dynamic":
        raise ValueError(f"--protocol iwae: expected --binarization dynamic, which it is a protocol of, got {found}")
    warmup = options.warmup_epochs
    if warmup is None:
        warmup = 0 if options.start_from else default_warmup(options.epochs)
    named = options.dataset in data.DATASETS
    check_precision(options)
    check_parts(options)
    check_objective(options)
    compiled = decide_compile(options.compile, count_steps(options, len(splits.train)), find_device(options.device))
    resolved = replace(
        options,
        compile="on" if compiled else "off",
        binarization=found,
        dequantization=_resolve_dequantization(options, splits, found, family.measure),
        warmup_epochs=warmup,
        device=str(find_device(options.device)),
        keep=options.keep or ("best" if options.beta == 1 or is_autoencoder(options) else "last"),
        dataset=options.dataset if named else str(Path(options.dataset).resolve()),
        data_dir=str(Path(options.data_dir).resolve()) if options.data_dir else None,
        start_from=str(Path(options.start_from).resolve()) if options.start_from else None,
    )
    check_support(resolved, splits)
    return resolved


def resolve_classes(options: Options, splits: data.Splits) -> int | None:
    """The number of classes K of the labels that the model takes; None for a model without labels.

    Raises ValueError for images without a label, and for labels that are not 0 to K - 1, each with a training image.
    """
    if options.condition == "none":
        return options.classes
    for split in data.SPLITS:
        if len(getattr(splits, split)) and split not in splits.labels:
            raise ValueError(
                f"--condition labels: expected a label of each image, got none for {split} of {splits.name}"
            )
    found = {split: y.unique().tolist() for split, y in splits.labels.items()}
    K = options.classes or len(found["train"])
    if found["train"] != list(range(K)):
        words = f"{len(found['train'])} labels from {found['train'][0]} to {found['train'][-1]}"
        raise ValueError(
            f"--condition labels: expected training images of each class from 0 to {K - 1}, got {words} in "
            f"{splits.name}"
        )
    for split, labels in found.items():
        if unknown := [y for y in labels if not 0 <= y < K]:
            raise ValueError(f"--condition labels: expected classes from 0 to {K - 1}, got {unknown[0]} in {split}")
    if options.labels is not None:
        try:
            data.keep_labels(splits.labels["train"], options.labels, seed=options.seed)
        except ValueError as error:
            raise ValueError(f"--labels: {str(error).removeprefix('number: ')}") from None
    return K


def _resolve_dequantization(options: Options, splits: data.Splits, binarization: str, measure: str) -> str:
    if splits.kind == data.LEVELS and binarization == "none" and measure == "density":
        return options.dequantization or "uniform"
    if options.dequantization == "uniform":
        kind = splits.kind if binarization == "none" else data.BINARY
        raise ValueError(
            f"--dequantization: expected none for a {measure} of {kind}, got uniform: it makes 8-bit levels "
            "fit for a density"
        )
    return "none"


def data_options(options: Options) -> JsonObject:
    """The options that decide the data set, as arguments of ``data.load``."""
    names = ("dataset", "data_dir", "protocol", "image_size", "fit", "color", "missing")
    return {name: getattr(options, name) for name in names}


def load_splits(options: Options, *, download: bool = True) -> data.Splits:
    """Loads the data set, and downloads it if that is allowed. Raises ValueError as ``data.load``."""
    return data.load(**data_options(options), download=download)


def choose_pixels(options: Options, splits: data.Splits) -> str:
    """How training sees pixels, a word of ``data.PIXELS``. The options are resolved."""
    assert options.binarization is not None
    if options.binarization != "none" or splits.kind != data.LEVELS:
        return options.binarization
    if options.dequantization == "uniform":
        return "dequantized"
    return "levels" if build_likelihood(options, splits.event_shape).data_kind in (data.LEVELS, data.COUNTS) else "none"


def choose_evaluated_pixels(options: Options, splits: data.Splits) -> str:
    """How an evaluation sees pixels: as training does, except that dequantized levels are evaluated by their mass."""
    word = choose_pixels(options, splits)
    return "levels" if word == "dequantized" else word


def describe_scale(options: Options, splits: data.Splits) -> str:
    """What the reported nats measure. Numbers on different scales are never compared."""
    word = choose_evaluated_pixels(options, splits)
    if word == "levels":
        return "mass of 8-bit levels"
    measure = build_likelihood(options, splits.event_shape).measure
    if word != "none" or splits.kind == data.BINARY:
        return f"{measure} of binary pixels"
    if splits.kind == data.LEVELS:
        return f"{measure} of level / 255"
    return f"{measure} of {splits.kind}"


_LEAST_SPREAD = 1e-15  # of real pixels: a density squares deviations and scales, in float32


def check_support(options: Options, splits: data.Splits) -> None:
    """Checks that the data, as the model sees it, is on the likelihood's support. The options are resolved.

    Raises ValueError for pixels off the support, for zeros and ones under anything that asks for gray or real pixels,
    and, for a density, for one image again and again.
    """
    family = build_likelihood(options, splits.event_shape)
    word = f"--likelihood {options.likelihood}"
    if options.binarization != "none":
        if family.data_kind != data.BINARY:
            raise ValueError(
                f"{word}: expected --binarization none, got {options.binarization}: it is a likelihood "
                f"of {family.data_kind}, and has no use for pixels that were made zeros and ones"
            )
        return
    if family.data_kind == data.LEVELS and splits.kind != data.LEVELS:
        raise ValueError(
            f"{word}: expected {data.LEVELS} (uint8, or pictures), got {splits.kind}; {_cure(splits, family)}"
        )
    if family.data_kind == data.UNIT_INTERVAL and splits.kind == data.BINARY:
        raise ValueError(f"{word}: expected {data.UNIT_INTERVAL}, got zeros and ones, which no density is of")
    # Levels are on the support of whatever takes levels, and dequantized ones are between 0 and 1.
    for split in ("train", "validation", "test") if choose_pixels(options, splits) == "none" else ():
        seen_by_model = data.probabilities(splits, split)
        parts = (part[~part.isnan()] for part in seen_by_model.split(1000))
        if not all(bool(family.support.check(part).all()) for part in parts):
            raise ValueError(
                f"{word}: expected pixels that are {family.support_words}, got {splits.kind} in {split}; "
                f"{_cure(splits, family)}"
            )
    if family.measure == "density":
        spread = splits.spread
        if spread == 0:
            raise ValueError(f"{word}: expected training images that differ, got {len(splits.train):,} of one image")
        if not _LEAST_SPREAD <= spread <= 1 / _LEAST_SPREAD:
            raise ValueError(
                f"{word}: expected pixels that spread by {_LEAST_SPREAD:g} to {1 / _LEAST_SPREAD:g}, got "
                f"{spread:.3g}; in another unit their squares can be computed in single precision"
            )


def _cure(splits: data.Splits, family: Likelihood) -> str:
    """What the user can do about data that does not fit the likelihood."""
    if family.data_kind == data.BINARY and splits.kind in (data.LEVELS, data.PROBABILITIES):
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
    is_bytes = splits.kind == data.COUNTS and splits.train.max() <= 255 and family.data_kind == data.LEVELS
    as_bytes = "; saved as uint8 they are 8-bit levels" if is_bytes else ""
    return cures[splits.kind] + as_bytes
