"""One table of likelihoods: the same network and latents under each, trained for the same epochs, on one scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ppl_vae import data, runs
from ppl_vae.commands.options import CompareLikelihoods
from ppl_vae.commands.pixel_calibration import calibrate_run
from ppl_vae.commands.train import QUICK_EVALUATION_SEED, resume_run, train_run
from ppl_vae.evidence.paired import CONFIDENCE, INDISTINCT, SEED_NATS, bound_difference
from ppl_vae.reports.likelihood_figures import write_likelihood_figures
from ppl_vae.reports.text.diagnosis import describe_calibration
from ppl_vae.reports.text.evaluation import plus_minus
from ppl_vae.runs.asked_run import check_comparable, check_same
from ppl_vae.runs.build import build_likelihood, build_vae
from ppl_vae.runs.evaluations import PerImage, is_evaluated, read_per_image
from ppl_vae.runs.opening import Run, Say, open_run
from ppl_vae.runs.options import LIKELIHOODS, Options
from ppl_vae.runs.resolve import check_support, describe_scale, load_splits, resolve
from ppl_vae.runs.results import RunCalibration, from_json, to_json
from ppl_vae.runtime.errors import NotFinite
from ppl_vae.runtime.progress import progress_bar

# What the likelihoods that fit the data are compared by, where none are named, in the words of ``describe_scale``.
_SCALES = {
    data.BINARY: "mass of binary pixels",
    data.LEVELS: "mass of 8-bit levels",
    data.COUNTS: "mass of counts",
    data.PROBABILITIES: "density of probabilities",
    data.REAL: "density of real values",
}

EXACT = "exact"  # the kind of a density of dequantized levels, whose masses are exact; else it is the measure


def run(options: CompareLikelihoods, *, say: Say) -> None:
    """The command: trains and evaluates the runs of the table, and prints it."""
    compare_likelihoods(
        options.likelihoods,
        options.make_run_options(),
        run_dir=options.run_dir or f"runs/likelihoods-{Path(options.dataset).stem}",
        output=options.output,
        say=say,
    )


def compare_likelihoods(
    likelihoods: Sequence[str] | None, options: Options, *, run_dir: str, output: str | None, say: Say
) -> list[dict[str, Any]]:
    """Trains the options' VAE under each likelihood, in run folders RUN_DIR/LIKELIHOOD; writes and says one table.

    All see the same images for the same epochs, and are evaluated on the same test images. Masses of 8-bit levels and
    those that densities give to them (``dequantization``) are on one scale; scales are never mixed. Differences from
    the best row are paired, with Bonferroni's correction for the rows that are compared with it: with 95% the row of
    the highest expected bound is among the first and those that are not distinguishable from it (Hsu 1984). A table
    that was interrupted goes on; its finished runs are taken as they are. A likelihood whose training meets a NaN is
    told of and left out.

    Args:
        likelihoods: words of ``--likelihood``, or None for all that fit the data and have its scale.
        options: all others; their likelihood does not count.
        run_dir: the folder of the run folders, and of figures/.
        output: a JSON file for the table, or None.
        say: takes each line for the reader.

    Returns:
        The table's rows, the best first.

    Raises:
        ValueError: an autoencoder, likelihoods that are not on one scale or do not fit the data, what cannot be built,
            or a folder that holds a run with other options; all of that before any training, and nothing is written.
    """
    check_comparable(options)
    splits = load_splits(options)
    words = fitting_likelihoods(options, splits) if likelihoods is None else list(likelihoods)
    parent, scale = Path(run_dir), _check(words, options, splits, Path(run_dir), output)
    say(f"{len(words)} likelihoods, compared by the {scale}: {', '.join(words)}")
    if output is not None:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
    opened: list[Run] = []
    calibrations, failed = {}, {}
    finished = sum(_is_finished(parent / word) for word in words)
    with progress_bar(total=len(words), initial=finished, unit="likelihood", desc="likelihoods") as bar:
        for word in words:
            was_finished = _is_finished(parent / word)
            bar.set_description(f"{word}: training")
            try:
                like = opened[0] if opened else None  # whose data is taken, and not read again
                _train(parent / word, replace(options, likelihood=word), like, say)
                run = open_run(str(parent / word), data_dir=options.data_dir, like=like)
                _check_finite(run)
            except NotFinite as error:
                failed[word] = str(error)
                say(f"{word} is left out: {error}")
            else:
                bar.set_description(f"{word}: calibration")
                calibrations[word] = to_json(calibrate_run(run))
                opened.append(run)
            bar.update(not was_finished)
    if not opened:
        raise NotFinite(f"none of {', '.join(words)} was trained: {failed[words[0]]}")
    rows = ranked([row(run) | {"calibration": calibrations[run.options.likelihood]} for run in opened], opened)
    if output is not None:
        table = {"dataset": options.dataset, "scale": scale, "rows": rows, "failed": failed}
        runs.write_json(Path(output), table | {"environment": runs.describe_environment(options.device)})
    for line in describe(rows, scale):
        say(line)
    write_likelihood_figures(parent / runs.FIGURES, opened, rows, say)
    return rows


# --- What is compared, and what is refused ---


def fitting_likelihoods(options: Options, splits: data.Splits) -> list[str]:
    """Every likelihood that the data fits, and whose numbers are on the scale of that kind of data.

    Of zeros and ones that is the Bernoulli alone: as counts they would be taken, and nobody means that.
    """

    def fits(word: str) -> bool:
        if (
            splits.kind == data.BINARY
            and build_likelihood(replace(options, likelihood=word), splits.event_shape).data_kind != data.BINARY
        ):
            return False
        try:
            return _scale_of(replace(options, likelihood=word), splits) == _SCALES[splits.kind]
        except ValueError:
            return False

    return [word for word in LIKELIHOODS if fits(word)]


def _scale_of(asked: Options, splits: data.Splits) -> str:
    """The scale of a likelihood's numbers on this data. Raises ValueError where it cannot be trained on it."""
    resolved = resolve(asked, splits)
    check_support(resolved, splits)
    return describe_scale(resolved, splits)


