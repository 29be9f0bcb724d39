"""The wording of log p(x): of a split, of given images with their latents or missing pixels, and of a certificate."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ppl_vae.evidence.estimate import Estimate
from ppl_vae.evidence.importance import UNRELIABLE_BIAS
from ppl_vae.reports.text import (
    describe_measure,
    describe_sample,
    format_number,
    make_sentence,
    markdown_table,
    plus_minus,
)
from ppl_vae.runs.certificates import Bound, Certificate, ConvergenceCurve
from ppl_vae.runs.command_results import Encoding, ImputationSummary
from ppl_vae.runs.files import JsonObject
from ppl_vae.runs.results import Evaluation, LabelledEvaluation

# Below this Pareto k-hat the weights have a variance, which the delta method and the jackknife assume.
_K_WITH_VARIANCE = 0.5
# From 1 on they have no mean either: the bound may be too low by any amount.
_K_WITHOUT_MEAN = 1.0

# With fewer effective particles, the draws of an image are nearly all of one or two z. Source: ours.
FEW_PARTICLES = 5
_ONE_PARTICLE = 1.5  # with fewer effective particles, most draws come from a single z

NOT_A_LOG_LIKELIHOOD = "not a log-likelihood; the guide is deterministic, an autoencoder has no density"

_MOST_CONFUSIONS = 3
_MOST_NAMED = 12  # unreliable images of a certificate
_STDERRS = 3.0
_STARTS = {"guide": "the guide", "prior": "the prior", "normal": "a normal with the guide's moments"}


# --- A split, and given images ---


def describe_evaluation(found: Evaluation) -> list[str]:
    """An evaluation, line by line."""
    S, n = found.num_particles, found.num_images
    sample = f"  {describe_sample(f'{found.split} split, {n:,} images', found, found.seed)}"
    if found.log_likelihood is None:
        return [
            f"reconstruction log p(x | z(x)) {plus_minus(found.reconstruction)} nats per image: {NOT_A_LOG_LIKELIHOOD}",
            sample,
            "  it has no floor and no entropy: those are for log-likelihoods, which pay for what z says of x",
        ]
    assert S is not None
    assert found.pareto_k is not None
    assert found.ess is not None
    references = f"independent pixels (marginals of the training images) {plus_minus(found.floor)}"
    if found.binarization_entropy is not None:
        references += f"; no model expects above {-found.binarization_entropy:.2f}, the binarization's own entropy"
    lines = [
        f"log-likelihood {plus_minus(found.log_likelihood)} nats per image: the importance-weighted bound L_{S}, "
        "in expectation below log p(x)"
    ]
    if isinstance(found, LabelledEvaluation):
        lines += _describe_classes(found)
    if found.bits_per_dim is not None:
        lines.append(f"  at most {plus_minus(found.bits_per_dim, 4)} bits per dimension, by that bound")
    lines += [
        sample,
        f"  for scale: {references}",
        f"  ELBO (beta = 1) {plus_minus(found.elbo)} = reconstruction {plus_minus(found.reconstruction)} - "
        f"KL {plus_minus(found.kl)}",
    ]
    if S == 1:
        return [*lines, "  one importance sample says nothing of its own error: take more"]
    k = None if found.pareto_k.median is None else round(found.pareto_k.median, 2)
    fitted = "not estimated" if k is None else f"median {k:.2f}"
    trust = ""
    if k is not None and k > 0.7:
        trust = " (above 0.7 is normal for a healthy VAE)"
    if k is not None and k >= _K_WITHOUT_MEAN:
        trust = " (from 1 on the bound cannot be trusted: take more particles, or a certificate)"
    floor = "" if k is not None and k < _K_WITH_VARIANCE else ", as a floor since k-hat is not below 0.5,"
    lines += [
        f"  effective particles: median {format_number(found.ess.median, 1)} of {S:,}; Pareto k-hat: {fitted}{trust}",
        f"  delta method and jackknife see{floor} a Monte Carlo error of {format_number(found.monte_carlo_stderr, 3)} "
        f"and {format_number(found.bias, 3)} nats still lacking",
    ]
    if S >= 10:
        gain = format_number(found.rise, 3)
        lines.append(f"  ten times the particles, S = {S // 10:,} to {S:,}, gained {gain} nats")
    lines.append(f"  unreliable images (jackknife above {UNRELIABLE_BIAS} nats): {found.unreliable_images:,} of {n:,}")
    return lines


def _describe_classifier(accuracy: Estimate | None) -> list[str]:
    return [] if accuracy is None else [f"  the classifier q(y | x) is right for {_percent(accuracy)} of the images"]


def _percent(share: Estimate) -> str:
    """A share in percent with its error.

    >>> _percent(Estimate(0.967, 0.0057))
    '96.70 ± 0.57 %'
    """
    return f"{plus_minus(Estimate(100 * share.mean, 100 * share.stderr))} %"


def _describe_classes(found: LabelledEvaluation) -> list[str]:
    """What the labels say: log p(x | y), and the classifier p(y | x)."""
    K, names = len(found.class_probs), found.class_names
    wrong = [(count, i, j) for i, row in enumerate(found.confusion) for j, count in enumerate(row) if i != j and count]
    name = [names[i] if names else str(i) for i in range(K)]
    confused = []
    for count, i, j in sorted(wrong, key=lambda each: -each[0])[:_MOST_CONFUSIONS]:
        n = sum(found.confusion[i])
        share = Estimate(count / n, math.sqrt(count * (n - count) / n**3))
        confused.append(f"{name[i]} for {name[j]}, {_percent(share)} of {n:,}")
    return [
        f"  log p(x) = log sum_y p(y) p(x | y) over {K} labels, with the known training labels' frequencies p(y)",
        f"  given the right label: log p(x | y) {plus_minus(found.log_likelihood_given_label)}, its ELBO "
        f"{plus_minus(found.elbo_given_label)}",
        f"  the most probable label by p(y | x) = p(y) p(x | y) / p(x) is right for {_percent(found.accuracy)} of the "
        f"images; log p(y | x) {plus_minus(found.log_prob_label, 3)}",
        *_describe_classifier(found.classifier_accuracy),
        *([f"  most often mistaken: {'; '.join(confused)}"] if confused else []),
    ]


def describe_replacement(entry: JsonObject) -> str:
    """The stored evaluation that a new one takes the place of, in one line. A damaged one is replaced as well."""
    words = {"num_images": "images", "num_particles": "particles", "seed": "seed"}
    known = ", ".join(f"{word} {entry[key]}" for key, word in words.items() if entry.get(key) is not None)
    return f"This replaces the stored evaluation ({known})."


def describe_encoding(found: Encoding) -> list[str]:
    """The log p(x) of images, or an autoencoder's log p(x | z(x)), line by line."""
    key = "reconstruction" if found.log_likelihood is None else "log_likelihood"
    estimate, name = getattr(found, key), "reconstruction log p(x | z(x))"
    meaning, lowest = NOT_A_LOG_LIKELIHOOD, "lowest log p(x | z(x)), the worst reconstructed"
    if found.log_likelihood is not None:
        meaning = f"the bound L_{found.num_particles}, in expectation below log p(x)"
        name, lowest = "log-likelihood", "lowest log p(x), perhaps unlike the training images"
    if found.num_images == 1:
        return [f"{name} {estimate.mean:.2f} nats of one image: {meaning}"]
    scores = ", ".join(f"{image.name} {getattr(image, key):.2f}" for image in found.lowest)
    lines = [
        f"{name} {plus_minus(estimate)} nats per image: {meaning}",
        f"  {describe_sample(f'{found.num_images:,} images ({found.images}), seed {found.seed}', found, found.seed)}",
        f"  {lowest}: {scores}",
    ]
    if found.ess is None:
        return lines
    lines.insert(2, f"  effective particles: median {format_number(found.ess.median, 1)} of {found.num_particles:,}")
    return [
        *lines,
        "  That alone does not find outliers: smooth and simple images of another kind can score higher than the "
        "training data's own (Nalisnick et al. 2019, arXiv 1810.09136).",
    ]


