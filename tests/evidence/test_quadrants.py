"""The script that predicts quadrants: which pixels it hides, and log p(x_hidden | x_observed) against quadrature."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from oracles import bernoulli_vae

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import compare_quadrants

    yield compare_quadrants
    sys.modules.pop("compare_quadrants", None)


@pytest.mark.parametrize(("given", "rows"), [(1, ["..", "o."]), (2, ["o.", "o."]), (3, ["oo", "o."])])
def test_the_quadrants_that_are_seen_are_those_of_pyros_tutorial(script, given, rows):
    seen = script.hide_quadrants(torch.zeros(3, 1, 4, 4), given)
    expected = torch.tensor([[letter == "o" for letter in row] for row in rows])
    assert torch.equal(~seen.isnan(), expected.repeat_interleave(2, 0).repeat_interleave(2, 1).expand(3, 1, 4, 4))


def test_hidden_pixels_have_their_log_probability_by_quadrature(script):
    vae = bernoulli_vae(latent_dim=1)
    torch.manual_seed(1)
    x = torch.bernoulli(torch.full((4, 12), 0.5)).double()
    seen = x.clone()
    seen[:, :5] = torch.nan
    nodes = torch.linspace(-9, 9, 2001, dtype=torch.double)[:, None]
    with torch.no_grad():
        rate = vae.likelihood.net(nodes).sigmoid()
    log_pixels = x[:, None] * rate.log() + (1 - x[:, None]) * (1 - rate).log()
    log_prior = -nodes[:, 0].square() / 2
    log_p_x, log_p_seen = ((part.sum(-1) + log_prior).logsumexp(1) for part in (log_pixels, log_pixels[..., 5:]))
    found, change = script.predict(vae, x, seen, 40_000)
    assert torch.allclose(found, log_p_x - log_p_seen, rtol=0, atol=0.03)
    assert change.abs().max() < 0.1
