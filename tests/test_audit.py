"Faults injected into a sound log, one at a time: each must be reported, at its rows, and nothing else."
import json
import random
from itertools import product

import pandas as pd
import pytest
from scipy.stats import binomtest, false_discovery_control
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from looper_math import audit, grading, stats
from looper_math.audit import LM_EVAL, contamination
from looper_math.compare import compare
from looper_math.data import load_questions, sft_target
from looper_math.records import RecordError, resolve

TEST = "data/pocket/test.jsonl"
N = 80
WRONG = range(0, N, 5)  # rows whose completion ends in another number


@pytest.fixture(scope="module")
def sound():
    "A log of the pocket's first questions: worked solutions, every fifth with a wrong answer, and true verdicts."
    rows = []
    for k, q in enumerate(load_questions(TEST, limit=N)):
        steps = sft_target(q["answer"]).partition("\nAnswer")[0]
        answer = str(int(q["gold_answer"]) + (3 if k in WRONG else 0))
        rows.append({"question": q["question"], "gold": q["gold_answer"], "completion": f"{steps}\nAnswer: {answer}",
                     "correct": k not in WRONG, "finish_reason": "stop"})
    return rows


@pytest.fixture
def write(tmp_path):
    def to(rows, name="log.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
        return path

    return to


def findings(log):
    return {name: rows for name, rows in log.findings.items() if rows}


def test_a_sound_log_is_found_sound(sound, write):
    log = audit.rescore(write(sound), reference=TEST)
    assert log.accuracy == log.accuracy_strict == (N - len(WRONG), N)
    assert findings(log) == {"missing from the log": list(range(N, 2500))}
    assert findings(audit.rescore(pd.DataFrame(sound))) == {} and len(log.changes) == 0


def changed(rows, k, **fields):
    return [r | (fields if i == k else {}) for i, r in enumerate(rows)]


@pytest.mark.parametrize("piece", ["the end of the question", "the whole question", "a labelled question",
                                   "the end of the prompt"])
def test_echo(sound, write, piece):
    "The prompt at the head of the output, and its example's number is not taken for the answer."
    k, row = 7, sound[7]
    prompt = f"Question: {row['question']}\nEnd with a line such as Answer: 42\nSolution:\n"
    head = {"the end of the question": row["question"][-15:], "the whole question": row["question"],
            "a labelled question": "Question: " + row["question"], "the end of the prompt": prompt[-48:]}[piece]
    steps = row["completion"].partition("\nAnswer")[0]
    log = audit.rescore(write(changed(sound, k, completion=f"{head}\n{steps}", prompt=prompt)))
    assert log.findings["prompt echo"] == [k]
    assert log.table.echo[k].strip() == head.strip() and log.accuracy == (N - len(WRONG), N)


INSTRUCTION = "Think step by step and end with a line such as Answer: 42"


@pytest.mark.parametrize("head", ["{instruction}\n\n{question}", "{instruction}.\nQ: {question}\nA:",
                                  "such as Answer: 42\n\n{question}", "<s> [INST] {instruction}\n{spread} [/INST]",
                                  "Question: 1 + 1?\nAnswer: 2\n\nQuestion: {question}"])
def test_an_echo_behind_whatever_stands_before_it(sound, write, head):
    "One row, no field that holds the prompt; the example's number before the question is not taken for the answer."
    k, row = 7, sound[7]
    spread = row["question"].replace(" ", "\n ", 3)
    head = head.format(instruction=INSTRUCTION, question=row["question"], spread=spread)
    steps = row["completion"].partition("\nAnswer")[0]
    log = audit.rescore(write(changed(sound, k, completion=f"{head}\n{steps}")))
    assert log.findings["prompt echo"] == [k] and log.table.echo[k].endswith(row["question"][-9:])
    assert log.accuracy == (N - len(WRONG), N) and log.findings["recorded verdict differs"] == []


@pytest.mark.parametrize("field", ["the prompt", "the question"])
def test_completions_that_begin_in_the_middle_of_the_prompt(sound, write, field):
    "Left padding, sliced at the unpadded length: each begins at another place, in the instruction or in the question."
    rows, place = [], random.Random(0)
    for r in sound:
        prompt = f"{INSTRUCTION}\n{r['question']}" + ("\nAnswer as above.\n" if field == "the prompt" else "")
        within_words = [k for k in range(1, len(prompt) - 30) if prompt[k - 1].isalnum() and prompt[k].isalnum()]
        completion = f"{prompt[place.choice(within_words):]}\n{r['completion']}"
        rows.append(r | {"completion": completion} | ({"prompt": prompt} if field == "the prompt" else {}))
    log = audit.rescore(write(rows))
    assert log.findings["prompt echo"] == list(range(N)) and log.accuracy_strict == (N - len(WRONG), N)
    behind = [r.completion[len(r.echo):].lstrip() for r in log.table.itertuples()]
    assert behind == [r["completion"] for r in sound]


def test_behind_another_instruction_the_rest_of_the_prompt_is_part_of_the_echo(sound, write):
    prompt = f"Question: {sound[3]['question']}\nEnd with a line such as Answer: 42\nSolution:"
    completion = f"user\n{prompt.partition(': ')[2]}\n{sound[3]['completion']}".replace("Answer: 42", "Answer:  42")
    log = audit.rescore(write(changed(sound, 3, prompt=prompt, completion=completion)))
    assert log.findings["prompt echo"] == [3] and log.table.echo[3].endswith("Solution:")


@pytest.mark.parametrize("text", ["{last} {solution}", "{first} {solution}", "Solution: {solution}",
                                  "Answer as above.\n{solution}", "{solution}\n\nThat was: {question}", "{solution}"])
def test_quoting_is_no_echo(sound, write, text):
    "A sentence of the question, the prompt's last line, and the question said once more behind the answer."
    parts = [{"question": r["question"], "solution": r["completion"], "first": r["question"].partition(". ")[0],
              "last": r["question"].rpartition(". ")[2]} for r in sound]
    prompt = INSTRUCTION + "\n{question}\nAnswer as above.\nSolution:\n"
    rows = [r | {"completion": text.format(**p), "prompt": prompt.format(**p)}
            for r, p in zip(sound, parts) if p["last"] != r["question"]]
    assert len(rows) > N / 2
    log = audit.rescore(write(rows))
    assert log.findings["prompt echo"] == log.findings["recorded verdict differs"] == []


def test_the_examples_number_graded_as_the_answer(sound, write):
    "An echo with the example in every row, and no field that holds the prompt; a 42 of the question does not count."
    steps = lambda r: r["completion"].partition("\nAnswer")[0]
    echo = lambda r: f"{r['question'][-30:]}\nEnd with a line such as Answer: 42\n{steps(r)}"
    rows = [r | {"completion": echo(r), "correct": False} for r in sound]
    log = audit.rescore(write(rows))
    assert log.findings["prompt echo"] == list(range(N))
    assert log.findings["instruction number"] == [k for k, r in enumerate(rows) if "42" not in r["question"]]
    assert log.accuracy[0] > .9 * N and log.accuracy_strict == (0, N)
    assert set(log.findings["recorded verdict differs"]) == set(log.table.index[log.table.correct])
    assert log.changes.why.str.contains("prompt echo").all()


def test_a_number_of_the_instruction(sound, write):
    instruction = "Give the answer as in: Answer: 4242"
    rows = [r | {"prompt": f"{r['question']}\n{instruction}"} for r in sound]
    rows = changed(rows, 3, completion="It is so.\nAnswer: 4242", correct=False)
    assert audit.rescore(write(rows)).findings["instruction number"] == [3]
    bare = [{k: v for k, v in r.items() if k != "prompt"} for r in rows]
    assert audit.rescore(write(bare), instruction=instruction).findings["instruction number"] == [3]


def test_one_wrong_answer_under_many_golds(sound, write):
    "The example's number graded in place of the answer, where neither prompt nor echo is in the log."
    rows = sound
    for k in (1, 2, 3, 4):
        rows = changed(rows, k, completion="Answer: 4242", correct=False)
    log = audit.rescore(write(rows))
    assert log.findings["same wrong answer"] == [1, 2, 3, 4] and not log.findings["instruction number"]


@pytest.mark.parametrize("how", ["by its text", "by its finish reason"])
def test_truncation(sound, write, how):
    text = sound[4]["completion"]
    if how == "by its text":
        half = changed(sound, 4, completion=text[: len(text) // 2].rstrip(". "), correct=False)
        rows = [{k: v for k, v in r.items() if k != "finish_reason"} for r in half]
    else:
        rows = changed(sound, 4, finish_reason="length")
    log = audit.rescore(write(rows))
    assert log.findings["cut off"] == [4]


def test_a_gold_with_a_comma(sound, write):
    "As text it is a finding; misread before it was written, it differs from the data file, and the verdict changes."
    rows = changed(sound, 6, gold="114,200", completion="Answer: 114", correct=True)
    log = audit.rescore(write(rows))
    assert log.findings["gold does not round-trip"] == [6] and log.findings["recorded verdict differs"] == [6]
    assert log.changes.why[6] == "gold does not round-trip"
    log = audit.rescore(write(changed(sound, 6, gold="114", completion="Answer: 114")), reference=TEST)
    assert log.findings["gold differs from the reference"] == [6]


def test_duplicates_missing_rows_and_order_in_one_log(sound, write):
    log = audit.rescore(write(sound + [sound[2]]))
    assert log.findings["duplicate question"] == [N] and log.accuracy == (N - len(WRONG), N)
    log = audit.rescore(write(sound[:10] + sound[12:]), reference=TEST)
    assert log.findings["missing from the log"][:2] == [10, 11]
    shuffled = [sound[k] for k in (1, 0, *range(2, N))]
    assert audit.rescore(write(shuffled), reference=TEST).findings["other order"] == [1]


def test_faults_between_two_logs(sound, write):
    a = write(sound, "a.jsonl")
    better = [dict(r) for r in sound]
    for k in (0, 5, 10): better[k]["completion"] = f"Answer: {better[k]['gold']}"
    better[1]["completion"] = "Answer: -1"
    shuffled = random.Random(0).sample(better, N)
    test = audit.compare_logs(a, write(shuffled, "b.jsonl"))
    assert (test.gained, test.lost, test.n, test.difference) == (3, 1, N, 2 / N)
    assert len(test.findings["other order"]) == N
    assert test.interval[0] < test.difference < test.interval[1]
    assert test.bootstrap == pytest.approx(test.interval, abs=.03)
    assert "3 gained, 1 lost" in test.sentence and "No evidence" in test.sentence
    assert sorted(test.changed.side) == ["gained"] * 3 + ["lost"]
    assert set(test.changed.question) == {sound[k]["question"] for k in (0, 1, 5, 10)}
    missing = audit.compare_logs(a, write(better[:-9] + [better[3]], "b.jsonl"))
    assert missing.n == N - 9 and missing.findings["missing from b"] == list(range(N - 9, N))
    assert missing.findings["twice in b"] == [N - 9]
    assert "missing from b: 9 rows" in missing.sentence and "twice in b: 1 rows" in missing.sentence
    golds = audit.compare_logs(a, write(changed(sound, 8, gold="1"), "b.jsonl"))
    assert golds.findings["gold differs"] == [8]


def test_greedy_and_sampled_are_not_compared(sound, write):
    a, b = ([r | {"temperature": t} for r in sound] for t in (0.0, 0.7))
    with pytest.raises(ValueError, match="greedy and sampled"):
        audit.compare_logs(write(a, "a.jsonl"), write(b, "b.jsonl"))


def test_fields_by_path(sound, write):
    "A log in the layout of lm-evaluation-harness, each question once per filter; a wrong path names the right ones."
    rows = [{"doc": {"question": r["question"], "answer": f"#### {r['gold']}"}, "resps": [[r["completion"]]],
             "arguments": {"gen_args_0": {"arg_0": r["question"]}}, "exact_match": float(r["correct"]), "filter": name}
            for r in sound for name in ("strict-match", "flexible-extract")]
    log = audit.rescore(write(rows), where={"filter": "strict-match"}, **LM_EVAL)
    assert log.accuracy == (N - len(WRONG), N) and findings(log) == {}
    with pytest.raises(RecordError, match=r"no field 'question'; there are doc.question, doc.answer, resps\[0\]\[0\]"):
        audit.rescore(write(rows))
    with pytest.raises(RecordError, match="no field 'verdict'"):
        audit.rescore(write(sound), verdict="verdict")


def refusal(log, **fields):
    with pytest.raises(RecordError) as e:
        audit.rescore(log, **fields)
    return str(e.value)


def test_a_list_in_place_of_a_text(sound, write):
    "Graded as Python prints it, a list of one right answer was wrong."
    log = write([{"doc": r, "resps": [[r["completion"]]]} for r in sound[1:5]])
    fields = {"question": "doc.question", "gold": "doc.gold"}
    assert audit.rescore(log, completion="resps[0][0]", **fields).accuracy == (4, 4)
    for path, near in (("resps[0]", "resps[0][0]"), ("resps", "resps[0][0]"), ("doc", "doc.completion")):
        message = refusal(log, completion=path, **fields)
        assert f"{log}, record 0: field '{path}' must be text or a number, got " in message
        assert near in message.rpartition("there is text at ")[2]


@pytest.mark.parametrize("field, value", [("completion", None), ("completion", {"text": "27"}), ("completion", True),
                                          ("completion", float("nan")), ("question", None), ("question", 7),
                                          ("question", " "), ("gold", None), ("gold", ["27"])])
def test_a_field_that_is_no_text(sound, write, field, value):
    rows = changed(sound[:9], 3, **{field: value})
    for log in (write(rows), pd.DataFrame(rows)):
        assert f"record 3: field '{field}' must be text" in refusal(log)


def test_numbers_are_golds_and_completions(sound, write):
    "The completion 0 is an answer, and no empty text."
    rows = [{"question": "None left?", "gold": 0, "completion": 0},
            {"question": "Half?", "gold": .5, "completion": "1/2"}, {"question": "?", "gold": "", "completion": ""}]
    for log in (audit.rescore(write(rows)), audit.rescore(pd.DataFrame(rows, dtype=object))):
        assert list(log.table.answer.dropna()) == ["0", "1/2"] and list(log.table.correct) == [True, True, False]
        assert log.findings["unreadable gold"] == [2]


def test_records_that_lack_a_field(sound, write):
    "Named, or compared, a field must be in all of them; a field that is merely usual may be missing."
    rows = [{k: v for k, v in r.items() if k != "correct" or i < 3} for i, r in enumerate(sound)]
    assert audit.rescore(write(rows)).table.recorded.notna().sum() == 3
    assert audit.rescore(pd.DataFrame(rows)).table.recorded.notna().sum() == 3
    assert "record 3: no field 'correct'" in refusal(write(rows), verdict="correct")
    assert "record 1: no field 'filter'" in refusal(write(changed(sound[:3], 0, filter="x")), where={"filter": "x"})
    partly = [r | ({"temperature": 0.0} if k < 5 else {}) for k, r in enumerate(sound)]
    for log in (write(partly), pd.DataFrame(partly)):
        assert "record 5: no field 'temperature', which other records have" in refusal(log)
    assert "no rows" in refusal(pd.DataFrame(columns=["question", "gold", "completion"]))


@pytest.mark.parametrize("prompt", [7, {"content": "How?"}, [{"role": "user"}], [{"content": None}], ["How?", 7]])
def test_a_prompt_that_is_no_text(sound, write, prompt):
    message = refusal(write(changed(sound[:4], 2, prompt=prompt)))
    assert "record 2: a prompt must be text, or a list of messages that hold text as 'content', got " in message


def test_prompts_of_messages(sound, write):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": sound[2]["question"]}]
    row = {"prompt": messages, "completion": f"e brief.\n{sound[2]['question']}\n{sound[2]['completion']}"}
    log = audit.rescore(write(changed(sound, 2, **row)))
    assert log.findings["prompt echo"] == [2] and log.accuracy == (N - len(WRONG), N)


def test_a_folder_and_a_deep_record_are_no_log(sound, write):
    log = write(sound[:2])
    assert "a folder, and a log is a file" in refusal(log.parent) and "log.jsonl" in refusal(log.parent)
    log.write_text(json.dumps(sound[0]) + "\n" + '{"question": ' + "[" * 90_000 + "]" * 90_000 + "}\n")
    assert "line 2: nested too deep" in refusal(log)


def test_an_unknown_verdict_is_named(sound):
    a = audit.rescore(pd.DataFrame(sound[:9]))
    with pytest.raises(ValueError, match="by='corect': no verdict that both logs hold; did you mean 'correct'"):
        audit.compare_logs(a, a, by="corect")
    with pytest.raises(ValueError, match="by='correct_strict': no verdict that both"):
        compare(a.table, pd.DataFrame(sound[:9]), by="correct_strict")


def test_a_torn_log_is_refused_by_line(sound, write):
    path = write(sound)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(RecordError, match=f"line {N}: expected one JSON object a line"):
        audit.rescore(path)


def test_statistics_equal_the_libraries(sound, write):
    "Counts, p, Holm and pass@k against scipy, statsmodels and enumeration."
    b = [r | {"completion": f"Answer: {r['gold']}" if k % 3 else "Answer: -1"} for k, r in enumerate(sound)]
    test = audit.compare_logs(write(sound, "a.jsonl"), write(b, "b.jsonl"))
    right_a, right_b = ([k not in WRONG for k in range(N)], [k % 3 > 0 for k in range(N)])
    table = [[sum(x == i and y == j for x, y in zip(right_a, right_b)) for j in (True, False)] for i in (True, False)]
    assert (test.gained, test.lost) == (table[1][0], table[0][1])
    assert test.p == binomtest(test.gained, test.gained + test.lost).pvalue
    assert test.p == pytest.approx(mcnemar(table, exact=True).pvalue)
    ps = [.001, .02, .03, .4]
    assert stats.holm(ps) == pytest.approx(multipletests(ps, method="holm")[1])
    assert stats.holm(ps) != pytest.approx(false_discovery_control(ps))
    for n, c in product((5, 8), (0, 1, 4)):
        rows = pd.DataFrame([{"question_id": q, "gold": "1", "answer": "1" if k < c else str(-k), "correct": k < c}
                             for q in "ab" for k in range(n)])
        got = grading.sampled(rows)
        assert got["avg"][0] == pytest.approx(c / n) and got["pass"]["1"][0] == pytest.approx(c / n)
        assert got["pass"][str(n)][0] == (c > 0)


def test_contamination_finds_a_planted_question():
    "A test question copied into the training set is the worst case; without it nothing is wholly there."
    train, test = load_questions("data/pocket/train.jsonl", limit=400), load_questions(TEST, limit=60)
    assert contamination(train, test).share.max() < 1
    worst = contamination(train + [test[17]], test).iloc[0]
    assert worst.share == 1 and worst.question == worst.nearest == test[17]["question"]


def test_logs_are_read_as_they_lie(tmp_path):
    "Relative paths count from the project's root, as everywhere."
    assert resolve("data/fixtures").exists()
    with pytest.raises(FileNotFoundError):
        audit.rescore("data/fixtures/nothing.jsonl")
