"The settings of every recipe agree with each other, and with what its comments say."
import math
import re

import pytest

from looper_math.dpo_trainer import CONTROL_EPOCHS
from looper_math.prompts import arms, build_prompt
from looper_math.ranges import named_files
from looper_math.records import ROOT
from looper_math.regime_w import find_preset
from looper_math.runs import about_recipe, assign, phases_of, read_recipe, recipes
from looper_math.shards import imbalance

GSM8K = {"openai/gsm8k": 7473, "openai/gsm8k:test": 1319, "madrylab/gsm8k-platinum": 1209}


def values(recipe):
    "phase → parameter → value."
    phases = phases_of(ROOT, recipe)
    return assign(read_recipe(ROOT, recipe, phases), phases)


def size(source, limit):
    "Questions of a slice of GSM8K."
    name, _, cut = source.partition("[")
    low, _, high = cut.rstrip("]").partition(":")
    whole = GSM8K[name.removesuffix(":train")]
    return min((int(high) if high else whole) - (int(low) if low else 0), limit or whole)


HUB = [r for r in recipes() if any(not str(v.get("base", "data/")).startswith("data/") for v in values(r).values())]
BIG = [r for r in HUB if about_recipe(ROOT, r).group == "large"]


def text(recipe, phase): return (ROOT / f"nbs/recipes/{recipe}/{phase}.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("recipe", recipes())
def test_every_recipe_says_what_it_is_for(recipe):
    "And a time only where there was a measurement: none of the large ones has been run."
    about = about_recipe(ROOT, recipe)
    assert about, f"nbs/recipes/{recipe} needs an about.yaml; see lib/runs"
    assert (about.minutes == "not run") == (about.group == "large")
    assert (about.group in ("large", "small")) == (recipe in HUB)
    assert len(f"{about.hardware:<20}  {about.purpose}") <= 110


@pytest.mark.parametrize("recipe", recipes())
def test_all_phases_share_prompt_base_and_preset(recipe):
    for name in ("template", "base", "preset", "dtype", "device"):
        assert len({str(v[name]) for v in values(recipe).values() if name in v}) <= 1, name


@pytest.mark.parametrize("recipe", recipes())
def test_arms_are_the_presets_wherever_arms_answer(recipe):
    v = values(recipe)
    preset = next(p["preset"] for p in v.values() if "preset" in p) if any("preset" in p for p in v.values()) else None
    for phase, p in v.items():
        if p.get("arm_set") and preset: assert p["arm_set"] == find_preset(preset).arm_set, phase
    rollouts = v.get("02_rollouts")
    if rollouts and "04_dpo" in v:
        assert set(v["04_dpo"]["control_arms"]) <= {a.name for a in arms(rollouts["arm_set"])}


@pytest.mark.parametrize("recipe", BIG)
def test_a_large_model_is_never_trained_on_a_cpu(recipe):
    computing = {phase: p["device"] for phase, p in values(recipe).items() if "device" in p}
    assert computing and set(computing.values()) == {"cuda"}


def longest_completion(p):
    "Tokens of the longest solution that a phase samples."
    return p["max_new_tokens"] if "max_new_tokens" in p else p["trainer"]["max_completion_length"]


@pytest.mark.parametrize("recipe", BIG)
def test_there_is_room_for_the_length_penalty_and_for_what_is_trained_on(recipe):
    v = values(recipe)
    sampled = [p for p in ("02_rollouts", "06_online_rl") if p in v]
    for phase in sampled:
        free = v[phase].get("weights", {}).get("free_tokens", find_preset(v[phase]["preset"]).weights.free_tokens)
        assert longest_completion(v[phase]) >= 2 * free, phase
    longest = max(longest_completion(v[phase]) for phase in sampled)
    for phase, p in v.items():
        assert p.get("max_new_tokens", longest) >= longest, f"{phase} would cut off what {sampled} may write"
        trained_on = longest if phase == "04_dpo" or p.get("targets", "human") != "human" else 512
        if "max_length" in p.get("trainer", {}): assert p["trainer"]["max_length"] >= trained_on + 512, phase


@pytest.mark.parametrize("recipe", BIG)
def test_every_process_has_a_share_of_the_rollouts(recipe):
    v = values(recipe)
    if "02_rollouts" not in v: return
    p = v["02_rollouts"]
    questions = size(p["questions"], p["limit"])
    assert imbalance([len(arms(p["arm_set"]))] * questions, p["n_gpu"]) <= 1.2
    stated = re.search(r"([\d,]+) questions x (\d+) (?:arms|variants)", text(recipe, "02_rollouts"))
    if stated: assert (int(stated[1].replace(",", "")), int(stated[2])) == (questions, len(arms(p["arm_set"])))
    total = re.search(r"([\d,]+) trajectories", text(recipe, "02_rollouts"))
    if total: assert int(total[1].replace(",", "")) == questions * len(arms(p["arm_set"]))


@pytest.mark.parametrize("recipe", [r for r in BIG if "05_eval" in values(r)])
def test_the_numbers_of_the_evaluation_are_those_of_its_comment(recipe):
    p = values(recipe)["05_eval"]
    sampling = p["sampling"]
    several = (sampling["n"] + len(arms(p["arm_set"]))) * sampling["questions"] * sampling["models"]
    greedy = size(p["questions"], p["limit"]) * len(p["models"]) * len(p["styles"])
    stated = re.search(r"([\d,]+) completions beside the ([\d,]+) greedy", text(recipe, "05_eval"))
    if stated: assert [int(n.replace(",", "")) for n in stated.groups()] == [several, greedy]


@pytest.mark.parametrize("recipe", [r for r in BIG if "05_eval" in values(r)])
def test_every_process_has_a_share_of_the_evaluation(recipe):
    "Also on a host with fewer GPUs than the recipe's."
    p = values(recipe)["05_eval"]
    sampling = p["sampling"]
    several = [sampling["n"], len(arms(p["arm_set"]))] * sampling["questions"] * sampling["models"]
    greedy = [1] * size(p["questions"], p["limit"]) * len(p["models"]) * len(p["styles"])
    for n in range(1, 9): assert imbalance(greedy + several, n) <= 1.2


@pytest.mark.parametrize("recipe", BIG)
def test_updates_are_those_of_the_comments(recipe):
    v = values(recipe)
    for phase in ("01_sft", "04_dpo", "06_online_rl"):
        if phase not in v: continue
        p, source = v[phase], text(recipe, phase)
        members = len(arms(p["arm_set"])) if phase == "06_online_rl" else 1
        rows = p["trainer"]["per_device_train_batch_size"] // members
        batch = rows * p["trainer"].get("gradient_accumulation_steps", 1) * max(1, p["n_gpu"])
        stated = re.search(r"(\d+) (?:rows|pairs|questions) (?:\(\d+ trajectories\) )?an update", source)
        if stated: assert int(stated[1]) == batch, phase
        if updates := re.search(r"(\d+) updates", source):
            rows = size(p.get("train") or p["questions"], p["limit"])
            assert int(updates[1]) == (rows // batch if phase == "06_online_rl" else math.ceil(rows / batch)), phase


@pytest.mark.parametrize("recipe", ["guide-8", "core-8b"])
def test_the_guides_prompts_have_a_tutoring_tone(recipe):
    template = values(recipe)["02_rollouts"]["template"]
    prompt = build_prompt("How many?", template=template)
    assert "tutor" in prompt and not re.search(r"\d", template) and prompt.endswith("step by step.\n")
    assert all("template:" not in text(recipe, p.stem).replace("native_template:", "")
               for p in (ROOT / f"nbs/recipes/{recipe}").glob("0*.yaml"))


def test_deepseek_fits_the_readmes_gpu():
    v = values("deepseek-r1-8b")
    assert all(v[p]["load_in_4bit"] and v[p]["n_gpu"] == 1 for p in ("01_sft", "06_online_rl"))
    assert v["06_online_rl"]["algorithm"] == "ppo" and v["06_online_rl"]["arm_set"] == "guide-8"


@pytest.mark.parametrize("recipe", [r for r in recipes() if r not in HUB])
def test_the_pocket_computes_in_float32(recipe):
    "Under `auto` its results would depend on the machine: a CPU with instructions for bfloat16 would use them."
    phases = values(recipe).values()
    assert {p["dtype"] for p in phases if "dtype" in p} == {"float32"}


def questions_of(source, limit):
    "Positions in GSM8K's training split that a parameter names; none for another split."
    name, _, cut = source.partition("[")
    if name.removesuffix(":train") != "openai/gsm8k": return set()
    low = int(cut.partition(":")[0] or 0)
    return set(range(low, low + size(source, limit)))


# They repeat pipelines that train and sample on the same questions, and say so in 02_rollouts.yaml.
SAME_QUESTIONS = ["abel-8xh100", "core-8b", "guide-8"]


@pytest.mark.parametrize("recipe", [r for r in BIG if "02_rollouts" in values(r) and "01_sft" in values(r)])
def test_rollouts_are_of_questions_that_sft_did_not_train_on(recipe):
    "Own solutions are of the run that the recipe continues."
    v = values(recipe)
    sft, own = v["01_sft"], about_recipe(ROOT, recipe).continues
    source = values(own)["02_rollouts"] if own else {"questions": sft["train"], "limit": sft["limit"]}
    trained = questions_of(source["questions"], source["limit"])
    sampled = questions_of(v["02_rollouts"]["questions"], v["02_rollouts"]["limit"])
    held_out = questions_of(v["04_dpo"]["dev"], v["04_dpo"]["dev_limit"])
    assert trained and sampled and not held_out & (trained | sampled)
    assert bool(trained & sampled) == (recipe in SAME_QUESTIONS)
    if recipe in SAME_QUESTIONS: assert "SFT has trained on these" in text(recipe, "02_rollouts")


@pytest.mark.parametrize("recipe", BIG)
def test_completions_may_be_as_long_as_published_solutions(recipe):
    "512 tokens cut off 50 of 1,319 of Abel-7B's published solutions."
    assert all(longest_completion(p) >= 1024 for phase, p in values(recipe).items() if phase != "03_preferences")


@pytest.mark.parametrize("recipe", recipes())
def test_a_recipe_names_the_run_that_it_continues(recipe):
    "Every phase that it reads of that run is one that the other recipe makes; the twins continue twins."
    earlier, files = about_recipe(ROOT, recipe).continues, [f for p in values(recipe).values() for f in named_files(p)]
    read = {tuple(path.split("/")[1:3]) for _, path in files if path.startswith("outputs/")}
    if not earlier: assert not read or recipe == "pocket-online"  # its evaluation reads three runs
    else: assert {run for run, _ in read} == {earlier} and {p for _, p in read} <= set(phases_of(ROOT, earlier))


def test_abel_smoke_is_the_long_run_in_small():
    "The same rows and lengths on each GPU, so the same memory; eight processes have a share everywhere."
    small, long = values("abel-smoke"), values("abel-8xh100")
    for phase, p in small.items():
        for name in ("base", "template", "dtype", "device", "n_gpu", "max_new_tokens", "engine", "styles"):
            assert p.get(name) == long[phase].get(name), f"{phase}.{name}"
        for name in ("per_device_train_batch_size", "max_length", "gradient_checkpointing"):
            assert p.get("trainer", {}).get(name) == long[phase].get("trainer", {}).get(name), f"{phase}.trainer.{name}"
    dpo, pairs = small["04_dpo"], small["02_rollouts"]["limit"] * small["03_preferences"]["cap"]
    assert pairs / (dpo["trainer"]["per_device_train_batch_size"] * dpo["n_gpu"]) == 8


def test_the_control_of_abel_repeats_little():
    "With the fewest solutions and the most pairs that are expected, 1,700 and 5,000."
    p, sizes = values("abel-8xh100")["04_dpo"], ("per_device_train_batch_size", "gradient_accumulation_steps")
    batch, control = (p["n_gpu"] * math.prod(p[trainer][name] for name in sizes)
                      for trainer in ("trainer", "control_trainer"))
    updates = math.ceil(5000 / batch) * p["trainer"]["num_train_epochs"]
    assert updates * control / 1700 <= CONTROL_EPOCHS
