"""Write the golden numbers, which a restructuring of the program must reproduce.

    python tests/golden/write.py             # every case
    python tests/golden/write.py training    # the cases whose names begin with this word

A number that agrees with the stored one within the tolerance of its case keeps its stored digits, so that ``git diff``
shows the numbers that moved and no others.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from cases import CASES, SINGLE, Case, read_json
from torch import Tensor

NUMBERS = Path(__file__).parent / "numbers"


def plain(value: Any) -> Any:
    """Tensors, arrays and numbers that are not finite in the form that JSON gives back."""
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, Tensor | np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def compute(name: str, folder: Path) -> Any:
    """Compute a case with the program as it is now; what the program prints is shown where it fails."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            return plain(CASES[name].compute(folder))
        except SystemExit:
            raise RuntimeError(f"{name}: a script failed: {printed.getvalue()[-1000:]}") from None


def differences(stored: Any, found: Any, case: Case, place: str = "") -> Iterator[str]:
    """Yield one line for every place at which the stored and the found values disagree."""
    if isinstance(stored, dict) and isinstance(found, dict):
        for key in [*stored, *(key for key in found if key not in stored and not case.may_grow)]:
            if key not in found or key not in stored:
                yield f"{place}/{key}: {'no longer there' if key in stored else 'not there before'}"
            else:
                yield from differences(stored[key], found[key], case, f"{place}/{key}")
    elif isinstance(stored, list) and isinstance(found, list) and len(stored) == len(found):
        for index, (old, new) in enumerate(zip(stored, found, strict=True)):
            yield from differences(old, new, case, f"{place}[{index}]")
    elif not agree(stored, found, case.tolerance):
        yield f"{place}: expected {stored}, got {found}"


def agree(stored: Any, found: Any, tolerance: float) -> bool:
    """Whether two numbers agree to the tolerance, or two other values are the same."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (stored, found))
    return abs(stored - found) <= tolerance * max(1.0, abs(stored)) if numbers else stored == found


def updated(stored: Any, found: Any, case: Case) -> Any:
    """The found values, rounded, with the stored ones in place of those that agree with them."""
    if isinstance(found, dict):
        old = stored if isinstance(stored, dict) else {}
        return {key: updated(old.get(key), value, case) for key, value in found.items()}
    if isinstance(found, list):
        old = stored if isinstance(stored, list) and len(stored) == len(found) else [None] * len(found)
        return [updated(before, value, case) for before, value in zip(old, found, strict=True)]
    if stored is not None and agree(stored, found, case.tolerance):
        return stored
    digits = 8 if case.tolerance == SINGLE else 12
    return float(f"{found:.{digits}g}") if isinstance(found, float) else found


def to_text(value: Any) -> str:
    """JSON with sorted keys, and lists of numbers or words wrapped into few lines."""
    text = json.dumps(value, indent=1, sort_keys=True)

    def on_few_lines(match: re.Match[str]) -> str:
        indent, inner = match.group(1), " ".join(match.group(2).split())
        if len(indent) + len(inner) < 110:
            return f"{indent}[{inner}]"
        return f"{indent}[\n{textwrap.fill(inner, 110, break_on_hyphens=False, break_long_words=False)}\n]"

    return re.sub(r"(?m)^( *(?:\"[^\"]*\": )?)\[\s*([^\[\]{}]*?)\s*\]", on_few_lines, text) + "\n"


def main() -> None:
    NUMBERS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PPL_VAE_CACHE_DIR"] = f"{folder}/cache"
        for name, case in CASES.items():
            if not name.startswith(tuple(sys.argv[1:]) or ""):
                continue
            path = NUMBERS / f"{name}.json"
            stored = read_json(path) if path.exists() else None
            found = compute(name, Path(folder))
            moved = [] if stored is None else list(differences(stored, found, case))
            path.write_text(to_text(updated(stored, found, case)), encoding="utf-8")
            print(f"{name}: {'new' if stored is None else f'{len(moved)} values moved'}", *moved[:5], sep="\n  ")


if __name__ == "__main__":
    main()
