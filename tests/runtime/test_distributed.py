"""Several ranks train what one process trains; what one of them meets ends all."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import distributed_worker as worker
import pyro
import pyro.distributions as dist
import pytest
import torch
from per_image import free_bits
from safetensors.torch import load_file
from small_run import save_bars

from ppl_vae import runs
from ppl_vae.runtime.noise import _RANDOM, SharedNoise
from ppl_vae.runtime.ranks import BatchShare

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[2]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def _run(folder: Path, num_ranks: int, *cases: str) -> list[int]:
    """The ranks' exit codes."""
    folder.mkdir(exist_ok=True)
    words = [sys.executable, str(ROOT / "tests" / "distributed_worker.py"), str(folder), str(num_ranks), *cases]
    done = subprocess.run(words, env=ONE_THREAD, capture_output=True, text=True, timeout=500)
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _says(folder: Path, case: str, num_ranks: int) -> list[str]:
    return [(folder / f"{case}.{rank}.txt").read_text() for rank in range(num_ranks)]


def _assert_same(one: Path, other: Path, *, atol: float) -> None:
    """Weights, moments, averages and best weights are the same to rounding, and random numbers to the bit."""
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    assert any(name.startswith("adam/") for name in a)
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], rtol=0, atol=0 if name.startswith("rng/") else atol, msg=name)


