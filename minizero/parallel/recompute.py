"""Checkpointed blocks: keep a block's inputs, compute it again in backward (Chen et al., arXiv 1604.06174).

A block runs without recording a graph. One autograd node stands for it, with the block's inputs *and the parameters it
used* as its own inputs: so who reads the outer graph (ZeRO does, to know which gradients will come) sees everything,
and gradients of parameters arrive as from any other node. Its backward computes the block again, with the graph, and
asks autograd for the gradients. That second pass repeats the first exactly: it gets back the random state, the autocast
state and the facts of its own forward (`utils.forward`), and tensors that were changed since are an error.

What is kept between the passes may be made smaller still:

    partition    activations that all tensor-parallel ranks hold alike: each keeps 1/tp of every one, and backward
                 gathers it (Rajbhandari et al., arXiv 1910.02054, section 6.1)
    cpu          kept tensors are copied to pinned host memory on a side stream, and back in backward

Glossary:
    inputs    the tensors in a block's arguments
    captured  tensors that need a gradient and reach the block another way: its parameters, what a closure holds
    kept      what is held between the passes: inputs, or their slices, or copies on the host
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from minizero.dist.collectives import Communicator
from minizero.dist.sharding import split_sizes
from minizero.parallel.last_product import second_pass
from minizero.utils.forward import Forward, forward_of, running
from minizero.utils.operands import operands


class RecomputeError(RuntimeError):
    """A block's second pass is not the first one again."""


@dataclass(frozen=True)
class Options:
    """How blocks are checkpointed.

    Attributes:
        partition: keep 1/tp of each activation. comm: the tensor-parallel axis, for that.
        cpu: keep tensors in host memory. A CPU run has them there already.
        check: compare the second pass with the first, bit for bit, and refuse random numbers from generators that are
            not given back (debug).
    """

    partition: bool = False
    comm: Communicator | None = None
    cpu: bool = False
    check: bool = False


@dataclass
class Slot:
    """Where the tensor number `index` goes in a block's arguments."""

    index: int


