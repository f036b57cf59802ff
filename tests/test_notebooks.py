"What holds for every notebook as a file and for every phase notebook as a page."
import ast
import re
import shutil
import statistics

import nbformat
import pytest
from jupyter_server.services.contents.largefilemanager import LargeFileManager
from nbdev.clean import clean_jupyter

from looper_math.records import ROOT

NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
PHASES = sorted((ROOT / "nbs").glob("0[1-9]_*.ipynb"))
MODULES = sorted(p for p in (ROOT / "looper_math").glob("[a-z]*.py"))
RUN = re.compile(r"^(\w+ = )?(launch\.launch|main|run_phase)\(", re.M)


def name(path): return path.stem


def code_cells(path): return [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]


def exported(cell): return re.match(r"#\| ?export", cell.source)


@pytest.fixture(scope="module")
def jupyter(tmp_path_factory):
    "JupyterLab's file manager with nbdev's hook, on a copy of the notebooks."
    root = tmp_path_factory.mktemp("jupyter")
    shutil.copytree(ROOT / "nbs", root / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copy(ROOT / "settings.ini", root)
    return LargeFileManager(root_dir=str(root), pre_save_hook=clean_jupyter)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name)
def test_opening_and_saving_in_jupyterlab_changes_nothing(notebook, jupyter):
    path = str(notebook.relative_to(ROOT))
    content = jupyter.get(path)["content"]
    jupyter.save({"type": "notebook", "format": "json", "content": content}, path)
    saved = (jupyter.root_dir + "/" + path)
    assert open(saved, "rb").read() == notebook.read_bytes()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name)
def test_size_of_a_notebook(notebook):
    cells = nbformat.read(notebook, 4).cells
    assert len(cells) <= 90
    long = {c.id: n for c in cells if c.cell_type == "code" and (n := len(c.source.splitlines())) > 60}
    assert not long, "code cells of more than 60 lines"


@pytest.mark.parametrize("notebook", PHASES, ids=name)
def test_shape_of_a_phase_notebook(notebook):
    "Parameters, settings and main come first, the first result in the first half."
    cells, code = nbformat.read(notebook, 4).cells, code_cells(notebook)
    parameters = next(c for c in code if "parameters" in c.metadata.get("tags", []))
    # 20 and `device`, without which a host with a wrong driver trains on its CPUs.
    assert len(ast.parse(parameters.source).body) <= 21
    main = next(k for k, c in enumerate(code, 1) if re.search(r"^def main\(", c.source, re.M))
    assert main <= 14
    run = next(k for k, c in enumerate(cells) if c.cell_type == "code" and RUN.search(c.source))
    result = next(k for k, c in enumerate(cells) if k >= run and c.get("outputs"))
    assert result < len(cells) / 2, f"the first result is cell {result} of {len(cells)}"
    assert len(cells) <= 55
    assert sum(len(c.source.splitlines()) for c in code if exported(c)) <= 200


def functions(): return [n for path in MODULES for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                         if isinstance(n, ast.FunctionDef)]


def test_length_of_lines_and_functions():
    lines = [line for path in MODULES for line in path.read_text(encoding="utf-8").splitlines()
             if path.stem != "_modidx" and not line.startswith("# %%")]
    assert sum(len(line) > 120 for line in lines) <= len(lines) / 100
    assert max(map(len, lines)) <= 140
    assert statistics.median(f.end_lineno - f.lineno + 1 for f in functions()) <= 8
