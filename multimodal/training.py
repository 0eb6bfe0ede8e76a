"""The training loop: AdamW, schedule, weight average, precision, accumulation, processes, resume, logging.

Policy, VLM, draft and calibration trainers are two functions on top of it:

    batch_source(index) -> batch                          micro-batch number `index` of the endless data stream
    loss_step(model, batch, generator) -> LossTerms       its loss as a sum, and what to divide the sum by

Numbering micro-batches makes everything a function of the position. Process `rank` of `count` takes, as accumulation
round `round` of step `step`, micro-batch (step * accumulation + round) * count + rank; before it the `generator` and the
global torch, numpy and python generators are seeded from (seed, index). So a resumed run needs no random state and
equals the uninterrupted one bit for bit, whatever validation drew in between; and n processes see the micro-batches that
one process with n-fold accumulation sees, with the same random numbers, and equal it up to summation order.

The gradient of a step is that of  sum of loss_sum / sum of normalizer  over all rounds and processes, so a micro-batch
with fewer supervised tokens weighs less, as it would in one large batch.
"""

import atexit
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, send_to_device
from torch import Tensor, nn

from multimodal.interruption import Interruption, resume_command
from multimodal.schedule import TrainingConfig, learning_rate_scale, progress
from multimodal.training_log import TrainingLog, plot_curve
from multimodal.training_state import (
    Position,
    WeightAverage,
    checkpoint_folder,
    last_checkpoint,
    load_training_state,
    save_training_state,
    seed_everything,
    write_run_checkpoint,
)


@dataclass(frozen=True)
class LossTerms:
    """The loss of one micro-batch, undivided."""

    loss_sum: Tensor  # scalar with gradient
    normalizer: float | Tensor  # e.g. samples or supervised tokens; > 0 in each step's sum
    metrics: dict[str, Tensor | float] = field(default_factory=dict)  # to be averaged over micro-batches; no gradient


class LossStep(Protocol):
    def __call__(self, model: nn.Module, batch: Any, generator: torch.Generator) -> LossTerms: ...


def train(
    model: nn.Module,
    loss_step: LossStep,
    batch_source: Callable[[int], Any],
    config: TrainingConfig,
    output_dir: str | Path,
    *,
    save_model: Callable[[Path, dict[str, Tensor]], object],
    on_checkpoint: Callable[[Path, int], dict[str, float] | None] | None = None,
    resume: bool = False,
) -> Path:
    """Train `model` in place and return the last checkpoint's folder, `output_dir/checkpoints/STEP`.

    batch_source: pure function of the index, called one batch ahead in a thread, which also moves the tensors in its batch
        (in tuples, lists, dicts) to the model's device; anything else is passed on as it is.
    save_model(folder, state): writes the policy with these weights (the average, if there is one) into `folder`, which
        does not exist yet. Called by the main process.
    on_checkpoint(folder, step): after each checkpoint, in the main process, while the clock of `minutes` stands still;
        the policy is in folder / "policy". Numbers that it returns are logged as validation/NAME. If that was cut off, the
        resumed run begins with it.
    resume: go on from output_dir/checkpoints/last.

    Ctrl-C or SIGTERM: the step is finished, a checkpoint written, KeyboardInterrupt raised with the command that goes on
    (a second Ctrl-C stops at once). Raises FloatingPointError naming the step if loss or gradient is not finite, and
    OSError(ENOSPC) on a full disk; the checkpoint before stays usable. FileExistsError if the folder holds a run and
    resume is false, FileNotFoundError if resume is true and it holds none.
    """
    run = Path(output_dir)
    previous = last_checkpoint(run)
    if resume and previous is None:
        raise FileNotFoundError(f"Nothing to resume: no {run / 'checkpoints' / 'last'}. Start without --resume.")
    if not resume and previous is not None:
        raise FileExistsError(f"{run} holds a run already: go on with --resume=true, or choose another --output_dir.")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    loop = _Loop(model, loss_step, config, run)
    if previous is not None:
        loop.restore(previous / "training_state")
    log = TrainingLog(run, first_step=loop.position.step, steps=config.steps) if loop.is_main else None
    folder = previous

    def validate() -> None:
        """Log the scores of the step just saved, unless the log has them."""
        if log is not None and on_checkpoint is not None and not log.is_validated(loop.position.step):
            interruption.at_once = True  # the step is saved, so Ctrl-C may end a long validation
            scores = on_checkpoint(folder, loop.position.step) or {}
            interruption.at_once = False
            log.write(loop.position.step, {f"validation/{name}": float(score) for name, score in scores.items()})
        loop.accelerator.wait_for_everyone()
        loop.restart_clock()

    try:
        with Interruption() as interruption, ThreadPoolExecutor(1) as thread:
            batches = _Ahead(loop.on_device(batch_source), thread, loop.first_index, loop.accelerator.num_processes)
            if previous is not None and loop.is_due:
                validate()
            while loop.progress < 1 and not loop.stopped:
                values = loop.step(batches, interruption)
                step = loop.position.step
                if log is not None:
                    log.step()
                    if step % config.log_every == 0 or step == 1 or loop.progress >= 1:
                        log.write(step, values)
                if loop.is_due or loop.stopped:
                    folder = loop.save(save_model)
                    if not loop.stopped:
                        validate()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_interrupted(run)) from None
    finally:
        if log is not None:
            log.close()
    if log is not None:
        plot_curve(run)
    if loop.stopped:
        raise KeyboardInterrupt(_interrupted(run))
    return folder


