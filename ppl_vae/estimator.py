"""A VAE as a scikit-learn estimator. It needs the extra ``sklearn``."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyro
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ppl_vae import data
from ppl_vae.data import arrays
from ppl_vae.data.arrays import find_kind
from ppl_vae.evidence.dequantization import dequantized
from ppl_vae.evidence.evaluation import evaluate
from ppl_vae.evidence.moments import decode_mean, encode, sample_latents
from ppl_vae.runs.build import build_likelihood, build_vae
from ppl_vae.runs.options import Options
from ppl_vae.runs.resolve import (
    check_support,
    choose_pixels,
    find_device,
    fit_arguments,
    initialize_output_bias,
    resolve,
)
from ppl_vae.runtime.batching import images_per_pass
from ppl_vae.runtime.errors import Widths, check_count, check_widths
from ppl_vae.runtime.global_state import seeded
from ppl_vae.training import fit
from ppl_vae.training.checks import check_no_mask
from ppl_vae.vae import VAE

try:
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
    from sklearn.preprocessing import StandardScaler
    from sklearn.utils import check_random_state
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError:
    raise ImportError("ppl_vae.estimator: expected scikit-learn; pip install 'ppl_vae[sklearn]' brings it") from None

# The default likelihood for each kind of data: a density or mass of all values of that kind.
_USUAL = {
    data.BINARY: "bernoulli",
    data.LEVELS: "discretized-logistic",
    data.COUNTS: "negative-binomial",
    data.PROBABILITIES: "normal",
    data.REAL: "normal",
}
# What ``Options`` takes as it is; the others are decided by the data.
_OPTIONS = (
    *("network", "hidden", "latent_dim", "prior", "posterior", "objective"),
    *("batch_size", "learning_rate", "beta", "warmup_epochs", "average_decay", "device"),
)
_X = Path("X")  # the name of the array in errors
_USUAL_STEPS, _FEWEST_EPOCHS, _MOST_EPOCHS = 1000, 10, 500


class VAEDensity(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """log p(x) = log int p(z) p(x | z) dz of rows or images x, learned by a VAE.

    X is (N, D), (N, H, W), (N, H, W, C) or (N, C, H, W), C = 1 or 3. The kind of its numbers is found as for a data
    file: zeros and ones, uint8 levels, whole numbers from 0 (counts, also as floats), floats in [0, 1], or other
    floats. The likelihood must fit that kind. The defaults are bernoulli, discretized-logistic, negative-binomial, and
    normal for both kinds of floats.

    The columns of a table under a likelihood of real numbers are standardized in double precision, y = (x - m) / s, and
    the Jacobian is added back:

        log p(x) = log p(y) - sum_d log s_d.

    The unit of a column thus changes the scores by a constant only, and no scaler is needed. A constant column keeps
    its unit, s_d = 1. Images and 8-bit levels are not standardized.

    Scores are densities or masses of X as this estimator receives it: after a scaler in a Pipeline, of scaled data,
    which differ by log |det| of the scaling. Scores after different scalers cannot be compared; neither can a mass with
    a density, nor one kind of data with another.

    Args:
        likelihood: A word of ``--likelihood``, or None for the default of that kind of data.
        network, hidden, latent_dim, prior, posterior, objective: As on the command line of ppl-vae train. hidden is one
            width or several. None takes the network's default for hidden, and the prior's for objective.
        epochs: Passes through X; None takes as many as make about 1,000 steps, from 10 to 500.
        batch_size, learning_rate, beta, average_decay: As on the command line.
        warmup_epochs: The epochs over which beta rises; None: as on the command line.
        validation_fraction: The part of the rows by which the best weights are chosen; 0 keeps the last weights.
        binarization: "none", or "threshold" to make gray black and white under bernoulli.
        image_shape: (H, W) or (H, W, C), for images given as rows of H W C numbers; None: as X is.
        num_particles: S of the bound that is the score.
        random_state: The seed of weights, noise, and the draws of scores: None, a seed or numpy's RandomState.
        device: cpu, cuda, cuda:1, ...

    Attributes:
        vae_: The trained ``VAE``, on the device. With a scaler it is a model of standardized columns, and with
            dequantized levels a density of (level + u) / 256.
        scaler_: The ``StandardScaler`` of the columns, or None if they are not standardized.
        kind_: The kind of data of X, one of the words of ``data``.
        likelihood_: The word of the likelihood.
        seed_: The seed of every draw.
        n_features_in_: X.shape[1].
        row_shape_, event_shape_: The shape of one x in X, and as the VAE sees it, (D,) or (C, H, W).

    Reference: Kingma and Welling 2014, arXiv 1312.6114 (the model); Burda et al. 2016, arXiv 1509.00519 (the score).
    """

    # scikit-learn's clone, get_params and grid search need one flat argument for each parameter: no dataclasses here.
    def __init__(
        self,
        *,
        likelihood: str | None = None,
        network: str = "gated",
        hidden: Widths | None = (128, 128),
        latent_dim: int = 10,
        prior: str = "standard-normal",
        posterior: str = "diagonal",
        objective: str | None = None,
        epochs: int | None = None,
        batch_size: int = 100,
        learning_rate: float = 2e-3,
        beta: float = 1.0,
        warmup_epochs: int | None = None,
        average_decay: float = 0.0,
        validation_fraction: float = 0.1,
        binarization: str = "none",
        image_shape: Sequence[int] | None = None,
        num_particles: int = 100,
        random_state: int | np.random.RandomState | None = None,
        device: str = "cpu",
    ) -> None:
        self.likelihood = likelihood
        self.network = network
        self.hidden = hidden
        self.latent_dim = latent_dim
        self.prior = prior
        self.posterior = posterior
        self.objective = objective
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.beta = beta
        self.warmup_epochs = warmup_epochs
        self.average_decay = average_decay
        self.validation_fraction = validation_fraction
        self.binarization = binarization
        self.image_shape = image_shape
        self.num_particles = num_particles
        self.random_state = random_state
        self.device = device

    def fit(self, X: ArrayLike, y: object = None) -> VAEDensity:
        """Maximize the ELBO of X, of two rows or more, and return the estimator itself. y is ignored.

        Raises:
            ValueError: A value is off the likelihood's support, or a parameter is out of its range.
        """
        if self.posterior == "delta":
            raise ValueError("posterior: expected a density q(z | x), got delta: an autoencoder has no log p(x)")
        if self.binarization not in ("none", "threshold"):
            raise ValueError(
                f"binarization: expected none or threshold, got {self.binarization!r}: what is drawn of X is not "
                "the X that is scored"
            )
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction: expected 0 or more and below 1, got {self.validation_fraction}")
        rows = self._validated(X, reset=True)
        images = self._images(rows)
        self.kind_ = find_kind(_X, {"X": images})
        self.row_shape_, self.event_shape_ = rows.shape[1:], images.shape[1:]
        self.seed_ = int(check_random_state(self.random_state).randint(2**31 - 1))
        options = self._options(len(images))
        is_table = images.ndim == 2 and self.kind_ != data.LEVELS
        is_real = is_table and build_likelihood(options, self.event_shape_).data_kind == data.REAL
        self.scaler_ = StandardScaler().fit(images) if is_real else None
        splits = self._splits(self._standardized(images))
        options = resolve(options, splits)
        check_support(options, splits)
        is_density = build_likelihood(options, self.event_shape_).measure == "density"
        is_scaled = self.kind_ in (data.PROBABILITIES, data.REAL)
        if is_density and (words := data.describe_constant_columns(splits.train)):
            warnings.warn(words, stacklevel=2)
        if is_density and is_scaled and (words := data.describe_repeats(splits.train)):
            warnings.warn(f"X: {words}", stacklevel=2)
        self.likelihood_, self._pixels_ = options.likelihood, choose_pixels(options, splits)
        self._n_features_out = options.latent_dim
        device = find_device(options.device)
        stored, transform = data.training_images(splits, self._pixels_)
        validation = None
        if len(splits.validation):
            validation = data.evaluation_images(splits, "validation", self._pixels_).to(device)
        with seeded(self.seed_, device):
            vae = build_vae(options, self.event_shape_).float()  # also where torch makes float64 by default
            initialize_output_bias(vae, data.initialization_images(splits, self._pixels_))
            fit(vae.to(device), stored, **fit_arguments(options, validation), transform=transform)
        self.vae_ = vae
        return self

    def score_samples(self, X: ArrayLike) -> np.ndarray:
        """L_S = log (1/S) sum_s p(x, z_s) / q(z_s | x), in expectation below log p(x), for each row.

        The same X gives the same scores, (N,) nats, float64; the draws for a row depend on its place in X.

        Raises:
            ValueError: X has other features than in ``fit``, or values off the likelihood's support.
            NotFittedError: ``fit`` was not called.
        """
        check_is_fitted(self)
        x = self._seen(X)
        result = evaluate(self._scored(), x, num_particles=self.num_particles, seed=self.seed_)
        log_volume = 0.0 if self.scaler_ is None else np.log(self.scaler_.scale_).sum()
        return result.log_evidence.cpu().numpy() - log_volume

    def score(self, X: ArrayLike, y: object = None) -> float:
        """The mean of ``score_samples``, nats per row, which GridSearchCV maximizes."""
        return float(self.score_samples(X).mean())

    def transform(self, X: ArrayLike) -> np.ndarray:
        """E[z | x] under the guide q(z | x), (N, L). Raises ValueError and NotFittedError as ``score_samples``."""
        check_is_fitted(self)
        x = self._seen(X)
        with seeded(self.seed_, x.device):
            return encode(self._scored(), x).mean.double().cpu().numpy()

    def inverse_transform(self, Z: ArrayLike) -> np.ndarray:
        """E[x | z], (N, *) in the layout and the unit of X, for Z (N, L); raises as ``transform``."""
        check_is_fitted(self)
        Z = np.asarray(Z, dtype=np.float32)
        if Z.ndim != 2 or Z.shape[1] != self._n_features_out or not len(Z):
            raise ValueError(f"Z: expected shape (N, {self._n_features_out}), got {Z.shape}")
        z = torch.from_numpy(Z).to(find_device(self.device))
        with seeded(self.seed_, z.device):
            return self._layout(decode_mean(self._scored(), z))

    def sample(self, n_samples: int = 1, random_state: int | np.random.RandomState | None = None) -> np.ndarray:
        """z ~ p(z), x ~ p(x | z): (n_samples, *) in the layout and the unit of X.

        Args:
            n_samples: At least 1; raises ValueError for fewer.
            random_state: The seed of the draws; None gives the same draws at every call.
        """
        check_is_fitted(self)
        n_samples = check_count("n_samples", n_samples)
        seed = self.seed_ if random_state is None else int(check_random_state(random_state).randint(2**31 - 1))
        vae = self._scored()
        with seeded(seed, find_device(self.device)), torch.no_grad(), pyro.validation_enabled(False):
            z = sample_latents(vae.prior(), n_samples)
            chunk = images_per_pass(vae.likelihood(z[:1]).mean)
            return self._layout(torch.cat([vae.likelihood(part).sample() for part in z.split(chunk)]))

    # --- From arrays to what the VAE sees, and back ---

    def _validated(self, X: ArrayLike, *, reset: bool) -> np.ndarray:
        check_no_mask("X", X)
        shape = getattr(X, "shape", ())
        if reset and self.image_shape is None and len(shape) > 4:
            raise ValueError(f"X: expected (N, D), (N, H, W), (N, H, W, C) or (N, C, H, W), got shape {shape}")
        return validate_data(self, X, reset=reset, dtype="numeric", allow_nd=True, ensure_min_samples=1 + reset)

    def _images(self, X: np.ndarray) -> np.ndarray:
        """Rows or images as (N, D) or (N, C, H, W). Negative whole numbers become real values."""
        if self.image_shape is not None:
            E = check_widths("image_shape", self.image_shape)
            if len(E) not in (2, 3) or math.prod(E) != math.prod(X.shape[1:]):
                raise ValueError(f"image_shape: expected (H, W) or (H, W, C) of {X.shape[1:]} numbers, got {E}")
            X = X.reshape(len(X), *E)
        if X.dtype.kind == "i" and X.size and X.min() < 0:
            X = X.astype(np.float64)
        return np.ascontiguousarray(arrays.move_channels_first(_X, "X", X))

    def _standardized(self, images: np.ndarray) -> np.ndarray:
        """Standardize columns (N, D) to mean 0 and standard deviation 1; return (N, *E) unchanged without a scaler."""
        return images if self.scaler_ is None else self.scaler_.transform(images)

    def _splits(self, images: np.ndarray) -> data.Splits:
        """Split the rows by the seed into training and validation data; there are no test data."""
        is_small = self.scaler_ is None and self.kind_ in (data.BINARY, data.LEVELS)
        dtype = np.uint8 if is_small else np.float32
        stored = torch.from_numpy(images.astype(dtype))
        order = np.random.RandomState(self.seed_).permutation(len(stored))
        count = int(len(stored) * self.validation_fraction)
        validation, train = (torch.from_numpy(np.sort(part)) for part in (order[:count], order[count:]))
        return data.Splits(
            name="X",
            kind=self.kind_ if self.scaler_ is None else data.REAL,
            train=stored[train],
            validation=stored[validation],
            test=stored[:0],
            sha256="",
            split="validation by random_state",
        )

    def _options(self, num_rows: int) -> Options:
        num_train = num_rows - int(num_rows * self.validation_fraction)
        steps_per_epoch = -(-num_train // max(1, self.batch_size))
        usual = min(_MOST_EPOCHS, max(_FEWEST_EPOCHS, -(-_USUAL_STEPS // steps_per_epoch)))
        return Options(
            **{name: getattr(self, name) for name in _OPTIONS},
            dataset="X",
            binarization=None if self.kind_ in (data.BINARY, data.REAL, data.COUNTS) else self.binarization,
            likelihood=self.likelihood or ("bernoulli" if self.binarization != "none" else _USUAL[self.kind_]),
            epochs=usual if self.epochs is None else self.epochs,
            compile="off",
            seed=self.seed_,
        )

    def _seen(self, X: ArrayLike) -> Tensor:
        """Convert X to (N, *E) on the device, as the scored model sees it; refuse values off its support."""
        images = self._images(self._validated(X, reset=False))
        if images.shape[1:] != self.event_shape_:
            raise ValueError(f"X: expected rows of event shape {self.event_shape_}, got {images.shape[1:]}")
        with np.errstate(over="ignore"):
            x = torch.from_numpy(self._standardized(images).astype(np.float32))
        if not x.isfinite().all():
            raise ValueError("X: expected numbers that single precision holds, got larger ones")
        is_levels = self.kind_ == data.LEVELS
        if self._pixels_ in ("threshold", "levels", "dequantized"):
            good = (x >= 0) & (x <= (255 if is_levels else 1)) & (x == (x.round() if is_levels else x))
            scale = "levels from 0 to 255" if is_levels else "gray from 0 to 1"
            words = f"expected {scale}, as the X that this is fitted to"
        else:
            family = self.vae_.likelihood.family  # type: ignore[attr-defined]
            good = family.support.check(x)
            words = f"{self.likelihood_} expected values that are {family.support_words}"
        if not good.all():
            raise ValueError(f"X: {words}, got values from {x.min():.4g} to {x.max():.4g}")
        if self._pixels_ == "threshold":
            x = (x / 255 if is_levels else x).ge(0.5).float()
        return x.to(find_device(self.device))

    def _scored(self) -> VAE:
        return dequantized(self.vae_) if self._pixels_ == "dequantized" else self.vae_

    def _layout(self, x: Tensor) -> np.ndarray:
        """Convert (N, *E) as the model sees it to the layout and the unit of X, float64."""
        values = x.double().cpu().numpy()
        if self.scaler_ is not None:
            values = self.scaler_.inverse_transform(values)
        layout = self.row_shape_ if self.image_shape is None else tuple(self.image_shape)
        if values.ndim == 4 and not arrays.has_channels_first((len(values), *layout)):
            values = values.transpose(0, 2, 3, 1)
        return values.reshape(len(values), *self.row_shape_)
