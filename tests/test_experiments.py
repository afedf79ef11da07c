"""The mathematics of the notebook: what networks are given and asked, what figures and tables
of the sections and experiments say, each against a reference of its own."""

import math
import statistics
import warnings
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from test_notebook import CODE, OBJECTIVES, execute, notebook, run
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import objectives


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """All names of the set-up and of the experiments' helpers and objectives."""
    found = notebook(tmp_path_factory.mktemp("experiments"))
    run(found, "log")
    for cell, name in [("comparison", "epochs_to"), ("baseline", "gradient_variance")]:
        start = CODE[cell].index(f"def {name}(")
        execute(found, CODE[cell][start:].split("\n\n\n")[0])
    return found


@pytest.fixture
def names(cells):
    """Tests may change names; a warning is an error."""
    before = dict(cells)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        yield cells
    cells.clear()
    cells.update(before)


# The network, and what it is given and asked


@pytest.fixture
def network(names):
    data, (config,) = names["settings"]()
    model = names["build"](data, replace(config, width=8))
    images, labels = data.train[0][:30], data.train[1][:30]
    return SimpleNamespace(model=model, images=names["normalise"](images), labels=labels, data=data)


@pytest.mark.parametrize("flip", [True, False])
def test_a_prediction_is_the_mean_of_an_image_the_same_moved_and_their_mirrors(
    names, network, flip
):
    """Moved by a pixel down and to the right, and up and to the left, where edges are repeated."""
    images, model = network.data.test[0].float(), network.model.eval()
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), mode="replicate")
    views = [images, padded[:, :, :-2, :-2], padded[:, :, 2:, 2:]]
    views += [view.flip(3) for view in views] * flip
    with torch.no_grad():
        mean = torch.stack([model((view - 120) / 64) for view in views]).mean(0)
    made = names["predict"](model, network.data.test[0], flip)
    torch.testing.assert_close(made, mean, rtol=1e-4, atol=1e-5)
    assert model.training


@pytest.mark.parametrize("mirrored", [True, False])
@pytest.mark.parametrize("shift", [0, 2])
def test_augmented_images_are_mirrored_and_moved_originals(names, mirrored, shift):
    """Each is one of the possible views, every view comes up, and edges are repeated."""
    torch.manual_seed(0)
    image = torch.randint(256, (1, 3, 8, 8), dtype=torch.uint8)
    padded = torch.nn.functional.pad(image.float(), (shift,) * 4, mode="replicate").byte()
    padded = padded.flip(3) if mirrored else padded
    views = [
        padded[..., y : y + 8, x : x + 8]
        for y in range(2 * shift + 1)
        for x in range(2 * shift + 1)
    ]
    others = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    moved = names["windows"](torch.cat([others, image]), shift)
    mirrors = torch.tensor([not mirrored] * 4 + [mirrored])
    made = names["augment"](moved, torch.full((1000,), 4), mirrors)
    which = (made[:, None] == torch.stack(views, 1)).flatten(2).all(2).float()
    assert made.shape == (1000, 3, 8, 8) and (which.sum(1) == 1).all()
    expected = 1000 / len(views)
    assert (which.sum(0) - expected).abs().max() <= 5 * expected**0.5


@pytest.mark.parametrize("flip", [True, False])
def test_half_of_the_images_are_mirrored_and_the_other_half_in_the_next_epoch(names, flip):
    """Images that are dark on the left show on which side they are dark when they arrive."""
    images = torch.full((200, 3, 32, 32), 200, dtype=torch.uint8)
    images[..., :16] = 40
    images[:, 0] = torch.arange(200)[:, None, None]  # which image it is
    labels, seen = torch.zeros(200, dtype=torch.int64), []

    def objective(model, images, labels):
        seen.extend(zip((images[:, 0, 0, 0] * 64 + 120).tolist(), images[:, 1, 0, 0] > 0))
        return model(images).sum(), {}

    data, (config,) = names["settings"]()
    data = replace(data, train=(images, labels))
    names["train"](objective, data, replace(config, epochs=3, flip=flip), lambda text: None)
    epochs = [{round(i): bool(m) for i, m in seen[k : k + 200]} for k in [0, 200, 400]]
    assert all(sorted(epoch) == [*range(200)] for epoch in epochs)
    if flip:
        assert all(epochs[0][i] == epochs[2][i] != epochs[1][i] for i in range(200))
        assert abs(sum(epochs[0].values()) - 100) <= 4 * 50**0.5
    else:
        assert not any(mirrored for epoch in epochs for mirrored in epoch.values())


