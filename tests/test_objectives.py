"""Every objective against an independent reference: a closed form written here, PyTorch's own
function, or the exact sum over all actions. In float64."""

import doctest
import math
import re

import pytest
import torch
from helpers import (
    CASES,
    LABELS,
    PROPENSITIES,
    C,
    Fixed,
    N,
    check_frequencies,
    close,
    evaluate,
    function,
    gradients,
    is_zero,
)
from torch.distributions import Categorical
from torch.nn.functional import cross_entropy

import objectives
from objectives import ClassFrequencies, LogUniform, entropy, epsilon_greedy, sample_actions

INF, NAN = math.inf, math.nan
X = CASES["softmax_cross_entropy"]["logits"]
TEACHER = CASES["teacher_student"]["teacher_logits"]
EYE = torch.eye(C, dtype=torch.float64)


def test_docstring_examples_print_what_they_say():
    result = doctest.testmod(objectives)
    assert result.failed == 0 and result.attempted > 50


# Supervised


@pytest.mark.parametrize("labels", [LABELS, torch.where(LABELS == 2, -100, LABELS)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_softmax_cross_entropy_is_that_of_pytorch(labels, reduction):
    loss, _, grads = evaluate("softmax_cross_entropy", labels=labels, reduction=reduction)
    x = X.clone().requires_grad_()
    expected = cross_entropy(x, labels, reduction=reduction)
    close((loss, grads["logits"]), (expected.detach(), *gradients(expected.sum(), x)))


@pytest.mark.parametrize("alpha", [0, 0.3, 1])
@pytest.mark.parametrize("temperature", [0.5, 1, 4.0])
def test_distillation_has_the_gradient_of_its_docstring(alpha, temperature):
    _, _, grads = evaluate("teacher_student", alpha=alpha, temperature=temperature)
    from_teacher = (X / temperature).softmax(1) - (TEACHER / temperature).softmax(1)
    from_labels = X.softmax(1) - EYE[LABELS]
    expected = alpha * temperature * from_teacher + (1 - alpha) * from_labels
    close(grads["logits"], expected / N)
    if temperature == 1:
        target = alpha * TEACHER.softmax(1) + (1 - alpha) * EYE[LABELS]
        close(expected, X.softmax(1) - target)


@pytest.mark.parametrize("alpha", [0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1, 4.0])
def test_distillation_is_the_weighted_sum_of_two_cross_entropies(alpha, temperature):
    loss, *_ = evaluate("teacher_student", alpha=alpha, temperature=temperature)
    from_teacher = cross_entropy(X / temperature, (TEACHER / temperature).softmax(1))
    from_labels = cross_entropy(X, LABELS)
    close(loss, alpha * temperature**2 * from_teacher + (1 - alpha) * from_labels)


def test_accuracy_and_agreement_count_highest_logits():
    x, labels = torch.eye(4), torch.tensor([0, 1, 0, 0])
    teacher = x[[0, 1, 3, 3]]
    metrics = evaluate("teacher_student", logits=x, labels=labels, teacher_logits=teacher)[1]
    assert metrics == {"accuracy": 0.5, "agreement": 0.75}
    assert evaluate("softmax_cross_entropy", logits=x, labels=labels)[1] == {"accuracy": 0.5}


# Bandits, on one row of logits: each action's loss and its gradient


ROW = torch.tensor([0.3, -0.8, 0.1, 1.2, -0.2], dtype=torch.float64)
PAY = torch.tensor([0.0, 0.25, 1.0, 0.5, 0.75], dtype=torch.float64)
Q = torch.tensor([0.1, 0.3, 0.05, 0.35, 0.2], dtype=torch.float64)  # another policy
P = ROW.softmax(0)


def of_each_action(name, **arguments):
    """The losses [C] and the gradients [C, C] of taking each action at ROW."""
    rows = {"logits": ROW.expand(C, C), "actions": torch.arange(C), "reduction": "none"}
    losses, _, grads = evaluate(name, **rows, **arguments)
    return losses, grads["logits"]


def test_values_are_learned_by_binary_cross_entropy_of_a_sigmoid():
    losses, grads = of_each_action("value_function", rewards=PAY)
    v = 1 / (1 + (-ROW).exp())
    close(losses, -PAY * v.log() - (1 - PAY) * (1 - v).log())
    close(grads, EYE * (v - PAY))  # of the action taken alone


def test_normalized_values_are_learned_by_binary_cross_entropy_of_the_softmax():
    losses, grads = of_each_action("value_function normalized", rewards=PAY)
    close(losses, -PAY * P.log() - (1 - PAY) * (1 - P).log())
    close(grads, (EYE - P) * ((P - PAY) / (1 - P))[:, None])


def test_a_normalized_value_near_one_is_still_unlearned():
    """1 - softmax(x)_a, about e^-40, is lost to rounding; its logarithm is not."""
    x = torch.tensor([[40.0, 0.0, 1.0]])
    settings = {"actions": torch.tensor([0]), "rewards": torch.tensor([0])}
    loss, _, grads = evaluate("value_function normalized", logits=x, **settings)
    others = 1 + math.e
    assert loss.item() == pytest.approx(40 - math.log(others), rel=1e-6)
    close(grads["logits"], torch.tensor([[1, -1 / others, -math.e / others]]), rtol=1e-5)


@pytest.mark.parametrize("scale", [-3.0, 1.0, 1e6])
def test_policy_gradient_has_the_closed_form(scale):
    losses, grads = of_each_action("policy_gradient", advantages=scale * PAY)
    close(losses, -scale * PAY * P.log())
    close(grads, -scale * PAY[:, None] * (EYE - P))
    losses, grads = of_each_action("policy_gradient", advantages=scale * PAY, propensities=Q)
    close(losses, -scale * PAY * P / Q)
    close(grads, -scale * (PAY * P / Q)[:, None] * (EYE - P))


@pytest.mark.parametrize("v", [0.0, 0.4, -3.0])
def test_expected_gradient_is_that_of_the_expected_reward(v):
    """Summed over all actions, whatever the baseline and whoever chose."""
    row = ROW.clone().requires_grad_()
    (expected,) = gradients(-(row.softmax(0) * PAY).sum(), row)
    close(P @ of_each_action("policy_gradient", advantages=PAY - v)[1], expected)
    close(Q @ of_each_action("policy_gradient", advantages=PAY - v, propensities=Q)[1], expected)


def test_doubly_robust_is_right_on_average_if_values_or_propensities_are():
    """As in the docstring, summed over all actions."""
    row = ROW.clone().requires_grad_()
    (expected,) = gradients(-(row.softmax(0) * PAY).sum(), row)
    for v, q in [(PAY, P.flip(0)), (PAY.flip(0), Q)]:
        _, grads = of_each_action("policy_gradient", advantages=PAY - v, propensities=q)
        (direct,) = gradients(-(row.softmax(0) * v).sum(), row)
        close(Q @ grads + direct, expected)


def test_weighted_mean_reward_as_a_baseline_is_self_normalisation():
    """As in the docstring: the gradient of -sum(w r) / sum(w), times the mean weight."""
    x = CASES["policy_gradient log"]["logits"].clone().requires_grad_()
    rewards = CASES["value_function"]["rewards"]
    w = x.softmax(1).gather(1, LABELS[:, None])[:, 0] / PROPENSITIES
    estimate = (w * rewards).sum() / w.sum()
    (expected,) = gradients(-estimate, x)
    _, metrics, grads = evaluate("policy_gradient log", advantages=rewards - estimate)
    close(grads["logits"], metrics["weight"] * expected)


def test_metrics_of_bandits_are_means():
    p_a = CASES["policy_gradient log"]["logits"].softmax(1).gather(1, LABELS[:, None])[:, 0]
    w = p_a / PROPENSITIES
    metrics = evaluate("policy_gradient log")[1]
    close(metrics["weight"], w.mean())
    close(metrics["effective"], w.sum() ** 2 / (N * (w**2).sum()))
    close(metrics["advantage"], CASES["policy_gradient log"]["advantages"].mean())
    close(evaluate("value_function")[1]["reward"], CASES["value_function"]["rewards"].mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("score", "effective"), [(-1000.0, 0), (-57.0, 1), (0.0, 1)])
def test_effective_is_a_number_however_small_the_weights_are(dtype, score, effective):
    """All alike: p_a = e^-1000 is 0, and the square of e^-57 is in float32."""
    x = torch.tensor([[score, 0.0], [score, 0.0]], dtype=dtype)
    policy = {"logits": x, "actions": torch.tensor([0, 0]), "advantages": torch.ones(2)}
    metrics = evaluate("policy_gradient log", propensities=torch.ones(2), **policy)[1]
    assert metrics["effective"].item() == pytest.approx(effective)


def test_effective_is_a_number_however_large_the_weights_are():
    """Of two weights, 1e30 and 3e30, the squares are inf in float32: 4^2 / (1 + 3^2) / 2."""
    x = torch.zeros(2, 1)
    policy = {"logits": x, "actions": torch.tensor([0, 0]), "advantages": torch.zeros(2)}
    q = torch.tensor([1e-30, 1e-30 / 3])
    metrics = evaluate("policy_gradient log", propensities=q, **policy)[1]
    assert metrics["effective"].item() == pytest.approx(0.8)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.float32])
