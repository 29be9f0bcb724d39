"""What is written to terminals and logs: in any encoding, from a notebook, and without torch's own warnings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from small_run import SMALL, save_bars

from ppl_vae import runs
from ppl_vae.runs.options import format_flag
from ppl_vae.runs.results import to_json

SCRIPTS = Path(__file__).parents[2] / "scripts"


def run_main(main: str, *, encoding: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A main function, by its lines, as a script runs it, in a process of its own."""
    program = f"from ppl_vae.runtime.process import run_script\ndef main():\n    {main}\nrun_script(main)\n"
    asked = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"} | environment
    return subprocess.run([sys.executable, "-c", program], env=asked, capture_output=True, timeout=300)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize(
    ("encoding", "text", "expected"),
    [
        ("ascii", "-82.4 ± 0.3", b"-82.4 \\xb1 0.3"),
        ("latin-1", "-82.4 ± 0.3 ≤ 1", b"-82.4 \xb1 0.3 \\u2264 1"),
        ("utf-8", "-82.4 ± 0.3", "-82.4 ± 0.3".encode()),
        ("utf-8", "file \udcff", b"file \\udcff"),  # a file's name in Latin-1, as Python reads it
    ],
)
def test_characters_that_the_encoding_lacks_are_escaped(stream, encoding, text, expected):
    done = run_main(f"import sys; print({text!a}, file=sys.{stream})", encoding=encoding)
    assert done.returncode == 0, done.stderr
    assert getattr(done, stream).splitlines() == [expected]


def test_an_error_with_such_a_character_is_one_line():
    done = run_main("raise ValueError('expected 1 ± 2')", encoding="ascii")
    assert (done.returncode, done.stderr.splitlines()) == (1, [b"error: expected 1 \\xb1 2"])


COMPILE = """
import torch, torch._inductor.compile_fx as compiler
from ppl_vae.runtime import capture
compiler.compile_fx_inner = lambda graph, inputs: lambda tensors: graph(*tensors)
capture.capture_obstacle = lambda device: None
capture.compile_function(lambda x: (2 * x,), [torch.ones(3)])
import torch.utils.cpp_extension
"""


@pytest.mark.thorough
def test_compiling_is_silent_where_a_cuda_toolkit_is_installed_without_a_gpu(tmp_path):
    settings = os.environ | {"CUDA_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=settings, capture_output=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A training by the script, as from a notebook's cell, with an ASCII log."""
    folder = tmp_path_factory.mktemp("run")
    dataset = save_bars(folder / "bars.npz")
    words = [
        word
        for name, value in to_json(SMALL).items()
        if value is not None and name not in ("dataset", "stream")
        for word in (format_flag(name), *(map(str, value) if isinstance(value, list) else [str(value)]))
    ]
    command = [sys.executable, SCRIPTS / "train_svi.py", "--dataset", dataset, *words, "--run-dir", folder / "run"]
    settings = {
        "MPLBACKEND": "module://a_notebook_of_other_packages",
        "PYTHONIOENCODING": "ascii",
        "PYTHONUTF8": "0",
        "OMP_NUM_THREADS": "1",
    }
    return folder / "run", subprocess.run(command, env=os.environ | settings, capture_output=True, timeout=300)


def test_a_log_has_a_line_for_each_epoch_and_no_bar_whatever_the_backend_of_a_notebook(trained):
    folder, done = trained
    assert done.returncode == 0
    with Image.open(folder / runs.FIGURES / "reconstructions.png") as picture:
        picture.load()
    assert b"%|" not in done.stdout + done.stderr
    assert b"\r" not in done.stdout + done.stderr
    records = runs.read_metrics(folder)
    lines = [line for line in done.stdout.decode().splitlines() if line.startswith("Epoch ")]
    assert len(lines) == len(records) == SMALL.epochs
    for epoch, (line, record) in enumerate(zip(lines, records, strict=True), 1):
        assert line.startswith(f"Epoch {epoch} of {SMALL.epochs}: ")
        assert f"{record['validation_elbo_nats_per_image']:.2f}" in line
        assert f"{record['train_loss_nats_per_image']:.2f}" in line


def test_a_training_ends_with_an_ascii_log(trained):
    _, done = trained
    assert done.returncode == 0, done.stderr
    assert b"\\xb1" in done.stdout.decode("ascii").encode()
