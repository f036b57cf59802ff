"QLoRA: SFT and DPO on a base whose weights have four bits, on whatever device there is."
import shutil

import pytest
import torch

pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing; `make test-4bit` installs it and runs these tests")

from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from conftest import RUN, SMALL, small
from peft import get_peft_model

from looper_math import dpo, models, sft, training
from looper_math.records import read_json, run_folder

BASE = "data/pocket-base"


@pytest.fixture
def twins():
    "The base in four bits, and a full base with the same numbers, both with the same adapter."
    quantized, whole = (models.load_base(BASE, "float32", load_in_4bit=bits) for bits in (True, False))
    for name, layer in quantized.named_modules():
        if not isinstance(layer, Linear4bit): continue
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        whole.get_submodule(name).weight.data = weight.to(whole.dtype)
    both = [get_peft_model(model, models.lora_config()) for model in (quantized, whole)]
    with torch.no_grad():
        for (name, a), (_, b) in zip(*(m.named_parameters() for m in both)):
            if "lora" in name: b.copy_(a.normal_(std=.02))
    return both


def test_projections_have_four_bits(twins):
    "All seven projections of a layer are quantized, and the model is smaller."
    quantized, whole = twins
    layers = [name for name, m in quantized.named_modules() if isinstance(m, Linear4bit)]
    assert {name.split(".")[-2] for name in layers} == set(models.PROJECTIONS)
    sizes = [m.base_model.model.get_memory_footprint() for m in (quantized, whole)]
    assert sizes[0] < sizes[1]


def test_gradients_are_those_of_the_same_numbers(twins):
    "Also after an evaluation, such as DPO's reference: there bitsandbytes 0.50 alone loses 99 % of it on a CPU."
    ids = torch.arange(5, 65, device=models.device()).view(2, 30)
    losses, gradients = [], []
    for model in twins:
        with torch.no_grad(): model.eval()(ids)
        losses.append(model.train()(ids, labels=ids).loss)
        losses[-1].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert abs(losses[0] - losses[1]) < 1e-3 * losses[1]
    assert (gradients[0] - gradients[1]).norm() < 1e-2 * gradients[1].norm()


def test_sft_and_dpo_in_four_bits(small_run):
    "Both phases train an adapter. DPO's reference equals SFT's adapter at the start. Both answer in four bits."
    folder = run_folder(f"{RUN}-four-bits")
    shutil.rmtree(folder, ignore_errors=True)
    sft.main(sft.SFTSettings(**small("01_sft", run=folder.name, load_in_4bit=True, limit=64)))
    inputs = {"adapter": str(folder / "01_sft/adapter"), "pairs": str(small_run / "03_preferences/pairs.jsonl")}
    dpo.main(dpo.DPOSettings(**small("04_dpo", run=folder.name, load_in_4bit=True, control_cap=0, **inputs)))
    for phase in ("01_sft", "04_dpo"):
        manifest = read_json(folder / phase / "manifest.json")
        assert manifest["parameters"]["load_in_4bit"] is True
        assert manifest["metrics"]["heldout"]["n"] == SMALL[phase]["dev_limit"]
        assert training.history(folder / phase / "adapter").grad_norm.gt(0).all()
    shutil.rmtree(folder)
