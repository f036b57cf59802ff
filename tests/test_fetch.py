"`looper data` and `looper merge`: files fetched and verified, and a base with its adapter as one folder."
import json
import shutil
from pathlib import Path

import datasets
import pytest

from looper_math import data, records
from looper_math.cli import looper
from looper_math.data import DataError, load_questions
from looper_math.records import ROOT

SHARED = ROOT.parent / "shared/data"  # GSM8K where it was laid beside the project


@pytest.fixture
def hub(monkeypatch, tmp_path):
    "Three small data sets instead of the hub's, and a project that has none of their files."
    sizes = dict(zip(data.HUB_FILES, (4, 2, 1)))
    files = {file: f._replace(questions=sizes[file]) for file, f in data.HUB_FILES.items()}
    monkeypatch.setattr(data, "HUB_FILES", files)
    monkeypatch.setattr(records, "ROOT", tmp_path)
    calls = []

    def load(name, config, split, revision=None):
        calls.append((name, config, split, revision))
        n = next(f.questions for f in data.HUB_FILES.values() if (f.name, f.split) == (name, split))
        rows = [{"question": f"How many are {i} {name} {split}?", "answer": f"#### {i}"} for i in range(n)]
        return [row | {"cleaning_status": "consensus"} for row in rows]

    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


NO_NETWORK = ConnectionError("Couldn't reach the hub")


def no_hub(monkeypatch, error=NO_NETWORK):
    def load(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)


def refusal(argv, root, capsys, code=2):
    with pytest.raises(SystemExit) as stop:
        looper(argv, root)
    err = capsys.readouterr().err
    assert stop.value.code == code and "Traceback" not in err
    return err


def test_data_is_fetched_once_and_verified(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    looper(["data"], tmp_path)
    assert capsys.readouterr().out.splitlines() == [
        "data/gsm8k_train.jsonl  4 questions, fetched",
        "data/gsm8k_test.jsonl  2 questions, fetched",
        "data/gsm8k_platinum_test.jsonl  1 questions, fetched",
    ]
    assert [(name, split) for name, _, split, _ in hub] == [
        ("openai/gsm8k", "train"), ("openai/gsm8k", "test"), ("madrylab/gsm8k-platinum", "test")]
    assert all(config == "main" and len(revision) == 40 for _, config, _, revision in hub)
    lines = (tmp_path / "data/gsm8k_train.jsonl").read_text().splitlines()
    assert json.loads(lines[3]) == {"question": "How many are 3 openai/gsm8k train?", "answer": "#### 3"}

    no_hub(monkeypatch)
    looper(["data"], tmp_path)
    assert capsys.readouterr().out.count(", there") == 3
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == sorted(data.HUB_FILES)


def test_a_folder_of_ones_own(hub, tmp_path, capsys):
    looper(["data", "elsewhere"], tmp_path)
    assert (tmp_path / "elsewhere/gsm8k_test.jsonl").exists() and not (tmp_path / "data").exists()


@pytest.mark.parametrize("error", [ConnectionError("no network"), PermissionError("403"), OSError("gated\nrepo")])
def test_without_a_network_it_lists_what_to_copy(hub, tmp_path, capsys, monkeypatch, error):
    "What is there already is not listed."
    looper(["data"], tmp_path)
    (tmp_path / "data/gsm8k_train.jsonl").unlink()
    (tmp_path / "data/gsm8k_platinum_test.jsonl").unlink()
    no_hub(monkeypatch, error)
    err = refusal(["data"], tmp_path, capsys)
    assert "the hub cannot be reached" in err
    assert "copy by hand, as one JSON object with question and answer a line" in err
    assert f"openai/gsm8k, split train (4 questions), to {tmp_path}/data/gsm8k_train.jsonl" in err
    assert f"madrylab/gsm8k-platinum, split test (1 questions), to {tmp_path}/data/gsm8k_platinum_test.jsonl" in err
    assert "gsm8k_test.jsonl" not in err and err.count("\n") == 1


def with_last(**row):
    "Puts another record in the place of the last one."
    return lambda rows: rows[:-1] + [json.dumps(row)]


DAMAGE = {
    "a line lost": (lambda rows: rows[:-1], "gsm8k_train.jsonl: 3 questions, expected 4"),
    "one too many": (lambda rows: rows + [json.dumps({"question": "New?", "answer": "1"})], "5 questions, expected 4"),
    "no number": (with_last(question="New?", answer="none"), "line 4: field 'answer' has no gold"),
    "a question twice": (lambda rows: rows[:-1] + rows[:1], "line 4: the same question as in"),
    "cut off": (lambda rows: rows[:-1] + [rows[-1][:-9]], "line 4: not JSON"),
    "a test question": (with_last(question="How many are 0 openai/gsm8k test?", answer="0"), "1 of the 2 questions of"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_file_that_is_there_is_verified(hub, tmp_path, capsys, case):
    looper(["data"], tmp_path)
    path, (damage, message) = tmp_path / "data/gsm8k_train.jsonl", DAMAGE[case]
    path.write_text("\n".join(damage(path.read_text().splitlines())) + "\n")
    before = path.read_bytes()
    assert message in refusal(["data"], tmp_path, capsys) and path.read_bytes() == before


def test_what_the_hub_sends_is_verified_before_it_is_put_in_place(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: [{"question": "One?", "answer": "#### 1"}])
    assert "1 questions, expected 4" in refusal(["data"], tmp_path, capsys)
    assert not (tmp_path / "data/gsm8k_train.jsonl").exists()


def test_hub_names_are_read_from_the_files(hub, tmp_path, monkeypatch):
    "A slice of a split, as the recipes name it; without the files the hub is asked."
    assert len(load_questions("openai/gsm8k:train")) == 4 and hub
    looper(["data"], tmp_path)
    no_hub(monkeypatch, AssertionError("asked the hub"))
    texts = lambda name: [q["question"] for q in load_questions(name)]
    whole = texts("openai/gsm8k")
    assert len(whole) == 4 and texts("openai/gsm8k:train[:3]") + texts("openai/gsm8k:train[3:]") == whole
    assert texts("openai/gsm8k:train[-1:]") == whole[-1:] and len(texts("madrylab/gsm8k-platinum")) == 1
    path = tmp_path / "data/gsm8k_train.jsonl"
    path.write_text(path.read_text().split("\n", 1)[1])
    with pytest.raises(DataError, match="3 questions, expected 4"):
        load_questions("openai/gsm8k:train[:2]")


@pytest.mark.skipif(not (SHARED / "gsm8k_train.jsonl").exists(), reason="GSM8K does not lie beside the project")
def test_the_real_files(monkeypatch):
    no_hub(monkeypatch, AssertionError("asked the hub"))
    assert {path.name: how for path, how in data.fetch(SHARED).items()} == dict.fromkeys(data.HUB_FILES, "there")


# --- merging


def test_merge_makes_one_folder(random_adapter, tmp_path, capsys):
    out = tmp_path / "merged"
    looper(["merge", "data/pocket-base", random_adapter, str(out)])
    assert capsys.readouterr().out.strip() == str(out)
    assert (out / "model.safetensors").exists() and (out / "tokenizer.json").exists()
    written = (out / "model.safetensors").stat().st_mtime_ns
    looper(["merge", "data/pocket-base", random_adapter, str(out)])
    assert (out / "model.safetensors").stat().st_mtime_ns == written


def test_a_base_whose_generation_config_lacks_do_sample_is_merged(random_adapter, tmp_path):
    "Llama 2's options of sampling, which transformers reads and refuses to write."
    base = Path(shutil.copytree(ROOT / "data/pocket-base", tmp_path / "base"))
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "temperature": .9, "top_p": .6}))
    looper(["merge", str(base), random_adapter, str(tmp_path / "merged")])
    written = json.loads((tmp_path / "merged/generation_config.json").read_text())
    assert (written["temperature"], written["top_p"], written["do_sample"]) == (.9, .6, True)


