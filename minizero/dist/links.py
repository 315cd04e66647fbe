"""Lists of tensors from one rank of an axis to another: what pipeline stages pass on.

The receiver need not know what comes. In front of each list goes a **label** of fixed size, which says how many tensors
there are, and dtype, shape and whether a gradient is wanted of each; so stages may pass any number of tensors, of
shapes that change from one microbatch to the next. A list can also be an **error**: a rank that fails tells those who
wait for it, and they raise at once instead of after the timeout.

Both directions between two ranks are separate sequences: the n-th list sent is the n-th received, whatever its tag. On
gloo everything is in the background. On nccl, where a send waits for its receive and what two ranks exchange is in one
order, lists must be posted in an order that is free of deadlock, and a label is waited for when it is posted.

Glossary:
    label   [LABEL_WORDS] int64: kind, number of tensors; of each: dtype, wants gradient, dims, shape
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minizero.dist.collectives import CollectiveError, Communicator, Work
from minizero.dist.transport import Waitable

LABEL_WORDS = 128
TENSORS, FAILURE = 0, 1  # kinds of lists
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
PATIENCE = 1.0  # seconds that a message of failure may take
TAGS = 3 << 22  # above those of `transport.Call`; gloo's own begin at 2**24
NUMBERS = 1 << 20


@dataclass
class Sent:
    """A list on its way, kept alive until the receiver has it."""

    work: Work
    kept: list[Tensor]


@dataclass
class Sequences:
    """What has passed between this rank and one peer.

    Attributes:
        sent, received: numbers of lists so far. pending: the sent ones that may still be read.
    """

    sent: int = 0
    received: int = 0
    pending: deque[Sent] = field(default_factory=deque)


class Links:
    """The links of this rank along the axis of `comm`.

    Args:
        device: of the tensors.
    """

    def __init__(self, comm: Communicator, device: torch.device) -> None:
        self.comm, self.device = comm, device
        self.group, self.ranks = comm.group, dist.get_process_group_ranks(comm.group)
        self.over_host = dist.get_backend(comm.group) == "gloo"
        self.wire_device = torch.device("cpu") if self.over_host else device
        self._peers = {peer: Sequences() for peer in range(comm.size)}

    # ---- sending ----

    def send(self, target: int, tensors: Sequence[Tensor | None], what: str) -> None:
        """Start sending `tensors` to rank `target` of the axis; `what` says what they are, for the ledger and errors.

        They must stay as they are until `arrived` is told that they did. Raises ValueError for what cannot be sent.
        """
        self._send(target, label_of(tensors), [t for t in tensors if t is not None], what)

    def fail(self, target: int, message: str) -> None:
        """Tell rank `target` that its next list will not come, and why; nothing is raised when it cannot be told.

        Waits a moment for it: a process that ends at once takes its message with it.
        """
        with suppress(RuntimeError):
            self._send(target, failure_label(message), [], "an error")
            requests: list[Any] = self._peers[target].pending[-1].work.requests
            for request in requests:
                request.wait(timedelta(seconds=PATIENCE))

    def arrived(self, target: int, leave: int) -> None:
        """All lists sent to `target` but the last `leave` are known to be there: let go of them."""
        pending = self._peers[target].pending
        while len(pending) > leave:
            pending.popleft().work.wait()

    def _send(self, target: int, label: Tensor, tensors: list[Tensor], what: str) -> None:
        peer = self._peers[target]
        wire = [tensor.detach().to(self.wire_device).contiguous() for tensor in tensors]
        work = self.comm.sending(target, what, sum(tensor.nbytes for tensor in wire), label.nbytes)
        tag = tag_of(peer.sent)
        peer.sent += 1
        pieces = [(label.to(self.wire_device), tag), *((tensor.view(-1), tag + 1) for tensor in wire if tensor.numel())]
        for piece, piece_tag in pieces:
            work.requests.append(self._request(dist.isend(piece, self.ranks[target], group=self.group, tag=piece_tag)))
        peer.pending.append(Sent(work, [piece for piece, _ in pieces]))

    # ---- receiving ----

    def receive(self, source: int, what: str) -> Arrival:
        """Start receiving the next list from rank `source` of the axis."""
        peer = self._peers[source]
        tag = tag_of(peer.received)
        peer.received += 1
        label = torch.empty(LABEL_WORDS, dtype=torch.int64, device=self.wire_device)
        work = self.comm.receiving(source, what)
        work.requests = [self._request(dist.irecv(label, self.ranks[source], group=self.group, tag=tag))]
        arrival = Arrival(self, source, what, tag, label, work)
        if not self.over_host:
            arrival.open()
        return arrival

    def _request(self, request: Waitable | None) -> Waitable:
        assert request is not None
        return request


@dataclass
class Arrival:
    """A list that is coming. `tensors` waits for it."""

    links: Links
    source: int
    what: str
    tag: int
    label: Tensor
    work: Work
    _opened: list[tuple[Tensor | None, bool]] | None = None

    def open(self) -> None:
        """Wait for the label, and start receiving what it announces."""
        if self._opened is not None:
            return
        self.work.wait()
        links = self.links
        if self.label[0].item() == FAILURE:
            raise CollectiveError(message_in(self.label))
        self._opened = made = empty_for(self.label.tolist(), links.wire_device)
        for tensor, _ in made:
            if tensor is not None and tensor.numel():
                request = dist.irecv(tensor.view(-1), links.ranks[self.source], group=links.group, tag=self.tag + 1)
                self.work.requests.append(links._request(request))

    def tensors(self) -> list[tuple[Tensor | None, bool]]:
        """(tensor or None, whether its gradient is wanted) of each.

        Raises CollectiveError when the sender died, stalled, or failed, with what it said.
        """
        self.open()
        self.work.wait()
        assert self._opened is not None
        return [(None if t is None else t.to(self.links.device), wants) for t, wants in self._opened]


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


def label_of(tensors: Sequence[Tensor | None]) -> Tensor:
    """Raises ValueError for a tensor, or a number of them, that no label can announce."""
    words = [TENSORS, len(tensors)]
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
