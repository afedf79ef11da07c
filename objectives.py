"""Five training objectives for classifiers, as plain functions of PyTorch tensors.

Three play supervised learning: they are told the right class of every image.

    softmax_cross_entropy(logits, labels)
    teacher_student(logits, labels, teacher_logits, *, alpha, temperature)
    sampled_softmax(embeddings, labels, weight, bias, *, n_samples, noise, sparse, generator)

Two play a contextual bandit: they choose one action per image, see the reward of that
action, and never see a label.

    value_function(logits, reward, *, epsilon, consistent, generator)
    policy_gradient(logits, reward, baseline, *, entropy_weight, generator)

Beside them, reward_if_correct makes a bandit of labelled data, and LogUniform and
ClassFrequencies are noise for sampled_softmax.

Each returns ``(loss, metrics)``. ``loss`` is a scalar tensor, the mean over the batch,
ready for ``.backward()``; the mean of an empty batch is 0. ``metrics`` is a dict of
detached scalar tensors that stay on the device until you read them.

Letters: N images (or other inputs), C classes or actions, D embedding size,
x = logits of one image, p = softmax(x), t = its label, a = its action, r = its reward.

Common rules. Inputs may be float16, bfloat16, float32 or float64, on any device that they
share; the arithmetic is at least float32, also under autocast. A logit of -inf masks a
class or action out: its probability is 0, it is never chosen, its gradient is 0; not all of
an image may be masked. With N = 0 loss, metrics and gradients are 0. With C = 2 a softmax is
the sigmoid of a difference, x_1 - x_0. With C = 1 it is 1 whatever x: nothing is learned but
the value of value_function without ``consistent``.

A ``generator`` makes the random draws repeatable; it must live on the device of the inputs.
A wrong type or dtype raises TypeError; a wrong shape, device or range raises ValueError;
both name the argument. What can only be known by reading the values of a tensor (labels in
range, rewards between 0 and 1) is checked on the CPU alone, since elsewhere the check would
make the program wait for the device; under torch.compile and vmap it is not checked.

torch.compile makes one graph of each, but takes no ``generator``: torch.manual_seed repeats
the draws, and its default backend, inductor, draws other numbers than eager mode and takes no
``sparse=True``. torch.func.grad and vmap work as well; for the three that draw, vmap needs
``randomness="different"`` or ``"same"``. (torch 2.6 has no grad of a vmap of sampled_softmax.)
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

__all__ = [
    "softmax_cross_entropy",
    "teacher_student",
    "sampled_softmax",
    "value_function",
    "policy_gradient",
    "reward_if_correct",
    "LogUniform",
    "ClassFrequencies",
]

Metrics = dict[str, Tensor]
Reward = Callable[[Tensor], Tensor]
Sizes = Sequence[int | None]  # of a tensor's dimensions; None may be any


class Noise(Protocol):
    """What sampled_softmax asks of a noise distribution over class ids."""

    def sample(self, shape: tuple[int, ...]) -> Tensor: ...

    def log_prob(self, ids: Tensor) -> Tensor: ...


_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def softmax_cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Metrics]:
    """Softmax cross entropy: raise the label's score, lower all others.

    loss = -x_t + log sum_c exp(x_c), with gradient p_c - [c = t] on logit c.

    Args:
        logits: [N, C] floating, any finite values, or -inf for a class masked out.
        labels: [N] int64, 0 <= label < C.

    Returns:
        ``(loss, metrics)``; metrics: ``accuracy``, the fraction of images whose highest
        logit is the label's.

    Raises:
        TypeError, ValueError: as described at the top of this module.

    Example:
        >>> loss, _ = softmax_cross_entropy(torch.zeros(3, 10), torch.tensor([0, 4, 9]))
        >>> round(loss.item(), 4)  # log(10): ten equal scores
        2.3026
    """
    _check_float("logits", logits, ("N", "C"))
    _check_labels(labels, logits, logits.shape[1])
    x = _scores(logits)
    loss = _mean(F.cross_entropy(x, labels, reduction="none"))
    return loss, {"accuracy": _accuracy(x, labels)}


def teacher_student(
    logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float = 0.5,
    temperature: float = 1.0,
) -> tuple[Tensor, Metrics]:
    """Knowledge distillation: match a teacher's probabilities as well as the labels.

    loss = alpha T^2 CE(softmax(teacher / T), x / T) + (1 - alpha) CE(onehot(t), x), where
    CE(q, x) = -sum_c q_c log softmax(x)_c. At T = 1 the gradient on logit c is
    p_c - target_c with target = alpha softmax(teacher) + (1 - alpha) onehot(t); T^2 keeps
    the size of the teacher's gradient when T grows. No gradient reaches the teacher.

    Args:
        logits: [N, C] floating, the student's.
        labels: [N] int64, 0 <= label < C.
        teacher_logits: [N, C] floating.
        alpha: weight of the teacher, in [0, 1]. 0 is softmax_cross_entropy exactly, 1 uses
            no label.
        temperature: T > 0. Above 1 it softens both distributions, so that the teacher's
            small probabilities count for more.

    Returns:
        ``(loss, metrics)``; metrics: ``accuracy`` as in softmax_cross_entropy, and
        ``agreement``, the fraction of images where student and teacher prefer one class.

    Raises:
        TypeError, ValueError: as described at the top of this module.

    Source: Hinton, Vinyals & Dean 2015, https://arxiv.org/abs/1503.02531.

    Example:
        >>> teacher = torch.tensor([[2.0, 0.0]])
        >>> loss, _ = teacher_student(teacher, torch.tensor([0]), teacher, alpha=1.0)
        >>> round(loss.item(), 4)  # the entropy of the teacher: the least possible loss
        0.3653
    """
    _check_float("logits", logits, ("N", "C"))
    _check_labels(labels, logits, logits.shape[1])
    _check_float("teacher_logits", teacher_logits, ("N", "C"), logits.shape)
    _check_device("teacher_logits", teacher_logits, "logits", logits)
    alpha = _number("alpha", alpha, 0, 1)
    temperature = _number("temperature", temperature, 0, math.inf, open_interval=True)
    x = _scores(logits)
    q = _scores(teacher_logits.detach(), temperature).softmax(1)
    from_teacher = -(q * _scores(logits, temperature).log_softmax(1)).sum(1)
    from_label = F.cross_entropy(x, labels, reduction="none")
    loss = _mean(alpha * temperature * temperature * from_teacher + (1 - alpha) * from_label)
    agreement = _accuracy(x, teacher_logits.argmax(1))
    return loss, {"accuracy": _accuracy(x, labels), "agreement": agreement}


def sampled_softmax(
    embeddings: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    n_samples: int = 5,
    noise: Noise | None = None,
    sparse: bool = False,
    generator: Generator | None = None,
) -> tuple[Tensor, Metrics]:
    """Softmax cross entropy against a few sampled classes, for when C is very large.

    It takes the last layer's weights instead of its output, and computes only the scores
    that it needs, x_c = e . weight_c + bias_c: those of the labels and of n_samples noise
    classes, drawn from a distribution q with replacement and shared by the whole batch. No
    [N, C] tensor exists. A noise class that equals an image's label is rejected for it.

    loss = -x_t + log(exp(x_t) + sum_{kept c} exp(x_c - log(k q_c / (1 - q_t)))), where k
    counts the noise classes kept for that image: the sum stands for sum_{c != t} exp(x_c),
    of which it is an unbiased estimate. The loss itself is too small on average, the less
    so the larger n_samples. An image with k = 0 contributes loss 0. The gradient is 0 for
    every class that was not drawn.

    Args:
        embeddings: [N, D] floating, the input of the last layer.
        labels: [N] int64, 0 <= label < C.
        weight: [C, D] floating, the last layer's ``weight``.
        bias: [C] floating, the last layer's ``bias``, or None.
        n_samples: how many noise classes to draw, at least 1.
        noise: q; None is uniform. Otherwise anything with ``sample(shape)`` and
            ``log_prob(ids)`` over the ids 0 to C - 1 on the device of the inputs:
            LogUniform, ClassFrequencies, torch.distributions.Categorical. The closer q
            is to the frequencies of the labels, the fewer samples are needed.
        sparse: whether the gradients of weight and bias are sparse tensors that hold only
            the rows used, so that a training step costs the same however large C is. They
            fit the optimisers SGD (without weight decay), SparseAdam and Adagrad. Both must
            then be the layer's own parameters, not computed from others.
        generator: makes the draw repeatable. Distributions from torch.distributions take
            none: with them it must be None, and torch.manual_seed does the same.

    Returns:
        ``(loss, metrics)``; metrics: ``kept``, the mean fraction of noise classes kept.

    Raises:
        TypeError, ValueError: as described at the top of this module.

    Sources: Bengio & Senecal 2008; Jean et al. 2014, https://arxiv.org/abs/1412.2007;
    TensorFlow's "Candidate Sampling Algorithms Reference".

    Example:
        >>> layer = torch.nn.Linear(16, 1_000_000)
        >>> e, labels = torch.randn(32, 16), torch.randint(1_000_000, (32,))
        >>> loss, _ = sampled_softmax(
        ...     e, labels, layer.weight, layer.bias, n_samples=100, sparse=True
        ... )
        >>> loss.backward()
        >>> layer.weight.grad.is_sparse
        True
    """
    _check_float("embeddings", embeddings, ("N", "D"))
    _check_float("weight", weight, ("C", "D"), (None, embeddings.shape[1]))
    _check_device("weight", weight, "embeddings", embeddings)
    if bias is not None:
        _check_float("bias", bias, ("C",), weight.shape[:1])
        _check_device("bias", bias, "embeddings", embeddings)
    n, n_classes = len(embeddings), len(weight)
    _check_labels(labels, embeddings, n_classes, "embeddings")
    _check_bool("sparse", sparse)
    _check_generator(generator, embeddings.device)
    drawn = _draw(noise, n_samples, labels, n_classes, generator)
    ids = torch.cat([labels, drawn])
    log_q, log_not_label = _log_noise(noise, ids, n, n_classes)

    # How often each label was drawn: seldom, where classes are many, and if never, then there
    # are no [N, n_samples] pairs to compare.
    first, end = torch.searchsorted(drawn, torch.stack([labels, labels + 1]))
    hits = end - first
    rejected = drawn == labels[:, None] if _extremes(hits, unknown=(0, 1))[1] > 0 else None
    k = n_samples - hits

    dtype = torch.promote_types(embeddings.dtype, torch.promote_types(weight.dtype, torch.float32))
    w = F.embedding(ids, weight, sparse=sparse).to(dtype)
    if bias is None:
        b = w.new_zeros(len(ids))
    else:
        b = _scores(bias.gather(0, ids, sparse_grad=sparse)).to(dtype)
    # What every noise score of an image shares, log(k / (1 - q_t)), is taken from their sum.
    log_scale = (k.clamp(min=1).to(dtype).log() - log_not_label).to(dtype)
    loss, *_ = _label_or_noise(embeddings.to(dtype), w, b, log_q, log_scale, rejected)
    return _mean(loss), {"kept": _mean(k / n_samples)}


class _LabelOrNoise(torch.autograd.Function):
    """-log sigmoid(x_t + log_scale - log sum_c exp(x_c - log q_c)) for each image.

    A softmax over all is a choice between the label and the noise classes together. With P the
    probability of the latter and p the softmax among them, the gradient is -P on x_t and P p_c
    on x_c. Left to itself, autograd makes several tensors of the size of p, [N, n_samples], for
    that, and they cost more time than the arithmetic. Here p is the only one that is kept, and
    P scales rows of e instead. A second derivative computes p again, as autograd sees it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        e: Tensor,
        w: Tensor,
        b: Tensor,
        log_q: Tensor | float,
        log_scale: Tensor,
        rejected: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        n = len(e)
        with _own_precision(e):
            x_label = (e * w[:n]).sum(1) + b[:n]
            x_noise = torch.addmm((b[n:] - log_q).to(e.dtype), e, w[n:].T)
        if rejected is not None:
            x_noise.masked_fill_(rejected, -_limit(e.dtype))
        p = x_noise.softmax(1)
        log_noise = x_noise.amax(1) - p.amax(1).log()
        margin = x_label + log_scale - log_noise
        return -F.logsigmoid(margin), p, (-margin).sigmoid()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        e, w, b, *ctx.constants = inputs
        _, p, p_noise = output
        ctx.mark_non_differentiable(p, p_noise)
        ctx.set_materialize_grads(False)  # or zeros would be made for p
        ctx.save_for_backward(e, w, b, p, p_noise)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        if grad is None:
            return (None,) * 6
        e, w, b, p, p_noise = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative
            p, p_noise = _LabelOrNoise.forward(e, w, b, *ctx.constants)[1:]
        n = len(e)
        d = (grad * p_noise)[:, None]
        with _own_precision(e):
            d_e = d * (p @ w[n:] - w[:n])
            d_w = torch.cat([-d * e, p.T @ (d * e)])
            d_b = torch.cat([-d, p.T @ d]).squeeze(1)
        return d_e, d_w, d_b, None, None, None