COMPILED = tuple(case for case in worker.CASES if case.startswith("compiled"))
EAGER = ("elbo", "iaf", "free bits", "dreg", "top-down", "vamp", "clipped", "refitted", "small batches", "streamed")
FURTHER = tuple(case for case in worker.CASES if case not in (*EAGER, *COMPILED))
IN_TWO = (*EAGER, "interrupted", "exchanges", "not finite", "refused")
IN_THREE = ("free bits", "small batches", "exchanges", "differs", "dies")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folders of 1, 2 and 3 ranks, and the exit codes."""
    folder = tmp_path_factory.mktemp("ranks")
    cases = {1: EAGER, 2: IN_TWO, 3: IN_THREE}
    codes = {num_ranks: _run(folder / str(num_ranks), num_ranks, *cases[num_ranks]) for num_ranks in cases}
    return folder, codes


# --- The same training ---


@pytest.mark.parametrize("case", EAGER)
def test_two_ranks_train_what_one_process_trains(trained, case):
    """51 steps in float64, of batches of 10, 10 and 1 image."""
    folder, _ = trained
    _assert_same(folder / "1" / f"{case}.safetensors", folder / "2" / f"{case}.safetensors", atol=1e-10)


def test_training_moves_every_weight_far_beyond_the_tolerance(trained):
    """The control: equal weights would be no wonder where nothing is trained."""
    folder, _ = trained
    torch.set_default_dtype(torch.double)
    try:
        vae, _ = worker.built({})
    finally:
        torch.set_default_dtype(torch.float)
    saved = load_file(folder / "1" / "elbo.safetensors")
    for name, w in vae.named_parameters():
        assert (saved[f"weights/{name}"] - w).abs().max() > 1e-2


@pytest.mark.slow
def test_two_and_three_ranks_train_what_one_process_trains_with_all_other_parts(tmp_path):
    for num_ranks in (1, 2, 3):
        assert _run(tmp_path / str(num_ranks), num_ranks, *FURTHER) == [0] * num_ranks
    for case in FURTHER:
        atol = 1e-4 if case == "single precision" else 1e-10
        for num_ranks in (2, 3):
            one, other = (tmp_path / str(n) / f"{case}.safetensors" for n in (1, num_ranks))
            _assert_same(one, other, atol=atol)


def test_a_training_stops_on_all_ranks_where_one_is_asked_to(trained):
    folder, _ = trained
    assert _says(folder / "2", "interrupted", 2) == ["stopped at 20"] * 2


def test_a_checkpoint_of_two_ranks_goes_on_in_one_process(trained, tmp_path):
    """From the middle of an epoch to the end of the undisturbed training of one process."""
    folder, _ = trained
    for name in ("from.safetensors", "from.json"):
        (tmp_path / name).write_bytes((folder / "2" / name).read_bytes())
    _run(tmp_path, 1, "elbo")
    _assert_same(folder / "1" / "elbo.safetensors", tmp_path / "elbo.safetensors", atol=1e-10)


@pytest.mark.slow  # it compiles nine graphs
def test_compiled_steps_of_two_ranks_are_those_of_one_process(tmp_path):
    for num_ranks in (1, 2):
        assert _run(tmp_path / str(num_ranks), num_ranks, *COMPILED, "not finite, compiled") == [0] * num_ranks
    for case in COMPILED:
        _assert_same(tmp_path / "1" / f"{case}.safetensors", tmp_path / "2" / f"{case}.safetensors", atol=1e-10)
    one, two = (_says(tmp_path / str(n), "not finite, compiled", n) for n in (1, 2))
    assert one[0].startswith("step 4: the loss is nan: site '")
    assert set(two) == set(one)


# --- What ends all ranks ---


def test_what_the_ranks_exchange_is_exact(trained):
    folder, _ = trained
    for num_ranks in (2, 3):
        total = num_ranks * (num_ranks + 1) / 2
        expected = (total, True, 0, True, False, ["é", 0], list(range(num_ranks)))
        assert _says(folder / str(num_ranks), "exchanges", num_ranks) == [repr(expected)] * num_ranks


def test_a_number_that_is_not_finite_ends_all_ranks_in_the_same_words(trained):
    folder, _ = trained
    words = _says(folder / "2", "not finite", 2)
    assert words[0] == words[1]
    assert words[0].startswith("step 4: the loss is nan")


def test_a_rank_that_dies_ends_the_others(trained):
    folder, codes = trained
    assert codes[2] == [0, 0]
    assert codes[3] == [0, 0, -9]
    for words in _says(folder / "3", "dies", 2):
        assert words.startswith("ConnectionError: another process ended")
        assert "another process ended" in words


def test_ranks_whose_weights_differ_are_told(trained):
    folder, _ = trained
    for words in _says(folder / "3", "differs", 3):
        assert words.startswith(
            "RanksDiffer: step 3: expected the same weights on all ranks, got others than rank 0 on 2"
        )


def test_noise_of_which_no_rank_knows_its_rows_is_refused_by_name(trained):
    folder, _ = trained
    for words in _says(folder / "2", "refused", 2):
        assert words.startswith("ValueError: torch.dropout: under several ranks")


# --- The noise of the whole batch ---

WHOLE, START, STOP = 7, 2, 5


@pytest.fixture
def noise():
    found = SharedNoise()
    found.share = BatchShare(WHOLE, START, STOP, (STOP - START) / WHOLE)
    return found


DRAWS = {
    "rand": lambda n: torch.rand(2, n, 3),
    "rand of a size": lambda n: torch.rand((2, n, 3), dtype=torch.double),
    "randn": lambda n: torch.randn(size=(2, n, 3)),
    "rand_like": lambda n: torch.rand_like(torch.zeros(2, n, 3)),
    "randn_like": lambda n: torch.randn_like(torch.zeros(2, n, 3, dtype=torch.double)),
    "normal_": lambda n: torch.empty(2, n, 3).normal_(1.0, 2.0),
    "uniform_": lambda n: torch.empty(2, n, 3).uniform_(-1.0, 2.0),
    "exponential_": lambda n: torch.empty(2, n, 3).exponential_(),
    "normal": lambda n: torch.normal(torch.ones(2, n, 3), torch.ones(2, n, 3)),
    "bernoulli": lambda n: torch.bernoulli(torch.full((2, n, 3), 0.3)),
    "a normal of torch": lambda n: torch.distributions.Normal(torch.zeros(n, 3), 1.0).rsample((2,)),
    "a logistic of torch": lambda n: torch.distributions.Gumbel(torch.zeros(n, 3), 1.0).rsample((2,)),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_rank_draws_its_rows_of_what_one_process_draws(noise, draw):
    torch.manual_seed(1)
    whole, after = draw(WHOLE), torch.rand(1)
    torch.manual_seed(1)
    with noise.along(-2):
        rows = draw(STOP - START)
    assert torch.equal(rows, whole[:, START:STOP])
    assert torch.equal(torch.rand(1), after)


def test_at_a_site_of_a_program_the_images_are_left_of_its_event(noise):
    def program(n):
        with pyro.plate("particles", 4, dim=-2), pyro.plate("images", n, dim=-1):
            one = pyro.sample("one", dist.Normal(torch.zeros(n, 3), 1.0).to_event(1))
            return one, pyro.sample("two", dist.Normal(one[..., 0], 1.0))

    torch.manual_seed(1)
    one, two = program(WHOLE)
    torch.manual_seed(1)
    with noise.along(None):
        rows = program(STOP - START)
    assert torch.equal(rows[0], one[:, START:STOP])
    assert torch.equal(rows[1], two[:, START:STOP])


REFUSED = {
    "poisson": lambda: torch.poisson(torch.ones(3, 2)),
    "multinomial": lambda: torch.multinomial(torch.ones(3, 2), 1),
    "randperm": lambda: torch.randperm(3),
    "randint": lambda: torch.randint(5, (3,)),
    "_standard_gamma": lambda: torch.distributions.Gamma(torch.ones(3, 2), 1.0).rsample(),
    "dropout": lambda: torch.nn.Dropout(0.5)(torch.ones(3, 2)),
    "gumbel_softmax": lambda: torch.nn.functional.gumbel_softmax(torch.ones(3, 2)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_noise_whose_amount_hangs_on_values_is_refused_by_name(noise, name):
    with noise.along(0), pytest.raises(ValueError, match=f"torch.{name}: under several ranks"):
        REFUSED[name]()


def test_every_random_operation_of_torch_is_known():
    """By torch's own mark on its operations; the names of those that hide behind another function are left out."""
    inner = ("_cudnn", "miopen", "_fused", "_flash", "_efficient", "_scaled_dot_product", "rrelu_", "normal_functional")
    packets = {name: getattr(torch.ops.aten, name) for name in dir(torch.ops.aten) if not name.startswith("__")}
    marked = {
        name
        for name, packet in packets.items()
        if hasattr(packet, "overloads")
        and any(torch.Tag.nondeterministic_seeded in getattr(packet, o).tags for o in packet.overloads())
    }
    assert {name for name in marked if not name.startswith(inner)} - _RANDOM == set()
    assert marked & {"rand", "normal_", "poisson", "dropout"}


