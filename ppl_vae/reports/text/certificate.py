"""The wording of a certificate: which number is a bound, which an estimate, and how far each can be trusted."""

from __future__ import annotations

from collections.abc import Sequence

from ppl_vae.evidence.estimate import Estimate
from ppl_vae.evidence.importance import UNRELIABLE_BIAS
from ppl_vae.evidence.typicality import Typicality
from ppl_vae.reports.text.evaluation import describe_images_scale, format_number, plus_minus
from ppl_vae.runs.certificates import (
    Bound,
    Certificate,
    ConvergenceCurve,
    SimulatedBounds,
    SplitGap,
)
from ppl_vae.runs.results import Quantiles

_MOST_NAMED = 12  # unreliable images
_STDERRS = 3.0
_STARTS = {"guide": "the guide", "prior": "the prior", "normal": "a normal with the guide's moments"}


def describe_certificate(found: Certificate) -> list[str]:
    """A certificate, line by line."""
    lines = [*_describe_bounds(found), *_describe_doubts(found)]
    if found.simulated is not None:
        lines += _describe_simulated(found.simulated)
    lines.append(_describe_convergence(found))
    if found.gaps is not None:
        lines += _describe_gaps(found.gaps)
    if found.calibration is not None:
        lines.append(f"calibration of the guide on the model's own images: {found.calibration.verdict}")
    if found.against is not None:
        lines += _describe_other(found.against)
    return [*lines, _describe_time(found)]


def _describe_bounds(found: Certificate) -> list[str]:
    chains, plain, improved, S = found.ais, found.importance, found.improved, found.num_particles
    lines = [
        f"log p(x) {plus_minus(chains.estimate)} nats an image: the bound of annealed importance sampling (AIS), in "
        "expectation below log p(x)",
        f"  {found.split} split, {found.num_images:,} images, {describe_images_scale(found, found.seed)}; ± is the "
        "standard error over images",
        f"  {found.chains} chains from {_STARTS[found.start]}, {found.temperatures:,} temperatures, {found.leapfrogs} "
        f"leapfrogs: Monte Carlo error {format_number(chains.monte_carlo_stderr, 3)}, and by the jackknife "
        f"{format_number(chains.bias, 3)} nats still lacking, both as floors; accepted "
        f"{_describe_acceptance(chains.acceptance)}",
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
        f"{plus_minus(plain.corrected_estimate)} and {plus_minus(improved.corrected_estimate)}; with as many other "
        f"draws of the guide, their largest weights smoothed, it is {plus_minus(plain.smoothed_estimate)}",
    ]


def _describe_difference(found: Bound) -> str:
    return f"{plus_minus(found.estimate, 3)} (paired; Monte Carlo error {format_number(found.monte_carlo_stderr, 3)})"


def _describe_acceptance(found: Quantiles) -> str:
    if found.median is None:
        return "no proposals, as there were none"
    return f"{found.median:.0%} of the proposals of the median image ({found.q05:.0%} to {found.q95:.0%})"


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


def _describe_simulated(found: SimulatedBounds) -> list[str]:
    return [
        f"from both sides, on {found.num_images:,} images that the model made: lower bound "
        f"{plus_minus(found.lower.estimate)}, upper bound {plus_minus(found.upper.estimate)}, a gap of "
        f"{plus_minus(found.gap, 3)} nats an image, the widest {format_number(found.widest_gap, 2)} (bidirectional "
        "Monte Carlo; each bound holds in expectation, so noise can bring a gap below 0)",
        "  The upper bound holds for data simulated from the model, since only there an exact draw of p(z | x) is "
        "known; it says nothing certain about real data.",
    ]


def _describe_convergence(found: Certificate) -> str:
    temperatures = _describe_curve(found.convergence.temperatures, found.temperatures)
    return (
        f"convergence, bounds by other draws minus that of AIS in full, on {found.convergence.num_images:,} of the "
        f"images: temperatures {temperatures}; importance samples {_describe_curve(found.convergence.particles)}"
    )


def _describe_curve(curve: ConvergenceCurve, full: int | None = None) -> str:
    """The differences by effort; that of the full effort, which is 0, is left out."""
    rows = zip(curve.effort, curve.minus_ais, curve.minus_ais_stderr, strict=True)
    shown = [f"{effort:,}: {plus_minus(Estimate(mean, stderr))}" for effort, mean, stderr in rows if effort != full]
    return ", ".join(shown) or "none"


def _describe_gaps(gaps: dict[str, SplitGap]) -> list[str]:
    return [
        "where log p(x) - ELBO is lost, nats an image (log p(x) by AIS, from below):",
        *(
            f"  {split}, {found.num_images:,} images: {plus_minus(found.total)} = approximation "
            f"{plus_minus(found.approximation)} (the guide's family) + amortization {plus_minus(found.amortization)} "
            "(one network for all images)"
            for split, found in gaps.items()
        ),
    ]


def _describe_other(found: Typicality) -> list[str]:
    own, other = plus_minus(found.own.estimate), plus_minus(found.other.estimate)
    return [
        f"against {found.dataset}: L_{found.num_particles} {other} nats an image on {found.other.num_images:,} of its "
        f"test images, {own} on the run's own",
        *(f"  {words[:1].upper()}{words[1:]}." for words in found.words),
    ]


def _describe_time(found: Certificate) -> str:
    stages = sorted(found.stage_seconds.items(), key=lambda each: -each[1])
    words = ", ".join(f"{name} {seconds:,.0f} s" for name, seconds in stages if seconds >= 1)
    return f"took {found.seconds:,.0f} s" + (f": {words}" if words else "")


# --- A table of certificates ---

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
    head, *body = (f"| {' | '.join(cells)} |" for cells in (_HEADER, *(_cells(*row) for row in rows)))
    return "\n".join([head, "|" + "---|" * len(_HEADER), *body])


def _cells(run: str, found: Certificate, threads: int) -> list[str]:
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
