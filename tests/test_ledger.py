"Properties of the ledger that must hold for any text, not only for the examples on the page."
from fractions import Fraction

import pytest
from hypothesis import example, given, strategies as st

from looper_math import regime_w
from looper_math.ledger import equations, ledger


@given(st.one_of(st.text(), st.lists(st.sampled_from(list("0123456789+-*/=()%.,$ x\n_") + ["of", " apples ", "<<", ">>", "\\frac", "**", "¾", "percent"]),
                                     max_size=60).map("".join)))
@example("((1)=1)(2)=2")
@example("1/0=1/0=(")
def test_the_ledger_reads_any_text(text):
    share, checked, first_false = ledger(text)
    found = equations(text)
    assert checked == len(found) and (share is None) == (checked == 0)
    if found:
        assert share == sum(e.holds for e in found) / checked
        assert (first_false is None) == (share == 1)
        assert first_false is None or (not found[first_false].holds and all(e.holds for e in found[:first_false]))


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
def test_the_ledger_knows_true_from_false(expression, error):
    text, value = expression
    right = f"{value.numerator}/{value.denominator}" if value.denominator > 1 else str(value.numerator)
    assert ledger(f"So it is {text} = {right}") == (1, 1, None)
    wrong = value + error
    right = f"{wrong.numerator}/{wrong.denominator}" if wrong.denominator > 1 else str(wrong.numerator)
    assert ledger(f"First 1 + 1 = 2. So it is {text} = {right}.") == (0.5, 2, 1)


@pytest.mark.parametrize("text, share", [
    ("3 + 4 = 7", 1), ("3 + 4 = 8", 0), ("<<48/2=24>>24", 1), ("$5 x 3 = $15", 1), ("$5 x 3 = $16", 0), ("2 × 3 = 6", 1), ("6 ÷ 3 = 2", 1),
    ("1 + 2 + 3 = 6", 1), ("2 + 3 * 4 = 14", 1), ("2 + 3 * 4 = 20", 0), ("(2 + 3) * 4 = 20", 1), ("1,000 + 234 = 1,234", 1), ("20% of 50 = 10", 1),
    ("10 / 3 = 3.33", 1), ("54 lines + 36 lines = 90 lines", 1), ("**12 + 5 = 17**", 1), (r"\frac{1}{2} \times 8 = 4", 1), ("- 12 + 5 = 17", 1),
    ("4 * 3 = 12 = 24 / 2", 1), ("7 = 3 + 4", 1), ("3 + 4 = 7 + 1 = 8", 0.5), ("x = 5", None), ("2x + 3 = 13", None), ("no sums", None), ("1/0 = 5 + 1", None)])
def test_the_ledger_on_the_ways_people_write(text, share):
    assert ledger(text).share == share


def test_regime_w_reads_the_same_ledger():
    texts = ["3 + 4 = 7", "3 + 4 = 8 and 2 * 2 = 4", "no sums", "1 + 1 = 2, 2 + 2 = 5"]
    trajectories = [{"arm_name": f"arm_{k}", "reasoning": text, "answer": "7"} for k, text in enumerate(texts)]
    _, signals = regime_w.score_unlabelled(trajectories)
    assert [(s["ledger"], s["first_false"]) for s in signals] == [(1, None), (.5, 0), (None, None), (.5, 1)]
