"The phases as a user runs them: one by one, after a kill, with bad input."
import json
import shutil

import pytest
from conftest import RUN, SMALL, kill_when, papermill, small, start
from safetensors.torch import load_file

from looper_math.progress import read_progress
from looper_math.records import read_json, read_records, run_folder


def test_rollouts_resume_to_the_same_bytes(small_run):
    "kill -9 after the first shard lines, half a line added, then resume: the same file as without the kill."
    other = run_folder(RUN + "-killed")
    shutil.rmtree(other, ignore_errors=True)
    parameters = small("02_rollouts", run=other.name, adapter=str(small_run / "01_sft" / "adapter"))
    shard = other / "02_rollouts" / "shard-0.jsonl"
    process = start("rollouts", "RolloutSettings", "run_phase", parameters)
    kill_when(process, lambda: shard.exists() and shard.stat().st_size > 0)
    assert not (other / "02_rollouts" / "rollouts.jsonl").exists()
    with shard.open("ab") as f: f.write(b'{"question_id": "torn')
    resumed = start("rollouts", "RolloutSettings", "run_phase", parameters)
    assert resumed.wait() == 0, resumed.stderr.read()[-2000:]
    name = "02_rollouts/rollouts.jsonl"
    assert (other / name).read_bytes() == (small_run / name).read_bytes()
    shutil.rmtree(other)


def test_records_are_complete(small_run):
    "Every question has its eleven arms, and completions do not begin with their prompt."
    records = read_records(small_run / "02_rollouts" / "rollouts.jsonl")
    assert len(records) == SMALL["02_rollouts"]["limit"]
    for r in records:
        assert len({t["arm_name"] for t in r["trajectories"]}) == 11
        assert len({t["seed"] for t in r["trajectories"]}) == 11
        for t in r["trajectories"]:
            assert t["finish_reason"] in ("stop", "length") and t["num_tokens"] > 0
            assert not t["full_text"].startswith(("Question", "Solve", "Solution"))


def test_dpo_alone_and_after_a_kill(small_run):
    "papermill runs phase 4 on the files of phases 1 and 3; killed and run again, it gives the same weights."
    done = papermill("04_dpo", small_run / "04_dpo.ipynb")
    assert done.returncode == 0, done.stderr[-3000:]
    unbroken = load_file(small_run / "04_dpo" / "adapter" / "adapter_model.safetensors")
    counts, metrics = (read_json(small_run / "04_dpo" / "manifest.json")[name] for name in ("counts", "metrics"))
    assert abs(metrics["step_zero"]["reward of chosen"]) < .1
    assert metrics["least_gradient_norm"] > 0 and metrics["adapter_moved_by"] > 0

    other = run_folder(RUN + "-killed")
    shutil.rmtree(other, ignore_errors=True)
    names = {"adapter": "01_sft/adapter", "pairs": "03_preferences/pairs.jsonl",
             "rollouts": "02_rollouts/rollouts.jsonl"}
    inputs = {parameter: str(small_run / name) for parameter, name in names.items()}
    adapter = other / "04_dpo" / "adapter"
    process = start("dpo", "DPOSettings", "main", small("04_dpo", run=other.name, **inputs))
    kill_when(process, lambda: any(adapter.glob("checkpoint-*/trainer_state.json")))
    assert not (other / "04_dpo" / "manifest.json").exists()
    left = read_progress(other / "04_dpo")
    assert left["doing"] == "training of adapter" and left["steps"] == counts["updates"]
    again = papermill("04_dpo", other / "04_dpo.ipynb", run=other.name, **inputs)
    assert again.returncode == 0, again.stderr[-3000:]
    assert not read_progress(other / "04_dpo")   # of a finished phase
    resumed = load_file(adapter / "adapter_model.safetensors")
    assert unbroken.keys() == resumed.keys()
    assert max((unbroken[k] - resumed[k]).abs().max().item() for k in unbroken) < 1e-5
    shutil.rmtree(other)


@pytest.mark.parametrize("phase, parameters, message", [
    ("04_dpo", {"min_pair": 5}, "did you mean 'min_pairs'"),
    ("04_dpo", {"trainer": {"betta": 0.5}}, "did you mean 'beta'"),
    ("04_dpo", {"trainer": {"beta": "high"}}, "trainer.beta must be float"),
    ("04_dpo", {"trainer": {"beta": 0.7}}, "another configuration"),
    ("04_dpo", {"run": "pytest-nowhere"}, "run the phase that makes it"),
])
def test_refused_at_once_and_nothing_changed(small_run, tmp_path, phase, parameters, message):
    "A misspelt or ill-typed parameter, another configuration, a missing input: a clear message, and no file changes."
    if not (small_run / "04_dpo" / "manifest.json").exists():
        assert papermill("04_dpo", small_run / "04_dpo.ipynb").returncode == 0
    files = lambda: {p: p.stat().st_mtime_ns for p in small_run.rglob("*")}
    before = files()
    done = papermill("04_dpo", tmp_path / "out.ipynb", **parameters)
    assert done.returncode != 0 and message in done.stderr, done.stderr[-2000:]
    assert files() == before and not run_folder("pytest-nowhere").exists()


def test_phase_2_on_other_questions(small_run, tmp_path):
    "GSM8K-like questions with commas, dollars and long numbers: the pocket model is wrong, and the records are right."
    questions = tmp_path / "questions.jsonl"
    rows = [{"question": f"Weng earns ${n},000 a year — how much in {n} years?",
             "answer": f"She earns {n},000 * {n} = {n * n * 1000:,}.\n#### {n * n * 1000:,}"} for n in (12, 114)]
    questions.write_text("".join(json.dumps(r) + "\n" for r in rows))
    other = run_folder(RUN + "-elsewhere")
    shutil.rmtree(other, ignore_errors=True)
    inputs = {"questions": str(questions), "adapter": str(small_run / "01_sft" / "adapter")}
    done = papermill("02_rollouts", other / "02_rollouts.ipynb", run=other.name, **inputs)
    assert done.returncode == 0, done.stderr[-3000:]
    records = read_records(other / "02_rollouts" / "rollouts.jsonl")
    assert [r["gold_answer"] for r in records] == ["144000", "12996000"]
    assert all(len(r["trajectories"]) == 11 for r in records)
    shutil.rmtree(other)
