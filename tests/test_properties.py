"""Every objective on generated inputs: any shape, type, layout, size of logits, and mask.

The suite takes a few hundred of them; 28,500 take minutes:
pytest tests/test_properties.py --hypothesis-profile=long
"""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical

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

INF = math.inf
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LAYOUTS = ["contiguous", "every second", "transposed", "expanded"]
SIZES = [0.0, 1.0, 30.0, 1e4, 1e30]


def laid_out(tensor, layout):
    """The same values in memory that is not contiguous; expanded, those of the first row."""
    if layout == "every second":
        return torch.stack([tensor, tensor], -1)[..., 0]
    if layout == "transposed":
        return tensor.movedim(-1, 0).contiguous().movedim(0, -1)
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    return tensor


@st.composite
def problems(draw, sizes=SIZES, layouts=LAYOUTS):
    """One set of arguments for every objective. All values follow from one seed."""
    p = SimpleNamespace(
        n=draw(st.integers(0, 6)),
        c=draw(st.sampled_from([1, 2, 3, 7])),
        d=draw(st.integers(1, 4)),
        dtype=draw(st.sampled_from(FLOATS)),
        size=draw(st.sampled_from(sizes)),
        masked=draw(st.booleans()),
        layout=draw(st.sampled_from(layouts)),
        seed=draw(st.integers(0, 2**32 - 1)),
        alpha=draw(st.sampled_from([0, 0.3, 1])),
        temperature=draw(st.sampled_from([0.01, 0.5, 1, 2, 100])),
        n_samples=draw(st.integers(1, 5)),
        noise=draw(st.sampled_from(["uniform", "log", "frequencies", "categorical"])),
        bias=draw(st.booleans()),
        sparse=draw(st.booleans()),
        epsilon=draw(st.sampled_from([0, 0.3, 1])),
        consistent=draw(st.booleans()),
        entropy_weight=draw(st.sampled_from([0, 0.3])),
        baseline=draw(st.booleans()),
    )
    generator = seeded(p)

    def floats(*shape, size=p.size):
        """Normal numbers times size, some of them exactly size or -size."""
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        x = torch.where(torch.rand(shape, generator=generator) < 0.2, x.sign(), x) * size
        return x.clamp(-60_000, 60_000).half() if p.dtype == torch.float16 else x.to(p.dtype)

    def mask(*shape):
        """Some classes of each row; never the class p.labels."""
        chosen = torch.rand(shape, generator=generator) < 0.4 * p.masked
        return chosen.scatter(-1, p.labels[:, None], False) if len(shape) == 2 else chosen

    p.labels = laid_out(torch.randint(p.c, (p.n,), generator=generator), p.layout)
    p.any_labels = torch.randint(p.c, (p.n,), generator=generator)
    p.pay = torch.rand(p.c, generator=generator)
    p.counts = torch.rand(p.c, generator=generator, dtype=torch.float64) + 0.1
    p.counts[1:] *= torch.rand(p.c - 1, generator=generator) < 0.7
    p.logits = laid_out(floats(p.n, p.c).masked_fill(mask(p.n, p.c), -INF), p.layout)
    p.mask = p.logits == -INF
    p.teacher = laid_out(floats(p.n, p.c).masked_fill(p.mask, -INF), p.layout)
    p.other_teacher = floats(p.n, p.c).masked_fill(mask(p.n, p.c), -INF)
    p.value = laid_out(floats(p.n), p.layout)
    p.embeddings = laid_out(floats(p.n, p.d), p.layout)
    p.weight = laid_out(floats(p.c, p.d, size=1), p.layout)
    p.class_mask = mask(p.c).scatter(0, p.labels, False)
    layout = "every second" if p.layout == "expanded" else p.layout  # or all classes are masked
    p.class_bias = laid_out(floats(p.c).masked_fill(p.class_mask, -INF), layout)
    return p


def seeded(p):
    return torch.Generator().manual_seed(p.seed)


def noise_of(p):
    if p.noise == "categorical":
        return Categorical(p.counts)
    return {"log": LogUniform(p.c), "frequencies": ClassFrequencies(p.counts)}.get(p.noise)


# Each objective as a function of a problem and its floating inputs, and in float64 from its
# definition, given what was drawn.


def softmax_case(p, x):
    return softmax_cross_entropy(x, p.labels)


def softmax_reference(p, drawn, x):
    return F.cross_entropy(x, p.labels, reduction="sum") / max(p.n, 1)


def teacher_case(p, x, teacher):
    settings = {"alpha": p.alpha, "temperature": p.temperature}
    return teacher_student(x, p.labels, teacher, **settings)


def teacher_reference(p, drawn, x, teacher):
    q = (teacher.detach() / p.temperature).softmax(1)
    log_p = (x / p.temperature).log_softmax(1).masked_fill(p.mask, 0)
    from_teacher = -(q * log_p).sum() / max(p.n, 1)
    from_labels = softmax_reference(p, drawn, x)
    return p.alpha * p.temperature**2 * from_teacher + (1 - p.alpha) * from_labels


