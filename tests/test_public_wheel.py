"A wheel without Regime W, in a separate environment: evaluation, serving and a plain question work there."
import json
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from looper_math.records import ROOT
from looper_math.runs import parameters_of

BASE = str(ROOT / "data/pocket-base")
PRIVATE = ("regime_w", "rollouts", "importing", "pairs", "preferences", "sampler", "online_rl", "criteria", "plan",
           "browse", "explore", "_modidx")

PLAIN_USE = f"""
import json, sys
from pathlib import Path
import looper_math
assert "site-packages" in looper_math.__path__[0] and "public" in looper_math.__path__[0], looper_math.__path__
from looper_math import ask, audit, cards, cli, engines, evaluation, heldout, records, report, serving
assert records.ROOT == Path.cwd()
for name in {PRIVATE}:
    try: __import__(f"looper_math.{{name}}")
    except ModuleNotFoundError: pass
    else: raise SystemExit(f"looper_math.{{name}} is in the wheel")
question = "Mia has 12 plums. Mia buys 5 plums. How many plums does Mia have now?"
answer = ask.ask({BASE!r}, question, plain=True, max_new_tokens=60)
assert answer.plain["full_text"], "the plain call has no text"
try: ask.ask({BASE!r}, "Mia has 12 plums. How many?")
except records.SettingsError as e: assert "--plain" in str(e), e
else: raise SystemExit("arms were scored without Regime W")
parameters = json.loads(sys.argv[1])
manifest = evaluation.run_phase(evaluation.EvalSettings(**parameters))
print(json.dumps(manifest["metrics"]["models"]))
"""


def run(command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel, built from a copy of the files that git tracks, without build products of the working tree."
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    files = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=ROOT,
                           capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, files):
        if not name.startswith(("looper_math/", "tests/")) and "/" in name: continue
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)],
        env=os.environ | {"LOOPER_WITHOUT_REGIME_W": "1"})
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def test_the_wheel_contains_no_formula(wheel, tmp_path):
    "Neither the wheel nor the source archive contains a private module, a test, or words of a metric's definition."
    archive, source = wheel
    run([sys.executable, "-m", "tarfile", "-e", str(source), str(tmp_path)])
    with zipfile.ZipFile(archive) as z: z.extractall(tmp_path / "wheel")
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) > 50 and not [p for p in files if p.stem in PRIVATE or "tests" in p.parts]
    formula = re.compile(r"jaccard|s_path|s_wm|centrality|Regime W metric|\bquality\b.{0,20}0?\.3", re.I)
    texts = [p for p in files if p.suffix in (".py", ".md", "")]
    leaks = [f"{p.name}: {m[0]}" for p in texts if (m := formula.search(p.read_text(encoding="utf-8")))]
    assert not leaks, leaks


def test_evaluation_and_a_plain_question_work(wheel, tmp_path):
    "In a new environment whose only looper_math is the wheel; its dependencies come from this environment."
    place, work = tmp_path / "public", tmp_path / "work"
    work.mkdir()
    run([sys.executable, "-m", "venv", str(place)])
    python = str(place / "bin/python")
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    # The folder alone: its own .pth files would make this checkout's looper_math importable.
    (site / "below.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run([python, "-m", "pip", "install", "-q", "--no-deps", str(wheel[0])])
    defaults = {k: p.default for k, p in parameters_of(ROOT / "nbs/05_eval.ipynb").items()}
    data = {k: str(ROOT / v) for k, v in defaults.items() if isinstance(v, str) and v.startswith("data/")}
    small = {"run": "wheel", "models": {"base": ""}, "comparisons": [], "limit": 4, "sampling": {}, "arm_set": "",
             "harder": "", "max_new_tokens": 60}
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    out = run([python, "-c", PLAIN_USE, json.dumps(defaults | data | small)], cwd=work, env=environment)
    assert json.loads(out.splitlines()[-1])["base"]["n"] == 4
    assert (work / "outputs/wheel/05_eval/manifest.json").exists()
