"""Every objective against an independent reference: a closed form written here, PyTorch's own
function, or the exact sum over all actions. All but a few lines are in float64."""

import doctest
import math
import re

import pytest
import torch
from torch.distributions import Categorical
from torch.nn.functional import binary_cross_entropy, cross_entropy

import objectives
from objectives import (
    ClassFrequencies,
    LogUniform,
    epsilon_greedy,
    policy_gradient,
    sample_actions,
    sampled_softmax,
    softmax_cross_entropy,
    teacher_student,
    value_function,
)

N, C, D = 6, 5, 4
INF, NAN = math.inf, math.nan
LABELS = torch.tensor([0, 4, 2, 1, 3, 2])  # every class is there
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
EYE = torch.eye(C).double()


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# A call of every objective, by name. Rewards and propensities are exact in every floating type.
TOLD = {"logits": normal(N, C), "labels": LABELS}
DONE = {"logits": normal(N, C), "actions": LABELS}
DONE |= {"rewards": torch.tensor([0, 0.25, 1, 0.5, 0.75, 1]).double()}
BASELINE = {"baseline": normal(N, seed=1)}
LOG = {"propensities": torch.tensor([0.5, 0.125, 0.25, 1, 0.5, 0.0625]).double()}
TEACHER = {"teacher_logits": normal(N, C, seed=1), "alpha": 0.3, "temperature": 2.0}
LAYER = {"weight": normal(C, D, seed=1), "bias": normal(C, seed=2), "n_samples": 4}
SAMPLED = {"embeddings": normal(N, D), "labels": LABELS} | LAYER
CASES = {
    "softmax_cross_entropy": TOLD,
    "teacher_student": TOLD | TEACHER,
    "sampled_softmax": SAMPLED,
    "sampled_softmax sparse": SAMPLED | {"sparse": True},
    "value_function": DONE,
    "value_function consistent": DONE | {"consistent": True},
    "policy_gradient": DONE | {"entropy_weight": 0.3},
    "policy_gradient baseline": DONE | BASELINE | {"entropy_weight": 0.3},
    "policy_gradient log": DONE | BASELINE | LOG | {"entropy_weight": 0.3},
}
SUPERVISED, BANDITS = list(CASES)[:4], list(CASES)[4:]
SHARED = ["weight", "bias"]  # have no rows of single examples
LEARNED = ["logits", "embeddings", "weight", "bias", "baseline"]
every_objective = pytest.mark.parametrize("name", CASES)
every_supervised = pytest.mark.parametrize("name", SUPERVISED)
every_bandit = pytest.mark.parametrize("name", BANDITS)


def function(name):
    return getattr(objectives, name.split()[0])


def learned(arguments):
    return {key: arguments[key] for key in LEARNED if arguments.get(key) is not None}


def changed(arguments, change, but=()):
    """The arguments, changed where they are tensors, but for some."""
    tensors = {key: x for key, x in arguments.items() if isinstance(x, torch.Tensor)}
    return arguments | {key: change(x) for key, x in tensors.items() if key not in but}


def cast(arguments, dtype):
    return changed(arguments, lambda x: x.to(dtype) if x.is_floating_point() else x)


def gradients(loss, *tensors):
    """The gradients, 0 for a tensor without one."""
    return torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)


def evaluate(name, run=None, seed=0, **arguments):
    """The loss, the metrics, and the gradients by argument, after seeding PyTorch's generator."""
    arguments = CASES[name] | arguments
    variables = {key: x.detach().requires_grad_() for key, x in learned(arguments).items()}
    torch.manual_seed(seed)
    loss, metrics = (run or function(name))(**arguments | variables)
    grads = gradients(loss, *variables.values())
    grads = [x.to_dense() if x.device.type == "cpu" else x for x in grads]
    return loss.detach(), metrics, dict(zip(variables, grads))


def close(actual, expected, rtol=1e-12, atol=1e-14):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def is_zero(tensor):
    return torch.equal(tensor, torch.zeros_like(tensor))


# All objectives


@every_objective
def test_metrics_are_detached_scalars(name):
    _, metrics, _ = evaluate(name)
    names = {
        "softmax_cross_entropy": "accuracy",
        "teacher_student": "accuracy agreement",
        "sampled_softmax": "kept",
        "value_function": "reward",
        "policy_gradient": "reward entropy",
    }[name.split()[0]]
    names += " weight" * ("propensities" in CASES[name])
    names += " baseline baseline_loss" * ("baseline" in CASES[name])
    assert " ".join(metrics) == names
    for value in metrics.values():
        assert value.shape == () and not value.requires_grad and value.is_floating_point()


