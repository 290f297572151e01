"""The task demo, for gpsearch."""

import torch
from torch import nn

from gpsearch import HLSTM, UserError


class Model(nn.Module):
    def __init__(self, shape):
        super().__init__()
        gates = ("gate_hidden", "activation", "gate_dropout", "gate_direct", "gate_norm")
        options = {name: getattr(shape, name) for name in ("bidirectional", *gates)}
        norm = {"layer": nn.LayerNorm, "batch": nn.BatchNorm1d, "none": nn.Identity}[shape.norm]
        self.added, size = shape.bidirectional and shape.merge == "sum", 2
        self.layers, self.norms = nn.ModuleList(), nn.ModuleList()
        for _ in range(shape.layers):
            self.layers.append(HLSTM(size, shape.hidden_size, batch_first=True, **options))
            size = shape.hidden_size * (2 if shape.bidirectional and not self.added else 1)
            self.norms.append(norm(size))
        self.dropout, self.output = nn.Dropout(shape.dropout), nn.Linear(size, 1)

    def forward(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = layer(x)[0]
            x = sum(x.chunk(2, -1)) if self.added else x
            x = self.dropout(norm(x.flatten(0, 1)).view_as(x))  # a batch norm takes rows
        return self.output(x.mean(1))[:, 0]


class DemoTask:
    """Add the two marked numbers of a sequence."""

    name, metric = "demo", "missed"  # what the tables call the error, from 0 to 1
    notes = ("2,000 sequences of 10 numbers, made up",)  # told to the user at the start

    def __init__(self, data=None):  # data: the path after --data
        if data is not None:
            raise UserError(f"--data {data}: the task demo makes its own data; leave --data out")
        random = torch.Generator().manual_seed(0)
        values = torch.rand(2000, 10, generator=random)
        marks = torch.zeros(2000, 10)
        marks.scatter_(1, torch.rand(2000, 10, generator=random).argsort(1)[:, :2], 1)
        self.x, self.y = torch.stack([values, marks], 2), (values * marks).sum(1)
        self.rows = {"train": slice(1600), "dev": slice(1600, 1800), "test": slice(1800, 2000)}

    def build(self, architecture):
        return Model(architecture)

    def prunable(self, name):
        return name.startswith("layers.") and "bias" not in name

    def batches(self, training, epoch, seed):
        random = torch.Generator().manual_seed(1000 * seed + epoch)
        for rows in torch.randperm(1600, generator=random).split(training.batch_size):
            yield self.x[rows], self.y[rows]

    def loss(self, model, batch):
        x, y = (one.to(next(model.parameters()).device) for one in batch)
        return nn.functional.mse_loss(model(x), y)

    @torch.inference_mode()
    def evaluate(self, model, split="dev"):
        device, rows = next(model.parameters()).device, self.rows[split]
        off = model.eval()(self.x[rows].to(device)).cpu() - self.y[rows]
        return {"missed": float((off.abs() > 0.1).float().mean())}

    def example(self):
        return (self.x[:1],)
