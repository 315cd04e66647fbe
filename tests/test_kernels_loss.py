"""Cross-entropy from logits, from parts of a vocabulary, and behind a linear layer."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import interpreter
import pytest
import torch
from kernel_checks import (
    Op,
    beyond_int32,
    bits,
    close,
    compiles,
    error,
    every_dtype,
    gradients_are_derivatives,
    oracle,
    parity,
    randn,
    refused_by_name,
    run,
    same_in_any_order,
    sees,
    triton_run,
)
from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
from torch import Tensor
from torch.nn import functional as F

from minizero import kernels
from minizero.kernels import cross_entropy, linear_cross_entropy
from minizero.kernels.cross_entropy import BLOCK, gradient, losses_of, scale_rows_, statistics

linear = sys.modules["minizero.kernels.linear_cross_entropy"]  # the package's attribute of that name is the function

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's, of log(0) and the like

SETTINGS: dict[str, dict[str, float]] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "with a z-loss": {"z_loss": 1e-2},
    "capped": {"softcap": 4.0},
    "all of it": {"label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 7.0},
}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def labels_of(tokens: int, vocabulary: int, ignored: int = 1) -> Tensor:
    labels = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(3))
    if tokens > 2:
        labels[1 : 1 + ignored] = -100
    return labels


def rising(tokens: int, vocabulary: int) -> Tensor:
    """Logits whose highest is among the last."""
    logits = randn(tokens, vocabulary, scale=3.0)
    logits[:, -(-vocabulary * 99 // 100) :] += 12
    return logits


def loss_op(labels: Tensor, **settings: Any) -> Op:
    return lambda x, **o: cross_entropy(x, labels, **settings, **o)


def liger_loss(labels: Tensor, reduction: str = "mean", **settings: float) -> Op:
    z, smoothing, cap = (settings.get(name, 0.0) for name in ("z_loss", "label_smoothing", "softcap"))

    def op(x: Tensor) -> Tensor:
        # its own z-loss takes part in the loss; it writes over the logits
        return LigerCrossEntropyFunction.apply(
            x.clone(), labels, None, -100, z, smoothing, reduction, cap or None, False, False, False
        )[0]

    return op


def textbook(labels: Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float = 0.0) -> Op:
    """Losses per token, from the definition: all probabilities, a mean over the vocabulary."""

    def op(x: Tensor) -> Tensor:
        if softcap:
            x = softcap * torch.tanh(x / softcap)
        log_p = torch.log(torch.exp(x) / torch.exp(x).sum(-1, keepdim=True))
        kept = labels != -100
        wanted = F.one_hot(labels.clamp_min(0), x.shape[-1]).double()
        wanted = (1 - label_smoothing) * wanted + label_smoothing / x.shape[-1]
        losses = -(wanted * log_p).sum(-1) + z_loss * torch.exp(x).sum(-1).log().square()
        return torch.where(kept, losses, 0.0)

    return op


# ---- parity ----


@every_setting
@every_dtype
@pytest.mark.parametrize("shape", [(5, 7), (3, 15), (1, 17), (6, 333), (4, BLOCK + 100)], ids=str)
def test_losses_are_as_exact_as_torchs_and_ligers(settings, dtype, shape):
    labels = labels_of(*shape)
    parity(loss_op(labels, **settings), [rising(*shape)], dtype, rivals=[liger_loss(labels, **settings)])


@every_setting
@every_dtype
def test_a_vocabulary_of_one(settings, dtype):
    """What is left of the loss is the z-loss. Errors are beside 1, the numbers that cancel."""
    labels, logits = labels_of(9, 1), randn(9, 1, scale=3.0)
    exact = run(loss_op(labels, **settings), [logits], dtype, torch.float64, backend="torch")
    found = run(loss_op(labels, **settings), [logits], dtype, dtype, backend="triton")
    for name, value in found.items():
        torch.testing.assert_close(value.double(), exact[name], rtol=8e-3, atol=1e-7, msg=name)


@every_dtype
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("in_place", [False, True])
def test_reductions(dtype, reduction, in_place):
    """Nothing that follows a loss changes its error: a mean, a sum, a weight for every token."""
    labels = labels_of(20, 333, ignored=4)
    whole = loss_op(labels, reduction=reduction, in_place=in_place, **SETTINGS["all of it"])
    parity(lambda x, **o: whole(x.clone(), **o), [randn(20, 333, scale=3.0)], dtype)


@pytest.mark.parametrize("kind", ["expanded", "random"])
def test_a_gradient_per_token(kind):
    labels = labels_of(20, 333)
    parity(loss_op(labels, reduction="none"), [randn(20, 333)], torch.float32, kind)


LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "vocabulary apart": ((333, 6), lambda x: x.t()),
    "a slice of a padded vocabulary": ((6, 400), lambda x: x[:, :333]),
    "all but the last token": ((7, 333), lambda x: x[:-1]),
    "every second token": ((12, 333), lambda x: x[::2]),
    "one row expanded": ((1, 333), lambda x: x.expand(6, 333)),
    "one element expanded": ((6, 1), lambda x: x.expand(6, 333)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_logits_and_labels(layout, dtype):
    shape, view = LAYOUTS[layout]
    labels = labels_of(12, 333)[::2]
    if "one element" in layout:
        dtype = torch.float32  # a sum of equal gradients, all rounded the same way, says nothing
    parity(lambda x, **o: cross_entropy(view(x), labels, z_loss=1e-2, **o), [randn(*shape)], dtype)


@every_dtype
def test_other_labels_to_ignore(dtype):
    labels = torch.tensor([0, 5, 0, 3])
    parity(loss_op(labels, ignore_index=0), [randn(4, 17)], dtype)
    parity(loss_op(labels, ignore_index=5), [randn(4, 17)], dtype)


def test_sixteen_bits_round_once():
    """A mean is in the gradient before it is rounded; so is nothing but one rounding between it and the exact one."""
    labels, logits = labels_of(20, 333), randn(20, 333).bfloat16()
    exact = run(loss_op(labels), [logits], torch.bfloat16, torch.float64, "expanded", backend="torch")["gradient 0"]
    leaf = logits.clone().requires_grad_()
    cross_entropy(leaf, labels, backend="triton").backward()
    assert leaf.grad is not None
    wrong = int((leaf.grad != (exact / 0.75).bfloat16()).sum())
    assert wrong <= 2  # where fp32 sums end next to a tie


# ---- what has no loss, or an odd one ----


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tokens", [0, 3])
def test_nothing_to_predict(tokens, reduction):
    """A mean over no tokens is nan, as torch has it; a sum is 0. No gradient is nan."""
    labels, leaf = torch.full((tokens,), -100), randn(tokens, 17).requires_grad_()
    found = cross_entropy(leaf, labels, reduction=reduction, backend="triton")
    wanted = F.cross_entropy(leaf, labels, reduction=reduction)
    torch.testing.assert_close(found, wanted, equal_nan=True)
    found.sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, torch.zeros(tokens, 17))


@every_dtype
@pytest.mark.parametrize("label", [-1, 17, 1 << 40, -(1 << 40)])
def test_labels_outside_of_the_vocabulary_give_nan_and_nothing_else_does(label, dtype):
    labels, leaf = torch.tensor([3, label, 16]), randn(3, 17).to(dtype).requires_grad_()
    losses = cross_entropy(leaf, labels, reduction="none", backend="triton")
    assert losses.isnan().tolist() == [False, True, False]
    losses.sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.isnan().all(dim=1).tolist() == leaf.grad.isnan().any(dim=1).tolist() == [False, True, False]
    assert cross_entropy(leaf, labels, backend="triton").isnan()
    with pytest.raises(IndexError):
        cross_entropy(leaf, labels, backend="torch")


@every_dtype
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_whose_label_is_ignored_may_hold_anything(dtype, bad):
    logits, labels = randn(3, 333).to(dtype), torch.tensor([5, -100, 7])
    logits[1] = bad
    leaf = logits.requires_grad_()
    loss = cross_entropy(leaf, labels, backend="triton")
    loss.backward()
    assert loss.isfinite()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    assert not leaf.grad[1].any()


@every_dtype
def test_hidden_logits_have_no_part(dtype):
    """-inf, as a padded vocabulary has: a whole block of it first, and some in between."""
    logits = randn(3, BLOCK + 40)
    logits[:, :BLOCK], logits[:, -7:] = -math.inf, -math.inf
    labels = torch.tensor([BLOCK + 3, BLOCK, BLOCK + 32])
    parity(loss_op(labels), [logits], dtype)
    leaf = logits.clone().requires_grad_()
    cross_entropy(leaf, labels, backend="triton").backward()
    assert leaf.grad is not None
    assert not leaf.grad[logits.isinf()].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.1}], ids=["plain", "smoothed"])
def test_what_is_not_finite_stays_in_its_row(bad, settings):
    logits, labels = randn(3, 333), labels_of(3, 333, ignored=0)
    logits[1, 7] = bad
    leaf = logits.requires_grad_()
    losses = cross_entropy(leaf, labels, reduction="none", backend="triton", **settings)
    assert losses.isnan().tolist() == [False, True, False]
    losses.sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.isnan().any(dim=1).tolist() == [False, True, False]


@every_dtype
def test_logits_as_large_as_they_come(dtype):
    """exp never sees more than 0."""
    largest = 3e4 if dtype == torch.float16 else 1e30
    logits = torch.tensor([[largest, -largest, 0.0], [largest, largest, largest], [-largest] * 3])
    parity(loss_op(torch.tensor([0, 1, 2])), [logits], dtype)


# ---- in place ----


def test_in_place_the_logits_are_their_gradient():
    logits, labels = randn(4, 333).bfloat16().requires_grad_() * 1, labels_of(4, 333)
    address = logits.data_ptr()
    (grad,) = torch.autograd.grad(cross_entropy(logits, labels, in_place=True, backend="triton"), logits)
    assert grad.data_ptr() == address
    apart = logits.detach()
    assert torch.equal(bits(grad), bits(apart))
    assert not (grad * 2).requires_grad  # a tensor like any other


def test_in_place_without_a_gradient_writes_nothing():
    logits, labels = randn(4, 333), labels_of(4, 333)
    before = logits.clone()
    cross_entropy(logits, labels, in_place=True, backend="triton")
    assert torch.equal(logits, before)
    assert logits._version == 0


def test_who_else_saved_the_logits_is_told_that_they_are_gone():
    logits, labels = randn(4, 333).requires_grad_() * 1, labels_of(4, 333)
    squares = logits.square().sum()
    loss = cross_entropy(logits, labels, in_place=True, backend="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (squares + loss).backward()


@pytest.mark.parametrize("in_place", [False, True])
def test_backward_runs_once(in_place):
    logits, labels = randn(4, 333).requires_grad_() * 1, labels_of(4, 333)
    loss = cross_entropy(logits, labels, in_place=in_place, backend="triton")
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    weight = randn(333, 8).requires_grad_()
    loss = linear_cross_entropy(randn(4, 8), weight, labels, backend="triton")
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_fp16_backward_runs_again_unless_in_place():
    labels = labels_of(4, 333)
    for in_place in (False, True):
        leaf = randn(4, 333).half().requires_grad_()
        loss = cross_entropy(leaf * 1, labels, in_place=in_place, backend="triton")
        (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        if in_place:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(loss, leaf)
        else:
            assert torch.equal(torch.autograd.grad(loss, leaf)[0], first)


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_where_nobody_wants_gradients_leaves_are_only_read(without, dtype):
    labels, leaf = labels_of(4, 333), randn(4, 333).to(dtype).requires_grad_()
    before = leaf.detach().clone()
    with without():
        loss = cross_entropy(leaf, labels, in_place=True, backend="triton")
    assert torch.equal(leaf.detach(), before)
    assert leaf._version == 0
    torch.testing.assert_close(loss, cross_entropy(leaf, labels, backend="torch").detach())


@every_dtype
def test_rows_that_overlap_are_not_written_over(dtype):
    """Six rows in the memory of one: each has a gradient of its own."""
    labels, row = labels_of(6, 333), randn(1, 333).to(dtype)
    grads = []
    for in_place in (False, True):
        leaf = row.clone().expand(6, 333).detach().requires_grad_()
        loss = cross_entropy(leaf * 1 if not in_place else leaf, labels, in_place=in_place, backend="triton")
        grads.append(torch.autograd.grad(loss, leaf)[0])
        assert torch.equal(leaf.detach(), row.expand(6, 333))
        assert leaf._version == 0
    assert torch.equal(*grads)
    rows = row.expand(6, 333)
    whole = statistics(rows, labels, 0, backend="triton")
    apart, within = (
        gradient(rows, labels, whole, torch.ones(6), 0, 333, (0.0, 0.0, 0.0), in_place=in_place, backend="triton")
        for in_place in (False, True)
    )
    assert torch.equal(apart, within)
    assert torch.equal(rows, row.expand(6, 333))


# ---- fp16 ----

LOSS_SCALE = 65536.0


def scaled(op: Op) -> Op:
    return lambda *x, **o: op(*x, **o) * LOSS_SCALE


def nearly_as_exact_as_eager(op: Op, eager: Op, inputs: list[Tensor], name: str) -> None:
    """Gradients in fp16, of a loss that is scaled, beside those of torch without fusion."""
    fp16 = torch.float16
    exact = run(scaled(eager), inputs, fp16, torch.float64, "expanded")
    theirs = run(scaled(eager), inputs, fp16, fp16, "expanded")
    found = run(scaled(op), inputs, fp16, fp16, "expanded", backend=name)
    for which in (each for each in exact if "gradient" in each):
        ours, bound = error(found[which], exact[which]), error(theirs[which], exact[which])
        assert ours <= 1.5 * bound, f"{which}: {ours:.2e}, torch's {bound:.2e}"


def test_what_is_small_in_a_mean_is_not_lost_in_fp16():
    """Labels that are nearly certain, so that no gradient is large."""
    logits = randn(256, 4096)
    labels = logits.argmax(dim=1)
    logits[torch.arange(256), labels] += 12
    op = loss_op(labels)
    nearly_as_exact_as_eager(op, partial(op, backend="torch"), [logits], "triton")


@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize("chunk", [50, 1 << 20])
def test_what_is_small_in_a_mean_over_tokens_of_a_head_is_not_lost_in_fp16(name, chunk):
    """The label's weight is 0: what reaches x are the small probabilities of all others."""
    labels, x, weight = torch.zeros(128, dtype=torch.int64), randn(128, 32), randn(2048, 32, seed=1, scale=0.1)
    weight[0] = 0.0
    nearly_as_exact_as_eager(linear_op(labels, chunk), unfused(labels), [x, weight], name)


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_in_fp16_a_sum_over_many_tokens_does_not_overflow_before_the_mean_is_taken(name):
    """One label for all tokens, and large activations: the sum is 96 000, and the largest number in fp16 65 504."""
    labels, weight = torch.zeros(128, dtype=torch.int64), torch.zeros(4, 8)
    leaves = [torch.full((128, 8), 1000.0).half(), weight.half().requires_grad_()]
    linear_cross_entropy(*leaves, labels, backend=name).backward()
    assert leaves[1].grad is not None
    torch.testing.assert_close(leaves[1].grad[0].float(), torch.full((8,), -750.0))


