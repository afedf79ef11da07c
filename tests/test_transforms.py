"""The objectives inside what PyTorch wraps around a loss: derivatives of other kinds, autocast, a
gradient scaler, torch.compile, torch.func, devices without float64."""

from functools import partial

import pytest
import torch
from test_objectives import (
    CASES,
    CHOOSERS,
    DONE,
    LABELS,
    LEARNED,
    LEFT_OUT,
    SHARED,
    C,
    N,
    cast,
    changed,
    close,
    evaluate,
    every_chooser,
    every_objective,
    every_supervised,
    function,
    learned,
    normal,
)
from torch._dynamo import lookup_backend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from objectives import ClassFrequencies, LogUniform

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])

NOISES = {"log": LogUniform(C), "frequencies": ClassFrequencies(torch.arange(1, C + 1))}


def of_tensors(name, case, keys):
    """The loss as a function of these arguments alone."""

    def loss(*tensors):
        torch.manual_seed(0)
        return function(name)(**case | dict(zip(keys, tensors)))[0]

    return loss


# Derivatives


# Where p_a is its own propensity; and gradcheck takes no sparse gradient.
UNCHECKED = ["policy_gradient", "policy_gradient baseline", "sampled_softmax sparse"]


@pytest.mark.parametrize("name", [name for name in CASES if name not in UNCHECKED])
def test_first_and_second_derivatives_are_those_of_differences(name):
    """But for a baseline, which is a constant in one term."""
    two = changed(CASES[name], lambda x: x[:2].clone(), SHARED)
    variables = {k: x.requires_grad_() for k, x in learned(two).items() if k != "baseline"}
    loss, tensors = of_tensors(name, two, variables), (*variables.values(),)
    assert torch.autograd.gradcheck(loss, tensors)
    assert torch.autograd.gradgradcheck(loss, tensors)


@every_objective
def test_functional_and_forward_derivatives_are_those_of_autograd(name):
    variables, (*_, grads) = learned(CASES[name]), evaluate(name)
    loss, tensors = of_tensors(name, CASES[name], variables), (*variables.values(),)
    functional = torch.func.grad(loss, tuple(range(len(tensors))))(*tensors)
    close([x.to_dense() for x in functional], [*grads.values()])
    direction = tuple(normal(*x.shape, seed=9) for x in tensors)
    _, slope = torch.func.jvp(loss, tensors, direction)
    close(slope, sum((x * grad).sum() for x, grad in zip(direction, grads.values())))


# Autocast, GradScaler


@every_objective
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_autocast_changes_nothing(name, dtype):
    def run(**arguments):  # the backward pass belongs outside
        with torch.autocast("cpu", torch.bfloat16):
            return function(name)(**arguments)

    arguments = cast(CASES[name], dtype)
    close(evaluate(name, run, **arguments), evaluate(name, **arguments), rtol=0, atol=0)