_label_or_noise: Callable[..., tuple[Tensor, ...]] = _LabelOrNoise.apply
# Otherwise apply works it out at every call.
_LabelOrNoise.forward.__dict__["__signature__"] = inspect.signature(_LabelOrNoise.forward)


def _own_precision(tensor: Tensor) -> AbstractContextManager[None]:
    """Arithmetic in the tensor's own dtype, also under autocast, which the meta device has not."""
    device = tensor.device.type
    if tensor.is_meta or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _draw(
    noise: Noise | None,
    n_samples: int,
    labels: Tensor,
    n_classes: int,
    generator: Generator | None,
) -> Tensor:
    """Noise classes, sorted: to look labels up, and to visit memory in its order."""
    _check_count("n_samples", n_samples)
    if noise is None:
        drawn = torch.randint(n_classes, (n_samples,), generator=generator, device=labels.device)
        return drawn.sort()[0]
    methods = (getattr(noise, name, None) for name in ("sample", "log_prob"))
    if isinstance(noise, type) or not all(map(callable, methods)):
        raise TypeError(
            f"noise must have sample(shape) and log_prob(ids), got {type(noise).__name__}"
        )
    if isinstance(noise, torch.distributions.Categorical):
        over = noise.param_shape[-1]
    else:
        over = getattr(noise, "n_classes", n_classes)
    if over != n_classes:
        raise ValueError(f"noise must be over the C={n_classes} classes of weight, got {over}")
    sample: Callable[..., Tensor] = noise.sample
    if generator is None:
        drawn = sample((n_samples,))
    elif "generator" in inspect.signature(sample).parameters:
        drawn = sample((n_samples,), generator=generator)
    else:
        raise ValueError(
            f"generator must be None with noise of type {type(noise).__name__}, "
            f"which takes none, got {generator}; use torch.manual_seed"
        )
    _check_int("noise.sample((n_samples,))", drawn, n_samples)
    _check_device("noise.sample((n_samples,))", drawn, "labels", labels)
    _check_range("noise.sample((n_samples,))", drawn, n_classes)
    return drawn.sort()[0]


