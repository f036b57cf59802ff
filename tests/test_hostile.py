"""Degenerate texts, as a model may write them. The time of every function that reads completions grows linearly with
their length: ten times the characters take at most fifteen times the seconds."""
import logging
import time
import timeit

import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from looper_math import answers, audit, grading, ledger, regime_w, show

FLOOR = .03  # seconds of CPU; below it, differences between two runs are noise
ARMS = ("wolfram_standard", "wolfram_rephrase", "maudlin_cf1")


def audit_of(text):
    row = {"question": f"Q {text}", "gold": "27", "completion": f"{text} Q {text}\n{text}", "prompt": text}
    return audit.rescore(pd.DataFrame([row]))


def rewards(text):
    trajectories = [{"arm_name": arm, "reasoning": text, "answer": text, "num_tokens": 9} for arm in ARMS]
    return regime_w.score_rollout(trajectories, "27")


READERS = {
    "extract_answer": answers.extract_answer,
    "extract_answer, strict": lambda text: answers.extract_answer(text, "strict"),
    "split_reasoning": answers.split_reasoning,
    "find_numbers": answers.find_numbers,
    "parse_answer": answers.parse_answer,
    "read_answer": answers.read_answer,
    "read_answer, alone": lambda text: answers.read_answer(text, alone=True),
    "ledger": ledger.ledger,
    "equations": ledger.equations,
    "cut_off": lambda text: audit.cut_off(text, None),
    "announces": audit.announces,
    "echoed": lambda text: audit.echoed(text, text[len(text) // 2:]),
    "echoed, all but the end": lambda text: audit.echoed(f"{text}a", f"a{text}b"),
    "shared_answers": lambda text: audit.shared_answers([text] * 4, list("1234")),
    "unsafe_gold": audit.unsafe_gold,
    "platinum_answer": grading.platinum_answer,
    "score_rollout": rewards,
}
PIECES = ["\n", "7", "(", ")", "[", "=", "$", "€", ",", "\\boxed{", "<think>", "Answer:", ".", " ", "1,234,", "1/",
          "1=", "1+", "1e99 ", "A:", "\n ", "\\frac{", "####", "1 ab", "1)", "- ", "<<"]
FORMS = ["{}", "{}a", "1{}=1", "Answer: {}"]


@pytest.fixture(autouse=True)
def quiet():
    "math-verify logs the whole text when it reaches its time limit."
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def seconds(function, text, runs=3):
    "CPU seconds of the fastest run, the garbage collector off."
    return min(timeit.repeat(lambda: function(text), timer=time.process_time, number=1, repeat=runs))


def check_growth(function, text):  # text: length → text
    "Compare 100,000 characters with 10,000; on a busy machine the fastest of several runs counts."
    long = seconds(function, text(100_000), runs=1)
    if long <= 15 * FLOOR: return
    long, short = min(long, seconds(function, text(100_000))), seconds(function, text(10_000))
    assert long <= 15 * max(short, FLOOR), f"{short:.3f} s for 10,000, {long:.3f} s for 100,000 of {text(40)!r}"


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("name", READERS)
def test_time_grows_with_the_length(name, piece):
    for form in FORMS:
        check_growth(READERS[name], lambda size: form.format((piece * size)[:size]))


@pytest.mark.parametrize("piece", ["\n", "7", "(", "=", "$", ",", "\\boxed{", "<think>", "Answer:", ".", "1/"])
@pytest.mark.parametrize("function", [lambda text: grading.grade(text, "27"), audit_of], ids=["grade", "rescore"])
def test_time_of_the_graders_grows_with_the_length(function, piece):
    check_growth(function, lambda size: (piece * size)[:size])


MORE = ["a", "#", "*", "{", "}", "\\", "/", "%", "½", "\u2028", "</think>", "percent", "of ", "x"]
hostile = st.lists(st.sampled_from(PIECES + MORE), max_size=4)


@settings(max_examples=20, deadline=None)
@given(head=hostile, middle=hostile.filter(bool), tail=hostile)
def test_time_grows_with_the_length_of_any_text(head, middle, tail):
    head, middle, tail = map("".join, (head, middle, tail))
    for function in READERS.values():
        check_growth(function, lambda size: head + (middle * size)[:size] + tail)


def test_a_run_of_digits():
    "The exact value of 400,000 digits would take seconds to compute."
    assert seconds(answers.extract_answer, "7" * 400_000) < .5


def test_a_run_of_lines():
    text = "\n" * 16_000 + "a"
    assert audit.cut_off(text, None) and seconds(lambda t: audit.cut_off(t, None), text) < .5


def test_a_repeated_line_that_all_completions_share():
    "The instruction's line, repeated up to the token limit, behind an echo of the question."
    def log(size):
        lines = "as in Answer: 42\n" * (size // 17)
        questions = {k: f"What is {k} and {k} together?" for k in range(1, 4)}
        return pd.DataFrame([{"question": question, "gold": 2 * k, "completion": f"{question}\n{lines}{2 * k}"}
                             for k, question in questions.items()])

    assert audit.rescore(log(100_000)).accuracy == (3, 3)
    check_growth(audit.rescore, log)


@given(st.text("ab", max_size=12), st.text("ab", max_size=12))
def test_the_overlap_is_the_longest(head, tail):
    longest = max(k for k in range(min(len(head), len(tail)) + 1) if tail.endswith(head[:k]))
    assert audit._overlap(head, tail) == longest


def test_a_table_of_texts_shows_dollars_and_needs_no_style_sheet():
    "MathJax reads the text between two prices as a formula, and an untrusted notebook drops <style>."
    page = show.texts([{"solution": "At $5 and $7 it is\n$12 <b>", "share": .5}])._repr_html_()
    assert "At $5 and $7 it is\n$12 &lt;b&gt;" in page and "<style" not in page
    assert page.startswith('<table class="tex2jax_ignore mathjax_ignore"') and page.count("white-space: pre-wrap") == 4
