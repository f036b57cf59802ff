"The documents' expectations beside a run's numbers, for each preset, with real rollouts and pairs."
import json
import random
import re
import shlex

import papermill
import pytest
from bs4 import BeautifulSoup
from matplotlib.colors import to_rgb
from nbformat import v4

from looper_math import cli, criteria, next_steps, report, runs
from looper_math.pairs import build_pairs_report, reward_terms
from looper_math.prompts import arms, build_prompt
from looper_math.records import ROOT, RecordWriter, read_json, write_json
from looper_math.regime_w import PRESETS, find_preset, score_records

ABEL = {"base": "GAIR/Abel-7B-002", "n_gpu": 8}
COMMON = {"git_commit": "", "versions": {}, "metrics": {}}


def trajectory(rng, arm, question, tokens):
    total = 7 if rng.random() < .7 else rng.choice([8, 12])
    words = " ".join(rng.choices("so we add three and four apples then".split(), k=rng.randint(3, 12)))
    text = f"{words} 3 + 4 = {total}"
    return dict(arm_name=arm.name, prompt=build_prompt(question, arm.instruction), full_text=f"{text}\nAnswer: {total}",
                reasoning=text, answer=str(total), answer_strict=str(total), num_tokens=rng.randint(*tokens),
                finish_reason="stop", seed=1)


def rollouts(arm_set, questions=20, tokens=(80, 300)):
    rng, records = random.Random(0), []
    for k in range(questions):
        solutions = [trajectory(rng, a, f"Question {k}?", tokens) for a in arms(arm_set)]
        records.append(dict(question_id=f"{k:016x}", question=f"Question {k}?", gold_answer="7",
                            trajectories=solutions))
    return records


DPO = {"num_train_epochs": 3, "learning_rate": 5e-5, "beta": .1, "loss_type": ["sigmoid"]}


def finished(folder, preset, changes=None, losses=(.62, .48, .38), **sizes):
    "A run of Abel-7B, its rollouts and pairs made by the project's code, its training and evaluation invented."
    arm_set = find_preset(preset).arm_set
    p = {"02_rollouts": ABEL | {"arm_set": arm_set, "limit": 20, "questions": "openai/gsm8k", "preset": preset},
         "03_preferences": {"policy": "all", "coherence": "best-worst", "threshold": .01, "cap": 4, "preset": preset},
         "04_dpo": ABEL | {"trainer": DPO},
         "05_eval": ABEL | {"questions": "madrylab/gsm8k-platinum", "limit": 0, "models": {}}}
    p = {phase: values | (changes or {}).get(phase, {}) for phase, values in p.items()}
    scored = list(score_records(rollouts(arm_set, **sizes), preset))
    (folder / "02_rollouts").mkdir(parents=True)
    with RecordWriter(folder / "02_rollouts/rollouts.jsonl") as writer: writer.append(scored)
    rules = {k: v for k, v in p["03_preferences"].items() if k != "preset"}
    counts = {"02_rollouts": {"questions": len(scored)}, "03_preferences": build_pairs_report(scored, **rules)[1],
              "04_dpo": {"pairs": 100}, "05_eval": {"test": 1209}}
    score = lambda k: {"correct": k, "n": 1209, "cut_off": 3}
    change = {"gained": 60, "lost": 25, "n": 1209, "p": .001, "p_holm": .002, "difference": 35 / 1209,
              "interval": [.012, .046], "sentence": "dpo scores 2.9 points higher than sft."}
    models = {"base": score(972), "sft": score(985), "dpo": score(1020)}
    metrics = {"03_preferences": reward_terms(scored, preset),
               "04_dpo": {"trainer": DPO | (changes or {}).get("04_dpo", {}).get("trainer", {})},
               "05_eval": (test := {"models": models, "paired": {"dpo_vs_sft": change}}) |
                          {"sets": {"test": test}, "sampled": {}, "warnings": ["sft < base"]}}
    for phase, values in p.items():
        write_json(folder / phase / "manifest.json", COMMON | {"parameters": values, "counts": counts[phase]} |
                   ({"metrics": metrics[phase]} if phase in metrics else {}))
    log = [{"epoch": k + part, "loss": loss + .01 - .02 * part, "grad_norm": 1., "step": 10 * k}
           for k, loss in enumerate(losses) for part in (.5, 1)]
    write_json(folder / "04_dpo/adapter/trainer_state.json", {"log_history": log})
    seconds = {"02_rollouts": 1200., "04_dpo": 1700., "05_eval": 800.}
    write_json(folder / "run.json", {"recipe": "smoke", "parameters": {}, "seconds": seconds})
    return criteria.criteria(folder).set_index("criterion")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_verdict_has_number_expectation_and_source_and_every_fail_a_reason(tmp_path, preset):
    judged = finished(tmp_path / "run", preset)
    assert list(judged) == ["verdict", "measured", "expected", "source", "reason"]
    assert set(judged.verdict) <= {"pass", "fail", "not measurable", "not applicable"}
    assert judged.measured.all() and judged.expected.all()
    assert set(judged.source) <= {"readme", "deployment guide", "pipeline guide", "core guide", "8B readme", "ours"}
    assert judged.reason[judged.verdict.isin(["fail", "not applicable"])].all()
    assert not judged.reason[judged.verdict == "pass"].any()


