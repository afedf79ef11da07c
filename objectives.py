"""Five training objectives for classifiers, as plain functions of PyTorch tensors.

softmax_cross_entropy, teacher_student and sampled_softmax play supervised learning: they are told
the right class of every example. value_function and policy_gradient play a contextual bandit: they
learn from actions and their rewards, on-line or from a log. epsilon_greedy and sample_actions
choose what to do; LogUniform and ClassFrequencies are noise for sampled_softmax.

Each loss returns (loss, metrics): a scalar tensor, the mean over the examples (0 where none are),
and a dict of detached scalar tensors that stay on the device until read.

Letters: C classes or actions, D embedding size, x = logits (scores) of one example, p = softmax(x),
t = its label, a = its action, r = its reward. [...] are any leading dimensions, or none. Inputs are
float16, bfloat16, float32 or float64; the arithmetic is at least float32, also under autocast. A
logit of -inf masks a class or action: its probability and gradient are 0, it is never chosen; it
must be neither the label nor the action taken, and not all of an example may be masked. Any other
score that is not finite makes the loss so, too, so that a GradScaler sees it. A label of -100
leaves its example out of loss, gradient, metrics and mean, provided that its scores obey the above.

A wrong type or dtype raises TypeError, a wrong shape or value ValueError; both name the argument.
The values of tensors (labels in range, rewards between 0 and 1) are checked on the CPU alone, and
not under torch.compile or vmap: elsewhere that would make the program wait for the device.

torch.compile makes one graph of each function, whatever the batch size and settings (torch 2.6 one
for each value of a float), but takes no generator, and inductor, its default backend, no
sparse=True. torch.func.grad and vmap work as well; where something is drawn, vmap needs
randomness="different".
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

Loss = tuple[Tensor, dict[str, Tensor]]


def softmax_cross_entropy(logits: Tensor, labels: Tensor) -> Loss:
    """Softmax cross entropy: raise the label's score, lower all others.

    loss = -log p_t = -x_t + log sum_c exp(x_c), with gradient p_c - [c = t] on logit c.

    Args:
        logits: [..., C] floating.
        labels: [...] int64, 0 <= label < C, or -100.
    Returns (loss, metrics): accuracy, the fraction of examples whose highest logit is the label's.

    Examples: two sequences, one of them padded. Ten equal scores cost log(10).
        >>> labels = torch.tensor([[1, 2, 3, 4], [5, 6, -100, -100]])
        >>> loss, _ = softmax_cross_entropy(torch.zeros(2, 4, 10), labels)
        >>> round(loss.item(), 4)
        2.3026

        In-batch negatives: user i must find its item, in column i, among those of the others. The
        logarithm of their frequencies q is taken off, since popular items stand there more often;
        where a user's own item stands in another column, too, that is masked.
        >>> users, items = torch.randn(4, 8), torch.tensor([7, 3, 7, 5])
        >>> table, q = torch.randn(10, 8), torch.full([10], 0.1)
        >>> logits = users @ table[items].T - q[items].log()
        >>> hits = (items == items[:, None]) & ~torch.eye(4, dtype=torch.bool)
        >>> loss, _ = softmax_cross_entropy(logits.masked_fill(hits, -math.inf), torch.arange(4))
    """
    _check("logits", logits, "floating", "...", "C")
    t, told = _check_labels(labels, logits.shape)
    log_p = _wide(logits).log_softmax(-1)
    return _mean(-_at(log_p, t), told), {"accuracy": _mean(logits.argmax(-1) == t, told)}


def teacher_student(
    logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float = 0.5,
    temperature: float = 1.0,
) -> Loss:
    """Knowledge distillation: match a teacher's probabilities as well as the labels.

    loss = alpha T^2 CE(softmax(teacher / T), x / T) + (1 - alpha) CE(onehot(t), x), where
    CE(q, x) = -sum_c q_c log softmax(x)_c. At T = 1 the gradient on logit c is p_c - target_c with
    target = alpha softmax(teacher) + (1 - alpha) onehot(t); T^2 keeps the size of the teacher's
    gradient when T grows. No gradient reaches the teacher.

    Args:
        logits, teacher_logits: [..., C] floating.
        labels: [...] int64, 0 <= label < C, or -100.
        alpha: weight of the teacher, in [0, 1]. 0 is softmax_cross_entropy, 1 uses no label.
        temperature: T > 0. Above 1 the teacher's small probabilities count for more.
    Returns (loss, metrics): accuracy, and agreement, the fraction of examples where student and
        teacher prefer the same class.
    Source: Hinton, Vinyals & Dean 2015, https://arxiv.org/abs/1503.02531.

    Example: the logarithm of soft labels is a teacher, that of smoothed ones for instance.
        >>> logits, labels = torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([1])
        >>> soft = 0.9 * F.one_hot(labels, 3) + 0.1 / 3
        >>> loss, _ = teacher_student(logits, labels, soft.log(), alpha=1.0)
        >>> torch.allclose(loss, F.cross_entropy(logits, labels, label_smoothing=0.1))
        True
    """
    _check("logits", logits, "floating", "...", "C")
    _check("teacher_logits", teacher_logits, "floating", *logits.shape)
    _check_range("alpha", alpha, 0, 1, Real)
    _check_range("temperature", temperature, _ABOVE_0, _FINITE, Real)
    t, told = _check_labels(labels, logits.shape)
    log_p = _scores(logits).log_softmax(-1)
    softened = _scores(logits, temperature).log_softmax(-1)
    q = _scores(teacher_logits.detach(), temperature).softmax(-1)
    from_teacher = alpha * temperature * temperature * -(q * softened).sum(-1)
    # Large, but finite, where the teacher prefers a class that the student masks.
    from_teacher = from_teacher.clamp(max=torch.finfo(q.dtype).max / 8)
    loss = from_teacher + (1 - alpha) * -_at(log_p, t)
    best, taught = logits.argmax(-1), teacher_logits.argmax(-1)
    metrics = {"accuracy": _mean(best == t, told), "agreement": _mean(best == taught, told)}
    return _mean(loss, told), metrics


def sampled_softmax(
    embeddings: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    n_samples: int = 5,
    noise: Any = None,
    sparse: bool = False,
    generator: Generator | None = None,
) -> Loss:
    """Softmax cross entropy against a few sampled classes, for when C is very large.

    It takes the last layer's weights instead of its output, and computes only the scores that it
    needs, x_c = e . weight_c + bias_c: those of the labels and of n_samples noise classes, drawn
    from a distribution q with replacement and shared by all examples. One that equals an example's
    label is rejected for it.

    loss = -x_t + log(exp(x_t) + sum_{kept c} exp(x_c - log(k q_c / (1 - q_t)))), where k counts the
    noise classes kept for that example. Given k > 0, the sum is an unbiased estimate of
    sum_{c != t} exp(x_c); where k = 0, with probability q_t^n_samples, the loss is 0. The loss is
    too small on average, the less so the larger n_samples. Classes not drawn have gradient 0.
    (TensorFlow's loss has other values on the same draws: it corrects the label's score, too.)

    Args:
        embeddings: [..., D] floating, the input of the last layer.
        labels: [...] int64, 0 <= label < C, or -100.
        weight: [C, D] floating, the last layer's weight.
        bias: [C] floating, the last layer's bias, or None.
        n_samples: how many noise classes to draw, at least 1.
        noise: q; None is uniform, else anything with sample(shape) and log_prob(ids) over the ids 0
            to C - 1 on the device of the inputs: LogUniform, ClassFrequencies, a Categorical of
            torch.distributions. The closer to the labels' frequencies, the fewer samples it takes.
        sparse: whether the gradients of weight and bias are sparse tensors of the rows used, so
            that a step costs the same however large C is. They fit SGD (without weight decay),
            SparseAdam and Adagrad, and need weight and bias to be parameters, not computed. A
            DistributedDataParallel averages them only for nn.Embedding(C, D, sparse=True), whose
            weight does as well; else keep the layer out of it and average them yourself.
        generator: makes the draw repeatable; torch.distributions take none, but torch.manual_seed.
    Returns (loss, metrics): kept, the mean fraction of noise classes kept.
    Sources: Bengio & Senecal 2008; Jean et al. 2014, https://arxiv.org/abs/1412.2007; TensorFlow's
    "Candidate Sampling Algorithms Reference".

    Example: a million classes, of which a step touches 132 at most.
        >>> layer = torch.nn.Linear(16, 1_000_000)
        >>> e, labels = torch.randn(32, 16), torch.randint(1_000_000, [32])
        >>> settings = {"n_samples": 100, "noise": LogUniform(1_000_000), "sparse": True}
        >>> loss, _ = sampled_softmax(e, labels, layer.weight, layer.bias, **settings)
        >>> loss.backward()
        >>> torch.optim.SGD(layer.parameters(), lr=0.1).step()
    """
    _check("embeddings", embeddings, "floating", "...", "D")
    _check("weight", weight, "floating", "C", embeddings.shape[-1])
    if bias is not None:
        _check("bias", bias, "floating", len(weight))
    t, told = (x.flatten() for x in _check_labels(labels, (*embeddings.shape[:-1], len(weight))))
    dtype = torch.promote_types(embeddings.dtype, torch.promote_types(weight.dtype, torch.float32))
    drawn, n = _draw(noise, n_samples, weight, generator), len(t)
    # An example to leave out borrows a class that was drawn, so that no other row is touched.
    ids = torch.cat([torch.where(told, t, drawn[:1]), drawn])
    if noise is None:
        log_q = torch.full_like(ids, -math.log(len(weight)), dtype=dtype)
    else:
        log_q = noise.log_prob(ids)
        _check("noise.log_prob(ids)", log_q, "floating", len(ids))
        log_q = log_q.detach()
    first, end = torch.searchsorted(drawn, torch.stack([t, t + 1]))
    k = n_samples - (end - first)

    e, sizes = embeddings.reshape(n, weight.shape[1]).to(dtype), [n, n_samples]
    w_t, w_c = F.embedding(ids, weight, sparse=sparse).to(dtype).split_with_sizes(sizes)
    # log(k / (1 - q_t)), which all noise scores lack, is on the label's: one number, not k of them.
    # Where it is infinite there is no noise, and any number does.
    log_k = (k.clamp(min=1) / (1 - log_q[:n].exp())).clamp(max=torch.finfo(log_q.dtype).max).log()
    b = 0 if bias is None else bias.gather(0, ids, sparse_grad=sparse)
    b_t, b_c = (b + torch.cat([log_k, -log_q[n:]])).to(dtype).split_with_sizes(sizes)
    with torch.autocast("cpu" if e.is_meta else e.device.type, enabled=False):
        x_t, x_c = (e * w_t).sum(1) + b_t, torch.addmm(b_c, e, w_c.T)
    if _extremes(k, (0, 0))[0] < n_samples:  # seldom, where classes are many, and dear
        x_c = x_c.masked_fill(drawn == t[:, None], -math.inf)
    m = torch.maximum(x_t.detach(), x_c.detach().amax(1))  # so that no exponential overflows
    loss = ((x_t - m).exp() + (x_c - m[:, None]).exp().sum(1)).log() - (x_t - m)
    return _mean(loss, told), {"kept": _mean(_wide(k) / n_samples, told)}


def value_function(
    logits: Tensor, actions: Tensor, rewards: Tensor, *, consistent: bool = False
) -> Loss:
    """Learn the expected reward of each action, from the one action taken.

    loss = -r log v_a - (1 - r) log(1 - v_a), binary cross entropy between the action's value and
    its reward. The value is sigmoid(x_a), whose gradient is v_a - r on logit a and 0 on all others,
    or softmax(x)_a, so that the values of all actions sum to 1.

    Args:
        logits: [..., C] floating.
        actions: [...] int64, 0 <= action < C, chosen in any way, by epsilon_greedy for instance.
        rewards: [...] real or bool, in [0, 1].
        consistent: whether values sum to 1, right where exactly one action is rewarded.
    Returns (loss, metrics): reward, the mean.
    Source: Sutton & Barto, Reinforcement Learning, 2nd edition 2018, chapter 2.

    Example: a bandit with three actions that rewards two of them.
        >>> logits = torch.tensor([[-3.0, 2.0, 1.0]])
        >>> actions = epsilon_greedy(logits, epsilon=0)
        >>> loss, metrics = value_function(logits, actions, rewards=actions > 0)
        >>> round(loss.item(), 4), metrics["reward"].item()  # -log(sigmoid(2))
        (0.1269, 1.0)
    """
    r = _check_bandit(logits, actions, rewards, 0, 1)
    x = _scores(logits)
    x_a = _at(x, actions) + (0 * x).sum(-1)  # + 0, or NaN for an overflow anywhere
    if consistent:
        # softmax(x)_a = sigmoid(x_a - log sum_{c != a} exp(x_c)), which cannot lose
        # 1 - softmax(x)_a to rounding; where there are no others it is 1 whatever x_a.
        others = x.scatter(-1, actions[..., None], torch.finfo(x.dtype).min / 2)
        x_a, certain = x_a - others.logsumexp(-1), torch.finfo(x.dtype).max / 16
        x_a = torch.where(x_a > certain, certain, x_a)
    loss = F.binary_cross_entropy_with_logits(x_a, r, reduction="none")
    return _mean(loss), {"reward": _mean(r)}


def policy_gradient(
    logits: Tensor,
    actions: Tensor,
    rewards: Tensor,
    baseline: Tensor | None = None,
    *,
    entropy_weight: float = 0.04,
    propensities: Tensor | None = None,
) -> Loss:
    """REINFORCE: make an action likelier the more its reward exceeds the expected one.

    loss = -(r - V) p_a / q - entropy_weight H(p) + BCE(V, r), where q is the probability with which
    the action was chosen, V = sigmoid(baseline) the expected reward, a constant in the first term,
    and H(p) = -sum_c p_c log p_c the entropy. Averaged over the choices of q, which must be above 0
    wherever p is, the first term's gradient is that of minus the expected reward of p, whatever V
    is. For actions drawn from p itself, q is p_a as a constant, and the gradient that of
    -(r - V) log p_a: (V - r) ([c = a] - p_c).

    Args:
        logits: [..., C] floating.
        actions: [...] int64, 0 <= action < C.
        rewards: [...] real or bool; in [0, 1] with a baseline, any finite numbers without.
        baseline: [...] floating, the logit of V, usually one more output of the network; None for
            V = 0 and no third term.
        entropy_weight: at least 0. Too little, and the policy stops exploring before it has found
            the best actions; too much, and it never commits to them.
        propensities: [...] floating, in (0, 1]: q, for actions from a log. None for actions just
            drawn from softmax(logits), as by sample_actions.
    Returns (loss, metrics): reward, the mean, and entropy, the mean H(p) in nats; with a baseline
        baseline, the mean V, and baseline_loss, the mean of the third term; with propensities
        weight, the mean of p_a / q, which is 1 on average for a policy not learned from this log.
    Sources: Williams 1992, https://doi.org/10.1007/BF00992696; Sutton & Barto, Reinforcement
    Learning, 2nd edition 2018, chapter 13; for logs Joachims, Swaminathan & de Rijke 2018,
    https://openreview.net/forum?id=SJaP_-xAb.

    Examples: a bandit that rewards action 3 of ten, on-line:
        >>> logits = torch.zeros(2, 10, requires_grad=True)
        >>> actions = sample_actions(logits)
        >>> loss, metrics = policy_gradient(logits, actions, rewards=actions == 3)
        >>> round(metrics["entropy"].item(), 4)  # log(10): ten equally likely actions
        2.3026

        From a log of what another policy did, with which probability:
        >>> actions, rewards, q = torch.tensor([[3, 7], [1, 0], [0.2, 0.5]]).unbind()
        >>> loss, metrics = policy_gradient(logits, actions.long(), rewards, propensities=q)
        >>> round(metrics["weight"].item(), 4)  # (0.1 / 0.2 + 0.1 / 0.5) / 2
        0.35
    """
    low, high = (-_FINITE, _FINITE) if baseline is None else (0, 1)
    r = _check_bandit(logits, actions, rewards, low, high)
    _check_range("entropy_weight", entropy_weight, 0, _FINITE, Real)
    log_p = _scores(logits).log_softmax(-1)
    log_p_a, entropy = _at(log_p, actions), -(log_p.exp() * log_p).sum(-1)
    metrics = {"reward": _mean(r), "entropy": _mean(entropy).detach()}
    weight, advantage, loss = (log_p_a - log_p_a.detach()).exp(), r, -entropy_weight * entropy
    if propensities is not None:
        _check("propensities", propensities, "floating", *actions.shape)
        _check_range("propensities", propensities, _ABOVE_0, 1)
        weight = (log_p_a - _wide(propensities.detach()).log()).exp()
        metrics["weight"] = _mean(weight).detach()
    if baseline is not None:
        _check("baseline", baseline, "floating", *actions.shape)
        x_v = _wide(baseline)
        x_v = x_v + 0 * x_v  # + 0, or NaN for an overflow
        v = x_v.detach().sigmoid()
        baseline_loss = F.binary_cross_entropy_with_logits(x_v, r, reduction="none")
        advantage, loss = r - v, loss + baseline_loss
        metrics["baseline"], metrics["baseline_loss"] = _mean(v), _mean(baseline_loss).detach()
    return _mean(loss - advantage * weight), metrics


def epsilon_greedy(
    logits: Tensor, epsilon: float = 0.2, *, generator: Generator | None = None
) -> Tensor:
    """Choose the action of the highest score, or, with probability epsilon, any at random.

    Of logits, [..., C] floating, it makes actions, [...] int64; epsilon is in [0, 1], a generator
    makes the choice repeatable. The propensity of an action, for a log, is
    (1 - epsilon) [a = argmax x] + epsilon / C, with C not counting what is masked.

    Example:
        >>> epsilon_greedy(torch.tensor([[0.0, 2.0, 1.0]]), epsilon=0)
        tensor([1])
    """
    _check("logits", logits, "floating", "...", "C")
    _check_range("epsilon", epsilon, 0, 1, Real)
    # The largest of C uniform numbers is at any action with the same probability.
    uniform = partial(torch.rand, dtype=torch.float32, device=logits.device, **_given(generator))
    anything = uniform(logits.shape).masked_fill(logits == -math.inf, -1).argmax(-1)
    explore = uniform(logits.shape[:-1]) < epsilon
    return torch.where(explore, anything, logits.argmax(-1))


def sample_actions(logits: Tensor, *, generator: Generator | None = None) -> Tensor:
    """Draw an action from the policy softmax(x).

    Of logits, [..., C] floating, it makes actions, [...] int64; a generator makes the draw
    repeatable. The propensity of an action, for a log, is softmax(x)_a.

    Example:
        >>> sample_actions(torch.tensor([[-math.inf, 0.0], [0.0, -math.inf]]))
        tensor([1, 0])
    """
    _check("logits", logits, "floating", "...", "C")
    p = _wide(logits.detach()).softmax(-1)
    # The first of C exponential clocks with rates p to ring is a with probability p_a.
    # torch.multinomial draws the same way, but makes a GPU wait for checks of p.
    return (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1)


class LogUniform:
    """Noise for classes sorted by falling frequency, as words in a vocabulary often are.

    P(c) = log((c + 2) / (c + 1)) / log(n_classes + 1), close to Zipf's law. A draw inverts the
    distribution function, so n draws cost O(n) whatever n_classes is.

    Args:
        n_classes: the number of classes, at least 1.
        device: where samples are made; None is PyTorch's default device.

    Example:
        >>> LogUniform(3).log_prob(torch.arange(3)).exp()
        tensor([0.5000, 0.2925, 0.2075], dtype=torch.float64)
    """

    def __init__(self, n_classes: int, *, device: torch.device | str | None = None):
        _check_range("n_classes", n_classes, 1, _FINITE, int)
        self.n_classes, self.device = n_classes, torch.empty(0, device=device).device

    def sample(self, shape: Sequence[int], *, generator: Generator | None = None) -> Tensor:
        """Class ids of this shape, int64, drawn independently."""
        u = torch.rand(shape, dtype=_widest(self.device), device=self.device, **_given(generator))
        ids = (u * math.log(self.n_classes + 1)).exp().long() - 1
        return ids.clamp(max=self.n_classes - 1)  # exp may round up

    def log_prob(self, ids: Tensor) -> Tensor:
        """log P(id) for ids of any shape, int64; float64, but float32 on Apple's GPUs."""
        share = (1 / (ids.to(_widest(ids.device)) + 1)).log1p()
        return share.log() - math.log(math.log(self.n_classes + 1))


