"""What holds for every objective: precision, reductions, examples left out, masks, and what
PyTorch wraps around a loss: derivatives, autocast, torch.func, torch.compile, devices."""

import math
from functools import partial

import pytest
import torch
from helpers import (
    CASES,
    FLOATS,
    LABELS,
    SHARED,
    C,
    N,
    cast,
    changed,
    close,
    evaluate,
    function,
    ids_of,
    is_zero,
    learned,
    normal,
)
from torch._dynamo import lookup_backend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import objectives
from objectives import ClassFrequencies, LogUniform, entropy, epsilon_greedy, sample_actions

INF, NAN = math.inf, math.nan
LEFT_OUT = torch.tensor([False, True, False, False, True, False])
every_objective = pytest.mark.parametrize("name", CASES)


@every_objective
def test_metrics_are_detached_scalars(name):
    names = {
        "softmax_cross_entropy": ["accuracy"],
        "teacher_student": ["accuracy", "agreement"],
        "sampled_softmax": ["kept"],
        "sampled_softmax sparse": ["kept"],
        "value_function": ["reward"],
        "value_function normalized": ["reward"],
        "policy_gradient": ["advantage"],
        "policy_gradient log": ["advantage", "weight", "effective"],
    }
    metrics = function(name)(**CASES[name])[1]
    assert list(metrics) == names[name]
    for value in metrics.values():
        assert value.shape == () and value.is_floating_point() and not value.requires_grad


@every_objective
@pytest.mark.parametrize("dtype", FLOATS)
def test_arithmetic_is_at_least_float32_under_autocast_too(name, dtype):
    """Only the gradients of the inputs are rounded to the inputs' type."""

    def run(**arguments):
        with torch.autocast("cpu", torch.bfloat16):
            return function(name)(**arguments)

    narrow = cast(CASES[name], dtype)
    wide_dtype = torch.promote_types(dtype, torch.float32)
    loss, metrics, grads = evaluate(name, run, **narrow)
    wide_loss, wide_metrics, wide_grads = evaluate(name, **cast(narrow, wide_dtype))
    assert loss.dtype == wide_dtype
    close((loss, metrics), (wide_loss, wide_metrics), rtol=1e-6, atol=1e-6)
    eps = torch.finfo(dtype).eps
    for key, grad in grads.items():
        assert grad.dtype == dtype
        close(grad.to(wide_dtype), wide_grads[key], rtol=eps, atol=eps)


@every_objective
def test_float64_comes_from_logits_teachers_embeddings_and_weights_alone(name):
    """As the docstring of the module says."""
    narrow = cast(CASES[name], torch.float32)
    for key, x in narrow.items():
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            wide = key in ["logits", "teacher_logits", "embeddings", "weight"]
            loss, *_ = evaluate(name, **{**narrow, key: x.double()})
            assert loss.dtype == (torch.float64 if wide else torch.float32)


@every_objective
@pytest.mark.parametrize("default", FLOATS)
def test_types_of_loss_and_metrics_do_not_depend_on_the_default(name, default):
    narrow = cast(CASES[name], torch.float32)
    expected = evaluate(name, **narrow)
    torch.set_default_dtype(default)
    try:
        loss, metrics, grads = evaluate(name, **narrow)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {x.dtype for x in (loss, *metrics.values(), *grads.values())} == {torch.float32}
    close((loss, metrics, grads), expected, rtol=1e-6, atol=1e-6)


@every_objective
def test_reductions_are_the_losses_their_sum_and_their_mean(name):
    ids = {ids_of(name): LABELS.masked_fill(LEFT_OUT, -100)}
    losses, metrics, _ = evaluate(name, reduction="none", **ids)
    assert losses.shape == (N,) and is_zero(losses[LEFT_OUT])
    total, sum_metrics, grads = evaluate(name, reduction="sum", **ids)
    mean, mean_metrics, mean_grads = evaluate(name, reduction="mean", **ids)
    close((total, mean), (losses.sum(), losses[~LEFT_OUT].mean()))
    assert metrics == sum_metrics == mean_metrics
    for key, grad in grads.items():
        close(grad, 4 * mean_grads[key])
    with pytest.raises(ValueError, match="^reduction must be .* got 'average'"):
        evaluate(name, reduction="average")