def test_merge_finds_a_model_of_a_run(random_adapter, tmp_path, capsys):
    "A run in another project folder, and a base whose own folder is named in full."
    run = tmp_path / "outputs/try"
    (run / "05_eval").mkdir(parents=True)
    evaluation = {"models": {"base": "", "dpo": random_adapter}, "base": "data/pocket-base", "template": "{question}"}
    evaluation |= {"max_new_tokens": 9}
    (run / "run.json").write_text(json.dumps({"recipe": "x", "parameters": {"05_eval": evaluation}, "seconds": {}}))
    looper(["merge", "try/dpo", str(tmp_path / "merged")], tmp_path)
    assert (tmp_path / "merged/merged_from.json").exists()
    out = tmp_path / "b"
    err = refusal(["merge", "try/base", str(out)], tmp_path, capsys)
    assert "try/base has no adapter, so there is nothing to merge" in err
    assert "has no model 'dop'; did you mean 'dpo'" in refusal(["merge", "try/dop", str(out)], tmp_path, capsys)
    assert not out.exists()


def test_merge_is_refused(random_adapter, tmp_path, capsys):
    base, out = "data/pocket-base", str(tmp_path / "out")
    assert "no adapter_config.json" in refusal(["merge", base, str(tmp_path), out], ROOT, capsys)
    assert "no such model folder" in refusal(["merge", "data/pocket-bsae", random_adapter, out], ROOT, capsys)
    assert "dtype must be auto" in refusal(["merge", base, random_adapter, out, "--dtype", "int8"], ROOT, capsys)
    Path(out).mkdir()
    (Path(out) / "mine.txt").write_text("mine")
    assert "holds something else" in refusal(["merge", base, random_adapter, out], ROOT, capsys)
    assert [p.name for p in Path(out).iterdir()] == ["mine.txt"]
