"""The command line of each script: what it takes, and one clear line where that is wrong."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ppl_vae.data.registry import COLORS, FITS, SPLITS
from ppl_vae.runs.options import (
    COMPILES,
    LIKELIHOODS,
    NETWORKS,
    NON_NEGATIVE_INTEGER,
    NOT_EMPTY,
    PLAIN,
    POSITIVE,
    POSITIVE_INTEGER,
    PRECISIONS,
    SIDES,
    WIDTH,
    Check,
    Options,
    flag,
    model_options,
    one_of,
)


class Parser(argparse.ArgumentParser):
    """argparse, with one clear line for an error."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message.removeprefix('argument ')} (--help lists the options)\n")

    def add(self, name: str, kind: type, check: Check, text: str, *, several: bool = False) -> None:
        """An option whose value is checked while it is read."""

        def read(word: str) -> Any:
            try:
                value = kind(word)
            except ValueError:
                value = None
            if value is None or not check.holds(value):
                raise argparse.ArgumentTypeError(f"expected {check.words}, got {word!r}")
            return value

        metavar = {int: "N", float: "X", str: "WORD"}[kind]
        self.add_argument(flag(name), type=read, help=text, metavar=metavar, nargs="+" if several else None)

    def add_run(self) -> None:
        """A run folder as the first argument."""
        self.add_argument("run_dir", metavar="RUN", help="a run folder")

    def add_data(self) -> None:
        """Where the run's data is now, should it have moved; its SHA-256 must be the same."""
        self.add("dataset", str, NOT_EMPTY, "the run's own data file or folder, where it has moved")
        self.add("data_dir", str, NOT_EMPTY, "folder of the named data sets, where it has moved")
        self.set_defaults(dataset=None, data_dir=None)

    def add_device_and_seed(self, of_what: str) -> None:
        """--device and --seed."""
        self.add("device", str, NOT_EMPTY, "cpu, cuda, cuda:1, ... (default: cpu)")
        self.add("seed", int, NON_NEGATIVE_INTEGER, f"{of_what} (default: 0)")
        self.set_defaults(device="cpu", seed=0)

    def add_compile(self) -> None:
        """--compile."""
        text = "the passes of the evaluation as one compiled graph (default: auto, where there are many of them)"
        self.add("compile", str, one_of(COMPILES), text)
        self.set_defaults(compile="auto")

    def add_draws(self) -> None:
        """--dequantization-draws."""
        text = "without effect: the masses of 8-bit levels are exact under every density of --likelihood"
        self.add("dequantization_draws", int, POSITIVE_INTEGER, text)
        self.set_defaults(dequantization_draws=None)

    def add_images(self) -> None:
        """Images as the second argument."""
        self.add_argument(
            "images_path",
            metavar="IMAGES",
            help="an .npz or .npy file, an image, a folder of images; or test, validation or train: that split",
        )


class TrainCommand(NamedTuple):
    """What train_svi.py was asked: options (and a folder) for a new run, or a folder to resume (and more epochs)."""

    options: Options | None = None
    run_dir: str | None = None
    resume: str | None = None
    epochs: int | None = None
    dataset: str | None = None
    data_dir: str | None = None
    compile: str | None = None


def parse_train(argv: Sequence[str] | None = None) -> TrainCommand:
    """Reads train_svi.py's command line; exits with one line where it is wrong."""
    parser = Parser("Train a VAE, estimate its log-likelihood, and draw its figures, in one run folder.")
    for spec in fields(Options):
        several = spec.metadata["several"]
        default = "" if spec.default in (None, MISSING) else f" (default: {_words(spec.default)})"
        parser.add(
            spec.name, spec.metadata["kind"], spec.metadata["check"], spec.metadata["help"] + default, several=several
        )
    parser.add(
        "run_dir", str, NOT_EMPTY, "the run's new folder (default: one under runs/, by data, likelihood and time)"
    )
    parser.add(
        "resume",
        str,
        NOT_EMPTY,
        "go on with this run folder; beside it only --epochs, to extend it, --dataset and --data-dir, where its data "
        "has moved, and --compile, to change that",
    )
    given = vars(parser.parse_args(argv))
    run_dir, resume = given.pop("run_dir", None), given.pop("resume", None)
    if resume is not None:
        beside = ("epochs", "dataset", "data_dir", "compile")
        others = [flag(name) for name in given if name not in beside] + ([flag("run_dir")] if run_dir else [])
        if others:
            allowed = ", ".join(map(flag, beside))
            parser.error(f"--resume: the run keeps its own options; beside it only {allowed}, got {', '.join(others)}")
        return TrainCommand(resume=resume, **given)
    fixed: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    return TrainCommand(options=_from_other_run(fixed) if "start_from" in fixed else Options(**fixed), run_dir=run_dir)


