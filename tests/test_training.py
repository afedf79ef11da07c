"""The network, its augmentation, the optimiser, the training loop, and the objectives in it."""

import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from notebook import coloured_images, shared_cells
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LOOP = ["train", "build", "predict", "Data", "Config", "muon", "adamw", "sgd"]
NAMES = [
    "softmax cross-entropy",
    "teacher-student",
    "sampled softmax",
    "value function",
    "policy gradient",
]
every_objective = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="session")
def loop():
    """The notebook up to its training loop."""
    return shared_cells(*LOOP)


@pytest.fixture(scope="session")
def lesson():
    """The notebook with its five objectives."""
    names = ["softmax", "teacher", "sampled", "value", "policy"]
    return shared_cells(*LOOP, *[f"{name}_objective" for name in names])


def coloured_data(space):
    classes = ("red", "green", "blue")
    return space.Data("colours", classes, coloured_images(120, 0), coloured_images(60, 1))


def small_config(space, **settings):
    defaults = {"epochs": 2, "batch_size": 20, "learning_rate": 0.02, "width": 8}
    return space.Config(**defaults | settings)


def objectives_of(lesson):
    """{name: objective}; the teacher is an untrained network."""
    teacher = lesson.build(coloured_data(lesson), small_config(lesson, seed=9))
    return {
        "softmax cross-entropy": lesson.softmax_objective,
        "teacher-student": partial(
            lesson.teacher_objective, teacher=teacher, alpha=0.2, temperature=2.0
        ),
        "sampled softmax": partial(lesson.sampled_objective, n_samples=2),
        "value function": partial(lesson.value_objective, epsilon=0.5, normalized=False),
        "policy gradient": partial(
            lesson.policy_objective, entropy_weight=0.04, with_baseline=True
        ),
    }


def cross_entropy(model, images, labels):
    return F.cross_entropy(model(images).float(), labels), {}


class Silent:
    """In place of a line of progress."""

    def update(self, *texts):
        pass

    done = update


def train(space, objective=cross_entropy, data=None, **settings):
    """A trained network, and what was measured in each epoch."""
    config = small_config(space, **settings)
    data = data or coloured_data(space)
    model = space.build(data, config)
    return model, list(space.train(model, objective, data, config, Silent()))


# The network


@pytest.mark.parametrize("width", [1, 2, 7, 32])
@pytest.mark.parametrize("n_classes", [2, 10, 100])
def test_the_network_makes_a_score_for_each_class_at_any_width(loop, width, n_classes):
    data = replace(coloured_data(loop), classes=tuple(map(str, range(n_classes))))
    model = loop.build(data, small_config(loop, width=width)).eval()
    images = loop.normalise(data.train[0][:5])
    assert model(images).shape == (5, n_classes)
    assert model.baseline(model.body(images)).shape == (5, 1)


def test_whitening_filters_answer_without_correlation_and_with_variance_1(loop):
    torch.manual_seed(0)
    images = torch.randn(300, 3, 32, 32, dtype=torch.float64)
    images = F.avg_pool2d(images, 3, stride=1, padding=1)  # neighbouring pixels are alike
    filters = loop.whitening_filters(images, 48, eps=0)
    answers = F.conv2d(images, filters, stride=2).transpose(0, 1).flatten(1)
    second_moments = answers @ answers.T / answers.shape[1]
    torch.testing.assert_close(second_moments, torch.eye(48, dtype=torch.float64))


def test_the_first_layer_has_each_filter_with_both_signs_and_does_not_learn(loop):
    model = loop.build(coloured_data(loop), small_config(loop))
    weight = model.body[0][0].weight
    filters, negatives = weight.chunk(2)
    assert torch.equal(filters, -negatives) and not weight.requires_grad


def test_a_seed_decides_the_first_weights(loop):
    data = coloured_data(loop)
    first, again, other = [
        loop.build(data, small_config(loop, seed=seed)).head.weight for seed in [1, 1, 2]
    ]
    assert torch.equal(first, again) and not torch.equal(first, other)


# Augmentation


@pytest.mark.parametrize("pixels", [0, 2])
def test_a_moved_image_is_one_of_the_crops_of_the_padded_one_and_all_are_equally_likely(
    loop, pixels
):
    torch.manual_seed(0)
    images = torch.rand(1000, 3, 6, 8)
    padded = F.pad(images, [pixels] * 4, mode="replicate")
    moved = loop.move(images, pixels, torch.Generator().manual_seed(0))
    places = list(product(range(2 * pixels + 1), repeat=2))
    counts = torch.zeros(len(places))
    for before, after in zip(padded, moved):
        crops = [before[:, y : y + 6, x : x + 8] for y, x in places]
        matches = [torch.equal(crop, after) for crop in crops]
        assert sum(matches) == 1
        counts[matches.index(True)] += 1
    expected = 1000 / len(places)
    assert (counts - expected).abs().max() <= 5 * expected**0.5


