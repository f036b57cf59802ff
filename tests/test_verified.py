"A phase reads what the earlier one has written: outputs against their manifests, adapters and checkpoints whole."
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import WORKER, fresh, papermill, small
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from looper_math import dpo, engines, evaluation, models, preferences, rollouts, sft, shards, training
from looper_math.data import load_questions
from looper_math.records import ROOT, RecordError, RunConflict, read_json, read_records, run_folder, sha256, write_json

ADAPTER = "01_sft/adapter/adapter_model.safetensors"


@pytest.fixture
def copied(small_run):
    "A copy of the small run, whose first three phases are done, to be damaged."
    folder = fresh("copied")
    shutil.copytree(small_run, folder)
    yield folder
    shutil.rmtree(folder)


def halve(path: Path):
    "Keep the first half of a file's lines."
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: len(lines) // 2]))


def flip(path: Path):
    "Change the last bit of a file: a weight by next to nothing."
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


OPEN = {
    "01_sft": lambda run: sft.open_phase(sft.SFTSettings(**small("01_sft", run=run))),
    "02_rollouts": lambda run: rollouts.open_phase(rollouts.RolloutSettings(**small("02_rollouts", run=run))),
    "03_preferences": lambda run: preferences.main(preferences.PreferenceSettings(**small("03_preferences", run=run))),
    "04_dpo": lambda run: dpo.main(dpo.DPOSettings(**small("04_dpo", run=run))),
    "05_eval": lambda run: evaluation.run_phase(evaluation.EvalSettings(
        **small("05_eval", run=run, models={"base": "", "sft": "01_sft/adapter"}, comparisons=[]))),
}


@pytest.mark.parametrize("file, damage, phases", [
    ("02_rollouts/rollouts.jsonl", halve, ("02_rollouts", "03_preferences", "04_dpo")),
    ("03_preferences/pairs.jsonl", halve, ("03_preferences", "04_dpo")),
    (ADAPTER, flip, ("01_sft", "02_rollouts", "04_dpo", "05_eval")),
    (ADAPTER, Path.unlink, ("01_sft", "02_rollouts", "05_eval")),
    ("01_sft/heldout.jsonl", Path.unlink, ("01_sft",)),
])
def test_a_damaged_output_is_refused_by_name(copied, file, damage, phases):
    "In the phase that made it and in those that would use it; restored, it is accepted."
    whole = (copied / file).read_bytes()
    damage(copied / file)
    path, maker = copied / file.replace("/adapter_model.safetensors", ""), file.split("/")[0]
    for phase in phases:
        with pytest.raises(RunConflict) as refused: OPEN[phase](copied.name)
        for part in (str(path), f"lists it as made by {maker}", f"delete {copied / maker} to make that phase again"):
            assert part in str(refused.value)
        assert ("is missing" if damage is Path.unlink else "has changed") in str(refused.value)
    assert not (copied / "04_dpo").exists() and not (copied / "05_eval").exists()
    (copied / file).write_bytes(whole)
    for phase in ("01_sft", "02_rollouts", "03_preferences"): OPEN[phase](copied.name)


def test_a_changed_bit_of_an_adapter_is_noticed_without_a_phase(copied):
    "As in `looper ask`, or in a notebook: the manifest beside the adapter is enough."
    base = models.load_base("data/pocket-base", "float32")
    models.check_adapter(base, copied / "01_sft/adapter")
    flip(copied / ADAPTER)
    with pytest.raises(RunConflict, match="adapter has changed"): models.load_adapter(base, copied / "01_sft/adapter")


def test_a_phase_says_so_on_its_page(copied):
    "Plain papermill on a finished phase with half of its output."
    halve(copied / "03_preferences/pairs.jsonl")
    done = papermill("03_preferences", copied / "again.ipynb", run=copied.name)
    assert done.returncode != 0 and "pairs.jsonl has changed" in done.stderr, done.stderr[-2000:]


def test_an_unfinished_phase_is_not_read(copied):
    "Its files may still grow; a checkpoint of its training may be evaluated."
    (copied / "02_rollouts/manifest.json").unlink()
    with pytest.raises(RunConflict, match="rollouts.jsonl is made by 02_rollouts, and that phase has not ended"):
        OPEN["03_preferences"](copied.name)
    (copied / "01_sft/manifest.json").unlink()
    changes = {"run": copied.name, "comparisons": [], "harder": "", "sampling": {}, "arm_set": "", "limit": 4}
    last = training.checkpoints(copied / "01_sft/adapter")[-1].name
    for adapter, accepted in (("adapter", False), (f"adapter/{last}", True)):
        s = evaluation.EvalSettings(**small("05_eval", models={"sft": f"01_sft/{adapter}"}, **changes))
        if accepted: evaluation.open_phase(s)
        else: pytest.raises(RunConflict, evaluation.open_phase, s).match("has not ended")


