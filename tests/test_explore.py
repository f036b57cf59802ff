"Run All with changed parameters on a finished run: in JupyterLab the page is shown, under papermill it is an error."
import ast
import os
import shutil
import subprocess
import sys

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from test_preferences import raw_rollouts

from looper_math import explore, records
from looper_math.preferences import PreferenceSettings, main
from looper_math.records import ROOT, RunConflict
from looper_math.regime_w import score_records
from looper_math.shards import write_records

CHANGED = {"policy": "hard", "threshold": 0.05}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A project whose run `small` has finished phases 2 and 3, with the notebooks' own defaults."
    root = tmp_path_factory.mktemp("project").resolve()
    caches = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for folder in ("looper_math", "nbs"): shutil.copytree(ROOT / folder, root / folder, ignore=caches)
    (root / "data").symlink_to(ROOT / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "ROOT", root)
        scored = list(score_records(raw_rollouts(20), "leave-one-out"))
        write_records(root / "outputs/small/02_rollouts/rollouts.jsonl", scored)
        main(PreferenceSettings(run="small", base="data/pocket-base", rollouts="", weights={}, preset="leave-one-out",
                                policy="capped"))
    return root


def files(folder): return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def page(project, **parameters):
    "Phase 3's notebook as a user saves it, with other values in the parameters cell."
    notebook = nbformat.read(project / "nbs/03_preferences.ipynb", 4)
    cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in ({"run": "small"} | parameters).items())
    return notebook


def run_all(notebook, project, monkeypatch, in_lab=True):
    "Run All; a kernel of JupyterLab may ask its user with `input`, one of papermill may not."
    monkeypatch.setenv("PYTHONPATH", str(project))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    client = NotebookClient(notebook, timeout=600, kernel_name="python3",
                            resources={"metadata": {"path": str(project / "nbs")}})
    with client.setup_kernel():
        client.kc.allow_stdin = in_lab
        for k, cell in enumerate(notebook.cells): client.execute_cell(cell, k)
    return notebook


def shown(notebook, text): return "\n".join(
    str(output.get("text", output.get("data", {}).get("text/html", ""))) for cell in notebook.cells
    if cell.cell_type == "code" and text in cell.source for output in cell.outputs)


def test_policy_and_threshold_changed_and_run_all(project, monkeypatch):
    "The page shows the finished run, the exploration shows the changed parameters, and no file changes."
    before = files(project / "outputs")
    done = run_all(page(project, **CHANGED), project, monkeypatch)
    assert files(project / "outputs") == before
    conflict = shown(done, "explore.reconcile(")
    assert "policy: &#x27;capped&#x27; there, &#x27;hard&#x27; now" in conflict
    assert "explore.load('small').repair(policy='hard', threshold=0.05)" in conflict
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "ROOT", project)
        run = explore.load("small")
        changes = explore.compare(run.pairs, run.repair(**CHANGED), names=("this run", "parameters cell"))
    assert len(changes.lost) > 0
    assert changes.sentences[0] in shown(done, "explore.compare(run_now.pairs, run_now.repair(")
    assert f"{len(run.pairs):,} pairs from" in shown(done, "describe_pairs(")


def test_a_preset_changed_and_run_all(project, monkeypatch):
    done = run_all(page(project, preset="platinum-11"), project, monkeypatch)
    assert "repair(preset='platinum-11')" in shown(done, "explore.reconcile(")


def test_without_a_person_the_conflict_is_an_error(project, monkeypatch):
    "Also for nbclient and nbconvert; the error is the message, without frames."
    with pytest.raises(CellExecutionError) as stopped:
        run_all(page(project, **CHANGED), project, monkeypatch, in_lab=False)
    assert stopped.value.ename == "RunConflict" and "File " not in stopped.value.traceback
    assert "explore.load('small').repair(policy='hard', threshold=0.05)" in stopped.value.traceback


def test_papermill_ends_with_an_error(project, tmp_path):
    before = files(project / "outputs")
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "nbs/03_preferences.ipynb",
               str(tmp_path / "out.ipynb"), "-p", "run", "small", "-p", "policy", "hard"]
    done = subprocess.run(command, cwd=project, env=os.environ | {"PYTHONPATH": str(project)}, capture_output=True,
                          text=True)
    assert done.returncode != 0 and "explore.load('small').repair(policy='hard')" in done.stderr
    assert files(project / "outputs") == before


def test_the_printed_lines_work(project, monkeypatch):
    "Those that explore give the changed pairs, and those of a new run make them."
    monkeypatch.setattr(records, "ROOT", project)
    s = PreferenceSettings(run="small", base="data/pocket-base", rollouts="", weights={}, preset="leave-one-out",
                           **CHANGED)
    with pytest.raises(RunConflict) as refused: main(s)
    lines = [line.strip() for line in str(refused.value).splitlines() if line.startswith("    ")]
    space = {}
    exec(lines[0], space)
    pairs = eval(lines[1], space)
    values = {name.strip(): ast.literal_eval(value) for name, _, value in (line.partition("=") for line in lines[2:])}
    assert values == {"run": "small-2", "rollouts": "outputs/small/02_rollouts/rollouts.jsonl"}
    new = main(PreferenceSettings(base="data/pocket-base", weights={}, preset="leave-one-out", **CHANGED, **values))
    shutil.rmtree(project / "outputs/small-2")
    assert pairs[list(new[0])].to_dict("records") == new
