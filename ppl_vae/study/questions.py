"""The study's questions: for each its figures, one table, and a fixed paragraph that says how to read them.

No sentence depends on a number. What the runs showed is in the tables, with errors; a comparison that can go either way
is read off its row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ppl_vae.reports.page import Block, Picture, Section, Slider, SliderStop, Text
from ppl_vae.study._cells import (
    format_difference,
    format_mean,
    format_number,
    format_share,
    make_table,
    name_data,
    stack_strips,
)
from ppl_vae.study.figures import Drawn

Study = Mapping[str, Any]
Row = Mapping[str, Any]

AVERAGING = """\
A loss that is averaged over the D pixels instead of summed divides the reconstruction term by D and leaves the KL as it
is: it is the objective of beta = D, even with beta set to one. A linear decoder near collapse keeps a direction of the
data only if its eigenvalue, in units of the likelihood's noise, is above beta (Lucas et al. 2019; Dai et al. 2020). The
table compares this prediction, made before any training, with what each training showed: *directions above* is the
prediction, *active* what came, and *as predicted* says whether a run collapsed exactly where no direction is above the
threshold. The rows of the mean and of beta = D should agree, since their objectives differ by a factor alone."""

REGULARIZER = """\
The KL term is a price on information: each nat that a code tells about its image costs beta nats, and pays only if it
earns more than that in the reconstruction. Along beta the rate (the KL) falls and the distortion (minus the
reconstruction term) rises. The price is the same for all latents, so those that would earn least go first: see how the
number of *active* latents falls. *Implied beta* is read off the finished weights, at which no small change of the
guide's scales pays; where training has converged it equals the beta that was set.

**Where does the likelihood peak?** Nothing makes beta = 1 best for log p(x): it maximizes a bound with a gap that
depends on the guide, on training images, in a training that ends. Read the column of differences to beta = 1: they are
paired on the same test images. "Not distinguishable" means that the 95% interval, corrected for the number of
comparisons, contains zero. A star marks an estimate that has not settled: with more importance samples it may still
rise, so log p(x) itself may be higher there. Peaks are chosen on the test images that they are reported on, from one
training for each beta; the second table shows how much another seed changes."""

COLLAPSE = """\
Early in training the decoder has not learned to use its latents, and the KL pushes them to the prior before it does. A
warm-up lowers the price at the beginning; free bits make the first nats of each latent free. Free bits count latents as
active nearly by construction, so look at the bound L_S as well as at the number of active latents."""

BLUR = """\
What is shown as a reconstruction is a mean of all images that the decoder holds possible for a code; a mean of sharp
images that differ is not sharp. **Why a VAE blurs:** the guide's noise makes several images share a code, and the error
of one reconstruction splits exactly into that *posterior noise* and the error that is left without it. **Why an
autoencoder blurs:** it has no noise, but a short code still leaves open which image it was: the table of latents shows
how sharpness grows with their number, and with two latents its reconstruction is close to the mean of the training
images whose codes are nearest. Power above one is noise, not detail: it comes from binary inputs.

