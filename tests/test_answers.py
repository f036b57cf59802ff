"Properties of final answers that hold for any text, not only for the examples of the notebook."
import json
from fractions import Fraction

import pytest
from hypothesis import assume, example, given, strategies as st

from looper_math import answers
from looper_math.answers import MODES, extract_answer, find_answer, format_answer, parse_answer, same_answer
from looper_math.data import DataError, gold_answer, load_questions, sft_target

fractions = st.fractions()
PIECES = ["Answer:", "####", "\\boxed{", "}", "{", "1", "0", "/", ",", ".", "-", "−", "$", "%", "e", "=", "(", "\n",
          " ", "**", "½", "\\frac", "٣", "apples", "½/0", "1e9999", "\\,", "{,}", "\r", "\x85", "\u2028"]
texts = st.text() | st.lists(st.sampled_from(PIECES), max_size=40).map("".join)
FORMS = ["Answer: {}", "**Answer:** {}.", "answer: ${} each", "#### {}", "\\boxed{{{}}}", "Answer: **{}**",
         "Answer:\n\n{} apples", "Answer: x = {}", "**Answer**: {} (as 1 + 1 = 2)"]


@given(texts)
@example("Answer:\u0663")
@example("1e9999/1e9999")
def test_any_text_is_read_without_an_error(text):
    for mode in MODES:
        value = extract_answer(text, mode)
        assert value is None or isinstance(value, Fraction)
    assert text.startswith(answers.split_reasoning(text))
    assert parse_answer(text) is None or isinstance(parse_answer(text), Fraction)


@given(texts)
def test_a_strict_answer_is_also_the_flexible_one(text):
    strict = extract_answer(text, "strict")
    assert (strict is not None) == (find_answer(text) is not None)
    if strict is not None:
        assert extract_answer(text) == strict


@given(texts, texts)
def test_no_answer_is_read_from_the_thinking(thinking, text):
    assume("think>" not in thinking + text)
    for mode in MODES:
        answer = extract_answer(text, mode)
        assert extract_answer(f"<think>{thinking}</think>{text}", mode) == answer
        assert extract_answer(f"{thinking}</think>{text}", mode) == answer
        assert extract_answer(f"<think>{thinking}", mode) is None
        assert extract_answer(f"{text}</think>{text}<think>{thinking}", mode) is None
    if thinking.strip():
        assert answers.split_reasoning(f"<think>{thinking}</think>{text}") == thinking.strip()


@given(fractions)
def test_format_and_parse_are_inverse(value):
    assert parse_answer(format_answer(value)) == value
    assert extract_answer(f"so it is.\nAnswer: {format_answer(value)}", "strict") == value
    assert same_answer(value, format_answer(value))


@given(st.integers(-10**12, 10**12), st.sampled_from(FORMS))
def test_an_announced_number_is_read_with_and_without_commas(value, form):
    reasoning = "First 3 + 4 = 7, then 99."
    for written in (str(value), f"{value:,}", str(value).replace("-", "−")):
        text = f"{reasoning}\n{form.format(written)}"
        assert extract_answer(text, "strict") == value
        assert answers.split_reasoning(text) == reasoning


@given(st.one_of(st.none(), fractions, st.text(max_size=8)), st.one_of(st.none(), fractions, st.text(max_size=8)))
def test_agreement_is_symmetric_and_missing_answers_do_not_agree(a, b):
    assert same_answer(a, b) == same_answer(b, a)
    assert same_answer(a, a) == (parse_answer(a) is not None)
    assert not same_answer(None, b)


@pytest.mark.parametrize("digits", [400, 4_301, 10_000])
def test_thousands_of_digits(digits):
    text = "7" * digits
    value = extract_answer(f"Answer: {text}", "strict")
    assert format_answer(value) == text
    assert not same_answer(value, value + 1)


@pytest.mark.parametrize("text", ["7" * 10_001, "7" * 50_000, "1/" + "7" * 10_001, "12e9999"])
def test_a_longer_number_is_none(text):
    "It is skipped as a whole: no part of it is taken for the answer, but another number may be."
    assert extract_answer(text) is extract_answer(f"Answer: {text}") is parse_answer(text) is None
    assert extract_answer(f"8 and {text}") == 8


@pytest.mark.parametrize("number", ["3,50", "1,23,456", "1,2345", "1.234,56", "1 000", "10:30", "3/4/5", "2^10", "5-7",
                                    "3, 4", "62 + 3x", "2 million"])
@pytest.mark.parametrize("form", ["{}", "#### {}", "so 7\nAnswer: {}", "\\boxed{{7}}\n#### {}.", "\\boxed{{{}}}"])
def test_an_ambiguous_gold_answer_is_refused(tmp_path, number, form):
    answer = form.format(number)
    assert gold_answer(answer) is None
    lines = [json.dumps({"question": f"Q{k}?", "answer": a}) for k, a in enumerate(["7", answer])]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"own.jsonl, line 2: field 'answer' has no gold number"):
        load_questions(tmp_path / "own.jsonl")
    with pytest.raises(DataError, match="no gold number"):
        sft_target(answer)


@pytest.mark.parametrize("number, value", [("1,250", "1250"), ("2,125", "2125"), ("1,250.50", "2501/2"), ("$18.", "18"),
                                           ("50%", "50"), ("3 1/2", "7/2"), ("18 km", "18"), ("5 + 3 = 8", "8"),
                                           ("**-3**", "-3")])
def test_a_gold_answer_that_stands_alone_is_read(number, value):
    assert gold_answer(f"#### {number}") == gold_answer(f"Answer: {number}\n") == value


def test_the_last_marker_counts_and_an_empty_one_is_skipped():
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
    assert [(s, e) for s, e, _ in answers.find_numbers("1,000 or -$5")] == [(0, 5), (9, 12)]
