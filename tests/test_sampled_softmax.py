"""sampled_softmax against its definition and exact sums over all draws; its sparse gradients; its
noise."""

import itertools
import math

import pytest
import torch
from helpers import Fixed, check_frequencies, close, gradients, is_zero, normal
from torch import nn
from torch.distributions import Categorical
from torch.nn.functional import cross_entropy, linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from objectives import ClassFrequencies, LogUniform, sampled_softmax

COUNTS = torch.tensor([5.0, 1.0, 3.0, 0.5, 2.5], dtype=torch.float64)
NOISES = {
    "uniform": None,
    "log_uniform": LogUniform(5),
    "frequencies": ClassFrequencies(COUNTS),
    "categorical": Categorical(COUNTS),
}
every_noise = pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)


def problem(n=3, n_classes=5, size=2):
    """Embeddings, labels, weight and bias."""
    shapes = enumerate([(n, size), (n_classes, size), (n_classes,)])
    e, weight, bias = (normal(*shape, seed=seed).requires_grad_() for seed, shape in shapes)
    return e, (torch.arange(n) * 3 + 1) % n_classes, weight, bias


def probabilities(noise, n_classes=5):
    if noise is None:
        return torch.full((n_classes,), 1 / n_classes, dtype=torch.float64)
    return noise.log_prob(torch.arange(n_classes)).exp()


def given(drawn, q):
    """Settings with which these classes are drawn from probabilities q."""
    return {"n_samples": len(drawn), "noise": Fixed(drawn, q)}


# The loss


@every_noise
@pytest.mark.parametrize("drawn", [[3, 0, 2, 0], [1, 3, 1, 4], [1, 1, 4, 4], [4]])
def test_loss_and_gradients_are_those_of_the_definition(noise, drawn):
    """One score at a time; labels 1, 4 and 2 drawn never, sometimes, and nothing else."""
    e, labels, weight, bias = problem()
    q = probabilities(noise)
    losses = []
    for e_i, t in zip(e, labels.tolist()):
        x = weight @ e_i + bias
        kept = [c for c in drawn if c != t]
        corrected = [x[c] - (len(kept) * q[c] / (1 - q[t])).log() for c in kept]
        losses.append(torch.stack([x[t], *corrected]).logsumexp(0) - x[t])
    expected = torch.stack(losses).mean()
    variables = (e, weight, bias)
    loss, metrics = sampled_softmax(e, labels, weight, bias, **given(drawn, q))
    close(loss, expected)
    close(gradients(loss, *variables), gradients(expected, *variables))
    kept = [c != t for t in labels.tolist() for c in drawn]
    assert metrics["kept"].item() == pytest.approx(sum(kept) / len(kept))
    without, _ = sampled_softmax(e, labels, weight, **given(drawn, q))
    close(without, sampled_softmax(e, labels, weight, 0 * bias, **given(drawn, q))[0])


def test_noise_is_not_taught():
    logits = COUNTS.log().requires_grad_()
    e, labels, weight, bias = problem()
    sampled_softmax(e, labels, weight, bias, noise=Categorical(logits=logits))[0].backward()
    assert logits.grad is None and weight.grad is not None


@every_noise
@pytest.mark.parametrize("n_samples", [1, 3])
def test_sum_over_other_classes_is_unbiased_if_something_was_kept(noise, n_samples):
    """Summed over all 5^n draws with their probabilities; without that condition the estimate
    is short by the factor 1 - q_t^n."""
    e, labels, weight, bias = problem(n=1)
    x = linear(e, weight, bias).detach()[0]
    q = probabilities(noise)
    t = labels.item()
    expected = 0
    for draw in itertools.product(range(5), repeat=n_samples):
        loss, _ = sampled_softmax(e, labels, weight, bias, **given(draw, q))
        estimate = x[t].exp() * loss.detach().expm1()  # 0 if nothing was kept
        expected += q[list(draw)].prod() * estimate
    exact = x.exp().sum() - x[t].exp()
    close(expected, (1 - q[t] ** n_samples) * exact)


