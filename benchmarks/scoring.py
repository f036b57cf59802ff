"""Time of Regime W's scoring against an earlier commit, side by side in one run, and its memory.

    export OMP_NUM_THREADS=1                         one core
    python benchmarks/scoring.py                     7,473 generated questions with eleven solutions each
    python benchmarks/scoring.py --old COMMIT        against the module of another commit
    python benchmarks/scoring.py --rollouts FILE     the questions of a rollout file
    python benchmarks/scoring.py --stream 100000     also print the peak memory over a stream of that many questions

Both modules compute every metric, reward and signal, the ledger included, and must return the same rewards. They take
turns on chunks of questions. The time of a chunk is the smallest CPU time of `--repeats` turns.
"""
import argparse
import random
import resource
import subprocess
import sys
import time
import types
from itertools import islice

from looper_math import regime_w
from looper_math.prompts import arms
from looper_math.records import ROOT, iter_records

SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
JOINTS = ["so", "then", "because", "after that", "we see that", "to find this", "in total", "by the problem",
          "this means that", "now"]


def module_at(commit):
    "Regime W as it was at a commit, on top of today's answers and ledger."
    show = ["git", "show", f"{commit}:looper_math/regime_w.py"]
    source = subprocess.run(show, cwd=ROOT, check=True, capture_output=True, text=True, encoding="utf-8").stdout
    module = types.ModuleType(f"looper_math.regime_w_at_{commit}")
    module.__package__ = "looper_math"
    sys.modules[module.__name__] = module  # dataclasses look their module up there
    exec(compile(source, module.__name__, "exec"), vars(module))
    return module


def generated(questions, seed=0):
    "Rollout records of GSM8K's length: the same steps and equations in every solution, in words that overlap in part."
    rng = random.Random(seed)
    for q in range(questions):
        nouns = ["".join(rng.choices(SYLLABLES, k=rng.randint(2, 3))) for _ in range(30)]
        steps = [(rng.randint(2, 90), rng.randint(2, 90)) for _ in range(rng.randint(3, 6))]
        gold = sum(steps[-1])
        yield dict(question_id=f"q{q}", gold_answer=str(gold),
                   trajectories=[solution(rng, arm, nouns, steps, gold) for arm in arms()])


def solution(rng, arm, nouns, steps, gold):
    "One trajectory: a line of words for each step, the answer right in seven of ten."
    lines = []
    for a, b in steps:
        words = " ".join(f"{rng.choice(nouns)} {rng.choice(JOINTS)}" for _ in range(rng.randint(3, 6)))
        lines.append(f"{words.capitalize()}, the {rng.choice(nouns)} is {a} + {b} = {a + b} {rng.choice(nouns)}.")
    answer = gold if rng.random() < 0.7 else gold + rng.randint(1, 3)
    return dict(arm_name=arm.name, reasoning="\n".join(lines), answer=str(answer), num_tokens=rng.randint(80, 700))


def cpu_time(score, chunk):
    "Seconds of CPU time for scoring a chunk, and the scored records."
    start = time.process_time()
    scored = list(score(chunk, "platinum-11"))
    return time.process_time() - start, scored


def compare(chunk, modules, repeats):
    "Smallest CPU time of each module; raises when their rewards differ."
    times, scored = {name: [] for name in modules}, {}
    for name in list(modules) * repeats:
        seconds, scored[name] = cpu_time(modules[name].score_records, chunk)
        times[name].append(seconds)
    for old, new in zip(scored["old"], scored["new"]):
        for a, b in zip(old["trajectories"], new["trajectories"]):
            if abs(a["reward"] - b["reward"]) > 1e-12:
                raise AssertionError(f"{old['question_id']}: the rewards {a['reward']} and {b['reward']} differ")
    return {name: min(values) for name, values in times.items()}


def peak_mb(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def stream(questions):
    "Score a stream of generated questions and print the peak memory after each fifth."
    for i, _ in enumerate(regime_w.score_records(generated(questions, seed=1)), start=1):
        if i % max(1, questions // 5) == 0: print(f"  stream: peak memory {peak_mb():.0f} MB after {i:,} questions")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", default="6c50942", help="commit of the earlier module")
    parser.add_argument("--questions", type=int, default=7473)
    parser.add_argument("--repeats", type=int, default=3, help="turns of each module on each chunk")
    parser.add_argument("--rollouts", default="", help="a rollout file instead of generated questions")
    parser.add_argument("--stream", type=int, default=0, help="number of generated questions to stream")
    args = parser.parse_args()

    if args.stream: stream(args.stream)
    modules, total = dict(old=module_at(args.old), new=regime_w), dict(old=0.0, new=0.0)
    records = iter_records(args.rollouts) if args.rollouts else generated(args.questions)
    questions = trajectories = words = 0
    while chunk := list(islice(records, 250)):
        for name, seconds in compare(chunk, modules, args.repeats).items(): total[name] += seconds
        questions += len(chunk)
        trajectories += sum(len(r["trajectories"]) for r in chunk)
        words += sum(len(t["reasoning"].split()) for r in chunk for t in r["trajectories"])

    print(f"{questions:,} questions, {trajectories:,} trajectories of {words / trajectories:.0f} words, "
          f"every signal and the ledger, one core; equal rewards")
    print(f"  {args.old:10} {total['old']:6.2f} s")
    print(f"  now        {total['new']:6.2f} s   {total['new'] / total['old']:.2f} times {args.old}'s")


if __name__ == "__main__":
    main()
