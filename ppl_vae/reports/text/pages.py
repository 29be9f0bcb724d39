"""The wording of figures and of pages: titles, captions, and the paragraphs of a run's page and of the study's.

A word in braces is filled in with what a figure or a page shows.
"""

from __future__ import annotations

from ppl_vae.diagnostics.measurement import FEWEST_IMAGES
from ppl_vae.runs.build import is_autoencoder
from ppl_vae.runs.open import Run

# --- Titles of figures ---

# Part of the title of every figure that decodes draws of an autoencoder's prior.
NOT_TRAINED_ON_PRIOR = "on which an autoencoder was never trained"

TITLES = {
    # of a run
    "training": "{name}: training",
    "training-dequantized": "{name}: training of the density of (level + u) / 256",
    "reconstructions": "Reconstructions, z ~ q(z | x)",
    "prior-samples": "Samples from the prior, z ~ p(z)",
    "prior-samples-autoencoder": "No samples of a model: decoded draws of the prior, z ~ N(0, I),\n"
    f"{NOT_TRAINED_ON_PRIOR}",
    "samples-by-class": "Samples of each class, E[x | z, y] for z ~ p(z | y)",
    "classes": "E[x | z, y]: the code of a test image given its label, decoded with every label y",
    "confusion": "{found.num_images:,} test images by label\nand by most probable label\n{percent:.2f} % are right",
    "interpolations": "E[x | z] on the line between the codes of two test images",
    "traversals": "E[x | z] as the code of test image no. {place}, the most central one, moves along one direction at "
    "a time\nacross: standard deviations of the codes; 0 is the reconstruction of the image\nrows: principal "
    "directions of {num_images:,} posterior means, and their share of the variance",
    "manifold": "E[x | z] over the plane of two latents, at equal steps of each latent's prior probability; across: z0",
    "log-likelihoods": "{name}: log p(x) of {num_images:,} test images",
    "particles": "The bound L_s on {what} by its number of importance samples s\n"
    "{num_images:,} test images; bars are standard errors over images",
    "latents": "Posterior means of {num_images:,} {kind}s",
    "latents-chosen": "Posterior means of {num_images:,} {kind}s,\nin the two of {num_latents} latents with the "
    "largest variance, in variances of the prior",
    "imputations": "x_missing ~ p(x_missing | x_observed); missing pixels are blue; ESS: effective particles",
    "display": "\nblack is {low:.3g} and below, white {high:.3g} and above",  # follows another title
    # of a table of likelihoods
    "calibration": "{name}: where pixels of {num_images:,} test images lie in p(x | z), z ~ q(z | x)\n"
    "(probability integral transform; uniform if the model were right; bars are standard errors)",
    # of a diagnosis
    "diagnosis-latents": "Which latents carry anything: {active} of {num_latents} are active",
    "diagnosis-aggregate": "Is the aggregate posterior the prior? Each latent alone can look right while all do not",
    "diagnosis-noise": "Which directions of the data rise above the likelihood's noise\n"
    "A linear decoder near the state that ignores z learns those above the line",
    "diagnosis-holes": "Does E[x | z] of prior draws look like that of images?\n"
    "{holes.share.mean:.1%} of prior draws are in holes ({holes.expected:.0%} if the aggregate posterior were the "
    "prior)\na classifier tells the two apart with an effect of {effect:.2f} (0: alike, 1: apart)",
    "diagnosis-pixels": "Where pixels lie in p(x | z), {num_images:,} images: flat is right",
    # of a certificate
    "agreement": "Two ways to log p(x), {num_images:,} {split} images: all are lower bounds, and the higher is the "
    "tighter\nOn the line they agree, so that either has lost little, or both have lost the same",
    "convergence": "How the bounds rise with effort, on {num_images:,} of the images: flat at the right is settled",
    "guide": "Is the guide the posterior, on images of the model's own?\n{verdict}",
    "against": "log p(x) of {other} under a model of {dataset}: tells the two apart with an AUROC of {auroc.mean:.3f} "
    "± {auroc.stderr:.3f}\nA density says how probable an image is, not whether it is like the data: simpler images "
    "can score higher",
    "doubtful": "Images whose bounds are farthest apart, with their places\n{unreliable:,} of {num_images:,}, marked "
    "!, are unreliable",
}


# --- Captions of a run's figures ---

