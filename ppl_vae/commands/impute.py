"""Images with missing pixels under a trained run: log p of the observed pixels, and draws of the missing ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ppl_vae import runs
from ppl_vae.commands.options import Impute
from ppl_vae.evidence.estimate import Estimate, ImagesMean
from ppl_vae.evidence.evaluation import evaluate
from ppl_vae.evidence.missing import Imputation, Observed, impute
from ppl_vae.reports.display import Display, choose_display
from ppl_vae.reports.figures.images import image_rows
from ppl_vae.reports.text.evaluation import FEW_PARTICLES, describe_imputation
from ppl_vae.runs.command_results import ImputationSummary, ImputedImage
from ppl_vae.runs.open import Images, Run, Say, check_density, load_evaluated_vae, load_given_images, open_run
from ppl_vae.runs.outputs import make_output_folder, write_arrays, write_figure
from ppl_vae.runs.resolve import find_device
from ppl_vae.runs.results import Quantiles, to_json
from ppl_vae.runtime.global_state import seeded
from ppl_vae.runtime.process import progress_bar
from ppl_vae.vae import VAE

_NUM_SHOWN, _DRAWS_SHOWN = 10, 3
_MISSING_COLOR = (0.36, 0.55, 0.80)


def impute_images(options: Impute, *, say: Say) -> Path:
    """Estimates log p(x_observed) of images, draws x_missing ~ p(x_missing | x_observed), and returns the folder.

    Writes imputed.npz, imputations.json and imputations.png. imputed.npz holds ``draws`` (M, n, *E), ``mean`` (n, *E),
    ``mask`` (n, *E) (1 = observed), ``log_likelihood_observed`` and ``ess`` (n,), and ``names``. If pixels were hidden
    from images that are otherwise complete, it also holds ``log_likelihood_hidden``, log p(x_hidden | x_observed) =
    log p(x) - log p(x_observed), with NaN for the other images.

    Raises:
        ValueError: no run, a damaged one, an autoencoder, other data than it was trained on, images or a mask that do
            not fit it, or an output folder that holds something.
    """
    run = open_run(options.run_dir, dataset=options.dataset, data_dir=options.data_dir)
    check_density(run, "p(x_missing | x_observed) to draw from")
    place, S = find_device(options.device), options.num_particles
    vae = load_evaluated_vae(run).to(place)
    given = load_given_images(run, options.images_path, most=options.images, seed=options.seed)
    x = torch.where(_find_observed(given, options), given.x, torch.nan)
    folder = make_output_folder(options.output, run.folder / "imputations")
    title = f"imputing {Path(given.source).name}"
    with seeded(options.seed, place), progress_bar(total=len(x), unit="image", desc=title) as bar:
        found = impute(Observed(vae), x.to(place), num_particles=S, num_draws=options.num_draws, progress=bar.update)
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
    summary = _summarize(run, given, x, result, hidden, options)
    picture, is_table = folder / "imputations.png", len(run.splits.event_shape) == 1
    (folder / "imputations.json").unlink(missing_ok=True)  # the last that is written: it never describes other arrays
    write_arrays(folder / "imputed.npz", arrays, given.names)
    if is_table:
        picture.unlink(missing_ok=True)
    else:
        write_figure(picture, draw_imputations(choose_display(run), x, given.x, result))
    runs.write_json(folder / "imputations.json", to_json(summary))
    for line in (*given.notes, *describe_imputation(summary)):
        say(line)
    say(f"In {folder}: imputed.npz (draws, means, mask), imputations.json{', imputations.png' * (not is_table)}")
    return folder


# --- What is missing ---


def read_mask(path: str, num_images: int, event_shape: tuple[int, ...]) -> Tensor:
    """Reads a mask file as (N, *E), True where a pixel is observed; or (1, *E) for all images.

    An .npy file of zeros and ones: (*E), (H, W), (N, *E), (N, H, W) or (N, H, W, C); a shape that is both an image's
    and that of N images without a channel is read as an image's.

    Raises:
        ValueError: no such file, another shape, or other values.
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
    """A mask (1, *E) that is False in one half of the image, the smaller one for an odd size.

    Raises:
        ValueError: a table, which has no sides.
    """
    if len(event_shape) != 3:
        raise ValueError(f"--hide: expected images (C, H, W), got a table of shape {event_shape}; --mask hides in one")
    observed = torch.ones(1, *event_shape, dtype=torch.bool)
    dim = 2 if side in ("top", "bottom") else 3
    size = observed.shape[dim]
    start = 0 if side in ("top", "left") else size - size // 2
    observed.narrow(dim, start, size // 2).fill_(False)
    return observed


def _find_observed(found: Images, options: Impute) -> Tensor:
    """(n, *E), False where the mask hides a pixel. A mask belongs to all images that were found."""
    if options.mask is not None and options.hide is not None:
        raise ValueError("--hide: expected one of --mask and --hide, got both")
    event_shape = tuple(found.x.shape[1:])
    observed = torch.ones(1, *event_shape, dtype=torch.bool)
    if options.mask is not None:
        observed = read_mask(options.mask, found.num_found, event_shape)
    elif options.hide is not None:
        observed = hide_half(options.hide, event_shape)
    return observed.expand(found.num_found, *event_shape)[found.places]


# --- Numbers ---


def _estimate_hidden(vae: VAE, x: Tensor, truth: Tensor, result: Imputation, options: Impute) -> Tensor:
    """log p(x_hidden | x_observed) = log p(x) - log p(x_observed) of each image, (n,) nats.

    NaN for an image without a hidden pixel, and for one with pixels that nobody knows.

    Both terms are bounds with S particles; their difference is an estimate and no bound.
    """
    hidden = x.isnan().flatten(1).any(1) & ~truth.isnan().flatten(1).any(1)
    log_p = torch.full((len(hidden),), torch.nan, dtype=torch.double)
    if hidden.any():
        whole = truth[hidden].to(find_device(options.device))
        found = evaluate(vae, whole, num_particles=options.num_particles, seed=options.seed).log_evidence
        log_p[hidden] = found.cpu() - result.log_evidence[hidden]
    return log_p


def _summarize(
    run: Run, given: Images, x: Tensor, result: Imputation, hidden: Tensor, options: Impute
) -> ImputationSummary:
    missing = x.isnan().flatten(1)
    incomplete, known = missing.any(1), hidden[~hidden.isnan()]
    columns = (missing.sum(1), result.log_evidence, result.ess, hidden)
    return ImputationSummary(
        **vars(run.provenance),
        images=given.source,
        num_images=len(x),
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
        seed=options.seed,
        step=runs.load_step(run.folder / runs.MODEL),
        notes=given.notes,
        per_image=tuple(
            ImputedImage(*row) for row in zip(given.names, *(column.tolist() for column in columns), strict=True)
        ),
    )


# --- The figure ---


def draw_imputations(display: Display, x: Tensor, truth: Tensor, result: Imputation) -> Figure:
    """Draws the first images with missing pixels: observed pixels, mean, three draws and, if known, the truth.

    Args:
        display: from pixels to gray and color.
        x: (n, C, H, W), NaN where missing: drawn blue.
        truth: (n, C, H, W), NaN where nobody knows.
        result: of ``impute`` for x.
    """
    incomplete = x.isnan().flatten(1).any(1)
    first = (incomplete if incomplete.any() else ~incomplete).nonzero()[:_NUM_SHOWN, 0]
    rows = {"observed": _color_missing(display, x[first]), "mean of\nthe missing": display(result.mean[first])}
    for m in range(min(_DRAWS_SHOWN, len(result.draws))):
        rows[f"draw {m + 1}"] = display(result.draws[m, first])
    if (x.isnan() & ~truth.isnan()).any():
        rows["truth"] = _color_missing(display, truth[first])
    ess = [f"ESS {value:.0f}" for value in result.ess[first].tolist()]
    title = "x_missing ~ p(x_missing | x_observed); missing pixels are blue; ESS: effective particles"
    return image_rows(rows, title=title + display.words, columns=ess)


def _color_missing(display: Display, x: Tensor) -> np.ndarray:
    """Images (n, C, H, W) as colors (n, 3, H, W) in [0, 1], with missing pixels in blue."""
    holes = x.isnan().any(1, keepdim=True).numpy()
    shown = np.broadcast_to(display(x.nan_to_num(0.0)), (len(x), 3, *x.shape[2:]))
    return np.where(holes, np.reshape(_MISSING_COLOR, (1, 3, 1, 1)), shown)
