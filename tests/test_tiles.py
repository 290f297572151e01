"""Products by tiles are as exact as those of floats, and say where they are not to be used."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gpsearch.kernels.compiled import compiled
from gpsearch.kernels.native import Native, available, native
from gpsearch.kernels.plain import plain
from gpsearch.kernels.tiles import in_tiles, put_product, terms
from tests.memory import before_a_wall
from tests.recurrent import assert_same, layer, leaves, results

pytestmark = pytest.mark.skipif("amx" not in available(), reason="needs a processor with AMX")
EXACT = {"highest": 1e-6, "high": 1e-5}
"""Relative to the result's norm."""


@pytest.fixture(scope="module")
def amx() -> Native:
    kernels = native("amx")
    assert kernels is not None
    return kernels


@pytest.fixture(params=EXACT)
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    """One of torch's words for how exact products of floats have to be."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


def error(product: Tensor, left: Tensor, right: Tensor) -> float:
    exact = left.double() @ right.double()
    return float((product - exact).norm() / exact.norm())


def drawn(rows: int, columns: int, *, turned: bool, apart: bool) -> Tensor:
    """A random matrix; turned: column by column, apart: a part of a larger one."""
    if turned:
        return drawn(columns, rows, turned=False, apart=apart).mT
    return torch.randn(rows, columns + 5 * apart)[:, 2 * apart :][:, :columns]


@given(
    sizes=st.tuples(st.integers(300, 600), st.integers(64, 300), st.integers(300, 600)),
    turned=st.tuples(st.booleans(), st.booleans()),
    apart=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_product_is_as_exact_as_that_of_floats(
    amx: Native,
    sizes: tuple[int, int, int],
    turned: tuple[bool, bool],
    apart: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    rows, inner, columns = sizes
    left = drawn(rows, inner, turned=turned[0], apart=apart)
    right = drawn(inner, columns, turned=turned[1], apart=apart)
    around = torch.full((rows, columns + 2), 7.0)
    assert put_product(amx, left, right, around[:, 1:-1])
    assert error(around[:, 1:-1], left, right) < EXACT["highest"]
    assert (around[:, [0, -1]] == 7.0).all()


@pytest.mark.parametrize(
    ("rows", "inner", "columns"),
    [(333, 70, 301), (320, 64, 320), (1100, 600, 200), (600, 200, 5000), (600, 2000, 600)],
    ids=["edges", "whole tiles", "right as a whole", "right by columns", "right by both"],
)
@pytest.mark.parametrize("turned", [False, True])
def test_products_read_and_write_nothing_beyond_their_matrices(
    amx: Native, rows: int, inner: int, columns: int, turned: bool
) -> None:
    shapes = (rows, inner), (inner, columns), (rows, columns)
    left, right, out = (before_a_wall(4 * a * b).view(torch.float32).view(a, b) for a, b in shapes)
    if turned:
        left, right = (one.view(one.shape[::-1]).mT for one in (left, right))
    left.copy_(torch.randn(rows, inner))
    right.copy_(torch.randn(inner, columns))
    assert put_product(amx, left, right, out)
    assert error(out, left, right) < EXACT["highest"]


def test_the_precision_that_torch_is_asked_for_is_kept(amx: Native, precision: str) -> None:
    torch.manual_seed(0)
    left, right, out = (torch.randn(512, 512) for _ in range(3))
    assert put_product(amx, left, right, out)
    assert error(out, left, right) < EXACT[precision]
    assert (error(out, left, right) > 1e-6) == (terms() == 2)


def test_tiny_and_huge_numbers_keep_their_digits(amx: Native) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(400, 400) * 1e-31, torch.randn(400, 400) * 1e15
    out = torch.empty(400, 400)
    assert put_product(amx, left, right, out)
    assert error(out, left, right) < EXACT["highest"]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e20])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_numbers_without_terms_are_left_to_others(
    amx: Native, value: float, turned: bool, side: str
) -> None:
    usual, odd = (drawn(333, 333, turned=turned, apart=False) for _ in range(2))
    odd[331, 77] = value
    left, right = (odd, usual) if side == "left" else (usual, odd)
    assert not put_product(amx, left, right, torch.empty(333, 333))
    assert in_tiles(amx, odd.contiguous()[None], 32, 32, 3, flip=turned) is None


def test_small_products_and_few_rows_are_left_to_others(amx: Native) -> None:
    assert not put_product(amx, torch.ones(100, 400), torch.ones(400, 100), torch.empty(100, 100))
    for inner in (0, 63):
        left, right = torch.ones(400, inner), torch.ones(inner, 400)
        assert not put_product(amx, left, right, torch.empty(400, 400))
    for of_float, rows in ((3, 25), (2, 17)):
        assert in_tiles(amx, torch.ones(1, 40, 40), rows - 1, 99, of_float, flip=False) is None
        assert in_tiles(amx, torch.ones(1, 40, 40), rows, 10, of_float, flip=False) is None
        assert in_tiles(amx, torch.ones(1, 40, 40), rows, 99, of_float, flip=False) is not None


def test_torch_s_settings_by_backend_leave_full_precision() -> None:
    """In a process of its own: torch cannot be asked any more then, and can hardly be set back."""
    code = "import torch; torch.backends.cuda.matmul.fp32_precision = 'tf32'\n"
    code += "from gpsearch.kernels.tiles import terms; print(terms())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "3\n"


def test_kernels_without_tiles_have_none() -> None:
    usual = native("avx512")
    assert usual is not None
    ones = torch.ones(400, 400)
    assert not put_product(usual, ones, ones, torch.empty(400, 400))
    assert in_tiles(usual, ones[None], 64, 64, 3, flip=False) is None


@pytest.mark.parametrize("batch", [25, 64, 100])
@pytest.mark.parametrize(("widths", "direct"), [((70,), True), ((40, 33), False)])
def test_the_recurrence_equals_the_written_out_one(
    amx: Native, precision: str, batch: int, widths: tuple[int, ...], direct: bool
) -> None:
    """Several bands of rows, whole and not, several pieces of long sums, all sides uneven.

    With tanh, since of so many ReLUs some stand within rounding of 0.
    """
    torch.manual_seed(0)
    example = layer(
        2, 42, batch, 90, 141, widths, activation="tanh", direct=direct, dtype=torch.float32
    )
    for leaf in leaves(example):
        leaf.detach().mul_(0.1)
    ours = results(partial(compiled, amx), example)
    assert_same(ours, results(plain, example), 10 * EXACT[precision])
    usual = results(partial(compiled, cast(Native, native("avx512"))), example)
    assert not torch.equal(ours[0], usual[0])  # or tiles had no part in it


def test_threads_change_results_by_rounding(amx: Native) -> None:
    """In one thread rows are enough for tiles, in three they are not."""
    torch.manual_seed(0)
    example = layer(1, 25, 48, 90, 80, (70,), activation="tanh", dtype=torch.float32)
    for leaf in leaves(example):
        leaf.detach().mul_(0.1)
    found, before = {}, torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found[threads] = results(partial(compiled, amx), example)
    torch.set_num_threads(before)
    assert not torch.equal(found[1][0], found[3][0])
    assert_same(found[1], found[3], 1e-6)


def test_sums_that_overflow_saturate_gates_as_floats_do(amx: Native) -> None:
    torch.manual_seed(0)
    xs, h0, c0, gates = layer(
        1, 16, 64, 300, 80, (90,), activation="tanh", direct=False, dtype=torch.float32
    )
    with torch.no_grad():
        xs[0].abs_().mul_(1e25)
        gates[0].ih.abs_().mul_(1e20)
        ours, wanted = (run(xs, h0, c0, gates)[0] for run in (partial(compiled, amx), plain))
    assert wanted.isfinite().all()
    torch.testing.assert_close(ours, wanted)


def test_infinite_inputs_and_weights_saturate_gates_as_floats_do(amx: Native) -> None:
    torch.manual_seed(0)
    xs, h0, c0, gates = layer(1, 33, 32, 40, 48, (50,), direct=False, dtype=torch.float32)
    with torch.no_grad():
        xs[0][1, 3, 5] = math.inf
        gates[0].dense[0].weight[2, 7, 11] = math.inf
        ours, wanted = (run(xs, h0, c0, gates)[0] for run in (partial(compiled, amx), plain))
    assert torch.equal(ours.isnan(), wanted.isnan())
    assert not wanted.isnan().all()
    torch.testing.assert_close(ours, wanted, equal_nan=True)
