"""The same VAE trained by different programs: what ``benchmark.py`` times. Each takes steps from the same weights.

Every contestant but the floor minimizes E_q[log q(z | x) - log p(x, z)], with one draw of z per image (a sampled KL),
by Adam with a learning rate of 1e-3, and adds up the loss of its steps. p(z) is a standard Normal or a flow, p(x | z)
784 Bernoullis and q(z | x) a diagonal Normal. ``Setting`` has other likelihoods, for ppl_vae's own steps alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from itertools import cycle, islice, pairwise
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ppl_vae import data, objectives
from ppl_vae.conditional import Conditional
from ppl_vae.parts import flows, likelihoods, networks, posteriors, priors
from ppl_vae.runs.build import build_vae
from ppl_vae.runs.options import PLAIN, Options
from ppl_vae.runs.resolve import choose_pixels, initialize_output_bias, resolve
from ppl_vae.training import CapturedSteps, EagerSteps, Optimizer, Resident, TrainingState
from ppl_vae.vae import VAE

LEARNING_RATE = 1e-3
EVENT_SHAPE = (1, 28, 28)
CLIP_NORM = 100.0  # of ppl_vae's steps; the others do not clip
_PIXELS = math.prod(EVENT_SHAPE)


class Model(NamedTuple):
    """An encoder, whose decoder is its mirror; convolutional with ``channels``, its prior a flow with ``couplings``."""

    hidden: tuple[int, ...]
    latent_dim: int
    batch_size: int
    activation: type[nn.Module] = nn.ReLU
    channels: tuple[int, ...] = ()
    convolutional: networks.NetworkPair = networks.CONV
    couplings: int = 0

    @property
    def is_translated(self) -> bool:
        """Whether it is written for NumPyro and JAX too."""
        return self.convolutional is networks.CONV and not self.couplings


MODELS = {
    "mlp128": Model((400,), 20, 128),
    "iwae20": Model((200, 200), 50, 20, nn.Tanh),
    "iwae100": Model((200, 200), 50, 100, nn.Tanh),
    "conv128": Model((256,), 40, 128, channels=(16, 32)),
    "resflow100": Model((256,), 40, 100, channels=(16, 32), convolutional=networks.RESIDUAL, couplings=10),
}


class Task:
    """A model, its first weights, and the batches that all contestants train it on.

    Args:
        model: what is trained.
        images: (N, 1, 28, 28) uint8 of zeros and ones, resident on the device.
    """

    def __init__(self, model: Model, images: Tensor) -> None:
        self.model = model
        self.images = images
        self.device = images.device
        self.batches = _batches(images, model.batch_size)
        torch.manual_seed(0)
        self._weights = [[w.detach().clone() for w in net.parameters()] for net in self.vae_networks()]
        self._prior = self._fresh_prior().to(self.device)

    def _with_first_weights(self, encoder: nn.Module, decoder: nn.Module) -> tuple[nn.Module, nn.Module]:
        with torch.no_grad():
            for net, weights in zip((encoder, decoder), self._weights, strict=True):
                for parameter, weight in zip(net.parameters(), weights, strict=True):
                    parameter.copy_(weight)
        return encoder.to(self.device), decoder.to(self.device)

    def vae_networks(self) -> tuple[nn.Module, nn.Module]:
        """ppl_vae's encoder, (B, 1, 28, 28) -> (B, 2 L), and decoder, (..., L) -> (..., 784), with fresh weights."""
        hidden, L, _, activation, channels, pair, _ = self.model
        if channels:
            return (
                pair.encoder(EVENT_SHAPE, 2 * L, channels=channels, hidden=hidden),
                pair.decoder(L, EVENT_SHAPE, _PIXELS, channels=channels, hidden=hidden),
            )
        return (
            networks.MLP(EVENT_SHAPE, 2 * L, hidden=hidden, activation=activation),
            networks.MLP(L, _PIXELS, hidden=hidden[::-1], activation=activation),
        )

    def plain_networks(self) -> tuple[nn.Module, nn.Module]:
        """The same functions as one would write them in PyTorch, with the first weights."""
        hidden, L, _, activation, channels, _, _ = self.model
        if channels:
            nets = self._with_first_weights(*self.vae_networks())
            for layer in [layer for net in nets for layer in net.modules()]:
                for kind in (nn.Conv2d, nn.ConvTranspose2d):
                    if isinstance(layer, kind):
                        layer.__class__ = kind  # torch's own form of the same sums
            return nets

        def dense(*widths: int) -> nn.Sequential:
            layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), activation())]
            return nn.Sequential(*layers[:-1])

        encoder = nn.Sequential(nn.Flatten(), *dense(_PIXELS, *hidden, 2 * L))
        return self._with_first_weights(encoder, dense(L, *hidden[::-1], _PIXELS))

    def _fresh_prior(self) -> nn.Module:
        if not self.model.couplings:
            return priors.StandardNormal(self.model.latent_dim)
        how: Any = {"coupling": flows.affine_coupling, "num_layers": self.model.couplings, "hidden": (256,)}
        return priors.FlowPrior(self.model.latent_dim, **how)

    def prior(self) -> nn.Module:
        """() -> p(z), with the first weights."""
        return deepcopy(self._prior)

    def vae(self) -> VAE:
        """The model as ppl_vae has it, with the first weights."""
        encoder, decoder = self._with_first_weights(*self.vae_networks())
        return VAE(
            self.prior(),
            Conditional(decoder, likelihoods.Bernoulli(EVENT_SHAPE)),
            Conditional(encoder, posteriors.DiagonalNormal(self.model.latent_dim)),
        ).to(self.device)


