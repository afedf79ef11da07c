"""The stored page, its text, how it finds objectives.py, and the notebook run as a whole."""

import ast
import json
import os
import re
import subprocess
import symtable
import sys
from collections import Counter
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from urllib.error import URLError
from urllib.parse import quote

import nbformat
import numpy as np
import pandas as pd
import pytest
from notebook import (
    CODE,
    MARKDOWN,
    NOTEBOOK,
    PATH,
    README,
    ROOT,
    Shown,
    cells_defining,
    execute,
    globals_inside,
    globals_of,
    run_cells,
    shared_cells,
    with_values,
    without_code,
)
from PIL import Image

FIVE = ["softmax cross-entropy", "teacher-student", "sampled softmax"]
FIVE += ["value function", "policy gradient"]
COMMANDS = re.findall(r"(?s)```bash\n(.*?)\n```", README)


def run(*command, **options):
    """Run a program of this Python, which must succeed, and return what it prints."""
    command = [sys.executable, "-m", *map(str, command)]
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


# The stored page, and a run of today


def texts_of(output):
    """All text in an output."""
    yield output.get("text", "")
    yield from output.get("traceback", [])
    for kind, value in output.get("data", {}).items():
        if kind.startswith("text/"):
            yield value


def check_page(notebook):
    """What holds for every notebook that ran from top to bottom. Returns the titles of figures."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    titles = []
    for output in [output for cell in code for output in cell.outputs]:
        assert output.output_type != "error" and output.get("name") != "stderr", output
        assert {*output.get("data", {})} <= {"text/plain", "text/html", "image/png"}, output
        text = "\n".join(texts_of(output))
        assert not re.search(r"Warning|\bnan\b|NaN|-0\.0+\b", text), text
        if "image/png" in output.get("data", {}):
            about = output.metadata["image/png"]
            assert len(about["alt"]) > 20 and about["width"] > 0 and about["height"] > 0
            titles.append(about["alt"])
    assert len(titles) > 20
    assert "widgets" not in notebook.metadata
    return titles


def test_the_stored_page_is_one_clean_run():
    check_page(NOTEBOOK)
    assert "papermill" not in NOTEBOOK.metadata
    assert not [cell.id for cell in NOTEBOOK.cells if "papermill" in cell.metadata]


def test_the_stored_page_names_no_path_of_a_machine():
    texts = [cell.source for cell in NOTEBOOK.cells]
    texts += [t for cell in CODE for output in cell.outputs for t in texts_of(output)]
    pattern = r".*(?:/(?:work|root|home|tmp|Users|site-packages)/|\b[A-Z]:\\).*"
    assert re.findall(pattern, "\n".join(texts)) == []


QUICK = {"CLASS_COUNTS": [1_000, 30_000], "N_DRAWS": 20, "READ_EVERY": 40, "RACE_SECONDS": 0.5}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder and the notebook after README's command, with tiny settings."""
    folder = tmp_path_factory.mktemp("whole")
    copy = nbformat.from_dict(json.loads(json.dumps(NOTEBOOK)))
    for cell in copy.cells:
        if cell.cell_type == "code":
            cell.source = with_values(cell.source, QUICK)
    nbformat.write(copy, folder / "training_objectives.ipynb")
    (folder / "objectives.py").write_bytes((ROOT / "objectives.py").read_bytes())
    (folder / "runs").mkdir()
    arguments = re.search(r"/papermill (.*?) &&", COMMANDS[0])[1].split()
    for name, value in {"N_IMAGES": 200, "WIDTH": 8, "EPOCHS": 1, "BATCH_SIZE": 64}.items():
        arguments += ["-p", name, value]
    arguments += ["-p", "DATA", "stand-in"]
    alone = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "FULL")
    }
    alone |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run("papermill", *arguments, cwd=folder, env=alone)
    return folder, nbformat.read(folder / arguments[1], as_version=4)


def test_the_notebook_runs_headless_from_top_to_bottom(whole):
    _, notebook = whole
    titles = check_page(notebook)
    assert not [title for title in titles if "CIFAR" in title and "stand-in" in title]
    assert sum("stand-in" in title for title in titles) > 12


def test_the_whole_run_leaves_a_table_of_all_its_training_runs(whole):
    folder, _ = whole
    runs = pd.read_csv(folder / "runs" / "training_runs.csv")
    assert {*FIVE} < {*runs.loc[runs["experiment"] == "the lesson", "objective"]}
    assert runs["experiment"].nunique() > 10 and "a log" in set(runs["experiment"])
    assert np.isfinite(runs[["seed", "epoch", "train_loss"]]).all(axis=None)
    last = runs.groupby(["experiment", "variant", "key"], dropna=False).tail(1)
    assert np.isfinite(last["accuracy"]).all()


# Its text