def test_rows_whose_factor_is_one_are_not_touched():
    x, factors = randn(4, 333), torch.tensor([1.0, 0.5, 1.0, -2.0])
    wanted = x * factors[:, None]
    with interpreter.traffic() as seen:
        scale_rows_(x, factors)
    assert torch.equal(x, wanted)
    assert seen.read(x) == seen.written(x) == x.nbytes // 2


# ---- references that are not ours ----


@every_setting
def test_the_torch_backend_is_the_textbook(settings):
    labels = labels_of(6, 17)
    oracle(loss_op(labels, reduction="none", **settings), textbook(labels, **settings), [randn(6, 17, scale=2.0)])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_kernels_are_torchs_own_cross_entropy(reduction, smoothing):
    labels, logits = labels_of(20, 333), randn(20, 333)
    settings: dict[str, Any] = {"label_smoothing": smoothing, "reduction": reduction}
    exact = run(lambda x: F.cross_entropy(x, labels, **settings), [logits], torch.float32, torch.float64)
    found = run(loss_op(labels, **settings), [logits], torch.float32, torch.float32, backend="triton")
    for name, value in found.items():
        assert error(value, exact[name]) < 5e-7, name


@every_setting
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_are_derivatives(settings, reduction):
    gradients_are_derivatives(loss_op(labels_of(4, 7), reduction=reduction, **settings), [randn(4, 7)])


