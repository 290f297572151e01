"""The recurrence in torch and in C against the written-out one, and how a padded batch is read."""

from __future__ import annotations

import copy
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.reduction import ForkingPickler
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from gpsearch.cell import HLSTM
from gpsearch.errors import UserError
from gpsearch.kernels.compiled import compiled
from gpsearch.kernels.dormant import clear_dormant, prepared
from gpsearch.kernels.fused import fused
from gpsearch.kernels.gates import Gates, flattened
from gpsearch.kernels.memory import keep_freed_memory
from gpsearch.kernels.native import Native, available, native
from gpsearch.kernels.pattern import Pattern, Patterns
from gpsearch.kernels.plain import ACTIVATIONS, plain
from gpsearch.kernels.products import linear, mkl_is_fast, room_like, torch_is_fast
from gpsearch.kernels.recurrence import recurrence
from gpsearch.kernels.sequence import Padded
from gpsearch.kernels.sparse import kernels_for_sparse, sparse
from gpsearch.kernels.threads import each_in_threads
from gpsearch.kernels.tiles import put_product
from tests.recurrent import Layer, assert_same, layer, leaves, results

KERNELS = {name: cast(Native, native(name)) for name in available()}


def all_awake(
    kernels: Native, xs: list[Tensor], h0: Tensor, c0: Tensor, gates: list[Gates]
) -> tuple[Tensor, Tensor]:
    """Take the way of sparse layers, with every weight awake."""

    def awake(g: Gates) -> Gates:
        ih, hh, *dense = (torch.ones_like(w, dtype=torch.bool) for w in matrices(g))
        return g._replace(patterns=Patterns.of(ih, hh, dense))

    return sparse(kernels, xs, h0, c0, [awake(g) for g in gates])


def matrices(g: Gates) -> list[Tensor]:
    return [g.ih, g.hh, *(d.weight for d in g.dense)]


RUNS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "fused": fused,
    **{name: partial(compiled, kernels) for name, kernels in KERNELS.items()},
    **{f"sparse {name}": partial(all_awake, kernels) for name, kernels in KERNELS.items()},
}
"""The implementations that have to equal `plain`."""
each_run = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
each_kernels = pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS)


sizes = st.integers(1, 5)