def _log_noise(
    noise: Noise | None, ids: Tensor, n: int, n_classes: int
) -> tuple[Tensor | float, Tensor | float]:
    """log q_c of the noise classes and log(1 - q_t) of the n labels before them in ids."""
    if noise is None:
        return -math.log(n_classes), math.log1p(-1 / max(n_classes, 2))
    log_q = noise.log_prob(ids)
    _check_float("noise.log_prob(ids)", log_q, ("N + n_samples",), ids.shape)
    _check_device("noise.log_prob(ids)", log_q, "labels", ids)
    tiny = torch.finfo(log_q.dtype).tiny  # where q_t is 1, everything was rejected
    return log_q[n:], (1 - log_q[:n].exp()).clamp(min=tiny).log()


def value_function(
    logits: Tensor,
    reward: Reward,
    *,
    epsilon: float = 0.2,
    consistent: bool = False,
    generator: Generator | None = None,
) -> tuple[Tensor, Metrics]:
    """Learn the expected reward of each action, from the one action taken.

    The action a is epsilon-greedy: with probability epsilon any action, each as likely as
    the others, else the one of highest value. loss = -r log v_a - (1 - r) log(1 - v_a),
    binary cross entropy between its value v_a and its reward r.

    The value is sigmoid(x_a), or, with ``consistent=True``, softmax(x)_a, so that the
    values of all actions sum to 1 (right where exactly one action is rewarded). In the
    first case the gradient is v_a - r on logit a and 0 on all others.

    Args:
        logits: [N, C] floating, any finite values, or -inf for an action masked out.
        reward: called exactly once, with the actions, [N] int64; returns their rewards,
            [N], real or bool, in [0, 1], on the same device. No gradient flows through it.
        epsilon: how often to explore, in [0, 1].
        consistent: whether values sum to 1 over the actions.
        generator: makes the actions repeatable.

    Returns:
        ``(loss, metrics)``; metrics: ``reward``, the mean reward.

    Raises:
        TypeError, ValueError: as described at the top of this module.

    Source: Sutton & Barto, Reinforcement Learning, 2nd edition 2018, chapter 2.

    Example:
        >>> logits = torch.tensor([[-3.0, 2.0, 1.0]])  # two of three arms pay here
        >>> loss, metrics = value_function(logits, lambda action: action > 0, epsilon=0)
        >>> round(loss.item(), 4), metrics["reward"].item()  # -log(sigmoid(2))
        (0.1269, 1.0)
    """
    _check_float("logits", logits, ("N", "C"))
    epsilon = _number("epsilon", epsilon, 0, 1)
    _check_bool("consistent", consistent)
    _check_generator(generator, logits.device)
    x = _scores(logits)
    n = len(x)
    with torch.no_grad():
        # The largest of C uniform numbers is at any action with the same probability, and
        # an action masked out gets none.
        lottery = torch.rand(x.shape, generator=generator, device=x.device)
        anything = lottery.masked_fill(logits == -math.inf, -1).argmax(1)
        explore = torch.rand(n, generator=generator, device=x.device) < epsilon
        action = torch.where(explore, anything, logits.argmax(1))
    r = _ask(reward, action, x.dtype)
    value_logit = x.gather(1, action[:, None]).squeeze(1)
    if consistent:
        # softmax(x)_a = sigmoid(x_a - log sum_{c != a} exp(x_c)), and this form cannot
        # lose 1 - softmax(x)_a to rounding.
        others = x.scatter(1, action[:, None], -math.inf).logsumexp(1)
        limit = 4 * _limit(x.dtype)
        value_logit = (value_logit - others).clamp(-limit, limit)
    loss = _mean(F.binary_cross_entropy_with_logits(value_logit, r, reduction="none"))
    return loss, {"reward": _mean(r)}


