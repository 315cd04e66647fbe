"""Where an op runs: whose tensors kernels take, with and without the cure of Triton's interpreter; what is traced."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_checks import randn

from minizero import kernels
from minizero.kernels import backend
from minizero.kernels.backend import chosen, overlaps, use_triton


def in_a_process(code: str, **environment: str) -> Any:
    """What `code` prints, as JSON."""
    here = Path(__file__).parent
    environment |= {"PYTHONPATH": f"{here.parent}{os.pathsep}{here}"}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def on_gpu(index: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    """As much of a tensor as is looked at."""
    return SimpleNamespace(device=torch.device("cuda", index), dtype=dtype, is_floating_point=lambda: True)


@pytest.fixture
def gpus(monkeypatch):
    """Two, of which the first is the current one, and kernels are compiled."""
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(backend, "obstacle", lambda device: "")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


# ---- devices ----


def test_kernels_take_tensors_of_the_current_device(gpus):
    for name in ("auto", "triton"):
        assert use_triton(name, "rms_norm", on_gpu(0), None, on_gpu(0))
    assert not use_triton("torch", "rms_norm", on_gpu(0))
    assert chosen("auto", torch.device("cuda", 0)) == "triton"


def test_tensors_of_another_device_than_the_current_one_are_for_torch(gpus):
    """A launch goes to the current device, where their addresses are nobody's."""
    assert not use_triton("auto", "rms_norm", on_gpu(1), on_gpu(1))
    with pytest.raises(ValueError, match="^rms_norm: tensors are on cuda:1, and the current device is cuda:0; backend"):
        use_triton("triton", "rms_norm", on_gpu(1), on_gpu(1))
    with pytest.raises(ValueError, match="^rms_norm: tensors are on cuda:0 and cuda:1; backend"):
        use_triton("triton", "rms_norm", on_gpu(0), on_gpu(1))


def test_auto_never_chooses_the_interpreter(monkeypatch):
    """Not for tensors on a GPU either, which it would copy to and fro."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert backend.INTERPRETED
    assert not use_triton("auto", "rms_norm", on_gpu(0, torch.float32))
    assert not use_triton("auto", "rms_norm", randn(3))
    assert chosen("auto", torch.device("cuda", 0)) == chosen("auto", torch.device("cpu")) == "torch"
    assert use_triton("triton", "rms_norm", randn(3))


# ---- the interpreter ----

UNCURED = """
import json, torch
from minizero import kernels
from minizero.kernels import backend
x, w = torch.randn(3, 40), torch.randn(40)
found = {"interpreted": backend.INTERPRETED}
found["error"] = float((kernels.rms_norm(x, w, backend="triton") - kernels.rms_norm(x, w, backend="torch")).norm())
calls = {
    "rms_norm": lambda: kernels.rms_norm(x.bfloat16(), w.bfloat16(), backend="triton"),
    "layer_norm": lambda: kernels.layer_norm(x, w.bfloat16(), None, backend="triton"),
    "cast_and_pack": lambda: kernels.cast_and_pack([x], torch.empty(120).bfloat16(), backend="triton"),
    "quantize_blockwise": lambda: kernels.quantize_blockwise(x, 16, torch.float8_e4m3fn, backend="triton"),
    "dequantize_blockwise": lambda: kernels.dequantize_blockwise(
        x.to(torch.int8), w[:8], 16, torch.bfloat16, backend="triton"
    ),
}
for name, call in calls.items():
    try:
        call()
    except ValueError as error:
        found[name] = str(error)
kernels.rms_norm(x.bfloat16(), w.bfloat16())
kernels.quantize_blockwise(x, 16, backend="triton")
print(json.dumps(found))
"""


@pytest.mark.parametrize("value", ["1", "true"])
def test_without_the_cure_the_interpreter_is_for_fp32_and_fp16(value):
    """What switches it on is what Triton takes for it."""
    found = in_a_process(UNCURED, TRITON_INTERPRET=value)
    assert found.pop("interpreted")
    assert found.pop("error") < 1e-5
    assert set(found) == {"rms_norm", "layer_norm", "cast_and_pack", "quantize_blockwise", "dequantize_blockwise"}
    for name, message in found.items():
        dtype = "torch.float8_e4m3fn" if name == "quantize_blockwise" else "torch.bfloat16"
        assert message == (
            f"{name}: Triton's interpreter computes garbage in {dtype}; backend auto or torch runs it in torch"
        )


# ---- tracing ----

TRACED = """
import json, sys, torch
import torch.utils._triton
from minizero import kernels
from minizero.kernels import backend

for module in [each for name, each in sys.modules.items() if name.startswith("minizero.kernels.")]:
    module.use_triton = lambda backend, op, *tensors: True
torch.utils._triton.has_triton = torch.utils._triton.has_triton_package = lambda: True
graphs, found = [], {"interpreted": backend.INTERPRETED}

def keep(graph, inputs):
    "Nothing is compiled, since nothing can run."
    graphs.append(graph)
    raise NotImplementedError

labels = torch.zeros(4, dtype=torch.int64)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for in_place in (False, True):
        x = torch.randn(4, 16).to(dtype).requires_grad_()
        try:
            loss = lambda x: kernels.cross_entropy(x * 1, labels, in_place=in_place, backend="triton")
            torch.compile(loss, fullgraph=True, backend=keep)(x)
        except Exception as error:
            found[f"{dtype} {in_place}"] = f"{type(error).__name__}: {error}"[:200]
        torch._dynamo.reset()
print(json.dumps({**found, "graphs": len(graphs)}))
"""


def test_torch_compile_traces_the_kernels_of_the_loss_and_their_backward():
    """Dynamo looks at backward too. There is no GPU to run them on."""
    found = in_a_process(TRACED, TRITON_INTERPRET="0")
    assert not found.pop("interpreted")
    assert found.pop("graphs") == 6, found
    assert all("NotImplementedError" in message for message in found.values()), found


# ---- memory ----


def test_elements_that_share_memory_are_found():
    """Beside all addresses, for all small shapes and strides; where it is hard to say, they are said to."""
    buffer = torch.arange(100)
    for shape in itertools.product(range(4), repeat=2):
        for stride in itertools.product(range(6), repeat=2):
            x = buffer.as_strided(shape, stride)
            shares = len(x.unique()) < x.numel()
            if shares or x.is_contiguous() or 1 in stride:
                assert overlaps(x) == shares, (shape, stride)
    assert not overlaps(buffer[:24].view(2, 3, 4).permute(2, 0, 1)[1:, :, ::2])
    assert overlaps(buffer.as_strided((3, 2), (2, 3)))  # they do not, but who knows
    assert kernels.Backend is not None
