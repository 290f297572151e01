"""Inference in C equals torch's, in every format and on every instruction set that runs here."""

from __future__ import annotations

import copy
import io
import itertools
import math
import os
import random
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gpsearch import HLSTM, HLSTMCell, Stream, UserError, compact
from gpsearch.deploy import load_model, save_model
from gpsearch.kernels import native
from gpsearch.kernels.decode import _CODES, FORMATS, MOST_SEQUENCES, Decoder, Packed
from gpsearch.kernels.native import Native
from gpsearch.quantize import rounded
from tests.memory import before_a_wall

several = settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
KERNELS = [one for name in native.available() if (one := native.native(name))]

pytestmark = pytest.mark.skipif(not KERNELS, reason="the kernels were not built")
each_kernels = pytest.mark.parametrize(
    "kernels", KERNELS, ids=lambda kernels: kernels.instruction_set
)


def multiplied(kernels: Native, weight: Tensor, format: str, x: Tensor) -> Tensor:
    """Weight @ x by a packed matrix; checks that nothing is written beyond the result."""
    packed, rows = Packed(kernels, weight, format), len(weight)
    padded = F.pad(x, (0, int(kernels.decode_stride(len(x))) - len(x)))
    y = torch.zeros(int(kernels.decode_stride(rows)))
    kernels.multiply_matrix(packed.pointer, padded.data_ptr(), y.data_ptr())
    assert not torch.nan_to_num(y[rows:]).any()
    return y[:rows]


def masked(module: Any, density: float, seed: int = 0) -> Any:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.uniform_(-0.5, 0.5, generator=draw)
            if p.dim() == 2:
                p *= torch.rand(p.shape, generator=draw) < density
    return module.eval()


def fitting(weight: Tensor, format: str) -> Tensor:
    """A matrix rounded to what the values of a format can hold."""
    return rounded(weight, format.partition("-")[2] or "float32")


def packed_as(module: Any, choose: Callable[[], str]) -> dict[str, str]:
    """Formats for a module's weights, which are rounded to what these hold."""
    formats = {name: choose() for name, p in module.named_parameters() if p.dim() == 2}
    with torch.no_grad():
        for name, format in formats.items():
            weight = module.get_parameter(name)
            weight.copy_(fitting(weight, format))
    return formats


def decoder(kernels: Native, module: Any, format: str = "windows") -> Decoder:
    packed: Decoder = module.packed(kernels, packed_as(module, lambda: format))
    return packed


def assert_near(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5, equal_nan=True)


# Products


@each_kernels
@several
@given(
    rows=st.integers(1, 140),
    columns=st.integers(1, 90),
    density=st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0]),
    format=st.sampled_from(FORMATS),
    seed=st.integers(0, 2**20),
)
def test_a_packed_matrix_multiplies_as_it_did(kernels, rows, columns, density, format, seed):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=draw)
    weight *= torch.rand(rows, columns, generator=draw) < density
    weight[torch.rand(rows, generator=draw) < 0.2] = 0
    weight = fitting(weight, format)
    x = torch.randn(columns, generator=draw)

    wanted, found = weight @ x, multiplied(kernels, weight, format, x)
    lanes = 2**-19 if format in ("windows", "windows2", "windows4") else 0  # noted in each value
    assert (
        (found - wanted).abs() <= 1e-5 * (1 + wanted.abs()) + lanes * (weight.abs() @ x.abs())
    ).all()


@each_kernels
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_no_number_stays_none(kernels, format):
    x = torch.ones(20)
    zeros = torch.zeros(18, 20)
    zeros[4, 7] = 127
    for value in (float("nan"), float("inf"), -float("inf")):
        x[3] = value  # which only zeros read: 0 * inf is NaN in a dense product
        assert multiplied(kernels, zeros, format, x).isnan().all()
    zeros[4, 7] = float("nan")
    if format.endswith("int8") or format.startswith("windows"):
        assert Packed.bytes_of(kernels, zeros, format) == -1
        return
    assert multiplied(kernels, zeros, format, torch.ones(20)).isnan().tolist() == [
        row == 4 for row in range(18)
    ]


@each_kernels
@pytest.mark.parametrize("format", FORMATS)
def test_denormal_numbers_stay_what_they_are(kernels, format):
    weight, x = torch.full((17, 5), 2.0**-70), torch.full((5,), 2.0**-70)

    found = multiplied(kernels, fitting(weight, format), format, x)
    few_bits = 2.0**-145 if format.endswith("int8") else 0  # of a scale that is nearly denormal
    torch.testing.assert_close(found, torch.full((17,), 5 * 2.0**-140), atol=few_bits, rtol=0)
    assert np.float64(1e-310) * 0.5 > 0  # nobody has set the processor to flush them