class _Loop:
    """Model, optimiser, average and position of one run; `step` is the one place where they change."""

    def __init__(self, model: nn.Module, loss_step: LossStep, config: TrainingConfig, run: Path) -> None:
        handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
        self.accelerator = Accelerator(cpu=config.device == "cpu", kwargs_handlers=handlers)
        if self.accelerator.num_processes > 1:  # a thread of Gloo's that wants the interpreter while it ends aborts the process
            atexit.register(self.accelerator.state.destroy_process_group)
        self.is_main = self.accelerator.is_main_process
        self.config, self.run, self.model = config, run, model.to(self.accelerator.device)
        self.optimizer = build_optimizer(model, config)
        self.average = WeightAverage(model, config.ema_decay) if config.ema_decay else None
        self.module = self.accelerator.prepare(_LossModule(model, loss_step, config.precision))
        self.generator = torch.Generator(self.accelerator.device)
        self.position, self.stopped, self._step_seconds = Position(), False, math.inf
        self.restart_clock()

    @property
    def progress(self) -> float:
        return progress(self.position.step, self.config.steps, self.position.elapsed, self.config.minutes)

    @property
    def is_due(self) -> bool:
        """Whether this step is to be saved and validated."""
        return self.position.step % self.config.save_every == 0 or self.progress >= 1

    @property
    def first_index(self) -> int:
        """Micro-batch that this process takes next."""
        return self.position.step * self._rounds + self.accelerator.process_index

    @property
    def _rounds(self) -> int:
        """Micro-batches of one step, all processes together."""
        return self.config.accumulation * self.accelerator.num_processes

    def step(self, batches: "_Ahead", interruption: Interruption) -> dict[str, float]:
        """One optimiser step; the scalars to log. Raises FloatingPointError before a bad gradient is applied."""
        config, done = self.config, self.position.step
        scale = learning_rate_scale(done, self.progress, warmup_steps=config.warmup_steps, final_scale=config.final_scale)
        learning_rate = config.learning_rate * scale
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        terms, sums = self._accumulate(batches)
        seconds = self._seconds(interruption.take_pause()) if self.is_main else 0.0
        extra = torch.tensor([interruption.requested, seconds], dtype=sums.dtype, device=sums.device)
        totals = self.accelerator.reduce(torch.cat([sums, extra]), "sum").tolist()
        loss_sum, normalizer, *metrics, stops, seconds = totals
        self.stopped = stops > 0
        loss = loss_sum / normalizer if normalizer > 0 else math.nan
        norm = self._update(loss, self.accelerator.num_processes / normalizer if normalizer > 0 else math.nan)
        self.position = Position(done + 1, self.position.elapsed + seconds)
        averages = {name: total / self._rounds for name, total in zip(terms.metrics, metrics, strict=True)}
        return averages | {
            "loss": loss,
            "learning_rate": learning_rate,
            "gradient_norm": norm,
            "samples_per_second": config.batch_size * self._rounds / seconds,
            "elapsed": self.position.elapsed,
            "progress": self.progress,
        }

    def on_device(self, batch_source: Callable[[int], Any]) -> Callable[[int], Any]:
        """The source with its batches on the model's device, by number: a thread has its own idea of the current one."""
        device = next(self.model.parameters()).device
        return lambda index: send_to_device(batch_source(index), device)

    def restart_clock(self) -> None:
        """Time since the last step does not count as training."""
        self._mark = time.monotonic()

    def save(self, save_model: Callable[[Path, dict[str, Tensor]], object]) -> Path:
        """Write checkpoints/STEP in the main process; its path in all."""
        weights = self.model.state_dict() if self.average is None else self.average.state_dict(self.model)
        parts = {"model": self.model, "optimizer": self.optimizer, "average": self.average, "settings": self._settings}
        if self.is_main:
            write_run_checkpoint(
                self.run,
                self.position,
                lambda folder: save_model(folder, weights),
                lambda folder: save_training_state(folder, position=self.position, **parts),
                self.config.keep_last,
            )
        self.accelerator.wait_for_everyone()
        return checkpoint_folder(self.run, self.position.step)

    def restore(self, folder: Path) -> None:
        self.position = load_training_state(
            folder, model=self.model, optimizer=self.optimizer, average=self.average, settings=self._settings
        )

    @property
    def _settings(self) -> dict[str, int]:
        """What a resumed run must share: it decides which samples and random numbers a step gets."""
        return {"seed": self.config.seed, "batch_size": self.config.batch_size, "micro-batches per step": self._rounds}

    def _accumulate(self, batches: "_Ahead") -> tuple[LossTerms, Tensor]:
        """Gradients of this process's share; its last LossTerms and float64 sums [loss_sum, normalizer, *metrics]."""
        self.optimizer.zero_grad(set_to_none=True)
        self.module.train()
        rows = []
        for round_ in range(self.config.accumulation):
            index, batch = batches.take()
            seed_everything(self.generator, self.config.seed, index)
            is_last = round_ == self.config.accumulation - 1
            with nullcontext() if is_last else self.accelerator.no_sync(self.module):
                terms = self.module(batch, self.generator)
                terms.loss_sum.backward()
            values = [terms.loss_sum, terms.normalizer, *terms.metrics.values()]
            rows.append(torch.stack([torch.as_tensor(v, device=self.generator.device).detach().double() for v in values]))
        return terms, torch.stack(rows).sum(0)

    def _update(self, loss: float, factor: float) -> float:
        """Scale the gradients by `factor` (processes average them, the loss divides), clip, step; the norm before clipping."""
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = factor * float(torch.nn.utils.get_total_norm(gradients))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            last = last_checkpoint(self.run)
            kept = f"The last checkpoint, {last}, is intact" if last else "No checkpoint had been written yet"
            raise FloatingPointError(
                f"loss is {loss} and gradient norm {norm} at step {self.position.step + 1}; the step was not applied. {kept}. "
                f"Lower learning_rate (now up to {self.config.learning_rate}), set clip_norm, or look for a division by zero."
            )
        clip = min(1.0, self.config.clip_norm / (norm + 1e-6)) if self.config.clip_norm else 1.0
        torch._foreach_mul_(gradients, factor * clip)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.position.step)
        return norm

    def _seconds(self, was_paused: bool) -> float:
        """Time since the last call; a step during which the process was stopped counts as long as the one before it."""
        now = time.monotonic()
        seconds, self._mark = now - self._mark, now
        self._step_seconds = min(seconds, self._step_seconds) if was_paused else seconds
        return self._step_seconds


