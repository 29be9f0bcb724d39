"""The words --compile, --precision and --average-decay, from the command line to a run's files."""

from __future__ import annotations

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._inductor.compile_fx as compiler
import torch._inductor.decomposition as decomposition
from small_run import SMALL, killed_at_save, save_bars, train_small

from ppl_vae import runs
from ppl_vae.commands import evaluate as evaluation
from ppl_vae.commands.evaluate import evaluate_run
from ppl_vae.commands.options import Evaluate
from ppl_vae.commands.train import resume_run
from ppl_vae.runs.resolve import load_splits, matmul_precision, resolve
from ppl_vae.runs.results import read_per_image
from ppl_vae.runtime import capture
from ppl_vae.runtime.errors import CannotCapture
from ppl_vae.training import loop

SCRIPTS = Path(__file__).parents[2] / "scripts"
NO_COMPILER = r"^--compile on: no C\+\+ compiler \(g\+\+ or clang\+\+\) is installed; --compile off does without$"


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(capture.shutil, "which", lambda *_, **__: None)


@pytest.fixture
def always_pays(monkeypatch):
    monkeypatch.setattr("ppl_vae.runs.resolve._RUNS_THAT_PAY", 1)


@pytest.fixture
def no_figures(monkeypatch):
    """Most of a small run's time; figures have tests of their own."""
    monkeypatch.setattr(sys.modules["ppl_vae.commands.train"], "is_drawn", lambda run: True)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return replace(SMALL, dataset=str(save_bars(tmp_path_factory.mktemp("data") / "bars.npz")))


def _train(options, folder):
    said = []
    train_small(folder, options, say=said.append)
    return said


def _resume(folder, **changes):
    said = []
    resume_run(str(folder), **({"epochs": None} | changes), say=said.append)
    return said


def _config(folder):
    return runs.read_json(folder / runs.CONFIG)["options"]


def _tensors(folder):
    return {name: runs.load_tensors(folder / name)[0] for name in (runs.MODEL, runs.TRAINING_STATE)}


def _assert_same_bits(folder, other):
    found, expected = _tensors(folder), _tensors(other)
    for name in expected:
        assert found[name].keys() == expected[name].keys()
        assert [key for key in expected[name] if not torch.equal(found[name][key], expected[name][key])] == [], name


# --- auto, on, off ---


@pytest.mark.parametrize(("batch_size", "epochs", "word"), [(20, 1000, "on"), (20, 999, "off"), (30, 1250, "on")])
def test_auto_compiles_where_five_thousand_steps_are_planned(graphs, small, batch_size, epochs, word):
    """100 images: 5 steps an epoch of 20 each, 4 of 30."""
    asked = replace(small, epochs=epochs, batch_size=batch_size)
    assert resolve(asked, load_splits(asked)).compile == word


