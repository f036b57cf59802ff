"""What vLLM's build for CPUs needs beside .venv, and whether installing it left .venv's packages as they are.

    python .ci/vllm_cpu.py needs FOLDER   write FOLDER/needs.txt and FOLDER/constraints.txt for pip
    python .ci/vllm_cpu.py check          fail when a package of .venv appears in another version

Run by the Makefile with the interpreter of .venv-vllm, which also sees the packages of .venv.
"""
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name

BELOW = Path(__file__).parent.parent / ".venv/bin/python"
ABSENT = {"torchaudio", "torchvision", "torchcodec"}  # there are no builds for CPUs, and no text model uses them
BUILDING = {"setuptools"}                             # needed to build vLLM, not to run it


def applies(requirement):
    "Whether a requirement holds here and can be installed."
    name, marker = canonicalize_name(requirement.name), requirement.marker
    return name not in ABSENT | BUILDING | {"torch"} and (not marker or marker.evaluate({"extra": ""}))


def requirements():
    "Requirements of vLLM that hold here, without torch and what has no build."
    return [r for r in map(Requirement, requires("vllm-cpu")) if applies(r)]


def versions(python):
    "Package → version as an interpreter sees them."
    command = [python, "-m", "pip", "freeze", "--exclude-editable"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    parts = [line.partition("==") for line in lines]
    return {canonicalize_name(name): version for name, _, version in parts if version}


def exact():
    "Packages of which vLLM needs exactly one version."
    return {canonicalize_name(r.name) for r in requirements() if any(s.operator == "==" for s in r.specifier)}


def line(r):
    "A requirement as pip reads it."
    return f"{r.name}{'[' + ','.join(r.extras) + ']' if r.extras else ''}{r.specifier}\n"


def needs(folder):
    "Write what pip is to install, and the versions of .venv that it must keep."
    (folder / "needs.txt").write_text("".join(map(line, requirements())))
    pins = [f"{name}=={version}\n" for name, version in versions(BELOW).items() if name not in exact()]
    (folder / "constraints.txt").write_text("".join(pins))


def check():
    "Fail when a package of .venv appears in another version, except where vLLM needs one exact version."
    mine, below = versions(sys.executable), versions(BELOW)
    other = [name for name, version in below.items() if mine.get(name) != version]
    changed = {name: (below[name], mine.get(name)) for name in other if name not in exact()}
    if changed: sys.exit(f".venv-vllm sees other versions than .venv: {changed}")
    print(f"vLLM is installed; of the {len(below)} packages of .venv only {sorted(other)} differ in .venv-vllm, "
          f"where vLLM needs one exact version")


if __name__ == "__main__":
    if sys.argv[1] == "needs": needs(Path(sys.argv[2]))
    else: check()
