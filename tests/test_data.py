"Bad files and names are refused with a message that names the place and the remedy; good files are read completely."
import json

import datasets
import pytest
from hypothesis import given, strategies as st

from looper_math import data
from looper_math.answers import extract_answer, parse_answer
from looper_math.data import DataError, check_disjoint, load_questions, sft_target, training_rows
from looper_math.prompts import build_prompt

GOOD = {"question": "How many?", "answer": "1+2=<<1+2=3>>3\n#### 3"}


def line(**changes): return json.dumps({**GOOD, **changes}).encode() + b"\n"


BAD = {
    "empty": (b"", ["empty", "'question'", "'answer'"]),
    "not JSON": (line() + b"{question: 1}\n", ["line 2", "not JSON", "one JSON object a line"]),
    "cut off": (line() + line(question="Another?")[:-9], ["line 2", "not JSON"]),
    "a list": (b'["How many?", "3"]\n', ["line 1", "got list"]),
    "null": (b"null\n", ["line 1", "got NoneType"]),
    "blank line": (line() + b"\n" + line(question="Another?"), ["line 2"]),
    "byte order mark": (b"\xef\xbb\xbf" + line(), ["line 1", "BOM"]),
    "latin-1": ('{"question": "¿Cuántos?"}\n'.encode("latin-1"), ["line 1", "not UTF-8", "Save the file"]),
    "utf-16": (line().decode().encode("utf-16"), ["line 1", "not UTF-8"]),
    "no question": (b'{"prompt": "How many?", "answer": "3"}\n', ["line 1", "'question' is missing", "'prompt'"]),
    "no answer": (b'{"question": "How many?"}\n', ["line 1", "'answer' is missing"]),
    "no fields": (b"{}\n", ["line 1", "no fields"]),
    "number": (line() + line(question="Another?", answer=3), ["line 2", "'answer'", "must be text", "3"]),
    "null answer": (line(answer=None), ["'answer'", "must be text"]),
    "blank question": (line(question=" \n"), ["'question' is blank"]),
    "blank answer": (line(answer=""), ["'answer' is blank"]),
    "no gold": (line(answer="She has 3 apples left."), ["'answer' has no gold number", "#### N", "Answer: N"]),
    "gold in words": (line(answer="1+2=3\n#### three"), ["no gold number", "three"]),
    "surrogate": (line(question="How \ud800 many?"), ["'question'", "surrogate"]),
    "twice": (line() + line(question="Another?") + line(question=" how  MANY? "), ["line 3", "line 1", "same question"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file(tmp_path, name):
    content, expected = BAD[name]
    path = tmp_path/"mine.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as error: load_questions(path)
    for part in ["mine.jsonl", *expected]: assert part in str(error.value)


def test_missing_file_names_the_nearest(tmp_path):
    (tmp_path/"train.jsonl").write_bytes(line())
    with pytest.raises(DataError, match="did you mean 'train.jsonl'"): load_questions(tmp_path/"trian.jsonl")
    with pytest.raises(DataError, match="a folder, not a file; it has train.jsonl"): load_questions(tmp_path)
    with pytest.raises(DataError, match="no folder"): load_questions(tmp_path/"nowhere"/"train.jsonl")


@pytest.fixture(autouse=True)
def without_fetched_files(monkeypatch):
    "Files that `looper data` saved under data/ are tested in test_fetch.py."
    monkeypatch.setattr(data, "HUB_FILES", {})


def test_an_unknown_name_uses_no_network(monkeypatch):
    def no_network(*a, **k): raise AssertionError("the network was used")
    monkeypatch.setattr(datasets, "load_dataset", no_network)
    for name in ("openai/gsm8", "gsm8k", "openai/gsm8k:dev", "someone/else", "./none.jsonl", ""):
        with pytest.raises(DataError): load_questions(name)


def test_hub_name_and_split(monkeypatch):
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: calls.append((a, k)) or [GOOD])
    assert load_questions("openai/gsm8k:test")[0]["gold_answer"] == "3"
    load_questions("openai/gsm8k"), load_questions("madrylab/gsm8k-platinum")
    assert calls == [(("openai/gsm8k", "main"), {"split": "test"}), (("openai/gsm8k", "main"), {"split": "train"}),
                     (("madrylab/gsm8k-platinum", "main"), {"split": "test"})]


def test_bad_hub_row_and_no_network(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: [GOOD, {"question": "Another?", "answer": "none"}])
    with pytest.raises(DataError, match="openai/gsm8k:train, row 2"): load_questions("openai/gsm8k")
    def unreachable(*a, **k): raise ConnectionError("offline")
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match="cannot be reached"): load_questions("openai/gsm8k")


@pytest.mark.parametrize("limit", [0, -3, 1.5, "2", True])
def test_bad_limit(tmp_path, limit):
    (tmp_path/"a.jsonl").write_bytes(line())
    with pytest.raises(DataError, match="limit"): load_questions(tmp_path/"a.jsonl", limit=limit)


def test_limit_takes_the_first_questions(tmp_path):
    (tmp_path/"a.jsonl").write_bytes(b"".join(line(question=f"Q{i}") for i in range(9)))
    assert [q["question"] for q in load_questions(tmp_path/"a.jsonl", limit=4)] == ["Q0", "Q1", "Q2", "Q3"]
    assert len(load_questions(tmp_path/"a.jsonl", limit=99)) == 9


def test_check_disjoint_counts_the_common_questions():
    sets = [[{"question": f"Q{i}"} for i in r] for r in (range(5), range(3, 9), range(5, 9))]
    with pytest.raises(DataError, match="2 of the 6 questions of test.*'Q3'"): check_disjoint(sets[0], sets[1])
    check_disjoint(sets[0], sets[2])


@given(st.text(), st.text())
def test_a_prompt_contains_question_and_instruction_unchanged(question, instruction):
    assert build_prompt(question, instruction) == "Question: " + question + "\n" + instruction + "\nSolution:\n"


@given(st.integers(-10**9, 10**9), st.sampled_from(["#### {:,}", "Answer: {}", "so\n#### ${:,}.00", "{:,}"]))
def test_a_target_ends_with_its_gold_answer(n, form):
    target = sft_target(form.format(n))
    assert target.split("\n")[-1] == f"Answer: {n}" and target.count("Answer:") == 1
    assert extract_answer(target, "strict") == parse_answer(n)


def test_one_training_row_per_question(tmp_path):
    (tmp_path/"a.jsonl").write_bytes(b"".join(line(question=f"Q{i}") for i in range(20)))
    rows = training_rows(load_questions(tmp_path/"a.jsonl"))
    assert len(rows) == 20 and set(rows[0]) == {"prompt", "completion"}
    assert rows[3] == {"prompt": build_prompt("Q3"), "completion": "1+2=3\nAnswer: 3"}