@every_objective
@pytest.mark.parametrize("dtype", FLOATS)
def test_arithmetic_is_at_least_float32(name, dtype):
    """Only the gradients on the inputs are rounded to the type of the inputs."""
    narrow, wide_dtype = cast(CASES[name], dtype), torch.promote_types(dtype, torch.float32)
    loss, metrics, grads = evaluate(name, **narrow)
    wide_loss, wide_metrics, wide_grads = evaluate(name, **cast(narrow, wide_dtype))
    assert loss.dtype == wide_dtype
    close((loss, metrics), (wide_loss, wide_metrics), rtol=1e-6, atol=1e-6)
    eps = torch.finfo(dtype).eps
    for key, grad in grads.items():
        assert grad.dtype == dtype
        close(grad.to(wide_dtype), wide_grads[key], rtol=eps, atol=eps)


@every_objective
def test_empty_batch_has_loss_zero(name):
    loss, metrics, grads = evaluate(name, **changed(CASES[name], lambda x: x[:0], SHARED))
    assert loss == 0 and all(value == 0 for value in metrics.values())
    assert all(is_zero(grad) for grad in grads.values())


@every_objective
@pytest.mark.parametrize("shape", [(), (1, 6), (2, 3), (3, 1, 2)])
def test_leading_dimensions_are_those_of_a_flattened_batch(name, shape):
    flat = changed(CASES[name], lambda x: x[: math.prod(shape)], SHARED)
    shaped = changed(flat, lambda x: x.reshape((*shape, *x.shape[1:])), SHARED)
    loss, metrics, grads = evaluate(name, **flat)
    other_loss, other_metrics, other_grads = evaluate(name, **shaped)
    close((other_loss, other_metrics), (loss, metrics))
    for key, grad in other_grads.items():
        close(grad, grads[key].reshape(shaped[key].shape))


@every_objective
def test_inputs_are_not_modified(name):
    copies = changed(CASES[name], torch.clone)
    evaluate(name, **copies)
    tensors = {key: x for key, x in copies.items() if torch.is_tensor(x)}
    assert {*learned(copies)} < {*tensors}
    assert all(torch.equal(x, CASES[name][key]) for key, x in tensors.items())


@every_objective
def test_no_gradient_reaches_teachers_rewards_and_propensities(name):
    arguments = changed(CASES[name], torch.clone)
    for key in {"teacher_logits", "rewards", "propensities"} & arguments.keys():
        arguments[key].requires_grad_()
    arguments.pop("baseline", None)
    assert not function(name)(**arguments)[0].requires_grad


@every_objective
def test_a_masked_class_is_removed(name):
    """Class 1 at -inf, or taken away: the same loss; its gradient is 0."""
    ids = {"labels", "actions"} & CASES[name].keys()
    others = {"logits", "teacher_logits", "bias"} & CASES[name].keys()
    arguments = {key: LABELS.where(LABELS != 1, 0) for key in ids}
    keep, removed = torch.tensor([0, 2, 3, 4]), {}
    for key in others:
        x = CASES[name][key].clone()
        removed[key], arguments[key] = x[..., keep], x.index_fill(-1, torch.tensor(1), -INF)
    loss, _, grads = evaluate(name, **arguments)
    assert loss.isfinite() and all(grad.isfinite().all() for grad in grads.values())
    assert all(is_zero(grads[key][..., 1]) for key in others & grads.keys())
    if "sampled" not in name:  # there the noise is drawn from four classes then
        removed |= {key: (x - 1).clamp(min=0) for key, x in arguments.items() if key in ids}
        expected, _, expected_grads = evaluate(name, **removed)
        close(loss, expected)
        close(grads["logits"][..., keep], expected_grads["logits"])


