"The runner and the launcher, on a project of three tiny phases in a temporary folder."
import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import nbformat
import papermill
import pytest

from looper_math import launch, records, runs
from looper_math.cli import looper
from looper_math.records import RunConflict, SettingsError
from looper_math.runs import PhaseFailed, Refused, run_recipe

HEAD = """
import os, time
from dataclasses import make_dataclass
from pathlib import Path
from looper_math import records
records.ROOT = Path(ROOT_HERE)
"""
# name → parameters, the settings' fields, body. The summary reads the numbers of the 2nd and 3rd.
PHASES = {
    "01_numbers": (
        'run = "tiny"  # str: run folder\ncount = 4  # int: how many\nscale = 1.0  # float: factor\n'
        'note = ""  # str: a remark\ntwice = False  # bool: whether to double\nsizes = [1, 2]  # list: anything\n'
        'trainer = {"rate": 0.1, "schedule": {"name": "cosine"}}  # dict: the trainer\'s options',
        "run=str, count=int, scale=float, note=str, twice=bool, sizes=list, trainer=dict",
        'records.write_json(phase.folder/"numbers.json", [scale * i for i in range(count)])\n'
        'phase.finish([phase.folder/"numbers.json"])',
    ),
    "03_preferences": (
        'run = "tiny"  # str: run folder\nseed = 7  # int: random seed\nwait = 0.0  # float: seconds to work\n'
        'break_at = ""  # str: work, plot or kernel',
        "run=str, seed=int, wait=float, break_at=str",
        """
for step in range(3):
    with records.RecordWriter(phase.folder/"pairs.jsonl") as w: w.append([{"step": step}])
    time.sleep(wait)
    assert not (break_at and Path("broken").exists() and break_at == "work"), "the work broke"
    if Path("broken").exists() and break_at == "kernel": os._exit(9)
phase.finish([phase.folder/"pairs.jsonl"], counts={"correctness": 5, "coherence": 2})
assert not (Path("broken").exists() and break_at == "plot"), "the plot broke"
""",
    ),
    "05_eval": (
        'run = "tiny"  # str: run folder\nseed = 7  # int: random seed\nlimit = None  # int: questions, all if None',
        "run=str, seed=int, limit=object",
        """
assert len(list(records.iter_records(inputs["pairs"]))) == 3, "pairs are missing or twice there"
models = {m: {"correct": c, "n": 100} for m, c in (("base", 40), ("sft", 50), ("dpo", 65))}
change = lambda gained, lost, p: {"gained": gained, "lost": lost, "n": 100, "p": p, "p_holm": p, "interval": [0, 1],
                                  "difference": (gained - lost)/100, "sentence": f"{gained} gained."}
test = {"models": models, "paired": {"sft_vs_base": change(15, 5, 0.041), "dpo_vs_sft": change(20, 5, 0.0041)}}
warnings = ["SFT SEEMS WORSE THAN BASE"]
phase.finish([], metrics=test | {"sets": {"test": test}, "sampled": {}, "warnings": warnings})
""",
    ),
}
INPUTS = {
    "01_numbers": "{}",
    "03_preferences": '{"numbers": records.ROOT/"outputs"/run/"01_numbers/numbers.json"}',
    "05_eval": '{"pairs": records.ROOT/"outputs"/run/"03_preferences/pairs.jsonl"}',
}


def write_notebook(path, cells):
    "A notebook of code cells, the second tagged as the parameters."
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nb.cells[1].metadata["tags"] = ["parameters"]
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(nb, path)


def make_project(root):
    "Notebooks and recipes of the tiny project under `root`."
    for recipe in ("tiny", "other"):
        (root / "nbs/recipes" / recipe).mkdir(parents=True)
        (root / "nbs/recipes" / recipe / "common.yaml").write_text("# nothing yet\n")
    for name, (parameters, fields, body) in PHASES.items():
        write_phase(root, name, parameters, fields, INPUTS[name], body)
    return root


def write_phase(root, name, parameters, fields, inputs, body):
    "The notebook of one phase."
    make = f"""
Settings = make_dataclass("Settings", dict({fields}).items())
settings = records.settings(Settings, globals())
inputs = {inputs}
phase = records.Phase({name!r}, settings, inputs)
shutil.rmtree(phase.folder, ignore_errors=True)
phase.begin()"""
    head = HEAD.replace("ROOT_HERE", repr(str(root)))
    write_notebook(root / f"nbs/{name}.ipynb", ["import shutil", parameters, head, make, body])


def files(root):
    "Every file with its bytes and the time it was written."
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in root.rglob("*") if p.is_file()}


def summary(root, run="tiny"):
    return json.loads((root / "outputs" / run / "summary.json").read_text())


@pytest.fixture
def fresh(tmp_path):
    return make_project(tmp_path.resolve())


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "A project whose recipe `tiny` has run; tests that use it change nothing in it."
    root = make_project(tmp_path_factory.mktemp("done").resolve())
    run_recipe("tiny", root=root)
    return root


def test_a_run_leaves_notebooks_pages_and_a_summary(done, capsys):
    folder = done / "outputs/tiny"
    for phase in PHASES:
        assert (folder / f"{phase}.ipynb").exists() and "<html" in (folder / f"{phase}.html").read_text()
    got = summary(done)
    assert got["models"]["dpo"] == {"correct": 65, "n": 100} and got["paired"]["dpo_vs_sft"]["gained"] == 20
    assert got["pairs"] == {"correctness": 5, "coherence": 2} and set(got["seconds"]) == set(PHASES)
    assert all(s > 0 for s in got["seconds"].values())
    page = (folder / "report.html").read_text()
    assert "+15.0 points" in page and 'href="05_eval.html"' in page and "looper card tiny" in page
    state = json.loads((folder / "run.json").read_text())
    assert state["recipe"] == "tiny" and state["parameters"]["03_preferences"]["seed"] == 7

    before = files(folder / "03_preferences") | files(folder / "01_numbers")
    run_recipe("tiny", root=done)
    printed = capsys.readouterr().out
    assert printed.count("done before") == 3
    assert "It worked, and no control was compared: dpo against sft +15.0 points" in printed
    assert "\nwarning: SFT SEEMS WORSE THAN BASE\n" in printed
    assert {p: v for p, v in files(folder).items() if p in before} == before and summary(done) == got


