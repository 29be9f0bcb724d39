"""The wording of a run: what is modelled, how its training goes and ends, and its model card in Markdown.

Whatever a file names, such as a data set or a device, stands in code spans of the card, where nothing is markup.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from ppl_vae import data, runs
from ppl_vae.data import SPLITS
from ppl_vae.reports.text.evaluation import describe_certificate, describe_evaluation
from ppl_vae.runs.build import build_likelihood, count_weights, is_autoencoder
from ppl_vae.runs.certificates import CERTIFICATE, Certificate
from ppl_vae.runs.load import is_export
from ppl_vae.runs.open import Run
from ppl_vae.runs.options import Options
from ppl_vae.runs.resolve import validation_particles
from ppl_vae.runs.results import from_json, read_entry
from ppl_vae.runtime.errors import pluralize
from ppl_vae.runtime.numerics import mean_and_variance
from ppl_vae.training import TrainingState

# Likelihoods with one scale for all pixels or columns.
_ONE_SCALE = ("normal", "normal-fixed", "normal-optimal", "laplace", "student-t")
_UNEVEN = 10  # ratio of the widest to the narrowest column's spread, above which one scale fits neither


def describe_model(run: Run) -> list[str]:
    """The network, the binarization and the likelihood of a run, and the scale of its numbers."""
    options, splits = run.options, run.splits
    likelihood = build_likelihood(options, splits.event_shape)
    num_weights = count_weights(options, splits.event_shape)
    counts = " + ".join([str(options.latent_dim), *map(str, options.upper_latents or ())])
    guide = options.inference if options.upper_latents else options.posterior
    transform = ", transform logit" if options.transform == "logit" else ""
    lines = [
        f"network {options.network} ({num_weights:,} weights), latents {counts}, prior {options.prior}, posterior "
        f"{guide}, objective {options.objective}, binarization {options.binarization}, likelihood "
        f"{options.likelihood}{transform} (a {likelihood.measure})"
    ]
    if options.labels is not None:
        lines.append(
            f"Of the training images {options.labels:,} have a known label, one of {options.classes}: training and "
            "validation are of log p(x)."
        )
    elif options.classes is not None:
        lines.append(f"Each image has one of {options.classes} labels y: training and validation are of log p(x | y).")
    if len(splits.event_shape) == 3 and splits.event_shape[0] == 3 and run.binarization != "none":
        lines.append(
            "Each color channel becomes 0 or 1 here, which is not how photos look; --likelihood "
            "discretized-logistic-mixture takes colors as they are."
        )
    lines += _describe_uneven_columns(options, splits)
    if likelihood.measure == "density" and (warning := data.describe_constant_columns(splits.train)):
        lines.append(warning)
    if is_autoencoder(options):
        lines.append(
            "A plain autoencoder: the guide is deterministic and has no density, so that every number is a "
            "reconstruction, log p(x | z(x)), and none a log-likelihood."
        )
    return lines + _describe_pixels(run, likelihood.measure)


def _describe_pixels(run: Run, measure: str) -> list[str]:
    """How pixels become numbers under a density, and what its nats can be compared with."""
    options, splits = run.options, run.splits
    if run.pixels == "dequantized" and is_autoencoder(options):
        return ["Pixels are (level + u) / 256, u uniform and drawn anew; its reconstructions are of that density."]
    if run.pixels == "dequantized":
        constant = math.prod(splits.event_shape) * math.log(256)
        return [
            "Pixels are (level + u) / 256, u uniform and drawn anew at every access. Training and validation are of "
            f"that density; {constant:,.1f} nats (D log 256) less, and it bounds the levels' mass, which is evaluated."
        ]
    if measure != "density":
        return []
    if splits.kind in (data.LEVELS, data.BINARY, data.COUNTS):
        pixels = {data.LEVELS: "levels / 255", data.BINARY: "zeros and ones", data.COUNTS: "counts"}[splits.kind]
        advice = " Counts have a mass under --likelihood negative-binomial." if splits.kind == data.COUNTS else ""
        return [
            f"Pixels are {pixels} here: a density of values on a grid has no upper bound, and its nats compare only "
            f"with densities of the same pixels.{advice}"
        ]
    repeats = data.describe_repeats(splits.train)
    return [repeats] if repeats else []


def _describe_uneven_columns(options: Options, splits: data.Splits) -> list[str]:
    """A warning where the columns of a table differ too much in spread for the one scale of the likelihood."""
    is_table = len(splits.event_shape) == 1 and splits.kind == data.REAL
    if not is_table or options.likelihood not in _ONE_SCALE or options.transform != "none":
        return []
    spread = mean_and_variance(splits.train)[1].sqrt()
    columns = spread.nonzero().flatten()
    if not len(columns):
        return []
    narrow, wide = (columns[extreme(spread[columns])] for extreme in (torch.argmin, torch.argmax))
    factor = float(spread[wide] / spread[narrow])
    if factor <= _UNEVEN:
        return []
    return [
        f"Warning: the columns differ in spread by a factor of {factor:,.0f} ({spread[narrow]:.3g} in column "
        f"{int(narrow)}, counted from 0, {spread[wide]:.3g} in column {int(wide)}), and {options.likelihood} has one "
        "scale for all. Standardize the columns, in NumPy (x - x.mean(0)) / x.std(0), or use --likelihood "
        "normal-per-pixel."
    ]


def _name_criterion(options: Options) -> tuple[str, str]:
    """What the best weights are chosen by, in words and in the keys of metrics.jsonl."""
    S = validation_particles(options)
    word = ("ELBO", "elbo") if S == 1 else (f"bound L_{S}", "bound")
    return ("reconstruction", "reconstruction") if is_autoencoder(options) else word


def describe_validation(options: Options, record: Mapping[str, float]) -> str:
    """The validation number of an epoch."""
    criterion, key = _name_criterion(options)
    value = record.get(f"validation_{key}_nats_per_image")
    return "no validation images" if value is None else f"validation {criterion} {value:.2f} nats"


def describe_epoch(options: Options, record: Mapping[str, float], validated: str) -> str:
    """An epoch's numbers and times, for a log."""
    return (
        f"Epoch {record['epoch']} of {options.epochs}: {validated}, training loss "
        f"{record['train_loss_nats_per_image']:.2f} nats; {tqdm.format_interval(record['seconds'])} elapsed."
    )


