"""The notebook run whole, by papermill, without a network; the stored run; each section alone.

The other tests take their helpers from here: `notebook` executes the notebook's cells, found by
their ids, in a namespace with tiny settings, so that a test can call its functions.
"""

import ast
import functools
import importlib
import itertools
import json
import linecache
import os
import re
import subprocess
import sys
from importlib.machinery import PathFinder
from io import BytesIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from urllib.error import URLError
from urllib.parse import quote

import matplotlib
import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PATH = ROOT / "training_objectives.ipynb"
NOTEBOOK = nbformat.read(PATH, as_version=4)
README = (ROOT / "README.md").read_text()
CELLS = {cell.id: cell for cell in NOTEBOOK.cells}
CODE = {name: cell.source for name, cell in CELLS.items() if cell.cell_type == "code"}
OBJECTIVES = ["softmax_cross_entropy", "teacher_student", "sampled_softmax"]
OBJECTIVES += ["value_function", "policy_gradient"]
FIRST_TRAINING, LAST_OF_SETUP = "first", "all-five"
SETUP = list(CODE)[: list(CODE).index(LAST_OF_SETUP) + 1]
TINY = {"DATA": "stand-in", "EPOCHS": 1, "BATCH_SIZE": 64, "WIDTH": 2, "N_IMAGES": 200}
FEW_IMAGES = "stand_in = partial(stand_in, 300, 100)"
QUICK = "CLASS_COUNTS = [1_000, 30_000]", "RACE_CLASSES = 2_000", "SAMPLE_COUNTS = [1, 100]"
QUICK += ("RACE_SECONDS = {m: 0.2 for m in ['full', 'adaptive', 'uniform', 'log-uniform']}",)
# Whatever is sent to another host ends at a port where nobody answers.
NO_NETWORK = {f"{kind}_proxy": "http://127.0.0.1:9" for kind in ["http", "https", "all"]}
NO_NETWORK |= {"no_proxy": "localhost,127.0.0.1"}

matplotlib.use("Agg")


# Helpers


class Shown(list):
    """In the place of display: what was displayed, as objects of IPython."""

    def __call__(self, thing, display_id=False):
        self.append(thing)
        return SimpleNamespace(update=self.append)

    def texts(self):
        return [thing.data for thing in self if isinstance(getattr(thing, "data", None), str)]

    def figures(self):
        """{alternative text: pixels}"""
        pictures = [thing for thing in self if isinstance(getattr(thing, "data", None), bytes)]
        return {p.metadata["alt"]: np.asarray(Image.open(BytesIO(p.data))) for p in pictures}

    def tables(self):
        return [text for text in self.texts() if text.startswith("| ")]


def quick(source):
    """A cell's source, with less to do where it lasts long whatever the settings."""
    names = {line.split(" = ")[0]: line for line in QUICK}
    for name, line in names.items():
        source = re.sub(rf"(?m)^{name} = .*$", line, source)
    return source.replace("Config(epochs=2, ", "Config(epochs=1, width=2, ")


files = (f"<cell {n}>" for n in itertools.count())


def execute(namespace, source):
    """Execute it like a cell, so that inspect.getsource finds it."""
    file = next(files)
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    exec(compile(source, file, "exec"), namespace)


def run(namespace, *names):
    """Execute the cells of these ids."""
    for name in names:
        execute(namespace, quick(CODE[name]))
        if name == "device":
            namespace |= {"DEVICE": torch.device("cpu"), "GPU": False, "PRECISION": torch.float32}
        if name == "imports":
            namespace["display"] = Shown()
            torch.set_num_threads(1)  # small tensors, and the cores may be busy
        if name == "parameters":
            namespace |= namespace["settings_of_the_test"]
        if name == "stand-in":
            execute(namespace, FEW_IMAGES)
    return namespace


def notebook(folder, last=LAST_OF_SETUP, without=("show-images",), **settings):
    """The names after the cells up to one of the set-up; finished trainings go to the folder."""
    settings = TINY | {"RUNS": str(folder)} | settings
    names = list(CODE)[: list(CODE).index(last) + 1]
    namespace = {"__name__": "__main__", "settings_of_the_test": settings}
    return run(namespace, *[name for name in names if name not in without])


def view(namespace):
    return SimpleNamespace(**namespace)


