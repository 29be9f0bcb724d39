"""The study's answers, in words: each number and each "more" or "less" of the text is read from study.json."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ppl_vae.study.words import (
    beta,
    count,
    data_name,
    differs,
    listed,
    number,
    percent,
    percent_plus_minus,
    plus_minus,
    several,
    signed,
    size_of,
)

Study = Mapping[str, Any]
Row = Mapping[str, Any]

# A classifier that tells codes from prior draws by less than this effect finds them alike. Source: ours.
ALIKE = 0.1

# Reconstructions this sharp, and sharper, are as sharp as the images. Source: ours.
AS_SHARP = 0.95


@dataclass(frozen=True)
class Answer:
    """A question and what the measurements say.

    Args:
        key: a word for it, by which the report finds its place.
        question: a reader's.
        short: some sentences, for a README.
        long: paragraphs, for the report; the short ones are not repeated.
    """

    key: str
    question: str
    short: str
    long: tuple[str, ...]


def answers(study: Study) -> list[Answer]:
    """Every question that the study's runs answer, in the order in which a reader asks.

    Where a measurement is missing, what rests on it is left out.

    Args:
        study: study.json.
    """
    main = (_trouble(study), _checked(study), _blur(study), _averaging(study), _peak(study))
    further = (_remedies(study), _architectures(study), _scale_maps(study))
    return [answer for answer in (*main, *further) if answer.short]


def _answer(key: str, question: str, short: Iterable[str | None], *long: Iterable[str | None]) -> Answer:
    """From sentences, of which those that could not be said are None."""
    paragraphs = (_joined(paragraph) for paragraph in long)
    return Answer(key, question, _joined(short), tuple(p for p in paragraphs if p))


def _joined(sentences: Iterable[str | None]) -> str:
    return " ".join(sentence for sentence in sentences if sentence)


def _first(study: Study) -> str:
    return study["datasets"][0]


def _of(study: Study, section: str, dataset: str | None = None) -> Any:
    """A section's part for a data set (the first one by default); None where there is none."""
    return (study.get(section) or {}).get(dataset or _first(study))


def _each(study: Study, say: Callable[[Study, str], str | None]) -> list[str | None]:
    """The same sentence of each data set."""
    return [say(study, dataset) for dataset in study["datasets"]]


def _once(general: str, found: Sequence[str | None]) -> list[str | None]:
    """A general sentence before those of the data sets, where there are any."""
    return [general, *found] if any(found) else []


def _row_at(rows: Sequence[Row], value: float) -> Row | None:
    """The row of that beta."""
    return next((row for row in rows if row.get("beta") == value and not row.get("autoencoder")), None)


# --- Why is the regularizer troublesome? ---


def _trouble(study: Study) -> Answer:
    dataset = _first(study)
    return _answer(
        "regularizer",
        "Why is the regularizer troublesome?",
        [
            "The KL term is a price on information: each nat that a code tells about its image costs beta nats, and "
            "must earn more than that in the reconstruction.",
            _rate_and_distortion(study, dataset),
            _all_collapsed(study, dataset),
            _unused_at_one(study, dataset),
            _warmup_matters(study),
        ],
        _each(study, lambda s, d: _rate_and_distortion(s, d) if d != dataset else None),
        _each(study, lambda s, d: _all_collapsed(s, d) if d != dataset else None),
        [
            "The price is the same for all latents, so those that would earn least go first; a latent that is unused "
            "says the same of every image (its KL is zero), and the decoder learns not to listen to it.",
            *_once(
                "The price can be read off finished weights, at which no small change of the guide's scales pays.",
                _each(study, _implied),
            ),
        ],
    )


def _rate_and_distortion(study: Study, dataset: str) -> str | None:
    rows = [row for row in (_of(study, "sweep", dataset) or {}).get("rows", ()) if row["rate"] and row["distortion"]]
    if len(rows) < 2:
        return None
    low, high = rows[0], rows[-1]
    return (
        f"On {data_name(dataset)}, from {beta(low['beta'])} to {beta(high['beta'])}, the rate (the KL) goes from "
        f"{plus_minus(low['rate'])} to {plus_minus(high['rate'])} nats an image, and the distortion (minus the "
        f"reconstruction term) from {plus_minus(low['distortion'])} to {plus_minus(high['distortion'])}."
    )


