"""The golden cases: how each group of numbers is computed, and how closely it must be reproduced.

The cases call the stable names of the package, its scripts and the files that these write, and ``program`` for the
rest. Weights, features and images are given by formulas.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import program
import torch
from safetensors import safe_open
from torch import Tensor

from ppl_vae import dequantized, importance, load, log_weights
from ppl_vae.parts import likelihoods

DOUBLE, SINGLE, EXACT = 1e-9, 2e-4, 0.0


class Case(NamedTuple):
    """One group of golden numbers.

    Args:
        compute: takes the folder that all cases share; returns numbers, words and lists of them, by name.
        tolerance: the largest accepted difference of two numbers, relative above 1 and absolute below.
        may_grow: whether a name that is not stored yet is accepted, such as a new option or a new key of a file.
    """

    compute: Callable[[Path], dict[str, Any]]
    tolerance: float
    may_grow: bool = False


# --- Inputs, by formulas: no random numbers and no files ---


def waves(*shape: int, start: float = 0.0) -> Tensor:
    """Numbers between -1 and 1 that follow no period, of this shape, in double precision."""
    return torch.sin(start + 1.7 * torch.arange(math.prod(shape), dtype=torch.double) ** 1.1).reshape(shape)


def fill_weights(module: Any, *, size: float = 0.4) -> Any:
    """Set every parameter by the position of its name in the alphabet, and switch to evaluation mode."""
    with torch.no_grad():
        for place, (_, parameter) in enumerate(sorted(module.named_parameters())):
            parameter.copy_(size * waves(*parameter.shape, start=place))
    return module.eval()


def gray_levels(num_images: int, *, start: int = 0) -> np.ndarray:
    """(N, 8, 8) uint8: a bright spot that moves from image to image, on a weak texture."""
    n, row, column = np.ogrid[start : start + num_images, :8, :8]
    distance = (row - 5 * n % 8) ** 2 + (column - 3 * n % 7) ** 2
    return (np.clip(235 - (9 + n % 4) * distance, 0, None) + (7 * n + row * column) % 17).astype(np.uint8)


def write_data(folder: Path, *, binary: bool, num_test: int = 12) -> str:
    """Write an .npz file of 50 training, 10 validation and some test images; returns the words that name it."""
    path = folder / f"{'binary' if binary else 'gray'}-{num_test}.npz"
    images = {"train": gray_levels(50), "valid": gray_levels(10, start=50), "test": gray_levels(num_test, start=60)}
    np.savez(path, **{split: x > 127 if binary else x for split, x in images.items()})
    return f"--dataset {shlex.quote(str(path))}"


def build(words: str) -> Any:
    """The VAE that these words of ``train_svi`` describe, for images of 4 x 4 pixels."""
    return program.build_vae(words, event_shape=(1, 4, 4))


# --- Likelihoods, priors, posteriors ---

LEVELS, COUNTS = (0.0, 3.0, 127.0, 254.0, 255.0), (0.0, 1.0, 7.0, 40.0, 1000.0)
INSIDE, REAL = (1e-3, 0.2, 0.5, 0.93, 0.9999), (-3.0, -0.4, 0.0, 0.7, 5.0)
LIKELIHOODS = {
    "bernoulli": (0.0, 1.0),
    "categorical": LEVELS,
    "discretized-logistic": LEVELS,
    "discretized-logistic-mixture": LEVELS,
    "binomial": LEVELS,
    "continuous-bernoulli": (0.0, *INSIDE, 1.0),
    "beta": INSIDE,
    "logit-normal": INSIDE,
    "normal": REAL,
    "normal-fixed": REAL,
    "normal-optimal": REAL,
    "normal-per-pixel": REAL,
    "laplace": REAL,
    "student-t": REAL,
    "poisson": COUNTS,
    "negative-binomial": COUNTS,
}


def likelihood_numbers(folder: Path) -> dict[str, Any]:
    """log p(x | h) at fixed features h, draws, and the fit of the marginal distributions, of every likelihood."""
    made: dict[str, tuple[Any, tuple[float, ...]]] = {}
    for word, values in LIKELIHOODS.items():
        name = "".join(part.capitalize() for part in word.split("-"))
        made[word] = getattr(likelihoods, name)((1, 2, 3)), values
    made["discretized-logistic-mixture of colors"] = likelihoods.DiscretizedLogisticMixture((3, 1, 2)), LEVELS
    made["logit of laplace"] = likelihoods.Logit(likelihoods.Laplace((1, 2, 3))), INSIDE
    return {name: _of_likelihood(family.double(), values) for name, (family, values) in made.items()}


@torch.no_grad()
def _of_likelihood(family: Any, values: tuple[float, ...]) -> dict[str, Any]:
    x = torch.tensor([values[(n + n // 6) % len(values)] for n in range(30)], dtype=torch.double)
    x, h = x.reshape(5, *family.event_shape), 3 * waves(5, family.num_features)
    found = {"fresh": family(h).log_prob(x), "marginals": program.fit_marginals(family, x)}
    found["log_prob"] = fill_weights(family)(h).log_prob(x)
    torch.manual_seed(0)
    return found | {"sample": family(h).sample()[:2], "mean": family(h).mean[:2]}


SMALL = "--network mlp --hidden 6 5 --latent-dim 3"
NORMAL_PRIOR = "--prior standard-normal"
FLOW_PRIOR = "--prior flow --prior-layers 3 --prior-hidden 7"
FLOW_POSTERIOR = "--posterior flow --posterior-layers 2 --posterior-hidden 7"
PRIORS = {
    "standard-normal": NORMAL_PRIOR,
    "mixture": "--prior mixture --prior-components 4",
    "vamp": "--prior vamp --prior-components 4",
    "flow affine": FLOW_PRIOR,
    "flow spline": f"{FLOW_PRIOR} --prior-flow spline",
}
POSTERIORS = {
    "diagonal exp": f"{NORMAL_PRIOR} --scale-map exp",
    "diagonal softplus": f"{NORMAL_PRIOR} --scale-map softplus",
    "full": f"{NORMAL_PRIOR} --posterior full",
    "flow iaf": f"{NORMAL_PRIOR} {FLOW_POSTERIOR}",
    "flow spline": f"{NORMAL_PRIOR} {FLOW_POSTERIOR} --posterior-flow spline",
}
TOP_DOWN = f"{NORMAL_PRIOR} --upper-latents 2 --upper-hidden 6 5"
HIERARCHIES = {"top-down": TOP_DOWN, "bottom-up": f"{TOP_DOWN} --inference bottom-up --decoder-input all"}


def latent_numbers(folder: Path) -> dict[str, Any]:
    """log p(z) and log q(z | x) at fixed z, and draws, of every prior and posterior."""
    z, x, found = 1.5 * waves(4, 3), waves(4, 1, 4, 4, start=2).gt(0).double(), {}
    for kind, words in ({"prior": PRIORS, "posterior": PRIORS | POSTERIORS}).items():
        for name, chosen in words.items():
            vae = fill_weights(build(f"{SMALL} {chosen}").double())
            with torch.no_grad():
                distribution = vae.prior() if kind == "prior" else vae.posterior(x)
                torch.manual_seed(0)
                draws = distribution.sample((2,))
                found[f"{kind} {name}"] = {"log_prob": distribution.log_prob(z), "draws": draws}
    return found


def log_weight_numbers(folder: Path) -> dict[str, Any]:
    """log w of two particles, in which the order of the draws shows, and the importance-sampled bound of 300."""
    x, found = waves(5, 1, 4, 4, start=2).gt(0).double(), {}
    for name, words in {**PRIORS, **POSTERIORS, **HIERARCHIES}.items():
        vae = fill_weights(build(f"{SMALL} {words}").double())
        found[name] = _of_log_weights(vae, x)
    normal = build(f"{SMALL} {NORMAL_PRIOR} --likelihood normal")
    levels = (128 + 127 * waves(5, 1, 4, 4, start=2)).round()
    found["mass of levels"] = _of_log_weights(dequantized(fill_weights(normal.double()), num_draws=4), levels)
    return found


def _of_log_weights(vae: Any, x: Tensor) -> dict[str, Any]:
    torch.manual_seed(0)
    with torch.no_grad():
        log_w = log_weights(vae.model, vae.guide, x, 2)
    many = importance(vae.model, vae.guide, x, num_particles=300, chunk=110)
    names = ("log_evidence", "elbo", "kl", "ess", "pareto_k", "monte_carlo_stderr", "bias")
    return {"log_w": log_w, **{name: getattr(many, name) for name in names}}


# --- The model that comes with the package ---


def mnist_double(folder: Path) -> dict[str, Any]:
    """L_S of 200 test images under mnist-best, S = 50, in double precision."""
    x = program.evaluated_images("--dataset mnist")[:200]
    vae = load("mnist-best").double()
    torch.manual_seed(0)
    found = importance(vae.model, vae.guide, x, num_particles=50)
    return {"log_evidence": found.log_evidence, "pareto_k": found.pareto_k}


def mnist_evaluation(folder: Path, *, compile: str = "off") -> dict[str, Any]:
    """The results of evaluate_log_likelihood for mnist-best: 200 test images, S = 50, the means and each image."""
    words = f"mnist-best --images 200 --num-particles 50 --compile {compile}"
    program.run_script("evaluate_log_likelihood", words, folder)
    run = folder / "runs" / "mnist-best"  # the copy of the model in which the script writes
    entry = read_json(run / "evaluation.json")["test"]
    per_image = tensors_of(run / "evaluation-test.safetensors")
    return {"entry": without_time(entry), "index": per_image["index"], "log_evidence": per_image["log_evidence"]}


# --- Training ---

STEPS = "--epochs 10 --batch-size 20 --compile off --seed 3"  # of 50 images: three steps an epoch
CONV = "--hidden 8 --channels 3 4 --latent-dim 3"
PLAIN = "--objective elbo --initialization shrinking --decay-start 0 --average-decay 0"
TRAIN_LEVELS = {
    "gated logistic-mixture flow stl average": f"{SMALL} --network gated --likelihood discretized-logistic-mixture "
    f"{FLOW_PRIOR} --objective stl --average-decay 0.9"
}
TRAININGS = {
    "mlp bernoulli hierarchy free-bits warm-up": f"{SMALL} {TOP_DOWN} --objective free-bits --beta 2 --warmup-epochs 4",
    "conv normal vamp full iwae stages": f"--network conv {CONV} --likelihood normal {PRIORS['vamp']} --posterior full "
    "--objective iwae --num-particles 3 --schedule stages",
    "residual bernoulli mixture iaf dreg": f"--network residual {CONV} {PRIORS['mixture']} {FLOW_POSTERIOR} "
    "--objective dreg --num-particles 3 --skip-norm 1000",
    "tanh normal-optimal elbo analytic": f"{SMALL} --network tanh --likelihood normal-optimal {PLAIN} --kl analytic "
    "--clip-norm 5",
}


def training_numbers(folder: Path) -> dict[str, Any]:
    """The losses of 30 steps in double precision, and the validation after each epoch."""
    dataset = write_data(folder, binary=False)
    return {name: program.train_in_double(f"{dataset} {STEPS} {words}") for name, words in TRAININGS.items()}


def training_of_levels(folder: Path) -> dict[str, Any]:
    """The same for a likelihood whose initial bias is fitted in single precision."""
    dataset = write_data(folder, binary=False)
    return {name: program.train_in_double(f"{dataset} {STEPS} {words}") for name, words in TRAIN_LEVELS.items()}


def captured_run(folder: Path) -> Path:
    """The run folder of a compiled training by train_svi; the first case that asks for it makes it."""
    run = folder / "captured"
    if not (run / "figures").exists():
        words = f"{write_data(folder, binary=True)} {STEPS} --compile on --network mlp --hidden 6 --latent-dim 3"
        program.run_script("train_svi", f"{words} {NORMAL_PRIOR} --evaluation-particles 30 --run-dir captured", folder)
    return run


def captured_numbers(folder: Path) -> dict[str, Any]:
    """The metrics and the evaluation of a compiled training by train_svi, in single precision."""
    run = captured_run(folder)
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [without_time(json.loads(line)) for line in lines]
    return {"metrics": metrics, "evaluation": without_time(read_json(run / "evaluation.json")["test"])}


# --- Certificate, diagnosis and the other commands, for a run whose weights are given by a formula ---

MANY = 1300  # test images: one seed gives the noise of at most 1,250


def fixed_run(folder: Path) -> Path:
    """A run folder without training: trained weights would differ between processors, these do not."""
    run = folder / "fixed"
    if not run.exists():
        words = f"{write_data(folder, binary=True, num_test=MANY)} {SMALL} {PRIORS['mixture']}"
        program.save_run(fill_weights(program.build_vae(words, event_shape=(1, 8, 8))), run, words)
    return run


def many_images(folder: Path) -> dict[str, Any]:
    """The results of evaluate_log_likelihood for more images than share one seed, S = 1."""
    run = fixed_run(folder)
    program.run_script("evaluate_log_likelihood", "fixed --num-particles 1", folder)
    per_image = tensors_of(run / "evaluation-test.safetensors")["log_evidence"]
    return {"log_evidence": per_image[::50], "entry": without_time(read_json(run / "evaluation.json")["test"])}


def bound_numbers(folder: Path) -> dict[str, Any]:
    """Annealed importance sampling from both sides, in double precision."""
    x, found = waves(4, 1, 4, 4, start=2).gt(0).double(), {}
    for name, words in {"full": POSTERIORS["full"], "flow": FLOW_PRIOR, "top-down": TOP_DOWN}.items():
        vae = fill_weights(build(f"{SMALL} {words}").double())
        found[name] = program.annealed_bounds(vae, x, num_temperatures=12, num_chains=3, seed=0)
    return found


def certificate_numbers(folder: Path) -> dict[str, Any]:
    """The entry of certify_log_likelihood in evaluation.json, at the least effort that runs every stage."""
    run = fixed_run(folder)
    effort = "--images 4 --simulated 2 --temperatures 12 --chains 2 --num-particles 30 --compile off"
    effort += " --gap-images 2 --simulations 20 --draws 19"
    program.run_script("certify_log_likelihood", f"fixed {effort}", folder)
    return without_time(read_json(run / "evaluation.json")["certificate-test"])


def diagnosis_numbers(folder: Path) -> dict[str, Any]:
    """The numbers that diagnose writes, and the severity and the advised options of its verdicts."""
    run = fixed_run(folder)
    program.run_script("diagnose", "fixed --split test --images 200", folder)
    found = read_json(run / "diagnosis.json")
    verdicts = [{key: verdict[key] for key in ("severity", "change")} for verdict in found["verdicts"]]
    return {"numbers": found["numbers"], "verdicts": verdicts}


def command_numbers(folder: Path) -> dict[str, Any]:
    """The arrays that sample, encode and impute write."""
    run = fixed_run(folder)
    program.run_script("sample", "fixed --num-samples 3", folder)
    program.run_script("encode", "fixed test --images 5 --num-particles 20", folder)
    program.run_script("impute", "fixed test --images 5 --num-particles 20 --hide top --num-draws 2", folder)
    return {path.name: dict(np.load(path)) for path in run.rglob("*.npz")}


# --- Names: of weights, of what files hold, and of the command line ---


def state_names(folder: Path) -> dict[str, Any]:
    """The names and shapes of all weights, of every network, prior, posterior, hierarchy and likelihood."""
    networks = ("mlp", "tanh", "gated", "conv", "gated-conv", "residual", "gated-residual")
    words = {f"network {word}": f"--network {word} {CONV} {NORMAL_PRIOR}" for word in networks}
    for kind, chosen in {"prior": PRIORS, "posterior": POSTERIORS, "hierarchy": HIERARCHIES}.items():
        words |= {f"{kind} {name}": f"{SMALL} {step_on_part}" for name, step_on_part in chosen.items()}
    words |= {f"likelihood {word}": f"{SMALL} {NORMAL_PRIOR} --likelihood {word}" for word in LIKELIHOODS}
    return {
        name: {key: list(weight.shape) for key, weight in build(asked).state_dict().items()}
        for name, asked in words.items()
    }


def run_folder_names(folder: Path) -> dict[str, Any]:
    """The files of a finished run folder: names, types and shapes of tensors, and the keys of JSON objects."""
    run = captured_run(folder)
    found: dict[str, Any] = {}
    for path in sorted(path for path in run.iterdir() if path.suffix in (".json", ".jsonl", ".safetensors")):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118, it is no dictionary
                found[path.name] = {key: f"{part.get_dtype()} {part.get_shape()}" for key, part in slices.items()}
        else:
            text = path.read_text(encoding="utf-8")
            found[path.name] = keys_of(json.loads(text.splitlines()[-1] if path.suffix == ".jsonl" else text))
    return found


def keys_of(value: Any) -> Any:
    """The keys of JSON objects within each other, without checksums; every other value becomes None."""
    if isinstance(value, dict):
        return {key: keys_of(inner) for key, inner in value.items() if key != "checksum"}
    return None


# Words that every option is tried with. An option that takes "no-such-word" takes any word.
WORDS = (
    "-1 0 0.5 1 3 no-such-word auto on off test validation train top bottom left right mnist static-mnist "
    "fashion-mnist kmnist caltech-silhouettes cifar10 svhn vampprior iwae crop stretch gray rgb dynamic fixed "
    "threshold none uniform logit bernoulli categorical discretized-logistic discretized-logistic-mixture "
    "binomial continuous-bernoulli beta logit-normal normal normal-fixed normal-optimal normal-per-pixel "
    "laplace student-t poisson negative-binomial mlp tanh gated conv gated-conv residual gated-residual "
    "standard-normal mixture vamp flow affine spline diagonal full delta iaf top-down bottom-up all shrinking "
    "wide bounded exp softplus elbo free-bits dreg stl cosine stages sampled analytic best last float32 tf32 "
    "bf16 guide prior mlp128 iwae20 iwae100 conv128 default training evaluation likelihoods start ranks "
    "folder streaming resume labels"
)


def command_line(folder: Path) -> dict[str, Any]:
    """The options of every script, with their defaults and the words that each accepts."""
    return {name: _of_script(name) for name in program.READERS}


def _of_script(name: str) -> dict[str, Any]:
    parser, defaults = program.argument_parser(name), program.default_values(name)
    required = program.READERS[name][1]
    found: dict[str, Any] = {"arguments": required}
    for action in parser._actions:
        flag = next((word for word in action.option_strings if word.startswith("--")), None)
        if flag in (None, "--help", "--help-all", "--config"):
            continue
        words = WORDS.split() if action.nargs != 0 else []
        accepted = [word for word in words if _accepts(parser, [*required, flag, word])]
        found[flag] = {
            "default": defaults[action.dest],
            "accepts": "any word" if "no-such-word" in accepted else accepted,
            "several": action.nargs == "+",
        }
    return found


def _accepts(parser: Any, words: list[str]) -> bool:
    try:
        parser.parse_args(words)
    except SystemExit:
        return False
    return True


# --- Files ---


def read_json(path: Path) -> Any:
    """What a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dictionary