FIGURES = {
    "training_curves.png": "Training. Look whether the validation curve still rises at the end (train longer) or falls "
    "behind the training curve (the network learns the training images by heart).",
    "reconstructions.png": "Test images, and what is left of them after the code. Look for strokes and textures that "
    "are lost.",
    "prior_samples.png": "What the decoder makes of draws from the prior. A VAE's should look like the data, and "
    "differ from each other; an autoencoder was never trained on them.",
    "classes.png": "One code under every label. Where rows are alike, the code holds the class itself, and the label "
    "acts through p(z | y).",
    "confusion.png": "The classifier that follows from the densities. It was never trained to classify. A share p of "
    "the n images of a row has the standard error sqrt(p (1 - p) / n).",
    "interpolations.png": "Straight lines between the codes of two images. Each step should be one image, not two laid "
    "over each other.",
    "traversals.png": "From the code of the most central test image along the principal directions of all codes, as "
    "far as codes go. Rows should change the image into others like the data; where no row changes anything, codes "
    "tell nothing.",
    "manifold.png": "The whole plane of two latents, decoded.",
    "latents.png": "Codes of test images, and draws of the prior in gray. Those of a VAE should be in the same places.",
    "log_likelihoods.png": "log p(x) is a mean over images that differ much. Look at the least likely ones.",
    "particles.png": "The bound rises with importance samples. Flat at its right end, it may have settled; with a "
    "k-hat above 0.7 rare particles carry it, and it can be flat and still too low.",
}
DIAGNOSIS_FIGURES = {
    "diagnosis-latents.png": "What each latent tells, and how much its mean varies over images; those near zero are "
    "unused.",
    "diagnosis-aggregate.png": "All codes together against the prior, latent by latent: the bars of a VAE should be "
    "short. No prior was in the training of an autoencoder.",
    "diagnosis-noise.png": "The data's directions in units of the likelihood's noise; a linear "
    "decoder near the state that ignores z learns those above the line.",
    "diagnosis-holes.png": "Decoded prior draws that the images' smoothed posteriors cover least, beside ordinary ones "
    "and reconstructions.",
    "diagnosis-pixels.png": "Whether pixels are distributed as the likelihood says: the bars should be level.",
}


NO_ACTIVE_LATENT = "No latent is active: all images have nearly the same code"


# --- A run's page ---

SECTIONS = {
    "likelihood": "Evaluation",
    "verdicts": "What stands out",
    "explore": "Move through its latent space",
    "figures": "Training and pictures",
    "diagnosis": "Behind the verdicts",
    "setup": "What was trained",
}

NO_EXPLORER = "There is no live picture here. {reason}"
EXPLORER_HELP = (
    "Move over the plane; click or tap to pick the nearest image. With the keyboard: arrow keys, with Shift for larger "
    "steps, Enter to pick, and Home to return."
)
EXPLORER_VIEWS = {"moved": "decoded at the pointer", "picked": "the picked image", "rebuilt": "its reconstruction"}
EXPLORER_IMAGE = "test image no. {place}"
EXPLORER_NO_SCRIPT = "The plane is drawn by a script, which this browser does not run."
TOO_FEW_IMAGES = f"There are fewer than {FEWEST_IMAGES} {{split}} images: too few for a diagnosis."
MEASURED_ON = "Measured on {num_images:,} images of the {split} split."
OPTIONS_CAPTION = "Every option of the run; config.json holds the same."
EVALUATION_CAPTION = (
    "{num_images:,} test images. The standard error is over images: how far the mean would move with other test "
    "images. It does not know what another training would give."
)


def page_title(run: Run) -> str:
    """The title of a run's page."""
    what = "autoencoder" if is_autoencoder(run.options) else "VAE"
    return f"{run.folder.resolve().name}: one {what} of {run.splits.name}"


def describe_setup(run: Run, step: int) -> str:
    """The data of a run, and where its weights are from."""
    words = f"{run.splits.describe()}\n\nThe weights are those of step {step:,}; its folder is `{run.folder}`."
    return words + (
        " It was trained from Python, or shipped with the package, and cannot be resumed." if not run.can_resume else ""
    )


def describe_missing_evaluation(run: Run) -> str:
    """What stands in the place of an evaluation."""
    command = f" `ppl-vae evaluate {run.folder}` makes one."
    words = "There is no evaluation of the test images with these weights."
    return words + ("" if is_autoencoder(run.options) else command)