@every_objective
def test_minus_100_leaves_its_example_out(name):
    ids = {ids_of(name): LABELS.masked_fill(LEFT_OUT, -100)}
    loss, metrics, grads = evaluate(name, **ids)
    kept = changed(CASES[name], lambda x: x[~LEFT_OUT], SHARED)
    expected, expected_metrics, expected_grads = evaluate(name, **kept)
    close((loss, metrics), (expected, expected_metrics))
    for key, grad in grads.items():
        if key in SHARED:
            close(grad, expected_grads[key])
        else:
            close(grad[~LEFT_OUT], expected_grads[key])
            assert is_zero(grad[LEFT_OUT])


@pytest.mark.parametrize("name", [name for name in CASES if ids_of(name) == "actions"])
@pytest.mark.parametrize("padding", [NAN, INF, -INF, -1.0, 0.0, 7.0])
@pytest.mark.parametrize("checked", [True, False], ids=["checked", "as on a GPU"])
def test_what_a_left_out_example_was_paid_is_ignored(name, padding, checked, monkeypatch):
    if not checked:
        monkeypatch.setattr(objectives, "_check_values", lambda *_: None)
    ids = {"actions": LABELS.masked_fill(LEFT_OUT, -100)}
    padded = {}
    for key in {"rewards", "advantages", "propensities"} & {*CASES[name]}:
        padded[key] = CASES[name][key].masked_fill(LEFT_OUT, padding)
    close(evaluate(name, **ids, **padded), evaluate(name, **ids))


@pytest.mark.parametrize("name", [name for name in CASES if "logits" in CASES[name]])
@pytest.mark.parametrize("padding", [NAN, INF, -INF])
def test_logits_of_left_out_examples_spoil_no_more_than_their_own_gradient(name, padding):
    ids = {ids_of(name): LABELS.masked_fill(LEFT_OUT, -100)}
    logits = CASES[name]["logits"].masked_fill(LEFT_OUT[:, None], padding)
    loss, metrics, grads = evaluate(name, logits=logits, **ids)
    expected, expected_metrics, expected_grads = evaluate(name, **ids)
    close((loss, metrics), (expected, expected_metrics))
    close(grads["logits"][~LEFT_OUT], expected_grads["logits"][~LEFT_OUT])


@every_objective
@pytest.mark.parametrize("n", [0, N])
def test_loss_and_gradient_of_no_example_are_zero(name, n):
    none = changed(CASES[name], lambda x: x[:n], SHARED)
    none[ids_of(name)] = torch.full((n,), -100)
    loss, _, grads = evaluate(name, **none)
    assert loss == 0 and all(is_zero(grad) for grad in grads.values())


@every_objective
@pytest.mark.parametrize("shape", [(), (2, 3), (3, 1, 2)])
def test_leading_dimensions_are_those_of_a_flattened_batch(name, shape):
    flat = changed(CASES[name], lambda x: x[: math.prod(shape)], SHARED)
    shaped = changed(flat, lambda x: x.reshape((*shape, *x.shape[1:])), SHARED)
    losses, metrics, grads = evaluate(name, reduction="none", **flat)
    other_losses, other_metrics, other_grads = evaluate(name, reduction="none", **shaped)
    assert other_losses.shape == shape
    close((other_losses.flatten(), other_metrics), (losses, metrics))
    for key, grad in other_grads.items():
        close(grad, grads[key].reshape(shaped[key].shape))


@every_objective
def test_no_gradient_reaches_teachers_rewards_and_propensities(name):
    arguments = changed(CASES[name], torch.clone)
    for key in {"teacher_logits", "rewards", "advantages", "propensities"} & {*arguments}:
        arguments[key].requires_grad_()
    assert not function(name)(**arguments)[0].requires_grad


# Masks, and other scores that are not finite


@every_objective
def test_a_masked_class_is_removed(name):
    """Class 1 at -inf, or taken away: the same loss; its gradient is 0."""
    ids = {ids_of(name): LABELS.where(LABELS != 1, 0)}
    keep = torch.tensor([0, 2, 3, 4])
    masked, removed = {}, {}
    for key in {"logits", "teacher_logits", "bias"} & {*CASES[name]}:
        masked[key] = CASES[name][key].index_fill(-1, torch.tensor(1), -INF)
        removed[key] = CASES[name][key][..., keep]
    loss, _, grads = evaluate(name, **ids, **masked)
    assert loss.isfinite() and all(grad.isfinite().all() for grad in grads.values())
    assert all(is_zero(grads[key][..., 1]) for key in masked if key in grads)
    if "sampled" not in name:  # whose noise would be over four classes
        fewer = {key: (t - 1).clamp(min=0) for key, t in ids.items()}
        expected, _, expected_grads = evaluate(name, **fewer, **removed)
        close(loss, expected)
        close(grads["logits"][..., keep], expected_grads["logits"])