def describe_imputation(found: ImputationSummary) -> list[str]:
    """What is missing in images, and the log p of what is not, line by line."""
    n, S, missing, pixels = found.num_images, found.num_particles, found.missing_pixels, found.num_pixels
    lines = [
        f"{missing:,} of {pixels:,} pixels are missing ({missing / pixels:.0%}), in {n:,} images.",
        f"  Without a missing pixel: {found.complete_images:,}, imputed as they are. Without an observed one: "
        f"{found.empty_images:,}, imputed by draws of the model, with log p of 0.",
    ]
    measure = describe_measure(found)
    lines.append(
        f"log p(x_observed) {plus_minus(found.log_likelihood_observed)} nats per image: the bound L_{S}, in "
        f"expectation below it{measure and f'; {measure}'}"
    )
    hidden = found.log_likelihood_hidden
    if hidden is not None:
        lines.append(
            f"log p(x_hidden | x_observed) {plus_minus(hidden.estimate)} nats per image: log p(x) "
            "- log p(x_observed), two such bounds, so no bound; where the second is looser, it flatters"
        )
        impossible = sum(image.log_likelihood_hidden > 0 for image in found.per_image)
        if impossible and found.measure == "mass":
            lines.append(
                f"  Do not use this mean: {impossible:,} of {n:,} images are above 0, where no mass lies, since the "
                "guide's draws miss p(z | x_observed)."
            )
    median = format_number(found.ess.median, 1)
    lines.append(f"  ± is the standard error over images; effective particles: median {median}")
    if found.few_particles:
        single = sum(image.missing_pixels > 0 and image.ess < _ONE_PARTICLE for image in found.per_image)
        lines.append(
            f"  Unreliable: {found.few_particles:,} of {n - found.complete_images:,} images with missing pixels have "
            f"fewer than {FEW_PARTICLES} effective particles of {S:,}. Their draws are nearly alike and show less than "
            "what is possible, and log p(x_observed) may lie above its bound."
        )
        if single:
            lines.append(
                f"  In {single:,} of them, most draws come from a single code: take them as one guess, and not as "
                "what else the missing pixels could be."
            )
        lines.append(
            f"  More particles help: --num-particles {10 * S}. imputations.json has the effective particles (ess) of "
            "each image."
        )
    return lines