@each_kernels
def test_a_column_beyond_16_bits_needs_the_dense_format(kernels):
    weight = torch.zeros(2, 65_536)
    weight[1, -1] = 3

    assert multiplied(kernels, weight, "dense", torch.ones(65_536)).tolist() == [0, 3]
    for format in (one for one in FORMATS if not one.startswith("dense")):
        assert Packed.bytes_of(kernels, weight, format) == -1
        with pytest.raises(ValueError, match=f"no {format}"):
            Packed(kernels, weight, format)


@each_kernels
def test_a_narrow_type_holds_a_matrix_exactly_or_not_at_all(kernels):
    exact = torch.tensor([[127.0, -3.0], [0.0, 254.0]])  # scales 1 and 2
    for format in (one for one in FORMATS if "-" in one):
        assert Packed.bytes_of(kernels, exact, format) > 0
        assert multiplied(kernels, exact, format, torch.ones(2)).tolist() == [124, 254]
        assert Packed.bytes_of(kernels, torch.tensor([[1.0, 0.1]]), format) == -1


@each_kernels
def test_windows_are_for_numbers_with_room_for_a_lane(kernels):
    for small in (1e-38, float("inf"), float("nan")):
        weight = torch.tensor([[127 * small, small]])
        for format in (one for one in FORMATS if one.startswith("windows")):
            assert Packed.bytes_of(kernels, weight, format) == -1


@each_kernels
@pytest.mark.parametrize("format", ["sell16", "windows", "windows2", "windows4", "windows4-int8"])
def test_rows_with_many_weights_are_put_together(kernels, format):
    weight = torch.zeros(128, 512)
    weight[:, 3], weight[::4] = 1, torch.randn(32, 512)
    weight = fitting(weight, format)
    x, together = torch.randn(512) / 16, weight[torch.arange(128).reshape(-1, 4).T.flatten()]

    assert_near(multiplied(kernels, weight, format, x), weight @ x)
    scattered, gathered = (Packed.bytes_of(kernels, one, format) for one in (weight, together))
    assert scattered < 1.05 * gathered


@each_kernels
def test_no_other_pair_of_layout_and_type_can_be_packed(kernels):
    weight = torch.ones(20, 20)
    codes = set(_CODES.values())
    layouts = 1 + max(layout for layout, _ in codes)
    for layout, type in itertools.product(range(layouts), range(3)):
        size = kernels.pack_matrix(layout, type, weight.data_ptr(), 20, 20, kernels.tiles, None)
        assert (size > 0) == ((layout, type) in codes)


@each_kernels
def test_narrow_values_take_the_fewer_bytes(kernels):
    weight = torch.ones(128, 512)
    dense, *narrow = (
        Packed.bytes_of(kernels, fitting(weight, one), one)
        for one in ("dense", "dense-bfloat16", "dense-int8")
    )

    assert [round(dense / one, 1) for one in narrow] == [2, 4]


@each_kernels
@pytest.mark.parametrize("columns", [1, 3, 100, 4090, 4097])  # of 8 bits, the last by other means
@pytest.mark.parametrize("format", ["dense-bfloat16", "dense-int8"])
def test_narrow_values_multiply_as_exactly_as_floats(kernels, columns, format):
    weight = fitting(torch.randn(70, columns), format)
    for scale in (0, 1e-33, 1.0, 30.0, 1e25):
        x = scale * torch.randn(columns) * torch.logspace(-3, 0, columns)
        exact = weight.double() @ x.double()
        error = (multiplied(kernels, weight, format, x) - exact).norm()
        assert error <= 5e-7 * weight.double().norm() * x.double().norm()


@each_kernels
@pytest.mark.parametrize("large", [3, 200, 1e3, 5e3, 1e20])
@pytest.mark.parametrize("format", ["dense", "dense-bfloat16", "dense-int8"])
def test_an_entry_that_no_weight_reads_disturbs_no_other(kernels, large, format):
    weight, x = torch.randn(40, 100), torch.rand(100)
    weight[:, 7], x[7] = 0, large
    weight = fitting(weight, format)

    error = (multiplied(kernels, weight, format, x) - weight @ x).abs()
    assert (error <= 1e-5 + 2**-21 * weight.abs().sum(1)).all()


# Layers


