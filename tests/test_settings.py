"What each parameter of each phase may be: the settings classes, and the runner that builds them before it starts."
import dataclasses
import importlib
import math
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import small

from looper_math import cli, launch, records, runs, sft
from looper_math.records import ROOT, SettingsError, settings

INF, NAN = math.inf, math.nan


def built(phase, **changes):
    "The settings of a phase: its notebook's defaults, then `changes`; `trainer.seed` is an option of `trainer`."
    module, name = runs.SETTINGS[phase]
    parameters = small(phase) | {"run": "settings"}
    for key, value in changes.items():
        parameter, dot, option = key.partition(".")
        parameters[parameter] = parameters[parameter] | {option: value} if dot else value
    return settings(getattr(importlib.import_module(f"looper_math.{module}"), name), parameters)


# (phases, parameter, bad value, what the sentence says). A phase is named by its number.
BAD = [
    # every phase
    ("12456", "run", "", "run must be"),
    ("12456", "run", "a/b", "run must be"),
    ("12456", "run", "r" * 256, "run must be a name of at most 255 bytes, got 256"),
    ("12456", "run", 7, "run must be"),
    ("12456", "base", "", "base must be a folder of the project"),
    ("12456", "base", "  ", "base must be a folder of the project"),
    ("12456", "base", "~nobody-here/base", "base: '~nobody-here/base' begins with ~nobody-here"),
    ("12456", "base", "no such model!", "base must be a folder of the project"),
    ("12456", "base", "a/b/c", "base must be a folder of the project"),
    ("12456", "base", "GAIR/Abel-7B-002@", "base: after @ comes a commit, a tag or a branch of GAIR/Abel-7B-002"),
    ("12456", "base", "a/b@v 1", "base: after @ comes a commit, a tag or a branch of a/b"),
    ("12456", "template", "", "has no {question}"),
    ("12456", "template", "Solve.", "has no {question}"),
    ("12456", "template", "{question} {instructon}", "did you mean {instruction}"),
    ("12456", "template", "chat", "has no chat template"),
    ("12456", "dtype", "float64", "dtype must be auto"),
    ("12456", "n_gpu", -1, "n_gpu must be at least 0"),
    ("12456", "n_gpu", 10**6, "n_gpu must be at least 0 and at most 1,024"),
    ("12456", "n_gpu", "8", "n_gpu must be int"),
    ("12456", "device", "gpu", "device must be auto, cpu or cuda"),
    ("1245", "max_new_tokens", 0, "max_new_tokens must be at least 1"),
    ("1245", "max_new_tokens", 10**9, "max_new_tokens must be at least 1 and at most 1,000,000"),
    ("25", "batch_size", 0, "batch_size must be at least 1"),
    ("25", "batch_size", -32, "batch_size must be at least 1"),
    ("25", "batch_size", 1.5, "batch_size must be int"),
    ("25", "serving", [], "serving must be dict"),
    ("25", "serving.gpu_memory_utilization", 0, "serving.gpu_memory_utilization must be above 0 and at most 1, got 0"),
    ("25", "serving.gpu_memory_utilization", 92, "serving.gpu_memory_utilization must be above 0 and at most 1"),
    ("25", "serving.gpu_memory_utilization", NAN, "serving must be finite"),
    ("25", "serving.gpu_memory_utilisation", 0.8, "did you mean 'gpu_memory_utilization'"),
    ("25", "serving.max_num_seqs", "256", "serving.max_num_seqs must be int, got '256'"),
    ("25", "serving.max_num_seqs", 0, "serving.max_num_seqs must be at least 1"),
    ("25", "serving.enforce_eager", 1, "serving.enforce_eager must be bool"),
    ("25", "serving.start_minutes", 0, "serving.start_minutes must be above 0 and at most 1,440, got 0"),
    ("25", "serving.max_model_len", 4096, "serving.max_model_len cannot be set: the longest prompt and max_new_tokens"),
    ("25", "serving.tensor_parallel_size", 8, "serving.tensor_parallel_size cannot be set: every process has an"),
    ("25", "serving.max_loras", 4, "serving.max_loras cannot be set: the adapters that are served decide it"),
    ("25", "serving.trust_remote_code", True, "serving.trust_remote_code cannot be set: code in a model's folder"),
    ("1256", "limit", -1, "limit must be at least 0"),
    ("1256", "limit", True, "limit must be int"),
    # the trainings
    ("146", "keep", "first", "keep must be last or best"),
    ("146", "dev", "data/no-such-dev.jsonl", "dev: "),
    ("146", "dev", "openai/gsm8k:trian[7000:]", "dev: openai/gsm8k: no split"),
    ("146", "dev", "openai/gsm8k:train[7000", "is no split"),
    ("146", "dev_limit", -5, "dev_limit must be at least 0"),
    ("146", "load_in_4bit", "yes", "load_in_4bit must be bool"),
    ("14", "accelerate_config", "nbs/accelerate/fsdp-9.yaml", "there is no"),
    ("14", "accelerate_config", "~nobody-here/fsdp.yaml", "begins with ~nobody-here"),
    # their trainers' options
    ("146", "trainer", "learning_rate: 0.1", "trainer must be dict"),
    ("146", "trainer", {"num_train_epochs": 2}, "trainer names no learning_rate"),
    ("146", "trainer.learning_rate", 0.0, "trainer.learning_rate must be above 0"),
    ("146", "trainer.learning_rate", -1e-4, "trainer.learning_rate must be above 0"),
    ("146", "trainer.learning_rate", 50.0, "trainer.learning_rate must be above 0 and at most 1"),
    ("146", "trainer.learning_rate", INF, "trainer must be finite"),
    ("146", "trainer.learning_rate", NAN, "trainer must be finite"),
    ("146", "trainer.learning_rate", "1e-4", "trainer.learning_rate must be float, got '1e-4'"),
    ("146", "trainer.learning_rate", None, "trainer.learning_rate must be float, got None"),
    ("146", "trainer.learning_rat", 0.1, "has no option 'learning_rat'; did you mean 'learning_rate'"),
    ("146", "trainer.epochs", 3, "Config has no option 'epochs'"),
    ("146", "trainer.num_train_epochs", 0, "trainer.num_train_epochs must be a whole number, at least 1"),
    ("146", "trainer.num_train_epochs", 1.5, "trainer.num_train_epochs must be a whole number, at least 1"),
    ("146", "trainer.num_train_epochs", 10**6, "at least 1 and at most 1,000, got 1000000"),
    ("146", "trainer.per_device_train_batch_size", 0, "trainer.per_device_train_batch_size must be at least 1"),
    ("146", "trainer.per_device_train_batch_size", 1.5, "trainer.per_device_train_batch_size must be int"),
    ("6", "trainer.per_device_train_batch_size", 45, "must be a multiple of 11"),
    ("146", "trainer.gradient_accumulation_steps", 0, "trainer.gradient_accumulation_steps must be at least 1"),
    ("146", "trainer.warmup_steps", -0.1, "trainer.warmup_steps must be at least 0"),
    ("146", "trainer.warmup_steps", 1.5, "below 1, or a whole number, at least 1 and at most 1,000,000, got 1.5"),
    ("146", "trainer.warmup_steps", NAN, "trainer must be finite"),
    ("146", "trainer.lr_scheduler_type", "cosin", "trainer.lr_scheduler_type must be linear, cosine"),
    ("146", "trainer.lr_scheduler_type", "reduce_lr_on_plateau", "trainer.lr_scheduler_type must be linear, cosine"),
    ("146", "trainer.lr_scheduler_type", "", "trainer.lr_scheduler_type must be linear, cosine"),
    ("146", "trainer.seed", -1, "trainer.seed must be at least 0"),
    ("146", "trainer.seed", 2**32, "trainer.seed must be at least 0 and at most 4,294,967,295"),
    ("146", "trainer.bf16", "yes", "trainer.bf16 must be bool"),
    ("146", "trainer.report_to", "wandbb", "trainer.report_to must be none, trackio"),
    ("146", "trainer.report_to", "wandb", "trainer.report_to needs the package wandb"),
    ("146", "trainer.gradient_checkpointing", 1, "trainer.gradient_checkpointing must be bool"),
    ("146", "trainer.optim", "adam", "trainer.optim must be adamw_torch"),
    ("146", "trainer.weight_decay", INF, "trainer must be finite"),
    ("146", "trainer.max_steps", 10, "trainer.max_steps cannot be set: num_train_epochs decides the length"),
    ("146", "trainer.output_dir", "elsewhere", "trainer.output_dir cannot be set"),
    ("14", "trainer.save_steps", -1, "trainer.save_steps must be a whole number, at least 0"),
    ("14", "trainer.save_steps", 2.5, "trainer.save_steps must be a whole number, at least 0"),
    ("4", "control_trainer.save_steps", -1, "control_trainer.save_steps must be a whole number, at least 0"),
    ("146", "trainer.save_total_limit", 1, "trainer.save_total_limit cannot be set: a checkpoint is saved"),
    ("146", "trainer.logging_steps", 1, "trainer.logging_steps cannot be set"),
    ("146", "trainer.eval_strategy", "epoch", "trainer.eval_strategy cannot be set"),
    ("146", "trainer.remove_unused_columns", True, "trainer.remove_unused_columns cannot be set"),
    ("14", "trainer.max_length", 0, "trainer.max_length must be at least 1"),
    ("14", "trainer.max_length", None, "trainer.max_length must be at least 1"),
    ("14", "trainer.max_length", 10**9, "trainer.max_length must be at least 1 and at most 1,000,000"),
    ("6", "trainer.max_length", 512, "GRPOConfig has no option 'max_length'"),
    ("14", "trainer.train_sampling_strategy", "sorted", "trainer.train_sampling_strategy must be random, sequential"),
    # 01
    ("1", "train", "", "train: "),
    ("1", "train", "data/pocket/trian.jsonl", "train: "),
    ("1", "train", "openai/gsm8k_main", "did you mean 'openai/gsm8k'"),
    ("1", "marks", "drop", "marks must be strip or keep"),
    ("1", "targets", "humans", "targets must be human, self or mixed"),
    ("1", "own_cap", 0, "own_cap must be at least 1"),
    ("1", "lora.r", 0, "lora.r must be at least 1"),
    ("1", "lora.r", 10**5, "lora.r must be at least 1 and at most 1,024"),
    ("1", "lora.rank", 8, "lora has no option 'rank'"),
    ("1", "lora.lora_alpha", 0, "lora.lora_alpha must be at least 1"),
    ("1", "lora.lora_alpha", -32, "lora.lora_alpha must be at least 1"),
    ("1", "lora.lora_dropout", -1.0, "lora.lora_dropout must be at least 0"),
    ("1", "lora.lora_dropout", 1.0, "lora.lora_dropout must be at least 0 and below 1"),
    ("1", "lora.lora_dropout", NAN, "lora must be finite"),
    ("1", "trainer.completion_only_loss", False, "trainer.completion_only_loss cannot be set: rows are prompt"),
    ("1", "rollouts", "~nobody-here/r.jsonl", "rollouts: '~nobody-here/r.jsonl'"),
    # 02
    ("2", "questions", "gsm8k", "questions: 'gsm8k': neither a file nor"),
    ("2", "arm_set", "platinum-12", "arm_set must be platinum-11"),
    ("2", "arm_set", "", "arm_set must be platinum-11"),
    ("2", "preset", "leave-one-in", "unknown preset 'leave-one-in'; did you mean 'leave-one-out'"),
    ("2", "weights", {"my_signal.none": 1.0}, "weights: 'my_signal.none': there is no module 'my_signal'"),
    ("2", "engine", "vlm", "engine must be auto, transformers or vllm"),
    ("2", "import_from", "data/no-such-rollouts.jsonl", "import_from: there is no file"),
    ("2", "adapter", "~nobody-here/adapter", "adapter: '~nobody-here/adapter'"),
    # 03, whose cells are checked by its own settings
    ("3", "policy", "alll", "policy 'alll' is unknown; did you mean 'all'"),
    ("3", "prompt", "canonic", "prompt 'canonic' is unknown; did you mean 'canonical'"),
    ("3", "pairing", "some", "pairing 'some' is unknown; "),
    ("3", "pair_types", "none", "pair_types 'none' is unknown; known are both"),
    ("3", "cap", 0, "cap must be at least 1"),
    ("3", "threshold", -0.01, "threshold must be"),
    ("3", "preset", "platinum11", "unknown preset 'platinum11'"),
    ("3", "weights", {"my_signal.none": 1.0}, "weights: 'my_signal.none': there is no module 'my_signal'"),
    # 04
    ("4", "trainer.beta", 0.0, "trainer.beta must be above 0"),
    ("4", "trainer.beta", -1.0, "trainer.beta must be above 0"),
    ("4", "trainer.beta", 1e6, "trainer.beta must be above 0 and at most 1,000"),
    ("4", "trainer.beta", INF, "trainer must be finite"),
    ("4", "trainer.loss_type", ["dop", "sft"], "trainer.loss_type must be [loss] or [loss, sft]"),
    ("4", "trainer.loss_type", ["sft", "sigmoid"], "trainer.loss_type must be [loss] or [loss, sft]"),
    ("4", "trainer.loss_type", "sigmoid", "trainer.loss_type must be list"),
    ("4", "trainer.loss_type", ["sigmoid"], "trainer.loss_weights must have one weight for each of sigmoid"),
    ("4", "trainer.loss_weights", [1.0, -1.0], "trainer.loss_weights must be None or a list of numbers"),
    ("4", "trainer.loss_weights", [1.0, NAN], "trainer must be finite"),
    ("4", "trainer.loss_weights", [1.0], "trainer.loss_weights must have one weight for each of sigmoid, sft"),
    ("4", "trainer.label_smoothing", 0.5, "trainer.label_smoothing must be at least 0 and below 0.5"),
    ("4", "trainer.label_smoothing", 0.1, "trainer.label_smoothing needs the loss robust"),
    ("4", "trainer.sync_ref_model", True, "cannot be set: the reference is the starting adapter"),
    ("4", "min_pairs", 0, "min_pairs must be at least 1"),
    ("4", "control_cap", -1, "control_cap must be at least 0"),
    ("4", "control_trainer.learning_rate", NAN, "control_trainer must be finite"),
    ("4", "control_trainer.learning_rate", 3.0, "control_trainer.learning_rate must be above 0 and at most 1"),
    ("4", "control_trainer.beta", 1.0, "control_trainer: SFTConfig has no option 'beta'"),
    ("4", "control_trainer.num_train_epochs", 3, "cannot be set: it is the same as DPO's"),
    ("4", "control_arms", ["wolfram_0", "wolfram_0"], "control_arms names 'wolfram_0' twice"),
    ("4", "control_arms", [3], "control_arms must be a list of texts"),
    ("4", "control_arms", "wolfram_0", "control_arms must be list"),
    ("4", "adapter", "none", "adapter must be a folder"),
    ("4", "pairs", "~nobody-here/pairs.jsonl", "pairs: '~nobody-here/pairs.jsonl'"),
    ("4", "rollouts", "~nobody-here/r.jsonl", "rollouts: '~nobody-here/r.jsonl'"),
    # 05
    ("5", "models", {}, "models must map"),
    ("5", "models", {"a/b": ""}, "models must map"),
    ("5", "models", {"": ""}, "models must map"),
    ("5", "models", {"m" * 65: ""}, "models must map"),
    ("5", "models", {"base": None}, "models must map"),
    ("5", "models", {False: ""}, "models must map"),
    ("5", "models", {"base": "~nobody-here/x"}, "models.base: '~nobody-here/x'"),
    ("5", "models", {"base": "no such model!"}, "models.base must be a folder"),
    ("5", "comparisons", [["sft", "sft"]], "compares a model with itself"),
    ("5", "comparisons", [["sft", "dpo"], ["sft", "dpo"]], "is there twice"),
    ("5", "comparisons", [["sft", "dop"]], "a comparison is a pair"),
    ("5", "comparisons", [["sft"]], "a comparison is a pair"),
    ("5", "comparisons", ["sft"], "a comparison is a pair"),
    ("5", "comparisons", [[["sft"], "dpo"]], "a comparison is a pair"),
    ("5", "questions", "", "questions: "),
    ("5", "questions", "data/pocket/hard.jsonl", "harder must be another set than questions"),
    ("5", "harder", "data/pocket/harder.jsonl", "harder: "),
    ("5", "train", "data/pocket/trian.jsonl", "train: "),
    ("5", "practice", "madrylab/gsm8k-platinum:train", "practice: madrylab/gsm8k-platinum: no split"),
    ("5", "styles", [], "styles must be some of"),
    ("5", "styles", ["trainin"], "styles may hold training, native"),
    ("5", "styles", ["training", "training"], "styles names 'training' twice"),
    ("5", "styles", [["training"]], "styles must be a list of texts"),
    ("5", "styles", [True], "styles must be a list of texts"),
    ("5", "styles", ["native"], "style native needs a native_template"),
    ("5", "sampling", {"n": -1}, "sampling.n must be at least 0"),
    ("5", "sampling", {"n": 10**6}, "sampling.n must be at least 0 and at most 1,000"),
    ("5", "sampling", {"n": True}, "sampling.n must be a whole number"),
    ("5", "sampling", {"samples": 8}, "sampling: unknown option 'samples'"),
    ("5", "sampling", {"temprature": 1}, "did you mean 'temperature'?"),
    ("5", "arm_set", "guide", "arm_set must be "),
    ("5", "sampling", {"models": -1}, "sampling.models must be at least 0"),
    ("5", "sampling", {"questions": -1}, "sampling.questions must be at least 0"),
    ("5", "sampling", {"seed": -1}, "sampling.seed must be at least 0"),
    ("5", "engine", "", "engine must be auto, transformers or vllm"),
    ("5", "sampling", {"temperature": 0.0}, "sampling.temperature must be at least 0.01"),
    ("5", "sampling", {"temperature": 1e-300}, "sampling.temperature must be at least 0.01"),
    ("5", "sampling", {"temperature": 100}, "sampling.temperature must be at least 0.01 and at most 10"),
    ("5", "sampling", {"temperature": NAN}, "sampling must be finite"),
    ("5", "sampling", {"top_p": 0.0}, "sampling.top_p must be above 0"),
    ("5", "sampling", {"top_p": 1.5}, "sampling.top_p must be above 0 and at most 1"),
    ("5", "sampling", {"top_p": NAN}, "sampling must be finite"),
    # 06
    ("6", "algorithm", "reinforce", "algorithm must be grpo or ppo"),
    ("6", "arm_set", "guide-9", "arm_set must be "),
    ("6", "prompt", "canon", "prompt must be canonical or arm"),
    ("6", "preset", "guide", "unknown preset 'guide'"),
    ("6", "weights", {"my_signal.none": 1.0}, "weights: 'my_signal.none': there is no module 'my_signal'"),
    ("6", "questions", "data/none.jsonl", "questions: "),
    ("6", "weights", {"corect": 1.0}, "no weight 'corect'"),
    ("6", "weights", {"correct": NAN}, "weights must be finite"),
    ("6", "weights", {"correct": INF}, "weights must be finite"),
    ("6", "weights", {"correct": "much"}, "weights: correct must be a number"),
    ("6", "weights", {"correct": True}, "weights: correct must be a number"),
    ("6", "weights", {"correct": 1e6}, "weights: correct must be a number, at least -1,000"),
    ("6", "weights", {"free_tokens": -1}, "weights: free_tokens must be a number"),
    ("6", "weights", {"free_tokens": 512.5}, "weights: free_tokens must be a number"),
    ("6", "trainer.temperature", 0.0, "trainer.temperature must be at least 0.01"),
    ("6", "trainer.temperature", 100.0, "trainer.temperature must be at least 0.01 and at most 10"),
    ("6", "trainer.beta", -0.01, "trainer.beta must be at least 0"),
    ("6", "trainer.beta", INF, "trainer must be finite"),
    ("6", "trainer.epsilon", 0.0, "trainer.epsilon must be above 0"),
    ("6", "trainer.epsilon", 2.0, "trainer.epsilon must be above 0 and at most 1"),
    ("6", "trainer.scale_rewards", "std", "trainer.scale_rewards must be group, batch or none"),
    ("6", "trainer.max_completion_length", 0, "trainer.max_completion_length must be at least 1"),
    ("6", "trainer.max_completion_length", 10**9, "at least 1 and at most 1,000,000"),
    ("6", "trainer.num_iterations", 0, "trainer.num_iterations must be at least 1"),
    ("6", "trainer.num_iterations", 3, "trainer.save_steps must be a multiple of trainer.num_iterations"),
    ("6", "trainer.save_steps", 0, "trainer.save_steps must be a whole number, at least 1"),
    ("6", "trainer.num_generations", 4, "trainer.num_generations cannot be set: the arm set decides it"),
    ("6", "trainer.use_vllm", True, "cannot be set: the arms sample with this project's decoder"),
    ("6", "trainer.loss_type", "grpo", "trainer.loss_type cannot be set: the loss is averaged over the tokens"),
    ("6", "ppo.lam", 1.1, "ppo.lam must be at least 0 and at most 1"),
    ("6", "ppo.lam", NAN, "ppo must be finite"),
    ("6", "ppo.value_weight", -1.0, "ppo.value_weight must be at least 0"),
    ("6", "ppo.value_learning_rate", 0.0, "ppo.value_learning_rate must be above 0"),
    ("6", "ppo.lambda", 1.0, "ppo has no option 'lambda'; did you mean 'lam'?"),
    ("6", "adapter", "none", "adapter must be a folder"),
]
NAMES = {name[1]: name for name in runs.SETTINGS}
ROWS = [(NAMES[number], *row) for numbers, *row in BAD for number in numbers]


