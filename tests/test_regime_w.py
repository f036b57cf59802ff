"Properties of Regime W that must hold for any set of trajectories, not only for the examples on the page."
import math
import re
from dataclasses import make_dataclass, replace
from fractions import Fraction

import pytest
from hypothesis import example, given, settings, strategies as st

from looper_math import regime_w
from looper_math.prompts import ARM_SETS, Arm, arms, sample_seed
from looper_math.records import SettingsError
from looper_math.regime_w import PRESETS, REWARD_TERMS, Weights, reward, score_question, score_records, score_rollout

NAMES = [a.name for a in arms()] + ["stranger"]
spellings = st.sampled_from(["14", "14.0", "1,400", "-3", "1/2", "", "none"])
answers = st.one_of(st.none(), spellings, st.integers(-3, 3), st.fractions(max_denominator=3),
                    st.floats(allow_nan=True, allow_infinity=True))
tokens = st.sampled_from("12 + 5 = 17 and so then apples eggs Ünï ×".split())
texts = st.one_of(st.text(max_size=30), st.lists(tokens, max_size=20).map(" ".join))
trajectory = st.fixed_dictionaries(dict(reasoning=texts, answer=answers, num_tokens=st.integers(0, 3000)))


@st.composite
def trajectory_sets(draw, smallest=1):
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, min_size=smallest, max_size=11))
    return [dict(draw(trajectory), arm_name=name) for name in names]


presets = st.sampled_from(sorted(PRESETS))


def close(a, b):
    return (a is None and b is None) or (a is not None and b is not None and math.isclose(a, b, abs_tol=1e-9))


@given(trajectory_sets(), presets)
def test_metrics_are_in_range(trajectories, preset):
    for name, value in score_question(trajectories, preset).items():
        assert (value is None and name == "s_probe") or -1e-12 <= value <= 1 + 1e-12, name


@given(trajectory_sets(), presets, st.randoms())
def test_the_order_of_trajectories_has_no_influence(trajectories, preset, rng):
    shuffled = rng.sample(trajectories, len(trajectories))
    metrics, scored = score_rollout(trajectories, 14, preset)
    metrics_of_shuffled, scored_shuffled = score_rollout(shuffled, 14, preset)
    assert metrics == metrics_of_shuffled   # in the last bit
    by_arm = {t["arm_name"]: s for t, s in zip(shuffled, scored_shuffled)}
    assert scored == [by_arm[t["arm_name"]] for t in trajectories]


@given(trajectory_sets(), presets)
def test_signals_are_in_range_and_make_up_the_reward(trajectories, preset):
    metrics, scored = score_rollout(trajectories, 14, preset)
    for s, t in zip(scored, trajectories):
        signals = s["signals"]
        assert close(s["reward"], reward(signals, PRESETS[preset].terms))
        for name in set(signals) - {"lift", "excess_tokens", "first_false"}:
            assert signals[name] is None or -1e-12 <= signals[name] <= 1 + 1e-12, name
        assert signals["lift"] is None or -1 <= signals["lift"] <= 1
        assert signals["excess_tokens"] == max(0, t["num_tokens"] - 512)
        assert (signals["quality"] is None) == (not s["correct"])
        assert s["correct"] or signals["agreement"] == 0


@given(trajectory_sets(smallest=2), presets)
def test_lift_is_the_score_with_minus_the_score_without(trajectories, preset):
    metrics, scored = score_rollout(trajectories, 14, preset)
    for i, s in enumerate(scored):
        without = score_question(trajectories[:i] + trajectories[i + 1:], preset)["s_wm"]
        assert close(s["signals"]["lift"], metrics["s_wm"] - without)


@settings(max_examples=30)
@given(st.lists(trajectory_sets(), min_size=1, max_size=5), presets)
def test_records_are_scored_one_at_a_time(questions, preset):
    records = [dict(question_id=f"q{i}", gold_answer="14", trajectories=t) for i, t in enumerate(questions)]
    for record, scored in zip(records, score_records(iter(records), preset), strict=True):
        metrics, each = score_rollout(record["trajectories"], "14", preset)
        assert metrics == scored["metrics"]
        assert each == [{name: t[name] for name in ("reward", "correct", "signals")} for t in scored["trajectories"]]


