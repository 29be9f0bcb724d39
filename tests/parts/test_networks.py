"""Networks: any event shape, any leading dimensions."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from ppl_vae.parts.convolutions import PixelOutput, ResidualBlock
from ppl_vae.parts.networks import MLP, ConvDecoder, ConvEncoder, GatedMLP, Standardized, start_wide
from ppl_vae.parts.registry import NETWORKS

SIZES = {"channels": (3, 4), "hidden": (6, 5)}
DENSE = {"mlp": MLP, "tanh": partial(MLP, activation=torch.nn.Tanh), "gated": GatedMLP}
CONVOLUTIONAL = ["conv", "gated-conv", "residual", "gated-residual"]


def test_every_network_of_the_command_line_is_in_the_lists():
    assert [*DENSE, *CONVOLUTIONAL] == list(NETWORKS)


@pytest.fixture(params=NETWORKS)
def word(request):
    torch.manual_seed(0)
    return request.param


@pytest.fixture(params=DENSE)
def network(request):
    torch.manual_seed(0)
    return DENSE[request.param]


def encoder(word, event_shape, num_features):
    return NETWORKS[word].load().encoder(event_shape, num_features, **SIZES)


def decoder(word, latent_dim, event_shape, num_features):
    return NETWORKS[word].load().decoder(latent_dim, event_shape, num_features, **SIZES)


def equals_a_loop(net, event_shape, leading):
    x = torch.randn(*leading, *event_shape, dtype=torch.double)
    h = net(x)
    loop = torch.stack([net(one) for one in x.reshape(-1, *event_shape)]).reshape(*leading, h.shape[-1])
    assert_close(h, loop, rtol=1e-10, atol=1e-12)
    return h


# --- Every network ---


@pytest.mark.parametrize("event_shape", [(1, 4, 3), (3, 2, 2), (1, 7, 9)])
@pytest.mark.parametrize("leading", [(), (4,), (3, 4), (2, 3, 4)])
def test_leading_dimensions_pass_through_and_equal_a_loop(word, event_shape, leading):
    net = encoder(word, event_shape, 7).double()
    assert equals_a_loop(net, event_shape, leading).shape == (*leading, 7)
    num_features = math.prod(event_shape)
    net = decoder(word, 2, event_shape, num_features).double()
    assert equals_a_loop(net, (2,), leading).shape == (*leading, num_features)


def test_every_parameter_has_a_gradient(word):
    for net, shape in ((encoder(word, (2, 6, 5), 4), (2, 6, 5)), (decoder(word, 3, (2, 6, 5), 60), (3,))):
        net(torch.randn(32, *shape)).square().sum().backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in net.parameters())


@pytest.mark.parametrize("shape", [(6,), (4, 6), (6, 5, 2), (4, 2, 6, 1), (3, 6, 5)])
def test_an_image_of_another_shape_is_refused(word, shape):
    with pytest.raises(ValueError, match=r"network input: expected shape \(\.\.\., 2, 6, 5\), got"):
        encoder(word, (2, 6, 5), 4)(torch.zeros(shape))


# --- Dense networks ---


def test_an_mlp_is_its_equation():
    net = MLP(3, 2, hidden=(4,), activation=torch.nn.Tanh).double()
    x = torch.randn(5, 3, dtype=torch.double)
    first = net.layers[0]
    expected = torch.tanh(x @ first.weight.T + first.bias) @ net.output.weight.T + net.output.bias
    assert_close(net(x), expected)


def test_a_gated_layer_is_its_equation():
    net = GatedMLP(3, 2, hidden=(4,)).double()
    x = torch.randn(5, 3, dtype=torch.double)
    first = net.layers[0]
    a, gate = (x @ first.weight.T + first.bias).split(4, dim=-1)
    assert_close(net(x), (a / (1 + torch.exp(-gate))) @ net.output.weight.T + net.output.bias)


def test_dropout_leaves_out_hidden_units_in_training_alone():
    torch.manual_seed(0)
    net, plain = GatedMLP(3, 2, hidden=(50,), dropout=0.3), GatedMLP(3, 2, hidden=(50,))
    plain.load_state_dict(net.state_dict())  # the same names
    x = torch.randn(1000, 3)
    assert_close(net.eval()(x), plain(x))
    hidden = plain.layers(x)
    torch.manual_seed(1)
    dropped = net.train().layers(x)
    left_out = dropped == 0
    assert_close(left_out.float().mean().item(), 0.3, atol=0.01, rtol=0)
    assert_close(dropped, torch.where(left_out, 0.0, hidden / 0.7))


def test_a_dropout_of_every_unit_is_refused():
    with pytest.raises(ValueError, match=r"dropout: expected a number, 0 or more and below 1, got 1\.0"):
        MLP(3, 2, hidden=(4,), dropout=1.0)


@pytest.mark.parametrize("word", NETWORKS)
def test_dropout_changes_every_decoder_in_training_alone(word):
    pair = NETWORKS[word].load()
    how = {"channels": (4, 6), "hidden": (20,)}
    net, plain = (pair.decoder(2, (1, 8, 8), 64, **how, dropout=dropout) for dropout in (0.5, 0.0))
    plain.load_state_dict(net.state_dict())
    z = torch.randn(3, 2)
    assert_close(net.eval()(z), plain(z))
    assert not torch.allclose(net.train()(z), plain(z))


# --- Convolutions, against dense networks of the same function ---


def windows(height, width, small):
    """(pixel y, pixel x, kernel row, kernel column) for each place in a stage of half the size, by its definition."""
    for i, j, u, v in itertools.product(range(small[0]), range(small[1]), range(5), range(5)):
        y, x = 2 * i + u - 2, 2 * j + v - 2
        if 0 <= y < height and 0 <= x < width:
            yield i, j, y, x, u, v


def halving_matrix(weight, height, width):
    """The matrix of a 5x5 convolution of stride 2 and padding 2: rows are outputs, columns inputs, both flattened."""
    planes_out, planes_in = weight.shape[:2]
    small = (-(-height // 2), -(-width // 2))
    matrix = torch.zeros(planes_out, *small, planes_in, height, width, dtype=weight.dtype)
    for i, j, y, x, u, v in windows(height, width, small):
        matrix[:, i, j, :, y, x] = weight[:, :, u, v]
    return matrix.reshape(planes_out * small[0] * small[1], -1)


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 6, 6), (1, 7, 4), (3, 5, 8), (2, 7, 3), (5, 4, 3)])
@torch.no_grad()
def test_a_convolutional_encoder_is_an_mlp_whose_matrix_repeats_its_weights(channels, height, width):
    torch.manual_seed(0)
    conv = ConvEncoder((channels, height, width), 4, channels=(3,), hidden=()).double()
    first = conv.stages[0]
    small = -(-height // 2) * -(-width // 2)
    mlp = MLP((channels, height, width), 4, hidden=(3 * small,), activation=torch.nn.SiLU).double()
    mlp.layers[0].weight.copy_(halving_matrix(first.weight, height, width))
    mlp.layers[0].bias.copy_(first.bias.repeat_interleave(small))
    mlp.output.load_state_dict(conv.output.state_dict())
    x = torch.randn(5, channels, height, width, dtype=torch.double)
    assert_close(conv(x), mlp(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 6, 6), (1, 7, 4), (3, 5, 8), (2, 7, 3), (5, 4, 3)])
@torch.no_grad()
def test_a_convolutional_decoder_is_an_mlp_whose_matrix_repeats_its_weights(channels, height, width):
    torch.manual_seed(0)
    num_features = channels * height * width
    conv = ConvDecoder(2, (channels, height, width), num_features, channels=(3,), hidden=()).double()
    small = -(-height // 2) * -(-width // 2)
    mlp = MLP(2, num_features, hidden=(3 * small,), activation=torch.nn.SiLU).double()
    mlp.layers[0].load_state_dict(conv.dense.output.state_dict())
    mlp.output.weight.copy_(halving_matrix(conv.output.up.weight, height, width).T)
    conv.output.bias.normal_()
    mlp.output.bias.copy_(conv.output.bias)
    z = torch.randn(5, 2, dtype=torch.double)
    assert_close(conv(z), mlp(z), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("word", ["conv", "gated-conv"])
def test_a_convolutional_pair_takes_no_images(word):
    pair = NETWORKS[word].load()
    how = {"channels": (4, 6), "hidden": (20,)}
    assert pair.encoder((1, 8, 8), 3, **how)(torch.zeros(0, 1, 8, 8)).shape == (0, 3)
    assert pair.decoder(2, (1, 8, 8), 64, **how)(torch.zeros(0, 2)).shape == (0, 64)


@torch.no_grad()
def test_two_stages_with_residual_blocks_are_the_composition_of_their_parts():
    torch.manual_seed(0)
    conv = ConvEncoder((1, 6, 5), 4, channels=(2, 3), hidden=(), num_blocks=1).double()
    x = torch.randn(5, 1, 6, 5, dtype=torch.double)
    h, size = x, (6, 5)
    for stage, block in ((conv.stages[0], conv.stages[2]), (conv.stages[3], conv.stages[5])):
        small = (-(-size[0] // 2), -(-size[1] // 2))
        flat = h.reshape(5, -1) @ halving_matrix(stage.weight, *size).T
        h = torch.nn.functional.silu(flat.reshape(5, -1, *small) + stage.bias[:, None, None])
        h, size = h + block.branch(h), small
    assert_close(conv(x), h.reshape(5, -1) @ conv.output.weight.T + conv.output.bias, rtol=1e-10, atol=1e-12)


def test_a_gated_residual_block_is_its_equation():
    torch.manual_seed(0)
    block = ResidualBlock(3, gated=True).double()
    x = torch.randn(2, 3, 4, 5, dtype=torch.double)
    u, v = block.branch(x).split(3, dim=1)
    assert_close(block(x), x + u / (1 + torch.exp(-v)))


def test_a_stage_moves_with_the_image():
    """Shifting the input by two pixels shifts the stage's output by one: the weights are the same everywhere."""
    torch.manual_seed(0)
    stage = ConvEncoder((1, 16, 16), 4, channels=(3,), hidden=()).double().stages
    x = torch.zeros(1, 1, 16, 16, dtype=torch.double)
    x[..., 4:8, 4:8] = torch.randn(4, 4, dtype=torch.double)
    assert_close(stage(x.roll((2, 2), (-2, -1))), stage(x).roll((1, 1), (-2, -1)))


