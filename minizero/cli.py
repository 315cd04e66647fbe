"""The verbs of `minizero`: train, doctor, pipeline, checkpoint, export, verify-resume."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import platform
import shlex
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch.distributed import DistError
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError

from minizero.checkpoint.verbs import add_checkpoint, add_export, checkpoint_verb, export_verb
from minizero.config import Config, ConfigError
from minizero.config.load import load
from minizero.kernels.backend import obstacle
from minizero.kernels.check import check_all
from minizero.parallel.pipeline import measured
from minizero.parallel.pipeline.actions import Schedule, read_csv, write_csv
from minizero.parallel.pipeline.draw import caption, grid, save
from minizero.parallel.pipeline.schedules import SCHEDULES, build
from minizero.parallel.pipeline.simulate import Costs, Timeline, simulate
from minizero.parallel.pipeline.validate import validate
from minizero.run_folder import INTERRUPTED, REQUEUE, finished_steps, say_finished
from minizero.utils.versions import installed
from minizero.verify_resume import verify_resume

PACKAGES = (
    "minizero",
    "torch",
    "triton",
    "numpy",
    "pydantic",
    "tokenizers",
    "safetensors",
    "transformers",
    "deepspeed",
)

WIDEST_GRID = 240
"""Characters of a line; a wider grid is not printed (`--draw FILE.txt` writes it)."""


def main(arguments: list[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    parser = argparse.ArgumentParser(prog="minizero", description="ZeRO training on torch.distributed.")
    parser.add_argument("--version", action="version", version=f"minizero {installed('minizero')}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    usage = "minizero train CONFIG [--nproc N] [--max-restarts N] [--json] [--a.b VALUE ...]"
    usage += "   (settings: python -m minizero.train --help)"
    train = verbs.add_parser("train", help="show the torchrun line, or run it", allow_abbrev=False, usage=usage)
    train.add_argument("config", help="TOML or JSON file; further --a.b VALUE override its settings")
    train.add_argument("--nproc", help="run on this many processes here; `auto`: one per GPU, or 2 on CPUs")
    train.add_argument("--max-restarts", type=int, default=0, metavar="N", help="of all ranks, after one has died (0)")
    train.add_argument("--json", action="store_true", help="print one JSON object: the summary of the run, or the line")

    resume = verbs.add_parser("verify-resume", help="kill a run, continue it, compare bit by bit", allow_abbrev=False)
    resume.add_argument("config", help="TOML or JSON file; further --a.b VALUE override its settings")
    resume.add_argument("--nproc", help="processes; `auto`: one per GPU, or 2 on CPUs")
    resume.add_argument("--n", type=int, default=3, metavar="N", help="killed after N of 2N steps (3)")
    resume.add_argument("--json", action="store_true", help="print one JSON object")

    doctor = verbs.add_parser("doctor", help="show versions, devices, backends, and run every kernel")
    doctor.add_argument("--json", action="store_true", help="print one JSON object")

    add_pipeline(verbs)
    add_checkpoint(verbs)
    add_export(verbs)

    known, overrides = parser.parse_known_args(arguments)
    if known.verb == "train":
        return train_verb(known, overrides)
    if known.verb == "verify-resume":
        return verify_resume_verb(known, overrides)
    if overrides:
        parser.error(f"unknown arguments: {' '.join(overrides)}")
    if known.verb == "checkpoint":
        return checkpoint_verb(known)
    if known.verb == "export":
        return export_verb(known)
    return pipeline_verb(known) if known.verb == "pipeline" else doctor_verb(known.json)


def train_verb(options: argparse.Namespace, overrides: list[str]) -> int:
    """Print the torchrun line, or with `--nproc` run it; returns the exit code."""
    config: str = options.config
    processes = default_processes() if options.nproc in (None, "auto") else _positive(options.nproc)
    settings = None
    try:
        resolved = load(config, overrides)
    except ConfigError:
        pass  # the run says it, as it says all else
    else:
        if multiplies_bf16_fast() and resolved.origins["precision"] == "default":
            overrides = ["--precision", "bf16", *overrides]
        settings = resolved.config
    launcher = [*placement(), "--nproc-per-node", str(processes)]
    if options.max_restarts:
        launcher += ["--max-restarts", str(options.max_restarts)]
    arguments = [*launcher, "-m", "minizero.train", config, *overrides]
    line = shlex.join(["torchrun", *arguments])
    if options.nproc is None:
        print(json.dumps({"command": line}) if options.json else line)
        return 0
    if not options.json:
        print(line, flush=True)
        return launch_unless_finished(arguments, processes, settings)
    with contextlib.redirect_stdout(sys.stderr), everything_to_stderr():
        code = launch_unless_finished(arguments, processes, settings)
    summary = Path(resolved.config.run.dir) / "summary.json" if code == 0 else None
    print(json.dumps({"command": line, "exit_code": code, **(json.loads(summary.read_text()) if summary else {})}))
    return code


def placement() -> list[str]:
    """torchrun's options for one machine, unless the environment names several nodes.

    torchrun reads every option also from PET_*, which `launch/multinode.sh` and Kubeflow's Trainer set. It looks this
    host's own name up, and where nobody knows that (some containers), it would wait for a quarter of an hour.
    """
    if "PET_NNODES" in os.environ:
        return []
    try:
        socket.getaddrinfo(socket.getfqdn(), None)
    except OSError:
        return ["--standalone", "--local-addr", "127.0.0.1"]
    return ["--standalone"]


def written(file: Path) -> int:
    """When `file` was written, in nanoseconds; 0 where there is none."""
    return file.stat().st_mtime_ns if file.is_file() else 0


def launch_unless_finished(arguments: list[str], processes: int, config: Config | None) -> int:
    """The exit code of a run: 0 if it is finished, though a signal came last; `REQUEUE` if one stopped it, saved.

    A finished run needs no ranks, for which a node that comes back would wait in vain if the others have left. And a
    word that was left by an earlier start is not this one's: a run that cannot begin must not ask to be started again
    for ever.
    """
    if config is None:
        return launch(arguments, processes)
    folder = Path(config.run.dir)
    if steps := finished_steps(folder, config):
        say_finished(folder, steps)
        return 0
    earlier = written(folder / INTERRUPTED)
    code = launch(arguments, processes)
    if code and finished_steps(folder, config):
        return 0
    return REQUEUE if code and written(folder / INTERRUPTED) > earlier else code


def verify_resume_verb(options: argparse.Namespace, overrides: list[str]) -> int:
    """Say whether a killed and continued run is the same; returns the exit code."""
    processes = default_processes() if options.nproc in (None, "auto") else _positive(options.nproc)
    with tempfile.TemporaryDirectory(prefix="minizero-") as folder:
        try:
            lines = verify_resume(options.config, processes, options.n, Path(folder), overrides)
        except (RuntimeError, OSError) as error:
            raise SystemExit(f"minizero verify-resume: {error}") from None
    if options.json:
        print(json.dumps({"steps": 2 * options.n, "killed_after": options.n, "differences": lines}))
    else:
        same = f"the same, bit by bit: {2 * options.n} steps, and {options.n}, a kill, and {options.n} more"
        print("\n".join(lines) or same)
    return 1 if lines else 0


@contextlib.contextmanager
def everything_to_stderr() -> Iterator[None]:
    """What child processes print goes to stderr: stdout is for the one JSON object."""
    sys.stdout.flush()
    before = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(before, 1)
        os.close(before)


def default_processes() -> int:
    """One process per visible GPU, or two on CPUs."""
    return torch.cuda.device_count() or 2


def multiplies_bf16_fast() -> bool:
    """Whether this machine has instructions for bf16 products: any GPU, and CPUs with AVX512-BF16 or AMX."""
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text() if cpu.exists() else ""
    return torch.cuda.is_available() or "avx512_bf16" in flags or "amx_bf16" in flags


def launch(arguments: list[str], processes: int) -> int:
    """Run torchrun in this process, without the tracebacks that it adds to what the ranks have said themselves."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // processes, 1)))
    os.environ.setdefault("PET_SHUTDOWN_TIMEOUT", os.environ.get("GRACE", "120"))  # seconds to save: 30 are few
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")  # all are passed on
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        torchrun.main(arguments)
    except ChildFailedError as error:
        for rank, failure in error.failures.items():
            if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:  # torchrun itself sends SIGTERM
                print(f"minizero: rank {rank} was killed by {failure.signal_name()}", file=sys.stderr)
        return 1
    except SignalException as error:
        return 128 + error.sigval
    except (RendezvousError, DistError) as error:  # between attempts: the node with the store is gone, or nobody comes
        print(f"minizero: the nodes cannot find one another: {error}", file=sys.stderr)
        return 1
    return 0