def sections(levels):
    """{heading: ids of the code cells below it}, for headings of these levels."""
    found, heading = {}, None
    for name, cell in CELLS.items():
        if cell.cell_type == "code":
            found.setdefault(heading, []).append(name)
        elif headings := re.findall(rf"(?m)^#{{{levels}}} (.+)$", cell.source):
            heading = headings[-1]
    return found


AFTER_SETUP = {
    heading: names for heading, names in sections("2").items() if not {*names} & {*SETUP}
}
EXPERIMENTS = {
    heading: names
    for heading, names in sections("2,3").items()
    if re.match(r"\d+\. ", heading or "")
}


# The whole run


def saved_texts(cells):
    """All text in the outputs of cells."""
    for output in (output for cell in cells for output in cell.get("outputs", [])):
        yield output.get("text", "")
        yield from output.get("traceback", [])
        for kind, value in output.get("data", {}).items():
            if not kind.startswith("image/"):
                yield json.dumps(value, ensure_ascii=False)


def check_run(cells):
    """What holds for every notebook that ran from top to bottom."""
    code = [cell for cell in cells if cell.cell_type == "code" and cell.source.strip()]
    outputs = [(cell.get("id"), output) for cell in code for output in cell.outputs]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    bad = [
        (name, o) for name, o in outputs if o.output_type == "error" or o.get("name") == "stderr"
    ]
    assert bad == []
    assert [name for name, o in outputs if "widget" in "".join(o.get("data", {}))] == []
    figures = [(name, o) for name, o in outputs if "image/png" in o.get("data", {})]
    assert len(figures) > 20
    assert [name for name, o in figures if len(o.metadata["image/png"].get("alt", "")) < 20] == []
    everything = "\n".join(text for text in saved_texts(code) if "```python" not in text)
    assert re.findall(r".*(?:Warning|NaN|\bnan\b|W\d{4} ).*", everything) == []
    return everything, [o.metadata["image/png"]["alt"] for _, o in figures]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder, the cells and the results of a run where nothing can be downloaded."""
    folder = tmp_path_factory.mktemp("whole")
    copy = nbformat.from_dict(json.loads(json.dumps(NOTEBOOK)))
    for cell in copy.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count, cell.source = [], None, quick(cell.source)
        if cell.id == "stand-in":
            cell.source += f"\n{FEW_IMAGES}"
    nbformat.write(copy, folder / PATH.name)
    (folder / "objectives.py").write_bytes((ROOT / "objectives.py").read_bytes())
    command = [sys.executable, "-m", "papermill", PATH.name, "out.ipynb", "--log-output"]
    for name, value in {"N_IMAGES": 200, "WIDTH": 2, "EPOCHS": 1, "BATCH_SIZE": 64}.items():
        command += ["-p", name, str(value)]
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    alone |= (
        {"OMP_NUM_THREADS": "1"}
        | NO_NETWORK
        | {name.upper(): value for name, value in NO_NETWORK.items()}
    )
    alone |= {"CUDA_VISIBLE_DEVICES": "", "IPYTHONDIR": str(folder / "ipython")}
    done = subprocess.run(command, cwd=folder, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    cells = nbformat.read(folder / "out.ipynb", as_version=4).cells
    results = json.loads((folder / "runs" / "results.json").read_text())
    return SimpleNamespace(folder=folder, cells=cells, results=results)


def test_the_notebook_runs_headless_from_top_to_bottom(whole):
    check_run(whole.cells)
    assert len(whole.cells) == len(CELLS) + 1  # the injected parameters


def test_without_a_download_one_notice_and_a_stand_in_that_is_called_one(whole):
    text, titles = check_run(whole.cells)
    assert text.count("NOTICE") == 1
    assert sum("stand-in" in title for title in titles) > 18
    assert not [title for title in titles if "CIFAR" in title]
    (name,) = {run["data"] for run in whole.results}
    assert "stand-in" in name


def test_results_hold_every_training_with_all_that_made_it(whole):
    saved = {path.name for path in (whole.folder / "runs").glob("*.pt")} - {"images.pt"}
    assert len(whole.results) == len(saved) > 80
    for result in whole.results:
        config = result["config"]
        assert len(result["history"]) == config["epochs"] and config["seed"] >= 0
        assert config["width"] > 0 and isinstance(config["network"], str)
        assert isinstance(result["settings"], dict) and result["stopped"] == ""
        assert result["accuracy"] == result["history"][-1]["test_accuracy"]
    assert {*OBJECTIVES} < {result["objective"] for result in whole.results}
    taught = [r for r in whole.results if r["objective"] == "teacher_student"]
    assert all(isinstance(r["settings"]["teacher"], str) for r in taught)


def test_settings_that_papermill_injects_count_in_every_training(whole):
    configs = [result["config"] for result in whole.results]
    assert {config["width"] for config in configs} == {2, 1}  # 1: the smaller student
    assert {config["batch_size"] for config in configs} == {64}
    assert {config["n_images"] for config in configs} == {200, 12_800}  # of half trained ones


# The stored run


def test_the_stored_run_is_one_clean_run():
    text, titles = check_run(NOTEBOOK.cells)
    assert "NOTICE" not in text and sum("CIFAR10" in title for title in titles) > 18


def test_the_stored_file_names_no_path_of_a_machine():
    sources = "\n".join(cell.source for cell in NOTEBOOK.cells)
    everything = "\n".join([sources, *saved_texts(NOTEBOOK.cells), json.dumps(NOTEBOOK.metadata)])
    paths = re.findall(r".*/(?:work|root|home|tmp|usr|Users)/.*", everything)
    assert [path for path in paths if "github.com" not in path] == []
    assert "widgets" not in NOTEBOOK.metadata and "papermill" not in NOTEBOOK.metadata
    assert not [cell.id for cell in NOTEBOOK.cells if {"papermill", "execution"} & {*cell.metadata}]
    assert not [cell.id for cell in NOTEBOOK.cells if "injected" in str(cell.metadata)]


def functions(source):
    """{name: its code without documentation}, as a tree"""
    found = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    for node in found:
        node.body = node.body[ast.get_docstring(node) is not None :]
    return {node.name: ast.dump(node) for node in found}


def test_sources_in_the_stored_run_are_those_of_the_module_and_the_notebook():
    text = "\n".join(
        output.get("data", {}).get("text/markdown", "")
        for cell in NOTEBOOK.cells
        for output in cell.get("outputs", [])
    )
    known = (
        functions((ROOT / "objectives.py").read_text()).items() | functions(CODE["five"]).items()
    )
    shown = [functions(code) for code in re.findall(r"(?ms)^```python\n(.*?)\n```$", text)]
    assert len(shown) >= 9 and all(source.items() <= known for source in shown)
    assert {*OBJECTIVES} <= {name for source in shown for name in source}


OTHER_RUNS = ["A million classes", "The recipe"]  # quote the benchmark and earlier networks


def rows(text):
    """The cells of the rows of Markdown tables."""
    lines = re.findall(r"(?m)^\|(.+)\|$", text)
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def test_prose_and_readme_quote_numbers_of_the_stored_run():
    """Every mean with its spread, and every percentage with a decimal."""
    displayed, titles = check_run(NOTEBOOK.cells)
    known = "\n".join([displayed, *titles])
    prose = [cell.source for cell in NOTEBOOK.cells if cell.cell_type == "markdown"]
    prose += [s for s in README.split("\n## ") if s.split("\n")[0] not in OTHER_RUNS]
    pattern = r"\d+\.\d ± \d+\.\d|(?<![±\d.] )\b\d+\.\d(?= %)|\b\d+\.\d(?=, \d+\.\d)"
    quoted = re.findall(pattern, "\n".join(prose))
    missing = [n for n in quoted if not re.search(rf"(?<![\d.]){n}(?!\d)", known)]
    assert len(quoted) > 40 and missing == []


def test_the_main_table_of_readme_is_that_of_the_stored_run():
    (output,) = [o for o in CELLS["comparison"].outputs if "text/markdown" in o.get("data", {})]
    stored = [row for row in rows(output.data["text/markdown"]) if row[0] in OBJECTIVES]
    quoted = [row for row in rows(README) if row[0].strip("`") in OBJECTIVES]
    assert len(stored) == 5
    assert [[row[0].strip("`"), *row[2:]] for row in quoted] == stored


def test_figures_stored_and_attached_have_alternative_texts():
    for cell in NOTEBOOK.cells:
        for alt, source in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", cell.source):
            assert len(alt) > 8 and "_" not in alt, cell.id
            if source.startswith("attachment:"):
                assert len(alt) > 80
                assert source.removeprefix("attachment:") in cell.get("attachments", {}), cell.id
        named = re.findall(r"attachment:([^)\s]+)", cell.source)
        assert {*named} == {*cell.get("attachments", {})}


def test_a_reader_finishes_the_notebook():
    """The limits of its weight."""
    lines = {name: code_lines(source) for name, source in CODE.items()}
    before = list(CODE).index(FIRST_TRAINING)
    prose = [cell.source for cell in NOTEBOOK.cells if cell.cell_type == "markdown"]
    definitions = [
        node
        for source in CODE.values()
        for node in ast.walk(ast.parse(without_magics(source)))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]
    assert len(NOTEBOOK.cells) <= 130 and len(CODE) <= 85 and len(definitions) <= 75
    assert sum(lines.values()) <= 1000 and sum([*lines.values()][:before]) <= 230
    assert len(" ".join(prose).split()) <= 5000
    assert len(README.split()) <= 1500
    assert not re.findall(r"\b(TODO|FIXME|[A-Z]{3,}_[A-Z]{3,}$)", "\n".join(prose), re.MULTILINE)
    assert PATH.stat().st_size < 3e6


def without_magics(source):
    return "\n".join("" if line[:1] in "!%" else line for line in source.split("\n"))


def code_lines(source):
    """How many lines are neither blank nor comments nor docstrings."""
    docs = [
        node.body[0]
        for node in ast.walk(ast.parse(without_magics(source)))
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node)
    ]
    doc_lines = {n for doc in docs for n in range(doc.lineno, doc.end_lineno + 1)}
    lines = enumerate(source.split("\n"), 1)
    return sum(bool(s.strip()) and s.strip()[0] != "#" and n not in doc_lines for n, s in lines)


# Every section alone


@pytest.fixture(scope="module")
def set_up(tmp_path_factory):
    """A function that brings a namespace to the end of the set-up; all share their trainings."""
    folder = tmp_path_factory.mktemp("sections")
    return functools.partial(notebook, folder)


@pytest.mark.parametrize("section", AFTER_SETUP)
def test_every_section_runs_alone_after_the_set_up(set_up, section, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = set_up()
    apart = {name for names in EXPERIMENTS.values() for name in names}
    apart |= {name for name, source in CODE.items() if re.search(r"(?m)^[%!]", source)}
    if section == "Side by side":  # of what has been trained
        with pytest.raises(AssertionError, match="run a section first"):
            run(namespace, "comparison")
        run(namespace, "softmax-train", "value-settings", "value-train")
    run(namespace, *[name for name in AFTER_SETUP[section] if name not in apart])
    assert all(pixels.std() > 5 for pixels in namespace["display"].figures().values())


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_runs_alone_after_the_set_up(set_up, experiment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = set_up(N_IMAGES=64)
    before = len(namespace["display"].figures())
    run(namespace, *EXPERIMENTS[experiment])
    figures = namespace["display"].figures()
    assert len(figures) > before and all("stand-in" in title for title in figures)


# Finding objectives.py


GOOD = (ROOT / "objectives.py").read_bytes()
WEB_PAGE = b"<!DOCTYPE html>\n<html><body>objectives.py</body></html>"
OTHER_MODULE = b"def softmax_cross_entropy(logits, labels):\n    return 0\n"
RAW = "https://raw.githubusercontent.com/"


class Upload:
    """Colab's google.colab.files: it saves what is chosen, under a name of its own."""

    def __init__(self, *chosen):
        self.chosen, self.asked = list(chosen), 0

    def upload(self):
        self.asked += 1
        files = self.chosen.pop(0) if self.chosen else {}
        for name, content in files.items():
            Path(name).write_bytes(content)
        return files