def test_planes_come_before_pixels():
    """Two features per pixel: the first half of the output is the first feature of all pixels, in the image's order."""
    output = PixelOutput(2, 2, size=(4, 3)).double()
    with torch.no_grad():
        output.up.weight.zero_()
        output.up.weight[:, 1].fill_(1)
    h = output(torch.ones(1, 2, 2, 2, dtype=torch.double)).detach()
    assert float(h[:, :12].abs().max()) == 0
    assert float(h[:, 12:].min()) > 0


@pytest.mark.parametrize("word", CONVOLUTIONAL)
@pytest.mark.parametrize("event_shape", [(12,), (3, 4), (1, 1, 3, 4)])
def test_a_convolution_of_what_is_no_image_is_refused(word, event_shape):
    with pytest.raises(ValueError, match=r"event_shape: expected images \(C, H, W\) for a convolutional network"):
        encoder(word, event_shape, 4)


# --- Units ---


def test_a_standardized_network_sees_pixels_without_their_unit():
    torch.manual_seed(0)
    x = torch.randn(200, 2, 3, dtype=torch.double)
    seen: list[torch.Tensor] = []

    class Look(torch.nn.Module):
        def forward(self, x):
            seen.append(x)
            return x

    for unit, offset in ((1.0, 0.0), (1000.0, 77.0)):
        net = Standardized(Look(), (2, 3)).double()
        net.fit_marginals(unit * x + offset)
        net(unit * x + offset)
    assert_close(seen[0], seen[1], rtol=1e-6, atol=1e-6)
    assert_close(seen[0].mean(0), torch.zeros(2, 3, dtype=torch.double), rtol=0, atol=1e-6)
    assert float(seen[0].square().mean()) == pytest.approx(1, rel=1e-6)


# --- Where training starts ---


def wide(net):
    torch.manual_seed(0)
    start_wide(net)
    return net


@torch.no_grad()
def test_a_wide_start_keeps_the_size_of_signals_in_a_linear_network():
    """Mean squares of a layer's output and input are alike: within 4.5 standard errors of 2 / width."""
    net, x = wide(MLP(1000, 3, hidden=(1000, 1000), activation=torch.nn.Identity)), torch.randn(20, 1000)
    for linear in (net.layers[0], net.layers[2]):
        y = linear(x)
        ratio = y.square().sum(-1) / x.square().sum(-1)
        assert ((ratio - 1).abs() < 4.5 * math.sqrt(2 / 1000)).all()
        x = y