@every_noise
def test_draws_of_its_own_are_those_of_the_noise(noise):
    """With the same seed: the draw, and so the loss, is what the noise makes."""
    torch.manual_seed(0)
    drawn = torch.randint(5, (4,)) if noise is None else noise.sample((4,))
    expected, _ = sampled_softmax(*problem(), **given(drawn.tolist(), probabilities(noise)))
    torch.manual_seed(0)
    close(sampled_softmax(*problem(), n_samples=4, noise=noise)[0], expected)


def test_noise_drawn_in_exact_proportion_makes_the_full_softmax():
    """What many samples come close to: the loss and all gradients, to the last digit."""
    e, labels, weight, bias = problem()
    drawn = torch.arange(5).repeat_interleave((2 * COUNTS).long()).tolist()
    loss, _ = sampled_softmax(e, labels, weight, bias, **given(drawn, COUNTS / COUNTS.sum()))
    full = cross_entropy(linear(e, weight, bias), labels)
    variables = (e, weight, bias)
    close(loss, full)
    close(gradients(loss, *variables), gradients(full, *variables))


def test_an_example_that_rejects_all_samples_costs_nothing():
    e, _, weight, bias = problem()
    settings = given([2, 2], COUNTS / COUNTS.sum())
    loss, metrics = sampled_softmax(e, torch.full((3,), 2), weight, bias, **settings)
    assert loss == 0 and metrics["kept"] == 0
    assert all(is_zero(grad) for grad in gradients(loss, e, weight, bias))


def test_a_left_out_example_may_borrow_a_masked_class():
    """Which is all that was drawn: its row has no finite score of its own."""
    e, labels, weight, bias = problem()
    labels[0] = -100
    masked = bias.detach().index_fill(0, torch.tensor(3), -math.inf).requires_grad_()
    loss, _ = sampled_softmax(e, labels, weight, masked, **given([3], torch.full((5,), 0.2)))
    assert loss == 0
    assert all(is_zero(grad) for grad in gradients(loss, e, weight, masked))


def test_a_label_that_is_nearly_all_of_the_noise_keeps_its_correction_in_float32():
    """1 - q_t = 1e-9 is lost where q_t is rounded to float32."""
    e, _, weight, bias = problem(n=1)
    settings = given([1], torch.tensor([1 - 1e-9, 1e-9, 0, 0, 0], dtype=torch.float64))
    label = torch.tensor([0])
    expected, _ = sampled_softmax(e, label, weight, bias, **settings)
    loss, _ = sampled_softmax(e.float(), label, weight.float(), bias.float(), **settings)
    close(loss.double(), expected, rtol=1e-5)


def test_tensorflows_loss_has_the_correction_of_the_label_too():
    """tf.nn.sampled_softmax_loss: all scores less log(n q), no score for a sample that is the
    label. Ours has (1 - q_t) / k where TensorFlow's has q_t, on the same draws."""
    e, labels, weight, bias = problem(n=1)
    q = COUNTS / COUNTS.sum()
    drawn = [3, 0, 2, 0]
    t = labels.item()
    assert t not in drawn
    corrected = linear(e, weight, bias)[0] - (len(drawn) * q).log()
    tensorflow = torch.stack([corrected[t], *corrected[drawn]]).logsumexp(0) - corrected[t]
    loss, _ = sampled_softmax(e, labels, weight, bias, **given(drawn, q))
    close(loss.expm1(), tensorflow.expm1() * (1 - q[t]) / (len(drawn) * q[t]))


# Sparse gradients


@every_noise
def test_sparse_gradients_are_the_dense_ones_on_the_rows_used(noise):
    """Of labels and noise, none of them for the label of -100, whatever class stands for it."""
    e, labels, weight, bias = problem(n=4, n_classes=50)
    labels[3] = -100
    q = torch.full((50,), 0.02) if noise is None else probabilities(noise).repeat(10) / 10
    settings = given([7, 40, 7], q)
    dense, _ = sampled_softmax(e, labels, weight, bias, **settings)
    sparse, _ = sampled_softmax(e, labels, weight, bias, sparse=True, **settings)
    variables = (e, weight, bias)
    close(dense, sparse)
    for x, y in zip(gradients(dense, *variables), gradients(sparse, *variables)):
        assert y.is_sparse == (len(y) == 50)
        close(y.to_dense(), x)
        if y.is_sparse:
            assert set(y._indices().unique().tolist()) == {7, 40, *labels[:3].tolist()}


