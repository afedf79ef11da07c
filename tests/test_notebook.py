"""The notebook: executed from a copy with tiny settings, cell by cell in a namespace, and as the
file that is committed. Cells are addressed by their ids."""

import ast
import base64
import copy
import html
import importlib.util
import inspect
import io
import json
import linecache
import re
import socket
import statistics
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from urllib.error import URLError

import benchmark
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
SHOWS = re.compile(r"^(show|anatomy|plot_run|experiment)\(", re.MULTILINE)
FIGURES = [name for name, source in CODE.items() if SHOWS.search(source)]
EXPERIMENTS = [name for name in FIGURES if re.search(r"(?m)^experiment\(", CODE[name])]
MADE_ON_THE_SPOT = {"costs", "bias-plot", "race-plot"}  # figures that show no image data
LOADERS = ["read-image", "list-images", "load-folder", "download", "stand-in", "load-data"]
LOADERS += ["on-device"]
BEFORE_PROBE = list(CODE)[list(CODE).index("to-device") : list(CODE).index("probe")]
BEFORE_PROBE.remove("show-images")
AFTER_PROBE = ["sampled-settings", "sampled-objective", "policy-settings", "policy-objective"]
CLASSES = ["Käfer", "cat", "white dog"]  # in the order of ImageFolder
EPOCHS = 2

