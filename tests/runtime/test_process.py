"""How a script ends: one line and an exit code for what a user can cause, a traceback for our own bugs."""

from __future__ import annotations

import pytest

from ppl_vae.runtime.process import run_script


@pytest.mark.parametrize("error", [ValueError("x: bad"), OSError(28, "disk full"), ArithmeticError("x: NaN")])
def test_what_a_user_can_cause_ends_in_one_line(capsys: pytest.CaptureFixture[str], error: Exception) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit, match=r"^1$"):
        run_script(main)
    assert capsys.readouterr().err == f"error: {error}\n"


def test_an_interrupt_ends_with_code_130_and_one_word(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match=r"^130$"):
        run_script(main)
    assert capsys.readouterr().err.strip() == "interrupted"


def test_our_own_bugs_keep_their_traceback() -> None:
    def main() -> None:
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        run_script(main)


def test_memory_that_ran_out_ends_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """By which errors it is known: see the tests of batching."""

    def main() -> None:
        raise MemoryError

    with pytest.raises(SystemExit, match=r"^1$"):
        run_script(main)
    assert capsys.readouterr().err.startswith("error: out of memory; a smaller batch")
