"What must hold for the pairs of any rollouts, and for the phase that writes them."
import dataclasses
import hashlib
import json
import math
import random

import pytest
from hypothesis import given, settings, strategies as st

from looper_math import pairs as pairing, records
from looper_math.pairs import CHOICES, build_pairs, build_pairs_report, compare_policies, inertness_audit
from looper_math.preferences import PreferenceSettings, main, open_phase
from looper_math.prompts import arms, build_prompt
from looper_math.records import RecordError, RunConflict, SettingsError
from looper_math.regime_w import PRESETS, REWARD_TERMS, score_records

settings.register_profile("no deadline", deadline=None)  # other processes may hold the cores
settings.load_profile("no deadline")

ARMS = [a.name for a in arms()]
PROMPTS = {a.name: build_prompt("Q", a.instruction) for a in arms()}
FIELDS = ["question_id", "question", "gold_answer", "prompt", "chosen", "rejected", "chosen_reward", "rejected_reward",
          "chosen_arm", "rejected_arm", "pair_type"]


def trajectory(arm, text, reward, finish="stop"):
    answer = text.split()[-1] if text.strip() else None
    return dict(arm_name=arm, prompt=PROMPTS[arm], full_text=text, reasoning=text, answer=answer, num_tokens=len(text),
                finish_reason=finish, correct=answer == "7", reward=reward)


TEXTS = st.sampled_from(["3 + 4 = 7", "3 + 1 = 4\n4 + 3 = 7", "3 + 1 = 4\n4 + 3 = 8", "3 + 1 = 4\n4 + 3 = 7\nso 7",
                         "4 + 3 = 7", "so 7", " so 7 ", "3 + 4 = 8", "3 * 4 = 12", "well 8", "", "perhaps 12"])
REWARDS, REASONS = st.sampled_from([0., .5, .505, 1., 1.2, 1.5]), st.sampled_from(["stop", "stop", "length"])
TRAJECTORIES = st.lists(st.builds(trajectory, st.sampled_from(ARMS), TEXTS, REWARDS, REASONS),
                        min_size=1, max_size=11, unique_by=lambda t: t["arm_name"])
ROLLOUTS = st.lists(TRAJECTORIES, max_size=4).map(
    lambda sets: [dict(question_id=f"q{i}", question=f"Q{i}?", gold_answer="7", trajectories=t)
                  for i, t in enumerate(sets)])
RULES = st.fixed_dictionaries(dict(policy=st.sampled_from(CHOICES["policy"]),
                                   coherence=st.sampled_from(CHOICES["coherence"]),
                                   pairing=st.sampled_from(CHOICES["pairing"]),
                                   pair_types=st.sampled_from(CHOICES["pair_types"]),
                                   prompt=st.sampled_from(CHOICES["prompt"]), threshold=st.sampled_from([0., .01, .4]),
                                   cap=st.integers(1, 5), seed=st.integers(0, 3)))


def coherence_pairs(pairs): return [p for p in pairs if p["pair_type"] == "coherence"]


def sides(rollouts, pair):
    "The chosen and the rejected trajectory of a pair."
    record = next(r for r in rollouts if r["question_id"] == pair["question_id"])
    by_arm = {t["arm_name"]: t for t in record["trajectories"]}
    return [by_arm[pair[f"{side}_arm"]] for side in ("chosen", "rejected")]


