"""The numbers of metrics.jsonl and evaluation.json as TensorBoard's events, in the run's folder tensorboard/."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ppl_vae import runs
from ppl_vae.runs.options import Options
from ppl_vae.runtime import ranks as distributed

EVENTS = "tensorboard"
Log = Callable[[Mapping[str, object]], None]


def check_tensorboard(options: Options) -> None:
    """Raises ValueError if events are asked for and the package is missing."""
    if options.tensorboard == "on":
        _import_writer()


@contextmanager
def open_events(folder: Path, options: Options, *, step: int | None = None, prefix: str = "") -> Iterator[Log]:
    """Yields a function that writes every number of a record by the record's step.

    It does nothing with ``--tensorboard off``, and on ranks that do not write.

    Args:
        folder: The run's folder.
        options: The run's options.
        step: The step at which training starts or resumes. Events after it are purged, since the work is done again.
        prefix: Begins the name of each number; the names of nested objects follow, as in test/log_likelihood/mean.

    Raises:
        ValueError: The folder of events is a link, or tensorboard is not installed.
    """
    if options.tensorboard != "on" or not distributed.is_writer():
        yield lambda record: None
        return
    path = folder / EVENTS
    if path.is_symlink():
        raise ValueError(f"{path}: expected a folder of the run's own, got a link to elsewhere")
    with _import_writer()(str(path), purge_step=None if step is None or not path.exists() else step + 1) as writer:

        def write(record: Mapping[str, object]) -> None:
            try:
                for name, value in _iterate_numbers(record, prefix):
                    if name != f"{prefix}step":
                        writer.add_scalar(name, value, record["step"])
                writer.flush()
            except OSError as error:
                raise runs.add_file_name(error, path) from None

        yield write


def _iterate_numbers(values: Mapping[str, object], prefix: str) -> Iterator[tuple[str, float]]:
    """Every number of an object and of the objects in it, by its path of names."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _iterate_numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + name, float(value)


def _import_writer() -> type:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "--tensorboard on: expected the package tensorboard, which is not installed; pip install "
            "'ppl_vae[tensorboard]' brings it"
        ) from None
    return SummaryWriter
