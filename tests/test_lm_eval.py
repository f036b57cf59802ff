"The same questions through lm-evaluation-harness and our evaluation: the same texts and counts (`make test-lm-eval`)."
import json
import subprocess
import sys
from pathlib import Path

import pytest

from looper_math import audit, engines, eval_jobs
from looper_math.data import load_questions
from looper_math.prompts import CANONICAL, build_prompt
from looper_math.records import ROOT, resolve

pytest.importorskip("lm_eval.tasks", reason="lm-eval is installed by `make test-lm-eval`")
N = 200
TASKS = ROOT / "tests/lm_eval"


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    "lm-eval's own log of the pocket's base on the first test questions, by its command line and its hf backend."
    out = tmp_path_factory.mktemp("lm_eval")
    command = [str(Path(sys.executable).parent / "lm_eval"), "--model", "hf",
               "--model_args", "pretrained=data/pocket-base,dtype=float32", "--include_path", str(TASKS),
               "--tasks", "jsonl_word_problems", "--limit", str(N), "--batch_size", "50", "--device", "cpu",
               "--output_path", str(out), "--log_samples"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (log,) = out.rglob("samples_*.jsonl")
    (results,) = out.rglob("results_*.json")
    return log, json.loads(results.read_text())["results"]["jsonl_word_problems"]


@pytest.fixture(scope="module")
def ours():
    "Our rows for the same questions."
    questions = load_questions("data/pocket/test.jsonl", limit=N)
    template = "Question: {question}\n{instruction}\nSolution:\n"
    with engines.opened("transformers", "data/pocket-base", dtype="float32") as generate:
        prompts = [build_prompt(q["question"], CANONICAL, template) for q in questions]
        completions = generate([engines.Request(str(k), p, max_new_tokens=200) for k, p in enumerate(prompts)])
    return [eval_jobs.answer_row(q, c, "base", "training") for q, c in zip(questions, completions)]


def test_same_texts_and_same_counts(samples, ours):
    log, results = samples
    theirs = {s["doc"]["question"]: s["resps"][0][0] for s in audit.read_log(log)}
    assert len(theirs) == N and [theirs[r["question"]] for r in ours] == [r["completion"] for r in ours]
    assert round(results["exact_match,strict-match"] * N) == sum(r["correct_strict"] for r in ours)
    assert round(results["exact_match,flexible-extract"] * N) == sum(r["correct"] for r in ours)
    assert 0 < sum(r["correct"] for r in ours) < N


def test_their_log_is_audited(samples, ours):
    "`rescore` reads lm-eval's log as it is, and agrees with its verdicts."
    log, _ = samples
    for name in ("strict-match", "flexible-extract"):
        again = audit.rescore(log, where={"filter": name}, reference="", **audit.LM_EVAL)
        assert again.accuracy == (sum(r["correct"] for r in ours), N)
        assert {k: v for k, v in again.findings.items() if v} == {}, again.sentence


def test_five_shot_prompt_is_theirs(tmp_path):
    "Our five-shot prompt is that of lm-eval's gsm8k task with the first five training questions as examples."
    import lm_eval.tasks
    import yaml

    shipped = Path(lm_eval.tasks.__file__).parent / "gsm8k/gsm8k.yaml"
    task = yaml.safe_load(shipped.read_text())
    assert list(eval_jobs.STOPS) == task["generation_kwargs"]["until"] and task["num_fewshot"] == 5
    files = {"train": str(resolve("data/pocket/train.jsonl")), "test": str(resolve("data/pocket/test.jsonl"))}
    changed = task | {"task": "ours", "dataset_path": "json", "dataset_kwargs": {"data_files": files},
                      "fewshot_config": {"sampler": "first_n"}}
    changed.pop("dataset_name")
    changed.pop("tag", None)
    (tmp_path / "ours.yaml").write_text(yaml.safe_dump(changed))
    manager = lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    built = manager.load(["ours"])["tasks"]["ours"]
    built.build_all_requests(limit=3, rank=0, world_size=1)
    questions = load_questions(files["test"], limit=3)
    shots = eval_jobs.few_shot(load_questions(files["train"]))
    assert [i.args[0] for i in built.instances] == [build_prompt(q["question"], template=shots) for q in questions]