PROSE = without_code("\n\n".join(cell.source for cell in MARKDOWN))
HEADINGS = re.findall(r"(?m)^(#+) (.+)$", PROSE)


def test_links_of_the_contents_lead_to_the_one_heading_of_that_name():
    anchors = Counter(heading.strip().replace(" ", "-") for _, heading in HEADINGS)
    links = re.findall(r"\]\(#([^)]+)\)", PROSE)
    assert len(links) > 15 and [link for link in links if anchors[link] != 1] == []


def test_headings_begin_with_the_title_and_skip_no_level():
    levels = [len(marks) for marks, _ in HEADINGS]
    assert levels[0] == 1
    assert all(below <= above + 1 for above, below in pairwise(levels))


def test_markdown_is_plain():
    """Headings and anchors in HTML are shown as text where a page is sanitised."""
    assert {*re.findall(r"</?([A-Za-z][A-Za-z0-9]*)\b[^<>$]*>", PROSE)} <= {"details", "summary"}
    for alt, source in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", PROSE):
        assert len(alt) > 8, source


def test_no_backslash_stands_before_punctuation():
    r"""GitHub takes it away before it sets an equation, as in \, \; \! \{ and \_."""
    assert re.findall(r".*\\[!-/:-@\[-`{-~].*", PROSE) == []


def test_the_commands_of_readme_are_those_that_ci_runs():
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    assert len(COMMANDS) == 2
    assert COMMANDS[1] in (ROOT / ".ci" / "run").read_text() and "run: .ci/run" in workflow


def test_readme_names_only_files_that_exist():
    for name in re.findall(r"`((?:tests/)?[\w.]+\.(?:py|ipynb|txt|md))`", README):
        assert (ROOT / name).exists() or name == "several_devices.py", name
    for target in re.findall(r"\]\(([^)#\s]+)\)", README):
        assert "://" in target or (ROOT / target).exists(), target


# Its code


def test_as_a_script_it_is_plain_python(tmp_path):
    run("nbconvert", "--to", "script", "--output-dir", tmp_path, PATH)
    (script,) = tmp_path.iterdir()
    source = script.read_text(encoding="utf-8")
    compile(source, script.name, "exec")
    assert script.suffix == ".py" and not re.search(r"get_ipython\(\)\.(run|system|getout)", source)


def test_what_a_function_reads_is_defined_by_one_cell_only():
    """Otherwise it would depend on which cells ran last. Lambdas and comprehensions run at once."""
    cells = {}
    readers = {}
    for number, cell in enumerate(CODE):
        table = symtable.symtable(cell.source, "cell", "exec")
        for symbol in table.get_symbols():
            if symbol.is_assigned() and not symbol.is_imported():
                cells.setdefault(symbol.get_name(), set()).add(number)
        for scope in table.get_children():
            if scope.get_name() not in ("lambda", "genexpr", "listcomp", "setcomp", "dictcomp"):
                for name in globals_inside(scope) | globals_of(scope):
                    readers.setdefault(name, []).append(scope.get_name())
    assert {name: readers[name] for name in readers if len(cells.get(name, [])) > 1} == {}


def test_requirements_name_every_package_that_is_imported():
    sources = [cell.source for cell in CODE] + [(ROOT / "objectives.py").read_text("utf-8")]
    imported = set()
    for node in [node for source in sources for node in ast.walk(ast.parse(source))]:
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    listed = {*re.findall(r"(?m)^([\w-]+)", (ROOT / "requirements.txt").read_text())}
    with_jupyter = {"IPython", "ipykernel", "ipywidgets"}
    names = {"pillow" if name == "PIL" else name for name in imported - with_jupyter}
    assert names - {*sys.stdlib_module_names} - listed == {"objectives", "google"}


def test_type_hints_of_the_module_are_complete_and_consistent(tmp_path):
    pytest.importorskip("mypy")
    run("mypy", "--strict", "--cache-dir", tmp_path, ROOT / "objectives.py")


# After changes that a reader makes


SIDE_BY_SIDE = ["plot_side_by_side", "epochs_to", "plot_disagreements"]


def titles_of(shown):
    return [thing.metadata["alt"] for thing in shown if getattr(thing, "metadata", None)]


def side_by_side(space):
    """Run the cells of the section again: their figures' titles and the table."""
    space.shown.clear()
    for cell in cells_defining(*SIDE_BY_SIDE):
        execute(space, cell.source)
    (table,) = [thing for thing in space.shown if isinstance(thing, pd.DataFrame)]
    return titles_of(space.shown), table


