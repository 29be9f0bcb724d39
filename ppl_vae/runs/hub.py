"""Models on the Hugging Face Hub: ``hf://USER/NAME`` is read as a run folder is, and an export is pushed there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ppl_vae.runs.files import CONFIG, EVALUATION, FIGURES, MODEL
from ppl_vae.runtime.errors import first_line

SCHEME = "hf://"

_ADDRESS = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([^@\s]+))?")  # USER/NAME, or USER/NAME@REVISION


def is_address(run_dir: object) -> bool:
    """Whether a run is given by its address on the Hub."""
    return str(run_dir).startswith(SCHEME)


def download(address: str) -> Path:
    """The folder with a model's config, weights and evaluation, in the cache that huggingface_hub keeps.

    No other file of the repository is downloaded. Without a connection the newest cached version is taken.

    Args:
        address: hf://USER/NAME, or hf://USER/NAME@REVISION with a branch, a tag or a commit.

    Raises:
        ValueError: The address is malformed, huggingface_hub is not installed, or the Hub does not give the files.
    """
    name, revision = _split_address(address)
    with _one_line(address):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, revision=revision, allow_patterns=[CONFIG, MODEL, EVALUATION]))


def get_name(address: str) -> str:
    """The USER/NAME in an address."""
    return _split_address(address)[0]


def check_push(name: str) -> None:
    """Raises ValueError if nothing can be pushed: no USER/NAME, no huggingface_hub, or no token."""
    if _split_address(SCHEME + name, "--push")[1] is not None:
        raise ValueError(f"--push: expected USER/NAME without a revision, got {name!r}")
    with _one_line(f"--push {name}"):
        from huggingface_hub import get_token

        if get_token() is None:
            raise ValueError(
                f"--push {name}: expected a token that may write to the Hub, got none; `hf auth login` stores one, "
                "and the environment variable HF_TOKEN is one"
            )


def push(folder: Path, name: str) -> str:
    """Uploads an export in one commit, into a private repository where there is none yet.

    Files of an earlier export that this one lacks are removed: an evaluation or figures of other weights.

    Returns:
        The address of the repository's page.

    Raises:
        ValueError: The Hub refused it, or cannot be reached.
    """
    kept = f"; the export is whole in {folder}: `hf upload --private {name} {folder}` sends it"
    with _one_line(f"--push {name}", kept):
        from huggingface_hub import HfApi

        page = HfApi().create_repo(name, private=True, exist_ok=True)
        HfApi().upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message="Upload a model of ppl_vae",
            delete_patterns=[EVALUATION, f"{FIGURES}/*"],
        )
        return str(page)


def _split_address(address: str, asker: str = "") -> tuple[str, str | None]:
    """USER/NAME and the revision, if there is one."""
    found = _ADDRESS.fullmatch(address.removeprefix(SCHEME))
    if found is None:
        wanted = "USER/NAME" if asker else f"{SCHEME}USER/NAME or {SCHEME}USER/NAME@REVISION"
        raise ValueError(f"{asker or address}: expected {wanted}, got {address.removeprefix(SCHEME) or 'nothing'!r}")
    return found[1], found[2]


@contextmanager
def _one_line(asker: str, kept: str = "") -> Iterator[None]:
    """Raise a ValueError of one line where huggingface_hub is missing or raises an error.

    Args:
        asker: What the line starts with: the address, or the option.
        kept: What the line ends with.
    """
    try:
        from huggingface_hub import constants, errors
    except ImportError:
        raise ValueError(
            f"{asker}: expected the package huggingface_hub, which is not installed; pip install 'ppl_vae[hub]' "
            "brings it"
        ) from None
    try:
        yield
    except errors.RevisionNotFoundError:
        raise ValueError(f"{asker}: expected a branch, tag or commit of the repository, got another word") from None
    except errors.RepositoryNotFoundError:
        raise ValueError(
            f"{asker}: expected a repository of {constants.ENDPOINT} that you may read, got none; a private one needs "
            f"your token (`hf auth login`, or HF_TOKEN){kept}"
        ) from None
    except (OSError, errors.HTTPError, RuntimeError) as error:  # a refusal, no connection, or a file that was not taken
        raise ValueError(f"{asker}: {constants.ENDPOINT} cannot be used: {first_line(error)}{kept}") from None
