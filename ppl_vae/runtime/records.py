"""Images with further tensors that a program is given for each of them, such as labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Size, Tensor

UNKNOWN = -1  # the label of an image whose class is not known


class Records:
    """N images with further tensors of N rows, which a program takes as ``model(x, *further)``.

    Records are cut into batches, groups and chunks as a tensor of images is. Shape, type and device are the images'.

    >>> data = Records(torch.zeros(3, 28, 28), torch.tensor([7, 2, 1]))  # images with labels
    >>> [len(part) for part in data.split(2)]
    [2, 1]

    Args:
        x: (N, *E), the images.
        *further: (N, ...) of any type, on the device of the images.

    Raises:
        ValueError: An argument is no tensor of N rows.
    """

    def __init__(self, x: Tensor, *further: Tensor) -> None:
        for i, tensor in enumerate([x, *further]):
            if not isinstance(tensor, Tensor) or not tensor.dim() or len(tensor) != len(x):
                got = f"shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
                rows = "(N, *E), the images" if i == 0 else f"({len(x)}, ...), one row for each image"
                raise ValueError(f"Records: expected tensor {i} of shape {rows}, got {got}")
        self.x, self.further = x, further

    @property
    def shape(self) -> Size:
        """(N, *E)."""
        return self.x.shape

    @property
    def dtype(self) -> torch.dtype:
        """That of the images."""
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        """That of the images."""
        return self.x.device

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: slice | Tensor) -> Records:
        return Records(*(tensor[rows] for tensor in arguments_of(self)))

    def split(self, size: int) -> list[Records]:
        """Records of ``size`` images each; the last may have fewer."""
        parts = zip(*(tensor.split(size) for tensor in arguments_of(self)), strict=True)
        return [Records(*part) for part in parts]

    def to(self, target: torch.device | Tensor) -> Records:
        """The same on a device, or on that of a tensor, whose type the images then have."""
        device = target.device if isinstance(target, Tensor) else target
        return Records(self.x.to(target), *(tensor.to(device) for tensor in self.further))


class EachLabel(Records):
    """N images with each of the labels 0 to K - 1: N K records, image by image, and no copies of the images.

    >>> data = EachLabel(torch.zeros(3, 28, 28), 10)
    >>> len(data), data[:12].further[0].tolist()
    (30, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1])

    Args:
        x: (N, *E).
        num_classes: K.
    """

    def __init__(self, x: Tensor, num_classes: int) -> None:
        self._places = torch.arange(len(x) * num_classes, device=x.device)
        self._num_classes = num_classes
        super().__init__(x)

    @property
    def shape(self) -> Size:
        """(N K, *E)."""
        return Size((len(self), *self.x.shape[1:]))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, rows: slice | Tensor) -> Records:
        places = self._places[rows]
        return Records(self.x[places // self._num_classes], places % self._num_classes)

    def to(self, target: torch.device | Tensor) -> EachLabel:
        """The same on a device, or on that of a tensor, whose type the images then have."""
        return EachLabel(self.x.to(target), self._num_classes)

    def split(self, size: int) -> list[Records]:
        """Records of ``size`` pairs of an image and a label each; the last may have fewer."""
        return [self[start : start + size] for start in range(0, len(self), size)]


Data: TypeAlias = Tensor | Records  # images (N, *E), alone or with further tensors


def arguments_of(data: Data) -> tuple[Tensor, ...]:
    """The arguments with which a program is called: the images, and what further tensors there are."""
    return (data.x, *data.further) if isinstance(data, Records) else (data,)


def further_of(data: Data) -> tuple[Tensor, ...]:
    """The further tensors of ``Records``; () for images alone."""
    return data.further if isinstance(data, Records) else ()


def join_arguments(tensors: Sequence[Tensor]) -> Data:
    """The inverse of ``arguments_of``."""
    return Records(*tensors) if len(tensors) > 1 else tensors[0]


def images_of(data: Data) -> Tensor:
    """The images (N, *E) alone."""
    return arguments_of(data)[0]
