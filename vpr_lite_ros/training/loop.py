"""The training loop of every stage: devices, mixed precision, checkpoints, progress.

A stage is a module that turns a batch into a loss; a data set gives the batch of each step. All
else is here, once. Killed at any moment, training goes on from its checkpoint: which images,
crops and distortions a step sees follows from the seed and the step's number alone.

On several GPUs start it with ``torchrun --nproc-per-node N``: each process takes batches of its
own and gradients are averaged, so a step sees N times as many images.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from vpr_lite_ros.export import CheckpointError
from vpr_lite_ros.training.errors import TrainingError

log = logging.getLogger(__name__)

Batch = tuple[Tensor, ...]
_SHOWN = 50
"""Progress shows means over this many steps."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast to train; every field ends up in the checkpoint."""

    steps: int
    minutes: float = math.inf
    """Training ends, learning rate at zero, when steps or minutes are used up."""
    learning_rate: float
    weight_decay: float = 0.01
    warmup_steps: int = 100
    save_every_s: float = 0.0
    """Seconds between checkpoints. 0: after each step, so that only the step in hand can be
    lost; worth raising where a step takes less time than writing some 70 MB."""
    workers: int = 1
    """Processes that read and distort images, for each process that trains."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "minutes", "learning_rate"):
            if not getattr(self, name) > 0:
                raise TrainingError(f"{name} is {getattr(self, name)}, should be above 0")


class Stage(nn.Module, ABC):
    """What is trained. Calling it with a batch returns ``loss`` and figures to show."""

    trained: nn.Module
    """What the checkpoint keeps, under ``model.``; the rest (teachers) is made anew."""
    round_steps: int = 0
    """Steps after which ``begin_round`` is called again; 0: once."""

    @abstractmethod
    def forward(self, *batch: Tensor) -> dict[str, Tensor]:
        """Scalars: ``loss``, which is minimised, and figures by name."""

    @abstractmethod
    def batches(self) -> Dataset[Batch]:
        """Item i: a batch that follows from the seed and i alone, read in worker processes."""

    def begin_round(self, step: int) -> dict[str, float]:
        """Look at all data anew (as for hard negatives) before ``step``; figures to log."""
        return {}


@dataclass(frozen=True)
class Devices:
    """Which of how many processes this is, and what it computes on."""

    rank: int
    world: int
    device: torch.device

    @property
    def autocast(self) -> torch.dtype | None:
        """bfloat16 where the hardware multiplies it; elsewhere it is slower than float32."""
        if self.device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = cpu_multiplies_bfloat16()
        return torch.bfloat16 if fast else None

    def mixed_precision(self) -> torch.autocast:
        """The context in which a network is run."""
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)

    def sum(self, values: Tensor) -> Tensor:
        """Over all processes; ``values`` lie on the CPU, as does the result."""
        if self.world == 1:
            return values
        here = values.to(self.device)
        dist.all_reduce(here)
        return here.cpu()

    def make_equal(self, module: nn.Module) -> None:
        """Give all processes the first one's weights and buffers."""
        if self.world > 1:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)

    def largest(self, value: float) -> float:
        """Over all processes."""
        if self.world == 1:
            return value
        here = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(here, dist.ReduceOp.MAX)
        return float(here)


