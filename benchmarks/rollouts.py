"""Speed of phase 2 against a script that calls `generate`, and against the limits of the machine.

    python benchmarks/rollouts.py --adapter outputs/pocket/01_sft/adapter       the pocket, 500 questions of eleven arms
    python benchmarks/rollouts.py --shape 7b --max-new-tokens 200               a Mistral of 7 billion random weights
    python benchmarks/rollouts.py --shape 7b --max-new-tokens 200 --engine vllm

Every row answers the same questions in one run of this program, in turns over parts of the questions, so that a busy
machine slows all rows alike. CPU seconds are given beside seconds of the clock, because on a shared machine the clock
also counts other programs. Loading a model is not counted. The rows:

    phase 2          prompts in, graded and scored records out, written and synced: as in a run
    decode loop      the engine alone on the same batches: tokens in, tokens out
    generate, same   the library's `generate` on the same batches, one temperature
    generate, 11     the library's `generate`, a batch of eleven for each question, as scripts do
    one by one       the library's `generate`, one prompt at a time, on a few questions; its time is extrapolated
    vLLM             its own `LLM.generate` given all requests at once (with --engine vllm, in place of transformers)

For a GPU two shares of its limits are given. With P parameters, w bytes a parameter, L layers, H query heads of width
d, c bytes of cached keys and values a token, and for each trajectory p prompt tokens and n new ones:

    arithmetic  (2 P (p + n) + 4 L H d (p + n)² / 2, summed over trajectories) / seconds / peak operations a second
    bandwidth   (P w for each step of a batch, and c (p n + n² / 2), summed over trajectories) / seconds / peak bytes
                a second
"""
import argparse
import contextlib
import dataclasses
import functools
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import torch

from looper_math import decoding, engines, models, rollouts, shards
from looper_math.data import load_questions
from looper_math.records import ROOT, read_sealed
from looper_math.runs import parameters_of
from looper_math.tables import trajectory_table
from looper_math.trajectories import requests_for

# bf16 operations and bytes a second, dense, SXM
PEAKS = {"H200": (989e12, 4.8e12), "H100": (989e12, 3.35e12), "A100": (312e12, 2.04e12)}
SHAPES = {
    "7b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
               num_key_value_heads=8, vocab_size=32000, max_position_embeddings=4096),
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1, vocab_size=800, max_position_embeddings=1024),
}


def random_model(shape, dtype):
    "Folder of a Mistral with random weights and the pocket's tokenizer; made once."
    from transformers import MistralConfig, MistralForCausalLM
    folder = ROOT / f"build/bench-{shape}-{dtype}"
    if (folder / "tokenizer.json").exists(): return str(folder)
    kind = models.pick_dtype(dtype)
    tokenizer = models.load_tokenizer("data/pocket-base")
    tokens = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    config = MistralConfig(**SHAPES[shape], **tokens, sliding_window=None, dtype=kind)
    torch.manual_seed(0)
    with torch.device(models.device()): model = MistralForCausalLM._from_config(config, dtype=kind)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class Meter:
    "Seconds on the clock and of all cores, trajectories, tokens and peak memory of one row, summed over its turns."
    def __init__(self):
        self.seconds, self.cores, self.trajectories, self.tokens, self.peak = 0.0, 0.0, 0, 0, 0.0

    @contextlib.contextmanager
    def turn(self):
        reset_peak()
        start, busy = time.perf_counter(), time.process_time()
        yield
        if torch.cuda.is_available(): torch.cuda.synchronize()
        self.seconds += time.perf_counter() - start
        self.cores += time.process_time() - busy
        self.peak = max(self.peak, peak_gib())

    def add(self, trajectories, tokens):
        self.trajectories += trajectories
        self.tokens += tokens


def reset_peak():
    if torch.cuda.is_available(): torch.cuda.reset_peak_memory_stats()
    else: Path("/proc/self/clear_refs").write_text("5")


def peak_gib():
    "Peak memory of the GPU, or resident memory of this process, since the last reset."
    if torch.cuda.is_available(): return torch.cuda.max_memory_allocated() / 2**30
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def phase_2(meter, s, generate, questions):
    "The phase's own loop, into a shard in a scratch folder."
    requests_of, make = functools.partial(rollouts.arm_requests, s), functools.partial(rollouts.rollout, s)
    with tempfile.TemporaryDirectory() as d:
        files = dataclasses.replace(s.files, final=Path(d) / "rollouts.jsonl", partial=Path(d) / "gathered.jsonl")
        tasks = shards.missing(files, questions, requests_of, make)
        with meter.turn(): shards.append(generate, tasks)
        rows = trajectory_table(read_sealed(files.shard_of(0)))
    meter.add(len(rows), int(rows.num_tokens.sum()))


def windows_of_jobs(s, questions, tokenizer, context):
    "The requests of each window as jobs, as the transformers engine decodes them."
    requests = [r for q in questions for r in requests_for(q, s.arms, s.template, s.max_new_tokens)]
    size = engines.WINDOW * s.batch_size
    for i in range(0, len(requests), size): yield engines.tokenize(requests[i:i + size], tokenizer, context)