def describe_training(run: Run, state: TrainingState, speeds: Sequence[float]) -> list[str]:
    """How a training ended: its time, its speeds in images per second by epoch, the kept weights, skipped steps."""
    options = run.options
    density = " of the density of (level + u) / 256" if run.pixels == "dequantized" else ""
    best = f"best validation {_name_criterion(options)[0]}{density} {state.best_validation:.2f} nats"
    chosen = f"{best}, at step {state.best_step:,} of {state.step:,}"
    if state.best_step == 0:
        chosen = f"{best}, that of the weights that it started from: no epoch had a better one, and they are kept"
    if options.keep == "last":
        chosen = "the last weights are kept, as --keep last asks"
    if not len(run.splits.validation):
        chosen = "no validation images, so the last weights are kept"
    speed = f", {statistics.median(speeds):,.0f} training images per second" if speeds else ""
    lines = [f"Trained {pluralize(options.epochs, 'epoch')} in {state.seconds:.0f} s{speed}; {chosen}."]
    if state.skipped:
        lines.append(
            f"{state.skipped:,} of {state.step:,} steps were left out: their gradient's norm was above --skip-norm, or "
            "not finite."
        )
    if options.beta != 1 and state.best_step < state.step and not is_autoencoder(options):
        lines.append(
            f"The weights of step {state.best_step:,} are kept: from then on, training with beta = {options.beta} "
            "lowered the ELBO at beta = 1, by which they are chosen."
        )
    records, (_, key) = runs.read_metrics(run.folder), _name_criterion(options)
    return lines + describe_few_images(records, key, skips=options.skip_norm is not None)


def describe_few_images(records: Sequence[Mapping[str, float]], key: str, *, skips: bool) -> list[str]:
    """A line if few validation images decide how far the last epoch lies below the best one.

    One image of n that falls by d lowers the mean by d / n, and its standard error becomes about d / n too. So the line
    is for a fall of more than ten errors of the best epoch that is less than three of its own. Source: ours.

    Args:
        records: Those of metrics.jsonl.
        key: What the best weights are chosen by, as ``validation_KEY_nats_per_image``.
        skips: Whether steps with a large gradient were left out.
    """
    name, error = f"validation_{key}_nats_per_image", f"validation_{key}_stderr_nats_per_image"
    records = [record for record in records if name in record]
    if not records:
        return []
    last, best = records[-1], max(records, key=lambda record: record[name])
    fall = best[name] - last[name]
    if not 10 * best[error] < fall < 3 * last[error]:
        return []
    cure = ", or no --skip-norm, with which such images are never learned" if skips else ""
    return [
        f"Warning: few validation images decide the last epoch, {last[name]:.2f} ± {last[error]:.2f} nats, {fall:.2f} "
        f"below the best one: the encoder fails for them. A smaller --learning-rate may help{cure}."
    ]


# --- The model card ---

CARD = "README.md"
_MOST_CHARACTERS = 200  # of a name from a file


