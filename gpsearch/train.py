"""One grow-and-prune training: the loop, its checkpoint, its history. Read it top to bottom."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpsearch import tasks
from gpsearch.candidate import Training
from gpsearch.errors import UserError, line_of
from gpsearch.files import write_pickled, write_text
from gpsearch.growprune import GrowPrune
from gpsearch.schedule import Schedule
from gpsearch.tasks import Task

EXPLODED = 100.0
"""An epoch whose loss is this many times the first one's is as lost as NaN."""


class TrainingFailed(RuntimeError):
    """The training cannot go on; the message says why, when, and what to change."""


@dataclass(frozen=True)
class Epoch:
    """One row of ``history.csv``."""

    epoch: int
    phase: str
    density: float
    nonzeros: int
    loss: float
    error: float
    learning_rate: float
    seconds: float
    event: str


Listener = Callable[[Epoch], None]


def grow_and_prune(
    model: nn.Module,
    task: Task,
    schedule: Schedule,
    training: Training,
    *,
    folder: Path | None = None,
    data: Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    listener: Listener | None = None,
    pause: Callable[[], object] = lambda: None,
) -> nn.Module:
    """Train ``model`` by a schedule and return it with the best weights of its final density.

    Every epoch leaves ``checkpoint.pt`` and ``history.csv`` in ``folder``. Called again with the
    same arguments after a kill, the training goes on from the last epoch and, on a CPU with the
    same number of threads, ends in the same numbers as an undisturbed one.

    Args:
        model: The network to train, in place.
        task: Gives batches, loss and development error.
        schedule: When connections grow and are pruned.
        training: How the weights are trained.
        folder: Where checkpoint and history go; None keeps nothing.
        data: Where the task's data was found, if it was said: a training goes on with no other.
        seed: Of the data order, the augmentation, the seed network and dropout.
        device: Where to train, such as "cpu" or "cuda".
        listener: Called after every epoch.
        pause: Called before every batch; may wait, as while somebody measures on this machine.

    Raises:
        TrainingFailed: The loss is NaN or explodes, a weight is not finite, the development error
            is NaN, there is no batch, or memory runs out.
        UserError: ``folder`` holds the checkpoint of another training.
    """
    run = _Run(model.to(device), task, schedule, training, data, seed, pause)
    if folder is not None and (folder / "checkpoint.pt").exists():
        run.load(folder / "checkpoint.pt")
        write_text(folder / "history.csv", history_csv(run.history))
    while run.epoch < training.epochs:
        with run.enough_memory():
            run.count_batches()
            started = time.perf_counter()
            event = run.change_masks()
            phase = run.masks.phase(run.epoch)
            loss = run.train_epoch()
            run.finish_epoch(phase, event, loss, time.perf_counter() - started)
        if folder is not None:
            run.save(folder)
        if listener is not None:
            listener(run.history[-1])
    return run.best_network()


