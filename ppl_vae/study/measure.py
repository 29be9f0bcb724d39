"""What is measured of the study's runs: each alone, and all against each other on the same test images."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ppl_vae import runs
from ppl_vae.diagnostics.measurement import Measurements, measure, summarize_estimate
from ppl_vae.diagnostics.verdicts import is_reliable
from ppl_vae.evidence.estimate import PairedDifference, bound_difference, paired_difference
from ppl_vae.evidence.moments import decode_mean, encode, sample_posterior
from ppl_vae.labels import SemiSupervisedVAE
from ppl_vae.runs.load import load
from ppl_vae.runs.results import LabelledEvaluation, PerImage, from_json, read_evaluation, read_per_image, to_json
from ppl_vae.runtime.global_state import seeded
from ppl_vae.study import plan, results
from ppl_vae.study.data import NUM_SHOWN, PICTURES, StudyData, fit_densities, write_strip
from ppl_vae.study.plan import Planned, Size, sweep_name
from ppl_vae.study.results import BoundDifferences, Difference, LabelledNumbers, Quality, RunNumbers
from ppl_vae.vae import VAE

MEASUREMENT = "measurement.json"

_VERSION = 5  # to be raised when a diagnostic comes to another number: measurements of other versions are done again
_OPTIONS = "network latent_dim beta objective free_bits warmup_epochs epochs seed posterior learning_rate likelihood"
_NUM_SAMPLES_SHOWN = 20
_PRIOR_SEED = 20_140_501


# --- One run ---


@torch.no_grad()
def measure_run(planned: Planned, folder: Path, study_data: StudyData) -> RunNumbers:
    """A trained run's numbers: the stored ones if they are of these weights and images, otherwise measured now.

    Args:
        planned: The run.
        folder: The study's folder, which takes its pictures.
        study_data: Its data.
    """
    run_dir = folder / results.RUNS / planned.name
    evaluation = read_evaluation(run_dir)
    assert evaluation is not None  # the run is finished
    key = {"version": _VERSION, "images": study_data.num_images, "codes": planned.num_codes}
    key |= {name: getattr(evaluation, name) for name in ("step", "num_images", "num_particles", "seed")}
    path = run_dir / MEASUREMENT
    stored = runs.read_json(path) if path.exists() else {}
    if stored.get("key") == key:
        return from_json(RunNumbers, stored["run"])
    started = time.monotonic()
    vae, per_image = load(run_dir), read_per_image(run_dir, "test")  # None for an autoencoder
    quality = None if per_image is None else summarize_estimate(per_image.result, per_image.num_particles)
    diagnosis = measure(vae, study_data.x, gray=study_data.gray, importance=quality)
    images, samples, densities = _decode(vae, study_data, planned.num_codes)
    pictures = {name: f"{PICTURES}/{planned.name}/{name}.png" for name in images}
    for name, picture in pictures.items():
        write_strip(folder / picture, images[name][:_NUM_SAMPLES_SHOWN])
    found = RunNumbers(
        name=planned.name,
        dataset=study_data.word,
        options={name: getattr(planned.options, name) for name in _OPTIONS.split()},
        seconds=runs.read_metrics(run_dir)[-1].get("seconds"),
        seconds_evaluation=evaluation.seconds,
        seconds_measuring=time.monotonic() - started,
        **{name: getattr(evaluation, name) for name in ("reconstruction", "kl", "elbo", "log_likelihood")},
        reliable=None if quality is None else is_reliable(quality.rise, quality.unreliable),
        active=diagnosis.active.count,
        implied_beta=diagnosis.implied_beta,
        variation=diagnosis.pictures.variation,
        blur=diagnosis.pictures.blur,
        prior_match=_match_prior(diagnosis),
        samples=samples,
        densities=densities,
        pictures=pictures,
    )
    runs.write_json(path, {"key": key, "run": to_json(found)})
    return from_json(RunNumbers, runs.read_json(path)["run"])  # JSON has no NaN


def _decode(vae: VAE, study_data: StudyData, num_codes: int) -> tuple[dict[str, Tensor], Quality, dict[str, Quality]]:
    """Images to show by name, the quality of decoded prior draws, and that of each density of codes by its name."""
    device, count = study_data.x.device, study_data.num_images
    codes = encode(vae, study_data.x).mean[study_data.shown]
    with seeded(_PRIOR_SEED, device):  # the same draws for every run with such a prior
        samples = decode_mean(vae, vae.prior().expand((count,)).sample())
    images = {"reconstructions": vae.likelihood(codes).mean, "samples": samples}
    found = {}
    if num_codes:
        with seeded(0, device):
            train = sample_posterior(vae, study_data.load_images("train", num_codes))
            validation = sample_posterior(vae, study_data.load_images("validation"))
        for name, density in fit_densities(train, validation).items():
            with seeded(0, device):
                decoded = images[f"{name}_samples"] = decode_mean(vae, density.sample((count,)))
            found[name] = study_data.measure_quality(decoded)
    return images, study_data.measure_quality(samples), found


def _match_prior(diagnosis: Measurements) -> results.PriorMatch:
    """The aggregate posterior against the prior."""
    aggregate, split = diagnosis.aggregate, diagnosis.elbo_split
    return results.PriorMatch(
        largest_distance=float(aggregate.kolmogorov_smirnov.statistic.max()),
        classifier=aggregate.classifier.effect,
        holes=None if aggregate.holes is None else aggregate.holes.share,
        mutual_information=None if split is None else split.mutual_information,
        marginal_kl=None if split is None else split.marginal_kl,
        saturated=None if split is None else split.saturated,
    )


def measure_labelled(planned: Planned, folder: Path) -> LabelledNumbers:
    """A trained semi-supervised run's numbers, and a picture of its samples in the study's folder."""
    place, name = folder / results.RUNS, planned.name
    vae, evaluation = load(place / name), read_evaluation(place / name)
    assert isinstance(vae, SemiSupervisedVAE)
    assert isinstance(evaluation, LabelledEvaluation)
    assert evaluation.classifier_accuracy is not None
    assert evaluation.log_likelihood is not None
    with seeded(_PRIOR_SEED, torch.device("cpu")), torch.no_grad():
        z = vae.fix_label(0).prior().expand((NUM_SHOWN,)).sample()  # the same codes for each class
        samples = torch.cat([decode_mean(vae.fix_label(y), z) for y in range(vae.num_classes)])
    picture = f"{PICTURES}/{name}/samples.png"
    write_strip(folder / picture, samples)
    return LabelledNumbers(
        labels=planned.options.labels or 0,
        log_likelihood=evaluation.log_likelihood,
        classifier=evaluation.classifier_accuracy,
        density=evaluation.accuracy,
        seconds=runs.read_metrics(place / name)[-1]["seconds"],
        seconds_evaluation=evaluation.seconds,
        picture=picture,
    )


# --- Runs against each other ---


def compare_bounds(
    place: Path, size: Size, words: Sequence[str], labelled: Sequence[str]
) -> dict[str, dict[str, BoundDifferences]]:
    """The differences of each table to its reference, by table. ``labelled``: the names of semi-supervised runs."""
    beta: dict[str, BoundDifferences] = {}
    for word in words:
        betas = [sweep_name(word, each) for each in size.betas_of(word)]
        beta |= compare_with_reference(place, betas, sweep_name(word))
    remedies = list(plan.remedy_names(words[0]).values())
    latents = compare_with_reference(place, plan.varied_names(size, words[0]), sweep_name(words[0]))
    classes = compare_with_reference(place, [sweep_name(words[0]), *labelled], sweep_name(words[0]))
    collapse = compare_with_reference(place, remedies, remedies[0])
    return {"beta": beta, "collapse": collapse, "latents": latents, "labels": classes}


def compare_with_reference(folder: Path, names: Sequence[str], reference: str) -> dict[str, BoundDifferences]:
    """ELBO and L_S of each run minus those of a reference, on the same test images; 95% for all of them together.

    Args:
        folder: The folder of all runs.
        names: The runs of one table.
        reference: One of them.

    Returns:
        By run, without the reference.

    Raises:
        ValueError: Evaluations of other images, or with another S or seed, so that not only the weights differ.
    """
    evaluated = {name: _read(folder / name) for name in names}
    a, found = evaluated.pop(reference), {}
    for name, b in evaluated.items():
        for what in ("index", "num_particles", "seed"):  # another S is another bound
            if not torch.equal(*(torch.as_tensor(getattr(each, what)) for each in (a, b))):
                raise ValueError(f"{folder / name}: expected an evaluation with the {what} of {reference}, got another")
        bounds = bound_difference(a.result, b.result, comparisons=len(evaluated))
        elbo = paired_difference(a.result.elbo, b.result.elbo, comparisons=len(evaluated))
        log_likelihood = _difference(bounds.bounds, bounds.ranks_log_evidence)
        found[name] = BoundDifferences(reference, _difference(elbo), log_likelihood)
    return found


def _read(folder: Path) -> PerImage:
    """The numbers of each test image."""
    found = read_per_image(folder, "test")
    assert found is not None  # the run is finished, and has a density
    return found


def _difference(found: PairedDifference, ranks: bool | None = None) -> Difference:
    return Difference(found.mean, found.stderr, found.lower, found.upper, ranks)