@pytest.mark.parametrize("phase, parameter, value, message", ROWS, ids=lambda x: str(x)[:24])
def test_a_bad_value_is_refused(phase, parameter, value, message):
    with pytest.raises(SettingsError if parameter not in ("dtype", "preset") else ValueError) as e:
        built(phase, **{parameter: value})
    assert message in str(e.value) and "\n" not in str(e.value)


def test_every_parameter_of_the_phases_has_a_bad_value():
    "But for flags, whose wrong type the runner refuses, and what any text may be."
    tried = {(phase, parameter.split(".")[0]) for phase, parameter, *_ in ROWS}
    free = {"native_template"} # is checked with the style native, below
    for phase in set(NAMES.values()) - {"03_preferences"}:
        module, name = runs.SETTINGS[phase]
        fields = dataclasses.fields(getattr(importlib.import_module(f"looper_math.{module}"), name))
        untried = {f.name for f in fields if f.type is not bool} - {p for ph, p in tried if ph == phase} - free
        assert not untried, (phase, untried)


@pytest.mark.parametrize("template, message", [("Solve.", "has no {question}"), ("chat", "has no chat template")])
def test_the_native_template_is_checked_where_it_is_used(template, message):
    assert built("05_eval", native_template=template)
    with pytest.raises(SettingsError, match=message):
        built("05_eval", native_template=template, styles=["native"])


