"""Every objective against an independent reference: a closed form written here, PyTorch's own
function, or the exact expectation over all actions or all draws."""

import doctest
import inspect
import itertools
import math
import re
from fractions import Fraction

import pytest
import torch
from torch.nn.functional import binary_cross_entropy, cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import objectives
from objectives import (
    policy_gradient,
    reward_if_correct,
    sampled_softmax,
    softmax_cross_entropy,
    teacher_student,
    value_function,
)

N, C, D = 6, 5, 4
INF, NAN = math.inf, math.nan
LABELS = torch.tensor([0, 4, 2, 1, 3, 2])
EYE = torch.eye(C).double()
ROW = torch.tensor([0.3, -0.8, 0.1, 1.2, -0.2], dtype=torch.float64)
PAY = torch.tensor([0.0, 0.25, 1.0, 0.5, 0.75])  # exact in every floating type
EPSILON, ENTROPY_WEIGHT, BASELINE = 0.4, 0.3, -0.4

# Every objective with its settings here, and the shapes of its floating inputs where they are
# not one [N, C]. Each is called with the first input, labels or a reward, and the other inputs.
CASES = {
    "softmax_cross_entropy": (softmax_cross_entropy, {}),
    "teacher_student": (teacher_student, {"temperature": 2}),
    "sampled_softmax": (sampled_softmax, {"n_samples": 4}),
    "value_function": (value_function, {"epsilon": EPSILON}),
    "value_function_consistent": (value_function, {"epsilon": EPSILON, "consistent": True}),
    "policy_gradient": (policy_gradient, {"entropy_weight": ENTROPY_WEIGHT}),
    "policy_gradient_baseline": (policy_gradient, {"entropy_weight": ENTROPY_WEIGHT}),
}
SHAPES = {
    "teacher_student": [(N, C), (N, C)],
    "sampled_softmax": [(N, D), (C, D), (C,)],
    "policy_gradient_baseline": [(N, C), (N,)],
}
METRICS = {
    "softmax_cross_entropy": "accuracy",
    "teacher_student": "accuracy agreement",
    "sampled_softmax": "kept",
    "value_function": "reward",
    "value_function_consistent": "reward",
    "policy_gradient": "reward entropy",
    "policy_gradient_baseline": "reward entropy baseline baseline_loss",
}
SUPERVISED, BANDITS = list(CASES)[:3], list(CASES)[3:]
RANDOM = ["sampled_softmax", *BANDITS]
every_objective = pytest.mark.parametrize("name", CASES)
every_random_objective = pytest.mark.parametrize("name", RANDOM)
every_bandit = pytest.mark.parametrize("name", BANDITS)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def inputs(name, dtype=torch.float64):
    shapes = enumerate(SHAPES.get(name, [(N, C)]))
    return [normal(*shape, seed=seed, dtype=dtype).requires_grad_() for seed, shape in shapes]


def gradients(loss, *tensors):
    """The gradients, 0 for a tensor without one."""
    return torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)


def objective(name, tensors, *, labels=LABELS, reward=PAY.__getitem__, seed=0, **settings):
    function, defaults = CASES[name]
    target = labels[: len(tensors[0])] if name in SUPERVISED else reward
    if name in RANDOM:
        settings["generator"] = seeded(seed)
    return function(tensors[0], target, *tensors[1:], **defaults | settings)


def evaluate(name, tensors, **settings):
    """The loss and the gradients on all floating inputs."""
    loss, _ = objective(name, tensors, **settings)
    return loss, *gradients(loss, *tensors)


def recording(seen):
    """A reward that keeps the actions it is asked about."""
    return lambda actions: seen.append(actions) or PAY[actions]


def close(actual, expected, rtol=1e-12, atol=1e-14):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def is_zero(tensor):
    return torch.equal(tensor, torch.zeros_like(tensor))


# All objectives


@every_objective
def test_gradcheck(name):
    # A teacher, and the baseline inside the advantage, are constants by design.
    variables, constants = inputs(name), []
    if name != "sampled_softmax":
        variables, constants = variables[:1], [t.detach() for t in variables[1:]]
    assert torch.autograd.gradcheck(
        lambda *tensors: objective(name, [*tensors, *constants])[0], variables
    )


