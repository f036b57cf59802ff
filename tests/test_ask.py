"One question from the terminal, and whatever a user may type in its place."
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest

from looper_math import prompts, regime_w
from looper_math.ask import Model, ask, find_model, run_models
from looper_math.cli import looper
from looper_math.prompts import TEMPLATE
from looper_math.records import ROOT, SettingsError, write_json

QUESTION = ("Mia has 12 plums. Mia buys 3 bags of 5 plums. Ben has 4 more plums than Mia. "
            "How many plums does Ben have now?")
BASE = "data/pocket-base"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def project(tmp_path_factory, random_adapter):
    "A root with one run, whose model `sft` is an adapter, with a template and a preset of its own."
    root = tmp_path_factory.mktemp("project").resolve()
    models = {"base": "", "sft": random_adapter}
    evaluation = {"base": BASE, "template": "Q: " + TEMPLATE, "max_new_tokens": 40, "models": models}
    parameters = {"02_rollouts": {"preset": "guide-8"}, "05_eval": evaluation}
    write_json(root / "outputs/try/run.json", {"recipe": "pocket", "parameters": parameters})
    return root


@pytest.fixture(scope="module")
def answered(project):
    return ask("try/sft", QUESTION, gold="31", root=project)


def test_terminal():
    looper = str(Path(sys.executable).parent / "looper")
    command = [looper, "ask", BASE, QUESTION, "--gold", "31", "--arm-set", "guide-8", "--max-new-tokens", "60"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^ *(plain call|\w+_\d) .*$", done.stdout.partition("  arm")[2], re.MULTILINE)
    assert rows == ["plain call", *(a.name for a in prompts.arms("guide-8"))]
    for text in ("support", "first_false", "reward", "s_wm", "Plurality: ", "Plain call: ", "for training only."):
        assert text in done.stdout


def test_a_run_says_how_its_model_is_asked(answered, project, random_adapter):
    assert answered.model == Model("try/sft", BASE, random_adapter, "Q: " + TEMPLATE, "guide-8", 40)
    assert [s["arm_name"] for s in answered.solutions] == [a.name for a in prompts.arms("guide-8")]
    for s in [answered.plain, *answered.solutions]:
        assert s["prompt"].startswith("Q: Question: Mia") and s["num_tokens"] <= 40
    assert answered.plain["prompt"].split("\n")[1] == prompts.CANONICAL and answered.plain["temperature"] == 0
    base = ask("try/base", QUESTION, root=project)
    assert [s["prompt"] for s in base.solutions] == [s["prompt"] for s in answered.solutions]
    assert [s["full_text"] for s in base.solutions] != [s["full_text"] for s in answered.solutions]


def test_scores_are_those_of_regime_w(answered):
    "Also for the solutions of a real engine, and not of a stand-in."
    metrics, scored = regime_w.score_rollout(answered.solutions, 31, "guide-8")
    assert answered.metrics == metrics
    assert [s["reward"] for s in answered.solutions] == [r["reward"] for r in scored]
    assert [s["support"] for s in answered.solutions] == [r["signals"]["support"] for r in scored]


def test_without_a_gold_answer_there_is_no_reward(answered, project):
    blind = ask("try/sft", QUESTION, root=project)
    assert [s["full_text"] for s in blind.solutions] == [s["full_text"] for s in answered.solutions]
    assert blind.metrics == answered.metrics
    for shown in (str(blind), blind._repr_html_()):
        assert not re.search("reward|correct|quality|right|wrong", shown) and "support" in shown
    assert re.search("right|wrong", str(answered)) and "reward" in answered._repr_html_()


def test_options_replace_those_of_the_run(project):
    "Preset, arms, template and length, each instead of the run's; a preset brings its arms."
    template = "{question}\n{instruction}\n"
    own = ask("try/base", QUESTION, preset="core-variants", template=template, max_new_tokens=3, root=project)
    assert [s["arm_name"] for s in own.solutions] == [a.name for a in prompts.arms("core-variants")]
    assert own.preset == "core-variants"
    assert own.plain["prompt"].startswith("Mia has") and all(s["num_tokens"] <= 3 for s in own.solutions)


def test_no_arm_gives_an_answer(project):
    "One token is no answer: there is no plurality and no agreement, and both displays show it."
    cut = ask("try/base", "Why?", max_new_tokens=1, gold=1, root=project)
    assert {s["finish_reason"] for s in cut.solutions} == {"length"} and {s["answer"] for s in cut.solutions} == {None}
    assert cut.plurality == [] and cut.metrics["s_end"] == 0
    for shown in (str(cut), cut._repr_html_()):
        assert "Plurality: none, as no arm gave an answer." in shown
        assert "Plain call: no answer, which is wrong: 1 is right." in shown


REFUSED = {
    "empty question": (["try/sft", "  "], "the question is empty"),
    "empty model": (["", QUESTION], "MODEL is empty: name a model of a run, try/base, try/sft"),
    "a run without a model": (["try", QUESTION], "'try' is a run: name one of its models, try/base, try/sft"),
    "a model that the run has not": (["try/stf", QUESTION], "no model 'stf'; did you mean 'sft'?"),
    "a misspelt run": (["tyr/sft", QUESTION], "there is no model 'tyr/sft'"),
    "nearest run": (["tyr/sft", QUESTION], "did you mean 'try/sft'?"),
    "a misspelt folder": (["data/pocket-bass", QUESTION], "there is no model 'data/pocket-bass'"),
    "a folder outside": (["../../nowhere", QUESTION], "there is no model '../../nowhere'"),
    "a folder without a model": (["/etc", QUESTION], "there is no config.json in it"),
    "an unknown preset": (["try/sft", QUESTION, "--preset", "platinum11"],
                          "there is no preset 'platinum11'; did you mean 'platinum-11'?"),
    "an unknown arm set": (["try/sft", QUESTION, "--arm-set", "guide"],
                           "there is no arm set 'guide'; did you mean 'guide-8'?"),
    "a gold answer without a number": (["try/sft", QUESTION, "--gold", "many"],
                                       "gold must state a number, such as 72, got 'many'"),
    "a layout without a question": (["try/sft", QUESTION, "--template", "Solve!"], "template must hold {question}"),
    "a chat layout that the base does not have": (["try/sft", QUESTION, "--template", "chat"], "has no chat template"),
    "a negative length": (["try/sft", QUESTION, "--max-new-tokens", "-1"], "max_new_tokens must be 1 or more"),
    "a question without end": (["try/sft", "plums " * 2100], "and there is room for 2048"),
    "a misspelt slot": (["try/sft", QUESTION, "--template", "{question} {instructon}"], "did you mean {instruction}?"),
    "a preset for a plain call": (["try/sft", QUESTION, "--plain", "--preset", "guide-8"], "leave out arm set and"),
    "a name that no file can have": (["m" * 300, QUESTION], "MODEL has a part of 300 bytes"),
    "a user who is not there": (["~nosuchuser/model", QUESTION], "this machine has no such user"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_a_model_is_loaded(project, case, capsys, monkeypatch):
    from looper_math import models

    argv, message = REFUSED[case]
    monkeypatch.setattr(models, "load_base", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as stop:
        looper(["ask", *argv], project)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_adapters_elsewhere(tmp_path, random_adapter):
    "An adapter without a manifest has neither prompt nor base, and can still be asked when both are given."
    with pytest.raises(SettingsError, match="no manifest.json beside this adapter"):
        find_model(random_adapter)
    own = ask(Model("mine", BASE, random_adapter), QUESTION, plain=True)
    assert own.plain["full_text"] and str(own).startswith(f"mine: {BASE} with {random_adapter}")
    with pytest.raises(SettingsError, match="no config.json in it"):
        find_model(str(tmp_path))


DAMAGED = {"torn": '{"recipe": "po', "empty": "", "list": "[1]", "number": '{"parameters": 3}', "mark": "\ufeff"}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize("file", ["run.json", "05_eval/manifest.json"])
def test_a_damaged_file_of_one_run_leaves_the_others_usable(project, tmp_path, file, text, capsys):
    "It is left out of the list, with a note, and named by whoever asks for it."
    root = shutil.copytree(project, tmp_path / "project")
    damaged = root / "outputs/broken" / file
    damaged.parent.mkdir(parents=True)
    damaged.write_text(text, encoding="utf-8")
    assert run_models(root) == ["try/base", "try/sft"]
    assert f"The models of run 'broken' are not listed: {damaged} is damaged" in capsys.readouterr().err
    assert find_model("try/sft", root).name == "try/sft"
    with pytest.raises(SystemExit) as stop: looper(["ask", "broken/dpo", QUESTION], root)
    assert stop.value.code == 2 and f"looper: {damaged} is damaged" in capsys.readouterr().err
    with pytest.raises(SettingsError, match="no model 'tyr/sft'.*did you mean 'try/sft'"): find_model("tyr/sft", root)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_a_truncated_base_is_one_sentence(tmp_path, file, capsys):
    base = shutil.copytree(ROOT / BASE, tmp_path / "base")
    data = (base / file).read_bytes()
    (base / file).write_bytes(data[:len(data) // 2])
    with pytest.raises(SystemExit) as stop: looper(["ask", str(base), QUESTION, "--plain"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and f"{base} cannot be loaded: " in error and error.count("\n") == 1


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_truncated_adapter_is_one_sentence(tmp_path, random_adapter, file):
    adapter = shutil.copytree(random_adapter, tmp_path / "adapter")
    data = (adapter / file).read_bytes()
    (adapter / file).write_bytes(data[:len(data) // 2])
    with pytest.raises(SettingsError, match=f"with {adapter} cannot be loaded: [^\n]*$"):
        ask(Model("mine", BASE, str(adapter)), QUESTION, plain=True)


WITHOUT = """
import sys
sys.modules["looper_math.regime_w"] = None   # as in a wheel that leaves it out
from looper_math import ask, cards, cli, engines, evaluation, heldout, serving, trajectories
from looper_math.records import SettingsError
question = "Mia has 12 plums and buys 3 bags of 5. How many now?"
print(ask.ask("data/pocket-base", question, gold=27, plain=True).plain["answer"])
try: ask.ask("data/pocket-base", question)
except SettingsError as e: print(e)
cli.looper(["ask", "data/pocket-base", question, "--plain"])
"""


def test_a_plain_call_without_regime_w():
    "Evaluation, serving, cards and the plain call need no metric; arms say what is missing."
    done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith("engine")]
    assert lines[0].isdigit() and lines[1].startswith("this build has no Regime W: ask with --plain")
    assert lines[-1] == f"Plain call: {lines[0]}."
