"""What needs no run: the notebook's headings, links, equations and colours; type hints; README."""

import ast
import html
import itertools
import re
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from test_notebook import CELLS, CODE, OBJECTIVES, PATH, README, ROOT

PROSE = {name: cell.source for name, cell in CELLS.items() if cell.cell_type == "markdown"}
WITHOUT_CODE = re.sub(r"(?ms)^```.*?^```$", "", "\n\n".join(PROSE.values()))
HEADINGS = re.findall(r"(?m)^(#+) (.+)$", WITHOUT_CODE)


# Headings, links and equations


def slug(heading):
    """What Jupyter makes of a heading."""
    return heading.strip().replace(" ", "-")


SLUGS = Counter(slug(heading) for _, heading in HEADINGS)


def test_headings_begin_with_the_only_title_and_skip_no_level():
    levels = [len(marks) for marks, _ in HEADINGS]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:]))


def test_every_internal_link_points_at_the_one_heading_of_that_name():
    links = re.findall(r"\]\(#([^)]+)\)", WITHOUT_CODE)
    assert len(links) > 20 and [link for link in links if SLUGS[link] != 1] == []


def test_headings_that_are_linked_have_their_anchor_right_before_them():
    links = set(re.findall(r"\]\(#([^)]+)\)", WITHOUT_CODE))
    anchors = re.findall(r'<a name="([^"]+)"></a>(?:\n#+ (.+))?', WITHOUT_CODE)
    assert [(name, heading) for name, heading in anchors if name != slug(heading)] == []
    assert len(set(anchors)) == len(anchors) and links <= {name for name, _ in anchors}


@pytest.mark.parametrize("name", PROSE)
def test_no_backslash_stands_before_punctuation(name):
    r"""GitHub takes it away before it sets the equation, as in \, \; \! \{ and \_."""
    assert re.findall(r"\\[!-/:-@\[-`{-~].*", PROSE[name]) == []


# Colours


@pytest.fixture(scope="module")
def style():
    """The names that the cell of the style defines; Matplotlib itself stays as it is."""
    plt = SimpleNamespace(rcParams={})
    tree = ast.parse(CODE["style"])
    wanted = [node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom)]
    names = {"plt": plt, "FIVE": OBJECTIVES}
    exec(ast.unparse(ast.Module(wanted, [])), names)
    return SimpleNamespace(**names)


# Machado, Oliveira & Fernandes 2009, severity 1, on linear RGB: the rows of a matrix
VISION = {
    "normal": "1 0 0  0 1 0  0 0 1",
    "protanopia": ".152286 1.052583 -.204868  .114503 .786281 .099216  -.003882 -.048116 1.051998",
    "deuteranopia": ".367322 .860646 -.227968  .280085 .672501 .047413  -.011820 .042940 .968881",
    "tritanopia": "1.255528 -.076749 -.178779  -.078411 .930809 .147602  .004733 .691367 .303900",
}
TO_XYZ = np.array([[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]])


def linear(colour):
    """Linear RGB of "#rrggbb"."""
    values = np.array(list(bytes.fromhex(colour[1:]))) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """CIELAB of linear RGB, whose white is 1, 1, 1."""
    x, y, z = TO_XYZ @ rgb / TO_XYZ.sum(1)
    f = lambda t: np.cbrt(t) if t > (6 / 29) ** 3 else t / 3 * (29 / 6) ** 2 + 4 / 29  # noqa: E731
    return np.array([116 * f(y) - 16, 500 * (f(x) - f(y)), 200 * (f(y) - f(z))])


def contrast_on_white(colour):
    """By WCAG, from 1 to 21."""
    return 1.05 / (TO_XYZ[1] @ linear(colour) + 0.05)


@pytest.mark.parametrize("vision", VISION)
def test_colours_stay_apart_for_every_kind_of_vision(style, vision):
    """By five just noticeable differences, which are 2.3 each in CIE76: lines are thin, and lie
    apart from their legend. The nearest two, blue and green with tritanopia, are 17 apart."""
    assert list(style.COLOURS) == OBJECTIVES
    colours = style.COLOURS | {"ink": style.INK}
    matrix = np.reshape(VISION[vision].split(), (3, 3)).astype(float)
    seen = {k: lab((matrix @ linear(c)).clip(0, 1)) for k, c in colours.items()}
    apart = {(a, b): np.linalg.norm(seen[a] - seen[b]) for a, b in itertools.combinations(seen, 2)}
    assert {pair: d for pair, d in apart.items() if d < 5 * 2.3} == {}


def test_colours_but_one_have_the_contrast_that_graphics_need(style):
    """3:1 by WCAG 1.4.11. Amber has 2.25: there the marker, the line and the label must tell."""
    contrasts = {name: contrast_on_white(colour) for name, colour in style.COLOURS.items()}
    low = {name: value for name, value in contrasts.items() if value < 3}
    assert list(low) == ["teacher_student"] and low["teacher_student"] > 2.2


def test_ink_has_the_contrast_that_small_letters_need(style):
    assert contrast_on_white(style.INK) >= 7  # by WCAG 1.4.6
    assert style.plt.rcParams.get("figure.facecolor", "white") == "white"


# Type hints


def test_type_hints_are_complete_and_consistent(tmp_path):
    api = pytest.importorskip("mypy.api")
    path = str(ROOT / "objectives.py")
    said, errors, status = api.run(["--strict", "--cache-dir", str(tmp_path), path])
    assert status == 0, said + errors


# README


def test_readme_names_only_files_that_exist():
    names = re.findall(r"`((?:tests/)?[\w.]+\.(?:py|ipynb|txt|md))`", README)
    made = {"results.json", "several_devices.py"}
    assert names and [n for n in names if not (ROOT / n).exists() and n not in made] == []
    for target in re.findall(r"\]\(([^)#\s]+)\)", README):
        assert "://" in target or (ROOT / target).exists(), target


def test_the_page_that_readme_makes_says_what_every_figure_shows(tmp_path):
    options = re.search(r"(nbconvert .*) runs/", README)[1].split()
    command = [sys.executable, "-m", "jupyter", *options, "--output-dir", tmp_path, PATH]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0 and "WARNING" not in finished.stderr, finished.stderr
    page = (tmp_path / PATH.with_suffix(".html").name).read_text()
    said = [html.unescape(text) for text in re.findall(r'<img\b[^>]*\balt="([^"]*)"', page)]
    outputs = [output for cell in CELLS.values() for output in cell.get("outputs", [])]
    pictures = [o.metadata["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) > 20 and not Counter(p["alt"] for p in pictures) - Counter(said)


def test_what_only_tests_need_is_not_installed_for_readers():
    listed = [(ROOT / name).read_text() for name in ["requirements.txt", "tests/requirements.txt"]]
    readers, testers = ({*re.findall(r"(?m)^[\w-]+(?=>=)", text)} for text in listed)
    assert {"torch", "papermill"} < readers and "pytest" in testers and not readers & testers
