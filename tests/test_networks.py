"""Networks: any event shape, any leading dimensions."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from ppl_vae import build
from ppl_vae.networks import MLP, GatedMLP

NETWORKS = {"mlp": MLP, "gated": GatedMLP}


def test_every_network_of_the_command_line_is_in_the_list():
    assert NETWORKS == build.NETWORKS


@pytest.fixture(params=NETWORKS)
def network(request):
    torch.manual_seed(0)
    return NETWORKS[request.param]


@pytest.mark.parametrize("event_shape", [(5,), (1, 4, 3), (3, 2, 2), (2, 3)])
@pytest.mark.parametrize("leading", [(), (4,), (3, 4), (2, 3, 4)])
def test_leading_dimensions_pass_through_and_equal_a_loop(network, event_shape, leading):
    net = network(event_shape, 7, hidden=(6, 5)).double()
    x = torch.randn(*leading, *event_shape, dtype=torch.double)
    h = net(x)
    assert h.shape == (*leading, 7)
    loop = torch.stack([net(one) for one in x.reshape(-1, *event_shape)]).reshape(*leading, 7)
    assert_close(h, loop, rtol=1e-12, atol=1e-12)


def test_a_number_stands_for_a_vector(network):
    assert network(5, 2, hidden=(3,))(torch.randn(4, 5)).shape == (4, 2)


def test_no_hidden_layers_are_an_affine_map(network):
    net = network((2, 3), 4, hidden=()).double()
    x = torch.randn(5, 2, 3, dtype=torch.double)
    assert_close(net(x), x.reshape(5, 6) @ net.output.weight.T + net.output.bias)


@pytest.mark.parametrize("shape", [(5,), (4, 6), (6, 1), (4, 2, 1), (3, 2)])
def test_an_input_of_another_event_shape_is_refused(network, shape):
    with pytest.raises(ValueError, match=r"network input: expected shape \(\.\.\., 2, 3\), got"):
        network((2, 3), 4, hidden=(3,))(torch.zeros(shape))


def test_every_parameter_has_a_gradient(network):
    net = network((2, 3), 4, hidden=(6, 5))
    net(torch.randn(8, 2, 3)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in net.parameters())


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