@given(ROLLOUTS, RULES)
def test_every_pair_is_what_it_says(rollouts, rules):
    for pair in build_pairs(rollouts, **rules):
        chosen, rejected = sides(rollouts, pair)
        assert list(pair) == FIELDS
        prompt = build_prompt(pair["question"]) if rules["prompt"] == "canonical" else chosen["prompt"]
        if rules["policy"] == "first-error" and pair["pair_type"] == "correctness":
            for side, t in (("chosen", chosen), ("rejected", rejected)):
                assert pair["prompt"] + pair[side] == prompt + t["full_text"].strip()
            lines = pair["chosen"].split("\n"), pair["rejected"].split("\n")
            assert lines[0][0] != lines[1][0] or min(map(len, lines)) == 1
        else:
            assert (pair["chosen"], pair["rejected"]) == (chosen["full_text"], rejected["full_text"])
            assert pair["prompt"] == prompt
        assert (pair["chosen_reward"], pair["rejected_reward"]) == (chosen["reward"], rejected["reward"])
        assert pair["chosen"].strip() != pair["rejected"].strip()
        assert chosen["correct"] and chosen["finish_reason"] == "stop"
        assert rejected["correct"] == (pair["pair_type"] == "coherence")
        if rejected["correct"]: assert chosen["reward"] - rejected["reward"] > rules["threshold"]
        if rules["pairing"] == "same-prompt": assert chosen["prompt"] == rejected["prompt"]
        if rules["pair_types"] != "both": assert pair["pair_type"] == rules["pair_types"]


@given(ROLLOUTS, RULES)
def test_no_duplicates_and_the_limits_of_each_policy(rollouts, rules):
    pairs = build_pairs(rollouts, **rules)
    keys = [(p["question_id"], p["chosen"].strip(), p["rejected"].strip()) for p in pairs]
    assert len(set(keys)) == len(keys)
    for record in rollouts:
        own = [p for p in pairs if p["question_id"] == record["question_id"]]
        if rules["coherence"] == "best-worst": assert sum(p["pair_type"] == "coherence" for p in own) <= 1
        if rules["policy"] in ("best-worst", "hard"): assert sum(p["pair_type"] == "correctness" for p in own) <= 1
        if rules["policy"] == "capped":
            assert len(own) <= rules["cap"]
            for side in ("chosen", "rejected"): assert len({p[side].strip() for p in own}) == len(own)


@given(ROLLOUTS, RULES, st.randoms())
def test_order_within_a_record_does_not_matter(rollouts, rules, rng):
    shuffled = [{**r, "trajectories": rng.sample(r["trajectories"], len(r["trajectories"]))} for r in rollouts]
    assert build_pairs(shuffled, **rules) == build_pairs(rollouts, **rules)


@given(ROLLOUTS, RULES)
def test_a_question_gives_the_same_pairs_alone_and_in_company(rollouts, rules):
    assert build_pairs(rollouts, **rules) == [p for r in rollouts for p in build_pairs([r], **rules)]


@given(ROLLOUTS)
def test_all_makes_every_right_over_every_wrong_text(rollouts):
    expected = set()
    for r in rollouts:
        right = {t["full_text"].strip() for t in r["trajectories"] if t["correct"] and t["finish_reason"] == "stop"}
        wrong = {t["full_text"].strip() for t in r["trajectories"] if not t["correct"]}
        expected |= {(r["question_id"], c, w) for c in right for w in wrong}
    made = build_pairs(rollouts, pair_types="correctness")
    assert {(p["question_id"], p["chosen"].strip(), p["rejected"].strip()) for p in made} == expected
    assert len(made) == len(expected)


@given(ROLLOUTS, RULES)
def test_the_account_adds_up(rollouts, rules):
    pairs, report = build_pairs_report(rollouts, **rules)
    assert report["correctness"] + report["coherence"] == len(pairs)
    assert report["questions"] == len(rollouts)
    assert report["questions_with_pairs"] == len({p["question_id"] for p in pairs})
    everything = build_pairs_report(rollouts, **{**rules, "policy": "all"})[1]
    assert everything["correctness"] == report["correctness"] + report["dropped_left_by_policy"]
    assert everything["coherence"] == report["coherence"] + report["dropped_coherence_left_by_policy"]
    assert everything["dropped_left_by_policy"] == everything["dropped_coherence_left_by_policy"] == 0
    solutions = [t for r in rollouts for t in r["trajectories"]]
    assert report["dropped_cut_off"] == sum(t["correct"] and t["finish_reason"] == "length" for t in solutions)


def record(*trajectories):
    return [dict(question_id="q", question="Q?", gold_answer="7", trajectories=list(trajectories))]


