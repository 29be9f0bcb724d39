"""Options with every default decided: by other options, by the data, and by this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ppl_vae import data
from ppl_vae.parts import likelihoods
from ppl_vae.protocols import Likelihood
from ppl_vae.runs.build import build_likelihood, check_parts, is_autoencoder, resolve_parts
from ppl_vae.runs.files import JsonObject
from ppl_vae.runs.fit_arguments import check_objective, check_precision, count_steps, decide_compile, find_device
from ppl_vae.runs.options import Options
from ppl_vae.training.schedules import default_warmup


def resolve(options: Options, seen: data.Splits) -> Options:
    """The options with every default filled in that depends on others or on the data, and with absolute paths.

    Raises:
        ValueError: a binarization, dequantization or transform that the data, the likelihood or the protocol cannot
            have, or a compiler or a precision that this machine has not.
    """
    options = resolve_parts(options)
    family = build_likelihood(options, seen.event_shape)
    default = "dynamic" if family.data_kind == data.BINARY else "none"
    found = data.resolve_binarization(seen, options.binarization, default=default)
    if options.protocol == "iwae" and found != "dynamic":
        raise ValueError(f"--protocol iwae: expected --binarization dynamic, which it is a protocol of, got {found}")
    warmup = options.warmup_epochs
    if warmup is None:
        warmup = 0 if options.start_from else default_warmup(options.epochs)
    named = options.dataset in data.DATASETS
    check_precision(options)
    check_parts(options)
    check_objective(options)
    compiled = decide_compile(options.compile, count_steps(options, len(seen.train)), find_device(options.device))
    return replace(
        options,
        compile="on" if compiled else "off",
        binarization=found,
        dequantization=_resolve_dequantization(options, seen, found, family.measure),
        warmup_epochs=warmup,
        keep=options.keep or ("best" if options.beta == 1 or is_autoencoder(options) else "last"),
        dataset=options.dataset if named else str(Path(options.dataset).resolve()),
        data_dir=str(Path(options.data_dir).resolve()) if options.data_dir else None,
        start_from=str(Path(options.start_from).resolve()) if options.start_from else None,
    )


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


def data_options(options: Options) -> JsonObject:
    """The options that decide the data set, as arguments of ``data.load``."""
    names = ("dataset", "data_dir", "protocol", "image_size", "fit", "color")
    return {name: getattr(options, name) for name in names}


def load_splits(options: Options, *, download: bool = True) -> data.Splits:
    """Loads the data set, and downloads it if that is allowed. Raises ValueError as ``data.load``."""
    return data.load(**data_options(options), download=download)


def choose_pixels(options: Options, seen: data.Splits) -> str:
    """How training sees pixels, a word of ``data.PIXELS``. The options are resolved."""
    assert options.binarization is not None
    if options.binarization != "none" or seen.kind != data.LEVELS:
        return options.binarization
    if options.dequantization == "uniform":
        return "dequantized"
    return "levels" if build_likelihood(options, seen.event_shape).data_kind in (data.LEVELS, data.COUNTS) else "none"


def choose_evaluated_pixels(options: Options, seen: data.Splits) -> str:
    """How an evaluation sees pixels: as training does, except that dequantized levels are evaluated by their mass."""
    word = choose_pixels(options, seen)
    return "levels" if word == "dequantized" else word


def describe_scale(options: Options, seen: data.Splits) -> str:
    """What the reported nats measure. Numbers on different scales are never compared."""
    word = choose_evaluated_pixels(options, seen)
    if word == "levels":
        return "mass of 8-bit levels"
    measure = build_likelihood(options, seen.event_shape).measure
    if word != "none" or seen.kind == data.BINARY:
        return f"{measure} of binary pixels"
    if seen.kind == data.LEVELS:
        return f"{measure} of level / 255"
    return f"{measure} of {seen.kind}"


_LEAST_SPREAD = 1e-15  # of real pixels: a density squares deviations and scales, in float32


def check_support(options: Options, seen: data.Splits) -> None:
    """Checks that the data, as the model sees it, is on the likelihood's support. The options are resolved.

    Raises:
        ValueError: pixels off the support, zeros and ones under anything that asks for gray or real pixels, or, for a
            density, one image again and again.
    """
    family = build_likelihood(options, seen.event_shape)
    word = f"--likelihood {options.likelihood}"
    if options.binarization != "none":
        if family.data_kind != data.BINARY:
            raise ValueError(
                f"{word}: expected --binarization none, got {options.binarization}: it is a likelihood "
                f"of {family.data_kind}, and has no use for pixels that were made zeros and ones"
            )
        return
    _check_kind(word, family, seen)
    # Levels are on the support of whatever takes levels, and dequantized ones are between 0 and 1.
    for split in ("train", "validation", "test") if choose_pixels(options, seen) == "none" else ():
        seen_by_model = data.probabilities(seen, split)
        if not all(bool(family.support.check(part).all()) for part in seen_by_model.split(1000)):
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


def _check_kind(word: str, family: Likelihood, seen: data.Splits) -> None:
    """Raises ValueError for data of another kind than the likelihood is made for."""
    if family.data_kind == data.LEVELS and seen.kind != data.LEVELS:
        raise ValueError(f"{word}: expected {data.LEVELS} (uint8, or pictures), got {seen.kind}; {_cure(seen, family)}")
    if family.data_kind == data.UNIT_INTERVAL and seen.kind == data.BINARY:
        raise ValueError(f"{word}: expected {data.UNIT_INTERVAL}, got zeros and ones, which no density is of")


def _cure(seen: data.Splits, family: Likelihood) -> str:
    """What the user can do about data that does not fit the likelihood."""
    if family.data_kind == data.BINARY and seen.kind in (data.LEVELS, data.PROBABILITIES):
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
    is_bytes = seen.kind == data.COUNTS and seen.train.max() <= 255 and family.data_kind == data.LEVELS
    as_bytes = "; saved as uint8 they are 8-bit levels" if is_bytes else ""
    return cures[seen.kind] + as_bytes
