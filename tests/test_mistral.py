"""All phases on a tiny Mistral with the real tokenizer, in the four states in which such a base may be published.

`mistral-common` ships the tokenizer of Mistral-7B-v0.1. GAIR/Abel-7B-002 is such a Mistral, published as pickles."""
import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest

pytest.importorskip("mistral_common", reason="mistral-common is missing; `make test-mistral` installs and runs it")

import mistral_common
import torch
from conftest import fresh, small
from tokenizers import normalizers
from transformers import LlamaTokenizer, MistralConfig, MistralForCausalLM
from trl import DPOConfig

from looper_math import demonstrations, dpo, dpo_trainer, engines, models, training
from looper_math.data import load_questions
from looper_math.prompts import build_prompt
from looper_math.records import read_json, read_records
from looper_math.runs import SETTINGS

TOKENIZER = Path(mistral_common.__file__).parent / "data/tokenizer.model.v1"
ROWS = 32000
FIRST = [1, 22478]  # <s> and ▁Question, as sentencepiece numbers them
TEMPLATE = "Question:\n{question}\n{instruction}\nAnswer:\nLet's think step by step.\n"  # abel-8xh100's
SAMPLING = {"_from_model_config": False, "eos_token_id": 2, "temperature": 0.9, "top_p": 0.6}  # Llama 2's, v1
# phase → what differs from the notebook's parameters: a few rows, two updates
TRAINER = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "bf16": False}
SAMPLED = {"max_new_tokens": 12, "engine": "transformers", "batch_size": 32}
PHASES = {
    "01_sft": {"limit": 8, "dev_limit": 2, "max_new_tokens": 12, "trainer": TRAINER},
    "02_rollouts": {"limit": 3} | SAMPLED,
    "03_preferences": {},
    "04_dpo": {"min_pairs": 2, "dev_limit": 2, "max_new_tokens": 12, "control_arms": [], "trainer": TRAINER},
    "05_eval": {"limit": 3, "harder": "", "arm_set": "", "sampling": {"n": 2, "models": 1, "questions": 2},
                "styles": ["training", "native", "five-shot"],
                "native_template": TEMPLATE.replace("{instruction}\n", "")} | SAMPLED,
    # Samples differ in length alone, so that is what is rewarded.
    "06_online_rl": {"limit": 2, "dev_limit": 2, "arm_set": "guide-8",
                     "weights": {"free_tokens": 0, "excess_tokens": -0.01},
                     "trainer": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
                                 "max_completion_length": 12, "bf16": False}},
}


def write(path, value): path.write_text(json.dumps(value), encoding="utf-8")


def make_model() -> MistralForCausalLM:
    "Two random layers that end a completion after about twenty tokens."
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(
        vocab_size=ROWS, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4096, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2))
    with torch.no_grad():
        model.model.embed_tokens.weight += 0.2  # a direction that all hidden states share
        model.lm_head.weight[2] = 7.5 / 64  # so the logit of the end token is about 7.5, those of the others about 0
    return model


