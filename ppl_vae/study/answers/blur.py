"""Why VAEs blur, and autoencoders too."""

from __future__ import annotations

from ppl_vae.study.answers.sentences import (
    Answer,
    Study,
    answer_from,
    difference_of,
    each_dataset,
    first_dataset,
    introduced,
    part_of,
)
from ppl_vae.study.words import count, data_name, differs, percent, plus_minus, signed, size_of

# Reconstructions this sharp, and sharper, are as sharp as the images. Source: ours.
AS_SHARP = 0.95

_BOTH = (("VAE", "vae"), ("autoencoder", "autoencoder"))
_OF_VAE = "the VAE's "


def blur_answer(study: Study) -> Answer:
    """Sharpness of reconstructions, the parts of their error, and what doing without a prior costs."""
    dataset = first_dataset(study)
    return answer_from(
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
            *each_dataset(study, _reconstructed_nats),
            "That is no log-likelihood, for nothing is paid for the code."
            if any(each_dataset(study, _reconstructed_nats))
            else None,
        ],
        *([_decomposition(study, d)] for d in study["datasets"][1:]),
        introduced("One may also draw from a normal distribution fitted to the codes.", each_dataset(study, _fitted)),
    )


def _sharpness(study: Study, dataset: str) -> str | None:
    part = part_of(study, "autoencoder", dataset)
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


def _factor(study: Study, dataset: str) -> str | None:
    part = part_of(study, "autoencoder", dataset)
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
    part = (part_of(study, "autoencoder", dataset) or {}).get("decomposition")
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
    part = part_of(study, "autoencoder", dataset)
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
        for row in (part_of(study, "autoencoder", dataset) or {}).get("latents", ())
        if row["posterior"] == "delta" and row.get("sharpness")
    ]
    if len(rows) < 2:
        return None
    few, many = rows[0], rows[-1]
    side = differs(difference_of(many["sharpness"], few["sharpness"]), 0.0)
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
    part = part_of(study, "autoencoder", dataset)
    paired = None if not part else part.get("reconstruction_difference")
    if not part or not paired:
        return None
    return (
        f"In nats of reconstruction the autoencoder is {paired['word']}"
        + ("" if paired["word"] == "not distinguishable" else f" by {size_of(paired)}")
        + f" on {data_name(dataset)}, on the same images."
    )


def _fitted(study: Study, dataset: str) -> str | None:
    part = part_of(study, "autoencoder", dataset)
    fitted = ((part or {}).get("autoencoder") or {}).get("fitted_samples")
    plain = ((part or {}).get("autoencoder") or {}).get("samples")
    if not fitted or not plain or not fitted.get("frechet") or not plain.get("frechet"):
        return None
    side = differs(difference_of(plain["frechet"], fitted["frechet"]), 0.0)
    word = {1: "helps", 0: "does not measurably help", -1: "does not help"}[side]
    return (
        f"That {word} the autoencoder's samples on {data_name(dataset)}: a Fréchet distance of "
        f"{plus_minus(fitted['frechet'])} instead of {plus_minus(plain['frechet'])}."
    )
