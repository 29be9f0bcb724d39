"""Options whose defaults depend on others, or on the data, decided."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ppl_vae import data
from ppl_vae.runs.build.fitting import check_objective, check_precision, compiles, device, planned_steps
from ppl_vae.runs.build.parts import decided, is_autoencoder, likelihood
from ppl_vae.runs.options import Options, default_warmup


def resolve(options: Options, seen: data.Splits) -> Options:
    """The options with every default that depends on others or on the data decided, and with absolute paths.

    Raises:
        ValueError: a binarization, dequantization or transform that the data, the likelihood or the protocol cannot
            have, or a compiler or a precision that this machine has not.
    """
    options = decided(options)
    family = likelihood(options, seen.event_shape)
    default = "dynamic" if family.data_kind == data.BINARY else "none"
    found = data.resolve_binarization(seen, options.binarization, default=default)
    if options.protocol == "iwae" and found != "dynamic":
        raise ValueError(f"--protocol iwae: expected --binarization dynamic, which it is a protocol of, got {found}")
    warmup = options.warmup_epochs
    if warmup is None:
        warmup = 0 if options.start_from else default_warmup(options.epochs)
    named = options.dataset in data.DATASETS
    check_precision(options)
    check_objective(options)
    compiled = compiles(options.compile, planned_steps(options, len(seen.train)), device(options.device))
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
