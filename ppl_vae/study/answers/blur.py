"""Why VAEs blur, and autoencoders too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
from ppl_vae.study.words import Value, count, data_name, differs, percent_plus_minus, plus_minus, size_of

# Reconstructions with this share of the images' high-frequency power, or more, are not said to blur. Source: ours.
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
            "What is shown as a reconstruction is a mean, of all images that the decoder holds possible for a code; a "
            "mean of sharp images that differ is not sharp.",
            _sharpness(study, dataset),
            _factor(study, dataset),
            _decomposition(study, dataset),
            _samples(study, dataset),
        ],
        *([_sharpness(study, d), _factor(study, d), _samples(study, d)] for d in study["datasets"][1:]),
        each_dataset(study, _binarized),
        [_few_codes(study, dataset), _neighbors(study, dataset)],
        [
            *each_dataset(study, _reconstructed_nats),
            "That is no log-likelihood, for nothing is paid for the code."
            if any(each_dataset(study, _reconstructed_nats))
            else None,
        ],
        *([_decomposition(study, d)] for d in study["datasets"][1:]),
        introduced("One may also draw from a normal distribution fitted to the codes.", each_dataset(study, _fitted)),
        each_dataset(study, _uncorrected),
    )


def _sharpness(study: Study, dataset: str) -> str | None:
    part = part_of(study, "autoencoder", dataset)
    if not part or not (part["vae"] or {}).get("sharpness") or not (part["autoencoder"] or {}).get("sharpness"):
        return None
    said = [f"the {who}'s {plus_minus(part[key]['sharpness'])}" for who, key in _BOTH]
    return (
        f"On {data_name(dataset)} the VAE's reconstructions have {said[0].removeprefix(_OF_VAE)} of the test images' "
        f"high-frequency power, and {said[1]}: {_who_blurs(part)}."
    )


def _who_blurs(part: Mapping[str, Any]) -> str:
    blurred = [who for who, key in _BOTH if differs(part[key]["sharpness"], AS_SHARP) < 0]
    noisy = [who for who, key in _BOTH if differs(part[key]["sharpness"], 1.0) > 0]
    if len(blurred) == len(_BOTH):
        words = "both blur"
    elif blurred:
        words = f"only the {blurred[0]} measurably loses power"
    else:
        words = "neither measurably loses power"
    return words + (f" (what the {' and the '.join(noisy)} has beyond one is noise, not detail)" if noisy else "")


def _factor(study: Study, dataset: str) -> str | None:
    part = part_of(study, "autoencoder", dataset)
    if not part or not part.get("sharper"):
        return None
    factor = part["sharper"]
    side = differs(factor, 1.0)
    if side == 0:
        return (
            f"The autoencoder's power is not measurably more or less than the VAE's (factor {plus_minus(factor)} on "
            f"{data_name(dataset)})."
        )
    word = "more" if side > 0 else "less"
    return f"The autoencoder has {word} of it, by a factor of {plus_minus(factor)} on {data_name(dataset)}."


def _binarized(study: Study, dataset: str) -> str | None:
    """What a reconstruction that is the network's own input would have."""
    binarized = (part_of(study, "autoencoder", dataset) or {}).get("binarized")
    if not binarized or not binarized.get("error") or not binarized.get("sharpness"):
        return None
    return (
        f"On {data_name(dataset)} the networks see binarized images, and are compared with the gray ones: the binary "
        f"image itself has an error of {plus_minus(binarized['error'])} a pixel, and "
        f"{plus_minus(binarized['sharpness'])} times the gray image's high-frequency power. What a network fits of "
        "that noise adds to its error and counts as power, so power measures detail only where little noise is fitted."
    )


def _share(part: Mapping[str, Any], name: str) -> Value:
    """A part of the error, with its error where it is known."""
    known = (part.get("shares") or {}).get(name)
    return known or {"mean": part[name]["mean"] / part["error"]["mean"]}


