"""The titles of a run's figures, and the labels of their axes."""

from __future__ import annotations

from ppl_vae.reports.text.captions import NOT_TRAINED_ON_PRIOR


def count_images(count: int, kind: str) -> str:
    """A number of images in words.

    >>> count_images(2, "test image")
    '2 test images'
    """
    return f"{count:,} {kind}" if count == 1 else f"{count:,} {kind}s"


def format_use(value: float) -> str:
    """How much a latent is used, with more digits where it is little."""
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def latent_axis_name(latent: int, name: str, value: float, unit: str) -> str:
    """The label of an axis that is one latent: its number, and how much it is used."""
    return f"z{latent}, {name.removeprefix('mean ')} {format_use(value)}{unit}"


def latents_title(count: int, kind: str, num_latents: int, name: str, *, is_deterministic: bool) -> str:
    """The title of the figure of latents."""
    means = "Codes z(x)" if is_deterministic else "Posterior means"
    title = f"{means} of {count_images(count, kind)}"
    return title if num_latents <= 2 else f"{title},\nin the two of {num_latents} latents with the highest {name}"


def training_title(dataset: str, *, is_dequantized: bool) -> str:
    """The title of the training curves."""
    return f"{dataset}: training" + (" of the density of (level + u) / 256" if is_dequantized else "")


def reconstructions_title(*, is_autoencoder: bool) -> str:
    """The title of the reconstructions."""
    return "Reconstructions, z = z(x)" if is_autoencoder else "Reconstructions, z ~ q(z | x)"


def samples_title(*, is_autoencoder: bool) -> str:
    """The title of the prior samples. An autoencoder's prior has no part in training, and the title says so."""
    if is_autoencoder:
        return f"No samples of a model: decoded draws of the prior, z ~ N(0, I),\n{NOT_TRAINED_ON_PRIOR}"
    return "Samples from the prior, z ~ p(z)"


def interpolations_title(*, is_autoencoder: bool) -> str:
    """The title of the interpolations."""
    ends = "codes z(x)" if is_autoencoder else "posterior means"
    return f"E[x | z] on the line between the {ends} of two test images"


def traversals_title(
    *,
    place: int,
    num_images: int,
    num_rows: int,
    num_latents: int,
    num_unused: int,
    meaning: str,
    threshold: str,
    is_autoencoder: bool,
    has_upper_layers: bool,
    has_dependent_prior: bool,
) -> str:
    """The title of the traversals.

    Args:
        place: The test image at which the other latents stay.
        num_images: The images by which the latents are ranked.
        num_rows: The latents that are shown.
        num_latents: The latents that the decoder sees.
        num_unused: Those of them that are not used.
        meaning: What ranks them.
        threshold: Below what a latent is unused.
        is_autoencoder: Whether the guide is deterministic.
        has_upper_layers: Whether there are latents above those.
        has_dependent_prior: Whether the prior is not a product of normals.
    """
    where = "code z(x)" if is_autoencoder else "posterior mean"
    first = (
        "E[x | z] as one latent moves, in scales of the prior; "
        f"the others stay at the {where} of test image no. {place}"
    )
    if has_dependent_prior:
        first = (
            "E[x | z] as one latent moves, in scales of the prior, which may itself put nothing there;\n"
            f"the others stay at the {where} of test image no. {place}"
        )
    if num_rows == num_latents:
        rows = "the latents"
    elif num_rows == 1:
        rows = f"the most used of {num_latents} latents"
    else:
        rows = f"the {num_rows} most used of {num_latents} latents"
    rows += " next to the image" if has_upper_layers else ""
    return (
        f"{first}\nrows: {rows}, by {meaning} over {count_images(num_images, 'test image')}\n"
        f"unused latents, with a {threshold}: {num_unused} of {num_latents}"
    )


def plane_title(*, is_autoencoder: bool, has_dependent_prior: bool) -> str:
    """The title of the plane of two latents."""
    steps = "each latent's own prior probability" if has_dependent_prior else "the prior's probability"
    title = f"E[x | z] over the plane of the two latents,\non a grid at equal steps of {steps}"
    return f"{title},\n{NOT_TRAINED_ON_PRIOR}" if is_autoencoder else title


def particles_title(num_images: int, num_particles: int) -> str:
    """The title of the bound by its number of particles."""
    return (
        f"The bound L_s on log p(x) by its number of importance samples s\n{count_images(num_images, 'test image')}, "
        f"means over {num_particles:,} samples an image; bars are standard errors over images"
    )
