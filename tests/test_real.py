"A real language model through phases 1 to 5: SmolLM2-135M on a handful of easy questions (`make test-real`)."
import json
import shutil

import pytest

from looper_math import cli
from looper_math.records import ROOT, read_records

BASE, RUN = ROOT / "data/models/smollm2", "pytest-real"
pytestmark = pytest.mark.skipif(not (BASE / "config.json").exists(), reason="SmolLM2 is made by `make test-real`")

# So easy that a model of 135 million weights solves some.
PRACTICE = [("Tom has 3 apples. He buys 4 apples. How many apples does Tom have now?", 7),
            ("Ann has 10 books. She gives away 4 books. How many books does Ann have left?", 6),
            ("A box holds 5 pens. How many pens do 2 boxes hold?", 10),
            ("There are 8 birds. 3 birds fly away. How many birds are left?", 5),
            ("Ben has 6 red balls and 2 blue balls. How many balls does Ben have?", 8),
            ("A ticket costs 3 dollars. How many dollars do 4 tickets cost?", 12)]
TEST = [("Sue has 2 cats and 3 dogs. How many pets does Sue have?", 5),
        ("Max had 9 coins and lost 2 coins. How many coins does Max have?", 7),
        ("One pack has 4 cards. How many cards are in 3 packs?", 12),
        ("Lea reads 5 pages a day. How many pages does she read in 4 days?", 20)]


def question_file(path, questions):
    "A file of questions; returns its path."
    path.write_text("".join(json.dumps({"question": q, "answer": f"#### {a}"}) + "\n" for q, a in questions))
    return path


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    "The words after `looper`."
    files = tmp_path_factory.mktemp("real")
    practice, test = (question_file(files / f"{n}.jsonl", q) for n, q in (("practice", PRACTICE), ("test", TEST)))
    flags = ["common.base=data/models/smollm2", f"02.questions={practice}", "02.limit=0",
             "02.max_new_tokens=100", "03.policy=best-worst", "04.min_pairs=1", f"05.questions={test}", "05.limit=0",
             "05.max_new_tokens=100", "05.train=data/pocket/train.jsonl", f"05.practice={practice}"]
    return ["run", "smollm2", "--run", RUN, *(word for flag in flags for word in ("-p", flag))]


@pytest.fixture(scope="module")
def folder(command):
    "The finished run."
    shutil.rmtree(ROOT / "outputs" / RUN, ignore_errors=True)
    cli.looper(command)
    yield ROOT / "outputs" / RUN
    shutil.rmtree(ROOT / "outputs" / RUN)


def test_every_phase_ends_with_what_it_promises(folder):
    summary = json.loads((folder / "summary.json").read_text())
    models = summary["sets"]["test"]["models"]
    assert list(models) == ["base", "sft", "control", "dpo"] and all(m["n"] == 4 for m in models.values())
    moved = json.loads((folder / "04_dpo/manifest.json").read_text())["metrics"]["adapter_moved_by"]
    assert moved > 0


def test_the_chat_template_and_its_end_token_are_used(folder):
    trajectories = [t for r in read_records(folder / "02_rollouts/rollouts.jsonl") for t in r["trajectories"]]
    assert all(t["prompt"].startswith("<|im_start|>") and t["prompt"].endswith("assistant\n") for t in trajectories)
    assert not any("<|im_" in t["full_text"] for t in trajectories)
    ended = [t for t in trajectories if t["finish_reason"] == "stop"]
    assert ended and all(0 < t["num_tokens"] <= 100 for t in ended)


def test_sft_learns_from_the_models_own_solutions(folder):
    (first, *_) = json.loads((folder / "01_sft/examples.json").read_text())
    masked, trained = first.rsplit("]\n", 1)
    assert masked.startswith("[<|im_start|>") and trained.rstrip().endswith("<|im_end|>")


def test_the_same_command_again_finds_everything_done(folder, command, capfd):
    cli.looper(command)
    assert capfd.readouterr().out.count("done before") == 5