GOOD = [
    ("01_sft", {"trainer.learning_rate": 1.0, "lora.lora_dropout": 0.0, "trainer.warmup_steps": 0.0, "lora.r": 1024}),
    ("01_sft", {"trainer.learning_rate": 1, "trainer.warmup_steps": 10, "trainer.optim": "adafactor"}),
    ("01_sft", {"train": "openai/gsm8k:train[:7000]", "dev": "openai/gsm8k:train[7000:]", "base": "GAIR/Abel-7B-002"}),
    ("01_sft", {"base": "GAIR/Abel-7B-002@refs/pr/1"}),
    ("01_sft", {"trainer": {"learning_rate": 1e-4}}),
    ("01_sft", {"trainer.lr_scheduler_type": "inverse_sqrt", "keep": "best"}),
    ("02_rollouts", {"adapter": "none", "limit": 0, "serving": {}}),
    ("04_dpo", {"control_arms": [], "trainer.label_smoothing": 0.1, "trainer.loss_type": ["robust"],
                "trainer.loss_weights": [1.0]}),
    ("04_dpo", {"control_cap": 0, "trainer": {"learning_rate": 1e-4}, "control_trainer": {}}),
    ("05_eval", {"models": {"größe_2": ""}, "comparisons": [], "arm_set": "", "sampling": {}, "harder": ""}),
    ("05_eval", {"styles": ["native", "five-shot"], "native_template": "{question}"}),
    ("05_eval", {"sampling": {"n": 1, "top_p": 1, "temperature": 10.0}}),
    ("05_eval", {"serving": {"gpu_memory_utilization": 1, "max_num_seqs": 1, "start_minutes": 0.5}}),
    ("06_online_rl", {"weights": {"free_tokens": 1024, "correct": 2}, "ppo.lam": 0.0, "trainer.beta": 0.0}),
    ("06_online_rl", {"trainer.num_iterations": 2, "trainer.save_steps": 4, "ppo": {}}),
]


