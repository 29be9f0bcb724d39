"""One run folder: train, go on, evaluate, draw. What every script that needs a run calls."""

from __future__ import annotations

import io
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from ppl_vae import build, data, plots, runs
from ppl_vae.evidence import UNRELIABLE_BIAS, Estimate, Importance, NotFinite, evaluate, seeded
from ppl_vae.options import Options, default_warmup, to_json
from ppl_vae.training import TrainingState, fit
from ppl_vae.vae import VAE

Say = Callable[[str], None]

# Below this Pareto k the weights have a variance, which the delta method and the jackknife assume.
_K_WITH_VARIANCE = 0.5
_QUICK_EVALUATION_SEED = 0
_FIGURE_SEED = 0
_NUM_SHOWN = 10
_CURVES, _RECONSTRUCTIONS, _SAMPLES, _INTERPOLATIONS = (
    "training_curves.png",
    "reconstructions.png",
    "prior_samples.png",
    "interpolations.png",
)


# --- Training ---


def train(options: Options, run_dir: str | None, *, say: Say) -> Path:
    """Trains a new run from options to figures; returns its folder.

    config.json is written first, so that a run can be resumed from the moment its folder exists.

    Raises:
        ValueError: bad options, data or folder; nothing is written.
        NotFinite: training met a NaN or an infinity; the last checkpoint is kept.
    """
    build.device(options.device)
    splits = data.load(options.dataset)
    options = replace(options, binarization=data.resolve_binarization(splits, options.binarization))
    if options.warmup_epochs is None:
        options = replace(options, warmup_epochs=default_warmup(options.epochs))
    if (options.warmup_epochs or 0) >= options.epochs:
        say(f"The warm-up of {options.warmup_epochs} epochs outlasts the training: beta never reaches {options.beta}.")
    if Path(options.dataset).suffix:
        options = replace(options, dataset=str(Path(options.dataset).resolve()))
    _check_support(options, splits)
    build.vae(options, splits.event_shape)  # what cannot be built, or does not fit into memory, leaves no folder
    folder = runs.new_run_dir(run_dir, dataset=options.dataset, likelihood=options.likelihood)
    seen = {"kind": splits.kind, "event_shape": list(splits.event_shape), "sha256": splits.sha256}
    runs.write_json(folder / runs.CONFIG, {"options": to_json(options), "data": seen})
    say(f"Run folder {folder}; --resume {folder} goes on if it is interrupted.")
    _go_on(folder, options, splits, say=say)
    return folder


def resume(run_dir: str, *, epochs: int | None, say: Say) -> None:
    """Goes on with a run, bit for bit; finishes its evaluation and figures; or extends it to more epochs.

    Raises:
        ValueError: no run, a damaged one, other data than it was trained on, or fewer epochs than it was given.
    """
    folder = Path(run_dir)
    options, seen = build.read_config(folder)
    build.device(options.device)
    if epochs is not None and epochs < options.epochs:
        raise ValueError(f"--epochs: expected at least the run's {options.epochs}, got {epochs}")
    splits = _same_data(folder, options, seen)
    if epochs is not None and epochs > options.epochs:
        options = replace(options, epochs=epochs)
        runs.write_json(folder / runs.CONFIG, runs.read_json(folder / runs.CONFIG) | {"options": to_json(options)})
        say(f"Extended to {epochs} epochs; the learning rate's cosine now ends there, so it rises again at first.")
    if _is_finished(folder, options, splits):
        say(f"{folder} is finished: {options.epochs} epochs, evaluated and drawn. --epochs extends it.")
        return
    _go_on(folder, options, splits, say=say)


def _go_on(folder: Path, options: Options, splits: data.Splits, *, say: Say) -> None:
    """Whatever is left to do of training, the quick evaluation and the figures."""
    runs.record_environment(folder, options.device)
    say(splits.describe())
    say(f"binarization {options.binarization}, likelihood {options.likelihood}")
    if _saved_step(folder) < _total_steps(options, splits) or not (folder / runs.MODEL).exists():
        _train(folder, options, splits, say=say)  # of a finished run without its weights, this writes them again
    if not _is_evaluated(folder):
        write_evaluation(
            folder,
            splits,
            split="test",
            num_particles=options.evaluation_particles,
            images=options.images,
            device=options.device,
            seed=_QUICK_EVALUATION_SEED,
            say=say,
        )
    if not _is_drawn(folder, splits):
        write_figures(folder, splits, say=say)


