"""``ppl-vae`` and ``python -m ppl_vae``: every command by its name."""

from __future__ import annotations

import subprocess
import sys

import pytest

import ppl_vae
from ppl_vae.__main__ import main
from ppl_vae.commands.options import COMMANDS


def test_the_list_names_every_command(capsys):
    main(["--help"])
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert listed == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_own_help(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ppl-vae"])
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: ppl-vae {name}")


def test_a_mistyped_command_is_refused_with_a_suggestion(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["trian"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "did you mean train?" in said


def test_python_m_prints_the_version_without_torch():
    code = "import sys, runpy; sys.argv = ['ppl_vae', '--version']; runpy.run_module('ppl_vae', run_name='__main__')"
    code += "; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"ppl-vae {ppl_vae.__version__}\n"
