"""Pipeline schedules: published bubbles, torch's orders, closed forms, and a validator that finds every break."""

from __future__ import annotations

import json
import queue
import threading
import types
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter

import pytest
import torch.distributed.pipelining.schedules as torch_schedules
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minizero import cli
from minizero.parallel.pipeline import auto, draw, measured, schedules
from minizero.parallel.pipeline.actions import (
    Action,
    Kind,
    Schedule,
    from_lists,
    loop_placement,
    peak_memory,
    read_csv,
    v_placement,
    write_csv,
)
from minizero.parallel.pipeline.schedules import SCHEDULES, build, interleaved, zb_auto, zbv
from minizero.parallel.pipeline.simulate import Costs, Event, Timeline, simulate
from minizero.parallel.pipeline.transfers import Receive, Send, Transfer, rendezvous, steps, transfers
from minizero.parallel.pipeline.validate import ScheduleError, validate

# ------------------------------------------------------------------------- published bubbles (arXiv 2401.10241)

# ranks, microbatches, profiled F, B, W and latency in ms (Table 9), then bubbles (Table 5):
# 1F1B, 1F1B-I (3 chunks), ZB-H1, ZB-H2, ZB-2p
PUBLISHED = [
    (8, 24, (18.522, 18.086, 9.337, 0.601), (0.2431, 0.1055, 0.1585, 0.1083, 0.0433)),
    (8, 32, (18.513, 18.086, 9.331, 0.626), (0.1985, 0.0818, 0.1242, 0.0837, 0.0039)),
    (8, 64, (18.546, 18.097, 9.321, 0.762), (0.1240, 0.0443, 0.0674, 0.0444, 0.0026)),
    (16, 48, (11.347, 11.248, 8.132, 0.377), (0.2552, 0.1104, 0.1397, 0.0672, 0.0066)),
    (16, 64, (11.307, 11.254, 8.101, 0.379), (0.2082, 0.0852, 0.1088, 0.0516, 0.0054)),
    (16, 128, (11.325, 11.308, 8.109, 0.378), (0.1251, 0.0445, 0.0576, 0.0266, 0.0028)),
]
# What W still needs of an activation in these models, 32 sbh of sbh (34 + 5as/h), with a 24, h 2304 and a 40, h 5120.
KEPT = {8: 32 / (34 + 5 * 24 * 1024 / 2304), 16: 32 / (34 + 5 * 40 * 1024 / 5120)}


@pytest.mark.parametrize(("ranks", "microbatches", "cost", "bubbles"), PUBLISHED)
def test_published_bubbles(ranks, microbatches, cost, bubbles):
    costs = Costs(*cost)
    for name, published in zip(("one_f_one_b", "zb_h1", "zb_h2"), (bubbles[0], bubbles[2], bubbles[3]), strict=True):
        found = simulate(SCHEDULES[name](ranks, microbatches), costs).bubble
        assert abs(found - published) < 0.6e-4, (name, found)


@pytest.mark.parametrize(("ranks", "microbatches", "cost", "bubbles"), PUBLISHED)
def test_the_published_interleaved_bubble_is_ours_less_one_latency_per_rank(ranks, microbatches, cost, bubbles):
    """Ours waits for 2 (3p - 1) latencies: one microbatch's whole way there and back. The paper does not say which p
    of them its simulator hid; the figures say that it is p in all six cells."""
    timeline = simulate(interleaved(ranks, microbatches, 3), Costs(*cost))
    work = microbatches * sum(cost[:3])
    longest = max(timeline.spans)
    assert longest == pytest.approx(work + (ranks - 1) * sum(cost[:3]) / 3 + 2 * (3 * ranks - 1) * cost[3])
    hidden = longest - ranks * cost[3]
    assert abs((hidden - work) / hidden - bubbles[1]) < 0.6e-4
    assert 0 <= timeline.bubble - bubbles[1] < 0.0036


@pytest.mark.parametrize(("ranks", "microbatches", "cost", "bubbles"), PUBLISHED)
def test_the_search_reaches_the_published_zb_2p(ranks, microbatches, cost, bubbles):
    costs, kept = Costs(*cost), KEPT[ranks]
    schedule = zb_auto(ranks, microbatches, costs, 2 * ranks, kept)
    validate(schedule)
    assert simulate(schedule, costs).bubble < bubbles[4] + 0.5e-4
    assert max(peak_memory(row, kept) for row in schedule.actions) <= 2 * ranks + 1e-9