@every_objective
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_arithmetic_is_at_least_float32(name, dtype):
    """Only the gradients on the inputs are rounded to the type of the inputs."""
    narrow, wide_dtype = inputs(name, dtype), torch.promote_types(dtype, torch.float32)
    wide = [tensor.detach().to(wide_dtype).requires_grad_() for tensor in narrow]
    (loss, *grads), (wide_loss, *wide_grads) = evaluate(name, narrow), evaluate(name, wide)
    assert loss.isfinite() and loss.dtype == wide_dtype
    close(loss, wide_loss, rtol=1e-6, atol=1e-6)
    eps = torch.finfo(dtype).eps
    for grad, wide_grad in zip(grads, wide_grads, strict=True):
        assert grad.dtype == dtype
        close(grad.to(wide_dtype), wide_grad, rtol=eps, atol=eps)


@every_objective
def test_autocast_changes_nothing(name):
    tensors = inputs(name, torch.float32)
    plain = evaluate(name, tensors)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = objective(name, tensors)
    # The backward pass belongs outside the autocast region.
    for a, b in zip(plain, (loss, *gradients(loss, *tensors)), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@every_objective
def test_empty_batch_has_loss_zero(name):
    tensors = [t[:0] if len(t) == N else t for t in inputs(name)]
    loss, *grads = evaluate(name, tensors)
    assert loss == 0 and all(is_zero(grad) for grad in grads)


@every_objective
def test_inputs_are_not_modified(name):
    tensors = inputs(name)
    evaluate(name, tensors)
    for tensor, before in zip(tensors, inputs(name), strict=True):
        assert torch.equal(tensor, before)


@every_objective
def test_strides_do_not_matter(name):
    tensors = inputs(name)
    columns = [torch.stack([t.detach().movedim(0, -1)] * 2, -1)[..., 0] for t in tensors]
    strided = [t.movedim(-1, 0).requires_grad_() for t in columns]
    assert not any(t.is_contiguous() for t in strided)
    for a, b in zip(evaluate(name, tensors), evaluate(name, strided), strict=True):
        close(a, b)


@every_random_objective
def test_generator_repeats_the_draws(name):
    runs = [evaluate(name, inputs(name), seed=7) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@every_random_objective
def test_seeds_differ(name):
    assert len({evaluate(name, inputs(name), seed=seed)[0].item() for seed in range(8)}) > 4


@every_objective
def test_metrics_are_detached_scalars(name):
    loss, metrics = objective(name, inputs(name))
    assert loss.shape == () and loss.requires_grad
    assert " ".join(metrics) == METRICS[name]
    for value in metrics.values():
        assert value.shape == () and not value.requires_grad and value.is_floating_point()


@every_objective
def test_masked_class_has_no_gradient(name):
    """A score of -inf for class 1, which is no image's label here."""
    labels, tensors = torch.tensor([0, 4, 2, 0, 3, 2]), inputs(name)
    scores = {"sampled_softmax": [2], "teacher_student": [0, 1]}.get(name, [0])
    for i in scores:
        tensors[i].data[..., 1] = -INF
    for seed in range(5):
        loss, *grads = evaluate(name, tensors, labels=labels, seed=seed)
        assert loss.isfinite() and all(grad.isfinite().all() for grad in grads)
        assert all(is_zero(grads[i][..., 1]) for i in scores)


@pytest.mark.parametrize("name", [name for name in CASES if name != "value_function"])
@pytest.mark.parametrize("r", [0.0, 1.0])
def test_single_class_teaches_nothing(name, r):
    """Its softmax is 1 whatever the logit."""
    shapes = [[1 if n == C else n for n in shape] for shape in SHAPES.get(name, [(N, C)])]
    tensors = [normal(*shape).requires_grad_() for shape in shapes]
    rewards = torch.full((N,), r)
    loss, *grads = evaluate(name, tensors, labels=0 * LABELS, reward=lambda actions: rewards)
    assert loss.isfinite() and is_zero(grads[0])


# softmax_cross_entropy


def test_softmax_cross_entropy_is_that_of_pytorch():
    x = normal(N, C)
    close(softmax_cross_entropy(x, LABELS)[0], cross_entropy(x, LABELS))


def test_softmax_cross_entropy_gradient_is_p_minus_onehot():
    x = normal(N, C).requires_grad_()
    (grad,) = gradients(softmax_cross_entropy(x, LABELS)[0], x)
    close(grad, (x.exp() / x.exp().sum(1, keepdim=True) - EYE[LABELS]) / N)


def test_accuracy_counts_highest_logits():
    _, metrics = softmax_cross_entropy(torch.eye(4), torch.tensor([0, 1, 2, 0]))
    assert metrics["accuracy"] == 0.75


# teacher_student


def distil(**settings):
    """Student, teacher, loss, and the student's gradient."""
    tensors = inputs("teacher_student")
    return *tensors, *evaluate("teacher_student", tensors, **settings)[:2]


@pytest.mark.parametrize("temperature", [0.5, 1, 3.0])
def test_alpha_zero_is_softmax_cross_entropy_exactly(temperature):
    x, _, loss, grad = distil(alpha=0, temperature=temperature)
    expected, _ = softmax_cross_entropy(x, LABELS)
    assert torch.equal(loss, expected) and torch.equal(grad, gradients(expected, x)[0])


@pytest.mark.parametrize("alpha", [0, 0.3, 1])
def test_gradient_is_p_minus_target(alpha):
    x, teacher, _, grad = distil(alpha=alpha, temperature=1)
    target = alpha * teacher.softmax(1) + (1 - alpha) * EYE[LABELS]
    close(grad, (x.softmax(1) - target) / N)


@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1, 4.0])
def test_loss_is_the_weighted_sum_of_two_cross_entropies(alpha, temperature):
    x, teacher, loss, _ = distil(alpha=alpha, temperature=temperature)
    from_teacher = cross_entropy(x / temperature, (teacher / temperature).softmax(1))
    from_labels = cross_entropy(x, LABELS)
    close(loss, alpha * temperature**2 * from_teacher + (1 - alpha) * from_labels)