# --- A certificate ---


def describe_certificate(found: Certificate) -> list[str]:
    """A certificate, line by line."""
    convergence, lines = found.convergence, [*_describe_bounds(found), *_describe_doubts(found)]
    if (both := found.simulated) is not None:
        lines += [
            f"from both sides, on {both.num_images:,} images that the model made: lower bound "
            f"{plus_minus(both.lower.estimate)}, upper bound {plus_minus(both.upper.estimate)}, a gap of "
            f"{plus_minus(both.gap, 3)} nats per image, the widest {format_number(both.widest_gap, 2)} (bidirectional "
            "Monte Carlo; each bound holds in expectation, so noise can bring a gap below 0)",
            "  The upper bound holds for data simulated from the model, since only there an exact draw of p(z | x) is "
            "known; it says nothing certain about real data.",
        ]
    lines.append(
        f"convergence, bounds by other draws minus that of AIS in full, on {convergence.num_images:,} of the images: "
        f"temperatures {_describe_curve(convergence.temperatures, found.temperatures)}; importance samples "
        f"{_describe_curve(convergence.particles)}"
    )
    if found.gaps is not None:
        lines.append("where log p(x) - ELBO is lost, nats per image (log p(x) by AIS, from below):")
        lines += [
            f"  {split}, {gap.num_images:,} images: {plus_minus(gap.total)} = approximation "
            f"{plus_minus(gap.approximation)} (the guide's family) + amortization {plus_minus(gap.amortization)} "
            "(one network for all images)"
            for split, gap in found.gaps.items()
        ]
    if found.calibration is not None:
        lines.append(f"calibration of the guide on the model's own images: {found.calibration.verdict}")
    if (other := found.against) is not None:
        lines.append(
            f"against {other.dataset}: L_{other.num_particles} {plus_minus(other.other.estimate)} nats per image on "
            f"{other.other.num_images:,} of its test images, {plus_minus(other.own.estimate)} on the run's own"
        )
        lines += [f"  {make_sentence(words)}" for words in other.words]
    stages = sorted(found.stage_seconds.items(), key=lambda each: -each[1])
    return [*lines, ", ".join([f"took {found.seconds:,.0f} s", *(f"{name} {time:,.0f} s" for name, time in stages)])]


