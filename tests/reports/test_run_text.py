"""The wording of a run: what is said when few validation images decide the last epoch."""

import torch

from ppl_vae.evidence.estimate import Estimate
from ppl_vae.reports.text.run import describe_few_images


def record(elbo):
    found = Estimate.mean_of(elbo)
    return {"validation_elbo_nats_per_image": found.mean, "validation_elbo_stderr_nats_per_image": found.stderr}


def warns(*epochs):
    return bool(describe_few_images([record(elbo) for elbo in epochs], "elbo", skips=False))


def test_one_image_that_falls_is_reported_and_all_images_that_fall_are_not():
    images = -230 + 75 * torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, three = images.clone(), images.clone()
    one[7] -= 1e6
    three[:3] -= 1e5
    assert warns(images, one)
    assert warns(images, three)
    assert not warns(images, images - 100)  # it overfits
    assert not warns(images, images - 1)
    assert not warns(one, images)  # the fall is over
    assert not describe_few_images([], "elbo", skips=False)
    assert not describe_few_images([{"step": 5}], "elbo", skips=False)  # no validation images