def test_an_objective_of_the_readers_own_is_taken_up_everywhere():
    """One function and one line; its name, metric and gradient are like no other's."""
    space = run_cells(*SIDE_BY_SIDE, "train_objectives", "show_comparison", "lab_data")
    execute(
        space,
        "def hinge(model, images, labels, margin=1.0):\n"
        "    scores = model(images)\n"
        "    loss = F.multi_margin_loss(scores, labels, margin=margin)\n"
        "    return loss, {'size of $scores': scores.detach().norm()}\n"
        "OBJECTIVES['hinge (§ 1, 100 %)'] = Objective(hinge, 'black', '*')\n",
    )
    (training,) = [c for c in cells_defining("trained") if 'name = "expected reward"' in c.source]
    execute(space, with_values(training.source, {"name": "hinge (§ 1, 100 %)"}))
    _, table = side_by_side(space)
    assert list(table.index) == [*FIVE, "hinge (§ 1, 100 %)"]
    variants = {"a": {}, "b": {"learning_rate": 0.01}}
    compared = space.train_objectives(
        space.OBJECTIVES, variants, space.lab_data, space.lab_config, [0]
    )
    assert {*compared["objective"]} == {*space.OBJECTIVES}
    space.show_comparison("Which?", compared, "a", space.lab_data, within_objective=True)


def test_after_a_change_of_data_nothing_old_is_shown_with_the_new(tmp_path):
    for i, split in enumerate(["train", "test"] * 20):
        image = tmp_path / "squares" / split / f"class {i % 4 // 2}" / f"{i}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (100 * (i % 4 // 2), i, 50)).save(image)
    space = run_cells(*SIDE_BY_SIDE, "lab_settings")
    titles, table = side_by_side(space)
    assert list(table.index) == FIVE and all("stand-in" in title for title in titles)

    space.DATA = str(tmp_path / "squares")
    for cell in cells_defining("configs", "softmax_objective"):
        execute(space, cell.source)
    with pytest.raises(ValueError, match="nothing was trained with these settings yet"):
        side_by_side(space)
    execute(space, cells_defining("trained")[0].source)
    titles, table = side_by_side(space)
    assert list(table.index) == ["softmax cross-entropy"]
    assert titles and all("squares" in title for title in titles)
    lab_data, _, _ = space.lab_settings(space.data, space.configs, False)
    assert lab_data.name == "squares"


# The form

FORM = {
    "epochs": 0,
    "batch_size": 0,
    "learning_rate": 0.0,
    "optimizer": "Muon",
    "width": 0,
    "flip": True,
    "seeds": [],
    "full": False,
}
WRONG = [("epochs", value) for value in [-1, 1.5, True, "3", None]]
WRONG += [("batch_size", -64), ("width", 8.0), ("seeds", [0, "one"]), ("seeds", None)]
WRONG += [("learning_rate", value) for value in [-0.1, "fast", True, float("nan")]]
WRONG += [("optimizer", "muon"), ("optimizer", None)]
WRONG += [(name, value) for name in ["flip", "full"] for value in ["false", "True", 0, None]]


@pytest.mark.parametrize("name, value", WRONG)
def test_a_wrong_setting_is_refused_by_its_name_and_value(name, value):
    space = shared_cells("make_configs")
    with pytest.raises(ValueError) as caught:
        space.make_configs("CPU", **FORM | {name: value})
    text = str(caught.value)
    assert text.startswith(name.upper()) and (repr(value) in text or name == "seeds")
    assert len(caught.value._render_traceback_()) == 1  # one line in Jupyter


@pytest.mark.parametrize("folder", [None, "", 3])
def test_a_folder_that_is_none_is_refused(folder):
    space = shared_cells("check_folder")
    with pytest.raises(ValueError, match=f"^RUNS .* got {folder!r}$"):
        space.check_folder("RUNS", folder)
    for right in ["runs", Path("runs")]:
        space.check_folder("RUNS", right)


def test_zero_means_the_default_of_the_machine():
    space = shared_cells("make_configs")
    for machine, defaults in space.DEFAULTS.items():
        (config,) = space.make_configs(machine, **FORM)
        assert config.epochs == defaults["epochs"] and config.seed == 0
        seeds = space.make_configs(machine, **FORM | {"full": True, "epochs": 7})
        assert [(config.epochs, config.seed) for config in seeds] == [(7, s) for s in range(5)]


# Finding objectives.py

