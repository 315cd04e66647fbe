"""What tests of kernels share: a measure of error, parity, the same bits in any order, planted defects, huge tensors.

An op is called as `op(*inputs, backend=...)`. Its exact result is the torch backend's in float64, on inputs that were
rounded to the dtype at hand; `oracle` proves that one against something that is not ours.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import interpreter
import pytest
import torch
from torch import Tensor
from torch.autograd import Function
from triton.runtime.interpreter import interpreter_builder

from minizero.kernels import backend

Op = Callable[..., Any]
Results = dict[str, Tensor]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TIMES = 1.5  # ours may be this many times as wrong as whoever is beside it
WORST = {torch.float32: 1e-2, torch.bfloat16: 0.1, torch.float16: 1e-2, torch.float64: 1e-10}  # of a rival
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def randn(*shape: int, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale + shift


# ---- errors ----


def error(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference by the norm of what is exact; infinities and nan must be where they belong."""
    assert found.shape == exact.shape, (found.shape, exact.shape)
    found, exact = found.detach().double(), exact.detach().double()
    odd = ~exact.isfinite()
    torch.testing.assert_close(found[odd], exact[odd], equal_nan=True, rtol=0, atol=0)
    difference = float(torch.where(odd, 0.0, found - exact).norm())
    size = float(torch.where(odd, 0.0, exact).norm())
    return 0.0 if difference == 0 else difference / size if size else math.inf


def floor(found: Tensor, exact: Tensor) -> float:
    """What nobody is blamed for: 4 ulp in fp32, scalars included; in 16 bits, the largest element off by one ulp."""
    if found.dtype == torch.float32:
        return 4 * torch.finfo(torch.float32).eps
    sizes = torch.where(exact.isfinite(), exact, 0.0).abs().double()
    return torch.finfo(found.dtype).eps * float(sizes.max() / sizes.norm()) if sizes.any() else 0.0


def close(found: Tensor, exact: Tensor, rival: Tensor, name: str = "") -> None:
    """`found` is no more than TIMES as far from `exact` as the rival, or as `exact` itself rounded, and the floor."""
    theirs = error(rival, exact)
    assert theirs <= WORST[rival.dtype], f"{name}: the rival is no measure, its error is {theirs:.2e}"
    best = max(theirs, error(exact.to(found.dtype), exact))
    ours, allowed = error(found, exact), TIMES * best + floor(found, exact)
    assert ours <= allowed, f"{name}: error {ours:.2e}, allowed {allowed:.2e} (rival {theirs:.2e})"


# ---- running an op ----


