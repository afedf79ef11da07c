"""Noise distributions and sparse gradients of sampled_softmax."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical
from torch.utils._python_dispatch import TorchDispatchMode

from objectives import ClassFrequencies, LogUniform, sampled_softmax

COUNTS = torch.tensor([5.0, 1.0, 3.0, 0.5])
NOISES = {
    "uniform": None,
    "log_uniform": LogUniform(4),
    "frequencies": ClassFrequencies(COUNTS),
    "categorical": Categorical(COUNTS.double()),
}


class Given:
    """Noise that draws the ids it was given."""

    def __init__(self, ids, noise):
        self.ids, self.log_prob = ids, noise.log_prob

    def sample(self, shape):
        return self.ids


def problem(n=3, n_classes=4, size=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n, size), (n_classes, size), (n_classes,)]
    embeddings, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    )
    labels = torch.randint(n_classes, (n,), generator=generator)
    return embeddings, labels, weight, bias


def probabilities(noise, n_classes):
    if noise is None:
        return torch.full((n_classes,), 1 / n_classes, dtype=torch.float64)
    return noise.log_prob(torch.arange(n_classes)).exp()


@pytest.mark.parametrize("name", NOISES)
def test_sum_over_other_classes_is_unbiased_under_any_noise(name):
    """Summed over all 4^3 draws with their probabilities, as an exact expectation."""
    embeddings, labels, weight, bias = problem(n=1)
    q = probabilities(NOISES[name], 4)
    uniform = ClassFrequencies(torch.ones(4))
    x = F.linear(embeddings, weight, bias).detach()[0]
    t = labels.item()
    expected = torch.zeros((), dtype=torch.float64)
    for draw in itertools.product(range(4), repeat=3):
        noise = Given(torch.tensor(draw), NOISES[name] or uniform)
        loss, _ = sampled_softmax(embeddings, labels, weight, bias, n_samples=3, noise=noise)
        estimate = (loss.detach() + x[t]).exp() - x[t].exp()
        expected += q[list(draw)].prod() * estimate
    exact = x.exp().sum() - x[t].exp()
    at_least_one_kept = 1 - q[t] ** 3
    torch.testing.assert_close(expected / at_least_one_kept, exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", NOISES)
def test_many_samples_approach_full_softmax(name):
    """Loss and gradient: within 4 standard errors over 50 draws, plus 1/n for the bias."""
    n_samples = 4000
    inputs = problem()
    embeddings, labels, weight, bias = inputs
    full = F.cross_entropy(F.linear(embeddings, weight, bias), labels)
    wanted = torch.cat([full.view(1), torch.autograd.grad(full, weight)[0].flatten()]).detach()
    torch.manual_seed(0)
    draws = []
    for _ in range(50):
        loss, _ = sampled_softmax(*inputs, n_samples=n_samples, noise=NOISES[name])
        gradient = torch.autograd.grad(loss, weight)[0].flatten()
        draws.append(torch.cat([loss.view(1), gradient]).detach())
    draws = torch.stack(draws)
    standard_error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - wanted).abs() <= 4 * standard_error + 1 / n_samples).all()


@pytest.mark.parametrize("drawn", [[3, 5, 4, 5], [0, 5, 1, 0], [2, 2, 2, 2]])
def test_loss_and_gradients_are_those_of_the_definition(drawn):
    """By autograd, one score at a time; labels drawn never, sometimes, and nothing else."""
    noise = ClassFrequencies(torch.arange(1, 7))
    embeddings, _, weight, bias = problem(n_classes=6)
    labels, q = torch.tensor([0, 1, 2]), probabilities(noise, 6)
    losses = []
    for e, t in zip(embeddings, labels.tolist(), strict=True):
        x, kept = weight @ e + bias, [c for c in drawn if c != t]
        corrected = [x[c] - (len(kept) * q[c] / (1 - q[t])).log() for c in kept]
        losses.append(torch.stack([x[t], *corrected]).logsumexp(0) - x[t])
    expected = torch.stack(losses).mean()
    loss, _ = sampled_softmax(
        embeddings, labels, weight, bias, n_samples=4, noise=Given(torch.tensor(drawn), noise)
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    inputs = (embeddings, weight, bias)
    wanted = torch.autograd.grad(expected, inputs)
    for _ in range(2):  # what is kept for the gradient stays as it was
        gradients = torch.autograd.grad(loss, inputs, retain_graph=True)
        torch.testing.assert_close(gradients, wanted, rtol=1e-12, atol=1e-12)


def test_second_derivatives_are_those_of_differences():
    embeddings, labels, weight, bias = problem()

    def loss(embeddings, weight, bias):
        generator = torch.Generator().manual_seed(0)
        return sampled_softmax(embeddings, labels, weight, bias, generator=generator)[0]

    assert torch.autograd.gradgradcheck(loss, (embeddings, weight, bias))


def test_the_softmax_over_the_noise_is_all_that_is_kept_of_its_size():
    n, n_samples, kept = 16, 64, []
    inputs = problem(n=n, n_classes=10_000)
    noise = Given(torch.arange(n_samples), ClassFrequencies(torch.ones(10_000)))

    def pack(tensor):
        kept.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sampled_softmax(*inputs, n_samples=n_samples, noise=noise)
    assert [size for size in kept if size >= n * n_samples and size < 10_000] == [n * n_samples]


@pytest.mark.parametrize("name", NOISES)
def test_two_classes_are_exact(name):
    """One other class: whatever is kept, the estimate is its score itself."""
    inputs = problem(n=5, n_classes=2)
    noise = {"log_uniform": LogUniform(2), "frequencies": ClassFrequencies(COUNTS[:2])}.get(name)
    if name == "categorical":
        noise = Categorical(COUNTS[:2].double())
    torch.manual_seed(0)
    loss, _ = sampled_softmax(*inputs, n_samples=64, noise=noise)
    embeddings, labels, weight, bias = inputs
    full = F.cross_entropy(F.linear(embeddings, weight, bias), labels)
    torch.testing.assert_close(loss, full)


@pytest.mark.parametrize("noise", [None, LogUniform(1), ClassFrequencies(torch.ones(1))])
def test_one_class_has_loss_and_gradient_zero(noise):
    embeddings, _, weight, bias = problem(n_classes=1)
    labels = torch.zeros(3, dtype=torch.int64)
    loss, metrics = sampled_softmax(embeddings, labels, weight, bias, noise=noise)
    gradients = torch.autograd.grad(loss, [embeddings, weight, bias])
    assert loss == 0 and metrics["kept"] == 0
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("common", [1e6, 1e12, 1e300])
def test_a_label_of_probability_near_one_stays_finite(dtype, common):
    noise = ClassFrequencies(torch.tensor([common, 1.0, 1.0], dtype=torch.float64))
    embeddings, _, weight, bias = (
        t.detach().to(dtype if t.is_floating_point() else t.dtype) for t in problem(n_classes=3)
    )
    weight.requires_grad_()
    for drawn in ([0, 0, 0], [0, 1, 2]):
        loss, _ = sampled_softmax(
            embeddings,
            torch.zeros(3, dtype=torch.int64),
            weight,
            bias,
            n_samples=3,
            noise=Given(torch.tensor(drawn), noise),
        )
        assert loss.isfinite()
        assert torch.autograd.grad(loss, weight)[0].isfinite().all()


@pytest.mark.parametrize("name", NOISES)
def test_sparse_gradients_equal_dense_ones(name):
    inputs = problem(n=6)
    gradients = {}
    for sparse in [False, True]:
        torch.manual_seed(1)
        loss, _ = sampled_softmax(*inputs, n_samples=3, noise=NOISES[name], sparse=sparse)
        gradients[sparse] = torch.autograd.grad(loss, [inputs[0], inputs[2], inputs[3]])
    for dense, sparse in zip(gradients[False], gradients[True]):
        torch.testing.assert_close(sparse.to_dense() if sparse.is_sparse else sparse, dense)
    assert gradients[True][1].is_sparse and gradients[True][2].is_sparse


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adagrad])
def test_sparse_training_equals_dense_training(optimizer):
    """Three steps; both optimisers leave a row with gradient zero where it is."""
    torch.sparse.check_sparse_tensor_invariants.disable()  # say so, or Adagrad warns
    embeddings, labels, weight, bias = problem(n=6, n_classes=9)
    trained = {}
    for sparse in [False, True]:
        torch.manual_seed(2)
        parameters = [torch.nn.Parameter(p.detach().clone()) for p in (weight, bias)]
        steps = optimizer(parameters, lr=0.1)
        for _ in range(3):
            loss, _ = sampled_softmax(embeddings, labels, *parameters, n_samples=2, sparse=sparse)
            steps.zero_grad()
            loss.backward()
            steps.step()
        trained[sparse] = parameters
    for dense, sparse in zip(trained[False], trained[True]):
        torch.testing.assert_close(sparse, dense)


def test_sparse_adam_moves_the_rows_used_and_no_others():
    embeddings, labels, weight, bias = problem(n=3, n_classes=50)
    weight, bias = torch.nn.Parameter(weight.detach()), torch.nn.Parameter(bias.detach())
    before = weight.detach().clone()
    steps = torch.optim.SparseAdam([weight, bias], lr=0.1)
    drawn = torch.tensor([7, 8])
    noise = Given(drawn, LogUniform(50))
    loss, _ = sampled_softmax(
        embeddings, labels, weight, bias, n_samples=2, noise=noise, sparse=True
    )
    loss.backward()
    steps.step()
    moved = (weight.detach() != before).any(1).nonzero().flatten()
    assert moved.tolist() == sorted({*labels.tolist(), *drawn.tolist()})


class Sizes(TorchDispatchMode):
    """Records how many elements every dense result of an operation holds."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor) and not value.is_sparse:
                self.seen.append(value.untyped_storage().nbytes() // value.element_size())
        return result


def test_nothing_as_long_as_the_classes_is_made_with_sparse_gradients():
    n_classes = 100_003
    embeddings, labels, weight, bias = problem(n=4, n_classes=n_classes)
    existing = {t.untyped_storage().nbytes() // t.element_size() for t in (weight, bias)}
    with Sizes() as sizes:
        loss, _ = sampled_softmax(
            embeddings, labels, weight, bias, noise=LogUniform(n_classes), sparse=True
        )
        loss.backward()
    assert len(sizes.seen) > 10
    assert {size for size in sizes.seen if size >= n_classes} <= existing


@pytest.mark.parametrize("n_classes", [1, 2, 1000])
def test_log_uniform_probabilities_have_the_closed_form_and_sum_to_one(n_classes):
    p = LogUniform(n_classes).log_prob(torch.arange(n_classes)).exp()
    closed = [math.log((c + 2) / (c + 1)) / math.log(n_classes + 1) for c in range(n_classes)]
    torch.testing.assert_close(p, torch.tensor(closed, dtype=torch.float64))
    assert p.sum().item() == pytest.approx(1)


@pytest.mark.parametrize(
    "noise", [LogUniform(30), ClassFrequencies(torch.arange(30).remainder(4))], ids=["log", "given"]
)
def test_samples_follow_log_prob(noise):
    """Each of 30 counts within 4.5 standard errors of its binomial mean: 1 in 5,000 by chance."""
    n = 400_000
    generator = torch.Generator().manual_seed(0)
    counts = noise.sample((n // 4, 4), generator=generator).flatten().bincount(minlength=30)
    p = noise.log_prob(torch.arange(30)).exp()
    standard_error = (n * p * (1 - p)).sqrt()
    assert ((counts - n * p).abs() <= 4.5 * standard_error).all()


@pytest.mark.parametrize("make", [LogUniform, lambda n: ClassFrequencies(torch.ones(n))])
def test_more_classes_than_multinomial_takes(make):
    """torch.multinomial stops at 2^24; the upper half must be drawn too."""
    n_classes = 2**24 + 1000
    ids = make(n_classes).sample((10_000,), generator=torch.Generator().manual_seed(0))
    assert 0 <= ids.min() and n_classes // 2 < ids.max() < n_classes


def test_frequency_zero_is_never_drawn():
    noise = ClassFrequencies(torch.tensor([0, 2, 0, 0, 1, 0]))
    ids = noise.sample((10_000,), generator=torch.Generator().manual_seed(0))
    assert ids.unique().tolist() == [1, 4]


@pytest.mark.parametrize("noise", [None, LogUniform(4), ClassFrequencies(COUNTS)])
def test_generator_repeats_the_draw(noise):
    def loss(seed):
        generator = torch.Generator().manual_seed(seed)
        return sampled_softmax(*problem(), n_samples=3, noise=noise, generator=generator)[0]

    assert torch.equal(loss(0), loss(0))
    assert len({loss(seed).item() for seed in range(5)}) > 1


class Wrong:
    def __init__(self, ids, log_q=None):
        self.ids, self.log_q = ids, log_q

    def sample(self, shape):
        return self.ids

    def log_prob(self, ids):
        return self.log_q


class WithoutLogProb:
    sample = LogUniform.sample


IDS, LOG_Q = torch.tensor([0, 1, 2, 3]), torch.zeros(7)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"noise": "uniform"}, TypeError, r"^noise must have .* got str"),
        ({"noise": COUNTS}, TypeError, r"^noise must have .* got Tensor"),
        ({"noise": LogUniform}, TypeError, r"^noise must have .* got type"),
        ({"noise": WithoutLogProb()}, TypeError, r"^noise must have .* got WithoutLogProb"),
        ({"noise": LogUniform(3)}, ValueError, r"^noise must be over the C=4 .* got 3"),
        ({"noise": LogUniform(5)}, ValueError, r"^noise must be over the C=4 .* got 5"),
        ({"noise": ClassFrequencies(COUNTS[:3])}, ValueError, r"^noise must be over .* got 3"),
        ({"noise": Categorical(COUNTS[:3])}, ValueError, r"^noise must be over .* got 3"),
        ({"noise": Categorical(COUNTS.repeat(2, 1))}, ValueError, r"^noise\.sample.* got \[4, 2\]"),
        ({"noise": Wrong(None)}, TypeError, r"^noise\.sample.* must be a tensor, got NoneType"),
        (
            {"noise": Wrong(IDS.int())},
            TypeError,
            r"^noise\.sample.* must be int64, got torch.int32",
        ),
        ({"noise": Wrong(IDS - 1)}, ValueError, r"^noise\.sample.* got values from -1 to 2"),
        ({"noise": Wrong(IDS.to("meta"))}, ValueError, r"^noise\.sample.* device .* got meta"),
        ({"noise": Wrong(IDS)}, TypeError, r"^noise\.log_prob.* must be a tensor, got NoneType"),
        ({"noise": Wrong(IDS, LOG_Q[0])}, ValueError, r"^noise\.log_prob.* got \[\]"),
        ({"noise": Wrong(IDS, LOG_Q[:4])}, ValueError, r"^noise\.log_prob.* got \[4\]"),
        ({"noise": Wrong(IDS, LOG_Q[:, None])}, ValueError, r"^noise\.log_prob.* got \[7, 1\]"),
        ({"noise": Wrong(IDS, LOG_Q.int())}, TypeError, r"^noise\.log_prob.* got torch.int32"),
        ({"noise": Wrong(IDS, LOG_Q.to("meta"))}, ValueError, r"^noise\.log_prob.* got meta"),
        ({"noise": Wrong([1, 2])}, TypeError, r"^noise\.sample.* must be a tensor, got list"),
        ({"noise": Wrong(COUNTS)}, TypeError, r"^noise\.sample.* must be int64, got torch.float32"),
        ({"noise": Wrong(torch.ones(3, dtype=int))}, ValueError, r"^noise\.sample.* got \[3\]"),
        (
            {"noise": Wrong(torch.full((4,), 4))},
            ValueError,
            r"^noise\.sample.* \[0, 4\), got .* 4 to 4",
        ),
        (
            {"noise": Categorical(COUNTS), "generator": torch.Generator()},
            ValueError,
            r"^generator must be None with noise of type Categorical",
        ),
    ],
)
def test_wrong_noise_is_refused(settings, error, message):
    with pytest.raises(error, match=message):
        sampled_softmax(*problem(), n_samples=4, **settings)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LogUniform(0), ValueError, "^n_classes must be at least 1, got 0"),
        (lambda: LogUniform(2.0), TypeError, "^n_classes must be an int, got float"),
        (lambda: LogUniform(True), TypeError, "^n_classes must be an int, got bool"),
        (lambda: LogUniform("3"), TypeError, "^n_classes must be an int, got str"),
        (lambda: LogUniform(-1), ValueError, "^n_classes must be at least 1, got -1"),
        (lambda: LogUniform(2**31), ValueError, "^n_classes must be less than 2.31, got"),
        (lambda: LogUniform(3, device=0.5), TypeError, "^device must be .* got float"),
        (lambda: LogUniform(3, device="abacus"), ValueError, "^device must .* got 'abacus'"),
        (lambda: LogUniform(3).sample(4), TypeError, "^shape must be .* got 4"),
        (lambda: LogUniform(3).sample((4.0,)), TypeError, "^shape must be .* got"),
        (lambda: LogUniform(3).sample((-4,)), ValueError, "^shape must not be negative, got"),
        (lambda: LogUniform(3).sample((4,), generator=0), TypeError, "^generator .* got int"),
        (
            lambda: LogUniform(3, device="meta").sample((4,), generator=torch.Generator()),
            ValueError,
            "^generator must be on the device of the draws, meta, got cpu",
        ),
        (lambda: LogUniform(3).log_prob(0), TypeError, "^ids must be a tensor, got int"),
        (lambda: LogUniform(3).log_prob(COUNTS), TypeError, "^ids must be int64, got torch.float"),
        (lambda: LogUniform(3).log_prob(IDS), ValueError, r"^ids .* \[0, 3\), got .* 0 to 3"),
        (lambda: LogUniform(9).log_prob(IDS - 1), ValueError, "^ids .* got values from -1 to 2"),
        (lambda: ClassFrequencies(None), TypeError, "^counts must be a tensor, got NoneType"),
        (lambda: ClassFrequencies(COUNTS * 1j), TypeError, "^counts must be real .* got .*complex"),
        (lambda: ClassFrequencies(COUNTS.to_sparse()), TypeError, "^counts .* got torch.sparse"),
        (lambda: ClassFrequencies(COUNTS.to("meta")), ValueError, "^counts .* got meta"),
        (lambda: ClassFrequencies(torch.tensor(3)), ValueError, r"^counts .* got \[\]"),
        (lambda: ClassFrequencies(COUNTS).sample(None), TypeError, "^shape must be .* got None"),
        (lambda: ClassFrequencies(COUNTS).sample([-1]), ValueError, "^shape must not .* got"),
        (
            lambda: ClassFrequencies(COUNTS).sample((4,), generator=IDS),
            TypeError,
            "^generator .* got Tensor",
        ),
        (lambda: ClassFrequencies(COUNTS).log_prob([0]), TypeError, "^ids .* got list"),
        (lambda: ClassFrequencies(COUNTS).log_prob(IDS > 0), TypeError, "^ids .* got torch.bool"),
        (lambda: ClassFrequencies(COUNTS).log_prob(IDS - 1), ValueError, "^ids .* from -1 to 2"),
        (lambda: ClassFrequencies(COUNTS).log_prob(IDS + 1), ValueError, "^ids .* from 1 to 4"),
        (lambda: ClassFrequencies(COUNTS).log_prob(IDS.to("meta")), ValueError, "^ids .* got meta"),
        (lambda: ClassFrequencies([1, 2]), TypeError, "^counts must be a tensor, got list"),
        (lambda: ClassFrequencies(torch.ones(2, 2)), ValueError, r"^counts must have shape \[C\]"),
        (lambda: ClassFrequencies(torch.zeros(3)), ValueError, r"^counts .* got a sum of 0"),
        (lambda: ClassFrequencies(torch.ones(0)), ValueError, r"^counts .* got a sum of 0"),
        (lambda: ClassFrequencies(torch.tensor([2.0, -1])), ValueError, "^counts must not be neg"),
        (lambda: ClassFrequencies(torch.tensor([1, math.nan])), ValueError, "^counts .* nan"),
        (lambda: ClassFrequencies(torch.tensor([1, math.inf])), ValueError, "^counts .* inf"),
    ],
)
def test_wrong_distributions_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
