"Properties of final answers that must hold for any text, not only for the examples on the page."
import time
from fractions import Fraction

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from looper_math.answers import (MODES, extract_answer, find_answer, find_numbers, format_answer, parse_answer,
                                 read_answer, same_answer, split_reasoning)

fractions = st.fractions()
pieces = st.lists(st.sampled_from(["Answer:", "####", "\\boxed{", "}", "{", "1", "0", "/", ",", ".", "-", "−", "$", "%", "e", "=", "(", "\n",
                                   " ", "**", "½", "\\frac", "٣", "apples", "½/0", "1e9999", "\\,", "{,}", "\r", "\x85", "\u2028"]), max_size=40)
texts = st.text() | pieces.map("".join)


@given(texts)
@example("Answer:\u0663")
@example("1e9999/1e9999")
def test_any_text_is_read_without_an_error(text):
    for mode in MODES:
        value = extract_answer(text, mode)
        assert value is None or isinstance(value, Fraction)
    assert text.startswith(split_reasoning(text))
    assert parse_answer(text) is None or isinstance(parse_answer(text), Fraction)


@given(texts)
def test_strict_is_flexible_where_it_answers(text):
    strict = extract_answer(text, "strict")
    assert (strict is not None) == (find_answer(text) is not None)
    if strict is not None:
        assert extract_answer(text) == strict


@given(texts, texts)
def test_thoughts_hold_no_answer(thoughts, text):
    assume("think>" not in thoughts + text)
    for mode in MODES:
        assert extract_answer(f"<think>{thoughts}</think>{text}", mode) == extract_answer(f"{thoughts}</think>{text}", mode) == extract_answer(text, mode)
        assert extract_answer(f"<think>{thoughts}", mode) is extract_answer(f"{text}</think>{text}<think>{thoughts}", mode) is None
    if thoughts.strip():
        assert split_reasoning(f"<think>{thoughts}</think>{text}") == thoughts.strip()


@given(fractions)
def test_format_and_parse_are_inverse(value):
    assert parse_answer(format_answer(value)) == value
    assert extract_answer(f"so it is.\nAnswer: {format_answer(value)}", "strict") == value
    assert same_answer(value, format_answer(value))


@given(st.integers(-10**12, 10**12), st.sampled_from(["Answer: {}", "**Answer:** {}.", "answer: ${} each", "#### {}", "\\boxed{{{}}}", "Answer: **{}**",
                                                      "Answer:\n\n{} apples", "Answer: x = {}", "**Answer**: {} (as 1 + 1 = 2)"]))
def test_every_announcement_is_read_with_and_without_commas(value, form):
    reasoning = "First 3 + 4 = 7, then 99."
    for written in (str(value), f"{value:,}", str(value).replace("-", "−")):
        text = f"{reasoning}\n{form.format(written)}"
        assert extract_answer(text, "strict") == value
        assert split_reasoning(text) == reasoning


@given(st.one_of(st.none(), fractions, st.text(max_size=8)), st.one_of(st.none(), fractions, st.text(max_size=8)))
def test_agreement_is_symmetric_and_nothing_agrees_with_nothing(a, b):
    assert same_answer(a, b) == same_answer(b, a)
    assert same_answer(a, a) == (parse_answer(a) is not None)
    assert not same_answer(None, b)


@pytest.mark.parametrize("digits", [400, 4_301, 50_000])
def test_any_number_of_digits(digits):
    text = "7" * digits
    value = extract_answer(f"Answer: {text}", "strict")
    assert format_answer(value) == text
    assert not same_answer(value, value + 1)


@pytest.mark.parametrize("piece", ["1", "1,234", "1/", "Answer: ", "Answer:\n", "answer **", "\\boxed{", "}", "#", "#### ", " ", "\n", "-", "$", "= 1 ",
                                   "1 ", "1 1/", ".1", "\\frac{", "(1", "a. ", "<think>", "</think>"])
def test_a_hundred_thousand_characters_take_well_under_a_second(piece):
    text = (piece * 100_000)[:100_000]
    start = time.perf_counter()
    for mode in MODES:
        extract_answer(text, mode)
    split_reasoning(text), parse_answer(text), read_answer(text)
    assert time.perf_counter() - start < 3


def test_the_last_marker_counts_and_an_empty_one_gives_way():
    assert extract_answer("Answer: 4\nAnswer: 5", "strict") == 5
    assert extract_answer("Answer: 4\nAnswer: none", "strict") is None
    assert extract_answer("#### 6\nAnswer: none", "strict") == 6
    assert extract_answer("\\boxed{7}\n#### \nAnswer: ", "strict") == 7
    assert extract_answer("Answer: <number>. It is 8") is not None


def test_a_solution_is_not_an_answer():
    assert parse_answer("48/2 = 24 clips\n#### 72") is None
    assert parse_answer("9 or 10") is None
    with pytest.raises(TypeError):
        parse_answer([18])


def test_positions_cover_the_numbers():
    assert [(s, e) for s, e, _ in find_numbers("1,000 or -$5")] == [(0, 5), (9, 12)]
