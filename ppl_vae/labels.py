"""VAEs of labelled images: p(x, z | y) = p(z | y) p(x | z, y), with the guide q(z | x, y)."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ppl_vae.runtime.records import UNKNOWN
from ppl_vae.vae import VAE, check_event_shape


class ConditionalVAE(VAE):
    """p(x, z | y) = p(z | y) p(x | z, y), with the guide q(z | x, y): a ``VAE`` whose parts take the label.

    The programs take ``Records(x, y)``: x (B, *E) and the labels y (B,), int64, from 0 to K - 1. Bounds of
    ``log_evidence`` are on log p(x | y).

    Args:
        prior: y (...) -> p(z | y), batch (...), or () where it ignores y; event (L,).
        likelihood: z (..., L), y -> p(x | z, y), batch (...), event E.
        posterior: x (..., *E), y -> q(z | x, y), batch (...), event (L,).
        class_probs: (K,) p(y), such as the frequencies in training; a buffer that is stored with the weights.

    Raises:
        ValueError: The shape of an image is not the likelihood's event shape.

    Reference: Kingma et al. 2014, arXiv 1406.5298; Sohn et al. 2015, "Learning structured output representation using
    deep conditional generative models".
    """

    class_probs: Tensor

    def __init__(
        self,
        prior: Callable[[Tensor], Distribution],
        likelihood: Callable[[Tensor, Tensor], Distribution],
        posterior: Callable[[Tensor, Tensor], Distribution],
        class_probs: Tensor,
    ) -> None:
        super().__init__(prior, likelihood, posterior)
        self.register_buffer("class_probs", class_probs)

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_probs)

    def fix_label(self, label: int) -> VAE:
        """The VAE p(z | y) p(x | z, y) of one label y, with the same weights.

        Raises:
            ValueError: The label is not from 0 to K - 1.
        """
        if not 0 <= label < self.num_classes:
            raise ValueError(f"label: expected a class from 0 to {self.num_classes - 1}, got {label}")
        y = torch.tensor(label, device=self.class_probs.device)
        return VAE(*(_FixedLabel(part, y) for part in (self.prior, self.likelihood, self.posterior))).eval()


class SemiSupervisedVAE(ConditionalVAE):
    """p(x, y, z) = p(y) p(z | y) p(x | z, y), with the guide q(y | x) q(z | x, y), where some labels are known (M2).

    y is a discrete latent that is summed over all its K values, ``infer={"enumerate": "parallel"}``. The guide puts all
    its mass on a known label, so that the ELBO is one of log p(x, y); where the label is -1, unknown, it is one of
    log p(x). ``objectives.SemiSupervisedELBO`` trains it, and teaches q(y | x). Bounds of ``log_evidence`` are on
    log p(x) in both cases, and exact in y: w = sum_y p(y) p(x, z_y | y) / q(z_y | x, y).

    Args:
        prior, likelihood, posterior, class_probs: As ``ConditionalVAE``.
        classifier: x (..., *E) -> q(y | x), a Categorical of batch shape (...).

    Reference: Kingma et al. 2014, arXiv 1406.5298, equations 6 and 7.
    """

    def __init__(
        self,
        prior: Callable[[Tensor], Distribution],
        likelihood: Callable[[Tensor, Tensor], Distribution],
        posterior: Callable[[Tensor, Tensor], Distribution],
        class_probs: Tensor,
        classifier: Callable[[Tensor], dist.Categorical],
    ) -> None:
        super().__init__(prior, likelihood, posterior, class_probs)
        self.classifier = classifier

    def model(self, x: Tensor, y: Tensor, *labelled: Tensor) -> None:  # type: ignore[override]
        """y ~ p(y), z ~ p(z | y), x ~ p(x | z, y). x: (B, *E); y: (B,), which the guide uses.

        ``labelled`` is ignored: the objective uses it.
        """
        with pyro.plate("images", len(x), dim=-1):
            label = pyro.sample("y", dist.Categorical(self.class_probs), infer={"enumerate": "parallel"})
            z = pyro.sample("z", self.prior(label))
            z = z.expand(*torch.broadcast_shapes(z.shape[:-1], label.shape), -1)  # a z may be given for all labels
            pyro.sample("x", check_event_shape(self.likelihood(z, label), x, z), obs=x)

    def guide(self, x: Tensor, y: Tensor, *labelled: Tensor) -> None:  # type: ignore[override]
        """y ~ q(y | x), or the known label, and z ~ q(z | x, y). x: (B, *E); y: (B,), -1 where it is not known."""
        with pyro.plate("images", len(x), dim=-1):
            label = pyro.sample("y", self._label_posterior(x, y), infer={"enumerate": "parallel"})
            pyro.sample("z", self.posterior(x, label))

    def given_labels(self) -> ConditionalVAE:
        """p(x, z | y) with q(z | x, y), without p(y) and q(y | x): the conditional VAE of the same parts."""
        parts = self.prior, self.likelihood, self.posterior
        return ConditionalVAE(*parts, self.class_probs).train(self.training)

    def _label_posterior(self, x: Tensor, y: Tensor) -> dist.Categorical:
        logits = self.classifier(x).logits
        is_label = y.unsqueeze(-1) == torch.arange(self.num_classes, device=y.device)
        sure = torch.where(is_label, 0.0, _IMPOSSIBLE).to(logits)
        return dist.Categorical(logits=torch.where((y == UNKNOWN).unsqueeze(-1), logits, sure))


_IMPOSSIBLE = -100.0  # log q of a label that is not the known one; -inf would give 0 * inf = NaN


class _FixedLabel(nn.Module):
    """A part of a ``ConditionalVAE`` with the label y, (), as its last argument."""

    y: Tensor

    def __init__(self, part: Callable[..., Distribution], y: Tensor) -> None:
        super().__init__()
        self.part = part
        self.register_buffer("y", y, persistent=False)

    def forward(self, *c: Tensor) -> Distribution:
        return self.part(*c, self.y)