def sampled_case(p, e, weight, bias=None):
    torch.manual_seed(p.seed)  # Categorical takes no generator
    settings = {"n_samples": p.n_samples, "noise": noise_of(p), "sparse": p.sparse}
    return sampled_softmax(e, p.labels, weight, bias, **settings)


def sampled_reference(p, drawn, e, weight, bias=None):
    noise = noise_of(p) or ClassFrequencies(torch.ones(p.c))
    torch.manual_seed(p.seed)
    drawn = torch.randint(p.c, (p.n_samples,)) if p.noise == "uniform" else None
    if drawn is None:
        drawn = noise.sample((p.n_samples,))
    q, x = noise.log_prob(torch.arange(p.c)).exp(), F.linear(e, weight, bias)
    total = x.new_zeros(())
    for row, t in zip(x, p.labels.tolist()):
        kept = drawn[drawn != t]
        if len(kept):
            scores = row[kept] - (len(kept) * q[kept] / (1 - q[t])).log()
            total = total + torch.cat([row[t : t + 1], scores]).logsumexp(0) - row[t]
    return total / max(p.n, 1)


def ask(p, function, *tensors, **settings):
    """The result and the actions that the reward was asked about."""
    seen = []
    reward = lambda actions: seen.append(actions) or p.pay[actions]  # noqa: E731
    result = function(tensors[0], reward, *tensors[1:], generator=seeded(p), **settings)
    p.drawn = seen[0]
    return result


def value_case(p, x):
    return ask(p, value_function, x, epsilon=p.epsilon, consistent=p.consistent)


def value_reference(p, actions, x):
    a = actions[:, None]
    v = x.gather(1, a).squeeze(1)
    if p.consistent:
        v = v - x.scatter(1, a, -INF).logsumexp(1)
    r = p.pay[actions].double()
    return F.binary_cross_entropy_with_logits(v, r, reduction="sum") / max(p.n, 1)


def policy_case(p, x, value=None):
    tensors = [x] if value is None else [x, value]
    return ask(p, policy_gradient, *tensors, entropy_weight=p.entropy_weight)


def policy_reference(p, actions, x, value=None):
    r, v, loss = p.pay[actions].double(), 0, 0
    if value is not None:
        v = value.detach().sigmoid()
        loss = F.binary_cross_entropy_with_logits(value, r, reduction="none")
    log_p = x.log_softmax(1).masked_fill(p.mask, 0)
    entropy = -(x.softmax(1) * log_p).sum(1)
    loss = loss - (r - v) * log_p.gather(1, actions[:, None]).squeeze(1)
    return (loss - p.entropy_weight * entropy).sum() / max(p.n, 1)


# The names of the floating inputs, the last of which is optional where there is a switch.
CASES = {
    "softmax_cross_entropy": (softmax_case, softmax_reference, ["logits"], None),
    "teacher_student": (teacher_case, teacher_reference, ["logits", "teacher"], None),
    "sampled_softmax": (
        sampled_case,
        sampled_reference,
        ["embeddings", "weight", "class_bias"],
        "bias",
    ),
    "value_function": (value_case, value_reference, ["logits"], None),
    "policy_gradient": (policy_case, policy_reference, ["logits", "value"], "baseline"),
}
every_objective = pytest.mark.parametrize("name", CASES)


def tensors_of(name, p):
    _, _, names, optional = CASES[name]
    names = names[:-1] if optional and not getattr(p, optional) else names
    return [getattr(p, key).detach() for key in names]


def gradients(loss, tensors):
    grads = torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)
    return [grad.to_dense() if grad.is_sparse else grad for grad in grads]


def evaluate(name, p, tensors):
    """The loss, the metrics and the gradients on all floating inputs."""
    p.drawn, p.wide = None, torch.promote_types(p.dtype, torch.float32)
    tensors = [tensor.requires_grad_() for tensor in tensors]
    loss, metrics = CASES[name][0](p, *tensors)
    return loss, metrics, gradients(loss, tensors)


def expected(name, p, tensors):
    """The same loss and gradients in float64, for what was drawn in the last evaluation."""
    tensors = [tensor.detach().double().requires_grad_() for tensor in tensors]
    loss = CASES[name][1](p, p.drawn, *tensors)
    if loss.requires_grad:
        return loss, gradients(loss, tensors)
    return loss, [torch.zeros_like(tensor) for tensor in tensors]


def check_ranges(p, loss, metrics, grads):
    """What holds for any input at all."""
    assert loss.shape == () and loss.dtype == p.wide and loss.isfinite()
    for grad in grads:
        assert grad.dtype == p.dtype and grad.isfinite().all()
    for name, value in metrics.items():
        assert value.shape == () and value.isfinite() and value >= -1e-6
        if name != "baseline_loss":
            assert value <= (math.log(p.c) if name == "entropy" else 1) + 1e-5
    if p.n == 0:
        assert loss == 0 and all(value == 0 for value in metrics.values())
        assert all((grad == 0).all() for grad in grads)


