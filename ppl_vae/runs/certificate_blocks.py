"""The work of a certificate in blocks, each of its own seed and kept when it is done: an interrupted one goes on."""

from __future__ import annotations

import hashlib
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppl_vae import runs
from ppl_vae.runs.fit_arguments import matmul_precision
from ppl_vae.runs.opening import Say
from ppl_vae.runtime.errors import CannotCapture, Interrupted
from ppl_vae.runtime.global_state import seeded
from ppl_vae.runtime.progress import progress_bar
from ppl_vae.vae import VAE

Tensors = dict[str, Tensor]
Progress = Callable[[int], None]

_SECONDS = "seconds"


class BlockStore:
    """What is done of a certificate: its blocks in a file that is replaced as a whole after each, and whole stages.

    Args:
        partial: the file of blocks, which goes at the end.
        complete: that of whole stages, which stays.
        stages: by each stage that will be asked for, JSON of all that decides its numbers. What was kept under the same
            name for anything else is not taken.
        common: what of that decides every stage. A whole stage that is not asked for now stays in the file as it is,
            where that is still the same.
        say: is told what is taken up, and what is not.
    """

    def __init__(
        self, partial: Path, complete: Path, stages: dict[str, dict[str, Any]], common: dict[str, Any], say: Say
    ) -> None:
        self._partial, self._complete, self._stages = partial, complete, stages
        tensors, scalars = _read(complete, say)
        self._whole, self._seconds = self._kept_stages(tensors, scalars, say)
        self._unasked = {
            stage: (_below(tensors, stage), key, scalars["seconds"][stage])
            for stage, key in scalars.get("stages", {}).items()
            if stage not in stages and not _others(common, {name: key.get(name) for name in common})
        }
        self._blocks = self._kept_blocks(say)

    def _kept_stages(
        self, tensors: Tensors, scalars: dict[str, Any], say: Say
    ) -> tuple[dict[str, Tensors], dict[str, float]]:
        same = [stage for stage, key in self._stages.items() if scalars.get("stages", {}).get(stage) == key]
        if same:
            say(f"Taken from {self._complete.name}, as measured with the same options: {', '.join(same)}.")
        return {stage: _below(tensors, stage) for stage in same}, {s: scalars["seconds"][s] for s in same}

    def _kept_blocks(self, say: Say) -> Tensors:
        tensors, scalars = _read(self._partial, say)
        kept = {stage: key for stage, key in scalars.get("stages", {}).items() if stage in self._stages}
        other = {stage: _others(key, self._stages[stage]) for stage, key in kept.items()}
        changed = sorted({name for names in other.values() for name in names})
        if changed:
            say(f"{self._partial.name} was begun with other {', '.join(changed)}: what depends on that starts over.")
        blocks = {name: v for name, v in tensors.items() if (stage := name.split("/")[0]) in kept and not other[stage]}
        count = len({name.rpartition("/")[0] for name in blocks})
        if count:
            say(f"Goes on: {self._partial.name} holds {count} finished block{'s' * (count != 1)}.")
        return blocks

    def whole(self, stage: str) -> Tensors | None:
        """The results of a whole stage; None where it is still to be done."""
        return self._whole.get(stage)

    def block(self, stage: str, number: int) -> Tensors | None:
        """The results of a finished block; None where it is still to be done."""
        return _below(self._blocks, f"{stage}/{number}") or None

    def keep(self, stage: str, number: int, results: Tensors) -> None:
        """Adds a block, on disk when this returns."""
        self._blocks |= {f"{stage}/{number}/{name}": value for name, value in results.items()}
        runs.save_tensors(self._partial, self._blocks, {"stages": self._stages})

    def join(self, stage: str, parts: list[Tensors]) -> Tensors:
        """A whole stage of its blocks: tensors joined along the first dimension, seconds summed."""
        names = parts[0].keys() - {_SECONDS}
        self._whole[stage] = {name: torch.cat([part[name] for part in parts]) for name in sorted(names)}
        self._seconds[stage] = sum(float(part[_SECONDS]) for part in parts)
        return self._whole[stage]

    @property
    def seconds(self) -> dict[str, float]:
        """What each stage took, over all of its interruptions."""
        return {stage: self._seconds[stage] for stage in self._stages}

    def save(self, others: Tensors) -> None:
        """Every stage as STAGE/NAME, and other tensors, into the file that stays."""
        whole = {stage: self._whole[stage] for stage in self._stages}
        whole |= {stage: tensors for stage, (tensors, _, _) in self._unasked.items()}
        stages = self._stages | {stage: key for stage, (_, key, _) in self._unasked.items()}
        seconds = self.seconds | {stage: seconds for stage, (_, _, seconds) in self._unasked.items()}
        tensors = {f"{stage}/{name}": v for stage, found in whole.items() for name, v in found.items()}
        runs.save_tensors(self._complete, tensors | others, {"stages": stages, "seconds": seconds})

    def remove_blocks(self) -> None:
        """They go, once everything of them stands elsewhere."""
        self._partial.unlink(missing_ok=True)