def _batches(images: Tensor, batch_size: int) -> list[Tensor]:
    """The images in an order of their own, as indices on their device, without a last batch that is smaller."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).to(images.device)
    return [index for index in order.split(batch_size) if len(index) == batch_size]


Steps = Callable[[int], float]
"""n -> the mean loss of the next n training steps, nats per image. It returns when they are done."""


# --- PyTorch by hand ---


class Loss(nn.Module):
    """log q(z | x) - log p(x, z), z ~ q(z | x), a mean over images: x (B, 1, 28, 28) -> ()."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.encoder, self.decoder = task.plain_networks()
        self.flow: Any = task.prior() if task.model.couplings else None

    def forward(self, x: Tensor) -> Tensor:
        loc, log_scale = self.encoder(x).float().chunk(2, dim=-1)  # bf16 under autocast
        noise = torch.randn_like(loc)
        z = loc + log_scale.exp() * noise
        reconstruction = F.binary_cross_entropy_with_logits(self.decoder(z), x.flatten(1), reduction="sum")
        if self.flow is None:
            kl = (0.5 * (z * z - noise * noise) - log_scale).sum()
        else:
            log_q = -(0.5 * (noise * noise + math.log(2 * math.pi)) + log_scale).sum()
            u, log_slope = self.flow.flow.inverse(z)
            log_p = log_slope.sum() - (0.5 * (u * u + math.log(2 * math.pi))).sum()
            kl = log_q - log_p
        return (reconstruction + kl) / len(x)


