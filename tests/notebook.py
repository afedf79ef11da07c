"""What the tests of the notebook share: its cells, and ways to execute some of them."""

import ast
import functools
import itertools
import linecache
import os
import re
import symtable
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from unittest import mock

import matplotlib
import nbformat
import torch
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
PATH = Path(os.environ.get("NOTEBOOK", ROOT / "training_objectives.ipynb")).resolve()
NOTEBOOK = nbformat.read(PATH, as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
MARKDOWN = [cell for cell in NOTEBOOK.cells if cell.cell_type == "markdown"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRATCH = TemporaryDirectory()  # where the trainings of tests are saved that name no other folder
TINY = {
    "DATA": "stand-in",
    "EPOCHS": 1,
    "BATCH_SIZE": 64,
    "WIDTH": 8,
    "N_IMAGES": 200,
    "FULL": False,
    "RUNS": SCRATCH.name,
}

matplotlib.use("Agg")
torch.set_num_threads(1)  # the tensors are small, and the cores may be busy


def without_code(text):
    """Markdown without its blocks and pieces of code."""
    text = re.sub(r"(?ms)^```.*?^```$", "", text)
    return re.sub(r"`[^`\n]*`", "", text)


# Images that a small network learns in a few steps


def coloured_images(n, seed):
    """Noise that is a little red, green or blue, and which of the three."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    images = torch.randint(100, (n, 3, 32, 32), generator=random, dtype=torch.uint8)
    images[torch.arange(n), labels] += 60
    return images, labels


# Which cell defines a name, and which cells another one needs


def in_order(statements):
    """The statements in the order of execution; a loop is its first step, a condition both ways."""
    for statement in statements:
        if isinstance(statement, ast.For):
            yield ast.Assign([statement.target], statement.iter, lineno=0)
            yield from in_order(statement.body)
        elif isinstance(statement, ast.If):
            yield ast.Expr(statement.test)
            yield from in_order(statement.body + statement.orelse)
        else:
            yield statement


def globals_of(table):
    return {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}


def globals_inside(table):
    """The global names that the functions and classes inside a table read."""
    found = set()
    for inner in table.get_children():
        found |= globals_of(inner) | globals_inside(inner)
    return found


@functools.cache
def names_of(source):
    """The names that a cell defines, those of which it sets entries, and those that it needs."""
    defined, changed, needed, needed_inside = set(), set(), set(), set()
    for statement in in_order(ast.parse(source).body):
        table = symtable.symtable(ast.unparse(statement), "cell", "exec")
        names = table.get_symbols()
        needed |= {s.get_name() for s in names if s.is_referenced()} - defined
        defined |= {s.get_name() for s in names if s.is_assigned() or s.is_imported()}
        needed_inside |= globals_inside(table)
        if isinstance(statement, ast.AugAssign):
            needed.add(getattr(statement.target, "id", None))
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Subscript):
            changed.add(getattr(statement.targets[0].value, "id", None))
    return defined, changed, needed | (needed_inside - defined)


def cells_defining(*names):
    """All code cells that define at least one of these names at their top level."""
    return [cell for cell in CODE if names_of(cell.source)[0] & {*names}]


def cells_needed(*names):
    """The cells that define these names first, and those that these cells need in their turn."""
    wanted = [(name, len(CODE)) for name in names]
    found = set()
    while wanted:
        name, before = wanted.pop()
        places = [i for i, cell in enumerate(CODE) if name in names_of(cell.source)[0]]
        if not places:
            assert name not in names, f"no cell defines {name}"
            continue  # a builtin
        earlier = [i for i in places if i < before]
        # What a cell needs, it finds as the last cell before it left it.
        chosen = {earlier[-1] if earlier and before < len(CODE) else places[0]}
        chosen |= {i for i in range(before) if name in names_of(CODE[i].source)[1]}
        for i in chosen - found:
            wanted += [(need, i) for need in names_of(CODE[i].source)[2]]
        found |= chosen
    return [CODE[i] for i in sorted(found)]


# Executing cells in this process


class Shown(list):
    """In place of display: a list of what was displayed."""

    def __call__(self, *things, display_id=False, **options):
        self.extend(things)
        return SimpleNamespace(update=self.append, display=self.append)


numbers = itertools.count(1)


def with_values(source, values):
    """The source, with other values for its settings, each of which is a line NAME = value."""
    for name, value in values.items():
        value = str(value) if isinstance(value, Path) else value
        line = f"{name} = {value!r}"
        source = re.sub(rf"(?m)^{name} = .*$", lambda match, line=line: line, source)
    return source


def execute(space, source):
    """Execute a cell in a module, so that inspect.getsource finds what it defines.

    What is displayed, also the value of an expression in the last line, goes to space.shown.
    """
    file = f"<cell {next(numbers)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    tree = ast.parse(source, file)
    last = ast.Constant(None, lineno=1, col_offset=0)
    if isinstance(tree.body[-1], ast.Expr):
        last = tree.body.pop().value
    with mock.patch("IPython.display.display", space.shown):
        exec(compile(tree, file, "exec"), space.__dict__)
        value = eval(compile(ast.Expression(last), file, "eval"), space.__dict__)
    if value is not None:
        space.shown(value)
    if "find_device" in names_of(source)[0]:
        space.DEVICE = torch.device("cpu")
        space.PRECISION = torch.float32


def run_cells(*names, **values):
    """A fresh module in which the cells that define these names, and what they need, were executed.

    Settings have the values of TINY, or those that are given. Trainings and figures of the lesson
    are not executed unless a name depends on them. What was displayed is in the list `shown`.
    """
    space = ModuleType("__main__")
    space.shown = Shown()
    for cell in cells_needed(*names):
        execute(space, with_values(cell.source, TINY | values))
    return space


# The same module for all tests, which must leave it as it was (monkeypatch does)
shared_cells = functools.cache(run_cells)


# Executing cells in a real kernel


@contextmanager
def kernel(folder, **values):
    """A kernel at work in a folder: a function that executes source there and returns its outputs.

    The outputs are those of the notebook format; an error is the last of them.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    notebook = nbformat.v4.new_notebook()
    client = NotebookClient(
        notebook, timeout=300, allow_errors=True, resources={"metadata": {"path": str(folder)}}
    )

    def run(source):
        cell = nbformat.v4.new_code_cell(with_values(source, TINY | {"RUNS": "runs"} | values))
        notebook.cells.append(cell)
        client.execute_cell(cell, len(notebook.cells) - 1)
        return cell.outputs

    with client.setup_kernel(env=environment):
        yield run