def test_rewards_of_any_real_type_count_the_same(dtype):
    r = LABELS % 2
    for name, key in [("value_function", "rewards"), ("policy_gradient", "advantages")]:
        close(evaluate(name, **{key: r.to(dtype)}), evaluate(name, **{key: r.double()}))


def test_entropy_is_that_of_a_categorical_and_leaves_masked_actions_alone():
    x = X.clone().requires_grad_()
    p = x.softmax(1)
    close(entropy(x), Categorical(logits=x).entropy())
    expected = gradients(-(p * p.log()).sum(), x)
    close(gradients(entropy(x).sum(), x), expected)
    masked = torch.cat([X, torch.full((N, 2), -INF)], 1).requires_grad_()
    (grad,) = gradients(entropy(masked).sum(), masked)
    close(entropy(masked), entropy(x))
    close(grad[:, :C], expected[0])
    assert is_zero(grad[:, C:])
    assert torch.autograd.gradgradcheck(entropy, x)


# Choosing


DRAWS = 40_000
MASKED = ROW.index_fill(0, torch.tensor([3]), -INF)
every_row = pytest.mark.parametrize("row", [ROW, MASKED], ids=["all", "masked"])
every_chooser = pytest.mark.parametrize("choose", [epsilon_greedy, sample_actions])