def test_whitened_patches_are_white(names):
    """The responses of the filters to the patches that made them have the identity as covariance,
    but for what keeps the smallest variances from being blown up."""
    torch.manual_seed(0)
    images = torch.randn(400, 3, 32, 32)
    images = torch.nn.functional.avg_pool2d(images, 3, 1, 1) * 3  # neighbours are alike
    filters = names["whitening_filters"](images, 24)
    answers = torch.nn.functional.conv2d(images, filters, stride=2).transpose(0, 1).flatten(1)
    second_moments = answers @ answers.T / answers.shape[1]
    assert (second_moments - torch.eye(24)).abs().max() < 0.01


# The optimiser


@pytest.mark.parametrize("shape", [(8, 30), (30, 8), (16, 16)])
def test_orthogonalising_keeps_singular_vectors_and_evens_out_singular_values(names, shape):
    """The values are those that the polynomial makes of the matrix's, one at a time."""
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    made = names["orthogonal"](matrix)
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    expected = values / values.square().sum().sqrt()
    for _ in range(2):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    torch.testing.assert_close(made, u @ expected.diag() @ v)
    assert expected.max() / expected.min() < values.max() / values.min()


def test_muon_moves_kernels_by_orthogonal_steps_and_all_else_like_adamw(names):
    """With momentum 0.95 as Nesterov has it, and decoupled decay for all."""
    torch.manual_seed(0)
    start = {"kernel": torch.randn(6, 4, 3, 3), "weight": torch.randn(5, 6), "bias": torch.randn(6)}
    ours, others = ({n: p.clone().requires_grad_() for n, p in start.items()} for _ in range(2))
    how = {"lr": 0.02, "weight_decay": 0.3}
    muon = names["Muon"]([*ours.values()], **how)
    adamw = torch.optim.AdamW([others["weight"], others["bias"]], **how)
    kernel, momentum = start["kernel"].clone(), torch.zeros(6, 4, 3, 3)
    for _ in range(4):
        for name, parameter in ours.items():
            parameter.grad = torch.randn_like(parameter)
            others[name].grad = parameter.grad.clone()
        gradient = others["kernel"].grad
        momentum = 0.95 * momentum + 0.05 * gradient
        step = names["orthogonal"]((0.05 * gradient + 0.95 * momentum).reshape(6, 36))
        kernel = kernel * (1 - 0.02 * 0.3) - 0.02 * 0.2 * 6 * step.reshape(6, 4, 3, 3)
        muon.step()
        adamw.step()
    torch.testing.assert_close(ours["kernel"].detach(), kernel)
    for name in ["weight", "bias"]:
        torch.testing.assert_close(ours[name], others[name])


class Crossings(TorchDispatchMode):
    """Collect the operations that move numbers from one device to another, or into Python."""

    def __init__(self):
        super().__init__()
        self.found, self.reads = [], 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        self.found += [operation] * (len({tensor.device for tensor in tensors}) > 1)
        self.reads += operation is torch.ops.aten._local_scalar_dense.default
        return result


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_training_step_never_waits_for_the_device(names, network, monkeypatch, name):
    """On the meta device there are no numbers: to ask for one is an error, and to fetch one from
    the CPU, for which a GPU would wait as well, is seen."""
    monkeypatch.setitem(names, "PRECISION", torch.float16)  # a fused AdamW knows no meta device
    model, objective = network.model.to("meta"), names[name]
    if name == "teacher_student":
        objective = partial(objective, teacher=model)
    muon = names["Muon"]([p for p in model.parameters() if p.requires_grad], 0.1, weight_decay=0.1)
    images, labels = (x.to("meta") for x in network.data.train)
    with Crossings() as crossings:
        batch = torch.randperm(len(images), device="meta")[:20]
        augmented = names["augment"](names["windows"](images, 1), batch, labels > 4)
        loss, _ = objective(model, names["normalise"](augmented), labels[batch])
        loss.backward()
        muon.step()
    assert loss.is_meta and crossings.found == []