@each_kernels
@several
@given(
    inputs=st.integers(1, 20),
    hidden=st.integers(1, 20),
    widths=st.lists(st.integers(1, 20), max_size=3).map(tuple),
    steps=st.integers(1, 70),
    batch=st.integers(1, 4),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    options=st.fixed_dictionaries(
        {"activation": st.sampled_from(["relu", "leaky_relu", "tanh", "gelu"])},
        optional={
            "num_layers": st.integers(2, 3),
            "bidirectional": st.just(True),
            "gate_direct": st.just(True),
            "bias": st.just(False),
        },
    ),
    ragged=st.booleans(),
    started=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_layers_equal_torchs(
    kernels, inputs, hidden, widths, steps, batch, density, options, ragged, started, seed
):
    module = masked(HLSTM(inputs, hidden, gate_hidden=widths, **options), density, seed)
    draw, formats = torch.Generator().manual_seed(seed), random.Random(seed)
    cells = module.num_layers * (1 + module.bidirectional)
    x = torch.randn(batch, steps, inputs, generator=draw).transpose(0, 1)
    state = None
    if started:
        state = tuple(torch.randn(cells, batch, hidden, generator=draw) for _ in "hc")
    lengths = torch.randint(1, steps + 1, (batch,), generator=draw) if ragged else None

    run = module.packed(kernels, packed_as(module, lambda: formats.choice(FORMATS))).run

    with torch.no_grad():
        assert_near(run(x, state, lengths), module(x, state, lengths=lengths))


@each_kernels
@pytest.mark.parametrize("widths", [(), (5,), (3, 4)])
@pytest.mark.parametrize("format", FORMATS)
def test_cells_equal_torchs(kernels, widths, format):
    cell = masked(HLSTMCell(6, 7, gate_hidden=widths), 0.5)
    x, h, c = torch.randn(3, 6), torch.randn(3, 7), torch.randn(3, 7)
    before = h.clone()

    with torch.no_grad():
        assert_near(decoder(kernels, cell, format).step(x, h, c), cell(x, (h, c)))
    assert h.equal(before)


@each_kernels
@pytest.mark.parametrize("format", FORMATS)
def test_two_thousand_steps_stay_equal(kernels, format):
    module = masked(HLSTM(6, 24, gate_hidden=(20,)), 0.4)
    x = torch.randn(2000, 1, 6)

    with torch.no_grad():
        assert_near(decoder(kernels, module, format).run(x, None), module(x))


@each_kernels
@pytest.mark.parametrize("inputs", [6, 70, 300])
def test_steps_may_be_small_or_large_or_no_number(kernels, inputs):
    """Weights of 8 bits take an entry in three digits or four, or as the float it is."""
    torch.manual_seed(0)
    module = masked(HLSTM(inputs, 70, gate_hidden=(66,), gate_direct=True), 0.7)
    run = decoder(kernels, module, "dense-int8").run
    x = torch.randn(70, 1, inputs) / inputs**0.5
    x[[3, 20, 40]] *= 30
    x[5] = 0
    for odd in (None, 1e4, float("inf"), float("nan")):
        if odd is not None:
            x[50, 0, 2] = odd
        with torch.no_grad():
            found, wanted = run(x, None)[0], module(x)[0]
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4, equal_nan=True)


@each_kernels
@pytest.mark.parametrize("widths", [(), (13,)])
@pytest.mark.parametrize("format", ["dense", "dense-bfloat16", "dense-int8"])
def test_an_infinite_input_spoils_no_later_step(kernels, format, widths):
    """It makes NaN of what pads the state, 29 units, to whole vectors; nothing is to read that."""
    module = HLSTM(12, 29, gate_hidden=widths, activation="tanh").eval()
    for parameter in module.parameters():
        parameter.data[..., 3] = 1  # no zero reads it
    x = torch.randn(9, 1, 12)
    x[0, 0, 3] = math.inf
    run = decoder(kernels, module, format).run

    with torch.no_grad():
        wanted = module(x)
        assert wanted[0].isfinite().all()
        assert_near(run(x, None), wanted)


