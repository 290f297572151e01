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
    pruned, halved = nn.Linear(4, 3), nn.Linear(4, 3)
    prune.random_unstructured(pruned, "weight", 6)
    parametrize.register_parametrization(halved, "weight", nn.Threshold(0.0, 0.0))

    for layer in (nn.Linear(4, 3), pruned, halved):
        found = {id(weight) for weight in own_weights(layer) if layer is not halved}
        assert found == ({id(layer.weight), id(layer.bias)} if layer is not halved else set())
    assert (next(w for w in own_weights(pruned) if w.dim() == 2) == 0).sum() == 6
    assert any((w.dim() == 2) and (w >= 0).all() for w in own_weights(halved))