@pytest.mark.parametrize(("ranks", "microbatches", "cost", "bubbles"), PUBLISHED[:4])
def test_the_search_is_no_worse_than_h1_and_h2_in_their_memory(ranks, microbatches, cost, bubbles):
    costs = Costs(*cost)
    for limit, published in ((ranks, bubbles[2]), (2 * ranks - 1, bubbles[3])):
        schedule = zb_auto(ranks, microbatches, costs, limit)
        assert max(schedule.peak_in_flight) <= limit
        assert simulate(schedule, costs).bubble < published + 0.6e-4


uneven = st.lists(st.floats(0.1, 5), min_size=4, max_size=4)


@settings(max_examples=30, deadline=None)
@given(
    uneven,
    uneven,
    st.lists(st.floats(0, 3), min_size=4, max_size=4),
    st.floats(0, 1),
    st.integers(1, 9),
    st.integers(1, 9),
)
def test_the_search_keeps_any_limit_at_any_costs(forward, backward, weight, latency, microbatches, limit):
    costs = Costs(forward, backward, weight, latency)
    schedule = zb_auto(4, microbatches, costs, limit)
    assert max(validate(schedule)) <= limit
    for name in ("zb_h1", "zb_h2"):
        other = SCHEDULES[name](4, microbatches)
        if max(other.peak_in_flight) <= limit:
            assert max(simulate(schedule, costs).spans) <= max(simulate(other, costs).spans) + 1e-9


@pytest.mark.parametrize("ranks", (1, 2, 4, 8))
def test_bubbles_in_closed_form(ranks):
    microbatches, f, b, w = 4 * ranks, 3.0, 4.0, 2.0
    sizes = {
        "gpipe": (ranks - 1) * (f + b + w),
        "one_f_one_b": (ranks - 1) * (f + b + w),
        "interleaved": (ranks - 1) * (f + b + w) / 2,
        "zb_h1": (ranks - 1) * (f + b - w),
    }
    for name, size in sizes.items():
        timeline = simulate(SCHEDULES[name](ranks, microbatches), Costs(f, b, w))
        assert max(timeline.spans) == pytest.approx(microbatches * (f + b + w) + size), name
    for name in ("zb_h2", "zbv"):
        assert simulate(SCHEDULES[name](ranks, microbatches)).bubble == 0, name


# ------------------------------------------------------------------------------------- torch's compute orders


class RecordingStage:
    """What torch's single-stage schedules need of a stage, so that they run without one."""

    def __init__(self, ranks, rank):
        self.num_stages = self.group_size = ranks
        self.stage_index = self.group_rank = rank
        self.is_first, self.is_last = rank == 0, rank == ranks - 1
        self.submod, self.has_backward, self.ran = None, True, []

    def forward_one_chunk(self, index, *_, **__):
        self.ran.append(f"F{index}")

    def backward_one_chunk(self, index, *_, **__):
        self.ran.append(f"BW{index}")

    def get_fwd_recv_ops(self, index):
        return []

    get_fwd_send_ops = get_bwd_recv_ops = get_bwd_send_ops = get_fwd_recv_ops

    def clear_runtime_states(self):
        pass

    def perform_reduce_grad(self, *_):
        pass

    def _initialize_stage(self, *_):
        pass


def torch_order(cls, ranks, microbatches, places, monkeypatch):
    """torch's order per rank in our words; `places[rank]` are the virtual stages that rank holds."""
    monkeypatch.setattr(torch_schedules._PipelineScheduleRuntime, "_prepare_schedule_with_comms", lambda *_, **__: None)
    stages = [
        types.SimpleNamespace(
            group_size=ranks, group_rank=0, stage_index=index, num_stages=sum(map(len, places)), submod=None,
            is_first=index == 0, is_last=False, has_backward=True, stage_index_to_group_rank=None,
        )
        for index in places[0]
    ]  # fmt: skip
    order = cls(stages, microbatches).pipeline_order
    kinds = {"F": "F", "I": "B", "W": "W", "B": "BW"}
    rows = []
    for rank in range(ranks):
        flat = [part for action in order[rank] if action for part in (action.sub_actions or [action])]
        rows.append(
            tuple(
                str(
                    Action(Kind(kinds[a.computation_type.value]), places[rank].index(a.stage_index), a.microbatch_index)
                )
                for a in flat
            )
        )
    return tuple(rows)


def places(schedule):
    return [
        [schedule.virtual_stages[rank, chunk] for chunk in range(schedule.chunks)] for rank in range(schedule.ranks)
    ]