def _decomposition(study: Study, dataset: str) -> str | None:
    """The three parts of the VAE's error, as shares of it."""
    part = (part_of(study, "autoencoder", dataset) or {}).get("decomposition")
    names = ("error", "posterior_noise", "autoencoder_error", "lost")
    if not part or not all(part.get(name) for name in names) or part["error"]["mean"] <= 0:
        return None
    noise, autoencoder, lost = (_share(part, name) for name in names[1:])
    rest = {
        1: f"and {percent_plus_minus(lost)} is what the VAE's mean reconstruction lacks beside that",
        0: f"and what the VAE's mean reconstruction lacks beside that cannot be told from none "
        f"({percent_plus_minus(lost)})",
        -1: "and no more is lost: the VAE's mean reconstruction is nearer to the image than the autoencoder's (by "
        f"{percent_plus_minus({**lost, 'mean': -lost['mean']})} of the error)",
    }[differs(part["lost"], 0.0)]
    return (
        f"Of the VAE's squared error on {data_name(dataset)}, {percent_plus_minus(noise)} is the posterior's noise "
        f"(each draw of a code decodes a little differently), {percent_plus_minus(autoencoder)} is the "
        "autoencoder's error (averaging over what the code leaves open, fitted pixel noise, a limited network and a "
        f"short training together), {rest}."
    )


def _samples(study: Study, dataset: str) -> str | None:
    part = part_of(study, "autoencoder", dataset)
    worse = None if not part else part.get("samples_worse")
    if not part or not worse or not worse.get("frechet"):
        return None
    factor, corrected = worse["frechet"], "frechet_uncorrected" in worse
    ratio = f"is{', less what other real images have,' if corrected else ''} {plus_minus(factor)} times the VAE's"
    words = {
        1: f"is paid for in prior samples: their Fréchet distance from real images {ratio}",
        -1: f"has no price in prior samples here: their Fréchet distance from real images {ratio}",
        0: f"has no price in prior samples that can be told: their Fréchet distance from real images {ratio}",
    }[differs(factor, 1.0)]
    return f"Doing without a prior {words}{_distances(part, dataset)}{_told_apart(worse)}."


def _distances(part: Mapping[str, Any], dataset: str) -> str:
    floor = (part.get("floor") or {}).get("frechet")
    vae, auto = (((part[key] or {}).get("samples") or {}).get("frechet") for key in ("vae", "autoencoder"))
    if not floor or not vae or not auto:
        return ""
    return (
        f" ({plus_minus(auto)} against {plus_minus(vae)} on {data_name(dataset)}, where other real images have "
        f"{plus_minus(floor)})"
    )


def _told_apart(worse: Mapping[str, Any]) -> str:
    """How much better a classifier tells the autoencoder's samples from real images than the VAE's."""
    effect = worse.get("classifier")
    if not effect:
        return ""
    side = differs(effect, 0.0)
    if side == 0:
        return f", and a classifier does not measurably tell them better or worse ({plus_minus(effect)} in its effect)"
    word = "higher" if side > 0 else "lower"
    return f", and the effect of a classifier against real images is {word} by {size_of(effect)}"


def _uncorrected(study: Study, dataset: str) -> str | None:
    """The plain ratio, and why it is not the one that is spoken of; all that there is where the VAE is at the floor."""
    worse = (part_of(study, "autoencoder", dataset) or {}).get("samples_worse") or {}
    plain = worse.get("frechet_uncorrected")
    if not plain:
        return None
    end = (
        "" if worse.get("frechet") else "; the VAE's own is not measurably above what real images have, so no other is"
    )
    return (
        f"The plain ratio of the two Fréchet distances on {data_name(dataset)}, {plus_minus(plain)}, is biased toward "
        f"one, for both hold what so few images alone make of it{end}."
    )


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
        f"images' high-frequency power, one of {count(many['latent_dim'])} {plus_minus(many['sharpness'])}, each "
        "trained once. No noise of codes and no prior is involved there."
    )


def _neighbors(study: Study, dataset: str) -> str | None:
    """Whether a reconstruction is a mean of images with nearly its code."""
    near = ((part_of(study, "autoencoder", dataset) or {}).get("same_code") or {}).get("neighbors")
    if not near or not near.get("ratio"):
        return None
    where = {1: "further from {} than from", 0: "not measurably nearer to {} than to", -1: "nearer to {} than to"}
    mean = f"the mean of the {count(near['count'])} training images with the nearest codes"
    return (
        f"With the shortest code a reconstruction is {where[differs(near['ratio'], 1.0)].format(mean)} its own image: "
        f"its squared distances have the ratio {plus_minus(near['ratio'])}."
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