def policy_gradient(
    logits: Tensor,
    reward: Reward,
    baseline: Tensor | None = None,
    *,
    entropy_weight: float = 0.04,
    generator: Generator | None = None,
) -> tuple[Tensor, Metrics]:
    """REINFORCE: make an action likelier the more its reward exceeds the expected one.

    One action a per image is drawn from the policy p = softmax(x), and with the expected
    reward V = sigmoid(baseline)

    loss = -(r - V) log p_a - entropy_weight H(p) + BCE(V, r),

    H(p) = -sum_c p_c log p_c. The first term has gradient (V - r)([c = a] - p_c) on logit
    c, whose mean over actions is that of minus the expected reward; none flows through V,
    which the third term alone trains: -r log V - (1 - r) log(1 - V).

    Args:
        logits: [N, C] floating, any finite values, or -inf for an action masked out.
        reward: called exactly once, with the actions, [N] int64; returns their rewards,
            [N], real or bool, in [0, 1], on the same device. No gradient flows through it.
        baseline: [N] floating, the logit of V, usually one more output of the network;
            None for no baseline: V = 0 and no third term.
        entropy_weight: at least 0. Too little, and the policy stops exploring before it
            has found the best actions; too much, and it never commits to them.
        generator: makes the actions repeatable.

    Returns:
        ``(loss, metrics)``; metrics: ``reward``, the mean reward; ``entropy``, the mean
        H(p) in nats; with a baseline also ``baseline``, the mean V, and ``baseline_loss``,
        the mean of the third term.

    Raises:
        TypeError, ValueError: as described at the top of this module.

    Sources: Williams 1992, https://doi.org/10.1007/BF00992696; Sutton & Barto,
    Reinforcement Learning, 2nd edition 2018, chapter 13.

    Example:
        >>> logits = torch.zeros(4, 10, requires_grad=True)
        >>> loss, metrics = policy_gradient(logits, lambda action: action == 3)
        >>> loss.backward()
        >>> round(metrics["entropy"].item(), 4)  # log(10): ten equally likely actions
        2.3026
    """
    _check_float("logits", logits, ("N", "C"))
    if baseline is not None:
        _check_float("baseline", baseline, ("N",), logits.shape[:1])
        _check_device("baseline", baseline, "logits", logits)
    entropy_weight = _number("entropy_weight", entropy_weight, 0, math.inf)
    _check_generator(generator, logits.device)
    log_p = _scores(logits).log_softmax(1)
    p = log_p.exp()
    with torch.no_grad():
        # The first of C exponential clocks with rates p to ring is a with probability p_a.
        # torch.multinomial draws the same way, but makes a GPU wait for checks of p.
        action = (p / torch.empty_like(p).exponential_(generator=generator)).argmax(1)
    r = _ask(reward, action, p.dtype)
    entropy = -(p * log_p).sum(1)
    metrics = {"reward": _mean(r), "entropy": _mean(entropy).detach()}
    advantage = r
    loss = -entropy_weight * entropy
    if baseline is not None:
        v_logit = _wide(baseline)
        advantage = r - v_logit.detach().sigmoid()
        baseline_loss = F.binary_cross_entropy_with_logits(v_logit, r, reduction="none")
        loss = loss + baseline_loss
        metrics["baseline"] = _mean(v_logit.detach().sigmoid())
        metrics["baseline_loss"] = _mean(baseline_loss).detach()
    loss = loss - advantage * log_p.gather(1, action[:, None]).squeeze(1)
    return _mean(loss), metrics