@given(
    dirs=st.integers(1, 2),
    steps=st.integers(1, 9),
    batch=sizes,
    inputs=sizes,
    hidden=sizes,
    widths=st.lists(sizes, min_size=1, max_size=3).map(tuple),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    direct=st.booleans(),
    bias=st.booleans(),
    dropout=st.booleans(),
    use=st.sampled_from(["h", "c", "both"]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=30)
@each_run
def test_all_equal_the_written_out_recurrence(run: Any, use: str, seed: int, **shape: Any) -> None:
    torch.manual_seed(seed)
    example = layer(**shape, dtype=torch.float32)
    assert_same(results(run, example, use=use), results(plain, example, use=use), 1e-5)


def masked(example: Layer, density: float) -> tuple[Layer, list[Tensor]]:
    """Put weights to sleep at random; return the masks of all `leaves`, too."""
    xs, h0, c0, gates = example
    masks, masked_gates = [torch.ones_like(one) for one in (*xs, h0, c0)], []
    for g in gates:
        awake = {id(one): torch.rand(one.shape) < density for one in matrices(g)}
        for one in matrices(g):
            one.detach().mul_(awake[id(one)])
        ih, hh, *dense = awake.values()
        masked_gates.append(g._replace(patterns=Patterns.of(ih, hh, dense)))
        own = [one for one in flattened([g]) if one is not None]
        masks += [awake.get(id(one), torch.ones_like(one)) for one in own]
    return (xs, h0, c0, masked_gates), masks


@given(
    dirs=st.integers(1, 2),
    steps=st.integers(1, 6),
    batch=st.integers(1, 40),
    inputs=sizes,
    hidden=sizes,
    widths=st.lists(st.integers(1, 12), min_size=1, max_size=2).map(tuple),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    direct=st.booleans(),
    bias=st.booleans(),
    dropout=st.booleans(),
    use=st.sampled_from(["h", "c", "both"]),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=30)
@each_kernels
def test_sparse_equals_the_masked_recurrence(
    kernels: Native, use: str, density: float, seed: int, **shape: Any
) -> None:
    torch.manual_seed(seed)
    example, masks = masked(layer(**shape, dtype=torch.float32), density)
    hs, cs, *grads = results(partial(sparse, kernels), example, use=use)
    wanted = results(plain, example, use=use)
    masked_grads = [grad * mask for grad, mask in zip(wanted[2:], masks, strict=True)]
    assert_same([hs, cs, *grads], [*wanted[:2], *masked_grads], 1e-5)


@each_run
@pytest.mark.parametrize("dirs", [1, 2])
def test_all_equal_the_written_out_recurrence_at_working_size(run: Any, dirs: int) -> None:
    """Large enough for oneDNN's products, whole tiles, and several blocks of prepared steps."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"steps": 60, "batch": 8, "inputs": 48, "hidden": 64, "widths": (24,)}
    example = layer(dirs, **shape, dtype=torch.float32)
    for leaf in leaves(example):
        leaf.detach().mul_(0.1)
    assert_same(results(run, example), results(plain, example), 1e-5)


@each_run
@pytest.mark.parametrize("widths", [(170,), (33, 170)])
def test_all_equal_the_written_out_recurrence_over_many_rows(run: Any, widths: Any) -> None:
    """Several tiles, parts of panels, pieces of the state's product and blocks of steps.

    With tanh, since of so many ReLUs some stand within rounding of 0.
    """
    torch.manual_seed(0)
    shape: dict[str, Any] = {"steps": 25, "batch": 25, "inputs": 8, "hidden": 170}
    example = layer(1, **shape, widths=widths, activation="tanh", dropout=True, dtype=torch.float32)
    for leaf in leaves(example):
        leaf.detach().mul_(0.1)
    assert_same(results(run, example), results(plain, example), 1e-5)


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@each_kernels
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.usefixtures("threads")
def test_sparse_equals_the_masked_recurrence_at_working_size(kernels: Native, direct: bool) -> None:
    """Large enough for several blocks of steps on the way back, the last a smaller one."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"steps": 11, "batch": 32, "inputs": 1100, "hidden": 12}
    example, masks = masked(
        layer(1, **shape, widths=(9, 5), direct=direct, dtype=torch.float32), 0.1
    )
    for leaf in leaves(example):
        leaf.detach().mul_(0.3)
    hs, cs, *grads = results(partial(sparse, kernels), example)
    wanted = results(plain, example)
    masked_grads = [grad * mask for grad, mask in zip(wanted[2:], masks, strict=True)]
    assert_same([hs, cs, *grads], [*wanted[:2], *masked_grads], 1e-5)


@pytest.mark.parametrize("widths", [(2,), (2, 1)])
def test_gradients_are_those_of_finite_differences(widths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    example = layer(steps=3, batch=1, inputs=1, widths=widths, activation="gelu", dropout=True)
    assert torch.autograd.gradcheck(lambda *_: fused(*example), leaves(example))


@each_run
def test_a_graph_can_be_run_through_twice(run: Any) -> None:
    example = layer(dtype=torch.float32)
    loss = run(*example)[0].sum()
    first = torch.autograd.grad(loss, leaves(example), retain_graph=True)
    again = torch.autograd.grad(loss, leaves(example))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@each_run
def test_states_that_were_written_to_have_no_gradient(run: Any) -> None:
    hs, cs = run(*layer(1, dtype=torch.float32))
    with torch.no_grad():
        cs.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        hs.sum().backward()


@each_run
@pytest.mark.parametrize("use", ["h", "c"])
def test_second_derivatives_are_those_of_the_written_out_recurrence(run: Any, use: str) -> None:
    """As a penalty on gradients needs them, also where a weight is used twice in a row."""
    torch.manual_seed(0)
    found, example = [], layer(1, inputs=2, activation="gelu", dtype=torch.float32)
    for way in (run, plain):
        xs, h0, c0, gates = example
        once = way(xs, h0, c0, gates)
        out = way([once[0][0]], h0, c0, gates)["hc".index(use)]
        grads = torch.autograd.grad(out.sin().sum(), leaves(example), create_graph=True)
        penalty = torch.stack([grad.square().sum() for grad in grads]).sum()
        again = torch.autograd.grad(penalty, leaves(example))
        found.append([*(grad.detach() for grad in grads), *again])
    assert_same(found[0], found[1], 1e-5)
    assert all(one.any() for one in found[0])


@each_run
def test_second_derivatives_of_a_sum_are_not_forgotten(run: Any) -> None:
    """A gradient that comes from a constant has a history, too."""
    example = layer(dtype=torch.float32)
    (grad,) = torch.autograd.grad(run(*example)[0].sum(), example[1], create_graph=True)
    assert grad.requires_grad


@each_run
def test_many_gradients_at_once_are_those_one_by_one(run: Any) -> None:
    torch.manual_seed(0)
    example = layer(dtype=torch.float32)
    hs, _ = run(*example)
    outer = torch.randn(3, *hs.shape)
    wanted = [torch.autograd.grad(hs, leaves(example), one, retain_graph=True) for one in outer]
    found = torch.autograd.grad(hs, leaves(example), outer, is_grads_batched=True)
    assert_same(list(found), [torch.stack(same) for same in zip(*wanted, strict=True)], 1e-5)


@each_run
def test_many_gradients_may_come_of_vmap_too(run: Any) -> None:
    example = layer(dtype=torch.float32)
    hs, _ = run(*example)
    outer = torch.randn(3, *hs.shape)

    def back(one: Tensor) -> Tensor:
        return torch.autograd.grad(hs, example[1], one, retain_graph=True)[0]

    torch.testing.assert_close(torch.vmap(back)(outer), torch.stack([back(one) for one in outer]))


@each_run
def test_what_is_computed_again_is_the_same(run: Any) -> None:
    """Checkpoints let what was kept be looked at once."""
    example = layer(dtype=torch.float32)

    def again(*given: Any) -> tuple[Tensor, Tensor]:
        return checkpoint(run, *given, use_reentrant=False)  # type: ignore[no-any-return]

    assert_same(results(again, example), results(run, example), 1e-6)


@each_run
def test_a_state_may_be_written_to_after_the_call(run: Any) -> None:
    """As by who carries it from one batch to the next."""
    xs, h0, c0, gates = layer(dtype=torch.float32)
    h, c = h0.detach(), c0.detach()
    hs, cs = run(xs, h, c, gates)
    (wanted,) = torch.autograd.grad(hs.sum(), xs[0], retain_graph=True)
    h.copy_(hs[:, -1].detach())
    c.copy_(cs[:, -1].detach())
    assert torch.equal(torch.autograd.grad(hs.sum(), xs[0], retain_graph=True)[0], wanted)
    (again,) = torch.autograd.grad(hs.sum(), xs[0], create_graph=True)
    assert_same([again.detach()], [wanted], 1e-5)


@each_run
def test_second_derivatives_of_what_autocast_has_cast_are_refused(run: Any) -> None:
    example = layer(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = run(*example)[0].sum()
    with pytest.raises(RuntimeError, match="is differentiable once"):
        torch.autograd.grad(loss, leaves(example), create_graph=True)


@each_run
def test_autocast_leaves_single_precision(run: Any) -> None:
    example = layer(dtype=torch.float32)
    usual = results(run, example)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(results(run, example), usual, 0.0)


@each_run
@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_saturated_gates_stay_finite(run: Any, scale: float) -> None:
    torch.manual_seed(0)  # of other numbers, a sum may happen to lie within rounding of 0
    example = layer(dtype=torch.float32)
    for x in example[0]:
        x.detach().mul_(scale)
    ours, oracle = results(run, example), results(plain, example)
    assert_same(ours[:2], oracle[:2], 1e-5)
    assert all(grad.isfinite().all() for grad in ours)


@each_run
def test_not_a_number_stays_in_its_sequence(run: Any) -> None:
    example = layer(batch=2, dtype=torch.float32)
    example[0][0].detach()[1, 0] = torch.nan
    hs, _ = run(*example)
    assert hs[0, 1:, 0].isnan().all()
    assert hs[0, :, 1].isfinite().all()
    assert hs[0, 0].isfinite().all()
    assert hs[1].isfinite().all()


@each_run
@pytest.mark.parametrize("threads", [2, 3], indirect=True)
@pytest.mark.usefixtures("threads")
def test_threads_change_no_output_and_gradients_by_rounding(run: Any) -> None:
    torch.manual_seed(0)
    example = layer(batch=37, hidden=9, widths=(5,), dtype=torch.float32)
    together = results(run, example)
    torch.set_num_threads(1)
    alone = results(run, example)
    assert all(torch.equal(a, b) for a, b in zip(alone[:2], together[:2], strict=True))
    assert_same(alone, together, 1e-6)


def test_the_kernels_in_c_are_chosen_where_there_are_any() -> None:
    hs, _ = recurrence(*layer(dtype=torch.float32))
    assert ("Compiled" if available() else "Fused") in str(hs.grad_fn)


def test_double_precision_goes_the_fused_way() -> None:
    hs, _ = recurrence(*layer())
    assert "Fused" in str(hs.grad_fn)


@each_kernels
@pytest.mark.parametrize("fast", [False, True])
def test_large_products_may_be_torch_s_or_our_own(
    kernels: Native, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("compiled", "products"):
        monkeypatch.setattr(f"gpsearch.kernels.{module}.torch_is_fast", lambda: fast)
    torch.manual_seed(0)
    example = layer(batch=9, hidden=21, widths=(35, 20), direct=False, dtype=torch.float32)
    assert_same(results(partial(compiled, kernels), example), results(plain, example), 1e-5)


@pytest.mark.parametrize(
    ("processor", "fast"),
    [
        ("vendor_id\t: GenuineIntel\nflags\t\t: fma avx2 avx512f avx512dq", True),
        ("vendor_id\t: GenuineIntel\nflags\t\t: fma avx2", True),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fma avx2", True),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fma avx2 avx512f avx512dq", False),
    ],
)
def test_mkl_leaves_avx512_unused_on_processors_that_are_not_intel_s(
    processor: str, fast: bool
) -> None:
    assert mkl_is_fast(processor) is fast


@given(width=st.integers(1, 300))
def test_rows_of_gradients_lie_an_odd_number_of_cache_lines_apart(width: int) -> None:
    room = room_like(torch.zeros(2, 3, width))
    assert room.shape == (2, 3, width)
    if torch_is_fast():
        assert room.stride(1) % 32 == 16


def test_numbers_of_another_type_are_torch_s_to_refuse() -> None:
    xs, h0, c0, gates = layer(1, dtype=torch.float32)
    dense = gates[0].dense[0]
    for other in (
        gates[0]._replace(ih=gates[0].ih.double()),
        gates[0]._replace(dense=(dense._replace(weight=dense.weight.double()),)),
    ):
        with pytest.raises(RuntimeError, match="dtype"):
            recurrence(xs, h0, c0, [other])


@pytest.mark.parametrize("rows", [1, 31, 32, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_is_the_affine_map(rows: int, bias: bool) -> None:
    left, right, add = torch.randn(rows, 7), torch.randn(5, 7), torch.randn(5)
    expected = left @ right.T + add * bias
    torch.testing.assert_close(linear(left, right, add if bias else None), expected)
    transposed = linear(left.T.contiguous().T, right.T.contiguous().T, add if bias else None)
    torch.testing.assert_close(transposed, expected)


def test_memory_is_kept_or_left_alone() -> None:
    assert keep_freed_memory() in (True, False)


# Zeros where weights sleep ------------------------------------------------------------------------


@given(awake=st.lists(st.booleans(), max_size=70), first=st.integers(0, 3))
@each_kernels
def test_what_sleeps_becomes_zero_and_all_else_stays(
    kernels: Native, awake: list[bool], first: int
) -> None:
    mask = torch.tensor([True] * first + awake + [True])
    before = torch.randn(len(mask))
    after = before.clone()
    kernels.clear_dormant(
        after[first:].data_ptr(), mask[first:].data_ptr(), len(awake)
    )  # not aligned, and with something behind it
    assert torch.equal(after, before.where(mask, torch.zeros(())))


@each_kernels
def test_minus_zero_and_not_a_number_sleep_as_zeros(kernels: Native) -> None:
    weights = torch.tensor([-0.0, torch.nan, torch.inf, 1.0]).repeat(5)
    mask = torch.zeros(20, dtype=torch.bool)
    kernels.clear_dormant(weights.data_ptr(), mask.data_ptr(), 20)
    assert weights.view(torch.int32).tolist() == [0] * 20


@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.usefixtures("threads")
def test_dormant_weights_are_cleared_in_every_type_and_layout() -> None:
    for mask in (torch.rand(7, 9) < 0.5, (torch.rand(9, 7) < 0.5).T):
        tensors = [torch.randn(7, 9), torch.randn(7, 9).double(), torch.randn(9, 7).T]
        expected = [tensor * mask for tensor in tensors]
        clear_dormant(tensors, [prepared(mask, tensor) for tensor in tensors])
        assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))


def test_a_network_may_change_its_type_after_its_masks_were_prepared() -> None:
    mask, weights = torch.tensor([True, False] * 20), torch.ones(40)
    awake = prepared(mask, weights)
    doubled = weights.double()
    clear_dormant([doubled], [awake])
    assert torch.equal(doubled, mask.double())


def test_a_mask_that_is_prepared_no_longer_follows_its_original() -> None:
    mask, weights = torch.ones(4, dtype=torch.bool), torch.ones(4)
    awake = prepared(mask, weights)
    mask.zero_()
    clear_dormant([weights], [awake])
    assert weights.tolist() == [1, 1, 1, 1]


# Padded batches -------------------------------------------------------------------------------


def batch_of(rows: list[list[float]]) -> Tensor:
    """[time, batch, 1] from one row for each sequence."""
    return torch.tensor(rows, dtype=torch.float32).T.unsqueeze(2)


def test_each_sequence_is_reversed_by_its_own_length() -> None:
    padded = Padded(4, 2, 2, torch.tensor([2, 4]), torch.device("cpu"))
    ahead, back = padded.split(batch_of([[1, 2, 0, 0], [5, 6, 7, 8]]))
    assert ahead.squeeze(2).T.tolist() == [[1, 2, 0, 0], [5, 6, 7, 8]]
    assert back.squeeze(2).T.tolist() == [[2, 1, 0, 0], [8, 7, 6, 5]]


def test_directions_come_together_in_the_order_of_time() -> None:
    padded = Padded(3, 2, 2, torch.tensor([2, 3]), torch.device("cpu"))
    ahead, back = batch_of([[1, 2, 9], [3, 4, 5]]), batch_of([[-2, -1, 9], [-5, -4, -3]])
    joined = padded.join(torch.stack([ahead, back]))
    assert joined[:, 0].tolist() == [[1, -1], [2, -2], [0, 0]]
    assert joined[:, 1].tolist() == [[3, -3], [4, -4], [5, -5]]
    assert padded.last(torch.stack([ahead, back])).squeeze(2).tolist() == [[2, 5], [-1, -3]]


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4))
@settings(max_examples=20)
def test_splitting_and_joining_give_the_batch_back(lengths: list[int]) -> None:
    steps = max(lengths)
    padded = Padded(steps, len(lengths), 2, torch.tensor(lengths), torch.device("cpu"))
    x = padded.zeroed(torch.randn(steps, len(lengths), 2)).requires_grad_()
    joined = padded.join(torch.stack(padded.split(x)))
    assert torch.equal(joined, torch.cat([x, x], 2))
    joined.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, padded.zeroed(torch.full_like(x, 2.0)))