@pytest.mark.parametrize("ranks", range(2, 9))
@pytest.mark.parametrize("name", ("gpipe", "one_f_one_b"))
def test_orders_of_one_chunk_are_those_torch_runs(name, ranks):
    """Of what torch runs, not of its `pipeline_order`: that one starts the last rank of 1F1B at microbatch 1.

    torch's 1F1B takes no fewer microbatches than ranks."""
    cls = {"gpipe": torch_schedules.ScheduleGPipe, "one_f_one_b": torch_schedules.Schedule1F1B}[name]
    for microbatches in range(ranks if name == "one_f_one_b" else 1, 33):
        schedule = SCHEDULES[name](ranks, microbatches)
        for rank in range(ranks):
            stage = RecordingStage(ranks, rank)
            runner = cls(stage, microbatches)
            runner._has_backward, runner._stage_forward_initialized, runner._stage_backward_initialized = (
                True,
                True,
                True,
            )
            runner._initialize_stage = lambda *_, **__: None
            runner._step_microbatches([()] * microbatches, [{}] * microbatches)
            assert tuple(stage.ran) == schedule.order[rank], (microbatches, rank)


@pytest.mark.parametrize("ranks", range(2, 9))
def test_interleaved_orders_are_torchs(ranks, monkeypatch):
    compared = 0
    for chunks in (1, 2, 3):
        for microbatches in range(1, 33):
            schedule = interleaved(ranks, microbatches, chunks)
            if microbatches % max(1, microbatches // ranks):
                continue  # torch wants equal rounds
            cls = torch_schedules.ScheduleInterleaved1F1B
            assert schedule.order == torch_order(cls, ranks, microbatches, places(schedule), monkeypatch)
            compared += 1
    assert compared > 30


@pytest.mark.parametrize("ranks", range(2, 9))
def test_v_orders_are_torchs(ranks, monkeypatch):
    for microbatches in range(1, 33):
        schedule = zbv(ranks, microbatches)
        assert schedule.placement == v_placement(ranks)
        cls = torch_schedules.ScheduleZBVZeroBubble
        assert schedule.order == torch_order(cls, ranks, microbatches, places(schedule), monkeypatch)
        if microbatches >= 2 * ranks:  # torch takes no fewer
            schedule = schedules.dualpipe_v(ranks, microbatches)
            cls = torch_schedules.ScheduleDualPipeV
            assert schedule.order == torch_order(cls, ranks, microbatches, places(schedule), monkeypatch)


@pytest.mark.parametrize("ranks", range(2, 9))
def test_zb_h1_is_torchs_interleaved_zero_bubble_of_one_chunk(ranks, monkeypatch):
    for microbatches in range(1, 33):
        if microbatches % max(1, microbatches // ranks):
            continue
        schedule = schedules.zb_h1(ranks, microbatches)
        cls = torch_schedules.ScheduleInterleavedZeroBubble
        assert schedule.order == torch_order(cls, ranks, microbatches, places(schedule), monkeypatch)


# ------------------------------------------------------------------------- every schedule, every size it takes


def first_round(ranks, microbatches):
    return -(-microbatches // max(1, microbatches // ranks))


PEAKS = {
    "gpipe": lambda p, m, r: m,
    "one_f_one_b": lambda p, m, r: min(p - r, m),
    "interleaved": lambda p, m, r: min(2 * m, 2 * (p - r - 1) + first_round(p, m) + 1),
    "zb_h1": lambda p, m, r: min(p, m),
    "zb_h2": lambda p, m, r: min(2 * p - 1, m),
    "zbv": lambda p, m, r: min(2 * p, 2 * m, m + r + 1),
    "dualpipe_v": lambda p, m, r: 2 * p + 1 if m >= 2 * p else None,
    "zb_auto": lambda p, m, r: None,
}


@pytest.mark.parametrize("ranks", range(1, 9))
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_legal_and_keeps_what_its_closed_form_says(name, ranks):
    for microbatches in range(1, 3 * ranks + 1):
        schedule = SCHEDULES[name](ranks, microbatches)
        peaks = validate(schedule)
        for rank, peak in enumerate(peaks):
            assert PEAKS[name](ranks, microbatches, rank) in (peak, None), (microbatches, rank)
        assert legal(schedule)
        assert schedule.peak_in_flight == simulate(schedule).peak_in_flight == peaks
        edges = sum(a[0] != b[0] for a, b in zip(schedule.placement, schedule.placement[1:], strict=False))
        assert len(transfers(schedule)) == 2 * microbatches * edges


@pytest.mark.parametrize("chunks", (1, 3, 4))
def test_any_number_of_chunks(chunks):
    for ranks in range(1, 7):
        for microbatches in range(1, 3 * ranks + 1):
            peaks = validate(interleaved(ranks, microbatches, chunks))
            most = (chunks - 1) * first_round(ranks, microbatches) + 1
            assert peaks == tuple(min(microbatches * chunks, 2 * (ranks - r - 1) + most) for r in range(ranks))


def test_balanced_memory_of_zbv_is_1f1bs():
    for ranks in (2, 4, 8):
        schedule = zbv(ranks, 3 * ranks)
        assert set(schedule.peak_in_flight) == {2 * ranks}  # halves of a stage
        assert max(schedules.one_f_one_b(ranks, 3 * ranks).peak_in_flight) == ranks


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_no_schedule_takes(name):
    for ranks, microbatches, wrong in ((0, 1, "ranks = 0"), (2, 0, "microbatches = 0"), (2, -1, "microbatches = -1")):
        with pytest.raises(ValueError, match=f"{wrong}: must be at least 1"):
            SCHEDULES[name](ranks, microbatches)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (("nope", 2, 2), "schedule 'nope': legal are gpipe, one_f_one_b"),
        (("zbv", 2, 2, 3), "chunks = 3: zbv has 2 per rank"),
        (("interleaved", 2, 2, 0), "chunks = 0"),
        (("gpipe", 2, 8, None, None, 4), "gpipe keeps 8 activations, more than memory_limit = 4"),
        (("zb_auto", 2, 2, None, None, 0.5), "memory_limit = 0.5: must be at least 1"),
        (("zb_auto", 2, 2, None, None, 4, 1.5), "kept = 1.5"),
        (("gpipe", 2, 2, None, None, None, 0.5), "kept = 0.5 is for zb_auto, not gpipe"),
        (("zb_auto", 2, 2, 2), "chunks = 2: zb_auto has 1 per rank"),
    ),
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError) as caught:
        build(*options)
    assert message in str(caught.value)


def test_docstrings_show_what_is_drawn():
    pictures = {
        schedules.__dict__[name]: simulate(SCHEDULES[name](3, 4)) for name in ("gpipe", "one_f_one_b", "zb_h1", "zb_h2")
    }
    pictures[interleaved], pictures[zbv] = simulate(interleaved(2, 2)), simulate(zbv(2, 3))
    pictures[auto] = simulate(zb_auto(3, 5, memory_limit=5))
    for owner, timeline in pictures.items():
        lines = [line.strip() for line in owner.__doc__.splitlines()]
        assert all(line in lines for line in draw.grid(timeline).splitlines()), owner
    for rank, row in enumerate(schedules.dualpipe_v(2, 4).order):
        assert f"rank {rank} | {' '.join(row)}" in schedules.dualpipe_v.__doc__


# ----------------------------------------------------------------------------- the validator against an oracle


def legal(schedule):
    """The rules again, written as a graph: each action once, and no circle of `after` and `in this order on a rank`."""
    last = len(schedule.placement) - 1
    nodes = {}
    for rank, row in enumerate(schedule.actions):
        for position, action in enumerate(row):
            if (rank, action.chunk) not in schedule.placement or action.microbatch not in range(schedule.microbatches):
                return False
            stage = schedule.placement.index((rank, action.chunk))
            for letter in str(action.kind):
                if (letter, stage, action.microbatch) in nodes:
                    return False
                nodes[letter, stage, action.microbatch] = (rank, position)
    if len(nodes) != 3 * (last + 1) * schedule.microbatches:
        return False
    graph = {node: set() for node in nodes.values()}
    for rank, row in enumerate(schedule.actions):
        for position in range(1, len(row)):
            graph[rank, position].add((rank, position - 1))
    for (letter, stage, microbatch), node in nodes.items():
        before = {
            "F": [("F", stage - 1)] if stage else [],
            "B": [("F", stage)] + ([("B", stage + 1)] if stage < last else []),
            "W": [("B", stage)],
        }[letter]
        graph[node] |= {nodes[kind, where, microbatch] for kind, where in before} - ({node} if letter == "W" else set())
    try:
        TopologicalSorter(graph).prepare()
    except CycleError:
        return False
    return True


@st.composite
def broken(draw):
    """A schedule with one to three accidents. Some of them leave it legal."""
    name = draw(st.sampled_from(sorted(SCHEDULES)))
    schedule = SCHEDULES[name](draw(st.integers(1, 4)), draw(st.integers(1, 6)))
    rows = [list(row) for row in schedule.actions]
    for _ in range(draw(st.integers(1, 3))):
        rank = draw(st.integers(0, schedule.ranks - 1))
        row = rows[rank]
        if not row:
            continue
        one, other = (draw(st.integers(0, len(row) - 1)) for _ in range(2))
        match draw(
            st.sampled_from(("drop", "swap", "neighbours", "duplicate", "move", "give away", "rename", "split"))
        ):
            case "drop":
                del row[one]
            case "swap":
                row[one], row[other] = row[other], row[one]
            case "neighbours" if one:
                row[one - 1], row[one] = row[one], row[one - 1]
            case "duplicate":
                row.insert(other, row[one])
            case "move":
                row.insert(other, row.pop(one))
            case "give away":
                rows[draw(st.integers(0, schedule.ranks - 1))].insert(0, row.pop(one))
            case "rename":
                field = draw(st.sampled_from(({"kind": Kind.B}, {"kind": Kind.BW}, {"microbatch": 9}, {"chunk": 1})))
                row[one] = replace(row[one], **field)
            case "split" if row[one].kind is Kind.BW:  # legal, where W goes after
                row[one : one + 1] = [replace(row[one], kind=Kind.B), replace(row[one], kind=Kind.W)]
    return replace(schedule, actions=tuple(map(tuple, rows)))


def check_validator(schedule, verdicts):
    expected = legal(schedule)
    verdicts.append(expected)
    try:
        validate(schedule)
    except ScheduleError as error:
        assert not expected, f"false alarm: {error}"
        assert 0 <= error.rank < schedule.ranks and 0 <= error.index <= len(schedule.actions[error.rank])
        head, _, *rows = str(error).splitlines()
        assert f"rank {error.rank}, action {error.index}: " in head and "expected: " in head
        assert sum(">" in row for row in rows) == 1
    else:
        assert expected, f"not found: {schedule.order}"


quick = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))