def explorer_caption(run: Run, share: float, *, active: int) -> str:
    """The caption of the live decoder over two directions, whose share of the codes' variance is given.

    "active" is the number of active latents.
    """
    if active == 0:
        return (
            f"{NO_ACTIVE_LATENT}, so moving it hardly changes the picture. The section 'What stands out' says what to "
            "change."
        )
    words = (
        "Each point is a test image, where the encoder puts it along the first two principal directions of the codes "
        f"({share:.0%} of their variance)."
    )
    if run.options.latent_dim > 2:
        words += " What moves is the code of the picked image; its other directions stay as they are."
    if is_autoencoder(run.options):
        words += " Nothing asked these codes to lie together: between them the decoder was never trained."
    return words


# The rows of the page's table of an evaluation, by the field of ``Evaluation``.
EVALUATION_ROWS = {
    "log_likelihood": "a lower bound on log p(x), tighter with more importance samples: the number to compare by",
    "elbo": "the bound of one sample, which training maximizes at beta = 1: reconstruction minus KL",
    "reconstruction": "log p(x | z) with z drawn from the guide: how well the code's image fits",
    "kl": "KL(q(z | x) || p(z)): what the code costs: an upper bound on what it tells about the image, on average",
}

BITS_PER_DIM = "in bits per dimension"
BITS_PER_DIM_MEANING = "the same bound as -log2 P(x) / D, for 8-bit levels of D pixels: lower is better"


# --- The study's page ---

# No sentence depends on a number: a comparison that can go either way is read off its row of a table.

# The title and the paragraphs of each section, by its anchor.
QUESTIONS = {
    "beta": (
        "Why is the regularizer troublesome?",
        """\
The KL term is a price on information: each nat that a code tells about its image costs beta nats, and pays only if it
earns more than that in the reconstruction. Along beta the rate (the KL) falls, the distortion (minus the reconstruction
term) rises, and the latents that would earn least go first: see how the number of "active" latents falls. "Implied
beta" is read off the finished weights; where training has converged it equals the beta that was set.

**Where does the likelihood peak?** Nothing makes beta = 1 best for log p(x): it maximizes a bound with a gap that
depends on the guide. Read the column of differences to beta = 1, paired on the same test images. "Not distinguishable"
means that the 95% interval, corrected for the number of comparisons, contains zero. A star marks an estimate that has
not settled: with more importance samples it may still rise.""",
    ),
    "check": (
        "How do I check that the regularization worked?",
        """\
The regularization worked if codes of test images, one sample each, look like samples of the prior, and still say
something about the images. The first is measured by a Kolmogorov-Smirnov distance for each latent, by a classifier
(effect 0: alike, 1: always told apart) and by holes (prior samples that the codes cover less than all but one percent
of other images' codes). The second is the mutual information, which cannot exceed the logarithm of the number of
images. Codes can match the prior because they are empty: read both together.""",
    ),
    "blur": (
        "Why do VAEs blur, and autoencoders too?",
        """\
A reconstruction is a mean of all images that the decoder holds possible for a code; a mean of sharp images that differ
is not sharp. **Why a VAE blurs:** the guide's noise makes several images share a code, and the error of one
reconstruction splits exactly into that "posterior noise" and the error that is left without it. **Why an autoencoder
blurs:** it has no noise, but a short code still leaves open which image it was: sharpness grows with the number of
latents. Power above one is noise, not detail: it comes from binary inputs.

**Samples.** The autoencoder was never trained with a prior, so decoding N(0, I) judges it unfairly. The rows "fitted"
decode draws of a density that was fitted to the codes of training images afterwards: a normal, or a mixture of normals,
whose number validation codes choose. The row "other real images" is what real images would have.""",
    ),
    "averaging": (
        "What does averaging over pixels do?",
        """\
A loss that is averaged over the D pixels instead of summed has the objective of beta = D up to a factor, even with beta
set to one: rec / D - KL = (rec - D KL) / D. A squared error that is averaged is the likelihood of a normal with
variance D / 2. A linear decoder near collapse keeps a direction of the data only if its eigenvalue, in units of the
likelihood's noise, is above beta (Lucas et al. 2019; Dai et al. 2020): "directions above" is this prediction, made
before any training, and "active" is what came. "As predicted" says whether a run collapsed exactly where no direction
is above beta.""",
    ),
    "collapse": (
        "What helps against collapse?",
        """\
Early in training the decoder has not learned to use its latents, and the KL pushes them to the prior before it does. A
warm-up lowers the price at the beginning; free bits make the first nats of each latent free. Free bits count latents as
active nearly by construction, so look at the bound L_S as well as at the number of active latents.""",
    ),
    "latents": (
        "How many latents?",
        """\
All runs are trained for the same epochs. Differences to the base are paired on the same test images; their errors say
nothing about what another seed would give.""",
    ),
    "labels": (
        "What is a label worth?",
        """\
A semi-supervised VAE sees all training images and the labels of a few, as many of each class; the others are a latent
that is summed over. Its classifier q(y | x) learns the labels, and from all images that similar images have one label,
that each image has one, and that classes are equally frequent. p(y | x) follows from the densities: which class gives
the image more probability. "The base" has the same latents and no classes. Below, samples: a column has one code, and a
row one class; what a column shares, such as slant and width, is what the code holds beyond the class.""",
    ),
    "method": (
        "How was it measured?",
        """\
Every run is the same plain VAE unless its name says otherwise, trained for {epochs} epochs. Its last weights are kept.
Every reported number is at beta = 1. log p(x) is estimated from below by the importance-weighted bound L_S with S =
{num_particles:,} samples per image, on {images:,} fixed random test images. Runs are ranked by log p(x) only where
their difference in L_S exceeds what either may still gain with more samples. ± is one standard error over images; it
says nothing about what another training would give.

Training took {training:.3g}, evaluation {evaluation:.3g} and measuring {measuring:.3g} minutes.""",
    ),
    "explore": (
        "Move through a latent space",
        """\
Two latents are few, but they can be seen whole. Each point is a test image, where the encoder puts it; the picture is
what the decoder makes of the place under the pointer. The network itself runs in this page. Between the classes of a
VAE the decoder may draw what is neither; between the codes of an autoencoder it was never trained.""",
    ),
}