def check_close(name, p, loss, grads, other_loss, other_grads):
    """Equal to the rounding of the scores and, for gradients, of their own type."""
    t = p.temperature if name == "teacher_student" else 1
    d = 30 * p.d if name == "sampled_softmax" else 1
    rounding = 16 * torch.finfo(p.wide).eps * (1 + 6 * p.size * d / t) * max(t, 1) ** 2
    torch.testing.assert_close(loss.double(), other_loss.double(), rtol=1e-5, atol=rounding)
    eps = torch.finfo(p.dtype).eps
    for grad, other in zip(grads, other_grads, strict=True):
        atol = (eps + rounding) * max([1.0, *other.abs().flatten().tolist()])
        torch.testing.assert_close(grad.double(), other.double(), rtol=4 * eps, atol=atol)


@every_objective
@given(p=problems(sizes=[0.0, 1.0, 30.0]))
def test_loss_and_gradients_are_those_in_float64(name, p):
    # The value of a sole action is 1, and its cross entropy infinite.
    p.consistent = p.consistent and bool(((~p.mask).sum(1) > 1).all())
    tensors = tensors_of(name, p)
    loss, metrics, grads = evaluate(name, p, tensors)
    check_ranges(p, loss, metrics, grads)
    loss64, grads64 = expected(name, p, tensors)
    check_close(name, p, loss, grads, loss64, grads64)
    for tensor, grad in zip(tensors, grads):
        assert (grad[tensor == -INF] == 0).all()


@every_objective
@given(p=problems())
def test_scores_of_any_size_give_finite_numbers(name, p):
    tensors = tensors_of(name, p)
    loss, metrics, grads = evaluate(name, p, tensors)
    check_ranges(p, loss, metrics, grads)
    for tensor, grad in zip(tensors, grads):
        assert (grad[tensor == -INF] == 0).all()
    if p.drawn is not None:
        assert not p.mask.gather(1, p.drawn[:, None]).any()


@every_objective
@given(p=problems(sizes=[0.0, 1.0, 30.0], layouts=LAYOUTS[1:]))
def test_layout_in_memory_does_not_matter(name, p):
    tensors = tensors_of(name, p)
    copies = [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]
    loss, metrics, grads = evaluate(name, p, tensors)
    p.labels = p.labels.clone()
    copied_loss, copied_metrics, copied_grads = evaluate(name, p, copies)
    check_close(name, p, loss, grads, copied_loss, copied_grads)
    for key, value in metrics.items():
        torch.testing.assert_close(value, copied_metrics[key], rtol=1e-4, atol=1e-4)


@given(p=problems())
def test_labels_and_teachers_that_the_student_masks_stay_finite(p):
    """Their cross entropy is infinite; it becomes a large number, and masked classes stay."""
    p.labels, p.teacher = p.any_labels, p.other_teacher
    for name in ("softmax_cross_entropy", "teacher_student"):
        loss, metrics, grads = evaluate(name, p, tensors_of(name, p))
        check_ranges(p, loss, metrics, grads)
        assert (grads[0][p.mask] == 0).all()


@given(p=problems())
def test_two_classes_are_a_logistic_regression(p):
    x = p.logits[:, :1] if p.c > 1 else p.logits
    x = torch.cat([x, -x], 1).double().clamp(-1e30, 1e30)
    labels = p.labels % 2
    loss, _ = softmax_cross_entropy(x, labels)
    wanted = F.binary_cross_entropy_with_logits(x[:, 1] - x[:, 0], labels.double(), reduction="sum")
    torch.testing.assert_close(loss, wanted / max(p.n, 1), rtol=1e-12, atol=1e-12)


@given(p=problems())
def test_rewards_are_one_where_actions_are_labels(p):
    rewards = reward_if_correct(p.labels)(p.any_labels)
    pairs = zip(p.labels.tolist(), p.any_labels.tolist())
    assert rewards.tolist() == [float(label == action) for label, action in pairs]


@given(p=problems(), shape=st.lists(st.integers(0, 4), max_size=3).map(tuple))
def test_noise_is_drawn_where_its_probability_is_positive(p, shape):
    for noise in (LogUniform(p.c), ClassFrequencies(p.counts.to(p.dtype))):
        probabilities = noise.log_prob(torch.arange(p.c)).exp()
        torch.testing.assert_close(probabilities.sum().item(), 1.0, rtol=1e-12, atol=0)
        ids = noise.sample(shape, generator=seeded(p))
        assert ids.dtype == torch.int64 and ids.shape == shape
        assert (probabilities[ids] > 0).all()
        assert torch.equal(noise.log_prob(ids).exp(), probabilities[ids])