@each_kernels
@pytest.mark.parametrize("format", ["dense", "dense-bfloat16", "dense-int8"])
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (520, 8), (33, 130), (65, 130), (96, 300)])
def test_products_read_nothing_beyond_a_matrix(kernels, format, rows, columns):
    """Tiles are loaded by instructions that AddressSanitizer does not see."""
    weight = fitting(torch.randn(rows, columns) / 10, format).contiguous()
    args = *_CODES[format], weight.data_ptr(), rows, columns, kernels.tiles
    size = kernels.pack_matrix(*args, None)
    padded = 4 * (-(-columns // 16) * 16 + 16)
    packed, x, y = before_a_wall(size), before_a_wall(padded).view(torch.float32), torch.zeros(640)
    assert kernels.pack_matrix(*args, packed.data_ptr()) == size
    x[:columns] = torch.randn(columns)

    kernels.multiply_matrix(packed.data_ptr(), x.data_ptr(), y.data_ptr())

    assert_near(y[:rows], weight @ x[:columns])


@each_kernels
def test_a_step_that_is_no_number_spoils_what_it_spoils_in_torch(kernels):
    module = masked(HLSTM(6, 5, gate_hidden=(8,), bidirectional=True), 0.3)
    for at in (0, 13, 39):
        x = torch.randn(40, 1, 6)
        x[at, 0, 2] = float("nan")
        with torch.no_grad():
            found, wanted = decoder(kernels, module).run(x, None)[0], module(x)[0]
        assert wanted.isnan().any()
        assert_near(found, wanted)


@each_kernels
def test_threads_do_not_disturb_one_another(kernels):
    module = masked(HLSTM(9, 20, 2, gate_hidden=(12,), bidirectional=True), 0.4)
    run = decoder(kernels, module).run
    xs = [torch.randn(steps, 1, 9) for steps in range(40, 80)]
    alone = [run(x, None) for x in xs]

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda x: run(x, None), xs))

    for (one, _), (other, _) in zip(alone, together, strict=True):
        assert one.equal(other)


def test_weights_that_do_not_fit_are_never_run():
    module = masked(HLSTM(4, 5, gate_hidden=(3,)), 1.0)
    run = decoder(KERNELS[-1], module).run
    for x, state in (
        (torch.zeros(2, 1, 3), None),
        (torch.zeros(2, 1, 4), (torch.zeros(1, 1, 6), torch.zeros(1, 1, 6))),
    ):
        with pytest.raises(ValueError, match="packed for 4 inputs"):
            run(x, state)


# When it is used


def deployed(module: Any) -> Any:
    module.formats = packed_as(module, lambda: "windows")
    return module


def in_c(module: Any, x: Tensor) -> bool:
    """Run a module, and tell whether that was in C."""
    module._deployed = None
    module(x)
    return module._deployed is not None


def test_it_is_for_inference_with_few_sequences():
    module, x = deployed(masked(HLSTM(3, 4, gate_hidden=(5,)), 0.5)), torch.randn(6, 1, 3)
    few, many = (torch.randn(6, batch, 3) for batch in (MOST_SEQUENCES, MOST_SEQUENCES + 1))

    assert not in_c(module, x)
    with torch.no_grad():
        assert in_c(module, x)
        assert in_c(module, few)
        assert not in_c(module, many)
        assert not in_c(module.train(), x)
        assert not in_c(deployed(masked(HLSTM(3, 4, gate_norm=True), 1.0)), x)
        assert not in_c(copy.deepcopy(module).eval().double(), x.double())
        with torch.autocast("cpu"):
            assert not in_c(module.eval(), x)
    module(x)[0].sum().backward()


@pytest.mark.parametrize("batch_first", [False, True])
def test_modules_take_and_give_what_they_did(batch_first):
    module = masked(HLSTM(3, 4, gate_hidden=(5,), batch_first=batch_first), 0.5)
    packed = nn.utils.rnn.pack_sequence([torch.randn(5, 3), torch.randn(2, 3)])
    inputs = [torch.randn(1, 2, 3), torch.randn(6, 3), packed]

    with torch.no_grad():
        wanted = [module(x) for x in inputs]
        found = [deployed(module)(x) for x in inputs]
    assert_near(found[:2], wanted[:2])
    assert_near(found[2][0].data, wanted[2][0].data)
    assert_near(found[2][1], wanted[2][1])


def test_packed_weights_follow_the_parameters():
    module, x = deployed(masked(HLSTM(3, 4, gate_hidden=(5,)), 0.5)), torch.randn(6, 1, 3)

    def is_current() -> bool:
        plain = copy.deepcopy(module)
        plain.formats = {}
        torch.testing.assert_close(module(x), plain(x))
        return module._deployed is not None

    with torch.no_grad():
        assert is_current()
        module.weight_gate1_l0 += 1
        assert is_current()
        module.load_state_dict({name: p + 1 for name, p in module.state_dict().items()})
        assert is_current()
        module.weight_gate_ih_l0 = nn.Parameter(torch.ones(20, 3))
        assert is_current()
        module.weight_gate_hh_l0.data = torch.ones(20, 4)
        assert is_current()
        module.train()
        module.weight_gate_hh_l0.data.zero_()  # which only the way through training makes known
        module.eval()
        assert is_current()


