"""Programs of one's own as latent models: densities against closed forms, and everything that takes a VAE's parts."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from labelled_model import exact_vae, labelled_images, log_p_x_given_y
from test_enumeration import ExactExpectation, ExactSum
from test_pyro_program import Labeled, TwoSites, images, records
from torch import nn
from torch.distributions import MultivariateNormal
from torch.testing import assert_close

from ppl_vae import VAE, Records, diagnostics, importance
from ppl_vae.diagnostics.measurement import measure
from ppl_vae.evidence import ais
from ppl_vae.evidence.guide_calibration import compute_ranks, judge
from ppl_vae.evidence.moments import decode_mean, encode
from ppl_vae.evidence.proposals import PerImageGuide, Proposal, replace_guide
from ppl_vae.evidence.refinement import measure_gaps, refine_proposal
from ppl_vae.evidence.typicality import mix_prior_into_guide
from ppl_vae.labels import SemiSupervisedVAE
from ppl_vae.latent_model import vectorize_latents
from ppl_vae.parts.posteriors import DiagonalNormal, FullNormal


class Waiting(nn.Module):
    """r ~ Gamma(a, b), x_d ~ Exponential(r), with its exact guide Gamma(a + D, b + sum_d x_d): r is above 0."""

    a, b, D = 2.0, 1.5, 4

    def model(self, x):
        with pyro.plate("images", len(x), dim=-1):
            r = pyro.sample("r", dist.Gamma(torch.tensor(self.a).double(), self.b))
            pyro.sample("x", dist.Exponential(r[..., None].expand(*r.shape, self.D)).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("images", len(x), dim=-1):
            pyro.sample("r", dist.Gamma(self.a + self.D, self.b + x.sum(-1)))

    def log_evidence(self, x):
        a, b = torch.tensor(self.a).double(), torch.tensor(self.b).double()
        return a * b.log() + (a + self.D).lgamma() - a.lgamma() - (a + self.D) * (b + x.sum(-1)).log()

    def draw(self, N):
        return torch.rand(N, self.D, generator=torch.Generator().manual_seed(0)).double() + 0.1


def program_and_images(make):
    program = make()
    return program, images(6) if make is TwoSites else program.draw(6)


PROGRAMS = [TwoSites, ExactSum, ExactExpectation, Waiting]


# --- Densities ---


@pytest.mark.parametrize("make", PROGRAMS)
def test_with_an_exact_guide_the_parts_give_the_evidence_at_every_z(make):
    program, x = program_and_images(make)
    model = vectorize_latents(program, x)
    z = model.posterior(x).sample((5,))
    log_w = model.prior().log_prob(z) + model.likelihood(z).log_prob(x) - model.posterior(x).log_prob(z)
    assert_close(log_w, program.log_evidence(x).expand(5, 6), rtol=0, atol=1e-9)


def test_the_density_of_a_site_above_zero_has_its_jacobian():
    program = Waiting()
    model = vectorize_latents(program, program.draw(2))
    u = torch.linspace(-30, 8, 20_001, dtype=torch.double)[:, None]  # log r
    total = torch.trapezoid(model.prior().log_prob(u).exp(), u[:, 0])
    assert_close(total, torch.ones(()).double(), rtol=0, atol=1e-6)
    z = model.prior().sample((100_000,))
    assert abs(z.exp().mean() - program.a / program.b) < 0.02  # of r


class Switch(nn.Module):
    """y ~ (0.7, 0.3), z ~ N(m_y, 1), x ~ N(c_y z, 1) in two pixels: what z says about y decides E[x | z]."""

    m, c = torch.tensor([0.0, 2.0]).double(), torch.tensor([[1.0, 3.0], [-1.0, 0.5]]).double()
    probs = torch.tensor([0.7, 0.3]).double()

    def model(self, x):
        with pyro.plate("images", len(x), dim=-1):
            y = pyro.sample("y", dist.Categorical(self.probs), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(self.m[y], 1.0))
            pyro.sample("x", dist.Normal(self.c[y] * z[..., None], 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("images", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.sum(-1), 1.0))

    def mean(self, z):
        log_joint = self.probs.log() + dist.Normal(self.m, 1.0).log_prob(z)
        return torch.einsum("ny,yd->nd", log_joint.softmax(-1), self.c) * z


def test_the_mean_and_the_draws_of_images_weigh_a_discrete_site_by_what_z_says():
    program = Switch()
    model, z = vectorize_latents(program, torch.zeros(2, 2).double()), torch.tensor([[-1.0], [1.2], [3.0]]).double()
    assert_close(decode_mean(model, z), program.mean(z), rtol=0, atol=1e-12)
    pyro.set_rng_seed(0)
    draws = model.likelihood(z.expand(20_000, 3, 1)).sample()
    stderr = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - program.mean(z)).abs() < 4 * stderr).all()


class OneSite(nn.Module):
    """z ~ p(z), x_d ~ N(z, 1), z ~ q(z) for every image."""

    def __init__(self, p, q):
        super().__init__()
        self.p, self.q = p, q

    def model(self, x):
        with pyro.plate("images", len(x), dim=-1):
            z = pyro.sample("z", self.p)
            mean = z if self.p.event_shape else z[..., None]
            pyro.sample("x", dist.Normal(mean + torch.zeros_like(x), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("images", len(x), dim=-1):
            pyro.sample("z", self.q)


zero, one = torch.zeros(()).double(), torch.ones(()).double()


def test_a_mixture_may_be_the_prior():
    probs, means = torch.tensor([0.3, 0.7]).double(), torch.tensor([-1.0, 2.0]).double()
    program = OneSite(dist.MixtureSameFamily(dist.Categorical(probs), dist.Normal(means, 1.0)), dist.Normal(zero, 2.0))
    z = torch.linspace(-3, 3, 7)[:, None].double()
    expected = (probs.log() + dist.Normal(means, 1.0).log_prob(z)).logsumexp(-1)
    assert_close(vectorize_latents(program, images(2)).prior().log_prob(z), expected, rtol=0, atol=1e-12)


class GivenCenter(nn.Module):
    """z ~ N(c, 1), x_d ~ N(z, 1), with the exact guide, given a center c of each image."""

    def model(self, x, c):
        with pyro.plate("images", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(c, 1.0))
            pyro.sample("x", dist.Normal(z[..., None] + torch.zeros_like(x), 1.0).to_event(1), obs=x)

    def guide(self, x, c):
        with pyro.plate("images", len(x), dim=-1):
            pyro.sample("z", dist.Normal((c + x.sum(-1)) / (1 + x.shape[1]), (1 + x.shape[1]) ** -0.5))

    def log_evidence(self, x, c):
        D = x.shape[1]
        covariance = torch.ones(D, D).double() + torch.eye(D).double()
        return MultivariateNormal(c[:, None].expand(-1, D), covariance).log_prob(x)


@pytest.mark.parametrize("first", [slice(0, 4), slice(0, 1), torch.zeros(2, dtype=torch.long)])
def test_a_prior_given_an_argument_is_that_of_each_row_whatever_rows_the_model_was_made_with(first):
    program, x, c = GivenCenter(), images(4), torch.arange(4.0).double()
    model = vectorize_latents(program, Records(x, c)[first])
    z = model.posterior(x, c).sample((3,))
    log_w = model.prior(c).log_prob(z) + model.likelihood(z, c).log_prob(x) - model.posterior(x, c).log_prob(z)
    assert_close(log_w, program.log_evidence(x, c).expand(3, 4), rtol=0, atol=1e-12)
    assert model.prior(c).batch_shape == (4,)
    assert model.prior(c[[2, 2]]).batch_shape == ()  # one p(z) for these rows
    assert abs(model.prior(c[[2, 2]]).sample((2000,)).mean() - 2) < 0.1


def test_a_posterior_repeated_for_more_rows_is_drawn_for_each():
    model = vectorize_latents(TwoSites(), images(2))
    assert len(model.posterior(images(1)).expand((5,)).sample().unique(dim=0)) == 5


# --- What takes a VAE's parts ---


@pytest.mark.parametrize("make", [TwoSites, ExactSum, Waiting])
@pytest.mark.parametrize("start", ["guide", "normal", "prior"])
def test_annealing_bounds_the_evidence_from_below(make, start):
    program, x = program_and_images(make)
    model = vectorize_latents(program, x)
    torch.manual_seed(0)
    chains = {"num_leapfrogs": 3, "num_chains": 20, "start": start}
    annealing = ais.pilot(model, x, betas=ais.temperatures(15), **chains)
    log_w = ais.lower(model, x, annealing, num_chains=60).log_w
    exact = program.log_evidence(x)
    if start == "guide":  # it is exact
        assert_close(log_w, exact.expand(60, 6), rtol=0, atol=1e-9)
    error = log_w.exp().std(0) / log_w.exp().mean(0) / math.sqrt(60)
    assert ((ais.lower_bound(log_w) - exact).abs() < 5 * error + 1e-9).all()


def test_bounds_of_simulated_images_with_an_argument_each_enclose_their_evidence():
    program, data = Labeled(), records(5)
    model = vectorize_latents(program, data)
    torch.manual_seed(0)
    x, z = ais.simulate(model, 5, *data.further)
    made = Records(x, *data.further)
    annealing = ais.pilot(model, made, betas=ais.temperatures(30), num_leapfrogs=3, num_chains=10)
    exact = program.log_evidence(x, *data.further)
    forward = ais.lower(model, made, annealing, num_chains=100).log_w
    backward = ais.upper(model, made, z, annealing, num_chains=100).log_w
    for ratio in ((forward - exact).exp(), (exact - backward).exp()):  # w / p(x) and p(x) / w, of mean 1
        assert ((ratio.mean(0) - 1).abs() < 4 * ratio.std(0) / 10).all()


@pytest.mark.parametrize("program", [ExactSum(), Labeled()], ids=["enumerated", "arguments"])
def test_a_compiled_chain_is_the_eager_one(graphs, program):
    data = records(5) if isinstance(program, Labeled) else program.draw(5)
    model = vectorize_latents(program, data)
    found = []
    for compile in (False, True):
        torch.manual_seed(0)
        annealing = ais.pilot(
            model, data, betas=ais.temperatures(8), num_leapfrogs=2, num_chains=4, start="prior", compile=compile
        )
        found.append(ais.lower(model, data, annealing, num_chains=4, compile=compile).log_w)
    assert graphs
    assert_close(*found, rtol=0, atol=1e-10)


class TwoNumbers(nn.Module):
    """a ~ N(0, 1), b ~ N(a, 1), x ~ N(W (a, b), I) in three pixels, with a guide that ignores x."""

    W = torch.tensor([[1.0, 0.5], [0.0, 1.0], [-0.5, 0.5]]).double()

    def model(self, x):
        with pyro.plate("images", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(torch.zeros(()).double(), 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(torch.stack([a, b], -1) @ self.W.T, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("images", len(x), dim=-1):
            pyro.sample("a", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("b", dist.Normal(torch.zeros(()).double(), 1.0))

    def log_evidence(self, x):
        covariance = torch.tensor([[1.0, 1.0], [1.0, 2.0]]).double()
        noise = torch.eye(3).double()
        return MultivariateNormal(torch.zeros(3).double(), self.W @ covariance @ self.W.T + noise).log_prob(x)


@pytest.mark.parametrize("program", [TwoNumbers(), Labeled()], ids=["two sites", "arguments"])
def test_a_refined_proposal_reaches_a_normal_posterior(program):
    data = records(5) if isinstance(program, Labeled) else images(5)
    arguments = (data.x, *data.further) if isinstance(data, Records) else (data,)
    model, exact = vectorize_latents(program, data), program.log_evidence(*arguments)
    torch.manual_seed(0)
    L = encode(model, data).mean.shape[1]
    own = replace_guide(model, refine_proposal(model, data, steps=200, family=FullNormal(L)))
    found = importance(own.model, own.guide, data[torch.arange(4, -1, -1)], num_particles=200)
    assert_close(found.elbo.flip(0), exact, rtol=0, atol=0.05)
    gaps = measure_gaps(model, data, exact, steps=200, family=FullNormal(L))
    assert_close(gaps.approximation, torch.zeros(5).double(), rtol=0, atol=0.05)


class Misplaced(TwoSites):
    def guide(self, x):
        super().guide(x + 1)


@pytest.mark.parametrize(("make", "is_exact"), [(TwoSites, True), (Misplaced, False)])
def test_calibration_tells_an_exact_guide_from_a_misplaced_one(make, is_exact):
    torch.manual_seed(0)
    found = judge(compute_ranks(vectorize_latents(make(), images(2)), num_simulations=400, num_draws=30))
    assert (found.p_value > 0.01) == is_exact


def test_a_program_may_be_a_part_of_a_mixture_guide():
    program, x = TwoSites(), images(3)
    mixed = mix_prior_into_guide(vectorize_latents(program, x))
    torch.manual_seed(0)
    found = importance(mixed.model, mixed.guide, x, num_particles=1000)
    assert ((found.log_evidence - program.log_evidence(x)).abs() < 5 * found.monte_carlo_stderr).all()


class Dropping(OneSite):
    """A program whose guide differs between training and evaluation."""

    def __init__(self):
        super().__init__(dist.Normal(zero, 1.0), None)
        self.shift = nn.Dropout(0.5)

    def guide(self, x):
        with pyro.plate("images", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.shift(torch.ones_like(x)).mean(-1), 1.0))


def test_diagnostics_and_calibration_are_of_evaluation_mode():
    x = images(8)
    model = vectorize_latents(Dropping(), x)
    found = []
    for training in (True, False):
        model.train(training)
        torch.manual_seed(0)
        ranks = compute_ranks(model, num_simulations=20, num_draws=5).latents
        found.append((measure(model, x, num_particles=5).reconstruction.mean, ranks.tolist()))
        assert model.program.shift.training == training
    assert found[0] == found[1]


def test_calibration_gives_each_simulation_its_own_argument():
    model = exact_vae()
    torch.manual_seed(0)
    y = torch.arange(400) % 3
    assert judge(compute_ranks(model, num_simulations=400, num_draws=30, further=(y,))).p_value > 0.01
    with pytest.raises(ValueError, match="further: expected 400 rows, one for each draw, got"):
        compute_ranks(model, num_simulations=400, num_draws=30, further=(y[:9],))


@pytest.mark.parametrize("program", [TwoSites(), Labeled()], ids=["two sites", "arguments"])
def test_a_diagnosis_of_a_program_has_the_parts_of_its_elbo(program):
    data = records(200) if isinstance(program, Labeled) else images(200)
    model = vectorize_latents(program, data)
    found = measure(model, data, num_particles=50)
    elbo = importance(program.model, program.guide, data, num_particles=300).elbo
    assert found.kl is not None
    error = math.hypot(found.kl.stderr, found.reconstruction.stderr)
    assert abs(found.reconstruction.mean - found.kl.mean - float(elbo.mean())) < 4 * error
    assert found.latent_dim == (1 if isinstance(program, Labeled) else 5)


# --- Labels ---


def test_a_conditional_vae_takes_its_labels_everywhere():
    vae, (x, y) = exact_vae(), labelled_images()
    data = Records(x, y)
    exact = log_p_x_given_y(x).gather(1, y[:, None])[:, 0]
    torch.manual_seed(0)
    annealing = ais.pilot(vae, data, betas=ais.temperatures(4), num_leapfrogs=2, num_chains=3)
    assert_close(ais.lower(vae, data, annealing, num_chains=3).log_w, exact.expand(3, 12), rtol=0, atol=1e-9)
    own = replace_guide(vae, refine_proposal(vae, data, steps=1, family=FullNormal(2)))
    found = importance(own.model, own.guide, data, num_particles=400)
    assert ((found.log_evidence - exact).abs() < 5 * found.monte_carlo_stderr + 0.02).all()


def test_a_semi_supervised_vae_has_its_label_summed():
    (x, y), exact = labelled_images(6), (log_p_x_given_y(labelled_images(6)[0]) + exact_vae().class_probs.log())
    vae = exact_vae()
    semi = SemiSupervisedVAE(
        vae.prior, vae.likelihood, vae.posterior, vae.class_probs, lambda x: dist.Categorical(logits=exact[: len(x)])
    )
    y = torch.where(torch.arange(6) < 3, y, -1)
    model = vectorize_latents(semi, Records(x, y))
    z = model.posterior(x, y).sample((4,))
    log_p = model.prior(y).log_prob(z) + model.likelihood(z, y).log_prob(x)
    by_label = [vae.prior(k).log_prob(z) + vae.likelihood(z, k).log_prob(x) for k in torch.arange(3)]
    expected = (torch.stack(by_label, -1) + vae.class_probs.log()).logsumexp(-1)
    assert_close(log_p, expected, rtol=0, atol=1e-9)
    log_w = (log_p - model.posterior(x, y).log_prob(z))[:, 3:]  # of unknown labels: the guide is exact
    assert_close(log_w, exact.logsumexp(1)[3:].expand(4, 3), rtol=0, atol=1e-9)


def test_images_are_told_apart_by_arguments_that_their_type_would_round():
    x, c = torch.ones(2, 3, dtype=torch.long), torch.tensor([0.1, 0.7])
    guide = PerImageGuide(Proposal(DiagonalNormal(1), torch.tensor([[0.0, 0.0], [5.0, 0.0]]), Records(x, c)), None)
    assert guide(x.flip(0), c.flip(0)).mean.flatten().tolist() == [5, 0]


COMPARING = {
    "measure": measure,
    "latent_kl": diagnostics.latent_kl,
    "elbo_split": diagnostics.elbo_split,
    "implied_beta": diagnostics.implied_beta,
    "holes": lambda vae, data: diagnostics.holes(vae, data, torch.zeros(9, 2).double(), torch.zeros(9, 2).double()),
}


@pytest.mark.parametrize("function", COMPARING.values(), ids=COMPARING)
def test_diagnostics_refuse_a_prior_that_differs_between_images(function):
    x, y = labelled_images()
    with pytest.raises(ValueError, match=r"vae: expected one p\(z\) for all images, .*vae.fix_label\(y\)"):
        function(exact_vae(), Records(x, y))


# --- What is refused ---


class Bounded(TwoSites):
    """A site whose support depends on a parameter."""

    def model(self, x):
        with pyro.plate("images", len(x), dim=-1):
            z = pyro.sample("z", dist.Uniform(torch.zeros(3).double(), 2.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("images", len(x), dim=-1):
            pyro.sample("z", dist.Uniform(torch.zeros(len(x), 3).double(), 2.0).to_event(1))


def test_a_support_with_parameters_is_refused():
    with pytest.raises(ValueError, match=r"site 'z': expected a support without parameters, .*; sample a normal or a"):
        vectorize_latents(Bounded(), images(2))


@pytest.mark.parametrize(
    ("p", "q", "message"),
    [
        (dist.HalfNormal(one), dist.Normal(one, 1.0), "expected a guide within the model's support .*LogNormal"),
        (dist.ProjectedNormal(torch.ones(3)), dist.ProjectedNormal(torch.ones(3)), "got Sphere; sample real numbers"),
    ],
)
def test_a_support_that_real_numbers_do_not_map_to_is_refused(p, q, message):
    with pytest.raises(ValueError, match=message):
        vectorize_latents(OneSite(p, q), images(2))


class Late(TwoSites):
    """A latent that is drawn after a part of the image, and depends on it."""

    def model(self, x):
        with pyro.plate("images", len(x), dim=-1):
            pyro.sample("z_1", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            z_2 = pyro.sample("z_2", dist.Normal(x, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z_2, 1.0).to_event(1), obs=x)


def test_a_latent_that_depends_on_the_images_is_refused():
    with pytest.raises(ValueError, match="model: expected latents that do not depend on the images"):
        vectorize_latents(Late(), images(2))


class Global(OneSite):
    def model(self, x):
        pyro.sample("w", self.p)
        super().model(x)

    def guide(self, x):
        pyro.sample("w", self.q)
        super().guide(x)


def test_a_site_outside_of_the_plate_is_refused():
    with pytest.raises(ValueError, match="site 'w': expected it in the images' plate"):
        vectorize_latents(Global(dist.Normal(zero, 1.0), dist.Normal(zero, 1.0)), images(2))


class Observing(OneSite):
    def model(self, x):
        super().model(x)
        with pyro.plate("more", len(x), dim=-1):
            pyro.factor("near", -(x.sum(-1) ** 2))


def test_images_of_a_program_that_observes_more_are_not_simulated():
    model = vectorize_latents(Observing(dist.Normal(zero, 1.0), dist.Normal(zero, 1.0)), images(2))
    for simulate in (lambda: ais.simulate(model, 3), lambda: compute_ranks(model, num_simulations=3, num_draws=2)):
        with pytest.raises(ValueError, match=r"model: expected one observed site, the images, .* got \['x', 'near'\]"):
            simulate()


@pytest.mark.parametrize("program", [(1, 2), TwoSites().model])
def test_what_is_no_module_is_refused(program):
    with pytest.raises(ValueError, match=r"program: expected a torch.nn.Module .*; PyroProgram"):
        vectorize_latents(program, images(2))


def test_a_forgotten_argument_is_missed():
    model, z = vectorize_latents(Labeled(), records(5)), torch.zeros(5, 1).double()
    for part in (lambda: model.likelihood(z), lambda: model.posterior(records(5).x)):
        with pytest.raises(ValueError, match=r"further: expected 2 tensors, which the program takes .* got 0"):
            part()


def test_records_for_a_vae_whose_parts_take_no_argument_are_refused():
    vae, data = OtherModel(), Records(images(2), torch.arange(2))
    vae = VAE(vae.prior, vae.likelihood, vae.posterior)
    with pytest.raises(ValueError, match=r"0 positional .* given; Records\(x, y\) .* each part of a VAE y"):
        importance(vae.model, vae.guide, data, num_particles=1)


def test_a_vae_is_its_own_latent_model():
    vae = exact_vae()
    assert vectorize_latents(vae, Records(*labelled_images())) is vae


class OtherParts(TwoSites):
    """A program whose attributes have the names of a VAE's parts and another meaning."""

    def __init__(self):
        super().__init__()
        self.prior, self.likelihood, self.posterior = nn.Linear(1, 2), nn.Linear(2, 3), nn.Linear(3, 2)


class OtherModel(VAE):
    """A VAE with a latent of its own, which its parts do not have."""

    def __init__(self):
        super().__init__(
            lambda: dist.Normal(torch.zeros(3).double(), 1.0).to_event(1),
            lambda z: dist.Normal(z, 1.0).to_event(1),
            lambda x: dist.Normal(x / 2, 0.5**0.5).to_event(1),
        )

    def model(self, x):
        super().model(x)
        with pyro.plate("more", len(x), dim=-1):
            pyro.sample("s", dist.Normal(zero, 1.0))

    def guide(self, x):
        super().guide(x)
        with pyro.plate("more", len(x), dim=-1):
            pyro.sample("s", dist.Normal(one, 1.0))


@pytest.mark.parametrize(("make", "L"), [(OtherParts, 5), (OtherModel, 4)])
def test_parts_that_are_not_those_of_model_and_guide_are_not_taken(make, L):
    model = vectorize_latents(make(), images(2))
    assert model.posterior(images(3)).sample().shape == (3, L)