class ClassFrequencies:
    """Noise in proportion to given counts or weights, for any number of classes.

    A Categorical of torch.distributions does the same, but reads all C probabilities at every draw
    and stops at 2^24 classes. This looks n draws up in the cumulative sum, O(n log C).

    Args:
        counts: [C] real or bool, not negative, not all 0; on the device where samples are wanted.

    Example:
        >>> ClassFrequencies(torch.tensor([3, 0, 1])).log_prob(torch.tensor([0, 2])).exp()
        tensor([0.7500, 0.2500], dtype=torch.float64)
    """

    def __init__(self, counts: Tensor):
        _check("counts", counts, "real or bool", "C")
        _check_range("counts", counts, 0, _FINITE)
        counts = counts.detach().to(_widest(counts.device))
        total, cumulative = counts.sum(), counts.cumsum(0)
        _check_range("counts.sum()", total, _ABOVE_0, _FINITE)
        self.n_classes, self.probabilities = len(counts), counts / total
        self.cumulative = cumulative / cumulative.max()  # ends at 1, without rounding

    def sample(self, shape: Sequence[int], *, generator: Generator | None = None) -> Tensor:
        """Class ids of this shape, int64, drawn independently."""
        kind, device = self.cumulative.dtype, self.cumulative.device
        u = torch.rand(shape, dtype=kind, device=device, **_given(generator))
        return torch.searchsorted(self.cumulative, u, right=True)

    def log_prob(self, ids: Tensor) -> Tensor:
        """log P(id) for ids of any shape, int64; float64, but float32 on Apple's GPUs."""
        return self.probabilities.take(ids).log()