# --- Free bits ---


def test_free_bits_decide_by_the_mean_over_the_batch(noise):
    """Without ranks: sum_l max(lambda, mean_n KL_nl), written out, for a latent below lambda and one above."""
    loc = torch.tensor([[0.1, 2.0], [0.2, 1.0]], dtype=torch.double, requires_grad=True)

    def guide(x):
        with pyro.plate("images", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc, torch.ones_like(loc)).to_event(1))

    def model(x):
        with pyro.plate("images", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros_like(loc), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    x = torch.zeros(2, dtype=torch.double)
    loss = free_bits(model, guide, x, free_nats=0.3)
    means = [(0.01 + 0.04) / 4, (4 + 1) / 4]
    assert float(loss.detach()) == pytest.approx(math.log(2 * math.pi) / 2 + max(0.3, means[0]) + max(0.3, means[1]))
    loss.backward()
    torch.testing.assert_close(loc.grad, torch.tensor([[0.0, 1.0], [0.0, 0.5]], dtype=torch.double))


# --- The command ---


def test_torchrun_trains_evaluates_and_draws_one_run(tmp_path):
    """Two processes, one folder, every line said once."""
    path = save_bars(tmp_path / "bars.npz")
    words = ["--standalone", "--nproc-per-node", "2", str(ROOT / "scripts" / "train_svi.py"), "--dataset", str(path)]
    words += ["--network", "mlp", "--hidden", "8", "--latent-dim", "2", "--epochs", "1", "--batch-size", "30"]
    words += ["--prior", "standard-normal", "--compile", "off", "--images", "20", "--evaluation-particles", "5"]
    words += ["--run-dir", str(tmp_path / "run")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *words]
    done = subprocess.run(torchrun, env=ONE_THREAD, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Run folder") == done.stdout.count("log-likelihood -") == 1
    folder = tmp_path / "run"
    assert runs.read_json(folder / runs.ENVIRONMENT)["ranks"] == 2
    assert runs.read_json(folder / runs.EVALUATION)["test"]["num_images"] == 20
    assert runs.load_tensors(folder / runs.TRAINING_STATE)[1]["step"] == 4
    assert len((folder / runs.METRICS).read_text().splitlines()) == 1
    assert (folder / "figures" / "training_curves.png").is_file()