def decode_loop(meter, s, model, tokenizer, ends, questions):
    windows = list(windows_of_jobs(s, questions, tokenizer, model.config.max_position_embeddings))
    with meter.turn():
        batches = [b for jobs in windows for b in decoding.decode(jobs, model, ends, rows=s.batch_size)]
    lengths = [len(new) for batch in batches for _, new in batch]
    meter.add(len(lengths), sum(lengths))


def library(model, tokenizer, jobs, ends):
    "New tokens of left-padded jobs by `generate`; one temperature for all, because it knows no other way."
    ids = {"input_ids": [j.ids for j in jobs]}
    batch = tokenizer.pad(ids, padding=True, padding_side="left", return_tensors="pt").to(model.device)
    out = model.generate(**batch, max_new_tokens=jobs[0].max_new_tokens, do_sample=True, temperature=.35, top_p=.95,
                         pad_token_id=tokenizer.pad_token_id)
    rows = out[:, batch.input_ids.shape[1]:].tolist()
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return sum(next((k + 1 for k, t in enumerate(row) if t in ends), len(row)) for row in rows), texts


def generate_same(meter, s, model, tokenizer, ends, questions):
    for jobs in windows_of_jobs(s, questions, tokenizer, model.config.max_position_embeddings):
        for batch in decoding.cut_batches(jobs, s.batch_size, decoding.BATCH_TOKENS):
            with meter.turn(): tokens, texts = library(model, tokenizer, [jobs[i] for i in batch], ends)
            meter.add(len(texts), tokens)


def generate_grouped(meter, s, model, tokenizer, ends, questions, size):
    "`size` prompts at a time: eleven are one question, one is one prompt."
    for question in questions:
        requests = requests_for(question, s.arms, s.template, s.max_new_tokens)
        jobs = engines.tokenize(requests, tokenizer, model.config.max_position_embeddings)
        for i in range(0, len(jobs), size):
            with meter.turn(): tokens, texts = library(model, tokenizer, jobs[i:i + size], ends)
            meter.add(len(texts), tokens)


def raw_vllm(folder, adapter, dtype, jobs, length, ends, results):
    "vLLM's own call on all jobs at once, in a process of its own."
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from looper_math.serving import served_rank
    options = {"enable_lora": True, "max_lora_rank": served_rank(adapter)} if adapter else {}
    if not torch.cuda.is_available():
        options |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(8192, length)}
    options |= {"dtype": str(models.pick_dtype(dtype)).removeprefix("torch."), "max_model_len": length}
    llm = LLM(folder, enable_prefix_caching=True, **options)
    sampling = [SamplingParams(temperature=j.temperature, top_p=j.top_p, seed=j.seed, max_tokens=j.max_new_tokens,
                               stop_token_ids=ends) for j in jobs]
    lora = LoRARequest("adapter", 1, adapter) if adapter else None
    start = time.perf_counter()
    outs = llm.generate([{"prompt_token_ids": j.ids} for j in jobs], sampling, lora_request=lora, use_tqdm=False)
    results.put((time.perf_counter() - start, len(outs), sum(len(o.outputs[0].token_ids) for o in outs)))


