import csv
import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time
import weakref
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from gpsearch.candidate import Architecture, Training
from gpsearch.errors import UserError
from gpsearch.schedule import GMP, GP, Dense, RigL, Selfish
from gpsearch.train import Epoch, TrainingFailed, _Run, grow_and_prune, learning_rate
from tests.toy import ToyTask

ARCHITECTURE = Architecture(hidden_size=8, gate_width=6, dropout=0.2)
TRAINING = Training(epochs=8, batch_size=16, learning_rate=0.02, kick_epochs=0)
SMALL_BATCHES = dataclasses.replace(TRAINING, batch_size=4)


def train(
    folder=None, *, schedule=None, training=TRAINING, task=None, listener=None,
    architecture=ARCHITECTURE, data=None, seed=0,
):  # fmt: skip
    task = task or ToyTask()
    torch.manual_seed(0)
    model = task.build(architecture)
    return grow_and_prune(
        model, task, schedule or GP(), training, folder=folder, data=data, seed=seed,
        listener=listener,
    )  # fmt: skip


@cache
def undisturbed(schedule=None):
    return train(schedule=schedule)


def equal_weights(a, b):
    return all(
        x.equal(y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_gp_learns_the_task_at_its_final_density():
    model = train(training=dataclasses.replace(TRAINING, epochs=12), schedule=GP(final_density=0.3))

    weights = [p for n, p in model.named_parameters() if n.startswith("layers.weight")]
    density = sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)
    assert density == pytest.approx(0.3, abs=0.01)
    assert ToyTask().evaluate(model, "test")["err"] <= 0.1
    assert not model.training


def test_the_history_tells_every_epoch(tmp_path):
    train(tmp_path, schedule=GMP(final_density=0.2, tolerance=1.0))
    rows = list(csv.DictReader((tmp_path / "history.csv").read_text().splitlines()))

    assert list(rows[0]) == ["epoch", "phase", "density", "nonzeros", "loss", "error",
                             "learning_rate", "seconds", "event"]  # fmt: skip
    assert [int(row["epoch"]) for row in rows] == list(range(8))
    assert [row["phase"] for row in rows] == ["dense"] * 3 + ["prune"] * 4 + ["retrain"]
    assert rows[3]["event"].startswith("prune 1.000 to ")
    assert float(rows[-1]["density"]) == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("schedule", [GP(), GMP(tolerance=0.0), RigL(), Dense()])
@pytest.mark.parametrize("stop_after", [0, 3, 7])
def test_a_training_that_was_stopped_ends_in_the_same_numbers(tmp_path, schedule, stop_after):
    class Stop(Exception):
        pass

    def stop(epoch):
        if epoch.epoch == stop_after:
            raise Stop

    with pytest.raises(Stop):
        train(tmp_path, schedule=schedule, listener=stop)
    (tmp_path / "history.csv").unlink()  # as if killed between the checkpoint and the history
    resumed = train(tmp_path, schedule=schedule)

    assert len((tmp_path / "history.csv").read_text().splitlines()) == 1 + TRAINING.epochs
    assert equal_weights(resumed, undisturbed(schedule))


def test_a_training_that_is_killed_ends_in_the_same_numbers(tmp_path):
    script = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        import torch
        from tests.test_train import train
        torch.set_num_threads(1)
        train(Path(sys.argv[1]), listener=lambda epoch: time.sleep(0.2))
        """
    )
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", script, str(tmp_path)]
    for epochs in (2, 5):
        process = subprocess.Popen(command, cwd=root)
        wait_for_epochs(tmp_path / "history.csv", epochs, process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()

    begun: list[int] = []
    end = train(tmp_path, listener=lambda epoch: begun.append(epoch.epoch))
    assert len(begun) < TRAINING.epochs
    assert equal_weights(end, undisturbed())


def wait_for_epochs(history, epochs, process, limit_s=60.0):
    """Wait until a training has written so many epochs."""
    for _ in range(int(limit_s / 0.05)):
        if history.exists() and len(history.read_text().splitlines()) > epochs:
            return
        assert process.poll() is None
        time.sleep(0.05)
    raise AssertionError("the training did not get there")


def test_the_checkpoint_of_another_training_is_refused(tmp_path):
    train(tmp_path)
    with pytest.raises(UserError, match="another training"):
        train(tmp_path, schedule=GP(final_density=0.2))
    with pytest.raises(UserError, match="another training"):
        train(tmp_path, architecture=dataclasses.replace(ARCHITECTURE, activation="tanh"))
    with pytest.raises(UserError, match="another training"):
        train(tmp_path, seed=1)


class OtherTask(ToyTask):
    name = "other"


def test_a_training_goes_on_with_its_own_task_and_data_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(tmp_path, data=Path("here"))
    train(tmp_path, data=tmp_path / "here")  # the same place
    with pytest.raises(UserError, match="another training"):
        train(tmp_path, data=Path("there"))
    with pytest.raises(UserError, match="another training"):
        train(tmp_path)
    with pytest.raises(UserError, match="another training"):
        train(tmp_path, task=OtherTask(), data=Path("here"))


def test_a_checkpoint_that_tells_neither_task_nor_data_is_gone_on_with(tmp_path):
    train(tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt")
    del state["identity"]["task"], state["identity"]["data"]  # as before they stood there
    torch.save(state, tmp_path / "checkpoint.pt")

    train(tmp_path)
    with pytest.raises(UserError, match="another training"):
        train(tmp_path, schedule=GP(final_density=0.2))


def test_a_damaged_checkpoint_is_named(tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"half a file")
    with pytest.raises(UserError, match=r"checkpoint\.pt: not a readable checkpoint"):
        train(tmp_path)


class BrokenTask(ToyTask):
    """A task whose loss goes wrong in its second epoch."""

    def __init__(self, fault):
        super().__init__()
        self.fault, self.calls = fault, 0

    def loss(self, model, batch):
        self.calls += 1
        return (
            self.fault(super().loss(model, batch)) if self.calls > 6 else super().loss(model, batch)
        )


def out_of_memory(loss):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            lambda loss: loss * torch.nan,
            r"the loss is nan in epoch 1, step 2: lower .*learning_rate",
        ),
        (lambda loss: loss * 1e6, r"the loss is .*e\+0. in epoch 1"),
        (out_of_memory, r"out of memory in epoch 1: lower training.batch_size"),
    ],
)
def test_what_cannot_go_on_says_why_and_the_mend(fault, message):
    with pytest.raises(TrainingFailed, match=message):
        train(task=BrokenTask(fault), schedule=Dense())


def test_a_loss_that_explodes_after_a_stop_is_held_against_the_first_epochs(tmp_path):
    def stop(epoch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, schedule=Dense(), listener=stop)
    exploding = BrokenTask(lambda loss: loss * 1e6)
    exploding.calls = 6  # so that all batches are large from epoch 1 on
    with pytest.raises(TrainingFailed, match=r"the loss is .*e\+0. in epoch 1, after 0\."):
        train(tmp_path, task=exploding, schedule=Dense())


class SteepTask(BrokenTask):
    """A task whose last gradient of the second epoch is no number, though its loss is one."""

    def loss(self, model, batch):
        loss = super().loss(model, batch)
        return loss + (loss - loss).sqrt() if self.calls == 8 else loss


@pytest.mark.parametrize("schedule", [Dense(), GMP(prune_start=0.25)])
def test_weights_that_the_last_step_of_an_epoch_has_lost_end_a_training(schedule):
    message = r"layers\.\w+ is not finite after epoch 1: lower training.learning_rate"
    with pytest.raises(TrainingFailed, match=message):
        train(task=SteepTask(lambda loss: loss), schedule=schedule)


def test_a_loss_that_is_no_number_while_connections_grow_ends_a_training():
    growing = BrokenTask(lambda loss: loss * torch.nan)
    growing.calls = 2  # so that the fifth batch fails: the first of epoch 1's growth
    with pytest.raises(TrainingFailed, match="the loss is nan in epoch 1, step 0: lower"):
        train(task=growing, schedule=GP())


class HungryTask(ToyTask):
    """A task whose evaluation takes more memory than there is."""

    def evaluate(self, model, split="dev"):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 TB")


def test_memory_may_run_out_while_connections_grow_or_in_evaluation():
    growing = BrokenTask(out_of_memory)
    growing.calls = 2  # so that the fifth batch fails: the first of epoch 1's growth
    for task, epoch in (growing, 1), (HungryTask(), 0):
        with pytest.raises(TrainingFailed, match=f"out of memory in epoch {epoch}: lower training"):
            train(task=task, schedule=GP())


class LazyTask(ToyTask):
    """A task that knows how many of its batches are alive."""

    def __init__(self):
        super().__init__()
        self.alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
        self.most = 0

    def batches(self, training, epoch, seed):
        for x, y in super().batches(training, epoch, seed):
            made = x.clone()
            self.alive.add(made)
            self.most = max(self.most, len(self.alive))
            yield made, y
            del made


@pytest.mark.parametrize("schedule", [Dense(), GP()])
def test_an_epochs_batches_are_never_there_all_at_once(schedule):
    task = LazyTask()
    trained = train(task=task, schedule=schedule, training=SMALL_BATCHES)
    assert equal_weights(trained, train(schedule=schedule, training=SMALL_BATCHES))
    assert task.most <= 3


class DrawingTask(ToyTask):
    """A task that draws from torch's own generator, as a data loader that shuffles does."""

    def batches(self, training, epoch, seed):
        torch.rand(1)
        return super().batches(training, epoch, seed)


def test_to_count_the_batches_draws_no_random_number():
    run = _Run(ToyTask().build(ARCHITECTURE), DrawingTask(), Dense(), TRAINING, None, 0, list)
    before = torch.get_rng_state()
    run.count_batches()

    assert run.batches_per_epoch == 4
    assert torch.get_rng_state().equal(before)


class ShrinkingTask(ToyTask):
    """A task with fewer batches in every epoch."""

    def batches(self, training, epoch, seed):
        return list(super().batches(training, epoch, seed))[epoch:]


class GrowingTask(ToyTask):
    """A task with more batches in every epoch."""

    def batches(self, training, epoch, seed):
        return list(super().batches(training, epoch, seed)) * (1 + epoch)


def test_an_epoch_with_more_batches_than_the_first_ends_at_its_own_learning_rate():
    run = _Run(ToyTask().build(ARCHITECTURE), GrowingTask(), Dense(), TRAINING, None, 0, list)
    run.count_batches()
    run.epoch = TRAINING.epochs - 1
    run.train_epoch()

    assert run.optimizer.param_groups[0]["lr"] == learning_rate(TRAINING, 1.0)


class NoBatches(ToyTask):
    """A task that drops every batch that is not full, and none is."""

    def batches(self, training, epoch, seed):
        return []


@pytest.mark.parametrize(("task", "epoch"), [(NoBatches(), 0), (ShrinkingTask(), 4)])
@pytest.mark.parametrize("schedule", [Dense(), GP(), RigL()])
def test_a_task_that_gives_no_batch_is_told_in_one_line(task, epoch, schedule):
    message = rf"^the task toy gives no batch in epoch {epoch}: .* training.batch_size \(16\)$"
    with pytest.raises(TrainingFailed, match=message):
        train(task=task, schedule=schedule)


class FullTask(ToyTask):
    """A task for whose second batch there is no memory."""

    def batches(self, training, epoch, seed):
        yield next(super().batches(training, epoch, seed))
        raise MemoryError


def test_memory_may_run_out_while_a_batch_is_made():
    with pytest.raises(TrainingFailed, match="out of memory in epoch 0: lower training"):
        train(task=FullTask())


def test_every_batch_is_made_after_a_pause():
    told: list[str] = []

    class Told(ToyTask):
        def batches(self, training, epoch, seed):
            for batch in super().batches(training, epoch, seed):
                told.append("batch")
                yield batch

    grow_and_prune(
        Told().build(ARCHITECTURE), Told(), GP(), TRAINING, pause=lambda: told.append("pause")
    )
    assert "batch" in told
    assert all(before == "pause" for before, one in pairwise(told) if one == "batch")


class NumpyTask(ToyTask):
    """A task whose metrics are numpy's numbers."""

    def evaluate(self, model, split="dev"):
        return {name: np.float64(value) for name, value in super().evaluate(model, split).items()}


def test_metrics_may_be_numpys(tmp_path):
    train(tmp_path, task=NumpyTask())
    (tmp_path / "history.csv").unlink()
    train(tmp_path, task=NumpyTask())  # the checkpoint can be read
    assert (tmp_path / "history.csv").exists()


class LostTask(ToyTask):
    """A task whose development error is no number."""

    def evaluate(self, model, split="dev"):
        return {"err": float("nan")}


def test_an_error_that_is_no_number_ends_a_training():
    with pytest.raises(TrainingFailed, match="the development error is nan after epoch 0"):
        train(task=LostTask())


class UnevenTask(ToyTask):
    """A task whose sequences, and with them its batches' losses, differ a thousandfold."""

    def loss(self, model, batch):
        return super().loss(model, batch) * (1000 if batch[1][0] else 1)


def test_a_loss_may_be_large_for_some_batches():
    assert not train(task=UnevenTask(), schedule=Dense()).training


class NegativeTask(ToyTask):
    """A task whose loss is a log-likelihood ratio, below zero from the start."""

    def loss(self, model, batch):
        return super().loss(model, batch) - 5


def test_a_loss_may_be_negative():
    assert not train(task=NegativeTask(), schedule=Dense()).training


def test_the_best_weights_are_those_of_the_final_density(tmp_path):
    # Lowest while dense, then higher: the dense weights must not come back.
    class Scripted(ToyTask):
        errors = iter([0.1, 0.0, 0.3, 0.3, 0.2, 0.4, 0.2, 0.3])

        def evaluate(self, model, split="dev"):
            return {"err": next(self.errors)}

    seen = {}
    task = Scripted()
    schedule = GMP(final_density=0.2, prune_start=0.25, prune_end=0.25, tolerance=1.0)
    model = task.build(ARCHITECTURE)

    def remember(epoch):
        seen[epoch.epoch] = {k: v.clone() for k, v in model.state_dict().items()}

    grow_and_prune(model, task, schedule, TRAINING, listener=remember)

    # 0.2 is reached in epochs 4 and 6; of equal errors the later network is kept.
    assert all(value.equal(seen[6][name]) for name, value in model.state_dict().items())


class Unrecovering(ToyTask):
    """A task whose error, that of each epoch in turn, rises for good when much is pruned."""

    def __init__(self, begins_with):
        super().__init__()
        self.errors = iter([0.3, 0.1, 0.1, 0.12, 0.9, *[0.8] * 5][begins_with:])
        self.built = []

    def build(self, architecture):
        self.built.append(super().build(architecture))
        return self.built[-1]

    def evaluate(self, model, split="dev"):
        return {"err": next(self.errors)}


@pytest.mark.parametrize("stop_after", [None, 3, 5])
def test_the_network_that_a_gate_takes_back_stays_the_best(tmp_path, stop_after):
    schedule = GMP(prune_start=0.3, prune_end=0.8, tolerance=0.25)
    training = dataclasses.replace(TRAINING, epochs=10)
    told: list[Epoch] = []
    good = {}

    def train_from(epoch, stop_after):
        task = Unrecovering(epoch)

        def listener(epoch):
            told.append(epoch)
            if epoch.epoch == 3:
                good.update({k: v.clone() for k, v in task.built[0].state_dict().items()})
            if epoch.epoch == stop_after:
                raise KeyboardInterrupt

        return train(
            tmp_path, schedule=schedule, training=training, task=task, listener=listener
        )  # fmt: skip

    begins = 0
    if stop_after is not None:
        with pytest.raises(KeyboardInterrupt):
            train_from(0, stop_after)
        begins = stop_after + 1
    end = train_from(begins, None)

    assert [epoch.error for epoch in told] == [0.3, 0.1, 0.1, 0.12, 0.9, *[0.8] * 5]
    assert told[5].event.startswith("restore")
    assert {epoch.phase for epoch in told[5:]} == {"retrain"}
    assert all(value.equal(good[name]) for name, value in end.state_dict().items())


def test_rewiring_of_blocks_forgets_no_best_network():
    run = _Run(
        ToyTask().build(ARCHITECTURE), ToyTask(), Selfish(structure="8x1", final_density=0.3),
        TRAINING, None, 0, list,
    )  # fmt: skip
    run.epoch, run.best = 1, {"error": 0.0}
    assert run.change_masks().startswith("rewire")
    assert run.best == {"error": 0.0}


@pytest.mark.parametrize(
    ("schedule", "event", "density"),
    [
        (Dense(), "", 1.0),
        (GMP(final_density=0.2, prune_start=0.5, prune_end=0.5, tolerance=0.1), "restore", 0.2),
    ],
)
def test_every_epoch_tells_its_own_error(schedule, event, density):
    class Scripted(ToyTask):
        errors = iter([0.3, 0.2, 0.5, 0.4, 0.2])  # the last one after a restoration

        def evaluate(self, model, split="dev"):
            return {"err": next(self.errors)}

    told: list[Epoch] = []
    training = dataclasses.replace(TRAINING, epochs=4)
    train(schedule=schedule, task=Scripted(), training=training, listener=told.append)

    assert [epoch.error for epoch in told] == [0.3, 0.2, 0.5, 0.4]
    assert told[-1].event.startswith(event)
    assert told[-1].density == pytest.approx(density, abs=0.01)


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_the_optimizer_is_the_one_asked_for_and_lets_matrices_decay(name, kind):
    training = dataclasses.replace(TRAINING, optimizer=name, weight_decay=0.3)
    run = _Run(ToyTask().build(ARCHITECTURE), ToyTask(), GP(), training, None, 0, list)
    groups = run.optimizer.param_groups

    assert type(run.optimizer) is kind
    assert {(p.dim(), group["weight_decay"]) for group in groups for p in group["params"]} == {
        (2, 0.3), (1, 0.0),
    }  # fmt: skip


class LoudTask(ToyTask):
    """A task whose losses, and with them its gradients, are large."""

    def loss(self, model, batch):
        return super().loss(model, batch) * 1e6


def test_no_step_is_longer_than_the_clip_allows():
    training = Training(batch_size=64, optimizer="sgd", weight_decay=0.0, warmup=0.0, clip=0.5)
    run = _Run(ToyTask().build(ARCHITECTURE), LoudTask(), Dense(), training, None, 0, list)
    before = torch.nn.utils.parameters_to_vector(run.model.parameters()).detach()
    run.count_batches()
    run.train_epoch()
    after = torch.nn.utils.parameters_to_vector(run.model.parameters()).detach()

    nesterov = 1.9  # what its momentum makes of a first step
    longest = nesterov * training.learning_rate * training.clip
    assert float((after - before).norm()) == pytest.approx(longest, rel=1e-3)


@pytest.mark.parametrize(
    ("shape", "rates"),
    [
        ("cosine", [0.02, 0.5, 1.0, 0.5, 0.001]),
        ("trapezoid", [0.02, 0.5, 1.0, 1.0, 0.001]),
        ("constant", [0.02, 0.5, 1.0, 1.0, 1.0]),
    ],
)
def test_learning_rates(shape, rates):
    training = Training(learning_rate=1.0, warmup=0.2, rate_shape=shape)
    shares = [0.0, 0.1, 0.2, 0.6, 1.0]

    assert [round(learning_rate(training, share), 3) for share in shares] == rates


@pytest.mark.parametrize("lost", ["first_loss", "masks", "history", "optimizer"])
def test_a_checkpoint_of_another_version_is_named(tmp_path, lost):
    train(tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt")
    del state[lost]
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match=f"of another version of gpsearch .*{lost}.*delete it"):
        train(tmp_path)