GOOD = (ROOT / "objectives.py").read_bytes()
WEB_PAGE = b"<!DOCTYPE html>\n<html><body>objectives.py</body></html>"
OTHER_MODULE = b"def softmax_cross_entropy(logits, labels):\n    return 0\n"
RAW = "https://raw.githubusercontent.com/"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """An empty folder from which no objectives.py can be imported, and a web of {address: file}."""
    here = SimpleNamespace(web={}, asked=[], sessions=[], uploads=[], folder=tmp_path)

    def urlopen(url, timeout):
        if url.endswith(":9000/api/sessions"):
            return BytesIO(json.dumps(here.sessions).encode())
        here.asked.append(url)
        if url not in here.web:
            raise URLError("not found")
        return BytesIO(here.web[url])

    def upload():  # like Colab's: it saves what was chosen, and returns it
        files = here.uploads.pop(0)
        for name, source in files.items():
            Path(name).write_bytes(source)
        return files

    monkeypatch.chdir(tmp_path)
    others = [place for place in sys.path if not Path(place or ".", "objectives.py").exists()]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *others])
    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    monkeypatch.setattr("ipykernel.get_connection_file", lambda: "/run/kernel-aa-11.json")
    here.google = ModuleType("google.colab")
    here.google.files = SimpleNamespace(upload=upload)
    return here


@pytest.fixture
def colab(machine, monkeypatch):
    monkeypatch.setenv("COLAB_JUPYTER_IP", "127.0.0.1")
    monkeypatch.setitem(sys.modules, "google", ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", machine.google)
    return machine


def find_objectives(url=""):
    space = ModuleType("__main__")
    space.shown = Shown()
    execute(
        space, with_values(cells_defining("path_of_objectives")[0].source, {"OBJECTIVES_URL": url})
    )


def session(kernel, **names):
    return {"id": "s", "kernel": {"id": kernel, "name": "python3"}, "type": "notebook"} | names


def file_id(repository, ref):
    file = f"https://github.com/{repository}/blob/{ref}/training_objectives.ipynb"
    return "fileId=" + quote(file, safe="")


def check_refused(match):
    """The error says this, in one line."""
    with pytest.raises(Exception, match=match) as caught:
        find_objectives()
    (line,) = caught.value._render_traceback_()
    assert "\n" not in line


@pytest.mark.parametrize("where", ["path", "name", "notebook"])
@pytest.mark.parametrize("ref", ["main", "v1.2/lessons", "0a1b2c"])
def test_colab_downloads_from_the_repository_that_the_notebook_came_from(colab, where, ref):
    ours, theirs = file_id("me/five-ways", ref), file_id("someone/else", "main")
    names = {"notebook": {"path": ours}} if where == "notebook" else {where: ours}
    colab.sessions += [session("bb-22", path=theirs), session("aa-11", **names)]
    colab.web[f"{RAW}me/five-ways/{ref}/objectives.py"] = GOOD
    find_objectives()
    find_objectives()  # the file is there now
    assert colab.asked == [f"{RAW}me/five-ways/{ref}/objectives.py"]
    assert Path("objectives.py").read_bytes() == GOOD


@pytest.mark.parametrize("sessions", [[], [session("bb-22", path=file_id("a/b", "main"))], [{}]])
def test_colab_falls_back_to_the_address_in_the_form(colab, sessions):
    colab.sessions += sessions
    colab.web["https://example.org/objectives.py"] = GOOD
    find_objectives("https://example.org/objectives.py")
    assert Path("objectives.py").read_bytes() == GOOD


@pytest.mark.parametrize("wrong", [WEB_PAGE, OTHER_MODULE, b"\0\0", b"\xff\xfe"])
def test_colab_falls_back_to_an_upload_and_leaves_nothing_wrong_behind(colab, wrong):
    colab.sessions.append(session("aa-11", path=file_id("me/five-ways", "main")))
    colab.web[f"{RAW}me/five-ways/main/objectives.py"] = wrong
    colab.uploads += [{"objectives (1).py": wrong}, {}, {"objectives (1).py": GOOD}]
    check_refused("objectives.py (is not|does not)")
    check_refused("Run this cell again")
    assert list(colab.folder.iterdir()) == []
    find_objectives()
    assert [path.name for path in colab.folder.iterdir()] == ["objectives.py"]


def test_outside_colab_one_line_says_where_objectives_belong(machine):
    check_refused(re.escape(str(machine.folder)))
    assert machine.asked == []


def test_a_module_that_lacks_functions_is_refused_with_their_names(machine):
    Path("objectives.py").write_bytes(OTHER_MODULE)
    check_refused("does not define teacher_student, sampled_softmax, .*sample_actions")


def test_a_folder_of_that_name_is_not_taken_for_the_module(machine):
    Path("objectives").mkdir()
    check_refused("there is no objectives.py")
    Path("objectives.py").write_bytes(GOOD)
    find_objectives()  # a folder without __init__.py hides nothing
    Path("objectives", "__init__.py").touch()
    check_refused("Rename that folder")


def test_the_module_is_read_as_utf_8_whatever_the_locale(machine):
    Path("objectives.py").write_bytes(GOOD + "\n# Größe, 画像\n".encode())
    cell = cells_defining("path_of_objectives")[0].source
    ascii_only = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-W", "error", "-c", cell], env=ascii_only)
    assert done.returncode == 0
