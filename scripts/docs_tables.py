"""The tables of README.md and docs/, each made from stored results or from the program's own tables.

A page holds a table between the lines ``<!-- table: NAME -->`` and ``<!-- end -->``; NAME is a key of ``TABLES``.
"""

import json
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from benchmark import CAPTURED, COMPILED, REFERENCE, likelihood_table, table

from ppl_vae.commands.cli import build_parser, iterate_fields
from ppl_vae.commands.options import COMMANDS
from ppl_vae.evidence.estimate import Estimate
from ppl_vae.parts.registry import NETWORKS, OBJECTIVES, POSTERIORS, PRIORS
from ppl_vae.reports.text import markdown_table as markdown
from ppl_vae.reports.text import plus_minus
from ppl_vae.reports.text.comparison import reproduction_table, seeds_table
from ppl_vae.reports.text.compression import compression_table
from ppl_vae.reports.text.diagnosis import describe_numbers, describe_verdicts
from ppl_vae.reports.text.evaluation import certificate_table, describe_evaluation
from ppl_vae.runs.certificates import read_certificates
from ppl_vae.runs.command_results import Compression
from ppl_vae.runs.options import format_flag
from ppl_vae.runs.recipes import Reproduction, read_reproductions
from ppl_vae.runs.results import Diagnosis, Evaluation, from_json, read_entry

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "scripts" / "results"
BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.S)


def refresh(text: str) -> str:
    """The text of a page with every marked block made anew.

    Raises:
        ValueError: a block names no table.
    """

    def fill(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"expected a table among {', '.join(TABLES)}, got {match[2]!r}")
        return f"{match[1]}\n{TABLES[match[2]]()}\n\n{match[4]}"

    return BLOCK.sub(fill, text)


def pages() -> list[Path]:
    """README.md, CONTRIBUTING.md and every page of the manual."""
    manual = (path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(manual)]