def test_the_validator_finds_every_break_and_raises_no_false_alarm():
    verdicts = []
    quick(given(broken())(lambda schedule: check_validator(schedule, verdicts)))()
    assert verdicts.count(False) > 100 and verdicts.count(True) > 20


@pytest.mark.soak
def test_ten_thousand_broken_schedules():
    verdicts = []
    many = settings(quick, max_examples=10_000)
    many(given(broken())(lambda schedule: check_validator(schedule, verdicts)))()
    assert len(verdicts) >= 10_000 and verdicts.count(False) > 2000 and verdicts.count(True) > 500


OWN = [["F0", "F1", "BW0", "BW1"], ["F0", "BW0", "F1", "BW1"]]


@pytest.mark.parametrize(
    ("rows", "where", "message"),
    (
        (
            [OWN[0], ["F0", "BW0", "F1"]],
            (1, 2),
            "BW1 is missing|B1 is missing; expected: B1 (or BW1) once on this rank",
        ),
        ([OWN[0], ["F0", "BW0", "F1", "B1"]], (1, 3), "W1 is missing; expected: W1 (or BW1) once on this rank"),
        ([[*OWN[0], "F0"], OWN[1]], (0, 4), "F0 is there twice"),
        ([[*OWN[0], "W1"], OWN[1]], (0, 4), "W1 comes on top of BW1"),
        ([OWN[0], ["BW0", "F0", "F1", "BW1"]], (1, 0), "BW0 comes before F0; expected: F0 of this rank first"),
        (
            [["F0", "BW0", "F1", "BW1"], ["F1", "F0", "BW0", "BW1"]],
            (1, 0),
            "a circle: rank 0 at BW0 waits for BW0 of rank 1; rank 1 at F1 waits for F1 of rank 0",
        ),
    ),
)
def test_what_the_validator_says(rows, where, message):
    schedule = from_lists(rows)
    with pytest.raises(ScheduleError) as caught:
        validate(schedule)
    assert any(part in str(caught.value) for part in message.split("|")), str(caught.value)
    assert (caught.value.rank, caught.value.index) == where


