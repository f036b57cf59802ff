"Phase 5 on several models, styles and processes; killed and resumed; its summary, report and cards."
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace

import pandas as pd
import pytest
from conftest import papermill
from safetensors.torch import load_file, save_file

from looper_math import audit, cards, cli, criteria, engines, eval_jobs, evaluation, launch, report
from looper_math.engines import Completion
from looper_math.grading import VERDICTS
from looper_math.records import ROOT, RunConflict, SettingsError, read_json, read_records, run_folder, write_json
from looper_math.runs import parameters_of

RUN = "pytest-eval"
FAST = {"limit": 20, "sampling": {"n": 2, "models": 1, "questions": 4}, "arm_set": "guide-8", "harder": "",
        "max_new_tokens": 120}


FASTEST = {"limit": 2, "sampling": {}, "arm_set": "", "styles": ["training"]}

def settings(adapter, run=RUN, **changes):
    "The notebook's parameters, cut down; three models, two of which are the same."
    defaults = {name: p.default for name, p in parameters_of(ROOT / "nbs/05_eval.ipynb").items()}
    models = {"base": "", "copy": "data/pocket-base", "sft": adapter}
    small = FAST | {"run": run, "models": models, "comparisons": [], "styles": ["training", "five-shot"]}
    return evaluation.EvalSettings(**defaults | small | changes)


def answers(s):
    "Every file of answers with its bytes."
    return {p.name: p.read_bytes() for p in s.folder.glob("*.jsonl")}


@pytest.fixture(scope="module")
def done(random_adapter):
    "The phase on one process."
    shutil.rmtree(run_folder(RUN), ignore_errors=True)
    s = settings(random_adapter)
    evaluation.run_phase(s)
    yield s
    shutil.rmtree(run_folder(RUN))


def test_files_and_counts(done):
    rows = {p.stem: pd.DataFrame(read_records(p)) for p in done.folder.glob("*.jsonl")}
    greedy = {f"test-{model}{style}" for model in ("base", "copy", "sft") for style in ("", "-five-shot")}
    assert set(rows) == greedy | {"test-sft-samples", "test-sft-arms"}
    assert {len(rows[name]) for name in greedy} == {20}
    assert (len(rows["test-sft-samples"]), len(rows["test-sft-arms"])) == (8, 32)
    completions = {name: rows[f"test-{name}"].completion for name in ("base", "copy", "sft")}
    assert (completions["base"] == completions["copy"]).all() and (completions["base"] != completions["sft"]).any()
    assert all(set(VERDICTS) <= set(r) for r in rows.values()) and rows["test-sft-arms"]["sample"].nunique() == 8
    assert set(rows["test-sft"].temperature) == {0} and set(rows["test-sft-samples"].temperature) == {0.7}
    metrics = evaluation.open_phase(done).manifest["metrics"]
    assert metrics["models"]["base"]["correct"] == rows["test-base"].correct.sum()
    assert metrics["paired"]["copy_vs_base"]["gained"] == metrics["paired"]["copy_vs_base"]["lost"] == 0
    pairs = done.eval_models.pairs
    assert set(metrics["paired"]) == {f"{b}{s}_vs_{a}{s}" for s in ("", "-five-shot") for a, b in pairs}
    assert all(c["p_holm"] >= c["p"] for c in metrics["paired"].values())
    assert (metrics["sampled"]["sft-samples"]["k"], metrics["sampled"]["sft-arms"]["k"]) == (2, 8)
    again = audit.rescore(done.folder / "test-base.jsonl")
    assert again.accuracy == (metrics["models"]["base"]["correct"], 20)
    assert not again.findings["recorded verdict differs"] and not again.findings["prompt echo"]


def test_two_processes_give_the_same_bytes(done, random_adapter):
    s = settings(random_adapter, f"{RUN}-two", n_gpu=2)
    shutil.rmtree(s.folder.parent, ignore_errors=True)
    evaluation.run_phase(s)
    assert answers(s) == answers(done) and not list(s.folder.glob("*.shard*")) + list(s.folder.glob("*.part"))
    shutil.rmtree(s.folder.parent)


