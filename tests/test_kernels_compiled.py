"""What the kernels compile to, for GPUs that are not here (`compiled.py`): nothing spills, all fits, loads are wide,
tensor cores multiply, and no sum depends on the order in which programs run."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

EACH = (pytest.param(80, marks=pytest.mark.soak), 90, pytest.param(100, marks=pytest.mark.soak))
# Bytes of shared memory. What runs on 8.0, which has 163 KB, has to run on 8.6, 8.9 and 12.0 as well, which have 99.
SHARED = {80: 101376, 90: 232448, 100: 232448}
TENSOR_CORES = {80: "mma", 90: "wgmma", 100: "tcgen05"}
TENSOR_MEMORY = 512  # columns, on 10.0
PLANTED = {"atomic": "adds atomically", "spill": "spills", "narrow": "loads are narrow"}

Record = dict[str, Any]


def faults(record: Record) -> list[str]:
    """What is wrong with a compiled kernel."""
    arch, options = record["arch"], record["options"]
    found = {
        "spills": record["stack"] or record.get("local"),
        "takes too much shared memory": record["shared"] > SHARED[arch],
        "takes too much tensor memory": record["tensor_memory"] > TENSOR_MEMORY,
        "takes too many registers": record["registers"] * record["threads"] > 65536,
        # a number of 16 bits that stands alone: the logit of a label, the flag that a step is to be skipped
        "loads are narrow": not record["wide_loads"] or record["narrow_loads"] > 1 or not record.get("LDG.128", True),
        "stores are narrow": record["narrow_stores"],
        "adds atomically": record["atomics"],
    }
    if record["dots"] and record["bits"] == 16:
        # Instructions of a group of warps multiply 64 rows or more. Backward over keys of heads wider than 128 has 32:
        # with 64, two sums of 256 columns take all the registers that there are. So it multiplies as of old.
        rows = options["BLOCK_U" if record["kernel"].endswith("_keys") else "BLOCK_T"]
        wanted = "mma" if rows < 64 else TENSOR_CORES[arch]
        found[f"does not multiply by {wanted}"] = not record[wanted]
    return [fault for fault, there in found.items() if there]


def of_all(records: list[Record]) -> dict[str, list[str]]:
    """Faults by case, kernel and architecture."""
    return {f"{r['case']}: {r['kernel']} on sm_{r['arch']}": found for r in records if (found := faults(r))}


def compile_all(path: Path, *options: str) -> tuple[list[str], list[Record], list[Record]]:
    """(names of kernels, records of theirs, records of what is planted)."""
    script = Path(__file__).resolve().parent / "compiled.py"
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, str(script), str(path), *options], env=environment, check=True)
    found = json.loads(path.read_text())
    planted = [record for record in found["records"] if record["case"].startswith("planted")]
    return found["kernels"], [record for record in found["records"] if record not in planted], planted


@functools.cache
def compiled(arch: int) -> tuple[list[str], list[Record], list[Record]]:
    """`compile_all` for one architecture: half a minute."""
    with tempfile.TemporaryDirectory() as folder:
        return compile_all(Path(folder) / "found.json", "--arch", str(arch))


@pytest.mark.parametrize("arch", EACH)
def test_kernels_are_free_of_faults(arch):
    kernels, records, _ = compiled(arch)
    assert sorted({record["kernel"] for record in records}) == kernels
    assert of_all(records) == {}


@pytest.mark.parametrize("arch", EACH)
@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults_are_found(name, arch):
    (record,) = (r for r in compiled(arch)[2] if r["case"] == f"planted {name}")
    assert PLANTED[name] in faults(record)
    assert not set(faults(record)) & (set(PLANTED.values()) - {PLANTED[name]})


@pytest.mark.parametrize("arch", EACH)
@pytest.mark.parametrize(
    "change, fault",
    [
        ({"shared": 232449}, "takes too much shared memory"),
        ({"tensor_memory": 513}, "takes too much tensor memory"),
        ({"registers": 255, "threads": 512}, "takes too many registers"),
        ({"narrow_loads": 2}, "loads are narrow"),
        ({"LDG.128": 0}, "loads are narrow"),
        ({"narrow_stores": 1}, "stores are narrow"),
        ({"local": 1}, "spills"),
        ({"mma": 0, "wgmma": 0, "tcgen05": 0}, "does not multiply by"),
    ],
)
def test_each_fault_alone_is_found(arch, change, fault):
    (record,) = (r for r in compiled(arch)[1] if r["case"] == "attention 128" and "_forward" in r["kernel"])
    assert faults(record) == []
    assert [each.startswith(fault) for each in faults(record | change)] == [True]


@pytest.mark.soak
def test_every_size_is_free_of_faults(tmp_path):
    kernels, records, _ = compile_all(tmp_path / "found.json", "--all")
    assert {record["kernel"] for record in records} == set(kernels)
    assert of_all(records) == {}