def _check(words: Sequence[str], options: Options, splits: data.Splits, parent: Path, output: str | None) -> str:
    """The one scale of all, once there is nothing that could end the table after hours of training.

    Raises:
        ValueError: as ``compare_likelihoods``.
    """
    if not words:
        raise ValueError(f"--likelihoods: expected one that fits {splits.kind} ({splits.name}), got none")
    if len(set(words)) < len(words):
        raise ValueError(f"--likelihoods: expected each once, got {' '.join(words)}")
    num_images = min(options.images, len(splits.test))
    if num_images < 2:
        raise ValueError(f"--images: expected at least 2 test images, for a standard error, got {num_images}")
    scales: dict[str, list[str]] = {}
    for word in words:
        scales.setdefault(_scale_of(replace(options, likelihood=word), splits), []).append(word)
    if len(scales) > 1:
        each = "; ".join(f"{scale} for {', '.join(of)}" for scale, of in scales.items())
        raise ValueError(
            f"--likelihoods: expected one scale for all, since numbers on two are never ranked, got {each}"
        )
    for word in words:
        asked = replace(options, likelihood=word)
        with torch.device("meta"):
            build_vae(asked, splits.event_shape)
        if (parent / word / runs.CONFIG).exists():
            check_same(parent / word, asked, splits)
            _check_evaluation(parent / word, asked, splits)
        elif (parent / word).exists() and not runs.is_empty(parent / word):
            raise ValueError(
                f"{parent / word}: expected a run, a new or an empty folder, got another; name another --run-dir"
            )
    if output is not None and Path(output).is_dir():
        raise ValueError(f"--output: expected a JSON file, got the folder {output}")
    return next(iter(scales))