def _all_collapsed(study: Study, dataset: str) -> str | None:
    rows = [row for row in (_of(study, "sweep", dataset) or {}).get("rows", ()) if row["active"] is not None]
    dead = [row["beta"] for row in rows if row["active"] == 0]
    if not rows:
        return None
    if len(dead) == len(rows):
        return f"On {data_name(dataset)} no latent is active at any beta of the sweep."
    if not dead:
        return f"On {data_name(dataset)} no beta of the sweep is high enough to silence all latents."
    living = [row["beta"] for row in rows if row["beta"] < min(dead)]
    until = f"; at {beta(max(living))} some still are" if living else ""
    return (
        f"On {data_name(dataset)} the price is too high at {beta(min(dead))}: no latent is active, and every "
        f"reconstruction is the same{until}."
    )


def _unused_at_one(study: Study, dataset: str) -> str | None:
    row = _row_at((_of(study, "sweep", dataset) or {}).get("rows", ()), 1.0)
    run = None if row is None else study["runs"].get(row["run"])
    if row is None or run is None or row["active"] is None:
        return None
    active, L = row["active"], run["options"]["latent_dim"]
    if active == L:
        return f"At {beta(1.0)} all {count(L)} latents are active."
    return f"At {beta(1.0)}, {count(active)} of {count(L)} latents are active; the others tell nothing."


def _implied(study: Study, dataset: str) -> str | None:
    rows = [row for row in (_of(study, "sweep", dataset) or {}).get("rows", ()) if row.get("implied_beta")]
    if not rows:
        return None
    pairs = [f"{plus_minus(row['implied_beta'])} at {beta(row['beta'])}" for row in rows]
    return f"On {data_name(dataset)} that implied beta is {listed(pairs)}."


def _remedy(study: Study, network: str, remedy: str) -> Row | None:
    networks = (study.get("collapse") or {}).get("networks") or {}
    rows = (networks.get(network) or {}).get("rows", ())
    return next((row for row in rows if row["remedy"] == remedy and row["active"] is not None), None)


def _networks(study: Study) -> list[str]:
    return list((study.get("collapse") or {}).get("networks") or {})


def _warmup_matters(study: Study) -> str | None:
    """Of the network that a warm-up changes most."""
    pairs = [(n, _remedy(study, n, "none"), _remedy(study, n, "warm-up")) for n in _networks(study)]
    known = [(n, without, with_) for n, without, with_ in pairs if without and with_]
    if not known:
        return None
    network, without, with_ = max(known, key=lambda item: abs(item[2]["active"] - item[1]["active"]))
    if without["active"] == with_["active"]:
        return (
            f"Whether beta was warmed up changed nothing in the number of active latents ({count(with_['active'])} of "
            f"{count(with_['latent_dim'])})."
        )
    return (
        f"And the outcome depends on how training begins: a {network} network ends with {count(without['active'])} of "
        f"{count(without['latent_dim'])} latents active if beta acts at once, and with {count(with_['active'])} if it "
        f"is warmed up{_by(with_)}."
    )


def _by(row: Row) -> str:
    """What the row gains in log p(x), or else in the ELBO, on its reference."""
    bound, difference = "log p(x)", row.get("difference_log_likelihood")
    if difference is None or difference.get("ranks_log_likelihood") is False:
        bound, difference = "the ELBO", row.get("difference_elbo")
    if difference is None:
        return ""
    if difference["word"] == "not distinguishable":
        return f", though {bound} is not distinguishable ({signed(difference)} nats)"
    return f", which is {difference['word']} by {size_of(difference)} nats in {bound}"


def _remedies(study: Study) -> Answer:
    return _answer(
        "collapse",
        "What helps against collapse?",
        _with_and_without(study),
        [
            "A warm-up lets the decoder learn to use codes before they cost anything; free bits make the first part of "
            "each latent's KL cost nothing for good. Neither changes what is reported: every number here is at "
            f"{beta(1.0)}."
            if _networks(study)
            else None
        ],
    )


def _with_and_without(study: Study) -> list[str | None]:
    said: list[str | None] = []
    for network in _networks(study):
        none = _remedy(study, network, "none")
        if none is None:
            continue
        said.append(f"The {network} network without help has {count(none['active'])} active latents.")
        for remedy, words in (("warm-up", "With a warm-up"), ("free-bits", "With free bits"), ("both", "With both")):
            row = _remedy(study, network, remedy)
            if row is not None:
                said.append(f"{words} it has {count(row['active'])}{_by(row)}.")
    return said