def test_the_training_loop_asks_for_numbers_only_where_an_epoch_ends(names, network):
    """With four batches as often as with two."""
    plain = lambda model, images, labels: (cross_entropy(model(images), labels), {})  # noqa: E731
    _, (config,) = names["settings"]()
    config, reads = replace(config, n_images=100, n_test=20), []
    for batch_size in [50, 25]:
        with Crossings() as crossings:
            names["train"](plain, network.data, replace(config, batch_size=batch_size), print)
        reads.append(crossings.reads)
    assert reads[0] == reads[1] > 0


def spy_on(monkeypatch, name):
    """Record what the objective of the module is given."""
    calls, function = [], getattr(objectives, name)

    def spy(*args, **settings):
        calls.append((args, settings))
        return function(*args, **settings)

    monkeypatch.setattr(objectives, name, spy)
    return calls


def test_a_student_is_given_the_logits_of_a_teacher_at_rest(names, network, monkeypatch):
    calls = spy_on(monkeypatch, "teacher_student")
    teacher = names["build"](network.data, names["Config"](width=4, seed=3))
    student = partial(names["teacher_student"], teacher=teacher, alpha=0.3, temperature=2.0)
    loss, _ = student(network.model, network.images, network.labels)
    ((logits, labels, teacher_logits), settings) = calls[0]
    assert not teacher.training and settings == {"alpha": 0.3, "temperature": 2.0}
    torch.testing.assert_close(logits, network.model(network.images))
    torch.testing.assert_close(teacher_logits, teacher(network.images))
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert torch.equal(labels, network.labels)


def test_sampled_softmax_is_given_the_last_layer_that_makes_the_logits(names, network, monkeypatch):
    calls = spy_on(monkeypatch, "sampled_softmax")
    names["sampled_softmax"](network.model, network.images, network.labels, n_samples=7)
    ((embeddings, labels, weight, bias), settings) = calls[0]
    torch.testing.assert_close(embeddings @ weight.T + bias, network.model(network.images))
    assert torch.equal(labels, network.labels) and settings["n_samples"] == 7


@pytest.mark.parametrize("name", ["value_function", "policy_gradient"])
def test_bandits_are_given_actions_and_whether_they_were_right(names, network, monkeypatch, name):
    calls = spy_on(monkeypatch, name)
    names[name](network.model, network.images, network.labels)
    ((logits, actions, rewards, *baseline), _) = calls[0]
    torch.testing.assert_close(logits, network.model(network.images))
    assert torch.equal(rewards, (actions == network.labels).float()) and 0 < rewards.sum() < 30
    if baseline:
        expected = network.model.baseline(network.model.body(network.images))
        torch.testing.assert_close(baseline[0], expected.squeeze(1))


def test_bandits_play_and_learn_with_their_settings(names, network, monkeypatch):
    spies = ["epsilon_greedy", "value_function", "policy_gradient"]
    chosen, values, policies = (spy_on(monkeypatch, name) for name in spies)
    given = network.model, network.images, network.labels
    names["value_function"](*given, epsilon=0.7, consistent=True)
    names["policy_gradient"](*given, entropy_weight=0.3, with_baseline=False)
    assert chosen[0][0][1] == 0.7 and values[0][1] == {"consistent": True}
    assert policies[0][0][3] is None and policies[0][1] == {"entropy_weight": 0.3}


@pytest.mark.parametrize("name", ["value_function", "policy_gradient"])
def test_bandits_learn_nothing_from_a_label_but_the_reward(names, network, monkeypatch, name):
    """Other labels that leave all rewards alone leave the gradient alone."""
    calls, gradients, labels = spy_on(monkeypatch, name), [], network.labels
    for _ in range(2):
        torch.manual_seed(5)
        loss, _ = names[name](network.model, network.images, labels)
        gradients.append(torch.autograd.grad(loss, network.model.head.parameters()))
        actions = calls[0][0][1]
        another = (actions + (labels - actions) % 10 % 9 + 1) % 10  # and wrong, too
        labels = torch.where(actions == labels, labels, another)
    assert (labels != network.labels).sum() > 10 and all(map(torch.equal, *gradients))


# What the figures of the sections show