def test_coherence_is_best_over_worst():
    solutions = (("a 7", 1.2), ("b 7", 1.9), ("c 7", 1.5), ("d 7", 1.0))
    rollouts = record(*(trajectory(arm, *solution) for arm, solution in zip(ARMS, solutions)))
    pair, = build_pairs(rollouts)
    assert (pair["chosen"], pair["rejected"]) == ("b 7", "d 7")
    assert build_pairs(rollouts, threshold=.9) == []


@given(ROLLOUTS, st.sampled_from([0., .01, .4]))
def test_all_above_the_threshold_is_every_ordered_pair_of_right_solutions(rollouts, threshold):
    def expected(trajectories):
        right = [t for t in trajectories if t["correct"]]
        return {(c["arm_name"], w["arm_name"]) for c in right for w in right
                if c["finish_reason"] == "stop" and c["reward"] - w["reward"] > threshold}

    for r in rollouts:
        different = list({t["full_text"].strip(): t for t in r["trajectories"]}.values())
        made = build_pairs([r | {"trajectories": different}], threshold=threshold, pair_types="coherence",
                           coherence="all-above-threshold")
        assert {(p["chosen_arm"], p["rejected_arm"]) for p in made} == expected(different)
        assert len(made) == len(expected(different))


@given(ROLLOUTS, RULES)
def test_no_text_is_better_and_worse_than_another(rollouts, rules):
    keys = {(p["question_id"], p["chosen"].strip(), p["rejected"].strip()) for p in build_pairs(rollouts, **rules)}
    assert not keys & {(q, rejected, chosen) for q, chosen, rejected in keys}


@given(ROLLOUTS, RULES)
def test_best_worst_is_the_first_of_all_above_the_threshold(rollouts, rules):
    one, every = (coherence_pairs(build_pairs(rollouts, **{**rules, "policy": "all", "coherence": c}))
                  for c in ("best-worst", "all-above-threshold"))
    assert one == list({p["question_id"]: p for p in every[::-1]}.values())[::-1]


FIXTURE_DIGESTS = {"platinum-11": "a51cb816c15470c6", "leave-one-out": "b5aa86fa440f254e"}


@pytest.mark.parametrize("preset", FIXTURE_DIGESTS)
def test_the_default_pairs_of_the_fixture_stay_what_they_were(preset):
    "As at the commit before there was a choice of coherence pairs: the same records, rewards rounded to ten decimals."
    def rounded(pair): return {name: round(v, 10) if isinstance(v, float) else v for name, v in pair.items()}
    rollouts = pairing.read_rollouts("data/fixtures/rollouts.jsonl")
    pairs = [[rounded(p) for p in build_pairs(score_records(rollouts, preset), policy, cap=cap)]
             for policy in ("all", "capped", "best-worst", "hard", "first-error") for cap in (1, 4)]
    assert hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16] == FIXTURE_DIGESTS[preset]


def test_equal_rewards_make_no_coherence_pair():
    assert build_pairs(record(*(trajectory(a, f"{a} 7", 1.7) for a in ARMS)), threshold=0) == []


def test_hard_takes_the_common_mistake_and_the_closest_wording():
    solutions = (("three and four make 7", 1.), ("add them up : 7", 1.), ("three and four make 8", 0.),
                 ("surely 8", 0.), ("add them up : 12", 0.), ("", 0.))
    rollouts = record(*(trajectory(arm, *solution) for arm, solution in zip(ARMS, solutions)))
    pair, = build_pairs(rollouts, "hard")
    assert (pair["chosen"], pair["rejected"]) == ("three and four make 7", "three and four make 8")


def test_nothing_to_pair():
    assert build_pairs([]) == []
    assert build_pairs(record(trajectory(ARMS[0], "a 7", 1.))) == []
    assert build_pairs(record(trajectory(ARMS[0], "a 8", 0.), trajectory(ARMS[1], "b 9", 0.))) == []