@given(trajectory_sets())
def test_s_end_and_consensus_count_pairs(trajectories):
    values = [regime_w.parse_answer(t["answer"]) for t in trajectories]
    n = len(values)
    same = [sum(i != j and a is not None and a == b for j, b in enumerate(values)) for i, a in enumerate(values)]
    metrics = score_question(trajectories)
    alone = float(values[0] is not None)
    assert close(metrics["s_end"], sum(same) / (n * (n - 1)) if n > 1 else alone)
    assert close(metrics["s_cf"], max(same) / (n - 1) if n > 1 else alone)


@given(trajectory_sets())
def test_s_end_of_the_guide_is_the_share_of_the_largest_group(trajectories):
    values = [regime_w.parse_answer(t["answer"]) for t in trajectories]
    largest = max((values.count(v) for v in values if v is not None), default=0)
    assert close(score_question(trajectories, "guide-8")["s_end"], largest / len(values))


@given(trajectory_sets(), st.integers(-3, 14))
def test_the_reward_of_core_variants_is_correctness_quality_and_length(trajectories, gold):
    metrics, scored = score_rollout(trajectories, gold, "core-variants")
    for t, s in zip(trajectories, scored):
        expected = s["correct"] + 0.3 * (s["signals"]["quality"] or 0) - 0.001 * max(0, t["num_tokens"] - 512)
        assert close(s["reward"], expected)
    assert metrics == score_question(trajectories, "core-variants")   # reported, and not rewarded


@given(trajectory_sets(smallest=2))
def test_jaccard_and_length_match_plain_sets(trajectories):
    trajectories = [dict(t, arm_name="stranger") for t in trajectories]
    words = [regime_w._words(t["reasoning"]) for t in trajectories]
    bags, lengths = [set(w) for w in words], [len(w) for w in words]
    pairs = [(a, b) for i, a in enumerate(bags) for b in bags[:i]]
    overlap = sum(len(a & b) / len(a | b) if a | b else 0 for a, b in pairs) / len(pairs)
    mean = sum(lengths) / len(lengths)
    steady = 1 / (1 + sum((x - mean) ** 2 for x in lengths) / len(lengths) / mean) if mean else 0
    assert close(score_question(trajectories)["s_path"], 0.4 * steady + 0.6 * overlap)


@given(st.text())
@example("ſtraße İstanbul ٣٤ 日本 a_b \ud800")
def test_words_are_runs_of_letters_and_digits(text):
    assert regime_w._words(text) == re.findall(r"\w+", text.lower())


@given(trajectory_sets(smallest=2))
def test_terms_of_the_set_rank_no_two_correct_trajectories(trajectories):
    correct = [s for s in score_rollout(trajectories, 14)[1] if s["correct"]]
    for term in ("s_wm", "agreement"):
        own = Weights().terms
        distance = {reward(s["signals"], own) - reward(s["signals"], own | {term: 0}) for s in correct}
        assert max(distance, default=0) - min(distance, default=0) < 1e-9


def test_objects_and_mappings_score_the_same():
    rows = [dict(arm_name=n, reasoning=f"12 + {i} = {12 + i}", answer=12 + i % 2, num_tokens=10)
            for i, n in enumerate(NAMES)]
    Trajectory = make_dataclass("Trajectory", ["arm_name", "reasoning", "answer", "num_tokens"])
    assert score_rollout(rows, "12") == score_rollout([Trajectory(**r) for r in rows], Fraction(12))


@pytest.mark.parametrize("field", ["arm_name", "reasoning", "answer", "num_tokens"])
def test_a_missing_field_is_named(field):
    rows = [dict(arm_name=n, reasoning="x", answer=1, num_tokens=3) for n in "ab"]
    del rows[1][field]
    with pytest.raises(ValueError, match=f"question 'q9': trajectory 1 has no '{field}'"):
        score_rollout(rows, 1, question="q9")


WRONG_TYPES = {"answer": [True, ["14"], {"value": 14}], "reasoning": [17, ["a", "b"]], "arm_name": [3],
               "num_tokens": ["12", -1, 2.5, False, math.nan, 10**400]}