@pytest.fixture
def colab(monkeypatch, tmp_path):
    """A Colab without objectives.py, in an empty folder; its sessions and the web can be set."""
    find_spec = importlib.util.find_spec
    here = SimpleNamespace(web={}, asked=[], sessions=[], upload=Upload(), folder=tmp_path)

    def urlopen(url, timeout):
        if url == "http://127.0.0.1:9000/api/sessions":
            assert timeout <= 3
            return BytesIO(json.dumps(here.sessions).encode())
        here.asked.append(url)
        if url not in here.web:
            raise ValueError("unknown url type: ''") if not url else URLError("not found")
        return BytesIO(here.web[url])

    def find(name, *args):
        importlib.invalidate_caches()
        return PathFinder.find_spec(name, ["."]) if name == "objectives" else find_spec(name, *args)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    monkeypatch.setattr("importlib.util.find_spec", find)
    monkeypatch.setenv("COLAB_JUPYTER_IP", "127.0.0.1")
    monkeypatch.setattr("ipykernel.get_connection_file", lambda: "/run/kernel-aa-11.json")
    module = ModuleType("google.colab")
    module.files = here.upload
    monkeypatch.setitem(sys.modules, "google", ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", module)
    return here


def session(kernel, **names):
    return {"id": "s", "kernel": {"id": kernel, "name": "python3"}, "type": "notebook"} | names


def file_id(repository, ref, file="training_objectives.ipynb"):
    return "fileId=" + quote(f"https://github.com/{repository}/blob/{ref}/{file}", safe="")


def find_objectives(url=""):
    execute({"__name__": "__main__"}, CODE["find-objectives"].replace('URL = ""', f"URL = {url!r}"))


@pytest.mark.parametrize("where", ["path", "name", "notebook.path"])
@pytest.mark.parametrize("ref", ["main", "v1.2/lessons", "0a1b2c"])
def test_colab_downloads_from_the_repository_that_the_notebook_came_from(colab, capsys, where, ref):
    ours, theirs = file_id("me/five-ways", ref), file_id("someone/else", "main")
    names = {"notebook": {"path": ours}} if where == "notebook.path" else {where: ours}
    colab.sessions += [session("bb-22", path=theirs), session("aa-11", **names)]
    colab.web[f"{RAW}me/five-ways/{ref}/objectives.py"] = GOOD
    find_objectives()
    assert (colab.folder / "objectives.py").read_bytes() == GOOD
    assert colab.asked == [f"{RAW}me/five-ways/{ref}/objectives.py"]
    find_objectives()  # is there now
    assert len(colab.asked) == 1 and colab.upload.asked == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-2:] == ["objectives.py: downloaded", "objectives.py: found"]