@pytest.mark.parametrize("bad", [dict(coherence="all"), dict(threshold=math.inf), dict(threshold=math.nan),
                                 dict(threshold="0.01"), dict(cap=2.5),
                                 dict(policy="everything"), dict(policy="best_worst"), dict(cap=0),
                                 dict(threshold=-.1), dict(pairing="same"),
                                 dict(pair_types="all"), dict(prompt="native"), dict(template="Solve it.")])
def test_bad_rules_are_refused(bad):
    with pytest.raises(ValueError): build_pairs([], **bad)


@pytest.mark.parametrize("rule", ["polcy", "treshold", "coherense"])
def test_a_misspelt_rule_is_answered_with_the_nearest(rule):
    near = {"polcy": "policy", "treshold": "threshold", "coherense": "coherence"}[rule]
    for call in (build_pairs, build_pairs_report, compare_policies, inertness_audit):
        with pytest.raises(SettingsError, match=f"there is no pair rule '{rule}'; did you mean '{near}'?"):
            call(raw_rollouts(1), **{rule: 1})


@pytest.mark.parametrize("field, value", [("reward", "1.5"), ("reward", math.nan), ("reward", math.inf),
                                          ("correct", "false"), ("full_text", 7)])
def test_a_field_of_the_wrong_kind_names_question_trajectory_and_field(field, value):
    rollouts = record(trajectory(ARMS[0], "a 7", 1.), trajectory(ARMS[1], "b 7", 2.) | {field: value})
    with pytest.raises(ValueError, match=f"question 'q', trajectory 1 .{ARMS[1]}.: field '{field}' must be .*, got "):
        build_pairs(rollouts)


def test_unscored_trajectories_are_refused():
    t = trajectory(ARMS[0], "a 7", 1.)
    del t["reward"]
    with pytest.raises(ValueError, match="question 'q', trajectory 0 .*'reward' is missing"): build_pairs(record(t))


def raw_rollouts(n, seed=0):
    "Unscored records in which half of the texts are wrong and lengths differ."
    rng, records = random.Random(seed), []
    for k in range(n):
        trajectories = []
        for arm in ARMS:
            total = 7 if rng.random() < .6 else rng.choice([8, 12])
            words = rng.choices("so we add three and four apples then".split(), k=rng.randint(3, 12))
            text = f"{' '.join(words)} 3 + 4 = {total}"
            trajectories.append(dict(arm_name=arm, prompt=PROMPTS[arm], full_text=f"{text}\nAnswer: {total}",
                                     reasoning=text, answer=str(total), answer_strict=str(total),
                                     num_tokens=rng.randint(400, 700), finish_reason="stop", seed=1))
        records.append(dict(question_id=f"{k:016x}", question=f"Question {k}?", gold_answer="7",
                            trajectories=trajectories))
    return records


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("policy", CHOICES["policy"])
def test_terms_of_the_set_are_always_inert(preset, policy):
    audit = inertness_audit(raw_rollouts(12), preset, policy=policy)
    assert set(audit.index) == {term for term in REWARD_TERMS if getattr(PRESETS[preset].weights, term)}
    for term in {"s_wm", "agreement"} & set(audit.index):
        assert audit.gone[term] == audit.new[term] == audit.swapped[term] == 0
        assert audit.sentence[term].startswith(f"{term} cannot change any pair in this preset")


def with_tokens(low, high):
    "Rollouts of guide-8's arms with completions of `low` to `high` tokens."
    rng, eight = random.Random(1), {a.name for a in arms("guide-8")}
    longer = lambda t: t | {"num_tokens": rng.randint(low, high)}
    return [r | {"trajectories": [longer(t) for t in r["trajectories"] if t["arm_name"] in eight]}
            for r in raw_rollouts(40)]


