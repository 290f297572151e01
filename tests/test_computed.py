import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from gpsearch.computed import copied, own_weights


def test_what_is_masked_by_torch_can_be_copied():
    layer = nn.Linear(4, 3)
    prune.random_unstructured(layer, "weight", 0.5)
    x = torch.randn(2, 4)
    again = copied(layer)

    assert torch.equal(again(x), layer(x))
    with torch.no_grad():
        layer.get_parameter("weight_orig").zero_()
    assert again(x).abs().sum() != layer(x).abs().sum()


def test_weights_are_what_a_module_reads():
    plain, pruned, positive = (nn.Linear(4, 3) for _ in range(3))
    prune.random_unstructured(pruned, "weight", 6)
    parametrize.register_parametrization(positive, "weight", nn.ReLU())

    assert [*map(id, own_weights(plain))] == [id(plain.weight), id(plain.bias)]
    for layer in (pruned, positive):
        bias, weight = sorted(own_weights(layer), key=lambda one: one.dim())
        assert bias is layer.bias
        assert torch.equal(weight, layer.weight)
    assert (pruned.weight == 0).sum() == 6
    assert (positive.weight >= 0).all()