# --- How to check that it worked? ---


def _checked(study: Study) -> Answer:
    dataset = _first(study)
    return _answer(
        "check",
        "How do I check that the regularization worked?",
        [
            "It worked if codes of test images, one draw each, look like draws of the prior, and still say something "
            "about the images.",
            _rejected(study, dataset),
            _effects(study, dataset),
            _alike_but_empty(study, dataset),
            _information(study, dataset),
        ],
        *([_rejected(study, d), _effects(study, d), _information(study, d)] for d in study["datasets"][1:]),
        _once("The plain autoencoder was never asked to match anything.", _each(study, _autoencoder_codes)),
        _each(study, _holes_along),
    )


def _regular_rows(study: Study, dataset: str) -> Sequence[Row]:
    return (_of(study, "regularization", dataset) or {}).get("rows", ())


def _rejected(study: Study, dataset: str) -> str | None:
    row = _row_at(_regular_rows(study, dataset), 1.0)
    distance = None if row is None else row.get("kolmogorov_smirnov")
    if distance is None:
        return None
    images = (_of(study, "regularization", dataset) or {}).get("images") or study["regularization"].get("images")
    of = f" of {count(images)} images" if images else ""
    return (
        f"A p-value answers another question: at {beta(1.0)} on {data_name(dataset)} a Kolmogorov-Smirnov test{of} "
        f"rejects {count(distance['rejected'])} of {count(distance['latent_dim'])} latents, while the largest gap "
        f"between the two distribution functions is {number(distance['max'])}."
    )


def _effects(study: Study, dataset: str) -> str | None:
    row = _row_at(_regular_rows(study, dataset), 1.0)
    if row is None or not row.get("classifier"):
        return None
    effect = row["classifier"]["effect"]
    verdict = "barely tells" if effect["mean"] < ALIKE else "tells"
    text = (
        f"So look at sizes: at {beta(1.0)} a classifier {verdict} codes from prior draws (effect {plus_minus(effect)}; "
        "none if alike, one if told apart always)"
    )
    if row.get("holes"):
        text += (
            f", and {percent_plus_minus(row['holes'])} of the prior's draws fall where no code lies "
            f"({percent(row['expected_holes'])} would if nothing were wrong)"
        )
    return text + "."


def _alike_but_empty(study: Study, dataset: str) -> str | None:
    rows = [row for row in _regular_rows(study, dataset) if row.get("classifier") and not row["autoencoder"]]
    dead = [row for row in rows if row["active"] == 0]
    if not dead:
        return None
    row = dead[0]
    effect = row["classifier"]["effect"]
    like = "passes" if effect["mean"] < ALIKE else "does not even pass"
    return (
        f"A match alone proves nothing: the run of {beta(row['beta'])}, whose latents are all dead, {like} the same "
        f"test (effect {plus_minus(effect)}), so count the active latents as well."
    )


def _information(study: Study, dataset: str) -> str | None:
    row = _row_at(_regular_rows(study, dataset), 1.0)
    if row is None or not row.get("mutual_information") or not row.get("kl"):
        return None
    text = (
        f"Of the KL at {beta(1.0)} on {data_name(dataset)}, {plus_minus(row['kl'])} nats, "
        f"{plus_minus(row['mutual_information'])} tell which of the images it is"
    )
    if row.get("saturated"):
        return text + (
            f", and that is all that so many images can show (the logarithm of their number is {number(row['cap'])}): "
            "the rest cannot be split between information and distance from the prior."
        )
    return text + f", and {plus_minus(row['marginal_kl'])} are the distance of all codes together from the prior."


def _autoencoder_codes(study: Study, dataset: str) -> str | None:
    row = next((row for row in _regular_rows(study, dataset) if row["autoencoder"]), None)
    one = _row_at(_regular_rows(study, dataset), 1.0)
    if row is None or one is None or not row.get("classifier") or not one.get("classifier"):
        return None
    theirs, ours = row["classifier"]["effect"], one["classifier"]["effect"]
    apart = differs(_difference(theirs, ours), 0.0)
    word = {1: "further from the prior than", -1: "nearer to the prior than", 0: "no further from the prior than"}[
        apart
    ]
    return (
        f"On {data_name(dataset)} its codes are {word} those of the VAE: the classifier's effect is "
        f"{plus_minus(theirs)}, against {plus_minus(ours)}."
    )


