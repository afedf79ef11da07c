"""Five training objectives for classifiers, as plain functions of PyTorch tensors.

In supervised learning the right class of every example is known: softmax_cross_entropy,
teacher_student and sampled_softmax. In a contextual bandit a policy takes one action and sees one
reward: value_function and policy_gradient. epsilon_greedy and sample_actions take the actions,
entropy measures how undecided a policy is, and LogUniform and ClassFrequencies are noise
distributions for sampled_softmax.

Letters: C classes or actions, D embedding size, x = logits (scores) of one example, p = softmax(x),
t = its label, a = its action, r = its reward, A = its advantage. [...] are any leading dimensions,
possibly none. [c = t] is 1 where c is t, and 0 elsewhere.

Every loss returns (loss, metrics). metrics is a dict of detached scalar tensors, means over
the examples unless said otherwise. reduction says what loss is:
    "mean"  the mean over the examples that count, a scalar; 0 if none does (default)
    "sum"   their sum, a scalar
    "none"  the loss of each example, [...], to be weighted, ranked or summed in another way

What an example may contain:
    label or action -100   leaves the example out of loss, gradient, metrics and mean, whatever its
                           reward, advantage and propensity. NaN or inf among its scores, or a mask
                           on all, still makes gradients NaN, also of weights, as in F.cross_entropy
    logit -inf             masks a class: its probability and its gradient are 0, it is never chosen
    any other logit that is not finite makes the loss so, where the loss reads it
Not all classes of an example may be masked, and neither may its label or the action taken.

Inputs are float16, bfloat16, float32 or float64. The arithmetic is in float32, or in float64 if
logits, teacher_logits, embeddings or weight are, under autocast as well. All else is converted.

Errors: a wrong type or dtype raises TypeError, a wrong shape or value ValueError, and the message
names the argument. Values of tensors are checked on the CPU only, and neither under torch.compile
nor under vmap: elsewhere a check would make the program wait for the device.

torch.compile makes one graph of each function for all batch sizes and settings (old versions one
for each value of a float), without a generator; its default backend does not take sparse=True.
torch.func.grad and vmap work, the latter with randomness="different" where something is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

LossAndMetrics = tuple[Tensor, dict[str, Tensor]]

LEFT_OUT = -100  # the label or action of an example that does not count


def softmax_cross_entropy(
    logits: Tensor, labels: Tensor, *, reduction: str = "mean"
) -> LossAndMetrics:
    """Softmax cross-entropy: raise the label's score, lower all others.

        loss = -log p_t = -x_t + log sum_c exp(x_c)

    Its gradient on logit c is p_c - [c = t].

    Args:
        logits: [..., C] floating.
        labels: [...] int64, 0 <= label < C, or -100.
        reduction: "mean", "sum" or "none".

    Returns:
        (loss, metrics): accuracy, the fraction of examples whose highest logit is the label's.

    Examples:
        Two sequences, the second of them padded. Ten equal scores cost log(10).

        >>> labels = torch.tensor([[1, 2, 3, 4], [5, 6, -100, -100]])
        >>> loss, metrics = softmax_cross_entropy(torch.zeros(2, 4, 10), labels)
        >>> round(loss.item(), 4)
        2.3026

        A weight for each example, such as one over the frequency of its class:

        >>> logits, labels = torch.tensor([[0.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
        >>> weights = torch.tensor([3.0, 1.0])
        >>> losses, _ = softmax_cross_entropy(logits, labels, reduction="none")
        >>> losses
        tensor([0.6931, 0.3133])
        >>> loss = (weights * losses).sum() / weights.sum()

        In-batch negatives: user i must find its item, in column i, among those of the others. The
        logarithm of the items' frequencies q is subtracted, because popular items are there more
        often. Where a user's own item is in another column as well, that column is masked.

        >>> users, items = torch.randn(4, 8), torch.tensor([7, 3, 7, 5])
        >>> table, q = torch.randn(10, 8), torch.full([10], 0.1)
        >>> logits = users @ table[items].T - q[items].log()
        >>> same = (items == items[:, None]) & ~torch.eye(4, dtype=torch.bool)
        >>> loss, _ = softmax_cross_entropy(logits.masked_fill(same, -math.inf), torch.arange(4))
    """
    _check_examples(logits, "labels", labels)
    mask = labels != LEFT_OUT
    t = labels.where(mask, 0)
    x = logits.to(_precision(logits))
    loss = -_pick(x.log_softmax(-1), t)
    metrics = {"accuracy": _mean(x.argmax(-1) == t, mask)}
    return _reduce(loss, mask, reduction), metrics


def teacher_student(
    logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "mean",
) -> LossAndMetrics:
    """Knowledge distillation: match a teacher's probabilities as well as the labels.

        loss = alpha T^2 CE(softmax(z / T), softmax(x / T)) + (1 - alpha) (-log p_t)

    with the teacher's logits z and the cross-entropy CE(q, p) = -sum_c q_c log p_c. Its gradient is
    alpha T (softmax(x / T) - softmax(z / T)) + (1 - alpha) (p - onehot(t)). At T = 1 this is
    p - target, where target = alpha softmax(z) + (1 - alpha) onehot(t). The factor T^2 keeps the
    size of the teacher's gradient when T grows. No gradient reaches the teacher.

    Args:
        logits: [..., C] floating, of the student. A class that they mask does not exist for the
            teacher either.
        labels: [...] int64, 0 <= label < C, or -100.
        teacher_logits: [..., C] floating, z.
        alpha: weight of the teacher, in [0, 1]. 0 is softmax_cross_entropy, 1 uses no label.
        temperature: T > 0. Above 1 the teacher's small probabilities count for more.
        reduction: "mean", "sum" or "none".

    Returns:
        (loss, metrics): accuracy, the fraction of examples whose highest logit is the label's, and
        agreement, the fraction where student and teacher prefer the same class.

    Source:
        Hinton, Vinyals & Dean 2015, https://arxiv.org/abs/1503.02531.

    Examples:
        Log-probabilities are logits, so a teacher's can be computed once and stored:

        >>> logits, labels = torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([1])
        >>> stored = torch.tensor([[0.2, 0.7, 0.1]]).log()
        >>> loss, metrics = teacher_student(logits, labels, stored, temperature=2.0)
        >>> round(loss.item(), 4)
        2.321

        In the same way any soft labels are a teacher, smoothed labels for instance:

        >>> soft = 0.9 * F.one_hot(labels, 3) + 0.1 / 3
        >>> loss, _ = teacher_student(logits, labels, soft.log(), alpha=1.0)
        >>> torch.allclose(loss, F.cross_entropy(logits, labels, label_smoothing=0.1))
        True
    """
    _check_examples(logits, "labels", labels)
    _check_tensor("teacher_logits", teacher_logits, "floating", logits.shape)
    _check_number("alpha", alpha, 0, 1)
    _check_number("temperature", temperature, 0, math.inf, exclusive=True)
    mask = labels != LEFT_OUT
    t = labels.where(mask, 0)
    x = logits.to(_precision(logits, teacher_logits))
    z = teacher_logits.detach().to(x.dtype).masked_fill(x == -math.inf, -math.inf)
    q = (z / temperature).softmax(-1)
    from_teacher = _cross_entropy(q, (x / temperature).log_softmax(-1))
    from_labels = -_pick(x.log_softmax(-1), t)
    loss = alpha * temperature**2 * from_teacher + (1 - alpha) * from_labels
    preferred = x.argmax(-1)
    metrics = {"accuracy": _mean(preferred == t, mask)}
    metrics["agreement"] = _mean(preferred == z.argmax(-1), mask)
    return _reduce(loss, mask, reduction), metrics


class Noise(Protocol):
    """A distribution over the class ids 0 to C - 1, such as LogUniform, ClassFrequencies or a
    Categorical of torch.distributions."""

    def sample(self, shape: tuple[int, ...], /) -> Tensor:
        """Class ids of this shape, int64, drawn independently."""

    def log_prob(self, ids: Tensor, /) -> Tensor:
        """The logarithm of each id's probability, floating, in the shape of ids."""


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
    reduction: str = "mean",
) -> LossAndMetrics:
    """Softmax cross-entropy against a few sampled classes, for when C is very large.

        loss = -x_t + log(exp(x_t) + sum_{kept c} exp(x_c - log(k q_c / (1 - q_t))))

    It takes the last layer's weights instead of its output, and computes only the scores that it
    needs, x_c = e . weight_c + bias_c: those of the labels, and those of n_samples noise classes,
    drawn with replacement from a distribution q and shared by all examples. A noise class that is
    an example's label is rejected for this example; k noise classes are kept.

    Given k > 0, the sum is an unbiased estimate of sum_{c != t} exp(x_c). So the loss is too small
    on average, the less so the more samples there are. If k = 0, which has probability
    q_t^n_samples, the loss is 0. Classes that were not drawn have gradient 0. (TensorFlow's loss
    corrects the label's score as well, and so has other values on the same draws.)

    Args:
        embeddings: [..., D] floating, the input e of the last layer.
        labels: [...] int64, 0 <= label < C, or -100.
        weight: [C, D] floating, the last layer's weight.
        bias: [C] floating, the last layer's bias, or None (default) for 0.
        n_samples: how many noise classes to draw, at least 1.
        noise: q, on the device of the inputs; None (default) is uniform. The closer it is to the
            labels' frequencies, the fewer samples are needed.
        sparse: whether the gradients of weight and bias are sparse tensors of the rows used, so
            that the cost of a step does not depend on C. They suit SGD without weight decay,
            SparseAdam and Adagrad, and need weight and bias to be parameters, not computed from
            others. DistributedDataParallel averages them only for the weight of an
            nn.Embedding(C, D, sparse=True); average those of other layers yourself.
        generator: makes the draw repeatable, for noise that takes one; for torch.distributions
            use torch.manual_seed. None (default) under torch.compile.
        reduction: "mean", "sum" or "none".

    Returns:
        (loss, metrics): kept, the fraction of noise classes that were kept.

    Sources:
        Bengio & Senecal 2008; Jean et al. 2014, https://arxiv.org/abs/1412.2007; TensorFlow's
        "Candidate Sampling Algorithms Reference". Rejection with k kept classes is in none of them.

    Example:
        A million classes, of which a step reads and updates 132 at most:

        >>> layer = torch.nn.Linear(16, 1_000_000)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> e, labels = torch.randn(32, 16), torch.randint(1_000_000, [32])
        >>> settings = {"n_samples": 100, "noise": LogUniform(1_000_000), "sparse": True}
        >>> loss, metrics = sampled_softmax(e, labels, layer.weight, layer.bias, **settings)
        >>> loss.backward()
        >>> optimizer.step()
    """
    _check_layer(embeddings, labels, weight, bias)
    noise = noise if noise is not None else _Uniform(len(weight), weight.device)
    c = _draw(noise, n_samples, len(weight), generator)
    mask = labels != LEFT_OUT
    t = labels.where(mask, c[0])  # an example that is left out borrows a class that is used anyway
    ids = torch.cat([t.flatten(), c])
    log_q = noise.log_prob(ids).detach()
    _check_tensor("noise.log_prob(ids)", log_q, "floating", ids.shape)

    dtype = _precision(embeddings, weight)
    e = embeddings.to(dtype)
    rows = F.embedding(ids, weight, sparse=sparse).to(dtype)
    biases = torch.zeros_like(ids) if bias is None else bias.gather(0, ids, sparse_grad=sparse)
    weight_t, weight_c = _split(rows, t)
    bias_t, bias_c = _split(biases.to(dtype), t)
    log_q_t, log_q_c = _split(log_q.to(dtype), t)

    kept = c != t[..., None]
    k = kept.sum(-1, dtype=dtype)
    rest = -log_q_t.expm1()  # 1 - q_t, precise where q_t is close to 1 as well
    log_count = log_q_c + (k / rest).log()[..., None]
    with torch.autocast(e.device.type, enabled=False):
        x_t = (e * weight_t).sum(-1) + bias_t
        x_c = F.linear(e, weight_c, bias_c) - log_count.where(kept, math.inf)
    x_t = x_t.where(mask, 0)  # a class that was borrowed may be masked, as no label is
    log_p = torch.cat([x_t[..., None], x_c], -1).log_softmax(-1)
    loss = -log_p[..., 0]
    return _reduce(loss, mask, reduction), {"kept": _mean(k / n_samples, mask)}


def value_function(
    logits: Tensor,
    actions: Tensor,
    rewards: Tensor,
    *,
    normalized: bool = False,
    reduction: str = "mean",
) -> LossAndMetrics:
    """Learn the expected reward of each action, from the one action taken.

        loss = -r log v_a - (1 - r) log(1 - v_a)

    This is the binary cross-entropy between the value of the action and its reward. The value is
    v_a = sigmoid(x_a), with gradient v_a - r on logit a and 0 on all others, or, normalized,
    v_a = p_a: values sum to 1, with gradient (v_a - r) / (1 - v_a) ([c = a] - p_c) on logit c.

    Args:
        logits: [..., C] floating.
        actions: [...] int64, 0 <= action < C, or -100, chosen in any way.
        rewards: [...] real or bool, in [0, 1].
        normalized: whether values sum to 1 (default False): right where just one action is paid.
        reduction: "mean", "sum" or "none".

    Returns:
        (loss, metrics): reward, the mean reward.

    Source:
        For bandits: Sutton & Barto, Reinforcement Learning, 2nd edition 2018, chapter 2.

    Example:
        A bandit with three actions that rewards two of them:

        >>> logits = torch.tensor([[-3.0, 2.0, 1.0]])
        >>> actions = epsilon_greedy(logits, epsilon=0)
        >>> loss, metrics = value_function(logits, actions, rewards=actions > 0)
        >>> round(loss.item(), 4)  # -log(sigmoid(2))
        0.1269
    """
    _check_examples(logits, "actions", actions)
    _check_tensor("rewards", rewards, "real or bool", actions.shape)
    mask = actions != LEFT_OUT
    a = actions.where(mask, 0)
    x = logits.to(_precision(logits))
    r = rewards.detach().to(x.dtype).where(mask, 0)
    _check_values("rewards", rewards, (r >= 0) & (r <= 1), "in [0, 1]")
    x_a = _pick(x, a)
    if normalized:
        # The lowest number, not -inf, lets the gradient of a sole action be 0 instead of NaN.
        others = x.scatter(-1, a[..., None], torch.finfo(x.dtype).min)
        log_v = x_a - x.logsumexp(-1)
        log_not_v = others.logsumexp(-1) - x.logsumexp(-1)
    else:
        log_v = F.logsigmoid(x_a)
        log_not_v = F.logsigmoid(-x_a)
    loss = -r * log_v - (1 - r) * log_not_v
    return _reduce(loss, mask, reduction), {"reward": _mean(r, mask)}


def policy_gradient(
    logits: Tensor,
    actions: Tensor,
    advantages: Tensor,
    *,
    propensities: Tensor | None = None,
    reduction: str = "mean",
) -> LossAndMetrics:
    """REINFORCE: make an action likelier the larger its advantage.

        loss = -A log p_a      for actions just drawn from p
        loss = -A p_a / q      for actions that another policy chose with probability q

    The advantage A = r - V says how much the reward exceeds a baseline V. It must not depend on the
    action, unless its mean is added back, as in the last example; V = 0 will do. Averaged over the
    actions, the gradient of both is that of minus the expected reward of p, if q > 0 wherever p is.
    On logit c it is A (p_c - [c = a]), times p_a / q in the second case. A and q get no gradient.

    The baseline must be learned and the policy kept undecided at first, as in the first example.

    Args:
        logits: [..., C] floating.
        actions: [...] int64, 0 <= action < C, or -100.
        advantages: [...] real or bool, finite.
        propensities: [...] floating, in (0, 1]: q, for actions from a log. None (default) for
            actions just drawn from softmax(logits), as by sample_actions.
        reduction: "mean", "sum" or "none".

    Returns:
        (loss, metrics): advantage, the mean of A. With propensities also weight, the mean of the
        importance weights w = p_a / q, which is about 1 for a policy that was not learned from
        this log; and effective, which is not a mean: the effective sample size (sum w)^2 / sum w^2
        as a fraction of the number of examples, 0 if all w are 0.

    Sources:
        Williams 1992, https://doi.org/10.1007/BF00992696; Sutton & Barto, Reinforcement Learning,
        2nd edition 2018, chapter 13; for logs Joachims, Swaminathan & de Rijke 2018,
        https://openreview.net/forum?id=SJaP_-xAb; doubly robust: Dudik, Langford & Li 2011,
        https://arxiv.org/abs/1103.4601.

    Examples:
        On-line, with a learned baseline, V = sigmoid(baseline), and a bonus for entropy. The
        network has one output more than there are actions. Action 3 is rewarded.

        >>> network = torch.nn.Linear(8, 10 + 1)
        >>> outputs = network(torch.randn(32, 8))
        >>> logits, baseline = outputs[:, :10], outputs[:, 10]
        >>> actions = sample_actions(logits)
        >>> rewards = (actions == 3).float()
        >>> loss, metrics = policy_gradient(logits, actions, rewards - baseline.sigmoid())
        >>> loss = loss - 0.04 * entropy(logits).mean()
        >>> loss = loss + F.binary_cross_entropy_with_logits(baseline, rewards)
        >>> loss.backward()

        From a log, which must say with which probability each action was chosen:

        >>> logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0]])
        >>> actions, rewards, q = torch.tensor([[3, 0], [1, 0], [0.25, 0.5]]).unbind()
        >>> actions = actions.long()
        >>> loss, metrics = policy_gradient(logits, actions, rewards, propensities=q)
        >>> {name: round(value.item(), 3) for name, value in metrics.items()}
        {'advantage': 0.5, 'weight': 1.211, 'effective': 0.97}

        Clipped weights have less variance and some bias. Here none exceeds 1 / 0.3:

        >>> loss, _ = policy_gradient(logits, actions, rewards, propensities=q.clamp(min=0.3))

        Self-normalised weights: with the weighted mean reward as V, the gradient is that of
        -sum(w r) / sum(w), times the mean weight.

        >>> w = logits.softmax(-1).gather(-1, actions[:, None]).squeeze(-1) / q
        >>> v = (w * rewards).sum() / w.sum()
        >>> loss, _ = policy_gradient(logits, actions, rewards - v, propensities=q)

        Doubly robust: values that value_function has learned stand in for the actions that were
        not taken. The gradient is right on average if they are, or if q is.

        >>> value_logits = torch.zeros(2, 4, requires_grad=True)
        >>> value_loss, _ = value_function(value_logits, actions, rewards)
        >>> v = value_logits.detach().sigmoid()
        >>> v_a = v.gather(-1, actions[:, None]).squeeze(-1)
        >>> loss, _ = policy_gradient(logits, actions, rewards - v_a, propensities=q)
        >>> loss = loss - (logits.softmax(-1) * v).sum(-1).mean()
    """
    _check_examples(logits, "actions", actions)
    _check_tensor("advantages", advantages, "real or bool", actions.shape)
    mask = actions != LEFT_OUT
    a = actions.where(mask, 0)
    x = logits.to(_precision(logits))
    A = advantages.detach().to(x.dtype).where(mask, 0)
    _check_values("advantages", advantages, A.isfinite(), f"finite as {A.dtype}")
    log_p_a = _pick(x.log_softmax(-1), a)
    metrics = {"advantage": _mean(A, mask)}
    if propensities is None:
        loss = -A * log_p_a
        return _reduce(loss, mask, reduction), metrics

    _check_tensor("propensities", propensities, "floating", actions.shape)
    q = propensities.detach().to(x.dtype).where(mask, 1)
    tiny = torch.finfo(q.dtype).tiny
    _check_values("propensities", propensities, (q >= tiny) & (q <= 1), f"in [{tiny:.0e}, 1]")
    w = log_p_a.exp() / q
    loss = -A * w
    metrics["weight"] = _mean(w, mask)
    relative = w / metrics["weight"].clamp(min=tiny)  # its square does not overflow
    metrics["effective"] = _mean(relative, mask) ** 2 / _mean(relative**2, mask).clamp(min=1)
    return _reduce(loss, mask, reduction), metrics


def entropy(logits: Tensor) -> Tensor:
    """How undecided a policy is: 0 if one action is certain, log(C) if all are equally likely.

        H(p) = -sum_c p_c log p_c

    Args:
        logits: [..., C] floating.

    Returns:
        [...] the entropy of each example, in nats, with gradient.

    Example:
        >>> entropy(torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, -math.inf]]))
        tensor([1.0986, 0.6931])
    """
    _check_logits("logits", logits)
    x = logits.to(_precision(logits))
    log_p = x.log_softmax(-1)
    return _cross_entropy(log_p.exp(), log_p)


def epsilon_greedy(
    logits: Tensor, epsilon: float = 0.2, *, generator: Generator | None = None
) -> Tensor:
    """Take the action of the highest score, or, with probability epsilon, any at random.

    The propensity of action a, to be stored in a log, is (1 - epsilon) [a = argmax x] + epsilon / n
    with n actions that are not masked.

    Args:
        logits: [..., C] floating, no NaN; in each example one at least is finite and none is inf.
        epsilon: in [0, 1].
        generator: makes the choice repeatable.

    Returns:
        [...] the actions, int64.

    Example:
        >>> epsilon_greedy(torch.tensor([[0.0, 2.0, 1.0]]), epsilon=0)
        tensor([1])
    """
    _check_choice(logits)
    _check_number("epsilon", epsilon, 0, 1)
    best = logits.argmax(-1)
    # Each of n uniform numbers is equally likely to be the highest.
    numbers = _rand(logits.shape, torch.float32, logits.device, generator)
    random = numbers.masked_fill(logits == -math.inf, -1).argmax(-1)
    explores = _rand(best.shape, torch.float32, logits.device, generator) < epsilon
    return torch.where(explores, random, best)


def sample_actions(logits: Tensor, *, generator: Generator | None = None) -> Tensor:
    """Draw an action from the policy p = softmax(x).

    The propensity of action a, to be stored in a log, is p_a.

    Args:
        logits: [..., C] floating, no NaN; in each example one at least is finite and none is inf.
        generator: makes the draw repeatable.

    Returns:
        [...] the actions, int64.

    Example:
        >>> sample_actions(torch.tensor([[-math.inf, 0.0], [0.0, -math.inf]]))
        tensor([1, 0])
    """
    _check_choice(logits)
    p = logits.detach().to(_precision(logits)).softmax(-1)
    # Of exponential clocks with rates p, clock a is the first to ring with probability p_a.
    # torch.multinomial draws the same way, but makes a GPU wait for its checks of p.
    times = torch.empty_like(p).exponential_(generator=generator)
    return (p / times).argmax(-1)


class LogUniform:
    """Noise for classes sorted by falling frequency, as words in a vocabulary often are.

        q_c = log((c + 2) / (c + 1)) / log(n_classes + 1)

    This is close to Zipf's law. A draw inverts the distribution function, so that its cost does
    not depend on n_classes.

    Args:
        n_classes: the number of classes, at least 1.
        device: where samples are made; None (default) is PyTorch's default device.

    Example:
        >>> LogUniform(3).log_prob(torch.arange(3)).exp()
        tensor([0.5000, 0.2925, 0.2075], dtype=torch.float64)
    """

    def __init__(self, n_classes: int, *, device: torch.device | str | None = None):
        _check_number("n_classes", n_classes, 1, math.inf, int)
        self.n_classes = n_classes
        self.device = torch.empty(0, device=device).device

    def sample(self, shape: Sequence[int], *, generator: Generator | None = None) -> Tensor:
        """Class ids of this shape, int64, drawn independently."""
        u = _rand(shape, _widest(self.device), self.device, generator)
        ids = (u * math.log(self.n_classes + 1)).exp().long() - 1
        return ids.clamp(max=self.n_classes - 1)  # exp may round up

    def log_prob(self, ids: Tensor) -> Tensor:
        """log q of ids of any shape, int64; float64, but float32 on Apple's GPUs."""
        c = ids.to(_widest(ids.device))
        return (1 / (c + 1)).log1p().log() - math.log(math.log(self.n_classes + 1))


class ClassFrequencies:
    """Noise in proportion to given counts or weights, for any number of classes.

        q_c = counts_c / sum_i counts_i

    A Categorical of torch.distributions does the same, but reads all C probabilities at every draw
    and stops at 2^24 classes. This looks up n draws in the cumulative sum, in O(n log C).

    Args:
        counts: [C] real or bool, not negative, finite, not all 0; on the device where samples are
            wanted.

    Example:
        >>> ClassFrequencies(torch.tensor([3, 0, 1])).log_prob(torch.tensor([0, 2])).exp()
        tensor([0.7500, 0.2500], dtype=torch.float64)
    """

    def __init__(self, counts: Tensor):
        _check_tensor("counts", counts, "real or bool", ("C",))
        valid = (counts >= 0) & counts.isfinite()
        _check_values("counts", counts, valid, "finite and not negative")
        _check_values("counts", counts, counts.any(), "above 0 for one class at least")
        counts = counts.detach().to(_widest(counts.device))
        self.n_classes = len(counts)
        self.probabilities = counts / counts.sum()
        cumulative = counts.cumsum(0)
        self.cumulative = cumulative / cumulative.max()  # ends at 1, without rounding

    def sample(self, shape: Sequence[int], *, generator: Generator | None = None) -> Tensor:
        """Class ids of this shape, int64, drawn independently."""
        u = _rand(shape, self.cumulative.dtype, self.cumulative.device, generator)
        return torch.searchsorted(self.cumulative, u, right=True)

    def log_prob(self, ids: Tensor) -> Tensor:
        """log q of ids of any shape, int64; float64, but float32 on Apple's GPUs."""
        return self.probabilities.gather(0, ids.flatten()).reshape(ids.shape).log()


class _Uniform:
    def __init__(self, n_classes: int, device: torch.device):
        self.n_classes = n_classes
        self.device = device

    def sample(self, shape: Sequence[int], *, generator: Generator | None = None) -> Tensor:
        return torch.randint(self.n_classes, shape, device=self.device, **_optional(generator))

    def log_prob(self, ids: Tensor) -> Tensor:
        return torch.full_like(ids, -math.log(self.n_classes), dtype=_widest(ids.device))


# What the functions above share


def _pick(x: Tensor, ids: Tensor) -> Tensor:
    """x_id of each example: [..., C] and [...] make [...]."""
    return x.gather(-1, ids[..., None]).squeeze(-1)


def _split(rows: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of the labels t, in their shape, and those of the noise classes behind them."""
    rows_t, rows_c = rows.tensor_split([t.numel()])
    return rows_t.reshape(t.shape + rows.shape[1:]), rows_c


def _cross_entropy(q: Tensor, log_p: Tensor) -> Tensor:
    """-sum_c q_c log p_c, where 0 log 0 is 0."""
    return -(q * log_p.masked_fill(q == 0, 0)).sum(-1)


def _reduce(losses: Tensor, mask: Tensor, reduction: str) -> Tensor:
    losses = losses.where(mask, 0)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if reduction == "mean":
        return losses.sum() / mask.sum().clamp(min=1)
    raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of the examples that count, detached, as metrics are."""
    return _reduce(values.detach().to(_precision(values)), mask, "mean")


def _precision(*tensors: Tensor) -> torch.dtype:
    """The type of the arithmetic: the widest of the tensors', at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # which Apple's GPUs lack


def _rand(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, generator: Generator | None
) -> Tensor:
    return torch.rand(shape, dtype=dtype, device=device, **_optional(generator))


def _optional(generator: Generator | None) -> dict[str, Any]:
    """The argument generator, left out if None: torch.compile cannot handle even that one."""
    return {} if generator is None else {"generator": generator}


def _draw(noise: Noise, n_samples: int, n_classes: int, generator: Generator | None) -> Tensor:
    _check_number("n_samples", n_samples, 1, math.inf, int)
    if isinstance(noise, type) or not (hasattr(noise, "sample") and hasattr(noise, "log_prob")):
        raise TypeError(f"noise must have sample(shape) and log_prob(ids), got {noise!r}")
    known = getattr(noise, "n_classes", n_classes)
    if known != n_classes:
        raise ValueError(f"noise must be over C = {n_classes} classes, got {known}")
    c = noise.sample((n_samples,), **_optional(generator))
    _check_tensor("noise.sample(shape)", c, "int64", (n_samples,))
    _check_values("noise.sample(shape)", c, (c >= 0) & (c < n_classes), f"in [0, {n_classes})")
    return c


# Checks


def _check_tensor(name: str, value: Tensor, kind: str, shape: Sequence[int | str]) -> None:
    """Raise unless value is a tensor of this kind and shape; a letter is any size but 0."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    is_kind = {
        "floating": value.is_floating_point(),
        "int64": value.dtype == torch.int64,
        "real or bool": not value.is_complex(),
    }
    if not is_kind[kind]:
        raise TypeError(f"{name} must be {kind}, got {value.dtype}")
    same = [n > 0 if isinstance(size, str) else n == size for n, size in zip(value.shape, shape)]
    if value.ndim != len(shape) or not all(same):
        wanted = ", ".join(str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(value.shape)}")


def _check_logits(name: str, logits: Tensor, size: str = "C") -> None:
    """Raise unless logits are floating and of shape [..., C]."""
    leading = logits.shape[:-1] if isinstance(logits, Tensor) else ()
    _check_tensor(name, logits, "floating", (*leading, size))


def _check_layer(embeddings: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise unless the tensors fit one another, as arguments of sampled_softmax."""
    _check_logits("embeddings", embeddings, "D")
    _check_tensor("weight", weight, "floating", ("C", embeddings.shape[-1]))
    _check_classes("labels", labels, embeddings.shape[:-1], len(weight))
    if bias is not None:
        _check_tensor("bias", bias, "floating", weight.shape[:1])
        _check_not_masked("labels", labels, bias.detach().expand(*labels.shape, -1))


def _check_examples(logits: Tensor, name: str, ids: Tensor) -> None:
    """Raise unless ids, labels or actions, are classes of logits that are not masked, or -100."""
    _check_logits("logits", logits)
    _check_classes(name, ids, logits.shape[:-1], logits.shape[-1])
    _check_not_masked(name, ids, logits.detach())


def _check_classes(name: str, ids: Tensor, shape: Sequence[int], n_classes: int) -> None:
    _check_tensor(name, ids, "int64", shape)
    valid = (ids == LEFT_OUT) | ((ids >= 0) & (ids < n_classes))
    _check_values(name, ids, valid, f"in [0, {n_classes}) or {LEFT_OUT}")


def _check_not_masked(name: str, ids: Tensor, scores: Tensor) -> None:
    is_masked = _pick(scores, ids.clamp(min=0)) == -math.inf
    _check_values(name, ids, ~is_masked | (ids == LEFT_OUT), "of classes that are not masked")


def _check_choice(logits: Tensor) -> None:
    """Raise where NaN or inf leaves open which action is best, or all are masked."""
    _check_logits("logits", logits)
    highest = logits.detach().amax(-1)
    _check_values("logits", highest, highest.isfinite(), "finite for one action at least, not NaN")


def _check_values(name: str, values: Tensor, valid: Tensor, rule: str) -> None:
    """Raise unless all are valid; do nothing where to read that is impossible, or slow."""
    if valid.device.type != "cpu" or torch.compiler.is_compiling():
        return
    try:
        all_valid = bool(valid.all())
    except RuntimeError:  # under vmap
        return
    if not all_valid:
        raise ValueError(f"{name} must be {rule}, got {values[~valid].flatten()[0].item()}")


def _check_number(
    name: str, value: float, low: float, high: float, kind: type = Real, *, exclusive: bool = False
) -> None:
    """Raise unless value, of this kind, is in [low, high], or in (low, high) if exclusive."""
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name} must be of type {kind.__name__}, got {type(value).__name__}")
    inside = low < value < high if exclusive else low <= value <= high
    if not inside:
        interval = f"({low}, {high})" if exclusive else f"[{low}, {high}]"
        raise ValueError(f"{name} must be in {interval}, got {value}")