@pytest.mark.parametrize("sessions", [[], [session("bb-22", path=file_id("a/b", "main"))]])
def test_colab_falls_back_to_the_address_in_the_form(colab, sessions):
    colab.sessions += sessions
    colab.web["https://example.org/objectives.py"] = GOOD
    find_objectives("https://example.org/objectives.py")
    assert (colab.folder / "objectives.py").read_bytes() == GOOD and colab.upload.asked == 0


@pytest.mark.parametrize("name", ["objectives.py", "objectives (1).py"])
@pytest.mark.parametrize("wrong", [WEB_PAGE, OTHER_MODULE, b"\0\0", b"\xff\xfe"])
def test_colab_falls_back_to_an_upload_and_leaves_nothing_wrong_behind(colab, name, wrong):
    colab.sessions.append(session("aa-11", path=file_id("me/five-ways", "main")))
    colab.web[f"{RAW}me/five-ways/main/objectives.py"] = wrong
    colab.web["https://example.org/"] = wrong
    colab.upload.chosen += [{name: wrong}, {name: GOOD}]
    with pytest.raises((SyntaxError, ValueError)):
        find_objectives("https://example.org/")
    assert list(colab.folder.iterdir()) == []
    find_objectives("https://example.org/")
    assert [p.name for p in colab.folder.iterdir()] == ["objectives.py"]
    assert (colab.folder / "objectives.py").read_bytes() == GOOD


def test_a_module_that_lacks_objectives_is_named_with_what_it_lacks(colab):
    (colab.folder / "objectives.py").write_bytes(OTHER_MODULE)
    with pytest.raises(SyntaxError, match="does not define policy_gradient, sampled_softmax"):
        find_objectives()


def test_a_cancelled_upload_says_what_to_do(colab):
    with pytest.raises(ModuleNotFoundError, match="run this cell again"):
        find_objectives()


def test_outside_colab_a_message_says_where_objectives_belong(colab, monkeypatch):
    monkeypatch.delitem(sys.modules, "google.colab")
    with pytest.raises(ModuleNotFoundError, match=re.escape(str(colab.folder))):
        find_objectives()
    assert colab.asked == []
