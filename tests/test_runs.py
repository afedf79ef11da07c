"""Settings count at once and wrong ones are named; trainings repeat themselves bit for bit, are
saved whole or not at all, and are found again exactly when nothing about them has changed."""

import dataclasses
import inspect
import math
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from test_notebook import CODE, ROOT, notebook, run

import objectives


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """The names of the notebook up to the objectives; tests change and restore what they need."""
    return notebook(tmp_path_factory.mktemp("runs"), last="example")


@pytest.fixture
def names(cells, tmp_path):
    """RUNS is an empty folder."""
    before = dict(cells)
    cells["RUNS"] = str(tmp_path / "runs")
    yield cells
    cells.clear()
    cells.update(before)


def train(names, name="softmax_cross_entropy", settings=None, **changes):
    """train_once, and whether it trained rather than found."""
    data, (config, *_) = names["settings"]()
    objective = names["partial"](names[name], **settings) if settings else names[name]
    said = []
    found = names["train_once"](
        objective, data, dataclasses.replace(config, **changes), said.append
    )
    return found, "found in RUNS" not in said[-1]


def bits(run):
    return [tensor.clone() for tensor in run.model.state_dict().values()]


def same(a, b):
    """Two lists of tensors, bit for bit."""
    return len(a) == len(b) and all(map(torch.equal, a, b))


# Settings


CHANGES = {
    "EPOCHS": ("epochs", 2),
    "BATCH_SIZE": ("batch_size", 30),
    "LEARNING_RATE": ("learning_rate", 0.5),
    "OPTIMIZER": ("optimizer", "SGD"),
    "WIDTH": ("width", 4),
    "FLIP": ("flip", False),
    "N_IMAGES": ("n_images", 70),
    "SEEDS": ("seed", 3),
}


def settings_cell(names, **changes):
    """Re-run the cell of the parameters alone, with other values in its form."""
    source = CODE["parameters"]
    for name, value in {**names["settings_of_the_test"], **changes}.items():
        source, n = re.subn(rf"(?m)^{name} = [^#\n]*", f"{name} = {value!r}  ", source)
        assert n == 1
    exec(source, names)


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_form_counts_in_the_next_training_after_its_own_cell_alone(names, tmp_path, name):
    field, value = CHANGES[name]
    before, _ = train(names)
    changed = {name: [value] if name == "SEEDS" else value, "RUNS": str(tmp_path / "runs")}
    settings_cell(names, **changed)
    after, trained = train(names)
    assert trained and getattr(after.config, field) == value != getattr(before.config, field)
    assert len(after.history) == after.config.epochs
    same_again = dataclasses.replace(after.config, **{field: getattr(before.config, field)})
    assert same_again == before.config
    assert not same(bits(before), bits(after))


def test_zero_and_an_empty_list_mean_the_default(names):
    for name in ["EPOCHS", "BATCH_SIZE", "WIDTH", "N_IMAGES", "LEARNING_RATE"]:
        names[name] = 0
    names["SEEDS"] = []
    _, configs = names["settings"]()
    config = configs[0]
    assert configs == [names["Config"](optimizer=names["OPTIMIZER"], n_test=config.n_test)]
    assert min(config.epochs, config.batch_size, config.learning_rate, config.width) > 0
    assert config.n_images is None


WRONG = [
    (name, value)
    for name in ["EPOCHS", "BATCH_SIZE", "WIDTH", "N_IMAGES"]
    for value in [-1, 1.5, "x", True, math.nan, None]
]
WRONG += [("LEARNING_RATE", value) for value in [-0.1, "x", math.nan, math.inf, True, None]]
WRONG += [("SEEDS", value) for value in [[-1], [0, 1.5], ["x"], [True], [math.nan], "x", None]]
WRONG += [("OPTIMIZER", value) for value in ["adam", "", None, 3]]
WRONG += [("DATA", value) for value in ["no such folder", "cifar10", ""]]


@pytest.mark.parametrize("name", sorted(CHANGES.keys() - {"EPOCHS", "SEEDS"}))
def test_a_changed_form_counts_in_the_next_experiment_and_figure(names, tmp_path, name):
    run(names, "sweep")
    field, value = CHANGES[name]
    settings_cell(names, **{name: value, "RUNS": str(tmp_path / "runs")})
    assert getattr(names["trial"]()[1], field) == value
    _, model = names["half_trained"](names["softmax_cross_entropy"])
    config = names["every_run"][model.key]["config"]
    assert name == "N_IMAGES" or getattr(config, field) == value