def test_sparse_adam_moves_the_rows_used_and_no_others():
    e, labels, *layer = problem(n_classes=50)
    weight, bias = (nn.Parameter(x.detach().clone()) for x in layer)
    settings = given([7, 8], torch.full((50,), 0.02))
    sampled_softmax(e, labels, weight, bias, sparse=True, **settings)[0].backward()
    torch.optim.SparseAdam([weight, bias], lr=0.1).step()
    moved = (weight != layer[0]).any(1) | (bias != layer[1])
    assert set(moved.nonzero().flatten().tolist()) == {7, 8, *labels.tolist()}


class Sizes(TorchDispatchMode):
    """Records the bytes of all memory that an operation makes for a dense tensor."""

    def __init__(self, *known):
        super().__init__()
        self.known = {x.data_ptr() for x in known}
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor) and not x.is_sparse]
        storages = [x.untyped_storage() for x in tensors]
        self.seen += [x.nbytes() for x in storages if x.data_ptr() not in self.known]
        return out


@pytest.mark.parametrize("sparse", [False, True])
def test_nothing_as_long_as_the_classes_is_made_with_sparse_gradients(sparse):
    n_classes = 100_003
    e, labels, weight, bias = problem(n=4, n_classes=n_classes)
    with Sizes(weight, bias) as sizes:
        settings = {"noise": LogUniform(n_classes), "sparse": sparse}
        sampled_softmax(e, labels, weight, bias, **settings)[0].backward()
    assert (max(sizes.seen) < n_classes) == sparse


# The noise


@pytest.mark.parametrize("n_classes", [1, 2, 1000])
def test_log_uniform_has_the_closed_form(n_classes):
    closed = [math.log((c + 2) / (c + 1)) / math.log(n_classes + 1) for c in range(n_classes)]
    expected = torch.tensor(closed, dtype=torch.float64)
    close(probabilities(LogUniform(n_classes), n_classes), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32])
def test_class_frequencies_are_the_counts_divided_by_their_sum(dtype):
    counts = COUNTS.to(dtype)
    close(probabilities(ClassFrequencies(counts)), counts.double() / counts.double().sum())
    existing = ClassFrequencies(torch.tensor([True, False, True]))
    assert probabilities(existing, 3).tolist() == [0.5, 0, 0.5]


@pytest.mark.parametrize(
    "noise", [LogUniform(30), ClassFrequencies(torch.arange(30) % 4)], ids=["log", "given"]
)
def test_samples_follow_log_prob(noise):
    generator = torch.Generator().manual_seed(0)
    ids = noise.sample((100_000, 4), generator=generator)
    check_frequencies(ids, probabilities(noise, 30))


def test_frequency_zero_is_not_drawn_by_a_number_on_the_edge(monkeypatch):
    edges = torch.tensor([0.0, 0.5], dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: edges)
    assert ClassFrequencies(torch.tensor([0, 1, 0, 1])).sample((2,)).tolist() == [1, 3]


@pytest.mark.parametrize("make", [LogUniform, lambda n: ClassFrequencies(torch.ones(n))])
def test_more_classes_than_multinomial_takes(make):
    """torch.multinomial stops at 2^24; the upper half must be drawn too."""
    n_classes = 2**24 + 1000
    ids = make(n_classes).sample((10_000,), generator=torch.Generator().manual_seed(0))
    assert 0 <= ids.min() and n_classes // 2 < ids.max() < n_classes


@pytest.mark.parametrize("noise", [None, LogUniform(5), ClassFrequencies(COUNTS)])
def test_generator_repeats_the_draw(noise):
    def loss(seed):
        generator = torch.Generator().manual_seed(seed)
        return sampled_softmax(*problem(), n_samples=3, noise=noise, generator=generator)[0]

    assert torch.equal(loss(0), loss(0))
    assert len({loss(seed).item() for seed in range(5)}) > 1
