"Bad files and names: each is refused with a message that names the place and the remedy; good ones lose nothing."
import json

import datasets
import pytest
from hypothesis import given, strategies as st

from looper_math import data
from looper_math.answers import extract_answer, parse_answer
from looper_math.data import DataError, check_disjoint, load_questions, question_id, sft_target, split_questions, training_rows
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
    with pytest.raises(DataError, match="Did you mean .*train.jsonl"): load_questions(tmp_path/"trian.jsonl")
    with pytest.raises(DataError, match="a folder.*has train.jsonl"): load_questions(tmp_path)
    with pytest.raises(DataError, match="no folder"): load_questions(tmp_path/"nowhere"/"train.jsonl")


@pytest.fixture(autouse=True)
def without_fetched_files(monkeypatch):
    "What `looper data` left under data/ is tested in test_fetch.py."
    monkeypatch.setattr(data, "HUB_FILES", {})


def test_unknown_name_never_asks_the_network(monkeypatch):
    def no_network(*a, **k): raise AssertionError("asked the network")
    monkeypatch.setattr(datasets, "load_dataset", no_network)
    for name in ("openai/gsm8", "gsm8k", "openai/gsm8k:dev", "someone/else", "./none.jsonl", ""):
        with pytest.raises(DataError): load_questions(name)


def test_hub_name_and_split(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or [GOOD])
    assert load_questions("openai/gsm8k:test")[0]["gold_answer"] == "3"
    load_questions("openai/gsm8k"), load_questions("madrylab/gsm8k-platinum")
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"}), (("openai/gsm8k", "main"), {"split": "train"}),
                     (("madrylab/gsm8k-platinum", "main"), {"split": "test"})]


def test_bad_row_of_the_hub_and_no_network(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: [GOOD, {"question": "Another?", "answer": "none"}])
    with pytest.raises(DataError, match="openai/gsm8k:train, row 2"): load_questions("openai/gsm8k")
    def unreachable(*a, **k): raise ConnectionError("offline")
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match="cannot be reached"): load_questions("openai/gsm8k")


@pytest.mark.parametrize("limit", [0, -3, 1.5, "2", True])
def test_bad_limit(tmp_path, limit):
    (tmp_path/"a.jsonl").write_bytes(line())
    with pytest.raises(DataError, match="limit"): load_questions(tmp_path/"a.jsonl", limit=limit)


def test_limit_takes_the_first(tmp_path):
    (tmp_path/"a.jsonl").write_bytes(b"".join(line(question=f"Q{i}") for i in range(9)))
    assert [q["question"] for q in load_questions(tmp_path/"a.jsonl", limit=4)] == ["Q0", "Q1", "Q2", "Q3"]
    assert len(load_questions(tmp_path/"a.jsonl", limit=99)) == 9


def test_check_disjoint_counts():
    sets = [[{"question": f"Q{i}"} for i in r] for r in (range(5), range(3, 9), range(5, 9))]
    with pytest.raises(DataError, match="2 of the 6 questions of test.*'Q3'"): check_disjoint(sets[0], sets[1])
    check_disjoint(sets[0], sets[2])


@given(st.text(), st.text())
def test_a_prompt_holds_question_and_instruction_unchanged(question, instruction):
    assert build_prompt(question, instruction) == "Question: " + question + "\n" + instruction + "\nSolution:\n"


@given(st.integers(-10**9, 10**9), st.sampled_from(["#### {:,}", "Answer: {}", "so\n#### ${:,}.00", "{:,}"]))
def test_a_target_ends_in_its_gold(n, form):
    target = sft_target(form.format(n))
    assert target.split("\n")[-1] == f"Answer: {n}" and target.count("Answer:") == 1
    assert extract_answer(target, "strict") == parse_answer(n)


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=2, unique_by=str.strip), st.integers(0, 5), st.data())
def test_split_is_a_partition_that_ignores_order(texts, seed, data):
    questions = [{"question": t, "question_id": question_id(t)} for t in texts]
    dev = data.draw(st.integers(0, len(questions) - 1))
    rest, held = split_questions(questions, dev, seed)
    assert len(held) == dev and sorted(q["question"] for q in rest + held) == sorted(texts)
    again = split_questions(data.draw(st.permutations(questions)), dev, seed)[1]
    assert {q["question_id"] for q in again} == {q["question_id"] for q in held}


def test_rows_are_as_many_as_questions(tmp_path):
    (tmp_path/"a.jsonl").write_bytes(b"".join(line(question=f"Q{i}") for i in range(20)))
    rows = training_rows(load_questions(tmp_path/"a.jsonl"))
    assert len(rows) == 20 and set(rows[0]) == {"prompt", "completion"}
    assert rows[3] == {"prompt": build_prompt("Q3"), "completion": "1+2=3\nAnswer: 3"}
