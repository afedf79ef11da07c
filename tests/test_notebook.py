"""The notebook: executed from a copy with tiny settings, cell by cell in a namespace, and as the
file that is committed. Cells are addressed by their ids."""

import ast
import base64
import copy
import importlib.util
import io
import json
import linecache
import re
import socket
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from urllib.error import URLError

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from nbconvert import ScriptExporter
from PIL import Image

import objectives

ROOT = Path(__file__).resolve().parents[1]
PATH = ROOT / "training_objectives.ipynb"
NOTEBOOK = nbformat.read(PATH, as_version=4)
CELLS = {cell.id: cell for cell in NOTEBOOK.cells}
CODE = {name: cell.source for name, cell in CELLS.items() if cell.cell_type == "code"}
OBJECTIVES = objectives.__all__[:5]
SHOWS = re.compile(r"^(plt\.show|anatomy|plot_run)\(", re.MULTILINE)
FIGURES = [name for name, source in CODE.items() if SHOWS.search(source)]
MADE_ON_THE_SPOT = {"costs", "bias-plot", "race-plot"}  # figures that show no image data
LOADERS = ["read-image", "list-images", "load-folder", "load-cifar10", "stand-in", "load-data"]
BEFORE_PROBE = list(CODE)[list(CODE).index("to-device") : list(CODE).index("probe")]
BEFORE_PROBE.remove("show-images")
AFTER_PROBE = ["sampled-settings", "sampled-objective", "policy-settings", "policy-objective"]
CLASSES = ["Käfer", "cat", "white dog"]  # in the order of ImageFolder
EPOCHS = 2

# Put into the copy after the cell of that id. The spy keeps every title of every figure.
SPY = """
titles, show = [], plt.show
def recording_show():
    for figure in map(plt.figure, plt.get_fignums()):
        titles.append([figure.get_suptitle(), *(ax.get_title() for ax in figure.axes)])
    show()
plt.show = recording_show
"""
INJECTED = {
    "imports": "torch.set_num_threads(1)",  # small tensors, and the cores may be busy
    "stand-in": "make_stand_in = partial(make_stand_in, 2_000, 500)",
    "style": SPY,
    "why-settings": "CLASS_COUNTS = [1_000, 30_000]",
    "race-settings": "RACE_CLASSES, RACE_SECONDS = 2_000, dict.fromkeys(RACE_SECONDS, 0.3)",
    "results": "print(json.dumps(titles))",
}


def run(namespace, *names):
    """Execute the cells of these ids in the namespace, and return it."""
    for name in names:
        execute(namespace, name, CODE[name])
    return namespace


def execute(namespace, name, source):
    """Execute it like a cell, so that inspect.getsource finds it."""
    file = f"<cell {name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    exec(compile(source, file, "exec"), namespace)


def resolved(**settings):
    """A namespace after the settings, on the CPU."""
    namespace = run({}, "find-objectives", "imports", "device", "ranks", "parameters")
    namespace |= {"DEVICE": torch.device("cpu"), "PRECISION": torch.float32} | settings
    return run(namespace, "resolve", "check-settings")


def with_few_images(folder, **settings):
    """A namespace that is about to load 400 images, and keeps its trainings in the folder."""
    settings = {"DATA": "stand-in", "EPOCHS": 2, "WIDTH": 8, "BATCH_SIZE": 64} | settings
    namespace = run(resolved(**settings, RUNS=str(folder)), *LOADERS)
    namespace["make_stand_in"] = namespace["partial"](namespace["make_stand_in"], 400, 100)
    return namespace