@dataclass
class Call:
    """One call of a block, as its backward will repeat it.

    Attributes:
        function, arguments, spec: what is called, and with what; tensors are slots.
        captured: see the module's glossary.
        state: what the second pass gets back.
        shapes: of the first pass's tensors, with dtypes. values: copies of them, where they are compared.
        left: calls of the first pass whose results someone holds besides the outputs.
    """

    function: Callable[..., Any]
    arguments: list[Any]
    spec: Any
    captured: list[Tensor]
    state: PassState
    options: Options
    shapes: list[tuple[torch.Size, torch.dtype]]
    values: list[Tensor]
    left: list[int]

    def again(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of the second pass, with their graph."""
        filled = [inputs[leaf.index] if isinstance(leaf, Slot) else leaf for leaf in self.arguments]
        args, kwargs = tree_unflatten(filled, self.spec)

        def run() -> list[Tensor]:
            with self.state.restored(), torch.enable_grad():
                return [leaf for leaf in tree_leaves(self.function(*args, **kwargs)) if isinstance(leaf, Tensor)]

        module = module_of(self.function)
        watch = SecondPass(self.left)
        with buffers_put_back(module), watch if self.left else nullcontext():
            outputs = second_pass(None if self.options.check or self.left else module, run)
        self._compare(outputs)
        refuse_what_is_left_behind(self.function, watch.differentiable)
        return outputs

    def _compare(self, outputs: list[Tensor]) -> None:
        name, found = name_of(self.function), [(out.shape, out.dtype) for out in outputs]
        if found != self.shapes:
            raise RecomputeError(
                f"{name} was computed again for backward and gave {describe(found)}, the first time "
                f"{describe(self.shapes)}: a checkpointed block must depend on its arguments and parameters alone"
            )
        for number, (first, second) in enumerate(zip(self.values, outputs, strict=False)):
            if not torch.equal(first, second):
                worst = float((first.double() - second.double()).abs().max())
                raise RecomputeError(
                    f"{name} was computed again for backward and its output {number} differs, by up to {worst:.3g}: a "
                    "checkpointed block must depend on its arguments and parameters alone"
                )


class _Checkpointed(Function):
    """The node of one call. Inputs: what is kept, then what was captured; outputs: those of the first pass."""

    @staticmethod
    def forward(ctx: Any, call: Call, keeper: Keeper, outputs: list[Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = tensors[: len(tensors) - len(call.captured)]
        ctx.call, ctx.keeper = call, keeper
        ctx.needs = [tensor.requires_grad for tensor in inputs]
        ctx.save_for_backward(*keeper.keep(inputs))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(out for out in outputs if not differentiable(out)))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        call: Call = ctx.call
        kept = ctx.keeper.give_back(ctx.saved_tensors)
        inputs = [tensor.detach().requires_grad_(needs) for tensor, needs in zip(kept, ctx.needs, strict=True)]
        outputs = call.again(inputs)
        reached = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
        reached = [(out, grad) for out, grad in reached if out.requires_grad]
        wanted = [tensor for tensor in inputs if tensor.requires_grad] + call.captured
        found: Iterator[Tensor | None] = iter(())
        if reached and wanted:
            outs, out_grads = zip(*reached, strict=True)
            found = iter(torch.autograd.grad(outs, wanted, out_grads, allow_unused=True))
        of_inputs = [next(found, None) if tensor.requires_grad else None for tensor in inputs]
        return None, None, None, *of_inputs, *(next(found, None) for _ in call.captured)


def checkpoint_block(function: Callable[..., Any], *args: Any, options: Options | None = None, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, of which only the tensors in the arguments are kept; backward computes it again.

    Args:
        function: a module or any callable; it may capture parameters and other tensors.
        args, kwargs: nested in lists, tuples and dicts as they like; what is not a tensor is passed on as it is.
        options: how; None: as the settings of the running forward's engine say, or those of `configure`.

    Returns what `function` returns. Without gradients to compute it just calls it. May be nested.

    Raises ValueError when the function changes an argument in place, returns what cannot be looked into, or draws
    random numbers that the second pass could not repeat (where that is checked); RecomputeError, in backward, when the
    second pass differs from the first, or the first left tensors behind that need a gradient.
    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    options = options or current_options()
    leaves, spec = tree_flatten((args, kwargs))
    inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    counter = iter(range(len(inputs)))
    arguments = [Slot(next(counter)) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    state, versions = PassState.now(inputs), [tensor._version for tensor in inputs]
    watch = FirstPass(inputs)
    with torch.no_grad(), generators_watched(function) if options.check else nullcontext(), watch:
        result = function(*args, **kwargs)
    changed = [n for n, (t, version) in enumerate(zip(inputs, versions, strict=True)) if t._version != version]
    if changed:
        raise ValueError(f"{name_of(function)} changes its argument {changed[0]} in place and cannot be checkpointed")
    module = module_of(function)
    own = [p for p in module.parameters() if p.requires_grad] if module is not None else []
    captured = [*dict.fromkeys([*own, *watch.captured])]
    results, result_spec = tree_flatten(result)
    outputs = [leaf for leaf in results if isinstance(leaf, Tensor)]
    if not captured and not any(tensor.requires_grad for tensor in inputs):
        return result
    refuse_opaque(function, results)
    call = Call(
        function, arguments, spec, captured, state, options, [(out.shape, out.dtype) for out in outputs],
        [out.clone() for out in outputs] if options.check else [],
        watch.left_behind([*inputs, *outputs, *captured, *buffers_of(module)]),
    )  # fmt: skip
    attached = iter(_Checkpointed.apply(call, Keeper(options, name_of(function)), outputs, *inputs, *captured))
    return tree_unflatten([next(attached) if isinstance(leaf, Tensor) else leaf for leaf in results], result_spec)


# ---- what a block reads and leaves on the side ----


class FirstPass(TorchFunctionMode):
    """Watches a first pass, in which no graph is recorded.

    Attributes:
        captured: every tensor that needs a gradient and is not an input: it came from outside.
        made: (name of the function, its result) of each call, in order; weak, so that what is alive afterwards is held
            by someone.
    """

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self._inputs = {id(tensor) for tensor in inputs}
        self.captured: dict[Tensor, None] = {}
        self.made: list[tuple[str, ref[Tensor]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in operands((*args, *(kwargs or {}).values())):
            if tensor.requires_grad and id(tensor) not in self._inputs:
                self.captured[tensor] = None
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            self.made.append((getattr(func, "__name__", "a function"), ref(result)))
        return result

    def left_behind(self, known: Sequence[Tensor]) -> list[int]:
        """Numbers of calls whose results someone still holds, other than in the memory of `known` tensors."""
        with torch._C.DisableTorchFunction():  # looking at a tensor is no use of it
            storages = {tensor.untyped_storage()._cdata for tensor in known}
            alive = [(number, result()) for number, (_, result) in enumerate(self.made)]
            return [
                number
                for number, tensor in alive
                if tensor is not None and tensor.untyped_storage()._cdata not in storages
            ]


class SecondPass(TorchFunctionMode):
    """Finds out which results of calls numbered as in the first pass have a graph.

    Attributes:
        differentiable: the names of their functions.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        super().__init__()
        self._numbers, self._calls = set(numbers), 0
        self.differentiable: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            if self._calls in self._numbers and result.requires_grad:
                self.differentiable.append(getattr(func, "__name__", "a function"))
            self._calls += 1
        return result


PLAIN = (Tensor, type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def refuse_opaque(function: Any, outputs: Sequence[Any]) -> None:
    """Raise ValueError for an output in which tensors could hide: their gradients would be lost."""
    for leaf in outputs:
        if not isinstance(leaf, PLAIN):
            raise ValueError(
                f"{name_of(function)} returns a {type(leaf).__name__}, into which a checkpoint cannot look; legal: "
                "tensors and plain values, nested in tuples, lists and dicts"
            )


def refuse_what_is_left_behind(function: Any, left: list[str]) -> None:
    """Raise RecomputeError when someone holds results of a first pass that should have a graph, and have none."""
    if left:
        raise RecomputeError(
            f"{name_of(function)} leaves tensors behind that are not among its outputs (results of "
            f"{', '.join(dict.fromkeys(left))}): a cache, a value kept on a module, or a hook that collects. Computed "
            "without a graph, they have no gradient: return them, detach them, turn the cache off, or do not "
            "checkpoint that block"
        )


def module_of(function: Any) -> nn.Module | None:
    """The module that `function` is, or whose `forward` it is."""
    owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def buffers_of(module: nn.Module | None) -> list[Tensor]:
    """Running statistics and the like."""
    return [*module.buffers()] if module is not None else []


@contextmanager
def buffers_put_back(module: nn.Module | None) -> Iterator[None]:
    """What a second pass does to a module's buffers (running statistics) is undone: the first pass has done it."""
    before = [(buffer, buffer.detach().clone()) for buffer in buffers_of(module)]
    yield
    for buffer, value in before:
        buffer.data.copy_(value)  # not seen by autograd, which may have saved it


# ---- what the second pass gets back ----


@dataclass(frozen=True)
class PassState:
    """Random state, autocast state and the running forward, as the first pass found them.

    Attributes:
        streams: of `parallel.random`, where the model draws from them.
    """

    forward: Forward | None
    cpu: Tensor
    cuda: tuple[torch.device, Tensor] | None
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    streams: Any

    @classmethod
    def now(cls, inputs: Sequence[Tensor]) -> PassState:
        device = next((tensor.device for tensor in inputs if tensor.is_cuda), None)
        forward = running()
        streams = getattr(forward, "streams", None)
        return cls(
            forward,
            torch.get_rng_state(),
            (device, torch.cuda.get_rng_state(device)) if device is not None else None,
            tuple(
                (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
                for kind in ("cpu", *(("cuda",) if device is not None else ()))
            ),
            streams.state() if streams is not None else None,
        )

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, everything is as it was; afterwards as before."""
        device = [self.cuda[0]] if self.cuda is not None else []
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=device))
            stack.enter_context(forward_of(self.forward))
            for kind, enabled, dtype in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            if self.forward is not None and self.forward.streams is not None:
                stack.enter_context(self.forward.streams.restored(self.streams))
            torch.set_rng_state(self.cpu)
            if self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda[1], self.cuda[0])
            yield


@contextmanager
def generators_watched(function: Any) -> Iterator[None]:
    """Raise ValueError when the block inside draws numbers from a generator that nobody gives back to backward."""
    before = library_states()
    with GeneratorWatch(name_of(function)):
        yield
    for name, state in library_states().items():
        if state != before[name]:
            raise untracked(name_of(function), name)


def library_states() -> dict[str, bytes]:
    """The states of generators outside torch."""
    return {
        "Python's random": repr(random.getstate()).encode(),
        "numpy.random": repr(np.random.get_state(legacy=False)).encode(),
    }


class GeneratorWatch(TorchFunctionMode):
    """Refuses torch functions that are given a generator of their own."""

    def __init__(self, block: str) -> None:
        super().__init__()
        self.block = block

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(leaf, torch.Generator) for leaf in (*args, *(kwargs or {}).values())):
            raise untracked(self.block, f"a torch.Generator of its own (in {getattr(func, '__name__', func)})")
        return func(*args, **(kwargs or {}))


def untracked(block: str, source: str) -> ValueError:
    """The error of a block that draws where it should not."""
    return ValueError(
        f"{block} draws random numbers from {source}: computed again in backward it would draw others; legal: "
        "minizero's Dropout, or torch's default generator"
    )


# ---- what is kept ----


class Keeper:
    """Turns a block's inputs into what is kept, and back."""

    def __init__(self, options: Options, unit: str) -> None:
        self.options, self.unit = options, unit
        self._shapes: list[torch.Size | None] = []  # of inputs that were partitioned
        self._devices: list[torch.device] = []
        self._copied: torch.cuda.Event | None = None

    def keep(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        self._devices = [tensor.device for tensor in inputs]
        self._shapes = [tensor.shape if self._is_partitioned(tensor) else None for tensor in inputs]
        kept = [
            tensor if shape is None else self._slice(tensor) for tensor, shape in zip(inputs, self._shapes, strict=True)
        ]
        return self._to_host(kept) if self.options.cpu else kept

    def give_back(self, kept: Sequence[Tensor]) -> list[Tensor]:
        if self._copied is not None:
            self._copied.wait()
        found = [tensor.to(device, non_blocking=True) for tensor, device in zip(kept, self._devices, strict=True)]
        return [
            tensor if shape is None else self._whole(tensor, shape)
            for tensor, shape in zip(found, self._shapes, strict=True)
        ]

    def _is_partitioned(self, tensor: Tensor) -> bool:
        """Activations only: what needs no gradient (positions, masks) is shared by all blocks, and small."""
        comm = self.options.comm
        return bool(
            self.options.partition and comm and comm.size > 1 and tensor.requires_grad and tensor.numel() >= comm.size
        )

    def _slice(self, tensor: Tensor) -> Tensor:
        comm = self.options.comm
        assert comm is not None
        return tensor.detach().reshape(-1).split(split_sizes(tensor.numel(), comm.size))[comm.rank].clone()

    def _whole(self, part: Tensor, shape: torch.Size) -> Tensor:
        comm = self.options.comm
        assert comm is not None
        return comm.gather_parts(part, split_sizes(shape.numel(), comm.size), 0, self.unit).view(shape)

    def _to_host(self, tensors: list[Tensor]) -> list[Tensor]:
        """Copies of CUDA tensors in pinned memory, made on a side stream once what computes them is done."""
        if not any(tensor.is_cuda for tensor in tensors):
            return tensors
        device = next(tensor.device for tensor in tensors if tensor.is_cuda)
        stream = side_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        host = []
        with torch.cuda.stream(stream):
            for tensor in tensors:
                if tensor.is_cuda:
                    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                    host.append(copy.copy_(tensor.detach(), non_blocking=True))
                    tensor.record_stream(stream)  # its memory is not used again before the copy is done
                else:
                    host.append(tensor)
            self._copied = torch.cuda.Event()
            self._copied.record(stream)
        return host


STREAMS: dict[torch.device, Any] = {}


def side_stream(device: torch.device) -> Any:
    """One stream per device, on which kept tensors travel."""
    if device not in STREAMS:
        STREAMS[device] = torch.cuda.Stream(device)
    return STREAMS[device]


# ---- small things ----

DEFAULT = [Options()]
"""What applies outside an engine's forward; `minizero.checkpointing.configure` sets it."""


def current_options() -> Options:
    """Those of the running forward's engine, else the default ones."""
    forward = running()
    found = forward.recompute if forward is not None else None
    return found if isinstance(found, Options) else DEFAULT[0]


def differentiable(tensor: Tensor) -> bool:
    """Whether gradients can flow through a tensor of this dtype."""
    return tensor.is_floating_point() or tensor.is_complex()


def name_of(function: Any) -> str:
    """What a person would call the block."""
    module = module_of(function)
    if module is not None:
        return type(module).__name__
    return getattr(function, "__qualname__", repr(function))


def describe(shapes: list[tuple[torch.Size, torch.dtype]]) -> str:
    """`(2, 3) float32, (4,) int64`."""
    return ", ".join(f"{tuple(shape)} {str(dtype).removeprefix('torch.')}" for shape, dtype in shapes) or "no tensor"