def _draw(noise: Any, n_samples: int, weight: Tensor, generator: Generator | None) -> Tensor:
    """Noise classes, sorted, to look labels up, and to visit memory in its order."""
    _check_range("n_samples", n_samples, 1, _FINITE, int)
    given, size, n_classes = _given(generator), (n_samples,), len(weight)
    if noise is None:
        return torch.randint(n_classes, size, device=weight.device, **given).sort()[0]
    if isinstance(noise, type) or not (hasattr(noise, "sample") and hasattr(noise, "log_prob")):
        raise TypeError(f"noise must have sample(shape) and log_prob(ids), got {noise!r}")
    if getattr(noise, "n_classes", n_classes) != n_classes:
        raise ValueError(f"noise must be over C={n_classes} classes, got {noise.n_classes}")
    drawn: Tensor = noise.sample(size, **given)
    _check("noise.sample(shape)", drawn, "int64", n_samples)
    _check_range("noise.sample(shape)", drawn, 0, n_classes - 1)
    return drawn.sort()[0]


def _given(generator: Generator | None) -> dict[str, Any]:
    """As an argument, left out if None: torch.compile knows no generator, not even that one."""
    return {} if generator is None else {"generator": generator}


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # which Apple's GPUs lack


def _wide(tensor: Tensor) -> Tensor:
    """The tensor in at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _scores(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Logits / temperature in at least float32, -inf and what is near it made finite.

    The probability of such a logit is still 0, but 0 times its logarithm is then 0 and not NaN, and
    clamp stops the gradient. An eighth of the largest number leaves room for sums. +inf, NaN stay.
    """
    x = _wide(logits)
    limit, tiny = torch.finfo(x.dtype).max / 8, torch.finfo(x.dtype).tiny
    # A divisor that rounds to 0 would turn a logit of 0 into NaN.
    return torch.where(x < math.inf, (x / max(temperature, tiny)).clamp(-limit, limit), x)