REFUSED = {
    "misspelt": (["run", "tiny", "-p", "01_numbers.cuont=3"],
                 "-p 01_numbers.cuont=3: unknown parameter 'cuont'; did you mean 'count'?"),
    "misspelt without a phase": (["run", "tiny", "-p", "scael=3"], "unknown parameter 'scael'; did you mean 'scale'?"),
    "misspelt phase": (["run", "tiny", "-p", "03_preferecnes.seed=3"],
                       "no phase '03_preferecnes'; did you mean '03_preferences'?"),
    "several phases": (["run", "tiny", "-p", "seed=3"],
                       "03_preferences, 05_eval all have 'seed'; write 03_preferences.seed=… for one of them or "
                       "common.seed=… for all"),
    "no value": (["run", "tiny", "-p", "count"], "expected PHASE.NAME=VALUE"),
    "text for a float": (["run", "tiny", "-p", "scale=big"], "scale must be float, got str 'big'"),
    "float for an int": (["run", "tiny", "-p", "count=2.5"], "count must be int, got float 2.5"),
    "bool for an int": (["run", "tiny", "-p", "count=true"], "count must be int, got bool True"),
    "int for a bool": (["run", "tiny", "-p", "twice=1"], "twice must be bool, got int 1"),
    "int for a list": (["run", "tiny", "-p", "sizes=3"], "sizes must be list, got int 3"),
    "none where none is not allowed": (["run", "tiny", "-p", "count=null"], "count must be int, got NoneType None"),
    "the run as a parameter": (["run", "tiny", "-p", "common.run=x"], "given by --run"),
    "a recipe that is not there": (["run", "tinny"], "there is no recipe 'tinny'; did you mean 'tiny'?"),
    "a name that is a path": (["run", "tiny", "--run", "../elsewhere"], "run must be a name of letters"),
    "an earlier phase missing": (["run", "tiny", "--run", "new", "--from", "05"],
                                 "05_eval needs 01_numbers, which is not done in"),
    "an unknown phase": (["run", "tiny", "--from", "07"], "--from: no phase '07'"),
    "phases back to front": (["run", "tiny", "--from", "05", "--to", "01"], "comes after"),
    "the folder of another recipe": (["run", "other", "--run", "tiny"],
                                     "holds a run of recipe 'tiny', not 'other': give another --run NAME, or "
                                     "delete that folder"),
    "other parameters": (["run", "tiny", "-p", "05.seed=8"], "was made with other parameters (seed was 7, now 8)"),
    "other parameters outside --to": (["run", "tiny", "--to", "01", "-p", "05.seed=8"],
                                      "was made with other parameters"),
    "a recipe that is a path": (["run", "../x"], "there is no recipe '../x'"),
    "a name that is too long": (["run", "tiny", "--run", "r" * 256], "run must be a name of at most 255 bytes"),
    "a longer one in bytes": (["run", "tiny", "--run", "é" * 128], "run must be a name of at most 255 bytes, got 256"),
    "the home of nobody, for data": (["data", "~nobody-here/x"], "DIR: '~nobody-here/x' begins with ~nobody-here"),
    "the home of nobody, to merge into": (["merge", "a", "b", "~nobody-here/x"], "OUT: '~nobody-here/x' begins with"),
    "the home of nobody, to ask": (["ask", "~nobody-here/x", "How many?"], "MODEL: '~nobody-here/x' begins with"),
    "half a surrogate pair as a name": (["run", "tiny", "--run", "\ud800"], "run must be a name of letters"),
    "octal": (["run", "tiny", "-p", "count=010"], "-p count=010: 010 is octal in YAML, 8; write the number without 0"),
    "sexagesimal": (["run", "tiny", "-p", "count=1:30"], "-p count=1:30: 1:30 is to base 60 in YAML, 90"),
    "sexagesimal in a list": (["run", "tiny", "-p", "sizes=[1, 1:30]"], "1:30 is to base 60 in YAML, 90"),
    "not a number": (["run", "tiny", "-p", "scale=nan"], "scale must be a finite number, got nan"),
    "infinite": (["run", "tiny", "-p", "scale=-inf"], "scale must be a finite number, got -inf"),
    "infinite in a list": (["run", "tiny", "-p", "sizes=[1, .inf]"], ".inf is no finite number"),
    "too large for a float": (["run", "tiny", "-p", "scale=1e400"], "scale must be a finite number, got inf"),
    "an entry of a list": (["run", "tiny", "-p", "01.sizes.first=1"],
                           "01_numbers.sizes must be a dict to have an entry 'first', got list [1, 2]"),
    "an entry of a number": (["run", "tiny", "-p", "common.seed.x=1"],
                             "03_preferences.seed must be a dict to have an entry 'x', got int 7"),
    "an entry of a text in a dict": (["run", "tiny", "-p", "trainer.schedule.name.x=1"],
                                     "trainer.schedule.name must be a dict to have"),
    "an entry of an unknown parameter": (["run", "tiny", "-p", "01.trianer.rate=1"],
                                         "unknown parameter 'trianer'; did you mean 'trainer'?"),
    "an entry without its dict": (["run", "tiny", "-p", "01.rate=1"], "'rate'; did you mean 'trainer.rate'?"),
    "an entry that is no YAML": (["run", "tiny", "-p", "trainer.rate=[1"], "-p trainer.rate=[1: this is no YAML"),
    "an octal entry": (["run", "tiny", "-p", "trainer.rate=010"], "-p trainer.rate=010: 010 is octal in YAML, 8"),
    "an empty key": (["run", "tiny", "-p", "01.trainer.=1"], "expected PHASE.NAME=VALUE"),
    "a text for a number in a dict": (["run", "tiny", "-p", "trainer={rate: 5e-5}"],
                                      "trainer.rate is a text, '5e-5'; in YAML a number with an exponent needs a "
                                      "point: 5.0e-5"),
    "no YAML": (["run", "tiny", "-p", "sizes=[1"], "-p sizes=[1: this is no YAML"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(done, case, capsys):
    argv, message = REFUSED[case]
    before = files(done)
    with pytest.raises(SystemExit) as stop:
        looper(argv, done)
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert files(done) == before and not (done / "outputs/new").exists()


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("common", "cuont: 3", "nbs/recipes/tiny/common.yaml: unknown parameter 'cuont'; did you mean 'count'?"),
        ("03_preferences", "seed: 3.5", "nbs/recipes/tiny/03_preferences.yaml: seed must be int, got float 3.5"),
        ("03_preferences", "count: 3", "unknown parameter 'count'"),
        ("01_numbers", "scale: 5e-5", "scale must be float, got str '5e-5'; in YAML a number with an exponent needs a"),
        ("01_nubmers", "count: 3", "no phase '01_nubmers'; did you mean '01_numbers'?"),
        ("common", "count: [3", "this is no YAML"),
        ("common", "trainer.rate: 3", "tiny/common.yaml: 'trainer.rate' is a dotted key, which only -p knows"),
        ("common", "trainer.rate: 3", "write `trainer: {rate: …}`"),
        ("01_numbers", "trainer: {rate: 5e-5}", "01_numbers.yaml: trainer.rate is a text, '5e-5'; in YAML"),
        ("common", "- count", "expected lines of the form"),
        ("phases", "[01_numbers, 04_dpo]", "no phase '04_dpo'"),
        ("phases", "[01_numbers, 03_preferences, 01_numbers]", "01_numbers is there twice"),
        ("phases", "[]", "expected a list of notebook names"),
        ("phases", "", "nbs/recipes/tiny/phases.yaml: expected a list of notebook names"),
        ("phases", "- 01_numbers: x", "no phase {'01_numbers': 'x'}"),
        ("phases", "- 01_numbers\n- [", "nbs/recipes/tiny/phases.yaml, line 2: this is no YAML"),
        ("phases", b"\xff\xfe-\x00 \x001\x00", "nbs/recipes/tiny/phases.yaml, line 1: not UTF-8"),
        ("01_numbers", "count: 3\nscale: 2\ncount: 4", "01_numbers.yaml, line 3: 'count' stands in line 1 already"),
        ("01_numbers", 'count: 3\n"count": 4', "01_numbers.yaml, line 2: 'count' stands in line 1 already"),
        ("01_numbers", "sizes: [{a: 1, a: 2}]", "'a' stands in line 1 already"),
        ("01_numbers", "scale: 2.0\ncount: 010", "nbs/recipes/tiny/01_numbers.yaml, line 2: 010 is octal in YAML, 8"),
        ("01_numbers", "count: 1:30", "line 1: 1:30 is to base 60 in YAML, 90"),
        ("01_numbers", "scale: 1:30.5", "line 1: 1:30.5 is to base 60 in YAML, 90.5"),
        ("01_numbers", "scale: .inf", "line 1: .inf is no finite number"),
        ("01_numbers", "scale: .NaN", "line 1: .NaN is no finite number"),
        ("01_numbers", "scale: 1" + "0" * 400, "scale must be a finite number"),
        ("01_numbers", "count: 1" + "0" * 5000, "this cannot be read"),
        ("01_numbers", "note: no", "note must be str, got bool False; YAML reads no, off and false as False"),
        ("01_numbers", "note: on", "note must be str, got bool True; YAML reads yes, on and true as True"),
        ("01_numbers", "note: 12", "note must be str, got int 12; put the text in quotes"),
        ("01_numbers", "note:", 'note must be str, got NoneType None; put the text in quotes, "" where it is empty'),
        ("01_numbers", "[" * 5000, "this cannot be read"),
        ("01_numbers", "a: 1\n---\nb: 2", "line 2: this is no YAML"),
        ("01_numbers", "count: 3\nnote: \x07", "line 2: this is no YAML (character 0x7 may not stand in it)"),
        ("01_numbers", "count: 3\n".encode("utf-16"), "line 1: not UTF-8 (byte 0 is 0xff); save the file as UTF-8"),
        ("01_numbers", "count: 3\n".encode("utf-16-le"), "01_numbers.yaml, line 1: this is no YAML (character 0x0"),
        ("01_numbers", b"count: 3\n\x89PNG\r\n", "01_numbers.yaml, line 2: not UTF-8 (byte 9 is 0x89)"),
        ("01_numbers", "just words", "01_numbers.yaml, line 1: expected lines of the form"),
        ("01_numbers", "!!python/object/apply:os.system [ls]", "line 1: this is no YAML"),
    ],
)
def test_a_bad_recipe_is_refused_and_named(fresh, name, text, message):
    (fresh / f"nbs/recipes/tiny/{name}.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    before = files(fresh)
    with pytest.raises((Refused, SettingsError)) as e:
        run_recipe("tiny", root=fresh)
    assert message in str(e.value) and "\n" not in str(e.value) and files(fresh) == before


def test_what_yaml_may_say(fresh):
    "A byte order mark, comments, dates, quoted words, other number formats, and merged keys."
    (fresh / "nbs/recipes/tiny/common.yaml").write_text("\ufeff# nothing but this\n")
    (fresh / "nbs/recipes/tiny/01_numbers.yaml").write_text(
        "x: &x {a: 1}\ncount: 0x10\nscale: 1_0.5\nnote: 2024-05-01\ntwice: yes\nsizes: ['010', {<<: *x, b: 2}]\n"
    )
    phases = runs.phases_of(fresh, "tiny")
    got = {o.name: o.value for o in runs.read_recipe(fresh, "tiny", phases) if o.name != "x"}
    assert got == {"count": 16, "scale": 10.5, "note": "2024-05-01", "twice": True, "sizes": ["010", {"a": 1, "b": 2}]}


def test_files_beside_a_recipe(fresh):
    "A file that would be ignored is refused; notes, folders, hidden files and links to files are in order."
    recipe = fresh / "nbs/recipes/tiny"
    (recipe / "README.md").write_text("why")
    (recipe / "older").mkdir()
    (recipe / ".common.yaml.swp").write_text("x")
    (fresh / "shared.yaml").write_text("count: 7\n")
    (recipe / "01_numbers.yaml").symlink_to("../../../shared.yaml")
    (fresh / "nbs/recipes/.hidden").mkdir()
    (fresh / "nbs/recipes/linked").symlink_to("tiny")
    assert runs.recipes(fresh) == ["linked", "other", "tiny"]
    phases = runs.phases_of(fresh, "linked")
    assert [o.value for o in runs.read_recipe(fresh, "linked", phases)] == [7]
    for make, message in (
        (lambda p: p.with_suffix(".yml").write_text("seed: 1"), "03_preferences.yml: a recipe's files end in .yaml"),
        (lambda p: p.with_suffix(".YAML").write_text("seed: 1"), "03_preferences.YAML: a recipe's files end in .yaml"),
        (lambda p: p.mkdir(), "03_preferences.yaml is a folder; expected a YAML file"),
        (lambda p: p.symlink_to("nowhere"), "03_preferences.yaml is a link to nothing"),
        (lambda p: (p.parent / "phases.yaml").symlink_to("nowhere"), "phases.yaml is a link to nothing"),
    ):
        here = set(recipe.iterdir())
        make(recipe / "03_preferences.yaml")
        with pytest.raises(Refused) as e:
            run_recipe("tiny", root=fresh)
        assert message in str(e.value)
        for path in set(recipe.iterdir()) - here:
            path.rmdir() if path.is_dir() else path.unlink()


def test_where_values_come_from(fresh):
    "Later values win: common.yaml, the phase's file, then the flags; a common value is for each phase that has it."
    recipe = fresh / "nbs/recipes/tiny"
    (recipe / "common.yaml").write_text("seed: 1\ncount: 2\n")
    (recipe / "05_eval.yaml").write_text("seed: 2\nlimit: 10\n")
    phases = runs.phases_of(fresh, "tiny")
    texts = "common.seed=3", "eval.seed=4", "1.note=007", "scale=5e-5", "sizes=[3, 4]", "01.twice=true"
    flags = [runs.read_flag(text, phases) for text in texts]
    got = runs.assign(runs.read_recipe(fresh, "tiny", phases), phases)
    assert (got["01_numbers"]["count"], got["03_preferences"]["seed"]) == (2, 1)
    assert (got["05_eval"]["seed"], got["05_eval"]["limit"]) == (2, 10)
    got = runs.assign(runs.read_recipe(fresh, "tiny", phases) + flags, phases)
    assert (got["03_preferences"]["seed"], got["05_eval"]["seed"]) == (3, 4)
    default = phases["01_numbers"]["trainer"].default
    assert got["01_numbers"] == {"count": 2, "scale": 5e-5, "note": "007", "twice": True, "sizes": [3, 4],
                                 "trainer": default}


def test_entries_of_a_dict_parameter(fresh):
    "A dotted key changes one entry of what the recipe gives; values are YAML, and 5e-5 is a number as for a float."
    phases = runs.phases_of(fresh, "tiny")

    def assigned(*texts):
        flags = [runs.read_flag(text, phases) for text in texts]
        return runs.assign(runs.read_recipe(fresh, "tiny", phases) + flags, phases)["01_numbers"]["trainer"]

    default = {"rate": 0.1, "schedule": {"name": "cosine"}}
    assert assigned() == default and assigned("trainer.rate=5e-5") == default | {"rate": 5e-5}
    got = assigned("01.trainer.schedule.cycles=2", "common.trainer.flags=[yes, a]", "numbers.trainer.new.deep='x y'")
    schedule = {"name": "cosine", "cycles": 2}
    assert got == {"rate": 0.1, "schedule": schedule, "flags": [True, "a"], "new": {"deep": "x y"}}
    (fresh / "nbs/recipes/tiny/01_numbers.yaml").write_text("trainer: {steps: 3, by.dot: 4}\n")
    assert assigned("trainer.rate=1") == {"steps": 3, "by.dot": 4, "rate": 1}
    assert assigned("trainer.rate=1", "trainer={}") == {} and assigned() == {"steps": 3, "by.dot": 4}
    assert phases["01_numbers"]["trainer"].default == default


def test_a_recipe_may_choose_its_phases(fresh, capsys):
    (fresh / "nbs/recipes/tiny/phases.yaml").write_text("[01_numbers]\n")
    assert run_recipe("tiny", root=fresh) is None
    assert "[1/1] 01_numbers" in capsys.readouterr().out
    assert not (fresh / "outputs/tiny/summary.json").exists()


def test_a_recipe_runs_its_phases_in_its_own_order(fresh, capsys):
    "One above 05 runs only where phases.yaml names it, and in the place that it has there."
    write_phase(fresh, "06_online", 'run = "tiny"  # str: run folder', "run=str", "{}", "phase.finish([])")
    assert list(runs.phases_of(fresh, "tiny")) == list(PHASES)
    (fresh / "nbs/recipes/tiny/phases.yaml").write_text("[06_online, 01_numbers]\n")
    looper(["run", "tiny", "--to", "06"], fresh)
    assert (fresh / "outputs/tiny/06_online/manifest.json").exists()
    assert not (fresh / "outputs/tiny/01_numbers").exists()
    looper(["run", "tiny", "--from", "01"], fresh)
    out = capsys.readouterr().out
    assert out.index("[1/2] 06_online") < out.index("[2/2] 01_numbers")
    assert list(json.loads((fresh / "outputs/tiny/run.json").read_text())["parameters"]) == ["06_online", "01_numbers"]
    with pytest.raises(Refused, match="06_online, which is not done"):
        run_recipe("tiny", "new", first="01", root=fresh)


def refusal(argv, root, capsys):
    "The message with which a command is refused."
    with pytest.raises(SystemExit) as stop:
        looper(argv, root)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_a_recipe_that_continues_a_run(fresh, capsys):
    "It is refused, with the command to run first, until that run is done; --after names another run of that recipe."
    parameters = 'run = "tiny"  # str: run folder\nrollouts = ""  # str: file'
    write_phase(fresh, "06_more", parameters, "run=str, rollouts=str",
                '{"rollouts": records.ROOT/rollouts}', "phase.finish([])")
    recipe = fresh / "nbs/recipes/other"
    (recipe / "phases.yaml").write_text("[06_more]\n")
    (recipe / "06_more.yaml").write_text("rollouts: outputs/tiny/01_numbers/numbers.json\n")
    (recipe / "about.yaml").write_text("group: twins\npurpose: x\nminutes: 1\nhardware: x\ncontinues: tiny\n")
    before = files(fresh)
    refused = lambda *flags: refusal(["run", *flags], fresh, capsys)
    assert ("06_more.rollouts reads outputs/tiny/01_numbers/numbers.json, and outputs/tiny/01_numbers is not done: "
            "first `looper run tiny`, or name a finished run of tiny by --after RUN") in refused("other")
    assert "first `looper run tiny --run mine`" in refused("other", "--after", "mine")
    assert "--after mine: tiny reads no earlier run" in refused("tiny", "--after", "mine")
    assert files(fresh) == before

    looper(["run", "tiny", "--run", "mine", "--to", "01"], fresh)
    looper(["run", "other", "--after", "mine"], fresh)
    inputs = json.loads((fresh / "outputs/other/06_more/manifest.json").read_text())["input_paths"]
    assert inputs == {"rollouts": "outputs/mine/01_numbers/numbers.json"}
    assert "first `looper run tiny`" in refused("other", "--run", "new")
    assert "outputs/other holds a run of recipe 'other', and other continues one of 'tiny'" in refused(
        "other", "--run", "new", "--after", "other")


def test_no_recipe_lists_them(fresh, capsys):
    "By group, with minutes, hardware and purpose; a recipe that does not say is listed last."
    about = "group: twins\npurpose: adds up\nminutes: not timed\nhardware: 1 CPU core\n"
    (fresh / "nbs/recipes/tiny/about.yaml").write_text(about)
    looper(["run"], fresh)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    assert "Recipes," in lines[0] and "Twins:" in lines[1]
    assert lines[2] == "tiny not timed 1 CPU core adds up".split()
    assert lines[3:] == ["Without an about.yaml".split(), ["other"]]
    (fresh / "nbs/recipes/tiny/about.yaml").write_text(about.replace("twins", "twin"))
    with pytest.raises(SystemExit) as stop:
        looper(["run"], fresh)
    assert stop.value.code == 2 and "tiny/about.yaml: no group 'twin'; did you mean 'twins'" in capsys.readouterr().err


def test_a_failed_phase_shows_its_error_and_is_resumed(fresh, capsys):
    (fresh / "broken").touch()
    command = ["run", "tiny", "-p", "break_at=work"]
    with pytest.raises(SystemExit) as stop:
        looper(command, fresh)
    err = capsys.readouterr().err
    assert stop.value.code == 1 and "AssertionError: the work broke" in err
    assert "outputs/tiny/03_preferences.ipynb" in err
    assert "the work broke" in (fresh / "outputs/tiny/03_preferences.html").read_text()
    left = nbformat.read(fresh / "outputs/tiny/03_preferences.ipynb", 4)
    assert any(o.output_type == "error" for c in left.cells if c.cell_type == "code" for o in c.outputs)
    assert not (fresh / "outputs/tiny/05_eval.ipynb").exists()

    first = (fresh / "outputs/tiny/01_numbers/manifest.json").stat().st_mtime_ns
    (fresh / "broken").unlink()
    looper(command, fresh)
    assert capsys.readouterr().out.count("done before") == 1
    assert (fresh / "outputs/tiny/01_numbers/manifest.json").stat().st_mtime_ns == first
    assert summary(fresh)["models"]["sft"]["correct"] == 50


def test_a_phase_whose_plot_fails_is_not_done(fresh):
    "The manifest is there, and still the notebook has to run to its end."
    (fresh / "broken").touch()
    for _ in range(2):
        with pytest.raises(PhaseFailed, match="the plot broke"):
            run_recipe("tiny", last="03", flags=("break_at=plot",), root=fresh)
    assert (fresh / "outputs/tiny/03_preferences/manifest.json").exists()


def test_a_dead_kernel_is_reported(fresh):
    (fresh / "broken").touch()
    with pytest.raises(PhaseFailed, match="the kernel died"):
        run_recipe("tiny", last="03", flags=("break_at=kernel",), root=fresh)


def popen(root, *flags, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, token=""):
    "A runner of the recipe tiny in a process group of its own, with a token in the environment of all that it starts."
    code = "import pathlib, sys; from looper_math.cli import looper; looper(sys.argv[2:], pathlib.Path(sys.argv[1]))"
    call = [sys.executable, "-c", code, str(root), "run", "tiny", *flags]
    return subprocess.Popen(call, stdout=stdout, stderr=stderr, text=True, start_new_session=True,
                            env=os.environ | {"RUNNER_OF_THE_TEST": token})


def start_runner(root, token=""):
    "A runner that is in the middle of the work of phase 3."
    p = popen(root, "-p", "wait=1.0", token=token)
    wait_for(p, root / "outputs/tiny/03_preferences/pairs.jsonl")
    return p


def wait_for(p, path):
    "Until a file holds something."
    for _ in range(1200):
        if path.exists() and path.stat().st_size:
            return
        time.sleep(0.05)
    p.kill()
    raise AssertionError(p.communicate()[0])


def processes_with(token):
    "Processes whose environment holds a token, however they were started."
    left = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if token.encode() in environ.read_bytes():
                left.append(environ.with_name("cmdline").read_text())
        except OSError: # ended meanwhile
            continue
    return left


def test_two_runners_and_a_kill(fresh, capsys):
    p = start_runner(fresh)
    with pytest.raises(Refused, match="another runner is at work"):
        run_recipe("tiny", flags=("wait=1.0",), root=fresh)
    os.kill(p.pid, signal.SIGKILL)
    p.wait()
    assert not (fresh / "outputs/tiny/03_preferences/manifest.json").exists()
    looper(["run", "tiny", "-p", "wait=1.0"], fresh)
    assert capsys.readouterr().out.count("done before") == 1 and summary(fresh)["pairs"]["correctness"] == 5


def interrupt(p):
    "Ctrl-C: SIGINT to the process group. The sentence that says so, and all that was printed; within three seconds."
    start, printed = time.time(), []
    os.killpg(p.pid, signal.SIGINT)
    while not printed or "looper: " not in printed[-1]:
        printed.append(p.stdout.readline())
        assert printed[-1], f"ended without a word: {printed}"
    assert time.time() - start < 3
    return printed[-1].strip(), "".join(printed) + p.communicate(timeout=30)[0]


def test_control_c(fresh):
    token = uuid.uuid4().hex
    p = start_runner(fresh, token)
    assert len(processes_with(token)) >= 2 # the runner and its kernel
    sentence, out = interrupt(p)
    assert sentence == "looper: stopped; nothing of 03_preferences is kept; the same command continues from here."
    assert p.returncode == 130 and "Traceback" not in out
    assert not (fresh / "outputs/tiny/03_preferences/manifest.json").exists()
    assert not processes_with(token)


def test_control_c_while_workers_train(fresh):
    "Two processes of torchrun, each in a session of its own, end as well."
    body = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
os.environ["PYTHONPATH"] = {str(Path(__file__).parent)!r} + os.pathsep + os.environ.get("PYTHONPATH", "")
import tiny_phase
from looper_math import launch
launch.launch("tiny_phase", tiny_phase.Settings(str(phase.folder), wait=60.), n_gpu=2)"""
    write_phase(fresh, "01_numbers", *PHASES["01_numbers"][:2], "{}", body)
    token = uuid.uuid4().hex
    p = popen(fresh, token=token)
    for rank in (0, 1):
        wait_for(p, fresh / f"outputs/tiny/01_numbers/waiting{rank}")
    assert len(processes_with(token)) >= 5 # runner, kernel, torchrun, two workers
    sentence, out = interrupt(p)
    assert p.returncode == 130 and "stopped; nothing of 01_numbers is kept" in sentence and "Traceback" not in out
    assert not processes_with(token)


def reporting(root):
    "Makes the recipe tiny one phase that reports its progress for four seconds."
    body = """
from looper_math.progress import Progress
work = Progress(phase.folder/"numbers.json", "training of numbers", 40)
for step in range(1, 41):
    time.sleep(.1)
    work.report(step, loss=1 / step, tokens=100 * step)
phase.finish([])"""
    write_phase(root, "01_numbers", *PHASES["01_numbers"][:2], "{}", body)
    (root / "nbs/recipes/tiny/phases.yaml").write_text("[01_numbers]\n")


def test_progress_in_a_log(fresh, capsys, monkeypatch):
    "Plain lines between the two that were there before; the file is gone when the phase is finished."
    reporting(fresh)
    monkeypatch.setattr(runs, "LOG_SECONDS", .5)
    looper(["run", "tiny"], fresh)
    lines = capsys.readouterr().out.splitlines()
    shown = [k for k, line in enumerate(lines) if "training of numbers" in line]
    took = [k for k, line in enumerate(lines) if line.startswith("[1/1] 01_numbers  took")]
    assert lines[0].endswith("  runs") and took[0] > shown[-1]
    form = r"\[1/1\] 01_numbers  [0-9.]+ s: training of numbers [0-9]+/40, loss [0-9.]+, [0-9,]+ tokens/s"
    assert len(shown) > 3 and re.fullmatch(form, lines[shown[-1]])
    assert not (fresh / "outputs/tiny/01_numbers/progress.jsonl").exists()


def test_progress_on_a_terminal(fresh):
    "One line that is written again and again, and is gone in the end."
    reporting(fresh)
    ours, theirs = os.openpty()
    p = popen(fresh, stdout=theirs)
    os.close(theirs)
    printed = b""
    with contextlib.suppress(OSError):   # the terminal's end
        while part := os.read(ours, 65536): printed += part
    assert p.wait(60) == 0
    lines = printed.decode().split("\n")
    moving = [line for line in lines if "training of numbers" in line]
    assert len(moving) == 1 and len(set(re.findall("training of numbers [0-9]+/40", moving[0]))) > 2
    assert [line for line in lines if "  took" in line]


def test_saved_answers_of_an_evaluation(tmp_path):
    "Whole lines of final, gathered and unfinished files; a line that was cut off does not count."
    folder = tmp_path / "05_eval"
    folder.mkdir()
    assert records.saved_work(folder) == "nothing of 05_eval is kept"
    written = {"test-sft.jsonl": 700, "test-dpo.part": 300, "test-dpo.shard-0": 4, "hard-dpo-samples.shard-1": 1}
    for name, lines in written.items():
        (folder / name).write_text("{}\n" * lines + '{"cut')
    assert records.saved_work(folder) == "1,005 answers are kept"


def test_a_closed_pipe(fresh):
    "`looper run tiny | head -1`: one sentence where there would be a traceback."
    p = popen(fresh, stderr=subprocess.PIPE)
    assert "[1/3] 01_numbers" in p.stdout.readline()
    p.stdout.close()
    err = p.stderr.read()
    assert p.wait(60) == 141 and "nothing reads this output any more" in err
    assert "Traceback" not in err and "Exception" not in err
    assert (fresh / "outputs/tiny/01_numbers/manifest.json").exists()
    assert not (fresh / "outputs/tiny/03_preferences").exists()


def test_braces_in_the_projects_path(tmp_path, capsys):
    "papermill fills in {names} in paths."
    root = make_project(tmp_path.resolve() / "a {b} c{}d{0}")
    looper(["run", "tiny"], root)
    assert summary(root)["models"]["dpo"]["correct"] == 65 and (root / "outputs/tiny/03_preferences.html").exists()
    looper(["run", "tiny"], root)
    assert capsys.readouterr().out.count("done before") == 3


@pytest.mark.parametrize("place", ["outputs", "outputs/tiny"])
def test_outputs_that_cannot_be_written_to(fresh, place, capsys):
    (fresh / place).parent.mkdir(exist_ok=True)
    (fresh / place).write_text("a file where a folder should be")
    before = files(fresh)
    with pytest.raises(SystemExit) as stop:
        looper(["run", "tiny"], fresh)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "outputs/tiny cannot be written to" in err and files(fresh) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_outputs_that_are_read_only(fresh, capsys):
    (fresh / "outputs/tiny").mkdir(parents=True)
    (fresh / "outputs/tiny").chmod(0o500)
    with pytest.raises(SystemExit) as stop:
        looper(["run", "tiny"], fresh)
    assert stop.value.code == 2 and "outputs/tiny cannot be written to (Permission denied)" in capsys.readouterr().err


def test_a_disk_that_fills_up(fresh, capsys, monkeypatch):
    def full(path, value):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(runs, "write_json", full)
    with pytest.raises(SystemExit) as stop:
        looper(["run", "tiny"], fresh)
    err = capsys.readouterr().err
    assert stop.value.code == 1 and "run.json: No space left on device; when the cause is fixed" in err


@pytest.mark.parametrize("text", ['{"recipe": "ti', "[]", "{}", ""])
def test_a_damaged_run_file(done, tmp_path, text, capsys):
    "It is named, with the way out: without it the finished notebooks run once more, and find their phases done."
    root = tmp_path.resolve() / "copy"
    shutil.copytree(done, root)
    (root / "outputs/tiny/run.json").write_text(text)
    with pytest.raises(SystemExit) as stop:
        looper(["run", "tiny"], root)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "outputs/tiny/run.json is damaged" in err and "delete it" in err


def test_an_evaluation_is_done_when_it_covers_the_models(tmp_path):
    "With another model it goes on; a name that means another model now is refused."
    before = {"models": {"base": "", "sft": "01_sft/adapter"}, "comparisons": [["base", "sft"]], "seed": 0}
    more = before | {"models": before["models"] | {"dpo": "04_dpo/adapter"}, "comparisons": [["base", "dpo"]]}
    (tmp_path / "05_eval").mkdir()
    for name in ("manifest", "started"):
        (tmp_path / f"05_eval/{name}.json").write_text(json.dumps({"parameters": before}))
    (tmp_path / "run.json").write_text(json.dumps({"recipe": "x", "parameters": {}, "seconds": {"05_eval": 1}}))
    assert runs.is_done(tmp_path, "05_eval") and runs.is_done(tmp_path, "05_eval", before)
    assert runs.is_done(tmp_path, "05_eval", before | {"models": {"sft": "01_sft/adapter"}, "comparisons": []})
    assert not runs.is_done(tmp_path, "05_eval", more)
    assert not runs.is_done(tmp_path, "05_eval", before | {"comparisons": [["sft", "base"]]})
    runs.check_folder(tmp_path, "x", {"05_eval": more})
    with pytest.raises(RunConflict, match="models.sft was '01_sft/adapter', now '04_dpo/adapter'"):
        runs.check_folder(tmp_path, "x", {"05_eval": before | {"models": {"sft": "04_dpo/adapter"}}})
    with pytest.raises(RunConflict, match="seed was 0, now 1"):
        runs.check_folder(tmp_path, "x", {"05_eval": more | {"seed": 1}})


def test_a_changed_output_of_a_finished_phase(done, tmp_path, capsys):
    root = tmp_path.resolve() / "copy"
    shutil.copytree(done, root)
    pairs = root / "outputs/tiny/03_preferences/pairs.jsonl"
    pairs.write_text(pairs.read_text()[:20])
    before = files(root)
    for flags in ([], ["--from", "05"]):
        with pytest.raises(SystemExit) as stop:
            looper(["run", "tiny", *flags], root)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and "03_preferences/pairs.jsonl has changed" in err and files(root) == before


def test_outputs_of_a_finished_phase_are_verified(done, monkeypatch, capsys):
    "Those of the phases of this call, and those of the earlier ones that they read."
    verified = []
    monkeypatch.setattr(runs, "verify_outputs", lambda folder: verified.append(folder.name))
    run_recipe("tiny", root=done)
    assert verified == list(PHASES)
    verified.clear()
    run_recipe("tiny", first="05", root=done)
    assert verified == list(PHASES)

    def changed(folder):
        if folder.name == "03_preferences":
            raise RunConflict("outputs/tiny/03_preferences/pairs.jsonl has changed since it was made")

    monkeypatch.setattr(runs, "verify_outputs", changed)
    for flags in ([], ["--from", "05"]):
        before = files(done)
        with pytest.raises(SystemExit) as stop:
            looper(["run", "tiny", *flags], done)
        assert stop.value.code == 2 and "pairs.jsonl has changed" in capsys.readouterr().err and files(done) == before


def test_changed_input_of_a_finished_phase(done, tmp_path):
    "A phase that is done is refused, not skipped, when one of its inputs has changed."
    root = tmp_path.resolve() / "copy"
    shutil.copytree(done, root)
    path = root / "outputs/tiny/03_preferences/manifest.json"
    manifest = json.loads(path.read_text())
    shutil.copy(root / "outputs/tiny/01_numbers/numbers.json", root / "own.json")
    path.write_text(json.dumps(manifest | {"input_paths": {"numbers": "own.json"}}))
    run_recipe("tiny", last="03", root=root)
    (root / "own.json").write_text("[]")
    before = files(root)
    with pytest.raises(RunConflict, match=r"its input `numbers` \(own.json\) has changed since"):
        run_recipe("tiny", root=root)
    assert files(root) == before


def execute(root, folder, parameters):
    "The first phase by papermill alone."
    papermill.execute_notebook(root / "nbs/01_numbers.ipynb", folder / "out.ipynb", parameters, progress_bar=False)


def test_plain_papermill_refuses_a_misspelt_parameter(done, tmp_path):
    "papermill itself only warns; the notebook's own settings refuse, before the phase writes anything."
    before = files(done)
    with pytest.raises(papermill.PapermillExecutionError, match="unknown parameter 'cuont'; did you mean 'count'"):
        execute(done, tmp_path, {"cuont": 3})
    with pytest.raises(papermill.PapermillExecutionError, match="count must be int, got '3'"):
        execute(done, tmp_path, {"count": "3"})
    assert files(done) == before


def test_plain_papermill_runs_one_phase(fresh, tmp_path):
    "And the runner takes over from there: the notebook runs once more and ends at once."
    execute(fresh, tmp_path, {"run": "mine"})
    run_recipe("tiny", "mine", first="03", root=fresh)
    assert (fresh / "outputs/mine/05_eval/manifest.json").exists()


# --- the launcher


@pytest.fixture
def tiny_phase(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import tiny_phase

    return tiny_phase


def test_launch_two_processes(tiny_phase, tmp_path, capsys):
    launch.launch("tiny_phase", tiny_phase.Settings(str(tmp_path)), n_gpu=2)
    assert [(tmp_path / f"rank{r}").read_text() for r in (0, 1)] == ["3.0", "3.0"]
    assert "rank 0 of 2 is done" in capsys.readouterr().out


def test_all_processes_leave_together(tiny_phase, tmp_path):
    "NCCL may abort a process whose peers have gone, so none leaves while the first one still writes its files."
    launch.launch("tiny_phase", tiny_phase.Settings(str(tmp_path), late=4.), n_gpu=2)
    done, left = (max(float((tmp_path / f"{name}{rank}").read_text()) for rank in ranks)
                  for name, ranks in (("done", (0, 1)), ("left", (1,))))
    assert left >= done


def test_launch_fails_with_the_tail(tiny_phase, tmp_path):
    with pytest.raises(RuntimeError, match="(?s)ended with exit code 1; its last lines.*rank 1 broke"):
        launch.launch("tiny_phase", tiny_phase.Settings(str(tmp_path), fail=True), n_gpu=2)


def test_too_few_processes_are_noticed(tiny_phase, tmp_path):
    "An accelerate configuration that says two and starts one."
    config = tmp_path / "accelerate.yaml"
    config.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nnum_machines: 1\n"
                      "num_processes: 2\nuse_cpu: true\n")
    with pytest.raises(RuntimeError, match="2 processes were expected and 1 started"):
        launch.launch("tiny_phase", tiny_phase.Settings(str(tmp_path)), accelerate_config=str(config))


def test_launch_by_an_accelerate_file(tiny_phase, tmp_path):
    "Eight processes, as the file for eight GPUs says; here they share the CPU."
    launch.launch("tiny_phase", tiny_phase.Settings(str(tmp_path)), accelerate_config="nbs/accelerate/fsdp-8.yaml")
    assert [(tmp_path / f"rank{r}").read_text() for r in range(8)] == ["36.0"] * 8


def test_the_report_is_written_again_only_after_a_newer_phase(tmp_path, monkeypatch):
    import pandas as pd

    from looper_math import report
    manifest, page, written = tmp_path / "05_eval/manifest.json", tmp_path / "report.html", []
    manifest.parent.mkdir()
    manifest.write_text("{}")
    monkeypatch.setattr(runs, "is_done", lambda *args: True)
    monkeypatch.setattr(report, "summarise", lambda folder: {"warnings": []})
    monkeypatch.setattr(report, "write_report", lambda folder: written.append(page.write_text("")))
    monkeypatch.setattr(report, "accuracies", lambda summary: pd.DataFrame())
    monkeypatch.setattr(report, "outcome", lambda summary: SimpleNamespace(sentence=""))
    for count in (1, 1):
        assert runs._close(tmp_path) == {"warnings": []} and len(written) == count
    os.utime(manifest, (page.stat().st_mtime + 1,) * 2)
    runs._close(tmp_path)
    assert len(written) == 2


def test_kernels_have_ended_after_the_block(tmp_path):
    for name in ("01_a", "02_b"):
        (tmp_path / "nbs").mkdir(exist_ok=True)
        (tmp_path / f"nbs/{name}.ipynb").write_text("{}")
    with runs.Kernels(tmp_path) as kernels:
        with kernels.running("01_a", ["02_b"]) as first:
            pids = [k.provisioner.pid for k in (first, kernels.waiting["02_b"])]
            assert all(os.path.exists(f"/proc/{pid}") for pid in pids)
        assert list(kernels.waiting) == ["02_b"] and not os.path.exists(f"/proc/{pids[0]}")
    assert not os.path.exists(f"/proc/{pids[1]}")
