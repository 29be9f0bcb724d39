"""Progress on a terminal, and in a log, where it is lines."""

from __future__ import annotations

import re

import pytest

from ppl_vae.runtime import process as progress
from ppl_vae.runtime.process import progress_bar


@pytest.mark.parametrize("leave", [True, False])
def test_in_a_log_a_long_bar_is_lines(capsys, monkeypatch, leave):
    """Also of a bar within another, which a terminal would show below it."""
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0)
    with (
        progress_bar(total=1, unit="run", desc="study"),
        progress_bar(total=4, unit="image", desc="test", leave=leave) as bar,
    ):
        for _ in range(4):
            bar.update()
    found = capsys.readouterr().err
    assert not re.search(r"[\r\x1b|]", found)
    shares = re.findall(r"^test: (\d+)% of 4 images, ", found, flags=re.MULTILINE)
    assert list(dict.fromkeys(shares)) == ["0", "25", "50", "75", "100"]
    assert all(line.startswith(("study: ", "test: ")) for line in found.splitlines())