@pytest.mark.parametrize("name", [name for name in CASES if name != "value_function"])
@pytest.mark.parametrize("r", [0.0, 1.0])
def test_single_class_teaches_nothing(name, r):
    """Its softmax is 1 whatever the logit."""
    keys = {"logits", "teacher_logits", "bias"} & CASES[name].keys()
    one = {key: CASES[name][key][..., :1] for key in keys}
    one |= {key: 0 * LABELS for key in ("labels", "actions") if key in CASES[name]}
    one |= {"rewards": torch.full((N,), r)} if name in BANDITS else {}
    one |= {"weight": LAYER["weight"][:1]} if "sampled" in name else {}
    loss, _, grads = evaluate(name, **one)
    assert loss.isfinite() and all(is_zero(grads[key]) for key in grads if key != "baseline")


@every_objective
def test_shapes_can_be_tried_on_the_meta_device(name):
    loss, metrics, grads = evaluate(name, **changed(CASES[name], lambda x: x.to("meta")))
    assert all(value.is_meta and value.shape == () for value in (loss, *metrics.values()))
    for key, grad in grads.items():
        assert grad.is_meta and grad.shape == CASES[name][key].shape


SCORES = [
    (name, key, bad)
    for name, case in CASES.items()
    for key in ("logits", "teacher_logits", "embeddings", "bias", "baseline")
    for bad in (INF, NAN, -INF)
    if key in case and (bad != -INF or key in ("embeddings", "baseline"))  # the others' mask
]


@pytest.mark.parametrize(("name", "key", "bad"), SCORES)
def test_an_overflow_anywhere_is_seen_by_loss_and_scaler(name, key, bad):
    """Of each score in turn. The scaler skips the step, which leaves the parameters alone."""
    for place in range(CASES[name][key].numel()):
        arguments = changed(CASES[name], torch.clone)
        arguments[key].view(-1)[place] = bad
        parameters = {k: torch.nn.Parameter(x.clone()) for k, x in learned(arguments).items()}
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        loss, _ = function(name)(**arguments | parameters)
        assert not loss.isfinite()
        scaler.scale(loss).backward()
        scaler.step(torch.optim.SGD(parameters.values(), lr=0.1))
        scaler.update()
        assert scaler.get_scale() == 2.0**9
        for k, x in parameters.items():
            torch.testing.assert_close(x.detach(), arguments[k], rtol=0, atol=0, equal_nan=True)


# Supervised: a label of -100


LEFT_OUT = torch.tensor([False, True, False, False, True, False])


@every_supervised
def test_label_minus_100_leaves_its_example_out(name):
    loss, metrics, grads = evaluate(name, labels=LABELS.masked_fill(LEFT_OUT, -100))
    left = changed(CASES[name], lambda x: x[~LEFT_OUT], SHARED)
    expected, expected_metrics, expected_grads = evaluate(name, **left)
    close((loss, metrics), (expected, expected_metrics))
    for key, grad in grads.items():
        if key not in SHARED:
            assert is_zero(grad[LEFT_OUT])
            grad = grad[~LEFT_OUT]
        close(grad, expected_grads[key])


@every_supervised
def test_nothing_but_labels_minus_100_has_loss_and_gradient_zero(name):
    loss, metrics, grads = evaluate(name, labels=torch.full((N,), -100))
    assert loss == 0 and all(value == 0 for value in metrics.values())
    assert all(is_zero(grad) for grad in grads.values())


# softmax_cross_entropy


@pytest.mark.parametrize("labels", [LABELS, LABELS.masked_fill(LEFT_OUT, -100)])
def test_softmax_cross_entropy_is_that_of_pytorch(labels):
    loss, _, grads = evaluate("softmax_cross_entropy", labels=labels)
    x = TOLD["logits"].clone().requires_grad_()
    expected = cross_entropy(x, labels)
    close((loss, grads["logits"]), (expected.detach(), *gradients(expected, x)))


# teacher_student


@pytest.mark.parametrize("alpha", [0, 0.3, 1])
def test_gradient_is_p_minus_target(alpha):
    _, _, grads = evaluate("teacher_student", alpha=alpha, temperature=1)
    target = alpha * TEACHER["teacher_logits"].softmax(1) + (1 - alpha) * EYE[LABELS]
    close(grads["logits"], (TOLD["logits"].softmax(1) - target) / N)


@pytest.mark.parametrize("alpha", [0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1, 4.0])
def test_loss_is_the_weighted_sum_of_two_cross_entropies(alpha, temperature):
    loss, *_ = evaluate("teacher_student", alpha=alpha, temperature=temperature)
    x, teacher = TOLD["logits"], TEACHER["teacher_logits"]
    from_teacher = cross_entropy(x / temperature, (teacher / temperature).softmax(1))
    from_labels = cross_entropy(x, LABELS)
    close(loss, alpha * temperature**2 * from_teacher + (1 - alpha) * from_labels)