def test_no_gradient_reaches_the_teacher():
    x, teacher = tensors = inputs("teacher_student")
    objective("teacher_student", tensors)[0].backward()
    assert x.grad is not None and teacher.grad is None


def test_alpha_one_ignores_labels():
    loss, other = (distil(alpha=1, labels=t)[2] for t in (LABELS, (LABELS + 1) % C))
    assert torch.equal(loss, other)


def test_high_temperature_matches_centred_logits():
    """Hinton et al. 2015, section 2.1; the rest is of order 1 / T."""
    x, teacher, _, grad = distil(alpha=1, temperature=1e5)
    difference = x - teacher
    expected = (difference - difference.mean(1, keepdim=True)) / (C * N)
    close(grad, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("alpha", [0, 0.5, 1])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_class_that_teacher_and_student_mask_is_removed(alpha, temperature):
    x, teacher, labels = normal(3, 3), normal(3, 3, seed=1), torch.tensor([0, 2, 0])
    settings = {"alpha": alpha, "temperature": temperature}
    expected, _ = teacher_student(x[:, ::2], labels // 2, teacher[:, ::2], **settings)
    x[:, 1] = teacher[:, 1] = -INF
    close(teacher_student(x, labels, teacher, **settings)[0], expected)


@pytest.mark.parametrize("temperature", [1e-300, 1e-3, 3.0, 1e3])
def test_extreme_temperatures_and_masks_stay_finite(temperature):
    """Also where the teacher prefers a class that the student masks."""
    x = torch.tensor([[0.0, 1.0, -INF], [1e30, 0.0, -INF]], requires_grad=True)
    teacher = torch.tensor([[0.0, -INF, 2.0], [-1e30, 0.0, 1e30]])
    settings = {"alpha": 0.5, "temperature": temperature}
    loss, _ = teacher_student(x, torch.tensor([0, 1]), teacher, **settings)
    (grad,) = gradients(loss, x)
    assert loss.isfinite() and grad.isfinite().all() and is_zero(grad[:, 2])


def test_agreement_counts_shared_preferences():
    teacher = torch.eye(4)[[0, 1, 3, 3]]
    _, metrics = teacher_student(torch.eye(4), torch.tensor([0, 0, 0, 0]), teacher)
    assert metrics["agreement"] == 0.75 and metrics["accuracy"] == 0.25


# sampled_softmax


def sampled_reference(noise, e, weight, bias):
    """One image and one noise class at a time, from the definition."""
    losses = []
    for i, t in enumerate(LABELS.tolist()):
        score = [e[i] @ w + b for w, b in zip(weight, bias, strict=True)]
        kept = [c for c in noise.tolist() if c != t]
        q = 1 / len(weight)
        z = score[t].exp() + sum(score[c].exp() / (len(kept) * q / (1 - q)) for c in kept)
        losses.append(z.log() - score[t])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("n_samples", [1, 3, 20])
def test_sampled_softmax_is_its_definition(n_samples):
    tensors = inputs("sampled_softmax")
    noise = torch.randint(C, (n_samples,), generator=seeded())
    expected = sampled_reference(noise, *tensors)
    measured = evaluate("sampled_softmax", tensors, n_samples=n_samples)
    for a, b in zip(measured, (expected, *gradients(expected, *tensors)), strict=True):
        close(a, b)


def test_no_bias_is_a_bias_of_zero():
    e, weight, bias = inputs("sampled_softmax")
    none, _ = objective("sampled_softmax", [e, weight])
    close(none, objective("sampled_softmax", [e, weight, 0 * bias])[0])


@pytest.mark.parametrize(("n_classes", "n_samples"), [(2, 3), (3, 3), (4, 2), (4, 3)])
def test_sum_over_other_classes_is_unbiased(n_classes, n_samples, monkeypatch):
    """The mean over all C^n draws of the sum that the loss implies, given k > 0."""
    t, scores = n_classes - 1, normal(n_classes, 1)
    one, label, estimates = torch.ones(1, 1).double(), torch.tensor([t]), []
    for draw in itertools.product(range(n_classes), repeat=n_samples):
        monkeypatch.setattr(torch, "randint", lambda *_, d=draw, **__: torch.tensor(d))
        loss, metrics = sampled_softmax(one, label, scores, n_samples=n_samples)
        if metrics["kept"] > 0:
            estimates.append(scores[t].exp() * loss.expm1())
    assert len(estimates) == n_classes**n_samples - 1
    close(torch.stack(estimates).mean(0), scores.exp().sum(0) - scores[t].exp())


def test_many_samples_approach_full_softmax():
    """Loss and gradients within 4 standard errors of the mean of 100 runs; with 5000 samples
    the bias, of order 1 / k, is far below one of them."""
    e, weight, bias = tensors = inputs("sampled_softmax")

    def flat(loss, *grads):
        return torch.cat([loss[None], *[grad.flatten() for grad in grads]])

    settings = [{"n_samples": 5000, "seed": seed} for seed in range(100)]
    runs = torch.stack([flat(*evaluate("sampled_softmax", tensors, **s)) for s in settings])
    loss = cross_entropy(e @ weight.T + bias, LABELS)
    full = flat(loss, *gradients(loss, *tensors))
    standard_error = runs.std(0) / 100**0.5
    assert (standard_error < 5e-3).all()
    assert ((runs.mean(0) - full).abs() <= 4 * standard_error).all()


@pytest.mark.parametrize("n_classes", [1, 2])
def test_image_whose_samples_were_all_rejected_costs_nothing(n_classes):
    shapes, rejected = [(1, D), (n_classes, D), (n_classes,)], 0
    tensors = [normal(*shape).requires_grad_() for shape in shapes]
    for seed in range(8):
        loss, metrics = objective("sampled_softmax", tensors, n_samples=1, seed=seed)
        if metrics["kept"] == 0:
            rejected += 1
            assert loss == 0 and all(is_zero(grad) for grad in gradients(loss, *tensors))
    assert rejected == 8 if n_classes == 1 else 0 < rejected < 8


def test_no_gradient_for_classes_not_drawn():
    tensors = [normal(*shape).requires_grad_() for shape in [(N, D), (50, D), (50,)]]
    _, _, *grads = evaluate("sampled_softmax", tensors, n_samples=4)
    drawn = {*torch.randint(50, (4,), generator=seeded()).tolist(), *LABELS.tolist()}
    for grad in grads:
        assert set(grad.nonzero()[:, 0].tolist()) == drawn


def test_kept_is_the_fraction_of_pairs_not_rejected():
    _, metrics = objective("sampled_softmax", inputs("sampled_softmax"), n_samples=9)
    noise = torch.randint(C, (9,), generator=seeded()).tolist()
    pairs = [c != t for t in LABELS.tolist() for c in noise]
    assert metrics["kept"].item() == pytest.approx(sum(pairs) / len(pairs), rel=1e-6)


class Shapes(TorchDispatchMode):
    """Records the shape of every tensor that an operation reads or makes."""

    seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        self.seen.update(tuple(tensor.shape) for tensor in tensors)
        return out


def test_no_tensor_of_images_by_classes_exists():
    n, c, d = 37, 1009, 11
    e, weight, bias = (normal(*shape).requires_grad_() for shape in [(n, d), (c, d), (c,)])
    with Shapes() as shapes:
        sampled_softmax(e, torch.arange(n), weight, bias)[0].backward()
    assert {(n, 5), (c, d)} <= shapes.seen  # it saw the scores, and the gradient of weight
    assert max(math.prod(shape) for shape in shapes.seen) < n * c


# Both bandits


def play(name, n, row=ROW, seed=0):
    """n independent draws at one row: the actions, the mean loss, each draw's gradient."""
    tensors, seen = [row.repeat(n, 1).requires_grad_()], []
    if name == "policy_gradient_baseline":
        tensors.append(row.new_full((n,), BASELINE).requires_grad_())
    loss, grad, *_ = evaluate(name, tensors, reward=recording(seen), seed=seed)
    return seen[0], loss.detach(), n * grad


def exact(name):
    """In closed form at ROW: each action's probability, its loss, and its gradient."""
    r, p = PAY.double(), ROW.softmax(0)
    if name.startswith("value_function"):
        consistent = name.endswith("consistent")
        v = p if consistent else 1 / (1 + (-ROW).exp())
        slope = (EYE - p) * ((p - r) / (1 - p))[:, None] if consistent else EYE * (v - r)
        policy = EPSILON / C + (1 - EPSILON) * EYE[ROW.argmax()]
        return policy, -r * v.log() - (1 - r) * (1 - v).log(), slope
    v, entropy = 0.0, -(p * p.log()).sum()
    loss = -ENTROPY_WEIGHT * entropy
    if name.endswith("baseline"):
        v = 1 / (1 + math.exp(-BASELINE))
        loss = loss - r * math.log(v) - (1 - r) * math.log(1 - v)
    slope = (v - r)[:, None] * (EYE - p) + ENTROPY_WEIGHT * p * (p.log() + entropy)
    return p, loss - (r - v) * p.log(), slope


@every_bandit
def test_one_draw_has_the_closed_form(name):
    _, losses, slopes = exact(name)
    for seed in range(10):
        actions, loss, grad = play(name, 1, seed=seed)
        close(loss, losses[actions[0]])
        close(grad, slopes[actions])


@every_bandit
def test_mean_over_draws_is_the_sum_over_actions(name):
    """Actions, loss and gradient within 4 standard errors of their expectation; the standard
    error is exact too."""
    n = 20_000
    actions, loss, grad = play(name, n)
    policy, losses, slopes = exact(name)
    table = torch.cat([EYE, losses[:, None], slopes], 1)
    mean = policy @ table
    standard_error = (policy @ (table - mean) ** 2 / n).sqrt()
    measured = torch.cat([EYE[actions].mean(0), loss[None], grad.mean(0)])
    assert ((measured - mean).abs() <= 4 * standard_error).all()


@every_bandit
def test_reward_is_called_once_with_int64_actions(name):
    calls = []
    evaluate(name, inputs(name), reward=lambda *args: calls.append(args) or PAY[args[0]])
    ((actions,),) = calls
    assert actions.dtype == torch.int64 and actions.shape == (N,)


@pytest.mark.parametrize("function", [value_function, policy_gradient])
def test_bandits_take_no_labels(function):
    assert not any("label" in name for name in inspect.signature(function).parameters)


@every_bandit
def test_no_gradient_reaches_the_reward(name):
    r = torch.full((N,), 0.5, requires_grad=True)
    loss, _ = objective(name, inputs(name), reward=lambda actions: r)
    assert torch.autograd.grad(loss, r, allow_unused=True) == (None,)


@every_bandit
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.float64])
def test_rewards_of_any_real_type_count_the_same(name, dtype):
    loss, _ = objective(name, inputs(name), reward=lambda a: (a % 2).to(dtype))
    expected, _ = objective(name, inputs(name), reward=lambda a: (a % 2).float())
    assert torch.equal(loss, expected)