def test_masks_of_student_and_teacher_may_differ():
    """A class masked for the student does not exist; one masked for the teacher has target 0."""
    name = "teacher_student"
    x, teacher = CASES[name]["logits"].clone(), CASES[name]["teacher_logits"].clone()
    x[0, 2] = -INF
    teacher[1, 1] = -INF
    _, _, grads = evaluate(name, logits=x, teacher_logits=teacher, temperature=1.0, alpha=0.5)
    teacher[0, 2] = -INF
    labels = torch.nn.functional.one_hot(LABELS, C)
    close(grads["logits"], (x.softmax(1) - (teacher.softmax(1) + labels) / 2) / N)


@every_objective
def test_a_masked_class_is_refused_as_label_or_action(name):
    key = "bias" if "sampled" in name else "logits"
    masked = CASES[name][key].index_fill(-1, torch.tensor(1), -INF)
    with pytest.raises(ValueError, match=f"^{ids_of(name)} must be .* not masked, got 1"):
        evaluate(name, **{key: masked})


@every_objective
@pytest.mark.parametrize("bad", [INF, NAN])
def test_a_score_that_is_not_finite_is_seen_in_the_loss_that_reads_it(name, bad):
    """Each in turn, so that a GradScaler skips the step. value_function reads x_a alone."""
    for key in {"logits", "teacher_logits", "embeddings"} & {*CASES[name]}:
        for place in range(CASES[name][key].numel()):
            row, column = divmod(place, CASES[name][key].shape[-1])
            if name != "value_function" or LABELS[row] == column:
                scores = CASES[name][key].clone()
                scores[row, column] = bad
                assert not evaluate(name, **{key: scores})[0].isfinite()


@pytest.mark.parametrize("name", [name for name in CASES if name != "value_function"])
def test_a_single_class_teaches_nothing(name):
    """Its softmax is 1 whatever the logit."""
    one = {key: CASES[name][key][..., :1] for key in {"logits", "bias"} & {*CASES[name]}}
    if "teacher_logits" in CASES[name]:
        one["teacher_logits"] = CASES[name]["teacher_logits"][:, :1]
    if "weight" in CASES[name]:
        one["weight"] = CASES[name]["weight"][:1]
    if "rewards" in CASES[name]:
        one["rewards"] = torch.ones(N)
    loss, _, grads = evaluate(name, **one, **{ids_of(name): 0 * LABELS})
    assert loss.isfinite() and all(is_zero(grad) for grad in grads.values())


# Derivatives


def of_tensors(name, case, keys):
    """The loss as a function of these arguments alone."""

    def loss(*tensors):
        torch.manual_seed(0)
        return function(name)(**{**case, **dict(zip(keys, tensors))})[0]

    return loss


@pytest.mark.parametrize("name", [name for name in CASES if "sparse" not in name])
def test_first_and_second_derivatives_are_those_of_differences(name):
    two = changed(CASES[name], lambda x: x[:2].clone(), SHARED)
    variables = {key: x.requires_grad_() for key, x in learned(two).items()}
    loss = of_tensors(name, two, variables)
    assert torch.autograd.gradcheck(loss, tuple(variables.values()))
    assert torch.autograd.gradgradcheck(loss, tuple(variables.values()))


@every_objective
def test_gradients_per_example_are_those_of_the_batch(name):
    """By torch.func. With randomness "same", noise classes are shared as in a batch."""
    case = {**CASES[name], ids_of(name): LABELS.masked_fill(LEFT_OUT, -100)}
    rows = {k: x for k, x in case.items() if isinstance(x, torch.Tensor) and k not in SHARED}
    variables = {key: rows.pop(key) for key in ["logits", "embeddings"] if key in rows}

    def loss(variables, rows):
        return function(name)(**{**case, **variables, **rows})[0]

    torch.manual_seed(0)
    each = torch.vmap(torch.func.grad(loss), randomness="same")(variables, rows)
    _, _, grads = evaluate(name, **case)
    for key, grad in each.items():
        close(grad / 4, grads[key])


