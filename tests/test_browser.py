"""What a reader sees: the page that README's command makes of the notebook, in a real browser.

It needs the packages playwright and axe-playwright-python and a Chrome or Chromium on the PATH.
"""

import re
import shutil
import subprocess
import sys
from collections import Counter

import pytest
from notebook import CODE, PATH, README

sync_api = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")

CHROMES = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"]
CHROME = next(filter(None, map(shutil.which, CHROMES)), None)
pytestmark = pytest.mark.skipif(CHROME is None, reason=f"none of {', '.join(CHROMES)} is on PATH")

HERE = re.compile(r"(file|data|blob):")

# Of every picture that is in the page itself (Colab's badge comes from another host)
PICTURES = """() => [...document.querySelectorAll("img:not([src^='http'])")].map(picture => {
    const {width, height, right} = picture.getBoundingClientRect()
    const sized = picture.hasAttribute("width") && picture.hasAttribute("height")
    return {alt: picture.alt, natural: picture.naturalWidth, sized, width, height, right}
})"""

# What the templates of nbconvert are to blame for: links told from the text by colour alone, the
# colours of prompts and code, and in JupyterLab's template pictures without their texts
OF_THE_TEMPLATE = {
    "link-in-text-block": "a",
    "color-contrast": ".prompt, .jp-InputPrompt, .jp-OutputPrompt, .highlight *",
    "scrollable-region-focusable": ".highlight, pre",
    "image-alt": ".jp-RenderedImage img",
}


OF_README = re.search(r"nbconvert (.*?) runs/", README)[1].split()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROME, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=["classic", "dark"])
def page(request, browser, tmp_path_factory):
    """The page as README makes it, and a dark one; it reaches no other host."""
    folder = tmp_path_factory.mktemp("page")
    how = OF_README if request.param == "classic" else ["--to", "html", "--theme", "dark"]
    command = [sys.executable, "-m", "nbconvert", *how, "--output-dir", folder, PATH]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(120_000)
    page.route(lambda url: not HERE.match(url), lambda route: route.abort())
    page.goto((folder / PATH.with_suffix(".html").name).as_uri())
    page.is_classic = request.param == "classic"
    yield page
    page.close()


def test_every_figure_is_there_with_its_size_and_its_text(page):
    outputs = [output for cell in CODE for output in cell.outputs]
    stored = [o.metadata["image/png"]["alt"] for o in outputs if "image/png" in o.get("data", {})]
    pictures = page.evaluate(PICTURES)
    assert len(pictures) >= len(stored) > 20
    if page.is_classic:
        assert not Counter(stored) - Counter(picture["alt"] for picture in pictures)
    for picture in pictures:
        assert picture["natural"] > 0, picture
        assert picture["sized"] or picture["alt"] not in ["", *stored], picture


def test_the_page_of_readme_leaves_out_the_code_of_folded_cells(page):
    if page.is_classic:
        unfolded = [cell for cell in CODE if "hide-input" not in cell.metadata.get("tags", [])]
        assert page.locator("div.input_area").count() == len(unfolded) < len(CODE)


@pytest.mark.parametrize("width", [1280, 700])
def test_nothing_is_wider_than_the_page(page, width):
    page.set_viewport_size({"width": width, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert [p for p in page.evaluate(PICTURES) if p["right"] > width] == []


def serious_findings(page):
    """What axe calls serious or critical, without what the template is to blame for."""
    for violation in axe.Axe().run(page).response["violations"]:
        if violation["impact"] not in ("serious", "critical"):
            continue
        excused = OF_THE_TEMPLATE.get(violation["id"], ":not(*)")
        for node in violation["nodes"]:
            element = page.locator(node["target"][0]).first
            if not element.evaluate("(element, selector) => element.matches(selector)", excused):
                yield f"{violation['id']}: {node['html'][:200]}"


def test_axe_finds_nothing_serious(page):
    page.set_viewport_size({"width": 1280, "height": 900})
    # Code without its colours, which are the template's: its 10,000 pieces would take long
    page.evaluate("document.querySelectorAll('.highlight pre').forEach(p => p.textContent += '')")
    assert list(serious_findings(page)) == []