def test_models_of_one_base_share_an_engine(done, random_adapter, monkeypatch):
    "One start for base, copy and adapter, and one more for a model with a base of its own."
    elsewhere = ROOT / "outputs" / f"{RUN}-base"
    shutil.rmtree(elsewhere, ignore_errors=True)
    shutil.copytree(ROOT / "data/pocket-base", elsewhere)
    opened, starts = engines.opened, []
    monkeypatch.setattr(engines, "opened", lambda *a, **k: starts.append(a[1]) or opened(*a, **k))
    s = settings(random_adapter, f"{RUN}-engines", limit=3)
    s = replace(s, models={"own": str(elsewhere)} | s.models)
    shutil.rmtree(s.folder.parent, ignore_errors=True)
    evaluation.run_phase(s)
    assert starts == [str(elsewhere), "data/pocket-base"]
    first = {p: p.read_bytes().splitlines()[:3] for p in done.folder.glob("test-*.jsonl") if "arms" not in p.name}
    for path, lines in first.items():
        if "samples" not in path.name: assert (s.folder / path.name).read_bytes().splitlines() == lines
    for folder in (s.folder.parent, elsewhere): shutil.rmtree(folder)


def test_every_process_grades_an_equal_share(random_adapter, monkeypatch):
    "Rows are counted in the shards of eight processes; the process that started them grades none."
    s = settings(random_adapter, f"{RUN}-eight", limit=24, n_gpu=8)
    shutil.rmtree(s.folder.parent, ignore_errors=True)
    counts = dict.fromkeys(range(8), 0)
    def workers(module, settings, n_gpu):
        "What the eight processes do, one after the other in this process, with a stand-in for the engine."
        for rank in range(n_gpu):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(n_gpu))
            evaluation.main(settings)
            shards = s.folder.glob(f"*.shard-{rank}")
            counts[rank] = sum(r["correct"] in (True, False) for p in shards for r in read_records(p))
        monkeypatch.setattr(eval_jobs, "grade", lambda *a: pytest.fail("graded in the process that starts the others"))
    @contextmanager
    def engine(*a, **k):
        yield lambda requests, on_done: on_done([Completion(r.id, "Answer: 27", 3, "stop") for r in requests])
    monkeypatch.setattr(engines, "opened", engine)
    monkeypatch.setattr(launch, "launch", workers)
    manifest = evaluation.run_phase(s)
    assert sum(counts.values()) == manifest["counts"]["completions"] == 24 * 6 + 4 * (2 + 8)
    assert max(counts.values()) / (sum(counts.values()) / 8) <= 1.2, counts
    shutil.rmtree(s.folder.parent)