@every_bandit
def test_reward_metric_is_the_mean_reward(name):
    seen = []
    _, metrics = objective(name, inputs(name), reward=recording(seen))
    close(metrics["reward"], PAY[seen[0]].double().mean())


@every_bandit
def test_masked_actions_are_never_drawn(name):
    row = ROW.clone()
    row[[0, 3]] = -INF
    actions, loss, grad = play(name, 2000, row)
    assert set(actions.tolist()) == {1, 2, 4}
    assert loss.isfinite() and grad.isfinite().all() and is_zero(grad[:, [0, 3]])


@every_bandit
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e30, "largest"])
@pytest.mark.parametrize("r", [0.0, 1.0])
def test_logits_of_any_finite_size_give_finite_numbers(name, dtype, size, r):
    size = torch.finfo(dtype).max if size == "largest" else size
    tensors = inputs(name, dtype)
    tensors[0] = torch.tensor([[size, -size, 0, -size, size]] * N, dtype=dtype).requires_grad_()
    rewards = torch.full((N,), r)
    for seed in range(3):
        results = evaluate(name, tensors, reward=lambda actions: rewards, seed=seed)
        assert all(tensor.isfinite().all() for tensor in results)


# value_function


@pytest.mark.parametrize("consistent", [False, True])
def test_epsilon_zero_is_greedy(consistent):
    x, seen = normal(500, C), []
    value_function(x, recording(seen), epsilon=0, consistent=consistent)
    assert torch.equal(seen[0], x.argmax(1))


