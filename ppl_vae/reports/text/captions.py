"""The wording of a run's figures and of its page: captions, titles and the sentences around them."""

from __future__ import annotations

from ppl_vae.runs.build import is_autoencoder
from ppl_vae.runs.open import Run
from ppl_vae.runs.results import Evaluation

# Part of the title of every figure that decodes draws of an autoencoder's prior.
NOT_TRAINED_ON_PRIOR = "on which an autoencoder was never trained"

_FIGURES = {
    "training_curves.png": "Training. Look whether the validation curve still rises at the end (train longer) or falls "
    "behind the training curve (the network learns the training images by heart).",
    "reconstructions.png": "Test images, and what is left of them after the code. Look for strokes and textures that "
    "are lost.",
    "prior_samples.png": "What the decoder makes of draws from the prior. They should look like the data, and differ "
    "from each other.",
    "interpolations.png": "Straight lines between the codes of two images. Each step should be one image, not two laid "
    "over each other.",
    "traversals.png": "One latent at a time is moved. A row in which nothing changes is a latent that is not used.",
    "manifold.png": "The whole plane of two latents, decoded.",
    "latents.png": "Codes of test images, and draws of the prior in gray. Each should be where the other is.",
    "log_likelihoods.png": "log p(x) is a mean over images that differ much. Look at the least likely ones.",
    "particles.png": "The bound rises with importance samples. Flat at its right end, it may have settled; with a "
    "k-hat above 0.7 rare particles carry it, and it can be flat and still too low.",
}
DIAGNOSIS_FIGURES = {
    "diagnosis-latents.png": "What each latent tells, and how much its mean varies over images; those near zero are "
    "unused.",
    "diagnosis-aggregate.png": "All codes together against the prior, latent by latent: the bars should be short.",
    "diagnosis-noise.png": "The data's directions in units of the likelihood's noise; a linear "
    "decoder near the state that ignores z learns those above the line.",
    "diagnosis-holes.png": "Decoded prior draws that the images' smoothed posteriors cover least, beside ordinary ones "
    "and reconstructions.",
    "diagnosis-pixels.png": "Whether pixels are distributed as the likelihood says: the bars should be level.",
}

# Captions for a plain autoencoder: its training has no prior, and asks nothing of codes but reconstructions.
_AUTOENCODER_FIGURES = {
    "training_curves.png": "Training. The reconstruction term alone: look whether the validation curve still rises at "
    "the end (train longer) or falls behind the training curve (the network learns the training images by heart).",
    "prior_samples.png": "Draws of a standard normal, decoded: no samples of a model. Training asked no codes to lie "
    "where these are, so they need not look like the data.",
    "interpolations.png": "Straight lines between the codes of two images. Between codes the decoder was not trained, "
    "and what stands there may be no image.",
    "manifold.png": "The whole plane of two latents, decoded, most of it perhaps far from any code.",
    "latents.png": "Codes of test images, and draws of a standard normal for scale: training asked no code to lie "
    "among them.",
    "diagnosis-latents.png": "How much each latent varies over images; those near zero are unused.",
    "diagnosis-aggregate.png": "All codes together against a standard normal, latent by latent. No prior was in the "
    "training, so long bars are no fault.",
}


def figure_caption(run: Run, name: str) -> str:
    """The caption of one of a run's figures, by its file name; empty for a figure without one."""
    own = _AUTOENCODER_FIGURES if is_autoencoder(run.options) else {}
    return (_FIGURES | DIAGNOSIS_FIGURES | own).get(name, "")


def explorer_caption(run: Run, axes: tuple[int, int]) -> str:
    """The caption of the plane of two latents with a live decoder. ``axes``: the two that are moved."""
    words = "Each point is a test image, where the encoder puts it; the picture is the decoder's mean."
    if run.options.latent_dim > 2:
        words += (
            f" Moved are z{axes[0]} and z{axes[1]}, the two of {run.options.latent_dim} that tell most; the others are "
            "those of the first picture's image, so a point's picture is not the reconstruction of its image."
        )
    if is_autoencoder(run.options):
        words += " Nothing asked these codes to lie together: between them the decoder was never trained."
    return words


# The rows of the page's table of an evaluation, by the field of ``Evaluation``.
EVALUATION_ROWS = {
    "log_likelihood": "a lower bound on log p(x), tighter with more importance samples: the number to compare by",
    "elbo": "the bound of one sample, which training maximizes at beta = 1: reconstruction minus KL",
    "reconstruction": "log p(x | z) with z drawn from the guide: how well the code's image fits",
    "kl": "KL(q(z | x) || p(z)): what the code costs, more than which it cannot tell of the image",
}


def evaluation_row_name(found: Evaluation, field: str) -> str:
    """The heading of a row of the page's table of an evaluation."""
    names = {"log_likelihood": f"log p(x): L_{found.num_particles}", "elbo": "ELBO", "kl": "KL"}
    return names.get(field, field)


def make_sentence(words: str) -> str:
    """Words with a capital letter and a full stop."""
    return words[:1].upper() + words[1:] + ("" if words.endswith(".") else ".")
