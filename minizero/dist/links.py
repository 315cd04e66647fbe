"""Lists of tensors from one rank of an axis to another: what pipeline stages pass on.

The receiver need not know what comes. In front of each list goes a **label** of fixed size, which says how many tensors
there are, and dtype, shape and whether a gradient is wanted of each; so stages may pass any number of tensors, of
shapes that change from one microbatch to the next. A list can also be an **error**: a rank that fails tells those who
wait for it, and they raise at once instead of after the timeout.

Both directions between two ranks are separate sequences: the n-th list sent is the n-th received. On one host they are
read from the neighbour's memory (`neighbour.py`), elsewhere on gloo they are messages in the background. On nccl, where
a send waits for its receive and what two ranks exchange is in one order, lists must be posted in an order that is free
of deadlock, and a label is waited for when it is posted.

Glossary:
    label   [LABEL_WORDS] int64: kind, number of tensors; of each: dtype, wants gradient, dims, shape
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from minizero.dist.collectives import CollectiveError, Communicator, Work
from minizero.dist.neighbour import NeighbourLinks
from minizero.dist.transport import Waitable

LABEL_WORDS = 128
TENSORS, FAILURE, ALONE = 0, 1, 2  # kinds of lists; ALONE: one tensor that is not in a list
DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
NOTHING = -1  # the dtype of a None
PATIENCE = 1.0  # seconds that messages of failure may take
TAGS = 3 << 22  # above those of `transport.Call`; gloo's own begin at 2**24
NUMBERS = 1 << 20


class Way(Protocol):
    """How lists travel; the first piece of each is its label."""

    def send(self, target: int, number: int, pieces: Sequence[Tensor]) -> list[Waitable]:
        """Start giving list `number` of this link to rank `target`; what is returned waits until it is there."""
        ...

    def receive(self, source: int, number: int, label: Tensor) -> Incoming:
        """Start getting list `number` of the link from rank `source`; its label goes into `label`."""
        ...


class Incoming(Protocol):
    """A list that is coming: waited for, its label is there; then `fill` starts getting the rest."""

    def wait(self) -> object: ...

    def fill(self, tensors: Sequence[Tensor]) -> list[Waitable]: ...


class LinkMessages:
    """Every piece is a message of torch's backend."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.ranks = group, dist.get_process_group_ranks(group)

    def send(self, target: int, number: int, pieces: Sequence[Tensor]) -> list[Waitable]:
        """See `Way.send`."""
        tags = [tag_of(number), *[tag_of(number) + 1] * (len(pieces) - 1)]
        requests = [
            dist.isend(piece, self.ranks[target], group=self.group, tag=tag)
            for piece, tag in zip(pieces, tags, strict=True)
        ]
        return [request for request in requests if request is not None]

    def receive(self, source: int, number: int, label: Tensor) -> IncomingMessages:
        """See `Way.receive`."""
        return IncomingMessages(self, source, number, self.get(source, label, tag_of(number)))

    def get(self, source: int, target: Tensor, tag: int) -> Waitable:
        """Start receiving one message."""
        request = dist.irecv(target, self.ranks[source], group=self.group, tag=tag)
        assert request is not None
        return request


@dataclass
class IncomingMessages:
    """See `Incoming`."""

    way: LinkMessages
    source: int
    number: int
    label: Waitable

    def wait(self) -> None:
        self.label.wait()

    def fill(self, tensors: Sequence[Tensor]) -> list[Waitable]:
        """See `Incoming`."""
        return [self.way.get(self.source, tensor, tag_of(self.number) + 1) for tensor in tensors]


@dataclass
class Sent:
    """A list on its way, kept alive until the receiver has it."""

    work: Work
    kept: list[Tensor]


@dataclass
class Passed:
    """What has passed between this rank and one peer.

    Attributes:
        sent, received: numbers of lists so far. pending: the sent ones that may still be read.
    """

    sent: int = 0
    received: int = 0
    pending: deque[Sent] = field(default_factory=deque)