def kill_at(s, shard):
    "Evaluate in a process of its own, and kill it when this shard has a row."
    code = ("import json, sys; from looper_math.evaluation import EvalSettings, run_phase; "
            "run_phase(EvalSettings(**json.loads(sys.argv[1])))")
    process = subprocess.Popen([sys.executable, "-c", code, json.dumps(vars(s))], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (shard.exists() and shard.stat().st_size):
        assert process.poll() is None and time.time() < deadline, "never got to the point of the kill"
        time.sleep(.01)
    process.kill()
    process.wait()


@pytest.mark.parametrize("n_gpu", [1, 2])
def test_killed_and_resumed_to_the_same_bytes(done, random_adapter, n_gpu):
    "With the same number of processes and with another."
    s = settings(random_adapter, f"{RUN}-killed", n_gpu=1)
    shutil.rmtree(s.folder.parent, ignore_errors=True)
    shard = s.folder / "test-base-five-shot.shard-0"
    kill_at(s, shard)
    assert not (s.folder / "manifest.json").exists()
    with shard.open("ab") as f:
        f.write(b'{"question_id": "torn')
    with pytest.warns(UserWarning, match="torn last line"):
        evaluation.run_phase(replace(s, n_gpu=n_gpu))
    assert answers(s) == answers(done)
    shutil.rmtree(s.folder.parent)


@pytest.fixture
def later(random_adapter):
    "Evaluations of some of the models, one after the other, in a run of its own."
    run = f"{RUN}-later"
    shutil.rmtree(run_folder(run), ignore_errors=True)
    everything = settings(random_adapter, run)
    yield lambda *names, **changes: replace(everything, models={n: everything.models[n] for n in names}, **changes)
    shutil.rmtree(run_folder(run))


def covered_by(s):
    "What the manifest of an evaluation holds, whatever the run is called and how long it took."
    manifest = read_json(s.folder / "manifest.json")
    return {k: manifest[k] for k in ("inputs", "outputs", "counts", "metrics")} | manifest["parameters"] | {"run": ""}


CALLS = {"new ones alone": [["base", "copy"], ["sft"]],
         "growing": [["base"], ["base", "copy"], ["base", "copy", "sft"]]}


@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
def test_one_after_the_other_equals_all_at_once(done, later, calls):
    "Earlier answers are kept, tables and manifest cover all models, and the same files are there."
    for names in calls:
        kept = answers(later("base"))
        evaluation.run_phase(later(*names))
        assert answers(later("base")).items() >= kept.items()
    assert covered_by(later("base")) == covered_by(done)
    assert answers(later("base")).items() >= answers(done).items()


def test_the_order_is_that_in_which_models_are_first_named(random_adapter, later):
    together = replace(later("sft", "copy", "base", limit=6), run=f"{RUN}-together")
    shutil.rmtree(together.folder.parent, ignore_errors=True)
    evaluation.run_phase(together)
    for names in (["sft"], ["copy", "base"]): evaluation.run_phase(later(*names, limit=6))
    assert list(covered_by(together)["metrics"]["models"])[::2] == ["sft", "copy", "base"]
    assert covered_by(later("sft")) == covered_by(together)
    shutil.rmtree(together.folder.parent)


def test_a_kill_in_the_second_evaluation(done, later):
    "The first one's manifest stays until the second is done, which goes on where it was killed."
    s = later("sft")
    evaluation.run_phase(later("base", "copy"))
    first = read_json(s.folder / "manifest.json")
    kill_at(s, s.folder / "test-sft.shard-0")
    assert evaluation.open_phase(later("base")).manifest == first and evaluation.run_phase(later("copy")) == first
    evaluation.run_phase(s)
    assert covered_by(s) == covered_by(done) and not list(s.folder.glob("*.shard*"))


def test_fewer_models_of_a_finished_evaluation_are_done(done):
    before = {p: p.stat().st_mtime_ns for p in done.folder.iterdir()}
    for names in (["base"], ["sft", "copy"]):
        manifest = evaluation.run_phase(replace(done, models={n: done.models[n] for n in names}))
        assert list(manifest["parameters"]["models"]) == ["base", "copy", "sft"]
    assert {p: p.stat().st_mtime_ns for p in done.folder.iterdir()} == before


def test_what_else_changed_is_refused(done, random_adapter):
    "Another place under an old name, another parameter, pairs instead of none, a place that is not there."
    before = answers(done)
    for change, message in [({"models": {"sft": ""}}, "model 'sft' is .* there and '' now"),
                            ({"limit": 21}, "limit: 20 there, 21 now"),
                            ({"models": {"new": ""}, "sampling": {"n": 3}}, "sampling.n: 2 there, 3 now"),
                            ({"comparisons": [["base", "sft"]]}, r"comparisons are \[\] there and \[\['base', 'sft'")]:
        with pytest.raises(RunConflict, match=message): evaluation.run_phase(replace(done, **change))
    with pytest.raises(FileNotFoundError, match="no such model folder"):
        evaluation.run_phase(settings(random_adapter, f"{RUN}-none", models={"sft": "01_sft/adapter"}))
    assert answers(done) == before and not run_folder(f"{RUN}-none").exists()


def test_a_changed_adapter_under_an_old_name(random_adapter, tmp_path):
    "Also when a later evaluation does not name it: its answers would stand beside those of other weights."
    adapter = shutil.copytree(random_adapter, tmp_path / "adapter")
    s = settings(str(adapter), f"{RUN}-changed", models={"sft": str(adapter)}, **FASTEST)
    shutil.rmtree(s.folder.parent, ignore_errors=True)
    evaluation.run_phase(s)
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({k: 2*v for k, v in weights.items()}, adapter / "adapter_model.safetensors")
    for models in ({"sft": str(adapter)}, {"base": ""}):
        with pytest.raises(RunConflict, match="adapter has changed since it was evaluated there as 'sft'"):
            evaluation.run_phase(replace(s, models=models))
    assert list(answers(s)) == ["test-sft.jsonl"]
    shutil.rmtree(s.folder.parent)


def test_pairs_add_up(later):
    "Pairs of the first evaluation stay, and one that names only new pairs of the same models goes on."
    evaluation.run_phase(later("base", "sft", comparisons=[["base", "sft"]], **FASTEST))
    evaluation.run_phase(later("base", "sft", comparisons=[["sft", "base"]], **FASTEST))
    paired = evaluation.run_phase(later("copy", "sft", comparisons=[["copy", "sft"]], **FASTEST))["metrics"]["paired"]
    assert list(paired) == ["sft_vs_base", "base_vs_sft", "sft_vs_copy"]


def test_two_commands_of_papermill(random_adapter):
    "As the documents evaluate: SFT by one command, DPO by another, each with a page of its own."
    run = run_folder(f"{RUN}-papermill")
    shutil.rmtree(run, ignore_errors=True)
    for place in ("01_sft", "04_dpo"): shutil.copytree(random_adapter, run / place / "adapter")
    fast = FAST | FASTEST | {"run": run.name}
    for name, models in (("sft", '{"base": "", "sft": "01_sft/adapter"}'), ("dpo", '{"dpo": "04_dpo/adapter"}')):
        made = papermill("05_eval", run / f"05_eval_{name}.ipynb", **fast, models=models)
        assert made.returncode == 0, made.stderr[-3000:]
    metrics = read_json(run / "05_eval/manifest.json")["metrics"]
    assert list(metrics["models"]) == ["base", "sft", "dpo"] and metrics["models"]["sft"] == metrics["models"]["dpo"]
    assert list(metrics["paired"]) == ["sft_vs_base", "dpo_vs_sft", "dpo_vs_base"]
    pages = [(run / f"05_eval_{name}.ipynb").read_text() for name in ("sft", "dpo")]
    assert ["between sft and dpo" in page for page in pages] == [False, True]
    shutil.rmtree(run)


def test_a_model_that_is_not_there_is_refused_by_the_runner():
    "Before the first phase, and a model that an earlier phase of the call will make is not."
    program = os.path.join(os.path.dirname(sys.executable), "looper")
    looper = [program, "run", "smoke", "--run", "pytest-missing-model"]
    models = "05_eval.models={base: '', dpo: 04_dpo/adapter, other: 07_none/adapter}"
    bad = subprocess.run([*looper, "-p", models], cwd=ROOT, capture_output=True, text=True)
    message = "05_eval.models.other: there is no outputs/pytest-missing-model/07_none/adapter"
    assert bad.returncode == 2 and message in bad.stderr, bad.stderr
    assert not run_folder("pytest-missing-model").exists()


@pytest.fixture
def finished(done):
    "The evaluated run, made whole by stand-ins for the manifests of phases 2 and 3."
    folder = run_folder(RUN)
    common = {"git_commit": "", "versions": {}}
    sampled = common | {"parameters": {"arm_set": "guide-8", "preset": "guide-8", "questions": "q.jsonl"},
                        "counts": {"questions": 3, "trajectories": 24}, "metrics": {"accuracy": .5}}
    write_json(folder / "02_rollouts/manifest.json", sampled)
    counts = {"questions": 3, "questions_all_right": 0, "questions_all_wrong": 1, "dropped_duplicate": 0,
              "correctness": 5, "coherence": 2}
    pairs = common | {"parameters": {"policy": "all"}, "counts": counts, "metrics": {}}
    write_json(folder / "03_preferences/manifest.json", pairs)
    write_json(folder / "run.json", {"recipe": "pocket", "parameters": {}, "seconds": {"05_eval": 61.0}})
    return folder


def test_report_and_comparison_of_two_runs(finished, capsys):
    page = report.write_report(finished).read_text(encoding="utf-8")
    metrics = read_json(finished / "05_eval/manifest.json")["metrics"]
    assert all(text in page for text in (report.outcome(metrics).sentence, 'href="05_eval.html"', "not measurable"))
    assert all(f"<td>+{c['gained']}</td>" in page for c in metrics["paired"].values())
    judged = criteria.criteria(finished).set_index("criterion")
    assert judged.verdict["correctness pairs"] == "fail" and judged.verdict["DPO's loss falls"] == "not measurable"
    row = judged.loc["correctness pairs"]
    assert (row.expected, row.source) == ("12 to 18 for 3 questions", "pipeline guide")
    assert all(text in page for text in (row.expected, row.source, row.reason))

    other = run_folder(f"{RUN}-other")
    shutil.rmtree(other, ignore_errors=True)
    shutil.copytree(finished, other)
    rows = read_records(other / "05_eval/test-sft.jsonl")
    right = [k for k, r in enumerate(rows) if r["correct"]]
    for r in rows:
        r["correct"] = not r["correct"]
    (other / "05_eval/test-sft.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[::-1]))
    cli.looper(["compare", RUN, f"{RUN}-other"])
    line = next(x.split() for x in capsys.readouterr().out.splitlines() if x.split()[:1] == ["test-sft"])
    assert line[1:6] == [str(len(right)), str(20 - len(right)), "20", f"+{20 - len(right)}", f"-{len(right)}"]
    shutil.rmtree(other)
    with pytest.raises(SystemExit):
        cli.looper(["compare", RUN, "pytest-nowhere"])
    assert "the run 'pytest-nowhere' is not there" in capsys.readouterr().err


def test_cards_hold_the_true_numbers_and_nothing_is_sent(finished, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(cards, "HfApi", lambda **k: pytest.fail("the hub was asked"))
    cli.looper(["card", RUN, "--model", "sft"])
    paths = [f"outputs/{RUN}/cards/{kind}/README.md" for kind in ("model", "dataset")]
    assert capsys.readouterr().out.split() == paths
    model = (finished / "cards/model/README.md").read_text()
    right = read_json(finished / "05_eval/manifest.json")["metrics"]["models"]["sft"]["correct"]
    assert f"| test | sft | {right} of 20 | {right/20:.1%} |" in model and f"value: {right/20}" in model
    with pytest.raises(SystemExit) as stop:
        cli.looper(["card", RUN, "--model", "sft", "--push", "me/it"])
    assert stop.value.code == 2 and "HF_TOKEN is not set" in capsys.readouterr().err


def test_settings_are_checked(done):
    for wrong, message in [({"comparisons": [["base", "stf"]]}, "a comparison is"),
                           ({"styles": ["native"]}, "native_template"), ({"arm_set": "none"}, "none"),
                           ({"sampling": {"temperature": 0.0}}, "sampling.temperature"),
                           ({"sampling": {"n": -1}}, "sampling.n must be at least 0")]:
        with pytest.raises(SettingsError, match=message): replace(done, **wrong)