@pytest.mark.parametrize("field, value", [(f, v) for f, values in WRONG_TYPES.items() for v in values])
def test_a_field_of_the_wrong_type_is_a_value_error_that_names_the_trajectory(field, value):
    rows = [dict(arm_name=n, reasoning="x", answer=1, num_tokens=3) for n in "abc"]
    rows[1][field] = value
    with pytest.raises(ValueError, match="question 'q9': trajectory 1: "):
        score_rollout(rows, 1, question="q9")
    if field != "num_tokens":
        with pytest.raises(ValueError, match="question 'q9': trajectory 1: "):
            score_question(rows, question="q9")


@pytest.mark.parametrize("gold", [True, ["14"], "fourteen", None])
def test_a_gold_answer_that_is_no_number_is_named(gold):
    with pytest.raises(ValueError, match="question 'q9': the gold answer .* is no number"):
        score_rollout([dict(arm_name="a", reasoning="x", answer=1, num_tokens=3)], gold, question="q9")


@pytest.mark.parametrize("value", [math.nan, math.inf, "0.5", True, None])
def test_a_weight_must_be_a_finite_number(value):
    with pytest.raises(SettingsError, match="weight 'quality' must be a finite number"):
        Weights(quality=value)


@pytest.mark.parametrize("form", [dict(s_end="largets"), dict(s_path="lenght"), dict(s_cf="consensu"),
                                  dict(alignment="probe"), dict(arm_set="guide8")])
def test_a_preset_of_an_unknown_form_is_refused(form):
    with pytest.raises(SettingsError, match=f"unknown {next(iter(form))} .*did you mean"):
        regime_w.Preset("mine", **{"arm_set": "guide-8"} | form)


UNKNOWN_NAMES = [lambda: score_question([], "platinum"), lambda: arms("platinum"),
                 lambda: score_rollout([], 1, "platinum")]


@pytest.mark.parametrize("call", UNKNOWN_NAMES)
def test_an_error_for_an_unknown_name_suggests_the_nearest(call):
    with pytest.raises(ValueError, match="did you mean 'platinum-11'"):
        call()


def test_no_trajectories_is_an_error_that_names_the_question():
    for call in (lambda: score_question([], question="q3"), lambda: score_rollout([], 1, question="q3"),
                 lambda: list(score_records([dict(question_id="q3", gold_answer="1", trajectories=[])]))):
        with pytest.raises(ValueError, match="'q3' has no trajectories"):
            call()


def test_seeds_are_stable_and_different():
    assert sample_seed(arms()[0], "q1") == 4274896629655867
    seeds = {sample_seed(a, f"q{i}") for s in ("platinum-11", "core-variants") for a in arms(s) for i in range(500)}
    assert len(seeds) == 23 * 500 and all(0 <= s < 2**53 for s in seeds)


def test_arms_are_as_specified():
    sampling = {a.name: (a.temperature, a.top_p, a.seed, a.probe) for a in arms()}
    assert sampling["wolfram_3"] == (0.5, 0.95, 45, None) and sampling["maudlin_0"] == (0.2, 0.90, 100, None)
    probes = [(0.3, 0.95, 1000, "A"), (0.3, 0.95, 1001, "A_prime"), (0.5, 0.90, 2000, "CF1")]
    assert [sampling[n] for n in NAMES[8:11]] == probes
    for arm in (a for arm_set in ARM_SETS.values() for a in arm_set):
        assert "Answer: <number>" in arm.instruction and not re.search(r"\d", arm.instruction)
    with pytest.raises(ValueError, match="temperature"):
        Arm("cold", "x", 0.0, 1.0, 1)


def test_every_reward_term_has_a_weight():
    assert all(hasattr(Weights(), term) for term in REWARD_TERMS)
    w = Weights()
    assert (w.correct, w.s_wm, w.quality, w.agreement) == (1.0, 0.5, 0.3, 0.2)
    assert (w.excess_tokens, w.free_tokens) == (-0.001, 512)
    assert (w.end, w.path, w.cf, w.length, w.overlap, w.conciseness, w.alignment) == (0.4, 0.3, 0.3, 0.4, 0.6, 0.4, 0.6)
    guide = PRESETS["guide-8"].weights
    assert (guide.end, guide.path, guide.cf, guide.quality) == (0.5, 0.3, 0.2, 0.0)
    assert PRESETS["core-variants"].weights == replace(Weights(), s_wm=0.0, agreement=0.0)
