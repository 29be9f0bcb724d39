"""The wording of pages: captions of a run's figures, and the paragraphs of the study."""

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


# --- The study ---

# No sentence depends on a number: a comparison that can go either way is read off its row of a table.

AVERAGING = """\
A loss that is averaged over the D pixels instead of summed divides the reconstruction term by D and leaves the KL as it
is: it is the objective of beta = D, even with beta set to one. A linear decoder near collapse keeps a direction of the
data only if its eigenvalue, in units of the likelihood's noise, is above beta (Lucas et al. 2019; Dai et al. 2020). The
table compares this prediction, made before any training, with what each training showed: "directions above" is the
prediction, "active" what came, and "as predicted" says whether a run collapsed exactly where no direction is above the
threshold. The rows of the mean and of beta = D should agree, since their objectives differ by a factor alone. A squared
error that is averaged over D pixels has the same fault: it is the likelihood of a normal with variance D / 2."""

REGULARIZER = """\
The KL term is a price on information: each nat that a code tells about its image costs beta nats, and pays only if it
earns more than that in the reconstruction. Along beta the rate (the KL) falls and the distortion (minus the
reconstruction term) rises. The price is the same for all latents, so those that would earn least go first: see how the
number of "active" latents falls. "Implied beta" is read off the finished weights, at which no small change of the
guide's scales pays; where training has converged it equals the beta that was set.

**Where does the likelihood peak?** Nothing makes beta = 1 best for log p(x): it maximizes a bound with a gap that
depends on the guide, on training images, in a training that ends. Read the column of differences to beta = 1: they are
paired on the same test images. "Not distinguishable" means that the 95% interval, corrected for the number of
comparisons, contains zero. A star marks an estimate that has not settled: with more importance samples it may still
rise, so log p(x) itself may be higher there. Peaks are chosen on the test images that they are reported on, from one
training for each beta; the second table shows how much another seed changes."""

COLLAPSE = """\
Early in training the decoder has not learned to use its latents, and the KL pushes them to the prior before it does. A
warm-up lowers the price at the beginning; free bits make the first nats of each latent free. Free bits count latents as
active nearly by construction, so look at the bound L_S as well as at the number of active latents."""

BLUR = """\
What is shown as a reconstruction is a mean of all images that the decoder holds possible for a code; a mean of sharp
images that differ is not sharp. **Why a VAE blurs:** the guide's noise makes several images share a code, and the error
of one reconstruction splits exactly into that "posterior noise" and the error that is left without it. **Why an
autoencoder blurs:** it has no noise, but a short code still leaves open which image it was: the table of latents shows
how sharpness grows with their number. With two latents, compare its reconstructions with "neighbors", the means of the
20 training images whose codes are nearest: a reconstruction is such a mean. Power above one is noise, not detail: it
comes from binary inputs.

**Samples.** The autoencoder was never trained with a prior, so decoding N(0, I) judges it unfairly. The rows "fitted"
decode draws of a density that was fitted to the codes of training images afterwards, which is the fair comparison: a
normal, a mixture of normals (validation codes choose their number) and a flow. Fréchet distances are in principal
components of the training images; the row "other real images" is what real images would have."""

CHECK = """\
The regularization worked if codes of test images, one sample each, look like samples of the prior, and still say
something about the images. The first is measured by a Kolmogorov-Smirnov distance for each latent, by a classifier
between codes and prior samples (effect 0: alike, 1: always told apart) and by holes (prior samples that the codes cover
less than all but one percent of other images' codes; one percent is expected by chance). The second is the mutual
information, which cannot exceed the logarithm of the number of images. Codes can match the prior because they are
empty: read both together. The autoencoder was never asked to match anything."""

NETWORKS = """\
All networks are trained for the same epochs, so a slower one has had more time. Differences to the base are paired on
the same test images; their errors say nothing about what another seed would give."""

SCALE_MAPS = """\
The encoder's output h must become a positive scale. Each map is trained once under stress: ten times the learning rate,
no warm-up and no clipping. One bad step, or one odd image, can make h large; a good map then keeps the gradient
neither huge nor broken."""

EXPLORE = """\
Two latents are few, but they can be seen whole. Each point is a test image, where the encoder puts it; the picture is
what the decoder makes of the place under the pointer. The network itself runs in this page. Between the classes of a
VAE the decoder may draw what is neither; between the codes of an autoencoder it was never trained."""


METHOD = """\
Every run is the same plain VAE unless its name says otherwise, trained for {epochs} epochs. Its last weights are kept.
beta is a matter of training alone: every reported number is at beta = 1. log p(x) is estimated from below by the
importance-weighted bound L_S with S = {num_particles:,} samples per image, on {images:,} fixed random test images. Runs
are ranked by log p(x) only where their difference in L_S exceeds what either may still gain with more samples. Where
L_S at beta = 1 is hardly above the floor, a model has learned little, and its numbers say little about trained models.

± is one standard error over images; it says nothing about what another training would give. Differences between bounds
on the same images are paired, with 95% intervals that are corrected for the number of comparisons in their table.

Training took {training:.3g}, evaluation {evaluation:.3g} and measuring {measuring:.3g} minutes."""
