"""The sections of study.json but the autoencoder's: each a function of the runs' records, all numbers with errors."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ppl_vae import diagnostics, runs
from ppl_vae.commands.diagnosis_numbers import noise_numbers
from ppl_vae.evidence.estimate import Estimate
from ppl_vae.parts.registry import SCALE_MAPS
from ppl_vae.runs.build import build_likelihood
from ppl_vae.runs.fit_arguments import count_steps
from ppl_vae.study import plan
from ppl_vae.study.context import Study
from ppl_vae.study.material import StudyData
from ppl_vae.study.pairs import BOUNDS, Peak, difference, differences, mean_and_spread, peak, per_image
from ppl_vae.study.scale_maps import gradients_at_start

_MOST_EIGENVALUES = 200  # that are kept
_MOST_FOR_NOISE = 20_000  # training images
_NOISE_VERSION = 2  # of what is kept of it; another is measured again
_LEVEL = 0.05  # of all tests of one run's latents together
_STEP = "step "


# --- (a) Sum against mean over pixels ---


def mean_section(study: Study) -> dict[str, Any]:
    """What averaging over pixels does: the collapse that eigenvalues suggest, and the one that was trained."""
    return {word: _mean_of(study, material) for word, material in study.materials.items()}


def _mean_of(study: Study, material: StudyData) -> dict[str, Any]:
    word, D = material.word, material.num_pixels
    noise = noise_of(study, material)
    found = [
        _condition(study, noise, "sum", plan.sweep_name(word, 1.0), 1.0, 1),
        _condition(study, noise, "mean", plan.mean_name(word), 1.0, D),
        _condition(study, noise, "beta-of-mean", plan.beta_of_mean_name(word), float(D), 1),
        *(_condition(study, noise, "beta", plan.sweep_name(word, b), b, 1) for b in study.betas(word)),
    ]
    conditions = [each for each in found if each is not None]
    sum_variance = noise["gaussian_variance"]
    mean, beta_of_mean = study.run(plan.mean_name(word)), study.run(plan.beta_of_mean_name(word))
    return {
        "num_pixels": D,
        "likelihood": material.options.likelihood,
        "eigenvalues": noise["eigenvalues"][:_MOST_EIGENVALUES],
        "num_eigenvalues": len(noise["eigenvalues"]),
        "edge": noise["edge"],
        "num_images": noise["num_images"],
        "gaussian_variance": {
            "sum": sum_variance,
            "mean": None if sum_variance is None else D * sum_variance,
            "mean_squared_error": diagnostics.variance_of_mean_squared_error(D),
            **{name: noise[name] for name in ("largest_eigenvalue", "largest_eigenvalue_as_seen")},
        },
        "conditions": conditions,
        "collapse_as_predicted": all(each["as_predicted"] for each in conditions),
        "mean_equals_beta_of_mean": {of: difference(mean, beta_of_mean, of) for of in ("kl", "reconstruction")},
    }


def noise_of(study: Study, material: StudyData) -> dict[str, Any]:
    """The data's eigenvalues in units of the likelihood's noise, kept beside the study: they depend on no run.

    Raises:
        ValueError: a likelihood without a location, or a damaged file.
    """
    path, options = study.folder / f"noise-{material.word}.json", material.options
    key = {
        "version": _NOISE_VERSION,
        "images": _MOST_FOR_NOISE,
        "sha256": material.splits.sha256,
        **{name: getattr(options, name) for name in ("likelihood", "binarization", "transform")},
    }
    stored = runs.read_json(path) if path.exists() else {}
    if stored.get("key") == key:
        return stored
    x = material.train_as_seen(_MOST_FOR_NOISE)
    found = noise_numbers(build_likelihood(options, material.splits.event_shape), x)
    if found is None:
        raise ValueError(f"--likelihood {options.likelihood}: expected one with a location, for the study")
    found |= {
        "largest_eigenvalue": _largest_eigenvalue(material.train_gray(_MOST_FOR_NOISE)),
        "largest_eigenvalue_as_seen": _largest_eigenvalue(x),
    }
    runs.write_json(path, {"key": key} | found, checksum=True)
    return found


def _largest_eigenvalue(x: Tensor) -> float:
    """Of the covariance of x (N, *E)."""
    return float(torch.linalg.eigvalsh(torch.cov(x.flatten(1).double().T))[-1])


def _condition(
    study: Study, noise: dict[str, Any], condition: str, name: str, beta: float, divisor: int
) -> dict[str, Any] | None:
    """One training, what was predicted of it, and what it came to.

    The prediction is of a linear decoder near the collapsed state, which keeps a direction where its eigenvalue is
    above the threshold, beta, or beta D for a mean over D pixels; and eigenvalues below the edge are what so many
    images show of independent pixels. How many latents are then used is another matter, since one latent of a network
    carries what takes several linear ones; and a deep decoder may have a better optimum away from collapse, so that
    "none" is a prediction, which the training confirms or not.
    """
    record = study.ended(name)
    if record is None:
        return None
    eigenvalues = torch.tensor(noise["eigenvalues"], dtype=torch.double)
    live = diagnostics.live_directions(eigenvalues, beta=beta * divisor, edge=noise["edge"])
    L, active, evaluation = record["options"]["latent_dim"], record["active"], record["evaluation"]
    return {
        "condition": condition,
        "run": name,
        "beta": beta,
        "reduction": "sum" if divisor == 1 else "mean",
        "threshold": beta * divisor,
        "predicted_live": live,
        "predicted": min(L, live),
        "latent_dim": L,
        "active": active,
        "variation": record["variation"],
        **{name: evaluation[name] for name in ("kl", "reconstruction", "elbo")},
        "predicted_collapse": live == 0,
        "shown_collapse": active == 0,
        "as_predicted": (live == 0) == (active == 0),
    }


# --- (b) Along beta ---


def sweep_section(study: Study) -> dict[str, Any]:
    """Rate, distortion and both bounds along beta; where they peak, and what cannot be told from the peak."""
    return {word: _sweep_of(study, word) for word in study.materials}


def _sweep_of(study: Study, word: str) -> dict[str, Any]:
    names = {beta: plan.sweep_name(word, beta) for beta in study.betas(word)}
    records = {beta: record for beta, name in names.items() if (record := study.ended(name)) is not None}
    reference = plan.sweep_name(word, 1.0)
    rows = [
        _along_beta(study, beta, record)
        | differences(study.run(names[beta]), study.run(reference), comparisons=len(records) - 1)
        for beta, record in records.items()
    ]
    folders = {beta: study.run(names[beta]) for beta in records}
    peaks = {of: _peak(folders, records, of) for of in BOUNDS} if records else {}
    alike = [set(found["not_distinguishable"]) for found in peaks.values()]
    may_be_best = [{*found["not_distinguishable"], *found["unranked"]} for found in peaks.values()]
    seeds = _over_seeds(study, word)
    return {
        "reference": reference,
        "rows": rows,
        "peaks": {of: peaks.get(of) for of in BOUNDS},
        "same_peak": len({found["beta"] for found in peaks.values()}) == 1,
        "peaks_distinguishable": bool(peaks) and not set.intersection(*alike),
        "peaks_ranked": bool(peaks) and not set.intersection(*may_be_best),
        "unreliable_betas": [row["beta"] for row in rows if not row["reliable"]],
        "seeds": seeds,
        "seed_peaks": {of: _peaks_by_seed(seeds, of) for of in BOUNDS},
    }


def _along_beta(study: Study, beta: float, record: dict[str, Any]) -> dict[str, Any]:
    evaluation = record["evaluation"]
    distortion = evaluation["reconstruction"]
    found = per_image(study.run(record["name"]))
    assert found is not None  # it ended, and has a density
    gap = Estimate.from_values(found.result.log_evidence - found.result.elbo)
    return {
        "beta": beta,
        "run": record["name"],
        "rate": evaluation["kl"],
        "distortion": {"mean": -distortion["mean"], "stderr": distortion["stderr"]},
        "gap": gap.to_json(),
        "active": record["active"],
        "implied_beta": record["implied_beta"],
        "variation": record["variation"],
        **{name: evaluation[name] for name in ("elbo", "log_likelihood", "rise", "unreliable", "pareto_k", "reliable")},
    }


def _peak(folders: dict[float, Path], records: dict[float, Any], of: str) -> dict[str, Any]:
    """Where one bound is highest, and of L_S, whether log p(x) ranks as it does."""
    values = {beta: record["evaluation"][of]["mean"] for beta, record in records.items()}
    found = peak(folders, values, of)
    to_reference = None
    if 1.0 in folders:
        to_reference = difference(folders[found.best], folders[1.0], of, comparisons=max(1, len(values) - 1))
    return {
        "beta": found.best,
        "run": records[found.best]["name"],
        "value": records[found.best]["evaluation"][of],
        "not_distinguishable": found.alike,
        "unranked": found.unranked,
        "ranks_log_likelihood": not found.unranked if of == "log_likelihood" else None,
        "is_reference": found.best == 1.0,
        "difference_to_reference": to_reference,
        "reliable": _is_reliable(found, records, of),
    }


def _is_reliable(found: Peak, records: dict[float, Any], of: str) -> bool:
    """Of L_S: all others are ranked, and those alike are settled. An ELBO is the mean of its draws: no weights."""
    settled = all(records[beta]["evaluation"]["reliable"] for beta in found.alike)
    return of == "elbo" or (settled and not found.unranked)


def _over_seeds(study: Study, word: str) -> list[dict[str, Any]]:
    found = []
    for beta in sorted(study.size.close_betas):
        records = {seed: study.ended(plan.sweep_name(word, beta, seed)) for seed in (0, *study.size.seeds)}
        ended = {seed: record for seed, record in records.items() if record is not None}
        if len(ended) < 2:
            continue
        of_bounds = {of: mean_and_spread([r["evaluation"][of]["mean"] for r in ended.values()]) for of in BOUNDS}
        active = {"values": [record["active"] for record in ended.values()]}
        found.append({"beta": beta, "seeds": [*ended], **of_bounds, "active": active})
    return found


def _peaks_by_seed(seeds: list[dict[str, Any]], of: str) -> list[float]:
    """Of each seed that every one of the betas has, the beta where it is highest."""
    if not seeds:
        return []
    common = set.intersection(*(set(row["seeds"]) for row in seeds))
    return [max(seeds, key=lambda row: row[of]["values"][row["seeds"].index(seed)])["beta"] for seed in sorted(common)]


# --- (c) What helps against collapse ---


def collapse_section(study: Study) -> dict[str, Any] | None:
    """No help, a warm-up, free bits, and both, for two networks."""
    word = study.first
    networks = {network: _remedies(study, word, network) for network in plan.REMEDIED_NETWORKS}
    return {"dataset": word, "networks": networks} if any(each["rows"] for each in networks.values()) else None


def _remedies(study: Study, word: str, network: str) -> dict[str, Any]:
    names = {
        remedy: plan.sweep_name(word, 1.0)
        if (network, remedy) == ("gated", "warm-up")  # the base itself
        else plan.remedy_name(word, network, remedy)
        for remedy in plan.REMEDIES
    }
    reference = study.run(names["none"])
    rows = []
    for remedy, name in names.items():
        record = study.records.get(name)
        if record is not None:
            paired = differences(study.run(name), reference, comparisons=len(names) - 1)
            rows.append({"remedy": remedy} | _remedied(record) | paired)
    return {"epochs": rows[0]["epochs"] if rows else None, "rows": rows}


def _remedied(record: dict[str, Any]) -> dict[str, Any]:
    evaluation, options = record["evaluation"] or {}, record["options"]
    bits = options["free_bits"] if options["objective"] == "free-bits" else None
    return {
        "run": record["name"],
        "epochs": options["epochs"],
        "active": record["active"],
        "latent_dim": options["latent_dim"],
        **{name: evaluation.get(name) for name in ("kl", "elbo", "log_likelihood", "reliable")},
        "collapsed": record["active"] == 0,
        "warmup_epochs": options["warmup_epochs"],
        "free_bits": bits,
        "failed": record["failed"],
    }


# --- (e) Did the regularization work? ---


def regularization_section(study: Study) -> dict[str, Any]:
    """The aggregate posterior against the prior, along beta and for the autoencoder."""
    return {
        word: {"rows": _regularized(study, word), "images": material.num_images}
        for word, material in study.materials.items()
    }


def _regularized(study: Study, word: str) -> list[dict[str, Any]]:
    names = [plan.sweep_name(word, beta) for beta in study.betas(word)] + [plan.autoencoder_name(word)]
    return [_aggregate(record) for name in names if (record := study.ended(name)) is not None]


def _aggregate(record: dict[str, Any]) -> dict[str, Any]:
    numbers = record["diagnosis"]
    aggregate, split = numbers["aggregate"], numbers["elbo_split"] or {}
    distance, holes = aggregate["kolmogorov_smirnov"], aggregate["holes"]
    parts = ("mutual_information", "marginal_kl", "total_correlation", "sum_of_dimension_kl", "cap", "saturated")
    return {
        "beta": record["options"]["beta"],
        "autoencoder": record["autoencoder"],
        "run": record["name"],
        "active": record["active"],
        "moments": {name: _sizes(aggregate["moments"][name]["mean"]) for name in ("mean", "log_scale")},
        "kolmogorov_smirnov": _sizes(distance["statistic"]) | _rejected(distance["p_value"]),
        "classifier": {name: aggregate["classifier"][name] for name in ("effect", "p_value")},
        "holes": None if holes is None else holes["share"],
        "expected_holes": None if holes is None else holes["expected"],
        "kl": numbers["kl"],
        **{name: split.get(name) for name in parts},
    }


def _rejected(p_values: list[float]) -> dict[str, Any]:
    """#{l: p_l < 0.05 / L}: one latent or more by chance in 5% of runs whose aggregate posterior is the prior.

    Reference: Dunn 1961, Multiple comparisons among means.
    """
    level = _LEVEL / len(p_values)
    return {"rejected": sum(p < level for p in p_values), "level": level, "latent_dim": len(p_values)}


def _sizes(values: list[float | None]) -> dict[str, float | None]:
    """The largest and the median size over latents; None where one is not finite, of a latent that is constant."""
    sizes = [abs(value) for value in values if value is not None]
    return {"max": max(sizes), "median": median(sizes)} if len(sizes) == len(values) else {"max": None, "median": None}


# --- (f) Architectures and latent sizes ---


def architectures_section(study: Study) -> dict[str, Any] | None:
    """Networks and numbers of latents, each against the base."""
    word = study.first
    base = plan.sweep_name(word, 1.0)
    varied = (
        [("latents", plan.latents_name(word, L)) for L in study.size.latent_dims]
        + [("base", base)]
        + [("network", plan.network_name(word, network)) for network in study.size.networks]
    )
    found = [(what, record) for what, name in varied if (record := study.ended(name)) is not None]
    rows = [
        {"varied": what}
        | _architecture(record)
        | differences(study.run(record["name"]), study.run(base), comparisons=len(found) - 1)
        for what, record in found
    ]
    return {"dataset": word, "reference": base, "rows": rows} if rows else None


def _architecture(record: dict[str, Any]) -> dict[str, Any]:
    options, evaluation = record["options"], record["evaluation"]
    return {
        "run": record["name"],
        **{name: options[name] for name in ("network", "latent_dim", "epochs")},
        **{name: record[name] for name in ("parameters", "seconds", "active")},
        **{name: evaluation[name] for name in ("elbo", "log_likelihood", "kl", "reliable")},
    }


# --- (g) Maps to the guide's scale ---


def scale_maps_section(study: Study) -> dict[str, Any]:
    """Gradients of each map at initialization, and trainings at ten times the learning rate."""
    word = study.first
    material = study.materials[word]
    names = {scale_map: plan.stress_name(word, scale_map) for scale_map in SCALE_MAPS}
    stressed = [
        _stressed(study, scale_map, study.records[name]) for scale_map, name in names.items() if name in study.records
    ]
    return {
        "dataset": word,
        "gradients": gradients_at_start(material.options, material.x[:500]),
        "stressed": stressed,
    }


def _stressed(study: Study, scale_map: str, record: dict[str, Any]) -> dict[str, Any]:
    failure, options = record["failed"], study.planned[record["name"]].options
    evaluation = record["evaluation"] or {}
    return {
        "scale_map": scale_map,
        "run": record["name"],
        "finished": failure is None,
        "failure": failure,
        "failure_phase": record["failed_phase"],
        "step": record["step"] if failure is None else _step_in(failure),
        "num_steps": count_steps(options, len(study.materials[study.first].splits.train)),
        "elbo": evaluation.get("elbo"),
        "learning_rate": options.learning_rate,
    }


def _step_in(failure: str) -> int | None:
    """Of a failed training's words, "step 12: site 'z' ...", the number; None of a failed evaluation's."""
    number = failure.removeprefix(_STEP).partition(":")[0]
    return int(number) if failure.startswith(_STEP) and number.isdigit() else None