@pytest.mark.parametrize("preset, source, size", [
    ("platinum-11", "deployment guide", "20 questions x 11 arms: 220"),
    ("leave-one-out", "deployment guide", "20 questions x 11 arms: 220"),
    ("guide-8", "pipeline guide", "20 questions x 8 arms: 160"),
    ("core-variants", "core guide", "20 questions x 12 arms: 240")])
def test_counts_are_scaled_to_the_recipes_questions_and_arms(tmp_path, preset, source, size):
    row = finished(tmp_path / "run", preset).loc["questions and trajectories"]
    assert (row.verdict, row.expected, row.source) == ("pass", size, source)


def test_pairs_are_scaled_to_the_questions_and_a_contradiction_is_named(tmp_path):
    judged = finished(tmp_path / "run", "platinum-11")
    assert judged.expected["pairs"] == "120 to 200 for 20 questions"
    share = judged.loc["share of correctness pairs"]
    assert share.verdict == "fail" and "the expectations exclude each other" in share.reason
    assert "20 coherence pairs of 120 are 17 %" in share.reason
    assert "coherence=all-above-threshold lifts that limit" in share.reason
    every = finished(tmp_path / "every", "platinum-11", {"03_preferences": {"coherence": "all-above-threshold"}})
    assert "exclude" not in every.reason["share of correctness pairs"]


def test_the_rewards_that_the_deployment_guide_expects_are_explained_by_the_weights(tmp_path):
    row = finished(tmp_path / "run", "platinum-11").loc["reward from 0.5 to 1.2"]
    assert row.verdict == "fail"
    assert "gets 1 and up to 0.5 for s_wm, up to 0.3 for quality, up to 0.2 for agreement;" in row.reason


@pytest.mark.parametrize("tokens, verdict, reason", [
    ((560, 900), "fail", "1.0 a question"),
    ((80, 300), "fail", "no completion is longer than 512 tokens, the longest has 300: the length penalty is 0")])
def test_the_guides_coherence_pairs_need_completions_beyond_the_free_tokens(tmp_path, tokens, verdict, reason):
    row = finished(tmp_path / "run", "guide-8", tokens=tokens).loc["coherence pairs"]
    assert row.verdict == verdict and row.reason.startswith(reason)
    assert row.expected == "6 to 12 for 20 questions" and row.source == "pipeline guide"