def pytorch_eager(task: Task, *, fused: bool) -> Steps:
    """A training loop by hand: loss, backward, torch's Adam as it comes or fused."""
    loss_of = Loss(task)
    optimizer = torch.optim.Adam(loss_of.parameters(), lr=LEARNING_RATE, fused=fused or None)
    batches = cycle(task.batches)

    def steps(n: int) -> float:
        total = torch.zeros((), device=task.device)
        for index in islice(batches, n):
            loss = loss_of(task.images[index].float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        return total.item() / n

    return steps


def pytorch_whole_step(task: Task, *, bf16: bool = False) -> Steps:
    """Gather, loss, gradient and Adam, written as one function for torch.compile; in bf16, under autocast.

    ``fullgraph`` makes a graph break an error. Inductor's wrapper in C++ was its fastest option on CPUs.
    """
    torch._dynamo.reset()  # the function below is compiled anew for each task
    loss_of = Loss(task)
    weights = {name: w.detach() for name, w in loss_of.named_parameters()}
    moments = [(w, torch.zeros_like(w), torch.zeros_like(w)) for w in weights.values()]
    total = torch.zeros((), device=task.device)
    options: dict[str, Any] = {"cpp_wrapper": True}
    if task.device.type == "cuda":
        options = {"triton.cudagraphs": True}
        for tensor in (total, *(tensor for triple in moments for tensor in triple)):
            torch._dynamo.mark_static_address(tensor)

    def loss_under_precision(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        with torch.autocast(task.device.type, torch.bfloat16, enabled=bf16):
            loss: Tensor = torch.func.functional_call(loss_of, weights, (x,))
            return loss

    @torch.compile(fullgraph=True, options=options)
    def step(index: Tensor, rate: Tensor, root_of_correction: Tensor) -> None:
        x = task.images[index].float()
        gradients, loss = torch.func.grad_and_value(loss_under_precision)(weights, x)
        for (weight, first, second), gradient in zip(moments, gradients.values(), strict=True):
            first.lerp_(gradient, 0.1)
            second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            weight.sub_(rate * first / (second.sqrt() / root_of_correction + 1e-8))
        total.add_(loss)

    batches, taken = cycle(task.batches), 0

    def steps(n: int) -> float:
        nonlocal taken
        total.zero_()
        times = range(taken + 1, taken + n + 1)
        rates = torch.tensor([LEARNING_RATE / (1 - 0.9**t) for t in times], device=task.device).unbind()
        roots = torch.tensor([(1 - 0.999**t) ** 0.5 for t in times], device=task.device).unbind()
        for index, rate, root in zip(islice(batches, n), rates, roots, strict=True):
            step(index, rate, root)
        taken += n
        return total.item() / n

    return steps


# --- ppl_vae ---


def ppl_vae(task: Task, *, captured: bool, bf16: bool = False) -> Steps:
    """The steps of ``training.fit``, which also clip the gradient and stop where a number is not finite."""
    return _ppl_vae_steps(task.vae(), task.images, data.convert_to_float, task.batches, captured=captured, bf16=bf16)


def _ppl_vae_steps(
    vae: VAE,
    images: Tensor,
    transform: Callable[..., Tensor],
    batches: list[Tensor],
    *,
    captured: bool,
    bf16: bool = False,
) -> Steps:
    batch_size = len(batches[0])
    state = TrainingState(vae)
    kind = CapturedSteps if captured else EagerSteps
    more: Any = {"batch_size": batch_size} if captured else {}
    source = Resident(images, images.device)
    elbo = objectives.autocast(objectives.elbo(), torch.bfloat16) if bf16 else objectives.elbo()
    loss = partial(objectives.loss_per_image, elbo)
    stepper = kind(state, loss, source, transform, optimizer=Optimizer(clip_norm=CLIP_NORM), **more)
    endless = cycle(batches)

    def steps(n: int) -> float:
        state.epoch_loss = 0.0
        for _ in stepper.epoch(tuple(islice(endless, n)), [(1.0, LEARNING_RATE, 0.0)] * n, validate=False):
            pass
        stepper.settle()
        return state.epoch_loss / (n * batch_size)

    return steps


class Setting:
    """A plain VAE of train_svi.py's own network, under a likelihood, with 8-bit images brought to what it takes.

    Training starts from the pixels' marginals, as it does there. What a likelihood refits in closed form between steps
    (``normal-optimal``, every tenth) is no part of a step.

    Args:
        likelihood: a word of the command line.
        splits: 8-bit images.
    """

    def __init__(self, likelihood: str, splits: data.Splits, *, device: torch.device) -> None:
        options = resolve(Options(**PLAIN, likelihood=likelihood, compile="off"), splits)
        pixels = choose_pixels(options, splits)
        torch.manual_seed(0)
        vae = build_vae(options, splits.event_shape)
        initialize_output_bias(vae, data.expected_images(splits, pixels))
        stored, self._observe = data.training_images(splits, pixels)
        self._vae = vae.to(device)
        self._images = stored.to(device)
        self._batches = _batches(self._images, options.batch_size)
        decoder: Any = vae.likelihood
        self.features_per_pixel = decoder.family.num_features // math.prod(splits.event_shape)

    def steps(self, *, captured: bool) -> Steps:
        """Steps from the first weights, by a copy of them."""
        return _ppl_vae_steps(deepcopy(self._vae), self._images, self._observe, self._batches, captured=captured)


# --- Pyro's example ---


def pyro_example(task: Task) -> Steps:
    """The training loop of Pyro's examples/vae: SVI, Trace_ELBO, pyro.optim.Adam, a DataLoader, validation as it comes.

    Model and guide are the example's; the networks have the sizes of the task, and one output layer for both moments.
    """
    pyro.clear_param_store()
    # In torch's own memory layout: of weights in another, pyro.module trains a copy that the network never sees.
    encoder, decoder = task.plain_networks()
    flow = task.prior() if task.model.couplings else None
    for parameter in [*encoder.parameters(), *decoder.parameters()]:
        parameter.data = parameter.data.contiguous()

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        if flow is not None:
            pyro.module("prior", flow)
        with pyro.plate("data", x.shape[0]):
            z_loc = x.new_zeros(torch.Size((x.shape[0], task.model.latent_dim)))
            z_scale = x.new_ones(torch.Size((x.shape[0], task.model.latent_dim)))
            z = pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1) if flow is None else flow())
            rate = torch.sigmoid(decoder(z))
            pyro.sample("obs", dist.Bernoulli(rate, validate_args=False).to_event(1), obs=x.reshape(-1, _PIXELS))

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", x.shape[0]):
            z_loc, log_scale = encoder(x).chunk(2, dim=-1)
            pyro.sample("latent", dist.Normal(z_loc, log_scale.exp()).to_event(1))

    svi = SVI(model, guide, pyro.optim.Adam({"lr": LEARNING_RATE}), loss=Trace_ELBO())
    images = task.images.cpu().float()
    dataset = TensorDataset(images, torch.zeros(len(images), dtype=torch.long))  # with labels, as the example's
    loader = DataLoader(dataset, batch_size=task.model.batch_size, shuffle=True, drop_last=True)

    def passes() -> Iterator[Tensor]:
        while True:
            for x, _ in loader:
                yield x.to(task.device)

    batches = passes()

    def steps(n: int) -> float:
        return sum(svi.step(x) for x in islice(batches, n)) / (n * task.model.batch_size)

    return steps


