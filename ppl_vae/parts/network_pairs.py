"""An encoder and the decoder that goes with it: what a word of ``--network`` names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from ppl_vae.parts import networks


class NetworkPair(NamedTuple):
    """An encoder, its decoder, and the network between further layers of latents.

    Args:
        encoder: (event_shape, num_features, *, channels, hidden) -> network, images to features.
        decoder: (latent_dim, event_shape, num_features, *, channels, hidden) -> network, latents to features; hidden
            in the encoder's order.
        dense: (num_inputs, num_features, *, hidden) -> network, vectors to features.
    """

    encoder: Callable[..., nn.Module]
    decoder: Callable[..., nn.Module]
    dense: Callable[..., nn.Module]


def _pair_dense(network: Callable[..., nn.Module]) -> NetworkPair:
    """The same dense network both ways; it sees neither channels nor positions."""

    def encoder(event_shape: Any, num_features: int, *, channels: Any, hidden: Sequence[int]) -> nn.Module:
        return network(event_shape, num_features, hidden=hidden)

    def decoder(latent_dim: int, event_shape: Any, num_features: int, *, channels: Any, hidden: Any) -> nn.Module:
        return network(latent_dim, num_features, hidden=hidden[::-1])

    return NetworkPair(encoder, decoder, network)


def _pair_convolutional(*, gated: bool, num_blocks: int) -> NetworkPair:
    """Convolutions to the features, and transposed convolutions back to the pixels."""
    sizes: dict[str, Any] = {"gated": gated, "num_blocks": num_blocks}

    def decoder(latent_dim: int, event_shape: Any, num_features: int, *, channels: Any, hidden: Any) -> nn.Module:
        return networks.ConvDecoder(
            latent_dim, event_shape, num_features, channels=channels, hidden=hidden[::-1], **sizes
        )

    encoder = partial(networks.ConvEncoder, **sizes)
    return NetworkPair(encoder, decoder, networks.GatedMLP if gated else networks.MLP)


MLP = _pair_dense(networks.MLP)
TANH = _pair_dense(partial(networks.MLP, activation=nn.Tanh))
GATED = _pair_dense(networks.GatedMLP)
CONV = _pair_convolutional(gated=False, num_blocks=0)
GATED_CONV = _pair_convolutional(gated=True, num_blocks=0)
RESIDUAL = _pair_convolutional(gated=False, num_blocks=1)
GATED_RESIDUAL = _pair_convolutional(gated=True, num_blocks=1)
