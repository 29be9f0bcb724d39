"""Several processes that train or evaluate together, as torchrun starts them: who they are, and what they exchange.

Without torchrun there is one process, rank 0 of 1, and nothing here does anything. What is exchanged is summed by
torch.distributed, over gloo on CPUs and NCCL on GPUs; no object is ever unpickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ppl_vae.runtime.capture import CannotCapture, is_capturing

TIMEOUT = timedelta(minutes=30)  # of one exchange: what a rank may take longer than another before all end


def join(device: str) -> torch.device:
    """Joins the other processes where torchrun started this one; says on which device this one works.

    Under torchrun "cuda" is one GPU a process, cuda:LOCAL_RANK. Called again, it changes nothing.

    Args:
        device: "cpu", "cuda" or a device with its index.

    Raises:
        ValueError: more processes on this machine than GPUs, or the index of one GPU for several of them.
        ConnectionError: the other processes were not found.
    """
    place = torch.device(device)
    if not _of_several():
        return place
    if place.type == "cuda":
        place = _own_gpu(place)
        torch.cuda.set_device(place)
    if not dist.is_initialized():
        # NCCL wherever there is one, for a run that is resumed joins before its device is known. It begins when used.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        with _in_one_line():
            dist.init_process_group(backend, timeout=TIMEOUT)
    return place


def leave() -> None:
    """Ends what ``join`` began: from here on, each process is on its own."""
    if _is_joined():
        dist.destroy_process_group()


def rank() -> int:
    """Which of the joined processes this one is, from 0; 0 where it is alone."""
    return dist.get_rank() if _is_joined() else 0


def num_ranks() -> int:
    """How many processes are joined; 1 where this one is alone."""
    return dist.get_world_size() if _is_joined() else 1


def is_writer() -> bool:
    """Whether this process is the one that writes files and speaks: rank 0, before ``join`` and after ``leave`` too."""
    return dist.get_rank() == 0 if _is_joined() else not _of_several() or os.environ["RANK"] == "0"


def sum_over_ranks(tensor: Tensor) -> None:
    """tensor <- sum over ranks of tensor, in place; any shape, the same bits on every rank."""
    if num_ranks() > 1:
        with _in_one_line():
            dist.all_reduce(tensor)


def gather_rows(mine: Tensor, num_rows: int, rows: Tensor) -> Tensor:
    """The whole table on every rank, bit for bit as its rows were.

    Args:
        mine: (n, *rest) this rank's rows; n may be 0, and ``rest`` and the type are the same on all ranks.
        num_rows: of the whole table.
        rows: (n,) int64, their places in it. Each row is some one rank's.

    Returns:
        (num_rows, *rest).
    """
    table = mine.new_zeros((num_rows, *mine.shape[1:]))
    table[rows] = mine
    if num_ranks() > 1 and table.numel():
        sum_over_ranks(table.view(-1).view(torch.uint8))  # bytes and zeros: no rounding, and -0.0 keeps its sign
    return table


def agree(value: bool) -> bool:
    """True on every rank where any rank says True."""
    if num_ranks() == 1:
        return value
    votes = torch.tensor([int(value)])
    sum_over_ranks(votes)
    return bool(votes > 0)


def barrier() -> None:
    """Waits until all ranks are here."""
    agree(False)


def broadcast(value: Any) -> Any:
    """What rank 0 gives, on every rank, by way of JSON; what the others give is not looked at.

    Where rank 0 ends before it comes here, this raises ConnectionError on the others.
    """
    return value if num_ranks() == 1 else gather_objects(value if rank() == 0 else None)[0]


def gather_objects(value: Any) -> list[Any]:
    """What each rank gives, in their order, on every rank, by way of JSON."""
    if num_ranks() == 1:
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    here = torch.tensor([rank()])
    sizes = gather_rows(torch.tensor([len(text)]), num_ranks(), here).tolist()
    letters = torch.zeros(1, max(sizes), dtype=torch.uint8)
    letters[0, : len(text)] = text
    table = gather_rows(letters, num_ranks(), here)
    return [json.loads(bytes(row[:size].tolist())) for row, size in zip(table, sizes, strict=True)]


@dataclass(frozen=True)
class Share:
    """Images start to stop of a batch of B: what one rank works on. Its weight is their number / B.

    A rank without an image works on the first one with the weight 0, so that every rank takes part in every exchange.
    """

    num_images: int
    start: int
    stop: int
    weight: float


def share_of(num_images: int) -> Share:
    """This rank's contiguous part of a batch; the parts of two ranks differ by at most one image."""
    start, stop = (r * num_images // num_ranks() for r in (rank(), rank() + 1))
    if start == stop:
        return Share(num_images, 0, 1, 0.0)
    return Share(num_images, start, stop, (stop - start) / num_images)


_share: Share | None = None


@contextmanager
def working_on(share: Share) -> Iterator[None]:
    """Within it, ``mean_over_batch`` knows the part of the batch that this rank works on."""
    global _share
    before, _share = _share, share
    try:
        yield
    finally:
        _share = before


def mean_over_batch(mean: Tensor) -> Tensor:
    """The mean over the whole batch, without gradients, from that over this rank's images; outside of shares as it is.

    Args:
        mean: of any shape.

    Raises:
        CannotCapture: several ranks, and it is being written down as a graph, which cannot wait for others.
    """
    if _share is None or num_ranks() == 1:
        return mean.detach()
    if is_capturing():
        raise CannotCapture("the loss needs a mean over all ranks in the middle of a step")
    total = mean.detach() * _share.weight
    sum_over_ranks(total)
    return total


def _of_several() -> bool:
    """Whether torchrun started this process together with others."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def _is_joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def _own_gpu(place: torch.device) -> torch.device:
    local, beside = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if place.index is not None and beside > 1:
        raise ValueError(f"--device {place}: expected cuda, one GPU for each of {beside} processes here, got one GPU")
    if place.index is None and beside > torch.cuda.device_count():
        raise ValueError(
            f"--nproc-per-node: expected at most one process a GPU, {torch.cuda.device_count()} here, got {beside}"
        )
    return place if place.index is not None else torch.device("cuda", local)


@contextmanager
def _in_one_line() -> Iterator[None]:
    """A lost connection as ConnectionError, which the scripts say in one line, and not as torch's RuntimeError."""
    try:
        yield
    except dist.DistError as error:
        raise _lost(error) from None
    except RuntimeError as error:
        words = str(error)
        if not any(part in words for part in ("onnection", "gloo", "NCCL", "imed out", "imeout")):
            raise
        raise _lost(error) from None


def _lost(error: Exception) -> ConnectionError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return ConnectionError(
        f"another process ended or did not answer within {TIMEOUT.total_seconds() / 60:.0f} minutes ({lines[0][:120]})"
    )