def test_epsilon_one_is_uniform():
    """Each action's frequency within 4 standard errors of 1 / C."""
    n, seen = 20_000, []
    value_function(ROW.repeat(n, 1), recording(seen), epsilon=1, generator=seeded())
    standard_error = (1 / C * (1 - 1 / C) / n) ** 0.5
    assert ((seen[0].bincount(minlength=C) / n - 1 / C).abs() <= 4 * standard_error).all()


def test_a_masked_action_is_not_preferred_to_the_lowest_finite_value():
    x, seen = torch.tensor([[-INF, torch.finfo(torch.float32).min]]), []
    value_function(x, recording(seen), epsilon=0)
    assert seen[0] == 1


def test_only_the_action_taken_has_a_gradient():
    actions, _, grad = play("value_function", 200)
    assert torch.equal(grad != 0, EYE[actions].bool())


def test_consistent_value_near_one_keeps_its_complement():
    """1 - p rounds to 0 in float32 here, but its logarithm must not be -inf."""
    x = torch.tensor([[40.0, 0.0, 1.0]], requires_grad=True)
    loss, _ = value_function(x, lambda a: 0 * a, epsilon=0, consistent=True)
    others = 1 + math.e  # log(1 - p) = log(others) - log(others + e^40)
    exact_loss = math.log(others + math.exp(40)) - math.log(others)
    assert loss.item() == pytest.approx(exact_loss, rel=1e-6)
    expected = torch.tensor([[1.0, -1 / others, -math.e / others]])
    close(gradients(loss, x)[0], expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 3, 10])
