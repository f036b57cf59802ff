"""The design notebook alone catches a wrong weight, seed, temperature, free-token count, penalty or formula.

Each mutant changes one number, operator, condition, function, weight or probe in the code that the notebook exports, or
in the arms that it imports. Then the notebook's cells run in order, as nbdev_test runs them, until one raises. A mutant
that no cell detects must be listed in `EQUIVALENT`, with the reason why it computes the same.
"""
import ast
import contextlib
import io
import sys
import types
import warnings

import nbformat
import pytest

from looper_math.records import ROOT
from looper_math.regime_w import PRESETS

SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
         ast.And: ast.Or, ast.Or: ast.And, ast.USub: ast.UAdd, ast.Not: ast.UAdd, ast.BitAnd: ast.BitOr,
         ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
         ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is}
FUNCTIONS = {"max": "min", "min": "max", "all": "any", "any": "all", "fmean": "max", "sum": "max", "len": "bool",
             "_groups": "list", "combinations": "product"}
WEIGHTS = {"end": "path", "path": "cf", "cf": "end", "length": "overlap", "overlap": "paraphrase",
           "paraphrase": "length", "conciseness": "alignment", "alignment": "conciseness", "support": "centrality",
           "centrality": "ledger", "ledger": "support"}
SETS = {"trajectories": "correct", "correct": "trajectories", "others": "trajectories", "agreeing": "others"}
PROBES = {"A": "A_prime", "A_prime": "CF1", "CF1": "A"}

FORMS = {"s_end": ("pairs", "largest"), "s_path": ("overlap", "length"), "s_cf": ("consensus", "consistency"),
         "alignment": ("probes", "plurality"), "arm_set": ("platinum-11", "guide-8", "core-variants")}
EQUIVALENT = {
    " for arm in arm_set": "an arm that is no probe maps to None, as does an arm that is not in the table",
    **dict.fromkeys(["lru_cache(4097, typed=True)", "lru_cache(0, typed=True)"], "the size of a cache"),
}


def cells():
    "The notebook's code as nbdev_test runs it, without the plots: (id, source)."
    code = [(c.id, c.source) for c in nbformat.read(ROOT / "nbs/00_regime_w.ipynb", 4).cells if c.cell_type == "code"]
    return [(i, s) for i, s in code if "plt.subplots" not in s and not s.startswith(("#| default_exp", "#| slow"))]


def execute(sources, space):
    "Run cells in one namespace, without output."
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, source in sources: exec(compile(source, name, "exec"), space)


def constants(node):
    "Other values for a number or the name of a probe."
    if type(node.value) is int: yield node.value + 1
    if type(node.value) is float: yield node.value * 1.5 or .1
    if type(node.value) in (int, float) and node.value: yield 0 * node.value
    if type(node.value) is str and node.value in PROBES: yield PROBES[node.value]


def changes(node):
    "Every (attribute, new value) of a node that makes a mutant."
    if isinstance(node, ast.Constant): yield from (("value", v) for v in constants(node))
    if type(getattr(node, "op", None)) in SWAPS: yield "op", SWAPS[type(node.op)]()
    for k, operator in enumerate(getattr(node, "ops", [])):
        if type(operator) in SWAPS: yield "ops", [*node.ops[:k], SWAPS[type(operator)](), *node.ops[k + 1:]]
    if isinstance(node, ast.Name): yield from (("id", swap[node.id]) for swap in (FUNCTIONS, SETS) if node.id in swap)
    if isinstance(node, ast.Attribute) and node.attr in WEIGHTS and ast.unparse(node.value) in ("w", "preset.weights"):
        yield "attr", WEIGHTS[node.attr]
    if isinstance(node, (ast.If, ast.IfExp)): yield "test", ast.UnaryOp(ast.Not(), node.test)
    if isinstance(node, ast.comprehension) and node.ifs: yield "ifs", []
    if isinstance(node, ast.BoolOp): yield from (("values", [value]) for value in node.values)


def around(node, parents):
    "A node with enough of the code around it to be recognised."
    while len(ast.unparse(node)) < 16 and isinstance(parents.get(node), (ast.expr, ast.keyword, ast.Assign)):
        node = parents[node]
    return node


def names_in(definition):
    "Names and parameters that a definition uses."
    return {getattr(n, "id", None) or getattr(n, "arg", None) for n in ast.walk(definition)}


