"""A ``torch.utils.data.Dataset`` as one tensor of images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset


def from_dataset(dataset: Dataset[Any] | DataLoader[Any]) -> Tensor:
    """The images of a map-style dataset, (N, *E), in its order.

    An item is an image or a tuple that begins with one, such as (image, label): a tensor, an array or a PIL image. A
    PIL image becomes (C, H, W), in gray or color if it is black and white or has a palette. Each item is read once, so
    a random transform of the dataset is drawn once; the argument ``transform`` of ``fit`` draws anew at every step. The
    batch size, order and workers of a ``DataLoader`` are ignored.

    >>> from_dataset(TensorDataset(torch.zeros(3, 1, 2, 2), torch.arange(3))).shape
    torch.Size([3, 1, 2, 2])

    Raises:
        ValueError: The dataset has no length or no items, or its images differ in shape.
    """
    if isinstance(dataset, DataLoader):
        dataset = dataset.dataset
    count = len(dataset) if hasattr(dataset, "__len__") else 0
    if count == 0:
        raise ValueError(f"dataset: expected a length and at least one item, got none in {type(dataset).__name__}")
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[0]
    images = [_to_tensor(dataset[i]) for i in range(count)]
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise ValueError(f"dataset: expected images of one shape, got {', '.join(map(str, sorted(shapes)))}")
    return torch.stack(images)


def _to_tensor(item: Any) -> Tensor:
    """The image of one item."""
    image = item[0] if isinstance(item, tuple | list) else item
    if hasattr(image, "getbands"):  # a PIL image
        mode = {"1": "L", "P": "RGB"}.get(image.mode, image.mode)
        levels = torch.from_numpy(np.array(image.convert(mode)))
        return levels[None] if levels.dim() == 2 else levels.permute(2, 0, 1)
    return torch.as_tensor(image)