def _train(folder: Path, options: Options, splits: data.Splits, *, say: Say) -> None:
    device = build.device(options.device)
    stored, observe = data.training_images(splits, options.binarization or "")
    validation = data.evaluation_images(splits, "validation", options.binarization or "")
    pyro.set_rng_seed(options.seed)
    vae = build.vae(options, splits.event_shape)
    saved, step = None, _saved_step(folder)
    if (folder / runs.TRAINING_STATE).exists():
        saved = runs.load_tensors(folder / runs.TRAINING_STATE)
        say(f"Going on from step {step:,}.")
    else:
        build.start_from_marginals(vae, data.expected_images(splits, options.binarization or ""))
    vae.to(device)
    runs.cut_metrics(folder, step)

    with (
        tqdm(total=_total_steps(options, splits), initial=step, unit="step", desc="training") as bar,
        quiet_about_nan(),
    ):

        def on_epoch(record: dict[str, Any]) -> None:
            runs.append_metrics(folder, record)
            elbo = record["validation_elbo_nats_per_image"]
            bar.set_postfix_str(f"epoch {record['epoch']}/{options.epochs}, validation ELBO {elbo:.2f} nats")

        def on_checkpoint(state: TrainingState) -> None:
            # The state last: a run killed between the two goes on from the older state, and writes both again.
            if state.best_weights:
                runs.save_tensors(folder / runs.MODEL, state.best_weights, {"step": state.best_step})
            runs.save_tensors(folder / runs.TRAINING_STATE, *state.to_tensors())

        try:
            state = fit(
                vae,
                stored,
                validation,
                epochs=options.epochs,
                objective=build.objective(options),
                observe=observe,
                batch_size=options.batch_size,
                learning_rate=options.learning_rate,
                beta=options.beta,
                warmup_epochs=options.warmup_epochs or 0,
                clip_norm=options.clip_norm,
                seed=options.seed,
                saved=saved,
                on_step=lambda state: bar.update(),
                on_epoch=on_epoch,
                on_checkpoint=on_checkpoint,
                checkpoint_seconds=options.checkpoint_seconds,
            )
            on_checkpoint(state)
        except ValueError as error:
            if saved is None:
                raise
            raise ValueError(f"{folder / runs.TRAINING_STATE}: {error}") from None
        except NotFinite as error:
            raise NotFinite(f"{error}; a new run with a smaller --learning-rate or --beta may pass it") from None
    say(
        f"Trained {options.epochs} epochs in {state.seconds:.0f} s; best validation ELBO {state.best_elbo:.2f} nats, "
        f"at step {state.best_step:,} of {state.step:,}."
    )
    if options.beta != 1 and state.best_step < state.step:
        say(
            f"The weights of step {state.best_step:,} are kept: from then on, training with beta = {options.beta} "
            "lowered the ELBO at beta = 1, by which they are chosen."
        )


