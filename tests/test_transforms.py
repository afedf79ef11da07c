"""The objectives inside what PyTorch wraps around a loss: autocast, a gradient scaler,
micro-batches, torch.compile, torch.func."""

import pytest
import torch
from torch import nn
from torch._dynamo import lookup_backend
from torch.distributions import Categorical
from torch.func import grad, vmap

from objectives import (
    ClassFrequencies,
    LogUniform,
    policy_gradient,
    reward_if_correct,
    sampled_softmax,
    softmax_cross_entropy,
    teacher_student,
    value_function,
)

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
N, C = 6, 5
LABELS = torch.tensor([0, 4, 2, 1, 3, 2])
PAY = torch.tensor([0.0, 0.25, 1.0, 0.5, 0.75])


def pay(action):
    return PAY[action]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


MATRIX, BIAS = normal(C, C, seed=1), normal(C, seed=2)


def sampled(noise=None):
    return lambda x, t: sampled_softmax(x, t, MATRIX, BIAS, n_samples=4, noise=noise)


# Every objective as a function of one [N, C], logits or embeddings, and labels.
CASES = {
    "softmax_cross_entropy": softmax_cross_entropy,
    "teacher_student": lambda x, t: teacher_student(x, t, x.flip(1), temperature=2),
    "sampled_softmax": sampled(),
    "sampled_softmax_log_uniform": sampled(LogUniform(C)),
    "sampled_softmax_frequencies": sampled(ClassFrequencies(PAY)),
    "sampled_softmax_categorical": sampled(Categorical(PAY.double())),
    "value_function_greedy": lambda x, t: value_function(x, reward_if_correct(t), epsilon=0),
    "value_function": lambda x, t: value_function(x, pay),
    "value_function_consistent": lambda x, t: value_function(
        x, reward_if_correct(t), consistent=True
    ),
    "policy_gradient": lambda x, t: policy_gradient(x, reward_if_correct(t)),
    "policy_gradient_baseline": lambda x, t: policy_gradient(x, pay, x[:, 0]),
}
DETERMINISTIC = ["softmax_cross_entropy", "teacher_student", "value_function_greedy"]
RANDOM = [name for name in CASES if name not in DETERMINISTIC]
SHARED_NOISE = [name for name in CASES if name.startswith("sampled")]
every_objective = pytest.mark.parametrize("name", CASES)
every_half = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def evaluate(function, x, labels=LABELS, seed=0):
    """Loss, metrics and gradient, after seeding PyTorch's own generator."""
    torch.manual_seed(seed)
    x = x.detach().requires_grad_()
    loss, metrics = function(x, labels)
    return loss.detach(), metrics, torch.autograd.grad(loss, x)[0]


def close(actual, expected, rtol=1e-5, atol=1e-6):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


# Autocast, GradScaler, micro-batches


@every_objective
@every_half
def test_under_autocast_only_the_gradient_is_rounded(name, dtype):
    x, eps = normal(N, C, dtype=dtype), torch.finfo(dtype).eps
    loss, metrics, gradient = evaluate(CASES[name], x.float())
    with torch.autocast("cpu", dtype):
        cast_loss, cast_metrics, cast_gradient = evaluate(CASES[name], x)
    assert cast_gradient.dtype == dtype
    close((cast_loss, cast_metrics), (loss, metrics))
    close(cast_gradient.float(), gradient, rtol=eps, atol=eps)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(C, 8), nn.ReLU(), nn.Linear(8, C))


def cast_loss(name, net, dtype):
    with torch.autocast("cpu", dtype):
        x = net(normal(N, C))
        assert x.dtype == dtype
        torch.manual_seed(1)
        return CASES[name](x, LABELS)[0]


