"""Time of Regime W's scorer against a plain implementation, and its memory.

    python benchmarks/scoring.py                             7,473 generated questions of eleven solutions
    python benchmarks/scoring.py --rollouts FILE             the questions of a rollout file
    python benchmarks/scoring.py --stream 100000             also stream so many questions and watch the memory

Both scorers run in one process, in turns over the same chunks of questions, and have to agree on every metric and reward.
"""
import argparse
import itertools
import os
import random
import re
import resource
import time

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[threads] = "1"  # one core; read when numpy is imported

from looper_math.answers import parse_answer
from looper_math.prompts import arms
from looper_math.records import iter_records
from looper_math.regime_w import find_preset, score_records

SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
JOINTS = ["so", "then", "because", "after that", "we see that", "to find this", "in total", "by the problem", "this means that", "now"]


def generated(questions, seed=0):
    "Rollout records of GSM8K's length: steps with equations, said by every arm in words that overlap without being equal."
    rng = random.Random(seed)
    for q in range(questions):
        nouns = ["".join(rng.choices(SYLLABLES, k=rng.randint(2, 3))) for _ in range(30)]
        steps = [(rng.randint(2, 90), rng.randint(2, 90)) for _ in range(rng.randint(3, 6))]
        gold = sum(steps[-1])
        trajectories = []
        for arm in arms():
            lines = []
            for a, b in steps:
                said = " ".join(f"{rng.choice(nouns)} {rng.choice(JOINTS)}" for _ in range(rng.randint(3, 6)))
                lines.append(f"{said.capitalize()}, the {rng.choice(nouns)} is {a} + {b} = {a + b} {rng.choice(nouns)}.")
            answer = gold if rng.random() < 0.7 else gold + rng.randint(1, 3)
            trajectories.append(dict(arm_name=arm.name, reasoning="\n".join(lines), answer=str(answer), num_tokens=rng.randint(80, 700)))
        yield dict(question_id=f"q{q}", gold_answer=str(gold), trajectories=trajectories)


def plain_words(trajectories):
    "Words of each trajectory, and their sets."
    tokens = [re.findall(r"\w+", t["reasoning"].lower()) for t in trajectories]
    return tokens, [set(w) for w in tokens]


def plain_jaccard(a, b): return len(a & b) / len(a | b) if a | b else 0.0


def plain_metrics(trajectories, answers, bags, tokens, weights):
    "Metrics of platinum-11 as one would first write them: loops over all pairs."
    n, lengths = len(trajectories), [len(w) for w in tokens]
    place = {t["arm_name"]: i for i, t in enumerate(trajectories)}
    a, a_prime, cf1 = (place.get(name) for name in ("wolfram_standard", "wolfram_rephrase", "maudlin_cf1"))

    def same(i, j): return answers[i] is not None and answers[i] == answers[j]

    pairs = list(itertools.combinations(range(n), 2))
    end = sum(same(i, j) for i, j in pairs) / len(pairs)
    mean = sum(lengths) / n
    steady = 1 / (1 + sum((x - mean) ** 2 for x in lengths) / n / mean)
    alike = sum(plain_jaccard(bags[i], bags[j]) for i, j in pairs) / len(pairs)
    if a is not None and a_prime is not None:
        alike = (1 - weights.paraphrase) * alike + weights.paraphrase * plain_jaccard(bags[a], bags[a_prime])
    path = weights.length * steady + weights.overlap * alike
    cf = max(sum(same(i, j) for j in range(n) if j != i) for i in range(n)) / (n - 1)
    probes = [i for i in (a, a_prime) if i is not None]
    probe = sum(same(i, cf1) for i in probes) / len(probes) if probes and cf1 is not None else None
    return dict(s_end=end, s_path=path, s_cf=cf, s_probe=probe, s_wm=weights.end * end + weights.path * path + weights.cf * cf)