def _check_evaluation(folder: Path, asked: Options, splits: data.Splits) -> None:
    """An evaluation that took the place of the training's own may be of other images or draws, and not comparable."""
    if not _is_finished(folder):
        return
    run = Run(folder, resolve(asked, splits), splits)
    entry = runs.read_evaluations(folder)["test"]
    expected = {
        "scale": run.scale,
        "num_images": min(asked.images, len(splits.test)),
        "num_particles": asked.evaluation_particles,
        "seed": QUICK_EVALUATION_SEED,
    }
    differ = [
        f"{key} {entry.get(key)} instead of {value}" for key, value in expected.items() if entry.get(key) != value
    ]
    if differ:
        raise ValueError(
            f"{folder}: expected the evaluation that the others have, got one with {', '.join(differ)}; "
            f"evaluate_log_likelihood.py {folder} --images {expected['num_images']} "
            f"--num-particles {expected['num_particles']} makes it again"
        )


def _check_finite(run: Run) -> None:
    """Raises NotFinite where a test image has no finite bound: then there is no mean, and nothing to rank."""
    broken = int((~_per_image(run).result.log_evidence.isfinite()).sum())
    if broken:
        raise NotFinite(f"expected a finite bound for every test image, got {broken:,} that are not")


def _is_finished(folder: Path) -> bool:
    return (folder / runs.MODEL).exists() and is_evaluated(folder)


# --- What is measured ---


def _train(folder: Path, options: Options, like: Run | None, say: Say) -> None:
    """A run that is new, or goes on from where it stands."""
    if (folder / runs.CONFIG).exists():
        resume_run(str(folder), epochs=None, say=say, data_dir=options.data_dir, like=like)
    else:
        train_run(options, str(folder), say=say)


def _per_image(run: Run) -> PerImage:
    found = read_per_image(run.folder, "test")
    if found is None:
        raise ValueError(f"{run.folder}: expected the numbers of each test image beside evaluation.json, got none")
    return found


def row(run: Run) -> dict[str, Any]:
    """A trained run's line of the table, from its files."""
    entry, metrics = runs.read_evaluations(run.folder)["test"], runs.read_metrics(run.folder)
    with torch.device("meta"):  # shapes without numbers
        weights = build_vae(run.options, run.splits.event_shape).parameters()
    elbo = "validation_elbo_nats_per_image"
    conditions = ("split", "binarization", "scale", "num_images", "num_particles")
    numbers = ("bits_per_dim", "log_likelihood", "elbo", "reconstruction", "kl", "rise", "floor")
    return {
        "likelihood": run.options.likelihood,
        "kind": EXACT if run.pixels == "dequantized" else entry["measure"],
        "weights": sum(w.numel() for w in weights),
        "epochs": metrics[-1]["epoch"],
        "best_epoch": max(metrics, key=lambda record: record.get(elbo, record["step"]))["epoch"],
        "seconds": metrics[-1]["seconds"],
        **{key: entry[key] for key in (*conditions, *numbers)},
        "floor_bits_per_dim": None if entry["bits_per_dim"] is None else entry["floor"]["mean"] / _minus_bit(run),
    }


def _minus_bit(run: Run) -> float:
    """-D log 2: nats an image over it are bits per dimension."""
    return -math.prod(run.splits.event_shape) * math.log(2)


def ranked(rows: Sequence[dict[str, Any]], opened: Sequence[Run]) -> list[dict[str, Any]]:
    """The rows by their bound, the best first, each with its paired difference from the best, in nats and in bits.

    "difference_nats" is below 0 and "difference_bits_per_dim" above 0 where a row is worse than the best. "verdict" is
    that of the paired interval. "ranks_log_likelihood" is the rule of ``paired.BoundDifference``: whether
    log p(x) ranks so as well.

    Raises:
        ValueError: rows of other images, or of another scale.
    """
    results = [_per_image(run) for run in opened]
    for run, result in zip(opened, results, strict=True):
        if not torch.equal(result.index, results[0].index) or run.scale != opened[0].scale:
            raise ValueError(f"{run.folder}: expected an evaluation on the same images and scale as {opened[0].folder}")
    order = sorted(range(len(rows)), key=lambda i: -rows[i]["log_likelihood"]["mean"])
    found, first = [], results[order[0]].result
    for rank, i in enumerate(order, start=1):
        entry = {"rank": rank, **rows[i], "difference_nats": None, "difference_bits_per_dim": None}
        entry |= {"verdict": "best", "ranks_log_likelihood": None}
        if rank > 1:
            difference = bound_difference(first, results[i].result, comparisons=len(rows) - 1)
            bounds = difference.bounds
            entry["difference_nats"] = _difference(bounds.mean, bounds.stderr, [bounds.lower, bounds.upper])
            if rows[i]["bits_per_dim"] is not None:
                minus_bit = _minus_bit(opened[i])
                entry["difference_bits_per_dim"] = _difference(
                    bounds.mean / minus_bit,
                    -bounds.stderr / minus_bit,
                    [bounds.upper / minus_bit, bounds.lower / minus_bit],
                )
            entry["verdict"] = bounds.word
            entry["ranks_log_likelihood"] = difference.ranks_log_evidence
        found.append(entry)
    return found