@every_row
@pytest.mark.parametrize("epsilon", [0, 0.3, 1])
def test_epsilon_greedy_follows_the_propensity_of_its_docstring(row, epsilon):
    torch.manual_seed(0)
    allowed = (row > -INF).double()
    p = (1 - epsilon) * EYE[row.argmax()] + epsilon * allowed / allowed.sum()
    check_frequencies(epsilon_greedy(row.half().expand(DRAWS, C), epsilon), p)


@every_row
def test_sample_actions_follows_softmax(row):
    torch.manual_seed(0)
    check_frequencies(sample_actions(row.expand(DRAWS, C)), row.softmax(0))


@every_chooser
def test_choices_have_the_leading_dimensions_and_repeat_with_a_generator(choose):
    x = torch.zeros(5, 20, C)
    first, again, other = [choose(x, generator=torch.Generator().manual_seed(s)) for s in (7, 7, 8)]
    assert first.shape == (5, 20) and first.dtype == torch.int64
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert choose(x[0, 0]).shape == () and choose(x[:0]).shape == (0, 20)


@every_chooser
@pytest.mark.parametrize("bad", [[0.0, NAN], [-INF, -INF], [INF, 0.0]])
def test_a_choice_that_is_none_is_refused(choose, bad):
    with pytest.raises(ValueError, match=f"^logits must be finite .*got {max(bad)}|got nan"):
        choose(torch.tensor([[0.0, 1.0], bad]))