def test_names_outside_the_schedule():
    good = from_lists(OWN)
    for extra, message in (
        (Action(Kind.F, 0, 2), "microbatch 2; expected: microbatches 0 to 1"),
        (Action(Kind.W, 1, 0), "chunk 1"),
    ):
        with pytest.raises(ScheduleError) as caught:
            validate(replace(good, actions=((*good.actions[0], extra), good.actions[1])))
        assert message in str(caught.value) and (caught.value.rank, caught.value.index) == (0, 4)


def test_ranks_may_take_microbatches_in_orders_of_their_own():
    assert validate(from_lists([OWN[0], ["F1", "BW1", "F0", "BW0"]])) == (2, 1)


def test_the_neighbourhood_is_drawn():
    with pytest.raises(ScheduleError) as caught:
        validate(from_lists([OWN[0], ["F0", "BW0", "BW1", "F1"]]))
    assert str(caught.value).splitlines() == [
        "schedule own, rank 1, action 2: BW1 comes before F1; expected: F1 of this rank first",
        "position 0     1     2     3     4     5     6",
        "rank 0   F0    F1    BW0   BW1",
        "rank 1   F0    BW0   >BW1< F1",
    ]


@pytest.mark.parametrize("placement", (((0, 0), (0, 0)), ((0, 0),), ((0, 0), (2, 0)), ()))
def test_placements_that_do_not_hold_every_chunk_once(placement):
    with pytest.raises(ValueError, match="placement"):
        Schedule("own", 1, placement, ((), ()))