def _difference(first: Row, second: Row) -> dict[str, float]:
    """Of independent values."""
    spread = (first.get("stderr") or 0.0) ** 2 + (second.get("stderr") or 0.0) ** 2
    return {"mean": first["mean"] - second["mean"], "stderr": spread**0.5}


def _holes_along(study: Study, dataset: str) -> str | None:
    rows = [row for row in _regular_rows(study, dataset) if row.get("holes") and not row["autoencoder"]]
    if len(rows) < 2:
        return None
    worst = max(rows, key=lambda row: row["holes"]["mean"])
    least = min(rows, key=lambda row: row["holes"]["mean"])
    if differs(_difference(worst["holes"], least["holes"]), 0.0) == 0:
        return (
            f"Holes on {data_name(dataset)} are as many at every beta that was measured "
            f"({percent_plus_minus(worst['holes'])} of prior draws at most)."
        )
    return (
        f"Holes on {data_name(dataset)} along beta: most at {beta(worst['beta'])} "
        f"({percent_plus_minus(worst['holes'])} of prior draws), fewest at {beta(least['beta'])} "
        f"({percent_plus_minus(least['holes'])})."
    )


# --- Why do VAEs blur, and autoencoders too? ---


def _blur(study: Study) -> Answer:
    dataset = _first(study)
    return _answer(
        "blur",
        "Why do VAEs blur, and autoencoders too?",
        [
            "What is shown as a reconstruction is a mean: of all images that the decoder holds possible for a code. "
            "A mean of sharp images that differ is not sharp.",
            _sharpness(study, dataset),
            _factor(study, dataset),
            _decomposition(study, dataset),
            _samples(study, dataset),
        ],
        *([_sharpness(study, d), _factor(study, d), _samples(study, d)] for d in study["datasets"][1:]),
        [_few_codes(study, dataset)],
        [
            *_each(study, _reconstructed_nats),
            "That is no log-likelihood, for nothing is paid for the code."
            if any(_each(study, _reconstructed_nats))
            else None,
        ],
        *([_decomposition(study, d)] for d in study["datasets"][1:]),
        _once("One may also draw from a normal distribution fitted to the codes.", _each(study, _fitted)),
    )


def _sharpness(study: Study, dataset: str) -> str | None:
    part = _of(study, "autoencoder", dataset)
    if not part or not (part["vae"] or {}).get("sharpness") or not (part["autoencoder"] or {}).get("sharpness"):
        return None
    said = [f"the {who}'s {plus_minus(part[key]['sharpness'])}" for who, key in _BOTH]
    blurred = [who for who, key in _BOTH if differs(part[key]["sharpness"], AS_SHARP) < 0]
    end = "" if blurred else ": neither blurs"
    if blurred == ["autoencoder"]:
        end = ": only the autoencoder blurs"
    elif blurred == ["VAE"]:
        end = ": the autoencoder does not blur"
    elif blurred:
        end = ": both blur"
    return (
        f"On {data_name(dataset)} the VAE's reconstructions have {said[0].removeprefix(_OF_VAE)} of the test images' "
        f"high-frequency power, and {said[1]}{end}."
    )


_BOTH = (("VAE", "vae"), ("autoencoder", "autoencoder"))
_OF_VAE = "the VAE's "


def _factor(study: Study, dataset: str) -> str | None:
    part = _of(study, "autoencoder", dataset)
    if not part or not part.get("sharper"):
        return None
    factor = part["sharper"]
    side = differs(factor, 1.0)
    if side == 0:
        return (
            f"The autoencoder is not measurably sharper or blurrier than the VAE (factor {plus_minus(factor)} on "
            f"{data_name(dataset)})."
        )
    word = "sharper" if side > 0 else "blurrier"
    return f"The autoencoder is {word}, by a factor of {plus_minus(factor)} on {data_name(dataset)}."