def test_a_pattern_fills_every_row_of_both_orders_up_to_groups_of_four() -> None:
    mask = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 1]])
    pattern = Pattern.of(mask.bool())
    assert pattern.start.tolist() == [0, 4, 4, 8, 12, 16, 20]
    assert pattern.column.tolist() == [0, 2, 0, 0, *3 * [0, 0, 0, 0], 0, 2, 0, 0]
    assert pattern.place[:8].tolist() == [0, 2, -1, -1, 6, -1, -1, -1]
    assert pattern.start_t.tolist() == [0, 8, 8, 12]
    assert pattern.column_t.tolist() == [0, 2, 3, 4, 5, 0, 0, 0, 0, 5, 0, 0]
    assert pattern.order.tolist() == [0, 4, 8, 12, 16, -1, -1, -1, 1, 17, -1, -1]
    assert pattern.awake == 7


def test_a_copy_of_a_pattern_points_at_arrays_of_its_own() -> None:
    pattern = Pattern.of(torch.eye(3, dtype=torch.bool))
    assert pattern.record.column == pattern.column.data_ptr()
    copied = copy.deepcopy(pattern)
    assert copied.record.column == copied.column.data_ptr() != pattern.record.column
    ForkingPickler.dumps(pattern)  # moves the tensors that it is given
    assert pattern.record.column == pattern.column.data_ptr()