def reward_if_correct(labels: Tensor) -> Reward:
    """Turn labels into a bandit's reward: 1.0 for the action that is the label, else 0.0.

    Args:
        labels: [N] int64.

    Returns:
        A function that maps actions, [N] int64, to rewards, [N] float32.

    Raises:
        TypeError, ValueError: as described at the top of this module, for ``labels`` here
            and for ``actions`` when the function is called.

    Example:
        >>> reward_if_correct(torch.tensor([0, 4, 9]))(torch.tensor([0, 5, 9]))
        tensor([1., 0., 1.])
    """
    _check_int("labels", labels)

    def reward(actions: Tensor) -> Tensor:
        _check_int("actions", actions, len(labels))
        _check_device("actions", actions, "labels", labels)
        return (actions == labels).float()

    return reward


class LogUniform:
    """Noise for classes sorted by falling frequency, as words in a vocabulary often are.

    P(c) = log((c + 2) / (c + 1)) / log(n_classes + 1), close to Zipf's law. A draw inverts
    the distribution function, so n draws cost O(n) whatever n_classes is.

    Args:
        n_classes: the number of classes, at least 1.
        device: where samples are made; it needs float64. None is PyTorch's default device.

    Example:
        >>> LogUniform(3).log_prob(torch.arange(3)).exp()
        tensor([0.5000, 0.2925, 0.2075], dtype=torch.float64)
    """

    def __init__(self, n_classes: int, *, device: torch.device | str | None = None):
        _check_count("n_classes", n_classes)
        if device is not None and not isinstance(device, (torch.device, str)):
            raise TypeError(f"device must be a torch.device or str, got {type(device).__name__}")
        try:
            self.device = None if device is None else torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"device must name a device, got {device!r}") from error
        self.n_classes = n_classes

    def sample(self, shape: tuple[int, ...], *, generator: Generator | None = None) -> Tensor:
        """Class ids of this shape, int64, drawn independently."""
        u = _uniform(shape, self.device, generator)
        ids = (u * math.log(self.n_classes + 1)).exp().long() - 1
        return ids.clamp(max=self.n_classes - 1)  # exp may round up

    def log_prob(self, ids: Tensor) -> Tensor:
        """log P(id), float64, for ids of any shape, int64."""
        _check_ids("ids", ids)
        _check_range("ids", ids, self.n_classes)
        share: Tensor = (1 / (ids.double() + 1)).log1p()
        return share.log() - math.log(math.log(self.n_classes + 1))


