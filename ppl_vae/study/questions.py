"""The study's questions: for each its figures, its table, and the fixed paragraph that says how to read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import numpy as np

from ppl_vae.parts.registry import SCALE_MAPS
from ppl_vae.reports.page import Block, Section, Slider, SliderStop, Text
from ppl_vae.reports.text import pages as text
from ppl_vae.study import plan
from ppl_vae.study.figures import (
    Cell,
    PageSource,
    format_cell,
    format_mean,
    format_share,
    make_table,
    stack_strips,
)
from ppl_vae.study.results import Quality, RunNumbers, StudyNumbers


def _make_section(title: str, anchor: str, paragraphs: str, *parts: Sequence[Block]) -> Section:
    return Section(title, [Text(paragraphs), *(block for part in parts for block in part)], anchor=anchor)


def explain_beta(source: PageSource) -> Section:
    """Why is the regularizer troublesome, and where does the likelihood peak along beta?"""
    study = source.study
    sweeps = {dataset: study.find_sweep(dataset) for dataset in study.datasets}
    columns = ["data", "beta", "rate", "distortion", "ELBO", "L_S", "ELBO - that of beta = 1"]
    table = make_table(
        [*columns, "L_S - that of beta = 1", "L_S - ELBO", "active", "implied beta"],
        [_list_bounds(study, run) for sweep in sweeps.values() for run in sweep],
        "Nats per image ± standard error over images. L_S is the importance-weighted bound on log p(x).",
    )
    return _make_section(
        "Why is the regularizer troublesome?",
        "beta",
        text.REGULARIZER,
        *(_make_slider(source, dataset, sweep) for dataset, sweep in sweeps.items()),
        source.show_figure(
            "rate-distortion",
            "Each point is a model, with its beta. The sum of both axes is minus the ELBO: all points of the dotted "
            "line have the best one.",
        ),
        source.show_figure(
            "bounds",
            "Differences of L_S and of the ELBO to beta = 1 on the same test images, with standard errors, near the "
            "best beta. Hollow marks are estimates that have not settled.",
        ),
        table,
        _tabulate_seeds(study),
    )


def _list_bounds(study: StudyNumbers, run: RunNumbers) -> list[Cell]:
    beta = f"{run.beta:g}" + (" *" if run.reliable is False else "")
    bounds = [run.kl, format_mean(run.reconstruction, scale=-1), run.elbo, run.log_likelihood]
    differences = study.find_differences("beta", run.name)
    return [run.dataset, beta, *bounds, *differences, run.gap, run.active, run.implied_beta]


def _tabulate_seeds(study: StudyNumbers) -> list[Block]:
    """Both bounds for several seeds of one beta."""
    rows: list[list[Cell]] = []
    dataset = study.datasets[0]
    for beta, (bound, word) in product(study.settings.close_betas, (("log_likelihood", "L_S"), ("elbo", "ELBO"))):
        found = study.find_runs(plan.sweep_name(dataset, beta, seed) for seed in (0, *study.settings.seeds))
        values = [getattr(run, bound).mean for run in found]
        if len(values) > 1:
            rows.append([beta, word, ", ".join(f"{value:.2f}" for value in values), float(np.std(values, ddof=1))])
    caption = f"{dataset}: the same bounds for several seeds, nats per image."
    return make_table(["beta", "bound", "by seed", "spread"], rows, caption)


def _make_slider(source: PageSource, dataset: str, sweep: Sequence[RunNumbers]) -> list[Block]:
    """Reconstructions and samples along beta."""
    stops = []
    for run in sweep:
        pictures = [(name, source.read_run_picture(run.name, name)) for name in ("reconstructions", "samples")]
        known = [(name, png) for name, png in pictures if png is not None]
        numbers: dict[str, Cell] = {
            "L_S, nats": run.log_likelihood,
            "rate, nats": run.kl,
            "distortion, nats": format_mean(run.reconstruction, scale=-1),
            "active latents": run.active,
        }
        words = {name: str(format_cell(value)) for name, value in numbers.items()}
        if len(known) == len(pictures):
            stops.append(SliderStop(f"{run.beta:g}", known, words))
    originals = source.read_originals(dataset)
    if not stops or originals is None:
        return []
    caption = (
        f"{dataset}. Move beta and compare both rows with the test images: where are reconstructions exact, where are "
        "samples of the prior like the data, and from where on are all pictures the same?"
    )
    start = [stop.label for stop in stops].index("1")
    return [Slider("beta", stops, caption, fixed=("test images", originals), start=start)]


def explain_check(source: PageSource) -> Section:
    """How do I check that the regularization worked?"""
    study = source.study
    found = [
        run
        for dataset in study.datasets
        for run in study.find_sweep(dataset) + study.find_runs([plan.name_run(dataset, "autoencoder")])
    ]
    columns = ["data", "beta", "active", "largest |mean|", "largest |log scale|", "largest KS", "rejected"]
    table = make_table(
        [*columns, "classifier", "holes", "mutual information", "KL to prior"],
        [_list_match(run) for run in found],
        "Means and scales in scales of the prior. Rejected: latents whose Kolmogorov-Smirnov test rejects at 5%, "
        "corrected for their number. The last two columns add up to the mean KL, nats.",
    )
    figure = source.show_figure(
        "aggregate",
        "Four measures of codes against the prior along beta; dashed: the autoencoder. The first three should be low, "
        "and the last should not be zero.",
    )
    return _make_section("How do I check that the regularization worked?", "check", text.CHECK, figure, table)


def _list_match(run: RunNumbers) -> list[Cell]:
    match = run.prior_match
    assert match is not None
    information = format_mean(match.mutual_information)
    return [
        run.dataset,
        "autoencoder" if run.is_autoencoder else run.beta,
        run.active,
        match.largest_mean,
        match.largest_log_scale,
        match.largest_distance,
        match.rejected,
        match.classifier,
        format_share(match.holes),
        f"{information} (cap)" if match.saturated else information,
        match.marginal_kl,
    ]


def explain_blur(source: PageSource) -> Section:
    """Why do VAEs blur, and autoencoders too?"""
    study = source.study
    pictures = [block for dataset in study.blur for block in _compare_pictures(source, dataset)]
    parts = make_table(
        ["data", "part of the error", "squared error", "share"],
        [
            [dataset, part.replace("_", " "), value, format_share(blur.shares[part])]
            for dataset, blur in study.blur.items()
            for part, value in blur.parts.items()
        ],
        "The squared error per pixel of one sampled reconstruction of the VAE in parts that add up: the noise of the "
        "posterior, the error of an autoencoder with as many latents, and what is lost beyond both.",
    )
    tables = [parts, _tabulate_error(study), _tabulate_samples(study)]
    return _make_section("Why do VAEs blur, and autoencoders too?", "blur", text.BLUR, pictures, *tables)


_COMPARED = {
    "reconstructions": "Reconstructions: look at edges and thin strokes.",
    "samples": "Samples: which of them could be data?",
    "normal_samples": "Samples of codes from a normal that was fitted to codes.",
    "mixture_samples": "The same, from a fitted mixture.",
    "flow_samples": "The same, from a fitted flow.",
    "interpolations": "Straight lines between two codes: look at the middle.",
}


def _compare_pictures(source: PageSource, dataset: str) -> list[Block]:
    """Pictures of the VAE above those of the autoencoder."""
    models = {"the VAE": plan.sweep_name(dataset, 1.0), "the autoencoder": plan.name_run(dataset, "autoencoder")}
    blocks: list[Block] = []
    for name, words in _COMPARED.items():
        named = [(model, source.read_run_picture(run, name)) for model, run in models.items()]
        if name == "reconstructions":
            named.insert(0, ("test images", source.read_originals(dataset)))
        blocks += stack_strips(named, f"{dataset}. {words}")
    return blocks


def _tabulate_error(study: StudyNumbers) -> list[Block]:
    """Reconstructions of the VAE and the autoencoder, by the number of latents."""
    rows: list[list[Cell]] = []
    for dataset, blur in study.blur.items():
        varied = [f"latents-{L}" for L in study.settings.latent_dims] + ["autoencoder-2", "autoencoder"]
        found = study.find_runs([plan.sweep_name(dataset, 1.0), *(plan.name_run(dataset, each) for each in varied)])
        for run in sorted(found, key=lambda run: (run.is_autoencoder, run.options["latent_dim"])):
            parts = run.blur
            assert parts is not None
            split = [None, None] if run.is_autoencoder else [parts.posterior_noise, parts.bias]
            cells = [run.options["latent_dim"], run.reconstruction, parts.sharpness, parts.error, *split]
            rows.append([dataset, "autoencoder" if run.is_autoencoder else "VAE", *cells])
        for model, latents, pair in (("neighbors", 2, blur.neighbors), ("the binary image", None, blur.binary)):
            if pair:
                rows.append([dataset, model, latents, None, pair["sharpness"], pair["error"], None, None])
    columns = ["data", "model", "latents", "reconstruction, nats", "power", "squared error", "posterior noise"]
    return make_table(
        [*columns, "the rest"],
        rows,
        "Reconstructions; squared errors are per pixel. The autoencoder's nats are log p(x | z(x)), never a "
        "log-likelihood. The error of neighbors is that of the autoencoder's reconstructions against them.",
    )


def _tabulate_samples(study: StudyNumbers) -> list[Block]:
    """Samples of the prior and of densities that were fitted to codes."""
    rows: list[list[Cell]] = []
    for dataset, blur in study.blur.items():
        for run in study.find_runs([plan.sweep_name(dataset, 1.0), plan.name_run(dataset, "autoencoder")]):
            model = "autoencoder" if run.is_autoencoder else "VAE"
            assert run.samples is not None
            rows.append([dataset, model, "prior", None, None, *_list_quality(run.samples)])
            for word, density in run.densities.items():
                source = f"fitted {word}" + (f" of {density.num_components}" if density.num_components else "")
                cells = [density.num_codes, density.log_density, *_list_quality(density.quality)]
                rows.append([dataset, model, source, *cells])
        rows.append([dataset, "other real images", None, None, None, *_list_quality(blur.floor)])
    return make_table(
        ["data", "model", "codes from", "fitted to", "log density", "power", "Fréchet", "classifier"],
        rows,
        "Decoded samples. Fitted to: training codes. Log density: of validation codes, nats; each model has its own "
        "codes. Classifier: 0 where samples cannot be told from real images, 1 where they always can.",
    )


def _list_quality(quality: Quality) -> list[Cell]:
    return [quality.sharpness, quality.frechet, quality.classifier]


def explain_averaging(source: PageSource) -> Section:
    """What does averaging over pixels do?"""
    study = source.study
    pictures: list[Block] = []
    rows: list[list[Cell]] = []
    for dataset in study.datasets:
        compared = {
            plan.sweep_name(dataset, 1.0): "the sum",
            plan.name_run(dataset, "mean-over-pixels"): "the mean",
            plan.name_run(dataset, "beta-of-mean"): "the sum with beta = D",
        }
        named = [("test images", source.read_originals(dataset))]
        named += [(words, source.read_run_picture(name, "reconstructions")) for name, words in compared.items()]
        pictures += stack_strips(named, f"{dataset}: reconstructions after the same training of the same network.")
        names = dict.fromkeys([*compared, *(run.name for run in study.find_sweep(dataset))])
        rows += [_list_condition(study, run) for run in study.find_runs(names)]
    spectrum = source.show_figure(
        "spectrum",
        "Eigenvalues of the training images' covariance, in units of the likelihood's noise, with the thresholds of a "
        "sum and of a mean. A direction above a threshold is kept.",
    )
    active = source.show_figure(
        "active",
        "Active latents along beta, measured and predicted; the cross is the mean over pixels, at the beta that it "
        "amounts to.",
    )
    columns = ["data", "pixels", "beta", "threshold", "directions above", "active", "variation", "KL"]
    table = make_table(
        [*columns, "reconstruction", "as predicted"],
        rows,
        "Nats per image. Variation: how much reconstructions differ between images, relative to the images themselves; "
        "at zero they are all one picture.",
    )
    title = "What does averaging over pixels do?"
    return _make_section(title, "averaging", text.AVERAGING, spectrum, active, pictures, table)


def _list_condition(study: StudyNumbers, run: RunNumbers) -> list[Cell]:
    directions, threshold = study.count_directions(run), study.threshold(run)
    agrees = "yes" if (directions == 0) == (run.active == 0) else "no"
    condition = [run.dataset, "mean" if run.averaged else "sum", run.beta, threshold, directions]
    return [*condition, run.active, format_share(run.variation), run.kl, run.reconstruction, agrees]


def explain_collapse(source: PageSource) -> Section:
    """What helps against posterior collapse?"""
    study = source.study
    rows: list[list[Cell]] = []
    for network, remedy in product(plan.REMEDIED_NETWORKS, plan.REMEDIES):
        for run in study.find_runs([plan.remedy_name(study.datasets[0], network, remedy)]):
            _, gain = study.find_differences("collapse", run.name)
            rows.append([network, remedy, run.active, run.kl, run.elbo, run.log_likelihood, gain])
    columns = ["network", "remedy", "active", "KL", "ELBO", "L_S", "L_S - that of none"]
    table = make_table(columns, rows, "Nats per image; differences are paired.")
    return _make_section("What helps against collapse?", "collapse", text.COLLAPSE, table)


def explain_networks(source: PageSource) -> Section:
    """Which network, and how many latents?"""
    study = source.study
    dataset, settings = study.datasets[0], study.settings
    varied = [f"latents-{L}" for L in settings.latent_dims] + [f"network-{network}" for network in settings.networks]
    rows: list[list[Cell]] = []
    for run in study.find_runs([plan.sweep_name(dataset, 1.0), *(plan.name_run(dataset, each) for each in varied)]):
        _, gain = study.find_differences("networks", run.name)
        size = [run.options["network"], run.options["latent_dim"], run.active, run.parameters]
        rows.append([*size, run.seconds, run.elbo, run.log_likelihood, gain])
    columns = ["network", "latents", "active", "weights", "seconds", "ELBO", "L_S", "L_S - that of the base"]
    table = make_table(columns, rows, "Nats per image; the first row is the base.")
    return _make_section("Which network, and how many latents?", "networks", text.NETWORKS, table)


def explain_scale_maps(source: PageSource) -> Section:
    """Does it matter how the guide's scales are kept positive?"""
    study = source.study
    stressed: list[list[Cell]] = []
    for scale_map in SCALE_MAPS:
        run = study.runs[plan.name_run(study.datasets[0], f"stress-{scale_map}")]
        ended = "yes" if run.failed is None else "no"
        stressed.append([scale_map, ended, run.step, run.elbo, run.failed])
    table = make_table(["map", "finished", "last step", "ELBO", "message"], stressed, "Training under stress.")
    return _make_section("Does the scale map matter?", "scale-maps", text.SCALE_MAPS, table)


def explain_method(source: PageSource) -> Section:
    """How was it measured?"""
    study, settings = source.study, source.study.settings
    minutes = {name: study.seconds.get(name, 0.0) / 60 for name in ("training", "evaluation", "measuring")}
    method = text.METHOD.format(
        epochs=settings.epochs, num_particles=settings.num_particles, images=settings.images, **minutes
    )
    rows: list[list[Cell]] = [
        [word, each.description, each.train, each.validation, each.test, each.floor]
        for word, each in study.data.items()
    ]
    caption = "Floor: the log-likelihood of each pixel on its own, without latents, on the same test images, in nats."
    table = make_table(["data", "what it is", "train", "validation", "test", "floor"], rows, caption)
    return _make_section("How was it measured?", "method", method, table)


QUESTIONS: tuple[Callable[[PageSource], Section], ...] = (
    explain_beta,
    explain_check,
    explain_blur,
    explain_averaging,
    explain_collapse,
    explain_networks,
    explain_scale_maps,
    explain_method,
)