def test_largest_finite_losses_have_a_finite_mean(dtype, n):
    """The one value is 1 and the reward 0; rounding must not carry the mean beyond them."""
    x = torch.zeros(n, 1, dtype=dtype)
    assert value_function(x, lambda actions: actions, consistent=True)[0].isfinite()


# policy_gradient


@pytest.mark.parametrize("name", ["policy_gradient", "policy_gradient_baseline"])
def test_expected_gradient_is_exact_with_any_baseline(name):
    """Summed over all actions: that of minus the expected reward and the weighted entropy."""
    actions, _, grad = play(name, 200)
    one_of_each = torch.stack([grad[actions == a][0] for a in range(C)])
    row = ROW.clone().requires_grad_()
    p = row.softmax(0)
    (expected,) = gradients(-(p * PAY).sum() + ENTROPY_WEIGHT * (p * p.log()).sum(), row)
    close(p.detach() @ one_of_each, expected)


def test_baseline_is_trained_by_binary_cross_entropy_alone():
    (x, baseline), seen = inputs("policy_gradient_baseline"), []
    loss, metrics = policy_gradient(x, recording(seen), baseline, generator=seeded())
    v, r = 1 / (1 + (-baseline).exp()), PAY[seen[0]].double()
    close(gradients(loss, baseline)[0], (v - r) / N)
    close(metrics["baseline_loss"], binary_cross_entropy(v, r).detach())
    close(metrics["baseline"], v.mean().detach())


