"""One sequence over several ranks: attention, gradients and training are those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_distributed
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_tensor_parallel import BATCH, LENGTH, VOCAB, Foreign, batches, foreign, make, train_plainly
from torch import Tensor, nn
from training import refused_everywhere, relative_error, run_steps

import minizero
from minizero.config.schema import ModelConfig
from minizero.dist.collectives import Communicator
from minizero.dist.dims import ParallelDims
from minizero.dist.ledger import CommLedger
from minizero.dist.mesh import build_mesh
from minizero.models import build
from minizero.models.layers import hidden
from minizero.parallel.context import ContextAxis, HeadPlan, Ring, ring_attention, ulysses_attention
from minizero.utils.losses import loss_of

# ---- attention itself ----


def textbook(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
    """The naive twin: one softmax over a whole matrix."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return scores.masked_fill(hidden(q, documents), float("-inf")).softmax(-1) @ v


def inputs(length: int, heads: int, kv_heads: int, dtype: torch.dtype, packed: bool) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(length)
    shapes = ((2, heads, length, 6), (2, kv_heads, length, 6), (2, kv_heads, length, 6), (2, heads, length, 6))
    q, k, v, grad = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    documents = torch.rand(2, length, generator=generator).lt(0.3).cumsum(1) if packed else None
    return q, k, v, grad, documents


def context_axis(method: str) -> ContextAxis:
    world = dist.get_world_size()
    return ContextAxis(Communicator(build_mesh(ParallelDims(world, cp=world)), "cp", CommLedger()), method)


def sent(ledger: CommLedger) -> int:
    """Bytes that attention put on the wire."""
    return sum(count.wire for key, count in ledger.counts.items() if key[1] in ("shift", "all_to_all"))


def attend(method: str, length: int, heads: int, kv_heads: int, dtype: torch.dtype, packed: bool) -> dict[str, Any]:
    axis = context_axis(method)
    q, k, v, grad, documents = inputs(length, heads, kv_heads, dtype, packed)
    mine = axis.positions(length, axis.comm.rank, q.device)
    leaves = [x[:, :, mine].clone().requires_grad_() for x in (q, k, v)]
    function = ring_attention if method == "ring" else ulysses_attention
    out = function(*leaves, axis.comm, length, 6**-0.5, documents)
    out.backward(grad[:, :, mine])
    return {"positions": mine, "tensors": [out.detach(), *(x.grad for x in leaves)], "sent": sent(axis.comm.ledger)}


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize(
    ("world", "length", "heads", "kv_heads"), ((2, 15, 4, 2), (2, 2, 3, 3), (4, 17, 5, 1), (4, 5, 6, 3), (4, 600, 4, 4))
)
@pytest.mark.parametrize("method", ("ring", "ulysses"))
def test_attention_and_its_gradients_are_the_textbooks(method, world, length, heads, kv_heads, packed):
    q, k, v, grad, documents = inputs(length, heads, kv_heads, torch.float64, packed)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = textbook(*leaves, documents)
    out.backward(grad)
    expected = [out.detach(), *(x.grad for x in leaves)]
    for report in run_distributed(attend, world, method, length, heads, kv_heads, torch.float64, packed):
        for found, whole in zip(report["tensors"], expected, strict=True):
            torch.testing.assert_close(found, whole[:, :, report["positions"]], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("dtype", "bound"), ((torch.float32, 2e-6), (torch.bfloat16, 1.2e-2)))
@pytest.mark.parametrize("method", ("ring", "ulysses"))
def test_attention_in_lower_precision(method, dtype, bound):
    q, k, v, grad, _ = inputs(15, 4, 2, dtype, False)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out = textbook(*leaves, None)
    out.backward(grad.double())
    expected = [out.detach(), *(x.grad for x in leaves)]
    for report in run_distributed(attend, 2, method, 15, 4, 2, dtype, False):
        for found, whole in zip(report["tensors"], expected, strict=True):
            assert found.dtype == dtype
            part = whole[:, :, report["positions"]]
            assert float((found.double() - part).norm() / part.norm()) < bound