def test_accuracies_and_times_are_judged_on_the_documents_model_test_and_host_only(tmp_path):
    judged = finished(tmp_path / "abel", "guide-8")
    verdicts = judged.verdict[["accuracy of base", "accuracy of dpo", "minutes of 04_dpo"]]
    assert verdicts.tolist() == ["fail", "pass", "pass"]
    assert judged.measured["accuracy of base"] == "80.4 % (78.1 to 82.5)"
    for model, gap in (("base", .04), ("sft", .53)):
        reason = f"{gap} points below, which chance alone may explain; 3 answers were cut off"
        assert judged.reason[f"accuracy of {model}"] == reason
    assert judged.verdict["minutes of 05_eval"] == "not applicable"   # the guide's ten minutes are of one GPU
    pocket = {phase: {"base": "data/pocket-base", "n_gpu": 0} for phase in ("02_rollouts", "04_dpo", "05_eval")}
    other = finished(tmp_path / "pocket", "guide-8", pocket)
    for name in ("accuracy of base", "accuracy of sft", "accuracy of dpo", "minutes of 02_rollouts"):
        assert other.verdict[name] == "not applicable"
    assert other.reason["accuracy of sft"] == "this run has data/pocket-base on madrylab/gsm8k-platinum"
    assert other.expected["accuracy of sft"] == "82 to 85 %, GAIR/Abel-7B-002 on GSM8K or Platinum"


def test_the_losses_of_the_deployment_guide_hold_for_its_loss_only(tmp_path):
    names = [f"loss of epoch {k}" for k in (1, 2, 3)]
    assert finished(tmp_path / "a", "platinum-11").verdict[names].tolist() == ["pass"] * 3
    high = finished(tmp_path / "b", "platinum-11", losses=(.69, .69, .69)).loc[names[2]]
    assert (high.verdict, high.reason) == ("fail", "above it, with learning_rate=5e-05 and beta=0.1")
    mixed = finished(tmp_path / "c", "platinum-11", {"04_dpo": {"trainer": {"loss_type": ["sigmoid", "sft"]}}})
    assert set(mixed.verdict[names]) == {"not applicable"} and "loss_type=sigmoid, sft" in mixed.reason[names[0]]
    assert not any("loss of" in name for name in finished(tmp_path / "d", "guide-8").index)   # its guide states none


def test_rollouts_that_changed_after_their_manifest_are_named(tmp_path):
    finished(tmp_path / "run", "guide-8")
    path = tmp_path / "run/02_rollouts/rollouts.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:10]))
    row = criteria.criteria(tmp_path / "run").set_index("criterion").loc["questions and trajectories"]
    assert (row.verdict, row.reason) == ("fail", "the manifest counted 20 questions: rollouts.jsonl has changed since")


def test_answers_behind_other_markers_are_counted_apart(tmp_path):
    judged = finished(tmp_path / "run", "guide-8")
    path = tmp_path / "run/02_rollouts/rollouts.jsonl"
    path.write_text(path.read_text().replace("\\nAnswer: 7", "\\n#### 7", 3))
    row = criteria.criteria(tmp_path / "run").set_index("criterion").loc["answers in the form 'Answer: <number>'"]
    assert judged.verdict["answers in the form 'Answer: <number>'"] == "pass"
    assert (row.verdict, row.measured, row.reason) == ("fail", "157 of 160", "3 announced by #### or a box")


def test_pairs_under_another_preset_than_the_rollouts_follow_the_document_of_each(tmp_path):
    judged = finished(tmp_path / "run", "platinum-11", {"03_preferences": {"preset": "core-variants"}})
    assert judged.source["questions and trajectories"] == "deployment guide"
    assert judged.source["coherence pairs"] == "core guide"
    assert "gets 1" not in judged.reason["reward from 0.5 to 1.2"]   # the weights are those of the other rewards


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    "The report of a run outside the project's outputs, whose folder papermill could take for a format string."
    folder = tmp_path_factory.mktemp("root") / "outputs" / "a {b} run"
    finished(folder, "platinum-11")
    assert report.write_report(folder) == folder / "report.html"
    assert (folder / "report.ipynb").exists() and not list(folder.glob("*.tmp"))
    return (folder / "report.html").read_text(encoding="utf-8")