def _decomposition(study: Study, dataset: str) -> str | None:
    """The three parts of the VAE's error, as shares of it."""
    part = (_of(study, "autoencoder", dataset) or {}).get("decomposition")
    names = ("error", "posterior_noise", "autoencoder_error", "lost")
    if not part or not all(part.get(name) for name in names) or part["error"]["mean"] <= 0:
        return None
    total = part["error"]["mean"]
    noise, averaging, lost = (part[name]["mean"] / total for name in names[1:])
    rest = (
        f"and {percent(lost)} is what the KL's price took from the code beside that"
        if lost > 0
        else "and no more is lost: the VAE's mean reconstruction is nearer to the image than the autoencoder's "
        f"({percent(-lost)} of the error)"
    )
    return (
        f"Of the VAE's squared error on {data_name(dataset)}, {percent(noise)} is the posterior's noise (each draw of "
        f"a code decodes a little differently), {percent(averaging)} is there in the autoencoder already, the "
        f"likelihood's averaging over what the code leaves open, {rest}."
    )


def _samples(study: Study, dataset: str) -> str | None:
    part = _of(study, "autoencoder", dataset)
    worse = None if not part else part.get("samples_worse")
    if not part or not worse or not worse.get("frechet"):
        return None
    factor = worse["frechet"]
    side = differs(factor, 1.0)
    words = {
        1: f"is paid for in prior samples, whose Fréchet distance from real images is {plus_minus(factor)} times the "
        "VAE's",
        -1: f"has no price in prior samples here: their Fréchet distance is {plus_minus(factor)} times the VAE's",
        0: f"has no price in prior samples that can be told: a Fréchet distance {plus_minus(factor)} times the VAE's",
    }[side]
    text = f"Doing without a prior {words}"
    if worse.get("classifier"):
        text += f" (a classifier against real images: effect {signed(worse['classifier'])} against the VAE's)"
    floor = (part.get("floor") or {}).get("frechet")
    vae = ((part["vae"] or {}).get("samples") or {}).get("frechet")
    auto = ((part["autoencoder"] or {}).get("samples") or {}).get("frechet")
    if floor and vae and auto:
        text += (
            f": {plus_minus(auto)} against {plus_minus(vae)} on {data_name(dataset)}, where other real images have "
            f"{plus_minus(floor)}"
        )
    return text + "."


def _few_codes(study: Study, dataset: str) -> str | None:
    """What a code of few numbers leaves open."""
    rows = [
        row
        for row in (_of(study, "autoencoder", dataset) or {}).get("latents", ())
        if row["posterior"] == "delta" and row.get("sharpness")
    ]
    if len(rows) < 2:
        return None
    few, many = rows[0], rows[-1]
    side = differs(_difference(many["sharpness"], few["sharpness"]), 0.0)
    what = {
        1: "The fewer numbers a code has, the more images share it, and the blurrier their mean",
        0: "A shorter code did not measurably blur more",
        -1: "A shorter code did not blur more",
    }[side]
    return (
        f"{what}: an autoencoder of {count(few['latent_dim'])} latents reaches {plus_minus(few['sharpness'])} of the "
        f"images' sharpness, one of {count(many['latent_dim'])} {plus_minus(many['sharpness'])}. No noise and no prior "
        "is involved there: this blur is the likelihood's."
    )


def _reconstructed_nats(study: Study, dataset: str) -> str | None:
    part = _of(study, "autoencoder", dataset)
    paired = None if not part else part.get("reconstruction_difference")
    if not part or not paired:
        return None
    return (
        f"In nats of reconstruction the autoencoder is {paired['word']}"
        + ("" if paired["word"] == "not distinguishable" else f" by {size_of(paired)}")
        + f" on {data_name(dataset)}, on the same images."
    )


def _fitted(study: Study, dataset: str) -> str | None:
    part = _of(study, "autoencoder", dataset)
    fitted = ((part or {}).get("autoencoder") or {}).get("fitted_samples")
    plain = ((part or {}).get("autoencoder") or {}).get("samples")
    if not fitted or not plain or not fitted.get("frechet") or not plain.get("frechet"):
        return None
    side = differs(_difference(plain["frechet"], fitted["frechet"]), 0.0)
    word = {1: "helps", 0: "does not measurably help", -1: "does not help"}[side]
    return (
        f"That {word} the autoencoder's samples on {data_name(dataset)}: a Fréchet distance of "
        f"{plus_minus(fitted['frechet'])} instead of {plus_minus(plain['frechet'])}."
    )


# --- What did averaging over pixels do? ---


