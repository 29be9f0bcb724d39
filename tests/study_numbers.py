"""A small study.json with invented numbers, and its pictures: what the report is made from, without any run."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

BETAS = (0.01, 0.3, 1.0, 5.0, 100.0)
EDGE = 1.25  # the largest eigenvalue of sampling noise


def value(mean: float, stderr: float = 0.25) -> dict[str, float]:
    return {"mean": mean, "stderr": stderr}


def paired(mean: float, stderr: float = 0.1, *, likelihood: bool = False) -> dict[str, Any]:
    lower, upper = mean - 2.5 * stderr, mean + 2.5 * stderr
    word = "better" if lower > 0 else "worse" if upper < 0 else "not distinguishable"
    of_likelihood = (
        {"rise": 0.5, "ranks_log_likelihood": True} if likelihood else {"rise": None, "ranks_log_likelihood": None}
    )
    return {"mean": mean, "stderr": stderr, "lower": lower, "upper": upper, "word": word, "n": 500, **of_likelihood}


def _rate(beta: float) -> float:
    return 60 / (1 + 3 * beta)


def _active(beta: float) -> int:
    return round(40 * min(1.0, _rate(beta) / 30))


def _run(dataset: str, name: str, beta: float, **options: Any) -> dict[str, Any]:
    autoencoder = options.get("posterior") == "delta"
    known = {"latent_dim": 40, "network": "gated", "warmup_epochs": 3, "likelihood": "bernoulli", "epochs": 10}
    pictures = ("reconstructions", "samples", "interpolations", "fitted_samples", "holes")
    return {
        "name": name,
        "dataset": dataset,
        "averaged": False,
        "autoencoder": autoencoder,
        "failed": None,
        "options": known | {"beta": beta, "posterior": "diagonal"} | options,
        "parameters": 1_116_864,
        "seconds": 52.2,
        "pictures": {word: f"pictures/{name}/{word}.png" for word in pictures},
    }


def _sweep_row(dataset: str, beta: float) -> dict[str, Any]:
    rate, distortion = _rate(beta), 60 + 1.6 * (60 - _rate(beta))
    elbo = -(rate + distortion)
    log_likelihood = elbo + 4 + 0.05 * rate
    one = -(_rate(1.0) + 60 + 1.6 * (60 - _rate(1.0)))
    shift = 1.5 * (beta == 0.3) - 12 * (beta == 0.01)
    is_reference = beta == 1.0
    return {
        "beta": beta,
        "run": f"{dataset}-beta-{beta:g}",
        "rate": value(rate),
        "distortion": value(distortion),
        "elbo": value(elbo),
        "log_likelihood": value(log_likelihood),
        "gap": value(4 + 0.05 * rate, 0.05),
        "active": _active(beta),
        "implied_beta": None if beta > 5 else value(beta * 1.01, beta * 0.01),
        "variation": value(0.75 * _active(beta) / 40, 0.004),
        "rise": 0.6,
        "unreliable": value(0.1, 0.01),
        "pareto_k": 1.0,
        "reliable": beta != 0.01,
        "difference_log_likelihood": None if is_reference else paired(0.02 * (elbo - one) + shift, likelihood=True),
        "difference_elbo": None if is_reference else paired(-abs(elbo - one) - 0.5),
    }


def _peak(dataset: str, beta: float, alike: list[float], *, ranks: bool | None) -> dict[str, Any]:
    return {
        "beta": beta,
        "run": f"{dataset}-beta-{beta:g}",
        "value": value(-86.25),
        "not_distinguishable": alike,
        "unranked": [],
        "ranks_log_likelihood": ranks,
        "is_reference": beta == 1.0,
        "difference_to_reference": None if beta == 1.0 else paired(1.25, likelihood=True),
        "reliable": True,
    }


def _sweep(dataset: str) -> dict[str, Any]:
    return {
        "reference": f"{dataset}-beta-1",
        "rows": [_sweep_row(dataset, beta) for beta in BETAS],
        "peaks": {
            "log_likelihood": _peak(dataset, 0.3, [0.3], ranks=True),
            "elbo": _peak(dataset, 1.0, [1.0], ranks=None),
        },
        "same_peak": False,
        "peaks_distinguishable": True,
        "peaks_ranked": True,
        "unreliable_betas": [0.01],
        "seeds": [
            {
                "beta": beta,
                "seeds": [0, 1],
                "log_likelihood": {"values": [at, at - 0.125], "mean": at - 0.0625, "spread": 0.0884},
                "elbo": {"values": [at - 4, at - 4.25], "mean": at - 4.125, "spread": 0.177},
                "active": {"values": [30, 31]},
            }
            for beta, at in ((0.3, -86.25), (1.0, -87.5))
        ],
        "seed_peaks": {"log_likelihood": [0.3, 0.3], "elbo": [1.0, 0.3]},
    }


def _condition(dataset: str, word: str, run: str, beta: float, threshold: float, active: int) -> dict[str, Any]:
    predicted = sum(40 / k > max(threshold, EDGE) for k in range(1, 101))
    return {
        "condition": word,
        "run": run,
        "beta": beta,
        "reduction": "mean" if word == "mean" else "sum",
        "threshold": threshold,
        "predicted_live": predicted,
        "predicted": min(40, predicted),
        "latent_dim": 40,
        "active": active,
        "variation": value(0.75 * active / 40, 0.004),
        "kl": value(0.6 * active, 0.05),
        "reconstruction": value(-206.5 + 3 * active),
        "elbo": value(-206.5 + 2.4 * active),
        "predicted_collapse": predicted == 0,
        "shown_collapse": active == 0,
        "as_predicted": (predicted == 0) == (active == 0),
    }


def _mean(dataset: str) -> dict[str, Any]:
    conditions = [
        _condition(dataset, "sum", f"{dataset}-beta-1", 1.0, 1.0, 30),
        _condition(dataset, "mean", f"{dataset}-mean-over-pixels", 1.0, 784.0, 0),
        _condition(dataset, "beta-of-mean", f"{dataset}-beta-of-mean", 784.0, 784.0, 0),
        *(
            _condition(dataset, "beta", f"{dataset}-beta-{beta:g}", beta, beta, _active(beta))
            for beta in BETAS
            if beta != 1
        ),
    ]
    return {
        "num_pixels": 784,
        "likelihood": "bernoulli",
        "eigenvalues": [40 / k for k in range(1, 101)],
        "num_eigenvalues": 717,
        "edge": EDGE,
        "num_images": 50_000,
        "gaussian_variance": {"sum": 0.066, "mean": 51.7, "mean_squared_error": 392.0}
        | {"largest_eigenvalue": 5.1, "largest_eigenvalue_as_seen": 6.1},
        "conditions": conditions,
        "collapse_as_predicted": True,
        "mean_equals_beta_of_mean": {"kl": paired(0.0, 0.001), "reconstruction": paired(0.01, 0.02)},
    }


def _remedy(network: str, remedy: str, active: int, gain: float | None) -> dict[str, Any]:
    return {
        "remedy": remedy,
        "run": f"mnist-{network}-remedy-{remedy}",
        "active": active,
        "latent_dim": 40,
        "kl": value(0.7 * active),
        "elbo": value(-200.0 + 2.5 * active),
        "log_likelihood": value(-198.0 + 2.5 * active),
        "reliable": True,
        "collapsed": active == 0,
        "warmup_epochs": 3,
        "free_bits": 0.25 if remedy in ("free-bits", "both") else None,
        "failed": None,
        "difference_log_likelihood": None if gain is None else paired(gain, likelihood=True),
        "difference_elbo": None if gain is None else paired(gain),
    }


def _collapse() -> dict[str, Any]:
    gated = [_remedy("gated", word, active, gain) for word, active, gain in (("none", 25, None), ("warm-up", 30, 1.5))]
    rows = (("none", 0, None), ("warm-up", 28, 101.5), ("free-bits", 40, 99.0), ("both", 40, 100.0))
    residual = [_remedy("residual", *row) for row in rows]
    return {
        "dataset": "mnist",
        "networks": {"gated": {"epochs": 10, "rows": gated}, "residual": {"epochs": 4, "rows": residual}},
    }


def _quality(frechet: float) -> dict[str, Any]:
    return {"sharpness": value(0.6, 0.01), "frechet": value(frechet, 0.05), "classifier": value(0.5, 0.02)}


def _autoencoder(dataset: str) -> dict[str, Any]:
    vae = {
        "run": f"{dataset}-beta-1",
        "reconstruction": value(-62.5),
        "squared_error": value(0.0125, 0.0001),
        "sharpness": value(0.55, 0.01),
        "variation": value(0.75, 0.01),
        "samples": _quality(2.5),
        "fitted_samples": _quality(2.25),
        "blur": None,
    }
    plain = vae | {
        "run": f"{dataset}-autoencoder",
        "reconstruction": value(-50.5),
        "sharpness": value(0.75, 0.01),
        "samples": _quality(20.0),
        "fitted_samples": _quality(5.0),
    }
    return {
        "vae": vae,
        "autoencoder": plain,
        "sharper": value(1.36, 0.02),
        "reconstruction_difference": paired(12.0),
        "samples_worse": {
            "frechet": value(8.0, 0.3),
            "frechet_uncorrected": value(5.0, 0.2),
            "classifier": value(0.375, 0.02),
        },
        "binarized": {"error": value(0.0186, 0.0001), "sharpness": value(2.625, 0.02)},
        "floor": {"frechet": value(0.25, 0.02), "sharpness": value(1.0, 0.02), "classifier": value(0.01, 0.02)},
        "num_samples": 500,
        "num_components": 50,
        "latents": [
            {"posterior": "delta", "latent_dim": L, "run": "x", "sharpness": value(s, 0.01), "error": value(0.02)}
            for L, s in ((2, 0.25), (40, 0.75))
        ],
        "decomposition": {
            "error": value(0.0125, 0.0001),
            "posterior_noise": value(0.0025, 0.0001),
            "bias": value(0.01, 0.0001),
            "autoencoder_error": value(0.0075, 0.0001),
            "lost": value(0.0025, 0.0001),
            "shares": {
                "posterior_noise": value(0.2, 0.01),
                "autoencoder_error": value(0.6, 0.01),
                "lost": value(0.2, 0.01),
            },
        },
    }


def _regularization(dataset: str) -> dict[str, Any]:
    def row(beta: float, *, autoencoder: bool = False) -> dict[str, Any]:
        active = 40 if autoencoder else _active(beta)
        effect = 0.9 if autoencoder else 0.05 + 0.8 * (beta < 0.1)
        return {
            "beta": beta,
            "autoencoder": autoencoder,
            "run": f"{dataset}-autoencoder" if autoencoder else f"{dataset}-beta-{beta:g}",
            "active": active,
            "moments": {"mean": {"max": 0.0625, "median": 0.01}, "log_scale": {"max": 0.125, "median": 0.02}},
            "kolmogorov_smirnov": {"max": 0.046, "median": 0.02, "rejected": 38, "latent_dim": 40} | {"level": 0.00125},
            "classifier": {"effect": value(effect, 0.02), "p_value": 0.0},
            "holes": None if autoencoder else value(0.015, 0.004),
            "expected_holes": 0.01,
            "mutual_information": None if autoencoder else value(min(6.2, _rate(beta)), 0.01),
            "marginal_kl": None if autoencoder else value(max(0.0, _rate(beta) - 6.2), 0.1),
            "total_correlation": None if autoencoder else value(1.5, 0.1),
            "kl": None if autoencoder else value(_rate(beta), 0.1),
            "cap": 6.2146,
            "saturated": not autoencoder and _rate(beta) > 6.2,
        }

    return {"rows": [*(row(beta) for beta in BETAS), row(0.0, autoencoder=True)], "images": 500}


def _architectures() -> dict[str, Any]:
    def row(network: str, L: int, varied: str, parameters: int, seconds: float, gain: float | None) -> dict[str, Any]:
        return {
            "run": f"mnist-{network}-{L}",
            "network": network,
            "latent_dim": L,
            "varied": varied,
            "parameters": parameters,
            "seconds": seconds,
            "epochs": 10,
            "elbo": value(-92.0 + (gain or 0)),
            "log_likelihood": value(-87.5 + (gain or 0)),
            "kl": value(25.0),
            "active": min(L, 30),
            "reliable": True,
            "difference_log_likelihood": None if gain is None else paired(gain, likelihood=True),
            "difference_elbo": None if gain is None else paired(gain),
        }

    rows = [
        row("gated", 40, "base", 1_116_864, 52.5, None),
        row("gated", 2, "latents", 1_070_000, 50.5, -45.0),
        row("gated", 128, "latents", 1_190_000, 55.5, -0.05),
        row("conv", 40, "network", 870_000, 230.0, 2.5),
    ]
    return {"dataset": "mnist", "reference": "mnist-beta-1", "rows": rows}


def _scale_maps() -> dict[str, Any]:
    gradients = [
        {
            "scale_map": word,
            "largest_feature": h,
            "gradient_norm": None if word == "exp" and h > 50 else value(h**power, 0.1),
            "not_finite": 1.0 if word == "exp" and h > 50 else 0.0,
            "kl_overflow": 0.0,
            "largest_scale": 2.0 * h,
            "vanished": 0.125 if word == "bounded" and h > 50 else 0.0,
            "sampled": {
                "gradient_norm": h**power,
                "not_finite": 0.5 if word == "exp" and h > 50 else 0.0,
                "kl_overflow": 0.0,
                "vanished": 0.0,
            },
        }
        for word, power in (("bounded", 0.5), ("exp", 3), ("softplus", 1))
        for h in (1.0, 10.0, 100.0)
    ]
    stressed = [
        {
            "scale_map": word,
            "run": f"mnist-stress-{word}",
            "finished": word != "exp",
            "failure_phase": "training" if word == "exp" else None,
            "failure": "step 12: the loss is NaN" if word == "exp" else None,
            "step": 12 if word == "exp" else None,
            "num_steps": 1000,
            "elbo": None if word == "exp" else value(-110.5),
            "learning_rate": 0.03,
        }
        for word in ("bounded", "exp", "softplus")
    ]
    return {"dataset": "mnist", "gradients": gradients, "stressed": stressed}


def study_numbers(datasets: tuple[str, ...] = ("mnist", "fashion-mnist")) -> dict[str, Any]:
    """study.json with every section."""
    runs = {}
    for dataset in datasets:
        made = [_run(dataset, f"{dataset}-beta-{beta:g}", beta) for beta in BETAS]
        made += [_run(dataset, f"{dataset}-mean-over-pixels", 1.0), _run(dataset, f"{dataset}-beta-of-mean", 784.0)]
        made.append(_run(dataset, f"{dataset}-autoencoder", 0.0, posterior="delta"))
        runs |= {run["name"]: run for run in made}
    of_data = {
        "image_shape": [1, 28, 28],
        "num_pixels": 784,
        "train": 50_000,
        "validation": 10_000,
        "test": 10_000,
        "description": "gray images of one thing each",
        "floor": value(-206.0),
        "classes": [str(k) for k in range(10)],
    }
    settings = {"epochs": 10, "collapse_epochs": 4, "stress_epochs": 2, "seeds": [1], "close_betas": [0.3, 1.0]}
    return {
        "version": 2,
        "size": "default",
        "settings": settings | {"images": 500, "num_particles": 200},
        "datasets": list(datasets),
        "data": {word: of_data | {"originals": f"pictures/{word}/originals.png"} for word in datasets},
        "environment": {"device": "a processor", "threads": 2},
        "seconds": {"training": 3000.0, "evaluation": 900.0, "measuring": 300.0},
        "runs": runs,
        "mean": {word: _mean(word) for word in datasets},
        "sweep": {word: _sweep(word) for word in datasets},
        "collapse": _collapse(),
        "autoencoder": {word: _autoencoder(word) for word in datasets},
        "regularization": {word: _regularization(word) for word in datasets},
        "architectures": _architectures(),
        "scale_maps": _scale_maps(),
        "explorers": [],
    }


_ROWS = {"originals": (1, 10), "reconstructions": (1, 10), "samples": (2, 10), "interpolations": (4, 10)}
_ROWS |= {"fitted_samples": (2, 10), "holes": (2, 6)}


def write_pictures(study: dict[str, Any], folder: Path) -> None:
    """A small picture of noise at every path that the study names."""
    generator = np.random.default_rng(0)
    paths = [entry["originals"] for entry in study["data"].values()]
    paths += [path for run in study["runs"].values() for path in run["pictures"].values()]
    for path in paths:
        rows, columns = _ROWS[Path(path).stem]
        levels = generator.integers(0, 255, (28 * rows, 28 * columns), dtype=np.uint8)
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        Image.fromarray(levels).save(buffer, format="png")
        (folder / path).write_bytes(buffer.getvalue())