def test_entropy_metric_is_in_nats():
    x = normal(N, C)
    p = x.softmax(1)
    close(policy_gradient(x, PAY.__getitem__)[1]["entropy"], -(p * p.log()).sum() / N)


# reward_if_correct


def test_reward_is_one_where_the_action_is_the_label():
    r = reward_if_correct(torch.tensor([0, 4, 9]))(torch.tensor([0, 5, 9]))
    assert r.dtype == torch.float32 and r.tolist() == [1.0, 0.0, 1.0]


# Errors


def act(actions):
    return reward_if_correct(torch.tensor([0, 3, 1]))(actions)


LOGITS, THREE = {"logits": normal(3, 4)}, torch.tensor([0, 3, 1])
REWARD = {"reward": lambda actions: actions == 0, "generator": None}
VALID = {
    softmax_cross_entropy: LOGITS | {"labels": THREE},
    teacher_student: LOGITS
    | {"labels": THREE, "teacher_logits": normal(3, 4), "alpha": 0.5, "temperature": 1},
    sampled_softmax: {"embeddings": normal(3, 2), "labels": THREE, "weight": normal(4, 2)}
    | {"bias": normal(4), "n_samples": 5, "sparse": False, "generator": None},
    value_function: LOGITS | REWARD | {"epsilon": 0.2, "consistent": False},
    policy_gradient: LOGITS | REWARD | {"baseline": normal(3), "entropy_weight": 0.04},
    reward_if_correct: {"labels": THREE},
    act: {"actions": THREE},
}
WRONG_SHAPES = {
    "logits": [(3,), (3, 4, 1), (3, 0)],
    "labels": [(), (3, 1), (2,), (1,)],
    "teacher_logits": [(3,), (3, 5), (1, 4), (2, 4)],
    "embeddings": [(3,), (3, 2, 1)],
    "weight": [(4,), (4, 3), (0, 2)],
    "bias": [(3,), (1,), (4, 1)],
    "baseline": [(), (3, 1), (1,), (4,)],
    "actions": [(), (3, 1), (2,), (1,)],
}
OUT_OF_RANGE = {
    "alpha": [-0.1, 1.1, NAN, INF],
    "temperature": [0, -1, INF, NAN, 10**400, Fraction(1, 10**400)],
    "n_samples": [0, -3, 2**31, 10**400],
    "epsilon": [-0.1, 1.1, NAN, -INF],
    "entropy_weight": [-0.1, INF, NAN, 10**400],
}
WRONG_REWARDS = [
    ([0.0, 1.0, 0.0], TypeError, "list"),
    (1.0, TypeError, "float"),
    (None, TypeError, "NoneType"),
    (torch.zeros(3, 1), ValueError, "[3, 1]"),
    (torch.zeros(1), ValueError, "[1]"),
    (torch.tensor(0.0), ValueError, "[]"),
    (torch.zeros(3, dtype=torch.complex64), TypeError, "complex64"),
    (torch.tensor([0.0, 1.5, 1.0]), ValueError, "1.5"),
    (torch.tensor([0, -1, 1]), ValueError, "-1"),
    (torch.tensor([0.0, NAN, 1.0]), ValueError, "nan"),
    (torch.tensor([0.0, INF, 1.0]), ValueError, "inf"),
    (torch.tensor([0.0, -INF, 1.0]), ValueError, "-inf"),
    (torch.zeros(3, device="meta"), ValueError, "meta"),
    (torch.zeros(3).to_sparse(), TypeError, "torch.sparse_coo"),
]