# Below each figure and table, by its name.
CAPTIONS = {
    "rate-distortion": "Each point is a model, with its beta. The sum of both axes is minus the ELBO: all points of "
    "the dotted line have the best one.",
    "bounds": "Differences of L_S and of the ELBO to beta = 1 on the same test images, with standard errors, near the "
    "best beta. Hollow marks are estimates that have not settled.",
    "beta": "Nats per image ± standard error over images. L_S is the importance-weighted bound on log p(x).",
    "sweep": "{dataset}: {name} along beta. How like the test images are they, and where are they all the same?",
    "check": "KS: the Kolmogorov-Smirnov distance of the farthest latent. The last two columns add up to the mean KL, "
    "nats.",
    "errors": "Reconstructions; squared errors are per pixel. The autoencoder's nats are log p(x | z(x)), never a "
    "log-likelihood.",
    "samples": "Decoded samples. Classifier: 0 where samples cannot be told from real images, 1 where they always can.",
    "active": "Active latents along beta, measured and predicted; the last beta is D, a mean over pixels.",
    "averaged-pictures": "{dataset}: reconstructions after the same training of the same network.",
    "averaging": "Nats per image. Variation: how much reconstructions differ between images, relative to the images "
    "themselves; at zero they are all one picture.",
    "collapse": "Nats per image; differences are paired.",
    "latents": "Nats per image; the first row is the base.",
    "labels": "L_S in nats per image, summed over the classes; the difference is paired.",
    "data": "Floor: the log-likelihood of each pixel on its own, without latents, on the same test images, in nats.",
    "strips": "From the top: {names}. {caption}",
}

# Below the pictures of the VAE and of the autoencoder, by what they show.
COMPARED_PICTURES = {
    "reconstructions": "Reconstructions: look at edges and thin strokes.",
    "samples": "Samples: which of them could be data?",
    "normal_samples": "Samples of codes from a normal that was fitted to codes.",
    "mixture_samples": "Samples of codes from a mixture of normals that was fitted to codes.",
}

NOT_RANKED = "log p(x) not ranked"  # said of a difference in L_S

TITLE = "What a VAE does and why"
SUBTITLE = (
    "{trainings} trainings on {datasets}, measured by one command. The size of this study is {size}; the numbers of a "
    "quick one are rough."
)