def make_card(
    run: Run, evaluations: Mapping[str, object], *, step: int, figures: Sequence[str] = (), address: str | None = None
) -> str:
    """The model card in Markdown, with YAML front matter for hubs.

    Args:
        run: The run. Its images are not used.
        evaluations: The entries of evaluation.json for these weights.
        step: The training step of the weights.
        figures: The names of the pictures in the folder figures next to the card.
        address: What ``load`` takes, where the card goes to a hub.

    Raises:
        ValueError: A file of the run is damaged.
    """
    sections = [
        _make_front_matter(run),
        f"# A VAE of {code(run.splits.name)}",
        _describe_model(run),
        "## Numbers\n\n" + _describe_numbers(run, evaluations),
        "## Data\n\n" + _describe_data(run),
        "## Training\n\n" + _describe_training(run, step),
        "## Limits\n\n" + _describe_limits(run),
        "## How to load it\n\n" + _explain_loading(run, address or "path/to/this/folder"),
    ]
    if figures:
        pictures = [f"![{Path(name).stem.replace('_', ' ')}]({runs.FIGURES}/{name})" for name in figures]
        sections.append("## Figures\n\n" + "\n\n".join(pictures))
    sections.append(
        "## License\n\nNot chosen yet: fill in the license of these weights. The license of the data may restrict it."
    )
    return "\n\n".join(sections) + "\n"


def code(value: object) -> str:
    """A Markdown code span of one line, in which nothing is markup."""
    text = re.sub(r"\s+", " ", "".join(c if c.isprintable() else " " for c in str(value))).strip()
    text = text.replace("`", "'")
    cut = text[:_MOST_CHARACTERS] + "..." * (len(text) > _MOST_CHARACTERS)
    return f"`{cut or '(no name)'}`"


def block(lines: Sequence[str]) -> str:
    """Lines as an indented Markdown code block, which no line can end."""
    clean = ("".join(c if c.isprintable() else " " for c in line) for part in lines for line in part.splitlines())
    return "\n".join(f"    {line}" for line in clean)


def _make_bullets(*lines: str) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _make_front_matter(run: Run) -> str:
    tags = ["variational-autoencoder", "density-estimation", "pyro", f"likelihood-{run.options.likelihood}"]
    lines = ["---", "library_name: ppl_vae", "tags:", *(f"- {json.dumps(tag)}" for tag in tags)]
    if run.options.dataset in data.DATASETS:
        lines += ["datasets:", f"- {json.dumps(run.options.dataset)}"]
    return "\n".join([*lines, "# license: fill in", "---"])


def _describe_model(run: Run) -> str:
    options, E = run.options, run.splits.event_shape
    num_weights = count_weights(options, E)
    latents = " + ".join(map(str, (options.latent_dim, *(options.upper_latents or ()))))
    hidden = ", ".join(map(str, options.hidden or ())) or "as the network has them"
    opening = "A variational autoencoder, p(x, z) = p(z) p(x | z) with the guide q(z | x), by the package ppl_vae."
    if is_autoencoder(options):
        opening = "A plain autoencoder: its guide is deterministic. It has no log-likelihood, and is no density."
    transform = ", of the logits of pixels (the Jacobian is counted)" if options.transform == "logit" else ""
    facts = _make_bullets(
        f"Likelihood p(x | z): {options.likelihood}, a {run.scale}{transform}.",
        f"Prior p(z): {options.prior}. Guide q(z | x): {options.posterior}.",
        f"Latents: {latents}. Network: {options.network}, hidden layers {hidden}; {num_weights:,} weights.",
        f"One x has the shape ({', '.join(map(str, E))}), {math.prod(E):,} numbers.",
    )
    return f"{opening}\n\n{facts}"


def _describe_numbers(run: Run, evaluations: Mapping[str, object]) -> str:
    words = (
        "In nats per image, the mean ± its standard error over images. A log-likelihood here is an "
        "importance-weighted bound: a lower bound in expectation, and not the value of log p(x)."
    )
    parts = [] if is_autoencoder(run.options) else [words]
    try:
        for key in filter(evaluations.__contains__, SPLITS):
            parts.append(block(describe_evaluation(read_entry(evaluations[key]))))
        for key in sorted(key for key in evaluations if key.startswith(CERTIFICATE)):
            words = block(describe_certificate(from_json(Certificate, evaluations[key])))
            parts.append(f"Certificate, {code(key.removeprefix(CERTIFICATE))} split:\n\n{words}")
    except ValueError as error:
        raise ValueError(f"{runs.EVALUATION}: damaged: {error}") from None
    if "test" not in evaluations:
        parts.append("There is no evaluation of the test split with these weights.")
    return "\n\n".join(parts)