def wrong_tensors(function, name, good):
    yield good.tolist(), TypeError, "list"
    yield 0.5, TypeError, "float"
    floating = good.is_floating_point()
    real, other = (torch.int64, torch.complex64) if floating else (torch.int32, torch.float32)
    for dtype in (real, other, torch.bool):
        yield good.to(dtype), TypeError, str(dtype)
    yield good.to_sparse(), TypeError, "torch.sparse_coo"
    if name not in ("bias", "baseline"):
        yield None, TypeError, "NoneType"
    for shape in WRONG_SHAPES[name]:
        # The labels of a reward may be of any number.
        if function is not reward_if_correct or len(shape) != 1:
            yield good.new_zeros(shape), ValueError, f"{list(shape)}"
    # The first argument sets the device that the others must share.
    if name != next(iter(VALID[function])) or function is act:
        yield good.to("meta"), ValueError, "meta"
    if name == "labels" and function is not reward_if_correct:
        for label in (-1, -100, 4):
            yield torch.tensor([0, label, 1]), ValueError, f"{label}"


def wrong_values(function, name, good):
    """Values that the argument must not have, with the error and what it says."""
    if isinstance(good, torch.Tensor):
        yield from wrong_tensors(function, name, good)
    elif name == "generator":
        yield 0, TypeError, "int"
        yield torch.get_rng_state(), TypeError, "Tensor"
        yield torch.Generator, TypeError, type(torch.Generator).__name__
    elif name == "reward":
        yield None, TypeError, "NoneType"
        yield THREE, TypeError, "Tensor; for labels pass reward_if_correct"
        for value, *error in WRONG_REWARDS:
            yield lambda actions, value=value: value, *error
    elif isinstance(good, bool):
        for value in (1, 0.0, None, "yes", torch.tensor(True)):
            yield value, TypeError, type(value).__name__
    else:
        for value in OUT_OF_RANGE[name]:
            yield value, ValueError, f"{value}"
        for value in ("x", True, None, 1j, torch.tensor(1), *[1.5] * (name == "n_samples")):
            yield value, TypeError, type(value).__name__


ERRORS = [
    (function, name, *row)
    for function, arguments in VALID.items()
    for name, good in arguments.items()
    for row in wrong_values(function, name, good)
]


@pytest.mark.parametrize("function", VALID)
def test_the_error_table_starts_from_valid_arguments(function):
    result = function(**VALID[function])
    assert callable(result) or result[0].isfinite().all()


@pytest.mark.parametrize(("function", "argument", "value", "error", "message"), ERRORS)
def test_wrong_input_is_an_error_that_names_it(function, argument, value, error, message):
    with pytest.raises(error, match=rf"^{argument}\b.*got .*{re.escape(message)}"):
        function(**VALID[function] | {argument: value})


@every_objective
def test_shapes_can_be_tried_on_the_meta_device(name):
    tensors = [tensor.detach().to("meta").requires_grad_() for tensor in inputs(name)]
    function, settings = CASES[name]
    target = LABELS.to("meta") if name in SUPERVISED else torch.Tensor.float
    loss, metrics = function(tensors[0], target, *tensors[1:], **settings)
    assert all(value.is_meta and value.shape == () for value in (loss, *metrics.values()))
    assert gradients(loss, *tensors)[0].shape == tensors[0].shape


@every_random_objective
def test_generator_must_share_the_device(name):
    tensors = [tensor.to("meta") for tensor in inputs(name)]
    with pytest.raises(ValueError, match="^generator .*meta, got cpu"):
        objective(name, tensors, labels=LABELS.to("meta"))


def test_docstring_examples_print_what_they_say():
    result = doctest.testmod(objectives)
    assert result.failed == 0 and result.attempted >= 6