**Samples.** The autoencoder was never trained with a prior, so decoding N(0, I) judges it unfairly. The columns
*fitted* give each model a density that is fitted to its codes afterwards, which is the fair comparison. Fréchet
distances are in principal components of the training images; the row *other real images* is what real images would
have."""

CHECK = """\
The regularization worked if codes of test images, one sample each, look like samples of the prior, and still say
something about the images. The first is measured by a Kolmogorov-Smirnov distance for each latent, by a classifier
between codes and prior samples (effect 0: alike, 1: always told apart) and by holes (prior samples that the codes cover
less than all but one percent of other images' codes; one percent is expected by chance). The second is the mutual
information, which cannot exceed the logarithm of the number of images. Codes can match the prior because they are
empty: read both together. The autoencoder was never asked to match anything."""

NETWORKS = """\
All networks are trained for the same epochs, so a slower one has had more time. Differences to the base are paired on
the same test images; their errors say nothing about what another seed would give. Numbers beside points are latents."""

SCALE_MAPS = """\
The encoder's output h must become a positive scale. The first table stretches h by hand at initialization and shows the
gradient that reaches it: a good map keeps it neither huge nor broken. The second trains once with each map under
stress: ten times the learning rate, no warm-up and no clipping."""

EXPLORE = """\
Two latents are few, but they can be seen whole. Each point is a test image, where the encoder puts it; the picture is
what the decoder makes of the place under the pointer. The network itself runs in this page. Between the classes of a
VAE the decoder may draw what is neither; between the codes of an autoencoder it was never trained."""


class Source(NamedTuple):
    """What the sections are made of: ``study.json``, the study's folder, and its figures by name."""

    study: Study
    folder: Path
    drawn: Mapping[str, Drawn]

    def parts(self, section: str) -> dict[str, Any]:
        """A section of study.json by data set, as far as it is there."""
        found = self.study.get(section) or {}
        return {word: found[word] for word in self.study["datasets"] if found.get(word)}

    def figure(self, name: str, caption: str, alt: str) -> list[Block]:
        """A figure, where there is one."""
        if name not in self.drawn:
            return []
        return [Picture(self.drawn[name].light, caption, alt, dark_png=self.drawn[name].dark)]

    def picture(self, path: str | None) -> bytes | None:
        """The bytes of a picture file of the study."""
        place = None if path is None else self.folder / path
        return place.read_bytes() if place is not None and place.is_file() else None

    def run_picture(self, run: str | None, name: str) -> bytes | None:
        """A run's picture by its name."""
        record = self.study["runs"].get(run) or {}
        return self.picture((record.get("pictures") or {}).get(name))

    def originals(self, dataset: str) -> bytes | None:
        """The test images of a data set that are shown."""
        return self.picture(((self.study.get("data") or {}).get(dataset) or {}).get("originals"))


def explain_averaging(source: Source) -> Section:
    """What does averaging over pixels do?"""
    blocks: list[Block] = [Text(AVERAGING)]
    blocks += source.figure(
        "spectrum",
        "Eigenvalues of the training images' covariance, in units of the likelihood's noise, with the thresholds of a "
        "sum and of a mean. A direction above a threshold is kept.",
        "Eigenvalues by rank on logarithmic axes, with the thresholds of sum and mean",
    )
    blocks += source.figure(
        "active",
        "Active latents along beta, measured and predicted; the cross is the mean over pixels, at the beta that it "
        "amounts to.",
        "Active latents against beta, measured and predicted",
    )
    reductions = {"sum": "the sum", "mean": "the mean", "beta-of-mean": "the sum with beta = D"}
    rows = []
    for dataset, part in source.parts("mean").items():
        by_word = {row["condition"]: row for row in part["conditions"]}
        named = [("test images", source.originals(dataset))] + [
            (words, source.run_picture((by_word.get(word) or {}).get("run"), "reconstructions"))
            for word, words in reductions.items()
        ]
        blocks += stack_strips(named, f"{name_data(dataset)}: same network, same training.", "Reconstructions")
        seen: set[str] = set()
        for row in sorted(part["conditions"], key=lambda row: row["condition"] == "beta"):
            if row["run"] in seen:  # the sum is a run of the sweep, too
                continue
            seen.add(row["run"])
            rows.append(
                [
                    name_data(dataset),
                    row["reduction"],
                    f"{row['beta']:g}",
                    format_number(row["threshold"]),
                    row["predicted_live"],
                    row["active"],
                    format_share(row["variation"]),
                    format_mean(row["kl"]),
                    format_mean(row["reconstruction"]),
                    {True: "yes", False: "no", None: None}[row["as_predicted"]],
                ]
            )
    columns = ["data", "pixels", "beta", "threshold", "directions above", "active", "variation", "KL"]
    blocks += make_table(
        [*columns, "reconstruction", "as predicted"],
        rows,
        "Nats per image. Variation: how much reconstructions differ between images, relative to the images themselves; "
        "at zero they are all one picture.",
    )
    return Section("What does averaging over pixels do?", blocks if rows else [], anchor="averaging")


def explain_beta(source: Source) -> Section:
    """Why is the regularizer troublesome, and where does the likelihood peak along beta?"""
    parts = source.parts("sweep")
    blocks: list[Block] = [Text(REGULARIZER)]
    for dataset, part in parts.items():
        blocks += _make_slider(source, dataset, part["rows"])
    blocks += source.figure(
        "rate-distortion",
        "Each point is a model, with its beta. The sum of both axes is minus the ELBO: all points of the dotted line "
        "have the best one.",
        "Distortion against rate along beta",
    )
    blocks += source.figure(
        "bounds",
        "Differences of L_S and of the ELBO to beta = 1 on the same test images, with standard errors. Small dots are "
        "further seeds; hollow marks are estimates that have not settled.",
        "Differences of L_S and ELBO to beta = 1, along beta",
    )
    rows, seeds = [], []
    for dataset, part in parts.items():
        for row in part["rows"]:
            rows.append(
                [
                    name_data(dataset),
                    f"{row['beta']:g}" + ("" if row["reliable"] is not False else " *"),
                    format_mean(row["rate"]),
                    format_mean(row["distortion"]),
                    format_mean(row["elbo"]),
                    format_mean(row["log_likelihood"]),
                    format_difference(row["difference_elbo"]),
                    format_difference(row["difference_log_likelihood"]),
                    format_mean(row["gap"]),
                    row["active"],
                    format_mean(row.get("implied_beta")),
                ]
            )
        for entry in part.get("seeds") or ():
            for bound, name in (("log_likelihood", "L_S"), ("elbo", "ELBO")):
                values = ", ".join(f"{value:.2f}" for value in entry[bound]["values"])
                seeds.append(
                    [name_data(dataset), f"{entry['beta']:g}", name, values, format_number(entry[bound]["spread"])]
                )
    columns = ["data", "beta", "rate", "distortion", "ELBO", "L_S", "ELBO - that of beta = 1"]
    blocks += make_table(
        [*columns, "L_S - that of beta = 1", "L_S - ELBO", "active", "implied beta"],
        rows,
        "Nats per image ± standard error over images. L_S is the importance-weighted bound on log p(x).",
    )
    blocks += make_table(
        ["data", "beta", "bound", "by seed", "spread"], seeds, "The same bounds for several seeds, nats per image."
    )
    return Section("Why is the regularizer troublesome?", blocks if rows else [], anchor="beta")


def _make_slider(source: Source, dataset: str, rows: Sequence[Row]) -> list[Block]:
    """Reconstructions and samples along beta."""
    stops = []
    for row in rows:
        pictures = [(name, source.run_picture(row["run"], name)) for name in ("reconstructions", "samples")]
        known = [(name, png) for name, png in pictures if png is not None]
        numbers = {
            "L_S, nats": format_mean(row["log_likelihood"]) or "–",
            "rate, nats": format_mean(row["rate"]) or "–",
            "distortion, nats": format_mean(row["distortion"]) or "–",
            "active latents": "–" if row["active"] is None else str(row["active"]),
        }
        if len(known) == len(pictures):
            stops.append(SliderStop(f"{row['beta']:g}", known, numbers))
    originals = source.originals(dataset)
    if not stops or originals is None:
        return []
    labels = [stop.label for stop in stops]
    caption = (
        f"{name_data(dataset)}. Move beta and compare both rows with the test images: where are reconstructions exact, "
        "where are samples of the prior like the data, and from where on are all pictures the same?"
    )
    start = labels.index("1") if "1" in labels else len(labels) // 2
    return [Slider("beta", stops, caption, fixed=("test images", originals), start=start)]


def explain_collapse(source: Source) -> Section:
    """What helps against posterior collapse?"""
    part = source.study.get("collapse") or {}
    rows = [
        [
            network,
            row["remedy"],
            row["active"],
            format_mean(row["kl"]),
            format_mean(row["elbo"]),
            format_mean(row["log_likelihood"]),
            format_difference(row["difference_log_likelihood"]),
        ]
        for network, found in (part.get("networks") or {}).items()
        for row in found["rows"]
    ]
    blocks: list[Block] = [Text(COLLAPSE)]
    blocks += source.figure(
        "remedies", "Active latents after the same training.", "Bars of active latents by network and remedy"
    )
    columns = ["network", "remedy", "active", "KL", "ELBO", "L_S", "L_S - that of none"]
    blocks += make_table(columns, rows, "Nats per image; differences are paired.")
    return Section("What helps against collapse?", blocks if rows else [], anchor="collapse")


def explain_blur(source: Source) -> Section:
    """Why do VAEs blur, and autoencoders too?"""
    parts = source.parts("autoencoder")
    blocks: list[Block] = [Text(BLUR)]
    for dataset, part in parts.items():
        runs = {key: (part.get(key) or {}).get("run") for key in ("vae", "autoencoder")}
        for what, name, hint in (
            ("Reconstructions", "reconstructions", "look at edges and thin strokes."),
            ("Samples", "samples", "which of them could be data?"),
            ("Samples of a fitted density", "fitted_samples", "the same, from a density fitted to the codes."),
            ("Interpolations", "interpolations", "straight lines between two codes; look at the middle."),
        ):
            named = [(f"the {key}", source.run_picture(run, name)) for key, run in runs.items()]
            if name == "reconstructions":
                named.insert(0, ("test images", source.originals(dataset)))
            blocks += stack_strips(named, f"{name_data(dataset)}: {hint}", what)
    blocks += source.figure(
        "sharpness",
        "Left: high-frequency power of reconstructions; the test images have one. Right: Fréchet distance between "
        "decoded samples and test images; the line is what other real images have.",
        "Bars of sharpness and of samples' distance",
    )
    blocks += source.figure(
        "blur",
        "The squared error of one sampled reconstruction in parts that add up: the error of an autoencoder with as "
        "many latents, the noise of the posterior, and the rest.",
        "Stacked bars of the parts of the error",
    )
    blocks += _tabulate_quality(parts) + _tabulate_error(parts)
    return Section("Why do VAEs blur, and autoencoders too?", blocks if parts else [], anchor="blur")


def _tabulate_quality(parts: Mapping[str, Any]) -> list[Block]:
    rows: list[list[Any]] = []
    for dataset, part in parts.items():
        for key in ("vae", "autoencoder"):
            found = part.get(key) or {}
            samples, fitted = found.get("samples") or {}, found.get("fitted_samples") or {}
            rows.append(
                [
                    name_data(dataset),
                    key,
                    format_mean(found.get("reconstruction")),
                    format_mean(found.get("sharpness")),
                    format_mean(found.get("squared_error")),
                    format_mean(samples.get("frechet")),
                    format_mean(samples.get("classifier")),
                    format_mean(fitted.get("frechet")),
                    format_mean(fitted.get("classifier")),
                ]
            )
        binarized, floor = part.get("binarized") or {}, part.get("floor") or {}
        if binarized:
            cells = [format_mean(binarized.get("sharpness")), format_mean(binarized.get("error"))]
            rows.append([name_data(dataset), "the binary image itself", None, *cells, None, None, None, None])
        cells = [format_mean(floor.get("sharpness")), None, format_mean(floor.get("frechet"))]
        rows.append(
            [name_data(dataset), "other real images", None, *cells, format_mean(floor.get("classifier")), None, None]
        )
    columns = ["data", "model", "reconstruction, nats", "power", "squared error", "samples: Fréchet"]
    return make_table(
        [*columns, "samples: classifier", "fitted: Fréchet", "fitted: classifier"],
        rows,
        "The autoencoder's nats are log p(x | z(x)), never a log-likelihood. Classifier: 0 where samples cannot be "
        "told from real images, 1 where they always can.",
    )


def _tabulate_error(parts: Mapping[str, Any]) -> list[Block]:
    rows = [
        [
            "autoencoder" if row["posterior"] == "delta" else "VAE",
            row["latent_dim"],
            format_mean(row.get("sharpness")),
            format_mean(row.get("error")),
            format_mean(row.get("posterior_noise")),
            format_mean(row.get("bias")),
        ]
        for part in parts.values()
        for row in part.get("latents") or ()
    ]
    columns = ["model", "latents", "power", "squared error", "posterior noise", "the rest"]
    return make_table(columns, rows, "Sharpness and squared error per pixel by the number of latents.")


def explain_check(source: Source) -> Section:
    """How do I check that the regularization worked?"""
    parts = source.parts("regularization")
    blocks: list[Block] = [Text(CHECK)]
    blocks += source.figure(
        "aggregate",
        "Four measures of codes against the prior along beta; dashed: the autoencoder. The first three should be low, "
        "and the last should not be zero.",
        "Four measures of codes against prior, along beta",
    )
    rows = []
    for dataset, part in parts.items():
        reference = ((source.study.get("sweep") or {}).get(dataset) or {}).get("reference")
        holes = source.run_picture(reference, "holes")
        if holes is not None:
            caption = (
                f"{name_data(dataset)}, beta = 1: above, the prior samples that the codes cover least; below, ordinary "
                "ones."
            )
            blocks.append(Picture(holes, caption, "Decoded prior samples: holes and ordinary ones", dark_png=holes))
        for row in part["rows"]:
            moments, distance = row.get("moments") or {}, row.get("kolmogorov_smirnov") or {}
            information = format_mean(row.get("mutual_information"))
            rows.append(
                [
                    name_data(dataset),
                    "autoencoder" if row["autoencoder"] else f"{row['beta']:g}",
                    row["active"],
                    format_number((moments.get("mean") or {}).get("max")),
                    format_number((moments.get("log_scale") or {}).get("max")),
                    format_number(distance.get("max")),
                    distance.get("rejected"),
                    format_mean((row.get("classifier") or {}).get("effect")),
                    format_share(row.get("holes")),
                    f"{information} (cap)" if information and row.get("saturated") else information,
                    format_mean(row.get("marginal_kl")),
                ]
            )
    columns = ["data", "beta", "active", "largest |mean|", "largest |log scale|", "largest KS", "rejected"]
    blocks += make_table(
        [*columns, "classifier", "holes", "mutual information", "KL to prior"],
        rows,
        "Means and scales in scales of the prior. Rejected: latents whose Kolmogorov-Smirnov test rejects at 5%, "
        "corrected for their number. The last two columns add up to the mean KL, nats.",
    )
    return Section("How do I check that the regularization worked?", blocks if rows else [], anchor="check")


def explain_networks(source: Source) -> Section:
    """Which network, and how many latents?"""
    part = source.study.get("architectures") or {}
    rows = [
        [
            row["network"],
            row["latent_dim"],
            row["active"],
            row["parameters"],
            format_number(row["seconds"]),
            format_mean(row["elbo"]),
            format_mean(row["log_likelihood"]),
            format_difference(row["difference_log_likelihood"]),
        ]
        for row in part.get("rows", ())
    ]
    blocks: list[Block] = [Text(NETWORKS)]
    blocks += source.figure(
        "architectures", "L_S by latents, seconds of training and weights.", "L_S against latents, seconds and weights"
    )
    columns = ["network", "latents", "active", "weights", "seconds", "ELBO", "L_S", "L_S - that of the base"]
    places = [k for k, row in enumerate(part.get("rows", ())) if row["varied"] == "base"]
    blocks += make_table(columns, rows, "Nats per image; the marked row is the base.", places)
    return Section("Which network, and how many latents?", blocks if rows else [], anchor="networks")


def explain_scale_maps(source: Source) -> Section:
    """Does it matter how the guide's scales are kept positive?"""
    part = source.study.get("scale_maps") or {}

    def norm(row: Row) -> str | None:
        value = row.get("gradient_norm")
        return format_mean(value) if isinstance(value, Mapping) else format_number(value)

    gradients = [
        [
            row["scale_map"],
            format_number(row["largest_feature"]),
            norm(row),
            format_number(row["not_finite"]),
            norm(row.get("sampled") or {}),
            format_number((row.get("sampled") or {}).get("not_finite")),
            format_number(row.get("largest_scale")),
        ]
        for row in part.get("gradients") or ()
    ]
    stressed = [
        [
            row["scale_map"],
            "yes" if row["finished"] else f"no, in {row.get('failure_phase') or 'training'}",
            None if row.get("step") is None else f"{row['step']:,} of {row['num_steps']:,}",
            format_mean(row.get("elbo")),
            row.get("failure"),
        ]
        for row in part.get("stressed") or ()
    ]
    blocks: list[Block] = [Text(SCALE_MAPS)]
    blocks += source.figure(
        "scale-maps",
        "Gradient norm, and share of images with a broken gradient, against the largest feature. Solid: KL in closed "
        "form; dashed: sampled KL.",
        "Gradient norm and share of broken gradients against the largest feature",
    )
    columns = ["map", "largest feature", "gradient norm", "share NaN", "gradient norm, sampled KL"]
    blocks += make_table(
        [*columns, "share NaN, sampled KL", "largest scale"], gradients, "At initialization, nats per unit of h."
    )
    blocks += make_table(["map", "finished", "last step", "ELBO", "message"], stressed, "Training under stress.")
    return Section("Does the scale map matter?", blocks if gradients or stressed else [], anchor="scale-maps")


def explain_method(source: Source) -> Section:
    """How was it measured?"""
    study, settings = source.study, source.study["settings"]
    seconds, environment = study.get("seconds") or {}, study.get("environment") or {}
    text = f"""\
Every run is the same plain VAE unless its name says otherwise, trained for {settings["epochs"]} epochs. Its last
weights are kept. beta is a matter of training alone: every reported number is at beta = 1. log p(x) is estimated
from below by the importance-weighted bound L_S with S = {settings["num_particles"]:,} samples per image, on
{settings["images"]:,} fixed random test images. Runs are ranked by log p(x)
only where their difference in L_S exceeds what either may still gain with more samples.

± is one standard error over images; it says nothing about what another training would give. Differences between bounds
on the same images are paired, with 95% intervals that are corrected for the number of comparisons in their table."""
    minutes = ", ".join(f"{value / 60:.3g} minutes of {name}" for name, value in seconds.items() if value)
    if minutes:
        text += f"\n\nIt took {minutes} on {environment.get('device') or 'one computer'}."
    rows = [
        [
            name_data(word),
            entry.get("description"),
            entry.get("train"),
            entry.get("validation"),
            entry.get("test"),
            format_mean(entry.get("floor")),
        ]
        for word, entry in (study.get("data") or {}).items()
    ]
    caption = "Floor: the log-likelihood of each pixel on its own, without latents, on the same test images, in nats."
    table = make_table(["data", "what it is", "train", "validation", "test", "floor"], rows, caption)
    return Section("How was it measured?", [Text(text), *table], anchor="method")