def mutants(source, only=None):
    "(the changed piece of code, the source with it) for every change of a cell, annotations left alone."
    tree = ast.parse(source)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    annotations = [getattr(n, name, None) for n in ast.walk(tree) for name in ("annotation", "returns")]
    spared = {x for a in annotations if a for x in ast.walk(a)}
    chosen = [n for n in tree.body if only is None or getattr(n, "name", ast.unparse(n).split(" ")[0]) in only]
    for node, names in ((n, names_in(definition)) for definition in chosen for n in ast.walk(definition)):
        for attribute, value in changes(node) if node not in spared else ():
            if attribute == "id" and value in SETS.values() and value not in names: continue  # an unknown name
            before = getattr(node, attribute)
            setattr(node, attribute, value)
            yield ast.unparse(around(node, parents)), ast.unparse(tree)
            setattr(node, attribute, before)


def survivors(changed, start, sources, space):
    "Names of the mutants of cell `start` with which all cells from it on still pass."
    saved, left = dict(space), []
    for name, source in changed:
        try: execute([("mutant", source), *sources[start + 1:]], space)
        except Exception: pass
        else: left.append(name)
        finally:   # the functions of earlier cells read their globals from this dict
            space.clear()
            space.update(saved)
    return left


@pytest.fixture(scope="module")
def design():
    "The notebook's cells, which pass unchanged."
    sources = cells()
    execute(sources, {"__name__": "design"})
    return sources


def test_the_notebook_holds_the_module(design):
    "A mutant of a cell is therefore a mutant of the module."
    kinds = ast.FunctionDef, ast.ClassDef
    shape = lambda source: [ast.dump(n) for n in ast.parse(source).body if isinstance(n, kinds)]
    exported = [d for _, source in design if source.startswith("#| export") for d in shape(source)]
    assert exported == shape((ROOT / "looper_math/regime_w.py").read_text(encoding="utf-8"))


def test_every_mutant_of_the_formulas_is_caught(design):
    space, left, number = {"__name__": "design"}, [], 0
    for k, (name, source) in enumerate(design):
        if source.startswith("#| export"):
            changed = list(mutants(source))
            left += survivors(changed, k, design, space)
            number += len(changed)
        execute([(name, source)], space)
    assert number > 300, number
    assert set(left) - set(EQUIVALENT) == set(), "no cell of 00_regime_w.ipynb detects these mutants"
    assert set(EQUIVALENT) - set(left) == set(), "these mutants are detected or do not exist: take them off the list"


def test_a_wrong_weight_or_form_is_caught_in_every_preset(design):
    k = next(k for k, (_, source) in enumerate(design) if "PRESETS = {" in source)
    changed = []
    for name, preset in PRESETS.items():
        for field, value in vars(preset.weights).items():
            weights = f"replace(PRESETS[{name!r}].weights, {field}={value * 1.5 or .1})"
            changed.append((f"{name}.{field}", f"PRESETS[{name!r}] = replace(PRESETS[{name!r}], weights={weights})"))
        for field, forms in FORMS.items():
            changed += [(f"{name}.{field}={f}", f"PRESETS[{name!r}] = replace(PRESETS[{name!r}], {field}={f!r})")
                        for f in forms if f != getattr(preset, field)]
    space = {"__name__": "design"}
    execute(design[:k], space)
    assert len(changed) >= 4 * 24
    assert survivors([(name, f"{design[k][1]}\n{line}") for name, line in changed], k, design, space) == []


def test_a_wrong_arm_or_sample_seed_is_caught(design, monkeypatch):
    source = (ROOT / "looper_math/prompts.py").read_text(encoding="utf-8")
    left, number = [], 0
    for name, changed in mutants(source, {"_family", "_FAMILIES", "_PROBES", "ARM_SETS", "sample_seed"}):
        module = types.ModuleType("looper_math.prompts")
        module.__package__ = "looper_math"
        monkeypatch.setitem(sys.modules, "looper_math.prompts", module)
        number += 1
        try:
            exec(compile(changed, "prompts", "exec"), vars(module))
            execute(design, {"__name__": "design"})
        except Exception: continue
        left.append(name)
    # 0.2 + 0.1 * 1 is 0.30000000000000004, which both rounded to one digit and to two is 0.3
    assert number > 25 and left == ["round(0.2 + 0.1 * i, 2)"]
