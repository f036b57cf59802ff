"Online RL after a kill, and on two processes."
import shutil

import pytest
from conftest import RUN, kill_when, small, start
from safetensors.torch import load_file

from looper_math import online_rl, training
from looper_math.launch import launch
from looper_math.records import read_json, run_folder

OPTIONS = {"per_device_train_batch_size": 16, # 2 questions by 8 arms
           "gradient_accumulation_steps": 1, "save_steps": 2, "max_completion_length": 60, "bf16": False}
SHARED = {"arm_set": "guide-8", "limit": 8, "dev_limit": 8}


def settings(small_run, name: str, options: dict, **changes) -> online_rl.OnlineSettings:
    "Four updates on two questions each, for a run without a folder."
    run = f"{RUN}-{name}"
    shutil.rmtree(run_folder(run), ignore_errors=True)
    parameters = {"run": run, "adapter": str(small_run / "01_sft/adapter"), "trainer": OPTIONS | options}
    return online_rl.OnlineSettings(**small("06_online_rl", **parameters | SHARED | changes))


@pytest.mark.parametrize("algorithm, options", [("grpo", {"num_train_epochs": 2}), ("ppo", {"num_iterations": 2})])
def test_online_rl_after_a_kill(small_run, algorithm, options):
    """kill -9 after the first checkpoint, then the phase again: weights and samples of an uninterrupted training.

    Over two epochs, and with two updates on each batch of samples."""
    unbroken, killed = (settings(small_run, f"{algorithm}-{name}", options, algorithm=algorithm, limit=4)
                        for name in ("unbroken", "killed"))
    process = start("online_rl", "OnlineSettings", "main", vars(killed))
    kill_when(process, lambda: training.checkpoints(killed.trained))
    assert not (killed.folder / "manifest.json").exists()
    for s in (unbroken, killed): online_rl.main(s)
    for name in ["adapter_model.safetensors"] + ["value_head.safetensors"] * (algorithm == "ppo"):
        a, b = (load_file(s.trained / name) for s in (unbroken, killed))
        assert a.keys() == b.keys() and max((a[k] - b[k]).abs().max().item() for k in a) < 1e-5
    samples = [[read_json(p) for p in sorted(s.samples.iterdir())] for s in (unbroken, killed)]
    assert samples[0] == samples[1]
    assert read_json(killed.folder / "manifest.json")["metrics"]["heldout"]["n"] == SHARED["dev_limit"]
    for s in (unbroken, killed): shutil.rmtree(run_folder(s.run))


def test_two_processes_do_what_one_does(small_run):
    "Samples, rewards, gradients and the value model's loss are those of one process with the whole batch."
    logs = []
    for n in (1, 2):
        options = {"per_device_train_batch_size": 16 // n}
        s = settings(small_run, f"online-{n}", options, algorithm="ppo", n_gpu=n, dev="")
        launch("looper_math.online_rl", s, n_gpu=n)
        logs.append(training.history(s.trained)[["reward", "grad_norm", "value/loss", "kl"]])
        shutil.rmtree(run_folder(s.run))
    one, two = logs
    assert len(one) == 4 and list(one.index) == list(two.index)
    assert (abs(one.reward - two.reward) < 1e-6).all(), (one, two)
    assert (abs(one - two) <= .02 * abs(one) + 1e-5).all().all(), (one, two)