def _difference(mean: float, stderr: float, interval: list[float]) -> dict[str, Any]:
    return {"mean": mean, "stderr": stderr, "interval": interval}


# --- In words ---


def describe(rows: Sequence[dict[str, Any]], scale: str) -> list[str]:
    """The table in words, a line a likelihood, what its numbers mean, and how its pixels are calibrated."""
    first, bits = rows[0], rows[0]["bits_per_dim"] is not None
    lines = [
        f"{scale}, {first['split']} split, the same {first['num_images']:,} images for all, "
        f"bound L_{first['num_particles']}, epochs of training: {first['epochs']}",
        f"{'likelihood':29} {'kind':8} {'bits/dim':>16} {'behind the best':>18} {'nats':>20} {'ELBO':>10} "
        f"{'reconstr.':>10} {'KL':>7} {'floor':>10} {'seconds':>8} {'best':>5}",
    ]
    for found in rows:
        own = f"{found['bits_per_dim']['mean']:.4f} ± {found['bits_per_dim']['stderr']:.4f}" if bits else "-"
        behind = found["difference_bits_per_dim" if bits else "difference_nats"]
        digits, sign = (4, 1) if bits else (2, -1)
        lacks = "-" if behind is None else f"{sign * behind['mean']:+.{digits}f} ± {behind['stderr']:.{digits}f}"
        mark = " ~" if found["verdict"] == INDISTINCT else "  "
        lines.append(
            f"{found['likelihood']:29} {found['kind']:8} {own:>16} {lacks + mark:>18} "
            f"{plus_minus(found['log_likelihood']):>20} {found['elbo']['mean']:>10.2f} "
            f"{found['reconstruction']['mean']:>10.2f} {found['kl']['mean']:>7.2f} {found['floor']['mean']:>10.2f} "
            f"{found['seconds']:>8.0f} {found['best_epoch']:>5}"
        )
    return [*lines, *_about(rows), *(f"{found['likelihood']}: {_calibrated(found)}" for found in rows)]


def _calibrated(found: dict[str, Any]) -> str:
    return describe_calibration(from_json(RunCalibration, found["calibration"]))


def _about(rows: Sequence[dict[str, Any]]) -> list[str]:
    """How the table is to be read."""
    lines = ["floor: independent pixels with the training images' marginals; best: the epoch that validation chose"]
    if len(rows) > 1:
        unit = "bits/dim" if rows[0]["bits_per_dim"] is not None else "nats an image"
        lines.append(
            f"behind the best: paired on the same images, {unit} ± standard error; ~ is not distinguishable from the "
            f"first row (intervals that hold together with {CONFIDENCE:.0%})"
        )
    if any(found["kind"] == EXACT for found in rows):
        lines.append(
            "exact: trained as a density of (level + u) / 256, evaluated by the exact masses that it gives to levels"
        )
    unsure = [found["likelihood"] for found in rows if found["ranks_log_likelihood"] is False]
    if unsure:
        lines.append(
            f"ten times the particles gained as much as separates the first row from {', '.join(unsure)}: there the "
            "bounds are ranked, log p(x) is not"
        )
    low, high = SEED_NATS
    return [
        *lines,
        "the same epochs are not the same time: see seconds. One training each: these trained models are compared, and "
        f"another seed moves a VAE by {low} to {high} nats on binary pixels, often more on others",
    ]