def test_on_without_a_compiler_is_refused_before_anything_is_written(no_compiler, small, tmp_path):
    with pytest.raises(ValueError, match=NO_COMPILER):
        _train(replace(small, compile="on"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_auto_without_a_compiler_trains_as_off_does(no_compiler, always_pays, no_figures, small, tmp_path):
    for word in ("auto", "off"):
        _train(replace(small, compile=word), tmp_path / word)
        assert _config(tmp_path / word)["compile"] == "off"
    _assert_same_bits(tmp_path / "auto", tmp_path / "off")


@pytest.fixture
def cannot(monkeypatch):
    def refuse(*_, **__):
        raise CannotCapture("it is written in water")

    monkeypatch.setattr(loop, "CapturedSteps", refuse)


def test_where_the_capture_fails_auto_says_why_and_trains_as_off_does(
    cannot, graphs, always_pays, no_figures, small, tmp_path
):
    said = _train(replace(small, compile="auto"), tmp_path / "auto")
    _train(replace(small, compile="off"), tmp_path / "off")
    assert [line for line in said if "eager" in line and "it is written in water" in line]
    assert _config(tmp_path / "auto") == _config(tmp_path / "off")
    _assert_same_bits(tmp_path / "auto", tmp_path / "off")


# --- Resuming ---


def _assert_resumes_bit_for_bit(options, tmp_path):
    options = replace(options, checkpoint_seconds=0.0)
    _train(options, tmp_path / "undisturbed")
    for checkpoints in (2, 5, 8):  # within an epoch, between two, within the last
        folder = tmp_path / f"after-{checkpoints}"
        with killed_at_save(checkpoints):
            _train(options, folder)
        assert runs.load_step(folder / runs.TRAINING_STATE) == checkpoints
        torch.manual_seed(12345)
        assert f"Going on from step {checkpoints}." in _resume(folder)
        _assert_same_bits(folder, tmp_path / "undisturbed")
        one, other = (runs.read_evaluations(run)["test"] for run in (folder, tmp_path / "undisturbed"))
        assert one | {"seconds": 0} == other | {"seconds": 0}


@pytest.mark.thorough
@pytest.mark.parametrize("average_decay", [0.0, 0.99])
@pytest.mark.parametrize("compile", ["on", "off"])
def test_an_interrupted_run_ends_bit_for_bit_where_the_undisturbed_one_does(
    graphs, no_figures, small, tmp_path, compile, average_decay
):
    options = replace(small, compile=compile, average_decay=average_decay)
    _assert_resumes_bit_for_bit(options, tmp_path)
    assert bool(graphs) == (compile == "on")


@pytest.mark.thorough
def test_a_run_through_the_real_compiler_resumes_bit_for_bit(no_figures, small, tmp_path):
    if (reason := capture.capture_obstacle(torch.device("cpu"))) is not None:
        pytest.skip(reason)
    _assert_resumes_bit_for_bit(replace(small, compile="on"), tmp_path)


@pytest.mark.thorough
@pytest.mark.parametrize(("before", "after"), [("on", "off"), ("off", "on")])
def test_resuming_with_the_other_word_changes_the_config_and_says_so(
    graphs, no_figures, small, tmp_path, before, after
):
    _train(replace(small, compile=before), tmp_path)
    graphs.clear()
    said = _resume(tmp_path, epochs=3, compile=after)
    assert f"From here on --compile {after}: the same to rounding, and no longer bit for bit." in said
    assert _config(tmp_path)["compile"] == after
    assert len(graphs) == (after == "on")


def _interrupt_compiled(small, folder):
    options = replace(small, compile="on", checkpoint_seconds=0.0)
    with killed_at_save(3):
        _train(options, folder)


@pytest.mark.thorough
def test_where_compiling_fails_on_resuming_a_compiled_run_goes_on_eagerly(
    graphs, no_figures, small, tmp_path, monkeypatch
):
    """From the same state as a run that is asked to go on eagerly."""
    for name in ("fails", "off"):
        _interrupt_compiled(small, tmp_path / name)
    _resume(tmp_path / "off", compile="off")

    def fail(*_, **__):
        raise RuntimeError("outside of a MetricsContext")

    monkeypatch.setattr(compiler, "compile_fx_inner", fail)
    said = _resume(tmp_path / "fails")
    assert [line for line in said if "eager" in line and "outside of a MetricsContext" in line]
    assert _config(tmp_path / "fails")["compile"] == "off"
    _assert_same_bits(tmp_path / "fails", tmp_path / "off")


# --- Precision ---


@pytest.fixture
def no_bf16(monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)


@pytest.mark.parametrize(
    ("precision", "words"),
    [
        ("tf32", r"^--precision tf32: expected an NVIDIA GPU since Ampere, got cpu$"),
        ("bf16", r"^--precision bf16: expected hardware for it \(.*\), got cpu without$"),
    ],
)
def test_a_precision_that_this_machine_has_not_is_refused_before_anything_is_written(
    no_bf16, small, tmp_path, precision, words
):
    with pytest.raises(ValueError, match=words):
        _train(replace(small, precision=precision), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough
@pytest.mark.parametrize("compile", ["on", "off"])
def test_bf16_multiplies_in_training_and_never_in_the_final_evaluation(
    graphs, no_figures, small, tmp_path, monkeypatch, compile
):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)  # elsewhere it is emulated
    products, place, evaluate = {"training": set(), "evaluation": set()}, "training", evaluation.evaluate

    def in_evaluation(*args, **asked):
        nonlocal place
        place = "evaluation"
        return evaluate(*args, **asked)

    def record(module, _, output):
        if isinstance(module, torch.nn.Linear) and module.training:
            products["training"].add(output.dtype)
        elif isinstance(module, torch.nn.Linear) and place == "evaluation":
            products["evaluation"].add(output.dtype)

    monkeypatch.setattr(evaluation, "evaluate", in_evaluation)
    hook = torch.nn.modules.module.register_module_forward_hook(record)
    try:
        _train(replace(small, precision="bf16", compile=compile), tmp_path)
    finally:
        hook.remove()
    assert products == {"training": {torch.bfloat16}, "evaluation": {torch.float}}
    assert {weights.dtype for weights in _tensors(tmp_path)[runs.MODEL].values()} == {torch.float}


@pytest.mark.parametrize("before", [("highest", True), ("high", False), ("medium", True)])
@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_the_settings_of_products_are_put_back_even_after_an_error(precision, before):
    def settings():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    def put(values):
        torch.set_float32_matmul_precision(values[0])
        torch.backends.cudnn.allow_tf32 = values[1]

    at_first = settings()
    try:
        put(before)
        products = matmul_precision(precision)
        products.__enter__()
        assert settings() == ("high" if precision == "tf32" else "highest", precision == "tf32")
        assert not products.__exit__(KeyError, KeyError(), None)
        assert settings() == before
    finally:
        put(at_first)


# --- The scripts of the evaluation ---


def _run(monkeypatch, script, *words):
    monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
    runpy.run_path(str(SCRIPTS / script), run_name="__main__")


def test_the_evaluation_is_the_same_for_each_word_of_compile(
    graphs, always_pays, no_figures, small, tmp_path, monkeypatch
):
    _train(replace(small, compile="off"), tmp_path)
    found, captured = {}, {}
    for word in ("off", "on", "auto"):
        graphs.clear()
        _run(monkeypatch, "evaluate_log_likelihood.py", tmp_path, "--num-particles", 30, "--compile", word)
        found[word] = read_per_image(tmp_path, "test").result.log_evidence
        captured[word] = len(graphs)
    assert captured == {"off": 0, "on": 1, "auto": 1}
    for word in ("on", "auto"):
        torch.testing.assert_close(found[word], found["off"], rtol=1e-6, atol=0)


def test_an_evaluation_whose_capture_fails_goes_on_as_it_is_with_the_reason(
    graphs, always_pays, no_figures, small, tmp_path, monkeypatch
):
    def refuse(*_, **__):
        raise CannotCapture("it is written in water")

    _train(replace(small, compile="off"), tmp_path)
    monkeypatch.setattr("ppl_vae.evidence.evaluation.CapturedTerms", refuse)
    asked = {"split": "test", "num_particles": 30, "images": None, "device": "cpu", "seed": 0}
    results, said = {}, []
    for word in ("auto", "off"):
        evaluate_run(Evaluate(str(tmp_path), **asked, compile=word), say=said.append)
        results[word] = read_per_image(tmp_path, "test").result.log_evidence
    assert any("it is written in water" in line for line in said)
    assert torch.equal(results["auto"], results["off"])
    with pytest.raises(ValueError, match=r"^--compile on: it is written in water"):
        evaluate_run(Evaluate(str(tmp_path), **asked, compile="on"), say=said.append)


def test_a_torch_whose_compiler_has_other_names_trains_eagerly(always_pays, no_figures, small, tmp_path, monkeypatch):
    monkeypatch.setattr(capture, "capture_obstacle", lambda device: None)
    monkeypatch.delattr(decomposition, "select_decomp_table")
    said = _train(replace(small, compile="auto"), tmp_path)
    assert [line for line in said if "eager" in line and "select_decomp_table" in line]
    assert _config(tmp_path)["compile"] == "off"