_PRETRAINED = Path(__file__).parents[1] / "pretrained"


def _from_other_run(given: dict[str, Any]) -> Options:
    """The model and the data of the run that training starts from, a folder or a pretrained run by its name."""
    folder = Path(given["start_from"])
    shipped = _PRETRAINED / folder
    if len(folder.parts) == 1 and not folder.exists() and (shipped / "config.json").exists():
        folder, given = shipped, given | {"start_from": str(shipped)}
    path = folder / "config.json"
    try:
        other = model_options(json.loads(path.read_text(encoding="utf-8")))
    except OSError:
        raise ValueError(f"--start-from: expected a run folder, but {path} cannot be read") from None
    except ValueError as error:  # of JSON and of bytes that are no text, too
        raise ValueError(f"{path}: damaged: {error}") from None
    for part in ("prior", "posterior"):  # another one has other options
        if given.get(part, other[part]) != other[part]:
            other = {name: value for name, value in other.items() if not name.startswith(f"{part}_")}
    return Options(**(other | given))


def parse_evaluate(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """run_dir, split, num_particles, images, dequantization_draws, device, seed, compile, dataset, data_dir."""
    parser = Parser("Importance-sampled log p(x) of a run, with its errors; written to the run's evaluation.json.")
    parser.add_run()
    parser.add("split", str, one_of(SPLITS), f"{', '.join(SPLITS)} (default: test)")
    parser.add("num_particles", int, POSITIVE_INTEGER, "importance samples an image (default: 5000)")
    parser.add("images", int, POSITIVE_INTEGER, "a fixed random subset of that many images (default: all)")
    parser.add_draws()
    parser.add_device_and_seed("of the importance samples, and of the test set's draw under --protocol iwae")
    parser.add_compile()
    parser.add_data()
    parser.set_defaults(split="test", num_particles=5000, images=None)
    return parser.parse_args(argv)


AIS_STARTS = ("guide", "prior", "normal")


def parse_certify(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """run_dir, split, images, and of each part of a certificate what it takes; device, seed, compile, the data's."""
    parser = Parser("log p(x) of a run from both sides, how far each number can be trusted, and where nats are lost.")
    parser.add_run()
    parser.add("split", str, one_of(SPLITS), f"{', '.join(SPLITS)} (default: test)")
    parser.add("images", int, POSITIVE_INTEGER, "a fixed random subset of that many images (default: 200)")
    parser.add("simulated", int, NON_NEGATIVE_INTEGER, "images of the model's own for the upper bound (default: 50)")
    parser.add("temperatures", int, POSITIVE_INTEGER, "of annealed importance sampling (default: 1000)")
    parser.add("leapfrogs", int, POSITIVE_INTEGER, "steps of a Hamiltonian transition (default: 2)")
    parser.add("chains", int, POSITIVE_INTEGER, "an image (default: 16)")
    starts = f"{', '.join(AIS_STARTS)} (default: guide)"
    parser.add("start", str, one_of(AIS_STARTS), f"what is annealed to p(z | x): {starts}")
    parser.add("num_particles", int, POSITIVE_INTEGER, "importance samples an image (default: 5000)")
    parser.add("gap_images", int, NON_NEGATIVE_INTEGER, "of train and of validation, whose gap is split (default: 100)")
    parser.add("simulations", int, NON_NEGATIVE_INTEGER, "of the guide's calibration (default: 1000)")
    parser.add("draws", int, POSITIVE_INTEGER, "of the guide, among which each simulation is ranked (default: 199)")
    parser.add("against", str, NOT_EMPTY, "another data set, whose test images are scored beside the run's own")
    parser.add("against_data_dir", str, NOT_EMPTY, "where --against is (default: the run's folder of named data sets)")
    parser.add("output", str, NOT_EMPTY, "a JSON file of certificates, to which this is added (default: none)")
    parser.add_device_and_seed("of every draw")
    parser.add_compile()
    parser.add_data()
    parser.set_defaults(split="test", images=200, simulated=50, temperatures=1000, leapfrogs=2, chains=16)
    parser.set_defaults(start="guide", num_particles=5000, gap_images=100, simulations=1000, draws=199)
    parser.set_defaults(against=None, against_data_dir=None, output=None)
    return parser.parse_args(argv)


def parse_compare(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """run_dirs, split, num_particles, images, dequantization_draws, device, seed, compile, the data's, and output."""
    parser = Parser("Paired differences of log p(x) between runs: the same images, binarization and noise.")
    parser.add_argument("run_dirs", metavar="RUN", nargs="+", help="run folders; each is compared with the first")
    parser.add("split", str, one_of(SPLITS), f"{', '.join(SPLITS)} (default: test)")
    parser.add("num_particles", int, POSITIVE_INTEGER, "importance samples an image (default: 200)")
    parser.add("images", int, POSITIVE_INTEGER, "a fixed random subset of that many images (default: 5000)")
    parser.add_draws()
    parser.add_device_and_seed("of the importance samples")
    parser.add_compile()
    parser.add_data()
    parser.add("output", str, NOT_EMPTY, "a new folder for the result (default: one under runs/, by the time)")
    parser.set_defaults(split="test", num_particles=200, images=5000, output=None)
    return parser.parse_args(argv)


def parse_sample(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """run_dir, num_samples, device, seed, output (or None)."""
    parser = Parser("Draw images from a run: z ~ p(z), x ~ p(x | z), as arrays and as pictures.")
    parser.add_run()
    parser.add("num_samples", int, POSITIVE_INTEGER, "images (default: 64)")
    parser.add_device_and_seed("of the samples")
    parser.add_data()
    parser.add("output", str, NOT_EMPTY, "folder of the results (default: samples in the run's folder)")
    parser.set_defaults(num_samples=64, output=None)
    return parser.parse_args(argv)


def parse_encode(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """run_dir, images_path, num_particles, images (or None), device, seed, dataset, data_dir, output (or None)."""
    parser = Parser("Latents and log p(x) of images under a run: of your own, or of a split of its data.")
    parser.add_run()
    parser.add_images()
    parser.add("num_particles", int, POSITIVE_INTEGER, "importance samples an image (default: 200)")
    parser.add("images", int, POSITIVE_INTEGER, "a fixed random subset of that many images (default: all)")
    parser.add_device_and_seed("of the importance samples, and of the images' binarization")
    parser.add_data()
    parser.add("output", str, NOT_EMPTY, "folder of the results (default: encodings/IMAGES in the run's folder)")
    parser.set_defaults(num_particles=200, images=None, output=None)
    return parser.parse_args(argv)


def parse_impute(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """run_dir, images_path, mask, hide, num_particles, num_draws, images, device, seed, dataset, data_dir, output."""
    parser = Parser("log p of the pixels that are observed, and draws of those that are missing.")
    parser.add_run()
    parser.add_images()
    parser.add("mask", str, NOT_EMPTY, "an .npy file, 1 where a pixel is observed and 0 where it is missing")
    parser.add("hide", str, one_of(SIDES), f"hide half of each image: {', '.join(SIDES)}")
    parser.add("num_particles", int, POSITIVE_INTEGER, "importance samples an image (default: 1000)")
    parser.add("num_draws", int, POSITIVE_INTEGER, "draws of the missing pixels of each image (default: 10)")
    parser.add("images", int, POSITIVE_INTEGER, "a fixed random subset of that many images (default: all)")
    parser.add_device_and_seed("of the particles and draws, and of the images' binarization")
    parser.add_data()
    parser.add("output", str, NOT_EMPTY, "folder of the results (default: imputations in the run's folder)")
    parser.set_defaults(mask=None, hide=None, num_particles=1000, num_draws=10, images=None, output=None)
    return parser.parse_args(argv)


def parse_networks(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The data's options, likelihood, networks, minutes, compile, images, num_particles, run_dir, output or None."""
    parser = Parser(
        "One table: a plain VAE of each network, its weights, seconds an epoch, and log p(x) after the same time."
    )
    parser.add("dataset", str, NOT_EMPTY, "as for train_svi.py (default: mnist)")
    parser.add("data_dir", str, NOT_EMPTY, "as for train_svi.py")
    parser.add("image_size", int, WIDTH, "as for train_svi.py", several=True)
    parser.add("fit", str, one_of(FITS), "as for train_svi.py (default: crop)")
    parser.add("color", str, one_of(COLORS), "as for train_svi.py")
    parser.add("likelihood", str, one_of(LIKELIHOODS), "as for train_svi.py (default: bernoulli)")
    usual = [word for word in NETWORKS if word != "tanh"]  # which is mlp with the activation of older papers
    parser.add("networks", str, one_of(NETWORKS), f"which (default: {' '.join(usual)})", several=True)
    parser.add("minutes", float, POSITIVE, "of training, each; epochs are planned to fill them (default: 2)")
    parser.add("compile", str, one_of(COMPILES), "as for train_svi.py (default: auto)")
    parser.add("images", int, POSITIVE_INTEGER, "test images of the estimate (default: 5000)")
    parser.add("num_particles", int, POSITIVE_INTEGER, "importance samples an image of the estimate (default: 100)")
    parser.add("run_dir", str, NOT_EMPTY, "folder of the run folders (default: runs/networks-DATASET)")
    parser.add("output", str, NOT_EMPTY, "a JSON file for the table (the README's are in scripts/results)")
    parser.set_defaults(dataset="mnist", data_dir=None, networks=usual, minutes=2.0, images=5000, num_particles=100)
    parser.set_defaults(
        compile="auto", image_size=None, fit="crop", color=None, likelihood="bernoulli", run_dir=None, output=None
    )
    return parser.parse_args(argv)


def parse_reproduce(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """name (or None), epochs, epochs_share, precision, seed, device, data_dir, run_dir, output, list, table."""
    parser = Parser("Train a published model stage by stage, evaluate it, and add a row beside the published number.")
    parser.add_argument("name", metavar="NAME", nargs="?", help="a recipe; --list names them", default=None)
    parser.add_argument("--list", action="store_true", help="say what recipes there are, and end")
    parser.add_argument("--table", action="store_true", help="print the rows so far as the README's table, and end")
    parser.add("epochs_share", float, POSITIVE, "a share of the recipe's epochs, which the row then says (default: 1)")
    parser.add("epochs", int, POSITIVE_INTEGER, "the same as a number, of all stages together; each has one at least")
    parser.add("precision", str, one_of(PRECISIONS), "as for train_svi.py (default: the recipe's, float32)")
    parser.add_device_and_seed("of the training")
    parser.add("data_dir", str, NOT_EMPTY, "as for train_svi.py")
    parser.add("run_dir", str, NOT_EMPTY, "folder of the stages' run folders (default: runs/reproduce/NAME-seedN)")
    parser.add("output", str, NOT_EMPTY, "the JSON file of the rows (default: scripts/results/reproductions.json)")
    parser.set_defaults(list=False, table=False, epochs=None, epochs_share=None, precision=None, data_dir=None)
    parser.set_defaults(run_dir=None, output="scripts/results/reproductions.json")
    asked = parser.parse_args(argv)
    if asked.name is None and not (asked.list or asked.table):
        parser.error("NAME: expected a recipe, got none; --list names them")
    if asked.epochs is not None and asked.epochs_share is not None:
        parser.error("--epochs: expected it without --epochs-share, got both")
    return asked


class LikelihoodsCommand(NamedTuple):
    """What compare_likelihoods.py was asked: the likelihoods (None: all that fit), all else of a run, and two paths."""

    likelihoods: list[str] | None
    options: Options
    run_dir: str | None
    output: str | None


def parse_likelihoods(argv: Sequence[str] | None = None) -> LikelihoodsCommand:
    """Reads compare_likelihoods.py's command line; exits with one line where it is wrong."""
    parser = Parser(
        "One table: the same plain VAE under each likelihood, trained for the same epochs, compared on one scale."
    )
    parser.add(
        "likelihoods",
        str,
        one_of(LIKELIHOODS),
        "which; they must be on one scale (default: all that fit the data and have its own, as of 8-bit levels all but "
        "bernoulli)",
        several=True,
    )
    of_data = ("dataset", "data_dir", "image_size", "fit", "color")
    of_training = ("network", "hidden", "channels", "latent_dim", "epochs", "batch_size", "learning_rate", "compile")
    of_both = ("images", "dequantization_draws", "device", "seed")
    specs, usual = {spec.name: spec for spec in fields(Options)}, PLAIN | {"epochs": 10}
    for name in (*of_data, *of_training, *of_both):
        spec, default = specs[name], usual.get(name, specs[name].default)
        known = "" if default is None else f" (default: {_words(default)})"
        kind, check, several = (spec.metadata[key] for key in ("kind", "check", "several"))
        parser.add(name, kind, check, f"as for train_svi.py{known}", several=several)
    parser.add("num_particles", int, POSITIVE_INTEGER, "importance samples an image of the estimate (default: 100)")
    parser.add("run_dir", str, NOT_EMPTY, "folder of the run folders (default: runs/likelihoods-DATASET)")
    parser.add("output", str, NOT_EMPTY, "a JSON file for the table (the README's are in scripts/results)")
    given: dict[str, Any] = usual | {"num_particles": 100} | vars(parser.parse_args(argv))
    own = [given.pop(name, None) for name in ("likelihoods", "run_dir", "output")]
    given["evaluation_particles"] = given.pop("num_particles")
    fixed: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    return LikelihoodsCommand(own[0], Options(**fixed), own[1], own[2])


BENCHMARK_MODELS = ("mlp128", "iwae20", "iwae100", "conv128", "default")
SCALE_PARTS = ("ranks", "folder", "streaming", "resume")
BENCHMARK_PARTS = ("training", "evaluation", "likelihoods", "start")


def parse_scale(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """parts, rounds, pictures, output (or None)."""
    parser = Parser(
        "Time what large data, several ranks and resumed runs cost, each by turns with what it costs without."
    )
    parts = " ".join(SCALE_PARTS)
    parser.add("parts", str, one_of(SCALE_PARTS), f"what is timed: {parts} (default: all)", several=True)
    parser.add("rounds", int, POSITIVE_INTEGER, "times that each is timed (default: 5)")
    parser.add("pictures", int, POSITIVE_INTEGER, "PNG files of 64 x 64 in the part folder (default: 20000)")
    parser.add("output", str, NOT_EMPTY, "JSON file of the results (default: printed only)")
    parser.set_defaults(parts=SCALE_PARTS, rounds=5, pictures=20_000, output=None)
    return parser.parse_args(argv)


def parse_benchmark(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """models, parts, likelihoods, rounds, images, num_particles, device, output (or None)."""
    parser = Parser(
        "Time training steps and log p(x) beside other programs that compute the same, in turn, and a fresh start."
    )
    parser.add(
        "models",
        str,
        one_of(BENCHMARK_MODELS),
        f"which of {' '.join(BENCHMARK_MODELS)} (default: all; default is the network of train_svi.py)",
        several=True,
    )
    parser.add(
        "parts",
        str,
        one_of(BENCHMARK_PARTS),
        f"what is timed: {' '.join(BENCHMARK_PARTS)} (default: all)",
        several=True,
    )
    parser.add(
        "likelihoods",
        str,
        one_of(LIKELIHOODS),
        f"which, beside {LIKELIHOODS[0]}, in the part likelihoods (default: all)",
        several=True,
    )
    parser.add("rounds", int, POSITIVE_INTEGER, "times that each is timed (default: 7)")
    parser.add("images", int, POSITIVE_INTEGER, "test images whose log p(x) is estimated (default: 100)")
    parser.add("num_particles", int, POSITIVE_INTEGER, "importance samples an image (default: 5000)")
    parser.add("device", str, NOT_EMPTY, "cpu, cuda, cuda:1, ... (default: cpu)")
    parser.add("output", str, NOT_EMPTY, "a JSON file for the result (scripts/results/benchmark.json: the README's)")
    parser.set_defaults(models=list(BENCHMARK_MODELS), parts=list(BENCHMARK_PARTS), rounds=7)
    parser.set_defaults(likelihoods=list(LIKELIHOODS))
    parser.set_defaults(images=100, num_particles=5000, device="cpu", output=None)
    return parser.parse_args(argv)


def parse_diagnose(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """run_dir, split (or None), images, device, seed, dataset, data_dir."""
    parser = Parser("What a run does and why, in numbers and in words, and which command would change it.")
    parser.add_run()
    default = "default: validation, or test where there is none"
    parser.add("split", str, one_of(SPLITS), f"{', '.join(SPLITS)} ({default})")
    parser.add("images", int, POSITIVE_INTEGER, "a fixed random subset of that many images (default: 2000)")
    parser.add_device_and_seed("of every draw")
    parser.add_data()
    parser.set_defaults(split=None, images=2000)
    return parser.parse_args(argv)


STUDY_DATASETS = ("mnist", "fashion-mnist")


def parse_study(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """quick, output, datasets, data_dir (or None)."""
    parser = Parser("Train and measure some fifty VAEs and autoencoders, and write what they show as one report.")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs: minutes, and not an hour")
    parser.add("output", str, NOT_EMPTY, "the study's folder (default: runs/study, or runs/study-quick)")
    names = " ".join(STUDY_DATASETS)
    parser.add("datasets", str, NOT_EMPTY, f"the first has every part (default: {names})", several=True)
    parser.add("data_dir", str, NOT_EMPTY, "as for train_svi.py")
    parser.set_defaults(quick=False, output=None, datasets=list(STUDY_DATASETS), data_dir=None)
    asked = parser.parse_args(argv)
    asked.output = asked.output or ("runs/study-quick" if asked.quick else "runs/study")
    return asked


def parse_figures(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """run_dir, dataset, data_dir."""
    parser = Parser("Draw a run's figures again from its files, into its folder figures/.")
    parser.add_run()
    parser.add_data()
    return parser.parse_args(argv)


def parse_report(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """run_dir, output (or None), dataset, data_dir."""
    parser = Parser("One self-contained HTML page of a run: likelihood, verdicts, figures, a live latent explorer.")
    parser.add_run()
    parser.add("output", str, NOT_EMPTY, "the page's file (default: report.html in the run's folder)")
    parser.add_data()
    parser.set_defaults(output=None)
    return parser.parse_args(argv)


def parse_export(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """run_dir, output."""
    parser = Parser("A run as one folder to share: its model without the training, its numbers, and a model card.")
    parser.add_run()
    parser.add("output", str, NOT_EMPTY, "a new or empty folder (default: exports/ and the run's name)")
    parser.set_defaults(output=None)
    return parser.parse_args(argv)


def parse_kills(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """kills, seed, compile."""
    parser = Parser("Kill small runs at random moments, resume each, and compare its numbers with an undisturbed run.")
    parser.add("kills", int, POSITIVE_INTEGER, "in all (default: 100)")
    parser.add("seed", int, NON_NEGATIVE_INTEGER, "of the moments (default: 0)")
    parser.add("compile", str, one_of(("on", "off")), "of the runs, in turn (default: off off on)", several=True)
    parser.set_defaults(kills=100, seed=0, compile=["off", "off", "on"])
    return parser.parse_args(argv)


def parse_docs(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """output."""
    parser = Parser("Every public module's docstrings as HTML pages.")
    parser.add("output", str, NOT_EMPTY, "folder of the pages (default: docs-html)")
    parser.set_defaults(output="docs-html")
    return parser.parse_args(argv)


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
