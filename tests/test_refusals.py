"""What would be silently wrong in a parallel or checkpointed model is refused, on every rank, by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_distributed
from test_tensor_parallel import BATCH, VOCAB, Own, batches, foreign, make
from torch import Tensor, nn
from torch.nn import functional as F
from training import refused_everywhere, relative_error

import minizero
from minizero.models.dropout import Dropout

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 37, "max_position_embeddings": 16,
}  # fmt: skip


def config(**parallel: Any) -> minizero.Config:
    more = {key: parallel.pop(key) for key in ("recompute", "debug") if key in parallel}
    return minizero.Config(
        parallel=parallel, train={"micro_batch_size": BATCH, "gradient_clipping": 0.0}, dist={"timeout": 20.0}, **more
    )


# ---- a loss of the caller's own, from logits ----


def own_loss(name: str, cp: int) -> list[float]:
    """Losses and norms where the script computes the loss from whole logits."""
    torch.manual_seed(0)
    model = make("llama") if name == "llama" else foreign(name)
    engine, *_ = minizero.initialize(model=model.double(), config=config(cp=cp))
    found = []
    for batch in batches(3):
        out = engine(input_ids=batch["input_ids"])
        logits = getattr(out, "logits", out)
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        engine.backward(loss)
        engine.step()
        found += [float(loss.detach()), engine.get_global_grad_norm()]
    return found


@pytest.mark.parametrize("name", ("llama", "hf_llama"))
def test_a_loss_from_whole_logits_has_the_whole_gradient(name):
    whole = run_distributed(own_loss, 1, name, 1)[0]
    for found in run_distributed(own_loss, 2, name, 2):
        assert relative_error(found, whole) < 2e-6


# ---- what is refused ----


def special(kind: str) -> Any:
    import transformers

    if kind == "embedding":
        return transformers.GemmaForCausalLM(transformers.GemmaConfig(**COMMON, head_dim=6))
    if kind == "chunks":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON, attention_chunk_size=4))
    if kind == "dynamic":
        rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON, rope_parameters=rope))
    if kind == "classes":
        return transformers.LlamaForTokenClassification(transformers.LlamaConfig(**COMMON, num_labels=3))
    return foreign("hf_llama")


def use(kind: str) -> None:
    ids = batches(1)[0]["input_ids"]
    model, settings, given = special(kind), config(cp=2), {"input_ids": ids}
    if kind == "embedding":
        settings = config(tp=2)
    elif kind == "unlisted":
        model, plan = Own(), {key: style for key, style in Own.plan.items() if not key.endswith("norm")}
        settings = config(tp=2, sequence=True, plan=plan | {"norm": "sequence_end"})
        given = batches(1)[0]
    elif kind == "own forward":
        model, settings = Own(), config(tp=2, plan=Own.plan)
        model.blocks[1].up = Tripled(24, 37)
    elif kind == "classes":
        given["labels"] = ids % 3
    elif kind == "hidden states":
        given["output_hidden_states"] = True
    elif kind == "tuple":
        given["return_dict"] = False
    elif kind == "left padding":
        given["attention_mask"] = torch.ones_like(ids).index_fill(1, torch.tensor([0]), 0)
    elif kind == "labels at padding":
        given |= {"labels": ids, "attention_mask": torch.ones_like(ids).index_fill(1, torch.tensor([5, 6]), 0)}
    elif kind == "other batches":
        given["input_ids"] = ids.roll(dist.get_rank(), dims=1)
    elif kind == "both":
        settings = config(recompute={"mode": "full"})
        model.gradient_checkpointing_enable()
    engine, *_ = minizero.initialize(model=model, config=settings)
    engine(**given)


class Tripled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


@pytest.mark.parametrize(
    ("kind", "message"),
    (
        (
            "embedding",
            r"parallel.tp = 2: model.embed_tokens is a GemmaTextScaledWordEmbedding with a forward",
        ),
        ("own forward", r"parallel.tp = 2: blocks.1.up is a Tripled with a forward of its own"),
        ("unlisted", r"the plan does not list blocks.0.norm.weight, which sees a part of the sequence"),
        ("chunks", r"LlamaModel has attention in chunks of 4"),
        ("dynamic", r"LlamaModel has rotary angles that depend on the length"),
        ("classes", r"LlamaForTokenClassification computes its loss from labels in its own way"),
        ("hidden states", r"was given output_hidden_states, which is not available over parts"),
        ("tuple", r"returns a tuple; legal: return_dict=True"),
        ("left padding", r"attention_mask of shape \(8, 7\); legal: .* 0 for padding behind them"),
        ("labels at padding", r"a label at padding counts; legal: -100 there"),
        ("other batches", r"ranks \[1\] were given other batches than the first"),
        ("both", r"has transformers' gradient checkpointing turned on too; legal: one of the two"),
    ),
)
def test_it_is_refused_by_name_on_every_rank(kind, message):
    refused_everywhere(use, 2, message, kind)


# ---- which forward a second pass belongs to ----


class Forgetful(nn.Module):
    """Blocks under torch's own checkpoint, with our dropout inside."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, 24), nn.Linear(24, VOCAB)
        self.blocks = nn.ModuleList(nn.Linear(24, 24) for _ in range(2))
        self.drop = Dropout(0.5)
        self.recomputes = False

    def forward(self, input_ids: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        x = self.embed(input_ids)
        for block in self.blocks:
            run = lambda x, block=block: self.drop(block(x)).tanh()  # noqa: E731
            x = checkpoint(run, x, use_reentrant=False) if self.recomputes else run(x)
        return self.head(x).square().mean()


def two_forwards(recomputes: bool) -> list[float]:
    """Norms of one backward through two forwards, as preference losses have it."""
    torch.manual_seed(0)
    model = Forgetful()
    model.recomputes = recomputes
    engine, *_ = minizero.initialize(model=model.double(), config=config())
    found = []
    for batch in batches(2):
        first, second = engine(batch["input_ids"][:4]), engine(batch["input_ids"][4:, :5])
        engine.backward(first - 0.5 * second.square())
        engine.step()
        found.append(engine.get_global_grad_norm())
    return found


def test_what_torch_computes_again_sees_its_own_forward():
    assert relative_error(run_distributed(two_forwards, 1, True)[0], run_distributed(two_forwards, 1, False)[0]) < 1e-12


def stale_loss() -> None:
    engine, *_ = minizero.initialize(model=Forgetful(), config=config())
    ids = batches(1)[0]["input_ids"]
    old, new = engine(ids), engine(ids)
    engine.backward(new)
    engine.step()
    engine.backward(old)


def test_a_loss_from_before_the_last_step_is_refused():
    refused_everywhere(stale_loss, 1, "a loss computed before the last step")


def masks_of_direct_calls() -> list[float]:
    """The model called without the engine's `__call__`, at three steps that change nothing."""
    torch.manual_seed(0)
    settings = minizero.Config(train={"micro_batch_size": 8}, optimizer={"lr": 0.0})
    engine, *_ = minizero.initialize(model=Forgetful(), config=settings)
    found = []
    for _ in range(3):
        loss = engine.module(batches(1)[0]["input_ids"])
        engine.backward(loss)
        engine.step()
        found.append(float(loss.detach()))
    return found


def test_each_step_has_its_own_masks():
    assert len(set(run_distributed(masks_of_direct_calls, 1)[0])) == 3