class ClassFrequencies:
    """Noise in proportion to given counts or weights, for any number of classes.

    torch.distributions.Categorical does the same, but reads all C probabilities at every
    draw and stops at 2^24 classes. This looks n draws up in the cumulative sum, O(n log C).

    Args:
        counts: [C], real or bool, not negative, not all 0; on the device where samples are
            wanted.

    Example:
        >>> ClassFrequencies(torch.tensor([3, 0, 1])).log_prob(torch.tensor([0, 2])).exp()
        tensor([0.7500, 0.2500], dtype=torch.float64)
    """

    def __init__(self, counts: Tensor):
        _check_real("counts", counts, ("C",))
        if counts.is_meta:
            raise ValueError("counts must be on a device that holds values, got meta")
        counts = counts.detach().double()
        self.cumulative = counts.cumsum(0)
        total = self.cumulative[-1].item() if len(counts) else 0.0
        if not (counts >= 0).all() or not 0 < total < math.inf:
            raise ValueError(f"counts must not be negative, nor all 0, got a sum of {total}")
        self.n_classes = len(counts)
        self.probabilities = counts / total
        self.cumulative /= total

    def sample(self, shape: tuple[int, ...], *, generator: Generator | None = None) -> Tensor:
        """Class ids of this shape, int64, drawn independently."""
        u = _uniform(shape, self.cumulative.device, generator)
        return torch.searchsorted(self.cumulative, u, right=True)

    def log_prob(self, ids: Tensor) -> Tensor:
        """log P(id), float64, for ids of any shape, int64."""
        _check_ids("ids", ids)
        _check_device("ids", ids, "counts", self.probabilities)
        _check_range("ids", ids, self.n_classes)
        return self.probabilities[ids].log()


