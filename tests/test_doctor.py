"What is wrong with a host is said before a run starts: `device: cuda`, and `looper doctor`."
import os
import shutil
import subprocess
import sys

import nbformat
import pytest
import torch
from conftest import RUN, small

from looper_math import cli, launch, models, records, runs, serving
from looper_math.records import ROOT, SettingsError

OLD = "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver"


@pytest.fixture
def old_driver(monkeypatch):
    "A host whose driver is too old for the installed torch: torch sees no GPU, and says why when it is asked."
    def init(): raise RuntimeError(OLD)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)


def built(phase, **changes):
    return runs.build_settings(phase, small(phase) | {"run": f"{RUN}-doctor"} | changes)


# --- the parameter `device`

COMPUTING = ("01_sft", "02_rollouts", "04_dpo", "05_eval", "06_online_rl")


@pytest.mark.parametrize("phase", COMPUTING)
def test_a_phase_is_refused_with_the_reason_of_torch(phase, old_driver):
    "B2: such a host trained on its CPUs, in silence."
    with pytest.raises(runs.Refused, match=f"{phase}: device is cuda, and there is no usable CUDA device: {OLD[:40]}"):
        built(phase, device="cuda")
    assert built(phase, device="auto")["device"] == "auto"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_abel_is_refused_on_a_host_without_a_gpu_and_nothing_is_written():
    "As the user types it. The first phase would load a 7B, so an accepted run is ended after two minutes."
    folder, program = records.run_folder(f"{RUN}-abel"), "from looper_math.cli import looper; looper()"
    command = [sys.executable, "-c", program, "run", "abel-8xh100", "--run", folder.name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "01_sft: device is cuda, and there is no usable CUDA device: Torch not compiled with CUDA" in done.stderr
    assert not folder.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_worker_checks_it_again(monkeypatch, tmp_path):
    "Settings that were made on a host with a GPU reach a worker that has none."
    from looper_math.rollouts import RolloutSettings
    values = small("02_rollouts", run=f"{RUN}-worker")
    job = {"module": "looper_math.rollouts", "settings_class": "RolloutSettings", "world_size": 1,
           "settings": vars(records.settings(RolloutSettings, values)) | {"device": "cuda"}}
    records.write_json(tmp_path / "job.json", job)
    monkeypatch.setattr(sys, "argv", ["worker", str(tmp_path / "job.json")])
    with pytest.raises(SettingsError, match="no usable CUDA device"):
        launch.worker()
    assert not records.run_folder(f"{RUN}-worker").exists()


def test_cpu_hides_the_gpus_from_the_phase_and_its_children(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert built("02_rollouts", device="cpu")["device"] == "cpu"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SettingsError, match="has used a GPU already: restart the kernel"):
        launch.check_device("cpu")


def test_one_run_computes_on_one_kind_of_device(capfd):
    "They are checked in one process, and a process cannot show GPUs again that it has hidden."
    flags = ["-p", "01.device=cpu", "-p", "04.device=cuda"]
    with pytest.raises(SystemExit):
        cli.looper(["run", "smoke", "--run", f"{RUN}-mixed", *flags])
    assert "01_sft.device is cpu and 04_dpo.device is cuda; give all phases the same" in capfd.readouterr().err
    assert not records.run_folder(f"{RUN}-mixed").exists()


def test_a_recorded_run_may_change_its_device(tmp_path, monkeypatch):
    "The parameter guards a run and does not enter its results."
    from looper_math import rollouts
    name = f"{RUN}-resumed"
    of = lambda device: records.settings(rollouts.RolloutSettings, small("02_rollouts", run=name, adapter="none",
                                                                         device=device))
    try:
        rollouts.open_phase(of("auto")).begin()
        monkeypatch.setattr(launch, "check_device", lambda device: None)
        assert rollouts.open_phase(of("cuda"))
    finally:
        shutil.rmtree(records.run_folder(name), ignore_errors=True)


# --- fewer visible GPUs than processes


def test_visible_gpus_shorter_than_the_processes(monkeypatch):
    "An IndexError in the worker before."
    worker = {"LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "3"}
    with pytest.raises(ValueError, match="'3' and names 1 GPUs, so worker 1, counted from 0, has none: name n_gpu"):
        serving.child_environment(worker)
    assert serving.child_environment(worker | {"LOCAL_RANK": "0"})["CUDA_VISIBLE_DEVICES"] == "3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SettingsError, match="at most 1, the GPUs of this host, got 2; CUDA_VISIBLE_DEVICES is '3'"):
        launch.check_processes(2)


def test_hidden_gpus_stay_hidden_from_an_engine():
    env = {"LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": ""}
    assert serving.child_environment(env)["CUDA_VISIBLE_DEVICES"] == ""


# --- the base: at a revision, and there before any worker starts


def test_a_revision_is_passed_to_the_hub(monkeypatch):
    "Both for the safetensors and for the pickles of a repository without any."
    asked = []

    def download(name, revision=None, allow_patterns=None, **options):
        asked.append((name, revision))
        return ROOT / "data"  # holds no safetensors

    monkeypatch.setattr(models, "snapshot_download", download)
    models.source(f"GAIR/Abel-7B-002@{'0' * 40}")
    models.source("GAIR/Abel-7B-002")
    assert asked == 2 * [("GAIR/Abel-7B-002", "0" * 40)] + 2 * [("GAIR/Abel-7B-002", None)]


def test_cards_and_criteria_know_a_base_at_a_revision():
    from looper_math import cards, criteria
    parameters = {"base": "GAIR/Abel-7B-002@main", "questions": "madrylab/gsm8k-platinum"}
    metadata = cards._model_metadata("m", parameters, {"correct": 1, "n": 2}, "dpo")
    assert metadata.base_model == "GAIR/Abel-7B-002"
    evaluation = {"parameters": parameters, "metrics": {"models": {"dpo": {"correct": 84, "n": 100, "cut_off": 0}}}}
    judged = criteria._accuracy_criterion(("dpo", 83, 87, "guide"), {"05_eval": evaluation})
    assert judged.verdict != "not applicable"


@pytest.mark.parametrize("phase", ["01_sft", "04_dpo", "06_online_rl"])
def test_the_base_is_fetched_before_workers_start(phase):
    "Else eight workers download it at once. Phases 2 and 5 do it with the checks of their inputs."
    cells = [c.source for c in nbformat.read(ROOT / f"nbs/{phase}.ipynb", 4).cells if c.cell_type == "code"]
    run = next(source for source in cells if "launch.launch(" in source)
    assert 0 < run.find("models.source(") < run.find("launch.launch(")