# ---- parts of a vocabulary ----


def in_parts(
    module: Any,
    logits: Tensor,
    labels: Tensor,
    widths: list[int],
    in_place: bool = False,
    backend: str = "triton",
    **settings: float,
) -> tuple[Tensor, Tensor]:
    """(losses, gradient of their sum) as ranks with some columns each compute them."""
    smoothing, z, cap = (settings.get(name, 0.0) for name in ("label_smoothing", "z_loss", "softcap"))
    vocabulary, kept = sum(widths), labels != -100
    firsts = [sum(widths[:index]) for index in range(len(widths))]
    parts = [logits[:, first : first + width] for first, width in zip(firsts, widths, strict=True)]
    found = torch.stack(
        [
            module.statistics(part, labels, first, cap, smoothing > 0, backend=backend)
            for part, first in zip(parts, firsts, strict=True)
        ]
    )
    highest = found[:, 0].amax(dim=0)
    total = (found[:, 1] * (found[:, 0] - highest).exp()).sum(dim=0)
    whole = torch.stack([highest, total, *found[:, 2:].sum(dim=0)])
    losses = torch.where(kept, module.losses_of(whole, labels, vocabulary, smoothing, z), 0.0)
    options = dict(in_place=in_place, backend=backend)
    grads = [
        module.gradient(part, labels, whole, kept.to(whole.dtype), first, vocabulary, (smoothing, z, cap), **options)
        for part, first in zip(parts, firsts, strict=True)
    ]
    return losses, torch.cat(grads, dim=1)


