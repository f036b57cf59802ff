"Training on several processes, after a kill, on own solutions, and with its control."
import collections
import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import SMALL, fresh, kill_when, papermill, small, start
from safetensors.torch import load_file

from looper_math import dpo, dpo_trainer, models, sft, training
from looper_math.data import load_questions
from looper_math.launch import launch
from looper_math.records import read_json, read_records

ADAPTER = "adapter_model.safetensors"


def distance(a, b) -> float:
    "The largest difference between two adapters' weights."
    x, y = load_file(a / ADAPTER), load_file(b / ADAPTER)
    assert x.keys() == y.keys()
    return max((x[k] - y[k]).abs().max().item() for k in x)


@pytest.fixture
def inputs(small_run):
    "What phase 4 reads, from the small run."
    files = {"adapter": "01_sft/adapter", "pairs": "03_preferences/pairs.jsonl",
             "rollouts": "02_rollouts/rollouts.jsonl"}
    return {name: str(small_run / path) for name, path in files.items()}


PLAIN = {"loss_type": ["sigmoid"], "loss_weights": None}   # DPO without its likelihood term


@pytest.mark.parametrize("module, settings, phase, trained", [
    (sft, sft.SFTSettings, "01_sft", "adapter"), (dpo, dpo.DPOSettings, "04_dpo", "trained")], ids=["sft", "dpo"])
