"""The design notebook alone catches a wrong weight, seed, temperature, free-token count, penalty or formula.

Each mutant changes one number, operator or name in the code that the notebook exports, or in the arms that it imports.
Then the notebook's cells run in order, as nbdev_test runs them, until one raises. A mutant that no cell notices must
stand in `EQUIVALENT`, with the reason why it computes the same.
"""
import ast
import contextlib
import io
import itertools
import sys
import types
import warnings

import nbformat
import pytest

from looper_math.records import ROOT
from looper_math.regime_w import PRESETS

SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
         ast.And: ast.Or, ast.Or: ast.And, ast.USub: ast.UAdd, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Lt: ast.LtE,
         ast.LtE: ast.Lt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In}
NAMES = {"max": "min", "min": "max", "maximum": "minimum", "minimum": "maximum", "all": "any", "any": "all"}

FORMS = {"s_end": ("pairs", "largest"), "s_path": ("overlap", "length"), "s_cf": ("consensus", "consistency"),
         "alignment": ("probes", "plurality"), "arm_set": ("platinum-11", "guide-8", "core-variants")}
SYMMETRIC = "the axes are the same: the array is symmetric, or has one length on both"
MASKED = "the value stands where a mask hides it, or where a later factor is 0"
EQUIVALENT = {
    "incidence[rows, columns] = 2": "sizes and intersections both grow fourfold, and a share of them stays",
    **dict.fromkeys([
        "common.shape[+1]", "common.shape[-2]", "supporters = s.same.sum(+1)", "supporters = s.same.sum(-2)",
        "(s.same.sum(+1), others.sum(-1))", "(s.same.sum(-2), others.sum(-1))", "supporters.max(+1, keepdims=True)",
        "np.where(correct, tokens, np.inf).min(+1, keepdims=True)", "correct.sum(+1, keepdims=True)",
        "np.where(correct, tokens, -np.inf).max(+1, keepdims=True)", "s.present.sum(+1, keepdims=True)"], SYMMETRIC),
    **dict.fromkeys([
        "np.maximum(count, 0)", "np.maximum(size, 0)", "np.where(high >= low, high - low, 1)",
        "np.where(high > low, high - low, 2)", "np.where(high > low, high - low, 0)",
        "_share(_largest(s, keep), keep.sum(-1), 1)", "_share((a @ s.overlap * a_prime).sum(-1), probes, 1)",
        "_share((s.overlap * usable).sum(-1), usable.sum(-1), 1)", "1.5000000000000002e-09",
        "np.where(mean >= 0, mean / np.maximum(mean + variance, 1e-09), 0)", "np.maximum(mean, 0.0)",
        "np.maximum(mean + variance, 0.0)"], MASKED),
    "np.maximum(size, 2)": "only a set of one differs, whose variance is 0 with any mean",
    "Ledger(None, 1, None)": "the number of equations is not read where the ledger is left out",
    "correct=correct / 1.0": "a division by 1",
    "enumerate(dict.fromkeys(value.values()), start=2)": "codes only have to differ, and to be above 0",
    "max((len(ts) for _, ts in questions), default=1)": "no questions, no records",
    "65": "the size of a batch of records changes no result",
    **dict.fromkeys([f"lru_cache({n}, typed=True)" for n in ("2 * 12", "3 ** 12", "0 ** 12", "2 ** 13", "2 ** 0")],
                    "the size of a cache"),
    **dict.fromkeys([f"0 <= min(values) <= max(values) < {high}" for high in ("2 * 53", "0 ** 53", "2 ** 0")] + [
        "1 <= min(values) <= max(values) < 2 ** 53", "0 < min(values) <= max(values) < 2 ** 53",
        "0 <= min(values) < max(values) < 2 ** 53"], "sends more values to the check of each by itself, and no fewer"),
}


def cells():
    "The notebook's code as nbdev_test runs it, without the plots: (id, source)."
    code = [(c.id, c.source) for c in nbformat.read(ROOT / "nbs/00_regime_w.ipynb", 4).cells if c.cell_type == "code"]
    return [(i, s) for i, s in code if "plt.subplots" not in s and not s.startswith(("#| default_exp", "#| slow"))]


def execute(sources, space):
    "Run cells in one namespace, in silence."
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, source in sources: exec(compile(source, name, "exec"), space)


def changes(node):
    "Every (attribute, new value) of a node that makes a mutant."
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        other = node.value + 1 if type(node.value) is int else node.value * 1.5 or .1
        yield from (("value", v) for v in (other, 0 * node.value) if v != node.value)
    if type(getattr(node, "op", None)) in SWAPS: yield "op", SWAPS[type(node.op)]()
    for k, operator in enumerate(getattr(node, "ops", [])):
        if type(operator) in SWAPS: yield "ops", [*node.ops[:k], SWAPS[type(operator)](), *node.ops[k + 1:]]
    for attribute in ("id", "attr"):
        if getattr(node, attribute, None) in NAMES: yield attribute, NAMES[getattr(node, attribute)]


def around(node, parents):
    "The smallest piece of code around a node that says where it stands."
    while len(ast.unparse(node)) < 16 and isinstance(parents.get(node), (ast.expr, ast.keyword, ast.Assign)):
        node = parents[node]
    return node


def mutants(source, only=None):
    "(the changed piece of code, the source with it) for every change of a cell, annotations left alone."
    tree = ast.parse(source)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    annotations = [getattr(n, name, None) for n in ast.walk(tree) for name in ("annotation", "returns")]
    spared = {x for a in annotations if a for x in ast.walk(a)}
    chosen = [n for n in tree.body if only is None or getattr(n, "name", ast.unparse(n).split(" ")[0]) in only]
    for node in itertools.chain.from_iterable(map(ast.walk, chosen)):
        for attribute, value in changes(node) if node not in spared else ():
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
        finally:   # the functions of earlier cells look their globals up in this very dict
            space.clear()
            space.update(saved)
    return left


@pytest.fixture(scope="module")
def design():
    "The notebook's cells; that they pass unchanged is what every mutant is measured by."
    sources = cells()
    execute(sources, {"__name__": "design"})
    return sources


def test_the_notebook_holds_the_module(design):
    "So a mutant of a cell is a mutant of the module."
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
    assert number > 300
    assert set(left) - set(EQUIVALENT) == set(), "no cell of 00_regime_w.ipynb notices these"
    assert set(EQUIVALENT) - set(left) == set(), "these are caught, or gone: take them off the list"


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
