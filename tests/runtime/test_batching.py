"""Memory that runs out: the work goes on with less at once, and its numbers stay right."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracles import LinearGaussian
from torch.testing import assert_close

from ppl_vae.evidence import evaluation
from ppl_vae.evidence.evaluation import evaluate
from ppl_vae.runtime import batching
from ppl_vae.runtime.errors import is_out_of_memory
from ppl_vae.weights import log_weight_terms


@pytest.fixture(autouse=True)
def nothing_to_release(monkeypatch):
    """Errors that are made up hold no tensors, and to search all of pytest's objects for them takes long."""
    monkeypatch.setattr(batching, "release", lambda device: None)


def _real_error() -> BaseException:
    try:
        torch.empty(2**58, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError("2^58 bytes were there")


ERRORS = {
    "this machine's own": _real_error(),
    "Python's": MemoryError(),
    "a GPU's": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "Windows'": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    "of a mapped file": RuntimeError("unable to mmap 4096 bytes from file <x>: Cannot allocate memory (12)"),
    "cuBLAS's": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_an_error_of_memory_is_known(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes differ"),
        RuntimeError("an illegal memory access"),
        ValueError("out of memory"),
        KeyboardInterrupt(),
    ],
)
def test_another_error_is_none_of_memory(error):
    assert not is_out_of_memory(error)


# --- Evaluation ---


def _of_at_most(pairs: int, held: list[int]):
    """log_weight_terms on a machine with memory for so many pairs of a particle and an image."""

    def terms(model, guide, x, num_particles):
        if num_particles * len(x) > pairs:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory")
        held.append(num_particles * len(x))
        return log_weight_terms(model, guide, x, num_particles)

    return terms


@pytest.mark.thorough
@pytest.mark.parametrize("pairs", [1, 3, 10, 30])
@pytest.mark.parametrize(("num_images", "num_particles", "first_pass"), [(9, 1, 9), (9, 20, 40), (2, 500, 25)])
def test_an_evaluation_that_runs_out_of_memory_ends_with_the_exact_number(
    monkeypatch, pairs, num_images, num_particles, first_pass
):
    """With the exact posterior every weight is the evidence, whatever the draws; each particle is counted once."""
    oracle = LinearGaussian.random()
    held: list[int] = []
    said: list[str] = []
    monkeypatch.setitem(batching.PASS_BYTES, "cpu", 40 * 8 * 6 * 6)
    monkeypatch.setattr(evaluation, "log_weight_terms", _of_at_most(pairs, held))
    x = oracle.draw(num_images)
    found = evaluate(oracle.vae(), x, num_particles=num_particles, seed=0, say=said.append)
    assert_close(found.log_evidence, oracle.log_evidence(x), rtol=1e-9, atol=0)
    assert_close(found.ess, torch.full((num_images,), float(num_particles), dtype=torch.double), rtol=1e-9, atol=0)
    assert sum(held) >= num_images * num_particles  # what a failed group had done already is done again
    assert sum("Out of memory with" in line for line in said) == (first_pass > pairs)


def test_a_group_that_is_done_again_draws_from_its_own_seed_again(monkeypatch):
    """Memory that is short for a moment, at the second image's first pass: the other images' numbers do not move."""
    oracle = LinearGaussian.random()
    vae, x = oracle.vae(widen=1.5), oracle.draw(3)
    monkeypatch.setitem(batching.PASS_BYTES, "cpu", 40 * 8 * 6 * 6)
    undisturbed = evaluate(vae, x, num_particles=40, seed=0).log_evidence
    asked = []

    def short_once(model, guide, images, num_particles):
        asked.append(num_particles)
        if len(asked) == 2:
            torch.rand(7)  # what the failed attempt had drawn
            raise MemoryError
        return log_weight_terms(model, guide, images, num_particles)

    monkeypatch.setattr(evaluation, "log_weight_terms", short_once)
    found = evaluate(vae, x, num_particles=40, seed=0).log_evidence
    assert asked == [40, 40, 20, 20, 20, 20]
    # A torch generator gives 20 x 3 numbers in another order than half of 40 x 3, so these are compared by size.
    assert torch.equal(found[0], undisturbed[0])
    assert_close(found, undisturbed, rtol=0, atol=0.5)


@pytest.mark.thorough
def test_a_process_with_little_memory_evaluates_in_smaller_passes():
    """The kernel's limit: passes of a million particles, which hold some hundred megabytes, under 150 more."""
    program = """
import resource, torch
from oracles import LinearGaussian
from ppl_vae.evidence import evaluation
from ppl_vae.runtime import batching
oracle = LinearGaussian.random()
x = oracle.draw(2)
evaluation.evaluate(oracle.vae(), x, num_particles=10, seed=0)
held = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (held + 150 * 2**20, resource.RLIM_INFINITY))
try:
    torch.empty(300 * 2**20, dtype=torch.uint8)
except RuntimeError:
    batching.PASS_BYTES["cpu"] = 8 * 6 * 6 * 1_000_000
    found = evaluation.evaluate(oracle.vae(), x, num_particles=1_000_000, seed=0, say=print).log_evidence
    print(float((found - oracle.log_evidence(x)).abs().max()))
else:
    print("no limit here")
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    if "no limit here" in done.stdout:
        pytest.skip("this system's RLIMIT_DATA limits nothing")
    line, error = done.stdout.splitlines()
    assert line.startswith("Out of memory with 1,000,000 particles at once: continuing with 500,000")
    assert float(error) < 1e-6


MAPPED_BLOCKS = """
import ctypes
from ppl_vae.runtime.batching import keep_freed_memory

class Statistics(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks u f k".split()]

keep_freed_memory()
library = ctypes.CDLL(None)
library.malloc.argtypes, library.mallinfo2.restype = [ctypes.c_size_t], Statistics
before = library.mallinfo2().hblks
library.malloc(20_000_000)
print(library.mallinfo2().hblks - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
@pytest.mark.parametrize(("own_setting", "mapped"), [({}, 0), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, 1)])
def test_blocks_of_a_pass_come_from_the_heap_unless_the_user_has_settings(own_setting, mapped):
    """What is mapped by itself is returned to the system when it is freed."""
    words, environment = [sys.executable, "-c", MAPPED_BLOCKS], os.environ | own_setting
    assert int(subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout) == mapped