def test_torn_files_of_a_phase_are_named(copied):
    "A manifest and a start note that are cut off, or hold something else."
    for name, text, message in (("manifest.json", '{"outputs": {', "not whole JSON"),
                             ("manifest.json", "{}", "'outputs' is missing"),
                             ("started.json", "", "not whole JSON"),
                             ("started.json", "[1]", "expected a JSON object")):
        path = copied / "02_rollouts" / name
        whole = path.read_bytes()
        path.write_text(text)
        with pytest.raises(RecordError) as refused: OPEN["02_rollouts"](copied.name)
        assert message in str(refused.value) and f"{path}" in str(refused.value)
        assert f"or delete {path.parent} to have it made again" in str(refused.value)
        path.write_bytes(whole)


def sft_in_a_process(s: dict, seed: int):
    "Phase 1 in a process whose sets have an order of their own."
    code = WORKER.format(module="sft", settings="SFTSettings", call="main")
    subprocess.run([sys.executable, "-c", code, json.dumps(s)], cwd=ROOT, check=True, capture_output=True,
                   env=os.environ | {"PYTHONHASHSEED": str(seed)})


def test_a_phase_made_again_has_the_same_hash():
    "Phase 1 twice with the same settings: other files beside the weights, the same hash; and phase 2 goes on."
    folder = fresh("again")
    parameters = small("01_sft", run=folder.name, limit=16, dev="")
    files, hashes = [], []
    for seed in (1, 2):
        shutil.rmtree(folder / "01_sft", ignore_errors=True)
        sft_in_a_process(parameters, seed)
        files.append((folder / "01_sft/adapter/adapter_config.json").read_text())
        hashes.append(sha256(folder / "01_sft/adapter"))
        phase = OPEN["02_rollouts"](folder.name)   # the second time against what the first one noted
        phase.begin()
    assert files[0] != files[1] and json.loads(files[0])["r"] == json.loads(files[1])["r"]
    assert hashes[0] == hashes[1] == read_json(folder / "01_sft/manifest.json")["outputs"]["adapter"]
    config = folder / "01_sft/adapter/adapter_config.json"
    for change in ({"r": 8}, {"lora_alpha": 1}, {"target_modules": ["q_proj"]}, {"rank_pattern": {"q_proj": 2}},
                   {"alpha_pattern": {"q_proj": 2}}, {"use_rslora": True}, {"use_dora": True}, {"lora_dropout": .5}):
        write_json(config, json.loads(files[0]) | change)
        assert sha256(config.parent) != hashes[0], change
    shutil.rmtree(folder)


def edit(adapter: Path, change):
    "Rewrite an adapter's weights; `change` gives a new name or none."
    file = adapter / "adapter_model.safetensors"
    weights = {name: w.clone() for k, w in load_file(file).items() if (name := change(k))}
    file.unlink()   # the loaded weights were parts of the old file
    save_file(weights, file, {"format": "pt"})


@pytest.mark.parametrize("how", ["renamed", "half", "alpha"])
def test_no_phase_takes_a_wrong_adapter_for_the_base(random_adapter, tmp_path, how):
    "An adapter from elsewhere, without a manifest: rollouts, evaluation and training refuse it by name."
    adapter = shutil.copytree(random_adapter, tmp_path / "adapter")
    if how == "renamed": edit(adapter, lambda k: k.replace("layers", "blocks"))
    elif how == "half": edit(adapter, lambda k: k if "layers.0" in k or "layers.1" in k else None)
    else: write_json(adapter / "adapter_config.json", read_json(adapter / "adapter_config.json") | {"lora_alpha": 0})
    message = "lora_alpha is 0, so the adapter changes nothing" if how == "alpha" else "weights are missing"
    folder = fresh("wrong-adapter")
    sampled = rollouts.RolloutSettings(**small("02_rollouts", run=folder.name, adapter=str(adapter)))
    s = evaluation.EvalSettings(**small("05_eval", run=folder.name, comparisons=[], models={"sft": str(adapter)}))
    uses = [lambda: rollouts.run_phase(sampled),
            lambda: evaluation.run_phase(s),
            lambda: models.merge("data/pocket-base", adapter, tmp_path / "merged"),
            lambda: models.load_adapter(models.load_base("data/pocket-base"), adapter, trainable=True)]
    for use in uses:
        with pytest.raises(ValueError, match=message) as refused: use()
        assert str(adapter) in str(refused.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]
    shutil.rmtree(folder)


def test_an_adapter_of_another_base_is_refused(random_adapter, tmp_path):
    "A base of another width and depth."
    config = AutoConfig.from_pretrained(ROOT / "data/pocket-base")
    config.intermediate_size, config.num_hidden_layers = 256, 3
    base = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="does not have for this base: .*layers.3"):
        models.load_adapter(base, random_adapter)
    config.num_hidden_layers = 4
    with pytest.raises(ValueError, match="another shape .*4×384 and not 4×256"):
        models.load_adapter(AutoModelForCausalLM.from_config(config), random_adapter)