@every_objective
@every_half
def test_a_scaled_step_is_an_unscaled_step(name, dtype):
    """A power of two changes no digit, unless the unscaled gradient is too small for float16."""
    scale, trained = 2.0**10, {}
    for enabled in (False, True):
        net = network()
        sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=enabled)
        scaler.scale(cast_loss(name, net, dtype)).backward()
        gradients = [p.grad.clone() / (scale if enabled else 1) for p in net.parameters()]
        scaler.step(sgd)
        scaler.update()
        assert scaler.get_scale() == (scale if enabled else 1)
        assert all(g.isfinite().all() for g in gradients) and any(g.any() for g in gradients)
        trained[enabled] = gradients, list(net.parameters())
    close(trained[True], trained[False], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("sparse", [False, True])
def test_scaler_takes_the_gradients_of_a_sampled_layer(sparse):
    layer = nn.Linear(C, C)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    sgd = torch.optim.SGD(layer.parameters(), lr=0.1)
    before, weights = layer.weight.detach().clone(), (layer.weight, layer.bias)
    settings = {"sparse": sparse, "generator": torch.Generator().manual_seed(0)}
    loss, _ = sampled_softmax(normal(N, C), LABELS, *weights, **settings)
    expected, _ = torch.autograd.grad(loss, weights, retain_graph=True)
    scaler.scale(loss).backward()
    scaler.step(sgd)
    close(layer.weight.detach(), before - 0.1 * expected.to_dense())


@pytest.mark.parametrize("name", DETERMINISTIC + SHARED_NOISE)
def test_micro_batches_add_up_to_the_batch(name):
    """Weighted by their size; with one seed, each draws the noise classes of the whole."""
    x = normal(N, C)
    loss, metrics, gradient = evaluate(CASES[name], x)
    total, gradients = 0, []
    for part in (slice(0, 1), slice(1, 3), slice(3, 3), slice(3, 6)):
        share = len(x[part]) / N
        part_loss, part_metrics, part_gradient = evaluate(CASES[name], x[part], LABELS[part])
        total = total + share * part_loss
        gradients.append(share * part_gradient)
        metrics = {key: value - share * part_metrics[key] for key, value in metrics.items()}
    close(total, loss)
    close(torch.cat(gradients), gradient)
    assert all(abs(rest) < 1e-6 for rest in metrics.values())


# torch.compile


class Counting:
    """The backend aot_eager, which counts the graphs that it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return lookup_backend("aot_eager")(graph, example_inputs)


def compiled(function):
    torch._dynamo.reset()
    backend = Counting()
    return torch.compile(function, backend=backend, fullgraph=True), backend


@every_objective
def test_compiled_is_eager_in_one_graph(name):
    """Same draws, same results; other values need no other graph."""
    function, backend = compiled(CASES[name])
    for seed in range(4):
        x, labels = normal(N, C, seed=seed), LABELS.roll(seed)
        expected = evaluate(CASES[name], x, labels, seed)
        close(evaluate(function, x, labels, seed), expected)
    assert backend.graphs == 1


@pytest.mark.parametrize("sparse", [False, True])
def test_compiled_layer_has_the_same_gradients(sparse):
    def function(e, weight, bias):
        return sampled_softmax(e, LABELS, weight, bias, n_samples=3, sparse=sparse)[0]

    layer, results = nn.Linear(C, C), []
    for run in (function, compiled(function)[0]):
        torch.manual_seed(0)
        loss = run(normal(N, C), layer.weight, layer.bias)
        gradients = torch.autograd.grad(loss, (layer.weight, layer.bias))
        assert all(gradient.is_sparse == sparse for gradient in gradients)
        results.append((loss, [gradient.to_dense() for gradient in gradients]))
    close(*results)


@every_objective
def test_compiled_empty_batch_has_loss_zero(name):
    function, _ = compiled(CASES[name])
    loss, _, gradient = evaluate(function, normal(0, C), LABELS[:0])
    assert loss == 0 and gradient.shape == (0, C)


# torch.func


@every_objective
def test_functional_gradient_is_that_of_autograd(name):
    x = normal(N, C)
    *_, expected = evaluate(CASES[name], x)
    torch.manual_seed(0)
    close(grad(lambda x: CASES[name](x, LABELS)[0])(x), expected)


def per_image(name, randomness):
    """The gradient of each image's own loss, as torch.func computes it."""

    def one(x, label):
        return CASES[name](x[None], label[None])[0]

    return vmap(grad(one), randomness=randomness)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_gradients_per_image_are_those_of_the_batch(name):
    x = normal(N, C)
    *_, expected = evaluate(CASES[name], x)
    close(per_image(name, "different")(x, LABELS) / N, expected)


@pytest.mark.parametrize("name", SHARED_NOISE)
def test_gradients_per_image_share_their_noise_with_same(name):
    x = normal(N, C)
    *_, expected = evaluate(CASES[name], x)
    torch.manual_seed(0)
    close(per_image(name, "same")(x, LABELS) / N, expected)


@pytest.mark.parametrize("name", RANDOM)
def test_images_draw_for_themselves_with_different(name):
    """Among equal images the gradients vary, and nearly all occur in draws of one image too."""
    x, labels = normal(1, C).expand(100, C), LABELS[:1].expand(100)
    torch.manual_seed(0)
    gradients = per_image(name, "different")(x, labels)
    alone = torch.stack([evaluate(CASES[name], x[:1], labels[:1], s)[2][0] for s in range(300)])
    apart = (gradients[:, None] - alone).abs().amax(2).amin(1)
    assert len(gradients.unique(dim=0)) > 1
    assert (apart < 1e-5).float().mean() > 0.9


@every_objective
def test_batches_can_be_mapped(name):
    """A loss per batch; equal batches differ only in what they draw."""
    x, labels = normal(N, C).expand(8, N, C), LABELS.expand(8, N)
    losses = vmap(lambda x, t: CASES[name](x, t)[0], randomness="different")(x, labels)
    assert losses.shape == (8,) and losses.isfinite().all()
    assert (len(losses.unique()) > 1) == (name in RANDOM)


@pytest.mark.parametrize("name", SHARED_NOISE)
@pytest.mark.skipif(TORCH < (2, 14), reason="torch 2.6 fails, 2.14 does not, between is unknown")
def test_a_mapped_loss_has_a_gradient(name):
    x, labels = normal(4, N, C), torch.stack([LABELS.roll(i) for i in range(4)])
    expected = torch.stack([evaluate(CASES[name], *batch)[2] for batch in zip(x, labels)])

    def total(x):
        return vmap(lambda x, t: CASES[name](x, t)[0], randomness="same")(x, labels).sum()

    torch.manual_seed(0)
    close(grad(total)(x), expected)