@contextmanager
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pretend_colab(monkeypatch, **parts):
    """Make google.colab importable, with these parts."""
    colab = ModuleType("google.colab")
    vars(colab).update(parts)
    monkeypatch.setitem(sys.modules, "google", ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", colab)


def assigned(source):
    """The names that the top level of a cell assigns, with their values."""
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    return {
        target.id: node.value for node in nodes for target in node.targets if hasattr(target, "id")
    }


def texts(cells):
    """All text in the outputs of cells."""
    for output in (output for cell in cells for output in cell.get("outputs", [])):
        yield output.get("text", "")
        yield from output.get("traceback", [])
        for kind, value in output.get("data", {}).items():
            if not kind.startswith("image/"):
                yield value if isinstance(value, str) else json.dumps(value)


def figures(cell):
    """The figures that a cell shows, as arrays."""
    for output in cell.outputs:
        if png := output.get("data", {}).get("image/png"):
            yield np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"))


def save_images(root, classes=CLASSES, n_train=60, n_test=20):
    """A folder of small images of several sizes and modes, one colour a class."""
    random = np.random.default_rng(0)
    modes = ["RGB", "RGBA", "P", "LA", "L", "1"]
    for split, n in [("train", n_train), ("test", n_test)]:
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = random.integers(0, 120, (int(random.integers(9, 70)), 40, 3), np.uint8)
                pixels[..., label] += 100
                image = Image.fromarray(pixels).convert(modes[i % len(modes)])
                # A palette with degrees of transparency, as many images of the web have
                extra = {"transparency": bytes(range(256))} if image.mode == "P" else {}
                image.save(root / split / name / f"{i}.png", **extra)
    return root


class Run:
    """A copy of the notebook, its kernel, and what it wrote."""

    def __init__(self, folder, data):
        self.folder = folder
        (folder / "objectives.py").write_bytes((ROOT / "objectives.py").read_bytes())
        notebook = copy.deepcopy(NOTEBOOK)
        settings = {"DATA": data, "EPOCHS": EPOCHS, "WIDTH": 8, "BATCH_SIZE": 32}
        parameters = "\n".join(f"{name} = {value!r}" for name, value in settings.items())
        notebook.cells = []
        for cell in copy.deepcopy(NOTEBOOK.cells):
            notebook.cells.append(cell)
            tagged = "parameters" in cell.metadata.get("tags", [])
            injected = parameters if tagged else INJECTED.get(cell.id)
            if injected:
                cell = nbformat.v4.new_code_cell(injected, id=f"injected-{cell.id}")
                notebook.cells.append(cell)
        resources = {"metadata": {"path": str(folder)}}
        self.client = NotebookClient(
            notebook, timeout=300, kernel_name="python3", resources=resources
        )
        self.cells = {cell.id: cell for cell in notebook.cells}

    def execute(self, names):
        for index, cell in enumerate(self.client.nb.cells):
            if cell.id in names:
                self.client.execute_cell(cell, index)

    def text(self, *names):
        return "\n".join(texts(self.cells[name] for name in names or self.cells))

    def results(self):
        return json.loads((self.folder / "runs" / "results.json").read_text())


def executed(folder, data):
    run = Run(folder, data)
    with run.client.setup_kernel():
        run.execute(run.cells)
        yield run


@pytest.fixture(scope="module")
def stand_in_run(tmp_path_factory):
    yield from executed(tmp_path_factory.mktemp("stand_in"), "stand-in")


@pytest.fixture(scope="module")
def folder_run(tmp_path_factory):
    images = save_images(tmp_path_factory.mktemp("own") / "my images")
    yield from executed(tmp_path_factory.mktemp("folder"), str(images))


@pytest.fixture(params=["stand_in_run", "folder_run"])
def any_run(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def loaders(tmp_path, monkeypatch):
    """A namespace with the functions that load data, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    namespace = run({}, "find-objectives", "imports", "device", "ranks", *LOADERS)
    namespace["make_stand_in"] = namespace["partial"](namespace["make_stand_in"], 40, 20)
    return namespace


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A namespace that can train all objectives, on few images."""
    with one_thread():
        namespace = with_few_images(tmp_path_factory.mktemp("runs"))
        yield run(namespace, *BEFORE_PROBE, "probe", *AFTER_PROBE)


@pytest.fixture
def notebook(trained):
    """The same, restored after the test."""
    before = dict(trained)
    yield trained
    trained.clear()
    trained.update(before)


# The whole notebook, executed


def test_a_run_prints_no_warning_and_no_notice(any_run):
    assert not re.search("Warning|NOTICE", any_run.text())


def test_every_figure_shows_something(any_run):
    for name in FIGURES:
        shown = list(figures(any_run.cells[name]))
        assert shown, name
        for pixels in shown:
            assert pixels.std() > 10 and len(np.unique(pixels @ [1, 256, 65536])) > 20, name


def test_every_figure_and_table_names_the_data(any_run):
    titles = json.loads(any_run.cells["injected-results"].outputs[0].text)
    name = any_run.results()["data"]["name"]
    assert len(titles) == len(FIGURES)
    of_the_images = [t for t, cell in zip(titles, FIGURES) if cell not in MADE_ON_THE_SPOT]
    assert all(any(name in title for title in figure) for figure in of_the_images)
    assert name in any_run.text("table").splitlines()[0]


def table_rows(text):
    """The words of every line that begins with a number."""
    return [line.split() for line in text.splitlines() if re.match(r"\s*\d", line)]


def test_memory_of_a_sparse_step_does_not_grow_with_the_classes(any_run):
    rows = table_rows(any_run.text("costs"))
    megabytes = np.array([[float(row[i]) for i in (3, 7, 11)] for row in rows])
    full, dense, sparse = megabytes.T
    assert full[1] > 10 * full[0] and dense[1] > 10 * dense[0] > 0 and sparse[1] == sparse[0] > 0


def test_more_samples_come_nearer_to_full_softmax(any_run):
    rows = table_rows(any_run.text("bias-plot"))
    biases = np.array([[float(row[i]) for i in (1, 4)] for row in rows])
    assert len(biases) == 5 and (np.abs(biases[-1]) < 0.1 * np.abs(biases[0])).all()


def test_every_method_of_the_race_is_reported(any_run):
    lines = [line for line in any_run.text("race-plot").splitlines() if "reached 95%" in line]
    assert [line.split()[0] for line in lines] == ["full", "adaptive", "uniform", "log-uniform"]


def test_results_hold_the_whole_run(any_run):
    results = any_run.results()
    assert list(results["objectives"]) == OBJECTIVES
    for objective in results["objectives"].values():
        assert {"loss", "test_accuracy"} < set(objective["history"])
        values = np.array(list(objective["history"].values()))
        assert values.shape[1] == EPOCHS and np.isfinite(values).all()
        assert objective["accuracy"] == objective["history"]["test_accuracy"][-1]
        assert objective["seconds"] > 0 and objective["images_per_second"] > 0
    assert results["settings"].items() >= {"EPOCHS": EPOCHS, "WIDTH": 8, "N_SAMPLES": 5}.items()
    assert set(assigned(CODE["parameters"])) <= set(results["settings"])
    assert set(results["device"]) == {"type", "name", "precision"}
    assert results["versions"]["torch"] == torch.__version__
    for name, objective in results["objectives"].items():
        row = next(row for row in any_run.text("table").splitlines() if row.startswith(name))
        assert f"{objective['accuracy']:.1%}" in row


def test_the_stand_in_says_so_and_is_learned(stand_in_run):
    """Labels teach at least ten standard errors above chance, on 500 images."""
    results = stand_in_run.results()
    data = results["data"]
    assert "stand-in" in data["name"] and "stand-in" in stand_in_run.text("table")
    assert (data["train"], data["test"], len(data["classes"])) == (2_000, 500, 10)
    for name in OBJECTIVES[:3]:
        assert results["objectives"][name]["accuracy"] > 0.1 + 10 * (0.1 * 0.9 / 500) ** 0.5


def test_own_images_keep_their_classes_and_are_learned(folder_run):
    """Labels teach at least three standard errors above chance, on 60 images."""
    results = folder_run.results()
    data = results["data"]
    assert (data["name"], data["train"], data["test"]) == ("my images", 180, 60)
    assert data["classes"] == CLASSES
    for name in OBJECTIVES[:3]:
        assert results["objectives"][name]["accuracy"] > 1 / 3 + 3 * (2 / 9 / 60) ** 0.5


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_source_of_every_objective_is_shown_without_its_docstring(stand_in_run, name):
    section = next(n for n, source in CODE.items() if f"show_source({name})" in source)
    shown = stand_in_run.text(section)
    assert f"```python\ndef {name}(" in shown and "return" in shown and '"""' not in shown
    assert f"def {name}(" not in "".join(CODE.values())


@pytest.mark.parametrize(
    "section, objective, setting, value",
    [
        ("teacher", "teacher_student", "ALPHA", 1.0),
        ("sampled", "sampled_softmax", "N_SAMPLES", 50),
        ("value", "value_function", "CONSISTENT", True),
        ("policy", "policy_gradient", "ENTROPY_WEIGHT", 0.3),
        ("policy", "policy_gradient", "BASELINE", False),
    ],
)
def test_one_section_can_be_run_again(stand_in_run, section, objective, setting, value):
    before = stand_in_run.results()
    cell = stand_in_run.cells[f"{section}-settings"]
    cell.source, n = re.subn(rf"(?m)^{setting} = \S+", f"{setting} = {value}", cell.source)
    assert n == 1 and before["settings"][setting] != value
    section = [name for name in CODE if name.startswith(f"{section}-")]
    stand_in_run.execute([*section, "comparison", "table", "predictions", "results"])
    after = stand_in_run.results()
    assert after["settings"] == before["settings"] | {setting: value}
    for name in OBJECTIVES:
        same = after["objectives"][name] == before["objectives"][name]
        assert same == (name != objective)
    assert ("baseline" in after["objectives"]["policy_gradient"]["history"]) == (
        after["settings"]["BASELINE"]
    )


# Data


@pytest.mark.parametrize("source", ["cifar100", "missing/folder", "", "no-train", "no-test"])
def test_a_wrong_data_setting_is_named(loaders, source):
    Path("no-train/test/cat").mkdir(parents=True)
    Path("no-test/train/cat").mkdir(parents=True)
    with pytest.raises(ValueError, match=f"(?s)DATA must .*{re.escape(repr(source))}"):
        loaders["load_data"](source)


def test_classes_in_one_half_only_are_named(loaders):
    save_images(Path("mixed"), ["cat", "dog"], 1, 1)
    Path("mixed/test/dog").rename("mixed/test/wolf")
    with pytest.raises(ValueError, match="mixed: .* dog, wolf"):
        loaders["load_data"]("mixed")


def test_images_of_a_folder_keep_their_labels_and_colours(loaders):
    save_images(Path("own"), CLASSES, 6, 1)
    data = loaders["load_data"]("own")
    images, labels = data.train
    assert images.shape == (18, 32, 32, 3) and images.dtype == np.uint8
    coloured = images.mean((1, 2)).reshape(3, 6, 3)[:, :3]  # of each class the RGB, RGBA and P
    assert (coloured.argmax(2) == np.arange(3)[:, None]).all()
    assert list(labels) == sorted([0, 1, 2] * 6) and list(data.test[1]) == [0, 1, 2]


class FakeCIFAR10:
    """Images whose every pixel is their label."""

    def __init__(self, root, train, download, timeout=None):
        assert download and (timeout or socket.getdefaulttimeout())
        self.targets = np.random.default_rng(train).integers(10, size=50 if train else 20).tolist()
        self.data = np.zeros((len(self.targets), 32, 32, 3), np.uint8)
        self.data += np.uint8(self.targets)[:, None, None, None]
        self.classes = [f"class {c}" for c in range(10)]


def test_downloaded_images_keep_their_labels_when_shuffled(loaders, capsys):
    loaders |= {"CIFAR10": FakeCIFAR10, "DATA": "cifar10", "DEVICE": torch.device("cpu")}
    data = run(loaders, "to-device")["data"]
    assert (data.name, data.n_classes, len(data.classes)) == ("CIFAR-10", 10, 10)
    for train, (images, labels) in [(True, data.train), (False, data.test)]:
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64
        assert torch.equal(images, labels[:, None, None, None].expand_as(images))
        expected = FakeCIFAR10("data", train=train, download=True, timeout=1).targets
        assert sorted(labels.tolist()) == sorted(expected)
    assert "NOTICE" not in capsys.readouterr().out
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("error", [URLError("no network"), RuntimeError("corrupt"), TimeoutError()])
def test_without_cifar10_one_notice_and_the_stand_in(loaders, capsys, error):
    def failing(*args, **kwargs):
        raise error

    loaders["CIFAR10"] = failing
    data = loaders["load_data"]("cifar10")
    printed = capsys.readouterr().out
    assert printed.count("NOTICE") == 1 and str(error) in printed and "stand-in" in printed
    assert "stand-in" in data.name and len(data.train[0]) == 40
    assert socket.getdefaulttimeout() is None


def test_a_cifar10_folder_is_used_without_a_download(loaders):
    loaders["CIFAR10"] = None  # calling it would be a TypeError
    save_images(Path("data", "cifar10"), ["cat", "dog"], 2, 1)
    data = loaders["load_data"]("cifar10")
    assert (data.name, data.classes, len(data.train[0])) == ("CIFAR-10", ["cat", "dog"], 4)


# The stand-in


@pytest.fixture(scope="module")
def stand_in():
    return run({}, "find-objectives", "imports", "stand-in")["make_stand_in"]()


def test_the_stand_in_has_the_promised_size_and_balance(stand_in):
    """Every class within four standard errors of a tenth."""
    assert len(set(stand_in.classes)) == 10 and "stand-in" in stand_in.name
    for (images, labels), n in [(stand_in.train, 10_000), (stand_in.test, 2_000)]:
        assert images.shape == (n, 32, 32, 3) and images.dtype == np.uint8
        counts = np.bincount(labels, minlength=10)
        assert len(counts) == 10 and (abs(counts - n / 10) < 4 * (n * 0.1 * 0.9) ** 0.5).all()


def test_the_stand_in_is_the_same_every_time(stand_in):
    again = run({}, "find-objectives", "imports", "stand-in")["make_stand_in"]()
    for split in ["train", "test"]:
        for a, b in zip(getattr(stand_in, split), getattr(again, split), strict=True):
            assert np.array_equal(a, b)


def test_a_linear_model_cannot_learn_the_stand_in(stand_in):
    """Ridge regression on all pixels stays within four standard errors of chance."""
    train, test = (
        torch.from_numpy(images.reshape(len(images), -1)).float() / 64 - 2
        for images, _ in [stand_in.train, stand_in.test]
    )
    target = torch.eye(10)[torch.from_numpy(stand_in.train[1])] - 0.1
    gram, moment = train.T @ train, train.T @ target
    for ridge in [1e2, 1e4]:
        scores = test @ torch.linalg.solve(gram + ridge * torch.eye(len(gram)), moment)
        accuracy = (scores.argmax(1).numpy() == stand_in.test[1]).mean()
        assert abs(accuracy - 0.1) < 4 * (0.1 * 0.9 / len(test)) ** 0.5


# The cell that finds objectives.py


@pytest.fixture
def find(tmp_path, monkeypatch):
    """Run the cell in an empty folder without objectives.py; with uploads, as if in Colab."""
    away = [path for path in sys.path if path and Path(path).resolve() != ROOT]
    monkeypatch.setattr(sys, "path", ["", *away])
    monkeypatch.delitem(sys.modules, "objectives", raising=False)
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    monkeypatch.chdir(tmp_path)

    def find(url="", uploads=None):
        if uploads is not None:
            dialogs = iter(uploads)
            files = SimpleNamespace(upload=lambda: next(dialogs))
            pretend_colab(monkeypatch, files=files)
        setting = re.compile(r'(?m)^OBJECTIVES_URL = ".*?"')
        source, n = setting.subn(lambda _: f"OBJECTIVES_URL = {url!r}", CODE["find-objectives"])
        assert n == 1
        exec(source, {})

    return find


SOURCE = (ROOT / "objectives.py").read_bytes()
URL = (ROOT / "objectives.py").as_uri()


def assert_objectives_are_here():
    importlib.invalidate_caches()
    assert Path(importlib.util.find_spec("objectives").origin).resolve().parent == Path.cwd()
    assert Path("objectives.py").read_bytes() == SOURCE


@pytest.mark.parametrize("uploads", [None, []], ids=["local", "colab"])
def test_objectives_that_are_here_are_found(find, capsys, uploads):
    Path("objectives.py").write_bytes(SOURCE)
    find(url=URL + ".missing", uploads=uploads)
    assert "found" in capsys.readouterr().out


def test_outside_colab_a_message_says_where_objectives_belong(find):
    where = f"objectives.py into {re.escape(str(Path.cwd()))}"
    with pytest.raises(ModuleNotFoundError, match=where):
        find(url=URL)


def test_colab_downloads_objectives(find, capsys):
    find(url=URL, uploads=[])
    assert "downloaded" in capsys.readouterr().out
    assert_objectives_are_here()


@pytest.mark.parametrize("url", ["", URL + ".missing", "no-scheme/objectives.py"])
def test_colab_asks_for_an_upload_without_a_working_url(find, capsys, url):
    find(url=url, uploads=[{"objectives (1).py": SOURCE}])
    printed = capsys.readouterr().out
    assert "uploaded" in printed and repr(url) in printed if url else "uploaded" in printed
    assert_objectives_are_here()


def test_a_cancelled_upload_says_what_to_do(find):
    with pytest.raises(ModuleNotFoundError, match="again.* objectives.py"):
        find(uploads=[{}])
    assert not Path("objectives.py").exists()


# Settings


@pytest.mark.parametrize(
    "name, value",
    [
        *[("EPOCHS", -1), ("EPOCHS", 2.5), ("EPOCHS", "a"), ("WIDTH", "a"), ("BATCH_SIZE", -64)],
        *[("OPTIMIZER", "foo"), ("LEARNING_RATE", -1), ("LEARNING_RATE", float("nan"))],
        ("LEARNING_RATE", "a"),
    ],
)
def test_a_wrong_setting_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must .*{value!r}"):
        resolved(**{name: value})


def test_the_parameters_cell_is_tagged_and_complete():
    tagged = [n for n, cell in CELLS.items() if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == ["parameters"]
    needed = {"DATA", "EPOCHS", "BATCH_SIZE", "LEARNING_RATE", "OPTIMIZER", "WIDTH", "SEED"}
    assert needed <= set(assigned(CODE["parameters"]))


FORMS = [name for name, source in CODE.items() if source.startswith("# @title Settings")]


@pytest.mark.parametrize("name", FORMS)
def test_settings_are_form_fields_whose_defaults_lie_in_their_bounds(name):
    lines = [line for line in CODE[name].splitlines() if not line.startswith("#")]
    assert lines
    for line in lines:
        value, field = re.fullmatch(r"[A-Z_]+ = (.+)  # @param (.+)", line).groups()
        if bounds := re.search(r"min:(\S+), max:([^,}]+)", field):
            assert float(bounds[1]) <= float(value) <= float(bounds[2])
        elif choices := re.match(r"\[.*?\]", field):
            assert ast.literal_eval(value) in json.loads(choices[0])


# Network and training loop


@pytest.mark.parametrize("objective, extra", [("supervised", 0), ("sampled", 0), ("reinforced", 1)])
def test_training_depends_on_the_seed_alone(notebook, objective, extra):
    def history(seed):
        notebook["SEED"] = seed
        return notebook["train"]("", notebook[objective], 10 + extra).history

    assert history(0) == history(0) != history(1)


def test_the_learning_rate_rises_from_zero_and_falls_back(notebook):
    rates = [notebook["learning_rate_at"](step / 1000) for step in range(1001)]
    top = rates.index(max(rates))
    assert rates[0] == 0 and abs(rates[-1]) < 1e-12 and 0 < top < 500
    assert max(rates) == pytest.approx(notebook["LEARNING_RATE"])
    assert (np.diff(rates[: top + 1]) > 0).all() and (np.diff(rates[top:]) < 0).all()


@pytest.mark.parametrize("flip", [True, False])
def test_predictions_ignore_mirroring_exactly_with_flip(notebook, flip):
    notebook["FLIP"] = flip
    images = notebook["data"].test[0]
    model = notebook["half_trained"]
    logits, mirrored = (notebook["predict"](model, x) for x in [images, images.flip(3)])
    assert logits.shape == (100, 10) and logits.dtype == torch.float32
    assert torch.allclose(logits, mirrored, atol=1e-5) == flip


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [0, 2])
def test_augmented_images_are_mirrored_and_moved_originals(notebook, flip, shift):
    notebook |= {"FLIP": flip, "SHIFT": shift}
    images = notebook["prepare"](notebook["data"].train[0][:64])
    torch.manual_seed(0)
    augmented = notebook["augment"](images)
    assert augmented.shape == images.shape and augmented.dtype == images.dtype
    inner, moves, seen = slice(2, 30), range(-shift, shift + 1), set()
    for before, after in zip(images, augmented, strict=True):
        fitting = {
            (mirror, down, right)
            for mirror in [False, True]
            for down in moves
            for right in moves
            if torch.equal(
                (before.flip(2) if mirror else before)[:, inner, inner].roll((0, 0), (1, 2)),
                after.roll((down, right), (1, 2))[:, inner, inner],
            )
        }
        assert len(fitting) == 1
        seen |= fitting
    assert {mirror for mirror, *_ in seen} == ({False, True} if flip else {False})
    for axis in [1, 2]:
        assert {move[axis] for move in seen} == set(moves)


@pytest.mark.parametrize("n_outputs", [1, 3, 17])
@pytest.mark.parametrize("width", [4, 16])
def test_the_body_gives_embeddings_and_the_head_any_number_of_outputs(notebook, n_outputs, width):
    model = notebook["SmallCNN"](n_outputs, width).eval()
    images = notebook["prepare"](notebook["data"].test[0][:5])
    embeddings = model.body(images)
    assert embeddings.shape == (5, 6 * width) and model(images).shape == (5, n_outputs)
    torch.testing.assert_close(model(images), model.head(embeddings))


def test_responses_of_the_whitening_filters_are_white(notebook):
    """Second moments of the responses: 1 each, 0 for two filters; the other half is negative."""
    images = notebook["prepare"](notebook["data"].train[0])
    filters = notebook["whitening_filters"](images, 32)
    assert filters.shape == (32, 3, 4, 4) and torch.equal(filters[16:], -filters[:16])
    responses = (
        torch.nn.functional.conv2d(images, filters[:16], stride=2).transpose(0, 1).flatten(1)
    )
    moments = responses @ responses.T / responses.shape[1]
    torch.testing.assert_close(moments, torch.eye(16), rtol=0, atol=0.02)


def test_training_leaves_the_whitening_filters_alone(notebook):
    before = notebook["STEM"].clone()
    model = notebook["train"]("", notebook["supervised"], 10).model
    assert torch.equal(model.body[0].weight, before) and torch.equal(notebook["STEM"], before)


# The committed file


def test_the_notebook_is_valid():
    nbformat.validate(json.loads(PATH.read_text("utf-8")))


def test_no_cell_is_longer_than_a_screen():
    assert {name: n for name, source in CODE.items() if (n := len(source.splitlines())) > 35} == {}


def test_the_committed_run_went_from_top_to_bottom():
    counts = [CELLS[name].execution_count for name in CODE]
    assert counts == list(range(1, len(CODE) + 1))


def test_the_committed_run_holds_every_figure():
    assert [name for name in FIGURES if not list(figures(CELLS[name]))] == []


def test_the_committed_run_is_clean():
    outputs = [output for name in CODE for output in CELLS[name].outputs]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert outputs and "error" not in {output.output_type for output in outputs}
    assert not any("widget" in kind for kind in kinds) and "widgets" not in NOTEBOOK.metadata
    assert not re.search("Warning|NOTICE|stand-in data", "\n".join(texts(CELLS.values())))


def test_the_committed_file_is_small_and_names_no_machine_path():
    everything = "\n".join([*texts(CELLS.values()), *(cell.source for cell in CELLS.values())])
    assert not re.search(r"(?<![\w.])/(work|root|tmp|home)/", everything)
    assert PATH.stat().st_size < 3e6


def test_the_notebook_compiles_as_a_script():
    script, _ = ScriptExporter().from_notebook_node(NOTEBOOK)
    compile(script, "training_objectives.py", "exec")
    assert "def train(" in script


def test_every_internal_link_has_its_anchor():
    prose = "\n".join(cell.source for cell in CELLS.values() if cell.cell_type == "markdown")
    links = set(re.findall(r"\]\(#([^)]+)\)", prose))
    assert links and links <= set(re.findall(r'<a id="([^"]+)">', prose))


# README


@pytest.fixture(scope="module")
def readme():
    return (ROOT / "README.md").read_text("utf-8")


def blocks(readme, language):
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", readme)


def test_readme_has_two_commands_and_ci_runs_the_second(readme):
    execute, test = (block.strip() for block in blocks(readme, "bash"))
    assert "\n" not in execute + test
    assert (
        "-r requirements.txt" in execute and f"--execute --output-dir runs {PATH.name}" in execute
    )
    assert test.endswith("-m pytest") and test in (ROOT / ".ci/run").read_text().splitlines()


def test_readme_python_runs(readme, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sources = blocks(readme, "python")
    assert sources
    for source in sources:
        exec(compile(source, "README.md", "exec"), {})


def test_readme_names_only_what_exists(readme):
    prose = re.sub(r"(?ms)^```.*?^```$", "", readme)
    spans = re.findall(r"`([^`\n]+)`", prose)
    code = "\n".join([*CODE.values(), (ROOT / "objectives.py").read_text("utf-8")])
    made = {line for line in (ROOT / ".gitignore").read_text().split() if line.endswith("/")}
    known, missing = set(re.findall(r"\w+", code)), set()
    for span in spans:
        name = re.match(r"(?:objectives\.)?(\w*)", span)[1]
        if re.fullmatch(r"[\w./-]+\.(py|ipynb|txt|json|toml|ini|html|md|png)|\.[\w./-]+", span):
            if not (ROOT / span).exists() and span.split("/")[0] + "/" not in made:
                missing.add(span)
        elif re.fullmatch(r"[A-Z][A-Z_]+( = .*)?|[a-z]+(_[a-z]+)+(\(.*\))?", span):
            missing |= {name} - known
    assert len(spans) > 5 and missing == set()
