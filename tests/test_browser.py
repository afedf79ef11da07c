"""What a reader sees: the notebook run in JupyterLab, and the exported pages, in a real browser.

It needs the packages playwright and axe-playwright-python and a Chrome or Chromium on the PATH.
"""

import copy
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from urllib.request import urlopen

import nbformat
import pytest
from test_notebook import CELLS, CODE, FIGURES, INJECTED, NOTEBOOK, PATH, ROOT

sync_api = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")

CHROMES = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"]
CHROME = next(filter(None, map(shutil.which, CHROMES)), None)
pytestmark = pytest.mark.skipif(CHROME is None, reason=f"none of {', '.join(CHROMES)} is on PATH")

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
WIDTHS = [1280, 700]
ROOM = 640  # for text, in the narrower page
SETTINGS = {"DATA": "stand-in", "EPOCHS": 1, "WIDTH": 8, "BATCH_SIZE": 64, "SEEDS": [0]}
TINY = ["imports", "why-settings", "race-settings", "experiment"]
ADDED = {name: INJECTED[name] for name in TINY} | {
    "parameters": "\n".join(f"{name} = {value!r}" for name, value in SETTINGS.items()),
    "stand-in": "make_stand_in = partial(make_stand_in, 400, 100)",
}
AGAIN = "softmax"  # the section that is run a second time

# JupyterLab as it is when new, but with every cell in the page and no question at the start
LAB_SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}

# What the template of nbconvert colours by itself, below the contrast that axe asks for: links,
# told from the text around them by colour alone, and the prompts. Nothing in a notebook changes it.
OF_THE_TEMPLATE = {
    "link-in-text-block": ".jp-RenderedMarkdown a",
    "color-contrast": ".jp-InputPrompt",
}

# Of every image that is in the notebook itself: its cell, its sizes and how much its pixels differ.
# Images from other hosts (the badge of Colab) are left out: those hosts are out of reach here.
IMAGES = """() => [...document.querySelectorAll(".jp-Cell img:not([src^='http'])")].map(image => {
    const canvas = document.createElement("canvas"), n = canvas.width = canvas.height = 200
    const context = canvas.getContext("2d")
    context.fillStyle = "white"
    context.fillRect(0, 0, n, n)
    if (image.naturalWidth) context.drawImage(image, 0, 0, n, n)
    const reds = context.getImageData(0, 0, n, n).data.filter((_, i) => i % 4 == 0)
    const mean = reds.reduce((sum, red) => sum + red, 0) / reds.length
    const variance = reds.reduce((sum, red) => sum + (red - mean) ** 2, 0) / reds.length
    const room = image.closest(".jp-OutputArea-output, .jp-RenderedMarkdown").clientWidth
    const cell = [...document.querySelectorAll(".jp-Cell")].indexOf(image.closest(".jp-Cell"))
    const {width, right} = image.getBoundingClientRect()
    return {cell, natural: image.naturalWidth, spread: variance ** 0.5, width, right, room}
})"""

# Whatever is wider than its box, and would be cut off or need a scrollbar of its own
TOO_WIDE = """selector => [...document.querySelectorAll(selector)]
    .filter(box => box.scrollWidth > box.clientWidth)
    .map(box => `${box.scrollWidth} > ${box.clientWidth}: ${box.textContent.slice(0, 80)}`)"""

# JupyterLab renames the ids in a notebook, so that none is taken for one of its own.
DANGLING = """() => [...document.querySelectorAll(".jp-RenderedMarkdown a[href^='#']")]
    .map(link => decodeURIComponent(link.hash.slice(1)))
    .filter(name => !["id", "name", "data-jupyter-id"].some(
        key => document.querySelector(`[${key}="${CSS.escape(name)}"]`)))"""
IN_SIGHT = """name => {
    const target = document.querySelector(`[id="${name}"], [data-jupyter-id="${name}"]`)
    const {top} = target.getBoundingClientRect()
    return 0 <= top && top < innerHeight
}"""
READY = """markdown => {
    const kernel = window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel
    return kernel?.status == "idle" && kernel.connectionStatus == "connected"
        && document.querySelectorAll(".jp-MarkdownCell .jp-MarkdownOutput").length == markdown
}"""
IDLE = """() => document.querySelector(".jp-Notebook-ExecutionIndicator").dataset.status == "idle"
    && [...document.querySelectorAll(".jp-CodeCell .jp-InputArea-prompt")]
        .every(prompt => !prompt.textContent.includes("*"))"""
STARTED = """() => [...document.querySelectorAll(".jp-CodeCell .jp-InputArea-prompt")]
    .some(prompt => /[*\\d]/.test(prompt.textContent))"""