# ------------------------------------------------------------------------------------------------- transfers


def test_transfers_of_a_small_pipeline():
    schedule = schedules.one_f_one_b(2, 1)
    f, bw = Action(Kind.F, 0, 0), Action(Kind.BW, 0, 0)
    there, back = Transfer(0, f, 1, f), Transfer(1, bw, 0, bw)
    assert transfers(schedule) == (there, back)
    assert steps(schedule) == ((f, Send(there), Receive(back), bw), (Receive(there), f, bw, Send(back)))
    assert transfers(zbv(1, 3)) == ()  # the turn of the V stays on its rank


def run_in_threads(rows, seconds=20.0):
    """Every rank a thread; a send waits until its receive has taken it. Returns the ranks that came to an end."""
    box = {(s, t): (queue.Queue(), queue.Queue()) for s in range(len(rows)) for t in range(len(rows))}
    ended = []

    def run(rank):
        here = set()
        needed = {step.transfer.before for step in rows[rank] if isinstance(step, Receive)}
        for step in rows[rank]:
            if isinstance(step, Send):
                item, taken = box[rank, step.transfer.target]
                item.put(step.transfer)
                taken.get(timeout=seconds)
            elif isinstance(step, Receive):
                item, taken = box[step.transfer.source, rank]
                assert item.get(timeout=seconds) == step.transfer  # in order, without tags
                taken.put(None)
                here.add(step.transfer.before)
            else:
                assert step not in needed or step in here
        ended.append(rank)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(len(rows))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * seconds)
    return sorted(ended)


@pytest.mark.parametrize("name", SCHEDULES)
def test_steps_come_to_an_end_when_sends_wait_for_receives(name):
    for ranks, microbatches in ((2, 3), (4, 5), (4, 9)):
        assert run_in_threads(steps(SCHEDULES[name](ranks, microbatches))) == list(range(ranks))


def test_rendezvous_tells_steps_that_block_each_other():
    """1F1B with each send at once after its action and each receive just before blocks: both ranks want to send."""
    rows = steps(schedules.one_f_one_b(2, 2))
    assert rendezvous(rows) == [len(row) for row in rows]
    late = []
    for row in rows:
        receives = {step.transfer.before: step for step in row if isinstance(step, Receive)}
        late.append([s for step in row if not isinstance(step, Receive) for s in (receives.get(step), step) if s])
    reached = rendezvous(late)
    assert [str(late[rank][at].transfer.after) for rank, at in enumerate(reached)] == ["F1", "BW0"]
    dropped = [[s for s in rows[0] if not isinstance(s, Receive)], rows[1]]
    assert rendezvous(dropped)[1] < len(rows[1])