def whole_is_its_parts(module: Any, dtype: torch.dtype, widths: list[int], settings: dict[str, float]) -> None:
    vocabulary = sum(widths)
    labels = torch.tensor([0, -100, widths[0] - 1, widths[0], vocabulary - 1])
    logits = randn(5, vocabulary, scale=3.0)
    op = loss_op(labels, reduction="none", **settings)
    exact = run(op, [logits], dtype, torch.float64, "expanded", backend="torch")
    found = run(op, [logits], dtype, dtype, "expanded", backend="triton")
    for name in ("triton", "torch"):
        losses, grad = in_parts(module, logits.to(dtype), labels, widths, backend=name, **settings)
        close(losses, exact["output 0"], found["output 0"], "losses")
        # by 1, where the others were multiplied by 0.75, which 16 bits would round
        close(grad, exact["gradient 0"] / 0.75, (exact["gradient 0"] / 0.75).to(dtype), "gradient")


@every_setting
@every_dtype
@pytest.mark.parametrize("widths", [[100, 17, 216], [1, 332], [BLOCK + 1, 7]], ids=str)
def test_parts_of_a_vocabulary_make_the_whole(settings, dtype, widths):
    whole_is_its_parts(Parts, dtype, widths, settings)


class Parts:
    """The two halves as they are."""

    statistics, losses_of, gradient = staticmethod(statistics), staticmethod(losses_of), staticmethod(gradient)


@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.1}], ids=["plain", "smoothed"])
def test_parts_of_huge_logits_do_not_cancel(name, settings):
    """lse - target, both 3e4, would be off by a thousandth; by differences to the highest nothing is lost."""
    labels, logits = torch.tensor([3, 40]), 3e4 + randn(2, 50)
    losses, _ = in_parts(Parts, logits, labels, [20, 30], backend=name, **settings)
    exact = F.cross_entropy(logits.double(), labels, reduction="none", **settings)
    assert error(losses, exact) < 1e-6 if not settings else error(losses, exact) < 2e-5  # of sums of 50 times 3e4


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_a_label_outside_of_the_vocabulary_is_nan(name):
    losses, _ = in_parts(Parts, randn(3, 50), torch.tensor([3, 50, -1]), [20, 30], backend=name)
    assert losses.isnan().tolist() == [False, True, True]


def test_parts_in_place_and_parts_that_nobody_may_choose():
    """A padded rank's columns are all -inf: it takes part, and changes nothing."""
    labels, logits = labels_of(5, 64), randn(5, 64)
    losses, grad = in_parts(Parts, logits.clone(), labels, [64])
    padded = torch.cat((logits, torch.full((5, 16), -math.inf)), dim=1)
    again = padded.clone()
    parts = in_parts(Parts, again, labels, [48, 16, 16], in_place=True)
    assert error(parts[0], losses) < 1e-6
    assert error(parts[1][:, :64], grad) < 1e-6
    assert not parts[1][:, 64:].any()
    assert torch.equal(again, parts[1])  # in the memory of the logits, though each part is a view of them


