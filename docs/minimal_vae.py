"""A variational autoencoder as a Pyro program, from the pixels to log p(x), in one file.

    python docs/minimal_vae.py

trains on MNIST (the files that ship with ppl_vae) for ten epochs, and estimates log p(x) of 500 test images.
It imports torch and Pyro and nothing of ppl_vae. Read it once from top to bottom.
"""

import lzma
import math
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

MNIST = Path(__file__).parents[1] / "ppl_vae" / "mnist"


# --- Data: 784 zeros and ones per image ---


def read_images(name: str) -> Tensor:
    """Read images of an IDX file as (N, 784) probabilities: pixel / 255."""
    content = lzma.decompress((MNIST / name).read_bytes())
    levels = torch.frombuffer(bytearray(content[16:]), dtype=torch.uint8)  # 16 bytes of header
    return levels.view(-1, 784).float() / 255


# --- The program: z ~ N(0, I), x ~ Bernoulli(decoder(z)); and its guide q(z | x) = N(mean(x), scale(x)^2) ---


class VAE(nn.Module):
    def __init__(self, num_latents: int = 20, num_hidden: int = 300) -> None:
        super().__init__()
        self.num_latents = num_latents
        self.decoder = nn.Sequential(nn.Linear(num_latents, num_hidden), nn.Tanh(), nn.Linear(num_hidden, 784))
        self.encoder = nn.Sequential(nn.Linear(784, num_hidden), nn.Tanh(), nn.Linear(num_hidden, 2 * num_latents))

    def prior(self) -> dist.Distribution:
        return dist.Normal(torch.zeros(self.num_latents), 1.0).to_event(1)

    def likelihood(self, z: Tensor) -> dist.Distribution:  # z: (..., L)
        # to_event(1) makes the 784 pixels one event: their log-probabilities are summed, never averaged.
        return dist.Bernoulli(logits=self.decoder(z)).to_event(1)

    def posterior(self, x: Tensor) -> dist.Distribution:  # x: (B, 784)
        mean, log_scale = self.encoder(x).chunk(2, dim=-1)
        return dist.Normal(mean, log_scale.exp()).to_event(1)

    # beta is the weight of the KL in training. It scales the latent site, in the model and in the guide, and never the
    # observed one. Everything that is reported has beta = 1.

    def model(self, x: Tensor, beta: float = 1.0) -> None:
        pyro.module("vae", self)
        with pyro.plate("images", len(x), dim=-1):
            with poutine.scale(scale=beta):
                z = pyro.sample("z", self.prior())
            pyro.sample("x", self.likelihood(z), obs=x)

    def guide(self, x: Tensor, beta: float = 1.0) -> None:
        pyro.module("vae", self)
        with pyro.plate("images", len(x), dim=-1), poutine.scale(scale=beta):
            pyro.sample("z", self.posterior(x))


# --- Training: stochastic variational inference ---


def train(vae: VAE, images: Tensor, *, epochs: int, warmup_epochs: int = 2, batch_size: int = 100) -> float:
    """Maximize the ELBO; beta rises to 1 over the warm-up. Return the last epoch's loss, in nats per image."""
    pyro.clear_param_store()
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    for epoch in range(epochs):
        beta = min(1.0, (epoch + 1) / (warmup_epochs + 1))  # poutine.scale takes no 0
        total = 0.0
        for batch in images[torch.randperm(len(images))].split(batch_size):
            total += svi.step(torch.bernoulli(batch), beta)  # new zeros and ones at every access
        print(f"epoch {epoch + 1:3}  beta {beta:.2f}  loss {total / len(images):.2f} nats per image")
    return total / len(images)


# --- log p(x): importance sampling with the guide as the proposal ---


@torch.no_grad()
def log_weights(vae: VAE, x: Tensor, num_particles: int) -> Tensor:
    """log w = log p(x, z) - log q(z | x), (S, B) nats: one row per particle, z ~ q(z | x)."""
    q = vae.posterior(x)
    z = q.sample((num_particles,))  # (S, B, L)
    return vae.prior().log_prob(z) + vae.likelihood(z).log_prob(x) - q.log_prob(z)


def log_evidence(vae: VAE, x: Tensor, num_particles: int) -> Tensor:
    """L_S = log (1/S) sum_s w_s of each image, (B,) nats. In expectation it is a lower bound on log p(x)."""
    # log of a mean of exponentials, taken without leaving the log: w itself is smaller than any float.
    return log_weights(vae, x, num_particles).logsumexp(0) - math.log(num_particles)


def main() -> None:
    pyro.set_rng_seed(0)
    vae = VAE()
    train(vae, read_images("train-images-idx3-ubyte.xz")[:50_000], epochs=10)

    x = torch.bernoulli(read_images("t10k-images-idx3-ubyte.xz")[:500])
    elbo = log_weights(vae, x, 100).mean(0)
    for name, nats in (("ELBO", elbo), ("L_10", log_evidence(vae, x, 10)), ("L_1000", log_evidence(vae, x, 1000))):
        print(f"{name:7} {nats.mean():.2f} ± {nats.std() / math.sqrt(len(nats)):.2f} nats per image")


if __name__ == "__main__":
    main()