# ------------------------------------------------------------------------------------------------ simulation


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(SCHEDULES)), st.integers(1, 7),
    st.lists(st.floats(0, 9), min_size=9, max_size=9), st.floats(0, 3),
)  # fmt: skip
def test_starts_are_the_longest_paths(name, microbatches, costs, latency):
    """The same times from the graph alone: an action starts when the slowest way to it is done."""
    schedule = SCHEDULES[name](3, microbatches)
    timeline = simulate(schedule, Costs(costs[:3], costs[3:6], costs[6:], latency))
    events = {(rank, event.action): event for rank, row in enumerate(timeline.events) for event in row}
    stage_of = {place: stage for stage, place in enumerate(schedule.placement)}
    for rank, row in enumerate(schedule.actions):
        for position, action in enumerate(row):
            stage, m = stage_of[rank, action.chunk], action.microbatch
            bounds = [events[rank, row[position - 1]].stop] if position else [0.0]
            for (other, other_action), event in events.items():
                if other_action.microbatch != m:
                    continue
                where, kinds = stage_of[other, other_action.chunk], (action.kind[0], other_action.kind[0])
                after = kinds == ("F", "F") and where == stage - 1 or kinds == ("B", "B") and where == stage + 1
                after |= kinds == ("B", "F") and where == stage or kinds == ("W", "B") and where == stage
                if after:
                    bounds.append(event.stop + (latency if other != rank else 0.0))
            event = events[rank, action]
            assert event.start == pytest.approx(max(bounds))
            f, b, w = (costs[index + rank] / schedule.chunks for index in (0, 3, 6))
            assert event.stop - event.start == pytest.approx({"F": f, "B": b, "W": w, "BW": b + w}[action.kind])


def test_costs_of_each_virtual_stage_and_an_empty_w():
    schedule = zbv(2, 1)
    timeline = simulate(schedule, Costs(F=(1, 2, 3, 4), B=1, W=(0, 0), latency=10))
    events = {(rank, str(e.action)): (e.start, e.stop) for rank, row in enumerate(timeline.events) for e in row}
    assert events[0, "F0"] == (0, 1) and events[1, "F0"] == (11, 13) and events[1, "F0.1"] == (13, 16)
    assert events[0, "F0.1"] == (26, 30) and events[0, "B0.1"] == (30, 30.5) and events[0, "W0.1"] == (30.5, 30.5)
    assert timeline.makespan == events[0, "B0"][1] == 52
    with pytest.raises(ValueError, match="cost F has 3 numbers: legal are 1, one per rank"):
        simulate(schedule, Costs(F=(1, 2, 3)))
    with pytest.raises(ValueError, match="wait for each other"):
        simulate(from_lists([["F0", "BW0"], ["BW0", "F0"]]))


@pytest.mark.parametrize("text", ("X=1", "F=1,F=2", "F=one", "F=-1", "F=nan", "latency=1/2", "F", ""))
def test_costs_that_are_none(text):
    with pytest.raises(ValueError, match="cost"):
        Costs.parse(text)


def test_costs_from_text():
    assert Costs.parse("F=18.5, B=18.1,W=9.3,latency=0.6") == Costs(18.5, 18.1, 9.3, 0.6)
    assert Costs.parse("F=1/2/3") == Costs(F=(1, 2, 3))


# ---------------------------------------------------------------------------------------- files and pictures


@pytest.mark.parametrize("name", SCHEDULES)
def test_csv_there_and_back(name, tmp_path):
    schedule = SCHEDULES[name](3, 4)
    write_csv(schedule, tmp_path / f"{name}.csv")
    assert read_csv(tmp_path / f"{name}.csv") == schedule