class _LossModule(nn.Module):
    """The loss step as a module, so that DistributedDataParallel and autocast see whatever it calls on the model."""

    def __init__(self, model: nn.Module, loss_step: LossStep, precision: str) -> None:
        super().__init__()
        self.model, self._loss_step, self._bf16 = model, loss_step, precision == "bf16"

    def forward(self, batch: Any, generator: torch.Generator) -> LossTerms:
        with torch.autocast(generator.device.type, torch.bfloat16, enabled=self._bf16):
            terms = self._loss_step(self.model, batch, generator)
        metrics = {name: torch.as_tensor(value).detach() for name, value in terms.metrics.items()}
        return LossTerms(terms.loss_sum.float(), terms.normalizer, metrics)


class _Ahead:
    """Micro-batches first, first + stride, ...; the next one is computed in `thread` while the last one is used."""

    def __init__(self, source: Callable[[int], Any], thread: ThreadPoolExecutor, first: int, stride: int) -> None:
        self._source, self._thread, self._index, self._stride = source, thread, first, stride
        self._next = thread.submit(source, first)

    def take(self) -> tuple[int, Any]:
        index, batch = self._index, self._next.result()
        self._index += self._stride
        self._next = self._thread.submit(self._source, self._index)
        return index, batch


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; weight decay on those with two or more dimensions only."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("The model has no parameter with requires_grad; nothing to train.")
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, config.beta2), fused=True)


def _interrupted(run: Path) -> str:
    last = last_checkpoint(run)
    return f"saved {last}. Go on with:\n  {resume_command()}" if last else "nothing was saved yet."
