"""A torch Dataset or DataLoader as one tensor of images, and training on it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracles import bernoulli_vae
from PIL import Image
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ppl_vae import data, fit

LEVELS = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).reshape(2, 3, 4, 5)


class Items(Dataset):
    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, place):
        return self.items[place]


@pytest.mark.parametrize(
    "dataset",
    [
        Items(*LEVELS),
        Items(*((image, 7) for image in LEVELS)),
        Items(*LEVELS.numpy()),
        Items(*((Image.fromarray(image.permute(1, 2, 0).numpy()), "a label") for image in LEVELS)),
        TensorDataset(LEVELS, torch.arange(2)),
        DataLoader(TensorDataset(LEVELS), batch_size=2, shuffle=True),
    ],
    ids=["tensors", "with labels", "arrays", "pictures", "TensorDataset", "DataLoader"],
)
def test_the_images_of_a_dataset_are_one_tensor_in_its_order(dataset):
    found = data.from_dataset(dataset)
    assert found.dtype == torch.uint8
    assert torch.equal(found, LEVELS)


def test_a_gray_picture_has_one_channel():
    found = data.from_dataset(Items(Image.fromarray(np.full((4, 5), 9, dtype=np.uint8))))
    assert torch.equal(found, torch.full((1, 1, 4, 5), 9, dtype=torch.uint8))


def test_a_picture_with_a_palette_has_its_colors_and_one_in_black_and_white_its_levels():
    colors = Image.fromarray(np.arange(60, dtype=np.uint8).reshape(4, 5, 3) * 4)
    palette = colors.convert("P", palette=Image.Palette.ADAPTIVE)
    expected = torch.from_numpy(np.array(palette.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(data.from_dataset(Items(palette))[0], expected)
    found = data.from_dataset(Items(Image.fromarray(np.eye(4, dtype=bool))))
    assert torch.equal(found, 255 * torch.eye(4, dtype=torch.uint8)[None, None])


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (TensorDataset(LEVELS[:0]), "expected a length and at least one item, got none in TensorDataset"),
        (Items(), "expected a length and at least one item, got none in Items"),
        (Items(torch.zeros(1, 2, 2), torch.zeros(1, 3, 3)), r"images of one shape, got \(1, 2, 2\), \(1, 3, 3\)"),
    ],
)
def test_a_dataset_that_is_no_stack_of_images_is_refused_in_one_line(dataset, words):
    with pytest.raises(ValueError, match=words):
        data.from_dataset(dataset)


@pytest.mark.parametrize("wrap", [TensorDataset, lambda x: DataLoader(TensorDataset(x), batch_size=3)])
def test_training_on_a_dataset_has_the_weights_of_training_on_its_tensor(wrap):
    x = torch.bernoulli(torch.full((20, 12), 0.3, dtype=torch.double), generator=torch.Generator().manual_seed(0))
    weights = []
    for images in (x, wrap(x)):
        torch.manual_seed(0)
        vae = bernoulli_vae(latent_dim=2, D=12)
        fit(vae, images, epochs=2)
        weights.append(torch.cat([w.detach().flatten() for w in vae.parameters()]))
    assert torch.equal(*weights)