def _averaging(study: Study) -> Answer:
    dataset = _first(study)
    return _answer(
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
        _once(
            "How many latents live is predicted by a theory of linear networks, and these are not linear.",
            _each(study, _counts),
        ),
    )


def _same_as_beta(study: Study, dataset: str) -> str | None:
    part = _of(study, "mean", dataset)
    if not part:
        return None
    D = count(part["num_pixels"])
    return (
        f"A loss that is averaged over the {D} pixels instead of summed divides the reconstruction term by {D} and "
        f"leaves the KL as it is: it is the objective of beta = {D}, even with beta set to one."
    )


def _condition(study: Study, dataset: str, word: str) -> Row | None:
    conditions = (_of(study, "mean", dataset) or {}).get("conditions", ())
    return next((row for row in conditions if row["condition"] == word), None)


def _predicted(study: Study, dataset: str) -> str | None:
    part, mean, sums = _of(study, "mean", dataset), *(_condition(study, dataset, w) for w in ("mean", "sum"))
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
    part = _of(study, "mean", dataset)
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
    part = _of(study, "mean", dataset)
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
    rows = [row for row in (_of(study, "mean", dataset) or {}).get("conditions", ()) if row["condition"] == "beta"]
    rows = [row for row in rows if row["active"] is not None]
    if not rows:
        return None
    pairs = [f"{count(row['active'])} for {count(row['predicted'])} at {beta(row['beta'])}" for row in rows]
    return f"Measured for predicted on {data_name(dataset)}: {listed(pairs)}."


# --- Where does the likelihood peak along beta? ---


def _peak(study: Study) -> Answer:
    dataset = _first(study)
    return _answer(
        "peak",
        "Where does the likelihood peak along beta?",
        [
            _peak_of(study, dataset, "log_likelihood"),
            _peak_of(study, dataset, "elbo"),
            _same_peak(study, dataset),
            _why_not_one(study, dataset),
        ],
        *(
            [_peak_of(study, d, "log_likelihood"), _peak_of(study, d, "elbo"), _same_peak(study, d)]
            for d in study["datasets"][1:]
        ),
        [_seeds(study, d) for d in study["datasets"]],
        [_unreliable(study, d) for d in study["datasets"]],
        [
            "Three things move the peak. The ELBO is log p(x) less a gap, the distance between the guide and the true "
            "posterior; training pays for both together, and another beta shares them out differently.",
            "Training ends before its optimum, and a lower or higher price may get further in the same epochs.",
            "And the training images are not the test images: what is best for the one need not be for the other.",
            *(_gaps(study, d) for d in study["datasets"]),
        ],
    )


_BOUNDS = {"log_likelihood": "log p(x)", "elbo": "the ELBO"}


def _peaks(study: Study, dataset: str) -> Any:
    return (_of(study, "sweep", dataset) or {}).get("peaks")


def _peak_of(study: Study, dataset: str, bound: str) -> str | None:
    peak = (_peaks(study, dataset) or {}).get(bound)
    if not peak:
        return None
    name, alike = _BOUNDS[bound], [value for value in peak["not_distinguishable"] if value != peak["beta"]]
    text = (
        f"On {data_name(dataset)} {name} of test images peaks at {beta(peak['beta'])} ({plus_minus(peak['value'])} nats"
    )
    difference = peak.get("difference_to_reference")
    if peak["is_reference"]:
        text += ")"
    elif difference:
        text += f"; {signed(difference)} against {beta(1.0)}, on the same images)"
    else:
        text += ")"
    if alike:
        text += f", but is not distinguishable from beta = {listed(alike)}"
    betas = [row["beta"] for row in _of(study, "sweep", dataset)["rows"]]
    if peak["beta"] in (betas[0], betas[-1]):
        text += "; that is an end of the sweep, so the peak may lie beyond"
    if peak.get("reliable") is False:
        text += "; the estimate there is still rising with more importance samples, so the peak is not certain"
    return text + "."


def _same_peak(study: Study, dataset: str) -> str | None:
    part, peaks = _of(study, "sweep", dataset), _peaks(study, dataset)
    if not peaks or not peaks.get("log_likelihood") or not peaks.get("elbo"):
        return None
    if part["same_peak"]:
        return f"Both peak at the same beta on {data_name(dataset)}."
    higher = "lower" if peaks["log_likelihood"]["beta"] < peaks["elbo"]["beta"] else "higher"
    if part["peaks_distinguishable"]:
        return f"So log p(x) peaks at a {higher} beta than the ELBO, and not by chance of the images."
    return f"So log p(x) peaks at a {higher} beta than the ELBO, though some beta is as good as the best of both."