class _Run:
    """What a training has reached: all that a checkpoint holds."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        schedule: Schedule,
        training: Training,
        data: Path | None,
        seed: int,
        pause: Callable[[], object],
    ) -> None:
        self.pause = pause
        self.model, self.task, self.training, self.seed = model, task, training, seed
        self.optimizer = _optimizer(model, training)
        self.masks = GrowPrune(
            model, self.optimizer, schedule, training.epochs,
            prunable=tasks.prunable(task, schedule), seed=seed,
        )  # fmt: skip
        self.identity = {
            "task": task.name,
            "data": data and str(data.resolve()),
            "model": repr(model),
            "schedule": repr(schedule),
            "training": asdict(training),
            "seed": seed,
        }
        self.batches_per_epoch = 0
        """Counted once a run, so no part of a checkpoint."""
        self.epoch = 0
        self.first_loss: float | None = None
        self.error: float | None = None
        self.best: dict[str, Any] | None = None
        self.history: list[Epoch] = []
        torch.manual_seed(seed)

    @contextmanager
    def enough_memory(self) -> Iterator[None]:
        """Say what would help where an epoch runs out of memory, wherever in it that is."""
        epoch = self.epoch
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise TrainingFailed(
                f"out of memory in epoch {epoch}: lower training.batch_size "
                f"({self.training.batch_size}) or architecture.hidden_size"
            ) from error

    def count_batches(self) -> None:
        """Count an epoch's batches once, to know its share that is over; all may not fit at once.

        They are those of the first epoch, so that a training that goes on counts the same.
        """
        if not self.batches_per_epoch:
            cuda = {p.device for p in self.model.parameters() if p.is_cuda}
            with torch.random.fork_rng(cuda):
                self.batches_per_epoch = sum(1 for _ in self._batches(0))

    def _batches(self, epoch: int) -> Iterator[Any]:
        """Yield an epoch's batches, each made when it is wanted and nobody measures."""
        none = True
        self.pause()
        for batch in self.task.batches(self.training, epoch, self.seed):
            none = False
            yield batch
            self.pause()
        if none:
            raise TrainingFailed(
                f"the task {self.task.name} gives no batch in epoch {epoch}: give it more training "
                f"data, or lower training.batch_size ({self.training.batch_size})"
            )

    def change_masks(self) -> str:
        """Grow, prune or step back as the schedule wants; return what was done, for people."""
        before = self.masks.density
        update = self.masks.update(self.epoch, self._losses, self.error)
        if update is None:
            return ""
        if self.masks.density != before:
            self.best = None  # a network of another density is another network
        if update.event == "restore":  # what was good stays good, whatever is trained from here
            self.error = self._dev_error() if update.error is None else update.error
            self._remember_best()
        return f"{update.event} {before:.3f} to {self.masks.density:.3f}"

    def train_epoch(self) -> float:
        """Pass once over the training data and return the mean loss."""
        self.model.train()
        total = 0.0
        for step, batch in enumerate(self._batches(self.epoch)):
            done = min(step / self.batches_per_epoch, 1.0)  # there may be more than in the first
            share = (self.epoch + done) / self.training.epochs
            total += self._step(batch, learning_rate(self.training, share), step)
        loss = self._believed(total / (step + 1))
        self._check_weights()
        return loss

    def _check_weights(self) -> None:
        """Refuse weights that the last step has made infinite or NaN: no loss has shown it yet."""
        for name, parameter in self.model.named_parameters():
            if not parameter.isfinite().all():
                raise TrainingFailed(
                    f"{name} is not finite after epoch {self.epoch}: {self._calmer()}"
                )

    def _believed(self, loss: float) -> float:
        """Return an epoch's mean loss; one batch's says little, as its sequences may be long."""
        self.first_loss = self.first_loss or loss
        if loss > EXPLODED * abs(self.first_loss):
            raise TrainingFailed(
                f"the loss is {loss:.4g} in epoch {self.epoch}, after {self.first_loss:.4g} in the "
                f"first: {self._calmer()}"
            )
        return loss

    def _calmer(self) -> str:
        return (
            f"lower training.learning_rate ({self.training.learning_rate:g}) or training.clip "
            f"({self.training.clip:g})"
        )

    def _step(self, batch: Any, rate: float, step: int) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss = self.task.loss(self.model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        value = self._finite(loss, step)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.training.clip)
        self.optimizer.step()
        return value

    def _finite(self, loss: Tensor, step: int) -> float:
        """Return a batch's loss as a number; refuse what is none."""
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingFailed(
                f"the loss is {value:.4g} in epoch {self.epoch}, step {step}: {self._calmer()}"
            )
        return value

    def _losses(self) -> Any:
        """One pass of losses with frozen weights, for growth."""
        self.model.train()
        for step, batch in enumerate(self._batches(self.epoch)):
            loss = self.task.loss(self.model, batch)
            self._finite(loss, step)
            yield loss

    def finish_epoch(self, phase: str, event: str, loss: float, seconds: float) -> None:
        """Take the development error, remember the best network, and write the history's row."""
        self.pause()
        self.error = self._dev_error()
        self._remember_best()
        rate = learning_rate(self.training, (self.epoch + 1) / self.training.epochs)
        row = Epoch(
            self.epoch, phase, self.masks.density, self.masks.nonzeros, loss, self.error, rate,
            seconds, event,
        )  # fmt: skip
        self.epoch += 1
        if self.epoch == self.training.epochs:  # the row stays that of the network just trained
            row = replace(row, event="; ".join(filter(None, [event, self._close()])))
        self.history.append(row)

    def _close(self) -> str:
        """Let the gate judge the last pruning step, by the best network since; say what it did."""
        assert self.best is not None
        self.error = self.best["error"]
        event = self.change_masks()
        if self.best is None:  # a schedule of one's own may change more at the end
            self.error = self._dev_error()
            self._remember_best()
        return event

    def _dev_error(self) -> float:
        error = tasks.scores(self.task, self.model)["error"]
        if math.isnan(error):
            raise TrainingFailed(f"the development error is {error} after epoch {self.epoch}")
        return error

    def _remember_best(self) -> None:
        assert self.error is not None
        if self.best is None or self.error <= self.best["error"]:
            state = {k: v.detach().cpu().clone() for k, v in self.model.state_dict().items()}
            self.best = {"error": self.error, "model": state}

    def best_network(self) -> nn.Module:
        """Return the model with the best weights seen since its density last changed.

        After a step back those taken back are among them.
        """
        assert self.best is not None
        self.model.load_state_dict(self.best["model"])
        self.masks.release()
        return self.model.eval()

    def save(self, folder: Path) -> None:
        """Write checkpoint and history, atomically."""
        state = {
            "identity": self.identity,
            "epoch": self.epoch,
            "first_loss": self.first_loss,
            "error": self.error,
            "best": self.best,
            "history": [asdict(row) for row in self.history],
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "masks": self.masks.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if self._on_cuda else [],
        }
        write_pickled(folder / "checkpoint.pt", state)
        write_text(folder / "history.csv", history_csv(self.history))

    @property
    def _on_cuda(self) -> bool:
        return next(self.model.parameters()).is_cuda

    def load(self, path: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            UserError: The file is unreadable, or belongs to another training.
        """
        try:
            # On the CPU, where random states have to be; the rest moves as it is loaded.
            state = torch.load(path, map_location="cpu", weights_only=True)
            identity = state["identity"]
        except Exception as error:
            raise UserError(
                f"{path}: not a readable checkpoint; delete it to start again"
            ) from error
        if self.identity | identity != self.identity:  # older ones do not tell the task
            raise UserError(f"{path}: belongs to another training; use another folder or delete it")
        try:
            self._take(state)
        except Exception as error:
            why = line_of(error)
            raise UserError(
                f"{path}: of another version of gpsearch ({why}); delete it to start again"
            ) from error

    def _take(self, state: dict[str, Any]) -> None:
        self.epoch, self.error, self.best = state["epoch"], state["error"], state["best"]
        self.first_loss = state["first_loss"]
        self.history = [Epoch(**row) for row in state["history"]]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.masks.load_state_dict(state["masks"])
        torch.set_rng_state(state["random"])
        if state["random_cuda"]:
            torch.cuda.set_rng_state_all(state["random_cuda"])


def learning_rate(training: Training, share: float) -> float:
    """Return the learning rate when ``share`` (0 to 1) of the run is over."""
    if share < training.warmup:
        return training.learning_rate * max(share / training.warmup, 0.02)
    rest = (share - training.warmup) / (1 - training.warmup)
    falling = {
        "cosine": (1 + math.cos(math.pi * rest)) / 2,
        "trapezoid": min(1.0, 2 * (1 - rest)),
        "constant": 1.0,
    }[training.rate_shape]
    return training.learning_rate * max(falling, 1e-3)


def history_csv(history: list[Epoch]) -> str:
    """Return ``history.csv``'s text."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(Epoch.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in history)
    return text.getvalue()


def _is_out_of_memory(error: Exception) -> bool:
    # On the CPU torch raises a plain RuntimeError of its allocator.
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def _optimizer(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    parameters = [
        {"params": decayed, "weight_decay": training.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if training.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, training.learning_rate, momentum=0.9, nesterov=True, foreach=True
        )
    return torch.optim.AdamW(parameters, training.learning_rate, betas=(0.9, 0.98), fused=True)
