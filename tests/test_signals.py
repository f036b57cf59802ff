"A signal of one's own goes through scores, pairs, audit, tables, the page and the manifest, as Regime W's terms do."
import pytest
from test_preferences import raw_rollouts

from looper_math import browse, explore, online_rl, records, sampler
from looper_math.pairs import build_pairs, inertness_audit
from looper_math.preferences import PreferenceSettings, main
from looper_math.records import ROOT, RunConflict, read_json
from looper_math.regime_w import reweighted, score_records
from looper_math.runs import parameters_of
from looper_math.shards import write_records

BRIEF = """
def brief(question, trajectory):
    return -trajectory["num_tokens"] / 100
"""
SIGNALS = {"brief_signals.brief": 5.0}


@pytest.fixture
def module(tmp_path, monkeypatch):
    "A file with a signal, in a project with one scored run."
    path = tmp_path / "brief_signals.py"
    path.write_text(BRIEF)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(records, "ROOT", tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    scored = score_records(raw_rollouts(30), "leave-one-out")
    write_records(tmp_path / "outputs/small/02_rollouts/rollouts.jsonl", scored)
    return path


def settings(**changes):
    values = {name: p.default for name, p in parameters_of(ROOT / "nbs/03_preferences.ipynb").items()}
    return PreferenceSettings(**values | {"run": "small", "weights": SIGNALS} | changes)


def coherence_pairs(pairs): return [p for p in pairs if p["pair_type"] == "coherence"]


def test_it_chooses_pairs(module):
    pairs = main(settings(policy="all"))
    tokens = {(r["question_id"], t["full_text"]): t["num_tokens"] for r in raw_rollouts(30) for t in r["trajectories"]}
    gaps = [tokens[p["question_id"], p["chosen"]] - tokens[p["question_id"], p["rejected"]]
            for p in coherence_pairs(pairs)]
    without = build_pairs(score_records(raw_rollouts(30), "leave-one-out"))
    assert len(gaps) > 5 and max(gaps) < 0
    assert coherence_pairs(pairs) != coherence_pairs(without)


def test_manifest_tables_and_page_show_it(module):
    main(settings())
    manifest = read_json(records.ROOT / "outputs/small/03_preferences/manifest.json")
    assert manifest["metrics"]["weights"]["brief"] == 5
    assert "brief_signals" in manifest["inputs"]
    run = explore.load("small")
    table = run.rescore()
    assert (table.brief == -table.num_tokens / 100).all()
    assert "brief" not in run.rescore("leave-one-out")
    page = browse.page_records(run.folder)
    assert dict(zip(page["terms"], page["weights"]))["brief"] == 5
    assert "brief" in page["views"][0]["questions"][0]["solutions"][0]["signals"]


def test_the_audit_counts_what_it_changes(module):
    audit = inertness_audit(raw_rollouts(30), reweighted("leave-one-out", SIGNALS))
    assert audit.loc["brief", "gone"] > 0 and audit.loc["brief", "weight"] == 5


def test_a_signal_without_values_is_named(module):
    module.write_text("def brief(question, trajectory): return None\n")
    preset = reweighted("leave-one-out", {"brief_signals.brief": 1})
    assert "brief has no value anywhere" in inertness_audit(raw_rollouts(5), preset).loc["brief", "sentence"].lower()


def test_a_changed_function_is_another_configuration(module):
    main(settings())
    module.write_text(BRIEF.replace("100", "50"))
    with pytest.raises(RunConflict, match="brief_signals"): main(settings())


def test_online_rl_rewards_it():
    values = {name: p.default for name, p in parameters_of(ROOT / "nbs/06_online_rl.ipynb").items()}
    s = online_rl.OnlineSettings(**values | {"weights": {"looper_math.process.who_has_what": .3}})
    config, names = online_rl.grpo_config(s, batches=1), [f.__name__ for f in sampler.reward_functions([*s.logged])]
    assert dict(zip(names, config.reward_weights, strict=True))["who_has_what"] == .3
