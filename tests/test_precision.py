"""The layers of engine/precision.py: what they give, whatever shares the call, on processors of any age."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import export_model
from engine.decoder import Decoder
from engine.precision import PRECISIONS, BFloat16Linear, Int8Linear, PackedLinear, with_precision

ROOT = Path(__file__).parents[1]
# (inputs, outputs): those of the two models, the joiner's odd one among them.
SIZES = [(1024, 4097), (512, 1536), (2048, 512), (80, 128), (192, 576), (192, 15), (320, 2048)]
LAYERS = {
    "fp32": lambda linear: PackedLinear(linear, many_rows=False),
    "fp32, many rows": lambda linear: PackedLinear(linear, many_rows=True),
    "bf16": BFloat16Linear,
    "int8": lambda linear: Int8Linear(linear, None),
    "int8 after GELU": lambda linear: Int8Linear(linear, -0.17),
}


def linear_of(inputs: int, outputs: int) -> torch.nn.Linear:
    torch.manual_seed(inputs + outputs)
    return torch.nn.Linear(inputs, outputs).requires_grad_(False)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("size", SIZES, ids="{0[0]} to {0[1]}".format)
def test_a_row_knows_nothing_of_the_others_in_its_call(layer, size):
    module = torch.jit.script(LAYERS[layer](linear_of(*size)))
    rows = torch.randn(500, size[0]) * torch.logspace(-2, 2, 500).unsqueeze(1)
    if "GELU" in layer:
        rows = torch.nn.functional.gelu(rows)
    with torch.inference_mode():
        together = module(rows)
        for count in (1, 2, 3, 4, 5, 7, 8, 10, 16, 17, 31, 33, 64, 100, 325):
            first = 3 * count % 170
            assert torch.equal(module(rows[first : first + count].clone()), together[first : first + count])


# In one process each, because FBGEMM reads the variable once.
ERRORS = """
import torch
from engine.precision import Int8Linear, saturates
torch.manual_seed(0)
worst = 0.0
for lowest, rows in ((None, torch.randn(20, 512)), (0.0, torch.rand(20, 512)), (-0.17, torch.rand(20, 512) - 0.17)):
    # Weights and inputs as large as they get, of one sign: what a sum of pairs in 16 bits has no place for.
    for weight in (torch.rand(64, 512), -torch.rand(64, 512), torch.randn(64, 512)):
        linear = torch.nn.Linear(512, 64).requires_grad_(False)
        linear.weight.copy_(weight)
        error = Int8Linear(linear, lowest)(rows) - linear(rows)
        worst = max(worst, (error.norm() / linear(rows).norm()).item())
print(saturates(), worst)
"""


@pytest.mark.parametrize("instructions", ["", "AVX512", "AVX2"])
def test_no_processor_saturates(instructions):
    """FBGEMM is told to use no more than AVX2, or AVX-512 without VNNI, as on older processors."""
    environment = os.environ | {"FBGEMM_ENABLE_INSTRUCTIONS": instructions}
    done = subprocess.run(
        [sys.executable, "-c", ERRORS], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    saturates, worst = done.stdout.split()
    assert saturates == "True" or not instructions
    assert float(worst) < (0.025 if saturates == "True" else 0.0125)


def test_int8_is_close_to_single_precision_and_closer_where_inputs_have_no_sign():
    linear = linear_of(1024, 4097)
    rows = torch.randn(50, 1024).relu()
    with torch.inference_mode():
        expected = linear(rows)
        errors = [(Int8Linear(linear, lowest)(rows) - expected).square().mean().sqrt() for lowest in (None, 0.0)]
    assert errors[1] < 0.9 * errors[0] < 0.01


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_are_in_memory_once(precision):
    """A module that has computed holds what it packed, and no longer what was loaded.

    Without AVX-512 the encoder at fp32, and everything at bf16, is computed with the weights as they were loaded.
    """
    model = export_model.digits(None)[0].eval()
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(with_precision(Decoder(model, 14), precision)), file)
    file.seek(0)
    engine = torch.jit.load(file)
    with torch.inference_mode():
        engine.decode([torch.randn(100, 80)], 4)
    layers = [module for module in engine.modules() if hasattr(module, "packed")]
    packed = [bool(layer.packed) for layer in layers]
    assert [layer.weight.numel() == 0 for layer in layers] == packed and len(packed) > 5
    wide = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert all(packed) if wide or precision == "int8" else any(packed) == (precision == "fp32")


def test_the_inputs_behind_an_activation_are_known_to_have_no_sign():
    engine = with_precision(Decoder(export_model.digits(None)[0].eval(), 14), "int8")
    unsigned = {name: layer.zero for name, layer in engine.named_modules() if not getattr(layer, "signed", True)}
    assert unsigned.pop("search.joiner.1") == 0  # ReLU
    assert len(unsigned) == len(engine.encoder.layers) and set(unsigned.values()) == {32}  # GELU