@pytest.mark.parametrize("flip", [True, False])
def test_a_prediction_is_the_mean_over_six_views_or_three_without_mirrors(loop, flip):
    """The image, moved by a pixel down and right, up and left, and their mirror images."""
    images = coloured_images(7, 2)[0]
    model = loop.build(coloured_data(loop), small_config(loop)).eval()
    padded = F.pad(images.float(), [1] * 4, mode="replicate")
    views = [padded[:, :, i : i + 32, i : i + 32] for i in range(3)]
    if flip:
        views += [view.flip(3) for view in views]
    with torch.no_grad():
        mean = torch.stack([model(loop.normalise(view)) for view in views]).mean(0)
    torch.testing.assert_close(loop.predict(model, images, flip), mean, rtol=1e-4, atol=1e-5)
    assert model.training


@pytest.mark.parametrize("flip", [True, False])
def test_every_image_is_seen_once_an_epoch_and_mirrored_in_every_second(loop, flip):
    """Each image is dark on the left, and its red channel says which one it is."""
    images = torch.full((90, 3, 32, 32), 200, dtype=torch.uint8)
    images[..., :16] = 40
    images[:, 0] = torch.arange(90)[:, None, None]
    seen = []

    def objective(model, images, labels):
        numbers = (images[:, 0, 0, 0] * 64 + 120).round().int().tolist()
        mirrored = (images[:, 1, 0, 0] > 0).tolist()
        seen.extend(zip(numbers, mirrored))
        return cross_entropy(model, images, labels)

    data = replace(coloured_data(loop), train=(images, torch.zeros(90, dtype=torch.int64)))
    train(loop, objective, data, epochs=3, flip=flip)
    epochs = [dict(seen[i : i + 90]) for i in [0, 90, 180]]
    for epoch in epochs:
        assert sorted(epoch) == list(range(90))
        assert flip or not any(epoch.values())
    if flip:
        assert epochs[0] == epochs[2]
        assert all(epochs[0][i] != epochs[1][i] for i in range(90))
        assert 20 < sum(epochs[0].values()) < 70


# The optimiser and its schedule


@pytest.mark.parametrize("shape", [(8, 30), (30, 8), (16, 16)])
def test_orthogonalising_keeps_singular_vectors_and_evens_out_singular_values(loop, shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    expected = values / values.norm()
    for _ in range(2):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    torch.testing.assert_close(loop.orthogonal(matrix), u @ expected.diag() @ v)
    assert expected.max() / expected.min() < values.max() / values.min()


def test_muon_takes_orthogonal_steps_for_kernels_and_those_of_adamw_for_the_rest(loop):
    """With Nesterov momentum 0.95, and decoupled weight decay 0.2 for all."""
    torch.manual_seed(0)
    kernel = torch.randn(6, 4, 3, 3)
    ours = [kernel.clone().requires_grad_(), torch.randn(5, 6).requires_grad_()]
    theirs = ours[1].detach().clone().requires_grad_()
    muon = loop.muon(ours, 0.02)
    adamw = torch.optim.AdamW([theirs], 0.02, weight_decay=0.2)
    momentum = torch.zeros(6, 36)
    for _ in range(3):
        for parameter in ours:
            parameter.grad = torch.randn_like(parameter)
        theirs.grad = ours[1].grad.clone()
        gradient = ours[0].grad.flatten(1).clone()
        momentum = 0.95 * momentum + 0.05 * gradient
        direction = loop.orthogonal(0.95 * momentum + 0.05 * gradient)
        kernel = kernel - 0.02 * 0.2 * kernel - 0.02 * 0.2 * 6 * direction.view(6, 4, 3, 3)
        muon.step()
        adamw.step()
    torch.testing.assert_close(ours[0].detach(), kernel)
    torch.testing.assert_close(ours[1], theirs)


@pytest.mark.parametrize("n_steps", [1, 5, 100, 1000])
def test_the_learning_rate_rises_to_its_maximum_and_falls_to_zero(loop, n_steps):
    rates = [loop.rise_and_fall(step, n_steps) for step in range(n_steps + 1)]
    assert min(rates[:-1]) > 0 and rates[-1] == 0
    assert max(rates) <= 1 and (n_steps < 100 or max(rates) > 0.99)
    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top]) and rates[top:] == sorted(rates[top:], reverse=True)


# The loop


def test_a_training_is_repeated_bit_by_bit_and_another_seed_makes_another(loop):
    (first, measured), (again, same), (other, _) = [train(loop, seed=s) for s in [1, 1, 2]]
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    assert not torch.equal(first.head.weight, other.head.weight)
    for before, after in zip(measured, same):
        assert before | {"seconds": 0} == after | {"seconds": 0}