def patterns(density: float) -> Patterns:
    ih, hh = (torch.rand(40, 20) < density for _ in range(2))
    return Patterns.of(ih, hh, [torch.rand(4, 10, 10) < density])


def test_the_density_of_patterns_is_that_of_all_masks_together() -> None:
    masks = torch.eye(4, dtype=torch.bool), torch.ones(4, 2, dtype=torch.bool)
    assert Patterns.of(*masks, [torch.zeros(4, 2, 1, dtype=torch.bool)]).density == 12 / 32


@pytest.mark.parametrize("instruction_set", available())
def test_a_batch_that_leaves_most_lanes_idle_takes_narrower_vectors_or_none(
    instruction_set: str,
) -> None:
    kernels = native(instruction_set)
    assert kernels is not None
    few, many = patterns(0.05), patterns(0.3)
    vector = kernels.lanes(1)
    for batch in (vector // 2 + 1, vector, vector + 1):  # of two vectors the second may idle
        assert kernels_for_sparse(kernels, batch, [few]) is kernels
    narrower = kernels_for_sparse(kernels, vector // 2, [few, few])
    assert narrower is (native("avx2") if vector == 16 else None)
    assert kernels_for_sparse(kernels, vector // 4, [few]) is None
    assert kernels_for_sparse(kernels, vector, [few, None]) is None
    assert kernels_for_sparse(kernels, 16, [few, many]) is kernels
    assert kernels_for_sparse(kernels, 15, [few, many]) is None  # few sequences want more zeros


@pytest.mark.usefixtures("untyped")
@each_kernels
def test_a_product_that_is_none_is_refused_before_anything_is_read(kernels: Native) -> None:
    for right, out in (((5, 6), (3, 6)), ((4, 6), (3, 5))):
        with pytest.raises(ValueError, match="no product of"):
            put_product(kernels, torch.ones(3, 4), torch.ones(right), torch.empty(out))


def test_gradients_whose_sign_is_only_noted() -> None:
    model, x = HLSTM(5, 16, gate_hidden=(8,)), torch.randn(6, 20, 5)
    weights = tuple(model.parameters())
    out = model(x)[0]
    grad = torch.randn_like(out)
    wanted = torch.autograd.grad(out, weights, -grad, retain_graph=True)
    found = torch.autograd.grad(out, weights, torch._neg_view(grad))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


# What does not fit, and what is not to be seen


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("mode", ["train", "sparse", "eval"])
@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [
        ("weight_gate1_l0", 16 * 64, 64),
        ("weight_gate_hh_l0", 256, 640),
        ("weight_gate_ih_l0", 256, 48),
        ("bias_gate_l0", 128, None),
        ("bias_gate1_l0", 512, None),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_anything_is_read(
    mode: str, name: str, rows: int, columns: int | None
) -> None:
    model = HLSTM(32, 64, gate_hidden=(64,))
    if mode == "sparse":
        model.use_masks({n: torch.rand(p.shape) < 0.1 for n, p in model.named_parameters()})
    shape = (rows,) if columns is None else (rows, columns)
    setattr(model, name, torch.nn.Parameter(torch.randn(shape)))
    with pytest.raises(
        (ValueError, RuntimeError), match=r"do not fit|must match|invalid for input"
    ):
        model.train(mode != "eval")(torch.randn(5, 32, 32))


def test_a_mask_of_another_shape_is_refused() -> None:
    model = HLSTM(32, 64, gate_hidden=(64,))
    with pytest.raises(UserError, match=r"weight_gate1_l0 should be \[256, 64\], not \[1024, 64\]"):
        model.use_masks({"weight_gate1_l0": torch.zeros(1024, 64, dtype=torch.bool)})


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # of torch's own counter
@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("density", [0.1, 1.0])
def test_what_is_watched_or_transformed_is_torchs_own(density: float, both_ways: bool) -> None:
    torch.manual_seed(0)
    model = HLSTM(5, 16, gate_hidden=(8,), bidirectional=both_ways)
    x = torch.randn(6, 20, 5)
    if density < 1:
        masks = {n: torch.rand(p.shape) < density for n, p in model.named_parameters()}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.mul_(masks[name])
        model.use_masks({n: mask for n, mask in masks.items() if mask.dim() == 2})
    plainly = model(x)[0].detach()

    graph = make_fx(lambda x: model(x)[0])(x)
    torch.testing.assert_close(graph(x), plainly, atol=1e-5, rtol=1e-5)
    with FlopCounterMode(display=False) as counter:
        model(x)
    each = 2 * 6 * 20 * 4 * ((5 + 16) * 8 + 8 * 16)
    assert counter.get_total_flops() == each * (1 + both_ways)
    many = torch.vmap(lambda x: model(x)[0])(torch.stack([x, -x]))
    torch.testing.assert_close(many[0], plainly, atol=1e-5, rtol=1e-5)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(model(dual)[0]).tangent
    assert tangent is not None
    assert tangent.abs().sum() > 0


def test_a_failed_job_leaves_none_at_work() -> None:
    begun, ended = threading.Event(), threading.Event()

    def job(number: int) -> None:
        if number == 0:
            begun.wait(10)
            raise KeyboardInterrupt
        begun.set()
        time.sleep(0.2)  # still at work when the other has failed, which is to wait for it
        ended.set()

    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyboardInterrupt):
            each_in_threads(job, [(0,), (1,)])
    finally:
        torch.set_num_threads(1)
    assert ended.is_set()


def alive(noted: list[weakref.ref[Tensor]]) -> list[Tensor]:
    return [one for one in (reference() for reference in noted) if one is not None]


def test_sparse_computing_keeps_nothing_after_the_way_back() -> None:
    model = HLSTM(32, 64, gate_hidden=(64,))
    masks = {n: torch.rand(p.shape) < 0.1 for n, p in model.named_parameters()}
    model.use_masks({n: mask for n, mask in masks.items() if mask.dim() == 2})
    kept: list[weakref.ref[Tensor]] = []

    def noted(tensor: Tensor) -> Tensor:
        kept.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(noted, lambda tensor: tensor):
        loss = model(torch.randn(7, 32, 32))[0].sum()
    assert sum(one.numel() for one in alive(kept)) > 7 * 32 * 4 * 64
    loss.backward()
    assert {id(one) for one in alive(kept)} <= {id(p) for p in model.parameters()}


@pytest.mark.parametrize("density", [0.1, 1.0])
@pytest.mark.parametrize("direct", [True, False])
def test_what_is_kept_may_come_back_as_a_copy(density: float, direct: bool) -> None:
    """As from hooks that keep it elsewhere: copies lie in places of their own."""
    model = HLSTM(32, 64, gate_hidden=(64,), gate_direct=direct, activation="tanh")
    masks = {n: torch.rand(p.shape) < density for n, p in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(masks[name])
    model.use_masks({n: mask for n, mask in masks.items() if mask.dim() == 2 and density < 1})
    x, found = torch.randn(40, 32, 32, requires_grad=True), []
    for copied in (torch.Tensor.detach, torch.Tensor.clone):
        with torch.autograd.graph.saved_tensors_hooks(copied, lambda tensor: tensor):
            loss = model(x)[0].square().sum()
        found.append(torch.autograd.grad(loss, [x, *model.parameters()]))
    for one, again in zip(*found, strict=True):
        torch.testing.assert_close(one, again)


def test_weights_that_changed_since_are_noticed_on_the_way_back() -> None:
    for density in (0.1, 1.0):
        model = HLSTM(32, 64, gate_hidden=(64,))
        if density < 1:
            masks = {n: torch.rand(p.shape) < density for n, p in model.named_parameters()}
            model.use_masks({n: mask for n, mask in masks.items() if mask.dim() == 2})
        loss = model(torch.randn(7, 32, 32))[0].sum()
        with torch.no_grad():
            model.get_parameter("weight_gate1_l0").mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
