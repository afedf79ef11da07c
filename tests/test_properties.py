"""Every objective on generated inputs: any shape, type, layout, size of scores, mask and setting.

The suite takes a few hundred of them; the long profile takes minutes:
pytest tests/test_properties.py --hypothesis-profile=long
"""

import math

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from test_objectives import CASES, FLOATS, INF, changed, evaluate, every_objective
from torch.distributions import Categorical

from objectives import ClassFrequencies, LogUniform

LAYOUTS = {
    "contiguous": torch.clone,
    "every second": lambda x: torch.stack([x, x], -1)[..., 0],
    "transposed": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "expanded": lambda x: x[:1].expand(x.shape),
}


@st.composite
def problems(draw, sizes=(0.0, 1.0, 30.0)):
    """Values for all arguments of all objectives. The tensors follow from one seed; no class
    that is an id is masked."""

    def pick(*values):
        return draw(st.sampled_from(values))

    n, c, d, dtype, size = (
        pick(0, 1, 2, 6),
        pick(1, 2, 3, 7),
        pick(1, 4),
        pick(*FLOATS),
        pick(*sizes),
    )
    masked, layout = pick(0, 0.4), LAYOUTS[pick(*LAYOUTS)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    ids = layout(torch.randint(c, (n,), generator=generator))

    def uniform(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def floats(*shape, size=size):
        """Normal numbers times size, some of them exactly size or -size."""
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        x = torch.where(uniform(*shape) < 0.2, x.sign(), x) * size
        return layout((x.clamp(-60_000, 60_000) if dtype == torch.float16 else x).to(dtype))

    logits, bias = floats(n, c), floats(c) if layout != LAYOUTS["expanded"] else floats(1).expand(c)
    hidden = layout((uniform(n, c) < masked).scatter(1, ids[:, None], False))
    counts = uniform(c) + 0.1
    counts[1:] *= uniform(c - 1) < 0.7
    noises = [None, LogUniform(c), ClassFrequencies(counts), Categorical(counts)]
    return {
        "logits": logits.masked_fill(hidden, -INF),
        "teacher_logits": floats(n, c).masked_fill(hidden, -INF),
        "embeddings": floats(n, d),
        "weight": floats(c, d, size=1),
        "bias": bias.masked_fill((uniform(c) < masked).scatter(0, ids, False), -INF),
        "baseline": floats(n),
        "labels": ids,
        "actions": ids,
        "rewards": layout(uniform(n).round(decimals=1).to(dtype).clamp(0, 1)),
        "propensities": layout((1 - 0.9 * uniform(n)).to(dtype)),
        "alpha": pick(0, 0.3, 1),
        "temperature": pick(0.01, 0.5, 1, 2, 100),
        "entropy_weight": pick(0, 0.3),
        "n_samples": pick(1, 2, 5),
        "noise": pick(*noises),
    }


def of_case(name, p):
    noise = {"noise": p["noise"]} if "sampled" in name else {}
    return {key: p.get(key, value) for key, value in CASES[name].items()} | noise


def check_ranges(name, arguments, loss, metrics, grads):
    """What holds for any input at all."""
    assert loss.shape == () and loss.isfinite() and loss.dtype in (torch.float32, torch.float64)
    for key, grad in grads.items():
        assert grad.dtype == arguments[key].dtype and grad.isfinite().all()
        assert (grad[arguments[key] == -INF] == 0).all()
    for key, value in metrics.items():
        c = arguments.get("logits", arguments.get("weight")).shape[-1]
        most = {"entropy": math.log(c), "weight": INF, "baseline_loss": INF}.get(key, 1)
        assert -1e-6 <= value <= most + 1e-5


@every_objective
@given(p=problems())
def test_results_are_those_of_contiguous_float64(name, p):
    """To the rounding of the scores and, for gradients, of their own type."""
    arguments = of_case(name, p)
    if name == "value_function consistent":  # that of a sole action is 1, its loss infinite
        assume(((p["logits"] > -INF).sum(1) > 1).all())
    loss, metrics, grads = evaluate(name, **arguments)
    check_ranges(name, arguments, loss, metrics, grads)
    wide = changed(arguments, lambda x: (x.double() if x.is_floating_point() else x).contiguous())
    wide_loss, wide_metrics, wide_grads = evaluate(name, **wide)
    scores = [wide[key] for key in ("logits", "teacher_logits", "bias") if key in wide]
    scores += [20 * wide["embeddings"]] if "embeddings" in wide else []
    size = max([1.0, *(x[x > -INF].abs().sum().item() for x in scores)])
    t = arguments.get("temperature", 1)
    rounding = 64 * torch.finfo(loss.dtype).eps * size * (1 + 1 / t) * max(t, 1) ** 2
    close(loss, wide_loss, 1e-5, rounding)
    for key, value in metrics.items():
        if key not in ("accuracy", "agreement"):
            close(value, wide_metrics[key], 1e-5, rounding)
    for key, grad in grads.items():
        eps, other = torch.finfo(grad.dtype).eps, wide_grads[key]
        close(grad, other, 4 * eps, (eps + rounding) * max([1.0, *other.abs().flatten().tolist()]))


def close(actual, expected, rtol, atol):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol)


@every_objective
@given(p=problems(sizes=(1e4, 1e30)))
def test_scores_of_any_finite_size_give_finite_numbers(name, p):
    arguments = of_case(name, p)
    check_ranges(name, arguments, *evaluate(name, **arguments))


@given(p=problems(), shape=st.lists(st.integers(0, 4), max_size=3).map(tuple))
def test_noise_is_drawn_where_its_probability_is_positive(p, shape):
    c = len(p["bias"])
    noise = p["noise"] if isinstance(p["noise"], ClassFrequencies) else LogUniform(c)
    probabilities = noise.log_prob(torch.arange(c)).exp()
    torch.testing.assert_close(probabilities.sum().item(), 1.0, rtol=1e-12, atol=0)
    ids = noise.sample(shape)
    assert ids.dtype == torch.int64 and ids.shape == shape
    assert (probabilities[ids] > 0).all()