def test_a_base_without_some_of_its_weights_is_refused(tmp_path):
    "transformers would draw them at random and go on."
    base = shutil.copytree(ROOT / "data/pocket-base", tmp_path / "base")
    weights = load_file(ROOT / "data/pocket-base/model.safetensors")
    save_file({k: w for k, w in weights.items() if "layers.2" not in k}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lack 9 weights of this model, such as model.layers.2"):
        models.load_base(str(base))


@pytest.fixture(scope="module")
def two_epochs(small_run):
    "DPO over two epochs, with its folder of checkpoints, one an epoch; and the same folder as a kill leaves it."
    folder = fresh("two-epochs")
    inputs = {"adapter": str(small_run / "01_sft/adapter"), "pairs": str(small_run / "03_preferences/pairs.jsonl")}
    s = dpo.DPOSettings(**small("04_dpo", run=folder.name, control_cap=0, dev_limit=4, **inputs))
    dpo.main(s)
    assert len(training.checkpoints(s.trained)) == 2
    yield s
    shutil.rmtree(folder)


def broken_off(s, name: str, **changes):
    "Settings and folder of the same training in another run, broken off before its manifest."
    folder = fresh(name)
    shutil.copytree(run_folder(s.run), folder)
    (folder / "04_dpo/manifest.json").unlink()
    (folder / "04_dpo/adapter/adapter_model.safetensors").unlink()
    (folder / "04_dpo/started.json").unlink()
    return dpo.DPOSettings(**vars(s) | {"run": folder.name} | changes)


@pytest.mark.parametrize("file", ["optimizer.pt", "adapter_model.safetensors", "ref/adapter_model.safetensors"])
def test_a_truncated_checkpoint_is_passed_over(two_epochs, capsys, file):
    "The last of two: training goes on from the first, and ends where the unbroken one ended."
    s = broken_off(two_epochs, "truncated")
    last = training.checkpoints(s.trained)[-1]
    os.truncate(last / file, (last / file).stat().st_size // 2)
    dpo.main(s)
    message = f"{last} is damaged, and training resumes from before it: {file}: cut off or changed"
    assert message in capsys.readouterr().out
    a, b = (load_file(f.trained / "adapter_model.safetensors") for f in (two_epochs, s))
    assert a.keys() == b.keys() and max((a[k] - b[k]).abs().max().item() for k in a) < 1e-6
    assert len(training.checkpoints(s.trained)) == 2
    shutil.rmtree(run_folder(s.run))


def test_the_chosen_epoch_is_the_one_that_the_manifest_names(two_epochs):
    "The first checkpoint is deleted, so the best of what is left is epoch 2, under that name."
    s = broken_off(two_epochs, "deleted", keep="best")
    first, last = training.checkpoints(s.trained)
    shutil.rmtree(first)
    dpo.main(s)
    assert read_json(s.folder / "manifest.json")["metrics"]["heldout"]["kept"] == "epoch 2"
    assert [*dict.fromkeys(r["stage"] for r in read_records(s.folder / "heldout.jsonl"))] == ["SFT", "epoch 2"]
    assert (s.trained / "adapter_model.safetensors").read_bytes() == (last / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(run_folder(s.run))


def test_a_hole_in_an_evaluation_shard_is_noticed(tmp_path):
    "Bytes cut out of a completion between two runs: a whole JSON line, and another text."
    s = evaluation.EvalSettings(**small("05_eval", run=fresh("hole").name, models={"base": ""}, comparisons=[]))
    tasks = evaluation.missing_answers(
        dataclasses.replace(s, limit=3, harder="", arm_set="", sampling={}), {"base": None}, evaluation.prompts_of(s),
        {"test": load_questions(s.questions, limit=3)})
    files = tasks[0].files
    files = dataclasses.replace(files, final=tmp_path / files.final.name, partial=tmp_path / files.partial.name)
    completion = lambda r: engines.Completion(r.id, "3 * 5 = 15\n12 + 15 = 27\nAnswer: 27", 9, "stop")
    generate = lambda requests, on_done: on_done([completion(r) for r in requests])
    shards.append(generate, [dataclasses.replace(task, files=files) for task in tasks])
    shard = tmp_path / "test-base.shard-0"
    whole = shard.read_bytes()
    shard.write_bytes(whole.replace(b"12 + 15 = 27", b"12 +  27", 1))
    with pytest.raises(RecordError, match="test-base.shard-0, line 1: the record was changed"):
        shards.gather(files)
    shard.write_bytes(whole)
    assert len(shards.gather(files)) == 3