def plain_rewards(trajectories, answers, gold, bags, metrics, weights):
    "Rewards of platinum-11 in the same manner."
    correct = [x is not None and x == gold for x in answers]
    sizes = [t["num_tokens"] for t, c in zip(trajectories, correct) if c]
    rewards = []
    for i, t in enumerate(trajectories):
        quality = 0.0
        if correct[i]:
            low, high = min(sizes), max(sizes)
            short = (high - t["num_tokens"]) / (high - low) if high > low else 0.5
            near = [plain_jaccard(bags[i], bags[p]) for p, other in enumerate(trajectories)
                    if p != i and correct[p] and other["arm_name"] in ("wolfram_standard", "wolfram_rephrase")]
            quality = weights.conciseness * short + weights.alignment * max(near) if near else short
        rewards.append(weights.correct * correct[i] + weights.s_wm * metrics["s_wm"] + weights.quality * quality + weights.agreement * all(correct)
                       + weights.excess_tokens * max(0, t["num_tokens"] - weights.free_tokens))
    return rewards


def plain_score(record, weights):
    "Metrics and rewards of one question. Words are cut and sets built once, so that only the manner of scoring is compared."
    trajectories = record["trajectories"]
    answers = [parse_answer(t["answer"]) for t in trajectories]
    tokens, bags = plain_words(trajectories)
    metrics = plain_metrics(trajectories, answers, bags, tokens, weights)
    return metrics, plain_rewards(trajectories, answers, parse_answer(record["gold_answer"]), bags, metrics, weights)


def check(record, fast, slow):
    "Both scorers say the same."
    for name, value in slow[0].items():
        got = fast["metrics"][name]
        assert (value is None and got is None) or abs(value - got) < 1e-9, (record["question_id"], name)
    assert all(abs(t["reward"] - r) < 1e-9 for t, r in zip(fast["trajectories"], slow[1])), record["question_id"]


def peak_mb(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=7473)
    parser.add_argument("--rollouts", default="", help="a rollout file instead of generated questions")
    parser.add_argument("--stream", type=int, default=0, help="stream so many more generated questions with every signal")
    args = parser.parse_args()

    preset = find_preset("platinum-11")
    records = iter_records(args.rollouts) if args.rollouts else generated(args.questions)
    scored = trajectories = words = 0
    seconds = dict(plain=0.0, fast=0.0, every_signal=0.0, leave_one_out=0.0)

    def timed(name, score):
        start = time.perf_counter()
        results = score()
        seconds[name] += time.perf_counter() - start
        return results

    while chunk := list(itertools.islice(records, 64)):
        slow = timed("plain", lambda: [plain_score(r, preset.weights) for r in chunk])
        fast = timed("fast", lambda: list(score_records(chunk, preset, every_signal=False)))
        timed("every_signal", lambda: list(score_records(chunk, preset)))
        timed("leave_one_out", lambda: list(score_records(chunk, "leave-one-out")))
        for record, f, s in zip(chunk, fast, slow):
            check(record, f, s)
        scored += len(chunk)
        trajectories += sum(len(r["trajectories"]) for r in chunk)
        words += sum(len(t["reasoning"].split()) for r in chunk for t in r["trajectories"])

    print(f"{scored:,} questions, {trajectories:,} trajectories of {words / trajectories:.0f} words, one core; both scorers agree on all of them")
    print(f"  plain sets over all pairs, metrics and rewards  {seconds['plain']:6.2f} s")
    print(f"  array scorer, metrics and rewards               {seconds['fast']:6.2f} s   {seconds['plain'] / seconds['fast']:.1f} times faster")
    print(f"  array scorer, every signal and the ledger       {seconds['every_signal']:6.2f} s")
    print(f"  the same under leave-one-out                    {seconds['leave_one_out']:6.2f} s")
    print(f"  peak memory {peak_mb():.0f} MB")

    if args.stream:
        start, marks = time.perf_counter(), []
        for i, _ in enumerate(score_records(generated(args.stream, seed=1), preset), start=1):
            if i % max(1, args.stream // 5) == 0: marks.append(f"{peak_mb():.0f} MB after {i:,}")
        print(f"  streamed {args.stream:,} questions in {time.perf_counter() - start:.0f} s, generating them included: {', '.join(marks)}")


if __name__ == "__main__":
    main()
