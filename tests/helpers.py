"""A call of every objective, by name, and what compares its results."""

import torch

import objectives

N, C, D = 6, 5, 4
LABELS = torch.tensor([0, 4, 2, 1, 3, 2])  # every class is there
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# Rewards and propensities are exact in every floating type.
REWARDS = torch.tensor([0, 0.25, 1, 0.5, 0.75, 1], dtype=torch.float64)
PROPENSITIES = torch.tensor([0.5, 0.125, 0.25, 1, 0.5, 0.0625], dtype=torch.float64)
SOFTMAX = {"logits": normal(N, C), "labels": LABELS}
TEACHER = {"teacher_logits": normal(N, C, seed=1), "alpha": 0.3, "temperature": 2.0}
LAYER = {"weight": normal(C, D, seed=1), "bias": normal(C, seed=2)}
SAMPLED = {"embeddings": normal(N, D), "labels": LABELS, **LAYER, "n_samples": 4}
VALUE = {"logits": normal(N, C), "actions": LABELS, "rewards": REWARDS}
POLICY = {"logits": normal(N, C), "actions": LABELS, "advantages": REWARDS - 0.5}
CASES = {
    "softmax_cross_entropy": SOFTMAX,
    "teacher_student": {**SOFTMAX, **TEACHER},
    "sampled_softmax": SAMPLED,
    "sampled_softmax sparse": {**SAMPLED, "sparse": True},
    "value_function": VALUE,
    "value_function normalized": {**VALUE, "normalized": True},
    "policy_gradient": POLICY,
    "policy_gradient log": {**POLICY, "propensities": PROPENSITIES},
}
SHARED = ["weight", "bias"]  # have no row for each example
LEARNED = ["logits", "embeddings", "weight", "bias"]


def function(name):
    return getattr(objectives, name.split()[0])


def ids_of(name):
    """The name of the argument with the class of each example."""
    return "labels" if "labels" in CASES[name] else "actions"


def learned(arguments):
    return {key: arguments[key] for key in LEARNED if key in arguments}


def changed(arguments, change, but=()):
    """The arguments, changed where they are tensors, but for some."""
    result = dict(arguments)
    for key, value in arguments.items():
        if isinstance(value, torch.Tensor) and key not in but:
            result[key] = change(value)
    return result


def cast(arguments, dtype):
    return changed(arguments, lambda x: x.to(dtype) if x.is_floating_point() else x)


def gradients(loss, *tensors):
    """The gradients, 0 for a tensor without one."""
    return torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)


def evaluate(name, run=None, **arguments):
    """The loss, the metrics, and the gradients by argument, after seeding PyTorch's generator."""
    arguments = {**CASES[name], **arguments}
    variables = {key: x.detach().requires_grad_() for key, x in learned(arguments).items()}
    torch.manual_seed(0)
    loss, metrics = (run or function(name))(**{**arguments, **variables})
    grads = gradients(loss.sum(), *variables.values())
    grads = [x.to_dense() if x.is_sparse else x for x in grads]
    return loss.detach(), metrics, dict(zip(variables, grads))


def close(actual, expected, rtol=1e-12, atol=1e-14):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def is_zero(tensor):
    return torch.equal(tensor, torch.zeros_like(tensor))


class Fixed:
    """Noise with probabilities q of which these classes were drawn."""

    def __init__(self, ids, q):
        self.ids = torch.as_tensor(ids)
        self.q = q

    def sample(self, shape):
        return self.ids

    def log_prob(self, ids):
        return self.q[ids].log()


def check_frequencies(ids, p):
    """Each within 4.5 standard errors of its probability; never, and always, are exact."""
    frequencies = ids.flatten().bincount(minlength=len(p)) / ids.numel()
    assert ((frequencies - p).abs() <= 4.5 * (p * (1 - p) / ids.numel()).sqrt()).all()
