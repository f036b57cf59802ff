"Properties of the ledger that hold for any text, not only for the examples of the notebook."
from fractions import Fraction

import pytest
from hypothesis import example, given, strategies as st

from looper_math import regime_w
from looper_math.ledger import equations, ledger

PIECES = [*"0123456789+-*/=()%.,$ x\n_", "of", " apples ", "<<", ">>", "\\frac", "**", "¾", "percent",
          " 3 + 4 = 7 ", " 3 + 4 = 8 "]


@given(st.text() | st.lists(st.sampled_from(PIECES), max_size=60).map("".join))
@example("((1)=1)(2)=2")
@example("1/0=1/0=(")
@example("3 + 4 = 7 and 3 + 4 = 8 and 1 + 1 = 3")
def test_the_ledger_reads_any_text(text):
    share, checked, first_false = ledger(text)
    truths = [e.holds for e in equations(text)]
    assert checked == len(truths)
    assert share == (sum(truths) / checked if truths else None)
    assert first_false == (truths.index(False) if False in truths else None)


@st.composite
def expressions(draw, depth=0):
    "An expression in brackets as text, with its exact value; its parts may be bare numbers."
    if depth > 2 or depth and draw(st.booleans()):
        n = draw(st.integers(1, 9999))
        return draw(st.sampled_from([f"{n}", f"{n:,}", f"${n}"])), Fraction(n)
    (a, x), (b, y) = draw(expressions(depth + 1)), draw(expressions(depth + 1))
    op = draw(st.sampled_from("+-*/") if y else st.sampled_from("+-*"))
    value = {"+": x + y, "-": x - y, "*": x * y}[op] if op != "/" else x / y
    return f"({a} {op} {b})", value


@given(expressions(), st.integers(1, 50))
def test_true_and_false_equations_are_told_apart(expression, error):
    text, value = expression
    assert ledger(f"So it is {text} = {value}") == (1, 1, None)
    assert ledger(f"First 1 + 1 = 2. So it is {text} = {value + error}.") == (0.5, 2, 1)


@pytest.mark.parametrize("text, share", [
    ("3 + 4 = 7", 1), ("3 + 4 = 8", 0), ("<<48/2=24>>24", 1), ("$5 x 3 = $15", 1), ("$5 x 3 = $16", 0),
    ("2 × 3 = 6", 1), ("6 ÷ 3 = 2", 1), ("1 + 2 + 3 = 6", 1), ("2 + 3 * 4 = 14", 1), ("2 + 3 * 4 = 20", 0),
    ("(2 + 3) * 4 = 20", 1), ("1,000 + 234 = 1,234", 1), ("20% of 50 = 10", 1), ("10 / 3 = 3.33", 1),
    ("54 lines + 36 lines = 90 lines", 1), ("**12 + 5 = 17**", 1), (r"\frac{1}{2} \times 8 = 4", 1),
    ("- 12 + 5 = 17", 1), ("4 * 3 = 12 = 24 / 2", 1), ("7 = 3 + 4", 1), ("3 + 4 = 7 + 1 = 8", 0.5), ("x = 5", None),
    ("2x + 3 = 13", None), ("no sums", None), ("1/0 = 5 + 1", None)])
def test_equations_in_different_notations(text, share):
    assert ledger(text).share == share


def test_regime_w_uses_the_same_ledger():
    texts = ["3 + 4 = 7", "3 + 4 = 8 and 2 * 2 = 4", "no sums", "1 + 1 = 2, 2 + 2 = 5"]
    trajectories = [{"arm_name": f"arm_{k}", "reasoning": text, "answer": "7"} for k, text in enumerate(texts)]
    _, signals = regime_w.score_unlabelled(trajectories)
    assert [(s["ledger"], s["first_false"]) for s in signals] == [(1, None), (.5, 0), (None, None), (.5, 1)]
