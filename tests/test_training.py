"Training on several processes, after a kill, on own solutions, and with its control."
import shutil

import pytest
from conftest import RUN, SMALL, kill_when, papermill, small, start
from safetensors.torch import load_file

from looper_math import dpo, sft, training
from looper_math.data import load_questions
from looper_math.launch import launch
from looper_math.records import read_json, read_records, run_folder

ADAPTER = "adapter_model.safetensors"


def distance(a, b) -> float:
    "The largest difference between two adapters' weights."
    x, y = load_file(a / ADAPTER), load_file(b / ADAPTER)
    assert x.keys() == y.keys()
    return max((x[k] - y[k]).abs().max().item() for k in x)


def fresh(name: str):
    "The folder of a run that begins with nothing."
    folder = run_folder(f"{RUN}-{name}")
    shutil.rmtree(folder, ignore_errors=True)
    return folder


@pytest.fixture
def inputs(small_run):
    "What phase 4 reads, from the small run."
    return dict(adapter=str(small_run / "01_sft" / "adapter"), pairs=str(small_run / "03_preferences" / "pairs.jsonl"), rollouts=str(small_run / "02_rollouts" / "rollouts.jsonl"))


@pytest.mark.parametrize("module, settings, phase, trained", [(sft, sft.SFTSettings, "01_sft", "adapter"), (dpo, dpo.DPOSettings, "04_dpo", "trained")], ids=["sft", "dpo"])
def test_two_processes_lose_what_one_loses(inputs, module, settings, phase, trained):
    "Half the batch on each of two processes: the loss of every update is that of one process with the whole batch, to 0.1 %. (DPO's likelihood term is a mean over the tokens of a process, so it is left out here.)"
    options = {"learning_rate": 1e-3, "num_train_epochs": 1, "bf16": False}
    shared = {"dev": ""} | (inputs | dict(control=False, nll_weight=0.) if phase == "04_dpo" else {"limit": 40})
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
    one, two = (log.iloc[:rows // 8] for log in logs)   # a last batch that is not full is filled up with repeated rows on two processes
    assert len(one) >= 3 and list(one.index) == list(two.index)
    assert (abs(one - two) / one).max() < 1e-3, (one.tolist(), two.tolist())


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
    assert [r["stage"] for r in read_records(s.folder / "heldout.jsonl")][:: SMALL["04_dpo"]["dev_limit"]] == ["SFT", "epoch 1", "epoch 2", "control"]
    shutil.rmtree(folder)


@pytest.mark.parametrize("loss, options", [("sigmoid_norm", dict(trainer={"gradient_checkpointing": True})), ("ipo", dict(trainer={"train_sampling_strategy": "group_by_length"})), ("hinge", dict(precompute_reference=False)), ("robust", dict(label_smoothing=.1))])
def test_every_loss_trains(inputs, loss, options):
    "Each loss with an option of the trainer: from a reference that equals the policy to an adapter that moved."
    folder = fresh(f"loss-{loss}")
    dpo.main(dpo.DPOSettings(**small("04_dpo", run=folder.name, loss=loss, nll_weight=0., control=False, dev="") | inputs | options))
    assert read_json(folder / "04_dpo" / "manifest.json")["metrics"]["adapter_moved_by"] > 0
    shutil.rmtree(folder)


def test_the_best_epoch_of_dpo_and_of_its_control(inputs):
    "Under keep = best both give up their last epoch for an earlier one that answers at least as well."
    folder = fresh("best")
    s = dpo.DPOSettings(**small("04_dpo", run=folder.name, keep="best", dev_limit=40, **inputs))
    dpo.main(s)
    right = {}
    for row in read_records(s.folder / "heldout.jsonl"): right[row["stage"]] = right.get(row["stage"], 0) + row["correct"]
    for trained, name in ((s.trained, "epoch"), (s.controlled, "control, epoch")):
        epochs = [right[f"{name} {i}"] for i in range(1, len(training.checkpoints(trained)) + 1)]
        assert distance(trained, training.checkpoints(trained)[epochs.index(max(epochs))]) == 0
    shutil.rmtree(folder)


@pytest.mark.parametrize("source", ["pairs", "rollouts"])
def test_held_out_questions_may_not_be_trained_on(inputs, tmp_path, source):
    "Refused before anything is written, whether DPO would train on the question or only its control."
    folder = fresh("leak")
    paired = {p["question"] for p in read_records(inputs["pairs"])}
    asked = next(q for r in read_records(inputs["rollouts"]) if ((q := r["question"]) in paired) == (source == "pairs"))
    leak = next(q for q in load_questions("data/pocket/practice.jsonl") if q["question"] == asked)
    (tmp_path / "dev.jsonl").write_text('{"question": "%s", "answer": "Answer: %s"}\n' % (leak["question"], leak["gold_answer"]))
    done = papermill("04_dpo", tmp_path / "out.ipynb", run=folder.name, dev=str(tmp_path / "dev.jsonl"), **inputs)
    assert done.returncode != 0 and f"are also in {inputs[source]}" in done.stderr
    assert not folder.exists()