@pytest.mark.parametrize("sums", [True, False])
def test_sums_are_computed_where_they_are_wanted(sums):
    logits, labels = randn(5, 333), labels_of(5, 333)
    found = statistics(logits, labels, 0, 0.0, sums, backend="triton")
    assert error(found[0], logits.max(dim=1).values) == 0
    assert error(found[1], (logits - found[0][:, None]).double().exp().sum(dim=1)) < 1e-6
    assert error(found[3], logits.double().sum(dim=1) if sums else torch.zeros(5)) < 1e-6


def test_no_tokens_have_statistics_and_gradients_too():
    empty = torch.empty(0, 7)
    labels = torch.empty(0, dtype=torch.int64)
    nothing = torch.empty(0)
    for name in ("triton", "torch"):
        whole = statistics(empty, labels, 0, backend=name)
        assert whole.shape == (4, 0)
        assert losses_of(whole, labels, 7, 0.1, 0.1).shape == (0,)
        assert gradient(empty, labels, whole, nothing, 0, 7, (0.0, 0.0, 0.0), backend=name).shape == (0, 7)
    assert scale_rows_(empty, nothing).shape == (0, 7)


# ---- behind a linear layer ----

H, V = 24, 333


def linear_inputs(tokens: int = 20, vocabulary: int = V) -> list[Tensor]:
    return [randn(tokens, H), randn(vocabulary, H, seed=1, scale=0.3)]


def linear_op(labels: Tensor, chunk: int = 1 << 20, module: Any = kernels, **settings: Any) -> Op:
    """`chunk` tokens at a time, in any dtype."""

    def op(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
        workspace = chunk * len(weight) * x.element_size()
        return module.linear_cross_entropy(x, weight, labels, workspace=workspace, **settings, **options)

    return op


def unfused(labels: Tensor, **settings: Any) -> Op:
    def op(x: Tensor, weight: Tensor) -> Tensor:
        logits = x @ weight.t()
        return F.cross_entropy(logits.float() if logits.element_size() == 2 else logits, labels, **settings)

    return op


def liger_linear(labels: Tensor, reduction: str = "mean", **settings: float) -> Op:
    z, smoothing, cap = (settings.get(name, 0.0) for name in ("z_loss", "label_smoothing", "softcap"))
    return lambda x, weight: LigerFusedLinearCrossEntropyFunction.apply(
        x, weight, labels, None, None, -100, z, smoothing, reduction, cap or None
    )[0]


@every_setting
@every_dtype
@pytest.mark.parametrize("chunk", [4, 1 << 20])
def test_a_head_and_its_loss_are_as_exact_as_torchs_and_ligers(settings, dtype, chunk):
    labels = labels_of(6, V)
    op = linear_op(labels, chunk, **settings)
    rivals = [liger_linear(labels, **settings)]
    if set(settings) <= {"label_smoothing"}:
        rivals.append(unfused(labels, **settings))
    parity(op, linear_inputs(6), dtype, rivals=rivals)


@pytest.mark.parametrize("chunk", [1, 3, 20])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_size_of_a_chunk_changes_nothing(chunk, reduction):
    labels = labels_of(20, V)
    oracle(linear_op(labels, chunk, reduction=reduction), unfused(labels, reduction=reduction), linear_inputs())
    exact = run(unfused(labels, reduction=reduction), linear_inputs(), torch.float32, torch.float64)
    op = linear_op(labels, chunk, reduction=reduction)
    for name, value in run(op, linear_inputs(), torch.float32, torch.float32, backend="triton").items():
        assert error(value, exact[name]) < 1e-6, name


def test_a_chunk_is_as_large_as_the_workspace_allows():
    """130 tokens are cut to 128, whole tiles of a product."""
    labels = labels_of(260, 17)
    x, weight = randn(260, H), randn(17, H, seed=1)
    for tokens, chunks in ((130, 3), (1000, 1)):
        with interpreter.launches() as counts:
            linear_op(labels, tokens)(x, weight, backend="triton")
        assert counts == {"cross_entropy._whole": chunks}


def adds_up_in_fp32(module: Any) -> None:
    """Thirty chunks leave the weight's gradient as exact as one does: what they add is not rounded to 16 bits."""
    labels, given = labels_of(60, 17), linear_inputs(60, 17)
    exact = run(unfused(labels), given, torch.bfloat16, torch.float64)["gradient 1"]
    found = [run(linear_op(labels, chunk, module), given, *[torch.bfloat16] * 2, backend="torch") for chunk in (60, 2)]
    one, many = (error(results["gradient 1"], exact) for results in found)
    assert many <= 1.5 * one, (many, one)


def test_chunks_add_up_in_fp32():
    adds_up_in_fp32(kernels)


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("name", ["triton", "torch"])
def test_only_the_gradients_that_are_wanted(wanted, name):
    labels = labels_of(20, V)
    whole = run(linear_op(labels, 7), linear_inputs(), torch.float32, torch.float32, "expanded", backend=name)
    leaves = [x.requires_grad_(want) for x, want in zip(linear_inputs(), wanted, strict=True)]
    loss = linear_op(labels, 7)(*leaves, backend=name)
    assert torch.equal(loss.detach(), whole["output 0"])
    assert loss.requires_grad == any(wanted)
    if any(wanted):
        (loss * 0.75).backward()
    for number, (leaf, want) in enumerate(zip(leaves, wanted, strict=True)):
        assert (leaf.grad is not None) == want
        assert leaf.grad is None or torch.equal(leaf.grad, whole[f"gradient {number}"])


def products(op: Callable[[], Any]) -> list[tuple[int, ...]]:
    """Shapes of the matrix products that `op` makes."""
    found = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if "mm" in str(function) or "matmul" in str(function):
                found.append(tuple(result.shape))
            return result

    with Watch():
        op()
    return found


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["triton", "torch"])
def test_where_nobody_wants_gradients_logits_are_the_only_product(without, name):
    op, leaves = linear_op(labels_of(20, V), 20), [x.requires_grad_() for x in linear_inputs()]
    assert len(products(lambda: op(*leaves, backend=name))) == 3
    with without():
        assert products(lambda: op(*leaves, backend=name)) == [(20, V)]