@contextmanager
def quiet_about_nan() -> Iterator[None]:
    """Without Pyro's own warning: the error that follows says the same, with the step and the site."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Encountered NaN")
        yield


def _check_support(options: Options, splits: data.Splits) -> None:
    """Refuses, before anything is written, data that the likelihood has no probability for."""
    likelihood = _likelihood(options, splits)
    for split in ("train", "validation", "test"):
        if options.binarization == "none" and not likelihood.support.check(data.probabilities(splits, split)).all():
            raise ValueError(
                f"--likelihood {options.likelihood}: expected pixels that are {likelihood.support_words}, "
                f"got {splits.kind} in {split}; another --binarization makes them so"
            )


def _likelihood(options: Options, splits: data.Splits) -> Any:
    return build.LIKELIHOODS[options.likelihood](splits.event_shape)


def _same_data(folder: Path, options: Options, seen: dict[str, Any]) -> data.Splits:
    splits = data.load(options.dataset)
    if splits.sha256 != seen["sha256"]:
        raise ValueError(
            f"{options.dataset}: the file has changed since {folder} was trained on it (its SHA-256 differs)"
        )
    if splits.event_shape != seen["event_shape"]:
        raise ValueError(
            f"{folder / runs.CONFIG}: damaged: event_shape {seen['event_shape']}, but the data has {splits.event_shape}"
        )
    return splits


# --- Where a run stands ---


def _total_steps(options: Options, splits: data.Splits) -> int:
    return options.epochs * math.ceil(len(splits.train) / options.batch_size)


def _saved_step(folder: Path) -> int:
    path = folder / runs.TRAINING_STATE
    return runs.load_step(path) if path.exists() else 0


def _is_evaluated(folder: Path) -> bool:
    """The test split was evaluated with the weights that the run has now."""
    entry = runs.read_evaluations(folder).get("test", {})
    return entry.get("step") == runs.load_step(folder / runs.MODEL)


def _is_drawn(folder: Path, splits: data.Splits) -> bool:
    """Every figure is there, and is newer than what it was drawn from."""
    sources = [folder / runs.MODEL, folder / runs.METRICS]
    newest = max(path.stat().st_mtime_ns for path in sources if path.exists())
    drawn = [folder / runs.FIGURES / name for name in figure_names(splits)]
    return all(path.exists() and path.stat().st_mtime_ns >= newest for path in drawn)


def _is_finished(folder: Path, options: Options, splits: data.Splits) -> bool:
    return (
        _saved_step(folder) >= _total_steps(options, splits)
        and (folder / runs.MODEL).exists()
        and _is_evaluated(folder)
        and _is_drawn(folder, splits)
    )


# --- Evaluation ---


def evaluate_run(
    run_dir: str, *, split: str, num_particles: int, images: int | None, device: str, seed: int, say: Say
) -> dict[str, Any]:
    """Estimates log p(x) of a split, writes it into evaluation.json under the split's name, and says it.

    Returns:
        The entry, as evaluation.json holds it.

    Raises:
        ValueError: no run, a damaged one, or other data than it was trained on.
    """
    folder = Path(run_dir)
    options, seen = build.read_config(folder)
    splits = _same_data(folder, options, seen)
    return write_evaluation(
        folder, splits, split=split, num_particles=num_particles, images=images, device=device, seed=seed, say=say
    )


def write_evaluation(
    folder: Path,
    splits: data.Splits,
    *,
    split: str,
    num_particles: int,
    images: int | None,
    device: str,
    seed: int,
    say: Say,
) -> dict[str, Any]:
    """``evaluate_run``, for data that is already loaded."""
    runs.read_evaluations(folder)  # a damaged file is found before the work, not after it
    step = runs.load_step(folder / runs.MODEL)
    options, _ = build.read_config(folder)
    place = build.device(device)
    vae = build.load(folder).to(place)
    x = data.evaluation_images(splits, split, options.binarization or "")
    if images is not None and images > len(x):
        say(f"--images {images:,}: the {split} split has {len(x):,}, and all are taken.")
    x = x[data.subset(len(x), images)].to(place)
    started = time.monotonic()
    with tqdm(total=len(x), unit="image", desc=f"log p(x), {split}") as bar:
        result = evaluate(vae, x, num_particles=num_particles, seed=seed, progress=bar.update)
    entry = {
        "dataset": splits.name,
        "split": split,
        "binarization": options.binarization,
        "num_images": len(x),
        "num_particles": num_particles,
        "seed": seed,
        "likelihood": options.likelihood,
        "measure": _likelihood(options, splits).measure,
        **_summary(result, num_particles),
        "bits_per_dim": None,  # binarized pixels are no 8-bit data
        "step": step,
        "seconds": time.monotonic() - started,
    }
    # What was measured with weights that the run has no longer says nothing of the run.
    kept = {key: old for key, old in runs.read_evaluations(folder).items() if old.get("step") == step}
    if split in kept:
        old = kept[split]
        say(f"Replaces the {split} split's estimate of {old['num_images']:,} images with S = {old['num_particles']:,}.")
    runs.write_json(folder / runs.EVALUATION, kept | {split: entry})
    for line in describe_evaluation(entry):
        say(line)
    return entry


def _summary(result: Importance, num_particles: int) -> dict[str, Any]:
    def mean(values: Tensor) -> dict[str, float]:
        estimate = Estimate.of(values, num_particles)
        return {"mean": estimate.mean, "stderr": estimate.stderr}

    def quantiles(values: Tensor) -> dict[str, float | None]:
        known = values[~values.isnan()]
        if not len(known):
            return {"median": None, "q05": None, "q95": None}
        return {
            name: float(known.quantile(q, interpolation="lower"))
            for name, q in (("median", 0.5), ("q05", 0.05), ("q95", 0.95))
        }

    count = len(result.log_evidence)
    return {
        "log_likelihood": mean(result.log_evidence),
        "elbo": mean(result.elbo),
        "reconstruction": mean(result.reconstruction),
        "kl": mean(result.kl),
        "monte_carlo_stderr": float(result.monte_carlo_stderr.square().sum().sqrt()) / count,
        "bias": float(result.bias.mean()),
        "rise": float(result.rise.mean()),
        "ess": quantiles(result.ess),
        "pareto_k": quantiles(result.pareto_k),
        "unreliable_images": int(result.unreliable().sum()) if num_particles > 1 else None,
    }


def describe_evaluation(entry: dict[str, Any]) -> list[str]:
    """The numbers of one evaluation, in words."""
    S, n = entry["num_particles"], entry["num_images"]
    ll, elbo, rec, kl = (entry[key] for key in ("log_likelihood", "elbo", "reconstruction", "kl"))
    lines = [
        f"log-likelihood {_pm(ll)} nats an image: the importance-weighted bound L_{S}, in expectation below log p(x)",
        f"  {entry['split']} split, {n:,} images, binarization {entry['binarization']}; "
        "± is the standard error over images",
        f"  ELBO (beta = 1) {_pm(elbo)} = reconstruction {_pm(rec)} - KL {_pm(kl)}",
    ]
    if S == 1:
        return [*lines, "  one importance sample says nothing of its own error: take more"]
    k = entry["pareto_k"]["median"]
    fitted = "not estimated" if k is None else f"median {k:.2f}"
    lines.append(
        f"  effective particles: median {_number(entry['ess']['median'], 1)} of {S:,}; Pareto k-hat: {fitted} "
        "(above 0.7 is normal for a healthy VAE)"
    )
    seen = "see" if k is not None and k < _K_WITH_VARIANCE else "see, as a floor since k-hat is not below 0.5,"
    lines.append(
        f"  delta method and jackknife {seen} a Monte Carlo error of {_number(entry['monte_carlo_stderr'], 3)} "
        f"and {_number(entry['bias'], 3)} nats still lacking"
    )
    lines.append(f"  ten times the particles, S = {S // 10:,} to {S:,}, gained {_number(entry['rise'], 3)} nats")
    return [
        *lines,
        f"  unreliable images (jackknife above {UNRELIABLE_BIAS} nats): {entry['unreliable_images']:,} of {n:,}",
    ]


def _number(value: float | None, digits: int) -> str:
    return "unknown" if value is None or math.isnan(value) else f"{value + 0.0:.{digits}f}"


def _pm(estimate: dict[str, float]) -> str:
    return f"{_number(estimate['mean'], 2)} ± {_number(estimate['stderr'], 2)}"  # unknown for one image


# --- Figures ---


def draw_run(run_dir: str, *, say: Say) -> None:
    """Draws a run's figures again, from its files."""
    folder = Path(run_dir)
    options, seen = build.read_config(folder)
    write_figures(folder, _same_data(folder, options, seen), say=say)


