"""Writes every notebook as JupyterLab does: sources as lists of lines. nbdev_clean leaves each source as one string.

python .ci/notebooks.py [FOLDER]
"""
import sys
from pathlib import Path

import nbformat

for path in sorted(Path(sys.argv[1] if len(sys.argv) > 1 else "nbs").rglob("*.ipynb")):
    if ".ipynb_checkpoints" in path.parts: continue
    text = nbformat.writes(nbformat.read(path, as_version=nbformat.NO_CONVERT)) + "\n"
    if text != path.read_text(encoding="utf-8"): path.write_text(text, encoding="utf-8")