def _read(path: Path, say: Say) -> tuple[Tensors, dict[str, Any]]:
    """Nothing where there is no such file, or a damaged one, which is said."""
    if not path.exists():
        return {}, {}
    try:
        return runs.load_tensors(path)
    except ValueError as error:
        say(f"{error}; what it held is measured again.")
        return {}, {}


def _below(tensors: Tensors, prefix: str) -> Tensors:
    start = f"{prefix}/"
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}


def _others(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return [name for name in a.keys() | b.keys() if a.get(name) != b.get(name)]


def seed_of(seed: int, stage: str, number: int) -> int:
    """A seed for one block of one stage: what is drawn before it, or not, makes no difference to it."""
    digest = hashlib.sha256(f"{seed} {stage} {number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass
class StageContext:
    """What every stage works with.

    Args:
        vae: on its device, in evaluation mode.
        place: the device.
        seed: of the certificate.
        finished: the blocks that are done.
        compile: the word of --compile.
        compiles: whether that makes graphs of what is done often.
        say: takes each line for the reader.
        should_stop: asked after each block, whether to end there.
    """

    vae: VAE
    place: torch.device
    seed: int
    finished: BlockStore
    compile: str
    compiles: bool
    say: Say
    should_stop: Callable[[], bool] = lambda: False
    _not_compiled: dict[str, str] = field(default_factory=dict)  # by stage, why

    def compiled_or_not(self, stage: str, run: Callable[[bool], Tensors]) -> Tensors:
        """``run(True)`` where graphs are made and the stage can be one, else ``run(False)``.

        Raises:
            ValueError: --compile on, and it is impossible.
        """
        if not self.compiles or stage in self._not_compiled:
            return run(False)
        try:
            with warnings.catch_warnings():  # of torch's compiler, about what it does itself
                warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
                return run(True)
        except CannotCapture as error:
            if self.compile == "on":
                raise ValueError(f"--compile on: {error}") from None
            if str(error) not in self._not_compiled.values():
                self.say(f"Not compiled: {error}.")
            self._not_compiled[stage] = str(error)
            return run(False)


class _Bar:
    """A progress bar over blocks whose parts are counted by whoever does the work, of which only a guess is known."""

    def __init__(self, bar: Any) -> None:
        self._bar, self._begin, self._end, self._calls = bar, 0.0, 0.0, 1

    def begin(self, size: int, calls: int) -> None:
        self._begin, self._end, self._calls = self._bar.n, self._bar.n + size, max(1, calls)

    def update(self, count: int) -> None:
        step = count * (self._end - self._begin) / self._calls
        self._bar.update(max(0.0, min(step, self._end - self._bar.n)))

    def finish(self) -> None:
        self._bar.update(self._end - self._bar.n)


_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"  # blocks advance by fractions, which nobody would read

Compute = Callable[[slice, Progress, bool], Tensors]


def compute_blocks(
    bench: StageContext, stage: str, count: int, size: int, compute: Compute, *, calls: int, words: str
) -> Tensors:
    """What ``compute`` gives for each block of items, joined along the first dimension.

    Args:
        bench: with what it is computed.
        stage: the name that its blocks are kept by.
        count, size: items in all, and of a block; the last may be smaller.
        compute: the items' slice, a progress function and whether to compile -> tensors whose first dimension is the
            items'. It is called with torch's global generators seeded for the block.
        calls: about how much ``compute`` tells the progress function of in all.
        words: before the progress bar.
    """
    whole = bench.finished.whole(stage)
    if whole is not None:
        return whole
    parts: list[Tensors] = []
    with progress_bar(total=count, unit="item", desc=words, bar_format=_BAR) as shown, matmul_precision("float32"):
        bar = _Bar(shown)
        for number, start in enumerate(range(0, count, size)):
            items = slice(start, min(start + size, count))
            bar.begin(items.stop - items.start, calls)
            parts.append(block(bench, stage, number, partial(_seeded, bench, stage, number, items, compute, bar)))
            bar.finish()
    return bench.finished.join(stage, parts)


def _seeded(bench: StageContext, stage: str, number: int, items: slice, compute: Compute, bar: _Bar) -> Tensors:
    def run(compiled: bool) -> Tensors:
        with seeded(seed_of(bench.seed, stage, number), bench.place):
            return compute(items, bar.update, compiled)

    return bench.compiled_or_not(stage, run)


def block(bench: StageContext, stage: str, number: int, compute: Callable[[], Tensors]) -> Tensors:
    """One block: as it was kept, or computed, timed and kept; on the CPU.

    Raises:
        Interrupted: after the block, where ``should_stop`` said so.
    """
    kept = bench.finished.block(stage, number)
    if kept is not None:
        return kept
    started = time.monotonic()
    results = {name: value.detach().cpu() for name, value in compute().items()}
    results[_SECONDS] = torch.tensor(time.monotonic() - started, dtype=torch.double)
    bench.finished.keep(stage, number, results)
    if bench.should_stop():
        raise Interrupted("the finished blocks are kept, and the same command goes on from there")
    return results


def even_block(count: int, most: int) -> int:
    """ceil(count / ceil(count / most)): blocks of nearly one size, none above ``most``; one graph then fits most."""
    return math.ceil(count / math.ceil(count / most)) if count else most