def figure_names(splits: data.Splits) -> list[str]:
    """The figures that a run on this data has: tables are no images."""
    return [_CURVES] if len(splits.event_shape) == 1 else [_CURVES, _RECONSTRUCTIONS, _SAMPLES, _INTERPOLATIONS]


def write_figures(folder: Path, splits: data.Splits, *, say: Say) -> None:
    """Training curves, reconstructions, prior samples and interpolations, into the run's figures/."""
    options, _ = build.read_config(folder)
    vae = build.load(folder)
    metrics = runs.read_metrics(folder)
    if not metrics:
        raise ValueError(f"{folder / runs.METRICS}: expected the record of at least one epoch, got none")
    try:
        figures = {_CURVES: plots.training_curves(metrics, title=f"{splits.name}: training")}
    except KeyError as error:
        raise ValueError(f"{folder / runs.METRICS}: damaged: a record is missing {error}") from None
    if len(splits.event_shape) == 1:
        say("The data is a table, (N, D): figures of images are skipped.")
    else:
        x = data.evaluation_images(splits, "test", options.binarization or "")
        with seeded(_FIGURE_SEED, x.device), torch.no_grad():
            figures |= _image_figures(vae, x[data.subset(len(x), 2 * _NUM_SHOWN)])
    for name, figure in figures.items():
        path = folder / runs.FIGURES / name
        path.parent.mkdir(exist_ok=True)
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=130)
        runs.write_bytes(path, png.getvalue())
    say(f"Figures in {folder / runs.FIGURES}: {', '.join(figures)}")


def _image_figures(vae: VAE, x: Tensor) -> dict[str, Any]:
    """x: 2 N test images (2 N, C, H, W), as the model sees them."""
    x = x[torch.randperm(len(x))]
    half = x[: max(1, len(x) // 2)]
    decoded = vae.likelihood(vae.posterior(half).rsample())
    rows = {"test image x": half, "E[x | z]": decoded.mean, "x ~ p(x | z)": decoded.sample()}
    prior = vae.likelihood(vae.prior().expand((64,)).sample())
    start, end = (vae.posterior(ends).mean for ends in (half[: len(half) // 2 or 1], half[-(len(half) // 2 or 1) :]))
    weight = torch.linspace(0, 1, _NUM_SHOWN).reshape(-1, 1, 1)
    path = vae.likelihood((1 - weight) * start + weight * end).mean
    return {
        _RECONSTRUCTIONS: plots.image_rows(_arrays(rows), title="Reconstructions, z ~ q(z | x)"),
        _SAMPLES: plots.image_grids(
            _arrays({"means E[x | z]": prior.mean, "images x ~ p(x | z)": prior.sample()}),
            columns=8,
            title="Samples from the prior, z ~ p(z)",
        ),
        _INTERPOLATIONS: plots.image_rows(
            _arrays({f"pair {i + 1}": path[:, i] for i in range(path.shape[1])}),
            title="E[x | z] on the line between two posterior means",
        ),
    }


def _arrays(images: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {label: x.float().clamp(0, 1).numpy() for label, x in images.items()}