def test_the_guides_coherence_pairs_come_from_length_and_only_beyond_the_free_tokens():
    long, short = with_tokens(560, 640), with_tokens(300, 512)
    pairs, none = (coherence_pairs(build_pairs(score_records(r, "guide-8"))) for r in (long, short))
    assert len(pairs) > 30 and none == []
    tokens = {(r["question_id"], t["arm_name"]): t["num_tokens"] for r in long for t in r["trajectories"]}
    for p in pairs:
        assert tokens[p["question_id"], p["chosen_arm"]] + 10 < tokens[p["question_id"], p["rejected_arm"]]
    audited, inert = (inertness_audit(r, "guide-8").loc["excess_tokens"] for r in (long, short))
    assert audited.limits == "" and audited["coherence gone"] == len(pairs)
    limit = "no completion is longer than 512 tokens, the longest has 512: the length penalty is 0 everywhere"
    assert inert.limits == limit and inert.sentence.endswith(f"{limit[0].upper()}{limit[1:]}.")


def lone(**fields): return [r | {"trajectories": [t | fields for t in r["trajectories"]]} for r in raw_rollouts(8)]


@pytest.mark.parametrize("rollouts, preset, term, says", [
    (lone(answer="8"), "platinum-11", "quality", "no question has two right solutions"),
    (lone(answer="8"), "platinum-11", "correct", "no solution is right"),
    (lone(answer="7"), "platinum-11", "correct", "every solution is right"),
    (raw_rollouts(8), "platinum-11", "agreement", "in no question do all arms answer and agree on the right answer"),
    (lone(reasoning="so then"), "leave-one-out", "coherence", "no solution holds an equation that can be checked: the"),
    (lone(reasoning="so then"), "guide-8", "s_wm", "no solution holds an equation that can be checked: s_cf is 0"),
    ([r | {"trajectories": r["trajectories"][:1]} for r in raw_rollouts(3)], "leave-one-out", "coherence",
     "coherence has no value"),
    (lone(num_tokens=200, finish_reason="length"), "guide-8", "excess_tokens",
     "the longest has 200 and 88 were cut off: the length")])
def test_the_audit_names_what_a_term_lacks(rollouts, preset, term, says):
    row = inertness_audit(rollouts, preset).loc[term]
    assert says in row.limits and row.sentence.endswith(f"{row.limits[0].upper()}{row.limits[1:]}.")


def test_a_term_that_can_act_has_no_limit():
    audit = inertness_audit(raw_rollouts(8), "leave-one-out")
    assert set(audit.limits[["correct", "coherence", "excess_tokens"]]) == {""}


def test_the_audit_counts_what_quality_does():
    rollouts = raw_rollouts(40)
    preset = PRESETS["platinum-11"]
    without = dataclasses.replace(preset, name="none", weights=dataclasses.replace(preset.weights, quality=0.0))
    pairs_of = lambda preset: build_pairs(score_records(rollouts, preset))
    before, after = ({(p["question_id"], p["chosen"], p["rejected"]) for p in pairs_of(s)} for s in (preset, without))
    row = inertness_audit(rollouts, preset).loc["quality"]
    assert (row.pairs, row.gone, row.new) == (len(before), len(before - after), len(after - before)) and row.gone > 0
    assert row.swapped == len({(q, r, c) for q, c, r in before} & after)


def test_comparison_of_policies_agrees_with_the_pairs():
    scored = list(score_records(raw_rollouts(15)))
    summary, per_question = compare_policies(scored, cap=2)
    for policy in CHOICES["policy"]:
        pairs = build_pairs(scored, policy, cap=2)
        assert summary.loc[policy, ["correctness", "coherence"]].sum() == len(pairs)
        assert per_question[per_question.policy == policy].pairs.sum() == len(pairs)


@pytest.fixture
def phase(tmp_path, monkeypatch):
    "Settings of a run in a project of its own, its rollouts written."
    monkeypatch.setattr(records, "ROOT", tmp_path)
    s = PreferenceSettings(run="r", base="data/pocket-base", rollouts="", weights={}, preset="platinum-11",
                           policy="capped")
    folder = tmp_path/"outputs"/"r"/"02_rollouts"
    folder.mkdir(parents=True)
    with records.RecordWriter(folder/"rollouts.jsonl") as writer: writer.append(list(score_records(raw_rollouts(20))))
    return s


