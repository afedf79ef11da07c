"""The sections "Try it" and "Five claims": sweeps, ten experiments and verdicts, against numbers
that are recomputed here. Cells are addressed by their ids and run on few images."""

import ast
import io
import itertools
import json
import math
import re
import statistics
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.text import Text
from test_notebook import (
    BEFORE_PROBE,
    CODE,
    execute,
    one_thread,
    run,
    save_images,
    with_few_images,
)
from test_runs import same
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

SETTINGS = [f"{part}-{kind}" for part in ["teacher", "sampled", "value", "policy"]
            for kind in ["settings", "objective"]]  # fmt: skip
HELPERS = ["sweep", "train-one", "keep-trainings", "experiment", "heading", "compare", "plot-sweep"]
CLAIMS = ["parts", "reliability-parts", "teacher-parts", "setting-parts", "value-parts"]
OUTPUTS = {  # of a network with ten classes, with a baseline
    "softmax_cross_entropy": ("supervised", 10),
    "teacher_student": ("distilled", 10),
    "sampled_softmax": ("sampled", 10),
    "value_function": ("valued", 10),
    "policy_gradient": ("reinforced", 11),
}
SOFTMAX, TEACHER, SAMPLED, VALUE, POLICY = OUTPUTS

# The cells of each experiment, the name of its sizes, and what is changed in these.
TINY = {"EPOCHS": 2, "N_IMAGES": 160, "N_TEST": 80, "SEEDS": [0]}
EXPERIMENTS = {
    "targets": (
        ["targets-sizes", "targets"],
        "TARGETS",
        {"alphas": [0.0, 1.0], "temperatures": [1.0, 4.0]},
    ),
    "larger_teacher": (
        ["teacher-sizes", "larger-teacher", "gap-closed"],
        "LARGER_TEACHER",
        {"width": 4, "mixtures": [(0.5, 1.0), (0.9, 4.0)], "SEEDS": [0, 1]},
    ),
    "samples": (["samples-sizes", "samples"], "SAMPLES", {"counts": [1, 5], "SEEDS": [0, 1]}),
    "exploration": (["exploration-sizes", "exploration"], "EXPLORATION", {"epsilons": [0.0, 1.0]}),
    "entropy": (["entropy-sizes", "entropy", "collapse"], "ENTROPY", {"weights": [0.0, 0.3]}),
    "baselines": (
        ["baseline-sizes", "gradient-variance", "plot-baselines", "baseline"],
        "BASELINES",
        {"draws": 5},
    ),
    "consistency": (["consistent-sizes", "consistent"], "CONSISTENCY", {"SEEDS": [0, 1]}),
    "deeper": (
        ["deeper-sizes", "resnet", "deeper"],
        "DEEPER",
        {"objectives": [SOFTMAX, POLICY], "EPOCHS": 1, "N_IMAGES": 64, "BATCH_SIZE": 32},
    ),
    "steps": (
        ["steps-sizes", "steps", "plot-steps", "good-region"],
        "STEPS",
        {"objectives": [SOFTMAX, VALUE], "rates": {"SGD": [0.01, 0.1], "AdamW": [0.006]}},
    ),
    "other_images": (["other-sizes", "plot-other", "other"], "OTHER_IMAGES", {}),
    "reliability": (
        ["reliability-sizes", "plain-network", "recipes", "reliability"],
        "RELIABILITY",
        {"objectives": [SOFTMAX, SAMPLED], "SEEDS": [0, 1, 2]},
    ),
}


def definitions(namespace, *cells):
    """Execute only the functions and classes of cells, on their own lines for inspect."""
    for name in cells:
        lines = CODE[name].splitlines()
        kept = [""] * len(lines)
        for node in ast.parse(CODE[name]).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                first = min(part.lineno for part in [node, *node.decorator_list]) - 1
                kept[first : node.end_lineno] = lines[first : node.end_lineno]
        execute(namespace, name, "\n".join(kept) + "\n")


def prepared(folder, **changes):
    """A namespace that has trained all five objectives and defined all helpers and experiments."""
    names = run(with_few_images(folder, **changes), *BEFORE_PROBE)
    definitions(names, "probe")
    names["runs"][SOFTMAX] = names["train_seeds"](SOFTMAX, names["supervised"], 10)
    run(names, *SETTINGS, *HELPERS)
    definitions(names, "table")
    for cells, *_ in EXPERIMENTS.values():
        run(names, cells[0])
        definitions(names, *cells[1:])
    return run(names, "recipes")


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """One namespace for all tests, and every figure that is shown, with its caption."""
    style = dict(plt.rcParams)
    with one_thread():
        names = prepared(tmp_path_factory.mktemp("runs"))
        for objective in list(OUTPUTS)[1:]:
            function, n_outputs = OUTPUTS[objective]
            names["runs"][objective] = names["train_seeds"](objective, names[function], n_outputs)
        figures = []
        names["show"] = lambda caption: (figures.append((plt.gcf(), caption)), plt.close("all"))
        yield SimpleNamespace(names=names, figures=figures)
    plt.rcParams.update(style)


@pytest.fixture
def names(session, tmp_path):
    """The namespace, with an empty folder for trainings; restored after the test."""
    names, before = session.names, dict(session.names)
    names |= {"RUNS": str(tmp_path / "runs"), "finished_files": set(), "findings": {}}
    names["runs"] = dict(names["runs"])
    session.figures.clear()
    yield names
    names.clear()
    names.update(before)


@pytest.fixture
def steps():
    """Counts the steps of all optimisers, and raises an error at one of them."""
    counter = SimpleNamespace(n=0, at=None, error=None)

    def count(*_):
        counter.n += 1
        if counter.n == counter.at:
            raise counter.error

    handle = register_optimizer_step_pre_hook(count)
    yield counter
    handle.remove()


@pytest.fixture
def bars(names):
    """All progress bars, which also note how far they ever got."""
    made = []

    class Recorded(names["tqdm"]):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.furthest = 0
            made.append(self)

        def update(self, n=1):
            super().update(n)
            self.furthest = max(self.furthest, self.n)

    names["tqdm"] = Recorded
    return made


def equal_sweeps(one, other):
    return one.keys() == other.keys() and all(
        len(one[key]) == len(other[key]) and all(map(same, one[key], other[key])) for key in one
    )


def small(names, **changes):
    """Settings with which a training takes three steps an epoch."""
    names.update({"EPOCHS": 1, "N_IMAGES": 160, "N_TEST": 50, "SEEDS": [3, 1]} | changes)


def investigation(name, found):
    """An experiment of this name that finds this."""

    def investigate():
        return "", found

    investigate.__name__ = name
    return investigate


# Settings for the length of a block


def test_settings_hold_inside_and_are_restored(names):
    before = names["EPOCHS"], names["WIDTH"]
    with names["settings"](EPOCHS=7, WIDTH=12):
        assert (names["EPOCHS"], names["WIDTH"]) == (7, 12)
        with names["settings"](EPOCHS=9):
            assert (names["EPOCHS"], names["WIDTH"]) == (9, 12)
        assert names["EPOCHS"] == 7
    assert (names["EPOCHS"], names["WIDTH"]) == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_settings_are_restored_after_an_exception(names, error):
    before = dict(names)
    with pytest.raises(error), names["settings"](EPOCHS=7), names["settings"](EPOCHS=8, SEED=5):
        raise error
    assert dict(names) == before


def test_an_unknown_setting_is_named_and_changes_nothing(names):
    before = dict(names)
    with pytest.raises(NameError, match=r"EPOCS"), names["settings"](WIDTH=12, EPOCS=3):
        pytest.fail("the block was entered")
    assert dict(names) == before
    with pytest.raises(NameError, match="EPSILOM"):
        names["sweep"](VALUE, "EPSILOM", [0.1])
    assert dict(names) == before


# Sweeps


