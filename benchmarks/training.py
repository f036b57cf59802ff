"""DPO as phase 4 does it, and DPO with two full models: same pairs, same batches, one run.

Ours keeps one base in memory, trains a LoRA adapter, and computes the reference's log-probabilities once, before the
first update. The other way is that of earlier scripts: the policy and a second full copy of the model as reference,
which runs at every update.

    # a Mistral of 110 million random weights, on the CPU
    python benchmarks/training.py
    # a billion weights, in the precision of the 7B recipes, still on the CPU
    python benchmarks/training.py --shape 1b --dtype bfloat16
    # the shape of Mistral-7B, for a GPU
    python benchmarks/training.py --shape 7b --batch 2 --tokens 512

Each way runs in its own process, so that its peak memory is measured alone. The share of the peak FLOP rate (MFU)
counts 6 FLOP per weight and trained token for a full training, and 4 for an adapter: 2 for the forward pass, 2 for the
gradients of activations, none for the frozen weights.
"""
import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings

SHAPES = { # width, layers, heads, feed-forward, vocabulary
    "tiny": (64, 2, 4, 128, 512), "110m": (768, 12, 12, 2048, 4096), "1b": (2048, 22, 32, 5632, 32000),
    "3b": (3072, 28, 24, 8192, 32000), "7b": (4096, 32, 32, 14336, 32000)}
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 FLOP/s of the data sheets
WAYS = ("ours", "two models")


def model_of(shape: str, dtype):
    "A Mistral with random weights."
    import torch
    from transformers import AutoModelForCausalLM, MistralConfig
    width, layers, heads, feed, vocabulary = SHAPES[shape]
    torch.manual_seed(0)
    config = MistralConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
                           num_key_value_heads=max(1, heads // 4), intermediate_size=feed, vocab_size=vocabulary,
                           sliding_window=None, max_position_embeddings=4096)
    # Created in its own precision: created in a higher one it would need more memory than the training.
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def pairs_of(n: int, tokens: int, vocabulary: int):
    "Pairs of random words, one token each: half of `tokens` are the prompt."
    import numpy as np
    from datasets import Dataset
    rng = np.random.default_rng(0)
    draw = lambda: " ".join(f"t{i}" for i in rng.integers(3, vocabulary, tokens // 2))
    return Dataset.from_list([{"prompt": draw(), "chosen": " " + draw(), "rejected": " " + draw()} for _ in range(n)])


def tokenizer_of(vocabulary: int):
    "A tokenizer with one token per word; no word contains a special token."
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    special = ["<unknown>", "<pad>", "<end>"]
    names = special + [f"t{i}" for i in range(len(special), vocabulary)]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=special[0]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=special[1], eos_token=special[2])


def measure(way: str, a) -> dict:
    "Train for a few updates one way; seconds an update and peak memory."
    import torch
    from peft import get_peft_model
    from trl import DPOConfig, DPOTrainer

    from looper_math import models, training
    warnings.simplefilter("ignore")
    gpu, ours = torch.cuda.is_available(), way == "ours"
    dtype, vocabulary = models.pick_dtype(a.dtype), SHAPES[a.shape][-1]
    policy = get_peft_model(model_of(a.shape, dtype), models.lora_config())
    rows, stamps = pairs_of(a.batch * a.updates, a.tokens, vocabulary), []
    with tempfile.TemporaryDirectory() as folder:
        config = training.one_device(DPOConfig(
            output_dir=folder, per_device_train_batch_size=a.batch, max_steps=a.updates, learning_rate=1e-5,
            max_length=4096, save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=1,
            bf16=training.precision() == "bf16", use_cpu=not gpu, precompute_ref_log_probs=ours,
            gradient_checkpointing=a.checkpointing))
        start = time.perf_counter()
        reference = None if ours else model_of(a.shape, dtype)
        trainer = DPOTrainer(policy, ref_model=reference, args=config, train_dataset=rows,
                             processing_class=tokenizer_of(vocabulary))
        prepared = time.perf_counter() - start
        tokens = sum(len(trainer.train_dataset[0][f"{part}_ids"]) for part in ("prompt", "chosen"))
        assert tokens == a.tokens + 1, f"the trainer has {tokens} tokens, expected {a.tokens} and an end token"
        trainer.add_callback(clock(stamps))
        trainer.train()
    steps = sorted(b - a for a, b in zip(stamps, stamps[1:]))
    peak = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"way": way, "seconds": steps[len(steps) // 2], "preparing": prepared if ours else 0., "memory": peak,
            "weights": sum(p.numel() for p in policy.parameters()), "loss": trainer.state.log_history[0]["loss"],
            "device": torch.cuda.get_device_name() if gpu else "CPU"}


def clock(stamps: list):
    "A callback that appends the time at which each update ended."
    import torch
    from transformers import TrainerCallback
    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            if torch.cuda.is_available(): torch.cuda.synchronize()
            stamps.append(time.perf_counter())
    return Clock()


def report(results: list[dict], a):
    "Print both ways and their ratios."
    trained, (ours, other) = 2 * a.batch * a.tokens, results
    print(f"{ours['weights']:,} weights on {ours['device']}, {a.batch} pairs of 2 × {a.tokens} tokens per update, "
          f"median of {a.updates - 1} updates")
    print(f"{'way':<12}{'s/update':>10}{'tokens/s':>10}{'peak GB':>10}{'MFU':>8}")
    for r in results:
        flops = next((v for k, v in PEAK.items() if k in r["device"]), None)
        mfu = f"{4 * r['weights'] * trained / r['seconds'] / flops:.1%}" if flops else "–"
        rate = trained / r["seconds"]
        print(f"{r['way']:<12}{r['seconds']:>10.3f}{rate:>10.0f}{r['memory'] / 1e9:>10.2f}{mfu:>8}")
    time_ratio, memory_ratio = (ours[name] / other[name] for name in ("seconds", "memory"))
    print(f"ours / two models: time {time_ratio:.2f}, memory {memory_ratio:.2f}; reference computed before training: "
          f"{ours['preparing']:.1f} s with the set-up, once for all epochs")
    print(f"loss of the first update: {ours['loss']:.4f} and {other['loss']:.4f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="110m")
    parser.add_argument("--batch", type=int, default=1, help="pairs per update")
    parser.add_argument("--tokens", type=int, default=256, help="of a prompt with one completion")
    parser.add_argument("--dtype", default="auto", help="of the weights: auto, float32 or bfloat16")
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.way:
        print(json.dumps(measure(a.way, a)))
        return
    results = []
    for way in WAYS:
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results.append(json.loads(done.stdout.strip().splitlines()[-1]))
    report(results, a)


if __name__ == "__main__": main()