@pytest.mark.parametrize("name, value", WRONG)
def test_a_wrong_setting_is_named_with_its_value(names, name, value):
    names[name] = value
    with pytest.raises(ValueError) as caught:
        names["settings"]()
    bad = repr(value[-1] if isinstance(value, list) else value)
    assert name in str(caught.value) and bad in str(caught.value)


def test_full_comes_from_the_form_or_the_environment(names, monkeypatch):
    monkeypatch.delenv("FULL", raising=False)
    names |= {"SEEDS": [], "N_IMAGES": 0}
    run(names, "sweep")

    def size(form, variable):
        names["FULL"] = form
        monkeypatch.setenv("FULL", variable)
        (_, config, seeds), (_, configs) = names["trial"](), names["settings"]()
        return config.n_images, len(seeds), configs[0].n_test or math.inf

    quick, full = size(False, ""), size(True, "")
    assert quick == size(False, "0") and full == size(False, "1")
    assert all(less < more for less, more in zip(quick, full)) and full[2] == math.inf


def test_home_in_the_folder_of_runs_is_the_readers(names, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    names["RUNS"] = "~/kept"
    train(names)
    assert len(list((tmp_path / "kept").glob("*.pt"))) == 1 and not Path("~").exists()


@pytest.mark.parametrize("kind", ["a file", "below a file", "read-only"])
def test_runs_that_cannot_be_written_are_an_error_before_any_training(names, tmp_path, kind):
    (tmp_path / "file").write_text("x")
    names["RUNS"] = str(tmp_path / "file" / ("x" if kind == "below a file" else ""))
    if kind == "read-only":
        names["RUNS"] = "/proc/self"
    names["train"] = lambda *_: pytest.fail("trained")
    with pytest.raises(OSError):
        train(names)


@pytest.mark.parametrize("name", ["DATA", "RUNS"])
@pytest.mark.parametrize("where", ["/content/drive/MyDrive/x", "x"])
def test_colab_mounts_drive_if_needed(names, tmp_path, monkeypatch, name, where):
    colab = ModuleType("google.colab")
    colab.drive = SimpleNamespace(mount=pytest.fail)  # before any folder is made
    monkeypatch.setitem(sys.modules, "google", ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.chdir(tmp_path)
    names |= {name: where, "load_data": lambda source: source}
    drive = pytest.raises(pytest.fail.Exception, match="^/content/drive$")
    with drive if len(where) > 1 else nullcontext():
        names["settings"]()


# Training


OBJECTIVES = ["softmax_cross_entropy", "sampled_softmax", "value_function", "policy_gradient"]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_training_depends_on_its_seed_alone(names, name, tmp_path):
    first, _ = train(names, name, seed=5, shift=2)
    names["RUNS"] = str(tmp_path / "others")
    torch.manual_seed(99)
    again, trained = train(names, name, seed=5, shift=2)
    other, _ = train(names, name, seed=6, shift=2)
    assert trained and same(bits(first), bits(again)) and not same(bits(first), bits(other))
    assert not same(bits(first)[1:3], bits(other)[1:3])


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops_a_training_unsaved(names, tmp_path, loss):
    calls = []

    def diverging(model, images, labels):
        calls.append(1)
        return model(images).sum() * (loss if len(calls) > 6 else 1), {}

    names["diverging"] = diverging
    found, _ = train(names, "diverging", epochs=9)
    assert len(found.history) == 2 and "loss became" in found.stopped  # 4 batches an epoch
    assert list((tmp_path / "runs").glob("*.pt*")) == []


@pytest.fixture
def calls(names):
    """The calls of an objective, names["interrupted"], which the sixth interrupts."""
    calls = []

    def interrupted(model, images, labels):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return names["softmax_cross_entropy"](model, images, labels)

    names["interrupted"] = interrupted
    return calls


def test_an_interrupt_keeps_the_finished_epochs_and_saves_nothing(names, tmp_path, calls):
    found, _ = train(names, "interrupted", epochs=9)
    assert len(found.history) == 1 and found.stopped == "interrupted"
    assert list((tmp_path / "runs").glob("*.pt*")) == []
    calls[:] = [1] * 5
    with pytest.raises(KeyboardInterrupt):  # nothing to keep
        train(names, "interrupted", epochs=9)


def test_an_interrupt_stops_a_sweep_and_the_next_goes_on(names, calls):
    run(names, "sweep")
    data, config, _ = names["trial"]()
    variants = {n: (names[n], {}) for n in ["softmax_cross_entropy", "interrupted"]}
    with pytest.raises(KeyboardInterrupt, match="run this cell again"):
        names["sweep"](variants, data, config, [0, 1])
    names["display"].clear()
    found = names["sweep"](variants, data, config, [0, 1])
    assert [len(group) for group in found.values()] == [2, 2]
    assert "found in RUNS" in "".join(names["display"].texts())
    assert len(calls) == 6 + 2 * 2 * 4  # 2 seeds, 2 epochs, 4 batches


# Saved and found again


def test_a_finished_training_is_found_again_after_a_restart(names, tmp_path):
    first, trained = train(names)
    names["every_run"].clear()
    names["RUNS"] = str(tmp_path / "runs")
    again, trained_again = train(names)
    assert trained and not trained_again and same(bits(first), bits(again))
    assert again.history == first.history and vars(again).keys() == vars(first).keys()
    images = names["settings"]()[0].test[0]
    a, b = (names["predict"](r.model, images, True) for r in [first, again])
    assert torch.equal(a, b)


def test_two_processes_may_finish_the_same_training_at_once(names, monkeypatch):
    save = torch.save

    def save_twice(value, path):
        monkeypatch.setattr(torch, "save", save)
        save(value, path)
        assert train(names)[1]  # the other one, which does not find this one yet

    monkeypatch.setattr(torch, "save", save_twice)
    assert train(names)[1] and not train(names)[1]


FIELDS = {"epochs": 2, "batch_size": 30, "learning_rate": 0.1, "optimizer": "Adam", "width": 4}
FIELDS |= {"stride": 1, "flip": False, "shift": 2, "seed": 1, "n_images": 70, "n_test": 50}


@pytest.mark.parametrize("field", FIELDS)
def test_a_training_with_another_config_is_another(names, field):
    first, _ = train(names)
    second, trained = train(names, **{field: FIELDS[field]})
    assert trained and not train(names)[1]
    assert field == "n_test" or not same(bits(first), bits(second))


def test_a_test_is_of_as_many_images_as_the_config_says(names, monkeypatch):
    seen, predict = [], names["predict"]
    count = lambda model, images, flip: seen.append(len(images)) or predict(model, images, flip)  # noqa: E731
    monkeypatch.setitem(names, "predict", count)
    train(names, n_test=50)
    assert {*seen} == {50}


def test_a_training_with_another_setting_of_the_objective_is_another(names):
    assert train(names, "sampled_softmax", {"n_samples": 3})[1]
    assert train(names, "sampled_softmax", {"n_samples": 4})[1]
    assert not train(names, "sampled_softmax", {"n_samples": 3})[1]


def test_a_student_of_another_teacher_is_another(names):
    teachers = [train(names, seed=seed)[0].model for seed in [1, 2, 1]]
    trained = [train(names, "teacher_student", {"teacher": t})[1] for t in teachers]
    assert trained == [True, True, False]


PARTS = ["train", "build", "windows", "augment", "normalise", "predict", "whitening_filters"]
PARTS += ["convolution", "orthogonal", "small_cnn", "softmax_cross_entropy"]
PARTS += ["Network.__init__", "Network.forward", "Muon.__init__", "Muon.step"]


@pytest.mark.parametrize("function", PARTS)
def test_a_training_with_other_code_is_another(names, monkeypatch, function):
    assert train(names)[1]
    source, edited = inspect.getsource, inspect.unwrap(eval(function, names))
    with monkeypatch.context() as patch:
        changed = lambda f: source(f) + "# changed" * (inspect.unwrap(f) is edited)  # noqa: E731
        patch.setattr(inspect, "getsource", changed)
        assert train(names)[1]
    assert not train(names)[1]


def test_other_pixels_labels_or_classes_make_another_training(names):
    data, (config,) = names["settings"]()
    images, labels = data.train
    pixel = images.clone()
    pixel[0, 0, 0, 0] ^= 1
    others = [(pixel, labels), (images, labels.roll(1))]
    others = [dataclasses.replace(data, train=train) for train in others]
    others.append(dataclasses.replace(data, test=(data.test[0].flip(0), data.test[1])))
    others.append(dataclasses.replace(data, classes=[*"abcdefghij"]))
    others.append(dataclasses.replace(data, name="another name"))
    keys = [
        names["key_of"](names["softmax_cross_entropy"], d, config) for d in [data, data, *others]
    ]
    assert keys[0] == keys[1] == keys[-1] and len({*keys}) == 5  # a name trains nothing


def test_other_objectives_torch_or_precision_make_another_training(names, monkeypatch):
    assert train(names)[1]
    for owner, name, value in [
        (vars(objectives), "text", objectives.text + "\n"),
        (vars(torch), "__version__", "3.0"),
        (names, "PRECISION", torch.bfloat16),
    ]:
        with monkeypatch.context() as patch:
            patch.setitem(owner, name, value)
            assert train(names)[1]
    assert not train(names)[1]


KILLED = """
import os, random, signal, sys, time
sys.path[:0] = [{tests!r}, {root!r}]
from test_notebook import notebook
names = notebook("unused", last="five", EPOCHS=3, SEEDS=[0, 1, 2, 3])
data, configs = names["settings"]()

def start(folder):
    if pid := os.fork():
        return pid
    names["RUNS"] = folder
    names["settings"]()
    for objective in [names["softmax_cross_entropy"], names["policy_gradient"]]:
        for config in configs:
            names["train_once"](objective, data, config, lambda text: None)
    os._exit(0)

started = time.perf_counter()
assert os.waitpid(start("whole"), 0)[1] == 0
seconds, random, killed = time.perf_counter() - started, random.Random(0), 0
for _ in range(8):
    pid = start("killed")
    time.sleep(random.uniform(0, seconds / 3))
    os.kill(pid, signal.SIGKILL)
    killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
assert os.waitpid(start("killed"), 0)[1] == 0
print("killed", killed)
"""


def saved(folder):
    loaded = {path.name: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}
    return {name: [*kept["weights"].values()] for name, kept in loaded.items()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a fork")
def test_killed_again_and_again_it_ends_with_the_same_bits(tmp_path):
    source = KILLED.format(tests=str(ROOT / "tests"), root=str(ROOT))
    settings = {"cwd": tmp_path, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "timeout": 120}
    done = subprocess.run(
        [sys.executable, "-c", source], text=True, capture_output=True, **settings
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 3
    undisturbed, resumed = saved(tmp_path / "whole"), saved(tmp_path / "killed")
    assert len(undisturbed) == 8 and undisturbed.keys() == resumed.keys()
    assert all(same(undisturbed[name], resumed[name]) for name in undisturbed)


# An edited objectives.py, and runs of other settings


def test_an_edited_module_is_noticed_and_what_was_imported_is_shown_and_hashed(tmp_path):
    """In a process of its own, where objectives.py can be edited."""
    (tmp_path / "objectives.py").write_bytes((ROOT / "objectives.py").read_bytes())
    source = f"""
import sys
sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT / "tests")!r}]
from pathlib import Path
from test_notebook import notebook
names = notebook({str(tmp_path / "runs")!r})
data, configs = names["settings"]()
key = lambda: names["key_of"](names["softmax_cross_entropy"], data, configs[0])
before, o = key(), names["objectives"]
assert Path(o.__file__).parent == Path({str(tmp_path)!r})
path = Path(o.__file__)
edited = path.read_text().replace("log_p = _wide", "log_p = 7 * _wide")
path.write_text("# one line more\\n" + edited)
print("EDITED")
names["settings"]()
assert key() == before
names["display"].clear()
names["show_source"](o.softmax_cross_entropy)
print(names["display"].texts()[-1])
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = done.stdout.split("EDITED")
    assert "NOTICE" not in before and after.count("NOTICE") == 1 and "restart" in after
    assert "def softmax_cross_entropy(" in after and "log_p = _wide(logits)" in after
    assert "7 *" not in after and "Args:" not in after


def test_runs_of_other_settings_or_data_are_left_out_and_named(names, capsys):
    run(names, "curves")
    data, configs = names["settings"]()
    names["runs"]["softmax_cross_entropy"] = [train(names)[0]]
    names["runs"]["value_function"] = [train(names, "value_function", seed=7)[0]]
    assert [*names["alike"](data, configs)] == ["softmax_cross_entropy"]
    assert "value_function" in capsys.readouterr().out
    seven = [dataclasses.replace(configs[0], seed=7)]
    assert [*names["alike"](data, seven)] == ["value_function"]
    with pytest.raises(AssertionError, match="run a section first"):
        names["alike"](dataclasses.replace(data, name="others"), configs)
    assert names["runs"]["value_function"][0].config.seed == 7
