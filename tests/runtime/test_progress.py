"""Progress on a terminal, and in a log, where it is lines."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import suppress

import pytest

from ppl_vae.runtime import process as progress
from ppl_vae.runtime.process import Progress, progress_bar

TRAINING = """
import time
from ppl_vae.runtime.process import Progress
with Progress(total=3, initial=1, unit="step", desc="training") as shown:
    shown.show_clock("Compiling the training step", print)
    time.sleep(2.5)
    shown.show_bar()
    shown.update()
    shown.update()
"""


def on_terminal(program: str) -> str:
    """What a program writes to standard error on a terminal."""
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (24, 100))
    with subprocess.Popen([sys.executable, "-c", program], stderr=theirs) as process:
        os.close(theirs)
        parts = []
        try:
            while part := os.read(ours, 4096):
                parts.append(part)
        except OSError:  # Linux's way to say that nobody writes any more
            pass
        assert process.wait() == 0
    os.close(ours)
    return b"".join(parts).decode()


def test_on_a_terminal_a_clock_runs_while_the_step_is_compiled_and_the_bar_starts_afterwards():
    shown = on_terminal(TRAINING)
    clock, bar = shown[: shown.index("training:")], shown[shown.index("training:") :]
    assert re.findall(r"Compiling the training step \.\.\. 00:0(\d)", clock)[:3] == ["0", "1", "2"]
    assert "Compiling" not in bar
    assert re.match(r"training:  33%\|\S* *\| 1/3 \[00:00<\?", bar)  # without the seconds of the compiler
    assert "3/3" in bar


def test_in_a_log_a_clock_is_one_line_of_output_and_a_short_bar_none(capsys):
    said = []
    with Progress(total=2, unit="step", desc="training") as shown:
        shown.show_clock("Compiling the training step", said.append)
        shown.update()
        shown.update()
        assert shown.count == 2
    assert (said, capsys.readouterr().err) == (["Compiling the training step ..."], "")


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


@pytest.mark.thorough
def test_an_error_ends_the_clock(capsys, monkeypatch):
    monkeypatch.setattr(progress, "has_terminal", lambda: True)
    with suppress(KeyError), Progress(total=2) as shown:
        shown.show_clock("Compiling", print)
        raise KeyError
    before = capsys.readouterr().err
    progress.threading.Event().wait(1.2)
    assert (capsys.readouterr().err, "Compiling" in before) == ("", True)
