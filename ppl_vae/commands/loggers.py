"""The numbers of metrics.jsonl and evaluation.json as TensorBoard's events, in the run's folder tensorboard/."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
        _import_writer()


@contextmanager
def metric_events(folder: Path, options: Options, *, step: int) -> Iterator[Log]:
    """Yields a function that writes the numbers of each record of metrics.jsonl by its step.

    It does nothing with ``--tensorboard off``, and on ranks that do not write.

    Args:
        folder: The run's folder.
        options: The run's options.
        step: The step at which training starts or resumes. Events after it are purged, since the work is done again.
    """
    with _open_writer(folder, options, purge_step=step + 1 if (folder / EVENTS).exists() else None) as writer:
        yield lambda record: _write_numbers(folder, writer, "", record, record["step"])


def log_evaluation(folder: Path, options: Options, entry: dict[str, Any]) -> None:
    """Writes the numbers of an evaluation by the step of its weights: test/log_likelihood/mean and so on."""
    with _open_writer(folder, options, purge_step=None) as writer:
        _write_numbers(folder, writer, f"{entry['split']}/", entry, entry["step"])


@contextmanager
def _open_writer(folder: Path, options: Options, *, purge_step: int | None) -> Iterator[Any]:
    """TensorBoard's writer, or None if nothing is written."""
    if options.tensorboard != "on" or not distributed.is_writer():
        yield None
        return
    if (folder / EVENTS).is_symlink():
        raise ValueError(f"{folder / EVENTS}: expected a folder of the run's own, got a link to elsewhere")
    with _import_writer()(str(folder / EVENTS), purge_step=purge_step) as writer:
        yield writer


def _write_numbers(folder: Path, writer: Any, prefix: str, values: dict[str, Any], step: int) -> None:
    if writer is None:
        return
    try:
        for name, value in _iterate_numbers(values):
            if name != "step":
                writer.add_scalar(prefix + name, value, step)
        writer.flush()
    except OSError as error:
        raise runs.add_file_name(error, folder / EVENTS) from None


def _iterate_numbers(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number of an object and of the objects in it, by its path of names."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _iterate_numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + name, float(value)


def _import_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "--tensorboard on: expected the package tensorboard, which is not installed; pip install "
            "'ppl_vae[tensorboard]' brings it"
        ) from None
    return SummaryWriter