def test_noise_and_actions_can_be_drawn_for_each_example():
    case = changed(CASES["sampled_softmax"], lambda x: x[:1].expand(100, *x.shape[1:]), SHARED)

    def loss(e, t):
        settings = {**case, "embeddings": e, "labels": t, "n_samples": 1}
        return function("sampled_softmax")(**settings)[0]

    torch.manual_seed(0)
    losses = torch.vmap(loss, randomness="different")(case["embeddings"], case["labels"])
    assert len(losses.unique()) == C  # each class but the label, and none
    for choose in (partial(epsilon_greedy, epsilon=1.0), sample_actions):
        actions = torch.vmap(choose, randomness="different")(torch.zeros(100, C))
        assert len(actions.unique()) == C


# torch.compile


SIZES = [N, N, 9, 4, 13]  # of the batch; each setting goes with one
SETTINGS = {
    "teacher_student": [{"alpha": x, "temperature": 2 * x} for x in (0.5, 0.3, 0.7, 0.1, 0.9)],
    "sampled_softmax": [{"n_samples": n} for n in (4, 5, 7, 3, 9)],
    "sampled_softmax sparse": [{"n_samples": n, "noise": LogUniform(C)} for n in (4, 5, 7, 3, 9)],
}


def compiled(f):
    """The function and a list with an entry for each of its graphs."""
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, example_inputs)

    torch._dynamo.reset()
    return torch.compile(f, backend=backend, fullgraph=True), graphs


@every_objective
def test_one_graph_serves_all_batch_sizes_and_settings(name):
    """Without a break: static first, then dynamic in the setting, then in the size."""
    run, graphs = compiled(function(name))
    for n, settings in zip(SIZES, SETTINGS.get(name, 5 * [{}])):
        arguments = changed(CASES[name], lambda x, n=n: x[torch.arange(n) % N], SHARED)
        arguments[ids_of(name)][:2] = -100
        case = {**arguments, **settings}
        close(evaluate(name, run, **case), evaluate(name, **case))
    newest = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)
    assert len(graphs) <= (3 if newest else 1 + len(SIZES))  # before: one for each float


def draw(noise, x):
    ids = noise.sample(x.shape)
    return ids, noise.log_prob(ids)


OTHERS = {
    "entropy": entropy,
    "epsilon_greedy": epsilon_greedy,
    "sample_actions": sample_actions,
    "LogUniform": partial(draw, LogUniform(C)),
    "ClassFrequencies": partial(draw, ClassFrequencies(torch.arange(1, C + 1))),
}


@pytest.mark.parametrize("name", OTHERS)
def test_one_graph_chooses_and_draws_for_all_batch_sizes(name):
    run, graphs = compiled(OTHERS[name])
    for n in SIZES:
        results = []
        for each in (OTHERS[name], run):
            torch.manual_seed(0)
            results.append(each(normal(n, C)))
        close(*results)
    assert len(graphs) <= 2


# Devices


class OnAGpu(TorchDispatchMode):
    """Refuses float64 and take, which Apple's GPUs lack (take in old versions), and to read a
    value, for which all GPUs wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("take", "_local_scalar_dense", "nonzero", "equal")
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, out)):
            assert getattr(x, "dtype", None) != torch.float64, f"{func} in float64"
        return out


@pytest.mark.parametrize("name", [*CASES, "entropy", "epsilon_greedy", "sample_actions"])
def test_float32_makes_no_float64_and_nothing_but_checks_reads_values(name, monkeypatch):
    monkeypatch.setattr(objectives, "_check_values", lambda *_: None)
    monkeypatch.setattr(objectives, "_widest", lambda device: torch.float32)  # as on Apple's GPUs
    arguments = cast(CASES.get(name, {}), torch.float32)
    with OnAGpu():
        if name in CASES:
            evaluate(name, **arguments)
        else:
            OTHERS[name](torch.zeros(N, C))


def test_checks_read_values_on_the_cpu_alone():
    objectives._check_values("x", torch.zeros(2), torch.zeros(2, device="meta") > 0, "read")
    with pytest.raises(ValueError, match="^x must be read, got 0"):
        objectives._check_values("x", torch.zeros(2), torch.zeros(2) > 0, "read")


@pytest.mark.parametrize(
    "make",
    [lambda: LogUniform(C, device="mps"), lambda: ClassFrequencies(torch.ones(C, device="mps"))],
)
def test_noise_on_apples_gpus_makes_no_float64(make):
    """On a fake one, which computes shapes and types alone."""
    with OnAGpu(), FakeTensorMode():
        ids, log_q = draw(make(), torch.zeros(3, 4))
    assert ids.device.type == log_q.device.type == "mps" and ids.shape == log_q.shape == (3, 4)
    assert ids.dtype == torch.int64 and log_q.dtype == torch.float32