def test_csv_by_hand(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text("F0, F1,,BW0,BW1\n\n F0,BW0 ,F1,BW1\n")
    schedule = read_csv(path)
    assert schedule == from_lists(OWN) and schedule.placement == loop_placement(2) and validate(schedule) == (2, 1)
    for text, message in (
        ("F0,X1\n", "action 'X1'"),
        ("placement,0\nF0\n", "placement row"),
        ("", "at least one action"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_csv(path)


def test_pictures_are_well_formed(tmp_path):
    planned = simulate(zbv(3, 5), Costs(2, 2, 1, 0.25))
    late = tuple(tuple(Event(e.action, 100 + 1.1 * e.start, 100 + 1.2 * e.stop) for e in row) for row in planned.events)
    measured = Timeline("measured <run>", late)
    count = sum(map(len, planned.events))
    for timelines in ((planned,), (planned, measured)):
        for suffix in ("svg", "png", "json", "txt"):
            draw.save(tmp_path / f"out.{suffix}", *timelines)
        root = ElementTree.parse(tmp_path / "out.svg").getroot()
        bars = root.findall("{http://www.w3.org/2000/svg}g")
        assert len(bars) == count * len(timelines)
        for bar in bars:
            rect = bar.find("{http://www.w3.org/2000/svg}rect")
            assert draw.LEFT <= float(rect.get("x")) and float(rect.get("x")) + float(rect.get("width")) < float(
                root.get("width")
            )
        assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG\r\n")
        events = json.loads((tmp_path / "out.json").read_text())["traceEvents"]
        ran = [event for event in events if event["ph"] == "X"]
        assert len(ran) == count * len(timelines) and all(
            min(event["ts"] for event in ran if event["pid"] == index) == 0 for index in range(len(timelines))
        )
        assert {event["pid"] for event in ran} == set(range(len(timelines)))
        text = (tmp_path / "out.txt").read_text()
        assert text.count("rank 2 |") == len(timelines) and "F4.1" in text
    with pytest.raises(ValueError, match=r"legal are \.svg, \.png"):
        draw.save(tmp_path / "out.gif", planned)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_grid_shows_every_action_in_order(name):
    schedule = SCHEDULES[name](4, 6)
    for costs in (Costs(), Costs(3, 2, 0.7, 0.4), Costs(1, 1, 0)):
        for row, line in zip(schedule.order, draw.grid(simulate(schedule, costs)).splitlines(), strict=True):
            assert tuple(cell for cell in line.split(" | ")[1].split() if cell not in ".-") == row


# -------------------------------------------------------------------------------------------------------- CLI


def test_cli_shows_several_schedules_and_what_a_run_measured(tmp_path, capsys):
    path = tmp_path / "several.svg"
    several = "pipeline --schedule gpipe,zb_h1 --stages 2 --microbatches 4 --draw"
    assert cli.main([*several.split(), str(path)]) == 0
    assert capsys.readouterr().out.count("bubble") == 2 and path.read_text().count("rank 1") == 2
    schedule = build("zb_h1", 2, 4)
    late = simulate(schedule, Costs(2.0, 3.0, 1.0, latency=0.5))  # a run whose transfers take half a second
    measured.write(tmp_path / "run.json", schedule, late)
    assert measured.read(tmp_path / "run.json") == (schedule, Timeline("zb_h1, measured", late.events))
    assert cli.main(["pipeline", "--measured", str(tmp_path / "run.json"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    planned = simulate(schedule, Costs(2.0, 3.0, 1.0))
    assert (found["makespan"], found["bubble"]) == (planned.makespan, planned.bubble)
    assert (found["measured_makespan"], found["measured_bubble"]) == (late.makespan, late.bubble)


def test_cli_prints_one_json_object(capsys):
    line = (
        "pipeline --schedule zb_h1 --stages 8 --microbatches 24 --cost F=18.522,B=18.086,W=9.337,latency=0.601 --json"
    )
    assert cli.main(line.split()) == 0
    found = json.loads(capsys.readouterr().out)
    assert round(found["bubble"], 4) == 0.1585 and found["peak_in_flight"] == [8] * 8
    assert found["makespan"] > 24 * 45.9 and found["order"][7][:3] == ["F0", "B0", "F1"]


@pytest.mark.parametrize("name", SCHEDULES)
def test_cli_shows_and_draws(name, tmp_path, capsys):
    line = f"pipeline --schedule {name} --stages 2 --microbatches 4 --draw"
    for suffix in ("svg", "csv"):
        assert cli.main([*line.split(), str(tmp_path / f"out.{suffix}")]) == 0
        assert "rank 1 |" in capsys.readouterr().out
    ElementTree.parse(tmp_path / "out.svg")
    assert cli.main(["pipeline", "--csv", str(tmp_path / "out.csv"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["order"] == [list(row) for row in SCHEDULES[name](2, 4).order]


@pytest.mark.parametrize(
    ("line", "message"),
    (
        ("--schedule nope --stages 2 --microbatches 2", "schedule 'nope': legal are"),
        ("--schedule zbv --stages 2", "--schedule needs --stages and --microbatches"),
        ("--schedule zbv --stages 2 --microbatches 0", "microbatches = 0"),
        ("--schedule zbv --stages 2 --microbatches 2 --cost F=x", "cost 'F=x': not a number"),
        ("--schedule zbv --stages 2 --microbatches 4 --memory-limit 1", "zbv keeps 2 activations"),
        ("--schedule zbv --stages 2 --microbatches 4 --draw out.gif", "out.gif: legal are"),
        ("--csv missing.csv", "No such file"),
        ("--csv missing.csv --chunks 2", "--chunks does not go with --csv"),
        ("--measured missing.json --cost F=1", "--cost does not go with --measured"),
        ("--measured missing.json", "No such file"),
        ("--schedule zbv,gpipe --stages 2 --microbatches 4 --json", "of one schedule, --schedule names 2"),
    ),
)
def test_cli_says_what_is_wrong_in_one_line(line, message):
    with pytest.raises(SystemExit) as caught:
        cli.main(["pipeline", *line.split()])
    assert message in str(caught.value.code) and "\n" not in str(caught.value.code)
