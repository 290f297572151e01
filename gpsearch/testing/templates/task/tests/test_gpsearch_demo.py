import pytest
import torch
from gpsearch_demo import DemoTask

from gpsearch import UserError, compact, tasks
from gpsearch.candidate import Architecture, Training
from gpsearch.schedule import SCHEDULES
from gpsearch.train import grow_and_prune


def test_it_is_found_by_its_name():
    assert isinstance(tasks.find("demo"), DemoTask)


def test_an_epoch_can_be_repeated():
    task, training = DemoTask(), Training(batch_size=32)
    first, again, next_one = (next(iter(task.batches(training, e, seed=1))) for e in (0, 0, 1))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], next_one[0])


def test_grow_and_prune_learns_it_and_compacting_changes_nothing(tmp_path):
    torch.manual_seed(0)
    task = DemoTask()
    model = task.build(Architecture(layers=1, hidden_size=16, gate_depth=0))
    before = task.loss(model, next(iter(task.batches(Training(), 0, 0)))).item()
    trained = grow_and_prune(
        model, task, SCHEDULES["gp"](), Training(epochs=6, batch_size=32, learning_rate=0.01),
        folder=tmp_path, seed=0,
    )  # fmt: skip
    assert task.loss(trained, next(iter(task.batches(Training(), 0, 0)))).item() < before / 2
    assert task.evaluate(compact(trained)) == task.evaluate(trained)


def test_data_that_it_cannot_read_is_one_line(tmp_path):
    with pytest.raises(UserError, match="--data"):
        DemoTask(tmp_path)