def without_time(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry without seconds, speeds, paths and checksums, which differ from one run to the next."""
    return {key: value for key, value in entry.items() if "second" not in key and key not in ("checksum", "dataset")}


CASES = {
    "likelihoods": Case(likelihood_numbers, DOUBLE),
    "latents": Case(latent_numbers, DOUBLE),
    "log_weights": Case(log_weight_numbers, DOUBLE),
    "mnist_double": Case(mnist_double, DOUBLE),
    "mnist_evaluation": Case(mnist_evaluation, SINGLE, may_grow=True),
    "training": Case(training_numbers, DOUBLE),
    "training_levels": Case(training_of_levels, SINGLE),
    "training_captured": Case(captured_numbers, SINGLE, may_grow=True),
    "many_images": Case(many_images, SINGLE, may_grow=True),
    "bounds": Case(bound_numbers, DOUBLE),
    "certificate": Case(certificate_numbers, SINGLE, may_grow=True),
    "diagnosis": Case(diagnosis_numbers, SINGLE, may_grow=True),
    "commands": Case(command_numbers, SINGLE, may_grow=True),
    "state_names": Case(state_names, EXACT),
    "run_folder_names": Case(run_folder_names, EXACT, may_grow=True),
    "command_line": Case(command_line, EXACT, may_grow=True),
}