def files(s): return {p: p.read_bytes() for p in s.path.parent.glob("*")} if s.path.parent.exists() else {}


def test_the_phase_writes_pairs_and_a_manifest_once(phase):
    pairs = main(phase)
    rollouts = pairing.read_rollouts(phase.rollouts)
    assert pairs == records.read_records(phase.path) == build_pairs(rollouts, **phase.rules)
    counts, metrics = (open_phase(phase).manifest[k] for k in ("counts", "metrics"))
    assert counts["correctness"] + counts["coherence"] == len(pairs)
    assert metrics["weights"]["quality"] == .3 and "agreement" in metrics["limits"]
    before = files(phase)
    assert main(phase) == pairs and files(phase) == before
    assert len(pairing.pair_table(pairs, rollouts)) == len(pairs)


def test_another_preset_scores_the_same_rollouts_anew(phase):
    other = main(dataclasses.replace(phase, preset="leave-one-out"))
    assert other == build_pairs(score_records(pairing.read_rollouts(phase.rollouts), "leave-one-out"), **phase.rules)
    assert other != build_pairs(pairing.read_rollouts(phase.rollouts), **phase.rules)


def test_another_configuration_is_refused_and_nothing_changes(phase):
    main(phase)
    before = files(phase)
    with pytest.raises(RunConflict, match="cap"): main(dataclasses.replace(phase, cap=2))
    assert files(phase) == before


def without(values, name): return {k: v for k, v in values.items() if k != name}


BROKEN = {
    "no trajectories": (lambda r: r | {"trajectories": []}, "line 2.*'trajectories' is empty"),
    "no question": (lambda r: without(r, "question"), "line 2.*'question' is missing"),
    "no text": (lambda r: r | {"trajectories": [without(r["trajectories"][0], "full_text")]},
                "line 2, trajectory 0.*'full_text' is missing"),
    "tokens as text": (lambda r: r | {"trajectories": [r["trajectories"][0] | {"num_tokens": "12"}]},
                       "line 2, trajectory 0.*'num_tokens' must be int"),
    "negative tokens": (lambda r: r | {"trajectories": [r["trajectories"][0] | {"num_tokens": -1}]},
                        "line 2, trajectory 0: field 'num_tokens' must be 0 or more"),
    "answer as number": (lambda r: r | {"trajectories": [r["trajectories"][0] | {"answer": 7}]},
                         "line 2.*'answer' must be text or null"),
    "no object": (lambda r: r | {"trajectories": ["3 + 4 = 7"]}, "line 2, trajectory 0: expected an object"),
    "twice": (lambda r: r | {"question_id": f"{0:016x}"}, "line 2.*already in line 1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_bad_record_is_named_and_nothing_is_written(phase, name):
    change, message = BROKEN[name]
    first, second = raw_rollouts(2)
    path = records.resolve(phase.rollouts)
    path.write_text("".join(json.dumps(r) + "\n" for r in (first, change(second))))
    with pytest.raises(RecordError, match=message): main(phase)
    assert not files(phase)


def test_missing_rollouts_and_no_pairs(phase):
    path = records.resolve(phase.rollouts)
    same = [r | {"trajectories": r["trajectories"][:1]} for r in raw_rollouts(3)]
    path.write_text("".join(json.dumps(r) + "\n" for r in same))
    with pytest.raises(RecordError, match="no pair can be made"): main(phase)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="rollouts.jsonl.*run the phase that writes it"): main(phase)
    assert not files(phase)


def test_bad_settings():
    sound = dict(run="r", base="data/pocket-base", rollouts="", weights={}, preset="platinum-11")
    for change, error, message in (({"policy": "caped"}, SettingsError, "did you mean 'capped'"),
                                   ({"preset": "platinum11"}, ValueError, "platinum-11"),
                                   ({"run": "../r"}, SettingsError, "run must be a name")):
        with pytest.raises(error, match=message): PreferenceSettings(**sound | change)