# Put into the copy after the cell of that id. The spy measures every figure that is open.
SPY = """
seen_figures, as_shown = [], show
def show(caption):
    for figure in map(plt.figure, plt.get_fignums()):
        figure.draw_without_rendering()  # which writes the numbers of the axes
        texts = [text for text in figure.findobj(plt.Text) if text.get_text().strip()]
        titles = [figure.get_suptitle(), *(ax.get_title() for ax in figure.axes)]
        points, inches = min(text.get_fontsize() for text in texts), figure.get_figwidth()
        seen_figures.append({"titles": titles, "points": points, "inches": inches})
    as_shown(caption)
"""
TINY = """
as_it_was = experiment
def experiment(investigate, sizes):
    n_images = 64 if investigate.__name__ == "deeper" else 200  # ResNets take their time
    few = {"EPOCHS": 1, "N_IMAGES": n_images, "N_TEST": 100}
    as_it_was(investigate, {kind: size | few for kind, size in sizes.items()})
"""
INJECTED = {
    "imports": "torch.set_num_threads(1)",  # small tensors, and the cores may be busy
    "stand-in": "make_stand_in = partial(make_stand_in, 2_000, 500)",
    "figure-helpers": SPY,
    "why-settings": "CLASS_COUNTS = [1_000, 30_000]",
    "race-settings": "RACE_CLASSES, RACE_SECONDS = 2_000, dict.fromkeys(RACE_SECONDS, 0.3)",
    "experiment": TINY,
    "results": "print(json.dumps(seen_figures))",
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
    return run(namespace, "optimizers", "resolve", "check-settings")


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

    def __init__(self, folder, data, seeds):
        self.folder, self.seeds = folder, seeds
        (folder / "objectives.py").write_bytes((ROOT / "objectives.py").read_bytes())
        notebook = copy.deepcopy(NOTEBOOK)
        settings = {"DATA": data, "EPOCHS": EPOCHS, "WIDTH": 8, "BATCH_SIZE": 32, "SEEDS": seeds}
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

    def seen_figures(self):
        """What the spy measured, by cell; each cell of a figure has shown one."""
        seen = json.loads(self.cells["injected-results"].outputs[0].text)
        return dict(zip(FIGURES, seen, strict=True))

    def results(self):
        return json.loads((self.folder / "runs" / "results.json").read_text())


def executed(folder, data, seeds):
    run = Run(folder, data, seeds)
    with run.client.setup_kernel():
        run.execute(run.cells)
        yield run


@pytest.fixture(scope="module")
def stand_in_run(tmp_path_factory):
    yield from executed(tmp_path_factory.mktemp("stand_in"), "stand-in", [0, 1])


@pytest.fixture(scope="module")
def folder_run(tmp_path_factory):
    images = save_images(tmp_path_factory.mktemp("own") / "my images")
    yield from executed(tmp_path_factory.mktemp("folder"), str(images), [0])


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
    name = any_run.results()["data"]["name"]
    for cell, figure in any_run.seen_figures().items():
        shown = "stand-in data, not CIFAR-10" if cell == "other" else name
        named = any(f"({shown})" in title for title in figure["titles"])
        assert cell in MADE_ON_THE_SPOT or named, cell
    for cell in ["table", "evidence", "verdicts"]:
        assert f"({name})" in any_run.text(cell).strip().splitlines()[0]


def assert_captions(cell):
    """Every picture has an alternative text, and right below it the same as a caption."""
    pictures = [i for i, o in enumerate(cell.outputs) if "image/png" in o.get("data", {})]
    assert pictures, cell.id
    for i in pictures:
        picture, caption = cell.outputs[i : i + 2]
        alternative = picture.metadata["image/png"]["alt"]
        assert re.fullmatch(r"[A-Z][^*\n]+\.", alternative), cell.id  # * would end the italics
        assert caption.data["text/markdown"] == f"*{alternative}*", cell.id


def test_every_figure_has_an_alternative_text_that_is_its_caption(any_run):
    for name in FIGURES:
        assert_captions(any_run.cells[name])


def test_letters_in_figures_have_eight_points_and_are_shown_in_their_size(any_run):
    """Every figure is 7 inches wide and shown 700 pixels wide, so that nothing is shrunk."""
    for name, figure in any_run.seen_figures().items():
        assert figure["points"] >= 8 and figure["inches"] == 7, (name, figure)
        for output in any_run.cells[name].outputs:
            if "image/png" in output.get("data", {}):
                assert output.metadata["image/png"]["width"] == 700, name


def test_the_bar_of_a_training_is_one_output_replaced_in_place(any_run):
    for name in ["softmax-train", "policy-train"]:
        bars = [output.data["text/plain"] for output in any_run.cells[name].outputs]
        assert len(bars) == len(any_run.seeds)
        for seed, bar in zip(any_run.seeds, bars):
            assert re.fullmatch(rf"\w+, seed {seed} 100% .* left, test accuracy \d+\.\d%", bar)
            assert len(bar) <= 90


def test_every_experiment_says_how_little_stands_behind_it(any_run):
    """In its title and below its answer; the title tells epochs, images and seeds."""
    figures, experiments = any_run.seen_figures(), any_run.results()["experiments"]
    assert len(experiments) == len(EXPERIMENTS) > 10
    n_images = min(200, any_run.results()["data"]["train"])
    for cell, (name, found) in zip(EXPERIMENTS, experiments.items(), strict=True):
        n_seeds = len({training["seed"] for training in found["trainings"]})
        images = {"deeper": 64, "other": 200}.get(cell, n_images)
        size = f"quick: 1 × {images} images, {n_seeds} seed{'s' * (n_seeds > 1)} ("
        assert any(size in title for title in figures[cell]["titles"]), name
        said = any_run.text(cell)
        assert found["answer"] in said and f"(quick: {len(found['trainings'])} trainings, " in said


def markdown_table(text):
    """The rows of the only Markdown table in a text, without its heading, as lists of cells."""
    lines = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert lines[1] == ["---", *["--:"] * (len(lines[0]) - 1)]
    assert {len(line) for line in lines} == {len(lines[0])}
    return lines[2:]


def test_memory_of_a_sparse_step_does_not_grow_with_the_classes(any_run):
    rows = markdown_table(any_run.text("costs"))
    megabytes = [[re.fullmatch(r".* ms, (.+) MB", cell)[1] for cell in row[1:]] for row in rows]
    full, dense, sparse = np.float64(megabytes).T
    assert full[1] > 10 * full[0] and dense[1] > 10 * dense[0] > 0 and sparse[1] == sparse[0] > 0


def test_more_samples_come_nearer_to_full_softmax(any_run):
    rows = markdown_table(any_run.text("bias-plot"))
    biases = np.array([[float(cell.split(" ± ")[0]) for cell in row[1:]] for row in rows])
    assert biases.shape == (5, 2) and (np.abs(biases[-1]) < 0.1 * np.abs(biases[0])).all()


def test_every_method_of_the_race_is_reported(any_run):
    lines = [line for line in any_run.text("race-plot").splitlines() if "reached 95%" in line]
    assert [line.split()[0] for line in lines] == ["full", "adaptive", "uniform", "log-uniform"]


def test_results_hold_the_whole_run(any_run):
    results = any_run.results()
    assert list(results["objectives"]) == OBJECTIVES
    for trainings in results["objectives"].values():
        assert [training["seed"] for training in trainings] == any_run.seeds
        for training in trainings:
            assert {"loss", "test_accuracy"} < set(training["history"])
            values = np.array(list(training["history"].values()))
            assert values.shape[1] == EPOCHS and np.isfinite(values).all()
            assert training["accuracy"] == training["history"]["test_accuracy"][-1]
            assert training["seconds"] > 0 and training["images_per_second"] > 0
            assert training["finished"] is True
    expected = {"EPOCHS": EPOCHS, "WIDTH": 8, "N_SAMPLES": 5, "SEEDS": any_run.seeds}
    assert results["settings"].items() >= expected.items()
    assert set(assigned(CODE["parameters"])) <= set(results["settings"])
    assert set(results["device"]) == {"type", "name", "precision"}
    assert results["versions"]["torch"] == torch.__version__
    for found in results["experiments"].values():
        assert found["answer"] and found["trainings"]
        for training in found["trainings"]:
            assert training["objective"] in OBJECTIVES and type(training["value"]) is str
            assert training["accuracy"] == training["history"]["test_accuracy"][-1]


def spread(accuracies):
    """Mean and, of several, one standard deviation of a sample, as a table prints them."""
    words = f"{statistics.mean(accuracies):.1%}"
    return f"{words} ± {statistics.stdev(accuracies):.1%}" if len(accuracies) > 1 else words


def test_the_table_shows_mean_spread_and_worst_seed(any_run):
    results, together = any_run.results(), 0
    said = any_run.text("table").strip().splitlines()
    assert f"seeds {any_run.seeds}" in said[0]
    rows = markdown_table("\n".join(said))
    for row, (name, trainings) in zip(rows, results["objectives"].items(), strict=True):
        accuracies, seconds, speeds = (
            [training[part] for training in trainings]
            for part in ["accuracy", "seconds", "images_per_second"]
        )
        together += sum(seconds)
        assert row == [
            name,
            spread(accuracies),
            f"{min(accuracies):.1%}",
            f"{statistics.mean(seconds):.1f}",
            f"{statistics.mean(speeds):,.0f}",
        ]
    assert len(rows) == 5 and said[-1] == f"All trainings together took {together:.0f} s."


def test_the_stand_in_says_so_and_is_learned(stand_in_run):
    """Labels teach at least ten standard errors above chance, on 500 images."""
    results = stand_in_run.results()
    data = results["data"]
    assert "stand-in" in data["name"] and "stand-in" in stand_in_run.text("table")
    assert (data["train"], data["test"], len(data["classes"])) == (2_000, 500, 10)
    for training in (run for name in OBJECTIVES[:3] for run in results["objectives"][name]):
        assert training["accuracy"] > 0.1 + 10 * (0.1 * 0.9 / 500) ** 0.5


def test_own_images_keep_their_classes_and_are_learned(folder_run):
    """Labels teach at least three standard errors above chance, on 60 images."""
    results = folder_run.results()
    data = results["data"]
    assert (data["name"], data["train"], data["test"]) == ("my images", 180, 60)
    assert data["classes"] == CLASSES
    for training in (run for name in OBJECTIVES[:3] for run in results["objectives"][name]):
        assert training["accuracy"] > 1 / 3 + 3 * (2 / 9 / 60) ** 0.5


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_source_of_every_objective_is_shown_without_its_docstring(stand_in_run, name):
    section = next(n for n, source in CODE.items() if f"show_source({name})" in source)
    pages = (output.data["text/html"] for output in stand_in_run.cells[section].outputs)
    sources = [html.unescape(re.sub(r"<[^>]+>", "", page)).strip() for page in pages]
    (shown,) = (source for source in sources if source.startswith(f"def {name}("))
    (function,) = ast.parse(inspect.getsource(getattr(objectives, name))).body
    del function.body[0]  # the docstring
    assert ast.unparse(ast.parse(shown)) == ast.unparse(function) and "return" in shown
    assert '"""' not in shown and f"def {name}(" not in "".join(CODE.values())


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
    first, last = (list(CODE).index(f"{section}-{part}") for part in ["source", "plot"])
    section = list(CODE)[first : last + 1]
    stand_in_run.execute([*section, "summary", "comparison", "table", "predictions", "results"])
    after = stand_in_run.results()
    assert after["settings"] == before["settings"] | {setting: value}
    for name in OBJECTIVES:
        same = after["objectives"][name] == before["objectives"][name]
        assert same == (name != objective)
    assert after["experiments"] == before["experiments"]
    for training in after["objectives"]["policy_gradient"]:
        assert ("baseline" in training["history"]) == after["settings"]["BASELINE"]


# Data


@pytest.mark.parametrize("source", ["cifar-10", "missing/folder", "", "no-train", "no-test"])
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

    shape, n_classes = (32, 32, 3), 10

    def __init__(self, root, train, download, timeout=None):
        assert download and (timeout or socket.getdefaulttimeout())
        n = (5 if train else 2) * self.n_classes
        self.targets = np.random.default_rng(train).integers(self.n_classes, size=n).tolist()
        self.data = np.zeros((n, *self.shape), np.uint8)
        self.data += np.uint8(self.targets).reshape(-1, *[1] * len(self.shape))
        self.classes = [f"class {c}" for c in range(self.n_classes)]


class FakeCIFAR100(FakeCIFAR10):
    n_classes = 100


class FakeFashionMNIST(FakeCIFAR10):
    """Grey, and in tensors; the labels are larger numbers in the middle than at the margin."""

    shape = (28, 28)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.data[:, 7:21, 7:21] += 100
        self.data, self.targets = torch.from_numpy(self.data), torch.tensor(self.targets)


FAKES = {
    "cifar10": ("CIFAR-10", FakeCIFAR10),
    "cifar100": ("CIFAR-100", FakeCIFAR100),
    "fashion-mnist": ("FashionMNIST", FakeFashionMNIST),
}


def test_what_is_downloaded_is_what_the_names_say(loaders):
    datasets = loaders["torchvision"].datasets
    assert loaders["DOWNLOADS"] == {
        "cifar10": ("CIFAR-10", datasets.CIFAR10),
        "cifar100": ("CIFAR-100", datasets.CIFAR100),
        "fashion-mnist": ("FashionMNIST", datasets.FashionMNIST),
    }


@pytest.mark.parametrize("source", FAKES)
def test_downloaded_images_keep_their_labels_when_shuffled(loaders, capsys, source):
    name, fake = loaders["DOWNLOADS"][source] = FAKES[source]
    loaders |= {"DATA": source, "DEVICE": torch.device("cpu")}
    data = run(loaders, "to-device")["data"]
    n = fake.n_classes
    assert (data.name, data.n_classes, len(data.classes)) == (name, n, n)
    for train, (images, labels) in [(True, data.train), (False, data.test)]:
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64
        assert images.shape[1:] == (3, 32, 32)
        assert images.is_contiguous(memory_format=torch.channels_last)
        expected = labels[:, None, None, None].expand_as(images).clone()
        if source == "fashion-mnist":  # two pixels of black on every side
            expected[:, :, 9:23, 9:23] += 100
            expected[:, :, [0, 1, 30, 31]] = expected[:, :, :, [0, 1, 30, 31]] = 0
        assert torch.equal(images, expected.byte())
        before = list(fake("data", train=train, download=True, timeout=1).targets)
        assert sorted(labels.tolist()) == sorted(map(int, before)) and labels.tolist() != before
    assert "NOTICE" not in capsys.readouterr().out
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("source", FAKES)
@pytest.mark.parametrize("error", [URLError("no network"), RuntimeError("corrupt"), TimeoutError()])
def test_without_a_download_one_notice_and_the_stand_in(loaders, capsys, error, source):
    def failing(*args, **kwargs):
        raise error

    name, _ = loaders["DOWNLOADS"][source]
    loaders["DOWNLOADS"][source] = name, failing
    data = loaders["load_data"](source)
    printed = capsys.readouterr().out
    assert printed.count(f"NOTICE: {name} could not be loaded") == 1 == printed.count("NOTICE")
    assert str(error) in printed and "stand-in" in printed
    assert "stand-in" in data.name and len(data.train[0]) == 40
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("source", FAKES)
def test_a_folder_of_a_download_is_used_without_one(loaders, source):
    name, _ = loaders["DOWNLOADS"][source]
    loaders["DOWNLOADS"][source] = name, None  # calling it would be a TypeError
    save_images(Path("data", source), ["cat", "dog"], 2, 1)
    data = loaders["load_data"](source)
    assert (data.name, data.classes, len(data.train[0])) == (name, ["cat", "dog"], 4)


def test_images_of_one_colour_are_not_divided_by_zero(loaders):
    """Their pixels have no spread, so the mean is all that is taken away."""
    loaders |= {"DEVICE": torch.device("cpu")}
    pixels = np.full((20, 32, 32, 3), 7, np.uint8), np.zeros(20)
    data = SimpleNamespace(train=loaders["to_device"](*pixels))
    assert loaders["mean_and_std"](data) == (7, 1)
    data.train[0][0, 0, 0, 0] = 200
    values = data.train[0].double().numpy()
    expected = values.mean(), values.std(ddof=1)
    assert loaders["mean_and_std"](data) == pytest.approx(expected, rel=1e-5)


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
        *[("LEARNING_RATE", "a"), ("SEEDS", []), ("SEEDS", [0, 0]), ("SEEDS", [-1]), ("SEEDS", 0)],
        *[("SEEDS", "a"), ("SEEDS", [1.5]), ("SEEDS", [0, True]), ("SEEDS", (0,)), ("SEEDS", None)],
        *[("EXPERIMENTS", "fast"), ("EXPERIMENTS", True), ("EXPERIMENTS", None)],
    ],
)
def test_a_wrong_setting_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be .*, got {re.escape(repr(value))}$"):
        resolved(**{name: value})