def stored(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def mean(value: dict[str, float], decimals: int = 2) -> str:
    return plus_minus(Estimate(value["mean"], value["stderr"]), decimals)


def code(lines: Sequence[str]) -> str:
    return "\n".join(["```text", *lines, "```"])


# --- Measured numbers ---


def default_run() -> str:
    return code(describe_evaluation(from_json(Evaluation, stored("default_run")["test"])))


def labels() -> str:
    return code(describe_evaluation(read_entry(stored("labels")["test"])))


def diagnosis() -> str:
    found = from_json(Diagnosis, stored("diagnosis"))
    return code([*describe_numbers(found.numbers), *describe_verdicts(found.verdicts)])


def likelihoods() -> str:
    rows = []
    for row in stored("likelihoods")["rows"]:
        behind = row["difference_bits_per_dim"]
        nats = row["log_likelihood"]
        rows.append(
            [
                f"`{row['likelihood']}`",
                row["kind"],
                mean(row["bits_per_dim"], 3),
                "" if behind is None else f"{behind['mean']:+.3f} ± {behind['stderr']:.3f}",
                f"{nats['mean']:,.1f} ± {nats['stderr']:.1f}",
                f"{row['reconstruction']['mean']:,.1f}",
                f"{row['kl']['mean']:.1f}",
                f"{row['floor_bits_per_dim']:.3f}",
                f"{row['calibration']['above_90_percent_quantile']['mean']:.0%}",
                f"{row['seconds']:,.0f}",
            ]
        )
    header = ["likelihood", "kind", "bits per dim", "behind the first", "log P", "reconstruction", "KL"]
    return markdown([*header, "baseline, bits", "> 90%", "training, s"], rows)


def likelihood_steps() -> str:
    return "\n".join(likelihood_table(stored("likelihood_steps")["likelihoods"]))


def compression() -> str:
    return compression_table([from_json(Compression, row) for row in stored("compression")])


def networks() -> str:
    header = ["network", "weights", "s / epoch", "epochs", "log p(x), L_100", "ELBO"]
    return markdown(
        header,
        [
            [
                f"`{row['network']}`",
                f"{row['weights']:,}",
                f"{row['seconds_an_epoch']:.1f}",
                str(row["epochs"]),
                mean(row["log_likelihood"]),
                f"{row['elbo']['mean']:.2f}",
            ]
            for row in stored("networks")["rows"]
        ],
    )


def imputation() -> str:
    tables = stored("imputation")["tables"]
    methods = [row["method"] for row in next(iter(tables.values()))["rows"]]
    rows = [[method] for method in methods]
    for compared in tables.values():
        for row, found in zip(rows, compared["rows"], strict=True):
            row.append(mean(found, 3))
    columns = [f"{name.replace('_', ' ')}, {t['num_rows']} x {t['num_columns']}" for name, t in tables.items()]
    return markdown(["method", *columns], rows)


def missing_mnist() -> str:
    found = stored("imputation")["mnist"]
    rows = [
        [row["trained_on"], f"{row['seconds']:,.0f}", mean(row["complete"]), mean(row["half"])] for row in found["rows"]
    ]
    rows.append(["difference, paired", "", *(mean(found["difference"][kind]) for kind in ("complete", "half"))])
    return markdown(["trained on", "seconds", "complete test images", "half of their pixels"], rows)


def quadrants() -> str:
    found = stored("quadrants")["rows"]
    rows = [
        [given, mean(row["negative_log_likelihood"]), mean(row["change"]), f"{row['published']:.1f}"]
        for given, row in found.items()
    ]
    return markdown(["quadrants given", "this VAE", "rise from 100 to 1,000 particles", "Pyro's CVAE"], rows)


_PYRO_M2 = {100: "93.19", 600: "94.37", 1000: "94.87", 3000: "95.82"}  # percent, ss_vae_M2's tutorial


def few_labels() -> str:
    rows = []
    for row in stored("few_labels")["rows"]:
        numbers = [mean(_percent(row[name])) for name in ("classifier", "density", "supervised")]
        is_plain = row["consistency"] == 0
        rows.append(
            [
                f"{row['labels']:,}" + ", plain M2" * is_plain,
                *numbers,
                "" if is_plain else _PYRO_M2.get(row["labels"], ""),
                mean(row["log_likelihood"]),
                f"{row['seconds']['mean'] / 60:.1f}",
            ]
        )
    header = ["labels", "q(y given x)", "p(y given x)", "supervised", "Pyro's example", "log p(x), L_50", "minutes"]
    return markdown(header, rows)


def _percent(found: dict[str, Any]) -> dict[str, Any]:
    return found | {name: found[name] and 100 * found[name] for name in ("mean", "stderr")}


def fifteen_minutes() -> str:
    rows = []
    for dataset, found in stored("fifteen_minutes").items():
        for network, row in found["networks"].items():
            test = row["test"]
            rows.append(
                [
                    dataset,
                    f"`{network}`",
                    str(row["epochs"]),
                    f"{row['seconds'] / 60:.1f}",
                    mean(test["log_likelihood"]),
                    mean(test["elbo"]),
                    f"{test['floor']['mean']:.2f}",
                ]
            )
    header = ["data", "network", "epochs", "minutes", "log p(x), L_500", "ELBO", "independent pixels"]
    return markdown(header, rows)


def overfitting() -> str:
    rows = []
    for row in stored("overfitting")["rows"]:
        cells = [mean(row["log_likelihood"]), f"{row['train_log_likelihood']['mean']:.2f}", ""]
        if "difference" in row:
            cells[-1] = f"{row['difference']['mean']:+.2f} ± {row['difference']['stderr']:.2f}"
        options = f"`{row['change']}`" if row["change"].startswith("--") else row["change"]
        rows.append([("+ " if row["baseline"] else "") + options, f"{row['best_epoch']} of {row['epochs']}", *cells])
    return markdown(["options", "best epoch", "validation, L_200", "training, L_200", "difference"], rows)


def reproductions() -> list[Reproduction]:
    return read_reproductions(RESULTS / "reproductions.json")


def published_ours() -> str:
    """The program's own table without the column of numbers in print, which ``published_in_print`` has once."""
    head, _, *lines = (line.strip("| ").split(" | ") for line in reproduction_table(reproductions()).splitlines())
    kept = [k for k, name in enumerate(head) if name != "published"]
    names = {"rise": "tenfold gain", "L_S, S = 5,000": "L_5000"}
    return markdown([names.get(head[k], head[k]) for k in kept], [[cells[k] for k in kept] for cells in lines])


def published_in_print() -> str:
    found: dict[str, dict[str, None]] = {}
    for row in reproductions():
        for number in row.published:
            error = "" if number.stderr is None else f" ± {number.stderr:.2f}"
            cells = f"{number.log_likelihood:.2f}{error} | {number.source}"
            found.setdefault(cells, {})[f"`{row.recipe}`"] = None
    rows = [[cells, ", ".join(names)] for cells, names in found.items()]
    return markdown(["in print", "source", "compare with"], rows)


def published_seeds() -> str:
    return seeds_table(reproductions())


def published_short() -> str:
    """For README: one line per recipe, the mean over its seeds, and the nearest comparison in print."""
    what = {
        "iwae_vae_1": "one tanh layer of 50 latents, k = 1",
        "iwae_1": "the same, then the bound L_16",
        "vae_gaussian": "dense, N(0, I) prior",
        "vae_flow": "the same with a flow prior",
        "conv_flow": "convolutions, flow prior",
        "ladder": "ladder of two layers of latents",
        "static_flow": "flow prior, static MNIST",
    }
    groups: dict[str, list[Reproduction]] = {}
    for row in reproductions():
        groups.setdefault(row.recipe, []).append(row)
    rows = []
    for recipe, words in what.items():
        found = groups[recipe]
        number = found[0].published[0]
        error = "" if number.stderr is None else f" ± {number.stderr:.2f}"
        name, _, source = number.source.partition(": ")
        rows.append(
            [
                words,
                f"{statistics.mean(row.ours.mean for row in found):.2f} ± {found[0].ours.stderr:.2f}",
                str(len(found)),
                f"{number.log_likelihood:.2f}{error}: {name}, {source.split(',')[0]}",
            ]
        )
    return markdown(["model", "here, L_5000", "seeds", "in print"], rows)


def certificates() -> str:
    rows = read_certificates(RESULTS / "certificates.json")
    return certificate_table([(row.run, row, row.environment["threads"]) for row in rows])


def speed_training() -> str:
    return "\n".join(table("training", stored("benchmark")["training"], "ratio"))


def speed_short() -> str:
    """For README: six ways to take the step."""
    names = [REFERENCE, COMPILED, CAPTURED, "NumPyro, fori_loop", "NumPyro, jitted steps", "Pyro's example loop"]
    found = stored("benchmark")["training"]
    kept = {model: {name: records[name] for name in names if name in records} for model, records in found.items()}
    return "\n".join(table("training", kept, "ratio"))


def speed_compiling() -> str:
    """Seconds to the end of the first step: with an empty cache, and with a filled one in brackets."""
    found = stored("benchmark")["training"]
    rows = []
    for name in (COMPILED, CAPTURED):
        records = [found[model].get(name) for model in found]
        rows.append(
            [name, *(f"{r['first_seconds']:.1f} ({r['first_again_seconds']:.1f})" if r else "–" for r in records)]
        )
    return markdown(["first step", *found], rows)


def first_minute() -> str:
    """Seconds of each stage of the default run with one epoch."""
    empty, filled = stored("benchmark")["first_minute"]
    rows = [[stage, f"{seconds:.1f}", f"{filled[stage]:.1f}"] for stage, seconds in empty.items()]
    rows.append(["together", f"{sum(empty.values()):.1f}", f"{sum(filled.values()):.1f}"])
    return markdown(["stage", "seconds, empty cache", "filled cache"], rows)


def speed_evaluation() -> str:
    return "\n".join(table("log p(x)", stored("benchmark")["evaluation"], "ratio_to_floor"))


def scale() -> str:
    found = stored("scale")
    later = found["folder"]["later_than_mnist_seconds"]
    streamed = [f"{of['ratio']:.2f}" for of in stored("streaming")["streaming"].values()]
    return markdown(
        ["what", "measured"],
        [
            ["log p(x) by two processes, times as fast as by one", f"{found['ranks']['times_as_fast']:.2f}"],
            [
                f"{found['folder']['pictures']:,} PNG files of 64x64 in color: first start, to the first training step",
                f"{found['folder']['first_seconds']:.0f} s",
            ],
            *(
                [f"later starts, compared with embedded MNIST, `{likelihood}`", f"{seconds:+.1f} s"]
                for likelihood, seconds in later.items()
            ),
            [f"a streamed step over a resident one ({len(streamed)} networks)", ", ".join(sorted(streamed))],
            ["resuming, compared with starting", f"{found['resume']['more_than_a_start_seconds']:+.1f} s"],
        ],
    )


# --- The program's own tables ---

SCRIPTS = {
    "train": "train_svi",
    "evaluate": "evaluate_log_likelihood",
    "certify": "certify_log_likelihood",
    "compare": "compare_runs",
    "figures": "make_figures",
}


def _parts(words: dict[str, Any]) -> str:
    rows = []
    for word, part in words.items():
        own = ", ".join(f"`{format_flag(name)}`" for name in part.options)
        rows.append([f"`{word}`", part.help.replace("|", "\\|"), own])
    return markdown(["word", "what it is", "its options"], rows)


def _options(command: str) -> Iterator[tuple[str, list[str]]]:
    """The options of a command: the group, and the flag with its choices, default and help."""
    for spec in iterate_fields(COMMANDS[command].options):
        if spec.metadata["positional"]:
            continue
        default = spec.default
        if default is MISSING or default is None:
            shown = ""
        elif default is False:
            shown = "off"
        else:
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
        choices = spec.metadata["choices"]
        help = spec.metadata["help"].replace("|", "\\|")
        help += f" (one of {', '.join(f'`{word}`' for word in choices)})" if choices and len(choices) < 8 else ""
        yield spec.metadata["group"] or "options", [f"`{format_flag(spec.name)}`", shown, help]


def commands() -> str:
    """Every command: its usage, what it does, and a table of its options."""
    sections = []
    for name, command in COMMANDS.items():
        script = f"scripts/{SCRIPTS.get(name, name.replace('-', '_'))}.py"
        usage = build_parser(command).format_usage().split(maxsplit=2)[-1].strip()
        rows = [cells for _, cells in _options(name)]
        body = markdown(["option", "default", "what it does"], rows) if rows else ""
        if name == "train":
            body = "Its options are in [configuration](configuration.md)."
        calls = f"    ppl-vae {name} {usage}\n    python {script} {usage}"
        sections.append(f"## {name}\n\n{command.options.__doc__}\n\n{calls}\n\n{body}")
    return "\n\n".join(sections)


def configuration() -> str:
    """The options of a training, a table for each group."""
    groups: dict[str, list[list[str]]] = {}
    for group, cells in _options("train"):
        groups.setdefault(group, []).append(cells)
    header = ["option", "default", "what it does"]
    return "\n\n".join(f"## {group.capitalize()}\n\n{markdown(header, rows)}" for group, rows in groups.items())


TABLES: dict[str, Callable[[], str]] = {
    "default-run": default_run,
    "diagnosis": diagnosis,
    "likelihoods": likelihoods,
    "likelihood-steps": likelihood_steps,
    "compression": compression,
    "networks": networks,
    "fifteen-minutes": fifteen_minutes,
    "overfitting": overfitting,
    "imputation": imputation,
    "quadrants": quadrants,
    "labels": labels,
    "missing-mnist": missing_mnist,
    "few-labels": few_labels,
    "published-ours": published_ours,
    "published-in-print": published_in_print,
    "published-seeds": published_seeds,
    "published-short": published_short,
    "certificates": certificates,
    "speed-training": speed_training,
    "speed-short": speed_short,
    "speed-compiling": speed_compiling,
    "first-minute": first_minute,
    "speed-evaluation": speed_evaluation,
    "scale": scale,
    "words-networks": lambda: _parts(NETWORKS),
    "words-priors": lambda: _parts(PRIORS),
    "words-posteriors": lambda: _parts(POSTERIORS),
    "words-objectives": lambda: _parts(OBJECTIVES),
    "commands": commands,
    "configuration": configuration,
}