@pytest.fixture(scope="module")
def anatomies(cells):
    found = dict(cells) | {"display": cells["display"]}
    sections = ["softmax", "teacher", "sampled", "value", "policy"]
    shown = [f"{s}-{part}" for s in sections for part in ["settings", "anatomy"]]
    run(found, *[name for name in shown if name in CODE])
    return found["anatomies"], found


@pytest.mark.parametrize("objective", OBJECTIVES[:4])
def test_the_gradient_shown_is_what_was_said_minus_what_was_told(anatomies, objective):
    """Where something was told; elsewhere the gradient is zero."""
    for said, told, gradient in anatomies[0][objective].values():
        known = ~told.isnan()
        torch.testing.assert_close(gradient[known], (said - told)[known], rtol=1e-4, atol=1e-5)
        assert (gradient[~known] == 0).all() and known.any()


def test_what_sampled_softmax_said_is_the_softmax_over_the_label_and_the_kept(anatomies):
    shown, found = anatomies
    n, label = found["N_SAMPLES"], found["label"]
    logits, _ = found["half_trained"](partial(found["sampled_softmax"], n_samples=n))
    torch.manual_seed(0)
    drawn = torch.randint(10, (n,))
    kept = drawn[drawn != label]
    x, ids = logits.detach()[0], torch.cat([label, kept])
    p = torch.cat([x[label], x[kept] - math.log(len(kept) * 0.1 / 0.9)]).softmax(0)
    expected = torch.full((10,), math.nan).index_fill(0, ids, 0).index_add(0, ids, p)
    ((said, _, _),) = shown["sampled_softmax"].values()
    torch.testing.assert_close(said, expected, equal_nan=True)


def test_bars_are_as_long_as_their_values(anatomies):
    _, found = anatomies
    ax, values = found["plt"].subplots()[1], torch.linspace(-1, 1, 10)
    values[3] = math.nan
    found["show_bars"](ax, values, "C0")
    widths = torch.tensor([float(bars[0].get_width()) for bars in ax.containers])
    torch.testing.assert_close(widths, values[found["shown"]], equal_nan=True)


def test_the_gradient_shown_of_a_policy_is_that_of_its_equation(anatomies):
    shown, found = anatomies
    assert len(shown["policy_gradient"]) == 2
    w, label = found["ENTROPY_WEIGHT"], found["label"]
    v = found["baseline"].sigmoid()
    for n, (p, told, gradient) in enumerate(shown["policy_gradient"].values()):
        (action,) = (~told.isnan()).nonzero().flatten()
        r = float(action == label)
        assert r == 1 - n  # the right one, then a wrong one
        one_hot = torch.nn.functional.one_hot(action, len(p))
        entropy = -(p * p.log()).sum()
        expected = (r - v) * (p - one_hot) + w * p * (p.log() + entropy)
        torch.testing.assert_close(gradient, expected.detach(), rtol=1e-4, atol=1e-6)


# Numbers of tables


def group(*accuracies, **metrics):
    """Runs with these accuracies, one for each seed."""
    same = {"objective": "value_function", "guessing": 0.12}
    histories = [[{"test_accuracy": a} | metrics] for a in accuracies]
    return [SimpleNamespace(accuracy=h[0]["test_accuracy"], history=h, **same) for h in histories]


def numbers(text):
    return [
        float(word) for word in text.replace(",", " ").split() if word.lstrip("+-")[0].isdigit()
    ]


def test_a_difference_is_paired_by_seed_and_has_the_standard_error_of_its_mean(names):
    """Seeds differ much, the groups little and always the same way."""
    ours, others = [0.52, 0.73, 0.31, 0.66], [0.50, 0.70, 0.30, 0.64]
    points = [100 * (a - b) for a, b in zip(ours, others)]
    said = names["versus"](group(*ours), group(*others))
    mean, error = statistics.mean(points), statistics.stdev(points) / 2
    assert numbers(said) == [pytest.approx(mean, abs=0.051), pytest.approx(error, abs=0.051)]
    assert "clear" in said and "not" not in said
    assert names["versus"](group(*others), group(*ours)).startswith("-")


@pytest.mark.parametrize("n", [3, 5])
@pytest.mark.parametrize("accuracy", [0.0, 0.5, 1.0])
def test_ties_are_not_clear(names, n, accuracy):
    said = names["versus"](group(*[accuracy] * n), group(*[accuracy] * n))
    assert said.endswith("not clear") and numbers(said) == [0, 0] and "nan" not in said