def test_two_processes_lose_what_one_loses(inputs, module, settings, phase, trained):
    """Half the batch on each of two processes: every update has the loss of one process with the whole batch, to 0.1 %.

    DPO's likelihood term is a mean over the tokens of a process, so it is left out here."""
    options = {"learning_rate": 1e-3, "num_train_epochs": 1, "bf16": False} | (PLAIN if phase == "04_dpo" else {})
    shared = {"dev": ""} | (inputs | {"control_cap": 0} if phase == "04_dpo" else {"limit": 40})
    logs = []
    for n in (1, 2):
        folder = fresh(f"{n}-processes")
        trainer = options | {"per_device_train_batch_size": 8 // n}
        s = settings(**small(phase, run=folder.name, n_gpu=n, trainer=trainer, **shared))
        assert s.effective_batch == 8
        launch(f"looper_math.{module.__name__.split('.')[-1]}", s, n_gpu=n)
        logs.append(training.history(getattr(s, trained)).loss)
        shutil.rmtree(folder)
    rows = len(read_records(inputs["pairs"])) if phase == "04_dpo" else shared["limit"]
    # On two processes a last batch that is not full is filled up with repeated rows.
    one, two = (log.iloc[:rows // 8] for log in logs)
    assert len(one) >= 3 and list(one.index) == list(two.index)
    assert (abs(one - two) / one).max() < 1e-3, (one.tolist(), two.tolist())


def test_two_processes_share_the_held_out_questions(small_run, monkeypatch):
    "Each answers half of them, and the file is that of one process: here of the base, which no training has changed."
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    answers = []
    for n, module in ((1, "looper_math.sft"), (2, "slow_phase")):
        folder = fresh(f"held-out-{n}")
        s = sft.SFTSettings(**small("01_sft", run=folder.name, n_gpu=n, limit=32, dev_limit=7))
        launch(module, s, n_gpu=n)
        answers.append([row for row in read_records(s.folder / "heldout.jsonl") if row["stage"] == "base"])
    assert [len((folder / f"asked{rank}").read_text().split()) for rank in (0, 1)] == [4, 3]
    for n in (1, 2): shutil.rmtree(folder.with_name(folder.name[:-1] + str(n)))
    assert [r["question_id"] for r in answers[0]] == [r["question_id"] for r in answers[1]]
    assert [r["completion"] for r in answers[0]] == [r["completion"] for r in answers[1]] and answers[0][0]["kl"] == 0


def test_held_out_answers_take_four_bits_when_the_training_does(small_run, monkeypatch):
    "Every model that answers, and the one for the KL divergence: otherwise a 24 GB GPU would have to hold 16 bits."
    load, bits = models.load_base, []

    def recorded(name, dtype="auto", load_in_4bit=False):
        bits.append(load_in_4bit)
        return load(name, dtype)

    monkeypatch.setattr(models, "load_base", recorded)
    s = sft.SFTSettings(**small("01_sft", dev_limit=2, max_new_tokens=20))
    s.load_in_4bit = True
    answers, _ = training.evaluate_checkpoints(s, {"base": None}, small_run / "01_sft/adapter",
                                               training.heldout_questions(s, {}))
    assert bits == [True] * 3 and len(answers) == 4


def test_sft_after_a_kill(small_run):
    "kill -9 after the first epoch, then the phase again: the adapter of an uninterrupted training."
    parameters = dict(trainer={"num_train_epochs": 2}, limit=40, dev="")
    folders = [fresh("sft-whole"), fresh("sft-killed")]
    process = start("sft", "SFTSettings", "main", small("01_sft", run=folders[1].name, **parameters))
    kill_when(process, lambda: training.checkpoints(folders[1] / "01_sft" / "adapter"))
    assert not (folders[1] / "01_sft" / "manifest.json").exists()
    for folder in folders: sft.main(sft.SFTSettings(**small("01_sft", run=folder.name, **parameters)))
    whole, resumed = (f / "01_sft" / "adapter" for f in folders)
    assert distance(whole, resumed) < 1e-5
    assert len(training.checkpoints(resumed)) == 2
    for folder in folders: shutil.rmtree(folder)


@pytest.mark.parametrize("module, settings, phase", [
    (sft, sft.SFTSettings, "01_sft"), (dpo, dpo.DPOSettings, "04_dpo")], ids=["sft", "dpo"])
def test_a_kill_within_an_epoch(inputs, module, settings, phase):
    """kill -9 after a checkpoint of `save_steps`, then the phase again: the adapters of an uninterrupted training.

    The held-out questions are answered at the ends of epochs alone."""
    options = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "save_steps": 3}
    shared = {"trainer": options, "dev_limit": 4, "keep": "best"} | (inputs if phase == "04_dpo" else {"limit": 20})
    folders = [fresh(f"{phase}-{name}") for name in ("whole", "killed")]
    parameters = [small(phase, run=folder.name, **shared) for folder in folders]
    process = start(module.__name__.split(".")[-1], settings.__name__, "main", parameters[1])
    checkpoints = lambda: training.checkpoints(folders[1] / phase / "adapter")
    kill_when(process, checkpoints, limit=600)
    for later in checkpoints()[1:]: shutil.rmtree(later)   # where the signal came late
    assert not training.epoch_stages(folders[1] / phase / "adapter")
    for p in parameters: module.main(settings(**p))
    whole, killed = (f / phase for f in folders)
    for name in ("adapter", "control") if phase == "04_dpo" else ("adapter",):
        assert distance(whole / name, killed / name) < 1e-5
        steps, ends = training.checkpoints(killed / name), training.epoch_stages(killed / name)
        assert [p.name for p in steps] == [p.name for p in training.checkpoints(whole / name)]
        assert "checkpoint-3" in [p.name for p in steps]   # of the control it may end an epoch: its rows are sampled
        updates = read_json(killed / name / "trainer_state.json")["global_step"]
        assert {f"checkpoint-{n}" for n in range(3, updates, 3)} <= {p.name for p in steps}
    stages = {r["stage"] for r in read_records(killed / "heldout.jsonl")}
    assert {"epoch 1", "epoch 2"} <= stages and len(stages) == 3 + (len(ends) if phase == "04_dpo" else 0)
    for folder in folders: shutil.rmtree(folder)


def test_own_solutions_as_demonstrations(small_run):
    "SFT on the correct solutions of rollouts, by plain papermill: a row for each distinct one, and held-out answers."
    folder = fresh("self")
    rollouts = small_run / "02_rollouts" / "rollouts.jsonl"
    parameters = dict(run=folder.name, targets="self", rollouts=str(rollouts), own_cap=2, keep="best")
    done = papermill("01_sft", folder / "01_sft.ipynb", **parameters)
    assert done.returncode == 0, done.stderr[-3000:]
    manifest = read_json(folder / "01_sft" / "manifest.json")
    usable = lambda t: t["correct"] and t["finish_reason"] == "stop"
    distinct = [len({t["full_text"].strip() for t in r["trajectories"] if usable(t)}) for r in read_records(rollouts)]
    assert manifest["counts"]["rows"] == sum(min(2, n) for n in distinct) > 0
    assert manifest["metrics"]["heldout"]["n"] == SMALL["01_sft"]["dev_limit"]
    assert {r["stage"] for r in read_records(folder / "01_sft" / "heldout.jsonl")} == {"base", "epoch 1"}
    shutil.rmtree(folder)


def test_the_control_is_trained_beside_dpo(inputs):
    "As many updates as DPO, another adapter than DPO's, and both answer the held-out questions."
    folder = fresh("control")
    s = dpo.DPOSettings(**small("04_dpo", run=folder.name, **inputs))
    dpo.main(s)
    steps = [read_json(f / "trainer_state.json")["global_step"] for f in (s.trained, s.controlled)]
    assert steps[0] == steps[1] > 0
    assert distance(s.trained, s.controlled) > 1e-4
    stages = dict.fromkeys(r["stage"] for r in read_records(s.folder / "heldout.jsonl"))
    assert list(stages) == ["SFT", "epoch 1", "epoch 2", "control"]
    counts = read_json(s.folder / "manifest.json")["counts"]
    rows, batch = counts["control_solutions"], 2 * s.batch_size
    whole, rest = divmod(steps[0], -(-rows // batch))
    assert whole <= counts["control_epochs"] <= whole + (rest > 0)
    assert f"its {rows:,} solutions" in dpo_trainer.control_repeats(rows, counts["control_epochs"])
    shutil.rmtree(folder)


def test_the_controls_options(inputs):
    "DPO's, without the loss; twice the rows in a batch, DPO's updates, and a warm-up of the same share of them."
    trainer = {"learning_rate": .001, "warmup_steps": .2, "weight_decay": .1}
    s = dpo.DPOSettings(**small("04_dpo", trainer=trainer, control_trainer={"learning_rate": .002}, **inputs))
    config = dpo.control_config(s, rows=100, updates=40)
    assert (config.max_steps, config.warmup_steps, config.per_device_train_batch_size) == (40, 8, 8)
    assert (config.learning_rate, config.weight_decay, config.completion_only_loss) == (.002, .1, True)
    own = dataclasses.replace(s, control_trainer={"per_device_train_batch_size": 3, "warmup_steps": 2})
    config = dpo.control_config(own, rows=100, updates=40)
    assert (config.learning_rate, config.warmup_steps, config.per_device_train_batch_size) == (.001, 2, 3)


@pytest.mark.parametrize("loss, options", [
    ("sigmoid_norm", {"gradient_checkpointing": True}), ("ipo", {"train_sampling_strategy": "group_by_length"}),
    ("hinge", {"precompute_ref_log_probs": False}), ("robust", {"label_smoothing": .1})])
def test_every_loss_trains(inputs, loss, options):
    "Each loss with an option of the trainer: from a reference that equals the policy to an adapter that moved."
    folder = fresh(f"loss-{loss}")
    trainer = PLAIN | {"loss_type": [loss]} | options
    dpo.main(dpo.DPOSettings(**small("04_dpo", run=folder.name, trainer=trainer, control_cap=0, dev="", **inputs)))
    assert read_json(folder / "04_dpo" / "manifest.json")["metrics"]["adapter_moved_by"] > 0
    shutil.rmtree(folder)


def test_the_best_epoch_of_dpo_and_of_its_control(inputs):
    "Under keep = best the earliest epoch with the most right answers is kept, of DPO and of its control."
    folder = fresh("best")
    s = dpo.DPOSettings(**small("04_dpo", run=folder.name, keep="best", dev_limit=40, **inputs))
    dpo.main(s)
    right = collections.Counter()
    for row in read_records(s.folder / "heldout.jsonl"): right[row["stage"]] += row["correct"]
    for trained, name in ((s.trained, "epoch"), (s.controlled, "control, epoch")):
        epochs = [right[f"{name} {i}"] for i in range(1, len(training.checkpoints(trained)) + 1)]
        assert distance(trained, training.checkpoints(trained)[epochs.index(max(epochs))]) == 0
    shutil.rmtree(folder)


@pytest.mark.parametrize("source", ["pairs", "rollouts"])
def test_held_out_questions_may_not_be_trained_on(inputs, tmp_path, source):
    "Refused before anything is written, whether DPO would train on the question or only its control would."
    folder = fresh("leak")
    paired = {p["question"] for p in read_records(inputs["pairs"])}
    questions = [r["question"] for r in read_records(inputs["rollouts"])]
    trained = next(q for q in questions if (q in paired) == (source == "pairs"))
    leak = next(q for q in load_questions("data/pocket/practice.jsonl") if q["question"] == trained)
    row = {"question": leak["question"], "answer": f"Answer: {leak['gold_answer']}"}
    (tmp_path / "dev.jsonl").write_text(json.dumps(row) + "\n")
    done = papermill("04_dpo", tmp_path / "out.ipynb", run=folder.name, dev=str(tmp_path / "dev.jsonl"), **inputs)
    assert done.returncode != 0 and f"are also in {inputs[source]}" in done.stderr
    assert not folder.exists()
