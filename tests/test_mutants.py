# ruff: noqa: E501
"""Our own code, broken on purpose: each mutant of what keeps runs safe must be killed by a test (`make soak`)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMIT, LAYOUTS = "test_checkpoint_commit.py", "test_checkpoint_layouts.py"
INTEGRITY, MATRIX, RESUME = "test_checkpoint_integrity.py", "test_matrix.py", "test_checkpoint.py"

# name: (file, what is replaced, by what, the test that must turn red)
MUTANTS: dict[str, tuple[str, str, str, str]] = {
    "files are not synced": ("checkpoint/tensor_file.py", "        os.fsync(file.fileno())\n", "", f"{COMMIT} -k before_it"),
    "the manifest is not synced": (
        "checkpoint/files.py", "        file.flush()\n        os.fsync(file.fileno())\n", "", f"{COMMIT} -k before_it"),
    "the folder is not synced after the rename": (
        "checkpoint/files.py", "        os.rename(temporary, final)\n        sync(final.parent)\n",
        "        os.rename(temporary, final)\n", f"{COMMIT} -k before_it"),
    "latest comes before the checkpoint": (
        "checkpoint/save.py", "        move_into_place(self.temporary, self.folder / self.tag)\n        if self.latest:\n"
        "            write_atomically(self.folder / LATEST, self.tag)\n",
        "        if self.latest:\n            write_atomically(self.folder / LATEST, self.tag)\n"
        "        move_into_place(self.temporary, self.folder / self.tag)\n", f"{COMMIT} -k before_it"),
    "files are written under their last name": (
        "checkpoint/save.py", 'temporary=folder / f".{tag}.tmp-{tokens[0]}"', "temporary=folder / tag",
        f"{COMMIT} -k before_it"),
    "ranks do not wait for each other's files": (
        "checkpoint/save.py", "            files = everyone(self.comm, self.device, self._write, is_slow=True)\n",
        "            files = [self._write()] * self.comm.size\n", f"{RESUME} -k bitwise"),
    "an update does not wait for the copy": (
        "engine.py", "            self._background.give_back()\n", "", f"{COMMIT} -k asked_at"),
    "a tensor changes while it is written": (
        "checkpoint/save.py", "            return self._one[", "            return values\n            return self._one[", f"{COMMIT} -k asked_at"),
    "changed weights are saved": (
        "checkpoint/save.py", "            if values._version != version:\n                raise",
        "            if False:\n                raise", f"{COMMIT} -k that_change"),
    "moments are not saved": (
        "checkpoint/state.py", "                    tensors[key] = value\n", "", f"{RESUME} -k bitwise"),
    "step numbers of the optimizer are not loaded": (
        "checkpoint/load.py", "                slot[key] = kept.tensor() if isinstance(kept, Scalar) else kept\n",
        "                slot[key] = torch.tensor(0.0)\n", f"{RESUME} -k bitwise"),
    "random states are not loaded": ("checkpoint/load.py", "            torch.set_rng_state(values)\n", "            pass\n",
                                     f"{RESUME} -k bitwise"),
    "the first rank's random state is everybody's": (
        "checkpoint/load.py", "    rank = state.world.rank if saved == here else 0\n", "    rank = 0\n", f"{MATRIX} -k row"),
    "the loss scale is not loaded": (
        "checkpoint/load.py", "        state.optimizer.scaler.load_state_dict(manifest.scaler.model_dump())\n", "", f"{RESUME} -k scale"),
    "the schedule is not loaded": (
        "checkpoint/load.py", "        state.scheduler.load_state_dict(as_here(manifest.scheduler, state.scheduler.state_dict()))\n", "        pass\n",
        f"{RESUME} -k bitwise"),
    "samples are not counted on": (
        "engine.py", "        self.global_steps, self.global_samples = counters.global_steps, counters.global_samples\n",
        "        self.global_steps = counters.global_steps\n", f"{LAYOUTS} -k gpt2"),
    "the manifest's checksum is not compared": (
        "checkpoint/manifest.py", "frame is None or xxhash.xxh3_128_hexdigest(frame[2]).encode() != frame[1]",
        "frame is None", f"{INTEGRITY} -k flipped"),
    "files' checksums are not compared": ("checkpoint/load.py", "    if found != wanted:\n", "    if False:\n",
                                          f"{INTEGRITY} -k named"),
    "what does not belong is not seen": (
        "checkpoint/files.py", "        names = sorted(os.listdir(folder))\n", "        names = []\n",
        f"{INTEGRITY} -k named"),
    "names may lead elsewhere": ("checkpoint/manifest.py", "    if not SAFE_NAME.fullmatch(name):\n", "    if False:\n",
                                 f"{INTEGRITY} -k leave"),
    "copies are written twice": (
        "checkpoint/state.py", "            writes = group.counts and rank == self.comm.rank",
        "            writes = rank == self.comm.rank", f"{LAYOUTS} -k names1"),
    "ranges along a dim are taken for one": (
        "dist/boxes.py", "            reached += end - begin\n", "            reached += end\n", "test_boxes.py"),
    "a restart takes the last one's name": (
        "dist/rendezvous.py", '    word = uuid.uuid4().hex\n', '    word = "attempt"\n', "test_rendezvous.py"),
    "a step with nan is applied": (
        "zero/optimizer.py", "        is_finite = math.isfinite(norm) and", "        is_finite = True or", "test_engine.py -k nan_losses"),
    "pruning comes before the commit": (
        "checkpoint/save.py", "        body = json.dumps(",
        "        prune(self.folder, self.tag, self.retention.keep or 9)\n        body = json.dumps(", f"{COMMIT} -k before_it"),
    "what a rolled back run left is counted": (
        "checkpoint/files.py", " if own is None or step <= int(own[1])]", "]", f"{INTEGRITY} -k rolled_back"),
    "a slow disk is a dead rank": (
        "checkpoint/load.py", "everyone(state.world, state.runtime.device, check, is_slow=True)",
        "everyone(state.world, state.runtime.device, check)", f"{RESUME} -k slow_disk"),
    "a save in the background has what its caller has later": (
        "checkpoint/save.py", "            header[key] = json.loads(json.dumps(value))", "            json.dumps(value)",
        f"{COMMIT} -k asked_at"),
    "what our models do not have is read over": (
        "models/hf.py", "if name in config and config[name] not in legal:", "if False:", "test_hf.py -k what_our_models"),
    "gradients of heads' norms are not summed": (
        "models/llama.py", '        "model.layers.*.self_attn.k_norm": "partial",\n', "", "test_layouts.py -k qwen3"),
    "a model is filled again": (
        "api.py", "folder, model.pretrained = model.pretrained, None", "folder = model.pretrained", "test_hf.py -k filled_once"),
    "an export is rounded": (
        "checkpoint/export.py", "path, manifest, DTYPES[precision], limit)", "path, manifest, DTYPES['bf16'], limit)",
        "test_hf.py -k same_bits"),
    "an export leaves its half behind": (
        "checkpoint/export.py", "        shutil.rmtree(temporary, ignore_errors=True)\n", "", "test_hf.py -k whole_or_not"),
}  # fmt: skip


@pytest.mark.soak
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_killed(tmp_path, name):
    file, old, new, selection = MUTANTS[name]
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv", ".git", "runs", "__pycache__", "results"))
    path = copy / "minizero" / file
    text = path.read_text()
    assert text.count(old) == 1, f"{file} has {text.count(old)} places to mutate"
    path.write_text(text.replace(old, new))
    test, *more = selection.split(" ", 1)
    command = [sys.executable, "-m", "pytest", "-q", "-x", f"tests/{test}", *(more[0].split() if more else [])]
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, f"it lives: {done.stdout[-500:]}{done.stderr[-500:]}"


def test_every_mutant_has_one_place():
    """Cheap enough for every run: a mutant that cannot be made any more would kill nothing."""
    for name, (file, old, *_) in MUTANTS.items():
        assert (ROOT / "minizero" / file).read_text().count(old) == 1, name