def test_a_sweep_trains_what_settings_by_hand_give(names):
    """All objectives, two settings at a time and two seeds, bit for bit."""
    small(names)
    values = [(0.002, 4), (0.02, 8)]
    found = names["sweep"](list(OUTPUTS), ("LEARNING_RATE", "WIDTH"), values)
    assert list(found) and set(found) == set(itertools.product(OUTPUTS, values))
    for (objective, (rate, width)), trained in found.items():
        names |= {"LEARNING_RATE": rate, "WIDTH": width}
        function, n_outputs = OUTPUTS[objective]
        assert len(trained) == 2
        for seed, found_run in zip([3, 1], trained):
            names["SEED"] = seed
            with redirect_stdout(io.StringIO()):
                by_hand = names["train"](objective, names[function], n_outputs)
            assert same(found_run, by_hand), (objective, rate, width, seed)


@pytest.mark.parametrize(
    "objective, setting, values",
    [
        (TEACHER, "ALPHA", [0.0, 1.0]),
        (TEACHER, "TEMPERATURE", [1.0, 8.0]),
        (SAMPLED, "N_SAMPLES", [1, 20]),
        (VALUE, "EPSILON", [0.0, 1.0]),
        (VALUE, "CONSISTENT", [False, True]),
        (POLICY, "ENTROPY_WEIGHT", [0.0, 0.5]),
        (POLICY, "BASELINE", [False, True]),
    ],
)
def test_the_value_of_an_objectives_own_setting_reaches_its_training(
    names, objective, setting, values
):
    small(names, SEEDS=[2])
    found = names["sweep"](objective, setting, values)
    (first,), (second,) = found.values()
    assert list(found) == [(objective, value) for value in values] and not same(first, second)
    names |= {setting: values[0], "SEED": 2}
    function, n_outputs = OUTPUTS[objective]
    with redirect_stdout(io.StringIO()):
        by_hand = names["train"]("", names[function], n_outputs - (setting == "BASELINE"))
    assert same(first, by_hand)


def test_a_sweep_trains_with_the_function_that_has_the_name_now(names):
    """Its cell may have been changed and run again after the cell of the sweep."""
    small(names, SEEDS=[0])
    source = "def valued(model, images, labels):\n    return supervised(model, images, labels)\n"
    execute(names, "valued-again", source)
    (value,), (softmax,) = names["sweep"]([VALUE, SOFTMAX], "WIDTH", [8]).values()
    assert same(value, softmax)


def test_unknown_objectives_are_named(names, steps):
    with pytest.raises(ValueError, match="(?s)objectives must be among .*hinge_loss"):
        names["sweep"]([SOFTMAX, "hinge_loss"], "WIDTH", [8])
    assert steps.n == 0


def test_a_second_sweep_trains_nothing_and_finds_the_same(names, steps):
    small(names)
    first = names["sweep"]([SOFTMAX, POLICY], "WIDTH", [4, 6])
    assert steps.n == 2 * 2 * 2 * 3
    again = names["sweep"]([SOFTMAX, POLICY], "WIDTH", [4, 6])
    assert steps.n == 24 and equal_sweeps(first, again)
    assert all(r.seconds == s.seconds for key in first for r, s in zip(first[key], again[key]))


def test_trainings_of_sweeps_go_to_a_folder_of_their_own(names):
    small(names)
    names["sweep"](VALUE, "EPSILON", [0.1, 0.9])
    files = [path.relative_to(names["RUNS"]) for path in Path(names["RUNS"]).rglob("*.*")]
    assert len(files) == 4 and all(
        file.parent == Path("experiments") and file.match("value_function-*.pt") for file in files
    )


def test_a_default_value_shares_the_training_of_the_main_section(names, steps):
    small(names, SEEDS=[0], EPSILON=0.2)
    with redirect_stdout(io.StringIO()):
        (main,) = names["train_seeds"](VALUE, names["valued"], 10)
    assert steps.n == 3
    found = names["sweep"](VALUE, "EPSILON", [0.2, 0.7])
    assert steps.n == 6 and same(found[VALUE, 0.2][0], main)
    folder = Path(names["RUNS"])
    assert len(list(folder.glob("*.pt"))) == len(list(folder.glob("experiments/*.pt"))) == 1


@pytest.fixture(scope="module")
def restarted(session, tmp_path_factory):
    """A second namespace, as after a restart."""
    with one_thread():
        yield prepared(tmp_path_factory.mktemp("restarted"))


@pytest.mark.parametrize("resume", [True, False])
def test_after_a_restart_trainings_are_used_only_with_resume(names, restarted, steps, resume):
    small(names)
    small(restarted, RUNS=names["RUNS"], RESUME=resume, finished_files=set())
    with redirect_stdout(io.StringIO()):
        names["train_seeds"](SOFTMAX, names["supervised"], 10)
    first = names["sweep"](SOFTMAX, "WIDTH", [4, 8])  # WIDTH 8 is the main section's
    trained = steps.n
    assert trained == 12
    again = restarted["sweep"](SOFTMAX, "WIDTH", [4, 8])
    assert steps.n - trained == (0 if resume else 12) and equal_sweeps(first, again)
    restarted["sweep"](SOFTMAX, "WIDTH", [4, 8])
    assert steps.n - trained == (0 if resume else 12)


# The progress bar of a sweep, and what diverges


@pytest.mark.parametrize(
    "setting, values, total",
    [
        ("EPSILON", [0.1, 0.2], 2 * 2 * 3),
        ("EPOCHS", [1, 2], 2 * (3 + 2 * 3)),
        ("BATCH_SIZE", [32, 64, 160], 2 * (5 + 3 + 1)),
        ("N_IMAGES", [64, 130], 2 * (1 + 3)),
        (("EPOCHS", "BATCH_SIZE"), [(2, 50), (1, 100)], 2 * (2 * 4 + 2)),
    ],
)
def test_one_bar_counts_the_steps_of_all_trainings(names, steps, bars, setting, values, total):
    small(names)
    names["sweep"](VALUE, setting, values)
    (bar,) = bars
    assert bar.total == bar.n == bar.furthest == steps.n == total


def test_the_bar_is_full_where_trainings_are_loaded(names, steps, bars, capsys):
    small(names)
    names["sweep"](VALUE, "EPOCHS", [2])
    names["sweep"](VALUE, "EPOCHS", [1, 2, 3])
    assert steps.n == 2 * 3 * (2 + 1 + 3)  # those with 2 only once
    assert [(bar.total, bar.n, bar.furthest) for bar in bars] == [(12,) * 3, (36,) * 3]
    capsys.readouterr()
    names["sweep"](VALUE, "EPOCHS", [3])
    assert "100%" in capsys.readouterr().out


@pytest.mark.parametrize("values", [[1e30, 0.006], [0.006, 1e30]])
def test_a_training_that_diverges_counts_as_a_guess(names, bars, values):
    """In its second step, of eight; the trainings after it go on."""
    small(names, EPOCHS=2, N_IMAGES=256)
    found = names["sweep"]([SOFTMAX, VALUE], "LEARNING_RATE", values)
    (bar,) = bars
    assert bar.total == bar.n == bar.furthest == 2 * 2 * 2 * 2 * 4
    for (_, value), trained in found.items():
        assert len(trained) == 2
        for run_ in trained:
            assert run_.finished == (value == 0.006)
            assert run_.finished or run_.accuracy == 1 / 10
    assert all(r.accuracy == 1 / 10 and not r.finished for r in found[SOFTMAX, 1e30])


def test_a_training_that_diverged_is_written_as_json_that_any_program_reads(names):
    """NaN is no JSON."""
    small(names, SEEDS=[0], N_IMAGES=256)
    found = names["sweep"](SOFTMAX, "LEARNING_RATE", [1e30])
    names["experiment"](investigation("diverging", found), {"quick": {}})
    (training,) = names["findings"]["diverging"].trainings
    assert json.loads(json.dumps(training, allow_nan=False)) == training


def test_with_three_classes_a_guess_is_right_in_a_third(names):
    small(names, SEEDS=[0], N_IMAGES=256)
    images, labels = names["data"].train
    names["data"] = SimpleNamespace(
        **vars(names["data"]) | {"n_classes": 3, "train": (images, labels % 3)}
    )
    ((diverged,),) = names["sweep"](SOFTMAX, "LEARNING_RATE", [1e30]).values()
    assert diverged.accuracy == 1 / 3


