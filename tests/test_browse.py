"The page of a run's trajectories: its program computes what Python computes, and it asks nobody for anything."
import base64
import dataclasses
import gzip
import html
import json
import random
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from looper_math import browse, runs
from looper_math.cli import looper
from looper_math.engines import Completion
from looper_math.eval_jobs import answer_row
from looper_math.pairs import PairRules, build_pairs, build_pairs_report
from looper_math.records import ROOT, RecordWriter, SettingsError, read_records, write_json
from looper_math.regime_w import REWARD_TERMS, Weights, find_preset, reward, score_records

needs_node = pytest.mark.skipif(not shutil.which("node"), reason="node is not installed; it runs the page's program")
PRESET = "platinum-11"


def varied_rollouts():
    "A part of the fixture with long solutions and some that were cut off, so that every reward term has values."
    rng, records = random.Random(0), read_records(ROOT / "data/fixtures/rollouts.jsonl")[:50]
    for t in (t for r in records for t in r["trajectories"]):
        t["num_tokens"] += rng.choice([0, 0, 480])
        t["finish_reason"] = rng.choice(["stop"] * 5 + ["length"])
    return list(score_records(records, PRESET))


SCORED = varied_rollouts()


@pytest.fixture
def run(tmp_path):
    "A folder of a project with a run: rollouts, pairs by the default rules, and the answers of two models."
    folder = tmp_path / "outputs/example"
    with RecordWriter(folder / "02_rollouts/rollouts.jsonl") as writer: writer.append(SCORED)
    write_json(folder / "02_rollouts/manifest.json", {"parameters": {"preset": PRESET}})
    return folder


def evaluated(folder, answers, questions=("2 + 2?", "3 + 3?", "4 + 4?")):
    "Add an evaluation: model → the completions of its questions; the gold answer is always 4."
    for model, texts in answers.items():
        rows = [answer_row({"question_id": f"q{k}", "question": q, "gold_answer": "4"},
                           Completion("", text, 9, "stop"), model, "training")
                for k, (q, text) in enumerate(zip(questions, texts))]
        with RecordWriter(folder / f"05_eval/test-{model}.jsonl") as writer: writer.append(rows)
    write_json(folder / "05_eval/manifest.json", {"metrics": {"sets": {"test": {"models": dict.fromkeys(answers)}}}})