def upstream(kind: str, like: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """A gradient of `like`, rounded to `dtype`: dense, or laid out as autograd and views lay gradients out."""
    plain = randn(*like.shape, seed=100 + seed).to(dtype).to(like.dtype)
    if kind == "random" or (kind != "expanded" and like.dim() < 2):
        return plain
    if kind == "expanded":  # as .sum().backward() makes it: every stride 0
        return plain.new_full((), 0.75).expand(like.shape)
    if kind == "transposed":
        return plain.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert kind == "sliced"
    return torch.cat((plain, plain), dim=-1)[..., : like.shape[-1]]


def run(
    op: Op, inputs: Iterable[Tensor], dtype: torch.dtype, compute: torch.dtype, kind: str = "random", **options: Any
) -> Results:
    """Outputs of `op` on inputs that are rounded to `dtype` and held in `compute`, and gradients at these inputs."""
    leaves = [x.to(dtype).to(compute).clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    outputs = op(*leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    given = [upstream(kind, output, dtype, seed) for seed, output in enumerate(outputs)]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    kept = [output.detach().clone() for output in outputs]  # some backward writes over what it was given
    gradients = torch.autograd.grad(outputs, wanted, given)
    names = [f"output {number}" for number in range(len(kept))] + [f"gradient {n}" for n in range(len(wanted))]
    return dict(zip(names, (*kept, *gradients), strict=True))


def parity(
    op: Op,
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    kind: str = "random",
    rivals: Sequence[Op] = (),
    truth: Op | None = None,
) -> None:
    """Triton's outputs and gradients beside those of torch in the same dtype, and beside `rivals`.

    Exact is what `truth` makes of float64, where it is given: it has no part in common with `op`.
    """
    exact = run(truth or partial(op, backend="torch"), inputs, dtype, torch.float64, kind)
    eager = run(op, inputs, dtype, dtype, kind, backend="torch")
    found = run(op, inputs, dtype, dtype, kind, backend="triton")
    others = [run(rival, inputs, dtype, dtype, kind) for rival in rivals]
    for name, value in found.items():
        assert value.dtype == eager[name].dtype, (name, value.dtype, eager[name].dtype)
        close(value, exact[name], eager[name], f"{name} beside torch")
        for number, other in enumerate(others):
            close(value, exact[name], other[name], f"{name} beside rival {number}")


def oracle(op: Op, reference: Op, inputs: Sequence[Tensor], tolerance: float = 1e-12) -> None:
    """The torch backend in float64 is `reference`: outputs and gradients."""
    ours = run(op, inputs, torch.float64, torch.float64, backend="torch")
    theirs = run(reference, inputs, torch.float64, torch.float64)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=tolerance, atol=tolerance, msg=name)


def compiles(op: Op, inputs: Sequence[Tensor], tolerance: float = 1e-6) -> None:
    """torch.compile traces the torch backend without a break, and its results and gradients are the same."""
    torch._dynamo.reset()
    plain = run(op, inputs, torch.float32, torch.float32, backend="torch")
    traced = torch.compile(op, fullgraph=True, backend="aot_eager")
    for name, value in run(traced, inputs, torch.float32, torch.float32, backend="torch").items():
        assert error(value, plain[name]) <= tolerance, (name, error(value, plain[name]))


class _Again(Function):
    """An op whose backward runs the op once more: gradcheck goes back several times, and some ops allow it once."""

    @staticmethod
    def forward(ctx: Any, op: Op, *inputs: Tensor) -> Any:
        ctx.op = op
        ctx.save_for_backward(*inputs)
        return op(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            outputs = ctx.op(*leaves)
            return None, *torch.autograd.grad(outputs, leaves, grads if isinstance(outputs, tuple) else grads[0])


def gradients_are_derivatives(op: Op, inputs: Sequence[Tensor]) -> None:
    """The torch backend's gradients in float64 beside differences of its outputs."""
    leaves = [x.double().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: _Again.apply(lambda *y: op(*y, backend="torch"), *x), leaves)


# ---- order ----


def bits(x: Tensor) -> Tensor:
    return x.detach().reshape(-1).contiguous().view(torch.uint8)


def same_in_any_order(make: Callable[[], Iterable[Tensor]], seeds: Sequence[int] = (1, 2, 3)) -> None:
    """`make` gives the same bits whatever order the programs of its launches run in; its last launch has several."""
    plain = [x.clone() for x in make()]
    assert math.prod(interpreter_builder.grid_dim) > 1, "one program has no order"
    for seed in seeds:
        with interpreter.program_order(seed):
            again = list(make())
        for number, (x, y) in enumerate(zip(plain, again, strict=True)):
            assert torch.equal(bits(x), bits(y)), f"result {number} depends on the order of programs (seed {seed})"


def triton_run(op: Op, inputs: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Callable[[], Iterable[Tensor]]:
    return lambda: run(op, inputs, dtype, dtype, backend="triton").values()


# ---- defects ----


def planted(folder: Path, name: str, *changes: tuple[str, str]) -> ModuleType:
    """A copy of the kernels' module `name` with some text changed: what a suite is for is to be red with it."""
    source = Path(str(importlib.import_module(f"minizero.kernels.{name}").__file__)).read_text()
    for old, new in changes:
        if old not in source:  # no AssertionError: that is what a defect is expected to raise
            raise LookupError(f"minizero/kernels/{name}.py no longer has {old!r}: plant this defect elsewhere")
        source = source.replace(old, new)
    # Python takes what it compiled before for a file that has the same name, length, and second of writing.
    path = Path(tempfile.mkdtemp(dir=folder)) / f"planted_{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PASSED: set[tuple[str, Any]] = set()


def sees(folder: Path, name: str, change: tuple[str, str], check: Callable[[ModuleType], None]) -> None:
    """`check` passes a copy of the kernels' module as it is, and not one with a defect."""
    if (name, check) not in PASSED:
        check(planted(folder, name))
        PASSED.add((name, check))
    with pytest.raises(AssertionError):
        check(planted(folder, name, change))


# ---- huge tensors ----

STRIDE = (1 << 30) + 64
"""From row to row, in elements: fits an int32, and the third row's offset does not."""

PRELUDE = f"""
import os
import sys
import interpreter
interpreter.cure()
import torch
from pathlib import Path
from kernel_checks import planted
bf16 = torch.bfloat16
buffer = torch.empty(2 * {STRIDE} + (1 << 16), dtype=bf16)  # 4 GB of addresses; memory for the pages that are touched

def far(columns, seed=0):
    "Three rows, the third beyond int32, and the same numbers close together."
    torch.manual_seed(seed)
    near = torch.randn(3, columns).to(bf16)
    rows = buffer[seed * 1024:].as_strided((3, columns), ({STRIDE}, 1))
    rows.copy_(near)
    return rows, near

def same(found, wanted):
    for x, y in zip(found, wanted, strict=True):
        assert torch.equal(x, y), "the third row is wrong"
"""


def beyond_int32(folder: Path, good: str, broken: Sequence[str]) -> None:
    """In a process of its own `good` succeeds, and each of `broken` crashes a fork of it or raises there."""
    here = Path(__file__).parent
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{here.parent}{os.pathsep}{here}"}
    code = f"{PRELUDE}\nfolder = Path({str(folder)!r})\n{good}\nprint('good', flush=True)\n"
    for number, lines in enumerate(broken):
        body = "".join(f"        {line}\n" for line in lines.strip().splitlines())
        code += f"if not os.fork():\n    try:\n{body}    except LookupError:\n        pass  # nothing was planted\n"
        code += f"    os._exit(0)\nprint({number}, os.wait()[1] != 0, flush=True)\n"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    wanted = ["good", *(f"{number} True" for number in range(len(broken)))]
    assert done.stdout.splitlines() == wanted, f"{done.stdout}\n{done.stderr}"


def refused_by_name(name: str, op: Callable[..., Any], monkeypatch: Any) -> None:
    """`op(cast, options)` says its name, and what is legal: for float64, an unknown backend, and without Triton."""
    with pytest.raises(
        ValueError, match=f"^{name}: a tensor is torch.float64; Triton's kernels take float32, bfloat16"
    ):
        op(torch.Tensor.double, {"backend": "triton"})
    with pytest.raises(ValueError, match=f"^{name}: backend 'cuda' does not exist; legal: auto, triton, torch"):
        op(torch.Tensor.float, {"backend": "cuda"})
    monkeypatch.setattr(backend, "TROUBLE", "Triton is not installed (so they say)")
    backend.obstacle.cache_clear()
    try:
        with pytest.raises(ValueError, match=f"^{name}: Triton is not installed .*; backend auto or torch runs it"):
            op(torch.Tensor.float, {"backend": "triton"})
        op(torch.Tensor.float, {})
    finally:
        backend.obstacle.cache_clear()