def save_pickled(model, folder: Path):
    "Two shards and their index, as Abel's checkpoint has them."
    model.config.save_pretrained(folder)
    weights = model.state_dict()
    names = sorted(weights)
    shards = {f"pytorch_model-0000{k + 1}-of-00002.bin": names[k::2] for k in (0, 1)}
    for file, part in shards.items(): torch.save({name: weights[name] for name in part}, folder / file)
    places = {name: file for file, part in shards.items() for name in part}
    write(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": places})


def save_tokenizer(folder: Path, **special):
    "The model file and the two configuration files that older checkpoints have beside it."
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | special
    shutil.copy(TOKENIZER, folder / "tokenizer.model")
    write(folder / "special_tokens_map.json", special)
    write(folder / "tokenizer_config.json", special | {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True,
                                                       "add_eos_token": False, "legacy": True})


def add_json(folder: Path):
    "A `tokenizer.json` in the layout of the published one: a normalizer puts the space in front."
    fast = LlamaTokenizer.from_pretrained(folder).backend_tokenizer
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.pre_tokenizer = None
    fast.save(str(folder / "tokenizer.json"))


def add_padding(folder: Path):
    "[PAD] as token 32,000, for which the embedding has no row."
    save_tokenizer(folder, pad_token="[PAD]")
    write(folder / "added_tokens.json", {"[PAD]": ROWS})


VARIANTS = {"tokenizer.model alone": lambda folder: None, "with tokenizer.json": add_json, "with [PAD]": add_padding,
            "Llama 2's generation config": lambda folder: write(folder / "generation_config.json", SAMPLING)}


def build(phase: str, base: str, run: str, **changes):
    "Settings of a phase for this base."
    module, kind = SETTINGS[phase]
    parameters = small(phase, run=run, base=base, template=TEMPLATE, **PHASES[phase] | changes)
    return getattr(import_module(f"looper_math.{module}"), kind)(**parameters)


def run_phase(phase: str, base: str, run: str, **changes):
    "Run one phase in this process; returns its settings."
    settings, module = build(phase, base, run, **changes), import_module(f"looper_math.{SETTINGS[phase][0]}")
    getattr(module, "run_phase", module.main)(settings)
    return settings


def answered(record: dict) -> dict:
    "A record whose arms alternately give the gold answer and another one, since random weights give neither."
    gold, texts = record["gold_answer"], ["It is {0}.\nAnswer: {0}", "It is {0}1.\nAnswer: {0}1"]
    trajectories = [t | {"full_text": texts[k % 2].format(gold)} for k, t in enumerate(record["trajectories"])]
    return record | {"trajectories": trajectories}


def plant_answers(own: Path, base: str, run: str) -> str:
    "Rollouts with planted answers, graded and scored by the import of phase 2 into another run; returns their file."
    planted = own.with_name("planted.jsonl")
    planted.write_text("".join(json.dumps(answered(r)) + "\n" for r in read_records(own)), encoding="utf-8")
    return str(run_phase("02_rollouts", base, run, import_from=str(planted)).path)


class Finished(NamedTuple):
    "A base and what all phases made of it."
    base: str
    run: Path  # the run's folder
    pairs: str  # JSON lines
    conversions: int


def run_all(change, folder: Path, name: str) -> Finished:
    "Publish the base, change its files, run all phases."
    save_pickled(make_model(), folder)
    save_tokenizer(folder)
    change(folder)
    base, run, planted = str(folder), fresh(name), fresh(f"{name}-planted")
    with patch.object(models, "_convert", wraps=models._convert) as convert:
        run_phase("01_sft", base, run.name)
        answers = plant_answers(run_phase("02_rollouts", base, run.name).path, base, planted.name)
        pairs = str(run_phase("03_preferences", base, run.name, rollouts=answers).path)
        run_phase("04_dpo", base, run.name, rollouts=answers)
        for phase in ("05_eval", "06_online_rl"): run_phase(phase, base, run.name)
    shutil.rmtree(planted)
    return Finished(base, run, pairs, convert.call_count)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "Variant → the base and its run."
    with patch.object(models, "CONVERTED", tmp_path_factory.mktemp("converted")):
        runs = {variant: run_all(change, tmp_path_factory.mktemp("mistral"), f"mistral-{k}")
                for k, (variant, change) in enumerate(VARIANTS.items())}
        yield runs
    for r in runs.values(): shutil.rmtree(r.run)


every_variant = pytest.mark.parametrize("variant", VARIANTS)


@every_variant
def test_all_phases_are_done_with_one_conversion(finished, variant):
    "The end token is known: completions of random weights end before they are cut off."
    r = finished[variant]
    manifests = {phase: read_json(r.run / phase / "manifest.json") for phase in PHASES}
    assert r.conversions == 1 and models.load_config(r.base).sliding_window == 4096
    assert [p.is_dir() for p in models.CONVERTED.glob(f"{Path(r.base).name}-*")].count(True) == 1
    counts = manifests["02_rollouts"]["counts"]
    assert counts["trajectories"] == 33 > counts["cut_off"]
    assert all(manifests[phase]["metrics"]["adapter_moved_by"] > 0 for phase in ("04_dpo", "06_online_rl"))


def first_tokens(r: Finished, folder: Path) -> dict[str, list[int]]:
    "The first two tokens of a prompt as SFT's trainer, DPO's trainer and the engines get them."
    s, d = build("01_sft", r.base, r.run.name), build("04_dpo", r.base, r.run.name)
    rows = demonstrations.sft_rows(load_questions(s.train, limit=4), None, s.layout)
    by_sft = demonstrations.make_sft_trainer(s, folder, rows, s.lora_config)
    config = training.trainer_config(DPOConfig, d, folder, 4, remove_unused_columns=False)
    by_dpo = dpo_trainer.make_dpo_trainer(dpo.start_policy(d), models.load_tokenizer(r.base), r.pairs, config, folder)
    request = engines.Request("q", build_prompt("How many?", template=TEMPLATE), max_new_tokens=9)
    job, = engines.tokenize([request], models.load_tokenizer(r.base), 500)
    return {"sft": by_sft.train_dataset[0]["input_ids"][:2], "dpo": by_dpo.train_dataset[0]["prompt_ids"][:2],
            "engines": job.ids[:2]}


@every_variant
def test_the_first_token_is_sentencepieces(finished, variant, tmp_path):
    r = finished[variant]
    models.check_tokenizer(r.base)
    assert models.load_tokenizer(r.base).tokenize("Question:\nHow many?")[0] == "▁Question"
    assert first_tokens(r, tmp_path) == dict.fromkeys(("sft", "dpo", "engines"), FIRST)


@every_variant
def test_padding_has_a_row_of_the_embedding(finished, variant):
    tokenizer = models.load_tokenizer(finished[variant].base)
    ids = tokenizer(["Question: How many apples?", "Question:"], padding=True, return_tensors="pt").input_ids
    assert (tokenizer.pad_token, int(ids.max()) < ROWS) == ("<unk>", True)


@every_variant
def test_base_and_adapter_are_merged(finished, variant, tmp_path):
    "The folder is read with the same tokens."
    r = finished[variant]
    merged = models.merge(r.base, r.run / "04_dpo/adapter", tmp_path / "merged")
    models.check_tokenizer(str(merged))
    assert models.load_tokenizer(str(merged))("Question:").input_ids[:2] == FIRST


def outcome(r: Finished) -> dict:
    "Losses of every training and texts of every sampling."
    trained = ("01_sft/adapter", "04_dpo/adapter", "04_dpo/control", "06_online_rl/adapter")
    losses = {name: training.history(r.run / name).loss.tolist() for name in trained}
    sampled = [t["full_text"] for q in read_records(r.run / "02_rollouts/rollouts.jsonl") for t in q["trajectories"]]
    return losses | {"sampled": sampled, "test": (r.run / "05_eval/test-dpo.jsonl").read_text(encoding="utf-8")}


def test_all_variants_are_the_same_model(finished):
    "They hold the same weights, so with the same tokens every loss and every completion is the same."
    first, *others = [outcome(r) for r in finished.values()]
    assert all(other == first for other in others)
