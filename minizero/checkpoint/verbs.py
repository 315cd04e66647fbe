"""`minizero checkpoint ls | inspect | verify | diff | export`: what a person asks of a folder."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from minizero.checkpoint.export import export_hf
from minizero.checkpoint.files import CheckpointError
from minizero.checkpoint.inspect import describe, diff, listing, resolve, verify
from minizero.checkpoint.manifest import Layout
from minizero.zero.policy import DTYPES

VERBS = {
    "ls": "the checkpoints of a folder or run, newest first",
    "inspect": "what a checkpoint holds",
    "verify": "read every byte, and compare it with its checksum",
    "diff": "where two checkpoints differ, whatever layouts wrote them",
}


def add_checkpoint(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The arguments of `minizero checkpoint`."""
    checkpoint = verbs.add_parser("checkpoint", help="list, look at, verify and compare checkpoints")
    inner = checkpoint.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, text in VERBS.items():
        action = inner.add_parser(name, help=text, description=text)
        action.add_argument("path", type=Path, help="a checkpoint, a folder of them, or a run")
        if name == "diff":
            action.add_argument("other", type=Path)
        action.add_argument("--json", action="store_true", help="print one JSON object")
    add_export(inner)


def add_export(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The arguments of `minizero export`, which is `minizero checkpoint export` too."""
    export = verbs.add_parser("export", help="write a checkpoint as a folder of HuggingFace's", allow_abbrev=False)
    export.add_argument("path", type=Path, help="a checkpoint, a folder of them, or a run")
    export.add_argument("out", type=Path, help="the new folder")
    export.add_argument("--format", choices=["hf"], default="hf", help="hf: safetensors, config.json, tokenizer files")
    export.add_argument(
        "--dtype", choices=[*DTYPES], help="of the weights; that in which the run computed unless given"
    )
    export.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of one file: 5GB unless given")
    export.add_argument(
        "--tokenizer", type=Path, metavar="PATH", help="tokenizer.json or folder; the run's unless given"
    )


def checkpoint_verb(options: argparse.Namespace) -> int:
    """Do it; returns the exit code: 1 for damage, and for checkpoints that differ."""
    if options.action == "export":
        return export_verb(options)
    try:
        return {"ls": _ls, "inspect": _inspect, "verify": _verify, "diff": _diff}[options.action](options)
    except CheckpointError as error:
        if options.json:
            print(json.dumps({"problem": str(error)}))
        else:
            print(f"minizero checkpoint: {error}")
        return 1


def export_verb(options: argparse.Namespace) -> int:
    """Write the folder and say what is in it; returns the exit code."""
    more = {"dtype": options.dtype, "max_shard_size": options.max_shard_size, "tokenizer": options.tokenizer}
    try:
        print("\n".join(export_hf(options.path, options.out, **more)))
    except (ValueError, OSError, CheckpointError) as error:
        raise SystemExit(f"minizero export: {error}") from None
    return 0


def _ls(options: argparse.Namespace) -> int:
    rows = listing(options.path)
    if options.json:
        print(json.dumps({"checkpoints": rows}))
        return 0
    if not rows:
        raise CheckpointError(f"{options.path} holds no checkpoint")
    for row in rows:
        told = row["problem"] or f"step {row['step']:>8,}  {row['bytes'] / 1e6:>10,.1f} MB  {Layout(**row['layout'])}"
        print(f"{'*' if row['latest'] else ' '} {row['tag']:<24} {told}")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    said = describe(resolve(options.path))
    if options.json:
        print(json.dumps(said))
        return 0
    print(f"{said['path']}: step {said['counters']['global_steps']:,}, {said['bytes']:,} bytes, {said['optimizer']}")
    print(f"written by {Layout(**said['layout'])}, torch {said['versions']['torch']}")
    for name, facts in said["parameters"].items():
        print(f"  {name:<48} {facts['shape']!s:<16} {' '.join(facts['kinds'])}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    path = resolve(options.path)
    manifest = verify(path)
    said = {"path": str(path), "files": len(manifest.files), "bytes": manifest.bytes, "problem": None}
    print(json.dumps(said) if options.json else f"{path} is whole: {said['files']} files, {said['bytes']:,} bytes")
    return 0


def _diff(options: argparse.Namespace) -> int:
    lines = diff(resolve(options.path), resolve(options.other))
    print(json.dumps({"differences": lines}) if options.json else "\n".join(lines) or "the same")
    return 1 if lines else 0