@pytest.mark.parametrize("world", (2, 4))
@pytest.mark.parametrize("method", ("ring", "ulysses"))
def test_volume_is_the_closed_form(method, world):
    length, heads, kv_heads, batch, width, element = 16, 4, 4, 2, 6, 8
    part = batch * length // world * width * element
    for report in run_distributed(attend, world, method, length, heads, kv_heads, torch.float64, False):
        if method == "ring":
            forward = 2 * (world - 1) * part * kv_heads
            assert report["sent"] == forward + 2 * forward
        else:
            forward = (world - 1) * part * (2 * heads + 2 * kv_heads) // world
            assert report["sent"] == 2 * forward


# ---- who does what ----


@given(st.integers(1, 8), st.integers(1, 200))
def test_every_position_has_one_holder(size, total):
    ring = Ring(size, total)
    for method in ("ring", "ulysses"):
        axis = ContextAxis(type("Comm", (), {"size": size})(), method)
        held = [axis.positions(total, rank, torch.device("cpu")) for rank in range(size)]
        assert torch.cat(held).sort().values.tolist() == list(range(total))
        assert all(len(of_rank) > 0 for of_rank in held) or total < size
        if method == "ring":
            assert [len(of_rank) for of_rank in held] == [ring.length(rank) for rank in range(size)]


@given(st.integers(1, 8), st.integers(1, 60))
def test_visible_pairs_are_exactly_the_causal_ones(size, total):
    ring, seen = Ring(size, total), torch.zeros(total, total, dtype=torch.int64)
    axis = ContextAxis(type("Comm", (), {"size": size})(), "ring")
    held = [axis.positions(total, rank, torch.device("cpu")) for rank in range(size)]
    for rank in range(size):
        for owner in range(size):
            for queries, keys, diagonal in ring.visible(rank, owner):
                rows, columns = held[rank][queries], held[owner][keys]
                block = torch.ones(len(rows), len(columns), dtype=torch.int64)
                seen[rows[:, None], columns] += block.tril() if diagonal else block
    assert torch.equal(seen, torch.ones(total, total, dtype=torch.int64).tril())