def limits(name, model_config, parameters, itemsize, jobs, new, batches, seconds):
    "Shares of the device's arithmetic and bandwidth, by the formulas above."
    peak = next((p for key, p in PEAKS.items() if key in name), None)
    if not peak: return f"no limits are known for {name}"
    heads = model_config.num_attention_heads
    width = heads * (getattr(model_config, "head_dim", None) or model_config.hidden_size // heads)
    sizes = [(len(j.ids), n) for j, n in zip(jobs, new)]
    attention = 2 * model_config.num_hidden_layers * width
    operations = sum(2 * parameters * (p + n) + attention * (p + n)**2 for p, n in sizes)
    cached = decoding.cache_bytes(model_config, 1, itemsize)
    weights = sum(parameters * itemsize * max(new[i] for i in batch) for batch in batches)
    moved = weights + sum(cached * (p * n + n * n / 2) for p, n in sizes)
    return (f"{operations / seconds / peak[0]:.1%} of {name}'s arithmetic ({operations:.3g} operations), "
            f"{moved / seconds / peak[1]:.1%} of its bandwidth ({moved:.3g} bytes)")


def device_name(): return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def show(rows, questions_of, total):
    "The table of all rows, each against the script's."
    script = rows.get("generate, 11")
    print(f"\n{'row':<16}{'questions':>10}{'seconds':>10}{'CPU seconds':>14}{'trajectories/s':>16}{'tokens/s':>10}"
          f"{'peak GiB':>10}{'against generate, 11':>22}")
    for name, m in rows.items():
        speed = m.trajectories / m.seconds
        against = f"{speed / (script.trajectories / script.seconds):.2f}" if script else ""
        part = questions_of[name] < total
        extrapolated = f"  (would take {m.seconds * total / questions_of[name]:.0f} s)" if part else ""
        print(f"{name:<16}{questions_of[name]:>10}{m.seconds:>10.1f}{m.cores:>14.1f}{speed:>16.1f}"
              f"{m.tokens / m.seconds:>10.0f}{m.peak:>10.2f}{against:>22}{extrapolated}")


def print_turn(turn, rows, before):
    "Speed of phase 2 in this turn, against each other row."
    for what, k in (("trajectories/s", 0), ("trajectories a CPU second", 1)):
        speed = {name: (m.trajectories - before[name][2]) / ((m.seconds, m.cores)[k] - before[name][k])
                 for name, m in rows.items()}
        others = [f"{speed['phase 2'] / v:.2f} of {name}" for name, v in speed.items() if name != "phase 2"]
        print(f"turn {turn + 1}: phase 2 makes {speed['phase 2']:.1f} {what}, {', '.join(others)}", flush=True)


def on_transformers(args, s, questions):
    model = models.load_merged(s.base, s.adapter_folder, s.dtype)
    ours = engines._MergedModel(s.base, [s.adapter_folder], s.dtype, load_in_4bit=False).model
    tokenizer = models.load_tokenizer(s.base)
    ends = engines.end_tokens(model.generation_config, tokenizer)
    single = -(-min(args.single, len(questions)) // args.rounds)   # in each turn
    rows = {name: Meter() for name in ("phase 2", "decode loop", "generate, same", "generate, 11", "one by one")}
    with engines.opened("transformers", s.base, s.adapter_folder, s.dtype, s.batch_size) as generate:
        phase_2(Meter(), s, generate, questions[:8])                        # warm up
        size = -(-len(questions) // args.rounds)
        for turn in range(args.rounds):
            part = questions[turn * size:(turn + 1) * size]
            before = {name: (m.seconds, m.cores, m.trajectories) for name, m in rows.items()}
            phase_2(rows["phase 2"], s, generate, part)
            decode_loop(rows["decode loop"], s, ours, tokenizer, ends, part)
            generate_same(rows["generate, same"], s, model, tokenizer, ends, part)
            generate_grouped(rows["generate, 11"], s, model, tokenizer, ends, part, 11)
            generate_grouped(rows["one by one"], s, model, tokenizer, ends, part[:single], 1)
            print_turn(turn, rows, before)
    show(rows, {name: len(questions) for name in rows} | {"one by one": single * args.rounds}, len(questions))
    jobs = [j for part in windows_of_jobs(s, questions, tokenizer, model.config.max_position_embeddings) for j in part]
    new = [rows["phase 2"].tokens / len(jobs)] * len(jobs)
    batches = decoding.cut_batches(jobs, s.batch_size, decoding.BATCH_TOKENS)
    print("phase 2:", limits(device_name(), model.config, sum(p.numel() for p in model.parameters()),
                             model.dtype.itemsize, jobs, new, batches, rows["phase 2"].seconds))


def on_vllm(args, s, questions):
    tokenizer, folder = models.load_tokenizer(s.base), models.source(s.base)
    ends = engines.end_tokens(engines.generation_settings(folder), tokenizer)
    rows = {"phase 2": Meter(), "vLLM": Meter()}
    with engines.opened("vllm", s.base, s.adapter_folder, s.dtype, max_length=args.length) as generate:
        phase_2(Meter(), s, generate, questions[:8])                        # warm up
        phase_2(rows["phase 2"], s, generate, questions)
    jobs = [j for part in windows_of_jobs(s, questions, tokenizer, args.length) for j in part]
    spawn = multiprocessing.get_context("spawn")
    results = spawn.SimpleQueue()
    process = spawn.Process(target=raw_vllm, args=(folder, s.adapter_folder, s.dtype, jobs, args.length, ends, results))
    process.start()
    rows["vLLM"].seconds, rows["vLLM"].trajectories, rows["vLLM"].tokens = results.get()
    process.join()
    show(rows, {name: len(questions) for name in rows}, len(questions))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--base", default="data/pocket-base")
    parser.add_argument("--adapter", default="", help="a peft folder")
    parser.add_argument("--shape", choices=SHAPES, help="a model with random weights in place of base and adapter")
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a prompt and its completion, for vLLM")
    parser.add_argument("--rounds", type=int, default=2, help="parts of the questions, over which the rows take turns")
    parser.add_argument("--single", type=int, default=10, help="questions for the row one by one")
    args = parser.parse_args()

    defaults = {k: p.default for k, p in parameters_of(ROOT / "nbs/02_rollouts.ipynb").items()}
    base = random_model(args.shape, args.dtype) if args.shape else args.base
    adapter = "none" if args.shape else args.adapter or "none"
    ours = dict(run="benchmark", base=base, adapter=adapter, engine=args.engine, dtype=args.dtype,
                batch_size=args.batch_size, max_new_tokens=args.max_new_tokens)
    s = rollouts.RolloutSettings(**defaults | ours)
    questions = load_questions(s.questions, limit=args.questions)
    print(f"{len(questions)} questions, {len(s.arms)} arms, {args.shape or s.base}, {torch.get_num_threads()} cores, "
          f"{device_name()}")
    (on_vllm if args.engine == "vllm" else on_transformers)(args, s, questions)


if __name__ == "__main__": sys.exit(main())