@pytest.mark.parametrize("n", [1, 2])
def test_too_few_seeds_are_called_too_few(names, n):
    said = names["versus"](group(*[0.9] * n), group(*[0.1] * n))
    assert "too few" in said and "±" not in said and numbers(said) == [80]


def test_an_accuracy_of_several_seeds_is_its_mean_and_standard_deviation(names):
    assert numbers(names["percent"](group(0.5))) == [50]
    some = [0.512, 0.634, 0.587]
    mean, spread = (100 * f(some) for f in [statistics.mean, statistics.stdev])
    near = partial(pytest.approx, abs=0.051)
    assert numbers(names["percent"](group(*some))) == [near(mean), near(spread)]


@pytest.mark.parametrize("accuracies", [[0.1], [0.119], [0.08, 0.14, 0.12]])
def test_guessing_is_called_guessing(names, accuracies):
    assert "guessing" in names["percent"](group(*accuracies))
    assert "guessing" not in names["percent"](group(*[a + 0.04 for a in accuracies]))


def test_guessing_is_the_share_of_the_commonest_class_and_two_standard_errors(names):
    data, (config,) = names["settings"]()
    labels = torch.tensor([3] * 60 + [1] * 40)
    data = replace(data, test=(data.test[0][:1].expand(100, -1, -1, -1), labels))
    run = names["train_once"](names["softmax_cross_entropy"], data, config, print)
    assert run.guessing == pytest.approx(0.6 + 2 * (0.6 * 0.4 / 100) ** 0.5)


@pytest.mark.parametrize(
    "level, epoch", [(0.1, 1), (0.3, 2), (0.30001, 4), (0.6, 4), (0.61, math.inf)]
)
def test_a_level_is_reached_in_the_first_epoch_that_shows_it(names, level, epoch):
    history = [{"test_accuracy": a} for a in [0.2, 0.3, 0.1, 0.6, 0.5]]
    assert names["epochs_to"](level, SimpleNamespace(history=history)) == epoch


def answer(names, found, *metrics):
    names |= {"sweep": lambda *_: found}
    names["display"].clear()
    data, config, _ = names["trial"]()
    n_seeds = len(next(iter(found.values())))
    names["answer"]("How?", dict.fromkeys(found), (data, config, [*range(n_seeds)]), *metrics)
    (table,) = names["display"].tables()
    head, _, *rows = [line.strip("| ").split(" | ") for line in table.split("\n")]
    (title,) = names["display"].figures()
    return [dict(zip(head, [cell.strip() for cell in row])) for row in rows], title


def test_the_line_of_an_answer_is_where_its_table_ends_to_say_guessing(names, monkeypatch):
    lines = []
    monkeypatch.setattr(names["plt"].Axes, "axvline", lambda self, x, **_: lines.append(x))
    answer(names, {"a": group(0.5, 0.6), "b": group(0.7, 0.8)})
    assert lines == [0.12]


def test_an_answer_says_how_far_each_variant_is_from_the_best(names, monkeypatch):
    labels = []
    monkeypatch.setattr(names["plt"].Axes, "set_xlabel", lambda _, text: labels.append(text))
    found = {"a": group(0.5, 0.6, 0.7, reward=0.25), "b": group(0.6, 0.7, 0.81, reward=0.5)}
    rows, title = answer(names, found, "reward")
    assert numbers(rows[0]["test accuracy"]) == [60, 10] and rows[0]["reward"] == "0.25"
    others = next(value for key, value in rows[0].items() if "best" in key)
    assert numbers(others) == [-10.3, 0.3] and "clear" in others and "not" not in others
    assert "[0, 1, 2]" in labels[0] and "stand-in" in title


def test_an_answer_where_all_are_perfect_calls_nobody_better(names):
    rows, _ = answer(names, {name: group(1.0, 1.0, 1.0) for name in "abc"}, "reward")
    words = " ".join(cell for row in rows for cell in row.values())
    assert words.count("not clear") == 2 and "nan" not in words


# Experiments


