"A phase notebook run by papermill does the run's own work and nothing else: no other model, no other folder."
import shutil
import subprocess
import sys

import nbformat
import pytest
import yaml
from conftest import SMALL, small

from looper_math.records import ROOT, run_folder

# Each base that is loaded leaves a line. Adapters are put onto a base and are not counted.
COUNT = """
import transformers
_load = transformers.PreTrainedModel.from_pretrained.__func__
def _counted(cls, name, *args, **kwargs):
    with open({log!r}, "a", encoding="utf-8") as f: f.write(str(name) + "\\n")
    return _load(cls, name, *args, **kwargs)
transformers.PreTrainedModel.from_pretrained = classmethod(_counted)
"""


def epochs(phase): return SMALL[phase]["trainer"]["num_train_epochs"]


EVALUATED = {"base": "", "sft": "01_sft/adapter", "dpo": "04_dpo/adapter"}
CHANGES = {"05_eval": {"models": EVALUATED, "harder": "", "sampling": {"n": 0}, "arm_set": ""}}
# One base for each training; one for the answers of the start, of each epoch and of the control; one that measures
# the distances of all of them. Phase 5 loads one for all adapters.
LOADED = {
    "01_sft": 1 + (1 + epochs("01_sft")) + 1,
    "02_rollouts": 1,
    "03_preferences": 0,
    "04_dpo": 2 + (1 + epochs("04_dpo") + 1) + 1,
    "05_eval": 1,
}


def bases_loaded(phase, folder, run):
    "Execute a phase's notebook after a cell that records which bases are loaded; returns their names."
    notebook, log = nbformat.read(ROOT / f"nbs/{phase}.ipynb", 4), folder / f"{phase}.log"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(COUNT.format(log=str(log))))
    nbformat.write(notebook, folder / f"{phase}.ipynb")
    names = {"run": run} | SMALL[phase] | CHANGES.get(phase, {})
    values = {name: value for name, value in small(phase, run=run, **CHANGES.get(phase, {})).items() if name in names}
    (folder / "values.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", folder / f"{phase}.ipynb", folder / "out.ipynb",
               "-f", folder / "values.yaml", "--cwd", ROOT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return log.read_text(encoding="utf-8").split() if log.exists() else []


def folders():
    "Folders in which a phase could leave something, without those of tests that run beside this one."
    places = [ROOT, *(ROOT / name for name in ("nbs", "nbs/lib", "data", "outputs"))]
    return {path for place in places for path in place.iterdir() if path.is_dir() and "pytest-" not in path.name}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    "Phase → bases that it loads, in a run of its own; and the folders that the phases leave beside it."
    run = run_folder("own-work")
    shutil.rmtree(run, ignore_errors=True)
    before, folder = folders(), tmp_path_factory.mktemp("own-work")
    yield {phase: bases_loaded(phase, folder, run.name) for phase in LOADED}, folders() - before - {run}
    shutil.rmtree(run)


@pytest.mark.parametrize("phase", LOADED)
def test_a_phase_loads_the_models_of_its_own_run(loaded, phase):
    assert loaded[0][phase] == [str(ROOT / "data/pocket-base")] * LOADED[phase]


def test_no_folder_is_left_beside_the_run(loaded):
    assert not loaded[1]
