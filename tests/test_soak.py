"""Long campaigns (`make soak`): every toy at every stage, world size and switch; repeated to find races."""

from __future__ import annotations

import itertools

import pytest
import torch
from harness import run_distributed
from test_checkpoint import straight_and_resumed
from toys import MODELS, train_plainly
from training import relative_error, train

pytestmark = pytest.mark.soak


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("world", (1, 2, 4, 8))
def test_every_model_in_every_layout(name, world):
    dtype, bound = (None, 3e-6) if name == "two_dtypes" else (torch.float64, 1e-10)
    losses, norms, _ = train_plainly(name, 6, dtype=dtype)
    for stage, accumulation in itertools.product(range(4), (1, 2)):
        report = run_distributed(train, world, name, stage, 6, accumulation, dtype=dtype)[0]
        assert relative_error(report.losses, losses) < bound, (stage, accumulation)
        assert relative_error(report.norms, norms) < bound, (stage, accumulation)


@pytest.mark.parametrize("repeat", range(20))
def test_overlap_races_do_not_show(repeat):
    zero = {"overlap": True, "prefetch": bool(repeat % 2)}
    runs = [run_distributed(train, 4, "toy", stage, 10, 2, zero={"stage": stage, **zero})[0] for stage in (2, 3)]
    assert runs[0].losses == runs[1].losses and runs[0].norms == runs[1].norms


@pytest.mark.parametrize("repeat", range(10))
@pytest.mark.parametrize("stage", (1, 2, 3))
def test_resume_again_and_again(tmp_path, stage, repeat):
    for expected, found, same in run_distributed(straight_and_resumed, 4, str(tmp_path), stage, "fp32"):
        assert found == expected and same