def _why_not_one(study: Study, dataset: str) -> str | None:
    peak = (_peaks(study, dataset) or {}).get("log_likelihood")
    if not peak:
        return None
    return (
        f"Nothing makes {beta(1.0)} best for log p(x): it maximizes a bound with a gap that depends on the guide, on "
        "training images, in a training that ends. " + (_gaps(study, dataset) or "")
    ).strip()


def _gaps(study: Study, dataset: str) -> str | None:
    """The gap at the peak beside that at beta = 1; where the peak is there, beside that at the next beta."""
    rows = [row for row in (_of(study, "sweep", dataset) or {}).get("rows", ()) if row.get("gap")]
    peak, one = (_peaks(study, dataset) or {}).get("log_likelihood"), _row_at(rows, 1.0)
    if not peak or not one:
        return None
    if peak["is_reference"]:
        return f"On {data_name(dataset)} that gap is at least {plus_minus(one['gap'])} nats at {beta(1.0)}."
    best = _row_at(rows, peak["beta"])
    if not best:
        return None
    side = differs(_difference(best["gap"], one["gap"]), 0.0)
    word = {1: "larger", 0: "about the same", -1: "smaller"}[side]
    return (
        f"On {data_name(dataset)} the gap is {word} at {beta(peak['beta'])} than at {beta(1.0)}: at least "
        f"{plus_minus(best['gap'])} against {plus_minus(one['gap'])} nats."
        if side
        else f"On {data_name(dataset)} the gap is {word} at {beta(peak['beta'])} and at {beta(1.0)}: at least "
        f"{plus_minus(best['gap'])} and {plus_minus(one['gap'])} nats."
    )


def _seeds(study: Study, dataset: str) -> str | None:
    peaks = (_of(study, "sweep", dataset) or {}).get("seed_peaks") or {}
    by_bound = [(name, peaks[bound]) for bound, name in _BOUNDS.items() if peaks.get(bound)]
    if not by_bound:
        return None
    said = []
    for name, values in by_bound:
        if len(set(values)) == 1:
            said.append(f"{name} peaks at {beta(values[0])} in every one")
        else:
            said.append(f"{name} peaks at beta = {listed(values)}")
    return (
        f"With {several(len(by_bound[0][1]), 'seed')} on {data_name(dataset)}, and among the betas that all of them "
        f"have, {', and '.join(said)}."
    )


def _unreliable(study: Study, dataset: str) -> str | None:
    values = (_of(study, "sweep", dataset) or {}).get("unreliable_betas")
    if not values:
        return None
    return (
        f"On {data_name(dataset)} the importance estimate has not settled at beta = {listed(values)}: there log p(x) "
        "is a lower bound, and no claim about a peak rests on it."
    )


# --- Which network, how many latents? ---


def _architectures(study: Study) -> Answer:
    part = study.get("architectures") or {}
    rows = [row for row in part.get("rows", ()) if row.get("log_likelihood") and row.get("parameters")]
    return _answer(
        "architectures",
        "Which network, and how many latents?",
        [_best(rows), _two_latents(rows), _most_latents(rows), _quickest(rows)] if len(rows) > 1 else [],
        [
            "All of them are trained for as many epochs as the base, so a slower network has had more time; the errors "
            "are of the test images, and do not know what another training would give."
            if len(rows) > 1
            else None,
            _seed_spread(study),
        ],
    )


def _seed_spread(study: Study) -> str | None:
    """What another seed does to the base, where it was trained with several."""
    entry = _row_at((_of(study, "sweep") or {}).get("seeds") or (), 1.0)
    if entry is None:
        return None
    return (
        f"The base itself, trained with {several(len(entry['seeds']), 'seed')}, has a spread of "
        f"{number(entry['log_likelihood']['spread'], 2)} nats in log p(x)."
    )


def _name(row: Row) -> str:
    return f"the {row['network']} network with {several(row['latent_dim'], 'latent')}"