def _uniform(
    shape: tuple[int, ...], device: torch.device | None, generator: Generator | None
) -> Tensor:
    """Random numbers in [0, 1), float64."""
    if not isinstance(shape, (tuple, list)) or not all(isinstance(n, int) for n in shape):
        raise TypeError(f"shape must be a tuple of ints, got {shape!r}")
    if any(n < 0 for n in shape):
        raise ValueError(f"shape must not be negative, got {shape}")
    _check_generator(generator, device)
    return torch.rand(shape, dtype=torch.float64, device=device, generator=generator)


def _wide(tensor: Tensor) -> Tensor:
    """The tensor in at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _scores(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Logits / temperature in at least float32, -inf and what is near it made finite.

    The probability of such a logit is still 0, but 0 times its logarithm is then 0 and not
    NaN, and clamp stops the gradient. An eighth of the largest number leaves room for sums,
    and, shared with T^2, for the weight that a temperature has in the loss.
    """
    x = _wide(logits)
    if temperature != 1:  # A divisor that rounds to 0 would turn a logit of 0 into NaN.
        x = x / max(temperature, torch.finfo(x.dtype).tiny)
    limit = _limit(x.dtype) / max(temperature * temperature, 1)
    return x.clamp(-limit, limit)


def _limit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).max / 8


def _mean(per_image: Tensor) -> Tensor:
    """The mean over the batch, 0 for an empty one, without overflow on the way."""
    return (per_image / max(len(per_image), 1)).sum()


def _accuracy(x: Tensor, labels: Tensor) -> Tensor:
    return _mean((x.detach().argmax(1) == labels).to(x.dtype))


