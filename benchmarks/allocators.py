"""A training step on the CPU with several memory allocators: seconds, the system's share of them, and peak memory.

Each step makes tensors of hundreds of megabytes and frees them. The C library returns such blocks to the system, which
fills every new page with zeros; the others keep them, and their memory grows with the gaps that batches of different
lengths leave. The last line is what `training.FreedMemory` does: the C library keeps them within a step.

    apt-get install libjemalloc2 libtcmalloc-minimal4
    python benchmarks/allocators.py --model data/models/qwen-0.5b

A step is two batches of `--rows` rows with LoRA, weights in bfloat16, the adapter in float32 under autocast, as phases
1 and 4 train; the lengths of the batches are drawn around `--tokens`, the same for every allocator. Each allocator runs
in a process of its own. The first step is left out of the times.
"""
import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time

KEEP = "dirty_decay_ms:-1,muzzy_decay_ms:-1,narenas:1,oversize_threshold:0"
ALLOCATORS = { # name → environment
    "C library": {}, "C library, large pages": {"THP_MEM_ALLOC_ENABLE": "1"},
    "C library, told to keep": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(40 * 10**9),
                                "MALLOC_TOP_PAD_": str(2**26)},
    "tcmalloc": {"LD_PRELOAD": "libtcmalloc_minimal.so.4"},
    "jemalloc": {"LD_PRELOAD": "libjemalloc.so.2", "MALLOC_CONF": KEEP},
    "C library, told to keep within a step": {}}


def usage(): return resource.getrusage(resource.RUSAGE_SELF)


def measure(folder: str, rows: int, tokens: int, steps: int, within: bool) -> dict:
    "Medians over steps: seconds, the system's CPU seconds, page faults; and the peak memory in GB."
    import torch
    from peft import get_peft_model

    from looper_math import models, training
    model = get_peft_model(models.load_base(folder, "bfloat16"), models.lora_config()).train()
    draw, seen = random.Random(0), []
    training.keep_freed_memory(within)
    for _ in range(steps + 1):
        before, start = usage(), time.perf_counter()
        for _ in range(2):
            ids = torch.randint(0, 1000, (rows, draw.randint(tokens * 2 // 3, tokens * 4 // 3)))
            with torch.autocast("cpu", torch.bfloat16): loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        if within: training.return_freed_memory()
        after = usage()
        seen.append((time.perf_counter() - start, after.ru_stime - before.ru_stime, after.ru_minflt - before.ru_minflt))
    medians = map(statistics.median, zip(*seen[1:]))
    return dict(zip(("seconds", "system", "faults"), medians)) | {"peak": usage().ru_maxrss / 1e6}


def child(name: str, args) -> dict:
    "The measurement in a process with another environment."
    command = [sys.executable, __file__, "--model", args.model, "--child", name,
               *(str(x) for option in ("rows", "tokens", "steps") for x in (f"--{option}", getattr(args, option)))]
    done = subprocess.run(command, env=os.environ | ALLOCATORS[name], capture_output=True, text=True)
    if done.returncode or "cannot be preloaded" in done.stderr: raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a model")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=340)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--child", choices=ALLOCATORS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        within = args.child.endswith("within a step")
        return print(json.dumps(measure(args.model, args.rows, args.tokens, args.steps, within)))
    print("| allocator | s a step | of C library | system's CPU s | page faults | peak GB |\n|---|---|---|---|---|---|")
    first = None
    for name in ALLOCATORS:
        r = child(name, args)
        first = first or r["seconds"]
        print(f"| {name} | {r['seconds']:.1f} | {r['seconds'] / first:.2f} | {r['system']:.1f} | {r['faults']:,.0f} | "
              f"{r['peak']:.1f} |", flush=True)


if __name__ == "__main__": main()