@pytest.mark.parametrize("temperature", [1e-300, 1e-3, 3.0, 1e3])
def test_extreme_temperatures_and_masks_stay_finite(temperature):
    """Also where the teacher prefers a class that the student masks."""
    x = torch.tensor([[0.0, 1.0, -INF], [1e30, 0.0, -INF]], requires_grad=True)
    teacher = torch.tensor([[0.0, -INF, 2.0], [-1e30, 0.0, 1e30]])
    settings = {"alpha": 0.5, "temperature": temperature}
    loss, _ = teacher_student(x, torch.tensor([0, 1]), teacher, **settings)
    (grad,) = gradients(loss, x)
    assert loss.isfinite() and grad.isfinite().all() and is_zero(grad[:, 2])


def test_accuracy_and_agreement_count_highest_logits():
    x, labels = torch.eye(4), torch.tensor([0, 1, 0, 0])
    assert softmax_cross_entropy(x, labels)[1]["accuracy"] == 0.5
    _, metrics = teacher_student(x, labels, x[[0, 1, 3, 3]])
    assert metrics["agreement"] == 0.75 and metrics["accuracy"] == 0.5
    near, label = torch.tensor([[0.0, 1e-9, -1.0]]), torch.tensor([1])
    assert softmax_cross_entropy(near, label)[1]["accuracy"] == 1
    assert all(value == 1 for value in teacher_student(near, label, near)[1].values())


# Both bandits, on one row of logits: each action's loss and its gradient


ROW = torch.tensor([0.3, -0.8, 0.1, 1.2, -0.2], dtype=torch.float64)
PAY = torch.tensor([0.0, 0.25, 1.0, 0.5, 0.75], dtype=torch.float64)
P, H = ROW.softmax(0), Categorical(logits=ROW).entropy()


def of_each_action(name, **settings):
    """The losses [C] and the gradients [C, C] of taking each action at ROW."""
    rows = {"actions": torch.arange(C), "rewards": PAY} | settings
    each = [{key: x[a] for key, x in rows.items()} for a in range(C)]
    results = [evaluate(name, logits=ROW, **one) for one in each]
    return (
        torch.stack([loss for loss, _, _ in results]),
        torch.stack([grads["logits"] for *_, grads in results]),
    )


def test_values_are_learned_by_binary_cross_entropy_of_a_sigmoid():
    losses, slopes = of_each_action("value_function")
    v = 1 / (1 + (-ROW).exp())
    close(losses, -PAY * v.log() - (1 - PAY) * (1 - v).log())
    close(slopes, EYE * (v - PAY))  # of the action taken alone


def test_consistent_values_are_learned_by_binary_cross_entropy_of_the_softmax():
    losses, slopes = of_each_action("value_function consistent")
    close(losses, -PAY * P.log() - (1 - PAY) * (1 - P).log())
    close(slopes, (EYE - P) * ((P - PAY) / (1 - P))[:, None])


V = torch.full((C,), -0.4, dtype=torch.float64)  # logits of a baseline
Q = torch.tensor([0.1, 0.3, 0.05, 0.35, 0.2], dtype=torch.float64)  # another policy
POLICIES = {"itself": {}, "a log": {"propensities": Q}}
BASELINES = {"none": {}, "constant": {"baseline": V}, "of any value": {"baseline": 3 * ROW}}
every_policy = pytest.mark.parametrize("policy", POLICIES)


@every_policy
@pytest.mark.parametrize("baseline", BASELINES)
def test_policy_gradient_has_the_closed_form(policy, baseline):
    settings = POLICIES[policy] | BASELINES[baseline]
    losses, slopes = of_each_action("policy_gradient", **settings)
    weight = P / settings.get("propensities", P)
    expected, v = -0.3 * H, torch.zeros(C).double()
    if "baseline" in settings:
        v = 1 / (1 + (-settings["baseline"]).exp())
        expected = expected - PAY * v.log() - (1 - PAY) * (1 - v).log()
    close(losses, expected - (PAY - v) * weight)
    close(slopes, ((v - PAY) * weight)[:, None] * (EYE - P) + 0.3 * P * (P.log() + H))