@pytest.mark.parametrize("fused", [False, True])
def test_packed_weights_follow_a_model_that_learns_in_eval_mode(fused):
    """A step of torch's fused optimizers does not count as a change of the parameters."""
    layer, x = deployed(masked(HLSTM(3, 4, gate_hidden=(5,)), 0.5)), torch.randn(6, 1, 3)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, fused=fused)
    for _ in range(2):
        with torch.no_grad():
            found = layer(x)[0]
            assert layer._deployed is not None
        wanted = layer(x)[0]
        torch.testing.assert_close(found, wanted.detach())
        wanted.sum().backward()
        optimizer.step()


def test_weights_that_are_narrow_no_more_are_packed_as_they_are():
    module, x = masked(HLSTM(3, 4, gate_hidden=(5,)), 0.5), torch.randn(6, 1, 3)
    module.formats = packed_as(module, lambda: "windows-int8")

    with torch.no_grad():
        assert in_c(module, x)
        module.weight_gate1_l0 += 0.1 * torch.randn_like(module.weight_gate1_l0)
        found = module(x)
        module.formats = {}
        assert_near(found, module(x))


def test_packed_weights_stay_where_they_are_used():
    module, x = deployed(masked(HLSTM(3, 4, gate_hidden=(5,)), 0.5)), torch.randn(6, 1, 3)
    with torch.no_grad():
        wanted = module(x)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)

    for other in copy.deepcopy(module), torch.load(file, weights_only=False):
        assert other.formats == module.formats
        assert other._deployed is None
        with torch.no_grad():
            assert other(x)[0].equal(wanted[0])


# Files from elsewhere


def damaged(module: Any, random: random.Random) -> None:
    """Change one thing in a module's state, as a damaged or forged file would have it."""
    sizes = [-1, 0, 1, 2, 3, 4, 5, 7, 10**6, 2.0, None, "3", (), (5, 5), (2**40,), True]
    values: list[Any] = [
        *sizes,
        *FORMATS,
        "relu",
        "selu",
        {},
        {"weight_gate1_l0": "zip"},
        {"x": "dense"},
        [],
    ]
    state, parameters = module.__dict__, module._parameters
    name = random.choice([*parameters])
    kind = random.randrange(4)
    if kind == 0:
        named = [key for key in state if not key.startswith("_")]
        state[random.choice([*named, "formats"])] = random.choice(values)
    elif kind == 1:
        shape = [random.choice([0, 1, 3, 5, 20]) for _ in range(random.choice([1, 2, 2, 3]))]
        parameters[name] = nn.Parameter(torch.ones(shape))
    elif kind == 2:
        parameters.pop(name)
    else:
        formats = module.formats if isinstance(module.formats, dict) else {}
        module.formats = {**formats, name: random.choice([*FORMATS, "ROWS", 3, None])}


@pytest.mark.parametrize("seed", range(120))
def test_a_damaged_model_is_refused_or_runs_as_in_torch(tmp_path, seed):
    draw, x = random.Random(seed), torch.randn(6, 1, 3)
    module = deployed(masked(HLSTM(3, 5, gate_hidden=(5,), bidirectional=seed % 2 > 0), 0.5))
    for _ in range(draw.choice([1, 1, 2, 4])):
        damaged(module, draw)
    path = tmp_path / "model.pt"
    save_model(module, path)

    try:
        loaded: Any = load_model(path)
    except UserError:
        return
    plain = copy.deepcopy(loaded)
    plain.formats = {}
    with torch.no_grad():
        assert_near(loaded(x), plain(x))


# Under AddressSanitizer

UNDER_SANITIZER = """
import ctypes, sys
from gpsearch.kernels import native
native.library = lambda: ctypes.CDLL(sys.argv[1])
import pytest
tests = "multiplies_as or multiply_as or put_together or disturbs or layers_equal or cells_equal"
tests += " or sparse_equals or recurrence_at_working"
options = "-q -s -n 0 -o addopts=--import-mode=importlib -p no:cacheprovider -W ignore".split()
few = "not settings and not (written_out_one and (64 or highest and 25 or not highest and 100))"
chosen = f"({tests}) and {sys.argv[2]} or tiles and {few}"
sys.exit(pytest.main([*options, *sys.argv[3:], "-k", chosen]))
"""


