"A small but real run that several tests share: a short SFT, a few rollouts, their pairs."
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from looper_math.records import ROOT, run_folder
from looper_math.runs import parameters_of

# A shell lets background jobs and their children ignore Ctrl-C; the tests of an interrupt need the default.
signal.signal(signal.SIGINT, signal.default_int_handler)
RUN = "pytest-" + os.environ.get("PYTEST_XDIST_WORKER", "pipeline")   # workers side by side must not share a run
SMALL = {
    "01_sft": {"limit": 96, "trainer": {"num_train_epochs": 1}, "dev_limit": 8},
    "02_rollouts": {"limit": 24},
    "03_preferences": {},
    "04_dpo": {"min_pairs": 2, "trainer": {"num_train_epochs": 2, "per_device_train_batch_size": 4}, "dev_limit": 8},
    "05_eval": {"limit": 16},
    "06_online_rl": {},
}


def fresh(name: str) -> Path:
    "The folder of a new run."
    folder = run_folder(f"{RUN}-{name}")
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def papermill(phase: str, out: Path, **parameters) -> subprocess.CompletedProcess:
    "One phase as its user runs it; parameters beyond the small run's."
    out.parent.mkdir(parents=True, exist_ok=True)
    values = small(phase, **parameters)
    flags = [x for k in {"run": RUN} | SMALL[phase] | parameters for x in ("-p", k, str(values[k]))]
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", f"nbs/{phase}.ipynb", str(out), *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


WORKER = """
import sys, json
from looper_math import {module} as phase
s = phase.{settings}(**json.loads(sys.argv[1]))
phase.{call}(s)
"""


def small(phase: str, **changes) -> dict:
    "Parameters of a phase: the notebook's defaults, the small run's, then `changes`; options of `trainer` one by one."
    values = {k: p.default for k, p in parameters_of(ROOT / "nbs" / f"{phase}.ipynb").items()} | {"run": RUN}
    for part in (SMALL[phase], changes):
        options = {"trainer": values["trainer"] | part["trainer"]} if "trainer" in part else {}
        values |= part | options
    return values


def start(module: str, settings: str, call: str, parameters: dict) -> subprocess.Popen:
    "The phase in a process of its own, so that it can be killed."
    code = WORKER.format(module=module, settings=settings, call=call)
    command = [sys.executable, "-c", code, json.dumps(parameters)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def kill_when(process: subprocess.Popen, reached, limit: float = 120):
    "Send SIGKILL as soon as `reached()` is true."
    deadline = time.time() + limit
    while not reached():
        assert process.poll() is None, f"ended before it could be killed: {process.stderr.read()[-2000:]}"
        assert time.time() < deadline, "never got to the point of the kill"
        time.sleep(.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


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


@pytest.fixture(scope="session")
def random_adapter(tmp_path_factory):
    "Folder of a rank-4 adapter of the pocket base with random weights, strong enough to change what the model says."
    import torch
    from peft import get_peft_model

    from looper_math import models
    torch.manual_seed(0)
    model = get_peft_model(models.load_base("data/pocket-base", "float32"), models.lora_config(rank=4, alpha=8))
    for name, p in model.named_parameters():
        if "lora_B" in name: torch.nn.init.normal_(p, std=.05)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def other_adapter(random_adapter, tmp_path_factory):
    "Folder of the same adapter with half of its update."
    from safetensors.torch import load_file, save_file
    folder = shutil.copytree(random_adapter, tmp_path_factory.mktemp("other") / "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    halved = {name: w * (.5 if "lora_B" in name else 1) for name, w in weights.items()}
    save_file(halved, folder / "adapter_model.safetensors")
    return str(folder)
