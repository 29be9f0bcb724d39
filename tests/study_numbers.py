"""A study with invented numbers, and its pictures: what the report is made from, without any run."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from ppl_vae.evidence.estimate import Estimate
from ppl_vae.runs.options import SCALE_MAPS
from ppl_vae.study.plan import Planned, Size, autoencoder_name, dataset_word, plan, remedy_name, sweep_name
from ppl_vae.study.results import (
    BlurNumbers,
    BlurParts,
    BoundDifferences,
    DataNumbers,
    DensityQuality,
    Difference,
    PriorMatch,
    Quality,
    RunNumbers,
    ScaleGradient,
    StudyNumbers,
)

BETAS = (0.01, 0.3, 1.0, 5.0, 100.0)
SETTINGS = Size(
    epochs=10,
    collapse_epochs=4,
    stress_epochs=2,
    betas={"mnist": BETAS},
    seeds=(1,),
    close_betas=(0.3, 1.0),
    latent_dims=(2, 128),
    networks=("conv",),
    images=500,
    num_particles=200,
    codes=1000,
)
OPTIONS = ("network", "latent_dim", "beta", "posterior", "epochs", "seed", "scale_map")
PICTURES = {"reconstructions": (1, 10), "samples": (2, 10), "interpolations": (4, 10), "holes": (2, 6)}
PICTURES |= {f"{name}_samples": (2, 10) for name in ("normal", "mixture", "flow")}
QUALITY = Quality(Estimate(0.6, 0.01), Estimate(2.5, 0.05), Estimate(0.5, 0.02))


def invent_run(planned: Planned) -> RunNumbers:
    """Numbers that change along beta as those of a VAE do."""
    options = {name: getattr(planned.options, name) for name in OPTIONS}
    told = RunNumbers(
        name=planned.name,
        dataset=dataset_word(planned.options.dataset),
        options=options,
        averaged=planned.averaged,
        pictures={name: f"pictures/{planned.name}/{name}.png" for name in PICTURES},
    )
    if planned.name.endswith("stress-exp"):
        return RunNumbers(name=told.name, dataset=told.dataset, options=options, failed="step 12: the loss is NaN")
    autoencoder, beta = told.is_autoencoder, 784.0 if planned.averaged else options["beta"]
    rate = 60 / (1 + 3 * beta)
    active = 40 if autoencoder else round(40 * min(1.0, rate / 30))
    elbo = None if autoencoder else Estimate(-60 - 1.6 * (60 - rate) - rate - options["seed"] / 8, 0.25)
    return RunNumbers(
        **{name: getattr(told, name) for name in ("name", "dataset", "options", "averaged", "pictures")},
        step=1000,
        parameters=1_116_864,
        seconds=52.2 + len(planned.name),
        reconstruction=Estimate(-60 - 1.6 * (60 - rate), 0.25),
        kl=None if autoencoder else Estimate(rate, 0.25),
        elbo=elbo,
        log_likelihood=None if elbo is None else Estimate(elbo.mean + 4 + 0.05 * rate, 0.25),
        gap=None if autoencoder else Estimate(4 + 0.05 * rate, 0.05),
        reliable=beta != 0.01,
        active=active,
        implied_beta=None if autoencoder or beta > 5 else Estimate(beta * 1.01, beta * 0.01),
        variation=Estimate(0.75 * active / 40, 0.004),
        blur=BlurNumbers(
            Estimate(0.55, 0.01), Estimate(0.0125, 0.0001), Estimate(0.0025, 0.0001), Estimate(0.01, 0.0001)
        ),
        prior_match=PriorMatch(
            largest_mean=0.0625,
            largest_log_scale=0.125,
            largest_distance=0.046,
            rejected=38,
            classifier=Estimate(0.05 + 0.8 * (beta < 0.1), 0.02),
            holes=None if autoencoder else Estimate(0.015, 0.004),
            mutual_information=None if autoencoder else Estimate(min(6.2, rate), 0.01),
            marginal_kl=None if autoencoder else Estimate(max(0.0, rate - 6.2), 0.1),
            saturated=rate > 6.2,
        ),
        samples=QUALITY,
        densities={
            name: DensityQuality(QUALITY, 1000, Estimate(-37.5, 0.1), 30 if name == "mixture" else None)
            for name in ("normal", "mixture", "flow")
        }
        if planned.num_codes
        else {},
    )


def invent_differences(runs: dict[str, RunNumbers], reference: str) -> dict[str, BoundDifferences]:
    """Of runs with a density to one of them."""

    def subtract(a: Estimate, b: Estimate) -> Difference:
        mean = b.mean - a.mean
        return Difference(mean, 0.1, mean - 0.25, mean + 0.25, ranks_log_likelihood=True)

    found, a = {}, runs[reference]
    for name, b in runs.items():
        if name != reference and a.elbo and b.elbo and a.log_likelihood and b.log_likelihood:
            bounds = subtract(a.elbo, b.elbo), subtract(a.log_likelihood, b.log_likelihood)
            found[name] = BoundDifferences(reference, *bounds)
    return found


def study_numbers(datasets: tuple[str, ...] = ("mnist", "fashion-mnist")) -> StudyNumbers:
    """A study in which every part was measured."""
    runs = {each.name: invent_run(each) for each in plan(SETTINGS, datasets)}
    differences = {table: invent_differences(runs, sweep_name("mnist", 1.0)) for table in ("beta", "networks")}
    differences["collapse"] = invent_differences(runs, remedy_name("mnist", "residual", "none"))
    parts = {"posterior_noise": 0.0025, "autoencoder_error": 0.0075, "lost": 0.0025}
    blur = BlurParts(
        {name: Estimate(value, 0.0001) for name, value in parts.items()},
        {name: Estimate(value / 0.0125, 0.01) for name, value in parts.items()},
        QUALITY,
        {"error": Estimate(0.0186, 0.0001), "sharpness": Estimate(2.625, 0.02)},
        {"error": Estimate(0.0025, 0.0001), "sharpness": Estimate(0.125, 0.01)},
    )
    gradients = tuple(
        ScaleGradient(
            word, h, None if word == "exp" and h > 50 else Estimate(h, 0.1), float(h > 50), Estimate(h, 0.1), 0.0, 2 * h
        )
        for word in SCALE_MAPS
        for h in (1.0, 10.0, 100.0)
    )
    data = {
        word: DataNumbers(
            description="gray images of one thing each",
            num_pixels=784,
            train=50_000,
            validation=10_000,
            test=10_000,
            classes=tuple(map(str, range(10))),
            eigenvalues=tuple(40 / k for k in range(1, 101)),
            edge=1.25,
            floor=Estimate(-206.0, 0.25),
            originals=f"pictures/{word}/originals.png",
        )
        for word in datasets
    }
    return StudyNumbers(
        size="default",
        settings=SETTINGS,
        datasets=datasets,
        data=data,
        runs=runs,
        environment={"device": "a processor"},
        seconds={"training": 3000.0, "evaluation": 900.0, "measuring": 300.0},
        differences=differences,
        blur={word: blur for word in datasets if autoencoder_name(word) in runs},
        gradients=gradients,
    )


def write_pictures(study: StudyNumbers, folder: Path) -> None:
    """A small picture of noise at every path that the study names."""
    generator = np.random.default_rng(0)
    sizes = {each.originals: (1, 10) for each in study.data.values() if each.originals}
    sizes |= {path: PICTURES[name] for run in study.runs.values() for name, path in run.pictures.items()}
    for path, (rows, columns) in sizes.items():
        levels = generator.integers(0, 255, (28 * rows, 28 * columns), dtype=np.uint8)
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        Image.fromarray(levels).save(buffer, format="png")
        (folder / path).write_bytes(buffer.getvalue())