@every_policy
@pytest.mark.parametrize("v", [None, -9.0, -0.4, 9.0])
def test_expected_gradient_is_that_of_the_expected_reward(policy, v):
    """Summed over all actions, whatever the baseline and whoever chose."""
    settings = POLICIES[policy] | ({} if v is None else {"baseline": torch.full_like(ROW, v)})
    _, slopes = of_each_action("policy_gradient", **settings)
    row = ROW.clone().requires_grad_()
    p = row.softmax(0)
    (expected,) = gradients(-(p * PAY).sum() + 0.3 * (p * p.log()).sum(), row)
    close(settings.get("propensities", P) @ slopes, expected)


def test_baseline_is_trained_by_binary_cross_entropy_alone():
    _, metrics, grads = evaluate("policy_gradient log")
    v, r = 1 / (1 + (-BASELINE["baseline"]).exp()), DONE["rewards"]
    close(grads["baseline"], (v - r) / N)
    close(metrics["baseline_loss"], binary_cross_entropy(v, r))
    close(metrics["baseline"], v.mean())


def test_metrics_of_policy_gradient_are_means():
    _, metrics, _ = evaluate("policy_gradient log")
    p = DONE["logits"].softmax(1)
    close(metrics["entropy"], -(p * p.log()).sum() / N)  # nats
    close(metrics["weight"], (p[torch.arange(N), LABELS] / LOG["propensities"]).mean())
    for name in BANDITS:
        close(evaluate(name)[1]["reward"], DONE["rewards"].mean())


@every_bandit
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.float32])
def test_rewards_of_any_real_type_count_the_same(name, dtype):
    r = LABELS % 2
    close(evaluate(name, rewards=r.to(dtype)), evaluate(name, rewards=r.double()))


@pytest.mark.parametrize("log", [{}, LOG])
@pytest.mark.parametrize("scale", [-3.0, 1e6, 1e200])
def test_without_a_baseline_rewards_have_any_scale(log, scale):
    """The gradient grows with them."""
    settings = {"entropy_weight": 0, **log}
    _, metrics, grads = evaluate("policy_gradient", **settings)
    rewards = scale * DONE["rewards"]
    _, scaled_metrics, scaled = evaluate("policy_gradient", rewards=rewards, **settings)
    close(scaled["logits"], scale * grads["logits"])
    close(scaled_metrics["reward"], scale * metrics["reward"])


@every_bandit
def test_nothing_is_drawn(name):
    state = torch.get_rng_state()
    function(name)(**CASES[name])
    assert torch.equal(torch.get_rng_state(), state)


@every_bandit
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e30, "largest"])
@pytest.mark.parametrize("r", [0.0, 1.0])
def test_logits_of_any_finite_size_give_finite_numbers(name, dtype, size, r):
    size = torch.finfo(dtype).max if size == "largest" else size
    logits = torch.tensor([[size, -size, 0, -size, size]] * N, dtype=dtype)
    rewards = torch.full((N,), r, dtype=dtype)
    loss, _, grads = evaluate(
        name, **cast(CASES[name], dtype) | {"logits": logits, "rewards": rewards}
    )
    assert loss.isfinite() and all(grad.isfinite().all() for grad in grads.values())


def test_consistent_value_near_one_keeps_its_complement():
    """1 - p rounds to 0 in float32 here, but its logarithm must not be -inf."""
    x, a = torch.tensor([40.0, 0.0, 1.0], requires_grad=True), torch.tensor(0)
    loss, _ = value_function(x, a, torch.tensor(0), consistent=True)
    others = 1 + math.e  # log(1 - p) = log(others) - log(others + e^40)
    exact = math.log(others + math.exp(40)) - math.log(others)
    assert loss.item() == pytest.approx(exact, rel=1e-6)
    expected = torch.tensor([1.0, -1 / others, -math.e / others])
    close(gradients(loss, x)[0], expected, rtol=1e-5)


# Choosing


DRAWS = 40_000
MASKED = ROW.index_fill(0, torch.tensor([1]), -INF)
CHOOSERS = {"epsilon_greedy": epsilon_greedy, "sample_actions": sample_actions}
every_chooser = pytest.mark.parametrize("choose", CHOOSERS.values(), ids=CHOOSERS)