# --- NumPyro ---


def numpyro_steps(task: Task, *, as_loop: bool) -> Steps:
    """NumPyro's SVI, data resident, float32: n updates as one compiled ``fori_loop``, or each as one compiled call."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as numpyro_dist
    from numpyro.infer import SVI as NumPyroSVI
    from numpyro.infer import Trace_ELBO as NumPyroELBO

    L, B = task.model.latent_dim, task.model.batch_size
    encoder, decoder = (_in_jax(net) for net in task.plain_networks())

    def model(x: Any) -> None:
        decode = numpyro.module("decoder", decoder, (B, L))
        with numpyro.plate("images", B):
            z = numpyro.sample("z", numpyro_dist.Normal(jnp.zeros((B, L)), 1.0).to_event(1))
            numpyro.sample("x", numpyro_dist.Bernoulli(logits=decode(z)).to_event(1), obs=x)

    def guide(x: Any) -> None:
        encode = numpyro.module("encoder", encoder, (B, _PIXELS))
        with numpyro.plate("images", B):
            loc, log_scale = jnp.split(encode(x), 2, axis=-1)
            numpyro.sample("z", numpyro_dist.Normal(loc, jnp.exp(log_scale)).to_event(1))

    svi = NumPyroSVI(model, guide, numpyro.optim.Adam(LEARNING_RATE), NumPyroELBO())
    images = jnp.asarray(task.images.flatten(1).cpu().numpy())
    batches = jnp.asarray(torch.stack(task.batches).cpu().numpy())
    state = svi.init(jax.random.PRNGKey(0), images[batches[0]].astype(jnp.float32))

    def step(state: Any, total: Any, index: Any, images: Any) -> Any:
        state, loss = svi.update(state, images[index].astype(jnp.float32))
        return state, total + loss

    def loop(state: Any, total: Any, first: Any, n: Any, images: Any, batches: Any) -> Any:
        def body(i: Any, carry: Any) -> Any:
            state, total = carry
            return step(state, total, batches[(first + i) % len(batches)], images)

        return jax.lax.fori_loop(0, n, body, (state, total))

    one, several = jax.jit(step, donate_argnums=(0, 1)), jax.jit(loop, donate_argnums=(0, 1))
    each, taken = list(batches), 0

    def steps(n: int) -> float:
        nonlocal state, taken
        total = jnp.float32(0)
        if as_loop:
            state, total = several(state, total, taken % len(each), n, images, batches)
        else:
            for i in range(taken, taken + n):
                state, total = one(state, total, each[i % len(each)], images)
        taken += n
        jax.block_until_ready((state, total))
        return float(total) / (n * B)

    return steps


# --- JAX ---


def jax_steps(task: Task) -> Steps:
    """Written by hand in JAX, float32, data resident: the ELBO, optax's Adam, and n steps as one compiled scan."""
    import jax
    import jax.numpy as jnp
    import optax

    L, B = task.model.latent_dim, task.model.batch_size
    (start_encoder, encode), (start_decoder, decode) = (_in_jax(net) for net in task.plain_networks())
    key = jax.random.PRNGKey(0)
    weights = start_encoder(key, (B, _PIXELS))[1], start_decoder(key, (B, L))[1]
    adam = optax.adam(LEARNING_RATE)
    images = jnp.asarray(task.images.flatten(1).cpu().numpy())
    batches = jnp.asarray(torch.stack(task.batches).cpu().numpy())

    def negative_elbo(weights: Any, x: Any, key: Any) -> Any:
        loc, log_scale = jnp.split(encode(weights[0], x), 2, axis=-1)
        z = loc + jnp.exp(log_scale) * jax.random.normal(key, loc.shape)
        logits = decode(weights[1], z)
        reconstruction = (x * logits - jax.nn.softplus(logits)).sum()
        log_p_over_q = (log_scale + ((z - loc) / jnp.exp(log_scale)) ** 2 / 2 - z**2 / 2).sum()
        return -(reconstruction + log_p_over_q)

    def step(carry: Any, index: Any) -> Any:
        weights, moments, key = carry
        key, own = jax.random.split(key)
        loss, slopes = jax.value_and_grad(negative_elbo)(weights, images[index].astype(jnp.float32), own)
        change, moments = adam.update(slopes, moments)
        return (optax.apply_updates(weights, change), moments, key), loss

    several = jax.jit(lambda carry, indices: jax.lax.scan(step, carry, indices), donate_argnums=0)
    carry, taken = (weights, adam.init(weights), key), 0

    def steps(n: int) -> float:
        nonlocal carry, taken
        carry, losses = several(carry, batches[(taken + jnp.arange(n)) % len(batches)])
        taken += n
        jax.block_until_ready(carry)
        return float(losses.sum()) / (n * B)

    return steps


