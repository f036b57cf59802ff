"A small but real run that several tests share: a short SFT, a few rollouts, their pairs."
import shutil, subprocess, sys
from pathlib import Path

import pytest

from looper_math.records import ROOT, run_folder

RUN = "pytest-pipeline"
SMALL = {
    "01_sft": {"limit": 96, "epochs": 1},
    "02_rollouts": {"limit": 24, "chunk": 8},
    "03_preferences": {},
    "04_dpo": {"min_pairs": 2, "epochs": 2, "batch_size": 4},
    "05_eval": {"limit": 16, "chunk": 8},
}


def papermill(phase: str, out: Path, **parameters) -> subprocess.CompletedProcess:
    "One phase as its user runs it; parameters beyond the small run's."
    out.parent.mkdir(parents=True, exist_ok=True)
    flags = [x for k, v in ({"run": RUN} | SMALL[phase] | parameters).items() for x in ("-p", k, str(v))]
    command = [str(Path(sys.executable).parent / "papermill"), "--no-progress-bar", f"nbs/{phase}.ipynb", str(out), *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    "Folder of a run whose first three phases are done, each by plain papermill."
    folder = run_folder(RUN)
    shutil.rmtree(folder, ignore_errors=True)
    for phase in ("01_sft", "02_rollouts", "03_preferences"):
        done = papermill(phase, folder / f"{phase}.ipynb")
        assert done.returncode == 0, done.stderr[-3000:]
    yield folder
    shutil.rmtree(folder)