EQUATIONS = """() => [...document.querySelectorAll(".jp-MarkdownOutput mjx-math")]
    .map(math => [math.getBoundingClientRect().width, math.closest(".jp-Cell").innerText])"""
HEADINGS = "() => [...document.querySelectorAll('h1, h2, h3, h4, h5, h6')].map(h => +h.tagName[1])"
OUTPUTS = """() => [...document.querySelectorAll(".jp-Cell")]
    .map(cell => cell.querySelectorAll(".jp-OutputArea-child").length)"""


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROME, args=FLAGS)
        yield browser
        browser.close()


def new_page(browser, width, height=900):
    """A page that reaches this machine and nothing else, so that it waits for no other host."""
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(180_000)  # on a busy machine JupyterLab may take its time
    here = re.compile(r"(file|data|blob):|https?://(localhost|127\.0\.0\.1)[:/]")
    page.route(lambda url: not here.match(url), lambda route: route.abort())
    return page


def seen_images(page):
    """How many images each cell shows: all loaded, none blank, none wider than its place."""
    images = page.evaluate(IMAGES)
    for image in images:
        assert image["natural"] > 0 and image["spread"] > 5, image
        assert image["width"] < image["room"] + 1, image
        assert image["right"] < page.viewport_size["width"] + 1, image
    return Counter(list(CELLS)[image["cell"]] for image in images)


def images_of(cells):
    """How many images each cell has in its outputs or, attached, in its text."""
    kept = {cell.id: len(cell.get("attachments", {})) for cell in cells}
    for cell in cells:
        for output in cell.get("outputs", []):
            kept[cell.id] += "image/png" in output.get("data", {})
    return Counter(kept)


def nothing_is_too_wide(page):
    whole = page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    boxes = ".jp-OutputArea-output, .jp-OutputArea-output pre, .jp-MarkdownOutput"
    return whole and page.evaluate(TOO_WIDE, boxes) == []


# JupyterLab


def tiny_notebook():
    """A copy whose settings are small; each is added to the end of its cell."""
    notebook = copy.deepcopy(NOTEBOOK)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            cell.source += "\n" + ADDED[cell.id] if cell.id in ADDED else ""
    return notebook


def lab_environment(folder):
    """Nothing of the user's own JupyterLab is read or changed."""
    names = ["JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"]
    names += ["JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR"]
    folders = {name: str(folder / name.lower()) for name in names}
    for name, settings in LAB_SETTINGS.items():
        file = folder / "jupyterlab_settings_dir" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings))
    return os.environ | folders


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for(server, address, log, seconds=180):
    """Until the server answers; its log says why it does not."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and server.poll() is None:
        try:
            return urlopen(f"{address}/api/status?token=reader", timeout=5).close()
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()}")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The folder and the address of a JupyterLab that has the tiny notebook."""
    folder, port = tmp_path_factory.mktemp("lab"), free_port()
    root, log, address = folder / "root", folder / "log", f"http://localhost:{port}"
    root.mkdir()
    nbformat.write(tiny_notebook(), root / PATH.name)
    shutil.copy(ROOT / "objectives.py", root)
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root"]
    command += [f"--ServerApp.root_dir={root}", f"--ServerApp.port={port}"]
    command += ["--ServerApp.port_retries=0", "--IdentityProvider.token=reader"]
    command += ["--LabApp.expose_app_in_browser=True"]  # to see whether its kernel is connected
    with log.open("w") as out:
        server = subprocess.Popen(
            command, stdout=out, stderr=out, cwd=root, env=lab_environment(folder)
        )
    try:
        wait_for(server, address, log)
        yield root, address
    finally:
        server.terminate()  # it ends its kernels, too
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def choose(page, *path):
    """An entry of the menu bar, by mouse."""
    page.get_by_role("menubar").get_by_role("menuitem", name=path[0], exact=True).click()
    for name in path[1:]:
        page.locator(".lm-Menu-item", has_text=re.compile(f"^{name}")).first.click()


def wait_until_idle(page, seconds=240):
    """No cell waits or runs, and all that ran has its number."""
    page.wait_for_function(IDLE, timeout=1000 * seconds, polling=500)


def run_all(page, tries=3):
    """JupyterLab drops what it is asked to run while it still connects: ask again."""
    for _ in range(tries):
        choose(page, "Run", "Run All Cells")
        try:
            return page.wait_for_function(STARTED, timeout=30_000)
        except sync_api.TimeoutError:
            pass
    pytest.fail("JupyterLab did not run the cells")


@pytest.fixture(scope="module")
def page(lab, browser):
    """The notebook in JupyterLab, after Run > Run All Cells."""
    page = new_page(browser, 1280)
    page.goto(f"{lab[1]}/lab/tree/{PATH.name}?token=reader")
    page.wait_for_function(READY, arg=len(CELLS) - len(CODE))
    run_all(page)
    wait_until_idle(page)
    yield page
    page.close()


