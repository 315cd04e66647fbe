"""Any layout to any layout: all pairs of ten, down to the bits of the state; what comes after is what would have been.

What is on disk is put together here by the safetensors library and the manifest alone, without any of our readers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_distributed
from safetensors.torch import load_file
from test_layouts import VOCAB, batches
from test_tensor_parallel import randomized
from torch import Tensor, nn
from training import refused_everywhere, relative_error, run_steps

import minizero
from minizero.config.schema import ModelConfig
from minizero.models import build

BATCH, LENGTH, BEFORE, AFTER = 12, 8, 3, 5  # the schedule begins with two steps at 0


@dataclass(frozen=True)
class Layout:
    """`dp` follows from the rest. accumulation: micro-batches of a step."""

    world: int
    stage: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    accumulation: int = 1
    schedule: str = "one_f_one_b"
    sequence: bool = False

    @property
    def dp(self) -> int:
        return self.world // self.tp // self.pp // self.cp


LAYOUTS = {
    "one": Layout(1, 0),
    "dp2-1": Layout(2, 1, accumulation=2),
    "dp3-2": Layout(3, 2),
    "dp4-3": Layout(4, 3, accumulation=3),
    "tp2-0": Layout(2, 0, tp=2),
    "tp2-dp2-3": Layout(4, 3, tp=2, sequence=True),
    "cp2-dp2-2": Layout(4, 2, cp=2),
    "pp2-1": Layout(2, 1, pp=2, accumulation=3),
    "zbv-dp2-2": Layout(4, 2, pp=2, accumulation=6, schedule="zbv"),
    "all-3": Layout(8, 3, tp=2, pp=2, accumulation=2),
}


def make(family: str) -> nn.Module:
    """Tied, odd widths, a vocabulary that no degree divides; a matrix and a norm that do not train."""
    torch.manual_seed(0)
    kv_heads = 2 if family == "llama" else None
    config = ModelConfig(
        family=family, hidden_size=24, num_layers=4, num_heads=4, num_kv_heads=kv_heads, intermediate_size=37,
        tie_embeddings=True,
    )  # fmt: skip
    model = randomized(build(config, VOCAB, LENGTH))
    frozen = ("layers.1.mlp.up_proj.weight", "layers.2.input_layernorm.weight", "h.1.mlp.c_fc.weight", "h.2.ln_1.bias")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith(frozen))
    return model


def settings(layout: Layout, **more: Any) -> minizero.Config:
    return minizero.Config(
        parallel={"tp": layout.tp, "pp": layout.pp, "cp": layout.cp, "sequence": layout.sequence},
        pipeline={"schedule": layout.schedule},
        zero={"stage": layout.stage},
        train={
            "micro_batch_size": BATCH // layout.dp // layout.accumulation,
            "gradient_accumulation_steps": layout.accumulation,
            "gradient_clipping": 0.5,
        },
        optimizer={"lr": 1e-3, "weight_decay": 0.1},
        scheduler={"type": "WarmupDecayLR", "params": {"total_num_steps": 20, "warmup_num_steps": 3}},
        dist={"timeout": 30.0},
        **more,
    )


def start(layout: Layout, family: str) -> Any:
    return minizero.initialize(model=make(family), config=settings(layout))[0]


def train(engine: Any, layout: Layout, first: int, last: int) -> tuple[list[float], list[float]]:
    return run_steps(engine, batches(last, BATCH, LENGTH)[first:], layout.accumulation)


def save(name: str, family: str, folder: str) -> tuple[list[float], list[float]]:
    layout = LAYOUTS[name]
    engine = start(layout, family)
    train(engine, layout, 0, BEFORE)
    engine.save_checkpoint(folder, tag=name)
    return train(engine, layout, BEFORE, BEFORE + AFTER)


def load_all(name: str, family: str, folder: str, steps: int) -> list[tuple[str, dict[str, Tensor], Any]]:
    """Of every checkpoint in turn: its name, the whole weights that it gives, what training goes on to give."""
    layout = LAYOUTS[name]
    engine, found = start(layout, family), []
    for source in sorted(path.name for path in Path(folder).iterdir() if path.name in LAYOUTS):
        engine.load_checkpoint(folder, tag=source)
        engine.save_checkpoint(folder, tag=f"{source}_by_{name}", save_latest=False)
        whole = {key: value.clone() for key, value in engine.runtime.whole_parameters()}
        assert (engine.global_steps, engine.global_samples) == (BEFORE, BEFORE * BATCH)
        found.append((source, whole, train(engine, layout, BEFORE, BEFORE + steps)))
    return found


def on_disk(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """({kind/parameter: whole tensor}, the manifest)."""
    text = (folder / "manifest.json").read_text()
    manifest = json.loads(text)["manifest"]
    whole: dict[str, Tensor] = {}
    for file in manifest["files"]:
        tensors = load_file(folder / file["file"])
        for kind, name, box in file["boxes"]:
            values = tensors[f"{kind}/{name}@{','.join(f'{low}:{high}' for low, high in box)}"]
            shape = manifest["parameters"][name]["shape"]
            into = whole.setdefault(f"{kind}/{name}", torch.full(shape, torch.nan))
            into[tuple(slice(low, high) for low, high in box)] = values
    return whole, manifest


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("family", "names", "steps"),
    (
        pytest.param("llama", tuple(LAYOUTS), AFTER, marks=pytest.mark.soak),
        ("llama", ("dp3-2", "tp2-dp2-3", "cp2-dp2-2", "zbv-dp2-2"), 2),
        ("gpt2", ("dp3-2", "zbv-dp2-2"), 2),
    ),
)
def test_all_pairs(tmp_path, family, names, steps):
    expected = {name: run_distributed(save, LAYOUTS[name].world, name, family, str(tmp_path))[0] for name in names}
    saved = {name: on_disk(tmp_path / name) for name in names}
    for name in names:
        reports = run_distributed(load_all, LAYOUTS[name].world, name, family, str(tmp_path), steps, timeout=150)
        assert [source for source, *_ in reports[0]] == sorted(names)
        for source, whole, (losses, norms) in reports[0]:
            tensors, manifest = saved[source]
            again, by = on_disk(tmp_path / f"{source}_by_{name}")
            assert same(tensors, again), (source, name)
            masters = {f"master/{key}": value for key, value in whole.items()}
            if LAYOUTS[name].pp == 1:  # else the first rank has only its own stage
                assert masters.keys() == {key for key in tensors if key.startswith("master/")}
            assert all(torch.equal(tensors[key], value) for key, value in masters.items()), (source, name)
            for key in ("counters", "scheduler", "param_groups", "parameters", "scaler"):
                found, wanted = by[key], manifest[key]
                if key == "counters":  # passes through the model depend on the layout
                    assert found.pop("micro_steps") == BEFORE * LAYOUTS[name].accumulation
                    wanted = {k: v for k, v in wanted.items() if k != "micro_steps"}
                assert found == wanted, (key, source, name)
            assert relative_error(losses, expected[source][0][:steps]) < 2e-6
            assert relative_error(norms, expected[source][1][:steps]) < 2e-6
            if source == name:
                assert (losses, norms) == tuple(series[:steps] for series in expected[source])
    held = {key.partition("/")[0] for key in saved[names[0]][0]}
    assert held == {"master", "exp_avg", "exp_avg_sq"}


def load_deeper(folder: str) -> None:
    """A checkpoint of four layers, into a pipeline of two."""
    layout = Layout(2, 1, pp=2, accumulation=3)
    config = ModelConfig(hidden_size=24, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=37)
    model = build(config.model_copy(update={"tie_embeddings": True}), VOCAB, LENGTH)
    minizero.initialize(model=model, config=settings(layout))[0].load_checkpoint(folder, tag="pp2-1")


def test_what_no_stage_has_is_refused(tmp_path):
    """Each stage has only a part of the model, and would not miss the rest."""
    run_distributed(save, 2, "pp2-1", "llama", str(tmp_path))
    refused_everywhere(
        load_deeper, 2, r"of another model: parameter 'model.layers.2.\S+' is only in the checkpoint", str(tmp_path)
    )
