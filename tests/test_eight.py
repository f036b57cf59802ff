"""Every phase on eight processes, as on the host with eight GPUs, one of them later than the others.

The tests follow each other as the phases do. They are run by `make test-eight` and not by `make test`: eight processes
need 6 GB, and some minutes on two cores."""
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import fresh, small
from safetensors.torch import load_file

from looper_math import dpo, evaluation, launch, online_rl, preferences, rollouts, sft, training
from looper_math.records import read_json, read_records

N = 8
HELD_OUT = {"dev_limit": 9}  # one process answers two of them
SAMPLING = {"n": 2, "temperature": .7, "top_p": .95, "seed": 0, "models": 1, "questions": 4}


@pytest.fixture(autouse=True, scope="module")
def one_is_late():
    "`launch` starts tests/slow_phase.py in the place of a phase wherever it starts several processes."
    here, start = str(Path(__file__).parent), launch.launch
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", here, prepend=os.pathsep)
        patch.syspath_prepend(here)
        late = lambda module, s, n_gpu=0, *rest: start("slow_phase" if n_gpu > 1 else module, s, n_gpu, *rest)
        patch.setattr(launch, "launch", late)
        yield


def times(folder: Path, name: str) -> list[float]:
    "What the processes noted of themselves: when they were done, or when they left."
    return [float((folder / f"{name}{rank}").read_text()) for rank in range(N)]


def check_training(s, adapter: Path):
    "The training is finished, its weights are finite, the processes shared the held-out questions and left together."
    assert min(times(s.folder.parent, "left")) >= max(times(s.folder.parent, "done"))
    weights = load_file(adapter / "adapter_model.safetensors")
    assert all(w.isfinite().all() for w in weights.values()) and any(w.abs().max() > 0 for w in weights.values())
    assert training.history(adapter).loss.notna().all()
    assert read_json(s.folder / "manifest.json")["metrics"]["heldout"]["n"] == HELD_OUT["dev_limit"]
    asked = [(s.folder.parent / f"asked{rank}").read_text().split() for rank in range(N)]
    assert sorted(map(len, asked)) == [1] * 7 + [2]
    stages = {}
    for row in read_records(s.folder / "heldout.jsonl"): stages.setdefault(row["stage"], []).append(row["question_id"])
    assert all(ids == [q["question_id"] for q in training.heldout_questions(s, {})] for ids in stages.values())
    for note in s.folder.parent.glob("[adl]*[0-7]"): note.unlink()


@pytest.fixture(scope="module")
def run():
    "Folder of a run with its SFT adapter, made by eight processes."
    folder = fresh("eight")
    trainer = {"num_train_epochs": 2, "per_device_train_batch_size": 2}
    s = sft.SFTSettings(**small("01_sft", run=folder.name, n_gpu=N, limit=40, trainer=trainer, **HELD_OUT))
    launch.launch("looper_math.sft", s, N)
    check_training(s, s.adapter)
    assert read_json(s.folder / "manifest.json")["counts"]["updates"] == 2 * -(-40 // 16)
    yield folder
    shutil.rmtree(folder)


def test_rollouts_are_those_of_one_process(run):
    files = []
    for name, n in ((run.name, N), (fresh("eight-one").name, 1)):
        parameters = {"run": name, "n_gpu": n, "limit": 20, "adapter": str(run / "01_sft/adapter")}
        s = rollouts.RolloutSettings(**small("02_rollouts", **parameters))
        rollouts.run_phase(s)
        files.append(s.path.read_bytes())
    assert files[0] == files[1] and files[0].count(b"\n") == 20
    shutil.rmtree(s.folder.parent)


def test_dpo_and_its_control(run):
    preferences.main(preferences.PreferenceSettings(**small("03_preferences", run=run.name)))
    trainer = {"num_train_epochs": 1, "per_device_train_batch_size": 1}
    s = dpo.DPOSettings(**small("04_dpo", run=run.name, n_gpu=N, trainer=trainer, **HELD_OUT))
    launch.launch("looper_math.dpo", s, N)
    check_training(s, s.trained)
    controlled = load_file(s.controlled / "adapter_model.safetensors")
    assert all(torch.isfinite(w).all() for w in controlled.values())
    counts = read_json(s.folder / "manifest.json")["counts"]
    assert counts["updates"] == -(-counts["pairs"] // N)


def test_evaluation_is_that_of_one_process(run):
    models = {"base": "", "dpo": str(run / "04_dpo/adapter")}
    parameters = {"models": models, "comparisons": [], "limit": 10, "sampling": SAMPLING, "arm_set": ""}
    folders = []
    for name, n in ((run.name, N), (fresh("eight-one").name, 1)):
        s = evaluation.EvalSettings(**small("05_eval", run=name, n_gpu=n, **parameters))
        evaluation.run_phase(s)
        folders.append(s.folder)
    names = [sorted(p.name for p in folder.glob("*.jsonl")) for folder in folders]
    assert names[0] == names[1] and len(names[0]) == 5
    for name in names[0]: assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    shutil.rmtree(s.folder.parent)


def test_online_rl(run):
    trainer = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_completion_length": 60,
               "save_steps": 1}
    parameters = {"arm_set": "guide-8", "limit": 16, "trainer": trainer, "n_gpu": N}
    s = online_rl.OnlineSettings(**small("06_online_rl", run=run.name, **parameters, **HELD_OUT))
    launch.launch("looper_math.online_rl", s, N)
    check_training(s, s.trained)
    assert read_json(s.folder / "manifest.json")["counts"] == {"questions": 16, "updates": 2, "trajectories": 128}
