"""A user's images under a run: their latents, and their missing pixels; and new images from a run."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ppl_vae import runs
from ppl_vae.commands.evaluate import evaluate_images
from ppl_vae.commands.options import Encode, Impute, Sample
from ppl_vae.data import SPLITS, dequantize_uniformly
from ppl_vae.evidence.estimate import Estimate, ImagesMean
from ppl_vae.evidence.evaluation import evaluate, reconstruction
from ppl_vae.evidence.missing import Imputation, Observed, impute
from ppl_vae.evidence.moments import PosteriorMoments, encode, sample_latents
from ppl_vae.labels import ConditionalVAE
from ppl_vae.reports.figures.charts import latents_figure
from ppl_vae.reports.figures.images import (
    choose_display,
    draw_imputations,
    name_classes,
    samples_by_class,
    samples_figure,
)
from ppl_vae.reports.text.evaluation import FEW_PARTICLES, describe_encoding, describe_imputation
from ppl_vae.reports.text.pages import NOT_TRAINED_ON_PRIOR
from ppl_vae.runs.build import is_autoencoder
from ppl_vae.runs.command_results import Encoding, ImageScore, ImputationSummary, ImputedImage
from ppl_vae.runs.files import JsonObject
from ppl_vae.runs.load import load
from ppl_vae.runs.open import (
    Images,
    Run,
    Say,
    check_density,
    check_no_labels,
    load_evaluated_vae,
    load_given_images,
    open_run,
    open_run_or_export,
)
from ppl_vae.runs.outputs import make_output_folder, write_arrays, write_figure, write_picture
from ppl_vae.runs.resolve import find_device
from ppl_vae.runs.results import Quantiles, summarize_importance, to_json
from ppl_vae.runtime.batching import images_per_pass
from ppl_vae.runtime.global_state import seeded, serialize_threads
from ppl_vae.runtime.process import progress_bar
from ppl_vae.vae import VAE

_NUM_LOWEST = 5
_MOST_DRAWN = 256  # in samples.png
_MOST_IN_ROW = 16


def _describe_given(run: Run, given: Images, options: Encode | Impute) -> JsonObject:
    """The fields that the summaries of given images share."""
    return vars(run.provenance) | {
        "images": given.source,
        "num_images": len(given.x),
        "seed": options.seed,
        "step": runs.load_step(run.folder / runs.MODEL),
        "notes": given.notes,
    }


# --- Latents ---


def encode_images(options: Encode, *, say: Say) -> Path:
    """Computes latents and log p(x) of images; writes encoded.npz, encoded.json and latents.png.

    encoded.npz holds for each image ``mean`` and ``scale`` of q(z | x) (n, L), ``log_likelihood`` (the bound L_S),
    ``elbo``, ``ess``, ``pareto_k`` (n,), ``names`` (of files, or places in the split or array) and, if they are known,
    ``labels``. Where images are from a path and the run's data is there, ``split`` names the split of the run that
    holds the same image, "" where none does. For dequantized levels, mean and scale are those of q(z | (x + u) / 256)
    with one draw of u.

    An autoencoder has no density: ``mean`` is z(x), and ``reconstruction``, log p(x | z(x)), is the only other number.
    For dequantized levels both use the same (x + u) / 256.

    An export of a run needs no data for a user's own images. Refuses images with missing pixels, but for a run that
    was trained with ``--missing train``: its numbers are those of the observed pixels.
    """
    is_split = options.images_path in SPLITS
    opened = open_run if is_split else open_run_or_export
    run = opened(options.run_dir, dataset=options.dataset, data_dir=options.data_dir, say=say)
    check_no_labels(run, "code of an image without its label")
    find_device(options.device)
    given = load_given_images(run, options.images_path, most=options.images, seed=options.seed)
    holes = int(given.x.flatten(1).isnan().any(1).sum())
    if holes and run.options.missing != "train":
        raise ValueError(
            f"{given.source}: expected every pixel, got missing ones (NaN) in {holes:,} of {len(given.x):,} images; a "
            "run that was trained with --missing train takes them"
        )
    name = options.images_path if is_split else Path(options.images_path).resolve().stem or "images"
    folder = make_output_folder(options.output, run.folder / "encodings" / name)
    measure = _reconstruct_images if is_autoencoder(run.options) else _evaluate_images
    codes, numbers, summary = measure(run, given, options, say)
    codes = codes._replace(mean=codes.mean.cpu(), scale=codes.scale.cpu())
    arrays = {"mean": codes.mean} | numbers
    if given.labels is not None:
        arrays |= {"labels": given.labels}
    vae = load_evaluated_vae(run)
    with seeded(options.seed, torch.device("cpu")), torch.no_grad():
        figure = latents_figure(
            codes, vae.prior(), kind="image", classes=given.labels, class_names=run.splits.class_names
        )
    (folder / "encoded.json").unlink(missing_ok=True)  # the last that is written: it never describes other arrays
    write_arrays(folder / "encoded.npz", arrays, given.names, given.splits)
    write_figure(folder / "latents.png", figure)
    runs.write_json(folder / "encoded.json", to_json(summary))
    for line in (*given.notes, *describe_encoding(summary)):
        say(line)
    say(f"In {folder}: encoded.npz (latents and numbers of each image), encoded.json, latents.png")
    return folder


Encoded = tuple[PosteriorMoments, dict[str, Tensor], Encoding]  # latents, numbers of each image, and their summary


def _evaluate_images(run: Run, given: Images, options: Encode, say: Say) -> Encoded:
    device, S = find_device(options.device), options.num_particles
    vae, x = load_evaluated_vae(run).to(device), given.x.to(device)
    with seeded(options.seed, device):
        codes = encode(vae, x)
    result = evaluate_images(run, given.x, options, words=f"log p(x), {Path(given.source).name}", say=say)
    lowest = result.log_evidence.argsort()[:_NUM_LOWEST].tolist()
    summary = Encoding(
        **_describe_given(run, given, options),
        **vars(summarize_importance(result, S)),
        num_particles=S,
        log_likelihood=Estimate.mean_of(result.log_evidence, S),
        lowest=tuple(ImageScore(given.names[i], log_likelihood=float(result.log_evidence[i])) for i in lowest),
    )
    numbers = {"scale": codes.scale.cpu(), "log_likelihood": result.log_evidence}
    return codes, numbers | {"elbo": result.elbo, "ess": result.ess, "pareto_k": result.pareto_k}, summary


def _reconstruct_images(run: Run, given: Images, options: Encode, say: Say) -> Encoded:
    device = find_device(options.device)
    vae, x = load(run.folder).to(device), given.x.to(device)
    with seeded(options.seed, device):
        x = dequantize_uniformly(x) if run.pixels == "dequantized" else x
    with progress_bar(total=len(x), unit="image", desc=f"log p(x | z), {Path(given.source).name}") as bar:
        found = reconstruction(vae, x, seed=options.seed, progress=bar.update).cpu()
    lowest = found.argsort()[:_NUM_LOWEST].tolist()
    summary = Encoding(
        **_describe_given(run, given, options) | {"scale": run.trained_scale},
        reconstruction=Estimate.mean_of(found, 1),
        lowest=tuple(ImageScore(given.names[i], reconstruction=float(found[i])) for i in lowest),
    )
    return encode(vae, x), {"reconstruction": found}, summary


# --- Missing pixels ---


def impute_images(options: Impute, *, say: Say) -> Path:
    """Estimates log p(x_observed) of images, draws x_missing ~ p(x_missing | x_observed), and returns the folder.

    Writes imputed.npz, imputations.json and imputations.png. imputed.npz holds ``draws`` (M, n, *E), ``mean`` (n, *E),
    ``mask`` (n, *E) (1 = observed), ``log_likelihood_observed`` and ``ess`` (n,), and ``names`` and ``split`` as
    ``encode_images`` has them. If pixels were hidden from images that are otherwise complete, it also holds
    ``log_likelihood_hidden``, log p(x_hidden | x_observed) = log p(x) - log p(x_observed), with NaN for the other
    images. Refuses autoencoders.
    """
    run = open_run(options.run_dir, dataset=options.dataset, data_dir=options.data_dir, say=say)
    check_density(run, "p(x_missing | x_observed) to draw from")
    check_no_labels(run, "imputation")
    device, S = find_device(options.device), options.num_particles
    vae = load_evaluated_vae(run).to(device)
    given = load_given_images(run, options.images_path, most=options.images, seed=options.seed)
    if options.mask is not None and options.hide is not None:
        raise ValueError("--hide: expected one of --mask and --hide, got both")
    event_shape = tuple(given.x.shape[1:])
    observed = torch.ones(1, *event_shape, dtype=torch.bool)
    if options.mask is not None:
        observed = read_mask(options.mask, given.num_found, event_shape)  # it belongs to all images that were found
    elif options.hide is not None:
        observed = hide_half(options.hide, event_shape)
    x = torch.where(observed.expand(given.num_found, *event_shape)[given.places], given.x, torch.nan)
    folder = make_output_folder(options.output, run.folder / "imputations")
    title = f"imputing {Path(given.source).name}"
    with seeded(options.seed, device), progress_bar(total=len(x), unit="image", desc=title) as bar:
        found = impute(Observed(vae), x.to(device), num_particles=S, num_draws=options.num_draws, progress=bar.update)
    result = Imputation(*(values.cpu() for values in vars(found).values()))
    hidden = _estimate_hidden(vae, x, given.x, result, options)
    arrays = {
        "draws": result.draws,
        "mean": result.mean,
        "mask": (~x.isnan()).byte(),
        "log_likelihood_observed": result.log_evidence,
        "ess": result.ess,
    }
    if not hidden.isnan().all():
        arrays |= {"log_likelihood_hidden": hidden}
    summary = _summarize_imputation(run, given, x, result, hidden, options)
    picture, is_table = folder / "imputations.png", len(run.splits.event_shape) == 1
    (folder / "imputations.json").unlink(missing_ok=True)  # the last that is written: it never describes other arrays
    write_arrays(folder / "imputed.npz", arrays, given.names, given.splits)
    if is_table:
        picture.unlink(missing_ok=True)
    else:
        write_figure(picture, draw_imputations(choose_display(run), x, given.x, result))
    runs.write_json(folder / "imputations.json", to_json(summary))
    for line in (*given.notes, *describe_imputation(summary)):
        say(line)
    say(f"In {folder}: imputed.npz (draws, means, mask), imputations.json{', imputations.png' * (not is_table)}")
    return folder


def read_mask(path: str, num_images: int, event_shape: tuple[int, ...]) -> Tensor:
    """Reads a mask file as (N, *E), True where a pixel is observed; or (1, *E) for all images.

    An .npy file of zeros and ones: (*E), (H, W), (N, *E), (N, H, W) or (N, H, W, C); a shape that is both an image's
    and that of N images without a channel is read as an image's. Raises ValueError for any other file.
    """
    try:
        array = np.array(np.load(path, mmap_mode="r", allow_pickle=False))  # a header that announces more is refused
    except OSError as error:
        raise ValueError(f"--mask: {path} cannot be read: {error.strerror or 'not an .npy file'}") from None
    except Exception:  # a damaged header is parsed as Python, and raises nearly every type
        raise ValueError(f"--mask: {path}: expected an .npy file of zeros and ones, got something else") from None
    if array.dtype.kind not in "buif" or not ((array == 0) | (array == 1)).all():
        raise ValueError(f"--mask: {path}: expected zeros (missing) and ones (observed) alone, got other values")
    observed, whole = torch.from_numpy(array.astype(bool)), tuple(event_shape)
    if array.shape in (whole, (num_images, *whole)):
        return observed.reshape(-1, *whole)
    if len(whole) == 3 and array.shape in (whole[1:], (num_images, *whole[1:])):
        return observed.reshape(-1, 1, *whole[1:]).expand(-1, *whole)
    if len(whole) == 3 and array.shape == (num_images, *whole[1:], whole[0]):
        return observed.permute(0, 3, 1, 2)
    raise ValueError(
        f"--mask: {path}: expected the shape of an image {whole} or of {num_images:,} images {(num_images, *whole)}, "
        f"also without channels, got {array.shape}"
    )


def hide_half(side: str, event_shape: tuple[int, ...]) -> Tensor:
    """A mask (1, *E) that is False in one half of the image, the smaller one for an odd size. Refuses tables."""
    if len(event_shape) != 3:
        raise ValueError(f"--hide: expected images (C, H, W), got a table of shape {event_shape}; --mask hides in one")
    observed = torch.ones(1, *event_shape, dtype=torch.bool)
    dim = 2 if side in ("top", "bottom") else 3
    size = observed.shape[dim]
    start = 0 if side in ("top", "left") else size - size // 2
    observed.narrow(dim, start, size // 2).fill_(False)
    return observed


def _estimate_hidden(vae: VAE, x: Tensor, truth: Tensor, result: Imputation, options: Impute) -> Tensor:
    """log p(x_hidden | x_observed) = log p(x) - log p(x_observed) of each image, (n,) nats.

    NaN for an image without a hidden pixel, and for one with pixels that nobody knows. Both terms are bounds with S
    particles; their difference is an estimate and no bound.
    """
    hidden = x.isnan().flatten(1).any(1) & ~truth.isnan().flatten(1).any(1)
    log_p = torch.full((len(hidden),), torch.nan, dtype=torch.double)
    if hidden.any():
        whole = truth[hidden].to(find_device(options.device))
        found = evaluate(vae, whole, num_particles=options.num_particles, seed=options.seed).log_evidence
        log_p[hidden] = found.cpu() - result.log_evidence[hidden]
    return log_p


def _summarize_imputation(
    run: Run, given: Images, x: Tensor, result: Imputation, hidden: Tensor, options: Impute
) -> ImputationSummary:
    missing = x.isnan().flatten(1)
    incomplete, known = missing.any(1), hidden[~hidden.isnan()]
    columns = (missing.sum(1), result.log_evidence, result.ess, hidden)
    return ImputationSummary(
        **_describe_given(run, given, options),
        num_particles=options.num_particles,
        missing_pixels=int(missing.sum()),
        num_pixels=missing.numel(),
        complete_images=int((~incomplete).sum()),
        empty_images=int(missing.all(1).sum()),
        log_likelihood_observed=Estimate.mean_of(result.log_evidence, options.num_particles),
        log_likelihood_hidden=ImagesMean.mean_of(known) if len(known) else None,
        ess=Quantiles.compute(result.ess),
        few_particles=int((result.ess[incomplete] < FEW_PARTICLES).sum()),
        mask=None if options.mask is None else str(Path(options.mask).resolve()),
        hide=options.hide,
        num_draws=options.num_draws,
        per_image=tuple(
            ImputedImage(*row) for row in zip(given.names, *(column.tolist() for column in columns), strict=True)
        ),
    )


# --- New images ---


class Samples(NamedTuple):
    """Draws z ~ p(z), and for each the mean and a draw of p(x | z)."""

    z: Tensor  # (N, L)
    mean: Tensor  # (N, *E) E[x | z]
    images: Tensor  # (N, *E) x ~ p(x | z)


@serialize_threads()
@torch.no_grad()
def sample(vae: VAE, num_samples: int) -> Samples:
    """Draws z ~ p(z), x ~ p(x | z) by torch's global generator, in passes that fit into memory."""
    z = sample_latents(vae.prior(), num_samples)
    one = vae.likelihood(z[:1]).mean
    samples = Samples(z, *(one.new_empty((num_samples, *one.shape[1:])) for _ in range(2)))
    chunk = images_per_pass(one, vae.likelihood)
    for part, mean, images in zip(*(values.split(chunk) for values in samples), strict=True):
        decoded = vae.likelihood(part)
        mean.copy_(decoded.mean)
        images.copy_(decoded.sample())
    return samples