def test_testing_once_changes_nothing_but_that_earlier_epochs_have_no_accuracy(loop):
    _, each = train(loop, epochs=3)
    _, once = train(loop, epochs=3, test_each_epoch=False)
    assert ["accuracy" in epoch for epoch in once] == [False, False, True]
    assert once[-1]["accuracy"] == each[-1]["accuracy"]
    assert [e["train_loss"] for e in once] == [e["train_loss"] for e in each]


def test_a_loss_that_is_not_finite_ends_the_training_with_a_test(loop):
    def breaks_down(model, images, labels):
        loss, metrics = cross_entropy(model, images, labels)
        return loss * math.nan, metrics

    _, (epoch,) = train(loop, breaks_down, epochs=3, test_each_epoch=False)
    assert math.isnan(epoch["train_loss"]) and 0 <= epoch["accuracy"] <= 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("optimizer", ["Muon", "SGD"])
def test_float16_with_scaled_gradients_learns_what_float32_does(loop, monkeypatch, optimizer):
    """One step is left out while the scaler looks for a scale, so the weights differ a little."""
    settings = {"optimizer": optimizer, "epochs": 6, "learning_rate": 0.02}
    _, plain = train(loop, **settings)
    monkeypatch.setattr(loop, "PRECISION", torch.float16)
    _, scaled = train(loop, **settings)
    assert plain[-1]["accuracy"] > 0.9 and scaled[-1]["accuracy"] > 0.9
    assert scaled[-1]["train_loss"] == pytest.approx(plain[-1]["train_loss"], abs=0.1)


class Crossings(TorchDispatchMode):
    """Counts the numbers that Python asks for, and what has tensors on two devices at once."""

    def __init__(self):
        super().__init__()
        self.n_asked = 0
        self.copies = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **kwargs or {})
        leaves = tree_leaves((args, kwargs, result))
        devices = {leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor)}
        if len(devices) > 1:
            self.copies.append(operation)
        if operation is torch.ops.aten._local_scalar_dense.default:
            self.n_asked += 1
        return result


def test_the_loop_asks_the_device_for_numbers_only_where_an_epoch_ends(loop):
    """As often with many steps as with few; else Python would wait for a GPU in every step."""
    n_asked = []
    for batch_size in [60, 10]:
        with Crossings() as crossings:
            train(loop, batch_size=batch_size)
        n_asked.append(crossings.n_asked)
    assert n_asked[0] == n_asked[1] > 0


@every_objective
def test_an_objective_never_waits_for_the_device(lesson, monkeypatch, name):
    """On the meta device, which has no numbers (and no autocast), to ask for one is an error."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **settings: nullcontext())
    data = coloured_data(lesson)
    objective = objectives_of(lesson)[name]
    if name == "teacher-student":
        objective.keywords["teacher"].to("meta")
    model = lesson.build(data, small_config(lesson)).to("meta")
    images, labels = (tensor[:20].to("meta") for tensor in data.train)
    with Crossings() as crossings:
        inputs = lesson.move(lesson.normalise(images), 1, generator=None)
        loss, metrics = objective(model, inputs, labels)
        loss.backward()
    assert crossings.copies == []
    for value in [loss, *metrics.values()]:
        assert value.is_meta and value.shape == ()


# The objectives in the loop


@every_objective
def test_every_objective_learns_and_its_metrics_are_measured(lesson, name):
    _, measured = train(lesson, objectives_of(lesson)[name], epochs=5)
    assert [epoch["epoch"] for epoch in measured] == [1, 2, 3, 4, 5]
    assert measured[-1]["accuracy"] > 0.9
    assert all(isinstance(value, (int, float)) for value in measured[-1].values())


def test_all_objectives_see_the_same_images_moved_alike_and_in_the_same_order(lesson):
    seen = {name: [] for name in NAMES}

    def watched(model, images, labels, name, objective):
        seen[name] += zip(labels.tolist(), images.sum((1, 2, 3)).tolist())
        return objective(model, images, labels)

    for name, objective in objectives_of(lesson).items():
        train(lesson, partial(watched, name=name, objective=objective))
    for name in NAMES:
        assert len(seen[name]) == 240 and seen[name] == seen[NAMES[0]]


@pytest.mark.parametrize("name", ["value function", "policy gradient"])
def test_a_bandit_learns_nothing_from_a_label_but_whether_its_action_was_right(lesson, name):
    """Where no action can be right, the label makes no difference to the gradient."""
    data = coloured_data(lesson)
    images = lesson.normalise(data.train[0][:20])
    gradients = []
    for wrong in [3, 4]:
        torch.manual_seed(0)
        model = lesson.build(data, small_config(lesson))
        loss, _ = objectives_of(lesson)[name](model, images, torch.full((20,), wrong))
        gradients.append(torch.autograd.grad(loss, model.head.weight)[0])
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0
