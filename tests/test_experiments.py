"""The laboratory: its statistics, figures and tables, and the mathematics of its questions.

Each is held against a reference of its own: scipy, a simulation, or an exact sum over all actions.
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from notebook import shared_cells
from scipy import stats

NAMES = ["show_comparison", "draw_grid", "policy_with_baseline", "doubly_robust_from_log"]
NAMES += ["estimate_reward", "deviation_interval", "operations_per_image"]
NAMES += ["gradient_variance", "hold_out", "train_variants", "data", "configs"]


@pytest.fixture(scope="module")
def lab():
    return shared_cells(*NAMES)


def made_up(accuracies, objective="value function", variants=None, **metrics):
    """Results as training gives them, of accuracies [variant][seed] in percent."""
    rows = []
    for i, of_seeds in enumerate(accuracies):
        for seed, accuracy in enumerate(of_seeds):
            row = {"objective": objective, "variant": variants[i] if variants else f"v{i}"}
            row |= {"seed": seed, "epoch": 2, "accuracy": accuracy / 100, "stopped": ""} | metrics
            rows += [row | {"epoch": 1, "accuracy": 0.9}, row]
    return pd.DataFrame(rows)


def test_a_difference_is_paired_by_seed_and_has_the_interval_of_student(lab):
    a = pd.Series([52.0, 73, 31, 66, 60], index=[0, 1, 2, 3, 4])
    b = pd.Series([64.0, 30, 70, 50.5, 59], index=[3, 2, 1, 0, 4])
    found = lab.paired_difference(a, b)
    d = np.array([1.5, 3, 1, 2, 1])
    reach = stats.t.ppf(0.975, 4) * d.std(ddof=1) / math.sqrt(5)
    expected = [d.mean(), d.mean() - reach, d.mean() + reach, stats.ttest_rel(a, b.sort_index())[1]]
    assert [*found.values()] == pytest.approx(expected)


@pytest.mark.parametrize("n_seeds", [3, 5])
def test_the_interval_covers_the_true_difference_in_95_percent_of_tables(lab, n_seeds):
    """Of 500 tables, but for four standard errors."""
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(500):
        luck = random.normal(50, 5, n_seeds)  # of the seed, the same for both variants
        a, b = luck + random.normal(1.5, 1, n_seeds), luck + random.normal(0, 1, n_seeds)
        found = lab.paired_difference(pd.Series(a), pd.Series(b))
        covered += found["low"] <= 1.5 <= found["high"]
    assert abs(covered / 500 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 500)


def test_holm_is_the_closed_test_of_bonferroni(lab):
    """A hypothesis is rejected if Bonferroni rejects every set of hypotheses that holds it."""
    for seed in range(20):
        p = np.random.default_rng(seed).uniform(size=5) ** 3
        corrected = np.zeros(5)
        for members in range(1, 2**5):
            chosen = [i for i in range(5) if members >> i & 1]
            worst = min(1, len(chosen) * p[chosen].min())
            corrected[chosen] = np.maximum(corrected[chosen], worst)
        assert lab.holm(p) == pytest.approx(corrected)


@pytest.mark.parametrize("n_seeds", [3, 5])
def test_at_most_one_table_in_twenty_has_a_false_word(lab, n_seeds):
    """Six equal variants, one of them the reference; 2,000 tables, but for four standard errors."""
    accuracies = np.random.default_rng(1).normal(60, 1, (2000, 6, n_seeds))
    p = stats.ttest_rel(accuracies[:, 1:], accuracies[:, :1], axis=2).pvalue
    false = np.mean([lab.holm(of_table).min() < 0.05 for of_table in p])
    assert false < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 2000)
    found = lab.compare(made_up(accuracies[0]), "v0")["p_corrected"]
    assert found[1:].tolist() == pytest.approx(lab.holm(p[0]).tolist())


def test_a_reference_that_was_taken_out_of_the_variants_is_named(lab):
    with pytest.raises(ValueError, match="'labels alone'"):
        lab.compare(made_up([[50, 52], [51, 54]]), "labels alone")


@pytest.mark.parametrize("more", [0.0, 0.2])
def test_equal_differences_get_no_word_and_no_negative_zero(lab, more):
    ours = [51.2, 71.2, 61.4]
    found = lab.compare(made_up([ours, [accuracy - more for accuracy in ours]]), "v0")
    assert found["verdict"][1] == "same difference for every seed"
    text = lab.format_table(found, "validation").to_string()
    assert "nan" not in text and "0.0 (" not in text and "−0.0" not in text and "-" not in text


def test_each_objective_has_its_own_reference_and_all_rows_share_the_correction(lab):
    names = ["value function", "policy gradient"]
    accuracies = [[50, 52, 51], [40, 43, 41.5]]
    tables = [made_up(accuracies, name, ["small", "deep"]) for name in names]
    found = lab.compare(pd.concat(tables), "small", within_objective=True)
    assert found["difference"].tolist() == pytest.approx([0, -9.5, 0, -9.5])
    assert found["p_corrected"][1] == pytest.approx(2 * found["p"][1])
    assert found["verdict"].tolist() == ["reference", "lower", "reference", "lower"]
    assert found["deviation"][1] == pytest.approx(np.std([40, 43, 41.5], ddof=1))


def test_the_interval_of_a_deviation_covers_the_true_one(lab):
    samples = np.random.default_rng(0).normal(0, 3, (4000, 5)).std(axis=1, ddof=1)
    low, high = lab.deviation_interval(samples, 5)
    assert abs(((low <= 3) & (3 <= high)).mean() - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)


def texts_of(figure):
    """The texts of a figure that are seen, with their boxes in pixels."""
    texts = set(figure.findobj(plt.Text))
    for ax in figure.axes:
        for axis in [ax.xaxis, ax.yaxis]:
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks():
                if not low <= tick.get_loc() <= high or not tick.label1.get_visible():
                    texts -= {tick.label1, tick.label2}
    found = [text for text in texts if text.get_text() and text.get_visible()]
    return [(text.get_text(), text.get_window_extent()) for text in found]


@pytest.mark.parametrize("n_seeds", [1, 5])
@pytest.mark.parametrize("n_classes", [3, 100])
def test_a_comparison_is_readable(lab, monkeypatch, n_seeds, n_classes):
    """No text lies outside or on another, also with a sixth objective of unforeseen metrics."""
    sixth = lab.Objective(lab.softmax_objective, "#56B4E9", "P")
    monkeypatch.setitem(lab.OBJECTIVES, "an objective of my own", sixth)
    guessing = 100 / n_classes
    random = np.random.default_rng(0)
    tables = []
    for name in lab.OBJECTIVES:
        metrics = {"train_surprise": 0.004} if "own" in name else {"train_reward": -0.001}
        accuracies = guessing + random.uniform(0, 30, (2, n_seeds))
        tables.append(made_up(accuracies, name, ["small network", "ResNet-18"], **metrics))
    labels = torch.arange(n_classes).repeat(10)
    data = replace(lab.data, name="many", test=(lab.data.test[0][:1], labels), split="validation")
    shown = []
    monkeypatch.setattr(lab, "display", shown.append)
    monkeypatch.setattr(lab, "show_figure", lambda figure, title: shown.append((figure, title)))
    settings = {"within_objective": True, "metrics": ["reward", "surprise", "entropy"]}
    settings["levels"] = {"old policy": guessing + 1}
    lab.show_comparison("How?", pd.concat(tables), "small network", data, **settings)
    (figure, title), table = shown
    figure.canvas.draw()
    assert title.startswith("How? (many, seed") and len(table) == 2 * len(lab.OBJECTIVES)
    assert table.loc["an objective of my own, ResNet-18", "surprise"] == "0"
    assert set(table["entropy"]) == {"–"} and "nan" not in table.to_string()
    assert ("verdict" in table) == (n_seeds > 1) and "-0.0" not in table.to_string()

    texts = texts_of(figure)
    width, height = figure.canvas.get_width_height()
    for text, box in texts:
        assert 0 <= box.x0 and box.x1 <= width + 1 and 0 <= box.y0 and box.y1 <= height + 1, text
    for i, (text, box) in enumerate(texts):
        for other, other_box in texts[:i]:
            assert not box.overlaps(other_box), (text, other)
    for name in ["always the most frequent class", "old policy"]:
        assert any(text == name for text, _ in texts)


def test_the_error_of_the_images_is_that_of_as_many_throws_of_a_coin(lab):
    means = 100 * np.random.default_rng(0).binomial(500, 0.3, 4000) / 500
    assert lab.image_error(30, 500) == pytest.approx(means.std(), rel=0.05)


def test_a_grid_of_settings_marks_what_is_settled(lab):
    tables = [made_up([[50, 52, 51], [80, 82.1, 81]], name) for name in lab.OBJECTIVES]
    summary = lab.compare(pd.concat(tables), "v0", within_objective=True)
    texts = [text.get_text() for text in lab.draw_grid(summary, lab.data).findobj(plt.Text)]
    assert texts.count("81.0*") == texts.count("51.0") == len(lab.OBJECTIVES)


def test_experiments_train_every_variant_with_every_seed_and_find_equal_ones(lab):
    config = replace(lab.configs[0], epochs=1, width=4)
    data = lab.hold_out(lab.data, 80, 40)
    variants = {
        "default": lab.Variant("value function"),
        "the same": lab.Variant("value function", {"epsilon": 0.2}),
        "other": lab.Variant("value function", {"epsilon": 1.0}, {"learning_rate": 0.1}),
        "taught": lab.Variant("teacher-student"),
    }
    models = {}
    rows = lab.train_variants(variants, data, config, [0, 3], models)
    assert list(models) == [(name, seed) for seed in [0, 3] for name in variants]
    keys = rows.set_index(["variant", "seed"])["key"]
    assert keys["default", 0] == keys["the same", 0] and keys.nunique() == 6
    assert set(rows["split"]) == {"validation"}


def test_operations_are_those_of_the_matrix_products(lab):
    def flat(images, config):
        return torch.nn.Flatten(), 3 * 32 * 32

    config = replace(lab.configs[0], network=flat)
    products = 2 * 3 * 32 * 32 * len(lab.data.classes) / 1e6
    count = lab.operations_per_image
    assert count("softmax cross-entropy", lab.data, config) == pytest.approx(2 * products)
    assert count("teacher-student", lab.data, config) == pytest.approx(3 * products)


@pytest.fixture
def policy():
    logits = 2 * torch.randn(7, 5, dtype=torch.float64, generator=torch.manual_seed(0))
    return logits, torch.tensor([0, 1, 2, 3, 4, 0, 1])


@pytest.mark.parametrize("of_each", [False, True])
def test_the_variance_of_the_gradient_is_that_over_all_actions(lab, policy, of_each):
    logits, labels = policy
    p = logits.softmax(1)
    v = torch.linspace(0, 1, 7, dtype=torch.float64) if of_each else 0.3
    total = 0.0
    for i in range(7):
        gradients = []
        for a in range(5):
            x = logits[i].clone().requires_grad_()
            advantage = float(labels[i] == a) - (float(v[i]) if of_each else v)
            (-advantage * x.log_softmax(0)[a]).backward()
            gradients.append(x.grad)
        gradients = torch.stack(gradients)
        mean = (p[i, :, None] * gradients).sum(0)
        total += (p[i, :, None] * (gradients - mean) ** 2).sum().item()
    assert lab.gradient_variance(p, labels, v) == pytest.approx(total / 7)


def test_no_other_baseline_has_less_variance_than_the_best(lab, policy):
    logits, labels = policy
    p = logits.softmax(1)
    constant, of_each = lab.best_baselines(p, labels)
    variance = lab.gradient_variance
    for change in [-0.01, 0.01]:
        assert variance(p, labels, constant + change) > variance(p, labels, constant)
        assert variance(p, labels, of_each + change) > variance(p, labels, of_each)
    assert variance(p, labels, of_each) < variance(p, labels, constant)
    uniform = torch.full((7, 5), 0.2)
    assert lab.best_baselines(uniform, labels)[0] == pytest.approx(0.2)  # the mean reward


def test_a_learned_baseline_leaves_the_body_alone(lab):
    embeddings = torch.randn(6, 4, requires_grad=True)
    model = SimpleNamespace(baseline=torch.nn.Linear(4, 1))
    rewards = torch.tensor([1.0, 0, 0, 1, 0, 0])
    v, loss = lab.baseline_and_loss("learned", model, embeddings, rewards)
    loss.backward()
    assert embeddings.grad is None and model.baseline.weight.grad.abs().sum() > 0
    v, _ = lab.baseline_and_loss("mean reward", model, embeddings, rewards)
    assert v.tolist() == pytest.approx([0.2, 0.4, 0.4, 0.2, 0.4, 0.4])  # of the others


def test_a_log_says_what_was_done_what_it_earned_and_how_likely_it_was(lab):
    policy = torch.tensor([0.5, 0.3, 0.2]).expand(6000, 3)
    labels = torch.arange(6000) % 3
    actions, rewards, propensities = lab.read_log(lab.write_log(policy, labels, seed=1))
    assert torch.equal(rewards, (actions == labels).float())
    assert torch.equal(propensities, policy[0][actions])
    shares = actions.bincount() / 6000
    assert ((shares - policy[0]) ** 2 < 4**2 * policy[0] * (1 - policy[0]) / 6000).all()


def all_logs(labels, q):
    for a in range(q.shape[1]):
        actions = torch.full_like(labels, a)
        yield torch.stack([actions.double(), (actions == labels).double(), q[:, a]], 1), q[:, a]


def test_estimates_of_a_policy_are_right_on_average(lab, policy):
    """By propensities, and doubly robust with any values; with wrong propensities, but right
    values, the doubly robust one as well."""
    logits, labels = policy
    p, q = logits.softmax(1), logits.flip(1).softmax(1)
    truth = p.gather(1, labels[:, None]).squeeze(1)
    values = torch.rand(7, 5, dtype=torch.float64)
    right_values = torch.nn.functional.one_hot(labels, 5).double()
    means = {}
    for log, weight in all_logs(labels, q):
        wrong = torch.cat([log[:, :2], log[:, 2:] / 3], 1)
        found = lab.estimate_reward(p, log, values)
        found["wrong q"] = lab.estimate_reward(p, wrong, right_values)["doubly robust"]
        for name, estimate in found.items():
            means[name] = means.get(name, 0) + weight * estimate
    for name in ["propensities", "doubly robust", "wrong q"]:
        torch.testing.assert_close(means[name], truth)
    assert (means["values"] - truth).abs().max() > 0.05


@pytest.mark.parametrize("robust", [False, True])
def test_losses_with_propensities_have_the_gradient_of_the_expected_reward(lab, policy, robust):
    logits, labels = policy
    x = logits.clone().requires_grad_()
    q = logits.flip(1).softmax(1)
    total = 0.0
    for i in range(7):
        for log, weight in all_logs(labels[i : i + 1], q[i : i + 1]):
            network = SimpleNamespace(eval=lambda: lambda images: logits[:1] / 3)
            settings = {"value_model": network} if robust else {"weighted": True, "v": 0.4}
            loss_function = lab.doubly_robust_from_log if robust else lab.policy_from_log
            loss, _ = loss_function(lambda images, i=i: x[i : i + 1], None, log, **settings)
            total = total + weight.item() * loss
    p = x.softmax(1)
    entropy = -(p * p.log()).sum()
    expected = -p.gather(1, labels[:, None]).sum() - 0.04 * entropy
    (made,) = torch.autograd.grad(total, x)
    (wanted,) = torch.autograd.grad(expected, x)
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-7)
