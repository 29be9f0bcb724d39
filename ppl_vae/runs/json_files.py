"""Strict JSON, with a checksum where a flipped bit would pass for a number."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from ppl_vae.runs.files import write_bytes
from ppl_vae.runs.names import CONFIG, ENVIRONMENT, EVALUATION, MODEL

MOST_BYTES = 64 * 2**20  # of a JSON file that is read
CHECKSUM = "checksum"
_ALWAYS = (CONFIG, ENVIRONMENT, EVALUATION)  # have one

# What to do where a file is damaged, and the others are not.
_ADVICE = {
    CONFIG: f"; {MODEL} and the training state are not touched by that",
    EVALUATION: f"; {MODEL} is not touched by that, and without the file its evaluations are measured again",
}


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any, *, checksum: bool = False) -> None:
    """Strict JSON, numbers that are not finite as null.

    Args:
        path: the file.
        value: what it will hold.
        checksum: whether a checksum is added to the object, which ``read_json`` checks and takes off. Config,
            environment and evaluations always have one.
    """
    value = finite(value)
    if checksum or path.name in _ALWAYS:
        value = value | {CHECKSUM: _checksum(value)}
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """What ``write_json`` wrote, without its checksum.

    Raises:
        ValueError: the file is missing, too large, no JSON object, or is not what its checksum says.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(
                f"{path}: expected at most {MOST_BYTES // 2**20} MiB of JSON, got {path.stat().st_size:,} bytes"
            )
        value = json.loads(path.read_bytes().decode())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; is {path.parent} a run folder?") from None
    except NotADirectoryError:
        raise ValueError(f"{path.parent}: expected a run folder, got a file") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: expected a file, got a folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged: not JSON ({error}){_ADVICE.get(path.name, '')}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: damaged: expected a JSON object, got {type(value).__name__}")
    told = value.pop(CHECKSUM, None)
    if told is not None and told != _checksum(value):
        raise ValueError(
            f"{path}: damaged, or edited by hand: its checksum is that of another content"
            f"{_ADVICE.get(path.name, '')}; deleting its line {CHECKSUM!r} accepts it as it is"
        )
    return value


def _checksum(value: dict[str, Any]) -> str:
    """SHA-256 of the object, whatever its layout and the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def read_evaluations(run_dir: Path) -> dict[str, Any]:
    """evaluation.json, or nothing where there is none yet. Raises ValueError where it is damaged."""
    path = run_dir / EVALUATION
    evaluations = read_json(path) if path.exists() else {}
    for key, entry in evaluations.items():
        if not isinstance(entry, dict):
            raise ValueError(f"{path}: damaged: expected an object under {key!r}, got {type(entry).__name__}")
    return evaluations