@pytest.mark.parametrize("size", (2, 4, 8))
def test_causal_work_is_balanced(size):
    work = [Ring(size, 4096).work(rank) for rank in range(size)]
    assert max(work) / min(work) < 1.05
    assert sum(work) == 4096 * 4097 / 2


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 4))
@hypothesis_settings(max_examples=200)
def test_each_query_head_meets_its_key_head(size, kv_heads, group):
    heads = kv_heads * group
    if heads < size:
        with pytest.raises(ValueError, match=f"legal: up to {heads}"):
            HeadPlan.of(heads, kv_heads, size)
        return
    plan = HeadPlan.of(heads, kv_heads, size)
    found = [
        (query, plan.keys[rank][0] + local)
        for rank in range(size)
        for query, local in zip(range(*plan.queries[rank]), plan.kv_of_query(rank, group), strict=True)
    ]
    assert found == [(head, head // group) for head in range(heads)]
    assert all(0 <= key < plan.keys[rank][1] for rank in range(size) for key in plan.kv_of_query(rank, group))


def peak_of_attention(method: str, length: int) -> int:
    """Bytes of the largest set of tensors alive during forward and backward, beyond inputs and gradients."""
    from torch.utils._python_dispatch import TorchDispatchMode

    axis = context_axis(method)
    q, k, v, grad, _ = inputs(length, 4, 4, torch.float32, False)
    mine = axis.positions(length, axis.comm.rank, q.device)
    leaves = [x[:, :, mine].clone().requires_grad_() for x in (q, k, v)]
    grad = grad[:, :, mine].clone()
    del q, k, v
    alive: dict[int, Any] = {}
    peak = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal peak
            out = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, Tensor):
                    alive[tensor.untyped_storage()._cdata] = (
                        torch.multiprocessing.reductions.StorageWeakRef(tensor.untyped_storage()),
                        tensor.untyped_storage().nbytes(),
                    )
            for key in [key for key, (ref, _) in alive.items() if ref.expired()]:
                del alive[key]
            peak = max(peak, sum(nbytes for _, nbytes in alive.values()))
            return out

    function = ring_attention if method == "ring" else ulysses_attention
    with Watch():
        function(*leaves, axis.comm, length, 6**-0.5).backward(grad)
    return peak


@pytest.mark.parametrize("method", ("ring", "ulysses"))
def test_peak_memory_of_attention_falls_with_the_ranks(method):
    """Forward and backward over 2048 positions: half the bytes on twice the ranks, or a little less (ring's tiles)."""
    two, four = (max(run_distributed(peak_of_attention, world, method, 2048)) for world in (2, 4))
    assert 0.4 < four / two < 0.52
    assert two < 2048 * 2048 * 4  # one head's (S, S) matrix alone would be more


# ---- whole models ----


def settings(cp: int, context: str, tp: int, stage: int, sequence: bool, accumulation: int, **more: Any) -> Any:
    dp = dist.get_world_size() // cp // tp
    return minizero.Config(
        parallel={"cp": cp, "context": context, "tp": tp, "sequence": sequence, **more.pop("parallel", {})},
        zero={"stage": stage},
        train={
            "micro_batch_size": BATCH // dp // accumulation,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": 0.5,
        },
        optimizer={"lr": 3e-3, "weight_decay": 0.1},
        dist={"timeout": 20.0},
        **more,
    )


class Wrapped(Foreign):
    """A transformers model in a user's module: labels are the tokens that follow."""

    context_inputs = ("input_ids", "labels")


def train(
    name: str, cp: int, context: str, steps: int, dtype: torch.dtype, tp: int = 1, stage: int = 0,
    sequence: bool = False, accumulation: int = 1,
) -> dict[str, Any]:  # fmt: skip
    model = (Wrapped(foreign(name)) if name.startswith("hf_") and seeded() else make(name)).to(dtype)
    target = model.model if isinstance(model, Foreign) else model
    plan = {}
    if tp > 1 and target is not model:
        from minizero.parallelize import plan_of

        plan = {f"model.{key}": style for key, style in plan_of(target).items()}
    config = settings(cp, context, tp, stage, sequence, accumulation, parallel={"plan": plan})
    engine, *_ = minizero.initialize(model=model, config=config)
    losses, norms = run_steps(engine, batches(steps), accumulation)
    return {"losses": losses, "norms": norms, "logits": logits(engine)}


def seeded() -> bool:
    torch.manual_seed(0)
    return True


def logits(engine: Any) -> Tensor | None:
    if isinstance(engine.module, Foreign):
        return None
    with torch.no_grad(), minizero.unsharded(engine.module):
        return engine.module(batches(1)[0]["input_ids"]).clone()


CELLS = [(2, 2, 1, 0, False), (4, 2, 1, 3, False), (4, 4, 1, 1, False), (4, 2, 2, 2, True), (8, 2, 2, 3, True)]


@pytest.mark.parametrize("context", ("ring", "ulysses"))
@pytest.mark.parametrize(("world", "cp", "tp", "stage", "sequence"), CELLS)
@pytest.mark.parametrize("name", ("llama", "gpt2"))
def test_our_models_train_as_one_process(name, world, cp, tp, stage, sequence, context):
    if context == "ulysses" and tp * cp > 4:
        cp = 4 // tp
    losses, norms = train_plainly(name, 2, torch.float64)
    reports = run_distributed(train, world, name, cp, context, 2, torch.float64, tp, stage, sequence)
    for report in reports:
        assert relative_error(report["losses"], losses) < 1e-10
        assert relative_error(report["norms"], norms) < 1e-10
        torch.testing.assert_close(report["logits"], reports[0]["logits"])
        assert report["logits"].shape == (BATCH, LENGTH, VOCAB)


@pytest.mark.parametrize("name", ("hf_llama", "hf_qwen3", "hf_gpt2"))
@pytest.mark.parametrize(("context", "tp"), (("ring", 1), ("ulysses", 1), ("ring", 2)))
def test_unmodified_transformers_models_train_as_one_process(name, context, tp):
    bound = 1e-10 if name == "hf_gpt2" else 2e-6  # transformers' RMSNorm computes in fp32, also in a float64 model
    losses, norms = train_plainly(name, 2, torch.float64)
    for report in run_distributed(train, 4, name, 2, context, 2, torch.float64, tp, 3, False, 2):
        assert relative_error(report["losses"], losses) < bound
        assert relative_error(report["norms"], norms) < bound


# ---- checkpoints ----


def save_then(folder: str, cp: int, again: int) -> tuple[list[float], list[float]]:
    """(losses after the save, losses of a run of `again` context-parallel ranks that resumed there)."""

    def steps(engine: Any, which: slice) -> list[float]:
        size = BATCH // engine.dp_size
        part = slice(engine.dp_rank * size, (engine.dp_rank + 1) * size)
        return [float(engine.train_batch(iter([{k: v[part] for k, v in b.items()}]))) for b in batches(4)[which]]

    straight, resumed = (
        minizero.initialize(model=make("llama").double(), config=settings(size, "ring", 1, 3, False, 1))[0]
        for size in (cp, again)
    )
    steps(straight, slice(0, 2))
    straight.save_checkpoint(folder)
    resumed.load_checkpoint(folder)
    return steps(straight, slice(2, 4)), steps(resumed, slice(2, 4))


@pytest.mark.parametrize(("cp", "again"), ((2, 2), (2, 1), (1, 4)))
def test_a_checkpoint_resumes_with_another_degree_on_as_many_ranks(tmp_path, cp, again):
    for straight, resumed in run_distributed(save_then, 4, str(tmp_path), cp, again):
        assert relative_error(resumed, straight) < 1e-10


def destroyed(name: str) -> tuple[Tensor, Tensor]:
    """Logits of a model before and after it belonged to a context-parallel, checkpointing engine that never stepped."""
    torch.manual_seed(0)
    model = make("llama") if name == "llama" else foreign(name)
    ids = batches(1)[0]["input_ids"]

    def logits_of() -> Tensor:
        with torch.no_grad():
            out = model(input_ids=ids)
        return getattr(out, "logits", out).clone()

    before = logits_of()
    for mode in ("selective", "full"):
        config = settings(2, "ring", 1, 0, False, 1, recompute={"mode": mode})
        engine, *_ = minizero.initialize(model=model, config=config)
        engine.backward(loss_of(engine(input_ids=ids[:4], labels=ids[:4])))
        engine.destroy()
    return before, logits_of()


@pytest.mark.parametrize("name", ("llama", "hf_llama"))
def test_a_destroyed_engine_leaves_an_ordinary_model(name):
    for before, after in run_distributed(destroyed, 2, name):
        torch.testing.assert_close(after, before)


# ---- packed documents, padding, and losses that transformers' models compute ----


def packed_batch(step: int) -> dict[str, Tensor]:
    """Position ids that begin again wherever a document does."""
    batch = batches(step + 1)[step]
    generator = torch.Generator().manual_seed(step)
    begins = torch.rand(BATCH, LENGTH, generator=generator).lt(0.3)
    begins[:, 0] = True
    places = torch.arange(LENGTH).expand(BATCH, LENGTH)
    starts = torch.where(begins, places, 0).cummax(dim=1).values
    return {**batch, "position_ids": places - starts}


def train_packed(name: str, cp: int, context: str) -> list[float]:
    engine, *_ = minizero.initialize(model=make(name).double(), config=settings(cp, context, 1, 0, False, 1))
    found = []
    for step in range(3):
        size = BATCH // engine.dp_size
        part = slice(engine.dp_rank * size, (engine.dp_rank + 1) * size)
        found.append(float(engine.train_batch(iter([{k: v[part] for k, v in packed_batch(step).items()}]))))
    return found


@pytest.mark.parametrize("name", ("llama", "gpt2"))
@pytest.mark.parametrize("context", ("ring", "ulysses"))
def test_packed_documents_do_not_see_each_other(name, context):
    whole = run_distributed(train_packed, 1, name, 1, "ring")[0]
    for found in run_distributed(train_packed, 4, name, 2, context):
        assert relative_error(found, whole) < 1e-10
    model, batch = make(name).double(), packed_batch(0)
    logits_whole = model(batch["input_ids"], position_ids=batch["position_ids"])
    for row, ids in enumerate(batch["position_ids"]):  # each document alone gives the same
        starts = [*(ids == 0).nonzero()[:, 0].tolist(), LENGTH]
        for start, stop in zip(starts[:-1], starts[1:], strict=True):
            alone = model(batch["input_ids"][row : row + 1, start:stop])
            torch.testing.assert_close(alone[0], logits_whole[row, start:stop])


def foreign_losses(name: str, cp: int, context: str, padded: bool) -> tuple[list[float], list[float]]:
    """A transformers model that computes its own mean loss from labels it shifts itself: losses and norms as the engine
    has them; losses as the caller sees them."""
    torch.manual_seed(0)
    engine, *_ = minizero.initialize(model=foreign(name).double(), config=settings(cp, context, 1, 1, False, 1))
    losses, seen = [], []
    for batch in batches(3):
        size = BATCH // engine.dp_size
        ids = batch["input_ids"][engine.dp_rank * size : (engine.dp_rank + 1) * size]
        more = {"attention_mask": torch.ones_like(ids).index_fill(1, torch.tensor([5, 6]), 0)} if padded else {}
        loss = engine(input_ids=ids, labels=ids.masked_fill(more.get("attention_mask", ids) == 0, -100), **more).loss
        seen.append(float(loss.detach()))
        engine.backward(loss)
        engine.step()
        losses += [engine.result.loss, engine.get_global_grad_norm()]
    return losses, seen


@pytest.mark.parametrize("padded", (False, True))
@pytest.mark.parametrize("context", ("ring", "ulysses"))
@pytest.mark.parametrize("name", ("hf_llama", "hf_gpt2"))
def test_a_transformers_models_own_loss_is_the_whole_sequences(name, context, padded):
    whole, whole_seen = run_distributed(foreign_losses, 1, name, 1, "ring", padded)[0]
    reports = run_distributed(foreign_losses, 2, name, 2, context, padded)
    for found, seen in reports:
        assert relative_error(found, whole) < 2e-6 and relative_error(seen, whole_seen) < 2e-6


# ---- bad input ----


def misuse(kind: str) -> None:
    world = dist.get_world_size()
    model: Any = make("llama")
    more: dict[str, Any] = {}
    batch = {key: value[:, : length_of(kind)] for key, value in batches(1)[0].items()}
    if kind == "wrapper":
        model = make("hf_llama")  # says nothing about its inputs
    elif kind == "no attention":
        model = Bare()
    elif kind == "dropout":
        config = ModelConfig(family="gpt2", hidden_size=24, num_heads=4, attention="eager", attention_dropout=0.1)
        model = build(config, VOCAB, LENGTH)
    elif kind == "argument":
        batch["weights"] = torch.ones(BATCH, LENGTH)
        model = Weighted(model)
    elif kind == "short parts":
        more = {"tp": 4, "cp": 2, "sequence": True}
    elif kind == "heads":
        more = {"context": "ulysses"}
    config = minizero.Config(parallel={**{"cp": world}, **more}, train={"micro_batch_size": 1}, dist={"timeout": 20.0})
    engine, *_ = minizero.initialize(model=model, config=config)
    engine(**batch)


def length_of(kind: str) -> int:
    return 3 if kind == "short" else LENGTH


class Bare(nn.Module):
    context_inputs = ("input_ids",)

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)


class Weighted(nn.Module):
    context_inputs = ("input_ids", "labels")

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, labels, weights):
        return self.inner(input_ids, labels)


@pytest.mark.parametrize(
    ("kind", "world", "message"),
    (
        ("short", 4, r"parallel.cp = 4: a sequence of 3 tokens is shorter; legal: at least 4"),
        ("short parts", 8, r"parallel.cp = 2 leaves 3 of 7 tokens to a rank, fewer than parallel.tp = 4 .* at least 8"),
        ("wrapper", 2, r"parallel.cp = 2: Foreign does not say which of its arguments hold the sequence"),
        ("no attention", 2, r"parallel.cp = 2: Bare has no attention that can span ranks"),
        ("dropout", 2, r"transformer.h.0.attn.attend has attention dropout 0.1; ring attention never holds"),
        ("argument", 2, r"cannot tell how to cut the argument 'weights'; those that hold the sequence are input_ids"),
        ("heads", 8, r"parallel.cp = 8 with parallel.context ulysses: 4 heads cannot be shared .* legal: up to 4"),
    ),
)
def test_bad_input_is_one_clear_error_on_every_rank(kind, world, message):
    refused_everywhere(misuse, world, message, kind)