def _at(x: Tensor, ids: Tensor) -> Tensor:
    return x.gather(-1, ids[..., None]).squeeze(-1)


def _mean(values: Tensor, told: Tensor | None = None) -> Tensor:
    """The mean, or that of the examples told about, without overflow on the way; 0 of nothing."""
    values = _wide(values)
    if told is None:
        return (values / max(values.numel(), 1)).sum()
    return (torch.where(told, values, 0.0) / told.sum().clamp(min=1)).sum()


_ABOVE_0, _FINITE = math.nextafter(0, 1), sys.float_info.max  # ends of intervals that are open
_KINDS: dict[str, Callable[[Tensor], bool]] = {
    "floating": lambda tensor: tensor.is_floating_point(),
    "int64": lambda tensor: tensor.dtype == torch.int64,
    "real or bool": lambda tensor: not tensor.is_complex(),
}


def _check(name: str, value: Tensor, kind: str, *shape: int | str) -> None:
    """Raise unless value is such a tensor; "..." is any dimensions, another name any size but 0."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if not _KINDS[kind](value):
        raise TypeError(f"{name} must be {kind}, got {value.dtype}")
    want = shape[shape[:1] == ("...",) :]
    got = value.shape[max(value.ndim - len(want), 0) :] if want != shape else value.shape
    fits = [g > 0 if isinstance(w, str) else g == w for g, w in zip(got, want)]
    if len(got) != len(want) or not all(fits):
        sizes = ", ".join(map(str, shape))
        raise ValueError(f"{name} must have shape [{sizes}], got {list(value.shape)}")


def _check_range(name: str, value: Any, low: float, high: float, kind: Any = Tensor) -> None:
    """Raise unless the values of a tensor, or one number of this kind, are in [low, high]."""
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{name} must be of type {kind.__name__}, got {type(value).__name__}")
    least, most = _extremes(value, (low, high)) if kind is Tensor else (value, value)
    if not (low <= least and most <= high):
        start = {_ABOVE_0: "(0", -_FINITE: "(-inf"}.get(low, f"[{low}")
        end = "inf)" if high == _FINITE else f"{high}]"
        got = f"{least}" if least == most else f"values from {least} to {most}"
        raise ValueError(f"{name} must lie in {start}, {end}, got {got}")


def _extremes(tensor: Tensor, unknown: tuple[float, float]) -> tuple[float, float]:
    """The least and the greatest value; unknown where there are none, where reading them makes
    the program wait for a GPU, and where that is impossible: while compiling, under vmap."""
    if tensor.device.type == "cpu" and not torch.compiler.is_compiling() and tensor.numel():
        try:
            low, high = tensor.aminmax()
            return low.item(), high.item()
        except RuntimeError:  # vmap: "We don't support vmap over calling .item()"
            pass
    return unknown


def _check_labels(labels: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The labels, 0 where an example is to be left out, and where not, so that it is told."""
    _check("labels", labels, "int64", *shape[:-1])
    told = labels != -100
    t = torch.where(told, labels, 0)
    _check_range("labels", t, 0, shape[-1] - 1)
    return t, told


def _check_bandit(
    logits: Tensor, actions: Tensor, rewards: Tensor, low: float, high: float
) -> Tensor:
    """The rewards, in the precision of the arithmetic."""
    _check("logits", logits, "floating", "...", "C")
    _check("actions", actions, "int64", *logits.shape[:-1])
    _check_range("actions", actions, 0, logits.shape[-1] - 1)
    _check("rewards", rewards, "real or bool", *logits.shape[:-1])
    _check_range("rewards", rewards, low, high)
    return rewards.detach().to(_wide(logits).dtype)