@pytest.fixture(scope="module")
def saved(lab, page):
    """The file as JupyterLab writes it after the run."""
    choose(page, "File", "Save Notebook")
    page.locator(".lm-DockPanel-tabBar .jp-mod-dirty").wait_for(state="detached")
    return lab[0] / PATH.name


def test_all_cells_run_in_jupyterlab_without_an_error(page, saved):
    cells = nbformat.read(saved, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(CODE) + 1)]
    assert not [cell.id for cell in code for o in cell.outputs if o.output_type == "error"]
    assert page.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0


def test_jupyterlab_shows_every_figure_and_cuts_nothing_off(page, saved):
    images = seen_images(page)
    assert images == images_of(nbformat.read(saved, as_version=4).cells)
    assert set(FIGURES) <= set(images)
    assert nothing_is_too_wide(page)


def test_a_section_that_runs_again_replaces_its_outputs(page, saved):
    ids = list(CELLS)
    first, last = ids.index(f"{AGAIN}-md"), ids.index(f"{AGAIN}-plot")
    outputs, images = page.evaluate(OUTPUTS), seen_images(page)
    number = page.locator(".jp-Cell .jp-InputArea-prompt").nth(last)
    before = number.text_content()
    page.locator(".jp-Cell .jp-InputArea-prompt").nth(first).click()
    for _ in ids[first : last + 1]:
        page.keyboard.press("Shift+Enter")
    sync_api.expect(number).not_to_have_text(before, timeout=60_000)
    wait_until_idle(page)
    assert page.evaluate(OUTPUTS) == outputs and sum(outputs[first : last + 1]) > 2
    assert seen_images(page) == images


def test_the_table_of_contents_lists_every_heading(page):
    texts = [cell.source for cell in NOTEBOOK.cells if cell.cell_type == "markdown"]
    headings = [h for text in texts for h in re.findall(r"(?m)^#+ (.+)$", text)]
    page.locator("[data-id='table-of-contents']").first.click()
    items = page.locator(".jp-tocItem-content")
    sync_api.expect(items).to_have_text([heading.replace("`", "") for heading in headings])


def test_a_link_in_the_contents_leads_to_its_section(page):
    assert page.evaluate(DANGLING) == []
    link = page.locator(".jp-Cell a[href^='#']:not(.jp-InternalAnchorLink)").first
    section = link.get_attribute("href")[1:]
    assert not page.evaluate(IN_SIGHT, section)
    link.click()
    page.wait_for_function(IN_SIGHT, arg=section, timeout=30_000)


def test_equations_fit_into_a_narrow_page(page):
    """In JupyterLab, which has MathJax: exported pages fetch it from a host out of reach here."""
    equations = page.evaluate(EQUATIONS)
    assert len(equations) > 10
    assert not [text[:80] for width, text in equations if width > ROOM]


# The exported page


@pytest.fixture(scope="module", params=["stored light", "stored dark", "run light"])
def exported(request, browser, tmp_path_factory):
    """The page of the committed file or of the run in JupyterLab, in a theme."""
    source, theme = request.param.split()
    notebook = PATH if source == "stored" else request.getfixturevalue("saved")
    folder = tmp_path_factory.mktemp("exported")
    command = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "html", "--theme", theme]
    command += ["--output-dir", folder, notebook]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-2000:]
    page = new_page(browser, WIDTHS[0])
    page.goto((folder / notebook.with_suffix(".html").name).as_uri())
    page.cells = nbformat.read(notebook, as_version=4).cells
    yield page
    page.close()


@pytest.mark.parametrize("width", WIDTHS)
def test_an_exported_page_shows_every_figure_and_cuts_nothing_off(exported, width):
    exported.set_viewport_size({"width": width, "height": 900})
    images = seen_images(exported)
    assert images == images_of(exported.cells) and set(FIGURES) <= set(images)
    assert nothing_is_too_wide(exported)


def test_the_links_within_an_exported_page_have_targets(exported):
    assert exported.evaluate(DANGLING) == []


def test_headings_of_an_exported_page_leave_no_level_out(exported):
    levels = exported.evaluate(HEADINGS)
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(lower <= upper + 1 for upper, lower in zip(levels, levels[1:]))


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


def test_axe_finds_nothing_serious_in_an_exported_page(exported):
    exported.set_viewport_size({"width": WIDTHS[0], "height": 900})
    # Code as text without its colours: they are the template's, and 20,000 pieces of it take long
    exported.evaluate(
        "document.querySelectorAll('.highlight pre').forEach(p => p.textContent += '')"
    )
    assert list(serious_findings(exported)) == []