def sample_classes(vae: VAE, num_samples: int) -> tuple[Samples, Tensor | None]:
    """``sample``; from a model of labelled images as many of each class, in order, with their labels (N,)."""
    if not isinstance(vae, ConditionalVAE):
        return sample(vae, num_samples), None
    labels = (torch.arange(num_samples) * vae.num_classes) // num_samples
    counts = labels.bincount(minlength=vae.num_classes).tolist()
    parts = [sample(vae.fix_label(k), count) for k, count in enumerate(counts) if count]
    return Samples(*(torch.cat(values) for values in zip(*parts, strict=True))), labels


def sample_run(options: Sample, *, say: Say) -> Path:
    """Draws images from a run: samples.npz (``Samples``), samples.png, and images/0000.png and so on.

    The single pictures are of the means, in 8 bits: what the decoder is sure of, without the noise of single pixels
    that p(x | z) draws independently. The draws themselves are in samples.npz. Tables have no pictures. An export needs
    no data for it.
    """
    run = open_run_or_export(options.run_dir, dataset=options.dataset, data_dir=options.data_dir, say=say)
    device = find_device(options.device)
    vae = load_evaluated_vae(run).to(device)
    if is_autoencoder(run.options):
        say(f"No samples of a model: these are decoded draws of N(0, I), {NOT_TRAINED_ON_PRIOR}.")
    folder = make_output_folder(options.output, run.folder / "samples")
    with seeded(options.seed, device):
        drawn, labels = sample_classes(vae, options.num_samples)
        samples = Samples(*(values.cpu() for values in drawn))
    given = "" if labels is None else " | y"
    write_arrays(folder / "samples.npz", samples._asdict() | ({} if labels is None else {"labels": labels}))
    say(f"{options.num_samples:,} samples, z ~ p(z{given}), x ~ p(x | z), seed {options.seed}, in {folder}:")
    say("  samples.npz: z, mean E[x | z], and images x ~ p(x | z)" + ", and their labels y" * (labels is not None))
    if len(run.splits.event_shape) == 1:
        say("The data is a table, (N, D): there are no pictures.")
        return folder
    display = choose_display(run, None if len(run.splits.train) else samples.images)
    shown = Samples(*(values[:_MOST_DRAWN] for values in samples))
    figure = samples_figure(display, shown.mean, shown.images, autoencoder=is_autoencoder(run.options))
    if labels is not None:
        length = min(_MOST_IN_ROW, max(1, len(labels) // len(labels.unique())))  # all rows have as many
        by_class = {name: samples.mean[labels == k][:length] for k, name in enumerate(name_classes(run))}
        figure = samples_by_class(display, {name: means for name, means in by_class.items() if len(means)})
    write_figure(folder / "samples.png", figure)
    (folder / "images").mkdir(exist_ok=True)
    for old in (folder / "images").glob("[0-9]*.png"):
        old.unlink()
    for i, image in enumerate(display.levels(samples.mean)):
        write_picture(folder / "images" / f"{i:04d}.png", image)
    first = f" of the first {_MOST_DRAWN}" if options.num_samples > _MOST_DRAWN else ""
    what = f"means and images{first}" if labels is None else f"at most {_MOST_IN_ROW} means of each class in a row"
    say(f"  samples.png: {what}; images/: a picture of each mean")
    return folder
