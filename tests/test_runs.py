"""Finished trainings survive: saved, found again, and trained anew where anything differs."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.collections import PolyCollection
from test_notebook import (
    AFTER_PROBE,
    BEFORE_PROBE,
    CODE,
    ROOT,
    execute,
    one_thread,
    pretend_colab,
    run,
    with_few_images,
)
from torch.utils._python_dispatch import TorchDispatchMode

import objectives

SUPERVISED = CODE["probe"].split("with settings")[0]  # the objective, without the training
TRAININGS = ["softmax-train", "teacher-settings", "teacher-objective", "teacher-train"]
TRAININGS += ["sampled-train", "policy-train"]


def prepared(folder, **settings):
    """A namespace that can train on few images, and has not yet."""
    namespace = run(with_few_images(folder, **settings), *BEFORE_PROBE)
    execute(namespace, "probe", SUPERVISED)
    return run(namespace, *AFTER_PROBE)


def train_all(names):
    """What the cells of the notebook train, with the student after its teacher."""
    return run(names, *TRAININGS)["runs"]


def same(run, other):
    """Equal bit for bit in all that does not depend on the clock."""
    weights, other_weights = run.model.state_dict(), other.model.state_dict()
    numbers, other_numbers = ((r.history, r.accuracy, r.finished) for r in (run, other))
    return numbers == other_numbers and all(
        torch.equal(weights[k], other_weights[k]) for k in {**weights, **other_weights}
    )


def saved_files(names, *folder):
    return sorted(Path(names["RUNS"], *folder).glob("*.pt"))


@pytest.fixture
def names(tmp_path):
    with one_thread():
        yield prepared(tmp_path / "runs", RESUME=True)


@pytest.fixture
def softmax(names):
    """Train or load with softmax cross entropy."""
    return lambda: names["train_or_load"]("softmax", names["supervised"], 10)


@pytest.fixture
def saved(names, softmax, capsys):
    """A finished training and its file."""
    first = softmax()
    (path,) = Path(names["RUNS"]).iterdir()
    capsys.readouterr()
    return first, path


def test_a_finished_training_is_loaded_bit_for_bit(softmax, saved, capsys):
    first, path = saved
    written = path.stat().st_mtime_ns
    assert same(first, softmax())
    said = capsys.readouterr().out
    accuracy = f"test accuracy {first.accuracy:.1%}"
    assert said == f"softmax, seed 0, was loaded from {path}: {accuracy}\n"
    assert path.stat().st_mtime_ns == written


def test_every_part_of_a_run_comes_back(softmax, saved):
    first, again = saved[0], softmax()
    assert vars(first).keys() == vars(again).keys() and first.seconds == again.seconds


def test_without_resume_nothing_old_is_used(names, softmax, saved, monkeypatch):
    names["RESUME"] = False
    names["find_run"] = names["load_run"] = lambda *_: pytest.fail("looked for an old run")
    first, path = saved
    written = path.stat().st_mtime_ns
    assert same(first, softmax()) and path.stat().st_mtime_ns > written


def test_an_unrelated_setting_changes_nothing(names, softmax, saved, capsys):
    names["ENTROPY_WEIGHT"], names["N_SAMPLES"], names["DATA"] = 0.5, 7, "elsewhere"
    softmax()
    assert "was loaded" in capsys.readouterr().out


def change_version(names, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.99.0")


def change_images(names, monkeypatch):
    images, labels = names["data"].train
    images = images.clone()
    images[0, 0, 0, 0] += 1
    names["data"].train = images, labels


def change_objectives(names, monkeypatch):
    text = Path(objectives.__file__).read_text()
    monkeypatch.setattr(Path, "read_text", lambda path: text + "#")


def change_objective(names, monkeypatch):
    execute(names, "probe", SUPERVISED.replace("model(images)", "model(1 * images)"))


def change_loop(names, monkeypatch):
    execute(names, "train", CODE["train"].replace("warm_up=0.15", "warm_up=0.3"))


def change_test(names, monkeypatch):
    execute(names, "predict", CODE["predict"].replace("/ len(views)", "/ 2"))


def change_network(names, monkeypatch):
    names["NETWORK"] = run(names, "plain-network")["PlainCNN"]


def change_layers(names, monkeypatch):
    execute(names, "network", CODE["network"].replace("nn.GELU()]", "nn.ReLU()]"))


def setting(name, value):
    return lambda names, monkeypatch: names.update({name: value})


@pytest.mark.parametrize(
    "what, change",
    [
        ("EPOCHS", setting("EPOCHS", 3)),
        ("BATCH_SIZE", setting("BATCH_SIZE", 32)),
        ("LEARNING_RATE", setting("LEARNING_RATE", 0.001)),
        ("OPTIMIZER", setting("OPTIMIZER", "SGD")),
        ("WIDTH", setting("WIDTH", 10)),
        ("FLIP", setting("FLIP", False)),
        ("SEED", setting("SEED", 1)),
        ("N_IMAGES", setting("N_IMAGES", 300)),
        ("N_TEST", setting("N_TEST", 50)),
        ("NETWORK", change_network),
        ("convolution", change_layers),
        ("PRECISION", setting("PRECISION", torch.bfloat16)),
        ("torch", change_version),
        ("images", change_images),
        ("objectives.py", change_objectives),
        ("objective", change_objective),
        ("learning_rate_at", change_loop),
        ("predict", change_test),
    ],
)
def test_what_differs_is_named_and_trained_anew(
    names, softmax, saved, capsys, monkeypatch, what, change
):
    change(names, monkeypatch)
    softmax()
    said = capsys.readouterr().out
    assert f"softmax is trained anew, since this differs from {saved[1]}: {what} (saved: " in said
    assert "was loaded" not in said and len(list(saved[1].parent.iterdir())) == 2
    softmax()
    assert "was loaded" in capsys.readouterr().out


@pytest.mark.skipif("Muon" not in dir(torch.optim), reason="PyTorch 2.9 brought Muon")
def test_the_code_of_an_optimizer_of_the_notebook_counts(names, softmax, capsys):
    """Also once it is in use, when torch has wrapped its step."""
    names["OPTIMIZER"] = "Muon"
    softmax()
    softmax()
    said = capsys.readouterr().out
    assert "anew" not in said and said.count("was loaded") == 1
    execute(names, "optimizers", CODE["optimizers"].replace("match_rms_adamw", "original"))
    softmax()
    said = capsys.readouterr().out
    assert "Muon (saved: " in said and "was loaded" not in said


def test_the_last_digits_of_the_pixels_mean_do_not_count(names, softmax, saved, capsys):
    """They depend on the number of threads that summed the pixels."""
    names["PIXEL_MEAN"] *= 1 + 1e-7
    softmax()
    assert "was loaded" in capsys.readouterr().out


def test_an_objectives_own_setting_counts(names, capsys):
    train = lambda: names["train_or_load"]("sampled", names["sampled"], 10)  # noqa: E731
    train()
    names["N_SAMPLES"] = 6
    train()
    assert "N_SAMPLES (saved: 5, now: 6)" in capsys.readouterr().out


def test_a_student_of_another_teacher_is_trained_anew(names, capsys):
    train_all(names)
    train_all(names)
    assert capsys.readouterr().out.count("was loaded") == 4
    teacher = names["runs"]["softmax_cross_entropy"][0].model
    with torch.no_grad():
        teacher.head.bias[0] += 1
    names["train_or_load"]("teacher_student", names["distilled"], 10)
    assert "differs" in (said := capsys.readouterr().out) and "teacher (saved: " in said


def test_a_damaged_file_is_named_and_trained_anew(softmax, saved, capsys):
    """Cut anywhere or with any byte changed, it is refused, or what matters in it is intact."""
    first, path = saved
    whole, chance = path.read_bytes(), random.Random(0)
    refused = 0
    for trial in range(12):
        at = chance.randrange(len(whole))
        changed = bytes([whole[at] ^ (1 + chance.randrange(255))])
        path.write_bytes(whole[:at] if trial % 2 else whole[:at] + changed + whole[at + 1 :])
        assert same(first, softmax())
        said = capsys.readouterr().out
        assert (f"{path} is damaged and not used" in said) != ("was loaded" in said)
        refused += "damaged" in said
    assert refused >= 9


def test_a_half_written_file_is_never_found(names, softmax, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            softmax()
    assert [path.suffix for path in Path(names["RUNS"]).iterdir()] == [".part"]
    softmax()
    assert "was loaded" not in capsys.readouterr().out
    assert [path.suffix for path in Path(names["RUNS"]).iterdir()] == [".pt"]


# Several seeds


def test_each_seed_gives_what_it_gives_alone(tmp_path):
    """Bit for bit, the student too: it had the teacher of its own seed."""
    with one_thread():
        names = prepared(tmp_path / "together", SEEDS=[3, 0])
        together = train_all(names)
        alone = [train_all(prepared(tmp_path / f"{s}", SEEDS=[s])) for s in [3, 0]]
        assert {name: len(finished) for name, finished in together.items()} == {
            "softmax_cross_entropy": 2,
            "teacher_student": 2,
            "sampled_softmax": 2,
            "policy_gradient": 2,
        }
        for name, finished in together.items():
            assert not same(*finished)
            for ours, others in zip(finished, alone, strict=True):
                assert same(ours, *others[name])
        assert names["SEED"] == 3 and names["teacher"] is together["softmax_cross_entropy"][0].model
        with names["settings"](SEED=0):
            swapped = names["train"]("", names["distilled"], 10)
    assert not same(swapped, together["teacher_student"][1])


def test_each_seed_is_saved_and_found_again(names, capsys):
    names["SEEDS"] = [0, 1, 5]
    first = run(names, "softmax-train")["runs"]["softmax_cross_entropy"]
    files = {torch.load(p, weights_only=True)["identity"]["SEED"]: p for p in saved_files(names)}
    assert sorted(files) == ["0", "1", "5"]
    names["SEEDS"] = [5, 0]
    capsys.readouterr()
    again = run(names, "softmax-train")["runs"]["softmax_cross_entropy"]
    assert same(again[0], first[2]) and same(again[1], first[0]) and len(again) == 2
    assert capsys.readouterr().out.splitlines() == [
        f"softmax_cross_entropy, seed {seed}, was loaded from {files[str(seed)]}: "
        f"test accuracy {found.accuracy:.1%}"
        for seed, found in zip([5, 0], again)
    ]


def test_a_student_beyond_the_last_teacher_has_one_of_the_others(names):
    """When the second seed of the teacher was stopped, its student takes the first's."""
    run(names, "softmax-train", "teacher-settings", "teacher-objective")
    names["SEEDS"] = [0, 1]
    students = run(names, "teacher-train")["runs"]["teacher_student"]
    with names["settings"](SEED=1):
        expected = names["train"]("", names["distilled"], 10)
    assert len(students) == 2 and same(students[1], expected)


