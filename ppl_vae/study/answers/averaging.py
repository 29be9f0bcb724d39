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
from ppl_vae.study.words import beta, count, data_name, listed, number, percent, percent_plus_minus, several, signed

# Reconstructions that vary less than this share of what the images do are nearly one picture. Source: ours.
ONE_PICTURE = 0.01
# A difference of a smaller share of the reconstruction term than this is a small one. Source: ours.
SMALL = 0.001
FAR_ABOVE = 10.0


def averaging_answer(study: Study) -> Answer:
    """The mean over pixels as another beta: what a linear theory predicts of it, and what came."""
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
            "That theory is one of linear networks and of small steps away from collapse; these are not linear, and "
            "may use fewer latents, or find an optimum that it does not see.",
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
    keeps = "none" if live == 0 else f"only {count(live)}"
    edge = part.get("edge")
    noise = f", and what sampling noise alone reaches, {number(edge)}" if edge else ""
    return (
        f"A linear decoder near collapse keeps a direction of the data only if its eigenvalue is above beta: of "
        f"{data_name(dataset)} the largest, in units of the likelihood's noise, is {number(part['eigenvalues'][0])}; "
        f"{count(sums['predicted_live'])} of {count(part['num_eigenvalues'])} exceed the threshold of a sum, "
        f"{number(sums['threshold'])}{noise}, but that of a mean is {number(mean['threshold'])}, which keeps {keeps}."
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
        if mean["variation"]["mean"] < ONE_PICTURE:
            text += ": they are all nearly the same"
    return text + "."


def _all_as_predicted(study: Study) -> str | None:
    parts = {word: part for word, part in (study.get("mean") or {}).items() if part}
    known = [
        (word, row) for word, part in parts.items() for row in part["conditions"] if row["as_predicted"] is not None
    ]
    named = {row["run"]: (word, row) for word, row in known}  # the sum is a run of the sweep, too
    rows = [row for _, row in named.values()]
    if not rows:
        return None
    right = sum(row["as_predicted"] for row in rows)
    if right == len(rows):
        return (
            f"In all {several(len(rows), 'condition')} of sums, means and betas, those that this predicts to collapse "
            "did, and no others."
        )
    wrong = [_wrong(word, row) for word, row in named.values() if not row["as_predicted"]]
    return (
        f"This prediction of who collapses was right in {count(right)} of {several(len(rows), 'condition')}; wrong "
        f"{listed(wrong)}."
    )


def _wrong(dataset: str, row: Row) -> str:
    """Where a prediction failed, what it was, and what came."""
    where = "with the mean over pixels" if row["condition"] == "mean" else f"at {beta(row['beta'])}"
    predicted = "collapse" if row["predicted_collapse"] else "keep latents"
    shown = f"{count(row['active'])} of {several(row['latent_dim'], 'latent')} active"
    return f"{where} on {data_name(dataset)} (predicted to {predicted}, shown {shown})"


def _same_optimum(study: Study, dataset: str) -> str | None:
    part = part_of(study, "mean", dataset)
    paired = None if not part else (part.get("mean_equals_beta_of_mean") or {}).get("reconstruction")
    if not part or not paired:
        return None
    D = count(part["num_pixels"])
    if paired["word"] == "not distinguishable":
        end = f"cannot be told apart in reconstruction ({signed(paired)} nats, on the same images)"
    else:
        end = (
            f"differ by {signed(paired)} nats in reconstruction{_share_of_term(study, dataset, paired)}: one objective "
            "but for a factor, which clipping the gradient's norm (it can act on the larger gradient alone) and the "
            "optimizer's small constants do not leave without effect"
        )
    return f"On {data_name(dataset)} the run of a mean over pixels and the run of beta = {D} {end}."


def _share_of_term(study: Study, dataset: str, paired: Row) -> str:
    """A difference's size beside the reconstruction term itself."""
    term = (_condition(study, dataset, "mean") or {}).get("reconstruction")
    if not term or not term["mean"]:
        return ""
    share = abs(paired["mean"] / term["mean"])
    word = "a small" if share < SMALL else "no small"
    return f", beyond chance of the images and {word} share of that term ({percent(share)})"


def _squared_error(study: Study, dataset: str) -> str | None:
    part = part_of(study, "mean", dataset)
    variance = None if not part else part.get("gaussian_variance")
    if not part or not variance or not variance.get("mean_squared_error") or not variance.get("largest_eigenvalue"):
        return None
    noise, largest = variance["mean_squared_error"], variance["largest_eigenvalue"]
    verdict = "far above" if noise > FAR_ABOVE * largest else "above" if noise > largest else "below"
    end = "no direction" if noise > largest else "some directions"
    pixels = "gray images'" if variance.get("largest_eigenvalue_as_seen") else "pixels'"
    return (
        f"The same holds of squared errors. A mean squared error over {count(part['num_pixels'])} pixels is a normal "
        f"likelihood with a variance of {number(noise)} a pixel, {verdict} the largest eigenvalue of the {pixels} "
        f"covariance, {number(largest)}: a linear decoder near collapse keeps {end}."
    )


def _counts(study: Study, dataset: str) -> str | None:
    rows = [row for row in (part_of(study, "mean", dataset) or {}).get("conditions", ()) if row["condition"] == "beta"]
    rows = [row for row in rows if row["active"] is not None]
    if not rows:
        return None
    pairs = [f"{count(row['active'])} ({count(row['predicted'])}) at {beta(row['beta'])}" for row in rows]
    return f"Active latents, and in brackets those that it predicts, on {data_name(dataset)}: {listed(pairs)}."