def check_frequencies(actions, p):
    """Each within 4 standard errors of its probability; never, and always, are exact."""
    frequencies = actions.bincount(minlength=len(p)) / len(actions)
    assert ((frequencies - p).abs() <= 4 * (p * (1 - p) / len(actions)).sqrt()).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("row", [ROW, MASKED], ids=["all", "masked"])
@pytest.mark.parametrize("epsilon", [0, 0.3, 1])
def test_epsilon_greedy_follows_the_propensity_of_its_docstring(dtype, row, epsilon):
    torch.manual_seed(0)
    allowed = (row > -INF).double()
    p = (1 - epsilon) * EYE[row.argmax()] + epsilon * allowed / allowed.sum()
    check_frequencies(epsilon_greedy(row.to(dtype).expand(DRAWS, C), epsilon), p)


@pytest.fixture
def coarse():
    """PyTorch's default type is so while the test runs."""
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def test_exploration_is_even_whatever_the_default_type(coarse):
    torch.manual_seed(0)
    p = torch.full([200], 1 / 200, dtype=torch.float64)
    check_frequencies(epsilon_greedy(torch.zeros(DRAWS, 200, dtype=torch.float32), 1.0), p)


@every_objective
def test_metrics_are_at_least_float32_whatever_the_default_type(coarse, name):
    _, metrics, _ = evaluate(name, **cast(CASES[name], torch.bfloat16))
    assert all(value.dtype == torch.float32 for value in metrics.values())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("row", [ROW, MASKED], ids=["all", "masked"])
def test_sample_actions_follows_softmax(dtype, row):
    torch.manual_seed(0)
    row = row.to(dtype)
    check_frequencies(sample_actions(row.expand(DRAWS, C)), row.double().softmax(0))


def test_a_masked_action_is_not_preferred_to_the_lowest_finite_value():
    row = torch.tensor([[-INF, torch.finfo(torch.float32).min]])
    assert epsilon_greedy(row, 0) == 1 and epsilon_greedy(row, 1) == 1


@every_chooser
def test_choices_have_the_leading_dimensions_and_no_gradient(choose):
    x = normal(2, 3, C).requires_grad_()
    actions = {
        shape: choose(x.reshape(shape), generator=torch.Generator().manual_seed(0))
        for shape in [(2, 3, C), (6, C)]
    }
    for shape, chosen in actions.items():
        assert chosen.shape == shape[:-1] and chosen.dtype == torch.int64
        assert torch.equal(chosen.flatten(), actions[6, C])
    assert choose(x[0, 0]).shape == () and choose(x[:0]).shape == (0, 3)
    assert choose(x.to("meta")).shape == (2, 3)


@every_chooser
def test_generator_repeats_the_choice(choose):
    x = torch.zeros(100, C)
    first, again, other = (choose(x, generator=torch.Generator().manual_seed(s)) for s in (7, 7, 8))
    assert torch.equal(first, again) and not torch.equal(first, other)


# Wrong input


THREE, HALVES = torch.tensor([0, 3, 1]), torch.tensor([0.5, 1.0, 0.5])
COUNTS = torch.tensor([5.0, 1.0, 3.0, 0.5])
VALID = {
    softmax_cross_entropy: {"logits": normal(3, 4), "labels": THREE},
    teacher_student: {"logits": normal(3, 4), "labels": THREE, "teacher_logits": normal(3, 4)}
    | {"alpha": 0.5, "temperature": 1},
    sampled_softmax: {"embeddings": normal(3, 2), "labels": THREE, "weight": normal(4, 2)}
    | {"bias": normal(4), "n_samples": 4, "noise": LogUniform(4)},
    value_function: {"logits": normal(3, 4), "actions": THREE, "rewards": HALVES},
    policy_gradient: {"logits": normal(3, 4), "actions": THREE, "rewards": HALVES}
    | {"baseline": normal(3), "entropy_weight": 0.04, "propensities": HALVES},
    epsilon_greedy: {"logits": normal(3, 4), "epsilon": 0.2},
    sample_actions: {"logits": normal(3, 4)},
    LogUniform: {"n_classes": 3},
    ClassFrequencies: {"counts": COUNTS},
}
OUT_OF_RANGE = {
    "alpha": [-0.1, 1.1, NAN, INF],
    "temperature": [0, -1, INF, NAN, 10**400],
    "n_samples": [0, -3],
    "epsilon": [-0.1, 1.1, NAN, -INF],
    "entropy_weight": [-0.1, INF, NAN],
    "n_classes": [0, -1],
    "labels": [-1, 4, -99],
    "actions": [-1, 4, -100],
    "rewards": [-0.5, 1.5, NAN, INF],
    "propensities": [0.0, -0.5, 1.5, NAN],
    "counts": [-1.0, NAN, INF],
}


