"Phase 2 survives kills, torn lines, lost shards and a full disk, on one process and on two; and imports rollouts."
import dataclasses
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import RUN, small, start as start_alone

from looper_math import engines, preferences, rollouts, shards
from looper_math.progress import read_progress
from looper_math.prompts import arms
from looper_math.records import ROOT, RecordError, RunConflict, read_json, read_records, run_folder, seal
from looper_math.runs import parameters_of

DEFAULTS = {k: p.default for k, p in parameters_of(ROOT / "nbs/02_rollouts.ipynb").items()}
SMALL = {"limit": 12, "max_new_tokens": 16, "batch_size": 16}

forks = multiprocessing.get_context("forkserver")   # children of a process that has imported everything start at once
forks.set_forkserver_preload(["looper_math.rollouts", "transformers.models.llama.modeling_llama"])


def remove(folder):
    "A run's folder and its log."
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_suffix(".log").unlink(missing_ok=True)


def settings(adapter: str, name: str, **changes) -> rollouts.RolloutSettings:
    "Settings of a tiny phase 2 in a fresh folder."
    folder = run_folder(f"{RUN}-{name}")
    remove(folder)
    return rollouts.RolloutSettings(**DEFAULTS | SMALL | {"run": folder.name, "adapter": adapter} | changes)


def start(s, file_size: int = 0):
    "Phase 2 in a process of its own."
    process = forks.Process(target=alone, args=(s, file_size))
    process.start()
    return process


def alone(s, file_size: int):
    "Phase 2 with its messages in a log beside its folder; no file may grow beyond `file_size` bytes if that is given."
    log = os.open(log_of(s), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2): os.dup2(log, stream)
    engines.WINDOW = 2   # batches, so that records come one after another
    if file_size: resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    rollouts.run_phase(s)


def log_of(s): return run_folder(s.run).with_suffix(".log")


def finish(s):
    process = start(s)
    process.join()
    assert process.exitcode == 0
    return s.path.read_bytes()


@pytest.fixture(scope="module")
def unbroken(random_adapter):
    "Bytes of an unbroken run, and the seconds it took."
    s = settings(random_adapter, "unbroken")
    warm = forks.Process(target=int)   # until now the server has imported nothing
    warm.start()
    warm.join()
    begun = time.time()
    whole = finish(s)
    yield whole, time.time() - begun
    remove(run_folder(s.run))