def test_the_first_seed_is_that_of_whatever_is_done_once():
    assert resolved(SEEDS=[3, 0])["SEED"] == 3


@pytest.mark.parametrize("optimizer", ["Muon", "AdamW"])
def test_an_optimizer_that_this_torch_lacks_is_refused_by_name(monkeypatch, optimizer):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    if optimizer == "AdamW":
        assert "Muon" not in resolved(OPTIMIZER=optimizer)["OPTIMIZERS"]
    else:
        with pytest.raises(ValueError, match="^OPTIMIZER must be one of AdamW, .*, got 'Muon'$"):
            resolved(OPTIMIZER=optimizer)


def test_the_parameters_cell_is_tagged_and_complete():
    tagged = [n for n, cell in CELLS.items() if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == ["parameters"]
    needed = {"DATA", "EPOCHS", "BATCH_SIZE", "LEARNING_RATE", "OPTIMIZER", "WIDTH", "SEEDS"}
    assert needed | {"EXPERIMENTS"} <= set(assigned(CODE["parameters"]))


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
        with notebook["settings"](SEED=seed):
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
    """Second moments of the responses: 1 each, 0 for two filters."""
    images = notebook["prepare"](notebook["data"].train[0])
    filters = notebook["whitening_filters"](images, 16)
    assert filters.shape == (16, 3, 4, 4)
    responses = torch.nn.functional.conv2d(images, filters, stride=2).transpose(0, 1).flatten(1)
    moments = responses @ responses.T / responses.shape[1]
    torch.testing.assert_close(moments, torch.eye(16), rtol=0, atol=0.02)


def test_training_leaves_the_whitening_filters_alone(notebook):
    before = notebook["STEM"].clone()
    model = notebook["train"]("", notebook["supervised"], 10).model
    half = before[: notebook["WIDTH"] // 2]
    assert torch.equal(model.body[0].weight, torch.cat([half, -half]))
    assert torch.equal(notebook["STEM"], before)


def test_a_network_has_the_filters_of_its_width_whatever_the_setting(notebook, tmp_path):
    """The first WIDTH / 2 components and their negatives, of 48 that patches of 4 x 4 have."""
    images = notebook["prepare"](notebook["data"].train[0][:2000])
    stems = {}
    for width in [8, 32, 128]:
        names = run(with_few_images(tmp_path, WIDTH=width), *BEFORE_PROBE)
        stems[width] = names["SmallCNN"](10, width).body[0].weight
        half = notebook["whitening_filters"](images, min(width, 96) // 2)
        torch.testing.assert_close(stems[width], torch.cat([half, -half]), rtol=0, atol=0)
        assert not stems[width].requires_grad
    for width, stem in stems.items():
        for namespace in [notebook, names]:
            assert torch.equal(namespace["SmallCNN"](10, width).body[0].weight, stem)


# Outputs of the notebook as a script


@pytest.mark.parametrize("rank", [0, 1])
def test_a_script_saves_its_figures_and_prints_their_captions(notebook, tmp_path, capsys, rank):
    """Numbered in the order in which they are shown, by one rank only, and they are closed."""
    numbers = notebook["itertools"].count(1)
    notebook |= {"RUNS": str(tmp_path / "new"), "RANK": rank, "figure_numbers": numbers}
    for caption in ["First.", "Second."]:
        figure, _ = notebook["plt"].subplots(figsize=(7, 2))
        notebook["show"](caption)
        assert not notebook["plt"].fignum_exists(figure.number)
    paths = [tmp_path / "new" / f"figure-{number}.png" for number in ["01", "02"]]
    said = f"{paths[0]}: First.\n{paths[1]}: Second.\n"
    assert capsys.readouterr().out == (said if rank == 0 else "")
    assert sorted(tmp_path.glob("*/*")) == (paths if rank == 0 else [])
    for path in tmp_path.glob("*/*"):
        assert Image.open(path).size == (1400, 400)


def test_a_script_prints_tables_in_columns_and_text_without_asterisks(notebook, capsys):
    notebook["show_table"]([{"name": "a", "share": "5%"}, {"name": "longer", "share": "100%"}])
    notebook["say"]("**1. A claim: yes.**")
    assert capsys.readouterr().out.splitlines() == [
        "name    share",
        "a          5%",
        "longer   100%",
        "1. A claim: yes.",
    ]


# Settings for a while


def test_settings_hold_inside_the_block_and_no_longer(notebook):
    before = dict(notebook)
    with notebook["settings"](EPOCHS=7, N_IMAGES=5, data="other"):
        assert (notebook["EPOCHS"], notebook["N_IMAGES"], notebook["data"]) == (7, 5, "other")
        with notebook["settings"](EPOCHS=8):
            assert notebook["EPOCHS"] == 8
        assert notebook["EPOCHS"] == 7
    assert notebook == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_settings_are_restored_after_an_error(notebook, error):
    before = dict(notebook)
    with pytest.raises(error), notebook["settings"](EPOCHS=7, WIDTH=1):
        raise error
    assert notebook == before


def test_an_unknown_setting_is_named_and_none_is_set(notebook):
    before = dict(notebook)
    with pytest.raises(NameError, match="^there is no setting called EPOCH, WITH$"):
        with notebook["settings"](WITH=1, EPOCHS=7, EPOCH=1):
            pytest.fail("the block ran")
    assert notebook == before


@pytest.mark.parametrize("n_images, n_test", [(100, 50), (None, 1), (400, 100)])
def test_training_takes_the_first_images_and_tests_on_the_first(notebook, n_images, n_test):
    """Others do not matter: their labels can be anything, and every batch is of the first."""
    seen = []

    def spying(model, images, labels):
        seen.append(labels)
        return notebook["supervised"](model, images, labels)

    notebook |= {"N_IMAGES": n_images, "N_TEST": n_test, "EPOCHS": 1}
    trained = notebook["train"]("", spying, 10)
    data = notebook["data"]
    expected = data.train[1][:n_images]
    assert torch.equal(torch.cat(seen).sort().values, expected.sort().values)
    right = notebook["classify"](trained.model, data.test[0]) == data.test[1]
    assert trained.accuracy == pytest.approx(right[:n_test].float().mean().item())
    assert trained.images_per_second == pytest.approx(len(expected) / trained.seconds)


# Muon


needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch 2.9 has Muon")


@needs_muon
def test_a_step_of_muon_is_that_of_torch_on_the_matrices_and_of_adamw_on_the_rest(notebook):
    """One row for each output channel; the step size may change from step to step."""
    torch.manual_seed(0)
    model = notebook["SmallCNN"](10, 8).to(memory_format=torch.channels_last)
    learned = [p for p in model.parameters() if p.requires_grad]
    ours = notebook["OPTIMIZERS"]["Muon"](learned, lr=0.01)
    as_matrix = lambda t: t.permute(0, 2, 3, 1).flatten(1).clone()  # noqa: E731
    twins = [
        torch.nn.Parameter(as_matrix(p.detach()) if p.ndim == 4 else p.detach().clone())
        for p in learned
    ]
    kernels = [p for p in learned if p.ndim == 4]
    assert len(kernels) == 3 and len(learned) > 8
    matrices = [twin for p, twin in zip(learned, twins) if p.ndim == 4]
    rest = [twin for p, twin in zip(learned, twins) if p.ndim != 4]
    options = {"lr": 0.01, "weight_decay": 0.05}
    references = [
        torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **options),
        torch.optim.AdamW(rest, **options),
    ]
    for rate in [0.01, 0.03, 0.002]:
        for p, twin in zip(learned, twins):
            p.grad = torch.randn_like(p)
            twin.grad = as_matrix(p.grad) if p.ndim == 4 else p.grad.clone()
        before = [p.detach().clone() for p in learned]
        ours.param_groups[0]["lr"] = rate
        ours.step()
        for reference in references:
            reference.param_groups[0]["lr"] = rate
            reference.step()
        for p, twin, old in zip(learned, twins, before):
            torch.testing.assert_close(as_matrix(p) if p.ndim == 4 else p, twin)
            assert not torch.equal(p, old)
        for kernel, matrix in zip(kernels, ours.matrices, strict=True):
            assert matrix.data_ptr() == kernel.data_ptr()
            assert torch.equal(matrix, as_matrix(kernel))


@needs_muon
@pytest.mark.parametrize("network", ["SmallCNN", "ResNet18"])
def test_networks_are_trained_with_muon(notebook, network):
    """Every learned parameter moves, and the loss of the second epoch is below the first's."""
    notebook |= {"OPTIMIZER": "Muon", "N_IMAGES": 128, "N_TEST": 20, "STEM_STRIDE": 4}
    notebook["NETWORK"] = run(notebook, "resnet")[network]
    torch.manual_seed(notebook["SEED"])
    first = dict(notebook["NETWORK"](10, 8).named_parameters())
    trained = notebook["train"]("", notebook["supervised"], 10)
    for name, p in trained.model.named_parameters():
        assert p.isfinite().all() and torch.equal(p, first[name]) != p.requires_grad, name
    assert trained.history["loss"][1] < trained.history["loss"][0]


# The benchmark


def test_the_benchmark_finds_its_cells():
    """It takes one training step of the network and the race from the notebook."""
    with one_thread():
        benchmark.network_step(8, 10, "cpu")()
        case = {"threads": 1, "method": "uniform", "limit": 0.01}
        seconds, accuracy = benchmark.measure_race(case)[-1]
        assert seconds >= 0.01 and 0 <= accuracy <= 1


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


def test_every_figure_of_the_committed_run_has_an_alternative_text_that_is_its_caption():
    for name in FIGURES:
        assert_captions(CELLS[name])


def test_the_committed_run_is_clean():
    outputs = [output for name in CODE for output in CELLS[name].outputs]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert outputs and "error" not in {output.output_type for output in outputs}
    assert not any("widget" in kind for kind in kinds) and "widgets" not in NOTEBOOK.metadata
    assert not re.search("Warning|NOTICE", "\n".join(texts(CELLS.values())))
    elsewhere = [cell for name, cell in CELLS.items() if name != "other"]  # the tenth experiment
    assert "stand-in data" not in "\n".join(texts(elsewhere))


def test_the_committed_file_names_no_machine_path():
    everything = "\n".join([*texts(CELLS.values()), *(cell.source for cell in CELLS.values())])
    assert not re.search(r"(?<![\w.])/(work|root|tmp|home)/", everything)


def test_the_committed_file_is_smaller_than_three_megabytes():
    assert 0 < PATH.stat().st_size < 3e6


def test_the_notebook_compiles_as_a_script():
    script, _ = ScriptExporter().from_notebook_node(NOTEBOOK)
    compile(script, "training_objectives.py", "exec")
    assert "def train(" in script


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