@pytest.fixture
def interrupted(names, monkeypatch):
    """Execute a cell, which is interrupted after so many steps; no code that is saved differs."""

    def interrupted(cell, after):
        update, steps = names["tqdm"].update, iter(range(1, 10**6))

        def updating(bar, n=1):
            if next(steps) == after:
                raise KeyboardInterrupt
            return update(bar, n)

        with monkeypatch.context() as patch:
            patch.setattr(names["tqdm"], "update", updating)
            run(names, cell)

    return interrupted


@pytest.mark.parametrize("finished", [0, 1, 2])
def test_an_interrupt_keeps_the_seeds_that_are_finished(names, interrupted, capsys, finished):
    """The seed that was stopped counts only if it is all there is; started again, it goes on."""
    names["SEEDS"] = [0, 1, 2]
    complete = run(names, "softmax-train")["runs"]["softmax_cross_entropy"]
    for path in saved_files(names):
        path.unlink()
    capsys.readouterr()
    interrupted("softmax-train", 14 * finished + 10)  # of 14 steps in two epochs
    stopped = names["runs"]["softmax_cross_entropy"]
    said, kept = capsys.readouterr().out, max(finished, 1)
    assert "STOPPED: softmax_cross_entropy was interrupted. Epochs kept: 1." in said
    assert f"softmax_cross_entropy: trained with {kept} of 3 seeds\n" in said
    assert [r.finished for r in stopped] == ([True] * finished or [False])
    assert all(same(a, b) for a, b in zip(stopped, complete[:finished]))
    assert len(saved_files(names)) == finished
    names["plot_run"]("softmax_cross_entropy", fraction=["accuracy"], nats=["loss"])
    plt.close("all")
    assert names["SEED"] == 0
    again = run(names, "softmax-train")["runs"]["softmax_cross_entropy"]
    assert all(same(a, b) for a, b in zip(again, complete, strict=True))
    assert capsys.readouterr().out.count("was loaded") == finished