def _in_jax(net: nn.Module) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(init, apply), as ``numpyro.module`` takes them, of a plain network: its layers, and its weights as the first."""
    import jax
    import jax.numpy as jnp

    activations = {nn.ReLU: jax.nn.relu, nn.Tanh: jnp.tanh, nn.SiLU: jax.nn.silu}

    def array(tensor: Tensor) -> Any:
        return jnp.asarray(tensor.detach().cpu().contiguous().numpy())

    def convolution(layer: Any) -> tuple[Any, Callable[..., Any]]:
        """Channels are innermost, which XLA has the faster code for on CPUs."""
        k, p, stride = layer.kernel_size[0], layer.padding[0], layer.stride
        if isinstance(layer, nn.ConvTranspose2d):
            kernel = layer.weight.flip(2, 3).permute(2, 3, 0, 1)
            padding = [(k - 1 - p, k - 1 - p + extra) for extra in layer.output_padding]
            how = {"window_strides": (1, 1), "padding": padding, "lhs_dilation": stride}
        else:
            kernel = layer.weight.permute(2, 3, 1, 0)
            how = {"window_strides": stride, "padding": [(p, p), (p, p)]}
        bias = [] if layer.bias is None else [array(layer.bias)]

        def apply(w: Any, h: Any) -> Any:
            h = jax.lax.conv_general_dilated(h, w[0], dimension_numbers=("NHWC", "HWIO", "NHWC"), **how)
            return h + w[1] if bias else h

        return [array(kernel), *bias], apply

    def in_jax(part: Any) -> tuple[Any, Callable[..., Any]]:
        """(weights, (weights, h) -> h) of a layer, or of a function of h."""
        if isinstance(part, nn.Linear):
            return [array(part.weight.T), array(part.bias)], lambda w, h: h @ w[0] + w[1]
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            return convolution(part)
        if isinstance(part, nn.Parameter):
            return [array(part)], lambda w, h: h + w[0]
        function = activations.get(type(part), part)
        return [], lambda w, h: function(h)

    parts: list[Any]
    if isinstance(net, networks.ConvEncoder):
        parts = [lambda h: h.reshape(-1, 28, 28, 1), *net.stages]
        parts += [lambda h: h.transpose(0, 3, 1, 2).reshape(len(h), -1), *net.dense.layers, net.dense.output]
    elif isinstance(net, networks.ConvDecoder):
        small = net.small
        parts = [*net.dense.layers, net.dense.output]
        parts += [lambda h: h.reshape(-1, *small).transpose(0, 2, 3, 1), *net.stages]
        parts += [net.output.up, lambda h: h.reshape(len(h), -1), net.output.bias]
    else:
        parts = [layer for layer in net.children() if not isinstance(layer, nn.Flatten)]
    weights, functions = zip(*map(in_jax, parts), strict=True)

    def apply(weights: Any, h: Any) -> Any:
        for w, function in zip(weights, functions, strict=True):
            h = function(w, h)
        return h

    return lambda key, shape: (None, list(weights)), apply


# --- The floor ---


def matrix_products(task: Task) -> Callable[[int], None]:
    """n times what no step can do without: the products of dense layers and the convolutions, on resident numbers.

    For each layer its output, the gradient of its weights and that of its input, which the encoder's first layer does
    not need. Dense layers are bare ``torch.mm`` into memory that is there; convolutions allocate what they return.
    """
    encoder, decoder = task.plain_networks()
    prior = task.prior()
    products: list[Callable[[], Any]] = []
    hooks = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        products.extend(_products(layer, inputs[0].detach().clone(), output.detach(), is_first=not products))

    for layer in [*encoder.modules(), *decoder.modules(), *prior.modules()]:
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            hooks.append(layer.register_forward_hook(note))
    with torch.no_grad():
        h = encoder(task.images[task.batches[0]].float())
        z = h[:, : task.model.latent_dim]
        decoder(z)
        prior().log_prob(z)
    for hook in hooks:
        hook.remove()

    @torch.no_grad()
    def steps(n: int) -> None:
        for _ in range(n):
            for product in products:
                product()
        if task.device.type == "cuda":
            torch.cuda.synchronize(task.device)

    return steps


def _products(layer: Any, h: Tensor, output: Tensor, *, is_first: bool) -> Iterator[Callable[[], Any]]:
    """The forward product of a layer on h, and those of its backward pass."""
    weight = layer.weight.detach()
    gradient = torch.randn_like(output)
    if isinstance(layer, nn.Linear):
        out, of_weight, of_input = torch.empty_like(output), torch.empty_like(weight), torch.empty_like(h)
        yield lambda: torch.mm(h, weight.T, out=out)
        yield lambda: torch.mm(gradient.T, h, out=of_weight)
        if not is_first:
            yield lambda: torch.mm(gradient, weight, out=of_input)
        return
    transposed = isinstance(layer, nn.ConvTranspose2d)
    how = (layer.stride, layer.padding, layer.dilation, transposed, layer.output_padding, layer.groups)
    yield lambda: torch.ops.aten.convolution(h, weight, None, *how)
    wanted = [not is_first, True, False]
    yield lambda: torch.ops.aten.convolution_backward(gradient, h, weight, None, *how, wanted)
