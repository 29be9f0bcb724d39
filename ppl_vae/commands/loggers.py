"""The numbers of metrics.jsonl and evaluation.json as TensorBoard's events, in the run's folder tensorboard/."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ppl_vae import runs
from ppl_vae.runs.options import Options
from ppl_vae.runtime import ranks as distributed

EVENTS = "tensorboard"
Log = Callable[[dict[str, Any]], None]


def check_tensorboard(options: Options) -> None:
    """Raises ValueError if events are asked for and the package is missing."""
    if options.tensorboard == "on":
        _writer_class()


@contextmanager
def metric_events(folder: Path, options: Options, *, step: int) -> Iterator[Log]:
    """Yields a function that writes the numbers of each record of metrics.jsonl by its step.

    Nothing where ``--tensorboard`` is off, and on ranks that do not write.

    Args:
        folder: the run's folder.
        options: the run's.
        step: where training goes on; events after it, of work that is done again, are purged.
    """
    with _writer(folder, options, purge_step=step + 1 if (folder / EVENTS).exists() else None) as add:
        yield lambda record: add("", record, record["step"])


def log_evaluation(folder: Path, options: Options, entry: dict[str, Any]) -> None:
    """Writes the numbers of an evaluation by the step of its weights: test/log_likelihood/mean and so on."""
    with _writer(folder, options, purge_step=None) as add:
        add(f"{entry['split']}/", entry, entry["step"])


@contextmanager
def _writer(folder: Path, options: Options, *, purge_step: int | None) -> Iterator[Callable[..., None]]:
    if options.tensorboard != "on" or not distributed.is_writer():
        yield lambda *_: None
        return
    if (folder / EVENTS).is_symlink():
        raise ValueError(f"{folder / EVENTS}: expected a folder of the run's own, got a link to elsewhere")
    with _errors_of_thread() as met:
        with _named(folder / EVENTS):
            writer = _writer_class()(str(folder / EVENTS), purge_step=purge_step)

        def add(prefix: str, values: dict[str, Any], step: int) -> None:
            with _named(folder / EVENTS):
                for name, value in _numbers(values):
                    if name != "step":
                        writer.add_scalar(prefix + name, value, step)
                writer.flush()

        try:
            yield add
        except BaseException:
            with suppress(OSError):  # what ended the block is told, not what follows from it
                writer.close()
            raise
        with _named(folder / EVENTS):
            writer.close()
            if met:
                raise met[0]


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Adds the folder's name to errors of writing."""
    try:
        yield
    except OSError as error:
        raise runs.add_file_name(error, folder) from None


@contextmanager
def _errors_of_thread() -> Iterator[list[OSError]]:
    """Collects the writing errors of the writer's thread, in place of their tracebacks."""
    former, met = threading.excepthook, []

    def hook(args: threading.ExceptHookArgs) -> None:
        if isinstance(args.exc_value, OSError) and "tensorboard" in type(args.thread).__module__:
            met.append(args.exc_value)
        else:
            former(args)

    threading.excepthook = hook
    try:
        yield met
    finally:
        threading.excepthook = former


def _numbers(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number of an object and of the objects in it, by its path of names."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + name, float(value)


def _writer_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "--tensorboard on: expected the package tensorboard, which is not installed; pip install "
            "'ppl_vae[tensorboard]' brings it"
        ) from None
    return SummaryWriter