# Wrong input


VALID = {
    **{name: CASES[name] for name in CASES if " " not in name},
    "policy_gradient log": CASES["policy_gradient log"],
    "epsilon_greedy": {"logits": X, "epsilon": 0.2},
    "LogUniform": {"n_classes": 3},
    "ClassFrequencies": {"counts": torch.tensor([5.0, 1.0, 3.0, 0.5])},
}
OUT_OF_RANGE = {
    "alpha": [-0.1, 1.1, NAN],
    "temperature": [0, -1, INF, NAN],
    "n_samples": [0],
    "n_classes": [0],
    "epsilon": [-0.1, 1.1, NAN],
    "labels": [-1, C, -99],
    "actions": [-1, C, -99],
    "rewards": [-0.5, 1.5, NAN],
    "advantages": [INF, NAN],
    "propensities": [0.0, -0.5, 1.5, NAN],
    "counts": [-1.0, NAN, INF],
}


def wrong_values(name, good):
    """Values that the argument must not have, with the error and what it says it got."""
    if isinstance(good, torch.Tensor):
        yield good.tolist(), TypeError, "list"
        yield good.to(torch.complex64), TypeError, "torch.complex64"
        if name not in ("rewards", "advantages", "counts"):
            yield good.int(), TypeError, "torch.int32"
        for x in (good.flatten()[0], good[..., :0], good[None, None]):
            if x.ndim < 3 or name not in ("logits", "embeddings"):  # to which the others must fit
                yield x, ValueError, f"{list(x.shape)}"
        for value in OUT_OF_RANGE.get(name, []):
            x = good.clone()
            x[1] = value
            yield x, ValueError, f"{value}"
    else:
        for value in ("x", True, None, torch.tensor(1)):
            yield value, TypeError, type(value).__name__
        for value in OUT_OF_RANGE[name]:
            yield value, ValueError, f"{value}"


ERRORS = []
for name, arguments in VALID.items():
    for argument, good in arguments.items():
        ERRORS += [(name, argument, *row) for row in wrong_values(argument, good)]

COUNTS = VALID["ClassFrequencies"]["counts"]
ERRORS += [
    ("sampled_softmax", "n_samples", 1.5, TypeError, "float"),
    ("sampled_softmax", "noise", "uniform", TypeError, "'uniform'"),
    ("sampled_softmax", "noise", LogUniform, TypeError, "LogUniform"),
    ("sampled_softmax", "noise", LogUniform(3), ValueError, "3"),
    ("sampled_softmax", "noise", ClassFrequencies(COUNTS), ValueError, "4"),
    ("sampled_softmax", "noise", Categorical(COUNTS.repeat(2, 1)), ValueError, "[4, 2]"),
    ("sampled_softmax", "noise", Fixed(COUNTS, Q), TypeError, "torch.float32"),
    ("sampled_softmax", "noise", Fixed([0, 1, 2, C], Q), ValueError, f"{C}"),
    ("ClassFrequencies", "counts", torch.zeros(3), ValueError, "0.0"),
]


@pytest.mark.parametrize(("name", "argument", "value", "error", "got"), ERRORS)
def test_wrong_input_is_an_error_that_names_it(name, argument, value, error, got):
    with pytest.raises(error, match=rf"(?s)^{argument}\b.*got .*{re.escape(got)}"):
        function(name)(**{**VALID[name], argument: value})


@pytest.mark.parametrize(
    ("key", "value"), [("propensities", 1e-50), ("propensities", 1e-40), ("advantages", -1e39)]
)
def test_a_value_too_small_or_large_for_the_arithmetic_is_an_error(key, value):
    """Of float32; float64 logits can do with it."""
    wrong = VALID["policy_gradient log"][key].clone()
    wrong[1] = value
    loss, *_ = evaluate("policy_gradient log", **{key: wrong})
    assert loss.isfinite()
    with pytest.raises(ValueError, match=rf"^{key} must be .*, got {re.escape(str(value))}$"):
        evaluate("policy_gradient log", logits=X.float(), **{key: wrong})
