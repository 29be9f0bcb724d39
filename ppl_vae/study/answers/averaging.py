"""What averaging over pixels does."""

from __future__ import annotations

from ppl_vae.study.answers.sentences import (
    Answer,
    Row,
    Study,
    answer_from,
    each_dataset,
    first_dataset,
    introduced,
    part_of,
)
from ppl_vae.study.words import beta, count, data_name, listed, number, percent_plus_minus, several, signed


def averaging_answer(study: Study) -> Answer:
    """The mean over pixels as another beta: what must follow from it, and what did."""
    dataset = first_dataset(study)
    return answer_from(
        "averaging",
        "What does averaging over pixels do?",
        [
            _same_as_beta(study, dataset),
            _predicted(study, dataset),
            _shown(study, dataset),
            _all_as_predicted(study),
        ],
        [_same_optimum(study, d) for d in study["datasets"]],
        [_squared_error(study, dataset)],
        *([_predicted(study, d), _shown(study, d)] for d in study["datasets"][1:]),
        introduced(
            "How many latents live is predicted by a theory of linear networks, and these are not linear.",
            each_dataset(study, _counts),
        ),
    )


def _same_as_beta(study: Study, dataset: str) -> str | None:
    part = part_of(study, "mean", dataset)
    if not part:
        return None
    D = count(part["num_pixels"])
    return (
        f"A loss that is averaged over the {D} pixels instead of summed divides the reconstruction term by {D} and "
        f"leaves the KL as it is: it is the objective of beta = {D}, even with beta set to one."
    )


def _condition(study: Study, dataset: str, word: str) -> Row | None:
    conditions = (part_of(study, "mean", dataset) or {}).get("conditions", ())
    return next((row for row in conditions if row["condition"] == word), None)


def _predicted(study: Study, dataset: str) -> str | None:
    part, mean, sums = part_of(study, "mean", dataset), *(_condition(study, dataset, w) for w in ("mean", "sum"))
    if not part or not mean or not sums or not part["eigenvalues"]:
        return None
    live = mean["predicted_live"]
    so = "so none can live" if live == 0 else f"so only {count(live)} can live"
    return (
        "What must follow can be computed before training: the largest eigenvalue of "
        f"{data_name(dataset)}, in units of the likelihood's noise, is {number(part['eigenvalues'][0])}; "
        f"{count(sums['predicted_live'])} of {count(part['num_eigenvalues'])} directions exceed the threshold of a "
        f"sum, {number(sums['threshold'])}, but that of a mean is {number(mean['threshold'])}, {so}."
    )


def _shown(study: Study, dataset: str) -> str | None:
    mean, sums = (_condition(study, dataset, word) for word in ("mean", "sum"))
    if not mean or not sums or mean["active"] is None or sums["active"] is None:
        return None
    text = (
        f"Trained so, the network has {count(mean['active'])} of {count(mean['latent_dim'])} latents active on "
        f"{data_name(dataset)}, against {count(sums['active'])} with the sum"
    )
    if mean.get("variation") and sums.get("variation"):
        text += (
            f", and its reconstructions vary {percent_plus_minus(mean['variation'])} of what the images do, against "
            f"{percent_plus_minus(sums['variation'])}"
        )
        if mean["shown_collapse"]:
            text += ": they are all the same"
    return text + "."


def _all_as_predicted(study: Study) -> str | None:
    parts = [part for part in (study.get("mean") or {}).values() if part]
    known = (row for part in parts for row in part["conditions"] if row["as_predicted"] is not None)
    rows = list({row["run"]: row for row in known}.values())  # the sum is a run of the sweep, too
    if not rows:
        return None
    right = sum(row["as_predicted"] for row in rows)
    if right == len(rows):
        return (
            f"In all {several(len(rows), 'condition')} of sums, means and betas, what was predicted to collapse did, "
            "and nothing else."
        )
    wrong = [row["run"] for row in rows if not row["as_predicted"]]
    return (
        f"The prediction of who collapses was right in {count(right)} of {several(len(rows), 'condition')}; wrong for "
        f"{listed(wrong)}."
    )


def _same_optimum(study: Study, dataset: str) -> str | None:
    part = part_of(study, "mean", dataset)
    paired = None if not part else (part.get("mean_equals_beta_of_mean") or {}).get("reconstruction")
    if not part or not paired:
        return None
    D = count(part["num_pixels"])
    if paired["word"] == "not distinguishable":
        end = f"cannot be told apart in reconstruction ({signed(paired)} nats, on the same images)"
    else:
        end = f"differ by {signed(paired)} nats in reconstruction, for an optimizer takes other paths to one optimum"
    return f"On {data_name(dataset)} the run of a mean over pixels and the run of beta = {D} {end}."


def _squared_error(study: Study, dataset: str) -> str | None:
    part = part_of(study, "mean", dataset)
    variance = None if not part else part.get("gaussian_variance")
    if not part or not variance or not variance.get("mean_squared_error") or not variance.get("largest_eigenvalue"):
        return None
    noise, largest = variance["mean_squared_error"], variance["largest_eigenvalue"]
    verdict = "far above" if noise > 10 * largest else "above" if noise > largest else "below"
    end = "no direction survives" if noise > largest else "some directions survive"
    return (
        f"The same holds of squared errors. A mean squared error over {count(part['num_pixels'])} pixels is a normal "
        f"likelihood with a variance of {number(noise)} a pixel, {verdict} the largest eigenvalue of the data's "
        f"covariance, {number(largest)}: {end}."
    )


def _counts(study: Study, dataset: str) -> str | None:
    rows = [row for row in (part_of(study, "mean", dataset) or {}).get("conditions", ()) if row["condition"] == "beta"]
    rows = [row for row in rows if row["active"] is not None]
    if not rows:
        return None
    pairs = [f"{count(row['active'])} for {count(row['predicted'])} at {beta(row['beta'])}" for row in rows]
    return f"Measured for predicted on {data_name(dataset)}: {listed(pairs)}."
