"""Models on the Hugging Face Hub, whose HTTP interface a server of the tests answers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import OWNER, TOKEN, serve_hub
from small_run import silent

from ppl_vae import load, runs, save
from ppl_vae.commands.evaluate import evaluate_run
from ppl_vae.commands.latents import sample_run
from ppl_vae.commands.options import Evaluate, Export, Sample
from ppl_vae.commands.report import export_run
from ppl_vae.runs.build import build_vae
from ppl_vae.runs.options import Options

constants = pytest.importorskip("huggingface_hub.constants", reason="the extra hub is not installed")

OPTIONS = Options(network="mlp", hidden=(8,), latent_dim=2, prior="standard-normal")
MODEL = f"{OWNER}/digits"


def make_run(folder: Path, *, seed: int) -> Path:
    torch.manual_seed(seed)
    return save(build_vae(OPTIONS, (1, 28, 28)), folder, OPTIONS)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("runs") / "digits", seed=0)
    evaluate_run(Evaluate(str(folder), num_particles=3, images=5, device="cpu"), say=silent)
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The server, for a person who has its token, an empty cache and an empty working folder."""
    with serve_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its own protocol, which the server lacks
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        yield server


def push(run: Path, output: str = "out") -> Path:
    return export_run(Export(str(run), output=output, push=MODEL), say=silent)


def is_same_model(one: str | Path, other: str | Path) -> bool:
    ours, theirs = load(one).state_dict(), load(other).state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- There and back ---


def test_a_pushed_model_is_the_export_and_loads_as_the_run(hub, run):
    folder = push(run)
    assert hub.files(MODEL) == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert hub.repositories[MODEL].private
    assert is_same_model(f"hf://{MODEL}", run)


def test_the_card_of_a_pushed_model_says_how_to_load_it_from_there(hub, run):
    push(run)
    assert f'vae = load("hf://{MODEL}")' in hub.files(MODEL)["README.md"].decode()


def test_a_second_push_leaves_no_evaluation_of_the_first_weights(hub, run, tmp_path):
    push(run)
    first = next(reversed(hub.repositories[MODEL].commits))
    hub.add(MODEL, hub.files(MODEL) | {"notes.txt": b"the owner's", "figures/prior_samples.png": b"old"})
    other = make_run(tmp_path / "other", seed=1)
    push(other, "out-2")
    assert set(hub.files(MODEL)) == {"config.json", "model.safetensors", "README.md", "notes.txt"}
    assert is_same_model(f"hf://{MODEL}", other)
    assert is_same_model(f"hf://{MODEL}@{first}", run)


def test_only_the_files_of_a_model_are_downloaded(hub, run):
    push(run)
    hub.add(MODEL, hub.files(MODEL) | {"pytorch_model.bin": b"a pickle", "config.py": b"raise SystemExit"})
    hub.asked.clear()
    load(f"hf://{MODEL}")
    found = {line.rpartition("/")[2] for line in hub.asked if line.startswith("GET") and "/resolve/" in line}
    assert found == {"config.json", "model.safetensors", "evaluation.json"}


def test_commands_take_an_address_and_write_beside_the_cache(hub, run, tmp_path):
    push(run)
    load(f"hf://{MODEL}")
    before = sorted((tmp_path / "cache").rglob("*"))
    asked = Sample(f"hf://{MODEL}", num_samples=2, device="cpu", seed=0)
    assert sample_run(asked, say=silent) == Path("runs", MODEL, "samples")
    entry = evaluate_run(Evaluate(f"hf://{MODEL}", num_particles=3, images=5, device="cpu"), say=silent)
    assert entry.log_likelihood is not None
    stored = runs.read_evaluations(run)["test"]["log_likelihood"]
    assert entry.log_likelihood.mean == stored["mean"]
    assert sorted((tmp_path / "cache").rglob("*")) == before


def test_what_was_downloaded_loads_without_a_connection(hub, run, monkeypatch):
    push(run)
    load(f"hf://{MODEL}")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert is_same_model(f"hf://{MODEL}", run)


@pytest.mark.thorough
def test_the_command_pushes_to_the_endpoint_of_the_environment(hub, run, tmp_path):
    theirs = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    code = f"import ppl_vae; print(ppl_vae.load('hf://{MODEL}').likelihood.event_shape)"
    for words in (["-m", "ppl_vae", "export", str(run), "--push", MODEL], ["-c", code]):
        done = subprocess.run([sys.executable, *words], env=os.environ | theirs, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert done.stdout == "(1, 28, 28)\n"


# --- What is refused, in one line ---


@pytest.mark.parametrize(
    ("address", "words"),
    [
        (f"hf://{OWNER}/nothing", "expected a repository of http://127.0.0.1:.* that you may read, got none"),
        (f"hf://{MODEL}@v2", "expected a branch, tag or commit of the repository, got another word"),
        ("hf://digits", "hf://digits: expected hf://USER/NAME or hf://USER/NAME@REVISION, got 'digits'"),
        ("hf://../digits", "expected hf://USER/NAME"),
        (f"hf://{OWNER}/no-model", "config.json: no such file"),
    ],
)
def test_an_address_without_a_model_is_refused(hub, address, words):
    hub.add(MODEL, {})
    hub.add(f"{OWNER}/no-model", {"README.md": b""})
    with pytest.raises(ValueError, match=words) as caught:
        load(address)
    assert len(str(caught.value).splitlines()) == 1


def test_a_private_model_is_refused_without_a_token(hub, run, monkeypatch):
    push(run)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match=r"got none; a private one needs your token"):
        load(f"hf://{MODEL}")


def test_nothing_is_exported_without_a_token(hub, run, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="expected a token that may write to the Hub, got none"):
        push(run)
    assert not Path("out").exists()
    assert hub.asked == []


@pytest.mark.parametrize(("name", "words"), [("a/b/c", "expected USER/NAME"), (f"{MODEL}@main", "without a revision")])
def test_a_name_that_is_none_is_refused_before_anything_is_written(hub, run, name, words):
    with pytest.raises(ValueError, match=rf"--push: .*{words}"):
        export_run(Export(str(run), output="out", push=name), say=silent)
    assert not Path("out").exists()


def test_a_refused_push_leaves_the_export_and_says_how_to_send_it(hub, run):
    with pytest.raises(ValueError, match=r"403 .*the export is whole in out: `hf upload") as caught:
        export_run(Export(str(run), output="out", push="other/digits"), say=silent)
    assert len(str(caught.value).splitlines()) == 1
    assert is_same_model("out", run)
    assert hub.repositories == {}


def test_weights_that_are_not_taken_leave_the_repository_as_it_was(hub, run):
    hub.is_full = True
    with pytest.raises(ValueError, match="the export is whole in out") as caught:
        push(run)
    assert len(str(caught.value).splitlines()) == 1
    assert hub.files(MODEL) == {}


def test_a_hub_that_does_not_answer_is_named(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"http://127\.0\.0\.1:9 cannot be used: ") as caught:
        load(f"hf://{MODEL}")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("act", [lambda run: load(f"hf://{MODEL}"), push], ids=["load", "push"])
def test_without_the_package_the_extra_is_named(act, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"expected the package huggingface_hub.*pip install 'ppl_vae\[hub\]'"):
        act(run)
    assert list(tmp_path.iterdir()) == []