def test_an_interrupt_in_the_first_epoch_of_a_later_seed_keeps_the_earlier(
    names, interrupted, capsys
):
    names["SEEDS"] = [0, 1]
    interrupted("softmax-train", 17)
    (kept,) = names["runs"]["softmax_cross_entropy"]
    assert names["SEED"] == 0 and kept.finished and len(saved_files(names)) == 1
    assert "softmax_cross_entropy: trained with 1 of 2 seeds" in capsys.readouterr().out
    run(names, "softmax-train")
    assert capsys.readouterr().out.count("softmax_cross_entropy, seed 0, was loaded") == 1
    assert len(names["runs"]["softmax_cross_entropy"]) == 2


def curves(*histories):
    return [SimpleNamespace(history={"loss": history}) for history in histories]


@pytest.fixture
def ax():
    fig, ax = plt.subplots()
    yield ax
    plt.close(fig)


@pytest.mark.parametrize("n", [2, 3, 7])
def test_a_curve_is_the_mean_and_a_band_of_one_standard_deviation(names, ax, n):
    values = np.random.default_rng(n).normal(size=(n, 4))
    names["plot_curve"](ax, curves(*values.tolist()), "loss", color="#D55E00", label="a")
    (line,), (band,) = ax.lines, ax.collections
    np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3, 4])
    np.testing.assert_allclose(line.get_ydata(), values.mean(0))
    assert isinstance(band, PolyCollection) and line.get_label() == "a"
    corners = np.concatenate([path.vertices for path in band.get_paths()])
    assert set(corners[:, 0]) == {1, 2, 3, 4}
    for epoch, mean, deviation in zip([1, 2, 3, 4], values.mean(0), values.std(0, ddof=1)):
        heights = np.unique(corners[corners[:, 0] == epoch, 1].round(12))
        np.testing.assert_allclose(heights, [mean - deviation, mean + deviation], atol=1e-9)
    np.testing.assert_array_equal(
        band.get_facecolor()[0, :3], plt.matplotlib.colors.to_rgb("#D55E00")
    )