class Links:
    """The links of this rank along the axis of `comm`; collective over it.

    Args:
        device: of the tensors.
    """

    def __init__(self, comm: Communicator, device: torch.device) -> None:
        self.comm, self.device = comm, device
        self.over_host = dist.get_backend(comm.group) == "gloo"
        self.wire_device = torch.device("cpu") if self.over_host else device
        self.way: Way = LinkMessages(comm.group)
        memory = comm.more_boards(comm.size)
        if memory is not None:
            self.way = NeighbourLinks(memory)
        self._peers = {peer: Passed() for peer in range(comm.size)}

    # ---- sending ----

    def send(self, target: int, given: Tensor | Sequence[Tensor | None], what: str) -> None:
        """Start sending a tensor or a list to rank `target` of the axis; `what` is for the ledger and errors.

        They must stay as they are until `arrived` is told that they did. Raises ValueError for what cannot be sent.
        """
        tensors = [given] if isinstance(given, Tensor) else given
        label = label_of(tensors, ALONE if isinstance(given, Tensor) else TENSORS)
        self._send(target, label, [t for t in tensors if t is not None], what)

    def signal(self, target: int, what: str) -> None:
        """Send an empty list."""
        self._send(target, label_of([], TENSORS), [], what)

    def fail(self, targets: Iterable[int], message: str) -> None:
        """Tell ranks that their next list will not come, and why; nothing is raised when one cannot be told.

        Waits a moment for them: a process that ends at once takes its messages with it.
        """
        requests: list[Any] = []
        for target in targets:
            with suppress(RuntimeError):
                self._send(target, failure_label(message), [], "an error")
                requests += self._peers[target].pending[-1].work.requests
        deadline = time.monotonic() + PATIENCE
        for request in requests:
            with suppress(RuntimeError):
                request.wait(timedelta(seconds=max(deadline - time.monotonic(), 0.01)))

    def arrived(self, target: int, leave: int) -> None:
        """All lists sent to `target` but the last `leave` are known to be there: let go of them."""
        pending = self._peers[target].pending
        while len(pending) > leave:
            pending.popleft().work.wait()

    def _send(self, target: int, label: Tensor, tensors: list[Tensor], what: str) -> None:
        peer = self._peers[target]
        wire = [tensor.detach().to(self.wire_device).contiguous() for tensor in tensors]
        payload = sum(tensor.nbytes for tensor in wire)
        work = self.comm.sending(target, what, payload, label.nbytes)
        pieces = [label.to(self.wire_device), *(tensor.view(-1) for tensor in wire if tensor.numel())]
        number, peer.sent = peer.sent, peer.sent + 1
        work.requests = work.posted(lambda: self.way.send(target, number, pieces))
        peer.pending.append(Sent(work, pieces))

    # ---- receiving ----

    def receive(self, source: int, what: str) -> Arrival:
        """Start receiving the next list from rank `source` of the axis."""
        peer = self._peers[source]
        number, peer.received = peer.received, peer.received + 1
        label = torch.empty(LABEL_WORDS, dtype=torch.int64, device=self.wire_device)
        incoming = self.way.receive(source, number, label)
        work = self.comm.receiving(source, what)
        work.requests = [incoming]
        arrival = Arrival(self, source, label, incoming, work)
        if not self.over_host:
            arrival.open()
        return arrival


@dataclass
class Arrival:
    """A list that is coming. `tensors` waits for it."""

    links: Links
    source: int
    label: Tensor
    incoming: Incoming
    work: Work
    _made: list[tuple[Tensor | None, bool]] | None = None

    def open(self) -> None:
        """Wait for the label, and start receiving what it announces."""
        if self._made is not None:
            return
        self.work.wait()
        if self.label[0].item() == FAILURE:
            with suppress(RuntimeError):  # the sender may be gone
                for last in self.incoming.fill([]):
                    last.wait()
            raise CollectiveError(message_in(self.label))
        self._made = made = empty_for(self.label.tolist(), self.links.wire_device)
        whole = [tensor.view(-1) for tensor, _ in made if tensor is not None and tensor.numel()]
        self.work.requests = self.work.posted(lambda: self.incoming.fill(whole))

    def tensors(self) -> list[tuple[Tensor | None, bool]]:
        """(tensor or None, whether its gradient is wanted) of each.

        Raises CollectiveError when the sender died, stalled, or failed, with what it said.
        """
        self.open()
        self.work.wait()
        assert self._made is not None
        return [(None if t is None else t.to(self.links.device), wants) for t, wants in self._made]

    def is_alone(self) -> bool:
        """Whether what arrived is one tensor that was not in a list."""
        return self.label[0].item() == ALONE


def tag_of(number: int) -> int:
    """Of the label of a link's list `number`; its tensors have the next one."""
    return TAGS + 2 * (number % NUMBERS)


def failure_label(message: str) -> Tensor:
    """A label that says why nothing comes, as much of it as has room."""
    text = message.encode()[: 8 * (LABEL_WORDS - 2)]
    words = torch.frombuffer(bytearray(text.ljust(8 * (LABEL_WORDS - 2), b" ")), dtype=torch.int64)
    return torch.cat([torch.tensor([FAILURE, 0]), words])


def message_in(label: Tensor) -> str:
    """The inverse of `failure_label`."""
    return bytes(label[2:].cpu().view(torch.uint8).tolist()).decode(errors="replace").rstrip()


def label_of(tensors: Sequence[Tensor | None], kind: int) -> Tensor:
    """Raises ValueError for a tensor, or a number of them, that no label can announce."""
    words = [kind, len(tensors)]
    for tensor in tensors:
        if tensor is None:
            words += [NOTHING, 0, 0]
            continue
        if tensor.dtype not in DTYPES or tensor.layout is not torch.strided:
            raise ValueError(
                f"a tensor of {tensor.dtype} and layout {tensor.layout} cannot be sent; legal: strided tensors of "
                f"{', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}"
            )
        words += [DTYPES.index(tensor.dtype), int(tensor.requires_grad), tensor.dim(), *tensor.shape]
    if len(words) > LABEL_WORDS:
        raise ValueError(f"{len(tensors)} tensors are more than a label can announce ({LABEL_WORDS} words)")
    return torch.tensor(words + [0] * (LABEL_WORDS - len(words)), dtype=torch.int64)


def empty_for(words: list[int], device: torch.device) -> list[tuple[Tensor | None, bool]]:
    """Memory for what a label announces, and whether gradients are wanted."""
    made: list[tuple[Tensor | None, bool]] = []
    position = 2
    for _ in range(words[1]):
        dtype, wants, dims = words[position : position + 3]
        shape = words[position + 3 : position + 3 + dims]
        position += 3 + dims
        tensor = None if dtype == NOTHING else torch.empty(shape, dtype=DTYPES[dtype], device=device)
        made.append((tensor, bool(wants)))
    return made