# Sweeps that are stopped


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_a_stopped_sweep_shows_what_is_finished_and_goes_on(names, steps, error, capsys):
    small(names, RUNS=names["RUNS"])
    sweep = lambda: names["sweep"]([SOFTMAX, VALUE], ("WIDTH", "EPOCHS"), [(4, 1), (6, 2)])  # noqa: E731
    undisturbed = sweep()
    total, steps.n = steps.n, 0
    assert total == 2 * 2 * (3 + 6)
    names |= {"RUNS": names["RUNS"] + "-again", "finished_files": set()}
    before = dict(names)
    steps.at, steps.error = 14, error  # in the fourth training: 3, 6, 3, and 2 of 6
    capsys.readouterr()
    with pytest.raises(type(error)) as caught:
        sweep()
    assert caught.value is error
    said = capsys.readouterr().out
    shown = re.findall(r"^(\w+, \d \d): (\S+%)$", said, re.MULTILINE)
    finished = [(SOFTMAX, (4, 1)), (SOFTMAX, (6, 2)), (VALUE, (4, 1))]
    assert shown == [
        (f"{objective}, {width} {epochs}", f"{undisturbed[objective, value][0].accuracy:.1%}")
        for objective, value in finished
        for width, epochs in [value]
    ]
    assert "3 of 8 trainings" in said and "run this cell again" in said
    assert dict(names) == before
    steps.n, steps.at = 0, None
    assert equal_sweeps(sweep(), undisturbed)
    assert steps.n == total - 12


# Comparisons


def test_a_difference_is_in_points_and_its_error_from_seeds_or_images(names):
    """By hand: p (1 - p) / n of each group, or the variance over seeds / their number."""
    difference = names["difference"]  # 100 test images
    points, error = difference([0.4, 0.8], [0.30, 0.34])
    assert points == pytest.approx(28) and error == pytest.approx(
        100 * (0.08 / 2 + 0.0008 / 2) ** 0.5  # more than (0.24 + 0.2176) / 100
    )
    points, error = difference([0.60, 0.62], [0.70, 0.72])
    assert points == pytest.approx(-10)
    assert error == pytest.approx(100 * ((0.61 * 0.39 + 0.71 * 0.29) / 100) ** 0.5)
    points, error = difference([0.5], [0.2])
    assert points == pytest.approx(30) and error == pytest.approx(100 * (0.41 / 100) ** 0.5)
    names["N_TEST"] = 25
    assert difference([0.5], [0.2])[1] == pytest.approx(100 * (0.41 / 25) ** 0.5)
    points, error = difference([0.5, 0.9], [0.2])
    assert points == pytest.approx(50)
    assert error == pytest.approx(100 * (0.08 / 2) ** 0.5)  # more than (0.21 + 0.16) / 25


def unclear(points, error):
    return f"not clearly different ({points:+.1f} ± {error:.1f} points) from"


def clear(points, error):
    return f"{abs(points):.1f} ± {error:.1f} points {'above' if points > 0 else 'below'}"


@pytest.mark.parametrize(
    "ours, others, words",
    [  # 2 standard errors of a difference between 50% and p on 100 images are 12 to 14 points
        ([0.50], [0.30], clear(20, 6.8)),
        ([0.30], [0.50], clear(-20, 6.8)),
        ([0.50], [0.40], unclear(10, 7)),
        ([0.40], [0.50], unclear(-10, 7)),
        ([0.50], [0.50], unclear(0, 7.1)),
        ([0.10, 0.90], [0.20], unclear(30, 40)),
    ],
)
def test_a_comparison_says_what_is_clear(names, ours, others, words):
    assert names["versus"](ours, others) == words


def made(*curve, seconds=4.0, **history):
    """A finished training that went like this."""
    history = {"loss": [1.0] * len(curve), "test_accuracy": list(curve)} | history
    return SimpleNamespace(
        model=None,
        history=history,
        accuracy=curve[-1],
        finished=True,
        seconds=seconds,
        images_per_second=100.0,
    )


def test_the_best_value_and_the_ends_are_compared(names):
    answer = names["best_and_ends"]
    found = {(VALUE, 0.0): [made(0.2)], (VALUE, 0.5): [made(0.5), made(0.7)]}
    found |= {(VALUE, 1.0): [made(0.55)], (SOFTMAX, 2.0): [made(0.9)]}
    assert answer(found, VALUE, "epsilon") == (
        "epsilon 0.5 did best, 60.0% ± 14.1%; "
        f"epsilon 0.0 was {clear(-40, 10)} it; epsilon 1.0 was {unclear(-5, 10)} it"
    )
    assert answer({(VALUE, 0.3): [made(0.4)]}, VALUE, "epsilon") == "epsilon 0.3 did best, 40.0%"
    best_last = {(VALUE, 0.1): [made(0.2)], (VALUE, 0.2): [made(0.6)]}
    assert answer(best_last, VALUE, "e") == (
        f"e 0.2 did best, 60.0%; e 0.1 was {clear(-40, 6.3)} it"
    )


def test_the_good_region_is_what_comes_near_the_best_above_chance(names):
    """The best is 0.5 above chance, so that 0.55 is just good and 0.54 is not."""
    by_setting = {("SGD", 0.1): [0.6], ("SGD", 1.0): [0.54], ("SGD", 0.01): [0.5, 0.58]}
    by_setting |= {("AdamW", 0.001): [0.5501], ("AdamW", 0.006): [0.57], ("Adam", 1.0): [0.1]}
    row, share = names["good_region"](by_setting)
    assert share == pytest.approx(3 / 6)
    assert row == {
        "best": "SGD 0.1",
        "reached": "60.0%",
        "good": "50%",
        "SGD": "0.1",
        "AdamW": "0.001, 0.006",
        "Adam": "–",
    }
    assert names["good_region"]({("SGD", 1.0): [0.1], ("SGD", 2.0): [0.05]})[1] == 0


def test_the_gap_to_the_teacher_is_closed_in_part(names):
    closed = names["gap_closed"]
    mixtures = {(8, 0.5, 1.0): [0.50], (8, 0.9, 4.0): [0.36]}
    error = 100 * ((0.4 * 0.6 + 0.5 * 0.5) / 100) ** 0.5, 100 * ((0.24 + 0.2304) / 100) ** 0.5
    assert closed(0.8, [0.40], mixtures) == (
        "The teacher reaches 80.0%, the student alone 40.0%; "
        f"with alpha 0.5 and T 1.0 50.0%, which closes 25% ± {error[0] / 40:.0%} of the gap; "
        f"with alpha 0.9 and T 4.0 36.0%, which closes -10% ± {error[1] / 40:.0%} of the gap."
    )
    for teacher in [0.45, 0.2]:
        assert closed(teacher, [0.40], mixtures).endswith("40.0%: no gap to close.")


def test_a_level_is_reached_after_the_first_epoch_that_passes_it(names):
    run(names, "evidence")
    epochs_to, seconds_to = names["epochs_to"], names["seconds_to"]
    curve = made(0.2, 0.6, 0.5, 0.7, seconds=8.0)
    assert [epochs_to(level, curve) for level in (0.1, 0.6, 0.65, 0.71)] == [1, 2, 4, math.inf]
    assert [seconds_to(level, curve) for level in (0.1, 0.6, 0.65, 0.71)] == [2, 4, 8, math.inf]


def test_the_shortfall_is_relative_to_the_mean(names):
    assert names["shortfall"]([0.6, 0.5, 0.4]) == pytest.approx(0.2)
    assert names["shortfall"]([0.3]) == 0


class Fixed(nn.Module):
    """Names the class whose number the first pixel holds."""

    def forward(self, images):
        return nn.functional.one_hot(images[:, 0, 0, 0].long(), 12).float()


def test_the_shares_of_the_classes_named_are_sorted(names):
    """Classes 0, 0, 0, 2, 2, 7; the two outputs beyond the ten classes do not count."""
    images = torch.tensor([0, 2, 0, 7, 0, 2, 5, 5])[:, None, None, None].expand(-1, 3, 32, 32)
    names |= {"FLIP": False, "prepare": lambda batch: batch, "N_TEST": 6}
    names["data"] = SimpleNamespace(test=(images, None), n_classes=10)
    shares = names["shares_named"](SimpleNamespace(model=Fixed()))
    assert shares.tolist() == pytest.approx([3 / 6, 2 / 6, 1 / 6, *[0] * 7])