def test_a_curve_of_one_seed_has_no_band(names, ax):
    names["plot_curve"](ax, curves([3.0, 1.0]), "loss")
    (line,) = ax.lines
    assert line.get_xydata().tolist() == [[1, 3], [2, 1]] and len(ax.collections) == 0


@pytest.mark.parametrize(
    "accuracies, words",
    [
        ([0.5], "50.0%"),
        ([1.0], "100.0%"),
        ([0.5, 0.6], "55.0% ± 7.1%"),
        ([0.7123, 0.7123, 0.7123], "71.2% ± 0.0%"),
        ([0.2, 0.4, 0.9], "50.0% ± 36.1%"),
    ],
)
def test_accuracies_are_printed_as_mean_and_sample_standard_deviation(names, accuracies, words):
    assert names["percent"](accuracies) == words


# As part of an experiment: with a bar of several trainings


@pytest.fixture
def bar(names):
    """The bar of two trainings; they have 14 steps each."""
    with names["progress_bar"](28, "two trainings") as bar:
        yield bar


@pytest.fixture
def part(names, bar):
    """Train or load with softmax cross entropy, as part of an experiment."""
    return lambda: names["train_or_load"]("softmax", names["supervised"], 10, bar)


def test_with_a_bar_it_trains_the_same_network(names, softmax, bar):
    with_bar = names["train"]("softmax", names["supervised"], 10, bar)
    assert bar.n == 14 and same(softmax(), with_bar)