def test_what_a_chunk_adds_to_the_weight_is_computed_a_few_rows_at_a_time(monkeypatch):
    """Else it would be as large as the weight, in fp32; besides, nothing is rounded on the way."""
    labels, given = labels_of(20, V), [x.bfloat16() for x in linear_inputs()]
    op = linear_op(labels, 7)
    found = []
    for rows in (linear.ROWS, 100):
        monkeypatch.setattr(linear, "ROWS", rows)
        leaves = [given[0], given[1].clone().requires_grad_()]
        shapes = products(lambda leaves=leaves: op(*leaves, backend="triton").backward())
        found.append(leaves[1].grad)
    assert torch.equal(*found)
    assert {shape for shape in shapes if shape[1] == H} == {(100, H), (33, H)}


AUTOCAST = pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=str)


@AUTOCAST
@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_autocast_casts_a_head_as_it_casts_a_product(name, chunk, dtypes):
    """Gradients are those of casts, in the dtypes of what was cast."""
    op = linear_op(labels_of(20, V), chunk)
    wanted = run(op, linear_inputs(), torch.bfloat16, torch.bfloat16, "expanded", backend=name)
    leaves = [x.bfloat16().to(dtype).requires_grad_() for x, dtype in zip(linear_inputs(), dtypes, strict=True)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = kernels.linear_cross_entropy(*leaves, labels_of(20, V), workspace=chunk * V * 2, backend=name)
        loss = loss * 0.75
    loss.backward()
    assert torch.equal(loss.detach(), 0.75 * wanted["output 0"])
    for number, leaf in enumerate(leaves):
        assert leaf.grad is not None
        assert leaf.grad.dtype == dtypes[number]
        assert torch.equal(leaf.grad.bfloat16(), wanted[f"gradient {number}"])


@pytest.mark.parametrize("name", ["triton", "torch"])
@every_dtype
def test_labels_outside_of_a_heads_vocabulary_give_nan(name, dtype):
    labels = torch.tensor([3, V, -100, -1])
    leaves = [x.to(dtype).requires_grad_() for x in linear_inputs(4)]
    loss = linear_cross_entropy(*leaves, labels, backend=name)
    loss.backward()
    assert loss.isnan()
    assert leaves[0].grad is not None
    assert leaves[0].grad.isnan().all(dim=1).tolist() == [False, True, False, True]
    assert leaves[0].grad.isnan().any(dim=1).tolist() == [False, True, False, True]


@every_dtype
def test_layouts_of_a_head(dtype):
    labels = labels_of(20, V)
    op = linear_op(labels, 7)
    parity(lambda x, w, **o: op(x.t(), w.t(), **o), [randn(H, 20), randn(H, V, seed=1)], dtype)
    parity(lambda x, w, **o: op(x[::2], w[:, 5 : 5 + H], **o), [randn(40, H), randn(V, 40, seed=1)], dtype)


@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize("tokens", [0, 3])
def test_a_head_with_nothing_to_predict(name, tokens):
    labels = torch.full((tokens,), -100)
    leaves = [x.requires_grad_() for x in linear_inputs(tokens)]
    loss = linear_cross_entropy(*leaves, labels, backend=name)
    assert loss.isnan()
    loss.backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert leaf.grad.shape == leaf.shape
    total = linear_cross_entropy(*linear_inputs(tokens), labels, reduction="sum", backend=name)
    assert total == 0


@every_setting
def test_gradients_of_a_head_are_derivatives(settings):
    op = linear_op(labels_of(5, 7), 2, **settings)
    gradients_are_derivatives(op, [randn(5, 3), randn(7, 3, seed=1)])


def test_a_factor_behind_the_loss_is_not_rounded():
    """A loss that is scaled by 0.7 has 0.7 times the gradients: not 0.69922, which is 0.7 in bf16."""
    op, whole = linear_op(labels_of(20, V), 7), [x.bfloat16().requires_grad_() for x in linear_inputs()]
    plain = torch.autograd.grad(op(*whole, backend="triton"), whole)
    scaled = torch.autograd.grad(op(*whole, backend="triton") * 0.7, whole)
    for one, other in zip(plain, scaled, strict=True):
        one, other = one.double().flatten(), other.double().flatten()
        assert float(one @ other / (one @ one)) == pytest.approx(0.7, rel=3e-4)


# ---- bytes ----


@pytest.mark.parametrize("columns", [333, 2 * BLOCK + 100])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_logit_is_read_twice_and_its_gradient_written_once(columns, in_place):
    """The second time from cache, where the row still is; besides, every row's label has its logit read."""
    labels = labels_of(5, columns)
    logits = randn(5, columns).bfloat16().requires_grad_() * 1
    kept = int((labels != -100).sum())
    row = columns * 2
    with interpreter.traffic() as forward:
        loss = cross_entropy(logits, labels, in_place=in_place, backend="triton")
    with interpreter.traffic() as backward:
        (grad,) = torch.autograd.grad(loss, logits)
    assert forward.read(logits) == kept * (2 * row + 2)
    assert forward.written(grad) == 5 * row  # zeros where the label is ignored
    assert forward.written(logits) == (5 * row if in_place else 0)
    assert backward.read(grad) == backward.written(grad) == 0  # the loss is the last op: its gradient is 1


def test_without_a_gradient_a_logit_is_read_once():
    logits, labels = randn(5, BLOCK + 100).bfloat16(), labels_of(5, BLOCK + 100)
    with interpreter.traffic() as seen:
        cross_entropy(logits, labels, backend="triton")
    assert seen.read(logits) == 4 * (logits.shape[1] * 2 + 2)
    assert seen.written(logits) == 0


def test_parts_are_read_once_for_statistics_and_once_for_the_gradient():
    logits, labels = randn(5, 333).bfloat16(), labels_of(5, 333, ignored=0)
    with interpreter.traffic() as seen:
        found = statistics(logits, labels, 0, backend="triton")
    assert seen.read(logits) == logits.nbytes + 5 * 2
    assert seen.written(found) == found.nbytes
    with interpreter.traffic() as seen:
        gradient(logits, labels, found, torch.ones(5), 0, 333, (0.0, 0.0, 0.0), in_place=True, backend="triton")
    assert seen.read(logits) == seen.written(logits) == logits.nbytes


def test_a_head_writes_no_more_logits_than_its_workspace():
    """The largest that is allocated besides the gradients is a chunk of logits."""
    labels, largest = labels_of(60, V), 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.shape[-1:] == (V,):
                largest = max(largest, result.numel())
            return result

    leaves = [x.requires_grad_() for x in linear_inputs(60)]
    with Watch():
        linear_op(labels, 25)(*leaves, backend="triton").backward()
    assert largest == 25 * V


# ---- order ----


@pytest.mark.parametrize("name", ["plain", "all of it"])
def test_the_order_of_programs_does_not_matter(name):
    labels, settings = labels_of(7, V), SETTINGS[name]
    same_in_any_order(triton_run(loss_op(labels, **settings), [randn(7, V)]))
    same_in_any_order(triton_run(linear_op(labels, 4, **settings), linear_inputs(7)))
    same_in_any_order(lambda: in_parts(Parts, randn(7, V), labels, [100, 233], **settings))


# ---- huge tensors ----

GOOD = """
from minizero.kernels.cross_entropy import cross_entropy, gradient, scale_rows_, statistics
labels = torch.tensor([5, 99, 0])
ones = torch.ones(3)

def whole(module, x, in_place=False):
    x = x.detach().requires_grad_()
    loss = module.cross_entropy(x, labels, in_place=in_place, backend="triton")
    return loss, torch.autograd.grad(loss, x)[0].clone()

def parts(module, x):
    found = module.statistics(x, labels, 0, backend="triton")
    options = dict(in_place=True, backend="triton")
    return found, module.gradient(x, labels, found, ones, 0, 100, (0.0, 0.0, 0.0), **options).clone()

import minizero.kernels.cross_entropy
ours = sys.modules["minizero.kernels.cross_entropy"]
rows, near = far(100)
same(whole(ours, rows), whole(ours, near))
same(parts(ours, rows), parts(ours, near))
rows, near = far(100, seed=1)
same(whole(ours, rows, True), whole(ours, near, True))
same([scale_rows_(rows, 2 * ones)], [scale_rows_(near, 2 * ones)])
rows, near = far(100, seed=2)
"""

BROKEN = [
    "same(whole(broken, rows), whole(ours, near))",
    "same(*([module.statistics(x, labels, 0, backend='triton')] for module, x in ((broken, rows), (ours, near))))",
    "same([broken.scale_rows_(rows, 2 * ones)], [ours.scale_rows_(near, 2 * ones)])",
]


def test_offsets_beyond_int32(tmp_path):
    """20 thousand tokens of a vocabulary of 128 thousand are more. The same kernels with int32 offsets die of it."""
    plant = 'broken = planted(folder, "cross_entropy", (".to(tl.int64)", ""))'
    beyond_int32(tmp_path, GOOD, [f"{plant}\n{call}" for call in BROKEN])


# ---- refusals ----

X, Y = torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)
HEAD = torch.zeros(3, 2), torch.zeros(5, 2)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "logits of three dims": (lambda: cross_entropy(X[None], Y), r"cross_entropy: logits are \(1, 3, 5\), labels \(3,"),
    "too few labels": (lambda: cross_entropy(X, Y[:2]), r"logits are \(3, 5\), labels \(2,\)"),
    "no vocabulary": (lambda: cross_entropy(X[:, :0], Y), r"logits are \(3, 0\)"),
    "labels of 32 bits": (lambda: cross_entropy(X, Y.int()), "labels are torch.int32; legal: torch.int64"),
    "too much smoothing": (lambda: cross_entropy(X, Y, label_smoothing=1.1), "label_smoothing = 1.1"),
    "negative smoothing": (lambda: cross_entropy(X, Y, label_smoothing=-0.1), "label_smoothing = -0.1"),
    "a negative cap": (lambda: cross_entropy(X, Y, softcap=-1.0), "softcap = -1.0; legal: 0 to 1, and 0"),
    "an unknown reduction": (lambda: cross_entropy(X, Y, reduction="max"), "reduction 'max' does not exist"),
    "a head of another width": (lambda: linear_cross_entropy(HEAD[0], X, Y), r"linear_cross_entropy: x is \(3, 2\)"),
    "a head of another dtype": (lambda: linear_cross_entropy(HEAD[0], HEAD[1].bfloat16(), Y), "of one dtype"),
    "a head for batches": (lambda: linear_cross_entropy(HEAD[0][None], HEAD[1], Y), r"x is \(1, 3, 2\)"),
    "a reduction without a sum": (lambda: linear_cross_entropy(*HEAD, Y, reduction="none"), "'none'; legal: mean, sum"),
    "no workspace": (lambda: linear_cross_entropy(*HEAD, Y, workspace=0), "workspace = 0 bytes; legal: more than 0"),
    "labels of a head": (lambda: linear_cross_entropy(*HEAD, Y[:1]), "linear_cross_entropy: logits are"),
    "a head's smoothing": (
        lambda: linear_cross_entropy(*HEAD, Y, label_smoothing=2.0),
        "linear_cross_entropy: label_s",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused(what):
    call, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        call()


OPS: dict[str, Callable[..., Any]] = {
    "cross_entropy": lambda t, o: cross_entropy(t(X), Y, **o),
    "linear_cross_entropy": lambda t, o: linear_cross_entropy(t(HEAD[0]), t(HEAD[1]), Y, **o),
}


@pytest.mark.parametrize("name", OPS)
def test_what_triton_cannot_run_is_refused_by_name(name, monkeypatch):
    refused_by_name(name, OPS[name], monkeypatch)


# ---- torch.compile ----


@every_setting
def test_torch_compile_traces_the_torch_backend(settings):
    compiles(loss_op(labels_of(4, 17), **settings), [randn(4, 17)])


def test_torch_compile_traces_a_head():
    compiles(linear_op(labels_of(20, V), 7), linear_inputs())


# ---- defects ----


def ragged(module: ModuleType) -> None:
    """All settings, rows that end within a block, two blocks."""
    for settings in SETTINGS.values():
        labels = labels_of(3, BLOCK + 100)
        parity(partial(module.cross_entropy, labels_T=labels, **settings), [rising(3, BLOCK + 100)], torch.float32)


def parts(module: ModuleType) -> None:
    whole_is_its_parts(module, torch.float32, [100, 17, 216], SETTINGS["all of it"])


def head(module: ModuleType) -> None:
    labels = labels_of(20, V)
    op = linear_op(labels, 7, module)
    oracle(op, unfused(labels), linear_inputs())
    parity(op, linear_inputs(), torch.float32, rivals=[unfused(labels)])


DEFECTS: dict[str, tuple[str, tuple[str, str], Callable[[ModuleType], None]]] = {
    "no z-loss in the gradient": (
        "cross_entropy", ("weight = (1.0 + 2.0 * z * (highest + tl.log(total))) / total", "weight = 1.0 / total"),
        ragged,
    ),
    "no slope of the cap": ("cross_entropy", ("* slope * factor", "* factor"), ragged),
    "what is beyond the last column is not hidden once it is capped": (
        "cross_entropy", ('        x = tl.where(column < columns, x, float("-inf"))\n', ""), ragged
    ),
    "a later block forgets the earlier ones' highest": (
        "cross_entropy", ("total * tl.exp(before - highest)", "total"), ragged
    ),
    "smoothing over all of the tokens but the label's": (
        "cross_entropy", ("- smoothing / vocabulary", "- smoothing / (vocabulary - 1)"), ragged
    ),
    "labels count from the first column here": (
        "cross_entropy", ("label = tl.load(labels_ptr + row) - first", "label = tl.load(labels_ptr + row)"), parts
    ),
    "a part's columns are taken for the vocabulary": (
        "cross_entropy", ("- smoothing / vocabulary", "- smoothing / columns"), parts
    ),
    "the last chunk's gradient of the weight wins": (
        "linear_cross_entropy", ("total.addmm_(a, b)", "torch.mm(a, b, out=total)"), head
    ),
    "chunks add up in 16 bits": (
        "linear_cross_entropy", ("wide if late or several else None", "None"), adds_up_in_fp32
    ),
    "every chunk takes its own mean": (
        "linear_cross_entropy", ("labels_C, scale, ignore_index, settings, g_CV", "labels_C, scale * 3, ignore_index, "
                                 "settings, g_CV"), head
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DEFECTS)
def test_a_planted_defect_is_seen(what, tmp_path):
    sees(tmp_path, *DEFECTS[what])