class Fixed:
    """Noise that draws the ids, and says the log_prob, that it was given."""

    def __init__(self, ids, log_q=None):
        self.ids, self.log_q = ids, log_q

    def sample(self, shape):
        return self.ids

    def log_prob(self, ids):
        return self.log_q


IDS, LOG_Q = torch.tensor([0, 1, 2, 3]), torch.zeros(7)
WRONG_NOISE = [
    ("uniform", TypeError, "'uniform'"),
    (COUNTS, TypeError, "tensor"),
    (LogUniform, TypeError, "LogUniform"),
    (LogUniform(3), ValueError, "3"),
    (ClassFrequencies(torch.ones(5)), ValueError, "5"),
    (Categorical(COUNTS.repeat(2, 1)), ValueError, "[4, 2]"),
    (Fixed([1, 2]), TypeError, "list"),
    (Fixed(COUNTS), TypeError, "torch.float32"),
    (Fixed(IDS.int()), TypeError, "torch.int32"),
    (Fixed(IDS[:3]), ValueError, "[3]"),
    (Fixed(IDS - 1), ValueError, "-1"),
    (Fixed(IDS + 1), ValueError, "4"),
    (Fixed(IDS), TypeError, "NoneType"),
    (Fixed(IDS, LOG_Q.int()), TypeError, "torch.int32"),
    (Fixed(IDS, LOG_Q[0]), ValueError, "[]"),
    (Fixed(IDS, LOG_Q[:4]), ValueError, "[4]"),
]


def wrong_values(name, good):
    """Values that the argument must not have, with the error and what it says it got."""
    if name == "noise":
        yield from WRONG_NOISE
    elif isinstance(good, torch.Tensor):
        yield good.tolist(), TypeError, "list"
        yield good.numpy(), TypeError, "ndarray"
        wrong = {True: [torch.int64, torch.bool], False: [torch.int32, torch.float32]}
        dtypes = [] if name in ("rewards", "counts") else wrong[good.is_floating_point()]
        for dtype in (*dtypes, torch.complex64):
            yield good.to(dtype), TypeError, str(dtype)
        shapes = [good.flatten()[0], good[..., :0]]
        if name not in ("logits", "embeddings"):  # to which the others must fit
            shapes += [good[None]] + [good[:1]] * (name not in ("counts", "weight"))
            shapes += [good[..., :1]] * (good.ndim == 2)
        for x in shapes:
            yield x, ValueError, f"{list(x.shape)}"
        for value in OUT_OF_RANGE.get(name, []):
            x = good.clone()
            x[1] = value
            yield x, ValueError, f"{value}"
    else:
        for value in OUT_OF_RANGE[name]:
            yield value, ValueError, f"{value}"
        integer = isinstance(good, int) and name != "temperature"
        for value in ("x", True, None, 1j, torch.tensor(1), *[1.5] * integer):
            yield value, TypeError, type(value).__name__


ERRORS = [
    (function, name, *row)
    for function, arguments in VALID.items()
    for name, good in arguments.items()
    for row in wrong_values(name, good)
]


@pytest.mark.parametrize("function", VALID)
def test_the_error_table_starts_from_valid_arguments(function):
    function(**VALID[function])


@pytest.mark.parametrize(("function", "argument", "value", "error", "got"), ERRORS)
def test_wrong_input_is_an_error_that_names_it(function, argument, value, error, got):
    with pytest.raises(error, match=rf"(?s)^{argument}\b.*got .*{re.escape(got)}"):
        function(**VALID[function] | {argument: value})


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_rewards_without_a_baseline_must_be_finite(bad):
    with pytest.raises(ValueError, match=rf"^rewards\b.*got .*{bad}"):
        policy_gradient(normal(2, C), LABELS[:2], torch.tensor([0.0, bad]))


def test_counts_must_not_all_be_zero():
    with pytest.raises(ValueError, match=r"^counts\b.*got 0"):
        ClassFrequencies(torch.zeros(3))


def test_docstring_examples_print_what_they_say():
    result = doctest.testmod(objectives)
    assert result.failed == 0 and result.attempted >= 30