@pytest.mark.parametrize(
    "step, error, expected",
    [(3, "interrupt", KeyboardInterrupt), (10, "interrupt", KeyboardInterrupt)]
    + [(3, "not_a_number", FloatingPointError), (10, "not_a_number", FloatingPointError)],
)
def test_with_a_bar_errors_pass_through_and_nothing_is_kept(
    names, part, capsys, step, error, expected
):
    stop_at(names, step, globals()[error])
    with pytest.raises(expected):
        part()
    assert "STOPPED" not in capsys.readouterr().out and not Path(names["RUNS"]).exists()


@pytest.mark.parametrize("resume", [False, True])
def test_what_this_session_finished_for_an_experiment_is_not_trained_again(
    names, part, bar, capsys, resume
):
    names["RESUME"] = resume
    first = part()
    (path,) = saved_files(names, "experiments")
    assert saved_files(names) == [] and bar.n == 14
    written = path.stat().st_mtime_ns
    capsys.readouterr()
    again = part()
    assert same(first, again) and vars(first).keys() == vars(again).keys()
    assert bar.n == 28 and path.stat().st_mtime_ns == written
    assert not re.search("loaded|anew|differs", capsys.readouterr().out)


@pytest.mark.parametrize("resume", [False, True])
def test_what_an_earlier_session_finished_is_used_with_resume_only(names, part, resume):
    first = part()
    (path,) = saved_files(names, "experiments")
    written = path.stat().st_mtime_ns
    names["RESUME"] = resume
    names["finished_files"].clear()
    assert same(first, part())
    assert (path.stat().st_mtime_ns == written) == resume


@pytest.mark.parametrize("resume", [False, True])
def test_an_experiment_finds_the_trainings_of_the_sections(names, softmax, part, resume):
    """They are in RUNS itself, and no second file is written."""
    names["RESUME"] = resume
    first = softmax()
    (path,) = saved_files(names)
    written = path.stat().st_mtime_ns
    assert same(first, part())
    assert saved_files(names) == [path] and saved_files(names, "experiments") == []
    assert path.stat().st_mtime_ns == written


def test_an_experiment_with_another_setting_trains_without_a_word(names, softmax, part, capsys):
    """Every training of an experiment differs from the others; nobody wants to read how."""
    softmax()
    capsys.readouterr()
    for n in [1, 2]:
        names["LEARNING_RATE"] /= 2
        part()
        assert len(saved_files(names, "experiments")) == n and len(saved_files(names)) == 1
    assert not re.search("loaded|anew|differs", capsys.readouterr().out)


# A training that does not finish


def stop_at(names, step, error):
    """Make the training meet this error at its step of that number, counted from 1."""
    train_step, steps = names["train_step"], iter(range(1, 10**6))

    def stopping(*arguments):
        result = train_step(*arguments)
        number = next(steps)
        if number == step - 1:
            names["loss_before"] = result["loss"].item()
        return error(result) if number == step else result

    names["train_step"] = stopping


def interrupt(_):
    raise KeyboardInterrupt


def not_a_number(result):
    return result | {"loss": torch.tensor(torch.nan)}


def test_an_interrupted_training_keeps_its_epochs_and_is_not_saved(names, softmax, capsys):
    complete = softmax().history
    (path,) = Path(names["RUNS"]).iterdir()
    path.unlink()
    stop_at(names, 10, interrupt)  # seven steps are an epoch
    stopped = softmax()
    assert "STOPPED: softmax was interrupted. Epochs kept: 1." in capsys.readouterr().out
    assert stopped.history == {k: v[:1] for k, v in complete.items()} and not stopped.finished
    assert list(Path(names["RUNS"]).iterdir()) == []
    names["runs"]["softmax_cross_entropy"] = [stopped]
    names["plot_run"]("softmax_cross_entropy", fraction=["accuracy"], nats=["loss"])
    plt.close("all")


def test_an_interrupt_before_the_first_epoch_ends_goes_through(names, softmax):
    stop_at(names, 3, interrupt)
    with pytest.raises(KeyboardInterrupt):
        softmax()


def test_a_loss_that_is_not_a_number_is_reported(names, softmax, capsys):
    stop_at(names, 10, not_a_number)
    stopped = softmax()
    said = capsys.readouterr().out
    rate = names["learning_rate_at"](9.5 / 14)
    assert (
        f"the loss of softmax became nan in epoch 2, step 3 of 7, at learning rate {rate:.3g}; "
        f"the last finite loss of that epoch was {names['loss_before']}. Epochs kept: 1." in said
    )
    assert len(stopped.history["loss"]) == 1 and not Path(names["RUNS"]).exists()