def test_the_collapse_is_that_of_the_smallest_weight(names):
    runs = [made(0.1, 0.2, entropy=[2.0, end]) for end in (1.1, 1.3)]
    found = {(POLICY, 0.3): [made(0.3, entropy=[2.2])], (POLICY, 0.01): runs}
    shares = {0.3: torch.full((10,), 0.1), 0.01: torch.tensor([0.9, 0.08, 0.011, 0.009] + 6 * [0])}
    sentence = names["collapse"](found, shares)
    assert sentence.startswith("With weight 0.01 the entropy ended at 1.20 of 2.30 nats")
    assert "3 of 10 classes" in sentence


# The variance of the policy's gradient


def exact_variance(model, image, label, v):
    """Over all actions: of the gradient, and of the squared distance from its mean."""
    outputs = model(image)[0]
    log_p = outputs[:10].log_softmax(0)
    gradients = []
    for action in range(10):
        loss = -(float(action == label) - v) * log_p[action]
        parts = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        gradients.append(torch.cat([part.flatten() for part in parts]))
    gradients, p = torch.stack(gradients).double(), log_p.detach().exp().double()
    squares = (gradients - p @ gradients).square().sum(1)
    variance = p @ squares
    return variance.item(), (p @ (squares - variance).square()).item()


@pytest.fixture
def linear(names):
    """A linear layer on an image, and the reward it expects; its bias sets V apart from 0.5."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 11))
    with torch.no_grad():
        model[1].weight *= 0.3
        model[1].weight[10] = 0
        model[1].bias[10] = -1.0
    image, label = names["prepare"](names["data"].train[0][:1]), names["data"].train[1][0].item()
    return model, image, label


@pytest.mark.parametrize("with_baseline", [True, False])
def test_the_gradients_variance_is_that_over_all_actions(names, linear, with_baseline):
    """Within four standard errors, from the exact fourth moments, on one image."""
    model, image, label = linear
    v = torch.tensor(-1.0).sigmoid().item() if with_baseline else 0.0
    draws = 1_500
    exact, spread = exact_variance(model, image, label, v)
    measured = names["gradient_variance"](model, draws, n=1)[not with_baseline]
    assert abs(measured - exact) < 4 * (spread / draws) ** 0.5
    assert (spread / draws) ** 0.5 < 0.2 * exact


def test_the_best_baseline_has_the_lowest_variance(names, linear):
    """E[r |g|^2] / E[|g|^2] with g the gradient of log p_a is known to be the best V."""
    model, image, label = linear
    with torch.no_grad():
        p = model(image)[0, :10].softmax(0)
    sizes = torch.stack([(torch.eye(10)[action] - p).square().sum() for action in range(10)])
    best = (p[label] * sizes[label] / (p * sizes).sum()).item()
    exact = {
        v: exact_variance(model, image, label, v)[0] for v in (0, best, 0.9 * best, best + 0.1)
    }
    assert min(exact, key=exact.get) == best
    with torch.no_grad():
        model[1].bias[10] = math.log(best / (1 - best))
    with_v, without = names["gradient_variance"](model, 1_000, n=1)
    assert with_v < without


def test_the_variance_of_a_batch_falls_with_its_size(names, linear):
    """Images are independent, so the mean over a batch has a fraction of their mean variance."""
    model, *_ = linear
    images, labels = names["data"].train
    v = torch.tensor(-1.0).sigmoid().item()
    exact = sum(
        exact_variance(model, names["prepare"](images[i : i + 1]), labels[i].item(), v)[0] / 16**2
        for i in range(16)
    )
    measured, _ = names["gradient_variance"](model, 600, n=16)
    assert measured == pytest.approx(exact, rel=0.15)  # about five standard errors


def test_measuring_the_variance_changes_no_network(names):
    torch.manual_seed(0)
    model = names["SmallCNN"](11, 8)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with_v, without = names["gradient_variance"](model, 3)
    assert with_v > 0 and without > 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


# Other networks


@pytest.mark.parametrize("n_outputs", [1, 7, 11])
@pytest.mark.parametrize(
    "network, embedding", [("ResNet18", 512), ("PlainCNN", 2 * 8 * 8 * 8), ("SmallCNN", 6 * 8)]
)
def test_a_network_is_a_body_and_a_head(names, network, embedding, n_outputs):
    torch.manual_seed(0)
    model = names[network](n_outputs, 8).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        body, outputs = model.body(images), model(images)
        assert torch.equal(outputs, model.head(body))
    assert body.shape == (2, embedding) and outputs.shape == (2, n_outputs)
    assert model.head.weight.shape == (n_outputs, embedding)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_the_stem_of_the_resnet_shrinks_images_by_its_stride(names, stride):
    names["STEM_STRIDE"] = stride
    model, sizes = names["ResNet18"](10, 8), []
    model.body.layer1.register_forward_hook(lambda _, inputs, output: sizes.append(output.shape))
    outputs = model(torch.randn(2, 3, 32, 32))
    outputs.sum().backward()
    assert sizes == [(2, 64, 32 // stride, 32 // stride)]
    assert all(p.grad is not None for p in model.parameters())


def test_networks_can_be_swept(names):
    small(names, SEEDS=[0])
    networks = [names["SmallCNN"], names["PlainCNN"]]
    found = names["sweep"]([SOFTMAX, SAMPLED, POLICY], "NETWORK", networks)
    for (_, network), (trained,) in found.items():
        assert type(trained.model) is network and trained.finished
    again = names["sweep"](SAMPLED, "NETWORK", networks)
    assert all(same(again[key][0], found[key][0]) for key in again)


# One experiment


def test_off_trains_nothing_and_says_so(names, steps, capsys):
    names["EXPERIMENTS"] = "off"
    for cells, *_ in EXPERIMENTS.values():
        run(names, *cells)
    assert capsys.readouterr().out == "EXPERIMENTS is off.\n" * len(EXPERIMENTS)
    assert steps.n == 0 and names["findings"] == {}


@pytest.mark.parametrize("size", ["quick", "full"])
def test_capitals_are_settings_and_the_rest_arguments(names, size, capsys):
    names["EXPERIMENTS"], seen = size, []
    found = {(SOFTMAX, (names["PlainCNN"], 0.1)): [made(0.5), made(0.7)]}

    def investigate(a, b):
        seen.append((a, b, names["EPOCHS"], names["ALPHA"], names["SEEDS"]))
        return "The answer.", found

    before = dict(names)
    chosen = {"a": 1, "EPOCHS": 9, "b": "two", "ALPHA": 0.25, "SEEDS": [4, 2]}
    names["experiment"](investigate, {"quick": {}, "full": {}} | {size: chosen})
    assert seen == [(1, "two", 9, 0.25, [4, 2])] and dict(names) == before
    finding = names["findings"]["investigate"]
    assert (finding.answer, finding.found) == ("The answer.", found)
    labels = [{k: run_[k] for k in ("objective", "value", "seed")} for run_ in finding.trainings]
    same = {"objective": SOFTMAX, "value": "PlainCNN 0.1"}
    assert labels == [same | {"seed": 4}, same | {"seed": 2}]
    back = json.loads(json.dumps(finding.trainings))
    assert [r["accuracy"] for r in back] == [0.5, 0.7]
    said = capsys.readouterr().out
    assert re.fullmatch(rf"The answer\.\n\({size}: 2 trainings, \d+ s\)\n", said)


def test_settings_are_restored_when_an_experiment_fails(names):
    def investigate():
        raise RuntimeError("no answer")

    before = dict(names)
    with pytest.raises(RuntimeError, match="no answer"):
        names["experiment"](investigate, {"quick": {"EPOCHS": 9, "SEEDS": [1]}})
    assert dict(names) == before and names["findings"] == {}


def test_the_heading_says_what_stands_behind_a_figure(names):
    names |= {"EXPERIMENTS": "full", "EPOCHS": 3, "N_IMAGES": 120, "SEEDS": [0, 5]}
    name = names["data"].name
    assert names["heading"]("Why?") == f"Why?\nfull: 3 × 120 images, 2 seeds ({name})"
    names |= {"EXPERIMENTS": "quick", "N_IMAGES": None, "SEEDS": [0]}
    assert names["heading"]("Why?") == f"Why?\nquick: 3 × 400 images, 1 seed ({name})"


# The ten experiments, and reliability


@pytest.fixture(scope="module")
def own_images(tmp_path_factory):
    return save_images(tmp_path_factory.mktemp("own") / "my images", n_train=30, n_test=12)


def shrink(names, experiment, own_images):
    """Run the cell of the sizes and make them tiny; return them, and the cells that follow."""
    (sizes_cell, *cells), variable, changes = EXPERIMENTS[experiment]
    run(names, sizes_cell)
    quick = names[variable]["quick"]
    if experiment == "other_images":
        changes = changes | {"source": str(own_images)}
    assert set(changes) - {"BATCH_SIZE"} <= set(quick)
    quick.update(TINY | changes)
    return quick, cells


@pytest.fixture(scope="module")
def answered(session, own_images, tmp_path_factory):
    """A function that carries out an experiment, once, and returns all that came of it."""
    names, done = session.names, {}

    def answer(experiment):
        if experiment not in done:
            before = dict(names)
            names["findings"], names["RUNS"] = {}, str(tmp_path_factory.mktemp(experiment))
            session.figures.clear()
            sizes, cells = shrink(names, experiment, own_images)
            printed = io.StringIO()
            with redirect_stdout(printed):
                run(names, *cells)
            ((name, finding),) = names["findings"].items()
            assert name == experiment
            groups = {}
            for r in finding.trainings:
                groups.setdefault((r["objective"], r["value"]), []).append(r)
            done[experiment] = SimpleNamespace(
                answer=finding.answer,
                found=finding.found,
                trainings=groups,
                figures=[figure for figure, _ in session.figures],
                captions=[caption for _, caption in session.figures],
                printed=printed.getvalue(),
                sizes=sizes,
            )
            names.clear()
            names.update(before)
        return done[experiment]

    return answer


def of(done, objective, value):
    """The accuracies of one setting."""
    return [r["accuracy"] for r in done.trainings[objective, str(value)]]


def as_text(group):
    spread = f" ± {statistics.stdev(group):.1%}" if len(group) > 1 else ""
    return f"{statistics.mean(group):.1%}{spread}"


def error_of(ours, others, n_test=80):
    """Points and standard error, written out."""
    means = [statistics.mean(group) for group in (ours, others)]
    by_images = sum(mean * (1 - mean) for mean in means) / n_test
    by_seeds = sum(statistics.variance(g) / len(g) for g in (ours, others) if len(g) > 1)
    return 100 * (means[0] - means[1]), 100 * math.sqrt(max(by_images, by_seeds))


def compared(ours, others):
    points, error = error_of(ours, others)
    return unclear(points, error) if abs(points) < 2 * error else clear(points, error)


def drawn(figure, x, y):
    """Does a line of the figure go through these points?"""
    lines = [line for ax in figure.axes for line in ax.lines]
    points = [(line.get_xdata(orig=False), line.get_ydata(orig=False)) for line in lines]
    return any(len(a) == len(x) and np.allclose(a, x) and np.allclose(b, y) for a, b in points)


def best_of(values, groups):
    return values[int(np.argmax([statistics.mean(group) for group in groups]))]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_says_how_little_stands_behind_it(session, answered, experiment):
    done = answered(experiment)
    n = sum(map(len, done.trainings.values()))
    assert done.answer in done.printed and f"(quick: {n} trainings, " in done.printed
    sizes = done.sizes
    n_images = min(sizes["N_IMAGES"], 90 if experiment == "other_images" else 400)
    seeds = f"{len(sizes['SEEDS'])} seed" + "s" * (len(sizes["SEEDS"]) > 1)
    data = "my images" if experiment == "other_images" else session.names["data"].name
    (figure,) = done.figures
    titles = [figure.get_suptitle(), *(ax.get_title() for ax in figure.axes)]
    wanted = f"\nquick: {sizes['EPOCHS']} × {n_images} images, {seeds} ({data})"
    assert any(title.endswith(wanted) for title in titles)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_figure_says_what_to_see_in_letters_of_eight_points(answered, experiment):
    """One to three sentences below it, and a width at which it is shown without shrinking."""
    (figure,), (caption,) = answered(experiment).figures, answered(experiment).captions
    assert re.fullmatch(r"[A-Z][^*\n]+\.", caption)
    assert 1 <= len(re.findall(r"[.?](?: |$)", caption)) <= 3
    assert figure.get_figwidth() == 7
    figure.savefig(io.BytesIO())  # which writes the numbers of the axes
    written = [text for text in figure.findobj(Text) if text.get_text()]
    assert len(written) > 10
    for text in written:
        assert text.get_fontsize() >= 8, text


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_trainings_of_an_experiment_are_kept_as_plain_numbers(answered, experiment):
    done = answered(experiment)
    kept = [r for group in done.trainings.values() for r in group]
    assert kept == json.loads(json.dumps(kept, allow_nan=False))
    found = [run_ for group in done.found.values() for run_ in group]
    assert [r["accuracy"] for r in kept] == [run_.accuracy for run_ in found]
    for r in kept:
        assert r["finished"] and len(r["history"]["test_accuracy"]) == done.sizes["EPOCHS"]
        assert r["accuracy"] == r["history"]["test_accuracy"][-1]
        assert r["seed"] in done.sizes["SEEDS"]
    assert all(len(group) == len(done.sizes["SEEDS"]) for group in done.trainings.values())


def test_experiment_1_names_the_best_alpha_and_temperature(answered):
    done = answered("targets")
    sentences = done.answer.split("\n")
    for sentence, name, values in zip(
        sentences, ["alpha", "temperature"], [[0.0, 1.0], [1.0, 4.0]]
    ):
        groups = [of(done, TEACHER, f"{name} {value}") for value in values]
        best, other = (1, 0) if groups[1] > groups[0] else (0, 1)
        assert sentence == (
            f"{name} {values[best]} did best, {as_text(groups[best])}; {name} {values[other]} was "
            f"{compared(groups[other], groups[best])} it."
        )
        assert drawn(done.figures[0], values, [statistics.mean(group) for group in groups])


def test_experiment_1_with_alpha_0_learns_from_labels_alone(names, answered):
    """It ends with the weights that softmax cross entropy ends with."""
    names.update(TINY)
    ((softmax,),) = names["sweep"](SOFTMAX, "WIDTH", [8]).values()
    (student,) = answered("targets").found[TEACHER, "alpha 0.0"]
    for key, value in softmax.model.state_dict().items():
        assert torch.allclose(value.float(), student.model.state_dict()[key].float(), atol=1e-4)


def test_experiment_2_compares_students_with_their_teacher(session, answered):
    done = answered("larger_teacher")
    with session.names["settings"](N_TEST=80):  # as many as its students are tested with
        teacher = session.names["test_accuracy"](session.names["teacher"])
    alone = of(done, SOFTMAX, 4)
    mixtures = {(a, t): of(done, TEACHER, f"4 {a} {t}") for a, t in [(0.5, 1.0), (0.9, 4.0)]}
    assert done.answer.startswith(
        f"The teacher reaches {teacher:.1%}, the student alone {as_text(alone)}"
    )
    gap, error = error_of([teacher], alone)
    if gap < 2 * error:
        assert done.answer.endswith(": no gap to close.")
    for (alpha, temperature), group in mixtures.items() if gap >= 2 * error else []:
        points, error = error_of(group, alone)
        assert (
            f"with alpha {alpha} and T {temperature} {as_text(group)}, which closes "
            f"{points / gap:.0%} ± {error / gap:.0%} of the gap" in done.answer
        )
    for row, group in enumerate([alone, *mixtures.values()]):
        assert drawn(done.figures[0], group, [row] * 2)
        assert drawn(done.figures[0], [statistics.mean(group)], [row])
    assert drawn(done.figures[0], [teacher] * 2, [0, 1])
    for (_, value), trained in done.found.items():
        assert value == 4 or value[0] == 4
        assert all(run_.model.head.in_features == 6 * 4 for run_ in trained)


def test_experiment_3_compares_samples_with_full_softmax(answered):
    done = answered("samples")
    full = of(done, SOFTMAX, 8)
    groups = {n: of(done, SAMPLED, n) for n in [1, 5]}
    near = [n for n, group in groups.items() if error_of(group, full)[0] > -1]
    enough = f"to within one point it takes {near[0]}" if near else "none came within one point"
    assert done.answer == (
        f"1 sample ended {compared(groups[1], full)} full softmax; 5 samples ended "
        f"{compared(groups[5], full)} full softmax ({as_text(full)}); {enough}."
    )
    assert drawn(done.figures[0], [1, 5], [statistics.mean(group) for group in groups.values()])
    assert drawn(done.figures[0], [0, 1], [statistics.mean(full)] * 2)


@pytest.mark.parametrize(
    "reached, words",
    [
        ({1: 0.20, 5: 0.495, 20: 0.5}, "to within one point it takes 5"),
        ({1: 0.20, 5: 0.485, 20: 0.48}, "none came within one point"),
        ({1: 0.60, 5: 0.3, 20: 0.5}, "to within one point it takes 1"),
    ],
)
def test_experiment_3_says_how_many_samples_are_enough(names, reached, words):
    names["sweep"] = lambda objective, setting, values: {
        (objective, value): [made(0.5 if objective == SOFTMAX else reached[value])]
        for value in values
    }
    answer, _ = names["samples"]([1, 5, 20])
    assert answer.endswith(f"full softmax (50.0%); {words}.")


def test_experiment_4_names_the_best_epsilon_and_what_was_earned(answered):
    done = answered("exploration")
    values = [0.0, 1.0]
    groups = [of(done, VALUE, value) for value in values]
    best = best_of(values, groups)
    earned = [
        statistics.mean(done.trainings[VALUE, str(value)][0]["history"]["reward"])
        for value in values
    ]
    assert done.answer.startswith(f"epsilon {best} did best, {as_text(groups[values.index(best)])}")
    assert done.answer.endswith(
        f"epsilon {values[int(np.argmax(earned))]} earned most while it trained, "
        f"{max(earned):.2f} an image."
    )
    assert drawn(done.figures[0], values, [group[0] for group in groups])
    assert drawn(done.figures[0], values, earned)


def test_experiment_5_shows_what_became_of_the_policy(session, answered):
    done = answered("entropy")
    values = [0.0, 0.3]
    groups = [of(done, POLICY, value) for value in values]
    best = best_of(values, groups)
    assert done.answer.startswith(f"weight {best} did best, {as_text(groups[values.index(best)])}")
    entropies = [done.trainings[POLICY, str(value)][0]["history"]["entropy"] for value in values]
    prepare, images = session.names["prepare"], session.names["data"].test[0][:80]
    shares = []
    for value in values:
        model = done.found[POLICY, value][0].model.eval()
        with torch.no_grad():
            logits = model(prepare(images)) + model(prepare(images.flip(3)))
        guesses = logits[:, :10].argmax(1).tolist()
        shares.append(sorted((guesses.count(c) / 80 for c in range(10)), reverse=True))
    few = sum(share > 0.01 for share in shares[0])
    assert done.answer.endswith(
        f"With weight 0.0 the entropy ended at {entropies[0][-1]:.2f} of {math.log(10):.2f} nats, "
        f"and {few} of 10 classes are named for more than 1% of the images."
    )
    figure = done.figures[0]
    assert drawn(figure, [0, 1], [group[0] for group in groups])
    for entropy, share in zip(entropies, shares):
        assert drawn(figure, [1, 2], entropy) and drawn(figure, range(1, 11), share)


def test_experiment_6_compares_variances_and_accuracies(names, answered):
    done = answered("baselines")
    without, with_v = (of(done, POLICY, value) for value in [False, True])
    assert done.answer.startswith(
        f"With the baseline accuracy was {as_text(with_v)}, {compared(with_v, without)} that "
        f"without ({as_text(without)}). "
    )
    torch.manual_seed(0)
    networks = [names["SmallCNN"](11, 8), done.found[POLICY, True][0].model]
    variances = [names["gradient_variance"](model, 5) for model in networks]
    new, trained = (pair[1] / pair[0] for pair in variances)
    assert done.answer.endswith(
        f"Without it the gradient's variance was {new:.2f} times as large on a new network and "
        f"{trained:.2f} times on the trained one."
    )
    figure = done.figures[0]
    for value in [False, True]:
        (r,) = done.trainings[POLICY, str(value)]
        assert drawn(figure, [1, 2], r["history"]["test_accuracy"])
        assert ("baseline" in r["history"]) == value
    heights = {
        bars.get_label(): [bar.get_height() for bar in bars] for bars in figure.axes[1].containers
    }
    assert heights["with baseline"] == pytest.approx([pair[0] for pair in variances])
    assert heights["without"] == pytest.approx([pair[1] for pair in variances])


def test_experiment_7_follows_the_sum_of_the_values(answered):
    done = answered("consistency")
    independent, summing = (of(done, VALUE, value) for value in [False, True])
    histories = {
        value: [r["history"] for r in done.trainings[VALUE, str(value)]] for value in [False, True]
    }
    sums = np.mean([history["sum_of_values"] for history in histories[False]], 0)
    assert done.answer == (
        f"With values that sum to one accuracy was {as_text(summing)}, "
        f"{compared(summing, independent)} that of independent values ({as_text(independent)}), "
        f"whose sum averaged {sums[0]:.2f} in the first epoch and {sums[1]:.2f} in the last."
    )
    assert drawn(done.figures[0], [1, 2], sums)
    for history in histories[True]:
        assert history["sum_of_values"] == pytest.approx([1, 1])
    for some in histories.values():
        curve = np.mean([history["test_accuracy"] for history in some], 0)
        assert drawn(done.figures[0], [1, 2], curve)


def test_experiment_8_says_what_each_objective_lost(answered):
    done = answered("deeper")
    lost = {}
    for row, objective in enumerate([SOFTMAX, POLICY]):
        small_, deep = (of(done, objective, network) for network in ["SmallCNN", "ResNet18"])
        lost[objective] = error_of(small_, deep)
        points, error = lost[objective]
        assert f"{objective} {-points:+.1f} ± {error:.1f}" in done.answer
        assert drawn(done.figures[0], [small_[0], deep[0]], [row] * 2)
    hardest = max(lost, key=lambda objective: lost[objective][0])
    clear = lost[hardest][0] > 2 * lost[hardest][1]
    verdict = f"{hardest} lost most" if clear else "no objective clearly lost"
    assert done.answer.startswith(f"With ResNet-18 {verdict}; change of accuracy in points: ")


def test_experiment_9_finds_the_widest_region(answered):
    done = answered("steps")
    settings = ["SGD 0.01", "SGD 0.1", "AdamW 0.006"]
    shares = {}
    for objective in [SOFTMAX, VALUE]:
        means = [of(done, objective, setting)[0] for setting in settings]
        good = [mean - 0.1 >= 0.9 * (max(means) - 0.1) > 0 for mean in means]
        shares[objective] = sum(good) / 3
        optimizer, rate = settings[int(np.argmax(means))].split()
        line = next(line for line in done.printed.splitlines() if line.startswith(objective))
        sgd = ", ".join(rate for rate, is_good in zip(["0.01", "0.1"], good) if is_good)
        assert re.split("  +", line) == [
            objective,
            f"{optimizer} {rate}",
            f"{max(means):.1%}",
            f"{shares[objective]:.0%}",
            sgd or "–",
            "0.006" if good[2] else "–",
        ]
        assert drawn(done.figures[0], [0.01, 0.1], means[:2])
        assert drawn(done.figures[0], [0.006], means[2:])
    widest, narrowest = (
        ", ".join(objective for objective in shares if shares[objective] == end)
        for end in [max(shares.values()), min(shares.values())]
    )
    assert done.answer == (
        f"The good region is widest for {widest} ({max(shares.values()):.0%} of the grid) and "
        f"narrowest for {narrowest} ({min(shares.values()):.0%})."
    )


def test_experiment_10_whitens_the_other_images(names, answered, own_images):
    """Its fixed filters are made from those images, normalised by their own pixels."""
    found = answered("other_images").found
    loaded = names["on_device"](str(own_images))
    pixels = loaded.train[0].float()
    names["STEM"] = names["whitening_filters"]((pixels - pixels.mean()) / pixels.std(), 96)[:48]
    expected = names["SmallCNN"](3, 8).body[0].weight
    for (trained,) in found.values():
        assert torch.allclose(trained.model.body[0].weight, expected, rtol=1e-3, atol=1e-4)


def test_experiment_10_ranks_the_objectives_on_other_images(session, answered):
    done = answered("other_images")
    names = session.names
    here = {objective: statistics.mean(of(done, objective, 8)) for objective in OUTPUTS}
    there = {o: statistics.mean(r.accuracy for r in group) for o, group in names["runs"].items()}
    order = " > ".join(sorted(here, key=lambda objective: -here[objective]))
    same = [
        (here[a] > here[b]) == (there[a] > there[b]) for a, b in itertools.combinations(here, 2)
    ]
    assert done.answer == (
        f"On my images: {order}. Of 10 pairs of objectives {sum(same)} stand in the same order "
        f"as in the main trainings on {names['data'].name}."
    )
    for objective in OUTPUTS:
        (r,) = done.trainings[objective, "8"]
        assert drawn(done.figures[0], [1, 2], r["history"]["test_accuracy"])
        (trained,) = done.found[objective, 8]
        assert trained.model.head.out_features == 3 + (objective == POLICY)


def test_reliability_names_the_largest_gap_of_each_recipe(answered):
    done = answered("reliability")
    recipes = {"this notebook's recipe": "SmallCNN AdamW 0.006", "a plain recipe": "PlainCNN Adam 0.001"}  # fmt: skip # noqa: E501
    parts = []
    for (recipe, value), down in zip(recipes.items(), [-0.15, 0.15]):
        gaps = {}
        for row, objective in enumerate([SOFTMAX, SAMPLED]):
            group = of(done, objective, value)
            gaps[objective] = 1 - min(group) / statistics.mean(group)
            assert drawn(done.figures[0], group, [row + down] * 3)
        worst = max(gaps, key=gaps.get)
        parts.append(f"with {recipe} {worst} has the largest, {gaps[worst]:.1%} of its mean")
    assert done.answer == f"Gap between the mean and the worst seed: {'; '.join(parts)}."


OWN = ["data", "PIXEL_MEAN", "PIXEL_STD", "STEM", "teacher", "FLIP", "EPOCHS", "SEEDS", "N_IMAGES"]


@pytest.mark.parametrize("fails_at", [None, 4])
def test_experiment_10_leaves_the_notebooks_own_images(names, steps, own_images, fails_at, capsys):
    """Also when a training of the second sweep fails."""
    sizes, cells = shrink(names, "other_images", own_images)
    sizes["EPOCHS"] = 1
    before = [names[name] for name in OWN]
    teacher = {key: value.clone() for key, value in names["teacher"].state_dict().items()}
    steps.at, steps.error = fails_at, RuntimeError("out of memory")  # 2 steps a training
    if fails_at:
        with pytest.raises(RuntimeError, match="out of memory"):
            run(names, *cells)
    else:
        run(names, *cells)
    assert all(names[name] is value for name, value in zip(OWN, before))
    for key, value in names["teacher"].state_dict().items():
        assert torch.equal(value, teacher[key])
    assert ("other_images" in names["findings"]) == (fails_at is None)


# What is not finished must not spoil an answer. Without its teacher or without the network whose
# gradient it measures, an experiment has none.
DIVERGES = [
    (experiment, which)
    for experiment in EXPERIMENTS
    for which in ["first", "last"]
    if (experiment, which) not in [("other_images", "first"), ("baselines", "last")]
]


@pytest.mark.parametrize("experiment, which", DIVERGES)
def test_an_experiment_has_an_answer_when_one_training_diverges(
    names, own_images, experiment, which, recwarn
):
    sizes, cells = shrink(names, experiment, own_images)
    planned = {"targets": 4, "larger_teacher": 6, "samples": 6, "deeper": 4, "steps": 6}
    planned |= {"other_images": 5, "reliability": 12, "consistency": 4}
    unlucky = 1 if which == "first" else planned.get(experiment, 2)
    numbers, random = itertools.count(1), np.random.default_rng(0)

    def pretend(name, objective, n_outputs, bar):
        if next(numbers) == unlucky:
            raise FloatingPointError("the loss became nan")
        bar.update(names["EPOCHS"] * names["steps_per_epoch"]())
        metrics = ["reward", "entropy", "sum_of_values"]
        history = {metric: random.random(names["EPOCHS"]).tolist() for metric in metrics}
        trained = made(*random.random(names["EPOCHS"]).tolist(), **history)
        trained.model = names["SmallCNN"](n_outputs, names["WIDTH"])
        return trained

    names["train_or_load"] = pretend
    run(names, *cells)
    (finding,) = names["findings"].values()
    assert sum(not r["finished"] for r in finding.trainings) == 1
    assert "nan" not in finding.answer
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


# Claims


def test_the_evidence_is_the_mean_over_the_seeds(names, capsys):
    names["runs"] = {
        SOFTMAX: [made(0.65, 0.7, 0.72, seconds=3.0), made(0.5, 0.6, 0.61, seconds=6.0)],
        VALUE: [made(0.1, 0.2, 0.3)],
    }
    run(names, "evidence")
    first, _, softmax, value = capsys.readouterr().out.splitlines()
    assert names["data"].name in first and "seeds [0]" in first
    # 60% after 1 and 2 epochs of 1 s and 2 s; 70% after 2 epochs, and never
    assert softmax.split(maxsplit=5)[1:5] == ["66.5%", "±", "7.8%", "61.0%"]
    assert re.search(r"61\.0% +1\.5 epochs, 2 s +not reached$", softmax)
    assert re.search(r"30\.0% +30\.0% +not reached +not reached$", value)


def judged(names, runs, findings, *cells, n_test=None):
    """The verdicts on these runs, and on experiments that found this with n_test images."""
    # Enough test images for a point to count
    made_up = SimpleNamespace(name="made up", n_classes=10, test=(range(10_000), None))
    names |= {"SEEDS": [0, 1, 2], "runs": runs, "findings": {}, "data": made_up}
    printed = io.StringIO()
    with redirect_stdout(printed):
        for name, found in findings.items():
            names["experiment"](investigation(name, found), {"quick": {"N_TEST": n_test}})
        run(names, *(cells or ["evidence", *CLAIMS, "verdicts"]))
    verdicts, claims = {}, printed.getvalue().partition("experiments ")[2]
    for number, verdict, parts in re.findall(
        r"^(\d)\. .*: (yes|no|only in part)\.\n\n((?:- .*\n)+)", claims, re.MULTILINE
    ):
        parts = re.findall(r"^- (yes|no), (.*)$", parts, re.MULTILINE)
        verdicts[int(number)] = verdict, {part: held == "yes" for held, part in parts}
    assert list(verdicts) == [1, 2, 3, 4, 5]
    return verdicts


def thrice(*curve, seconds=4.0, spread=0.005):
    """Three seeds, whose curves lie this far apart."""
    return [made(*(a + d for a in curve), seconds=seconds) for d in (-spread, 0, spread)]


def as_the_series_says():
    """Runs and findings for which every claim is true."""
    runs = {
        SOFTMAX: thrice(0.65, 0.75),
        TEACHER: thrice(0.65, 0.75),
        SAMPLED: thrice(0.55, 0.65),
        VALUE: thrice(0.5, 0.65, spread=0.04),
        POLICY: thrice(0.3, 0.4, spread=0.04),
    }
    recipe = lambda spread: [made(0.5 + d * spread) for d in (-1, 0, 1)]  # noqa: E731
    reliability = {
        (objective, value): recipe(0.2 if objective in (VALUE, POLICY) else 0.001)
        for objective in OUTPUTS
        for value in [("network", "one"), ("network", "two")]
    }
    grid = [("SGD", 0.1), ("SGD", 1.0)]
    good = {
        (o, s): [made(0.6 if s == grid[0] or o == SOFTMAX else 0.2)] for o in OUTPUTS for s in grid
    }
    samples = {(SAMPLED, 1): [made(0.4)], (SAMPLED, 20): [made(0.6)]} | {(SOFTMAX, 8): [made(0.7)]}
    entropy = {(POLICY, 0.0): [made(0.3)], (POLICY, 0.04): [made(0.5)], (POLICY, 0.3): [made(0.4)]}
    findings = {"reliability": reliability, "steps": good, "samples": samples, "entropy": entropy}
    return runs, findings


@pytest.fixture
def claimed(names):
    names["RECIPES"] = {"recipe one": ("network", "one"), "recipe two": ("network", "two")}
    return names


def test_all_claims_hold_where_the_numbers_say_so(claimed):
    runs, findings = as_the_series_says()
    verdicts = judged(claimed, runs, findings)
    assert {number: verdict for number, (verdict, _) in verdicts.items()} == dict.fromkeys(
        range(1, 6), "yes"
    )
    n_parts = [len(parts) for _, parts in verdicts.values()]
    assert n_parts == [1 + 3, 2, 2, 1 + 3 + 1, 1 + 3 + 1 + 1]
    text = "\n".join(part for _, parts in verdicts.values() for part in parts)
    assert "60% after 1.0 epochs, where the fastest objective takes 1.0" in text
    assert "60% after 2.0 epochs" in text and "+20.0 ± 0.7 points from 1 to 20" in text
    assert "20.0 ± 0.7 points between 0.0 and 0.04" in text and "50% of the grid" in text


def test_no_claim_holds_where_the_numbers_contradict_it(claimed):
    """Softmax slow and shaky, a bad student, sampled and bandits fast and steady."""
    runs = {
        SOFTMAX: thrice(0.3, 0.5, 0.65, spread=0.045),
        TEACHER: thrice(0.1, 0.2, 0.3, seconds=9.0),
        SAMPLED: thrice(0.65, 0.7, 0.8),
        VALUE: thrice(0.1, 0.2, 0.3),
        POLICY: thrice(0.65, 0.7, 0.8),
    }
    _, findings = as_the_series_says()
    for key, trained in findings["reliability"].items():
        unlucky = 0.1 if key[0] == SOFTMAX else 0.5
        trained[:] = [made(0.5), made(unlucky), made(0.5)]
    findings["steps"] = {(o, s): [made(0.6)] for o in OUTPUTS for s in [("SGD", 0.1), ("SGD", 1.0)]}
    findings["samples"][SAMPLED, 1] = [made(0.6)]
    findings["entropy"] = {(POLICY, 0.0): [made(0.5)], (POLICY, 0.3): [made(0.53)]}
    verdicts = judged(claimed, runs, findings)
    for number, (verdict, parts) in verdicts.items():
        assert verdict == "no" and not any(parts.values()), (number, parts)


@pytest.mark.parametrize(
    "number, change",
    [
        (1, lambda runs, findings: runs.update({SAMPLED: thrice(0.7), SOFTMAX: thrice(0.5, 0.7)})),
        (2, lambda runs, findings: runs.update({TEACHER: thrice(0.65, 0.75, seconds=5.0)})),
        (2, lambda runs, findings: runs.update({TEACHER: thrice(0.60, 0.75)})),
        (3, lambda runs, findings: runs.update({SAMPLED: thrice(0.65, 0.75)})),
        (3, lambda runs, findings: findings["samples"].update({(SAMPLED, 1): [made(0.595)]})),
        (4, lambda runs, findings: runs.update({VALUE: thrice(0.2, 0.3, 0.65, spread=0.04)})),
        (4, lambda runs, findings: runs.update({VALUE: thrice(0.5, 0.65)})),
        (5, lambda runs, findings: findings["entropy"].update({(POLICY, 0.0): [made(0.455)]})),
    ],
)
def test_a_claim_that_fails_in_one_part_holds_only_in_part(claimed, number, change):
    runs, findings = as_the_series_says()
    if number == 5:
        findings["entropy"][POLICY, 0.3] = [made(0.46)]
    change(runs, findings)
    verdict, parts = judged(claimed, runs, findings)[number]
    assert verdict == "only in part" and list(parts.values()).count(False) == 1


@pytest.mark.parametrize(
    "curve, slower",
    [
        ((0.55, 0.75), True),  # as good in the end, but 60% an epoch later
        ((0.65, 0.70), True),  # as quick to 60%, but 5 points worse in the end
        ((0.65, 0.749), False),
        ((0.65, 0.80), False),
    ],
)
def test_slower_means_later_or_less_far(claimed, curve, slower):
    runs, findings = as_the_series_says()
    verdicts = judged(claimed, runs | {SAMPLED: thrice(*curve)}, findings)
    assert next(iter(verdicts[3][1].values())) == slower


def test_without_experiments_their_parts_are_absent(claimed):
    runs, _ = as_the_series_says()
    verdicts = judged(claimed, {o: group[:1] for o, group in runs.items()}, {})
    assert [len(parts) for _, parts in verdicts.values()] == [1, 2, 1, 1, 1]
    verdicts = judged(claimed, runs, {})  # three seeds say something about reliability
    assert [len(parts) for _, parts in verdicts.values()] == [2, 2, 1, 2, 2]


@pytest.mark.parametrize(
    "finding, kept, absent",
    [
        ("reliability", lambda objective, value: objective == SOFTMAX, {4: 2, 5: 2}),
        ("reliability", lambda objective, value: objective == VALUE, {1: 2, 5: 2}),
        ("steps", lambda objective, value: objective != POLICY, {5: 1}),
        ("steps", lambda objective, value: objective != SOFTMAX, {4: 1, 5: 1}),
        ("samples", lambda objective, value: value != 1, {3: 1}),
        ("entropy", lambda objective, value: value == 0.3, {5: 1}),
    ],
)
def test_a_part_is_absent_where_its_experiment_left_something_out(claimed, finding, kept, absent):
    """The objectives and values in the cells with the sizes are there to be changed."""
    runs, findings = as_the_series_says()
    whole = judged(claimed, runs, findings)
    fewer = {key: group for key, group in findings[finding].items() if kept(*key)}
    verdicts = judged(claimed, runs, findings | {finding: fewer})
    missing = {n: len(whole[n][1]) - len(parts) for n, (_, parts) in verdicts.items()}
    assert missing == dict.fromkeys(range(1, 6), 0) | absent


def test_other_levels_give_other_verdicts(claimed):
    """The levels are a field of a form: after a change, the cell with the claims runs again."""
    runs, findings = as_the_series_says()
    judged(claimed, runs, findings)
    claimed["LEVELS"] = [0.2]
    verdicts = judged(claimed, runs, findings, "verdicts")
    for number in (1, 3, 4, 5):
        assert "20% after 1.0 epochs" in next(iter(verdicts[number][1]))


def test_a_level_that_nobody_reaches_is_no_obstacle(claimed):
    _, findings = as_the_series_says()
    verdicts = judged(claimed, {o: thrice(0.2, 0.3) for o in OUTPUTS}, findings)
    for number in (1, 3, 4, 5):
        first = next(iter(verdicts[number][1].items()))
        assert "never there" in first[0] and not first[1]


def test_the_errors_of_a_claim_are_those_of_its_experiments_images(claimed):
    """Quick experiments test fewer images than the sections above."""
    runs, findings = as_the_series_says()
    verdicts = judged(claimed, runs, findings, n_test=100)
    parts = "\n".join(part for _, parts in verdicts.values() for part in parts)
    error = 100 * ((0.6 * 0.4 + 0.4 * 0.6) / 100) ** 0.5
    assert f"+20.0 ± {error:.1f} points from 1 to 20" in parts
    error = 100 * ((0.5 * 0.5 + 0.3 * 0.7) / 100) ** 0.5
    assert f"20.0 ± {error:.1f} points between 0.0 and 0.04" in parts
    # Those of the trainings above have all images: 65% in the end against 75%
    assert f"-10.0 ± {100 * ((0.65 * 0.35 + 0.75 * 0.25) / 10_000) ** 0.5:.1f} points" in parts
