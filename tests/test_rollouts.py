"Phase 2 survives: kills at any moment, torn lines, lost shards, a full disk, other numbers of processes; and takes rollouts from elsewhere."
import dataclasses
import json
import multiprocessing
import os
import random
import resource
import shutil
import time

import pytest

from conftest import RUN
from looper_math import preferences, rollouts
from looper_math.records import ROOT, RecordError, RunConflict, read_json, read_records, run_folder, seal
from looper_math.prompts import arms
from looper_math.runs import parameters_of

DEFAULTS = {k: p.default for k, p in parameters_of(ROOT / "nbs/02_rollouts.ipynb").items()}
SMALL = {"limit": 12, "chunk": 3, "max_new_tokens": 16, "batch_size": 16}

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
    made = finish(s)
    yield made, time.time() - begun
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
            written.append(sum(path.read_bytes().count(b"\n") for path in s.folder.glob("*.jsonl")))
        else:
            assert process.exitcode == 0 and s.path.read_bytes() == expected
            shutil.rmtree(s.folder)
    assert finish(s) == expected
    remove(run_folder(s.run))


def test_a_lost_shard_and_a_torn_line_cost_only_themselves(random_adapter, unbroken):
    expected, _ = unbroken
    s = settings(random_adapter, "lost")
    process, shard = start(s), s.folder / "shard-0.jsonl"
    while not shard.exists() or shard.read_bytes().count(b"\n") < 4: time.sleep(.01)
    process.kill()
    process.join()
    lines = shard.read_bytes().splitlines(keepends=True)
    (s.folder / "shard-1.jsonl").write_bytes(lines[0] + lines[1][:40])   # one whole record of another process, and half of one
    shard.unlink()
    with pytest.warns(UserWarning, match="cut off a torn last line of 40 bytes"): found = rollouts.gather(s)
    assert len(found) == 1
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
    with pytest.raises(RecordError, match="shard-0.jsonl, line 2: the record was changed after it was written"): rollouts.gather(s)
    shard.write_bytes(lines[0] + b"".join(lines[2:]))
    assert finish(s) == unbroken[0]
    remove(run_folder(s.run))


def test_a_full_disk_loses_nothing_else(random_adapter, unbroken):
    "A file may not grow beyond a third of what is needed: a clear message, whole lines only, and the same end once there is room."
    expected, _ = unbroken
    s = settings(random_adapter, "full")
    process = start(s, file_size=len(expected) // 3)
    process.join()
    assert process.exitcode == 1 and "before are safe. Make room, then run the phase again" in log_of(s).read_text()
    kept = read_records(s.folder / "shard-0.jsonl")
    assert 0 < len(kept) < SMALL["limit"] and not s.path.exists()
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
    with pytest.raises(RunConflict, match="max_new_tokens: 16 there, 17 now"): rollouts.run_phase(dataclasses.replace(s, max_new_tokens=17))
    line = json.loads(unbroken[0].splitlines()[0])
    for k, gold in enumerate(("1", "2")): (s.folder / f"shard-{k}.jsonl").write_text(json.dumps(seal(line | {"gold_answer": gold})) + "\n")
    with pytest.raises(RecordError, match="differs from the one in another file"): rollouts.run_phase(s)
    assert len(list(s.folder.glob("shard-*.jsonl"))) == 2
    remove(run_folder(s.run))


def test_imported_rollouts_feed_the_next_phase(tmp_path):
    "A file as earlier scripts wrote it becomes a phase 2 of which pairs are made; a resume with another file is refused."
    path = tmp_path / "theirs.jsonl"
    trajectories = [{"arm_name": arm.name, "full_text": f"3 * 5 = 15\n12 + 15 = {27 + k % 2}\nAnswer: {27 + k % 2}", "answer": "27", "num_tokens": 7, "reward": .5, "correct": True} for k, arm in enumerate(arms())]
    theirs = [{"question": f"Mia has 12 plums and buys 3 bags of 5. How many now, in week {k}?", "gold_answer": "12 + 15 = 27\n#### 27", "trajectories": trajectories} for k in range(5)]
    path.write_text("".join(json.dumps(t) + "\n" for t in theirs))
    run = run_folder(RUN + "-import")
    remove(run)
    s = rollouts.RolloutSettings(**DEFAULTS | {"run": run.name, "import_from": str(path)})
    counts = rollouts.run_phase(s)["counts"]
    assert counts["questions"] == 5 and counts["imported"]["correct"] == {"given": 55, "different": 25} and counts["imported"]["num_tokens"]["different"] == 55
    defaults = {k: p.default for k, p in parameters_of(ROOT / "nbs/03_preferences.ipynb").items()}
    pairs = preferences.main(preferences.PreferenceSettings(**defaults | {"run": run.name}))
    assert pairs and all("27" in p["chosen"] and "28" in p["rejected"] for p in pairs if p["pair_type"] == "correctness")
    assert read_json(s.folder / "manifest.json")["inputs"].keys() == {"import_from"}
    path.write_text(json.dumps(theirs[0]) + "\n")
    with pytest.raises(RunConflict, match="import_from"): rollouts.run_phase(s)
    remove(run)