@every_objective
def test_a_scaled_step_is_an_unscaled_step(name):
    """A power of two changes no digit."""
    arguments, trained = CASES[name], {}
    for enabled in (False, True):
        parameters = {k: torch.nn.Parameter(x.clone()) for k, x in learned(arguments).items()}
        sgd = torch.optim.SGD(parameters.values(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled)
        torch.manual_seed(0)
        scaler.scale(function(name)(**arguments | parameters)[0]).backward()
        scaler.step(sgd)
        trained[enabled] = list(parameters.values())
    assert not any(torch.equal(x, arguments[k]) for k, x in parameters.items())
    close(trained[True], trained[False])


# torch.compile


class Counting:
    """The backend aot_eager, which counts the graphs that it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return lookup_backend("aot_eager")(graph, example_inputs)


def compiled(f):
    torch._dynamo.reset()
    backend = Counting()
    return torch.compile(f, backend=backend, fullgraph=True), backend


SIZES = [N, N, N, 9, 4, 13]  # of the batch; each setting goes with one
NUMBERS = [0.5, 0.3, 0.7, 0.1, 0.2, 0.9]
COUNTS = [4, 5, 7, 3, 9, 8]
SETTINGS = {
    "teacher_student": [{"alpha": x, "temperature": 2 * x} for x in NUMBERS],
    "sampled_softmax": [{"n_samples": n} for n in COUNTS],
    "sampled_softmax sparse": [{"n_samples": n, "noise": NOISES["log"]} for n in COUNTS],
    "policy_gradient": [{"entropy_weight": x} for x in NUMBERS],
}


def repeated(case, n):
    return changed(case, lambda x: x[torch.arange(n) % N], SHARED)


@every_objective
def test_one_graph_serves_all_batch_sizes_and_settings(name):
    """Without a break: static first, then dynamic in the setting, then in the size."""
    run, backend = compiled(function(name))
    for n, settings in zip(SIZES, SETTINGS.get(name, SETTINGS.get(name.split()[0], [{}] * 6))):
        arguments = repeated(CASES[name], n) | settings
        if "labels" in arguments:
            arguments["labels"][:2] = -100
        close(evaluate(name, run, **arguments), evaluate(name, **arguments))
    assert backend.graphs <= (3 if TORCH >= (2, 14) else 1 + len(SIZES))
    assert evaluate(name, run, **repeated(CASES[name], 0))[0] == 0


def draw(noise, n):
    ids = noise.sample((n, 2))
    return ids, noise.log_prob(ids)


@pytest.mark.parametrize("name", [*CHOOSERS, *NOISES])
def test_one_graph_chooses_and_draws_for_all_batch_sizes_and_settings(name):
    f = CHOOSERS[name] if name in CHOOSERS else partial(draw, NOISES[name])
    run, backend = compiled(f)
    for n, epsilon in zip(SIZES, NUMBERS):
        arguments = [repeated(DONE, n)["logits"]] if name in CHOOSERS else [n]
        arguments += [epsilon] * (name == "epsilon_greedy")
        results = []
        for each in (f, run):
            torch.manual_seed(0)
            results.append(each(*arguments))
        close(*results)
    assert backend.graphs <= 3


# vmap


def of_each_example(name, randomness="error", **arguments):
    """The gradient of each example's own loss, as torch.func computes it, by argument."""
    arguments = changed(CASES[name], torch.clone) | arguments
    rows = {k: x for k, x in arguments.items() if isinstance(x, torch.Tensor) and k not in SHARED}
    variables = {key: rows.pop(key) for key in LEARNED if key in rows}

    def loss(variables, rows):
        return function(name)(**arguments | variables | rows)[0]

    torch.manual_seed(0)
    return torch.vmap(torch.func.grad(loss), randomness=randomness)(variables, rows)


@every_objective
def test_gradients_per_example_are_those_of_the_batch(name):
    """With "same", the noise classes are shared as in a batch. A label of -100, which is not
    checked here, has none."""
    for left_out in (LEFT_OUT & False, LEFT_OUT):
        labels = {"labels": LABELS.masked_fill(left_out, -100)} if "labels" in CASES[name] else {}
        n = (~left_out).sum() if labels else N
        *_, grads = evaluate(name, **labels)
        for key, each in of_each_example(name, "same", **labels).items():
            close(each / n, grads[key])


@every_supervised
def test_batches_can_be_mapped(name):
    """One loss for each of two batches, which leave out another number of examples."""
    labels = torch.stack([LABELS, LABELS.masked_fill(LEFT_OUT, -100)])

    def loss(t):
        return function(name)(**CASES[name] | {"labels": t})[0]

    torch.manual_seed(0)
    losses = torch.vmap(loss, randomness="same")(labels)
    close(losses, torch.stack([evaluate(name, labels=t)[0] for t in labels]))


def test_examples_draw_for_themselves_with_different():
    """Equal examples of one noise class each: every class but the label is among them."""
    rows = repeated(CASES["sampled_softmax"] | {"embeddings": normal(1, 4).expand(N, 4)}, 100)
    rows["labels"] = torch.zeros(100, dtype=torch.int64)
    grads = of_each_example("sampled_softmax", "different", **rows | {"n_samples": 1})
    assert len(grads["embeddings"].unique(dim=0)) == C


@every_chooser
def test_choices_can_be_mapped(choose):
    torch.manual_seed(0)
    actions = torch.vmap(choose, randomness="different")(torch.zeros(100, C))
    assert actions.shape == (100,) and len(actions.unique()) == C


# Devices without float64


class NoFloat64(TorchDispatchMode):
    """Refuses what Apple's GPUs refuse."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, out)):
            assert getattr(x, "dtype", x) != torch.float64, f"{func} in float64"
        return out


@every_objective
def test_float32_makes_no_float64(name):
    arguments = cast(CASES[name], torch.float32)
    with NoFloat64():
        evaluate(name, **arguments)
        for choose in CHOOSERS.values():
            choose(torch.zeros(N, C))


@pytest.mark.parametrize(
    "make",
    [
        lambda: LogUniform(5, device="mps"),
        lambda: ClassFrequencies(torch.ones(5, device="mps")),
        lambda: ClassFrequencies(torch.ones(5, device="mps", dtype=torch.int64)),
    ],
)
def test_noise_on_apples_gpus_makes_no_float64(make):
    """On a fake one, which computes shapes and types alone."""
    with NoFloat64(), FakeTensorMode():
        noise = make()
        ids = noise.sample((3, 4))
        log_p = noise.log_prob(ids)
    assert ids.device.type == log_p.device.type == "mps" and ids.shape == log_p.shape == (3, 4)
    assert ids.dtype == torch.int64 and log_p.dtype == torch.float32