@pytest.mark.parametrize("phase, changes", GOOD, ids=lambda x: str(x)[:24])
def test_what_is_allowed_at_the_edges(phase, changes):
    assert built(phase, **changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_half_precision_needs_a_gpu():
    with pytest.raises(SettingsError, match="trainer.fp16 needs a GPU"):
        built("01_sft", **{"trainer.fp16": True})


BROKEN = [("num_processes: [", "is no YAML"), ("machines: 2", "expected a line"), ("\xff", "is no YAML")]


@pytest.mark.parametrize("text, message", BROKEN)
def test_a_broken_accelerate_file(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text, encoding="latin-1")
    with pytest.raises(SettingsError) as e:
        built("01_sft", accelerate_config=str(tmp_path / "a.yaml"))
    assert message in str(e.value) and "a.yaml" in str(e.value) and "\n" not in str(e.value)


def test_processes_need_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    launch.check_processes(2)
    launch.check_processes(8, "nbs/accelerate/fsdp-8.yaml")
    with pytest.raises(SettingsError, match="n_gpu must be at most 2, the GPUs of this host, got 8"):
        launch.check_processes(8)
    with pytest.raises(SettingsError, match="n_gpu must be at most 2"):
        launch.launch("looper_math.sft", None, n_gpu=8)


# --- the table of the runner


@pytest.mark.parametrize("notebook", sorted((ROOT / "nbs").glob("0[1-9]_*.ipynb")), ids=lambda p: p.stem)
def test_the_runner_has_the_settings_of_each_phase(notebook):
    module, name = runs.SETTINGS[notebook.stem]
    fields = {f.name for f in dataclasses.fields(getattr(importlib.import_module(f"looper_math.{module}"), name))}
    assert fields == set(runs.parameters_of(notebook))


@pytest.mark.parametrize("recipe", runs.recipes())
def test_every_recipe_is_in_range(recipe):
    "On a host with GPUs, vLLM and bitsandbytes; a layout stands in for a chat template that would have to be fetched."
    phases = runs.phases_of(ROOT, recipe)
    values = runs.assign(runs.read_recipe(ROOT, recipe, phases), phases)
    here = {"engine": ("vllm", "auto"), "template": ("chat", "{question}"), "load_in_4bit": (True, False),
            "device": ("cuda", "auto")}
    for phase in phases:
        changed = {name: mine for name, (theirs, mine) in here.items() if values[phase].get(name) == theirs}
        runs.build_settings(phase, values[phase] | changed | {"run": "settings"})
    runs.check_across(list(phases), values)


def test_the_command_line_does_not_wait_for_torch():
    code = "import sys, looper_math.cli; sys.exit('torch' in sys.modules or 'datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# --- through the runner

RUN = "pytest-settings"
THROUGH = { # recipe and flag → what the sentence says
    "smoke 05_eval.sampling={temperature: 0}": "sampling.temperature must be at least 0.01 and at most 10, got",
    "smoke 05_eval.batch_size=0": "05_eval: batch_size must be at least 1 and at most 1,000,000, got 0",
    "smoke 04_dpo.trainer={loss_type: [dop]}": "04_dpo: trainer.loss_type must be [loss] or [loss, sft], where loss",
    "smoke 04_dpo.trainer.beta=-1": "04_dpo: trainer.beta must be above 0 and at most 1,000, got -1",
    "smoke 03_preferences.policy=alll": "03_preferences: policy 'alll' is unknown; did you mean 'all'?",
    "smoke 05_eval.styles=[trainin]": "05_eval: styles may hold training, native, five-shot, got 'trainin'",
    "smoke 05_eval.engine=vllm": "05_eval: engine vllm is not installed",
    "smoke 04_dpo.accelerate_config=nbs/none.yaml": "04_dpo.accelerate_config: there is no nbs/none.yaml",
    "smoke 03.threshold=inf": "-p 03.threshold=inf: threshold must be a finite number, got inf",
    "smoke 05_eval.sampling.top_p=.inf": "-p 05_eval.sampling.top_p=.inf: .inf is no finite number",
    "smoke 02.arm_set=guide-8": "04_dpo.control_arms: 'wolfram_standard' is no arm of 02_rollouts.arm_set, guide-8",
    "smoke 04_dpo.control_cap=0": "there is no outputs/pytest-settings/04_dpo/control; 04_dpo.control_cap is 0",
    "pocket-grpo models={dpo: 04_dpo/adapter}": "pytest-settings/04_dpo/adapter; this recipe does not run 04_dpo",
    "pocket-grpo 06.adapter=outputs/none": "06_online_rl.adapter: there is no outputs/none",
    "pocket-base adapter=": "there is no outputs/pytest-settings/01_sft/adapter; this recipe does not run 01_sft",
}
# In a process of its own, as users run it, which takes seconds.
IN_A_PROCESS = ("smoke 05_eval.sampling={temperature: 0}", "smoke 05_eval.engine=vllm")
if importlib.util.find_spec("vllm"):
    del THROUGH["smoke 05_eval.engine=vllm"]


def build_here(run, todo, values):
    "What `check_settings` does in another process, done in this one, which has torch already."
    return {phase: runs.build_settings(phase, values[phase] | {"run": run}) for phase in todo}


@pytest.mark.parametrize("case", THROUGH)
def test_refused_before_the_first_phase(case, capfd, monkeypatch):
    recipe, flag = case.split(" ", 1)
    if case not in IN_A_PROCESS:
        monkeypatch.setattr(runs, "check_settings", build_here)
    with pytest.raises(SystemExit) as stop:
        cli.looper(["run", recipe, "--run", RUN, "-p", flag])
    err = capfd.readouterr().err
    assert stop.value.code == 2 and THROUGH[case] in err and "Traceback" not in err
    assert not (ROOT / "outputs" / RUN).exists()


def test_papermill_says_the_same(tmp_path):
    call = [sys.executable, "-m", "papermill", "--no-progress-bar", "nbs/05_eval.ipynb", str(tmp_path / "out.ipynb"),
            "-p", "run", RUN, "-y", "sampling: {temperature: 0}"]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and "sampling.temperature must be at least 0.01 and at most 10, got 0" in done.stderr
    assert not (ROOT / "outputs" / RUN).exists()


def test_a_finished_run_does_not_pay_for_it(monkeypatch):
    "Settings are built for the phases that are still to run, and for nothing when there are none."
    phases = runs.phases_of(ROOT, "smoke")
    values = runs.assign(runs.read_recipe(ROOT, "smoke", phases), phases)
    asked = []
    monkeypatch.setattr(runs, "check_settings", lambda run, todo, values: asked.append(todo) or {})
    for done in (lambda *_: True, lambda folder, phase, wanted: phase < "04"):
        monkeypatch.setattr(runs, "is_done", done)
        runs._check_all(ROOT, ROOT / "outputs" / RUN, "smoke", list(phases), values)
    assert asked == [[], ["04_dpo", "05_eval"]]
    monkeypatch.undo()
    monkeypatch.setattr(runs.subprocess, "run", None)
    assert runs.check_settings(RUN, [], values) == {}


def test_what_does_not_go_together_with_an_earlier_evaluation():
    "Before the notebook of that evaluation is overwritten by one that is refused."
    folder = ROOT / "outputs" / RUN / "05_eval"
    noted = small("05_eval") | {"comparisons": []}
    records.write_json(folder / "started.json", {"parameters": noted, "inputs": {}})
    try:
        with pytest.raises(runs.Refused, match="05_eval: .*comparisons are .. there and"):
            runs.build_settings("05_eval", noted | {"run": RUN, "comparisons": [["dpo", "base"]]})
        assert runs.build_settings("05_eval", noted | {"run": RUN, "models": {"base": "", "mine": "data/pocket-base"}})
    finally:
        shutil.rmtree(folder.parent)


def test_presets_that_differ_are_announced():
    phases = runs.phases_of(ROOT, "smoke")
    values = runs.assign([runs.read_flag("03.preset=guide-8", phases)], phases)
    assert runs.check_across(list(phases), values) == [
        "note: 02_rollouts.preset is leave-one-out and 03_preferences.preset is guide-8, which scores the rollouts anew"
    ]


@pytest.mark.parametrize("targets, rollouts", [
    ("human", ""), ("self", "outputs/settings/02_rollouts/rollouts.jsonl"),
    ("mixed", "outputs/settings/02_rollouts/rollouts.jsonl")])
def test_own_solutions_are_taken_from_this_run_unless_a_file_is_named(targets, rollouts):
    assert built("01_sft", targets=targets).rollouts == rollouts
    assert built("01_sft", targets="self", rollouts="a.jsonl").rollouts == "a.jsonl"


def test_a_run_that_takes_its_own_solutions_is_done_when_it_is_started_again():
    "What is recorded is the parameter, not the path that the settings put in its place; the file's hash is an input."
    parameters = {name: p.default for name, p in runs.phases_of(ROOT, "pocket")["01_sft"].items()}
    parameters |= {"run": RUN, "targets": "self"}
    folder = ROOT / "outputs" / RUN
    (folder / "02_rollouts").mkdir(parents=True)
    try:
        (folder / "02_rollouts/rollouts.jsonl").write_text("{}\n")
        phase = sft.open_phase(settings(sft.SFTSettings, parameters))
        assert "rollouts" not in phase.config["parameters"] and "rollouts" in phase.config["inputs"]
        records.write_json(folder / "01_sft/started.json", phase.config)
        runs.check_folder(folder, "pocket", {"01_sft": {k: v for k, v in parameters.items() if k != "run"}})
    finally:
        shutil.rmtree(folder)