def test_the_report_tells_what_was_run_and_what_came_out(page):
    assert "<title>Report of a {b} run</title>" in page
    assert page.count("<h1") == 1 and "<h1>Run a {b} run, recipe smoke</h1>" in page
    order = ("3 models (base, sft, dpo) of GAIR/Abel-7B-002, 1,209 test questions.", "Warning: sft &lt; base",
             "It worked, and no control was compared: dpo against sft +2.9 points (95 % interval +1.2 to +4.6, "
             "p = 0.001, corrected p = 0.002), n = 1,209 questions.", "✗ fail", "✓ pass", "looper run smoke")
    assert [page.index(text) for text in order] == sorted(page.index(text) for text in order)
    for text in ("+60", "the expectations exclude each other", "deployment guide",
                 "28 min 20 s", 'href="04_dpo.html"', '"beta": 0.1', 'alt="Figure: Accuracy"'):
        assert text in page, text


def test_every_failed_criterion_of_the_page_has_its_reason_beside_it(page):
    rows = [[td.text for td in tr.select("td")] for tr in BeautifulSoup(page, "html.parser").select("table tr")]
    failed = [row for row in rows if row and row[0] == "✗ fail"]
    assert failed and all(row[4] for row in failed)
    assert len([row for row in rows if row and "pass" in row[0]]) > 5


def test_the_report_shows_no_code(page):
    assert "report.summarise" not in page and "Traceback" not in page
    assert not BeautifulSoup(page, "html.parser").select("details.code")


@pytest.fixture(scope="module")
def phase_page(tmp_path_factory):
    "The page of a phase with code, a figure, a widget and messages, in a run of three phases."
    folder = tmp_path_factory.mktemp("run") / "mine"
    phases = ("01_sft", "02_rollouts", "05_eval")
    write_json(folder / "run.json", {"recipe": "smoke", "parameters": dict.fromkeys(phases, {}), "seconds": {}})
    figure = v4.new_output("display_data", {"image/png": "iVBORw0KGgo=", "text/plain": "<Figure>"})
    widget = v4.new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "pairs: 0%"})
    nb = v4.new_notebook(cells=[
        v4.new_code_cell("#| default_exp rollouts"), v4.new_markdown_cell("# Phase 2: rollouts\n\n## First *part*"),
        v4.new_code_cell("#| export\nimport os"), v4.new_code_cell("#| slow\nplot()", outputs=[widget, figure]),
        v4.new_markdown_cell("## [Second](lib/x.ipynb) part\n\n### Detail"),
        v4.new_code_cell("x", outputs=[v4.new_output("stream", name="stderr", text="a message")])])
    (folder / "02_rollouts.ipynb").write_text(json.dumps(nb))
    return BeautifulSoup(report.write_page(folder / "02_rollouts.ipynb").read_text(), "html.parser")


def test_a_page_has_contents_folded_code_and_ways_to_the_other_pages(phase_page):
    assert phase_page.title.text == "Phase 2: rollouts · mine"
    links = phase_page.select("nav.contents a")
    assert [a.text for a in links] == ["First part", "Second part", "Detail"]
    assert all(phase_page.find(id=a["href"][1:]) for a in links)
    assert [a["href"] for a in phase_page.select("nav.run a")] == ["report.html", "01_sft.html", "02_rollouts.html",
                                                                   "05_eval.html"]
    assert [a["href"] for a in phase_page.select("footer a")] == ["01_sft.html", "05_eval.html"]
    folds = phase_page.select("details.code")
    assert [fold.summary.text for fold in folds] == ["imports", "code", "code", "messages"]
    assert not any(fold.has_attr("open") for fold in folds)
    for gone in ("default_exp", "#| slow", "pairs: 0%", "x.ipynb"): assert gone not in phase_page.text


def test_every_figure_is_described(phase_page, page):
    described = [img["alt"] for p in (phase_page, BeautifulSoup(page, "html.parser")) for img in p.select("img")]
    assert described == ["Figure: First part", "Figure: Accuracy"]


