"What is wrong with a host is said before a run starts: `device: cuda`, and `looper doctor`."
import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import nbformat
import pytest
import torch
from conftest import RUN, small
from safetensors.torch import load_file
from sentencepiece import SentencePieceTrainer
from transformers import MistralConfig

from looper_math import cli, doctor, launch, models, records, runs, serving
from looper_math.records import ROOT, SettingsError
from looper_math.shards import write_records

OLD = "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver"


@pytest.fixture
def old_driver(monkeypatch):
    "A host whose driver is too old for the installed torch: torch sees no GPU, and says why when it is asked."
    def init(): raise RuntimeError(OLD)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)


def built(phase, **changes):
    return runs.build_settings(phase, small(phase) | {"run": f"{RUN}-doctor"} | changes)


# --- the parameter `device`

COMPUTING = ("01_sft", "02_rollouts", "04_dpo", "05_eval", "06_online_rl")


@pytest.mark.parametrize("phase", COMPUTING)
def test_a_phase_is_refused_with_the_reason_of_torch(phase, old_driver):
    "B2: such a host trained on its CPUs, in silence."
    with pytest.raises(runs.Refused, match=f"{phase}: device is cuda, and there is no usable CUDA device: {OLD[:40]}"):
        built(phase, device="cuda")
    assert built(phase, device="auto")["device"] == "auto"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_abel_is_refused_on_a_host_without_a_gpu_and_nothing_is_written():
    "As the user types it. The first phase would load a 7B, so an accepted run is ended after two minutes."
    folder, program = records.run_folder(f"{RUN}-abel"), "from looper_math.cli import looper; looper()"
    command = [sys.executable, "-c", program, "run", "abel-8xh100", "--run", folder.name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "01_sft: device is cuda, and there is no usable CUDA device: Torch not compiled with CUDA" in done.stderr
    assert not folder.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_worker_checks_it_again(monkeypatch, tmp_path):
    "Settings that were made on a host with a GPU reach a worker that has none."
    from looper_math.rollouts import RolloutSettings
    values = small("02_rollouts", run=f"{RUN}-worker")
    job = {"module": "looper_math.rollouts", "settings_class": "RolloutSettings", "world_size": 1,
           "settings": vars(records.settings(RolloutSettings, values)) | {"device": "cuda"}}
    records.write_json(tmp_path / "job.json", job)
    monkeypatch.setattr(sys, "argv", ["worker", str(tmp_path / "job.json")])
    with pytest.raises(SettingsError, match="no usable CUDA device"):
        launch.worker()
    assert not records.run_folder(f"{RUN}-worker").exists()


def test_cpu_hides_the_gpus_from_the_phase_and_its_children(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert built("02_rollouts", device="cpu")["device"] == "cpu"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SettingsError, match="has used a GPU already: restart the kernel"):
        launch.check_device("cpu")


def test_one_run_computes_on_one_kind_of_device(capfd):
    "They are checked in one process, and a process cannot show GPUs again that it has hidden."
    flags = ["-p", "01.device=cpu", "-p", "04.device=cuda"]
    with pytest.raises(SystemExit):
        cli.looper(["run", "smoke", "--run", f"{RUN}-mixed", *flags])
    assert "01_sft.device is cpu and 04_dpo.device is cuda; give all phases the same" in capfd.readouterr().err
    assert not records.run_folder(f"{RUN}-mixed").exists()


def test_a_recorded_run_may_change_its_device(tmp_path, monkeypatch):
    "The parameter guards a run and does not enter its results."
    from looper_math import rollouts
    name = f"{RUN}-resumed"
    of = lambda device: records.settings(rollouts.RolloutSettings, small("02_rollouts", run=name, adapter="none",
                                                                         device=device))
    try:
        rollouts.open_phase(of("auto")).begin()
        monkeypatch.setattr(launch, "check_device", lambda device: None)
        assert rollouts.open_phase(of("cuda"))
    finally:
        shutil.rmtree(records.run_folder(name), ignore_errors=True)


# --- fewer visible GPUs than processes


def test_visible_gpus_shorter_than_the_processes(monkeypatch):
    "An IndexError in the worker before."
    worker = {"LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "3"}
    with pytest.raises(ValueError, match="'3' and names 1 GPUs, so worker 1, counted from 0, has none: name n_gpu"):
        serving.child_environment(worker)
    assert serving.child_environment(worker | {"LOCAL_RANK": "0"})["CUDA_VISIBLE_DEVICES"] == "3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SettingsError, match="at most 1, the GPUs of this host, got 2; CUDA_VISIBLE_DEVICES is '3'"):
        launch.check_processes(2)


def test_hidden_gpus_stay_hidden_from_an_engine():
    env = {"LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": ""}
    assert serving.child_environment(env)["CUDA_VISIBLE_DEVICES"] == ""


# --- the base: at a revision, and there before any worker starts


def test_a_revision_is_passed_to_the_hub(monkeypatch):
    "Both for the safetensors and for the pickles of a repository without any."
    asked = []

    def download(name, revision=None, allow_patterns=None, **options):
        asked.append((name, revision))
        return ROOT / "data"  # holds no safetensors

    monkeypatch.setattr(models, "snapshot_download", download)
    models.source(f"GAIR/Abel-7B-002@{'0' * 40}")
    models.source("GAIR/Abel-7B-002")
    assert asked == 2 * [("GAIR/Abel-7B-002", "0" * 40)] + 2 * [("GAIR/Abel-7B-002", None)]


def test_cards_and_criteria_know_a_base_at_a_revision():
    from looper_math import cards, criteria
    parameters = {"base": "GAIR/Abel-7B-002@main", "questions": "madrylab/gsm8k-platinum"}
    metadata = cards._model_metadata("m", parameters, {"correct": 1, "n": 2}, "dpo")
    assert metadata.base_model == "GAIR/Abel-7B-002"
    evaluation = {"parameters": parameters, "metrics": {"models": {"dpo": {"correct": 84, "n": 100, "cut_off": 0}}}}
    judged = criteria._accuracy_criterion(("dpo", 83, 87, "guide"), {"05_eval": evaluation})
    assert judged.verdict != "not applicable"


@pytest.mark.parametrize("phase", ["01_sft", "04_dpo", "06_online_rl"])
def test_the_base_is_fetched_before_workers_start(phase):
    "Else eight workers download it at once. Phases 2 and 5 do it with the checks of their inputs."
    cells = [c.source for c in nbformat.read(ROOT / f"nbs/{phase}.ipynb", 4).cells if c.cell_type == "code"]
    run = next(source for source in cells if "launch.launch(" in source)
    assert 0 < run.find("models.source(") < run.find("launch.launch(")


# --- `looper doctor`: each row with a host that fails it and one that passes

H100 = "NVIDIA H100 80GB HBM3, {driver}, 81559, {free}\n"
EIGHT = doctor.Demand("abel", {"01_sft": {"device": "cuda", "n_gpu": 8}, "02_rollouts": {"engine": "vllm", "n_gpu": 8}})
ALONE = doctor.Demand("pocket", {"01_sft": {"device": "auto", "n_gpu": 0}, "02_rollouts": {"engine": "auto"}})
GB = 10**9
WEIGHTS = 15 * GB


def host(gpus=8, driver="580.65.06", free=81000, **changes):
    "A host with H100s, as nvidia-smi describes it."
    table = doctor.read_gpus(gpus * H100.format(driver=driver, free=free))
    readings = dict(gpus=table, no_gpus="" if table else "there is no nvidia-smi", torch="2.13.0", cuda="13.0",
                    problem="", visible=None, memory=10**12, shm=50 * GB)
    return doctor.Host(**readings | changes)


MACHINE = { # row → the check, a host that passes, a host that fails, what the line then says
    "driver": (doctor.check_driver, host(), host(driver="535.104.05"), "535.104.05; torch 2.13.0 is built for "
               "CUDA 13.0; wanted: at least 580 for CUDA 13; to mend it: update the driver"),
    "no driver": (doctor.check_driver, host(driver="535.104.05", cuda="12.8"), host(0), "a driver with 8 GPUs"),
    "torch": (doctor.check_torch, host(), host(problem=OLD), OLD),
    "torch for the CPU": (doctor.check_torch, host(), host(cuda=None, problem="Torch not compiled with CUDA enabled"),
                          "to mend it: install torch's build for CUDA"),
    "GPUs": (doctor.check_gpus, host(), host(4), "GPUs: 4 (NVIDIA H100 80GB HBM3); wanted: 8, which is n_gpu"),
    "visible GPUs": (doctor.check_gpus, host(visible="0,1,2,3,4,5,6,7"), host(visible="0,1"),
                     "CUDA_VISIBLE_DEVICES is '0,1'; wanted: 8"),
    "GPU memory": (lambda h, d: doctor.check_gpu_memory(h, d, WEIGHTS), host(), host(free=20000),
                   "21.0 GB of 85.5 GB free on the fullest of 8; wanted: 22.0 GB"),
    "vLLM's share": (lambda h, d: doctor.check_gpu_memory(h, d, WEIGHTS), host(), host(free=60000),
                     "wanted: 92% of the whole, which vLLM takes"),
    "host memory": (lambda h, d: doctor.check_memory(h, d, WEIGHTS), host(), host(memory=30 * GB),
                    "30.0 GB free; wanted: 31.0 GB for 8 processes"),
    "/dev/shm": (doctor.check_shm, host(), host(shm=64 * 2**20), "wanted: 1.0 GB; to mend it: give the container more"),
}


@pytest.mark.parametrize("row", MACHINE)
def test_a_row_of_the_machine(row):
    check, good, bad, words = MACHINE[row]
    assert check(good, EIGHT).status == "ok"
    finding = check(bad, EIGHT)
    assert finding.status == "failed" and finding.wanted and finding.mend and words in doctor.line(finding)


def test_a_recipe_for_the_cpu_needs_no_gpu():
    bare = host(0, cuda=None, problem="Torch not compiled with CUDA enabled", memory=16 * GB, shm=GB)
    checks = (doctor.check_driver, doctor.check_torch, doctor.check_gpus, doctor.check_shm)
    assert [check(bare, ALONE).status for check in checks] == 4 * ["ok"]
    assert doctor.check_gpu_memory(bare, ALONE, GB).status == "ok"
    assert doctor.check_memory(bare, ALONE, WEIGHTS).status == "failed"


def test_what_nvidia_smi_does_not_say_is_not_checked():
    silent = host(free="[N/A]", gpus=8)
    unknown = replace(silent, gpus=[gpu._replace(total=0) for gpu in silent.gpus])
    assert doctor.check_gpu_memory(unknown, EIGHT, WEIGHTS).status == "not checked"
    assert doctor.check_driver(host(cuda="14.0"), EIGHT).status == "not checked"
    assert doctor.check_gpu_memory(host(0), EIGHT, WEIGHTS).status == "not checked"


SCRIPTS = [("exit 9", "nvidia-smi failed"), ("echo NVIDIA H100, 580.1, 81559, 81000", "")]


@pytest.mark.parametrize("script, words", SCRIPTS)
def test_nvidia_smi_is_asked(tmp_path, monkeypatch, script, words):
    "It fails where the kernel's module and the library do not match, and prints that to stdout."
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = doctor.read_host()
    assert words in found.no_gpus and [gpu.driver for gpu in found.gpus] == ([] if words else ["580.1"])


def test_the_row_of_a_disk(tmp_path):
    assert doctor.check_disk("disk", tmp_path / "new/folder", 5 * GB, lambda place: 6 * GB).status == "ok"
    finding = doctor.check_disk("disk", tmp_path / "new/folder", 5 * GB, lambda place: 4 * GB)
    assert finding.status == "failed" and f"4.0 GB free at {tmp_path}; wanted: 5.0 GB" in doctor.line(finding)


def test_the_row_of_the_compiler(tmp_path):
    "It compiles: a compiler without Python's headers fails as one that is missing."
    assert doctor.check_compiler(EIGHT).status == "ok"
    missing, headless = doctor.check_compiler(EIGHT, "no-cc"), doctor.check_compiler(EIGHT, "", str(tmp_path))
    assert missing.status == "failed" and "there is no C compiler 'no-cc'" in missing.found
    assert headless.status == "failed" and "Python.h" in headless.found


LOCKS = {"both get it": lambda file: True, "it stays": lambda file: False}


def test_the_row_of_the_locks(tmp_path):
    "The first finding starts two more processes; the others replace what the second process says."
    assert doctor.check_locks(tmp_path / "outputs").status == "ok"
    both, stays = (doctor.check_locks(tmp_path, child) for child in LOCKS.values())
    assert "two processes got the same lock" in both.found and "stays when its process gives it up" in stays.found
    assert {both.status, stays.status} == {"failed"} and list((tmp_path / "outputs").iterdir()) == []


def test_locks_that_the_file_system_lacks(tmp_path):
    def unsupported(file): raise OSError("OSError: [Errno 37] No locks available")

    assert "No locks available" in doctor.check_locks(tmp_path, unsupported).found


def questions(*texts): return [{"question": text, "answer": "#### 1"} for text in texts]


def demand_on(tmp_path, **files):
    "A recipe with these files of questions, each `phase_name` → texts."
    values = {"01_sft": {"train": "", "limit": 0, "targets": "human", "dev": "", "dev_limit": 0},
              "02_rollouts": {"questions": "", "limit": 0, "import_from": ""}, "05_eval": {"questions": "", "limit": 0}}
    places = {"train": ("01_sft", "train"), "dev": ("01_sft", "dev"), "practice": ("02_rollouts", "questions"),
              "test": ("05_eval", "questions")}
    for name, texts in files.items():
        phase, parameter = places[name]
        values[phase][parameter] = str(tmp_path / f"{name}.jsonl")
        if texts is not None: write_records(tmp_path / f"{name}.jsonl", questions(*texts))
    return doctor.Demand("r", values)


OVERLAPS = { # files → status of the three rows
    "apart": (dict(train="ab", practice="c", dev="d", test="e"), ["ok", "ok", "ok"]),
    "trained on a test question": (dict(train="ab", test="B"), ["failed", "ok", "ok"]),
    "trained on a dev question": (dict(practice="ab", dev="b"), ["failed", "ok", "ok"]),
    "dev in test": (dict(dev="ab", test="b"), ["ok", "failed", "ok"]),
    "rollouts on SFT's questions": (dict(train="ab", practice="b"), ["ok", "ok", "warning"]),
    "a file is missing": (dict(train="ab", practice="c", dev="d", test=None), ["not checked", "not checked", "ok"]),
}


@pytest.mark.parametrize("case", OVERLAPS)
def test_the_rows_of_the_data(case, tmp_path):
    files, expected = OVERLAPS[case]
    findings, *sets = doctor.read_questions(demand_on(tmp_path, **files))
    assert [f.status for f in findings] == ["failed" if texts is None else "ok" for texts in files.values()]
    assert [f.status for f in doctor.check_overlaps(*sets)] == expected


def test_only_the_questions_within_the_limit_count(tmp_path):
    demand = demand_on(tmp_path, train="ab", test="b")
    demand.values["01_sft"]["limit"] = 1
    assert doctor.check_overlaps(*doctor.read_questions(demand)[1:])[0].status == "ok"


def test_the_row_of_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.constants, "HF_HUB_CACHE", str(tmp_path))

    def unreachable(name): raise OSError("no route to host\nmore")

    reached, room = doctor.check_hub("a/b@v1", lambda name: 10**18, offline=False)
    assert (reached.status, room.status) == ("ok", "failed")
    assert doctor.check_hub("a/b", lambda name: 0, offline=False)[1].status == "ok"
    lost, = doctor.check_hub("a/b", unreachable, offline=False)
    assert lost.status == "failed" and "no route to host; a/b is not in the cache" in lost.found
    (tmp_path / "models--a--b/snapshots/1").mkdir(parents=True)
    (tmp_path / "models--a--b/snapshots/1/config.json").write_text("{}")
    assert [doctor.check_hub("a/b@v1", unreachable, offline=offline)[0].status for offline in (0, 1)] == ["ok", "ok"]


def test_the_row_of_the_revision():
    commit = "0" * 39 + "1"
    folder = ROOT / f"models--a--b/snapshots/{commit}"
    assert doctor.check_revision(f"a/b@{commit}", folder, "abel").status == "ok"
    for name in ("a/b", "a/b@main"):
        finding = doctor.check_revision(name, folder, "abel")
        assert finding.status == "warning"
        assert f"in nbs/recipes/abel/common.yaml write base: a/b@{commit}" in finding.mend


def copy_of(tmp_path, **config):
    "The pocket base with other entries of its configuration."
    folder = tmp_path / "base"
    shutil.copytree(ROOT / "data/pocket-base", folder)
    records.write_json(folder / "config.json", records.read_json(folder / "config.json", {}) | config)
    return folder


def test_a_pickled_base_is_converted_once(tmp_path, monkeypatch):
    folder = copy_of(tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(models, "CONVERTED", tmp_path / "converted")
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as m:
        m.setattr(doctor.shutil, "disk_usage", lambda place: full)
        assert "converting these pickles takes" in doctor.base_findings(str(folder), "r")[-1].found
    assert not (tmp_path / "converted").exists()
    converted = doctor.Finding("weights", "ok", "883,840, converted from pickles")
    assert doctor.base_findings(str(folder), "r")[-1] == converted
    monkeypatch.setattr(models, "_convert", None)  # a worker would convert again
    assert doctor.base_findings(str(folder), "r")[-1] == converted


def test_a_base_that_is_not_there_or_cut_off(tmp_path):
    missing, = doctor.base_findings(str(tmp_path / "none"), "r")
    assert missing.status == "failed" and "no such model folder" in missing.found
    folder = copy_of(tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "cut off" in doctor.base_findings(str(folder), "r")[-1].found


def test_the_rows_of_the_tokenizer(tmp_path):
    rows = lambda folder: {f.what: f for f in doctor.tokenizer_findings(str(folder))}
    good = rows(ROOT / "data/pocket-base")
    assert {f.status for what, f in good.items() if what != "tokenizer"} == {"ok"}
    assert good["tokenizer"].status == "not checked" and "no tokenizer.model" in good["tokenizer"].found
    folder = copy_of(tmp_path)
    records.write_json(folder / "generation_config.json", {"eos_token_id": 9999, "temperature": .6})
    bad = rows(folder)
    assert "9,999" in bad["tokenizer"].found and "embedding has 752 rows" in bad["end tokens"].found
    assert bad["generation config"].status == "failed" and bad["padding token"].status == "ok"


@pytest.fixture
def sentencepiece_folder(tmp_path):
    "A Mistral's folder without weights, whose tokenizer sentencepiece has trained on three sentences."
    sentences = ["Question: How many apples?", "Question: Mia has 12 apples.", "Answer: Let's think step by step."]
    options = dict(vocab_size=340, model_type="bpe", byte_fallback=True, normalization_rule_name="identity")
    SentencePieceTrainer.train(sentence_iterator=iter(50 * sentences), model_prefix=str(tmp_path / "tokenizer"),
                               remove_extra_whitespaces=False, minloglevel=2, **options)
    MistralConfig(vocab_size=340).save_pretrained(tmp_path)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    records.write_json(tmp_path / "tokenizer_config.json", special | {"tokenizer_class": "LlamaTokenizer"})
    return tmp_path


def test_the_row_of_the_tokenizer_against_sentencepiece(sentencepiece_folder):
    "And with a `tokenizer.json` beside it that makes other tokens."
    assert doctor.tokenizer_findings(str(sentencepiece_folder))[0] == doctor.Finding(
        "tokenizer", "ok", "gives sentencepiece's tokens of a prompt")
    shutil.copy(ROOT / "data/pocket-base/tokenizer.json", sentencepiece_folder)
    finding = doctor.tokenizer_findings(str(sentencepiece_folder))[0]
    assert finding.status == "failed" and "sentencepiece reads" in finding.found


def test_the_row_of_the_padding_token(tmp_path):
    "No special token has a row of the embedding."
    folder = copy_of(tmp_path)
    settings = records.read_json(folder / "tokenizer_config.json", {})
    for name in ("pad_token", "unk_token", "eos_token"): settings[name] = f"<beyond {name}>"
    records.write_json(folder / "tokenizer_config.json", settings)
    padding, = [f for f in doctor.tokenizer_findings(str(folder)) if f.what == "padding token"]
    assert padding.status == "failed" and "embedding" in padding.found


# --- an adapter, saved, loaded and served


def test_the_row_of_the_adapter(monkeypatch):
    "On the base, on a copy of two layers where the memory is short, and not at all without the GPU of the recipe."
    base, here = str(ROOT / "data/pocket-base"), host(0, problem="no CUDA")
    check = lambda h, d: doctor.check_adapter_path(base, h, d, GB)
    assert "transformers served 8 tokens on the base" in check(here, ALONE).found
    assert "on a copy of the base with two layers" in check(replace(here, memory=GB), ALONE).found
    assert check(here, EIGHT).status == "not checked"
    monkeypatch.setattr(models, "load_adapter", lambda base, adapter: base)  # an adapter that is not applied
    finding = check(here, ALONE)
    assert finding.status == "failed" and "logits differ" in finding.found


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_an_engine_that_is_not_installed():
    vllm = doctor.Demand("r", {"02_rollouts": {"engine": "vllm"}, "05_eval": {"engine": "auto"}})
    finding = doctor.check_adapter_path(str(ROOT / "data/pocket-base"), host(0, problem="no CUDA"), vllm, GB)
    assert finding.status == "failed" and "engine vllm is not installed" in finding.found


# --- the command


def test_the_command_on_a_recipe_that_can_run(capsys):
    cli.looper(["doctor", "smoke", "--run", f"{RUN}-none"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("0 failed, 1 not checked") and len(lines) > 20
    assert not records.run_folder(f"{RUN}-none").exists()


def test_the_command_exits_with_1_when_a_check_fails(monkeypatch, capsys):
    "A warning alone does not."
    for status, code in (("warning", 0), ("failed", 1)):
        finding = doctor.Finding("disk", status, "1 GB", "2 GB", "delete something")
        monkeypatch.setattr(doctor, "diagnose", lambda *a: iter([finding]))
        with pytest.raises(SystemExit) if code else contextlib.nullcontext() as stop:
            cli.looper(["doctor", "smoke"])
        assert f"{status:<11}  disk: 1 GB; wanted: 2 GB; to mend it: delete something" in capsys.readouterr().out
        assert not code or stop.value.code == code


def test_an_unknown_recipe_or_parameter_is_refused(capsys):
    cases = ((["abel-8xh10"], "did you mean 'abel-8xh100'"), (["smoke", "-p", "gpus=2"], "unknown parameter"))
    for argv, words in cases:
        with pytest.raises(SystemExit) as stop:
            cli.looper(["doctor", *argv])
        assert stop.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_the_command_on_abel_without_a_gpu(capsys, monkeypatch):
    "Each row that cannot be checked says so; none passes for want of a GPU or of the base."
    monkeypatch.setattr(models, "fetch_base", lambda name: (_ for _ in ()).throw(OSError("not in the cache")))
    with pytest.raises(SystemExit) as stop:
        cli.looper(["doctor", "abel-8xh100"])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 1
    for what in ("NVIDIA driver", "CUDA in torch", "GPUs", "base GAIR/Abel-7B-002"):
        assert any(line.startswith(f"failed       {what}: ") for line in lines), what
    assert "not checked  memory, tokenizer and adapter: GAIR/Abel-7B-002 is not there" in lines
