"""What each map from a feature to the guide's scale does to the gradient, before anything is trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import kl_divergence

from ppl_vae.evidence.estimate import Estimate
from ppl_vae.runs.build import build_vae
from ppl_vae.runs.options import SCALE_MAPS, Options
from ppl_vae.vae import VAE

LARGEST_FEATURES = (1.0, 10.0, 30.0, 100.0)


def gradients_at_start(options: Options, x: Tensor) -> list[dict[str, Any]]:
    """The ELBO's gradient for the scale features h of an untrained guide, h stretched until max |h| is 1, 10, 30, 100.

    A feature of 10 or 30 is what one bad step, or one odd image, makes of it. Float32, one draw of z an image.

    Args:
        options: of a run with a diagonal guide; its scale map does not count.
        x: images (N, *E), as the model sees them.

    Returns:
        One record for each map and stretch, with the KL in closed form: "gradient_norm", the mean over images of the
        norm of the (L,) gradient, nats a unit of h, of those images where it is finite (None where there is none);
        "not_finite", the share of images where it is not; "kl_overflow", the share whose KL is not finite; and
        "vanished", the share of the gradient's entries that are exactly 0. The same four under "sampled", with the KL's
        estimate log q(z | x) - log p(z) at the draw, which is what trains in the study; and "largest_scale".
    """
    found = []
    for word in SCALE_MAPS:
        with torch.random.fork_rng(devices=[]), pyro.validation_enabled(False):  # an infinite scale is no error here
            torch.manual_seed(options.seed)
            vae = build_vae(replace(options, scale_map=word), tuple(x.shape[1:])).eval()
            for largest in LARGEST_FEATURES:
                found.append({"scale_map": word, "largest_feature": largest} | _of_one(vae, x, largest))
    return found


def _of_one(vae: VAE, x: Tensor, largest: float) -> dict[str, Any]:
    encoder: Any = vae.posterior
    with torch.no_grad():
        loc, feature = encoder.net(x).chunk(2, dim=-1)
    feature = (feature * largest / feature.abs().max()).requires_grad_()
    q, prior = encoder.family(torch.cat([loc, feature], dim=-1)), vae.prior()
    torch.manual_seed(0)  # the same noise for every map
    z = q.rsample()
    reconstruction = vae.likelihood(z).log_prob(x)
    analytic, sampled = kl_divergence(q, prior.expand((len(x),))), q.log_prob(z) - prior.log_prob(z)
    return {
        **_gradient(reconstruction, analytic, feature),
        "sampled": _gradient(reconstruction, sampled, feature),
        "largest_scale": float(q.stddev.detach().max()),
    }


def _gradient(reconstruction: Tensor, kl: Tensor, feature: Tensor) -> dict[str, Any]:
    (gradient,) = torch.autograd.grad((reconstruction - kl).sum(), feature, retain_graph=True)
    finite = gradient.isfinite().all(-1)
    norm = gradient.double().norm(dim=-1)  # whose squares overflow in float32 before the gradient does
    return {
        "gradient_norm": Estimate.from_values(norm[finite]).to_json() if finite.any() else None,
        "not_finite": float((~finite).double().mean()),
        "kl_overflow": float((~kl.isfinite()).double().mean()),
        "vanished": float((gradient == 0).double().mean()),
    }