def test_the_gradients_variance_is_that_over_all_actions(names):
    """Enumerated, through the gradient of the module's own loss."""
    torch.manual_seed(0)
    logits, labels = 2 * torch.randn(6, 5), torch.randint(5, (6,))
    for v in [0.0, 0.1, 0.5, 0.9]:
        total = 0.0
        for x, label in zip(logits, labels):
            p, gradients = x.softmax(0), []
            for action in torch.arange(5):
                leaf = x[None].clone().requires_grad_()
                reward = (action == label).float()[None] - v
                loss, _ = objectives.policy_gradient(leaf, action[None], reward, entropy_weight=0.0)
                gradients.append(torch.autograd.grad(loss, leaf)[0][0])
            gradients = torch.stack(gradients)
            mean = p @ gradients
            total += (p @ (gradients - mean).square().sum(1)).item() / 6
        ours = names["gradient_variance"](logits.softmax(1), labels, v)
        assert ours == pytest.approx(total, rel=1e-5)


@pytest.fixture(scope="module")
def log(cells):
    """A log of 3,000 choices about one image, so that frequencies can be compared."""
    data, config, _ = cells["trial"]()
    one = data.train[0][:1].expand(3000, -1, -1, -1)
    images = torch.cat([data.train[0], one]), torch.cat([data.train[1], torch.full([3000], 3)])
    data = replace(data, train=images)
    kept = cells["write_log"](data, replace(config, n_images=None))
    half = replace(config, epochs=1, n_images=12_800)
    old = cells["train_once"](cells["policy_gradient"], data, half, print)
    assert old.model.key == [*cells["every_run"]][-1]
    few = cells["write_log"](data, replace(config, n_images=100))
    return SimpleNamespace(data=data, kept=kept, few=few, old=old, flip=config.flip)


def test_propensities_are_the_probabilities_of_the_policy_that_chose(cells, log):
    actions, rewards, propensities = log.kept.train[1].unbind(1)
    p = cells["predict"](log.old.model, log.data.train[0], log.flip).softmax(1)
    mixture = 0.9 * p + 0.1 / p.shape[1]
    assert log.old.objective == "policy_gradient" and log.old.config.epochs == 1
    torch.testing.assert_close(propensities, mixture[torch.arange(len(p)), actions.long()])
    assert torch.equal(rewards, (actions.long() == log.data.train[1]).float())
    assert propensities.min() >= 0.1 / p.shape[1]


def test_logged_actions_follow_the_propensities(log):
    actions, _, propensities = log.kept.train[1][-3000:].unbind(1)
    counts = actions.long().bincount(minlength=10)
    for action in actions.unique().long():
        q = propensities[actions == action][0].item()
        assert abs(counts[action] - 3000 * q) <= 5 * (3000 * q * (1 - q)) ** 0.5
    shares = [propensities[actions == action][0].item() for action in actions.unique()]
    assert sum(shares) == pytest.approx(1, abs=0.02) and len(shares) >= 9


def test_a_log_holds_no_labels_and_tests_are_those_of_the_data(log):
    """Its rows are whole in (action, reward, propensity); right answers are known where r is 1."""
    assert torch.equal(log.kept.train[0], log.data.train[0])
    assert log.kept.train[1].shape == (len(log.data.train[1]), 3)
    assert log.kept.test is log.data.test
    for few, kept in zip(log.few.train, log.kept.train):
        assert torch.equal(few, kept[:100])


def test_who_learns_from_a_log_is_given_its_columns(names, network, monkeypatch):
    rows = torch.stack([network.labels.float(), torch.rand(30).round(), torch.rand(30)], 1)
    rows[:, 2] = rows[:, 2].clamp(min=0.1)
    calls = spy_on(monkeypatch, "value_function")
    names["learn_value_function"](network.model, network.images, rows, consistent=True)
    (logits, actions, rewards), settings = calls[0]
    assert settings == {"consistent": True} and torch.equal(actions, network.labels)
    assert torch.equal(rewards, rows[:, 1])
    calls = spy_on(monkeypatch, "policy_gradient")
    for weighted, v in [(True, 0.0), (True, 0.3), (False, 0.1)]:
        learn = partial(names["learn_policy_gradient"], weighted=weighted, v=v)
        learn(network.model, network.images, rows)
        (logits, actions, rewards), settings = calls[-1]
        torch.testing.assert_close(logits, network.model(network.images))
        assert torch.equal(actions, network.labels) and torch.equal(rewards, rows[:, 1] - v)
        q = settings["propensities"]
        assert torch.equal(q, rows[:, 2]) if weighted else q is None