def _describe_data(run: Run) -> str:
    options, splits = run.options, run.splits
    protocol = f"the {options.protocol} protocol"
    if options.dataset not in data.DATASETS:
        protocol = "as in the data; a missing validation or test split is a tenth of the training images, permuted once"
    facts = [
        f"Data set: {code(splits.name)}, {splits.kind}; SHA-256 {code(splits.sha256)}.",
        f"Splits: {protocol}.",
        f"Binarization: {options.binarization}. Dequantization: {options.dequantization}. Pixels are evaluated as "
        f"{run.evaluated_pixels}.",
    ]
    if options.image_size is not None:
        facts.append(f"Images were brought to {options.image_size[0]}x{options.image_size[-1]} ({options.fit}).")
    return _make_bullets(*facts)


def _describe_training(run: Run, step: int) -> str:
    if is_export(runs.read_json(run.folder / runs.CONFIG)):
        return f"Not in the files of an export, except for the step of the weights: {step:,}."
    options, facts = run.options, [f"Weights of step {step:,}."]
    if not run.can_resume:
        facts.append(
            "Trained from Python, or shipped with the package, without a record of the training. What follows are "
            "the options in config.json; nothing confirms that the training used them."
        )
    environment = run.folder / runs.ENVIRONMENT
    found = runs.read_json(environment) if environment.exists() else {}
    versions = ", ".join(f"{name} {version}" for name, version in found.get("packages", {}).items() if version)
    facts += [
        f"{describe_epochs(run)}.",
        f"Batches of {options.batch_size:,}, Adam from {options.learning_rate:g}, objective {options.objective}, "
        f"beta {options.beta:g}, KL warm-up {options.warmup_epochs:,} epochs.",
        f"Seed {options.seed}: one training, whose numbers say nothing of how others would differ.",
        f"Kept: the {options.keep} weights; moving average {options.average_decay:g}; precision {options.precision}; "
        f"dropout {options.dropout:g}.",
    ]
    if found:
        facts.append(
            f"Versions: {code(versions or 'unknown')}, Python {code(found.get('python'))}. Device: "
            f"{code(found.get('device'))}."
        )
    return _make_bullets(*facts)


def describe_epochs(run: Run) -> str:
    """How far a training came: the epochs of the last record of metrics.jsonl, of those in the options."""
    records, asked = runs.read_metrics(run.folder), run.options.epochs
    if not records:
        return f"{asked:,} epochs were asked for; how many were trained is not recorded"
    return f"{records[-1]['epoch']:,} of {asked:,} epochs"


def describe_export(run: Run, folder: Path, entries: Mapping[str, object], figures: list[str]) -> list[str]:
    """The lines about an export: where it is, and what it lacks."""
    lines = [
        f"Exported to {folder}: load({str(folder)!r}) makes the model of it. {CARD} is its model card: read it,",
        "  and fill in the license. No option of the training and no path of this machine is in the folder.",
    ]
    if not is_export(runs.read_json(run.folder / runs.CONFIG)):
        lines.append(f"Trained: {describe_epochs(run)}.")
    if not entries:
        lines.append("There is no evaluation of these weights; ppl-vae evaluate makes one.")
    if "reconstructions.png" in figures:
        lines.append(
            "figures/reconstructions.png shows images of the data: delete it where those are not to be shared."
        )
    return lines


def _describe_limits(run: Run) -> str:
    limits = ["Nothing here was checked beyond the images that the numbers are of: no fairness, no other source."]
    if is_autoencoder(run.options):
        limits.append("It gives reconstructions alone; log p(x | z(x)) is no log-likelihood, and compares with none.")
        return _make_bullets(*limits)
    if run.pixels == "dequantized":
        limits.append(
            "`load` gives a density of (level + u) / 256; `dequantized(load(...))` is the mass of levels that the "
            "numbers are of."
        )
    return _make_bullets(
        *limits,
        f"Its nats are of a {run.scale}, and compare with no number on another scale or protocol. A density can be "
        "above 1 and its log above 0; where values lie on a grid it has no bound.",
        "A high log p(x) does not say that an image is like the training data: smooth and simple images of another "
        "kind can score higher (Nalisnick et al. 2019, arXiv 1810.09136). It finds no outliers by itself.",
    )


def _explain_loading(run: Run, place: str) -> str:
    shape = ", ".join(map(str, run.splits.event_shape))
    names, model = ["load"], f'load("{place}")'
    if run.pixels == "dequantized":
        names, model = ["dequantized", "load"], f"dequantized({model})"
    use = f"z = vae.posterior(x).mean  # x: (N, {shape})"
    if not is_autoencoder(run.options):
        names.append("log_evidence")
        use = f"nats = log_evidence(vae.model, vae.guide, x, num_particles=1000)  # x: (N, {shape}), as modelled"
    images = "images = vae.likelihood(vae.prior().sample((16,))).mean"
    return f"```python\nfrom ppl_vae import {', '.join(names)}\n\nvae = {model}\n{use}\n{images}\n```"