def _describe_bounds(found: Certificate) -> list[str]:
    chains, plain, improved, S = found.ais, found.importance, found.improved, found.num_particles
    accepted = chains.acceptance
    share = "none" if accepted.median is None else f"{accepted.median:.0%} ({accepted.q05:.0%} to {accepted.q95:.0%})"
    lines = [
        f"log p(x) {plus_minus(chains.estimate)} nats per image: the bound of annealed importance sampling (AIS), in "
        "expectation below log p(x)",
        f"  {describe_sample(f'{found.split} split, {found.num_images:,} images', found, found.seed)}",
        f"  {found.chains} chains from {_STARTS[found.start]}, {found.temperatures:,} temperatures, {found.leapfrogs} "
        f"leapfrogs: Monte Carlo error {format_number(chains.monte_carlo_stderr, 3)}, and by the jackknife "
        f"{format_number(chains.bias, 3)} nats still lacking, both as floors; accepted {share} of the proposals of the "
        "median image",
        f"  importance sampling with the guide, bound L_{S}: {plus_minus(plain.estimate)}; AIS minus it "
        f"{_describe_difference(found.ais_minus_importance)}",
        f"  with a normal refined for each image, bound L_{S}: {plus_minus(improved.estimate)}; AIS minus it "
        f"{_describe_difference(found.ais_minus_improved)}",
    ]
    if found.total_gap is not None:
        elbo, gap = plus_minus(plain.elbo), plus_minus(found.total_gap)
        lines.append(f"  log p(x) - ELBO, AIS minus the guide's ELBO {elbo}: {gap}")
    return [
        *lines,
        "  estimates, no bounds: with the jackknife's correction these two are "
        f"{plus_minus(plain.corrected_estimate)} and {plus_minus(improved.corrected_estimate)}",
    ]


def _describe_difference(found: Bound) -> str:
    return f"{plus_minus(found.estimate, 3)} (paired; Monte Carlo error {format_number(found.monte_carlo_stderr, 3)})"


def _describe_doubts(found: Certificate) -> list[str]:
    lines, improved, places = [], found.ais_minus_improved, found.unreliable
    if improved.monte_carlo_stderr is not None and improved.mean < -_STDERRS * improved.monte_carlo_stderr:
        lines.append(
            "  importance sampling is above AIS by more than three Monte Carlo errors: the chains are too short; take "
            "more --temperatures, or --start guide"
        )
    named = ", ".join(map(str, places[:_MOST_NAMED]))
    more = f" and {len(places) - _MOST_NAMED} more" if len(places) > _MOST_NAMED else ""
    lines.append(
        f"  unreliable images (AIS and the refined normal more than {UNRELIABLE_BIAS} nats apart, or AIS still lacking "
        f"as much): {len(places):,} of {found.num_images:,}" + (f", at the places {named}{more}" if places else "")
    )
    return lines


def _describe_curve(curve: ConvergenceCurve, full: int | None = None) -> str:
    """The differences by effort; that of the full effort, which is 0, is left out."""
    rows = zip(curve.effort, curve.minus_ais, curve.minus_ais_stderr, strict=True)
    shown = [f"{effort:,}: {plus_minus(Estimate(mean, stderr))}" for effort, mean, stderr in rows if effort != full]
    return ", ".join(shown) or "none"


_HEADER = (
    "run",
    "images",
    "AIS, below log p(x)",
    "AIS - L_S of the guide",
    "AIS - L_S refined",
    "gap on simulated images",
    "log p(x) - ELBO = approximation + amortization",
    "minutes",
)


def certificate_table(rows: Sequence[tuple[str, Certificate, int]]) -> str:
    """Each run's name, certificate and number of threads as a table in Markdown; gaps are of validation images."""
    return markdown_table(_HEADER, [_make_cells(*row) for row in rows])


def _make_cells(run: str, found: Certificate, threads: int) -> list[str]:
    gap = (found.gaps or {}).get("validation")
    parts = [] if gap is None else [plus_minus(each) for each in (gap.total, gap.approximation, gap.amortization)]
    return [
        f"`{run}`",
        f"{found.num_images:,} of {found.split}",
        f"{plus_minus(found.ais.estimate)} (Monte Carlo {format_number(found.ais.monte_carlo_stderr, 3)})",
        plus_minus(found.ais_minus_importance.estimate, 3),
        plus_minus(found.ais_minus_improved.estimate, 3),
        "-" if found.simulated is None else plus_minus(found.simulated.gap, 3),
        "{} = {} + {}".format(*parts) if parts else "-",
        f"{found.seconds / 60:.0f}, {threads} thread{'s' * (threads != 1)}",
    ]
