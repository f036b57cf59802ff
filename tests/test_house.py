"What holds for the house as a whole: imports run one way, and parameters are where papermill sees them."
import ast
import collections
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from looper_math.records import ROOT
from looper_math.runs import assign, parameters_of, phases_of, read_recipe, recipes

# From the bottom up: a module imports only from the lines above its own. The phases, on the last line, do not import
# each other.
FLOORS = [
    {"answers", "records"},
    {"progress"},
    {"launch", "ledger", "pages", "prompts", "ranges", "shards", "signals", "stats"},
    {"regime_w", "grading", "data", "eval_models", "process"},
    {"compare", "pocket"},
    {"audit", "attention"},
    {"models", "report"},
    {"decoding"},
    {"serving"},
    {"cards", "criteria", "engines", "show"},
    {"eval_jobs", "heldout", "pairs", "trajectories"},
    {"ask", "changes", "importing", "tables", "verdicts"},
    {"explore"},
    {"browse"},
    {"runs", "training", "ppo"},
    {"demonstrations", "doctor", "dpo_trainer", "next_steps", "plan", "sampler"},
    {"cli"},
    {"sft", "rollouts", "preferences", "dpo", "evaluation", "online_rl"},
]
MODULES = sorted(p.stem for p in (ROOT / "looper_math").glob("[a-z]*.py"))
PHASES = sorted((ROOT / "nbs").glob("0[1-9]_*.ipynb"))


def imports_of(module):
    "Names of the project's modules that a module imports, anywhere in it."
    tree = ast.parse((ROOT / f"looper_math/{module}.py").read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module.split(".")[0]} if node.module else {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("looper_math"):
            found |= {node.module.split(".")[1]} if "." in node.module else {a.name for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("looper_math.")}
    return found & set(MODULES)


def floor(module):
    return next((k for k, names in enumerate(FLOORS) if module in names), None)


def test_every_module_is_on_a_floor():
    assert [m for m in MODULES if floor(m) is None] == []


@pytest.mark.parametrize("module", [m for m in MODULES if floor(m) is not None])
def test_imports_run_one_way(module):
    wrong = [m for m in imports_of(module) if floor(m) is not None and floor(m) >= floor(module)]
    assert not wrong, f"{module} imports {wrong}, which stand beside or above it"


LIGHT = ("answers", "cli", "launch", "ledger", "plan", "progress", "prompts", "ranges", "regime_w", "runs")


@pytest.mark.parametrize("module", [m for m in LIGHT if m in MODULES])
def test_light_modules_need_no_torch(module):
    code = f"import sys, looper_math.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("notebook", PHASES, ids=lambda p: p.stem)
def test_every_parameter_is_visible_to_papermill(notebook):
    "papermill overlooks lines such as `x: int | None = 1`; and each line says its type and meaning."
    cell = next(c for c in nbformat.read(notebook, 4).cells if "parameters" in c.metadata.get("tags", []))
    lines = [line for line in cell.source.splitlines() if line.strip() and not line.startswith(("#", " ", "]", "}"))]
    names = [t.id for node in ast.parse(cell.source).body for t in node.targets]
    assert names == list(parameters_of(notebook)) and "run" in names
    assert all("#" in line for line in lines if not line.rstrip().endswith(("[", "{"))), "a parameter has no comment"


@pytest.mark.parametrize("recipe", recipes())
def test_recipes_name_real_parameters(recipe):
    if PHASES:
        phases = phases_of(ROOT, recipe)
        assert assign(read_recipe(ROOT, recipe, phases), phases)


def test_a_missing_input_is_refused_before_the_first_phase():
    "Not after the phases that come before it."
    looper = str(Path(sys.executable).parent / "looper")
    command = [looper, "run", "smoke", "--run", "pytest-missing", "-p", "02_rollouts.questions=data/nofile.jsonl"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "there is no data/nofile.jsonl" in done.stderr
    assert not (ROOT / "outputs/pytest-missing").exists()


DEFINITIONS = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.AugAssign, ast.FunctionDef, ast.ClassDef)
NAMES = (ast.Name, ast.Tuple)


@pytest.mark.parametrize("module", MODULES)
def test_import_does_nothing_but_define(module):
    "No call for its effect, no `if __name__`, no assignment into another module or the environment."
    body = ast.parse((ROOT / f"looper_math/{module}.py").read_text(encoding="utf-8")).body
    statements = [n for n in body if not isinstance(n, DEFINITIONS) and not _docstring(n)]
    targets = [t for n in body if isinstance(n, ast.Assign) for t in n.targets]
    targets += [n.target for n in body if isinstance(n, ast.AugAssign)]
    assert [f"line {n.lineno}" for n in statements + [t for t in targets if not isinstance(t, NAMES)]] == []


def _docstring(node): return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


# A public name may stand in several modules for a reason.
SHARED = {"main": "a phase's work in one process", "run_phase": "the whole phase, from the notebook",
          "open_phase": "a phase's folder and manifest", "check_inputs": "what a phase reads",
          "compare": "two tables of answers; in explore also pairs and whole runs"}


def test_a_public_name_is_in_one_module():
    names = collections.defaultdict(list)
    for module in MODULES:
        tree = ast.parse((ROOT / f"looper_math/{module}.py").read_text(encoding="utf-8"))
        public = next((n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__"), None)
        for name in ast.literal_eval(public) if public else []: names[name].append(module)
    assert {n: where for n, where in names.items() if len(where) > 1 and n not in SHARED} == {}