def test_a_loss_that_is_infinite_in_the_first_epoch_raises(names, softmax):
    names["LEARNING_RATE"] = 1e30
    with pytest.raises(
        FloatingPointError, match="^the loss of softmax became (nan|inf) in epoch 1"
    ):
        softmax()


class Reads(TorchDispatchMode):
    """Counts how often the values of a tensor are asked for."""

    n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_the_loop_reads_no_value_in_a_step(names):
    """As often with 14 steps an epoch as with 7: labels are checked on the CPU alone."""

    def reads(batch_size):
        names["BATCH_SIZE"] = batch_size
        with Reads() as mode:
            names["train"]("", lambda model, images, _: (model(images).sum(), {}), 10)
        return mode.n

    assert reads(64) == reads(32)


@pytest.mark.parametrize(
    "folder, mounted", [("/content/drive/MyDrive/runs", True), ("runs", False)]
)
def test_colab_mounts_drive_for_a_folder_on_it(monkeypatch, folder, mounted):
    mounts = []
    pretend_colab(monkeypatch, drive=SimpleNamespace(mount=mounts.append))
    run({"sys": sys, "RUNS": folder}, "mount-drive")
    assert mounts == ["/content/drive"] * mounted


# Killed at any moment


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def die_half_written(state, file):
    file.write(b"PK\x03\x04 the beginning of a file")
    file.flush()
    die()


AIMS = [(torch, "save", die_half_written), (os, "fsync", die), (Path, "replace", die)]


def kill_repeatedly(folder):
    """Fork the same work again and again, kill it at random or while it saves; report in JSON."""
    torch.set_num_threads(1)
    chance = random.Random(0)
    names = prepared(folder / "undisturbed", RESUME=True)
    started = folder / "started"

    def fork(aim=None):
        pid = os.fork()
        if pid:
            return pid
        sys.stdout = open(os.devnull, "w")
        train = names["train"]
        names["train"] = lambda name, *rest, **options: (
            started.open("a").write(f"{name}\n"),
            train(name, *rest, **options),
        )[1]
        if aim:
            setattr(*aim)
        train_all(names)
        os._exit(0)

    began = time.monotonic()
    os.waitpid(fork(), 0)
    length = time.monotonic() - began
    started.unlink()
    names["RUNS"] = str(folder / "killed")
    files = lambda: list(Path(names["RUNS"]).glob("*.pt"))  # noqa: E731
    killed, intact = 0, True
    while killed < 20:
        for path in files():  # as if some had not been trained yet
            if chance.random() < 0.5:
                path.unlink()
        pid = fork()
        time.sleep(chance.uniform(0, length * (4 - len(files())) / 4))
        os.kill(pid, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        intact &= all(names["load_run"](path) for path in files())
    for path in files():
        path.unlink()
    started.unlink()
    for aim in [*AIMS, None]:
        killed += os.WIFSIGNALED(os.waitpid(fork(aim), 0)[1])
    print(json.dumps({"killed": killed, "intact": intact, "started": started.read_text().split()}))


def test_killed_at_any_moment_it_ends_with_the_same_bits(tmp_path):
    command = [sys.executable, __file__, str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["killed"] == 23 and report["intact"]
    assert report["started"] == ["softmax_cross_entropy"] * 4 + [
        "teacher_student",
        "sampled_softmax",
        "policy_gradient",
    ]
    folders = [tmp_path / "undisturbed", tmp_path / "killed"]
    files = [sorted(path.name for path in folder.glob("*.pt")) for folder in folders]
    assert files[0] == files[1] and len(files[0]) == 4
    for name in files[0]:
        undisturbed, killed = (torch.load(folder / name, weights_only=True) for folder in folders)
        for key, value in undisturbed["weights"].items():
            assert torch.equal(value, killed["weights"][key])
        assert undisturbed["run"]["history"] == killed["run"]["history"]


if __name__ == "__main__":
    kill_repeatedly(Path(sys.argv[1]))
