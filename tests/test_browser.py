"""What a reader sees: the page that nbconvert makes of the committed notebook, in a real browser.

It needs the packages playwright and axe-playwright-python and a Chrome or Chromium on the PATH.
"""

import re
import shutil
import subprocess
import sys
from collections import Counter

import pytest
from test_notebook import CELLS, NOTEBOOK, PATH

sync_api = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")

CHROMES = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"]
CHROME = next(filter(None, map(shutil.which, CHROMES)), None)
pytestmark = pytest.mark.skipif(CHROME is None, reason=f"none of {', '.join(CHROMES)} is on PATH")

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
HERE = re.compile(r"(file|data|blob):")

# What the template of nbconvert colours by itself, below the contrast that axe asks for: links,
# told from the text around them by colour alone, and the prompts. Nothing in a notebook changes it.
OF_THE_TEMPLATE = {
    "link-in-text-block": ".jp-RenderedMarkdown a",
    "color-contrast": ".jp-InputPrompt",
}

# Of every image that is in the notebook itself: its cell and its sizes.
# Images from other hosts (the badge of Colab) are left out: those hosts are out of reach here.
IMAGES = """() => [...document.querySelectorAll(".jp-Cell img:not([src^='http'])")].map(image => {
    const room = image.closest(".jp-OutputArea-output, .jp-RenderedMarkdown").clientWidth
    const cell = [...document.querySelectorAll(".jp-Cell")].indexOf(image.closest(".jp-Cell"))
    const {width, right} = image.getBoundingClientRect()
    return {cell, natural: image.naturalWidth, width, right, room}
})"""

# Whatever is wider than its box, and would be cut off or need a scrollbar of its own
TOO_WIDE = """selector => [...document.querySelectorAll(selector)]
    .filter(box => box.scrollWidth > box.clientWidth)
    .map(box => `${box.scrollWidth} > ${box.clientWidth}: ${box.textContent.slice(0, 80)}`)"""


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROME, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=["light", "dark"])
def page(request, browser, tmp_path_factory):
    """The page of the committed file, in a theme; it reaches no other host."""
    folder, theme = tmp_path_factory.mktemp("exported"), request.param
    command = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "html", "--theme", theme]
    command += ["--output-dir", folder, PATH]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-2000:]
    page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme=theme)
    page.set_default_timeout(120_000)
    page.route(lambda url: not HERE.match(url), lambda route: route.abort())
    page.messages = []
    page.on("pageerror", lambda error: page.messages.append(str(error)))
    page.on("console", lambda m: m.type == "error" and page.messages.append(m.text))
    page.goto((folder / PATH.with_suffix(".html").name).as_uri())
    yield page
    page.close()


def images_of_the_notebook():
    """How many images each cell has in its outputs or, attached, in its text."""
    kept = {cell.id: len(cell.get("attachments", {})) for cell in NOTEBOOK.cells}
    for cell in NOTEBOOK.cells:
        for output in cell.get("outputs", []):
            kept[cell.id] += "image/png" in output.get("data", {})
    return +Counter(kept)


@pytest.mark.parametrize("width", [1280, 700])
def test_the_page_shows_every_figure_and_cuts_nothing_off(page, width):
    page.set_viewport_size({"width": width, "height": 900})
    images = page.evaluate(IMAGES)
    for image in images:
        assert image["natural"] > 0, image
        assert image["width"] < image["room"] + 1 and image["right"] < width + 1, image
    shown = Counter(list(CELLS)[image["cell"]] for image in images)
    assert shown == images_of_the_notebook() and len(images) > 20
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = ".jp-OutputArea-output, .jp-OutputArea-output pre, .jp-MarkdownOutput"
    assert page.evaluate(TOO_WIDE, boxes) == []


def test_the_page_has_no_error_but_for_hosts_out_of_reach(page):
    errors = [text for text in page.messages if "Failed to load resource" not in text]
    assert [text for text in errors if "require" not in text.lower()] == []


def serious_findings(page):
    """What axe calls serious or critical, without what the template is to blame for."""
    for violation in axe.Axe().run(page).response["violations"]:
        rule = violation["id"]
        if violation["impact"] in ("serious", "critical"):
            for node in violation["nodes"]:
                element = page.locator(node["target"][0]).first
                excused = OF_THE_TEMPLATE.get(rule, ":not(*)")
                if not element.evaluate("(element, s) => element.matches(s)", excused):
                    yield f"{rule}: {node['html'][:200]}"


def test_axe_finds_nothing_serious(page):
    page.set_viewport_size({"width": 1280, "height": 900})
    # Code as text without its colours: they are the template's, and 10,000 pieces of it take long
    page.evaluate("document.querySelectorAll('.highlight pre').forEach(p => p.textContent += '')")
    assert list(serious_findings(page)) == []
