"Samples that depend on their request alone, engines that end with their parent, and pickled checkpoints of a hub."
import importlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from conftest import fresh, small
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file

from looper_math import engines, models, runs, serving
from looper_math.data import load_questions
from looper_math.prompts import arms, build_prompt, sample_seed
from looper_math.records import ROOT, run_folder, write_json

BASE = "data/pocket-base"


@pytest.fixture(scope="module")
def pocket(): return models.load_base(BASE, "float32"), models.load_tokenizer(BASE)


@pytest.fixture(scope="module")
def requests():
    "The arms of four questions, shorter and longer."
    questions = load_questions("data/pocket/practice.jsonl", limit=4)
    return [engines.Request(f"{q['question_id']}/{a.name}", build_prompt(q["question"], a.instruction), a.temperature,
                            a.top_p, sample_seed(a, q["question_id"]), 12 + k % 9)
            for q in questions for k, a in enumerate(arms())]


@pytest.fixture(scope="module")
def together(requests, pocket): return {c.id: c for c in engines.generate_transformers(requests, *pocket)}


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_sample_is_a_function_of_its_request(data, requests, together, pocket):
    "Any selection in any order and batches of any size: the completions that all of them together had."
    chosen = data.draw(st.permutations(requests))[:data.draw(st.integers(1, len(requests)))]
    made = engines.generate_transformers(chosen, *pocket, batch_size=data.draw(st.integers(1, 40)))
    assert made == [together[r.id] for r in chosen]


def test_one_engine_for_the_base_and_its_adapters(requests, random_adapter, other_adapter):
    "To the last token what an engine for each of them gives, also for the base after an adapter was merged."
    folders = [random_adapter, None, other_adapter]
    alone = {}
    for folder in folders:
        with engines.opened("transformers", BASE, folder, "float32") as generate: alone[folder] = generate(requests)
    mixed = [replace(r, id=f"{k}:{r.id}", adapter=folders[k % 3]) for r in requests for k in range(3)]
    with engines.opened("transformers", BASE, None, "float32", adapters=[random_adapter, other_adapter]) as generate:
        for _ in range(2):
            made = {c.id: c for c in generate(mixed)}
            for k, folder in enumerate(folders):
                assert [replace(made[f"{k}:{r.id}"], id=r.id) for r in requests] == alone[folder]
        with pytest.raises(ValueError, match="adapter elsewhere is not among those that the engine was opened with"):
            generate([replace(requests[0], adapter="elsewhere")])
    assert len({tuple(c.text for c in texts) for texts in alone.values()}) == 3


def test_the_base_is_loaded_once_for_all_adapters(requests, random_adapter, other_adapter, monkeypatch):
    loaded, load = [], models.load_base
    monkeypatch.setattr(models, "load_base", lambda *a: loaded.append(a) or load(*a))
    with engines.opened("transformers", BASE, random_adapter, "float32", adapters=[other_adapter]) as generate:
        generate([replace(r, adapter=a) for r, a in zip(requests, (None, random_adapter, other_adapter))])
    assert len(loaded) == 1


@pytest.fixture
def hanging_vllm(tmp_path, monkeypatch):
    "A module vllm whose import never ends, in a child process that prints a line as soon as Python runs."
    (tmp_path / "vllm.py").write_text("import time; time.sleep(600)")
    (tmp_path / "sitecustomize.py").write_text("print('a library waits for the network', flush=True)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")


@pytest.mark.parametrize("phase", ["02_rollouts", "05_eval"])
def test_a_start_of_vllm_that_never_ends(hanging_vllm, random_adapter, phase, capsys):
    "The phase stops after its limit; log and last lines are in the error, and the log is in the run's folder."
    module, name = runs.SETTINGS[phase]
    models_of = {"models": {"base": "", "sft": random_adapter}, "comparisons": []} if phase == "05_eval" else {}
    changes = {"run": fresh(f"hanging-{module}").name, "engine": "vllm", "serving": {"start_minutes": .2}, "limit": 2}
    if phase == "02_rollouts": changes["adapter"] = random_adapter
    phase_module = importlib.import_module(f"looper_math.{module}")
    s = getattr(phase_module, name)(**small(phase, **changes, **models_of))
    with pytest.raises(serving.ChildFailed) as e: phase_module.run_phase(s)
    log = f"outputs/{s.run}/{phase}/vllm-0.log"
    assert "not ready after 0.2 minutes; raise serving.start_minutes" in str(e.value)
    assert f"its log {log}:\na library waits for the network" in str(e.value)
    assert "a library waits for the network" in (ROOT / log).read_text()
    assert capsys.readouterr().out.count(f"vLLM starts; its log is {log}") == 1
    shutil.rmtree(run_folder(s.run))


ENGINE = "import time; from looper_math.serving import serve; serve(lambda settings: lambda jobs: time.sleep(600))"
PARENT = f"""
import time
from looper_math.serving import Child
print("the parent's script runs", flush=True)
child = Child({ENGINE!r})
child.send({{}})
child.receive()
child.send(["long"])
print(child.process.pid, flush=True)
time.sleep(600)
"""


def has_ended(pid):
    try: return ") Z " in Path(f"/proc/{pid}/stat").read_text()    # ended, and not yet fetched by init
    except (FileNotFoundError, ProcessLookupError): return True


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_engine_does_not_outlive_its_parent(how, tmp_path):
    """The engine ends although it is in the middle of its work, whether its parent is killed or interrupted.

    The parent is a script without a `__main__` guard, and the engine does not run it again."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    process = subprocess.Popen([sys.executable, str(script)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert process.stdout.readline() == "the parent's script runs\n"
    engine = int(process.stdout.readline())
    assert not has_ended(engine)
    process.send_signal(how)
    process.wait()
    assert process.stdout.read() == ""
    deadline = time.time() + 10
    while not has_ended(engine):
        assert time.time() < deadline, "the engine is still running"
        time.sleep(.05)
    process.stdout.close()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A hub cache without network that holds a model as two pickled shards, as Abel's."
    snapshot = tmp_path / "hub/models--someone--pickled/snapshots/0123abcd"
    shutil.copytree(ROOT / BASE, snapshot)
    weights = load_file(snapshot / "model.safetensors")
    (snapshot / "model.safetensors").unlink()
    shards = {f"pytorch_model-0000{k + 1}-of-00002.bin": dict(list(weights.items())[k::2]) for k in range(2)}
    for name, part in shards.items(): torch.save(part, snapshot / name)
    weight_map = {w: name for name, part in shards.items() for w in part}
    write_json(snapshot / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": weight_map})
    refs = tmp_path / "hub/models--someone--pickled/refs"
    refs.mkdir()
    (refs / "main").write_text("0123abcd")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(models, "CONVERTED", tmp_path / "converted")
    return weights


def test_a_pickled_hub_model_is_converted_once(hub, monkeypatch):
    "By the first of several threads, while the others wait; then all load the same safetensors."
    calls, convert = [], models._convert
    monkeypatch.setattr(models, "_convert", lambda *a: (calls.append(a), convert(*a)))
    sources = []
    threads = [threading.Thread(target=lambda: sources.append(models.source("someone/pickled"))) for _ in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(calls) == 1 and len(set(sources)) == 1
    loaded = models.load_base("someone/pickled", "float32").state_dict()
    assert all(torch.equal(loaded[k], w) for k, w in hub.items())
    with pytest.raises(FileNotFoundError): models.source("someone/else")