def test_pages_load_nothing_from_the_network(phase_page, page):
    for text in (str(phase_page), page):
        assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//|@import|url\(["']?http""", text)
        soup = BeautifulSoup(text, "html.parser")
        assert not soup.select("script[src], iframe, link[rel=stylesheet]")
        assert all(link["href"] == "data:," for link in soup.select("link"))


def test_plots_of_several_cells_are_all_shown(tmp_path):
    "A plot that sets a style as a whole also resets what the inline backend has set, and later plots are not shown."
    draw = "show.shares(pd.DataFrame({'name': ['sft'], 'k': 5, 'n': 9, 'low': .2, 'high': .9}), 'x', 'y')"
    cells = [v4.new_code_cell(source) for source in ("import pandas as pd\nfrom looper_math import show", draw, draw)]
    done = papermill.execute_notebook(v4.new_notebook(cells=cells), None, kernel_name="python3", cwd=str(ROOT),
                                      progress_bar=False)
    shown = [any("image/png" in output.get("data", {}) for output in cell.outputs) for cell in done.cells[-2:]]
    assert shown == [True, True], done.cells[-1]


def luminance(colour):
    "Relative luminance as the accessibility guidelines define it."
    linear = [c / 12.92 if c <= .03928 else ((c + .055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return .2126 * linear[0] + .7152 * linear[1] + .0722 * linear[2]


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + .05) / (low + .05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_every_text_is_legible_on_its_background(theme):
    "The colours of texts on those of the page and of its cards, with a contrast of at least 4.5."
    css = (ROOT / "looper_math/templates/page/page.css").read_text()
    colours = dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", re.findall(r":root \{(.*?)\}", css, re.S)[theme]))
    assert contrast("#767676", "#ffffff") > 4.5 > contrast("#787878", "#ffffff")
    for text in ("text", "soft", "link", "keyword", "string", "comment", "number"):
        assert min(contrast(colours[text], colours[ground]) for ground in ("page", "card")) >= 4.5, text


def changes(**sides):
    "Comparisons of dpo and sft, each higher, equal or lower."
    values = {"higher": (.1, .001), "equal": (.02, .4), "lower": (-.1, .001)}
    return {key: {"difference": d, "p": p, "p_holm": p, "interval": [d - .1, d + .1], "gained": 1, "lost": 1, "n": 9}
            for key, (d, p) in ((key, values[side]) for key, side in sides.items())}


@pytest.mark.parametrize("sides, first, flag", [
    ({"dpo_vs_sft": "higher", "dpo_vs_control": "higher"}, "It worked: ", "04_dpo.trainer.seed=1"),
    ({"dpo_vs_sft": "higher", "dpo_vs_control": "equal"}, "A gain, without evidence", "03_preferences.policy=capped"),
    ({"dpo_vs_sft": "equal"}, "No evidence that it worked: ", "03_preferences.policy=capped"),
    ({"dpo_vs_sft": "lower"}, "It did harm: ", "04_dpo.trainer.learning_rate=2.5e-05"),
    ({"sft_vs_base": "lower", "dpo_vs_sft": "higher"}, "It worked, and no control", "04_dpo.trainer.seed=1")])
def test_the_first_sentence_and_the_commands_follow_from_the_result(tmp_path, sides, first, flag):
    finished(tmp_path / "mine", "platinum-11")
    path = tmp_path / "mine/05_eval/manifest.json"
    manifest = read_json(path)
    manifest["metrics"]["paired"] = manifest["metrics"]["sets"]["test"]["paired"] = changes(**sides)
    write_json(path, manifest)
    assert report.outcome(report.summarise(tmp_path / "mine")).sentence.startswith(first)
    steps = next_steps.next_steps(tmp_path / "mine")
    assert len(steps) == 3 and steps[1].command == f"looper run smoke --run mine-2 -p {flag}"
    for step in steps:
        words = shlex.split(step.command)
        if words[0] != "looper": continue
        args = cli._parser().parse_args(words[1:])
        phases = runs.phases_of(ROOT, args.recipe)
        runs.assign([runs.read_flag(flag, phases) for flag in args.p], phases)