def doctor_verb(as_json: bool) -> int:
    """Print what this machine offers."""
    report = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed(name) for name in PACKAGES},
        "cpu_cores": os.cpu_count(),
        "cpu_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "backends": [name for name in ("gloo", "nccl") if torch.distributed.is_backend_available(name)],
        "default": f"{default_processes()} processes over {'nccl' if torch.cuda.is_available() else 'gloo'}",
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kernels = check_all(device)
    if as_json:
        print(json.dumps(report | {"kernels": {name: asdict(outcome) for name, outcome in kernels.items()}}))
        return 0
    for name, value in report.items():
        text = ", ".join(f"{k} {v or '-'}" for k, v in value.items()) if isinstance(value, dict) else value
        print(f"{name:<12}{', '.join(text) or 'none' if isinstance(text, list) else text}")
    print("kernels     " + (f"in torch: {obstacle(device)}" if obstacle(device) else "in Triton"))
    for name, outcome in kernels.items():
        verdict = "agrees with" if outcome.agrees else "DIFFERS from"
        print(f"  {name:<22}{outcome.runs:<8} {verdict} its reference in float64 ({outcome.error:.0e})")
    return 0 if all(outcome.agrees for outcome in kernels.values()) else 1


def add_pipeline(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The arguments of `minizero pipeline`."""
    pipeline = verbs.add_parser("pipeline", help="prove, time and draw a pipeline schedule", allow_abbrev=False)
    source = pipeline.add_mutually_exclusive_group(required=True)
    source.add_argument("--schedule", help=f"{', '.join(SCHEDULES)}; or several, to see them under one scale of time")
    source.add_argument("--csv", metavar="FILE", help="your own: a row of actions per rank, such as F0,F1,BW0,BW1")
    source.add_argument("--measured", metavar="FILE", help="pipeline.json of a run: what it planned beside what it did")
    pipeline.add_argument("--stages", type=int, metavar="P", help="ranks, each with one stage")
    pipeline.add_argument("--microbatches", type=int, metavar="M")
    pipeline.add_argument("--chunks", type=int, metavar="V", help="chunks per rank (interleaved: 2 unless given)")
    pipeline.add_argument("--cost", default="", metavar="F=..,B=..,W=..,latency=..", help="1, 1, 1 and 0 unless given")
    pipeline.add_argument("--memory-limit", type=float, metavar="N", help="activations of a whole stage on any rank")
    pipeline.add_argument("--kept", type=float, metavar="SHARE", help="zb_auto: of an activation, between B and W")
    pipeline.add_argument("--draw", metavar="FILE", help=".svg, .png, .json (trace), .txt (grid) or .csv (for --csv)")
    pipeline.add_argument("--json", action="store_true", help="print one JSON object")


def pipeline_verb(options: argparse.Namespace) -> int:
    """Prove, simulate and show a schedule; returns the exit code."""
    try:
        (schedule, *others), timelines = schedules_and_timelines(options)
        peak = validate(schedule)
        for other in others:
            validate(other)
        as_csv = options.draw is not None and Path(options.draw).suffix == ".csv"
        if others and (options.json or as_csv):
            raise ValueError(f"--json and .csv are of one schedule, --schedule names {1 + len(others)}")
        if as_csv:
            write_csv(schedule, options.draw)
        elif options.draw:
            save(options.draw, *timelines)
    except (ValueError, OSError) as error:
        raise SystemExit(f"minizero pipeline: {error}") from None
    if options.json:
        found = {"schedule": schedule.name, "ranks": schedule.ranks, "chunks": schedule.chunks}
        found |= {"microbatches": schedule.microbatches, "peak_in_flight": peak, "order": schedule.order}
        found |= {"bubble": timelines[0].bubble, "makespan": timelines[0].makespan}
        if options.measured:
            found |= {"measured_bubble": timelines[1].bubble, "measured_makespan": timelines[1].makespan}
        print(json.dumps(found))
        return 0
    for timeline in timelines:
        print(caption(timeline))
        picture = grid(timeline)
        if max(map(len, picture.splitlines())) <= WIDEST_GRID:
            print(picture)
    return 0


def schedules_and_timelines(options: argparse.Namespace) -> tuple[list[Schedule], list[Timeline]]:
    """The schedules that were asked for, simulated; of a run, what was planned from its costs and what was measured.

    Raises ValueError for options that do not go together.
    """
    costs = Costs.parse(options.cost) if options.cost else Costs()
    fixed = [name for name in ("stages", "microbatches") if getattr(options, name) is not None]
    others = [name for name in ("chunks", "memory_limit", "kept") if getattr(options, name) is not None]
    if options.measured or options.csv:
        others += ["cost"] if options.measured and options.cost else []
        if fixed + others:
            source = "measured" if options.measured else "csv"
            raise ValueError(
                f"--{(fixed + others)[0].replace('_', '-')} does not go with --{source}: the file says it all"
            )
        if options.measured:
            schedule, timeline = measured.read(options.measured)
            return [schedule], [measured.planned(schedule, timeline), timeline]
        schedules = [read_csv(options.csv)]
    elif len(fixed) < 2:
        raise ValueError("--schedule needs --stages and --microbatches")
    else:
        size = (options.stages, options.microbatches, options.chunks)
        names = options.schedule.split(",")
        schedules = [build(name, *size, costs, options.memory_limit, options.kept) for name in names]
    return schedules, [simulate(schedule, costs) for schedule in schedules]


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise SystemExit(f"minizero train: --nproc is {text!r}; legal: auto, or a number from 1")
    return int(text)
