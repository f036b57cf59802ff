"""Packaging. Every fact, the dependency list included, stands in settings.ini.

With LOOPER_WITHOUT_REGIME_W=1 the build leaves out Regime W and what cannot work without it.
"""
import os
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

parser = ConfigParser(delimiters=["="])
parser.read("settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

PUBLIC = ("looper_math", "README.md", "LICENSE", "MANIFEST.in", "settings.ini", "setup.py")
# _modidx names the functions of every module, so it goes too.
PRIVATE = ("regime_w", "rollouts", "importing", "pairs", "preferences", "sampler", "online_rl", "criteria", "plan",
           "browse", "explore", "_modidx")
public = os.environ.get("LOOPER_WITHOUT_REGIME_W") == "1"

# The second part of the README describes the private repository.
readme = Path("README.md").read_text(encoding="utf-8").partition("<!-- private from here -->")[0]


class BuildPublic(build_py):
    "A wheel without the private modules."

    def find_package_modules(self, package, package_dir):
        return [m for m in super().find_package_modules(package, package_dir) if m[1] not in PRIVATE]

    def find_data_files(self, package, src_dir):
        return [f for f in super().find_data_files(package, src_dir) if Path(f).stem not in PRIVATE]


class SourcePublic(sdist):
    "A source archive without the private modules, the tests (they compute the metrics anew) and the private README."

    def make_release_tree(self, base_dir, files):
        public_files = [f for f in files if Path(f).stem not in PRIVATE and Path(f).parts[0] in PUBLIC]
        super().make_release_tree(base_dir, public_files)
        (Path(base_dir)/"README.md").unlink()   # it may be a hard link to the project's own
        (Path(base_dir)/"README.md").write_text(readme, encoding="utf-8")


setup(
    name=cfg["lib_name"],
    version=cfg["version"] + ("+public" if public else ""),
    description=cfg["description"],
    long_description=readme,
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="All rights reserved",
    license_files=["LICENSE"],
    classifiers=["Private :: Do Not Upload"],
    packages=find_packages(include=["looper_math", "looper_math.*"]),
    package_data={"looper_math": ["templates/**/*"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split(), "gpu": cfg["gpu_requirements"].split()},
    entry_points={"console_scripts": cfg["console_scripts"].split("\n")},
    cmdclass={"build_py": BuildPublic, "sdist": SourcePublic} if public else {},
)