def _best(rows: Sequence[Row]) -> str:
    best = max(rows, key=lambda row: row["log_likelihood"]["mean"])
    base = next((row for row in rows if row["varied"] == "base"), None)
    text = f"Best in log p(x) is {_name(best)}: {plus_minus(best['log_likelihood'])} nats"
    if base is None or base is best:
        return text + (", which is the base itself." if base is best else ".")
    return text + f" (the base, {_name(base)}: {plus_minus(base['log_likelihood'])}){_by(best)}."


def _of_latents(rows: Sequence[Row]) -> list[Row]:
    """Those that differ in their latents alone, ascending."""
    return sorted((row for row in rows if row["varied"] in ("base", "latents")), key=lambda row: row["latent_dim"])


def _two_latents(rows: Sequence[Row]) -> str | None:
    series = _of_latents(rows)
    if len(series) < 2:
        return None
    few = series[0]
    return (
        f"With {several(few['latent_dim'], 'latent')} the same network reaches {plus_minus(few['log_likelihood'])} nats"
        f"{_by(few)}."
    )


def _most_latents(rows: Sequence[Row]) -> str | None:
    series = _of_latents(rows)
    base = next((row for row in series if row["varied"] == "base"), None)
    if base is None or series[-1] is base or series[-1]["active"] is None:
        return None
    most = series[-1]
    return (
        f"More latents than needed stay unused: of {count(most['latent_dim'])}, {count(most['active'])} are active "
        f"(of {count(base['latent_dim'])}, {count(base['active'])}){_by(most)}."
        if most["active"] < most["latent_dim"]
        else f"Of {count(most['latent_dim'])} latents all are active{_by(most)}."
    )


def _quickest(rows: Sequence[Row]) -> str | None:
    timed = [row for row in rows if row.get("seconds")]
    if len(timed) < 2:
        return None
    quick, slow = (choose(timed, key=lambda row: row["seconds"]) for choose in (min, max))
    return (
        f"Training took from {number(quick['seconds'], 2)} seconds ({_name(quick)}, {count(quick['parameters'])} "
        f"weights) to {number(slow['seconds'], 2)} ({_name(slow)}, {count(slow['parameters'])})."
    )


# --- Which map to the guide's scales? ---


def _scale_maps(study: Study) -> Answer:
    part = study.get("scale_maps") or {}
    return _answer(
        "scale_maps",
        "Does it matter how the guide's scales are kept positive?",
        [_extremes(part.get("gradients") or ()), _stressed(part.get("stressed") or ())],
        [_vanishing(part.get("gradients") or ())],
    )


def _extremes(rows: Sequence[Row]) -> str | None:
    """Of each map, at the largest features."""
    if not rows:
        return None
    largest = max(row["largest_feature"] for row in rows)
    at = [row for row in rows if row["largest_feature"] == largest]
    said = [f"{row['scale_map']} {percent(row['not_finite'])}" for row in at if row.get("not_finite") is not None]
    if not said:
        return None
    broken = any(row["not_finite"] for row in at)
    return (
        f"At features as large as {number(largest)}, the gradient of the loss is NaN or infinite for this share of "
        f"images: {listed(said)}" + ("." if broken else "; none of them breaks there.")
    )


def _stressed(rows: Sequence[Row]) -> str | None:
    if not rows:
        return None
    said = []
    for row in rows:
        if row["finished"]:
            elbo = f" at an ELBO of {plus_minus(row['elbo'])} nats" if row.get("elbo") else ""
            said.append(f"{row['scale_map']} ended{elbo}")
        else:
            where = f" at step {count(row['step'])} of {count(row['num_steps'])}" if row.get("step") else ""
            said.append(f"{row['scale_map']} broke{where}")
    rate = next((row["learning_rate"] for row in rows if row.get("learning_rate")), None)
    rates = f" with a learning rate of {number(rate)} and no clipping" if rate else ""
    return f"Trained under stress{rates}, {listed(said)}."


def _vanishing(rows: Sequence[Row]) -> str | None:
    gone = [row for row in rows if (row.get("vanished") or 0) > 0]
    if not gone:
        return None
    most = max(gone, key=lambda row: row["vanished"])
    return (
        f"A map may also fail in silence: {percent(most['vanished'])} of the gradient's entries are exactly zero with "
        f"{most['scale_map']} at features of {number(most['largest_feature'])}, and what has no gradient does not move."
    )
