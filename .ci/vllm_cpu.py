"""What vLLM's build for processors needs beside .venv, and whether installing it left .venv's packages as they are.

    python .ci/vllm_cpu.py needs FOLDER   write FOLDER/needs.txt and FOLDER/constraints.txt for pip
    python .ci/vllm_cpu.py check          fail when a package of .venv is seen in another version

Run by the Makefile with the interpreter of .venv-vllm, which sees the packages of .venv beneath its own.
"""
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name

BELOW = Path(__file__).parent.parent / ".venv/bin/python"
ABSENT = {"torchaudio", "torchvision", "torchcodec"}  # no builds for processors, and no text model uses them
BUILDING = {"setuptools"}                             # needed to build vLLM, not to run it


def wanted():
    "Requirements of vLLM that hold here, torch and what can't be had left out."
    found = [Requirement(r) for r in requires("vllm-cpu")]
    return [r for r in found if canonicalize_name(r.name) not in ABSENT | BUILDING | {"torch"} and (not r.marker or r.marker.evaluate({"extra": ""}))]


def frozen(python):
    "Package → version as an interpreter sees them."
    lines = subprocess.run([python, "-m", "pip", "freeze", "--exclude-editable"], check=True, capture_output=True, text=True).stdout.splitlines()
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines) if version}


def exact():
    "Packages of which vLLM wants exactly one version."
    return {canonicalize_name(r.name) for r in wanted() if any(s.operator == "==" for s in r.specifier)}


def needs(folder):
    (folder / "needs.txt").write_text("".join(f"{r.name}{'[' + ','.join(r.extras) + ']' if r.extras else ''}{r.specifier}\n" for r in wanted()))
    (folder / "constraints.txt").write_text("".join(f"{name}=={version}\n" for name, version in frozen(BELOW).items() if name not in exact()))


def check():
    mine, below = frozen(sys.executable), frozen(BELOW)
    other = {name: (version, mine.get(name)) for name, version in below.items() if mine.get(name) != version and name not in exact()}
    if other: sys.exit(f".venv-vllm sees other versions than .venv: {other}")
    print(f"vLLM is in .venv-vllm; the {len(below)} packages of .venv are as they were, apart from {sorted(name for name in exact() if name in below and mine[name] != below[name])} seen in vLLM's version by vLLM only")


if __name__ == "__main__":
    if sys.argv[1] == "needs": needs(Path(sys.argv[2]))
    else: check()