@contextmanager
def devices() -> Iterator[Devices]:
    """One process on the GPU or else the CPU; what ``torchrun`` started is joined together."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    joins = world > 1 and not dist.is_initialized()
    if joins:
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Devices(rank, world, device)
    finally:
        if joins:
            dist.destroy_process_group()


def train(stage: Stage, schedule: Schedule, output: Path, on: Devices) -> Path:
    """Train, or go on training, and return the checkpoint's path.

    Beside the checkpoint, a folder of the same name takes what TensorBoard shows.
    """
    torch.manual_seed(schedule.seed)
    stage.to(on.device)
    parameters = [p for p in stage.trained.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        parameters, schedule.learning_rate, weight_decay=schedule.weight_decay
    )
    step, spent, finished = 0, 0.0, False
    if output.exists():
        step, spent, finished = resume(output, stage, optimiser, schedule)
        log.info("%s: %s at step %d", output, "finished" if finished else "going on", step)
    if finished:
        return output
    output.parent.mkdir(parents=True, exist_ok=True)
    leads = on.rank == 0
    writer = SummaryWriter(str(output.with_suffix("")), purge_step=step + 1) if leads else None
    progress = tqdm(total=schedule.steps, initial=step, desc=output.stem, disable=not leads)
    shown: deque[dict[str, float]] = deque(maxlen=_SHOWN)
    wrapped = DistributedDataParallel(stage) if on.world > 1 else stage
    began = saved = time.monotonic()
    began -= spent
    done = 0.0
    while done < 1:
        if step % stage.round_steps == 0 if stage.round_steps else step == 0:
            figures = stage.begin_round(step)
            on.make_equal(stage.trained)
            _write(writer, figures, step)
        end = schedule.steps
        if stage.round_steps:
            end = min(end, (step // stage.round_steps + 1) * stage.round_steps)
        stage.train()
        for batch in _load(stage.batches(), range(step, end), schedule.workers, on):
            spent = time.monotonic() - began
            # No process may stop while others wait for its gradients.
            done = on.largest(max(step / schedule.steps, spent / 60 / schedule.minutes))
            if done >= 1:
                break
            warm = min(1, (step + 1) / schedule.warmup_steps)
            for group in optimiser.param_groups:
                cosine = (1 + math.cos(math.pi * done)) / 2
                group["lr"] = schedule.learning_rate * warm * cosine
            # What a step draws at random is the same again after a restart.
            torch.manual_seed((schedule.seed << 32) + step * on.world + on.rank)
            with on.mixed_precision():
                result = wrapped(*(part.to(on.device, non_blocking=True) for part in batch))
            if not result["loss"].isfinite():
                raise TrainingError(
                    f"the loss of step {step} is {result['loss'].item()}: lower learning_rate "
                    f"({schedule.learning_rate:g}); {output} holds step {step}"
                )
            optimiser.zero_grad()
            result["loss"].backward()
            optimiser.step()
            step += 1
            shown.append({name: value.item() for name, value in result.items()})
            progress.update()
            means = {name: float(np.mean([s[name] for s in shown])) for name in shown[-1]}
            progress.set_postfix({name: f"{value:.3f}" for name, value in means.items()})
            _write(writer, shown[-1] | {"learning_rate": optimiser.param_groups[0]["lr"]}, step)
            if writer and time.monotonic() - saved >= schedule.save_every_s:
                writer.flush()  # first: what the checkpoint has seen, TensorBoard shows
                save(output, stage, optimiser, schedule, step, time.monotonic() - began)
                saved = time.monotonic()
            if step % 100 == 0:
                told = " ".join(f"{name} {value:.4f}" for name, value in means.items())
                log.info("%s step %d, %.1f min: %s", output.stem, step, spent / 60, told)
        done = max(done, step / schedule.steps)
    progress.close()
    if writer:
        writer.close()
    if leads:
        save(output, stage, optimiser, schedule, step, time.monotonic() - began, finished=True)
    if on.world > 1:
        dist.barrier()
    return output


def _load(batches: Dataset[Batch], steps: range, workers: int, on: Devices) -> DataLoader[Batch]:
    """The batches of ``steps``, of each only this process's share."""
    return DataLoader(
        batches,
        batch_size=None,
        sampler=[step * on.world + on.rank for step in steps],
        num_workers=workers,
        pin_memory=on.device.type == "cuda",
        worker_init_fn=_one_thread,
    )


def _one_thread(_worker: int) -> None:
    cv2.setNumThreads(0)


def _write(writer: SummaryWriter | None, figures: dict[str, float], step: int) -> None:
    if writer:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)


def cpu_multiplies_bfloat16() -> bool:
    """Whether bfloat16 is fast here; without these instructions it is ten times slower."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


# -- checkpoints ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """What a stage left: its weights by name, and how they came about."""

    weights: dict[str, Tensor]
    optimiser: dict[int, dict[str, Tensor]]
    step: int
    seconds: float
    finished: bool
    config: dict[str, Any]

    def part(self, name: str) -> dict[str, Tensor]:
        """The weights whose names begin with ``name.``, without it."""
        prefix = name + "."
        return {k[len(prefix) :]: v for k, v in self.weights.items() if k.startswith(prefix)}


def save(
    path: Path,
    stage: Stage,
    optimiser: torch.optim.Optimizer,
    schedule: Schedule,
    step: int,
    seconds: float,
    finished: bool = False,
) -> None:
    """Weights and the optimiser's state; written beside the old file, then put in its place."""
    tensors = {f"model.{k}": v.contiguous() for k, v in stage.trained.state_dict().items()}
    for index, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{k}": torch.as_tensor(v) for k, v in state.items()}
    meta = {
        "step": str(step),
        "seconds": f"{seconds:.1f}",
        "finished": json.dumps(finished),
        "config": json.dumps(asdict(schedule)),
    }
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata=meta)
    temporary.replace(path)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read what ``save`` wrote; ``CheckpointError`` if it is something else or damaged."""
    weights: dict[str, Tensor] = {}
    optimiser: dict[int, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            for name in file.keys():
                kind, rest = name.split(".", 1)
                if kind == "model":
                    weights[rest] = file.get_tensor(name)
                else:
                    index, key = rest.split(".")
                    optimiser.setdefault(int(index), {})[key] = file.get_tensor(name)
        return Checkpoint(
            weights,
            optimiser,
            int(meta["step"]),
            float(meta["seconds"]),
            bool(json.loads(meta["finished"])),
            json.loads(meta["config"]),
        )
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} is no checkpoint of a training stage ({error}): move it away to begin anew"
        ) from error


def resume(
    path: Path, stage: Stage, optimiser: torch.optim.Optimizer, schedule: Schedule
) -> tuple[int, float, bool]:
    """Fill ``stage`` and ``optimiser``; return steps done, seconds spent and if it is the end.

    Entries of ``schedule`` that have changed since are named in a warning.
    """
    checkpoint = read_checkpoint(path)
    before, now = checkpoint.config, json.loads(json.dumps(asdict(schedule)))
    for name in now:
        if before.get(name) != now[name]:
            log.warning("%s began with %s %s, now %s", path, name, before.get(name), now[name])
    try:
        stage.trained.load_state_dict(checkpoint.weights, strict=True)
        groups = optimiser.state_dict()["param_groups"]
        optimiser.load_state_dict({"state": checkpoint.optimiser, "param_groups": groups})
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is of another network: move it away to begin anew ({error})"
        ) from error
    return checkpoint.step, checkpoint.seconds, checkpoint.finished
