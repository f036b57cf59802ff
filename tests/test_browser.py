"""JupyterLab, a run's pages and the browser of trajectories in a real browser: the Chromium of the distribution.

The smoke run `outputs/smoke-test` must be there. Everything happens in a copy of the project.
"""
import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

from looper_math.records import ROOT, read_json

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is missing; `make test-browser` installs it and runs these tests")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
RUN, BIN = "smoke-test", ROOT / ".venv/bin"
NOTEBOOKS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "nbs").rglob("*.ipynb")
                   if ".ipynb_checkpoints" not in path.parts)


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    "A copy of the project's files with the smoke run, and JupyterLab set up as `make` does it."
    folder = tmp_path_factory.mktemp("lab") / "project"
    names = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                           check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    assert (ROOT / "outputs" / RUN / "summary.json").exists(), "run `make test-smoke` first"
    shutil.copytree(ROOT / "outputs" / RUN, folder / "outputs" / RUN)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    subprocess.run([BIN / "nbdev_install_hooks"], cwd=folder, env=environment(folder), check=True, capture_output=True)
    return folder


def environment(project: Path) -> dict:
    "A home of its own, and the copy's modules."
    home = project.parent / "home"
    home.mkdir(exist_ok=True)
    return os.environ | {"HOME": str(home), "PYTHONPATH": str(project), "HF_HUB_OFFLINE": "1",
                         "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="session")
def lab(project):
    "The address of a JupyterLab in the copy."
    port = free_port()
    command = [BIN / "jupyter", "lab", "--no-browser", "--allow-root", f"--ServerApp.port={port}",
               "--IdentityProvider.token=", f"--ServerApp.root_dir={project}", "--LabApp.expose_app_in_browser=True"]
    log = open(project.parent / "lab.log", "w")
    server = subprocess.Popen(command, cwd=project, env=environment(project), stdout=log, stderr=log)
    deadline = time.time() + 120
    while time.time() < deadline:
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0: break
        assert server.poll() is None, Path(log.name).read_text()[-3000:]
        time.sleep(.2)
    yield f"http://127.0.0.1:{port}/lab"
    server.terminate()
    server.wait(30)


@pytest.fixture(scope="session")
def browser():
    if not CHROMIUM: pytest.fail("no Chromium was found: install the distribution's package chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def jupyter(browser, lab):
    "A page with JupyterLab's program, whose commands are those behind its menus."
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.goto(lab)
    page.wait_for_function("window.jupyterapp !== undefined", timeout=120_000)
    page.evaluate("() => window.jupyterapp.restored")
    return page


OPEN = """async path => {
  const widget = await jupyterapp.commands.execute("docmanager:open", {path, factory: "Notebook"});
  await widget.context.ready;
  await widget.context.sessionContext.ready;
  await widget.revealed;
  jupyterapp.shell.activateById(widget.id);   // the commands act on the active notebook
  window.opened = widget;
}"""
SAVE = "() => opened.context.save()"
CLOSE = """async () => {
  await opened.context.sessionContext.shutdown();
  opened.close();
}"""
SET = """([old, value]) => {
  for (const cell of opened.content.model.cells) {
    const source = cell.sharedModel.getSource();
    if (source.includes(old)) { cell.sharedModel.setSource(source.replaceAll(old, value)); return true; }
  }
  return false;
}"""
RUN_ALL = "() => jupyterapp.commands.execute('notebook:run-all-cells')"
OUTPUTS = """() => opened.content.model.toJSON().cells.map(cell => ({source: [cell.source].flat().join(""),
  count: cell.execution_count, outputs: cell.outputs || []}))"""


def run_all(jupyter, project, notebook, changes):
    "Open a notebook, change cells, press Run All; returns its cells with their outputs."
    shutil.copyfile(ROOT / notebook, project / notebook)   # without the changes of another test
    jupyter.evaluate(OPEN, notebook)
    for old, value in changes.items(): assert jupyter.evaluate(SET, [old, value]), f"no cell of {notebook} has {old}"
    jupyter.evaluate(RUN_ALL)
    cells = jupyter.evaluate(OUTPUTS)
    jupyter.evaluate(SAVE)   # else a dialogue asks whether to
    jupyter.evaluate(CLOSE)
    return cells


def errors(cells):
    return [f"{o['ename']}: {o['evalue']}" for cell in cells for o in cell["outputs"] if o["output_type"] == "error"]


def text(cells):
    "All that a reader sees below the cells, as plain text and HTML."
    parts = [o.get("text") or list(o.get("data", {}).values()) for cell in cells for o in cell["outputs"]]
    flat = lambda x: "".join(map(flat, x)) if isinstance(x, list) else str(x)
    return flat(parts)


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_opening_and_saving_leaves_the_file_as_it_was(jupyter, project, notebook):
    before = (project / notebook).read_bytes()
    jupyter.evaluate(OPEN, notebook)
    stamp = (project / notebook).stat().st_mtime_ns
    jupyter.evaluate(SAVE)
    assert (project / notebook).stat().st_mtime_ns > stamp   # it was written
    jupyter.evaluate(CLOSE)
    assert (project / notebook).read_bytes() == before


RUN_LINE = {'run = "pocket"': f'run = "{RUN}"'}


@pytest.mark.parametrize("notebook, changes", [
    ("nbs/00_regime_w.ipynb", {}), ("nbs/03_preferences.ipynb", RUN_LINE),
    ("nbs/index.ipynb", {'explore.load("pocket")': f'explore.load("{RUN}")', 'browse("pocket")': f'browse("{RUN}")'})])
def test_run_all_ends_without_an_error(jupyter, project, notebook, changes):
    cells = run_all(jupyter, project, notebook, changes)
    assert not errors(cells)
    assert sum(cell["count"] is not None for cell in cells) > 4


def test_other_rules_and_run_all_explore_the_finished_run(jupyter, project):
    "Policy and threshold are changed: the page says so, goes on, and the run's files stay as they are."
    pairs = project / "outputs" / RUN / "03_preferences/pairs.jsonl"
    before = pairs.read_bytes()
    policy = read_json(pairs.with_name("manifest.json"))["parameters"]["policy"]
    other = "hard" if policy != "hard" else "all"
    cells = run_all(jupyter, project, "nbs/03_preferences.ipynb", RUN_LINE | {
        'policy = "capped"': f'policy = "{other}"', "threshold = 0.01": "threshold = 0.2"})
    assert not errors(cells)
    assert "repair(" in text(cells) and other in text(cells)
    assert pairs.read_bytes() == before


@pytest.fixture
def opened(browser):
    "Open a file and record what the page asks for and complains about."
    pages = []

    def open_page(path: Path):
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.asked, page.complaints = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("console", lambda m: page.complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: page.complaints.append(str(e)))
        page.goto(path.as_uri())
        pages.append(page)
        return page

    yield open_page
    for page in pages: page.close()


@pytest.mark.parametrize("name", ["report.html", "browse.html", "01_sft.html", "03_preferences.html", "05_eval.html"])
def test_a_page_complains_of_nothing_and_asks_for_nothing(opened, project, name):
    page = opened(project / "outputs" / RUN / name)
    page.wait_for_timeout(500)
    assert page.complaints == []
    assert [url for url in page.asked if not url.startswith(("file://", "data:"))] == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_links_of_the_report_lead_somewhere(opened, project):
    page = opened(project / "outputs" / RUN / "report.html")
    links = page.eval_on_selector_all("a[href]", "links => links.map(a => a.href)")
    files = {re.sub("[#?].*", "", link) for link in links if link.startswith("file://")}
    assert any(f.endswith("browse.html") for f in files)
    assert [f for f in files if not Path(f.removeprefix("file://")).exists()] == []


def listed(page) -> int:
    "How many questions the page says that it lists."
    return int(page.inner_text("#count").split(" of ")[0].replace(",", ""))


def cards(page) -> list[str]: return page.eval_on_selector_all("#cards .card", "cards => cards.map(c => c.className)")


def test_filters_of_the_browser(opened, project):
    page = opened(project / "outputs" / RUN / "browse.html")
    page.wait_for_selector("#layout:not([hidden])")
    everything = listed(page)
    assert everything > 0 and len(cards(page)) > 1
    if not page.is_visible("#correct"): page.click("#filters summary")   # folded on a narrow screen
    page.select_option("#correct", "0")
    page.check("#only")
    assert 0 < listed(page) <= everything
    assert all("no" in card.split() for card in cards(page))
    page.click("#clear")
    page.select_option("#agree", "1")
    agree = listed(page)
    page.select_option("#agree", "0")
    assert agree + listed(page) == everything
    page.click("#clear")
    page.fill("#search", "no question has these words")
    assert listed(page) == 0
    page.fill("#search", "")
    assert listed(page) == everything
    assert page.complaints == []


def test_gained_and_lost_are_mirror_images(opened, project):
    page = opened(project / "outputs" / RUN / "browse.html")
    page.wait_for_selector("#layout:not([hidden])")
    page.click("#views button:nth-child(2)")
    if not page.is_visible("#correct"): page.click("#filters summary")   # folded on a narrow screen
    models = page.eval_on_selector_all("#before option", "options => options.map(o => o.value)")
    assert len(models) > 1
    page.select_option("#before", models[0])
    page.select_option("#after", models[1])
    counts = {}
    for change in ("gained", "lost"):
        page.select_option("#change", change)
        counts[change] = listed(page)
    page.select_option("#before", models[1])
    page.select_option("#after", models[0])
    assert listed(page) == counts["gained"]   # lost the other way round
    assert sum(counts.values()) > 0


def test_a_weight_redraws_histogram_and_pairs(opened, project):
    page = opened(project / "outputs" / RUN / "browse.html")
    page.wait_for_selector("#layout:not([hidden])")
    if not page.is_visible("#weights"): page.click("#panel summary")
    before = page.inner_html("#histogram"), page.inner_text("#counts")
    page.fill("[type=number][aria-label='Weight of correct']", "-3")
    page.wait_for_function("before => document.getElementById('histogram').innerHTML !== before", arg=before[0])
    page.fill("#threshold", "50")
    page.wait_for_function("before => document.getElementById('counts').innerText !== before", arg=before[1])
    page.click("#reset")
    page.fill("#threshold", "0.01")
    page.wait_for_function("before => document.getElementById('histogram').innerHTML === before", arg=before[0])