def sanitized(folder: Path) -> tuple[Path, str]:
    """Build the kernels with checks of every access; return them and what has to be preloaded."""
    sources = Path(native.__file__).with_name("csrc")
    files = [str(sources / f"{name}.c") for name in ("module", KERNELS[-1].source)]
    flags = ["-std=gnu11", "-O0", "-g", "-shared", "-fPIC", "-fsanitize=address,undefined"]
    include = sysconfig.get_paths()["include"]
    library = folder / "sanitized.so"
    command = ["gcc", *flags, "-fno-sanitize-recover", f"-I{include}", *files, "-o", str(library)]
    done = subprocess.run([*command, "-lm"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"gcc cannot build with sanitizers here: {done.stderr.strip()[-200:]}")
    found = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True)
    return library, found.stdout.strip()


@pytest.mark.skipif(not shutil.which("clang"), reason="needs clang")
@pytest.mark.parametrize("name", ["portable", "avx2", "avx512"])
def test_clang_compiles_the_kernels_too(name, tmp_path):
    source = Path(native.__file__).with_name("csrc") / f"{name}.c"
    command = ["clang", "-std=gnu11", "-O1", "-c", str(source), "-o", str(tmp_path / "kernels.o")]

    assert subprocess.run(command, capture_output=True, text=True, check=False).returncode == 0


@pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc, to build with AddressSanitizer")
def test_the_kernels_stay_within_their_arrays(tmp_path):
    library, preload = sanitized(tmp_path)
    files = [
        __file__,
        *(str(Path(__file__).with_name(f"test_{n}.py")) for n in ("kernels", "tiles")),
    ]

    done = subprocess.run(
        [sys.executable, "-c", UNDER_SANITIZER, str(library), KERNELS[-1].instruction_set, *files],
        capture_output=True,
        text=True,
        env={**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"},
    )

    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_type_is_no_matter(dtype: torch.dtype) -> None:
    model = masked(HLSTM(20, 96, gate_hidden=(80,)), 0.1)
    x = torch.randn(6, 1, 20)
    wanted = model(x)[0]
    torch.set_default_dtype(dtype)
    try:
        small = compact(model)
        stream = Stream(small)
        found = torch.stack([stream(one) for one in x])
    finally:
        torch.set_default_dtype(torch.float32)
    assert_near(found, wanted)


@pytest.mark.skipif(not KERNELS, reason="the kernels were not built")
def test_another_default_device_is_no_matter() -> None:
    with torch.device("meta"):
        packed = Packed(KERNELS[-1], torch.ones(3, 3, device="cpu"), "dense")
    assert packed.pointer > 0


@each_kernels
def test_weights_that_lie_in_one_memory_are_told_apart(kernels):
    model = HLSTM(64, 16, gate_hidden=())
    base = model.get_parameter("weight_ih_l0").detach().clone()
    model.weight_ih_l0, model.weight_hh_l0 = nn.Parameter(base), nn.Parameter(base[:, :16])
    x = torch.randn(5, 1, 64)
    with torch.no_grad():
        wanted = model.eval()(x)[0]
    assert_near(decoder(kernels, model, "dense").run(x, None)[0], wanted)


@pytest.mark.usefixtures("untyped")
@each_kernels
def test_what_is_of_another_type_is_refused_before_it_is_read(kernels):
    packed = decoder(kernels, masked(HLSTM(4, 8, gate_hidden=(6,)), 1.0))
    x = torch.randn(5, 2, 4)
    for wrong, lengths in ((x.double(), None), (x.bfloat16(), None), (x, torch.tensor([5]))):
        with pytest.raises(ValueError, match="packed for 4 inputs"):
            packed.run(wrong, None, lengths)


def test_frozen_weights_in_buffers_and_other_options_are_seen():
    model = masked(HLSTM(4, 8, gate_hidden=(6,)), 1.0)
    model.formats = dict.fromkeys(("weight_gate_ih_l0", "weight_gate_hh_l0"), "dense")
    x = torch.randn(5, 1, 4)

    def both():
        with torch.no_grad():
            plain = copy.deepcopy(model)
            plain.formats = {}
            return model(x)[0], plain(x)[0]

    assert_near(*both())
    model.activation = "tanh"
    assert_near(*both())
    bias = model.get_parameter("bias_gate_l0").detach() + 1
    del model.bias_gate_l0
    model.register_buffer("bias_gate_l0", bias)
    assert_near(*both())