def in_node(program, value):
    "What the page's program computes in node: `program` is an expression of `value`."
    text = (ROOT / "looper_math/templates/browse.html").read_text(encoding="utf-8")
    core = re.search(r'<script id="core">(.*?)</script>', text, re.S)[1]
    code = f'{core}\nconst value = JSON.parse(require("fs").readFileSync(0));console.log(JSON.stringify({program}))'
    done = subprocess.run(["node", "-e", code], input=json.dumps(value), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def unpacked(text):
    "The records in a page."
    packed = re.search(r'<script type="text/plain" id="records">(.*?)</script>', text, re.S)[1]
    return json.loads(gzip.decompress(base64.b64decode(packed)))


WEIGHTS = [{}, dict(correct=0, s_wm=0, quality=0, agreement=0, coherence=.5, excess_tokens=0),
           dict(correct=-1, quality=.35, coherence=-.4, lift=2, excess_tokens=-.0007), dict.fromkeys(REWARD_TERMS, 0)]
RULES = [dict(policy=policy, **rest) for policy in ("all", "capped", "best-worst", "hard", "first-error")
         for rest in ({}, dict(coherence="all-above-threshold", threshold=.0, cap=3), dict(cap=1, threshold=.2))]
RULES += [dict(pairing="same-prompt"), dict(policy="capped", pairing="same-prompt", seed=7),
          dict(policy="best-worst", pair_types="coherence"), dict(policy="capped", pair_types="correctness")]
COMPUTE = """value.settings.map(({weights, rules}) => value.questions.map(q => {
  const rewards = q.solutions.map(s => rewardOf(s.terms, weights));
  return [rewards, pairsOf(q, rewards, rules).map(([c, r, type]) => [q.solutions[c].by, q.solutions[r].by, type])];
}))"""


@needs_node
@pytest.mark.parametrize("rules", RULES, ids=lambda rules: " ".join(map(str, rules.values())))
def test_the_page_scores_and_pairs_as_python_does(run, rules):
    "For several weights: every reward, and the pairs of every question in their order."
    write_json(run / "03_preferences/manifest.json", {"parameters": {"preset": PRESET, **rules}})
    questions = browse.page_records(run)["views"][0]["questions"]
    weights = [dataclasses.replace(Weights(), **changes) for changes in WEIGHTS]
    settings = [{"weights": [getattr(w, term) for term in REWARD_TERMS],
                 "rules": dataclasses.asdict(PairRules(**rules))} for w in weights]
    by_page = in_node(COMPUTE, {"settings": settings, "questions": questions})
    kinds = set()
    for w, computed in zip(weights, by_page, strict=True):
        rescored = [{**r, "trajectories": [{**t, "reward": reward(t["signals"], w.terms)} for t in r["trajectories"]]}
                    for r in SCORED]
        for r, (rewards, pairs) in zip(rescored, computed, strict=True):
            assert rewards == pytest.approx([t["reward"] for t in r["trajectories"]], abs=1e-12)
            expected = [[p["chosen_arm"], p["rejected_arm"], p["pair_type"]] for p in build_pairs([r], **rules)]
            assert pairs == expected, r["question_id"]
            kinds |= {p[2] for p in pairs}
    assert kinds == {"correctness", "coherence"} if rules.get("pair_types", "both") == "both" else len(kinds) == 1


@needs_node
def test_a_policy_can_be_changed_in_the_page(run):
    "The candidates of every policy are in the page, whatever policy the run has."
    questions = browse.page_records(run)["views"][0]["questions"]
    weights = [*find_preset(PRESET).terms.values()]
    for policy in ("capped", "hard", "first-error"):
        settings = [{"weights": weights, "rules": dataclasses.asdict(PairRules(policy=policy))}]
        (computed,) = in_node(COMPUTE, {"settings": settings, "questions": questions})
        report = build_pairs_report(SCORED, policy=policy)[1]
        assert sum(len(pairs) for _, pairs in computed) == report["correctness"] + report["coherence"] > 0


ANY = {"words": [], "by": "", "correct": "", "agree": "", "false": False, "low": -1e9, "high": 1e9, "before": "sft",
       "after": "dpo", "change": ""}
# question 0 is gained, question 1 is lost, question 2 is wrong twice, by a false equation of one model
MODELS = {"sft": ("Answer: 5", "Answer: 4", "4 + 4 = 9\nAnswer: 9"),
          "dpo": ("Answer: 4", "Answer: 6", "4 + 4 = 8\nAnswer: 8")}
FILTERS = {"no filter": ({}, [0, 1, 2]), "gained": ({"change": "gained"}, [0]), "lost": ({"change": "lost"}, [1]),
           "lost the other way": ({"change": "lost", "before": "dpo", "after": "sft"}, [0]),
           "right": ({"correct": "1"}, [0, 1]), "right by one model": ({"correct": "1", "by": "dpo"}, [0]),
           "false equation": ({"false": True}, [2]), "false equation of dpo": ({"false": True, "by": "dpo"}, []),
           "words": ({"words": ["3", "+"]}, [1]), "agree": ({"agree": "1"}, []),
           "disagree": ({"agree": "0"}, [0, 1, 2])}


@needs_node
@pytest.mark.parametrize("name", FILTERS)
def test_filters_of_answers(run, name):
    evaluated(run, MODELS)
    changes, expected = FILTERS[name]
    questions = browse.page_records(run)["views"][1]["questions"]
    program = "value.questions.map((q, k) => listed(q, null, value.filter) ? k : -1).filter(k => k >= 0)"
    assert in_node(program, {"questions": questions, "filter": ANY | changes}) == expected


@needs_node
def test_filters_of_rollouts(run):
    "By reward, by arm, and by whether the arms agree, against the records."
    questions = browse.page_records(run)["views"][0]["questions"]
    rewards = [[t["reward"] for t in r["trajectories"]] for r in SCORED]
    program = "value.questions.map((q, k) => listed(q, value.rewards[k], value.filter))"
    listed = lambda **changes: in_node(program, {"questions": questions, "rewards": rewards, "filter": ANY | changes})
    high = [any(x >= 1.5 for x in row) for row in rewards]
    assert listed(low=1.5) == high and 0 < sum(high) < len(high)
    arm = [any(t["arm_name"] == "maudlin_cf1" and not t["correct"] and t["signals"]["first_false"] is not None
               for t in r["trajectories"]) for r in SCORED]
    assert listed(by="maudlin_cf1", correct="0", false=True) == arm and 0 < sum(arm) < len(arm)
    disagree = [len({t["answer"] for t in r["trajectories"]}) > 1 for r in SCORED]
    assert listed(agree="0") == disagree and listed(agree="1") == [not d for d in disagree]


def test_the_page_loads_nothing_and_holds_no_text_of_a_model_as_html(run):
    "Records are packed, so neither a tag nor the end of a script in them reaches the page's HTML."
    nasty = '</script><img src="https://example.org/x.png">{{report}}'
    evaluated(run, {"base": [nasty]}, [nasty])
    text = browse.page(run)
    assert "example.org" not in text and not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(https?:)?//", text)
    assert "default-src 'none'" in text and "innerHTML" not in text
    question = unpacked(text)["views"][1]["questions"][0]
    assert question["question"] == nasty and question["solutions"][0]["text"] == nasty
    assert text == browse.page(run) and 'href="report.html"' in text


def test_marks_are_in_units_of_javascript(run):
    "A place counts UTF-16 units, and the text between its ends is the equation."
    marks = [(s["text"].encode("utf-16-le"), s["false"]) for q in browse.page_records(run)["views"][0]["questions"]
             for s in q["solutions"] if s["false"]]
    assert len(marks) > 100
    assert all(text[2 * m["start"]:2 * m["end"]].decode("utf-16-le") == m["equation"] for text, m in marks)


def test_a_page_of_many_questions_shows_some_and_says_so(run):
    evaluated(run, MODELS)
    records = browse.page_records(run, limit=335)
    assert [len(v["questions"]) for v in records["views"]] == [30, 3]
    assert "30 questions of 50, evenly spaced, 330 solutions" in records["about"]
    assert len(browse.page(run, limit=335)) < len(browse.page(run)) < 1e6


def test_the_command_writes_the_page(run, capsys):
    looper(["browse", "example"], run.parents[1])
    assert Path(capsys.readouterr().out.strip()).name == "browse.html"
    assert (run / "browse.html").read_text(encoding="utf-8") == browse.page(run)
    with pytest.raises(SystemExit, match="2"): looper(["browse", "exmaple"], run.parents[1])
    assert "did you mean 'example'?" in capsys.readouterr().err


def test_a_run_writes_the_page_beside_its_next_phase(run):
    "And kills the process that writes it when the run is interrupted."
    with runs.BrowserPage(run) as page:
        assert not page.wait()
        page.write()
        assert page.wait() and (run / "browse.html").read_text(encoding="utf-8") == browse.page(run)
    with pytest.raises(KeyboardInterrupt), page:
        page.write()
        process = page.process
        raise KeyboardInterrupt
    assert process.wait() == -signal.SIGKILL


def test_a_page_that_cannot_be_written_fails_the_run(tmp_path, capfd):
    with pytest.raises(runs.PhaseFailed, match="see `looper browse"), runs.BrowserPage(tmp_path) as page:
        page.write()
        page.wait()
    assert "there is nothing to browse" in capfd.readouterr().err


def test_a_run_without_records_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="there is nothing to browse"): browse.page(tmp_path)


def test_the_notebook_shows_the_same_page(run):
    "In a frame that runs scripts and has no access to the notebook."
    frame = browse.browse(run).data
    assert 'sandbox="allow-scripts"' in frame
    assert html.unescape(re.search(r'srcdoc="([^"]*)"', frame)[1]) == browse.page(run)
