"""How it was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ppl_vae.reports.page import Block, Section, Text
from ppl_vae.study.page.source import Source, Study
from ppl_vae.study.page.tables import known_table, mean_cell
from ppl_vae.study.words import count, data_name, listed, number, several


def method_section(source: Source) -> Section:
    """What all runs share, what the errors mean, how long it took, and the data."""
    study, settings = source.study, source.study["settings"]
    seconds, environment = study.get("seconds") or {}, study.get("environment") or {}
    S, n = count(settings["num_particles"]), count(settings["images"])
    base = _base_words(study)
    paragraphs = [
        f"Every run is {base} unless its name says otherwise, trained for {several(settings['epochs'], 'epoch')} "
        f"(residual networks of the collapse section {settings['collapse_epochs']}, stressed runs "
        f"{settings['stress_epochs']} and without a warm-up), and its last weights are kept. beta is a matter of "
        "training alone: every reported number is at beta = 1.",
        f"log p(x) is estimated from below by the importance-weighted bound L_S, with S = {S} samples an image, on {n} "
        "test images drawn at random once. Differences between runs are differences of this bound, not of log p(x). "
        "Where one exceeds what ten times the samples gained, log p(x) is likely to rank the runs so too.",
        "What stands behind ± is one standard error over images, and says nothing of what another training would give. "
        "Between two bounds on the same images, the words better, worse and not distinguishable follow a 95% interval "
        "that is corrected for the number of comparisons of its table. All other words of more and less ask for two "
        "standard errors, not corrected (three between the most and the fewest of many), of the paired difference "
        "where it is known and else as if both were independent. What cannot be told apart is not thereby equal.",
        "Peaks along beta are chosen on the test images that they are reported on, which favors them a little.",
        _seed_words(settings),
        "What is not shown: other data, other priors and guides, longer training. A bound that has not settled is "
        "marked, and of its peak nothing is claimed for log p(x).",
    ]
    if seconds:
        parts = [f"{number(value / 60, 2)} minutes of {name}" for name, value in seconds.items() if value]
        where = environment.get("device") or "one computer"
        threads = environment.get("threads")
        paragraphs.append(
            f"It took {listed(parts)} on {where}" + (f" with {several(threads, 'thread')}." if threads else ".")
            if parts
            else ""
        )
    blocks: list[Block] = [Text("\n\n".join(p for p in paragraphs if p))]
    rows = [
        [
            data_name(word),
            entry.get("description"),
            entry.get("train"),
            entry.get("validation"),
            entry.get("test"),
            mean_cell(entry.get("floor")),
        ]
        for word, entry in (study.get("data") or {}).items()
    ]
    caption = "The data. Floor: the log-likelihood of each pixel on its own, without latents, on the same test images."
    blocks += known_table(["data", "what it is", "train", "validation", "test", "floor, nats"], rows, caption)
    return Section("How it was measured", blocks, anchor="method")


def _base_words(study: Study) -> str:
    """The run at beta = 1 of the first data set, in words."""
    part = (study.get("sweep") or {}).get(study["datasets"][0]) or {}
    options = (study["runs"].get(part.get("reference")) or {}).get("options")
    if not options:
        return "the same network"
    return (
        f"a {options['network']} network with {count(options['latent_dim'])} latents, a {options['likelihood']} "
        f"likelihood, {several(options['warmup_epochs'], 'epoch')} of warm-up"
    )


def _seed_words(settings: Mapping[str, Any]) -> str:
    seeds = settings.get("seeds") or ()
    if not seeds:
        return "Each run was trained once, with one seed, and another seed may order close ones differently."
    return (
        f"Each run was trained with one seed, those at beta = {listed(list(settings['close_betas']))} of the first "
        f"data set with {several(len(seeds) + 1, 'seed')}; how far these agree is said with the peaks."
    )
