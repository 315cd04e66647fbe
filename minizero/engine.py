"""The engine: one model, one optimizer, one accumulation window.

It has DeepSpeed's surface, so that `import minizero as deepspeed` is all a script needs to change:

    loss = engine(batch); engine.backward(loss); engine.step()     # or engine.train_batch(iterator)

`backward` divides a mean loss by the accumulation steps; `step` does nothing off the boundary. A loss may also be a
pair (sum over tokens, number of tokens): gradients are then divided once, by the tokens of the whole global batch,
which is exact for ragged batches where a mean of means is not.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_map

from minizero.checkpoint.load import load_state
from minizero.checkpoint.manifest import Counters, Layout
from minizero.checkpoint.save import KEEP_ALL, Background, Retention, prepare
from minizero.checkpoint.state import TrainingState, everyone
from minizero.checkpoint.weights import load_weights, save_weights
from minizero.config import Config
from minizero.config.batch import BatchSizes
from minizero.config.deepspeed import to_deepspeed
from minizero.dist.collectives import CollectiveError, Communicator
from minizero.models.dropout import hash_samples
from minizero.observe.log import EngineLog
from minizero.observe.watchdog import Watchdog
from minizero.parallelize import Parallelized
from minizero.pipelined import Pipelined
from minizero.utils.forward import ForwardEntry, forward_of, samples
from minizero.utils.losses import Loss, arguments, checked, loss_and_count, loss_of
from minizero.utils.warnings import warn_once
from minizero.zero.optimizer import StepResult, Window, ZeroOptimizer
from minizero.zero.policy import DTYPES
from minizero.zero.replicas import check_replicas
from minizero.zero.runtime import ZeroRuntime


class Engine:
    """Made by `minizero.initialize`; every method is called on every rank.

    Attributes:
        module: the model. optimizer: its sharded optimizer. lr_scheduler: stepped after each applied step, or None.
        settings: the `Config`. device, mesh, dp_rank, dp_size: where this rank runs. ledger: counts communication.
        global_steps: boundaries passed. global_samples: sequences consumed. skipped_steps: of those steps, the skipped.
        micro_steps: backward passes.
    """

    def __init__(
        self,
        *,
        module: nn.Module,
        optimizer: ZeroOptimizer,
        lr_scheduler: Any,
        runtime: ZeroRuntime,
        comm: Communicator,
        world: Communicator,
        mesh: DeviceMesh,
        batch: BatchSizes,
        config: Config,
        entry: ForwardEntry,
        num_parameters: int,
        dataloader: Any = None,
        stages: Parallelized | None = None,
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.runtime = runtime
        self.comm, self.world = comm, world
        self.mesh = mesh
        self.ledger = comm.ledger
        self.batch = batch
        self.settings = config
        self.device = runtime.device
        self.cp_size = config.parallel.cp
        self.dp_rank, self.dp_size = comm.rank // self.cp_size, comm.size // self.cp_size
        self.training_dataloader = dataloader
        self.entry = entry
        self.global_steps = self.global_samples = self.skipped_steps = self.micro_steps = 0
        self.result: StepResult | None = None
        self.log = EngineLog(config.log, enabled=torch.distributed.get_rank() == 0)
        self._boundary: bool | None = None  # set by the user; None means the engine counts
        self._step_pending = False  # between a backward and its step
        self._synchronize = True
        self._iterator: Iterator[Any] | None = None
        self._compares_inputs = config.parallel.tp * config.parallel.cp * config.parallel.pp > 1
        self._num_parameters = num_parameters
        self._background = Background(world.apart)
        self._watchdog = Watchdog(self.ledger, torch.distributed.get_rank(), config.dist.step_timeout)
        self.pipeline: Pipelined | None = None
        if stages is not None and stages.stage is not None:
            call = lambda batch: self._call(*arguments(self._on_device(batch)))  # noqa: E731
            self.pipeline = Pipelined.of(stages, runtime, config, call, self._seed_of, entry.history)

    # ---- one micro-batch ----

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward; float inputs are cast to the compute dtype."""
        self._refuse_in_pipeline("engine(batch)", "train_batch(data_iter), eval_batch(data_iter) or infer(batches)")
        if self._compares_inputs:
            self._compare_inputs((args, kwargs))
        phase = "forward" if self.module.training else "eval"
        with self._watchdog.watch(phase), self.ledger.phase(phase), self.log.timer("forward"):
            try:
                return self._call(args, kwargs)
            except Exception as error:  # not an interrupt: unwinding waits for peers, which are being interrupted too
                self._unless_alone(error, self.runtime.unwind)
                raise

    forward = __call__

    def _unless_alone(self, error: Exception, to_rest: Callable[[], None]) -> None:
        """Bring the runtime `to_rest` after `error`, for whoever goes on; not where peers do not answer.

        Each collective under way would wait for them as long as the first one did, and this rank is to end.
        """
        if not isinstance(error, CollectiveError):
            with suppress(CollectiveError):  # the first one says more
                to_rest()

    def _call(self, args: Any, kwargs: Any) -> Any:
        return self.module(*tree_map(self._to_compute, args), **tree_map(self._to_compute, kwargs))

    def _refuse_in_pipeline(self, what: str, legal: str) -> None:
        if self.pipeline is not None:
            raise RuntimeError(
                f"parallel.pp = {self.settings.parallel.pp}: {what} is a part of a step, which a pipeline "
                f"schedules as a whole; legal: {legal}"
            )

    def _compare_inputs(self, inputs: Any) -> None:
        """Raise ValueError on all ranks when ranks of one data-parallel rank were given different batches."""
        self._compares_inputs = self.settings.debug.collectives  # else the first forward is enough to find out
        given = samples(inputs)
        row = torch.tensor([len(given), given[0].numel() if given else 0, 0], device=self.device)
        row[2] = hash_samples(given).long().sum() if given else 0
        with self.ledger.phase("forward"):
            rows = self.world.gather_rows(row, "inputs of the first forward").cpu()
        parallel = self.settings.parallel
        together = rows.view(parallel.pp, -1, parallel.cp * parallel.tp, 3)
        different = (together != together[:1, :, :1]).any(dim=-1)
        if bool(different.any()):
            raise ValueError(
                f"ranks {different.flatten().nonzero()[:, 0].tolist()} were given other batches than the first of "
                "their tensor-, context- and pipeline-parallel ranks; legal: the same for all of one data-parallel "
                "rank (see engine.dp_rank and engine.dp_size)"
            )

    def backward(self, loss: Loss, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """Gradients of `loss` into the accumulation window.

        Args:
            loss: 0-d mean loss, divided by the accumulation steps unless `scale_wrt_gas` is False; or a pair (sum,
                count).

        Returns the loss that was differentiated (without the fp16 scale), as DeepSpeed does.
        """
        self._refuse_in_pipeline("backward(loss)", "train_batch(data_iter), which does all of a step")
        boundary, self._step_pending = self._next_is_boundary(), True
        value, tokens = checked(loss)
        if value.grad_fn is not None and value.grad_fn._sequence_nr() < self.entry.stale_before:
            raise RuntimeError("backward of a loss computed before the last step: the parameters have changed since")
        self._add_to_window(value, tokens)
        if tokens is None and scale_wrt_gas:
            value = value / self.batch.accumulation
        with self._watchdog.watch("backward"), self.ledger.phase("backward"), self.log.timer("backward"):
            try:
                self.runtime.begin_backward(value, boundary=boundary, sync=self._synchronize)
                with forward_of(self.entry.history):  # for blocks that others compute again
                    (value * self.optimizer.scaler.scale).backward(retain_graph=retain_graph)
                self.runtime.end_backward()
            except Exception as error:
                self.optimizer.window = Window()
                self._unless_alone(error, self.runtime.abort)
                raise
        self.micro_steps += 1
        return value.detach()

    def _add_to_window(self, value: Tensor, tokens: Any) -> None:
        if tokens is None and self.batch.accumulation > 1:
            warn_once(
                "a mean loss with gradient accumulation is a mean of means: exact only if all micro-batches hold "
                "equally many tokens. Give backward a pair (loss sum, token count) otherwise."
            )
        self._window.add(value, None if tokens is None else torch.as_tensor(tokens, device=self.device))

    def step(self, lr_kwargs: None = None) -> None:
        """On the accumulation boundary: clip, update, gather, advance the schedule. Elsewhere nothing.

        Raises NonFiniteError as `ZeroOptimizer.step_window` says, RuntimeError when `loss.backward()` took the
        place of `engine.backward(loss)`.
        """
        self._refuse_in_pipeline("step()", "train_batch(data_iter), which does all of a step")
        if lr_kwargs:
            raise ValueError("step(lr_kwargs=...) is not available: schedules depend on the step number alone")
        self._step_pending = False
        if self._window.micro_batches == 0 and self.runtime.has_local_gradients:
            raise RuntimeError("gradients were computed by loss.backward(): call engine.backward(loss) instead")
        if not self._at_boundary():
            return
        if self._window.micro_batches == 0:
            raise RuntimeError("step() without a backward() before it")
        self._update(1.0)

    def flush(self) -> None:
        """Step with what a partial window holds, as if it were whole; nothing when it is empty. Call it on all ranks.

        For the end of an epoch whose batches do not fill the last window. Mean losses were divided by the accumulation
        steps as they came; here that is made up for, so the update is that of the mean over what there was.
        """
        micro_batches = self._window.micro_batches
        if micro_batches:
            self._step_pending = False
            means = self._window.tokens is None and self._boundary is None
            self._update(self.batch.accumulation / micro_batches if means else 1.0)

    def _update(self, weight: float) -> None:
        samples = self.batch.micro_batch_size * self.dp_size * self._window.micro_batches
        with self._watchdog.watch("an update"), self.ledger.phase("step"), self.log.timer("step"):
            self._background.give_back()
            self.result = self.optimizer.step_window(weight)
        self.global_steps += 1
        self.global_samples += samples
        if self.result.applied:
            if self.lr_scheduler is not None:
                self.lr_scheduler.step()
        else:
            self.skipped_steps += 1
        self._stepped()
        every = self.settings.dist.check_replicas
        if every and self.global_steps % every == 0:
            with self.ledger.phase("replicas"):
                check_replicas(self.runtime, self.world)
        self.log.step(self)

    def _stepped(self) -> None:
        """Tell those who count along."""
        self.entry.stepped(self.global_steps)
        self.ledger.step = self.global_steps

    @property
    def _window(self) -> Window:
        return self.optimizer.window

    def _at_boundary(self) -> bool:
        """Whether the window that the last backward closed is full."""
        if self._boundary is not None:
            return self._boundary
        return self._window.micro_batches > 0 and self._window.micro_batches % self.batch.accumulation == 0

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the micro-batch at hand (until its `step`) is the last before an update."""
        return self._at_boundary() if self._step_pending else self._next_is_boundary()

    def _next_is_boundary(self) -> bool:
        if self._boundary is not None:
            return self._boundary
        return (self._window.micro_batches + 1) % self.batch.accumulation == 0

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Take over the count of the accumulation boundary: until further notice it is what the caller says."""
        self._refuse_in_pipeline("set_gradient_accumulation_boundary()", "train_batch(data_iter), one whole step")
        self._boundary = bool(is_boundary)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Keep whole gradients on this rank inside. Legal at every stage; costs their memory at stages 2 and 3."""
        self._refuse_in_pipeline("no_sync()", "train_batch(data_iter), which reduces once per step")
        outer, self._synchronize = self._synchronize, False
        try:
            yield
        finally:
            self._synchronize = outer

    # ---- whole batches ----

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> Tensor:
        """One optimizer step over `gradient_accumulation_steps` micro-batches from `data_iter`.

        A micro-batch is a dict (keyword arguments of the model), a tuple (positional) or a tensor; the model returns
        its loss, a pair (sum, count), or an object with `.loss`. Returns the 0-d float64 mean loss over the global
        batch. An iterator that ends inside the window raises StopIteration: then `flush` or `zero_grad`.
        """
        if self._window.micro_batches:
            raise RuntimeError(
                f"train_batch() with {self._window.micro_batches} micro-batches already in the window: call "
                "engine.flush() to step with them, or engine.zero_grad() to drop them"
            )
        iterator = self._training_iterator() if data_iter is None else data_iter
        self.module.train()
        with self._watchdog.watch("a step"):
            if self.pipeline is not None:
                self._pipelined_step([next(iterator) for _ in range(self.batch.accumulation)])
            else:
                for _ in range(self.batch.accumulation):
                    self.backward(loss_of(self._forward_batch(next(iterator))))
                self.step()
        assert self.result is not None
        return torch.tensor(self.result.loss, dtype=torch.float64)

    def _pipelined_step(self, batches: list[Any]) -> None:
        assert self.pipeline is not None
        if self._compares_inputs:
            self._compare_inputs(batches)
        try:
            began = time.perf_counter()
            self.pipeline.train(batches)
        except Exception as error:
            self.optimizer.window = Window()
            self._unless_alone(error, self.runtime.abort)
            raise
        computing = self.pipeline.seconds()
        for phase, seconds in computing.items():
            self.log.add(phase, seconds)
        self.log.add("pipeline_wait", time.perf_counter() - began - sum(computing.values()))
        self.micro_steps += len(batches)
        self._window.micro_batches = len(batches)  # also on ranks that have seen no loss
        self._update(1.0)

    def _seed_of(self, output: Any) -> tuple[Tensor, Tensor]:
        """The loss in a microbatch's output, entered into the window, and the gradient that backward begins with."""
        value, tokens = checked(loss_of(output))
        self._add_to_window(value, tokens)
        share = self.batch.accumulation if tokens is None else 1
        return value, torch.full_like(value, self.optimizer.scaler.scale / share)

    def eval_batch(self, data_iter: Iterator[Any]) -> Tensor:
        """Mean loss, over all ranks, of one global batch in evaluation mode; collective. 0-d float64."""
        total = self.evaluate([next(data_iter) for _ in range(self.batch.accumulation)])
        return total[0] / total[1]

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Any]) -> Tensor:
        """(sum of losses, tokens or batches behind it) of these batches of all ranks, in evaluation mode; collective.

        Data-parallel ranks may have different batches, and different numbers of them. float64 [2], on the host.
        """
        was_training = self.module.training
        self.module.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        try:
            if self.pipeline is not None:
                for found in self.pipeline.infer([*batches], loss_and_count):
                    total += found.to(self.device)
            else:
                for batch in batches:
                    total += loss_and_count(self._forward_batch(batch)).to(self.device)
        finally:
            self.module.train(was_training)
        with self.ledger.phase("eval"):
            if self.pipeline is not None:
                total = self.pipeline.from_last(total, "evaluation loss")
            return self.comm.gather_rows(total, "evaluation loss").sum(dim=0).cpu()

    @torch.no_grad()
    def infer(self, batches: Iterable[Any]) -> list[Any]:
        """The model's output for each batch, without gradients; collective.

        In a pipeline only the ranks of the last stage get them; the others get none.
        """
        if self.pipeline is None:
            return [self._forward_batch(batch) for batch in batches]
        return self.pipeline.infer([*batches])

    def _forward_batch(self, batch: Any) -> Any:
        args, kwargs = arguments(self._on_device(batch))
        return self(*args, **kwargs)

    def _on_device(self, batch: Any) -> Any:
        return tree_map(lambda leaf: leaf.to(self.device) if isinstance(leaf, Tensor) else leaf, batch)

    def _training_iterator(self) -> Iterator[Any]:
        if self.training_dataloader is None:
            raise ValueError("train_batch() needs an iterator, or training_data given to initialize()")
        if self._iterator is None:
            self._iterator = forever(self.training_dataloader, skip=self.micro_steps)
        return self._iterator

    def _to_compute(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.dtype == torch.float32 and self.settings.precision != "fp32":
            return leaf.to(DTYPES[self.settings.precision])
        return leaf

    # ---- what a script may ask ----

    def train(self, mode: bool = True) -> Engine:
        self.module.train(mode)
        return self

    def eval(self) -> Engine:
        return self.train(False)

    def zero_grad(self) -> None:
        """Drop the running window and its gradients."""
        self.optimizer.zero_grad()
        self._step_pending = False

    def get_global_grad_norm(self) -> float | None:
        """L2 norm of the last step's gradient over the whole model, before clipping; None before the first step."""
        return self.result.grad_norm if self.result else None

    def get_lr(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def get_mom(self) -> list[Any]:
        return [group.get("betas", group.get("momentum")) for group in self.optimizer.param_groups]

    def was_step_applied(self) -> bool:
        """False when the last step was skipped because gradients were not finite."""
        return bool(self.result and self.result.applied)

    def train_batch_size(self) -> int:
        return self.batch.global_batch_size

    def train_micro_batch_size_per_gpu(self) -> int:
        return self.batch.micro_batch_size

    def gradient_accumulation_steps(self) -> int:
        return self.batch.accumulation

    def fp16_enabled(self) -> bool:
        return self.settings.precision == "fp16"

    def bfloat16_enabled(self) -> bool:
        return self.settings.precision == "bf16"

    def zero_optimization(self) -> bool:
        return self.settings.zero.stage > 0

    def gradient_clipping(self) -> float:
        return self.settings.train.gradient_clipping

    def steps_per_print(self) -> int:
        return self.settings.log.every

    def wall_clock_breakdown(self) -> bool:
        return self.settings.log.wall_clock_breakdown

    def dynamic_loss_scale(self) -> bool:
        return self.optimizer.scaler.dynamic

    def get_batch_info(self) -> tuple[int, int, int]:
        """(train_batch_size, train_micro_batch_size_per_gpu, gradient_accumulation_steps)."""
        return self.batch.global_batch_size, self.batch.micro_batch_size, self.batch.accumulation

    def zero_optimization_stage(self) -> int:
        return self.settings.zero.stage

    def zero_gather_16bit_weights_on_model_save(self) -> bool:
        return self.settings.zero.gather_16bit_weights_on_model_save

    @property
    def loss_scale(self) -> float:
        return self.optimizer.scaler.scale

    @property
    def local_rank(self) -> int:
        return int(os.environ.get("LOCAL_RANK", "0"))

    @property
    def global_rank(self) -> int:
        return torch.distributed.get_rank()

    @property
    def world_size(self) -> int:
        return torch.distributed.get_world_size()

    @property
    def dp_world_size(self) -> int:
        return self.dp_size

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.module.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.module.named_parameters()

    def state_dict(self) -> dict[str, Any]:
        """The model's; refused while its parameters are sharded (see `unsharded`)."""
        return self.module.state_dict()

    @property
    def config(self) -> dict[str, Any]:
        """The settings in DeepSpeed's key names, batch sizes solved; `settings` has them in ours."""
        return to_deepspeed(self.settings, self.batch)

    def num_parameters(self) -> int:
        """Parameters of the whole model."""
        return self._num_parameters

    def memory_bytes(self) -> dict[str, int]:
        """Bytes of model state on this rank by kind: parameters, masters, gradients, optimizer."""
        states = [
            t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor) and t.dim()
        ]
        return {**self.runtime.memory_bytes(), "optimizer": sum(t.nbytes for t in states)}

    # ---- files ----

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
        retention: Retention = KEEP_ALL,
    ) -> bool:
        """Write everything that resuming needs to `save_dir/tag` (default `global_step{N}`); collective.

        With `checkpoint.asynchronous` it returns at once, and a thread writes; the next update copies what is not
        written by then. Whoever changes weights otherwise must `wait_for_checkpoint` first. The next save,
        `wait_for_checkpoint` or `destroy` raises what went wrong. Refused in the middle of an accumulation window,
        whose gradients are not part of a checkpoint. Raises `CheckpointError` on every rank when one of them cannot
        write; what was saved before is then as it was.

        Args:
            save_latest: have `save_dir/latest` name this one. retention: which older ones stay (default: all).
        """
        if self._window.micro_batches:
            raise RuntimeError("save_checkpoint() in the middle of an accumulation window; call it after step()")
        if exclude_frozen_parameters:
            raise ValueError("exclude_frozen_parameters is not available: a checkpoint holds every parameter")
        name = f"global_step{self.global_steps}" if tag is None else str(tag)
        settings = self.settings.checkpoint
        with self._watchdog.watch("a save"), self.ledger.phase("checkpoint"):
            self.wait_for_checkpoint()
            save = prepare(
                self._state(),
                Path(save_dir),
                name,
                client_state or {},
                latest=save_latest,
                retention=retention,
                checksum=settings.checksum,
                background=self._background if settings.asynchronous else None,
            )
            if settings.asynchronous:
                self._background.start(save)
            else:
                save.run()
        return True

    def wait_for_checkpoint(self) -> None:
        """Return when no checkpoint is being written any more. Raises what the last one raised, on every rank."""
        with self._watchdog.watch("a save"):
            self._background.wait()

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
    ) -> tuple[str | None, dict[str, Any]]:
        """Continue from `load_dir/tag` (default: what the file `latest` names), in any layout; collective.

        Returns (path, client_state), or (None, {}) when there is no checkpoint. Raises `CheckpointError` naming the
        file that is damaged or what does not fit, before it changes anything. One that is damaged is passed over for
        an older one only with `checkpoint.allow_fallback`.
        """
        if not load_module_strict:
            raise ValueError("load_module_strict=False is not available: a checkpoint must hold every parameter")
        self.wait_for_checkpoint()
        with self._watchdog.watch("a load"), self.ledger.phase("checkpoint"):
            state = self._state()
            path, manifest = load_state(
                state,
                Path(load_dir),
                tag,
                optimizer=load_optimizer_states and not load_module_only,
                scheduler=load_lr_scheduler_states and not load_module_only,
                allow_fallback=self.settings.checkpoint.allow_fallback,
            )
            if path is None or manifest is None:
                return None, {}
            self.zero_grad()
            self.runtime.refresh()
        if not load_module_only:
            self._continue_from(manifest.counters, same_layout=manifest.layout == state.layout)
        return str(path), manifest.client_state

    def _continue_from(self, counters: Counters, same_layout: bool) -> None:
        self._iterator = None
        self.global_steps, self.global_samples = counters.global_steps, counters.global_samples
        self.skipped_steps, self.micro_steps = counters.skipped_steps, counters.micro_steps
        if not same_layout:  # of this layout there would have been as many as hold the samples
            self.micro_steps = self.global_samples // (self.batch.micro_batch_size * self.dp_size)
        self._stepped()

    def _state(self) -> TrainingState:
        counters = {
            "global_steps": self.global_steps,
            "global_samples": self.global_samples,
            "skipped_steps": self.skipped_steps,
            "micro_steps": self.micro_steps,
        }
        parallel = self.settings.parallel
        layout = Layout(
            pp=parallel.pp,
            dp=self.dp_size,
            cp=parallel.cp,
            tp=parallel.tp,
            zero_stage=self.settings.zero.stage,
            precision=self.settings.precision,
            micro_batch_size=self.batch.micro_batch_size,
            accumulation=self.batch.accumulation,
        )
        text = self.settings.model_dump_json(exclude={"run", "log", "debug"})
        return TrainingState(
            self.module,
            self.runtime,
            self.optimizer,
            self.lr_scheduler,
            self.comm,
            self.world,
            counters,
            layout,
            hashlib.sha256(text.encode()).hexdigest(),
        )

    def save_16bit_model(self, save_dir: str | Path, save_filename: str = "model.safetensors") -> bool:
        """Write whole weights in the compute dtype to one safetensors file on rank 0; collective.

        At stage 3 this must have been allowed by `zero.gather_16bit_weights_on_model_save`; otherwise nothing is
        written and False is returned, as DeepSpeed does.
        """
        if self.settings.zero.stage == 3 and not self.settings.zero.gather_16bit_weights_on_model_save:
            warn_once("save_16bit_model at stage 3 needs zero.gather_16bit_weights_on_model_save; nothing was written")
            return False
        with self.ledger.phase("checkpoint"):
            path = Path(save_dir) / Path(save_filename).with_suffix(".safetensors")
            everyone(self.world, self.device, lambda: save_weights(self.runtime, self.module, path))
        return True

    def load_weights(self, path: str | Path) -> None:
        """Fill the model from `path`, in HuggingFace's layout and under the model's own parameter names; collective.

        `path` is a `.safetensors` file, or a folder with `model.safetensors` or `model.safetensors.index.json` and the
        files that it names. Each rank reads the slices that it keeps, whatever the degrees and the ZeRO stage, so the
        model may have been built on the meta device. Values are cast. Optimizer state, schedule and counters stay as
        they are. Raises `CheckpointError` on every rank, naming the file and what does not fit, before it changes
        anything.
        """
        if self._window.micro_batches:
            raise RuntimeError("load_weights() in the middle of an accumulation window; call it after step()")
        if self.runtime.gatherer is not None and self.runtime.gatherer.suspended:
            raise RuntimeError(
                "load_weights() inside unsharded(): the whole parameters there would keep the old values"
            )
        with self.ledger.phase("checkpoint"):
            load_weights(self.runtime, self.module, Path(path), self.world)

    def destroy(self) -> None:
        """Wait for a checkpoint on its way, take our hooks off the model, drop gradients, close log files.

        Below stage 3 the model is then an ordinary one; at stage 3 its parameters stay sharded, and it is of no use.
        What was cut into stages stays cut.
        """
        self.wait_for_checkpoint()
        self.runtime.detach()
        for handle in self.entry.hooks:
            handle.remove()
        self.log.close()


def forever(dataloader: Any, skip: int = 0) -> Iterator[Any]:
    """The batches of `dataloader`, epoch after epoch, without the first `skip`. Raises ValueError when it has none."""
    epoch = 0
    while True:
        sampler: Any = getattr(dataloader, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        count = 0
        for batch in dataloader:
            count += 1
            if skip:
                skip -= 1
            else:
                yield batch
        if not count:
            raise ValueError("the training data loader is empty")
        epoch += 1