def _ask(reward: Reward, action: Tensor, dtype: torch.dtype) -> Tensor:
    """Call the reward function once and check what it returns."""
    if not callable(reward):
        raise TypeError(
            f"reward must be a function from actions to rewards, got {type(reward).__name__}; "
            "for labels pass reward_if_correct(labels)"
        )
    r = reward(action)
    _check_real("reward(actions)", r, ("N",), action.shape)
    _check_device("reward(actions)", r, "logits", action)
    r = r.detach().to(dtype)
    low, high = _extremes(r)
    if not (low >= 0 and high <= 1):
        raise ValueError(f"reward(actions) must lie in [0, 1], got values from {low} to {high}")
    return r


def _extremes(tensor: Tensor, unknown: tuple[float, float] = (0, 0)) -> tuple[float, float]:
    """The least and the greatest value; ``unknown`` where there are none, where reading them makes
    the program wait for a GPU, and where that is impossible: while compiling, under vmap."""
    if tensor.device.type == "cpu" and not torch.compiler.is_compiling() and tensor.numel():
        try:
            low, high = tensor.aminmax()
            return low.item(), high.item()
        except RuntimeError:  # vmap: "We don't support vmap over calling .item()"
            pass
    return unknown


def _check_tensor(
    name: str, value: Tensor, dims: tuple[str, ...], sizes: Sizes | None = None
) -> None:
    """Raise unless value is a tensor with these dimensions; a size of None may be any."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    sizes = [None] * len(dims) if sizes is None else sizes
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {value.layout}")
    ok = value.ndim == len(dims)
    if not ok or any(want not in (None, got) for want, got in zip(sizes, value.shape)):
        named = (d if want is None else f"{d}={want}" for d, want in zip(dims, sizes))
        want = f"[{', '.join(named)}]"
        raise ValueError(f"{name} must have shape {want}, got {list(value.shape)}")


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    if value >= 2**31:  # what counts in int32 and float64 hold exactly
        raise ValueError(f"{name} must be less than 2^31, got {value}")


def _check_bool(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def _check_real(
    name: str, value: Tensor, dims: tuple[str, ...], sizes: Sizes | None = None
) -> None:
    _check_tensor(name, value, dims, sizes)
    if value.is_complex():
        raise TypeError(f"{name} must be real or bool, got {value.dtype}")


def _check_float(
    name: str, value: Tensor, dims: tuple[str, ...], sizes: Sizes | None = None
) -> None:
    _check_tensor(name, value, dims, sizes)
    if value.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}")
    if "C" in dims and value.shape[dims.index("C")] == 0:
        raise ValueError(f"{name} must have at least one class, got shape {list(value.shape)}")


def _check_int(name: str, value: Tensor, n: int | None = None) -> None:
    _check_tensor(name, value, ("N",), (n,))
    _check_ids(name, value)


def _check_ids(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {value.dtype}")


def _check_labels(
    labels: Tensor, inputs: Tensor, n_classes: int, inputs_name: str = "logits"
) -> None:
    _check_int("labels", labels, len(inputs))
    _check_device("labels", labels, inputs_name, inputs)
    _check_range("labels", labels, n_classes)


def _check_range(name: str, ids: Tensor, n_classes: int) -> None:
    low, high = _extremes(ids)
    if low < 0 or high >= n_classes:
        raise ValueError(f"{name} must lie in [0, {n_classes}), got values from {low} to {high}")


def _check_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}, got {value.device}"
        )


def _check_generator(generator: Generator | None, device: torch.device | None) -> None:
    if generator is None:
        return
    if not isinstance(generator, Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    device, its = device or torch.get_default_device(), generator.device
    other_index = its.index != device.index and None not in (its.index, device.index)
    if its.type != device.type or other_index:
        raise ValueError(f"generator must be on the device of the draws, {device}, got {its}")


def _number(
    name: str, value: float, low: float, high: float, *, open_interval: bool = False
) -> float:
    """The value as a float; raise unless it is finite and in [low, high], or in (low, high)."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:  # an int or fraction beyond the largest float
        number = math.inf
    ok = low < number < high if open_interval else low <= number <= high
    if not ok or math.isinf(number):
        left = "(" if open_interval else "["
        right = ")" if open_interval or math.isinf(high) else "]"
        raise ValueError(f"{name} must lie in {left}{low}, {high}{right}, got {value}")
    return number