def test_ten_kills_at_random_moments(random_adapter, unbroken):
    "Killed again and again at a random moment of what is left, then resumed: byte for byte the unbroken run."
    expected, seconds = unbroken
    rng, kills, written = random.Random(7), 0, []
    s = settings(random_adapter, "kills")
    while kills < 10 or not any(written):   # at least once in the middle of the work, not only while it starts
        process = start(s)
        process.join(rng.uniform(.1, 1) * seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
            written.append(sum(path.read_bytes().count(b"\n") for path in s.folder.glob("[!p]*.jsonl")))
        else:
            assert process.exitcode == 0 and s.path.read_bytes() == expected
            shutil.rmtree(s.folder)
    assert finish(s) == expected
    remove(run_folder(s.run))


def cpu_seconds(pid: int) -> float:
    "What a process has computed so far."
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_an_interrupt_stops_at_once():
    """Although a batch is being computed that takes longer; what the phase was doing stays in its folder.

    Seconds of the CPU are counted, since other programs may use it too."""
    run = run_folder(f"{RUN}-interrupted")
    remove(run)
    ended = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    process = start_alone("rollouts", "RolloutSettings", "run_phase",
                          small("02_rollouts", run=run.name, adapter="none", limit=400))
    while not (run / "02_rollouts/progress.jsonl").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(.05)
    begun = cpu_seconds(process.pid)
    while cpu_seconds(process.pid) < begun + 1: time.sleep(.05)   # in the first batch
    begun = cpu_seconds(process.pid)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - ended - begun < 3
    assert "Interrupted: stopped; nothing of 02_rollouts is kept; run the phase again" in err
    assert "concurrent" not in err and "_decode" not in err
    line = read_progress(run / "02_rollouts")
    assert (line["doing"], line["step"], line["steps"]) == ("completions", 0, 400 * 11)
    remove(run)


def test_a_lost_shard_and_a_torn_line_cost_only_their_own_records(random_adapter, unbroken):
    expected, _ = unbroken
    s = settings(random_adapter, "lost")
    process, shard = start(s), s.folder / "shard-0.jsonl"
    while not shard.exists() or shard.read_bytes().count(b"\n") < 4: time.sleep(.01)
    process.kill()
    process.join()
    lines = shard.read_bytes().splitlines(keepends=True)
    (s.folder / "shard-1.jsonl").write_bytes(lines[0] + lines[1][:40])   # of another process, one record and a half
    shard.unlink()
    with pytest.warns(UserWarning, match="cut off a torn last line of 40 bytes"): records = shards.gather(s.files)
    assert len(records) == 1
    assert finish(s) == expected
    remove(run_folder(s.run))


def test_a_hole_in_a_text_is_noticed(random_adapter, unbroken):
    "Bytes cut out of a completion between two runs: the line is named, and without it the phase ends as unbroken."
    s = settings(random_adapter, "hole")
    process, shard = start(s), s.folder / "shard-0.jsonl"
    while not shard.exists() or shard.read_bytes().count(b"\n") < 3: time.sleep(.01)
    process.kill()
    process.join()
    lines = shard.read_bytes().splitlines(keepends=True)
    text = json.loads(lines[1])["trajectories"][0]["full_text"].encode()
    holed = lines[1].replace(text[4:8], b"", 1)
    assert holed != lines[1] and json.loads(holed)
    shard.write_bytes(lines[0] + holed + b"".join(lines[2:]))
    with pytest.raises(RecordError, match="shard-0.jsonl, line 2: the record was changed"): shards.gather(s.files)
    shard.write_bytes(lines[0] + b"".join(lines[2:]))
    assert finish(s) == unbroken[0]
    remove(run_folder(s.run))


def test_a_full_disk_loses_nothing_else(random_adapter, unbroken):
    "No file may grow beyond a third of what is needed: a clear message, whole lines, and the same result with room."
    expected, _ = unbroken
    s = settings(random_adapter, "full")
    process = start(s, file_size=len(expected) // 3)
    process.join()
    assert process.exitcode == 1 and "before are safe. Make room, then run the phase again" in log_of(s).read_text()
    records = read_records(s.folder / "shard-0.jsonl")
    assert 0 < len(records) < SMALL["limit"] and not s.path.exists()
    assert finish(s) == expected
    remove(run_folder(s.run))


def test_two_processes_make_the_records_of_one(random_adapter, unbroken):
    s = settings(random_adapter, "two", n_gpu=2)
    rollouts.run_phase(s)
    assert s.path.read_bytes() == unbroken[0]
    remove(run_folder(s.run))


def test_other_settings_and_contradictions_are_refused(random_adapter, unbroken):
    "Another configuration in the same folder, and two records of one question that differ."
    s = settings(random_adapter, "refused")
    s.folder.mkdir(parents=True)
    phase = rollouts.open_phase(s)
    phase.begin()
    with pytest.raises(RunConflict, match="max_new_tokens: 16 there, 17 now"):
        rollouts.run_phase(dataclasses.replace(s, max_new_tokens=17))
    line = json.loads(unbroken[0].splitlines()[0])
    for k, gold in enumerate(("1", "2")):
        (s.folder / f"shard-{k}.jsonl").write_text(json.dumps(seal(line | {"gold_answer": gold})) + "\n")
    with pytest.raises(RecordError, match="differs from the one in another file"): rollouts.run_phase(s)
    assert len(list(s.folder.glob("shard-*.jsonl"))) == 2
    remove(run_folder(s.run))


RIGHT, WRONG = (f"3 * 5 = 15\n12 + 15 = {n}\nAnswer: {n}" for n in (27, 28))
HALF = "3 * 5 = 15\n12 + 15 = 27, so that Mia has"   # its last number is right, and it was cut off


def foreign_record(*trajectories, **changes):
    "A record as another script may have written it."
    return {"question": "Mia has 12 plums and buys 3 bags of 5. How many now?", "gold_answer": "12 + 15 = 27\n#### 27",
            "trajectories": list(trajectories)} | changes


def named(*texts, **changes):
    "Trajectories of arms with invented names."
    return [{"arm_name": f"arm {k}", "full_text": text} | changes for k, text in enumerate(texts)]


@pytest.fixture
def importing(tmp_path):
    "Settings of an import of these records, in a run of its own."
    path, run = tmp_path / "theirs.jsonl", run_folder(RUN + "-import")
    def import_of(*records):
        remove(run)
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
        return rollouts.RolloutSettings(**DEFAULTS | {"run": run.name, "import_from": str(path)})
    yield import_of
    remove(run)


def pairs_of(s):
    "The pairs that phase 3 makes of phase 2."
    defaults = {k: p.default for k, p in parameters_of(ROOT / "nbs/03_preferences.ipynb").items()}
    return preferences.main(preferences.PreferenceSettings(**defaults | {"run": s.run}))


def test_imported_rollouts_feed_the_next_phase(importing):
    "A file as earlier scripts wrote it becomes a phase 2, and gives pairs; a resume with another file is refused."
    claims = {"answer": "27", "num_tokens": 7, "reward": .5, "correct": True}
    trajectories = [{"arm_name": arm.name, "full_text": (RIGHT, WRONG)[k % 2]} | claims for k, arm in enumerate(arms())]
    theirs = [foreign_record(*trajectories, question=f"Mia has 12 plums and buys 3 bags of 5. How many in week {k}?")
              for k in range(5)]
    s = importing(*theirs)
    counts = rollouts.run_phase(s)["counts"]
    assert counts["questions"] == 5 and counts["imported"]["correct"] == {"given": 55, "different": 25}
    assert counts["imported"]["num_tokens"]["different"] == 55
    pairs = pairs_of(s)
    correctness = [p for p in pairs if p["pair_type"] == "correctness"]
    assert correctness and all("27" in p["chosen"] and "28" in p["rejected"] for p in correctness)
    assert read_json(s.folder / "manifest.json")["inputs"].keys() == {"import_from"}
    with open(s.import_from, "a") as f: f.write(json.dumps(foreign_record(trajectories[0])) + "\n")
    with pytest.raises(RunConflict, match="import_from"): rollouts.run_phase(s)


CUTS = ("LENGTH", "max_tokens", "MAX_TOKENS", "model_length", "max_new_tokens", "FinishReason.LENGTH")

@pytest.mark.parametrize("word", CUTS)
def test_a_text_that_was_cut_off_is_never_chosen(importing, word):
    "Whatever word its engine has for it; the right text that ended is chosen alone."
    reasons = [{"finish_reason": reason} for reason in (word, "EOS_TOKEN", "end_turn")]
    s = importing(foreign_record(*(t | reason for t, reason in zip(named(HALF, RIGHT, WRONG), reasons))))
    assert rollouts.run_phase(s)["counts"]["cut_off"] == 1
    assert [t["finish_reason"] for t in read_records(s.path)[0]["trajectories"]] == ["length", "stop", "stop"]
    assert {p["chosen"] for p in pairs_of(s)} == {RIGHT}


def test_without_a_reason_the_text_decides(importing, capsys):
    "Half a sentence is cut off and never chosen. A text with a marked answer may be, and its reason is unknown."
    s = importing(foreign_record(*named(HALF, RIGHT, WRONG)))
    counts = rollouts.run_phase(s)["counts"]
    assert [t["finish_reason"] for t in read_records(s.path)[0]["trajectories"]] == ["length", "unknown", "unknown"]
    assert {p["chosen"] for p in pairs_of(s)} == {RIGHT}
    assert counts["lacking"]["finish_reason"] == 3 and counts["cut_off"] == 1
    assert "3 of 3 trajectories have no finish_reason. Used instead: unknown, or length" in capsys.readouterr().out


def test_arm_names_hold_slashes(importing):
    s = importing(foreign_record(*({"arm_name": name, "full_text": RIGHT} for name in ("a/b", "c/b"))))
    rollouts.run_phase(s)
    assert [t["arm_name"] for t in read_records(s.path)[0]["trajectories"]] == ["a/b", "c/b"]


def test_trajectories_without_names_are_numbered_and_announced(importing, capsys):
    "Together with what that switches off: without probes s_probe has no value."
    s = importing(foreign_record(*({"full_text": (RIGHT, WRONG)[k % 2], "finish_reason": "stop"} for k in range(11))))
    counts = rollouts.run_phase(s)["counts"]
    record = read_records(s.path)[0]
    assert [t["arm_name"] for t in record["trajectories"]] == [f"unnamed_{k}" for k in range(11)]
    assert record["metrics"]["s_probe"] is None and "finish_reason" not in counts["lacking"]
    assert all(counts["lacking"][name] == 11 for name in ("arm_name", "prompt", "seed", "num_tokens"))
    out = capsys.readouterr().out
    assert "11 of 11 trajectories have no arm_name. Used instead: unnamed_0" in out
    assert "Not available: probes: s_probe" in out and "generate the rollouts again" in out
    assert all(p["chosen_arm"] != p["rejected_arm"] for p in pairs_of(s))


TRAJECTORY = { # changes to a trajectory → the message
    "unknown reason": ({"finish_reason": "tired"}, "'finish_reason' has an unknown word, 'tired'"),
    "text with half a pair": ({"full_text": "\udfff 27"}, "full_text' holds half of a surrogate pair"),
    "name with half a pair": ({"arm_name": "\ud800"}, "arm_name' holds half of a surrogate pair"),
    "endless tokens": ({"num_tokens": 10**400}, "num_tokens' "),
    "too many tokens": ({"num_tokens": 10**9}, "'num_tokens' must be a number of tokens, 0 to 10,000,000, got 1000"),
    "negative tokens": ({"num_tokens": -7}, "'num_tokens' must be a number of tokens, 0 to 10,000,000, got -7"),
    "tokens as text": ({"num_tokens": "7"}, "'num_tokens' must be a number of tokens, 0 to 10,000,000, got '7'"),
    "answer true": ({"answer": True}, "'answer' must be text or a number, got True"),
    "reward not a number": ({"reward": float("nan")}, "'reward' must be a number between"),
    "endless reward": ({"reward": 10**400}, "reward' "),
}
RECORD = { # changes to a record → the message
    "question null": ({"question": None}, "'question' must be text, got None"),
    "question a number": ({"question": 12}, "'question' must be text, got 12"),
    "question with half a pair": ({"question": "Mia \ud800?"}, "'question' holds half of a surrogate pair"),
    "no list": ({"trajectories": {"0": {}}}, "'trajectories' must be list"),
    "gold true": ({"gold_answer": True}, "'gold_answer' must be text or a number, got True"),
    "gold null": ({"gold_answer": None}, "'gold_answer' must be text or a number, got None"),
    "endless metric": ({"metrics": {"s_wm": 10**400}}, "'metrics.s_wm' "),
    "metric as text": ({"metrics": {"s_wm": "high"}}, "'metrics.s_wm' must be a number between"),
    "metrics a list": ({"metrics": [1]}, "'metrics' must be an object, got [1]"),
}
UNUSABLE = {name: (foreign_record(*named(RIGHT, **change)), m) for name, (change, m) in TRAJECTORY.items()}
UNUSABLE |= {name: (foreign_record(*named(RIGHT), **change), m) for name, (change, m) in RECORD.items()}
UNUSABLE |= {
    "no object": (foreign_record("27"), "line 1, trajectory 0: expected an object, got str"),
    "two of a name": (foreign_record(*named(RIGHT, WRONG, arm_name="a")),
                      "line 1, trajectory 1: field 'arm_name' is 'a', as in trajectory 0"),
    "one without a name": (foreign_record(*named(RIGHT), {"full_text": WRONG}),
                           "line 1, trajectory 1: field 'arm_name' is missing"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_cannot_be_used_is_refused_by_its_place(importing, case):
    "File, line, trajectory and field, and nothing is written."
    record, message = UNUSABLE[case]
    s = importing(record)
    with pytest.raises(RecordError) as refused: rollouts.run_phase(s)
    assert message in str(refused.value) and "theirs.jsonl, line 1" in str(refused.value)
    assert case not in TRAJECTORY or "trajector" in str(refused.value)
    assert not s.folder.exists()
