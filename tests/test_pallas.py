"""The Pallas kernels without a GPU: values in the interpreter, lowering to CUDA, plans and errors."""

import dataclasses
import re
import shutil
import subprocess

import emulator
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import planar
import pytest
from backends import ONLY_WITH_A_GPU, for_a_gpu

import pallas_kernels
from fdk_jax import models
from fdk_jax.format import codebooks, packing
from fdk_jax.models.cache import KVCache
from fdk_jax.models.config import ModelConfig
from pallas_kernels import choice, dequantise, integer, matvec, mma, tuning, wgmma, xla_call
from pallas_kernels.case import Arrays, Case
from pallas_kernels.ptx import Ptx, shared_bytes
from pallas_kernels.registers import at
from pallas_kernels.target import H200, Target

HALF = jnp.dtype(jnp.bfloat16)
# Widths of codes, and whether the values are evenly spaced: every decoder.
DECODERS = [(1, False), (2, False), (4, False), (8, False), (4, True), (8, True)]


@pytest.mark.parametrize("dtype", sorted(oracle.DTYPES))
@pytest.mark.parametrize("bits", packing.BITS)
@pytest.mark.parametrize(
    ("m", "n", "k", "group_size", "books"),
    [(1, 1, 7, 4, 1), (3, 33, 130, 64, 1), (17, 48, 96, 32, 3), (2, 5, 600, 24, 1)],
)
def test_interpreted_values(rng, dtype, bits, m, n, k, group_size, books):
    arrays, facts, wanted = planar.product(rng, m, n, k, bits, group_size, dtype, books)
    bias = rng.normal(size=n).astype(np.float32)
    y = pallas_kernels.matmul(
        *arrays,
        **facts,
        uniform=False,
        bias=jnp.asarray(bias),
        out_dtype=jnp.float32,
        interpret=True,
    )
    assert y.shape == (m, n)
    assert y.dtype == jnp.float32
    wanted.check(y, bias)


def _launches(text):
    """What a lowered program gives XLA to launch as it stands: the attributes, and the number of operands."""
    found = re.findall(
        r"custom_call @__gpu\$xla\.gpu\.ptx\((.*?)\).*? = \{(.*?)\}, operand_layouts", text
    )
    for operands, attributes in found:
        pairs = re.findall(r'(\w+) = (?:"(.*?)"|(\d+) : i64)', attributes)
        yield {key: value or int(number) for key, value, number in pairs}, operands.count("%")


def _lower(case, run):
    """The program for an NVIDIA GPU, which this machine need not have."""
    shape = jax.ShapeDtypeStruct
    arrays = (
        shape((case.m, case.k), case.x_dtype),
        shape((case.tiles, case.blocks, 2, 8, 32), jnp.uint16),
        shape((case.tiles, case.quads, 64), case.scale_dtype),
        shape((case.books, 2**case.bits), jnp.float32),
        None if case.bias_dtype is None else shape((case.n,), case.bias_dtype),
    )
    with for_a_gpu():
        return jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def _case(
    *shape, group_size=64, books=1, dtype=HALF, scales=HALF, bias=None, out=HALF, uniform=False
):
    return Case(*shape, group_size, books, dtype, scales, bias, out, uniform)


def _tuned_rows():
    """A row of the table for each configuration and decoder in it."""
    rows = {}
    for r in choice.table():
        rows[r["bits"], choice.is_even(r), r["m"], r["kernel"], *r["config"].values()] = r
    return list(rows.values())


@pytest.mark.parametrize("row", _tuned_rows(), ids=lambda r: "{bits}-{m}-{n}-{k}".format(**r))
def test_tuned_rows_lower(row):
    case = _case(row["m"], row["n"], row["k"], row["bits"], uniform=choice.is_even(row))
    target = dataclasses.replace(Target.parse(choice.architecture_of(row)), kind=row["device"])
    plan = choice.choose(case, target)
    assert plan.kernel == row["kernel"]
    text = _lower(
        case, lambda *a: choice.launch(case, plan.kernel, plan.config, Arrays(*a), target)
    )
    assert text.count("mosaic_gpu" if plan.kernel == "mosaic" else "fdk_") >= 1
    # One launch and nothing that reformats the weight.
    assert text.count("stablehlo.custom_call") == 1
    assert "stablehlo.transpose" not in text


@pytest.mark.parametrize("bits", packing.BITS)
@pytest.mark.parametrize("group_size", [8, 16, 32, 64, 96, 128, 192, 1024, 4096])
@pytest.mark.parametrize("m", [1, 9, 40, 2000])
def test_group_sizes_lower(bits, group_size, m):
    half = jnp.dtype(jnp.float16)
    case = _case(m, 33, 2000, bits, group_size=group_size, bias=jnp.dtype(jnp.float32), dtype=half)
    plan = choice.choose(case, H200)
    assert plan.kernel in (*choice.KERNELS, "mosaic", "dequantise")
    _lower(case, lambda *a: choice.launch(case, plan.kernel, plan.config, Arrays(*a), H200))


@pytest.mark.parametrize(
    ("m", "config", "grid"),
    [
        (1, matvec.Config(2, 8, 4, ring=True), (256, 1, 1)),
        (40, wgmma.Config(32, 2, 1, 2, cluster=2), (4, 64, 1)),
    ],
)
def test_what_triton_does_not_launch_is_launched_as_it_stands(m, config, grid):
    case = _case(m, 8192, 1024, 4, bias=HALF)
    kernel = choice.kernel_of(config)
    text = _lower(case, lambda *a: choice.launch(case, kernel, config, Arrays(*a), H200))
    assert text.count("stablehlo.custom_call") == 1
    [(launch, operands)] = _launches(text)
    assert f".entry {launch['name']}(" in launch["kernel_data"]
    assert (launch["block_x"], operands) == (32 * config.warps, 5)
    assert tuple(launch[f"grid_{axis}"] for axis in "xyz") == grid
    source = choice.KERNELS[kernel].source(case, config, H200)
    assert launch["shared_mem_bytes"] == shared_bytes(source)
    assert (".reqnctapercluster 2, 1, 1" in launch["kernel_data"]) == (config.cluster == 2)


@pytest.mark.parametrize(("bits", "uniform"), DECODERS)
def test_candidates_are_written(bits, uniform):
    for m in (1, 8, 16, 32, 64, 256):
        case = _case(m, 200, 1000, bits, uniform=uniform)
        for kernel, config in tuning.candidates(case, H200):
            if config is None:
                source = dequantise.source(case, H200)
            elif choice.unsupported_reason(case, config, H200) is None:
                source = choice.KERNELS[kernel].source(case, config, H200)
            else:
                continue
            assert source.startswith("{") and source.endswith("}")


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="needs the CUDA toolkit's ptxas")
@pytest.mark.parametrize(("bits", "uniform"), DECODERS)
@pytest.mark.parametrize("m", [1, 16, 64, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_candidates_assemble(tmp_path, bits, uniform, m, dtype):
    """NVIDIA's assembler takes the PTX, which the emulator in these tests knows less well."""
    half = jnp.dtype(dtype)
    case = _case(m, 200, 1000, bits, dtype=half, scales=half, out=half, uniform=uniform)
    files = []
    for i, (kernel, config) in enumerate(tuning.candidates(case, H200)):
        if config is None or choice.unsupported_reason(case, config, H200) is not None:
            continue
        source = choice.KERNELS[kernel].source(case, config, H200)
        text = xla_call.entry(source, "kernel", H200, operands=5, threads=32 * config.warps)
        files.append(tmp_path / f"{i}.ptx")
        files[-1].write_text(text)
    for file in files:
        command = ["ptxas", "-arch=sm_90a", "-O1", str(file), "-o", str(file.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_plans_say_why():
    facts = dict(bits=4, group_size=64, out_features=6144, in_features=4096, uniform=False)
    assert pallas_kernels.plan(1, dtype=HALF, **facts).kernel == "matvec"
    assert pallas_kernels.plan(64, dtype=HALF, **facts).kernel == "wgmma"
    assert pallas_kernels.plan(100_000, dtype=HALF, **facts).kernel == "mosaic"
    older = Target.parse("sm_80")
    many = pallas_kernels.plan(100_000, dtype=HALF, target=older, **facts)
    assert many.kernel == "dequantise"
    exact = pallas_kernels.plan(1, dtype=jnp.float32, **facts)
    assert exact.kernel == "plain" and "float32" in str(exact)
    odd = pallas_kernels.plan(1, dtype=HALF, **(facts | {"group_size": 10}))
    assert odd.kernel == "plain" and "group_size=10" in odd.reason
    unknown = pallas_kernels.plan(
        1, dtype=HALF, target=dataclasses.replace(H200, kind="another"), **facts
    )
    assert "NVIDIA H" in unknown.reason


def test_codebooks_that_change_within_a_program_take_smaller_programs():
    case = _case(1, 96, 4096, 4, books=6)
    plan = choice.choose(case, H200)
    assert plan.kernel == "matvec" and plan.config.rows == 16
    assert choice.choose(_case(1, 96, 4096, 4, books=12), H200).kernel == "plain"


def test_errors_name_the_remedy(rng):
    arrays, facts, _ = planar.product(rng, 2, 16, 64, 4, 64, "bfloat16")
    x, packed, scales, codebook = arrays
    with pytest.raises(ValueError, match=r"fdk_jax\.prepare"):
        pallas_kernels.matmul(x, packed[:, :0], scales, codebook, **facts, uniform=False)
    with pytest.raises(ValueError, match=r"scales\.shape"):
        pallas_kernels.matmul(x, packed, scales[:0], codebook, **facts, uniform=False)
    with pytest.raises(ValueError, match=r"codebook\.shape"):
        pallas_kernels.matmul(x, packed, scales, codebook[:, :3], **facts, uniform=False)
    with pytest.raises(NotImplementedError, match="diagonal"):
        pallas_kernels.matmul(*arrays, **facts, uniform=False, config=matvec.Config(diagonal=True))
    with pytest.raises(NotImplementedError, match="cannot be persistent"):
        config = matvec.Config(programs=4, ring=True)
        pallas_kernels.matmul(*arrays, **facts, uniform=False, config=config)


def test_a_cache_file_wins_over_the_package(tmp_path, monkeypatch):
    row = dict(device="here", bits=4, m=1, n=64, k=64, kernel="matvec", us=1.0)
    row["config"] = dict(tiles=1, warps=4, stages=1, columns=1, row_warps=1, diagonal=False)
    path = tmp_path / "tuned.json"
    monkeypatch.setenv("FDK_JAX_TUNED", str(path))
    tuning._write([row], path)
    tuning._write([row | {"us": 2.0}], path)
    choice.table.cache_clear()
    try:
        assert (
            choice.choose(_case(1, 64, 64, 4), dataclasses.replace(H200, kind="here")).config.warps
            == 4
        )
        assert sum(r["device"] == "here" for r in choice.table()) == 1
    finally:
        choice.table.cache_clear()


@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 12, 16, 42, 131, 132, 4096, 42752, 2**29 + 1])
def test_quotients_and_remainders(rng, divisor):
    """Around multiples of the divisor, where a rounded reciprocal would show, to the largest values."""
    near = rng.integers(0, 2**30 // divisor, 60, endpoint=True) * divisor
    values = np.concatenate([near - 1, near, near + 1, [0, 2**30 - 1], rng.integers(0, 2**30, 10)])
    values = np.clip(values, 0, 2**30 - 1).astype(np.uint32)
    ptx, threads = Ptx(), len(values)
    ptx.share(16)
    place = ptx.op("mad.wide.u32", ptx.op("mov.u32", "%tid.x"), 4, "$1", kind="b64")
    value = ptx.op("ld.global.nc.b32", at(place))
    for target, result in (
        ("$2", ptx.quotient(value, divisor)),
        ("$3", ptx.remainder(value, divisor)),
    ):
        place = ptx.op("mad.wide.u32", ptx.op("mov.u32", "%tid.x"), 4, target, kind="b64")
        ptx.do("st.global.b32", at(place), result)
    found = np.full((2, threads), 2**32 - 1, np.uint32)
    emulator.run(ptx.text(), [values, *found], (1, 1), threads)
    np.testing.assert_array_equal(found, np.divmod(values, np.uint32(divisor)))


def _run_ptx(case, config, arrays, bias):
    """A kernel's PTX on numpy: its result, poisoned beforehand."""
    x, packed, scales, codebook = (np.asarray(a) for a in arrays)
    x = np.pad(x, ((0, 0), (0, case.blocks * case.span - case.k)))
    operands = [x, packed, scales, codebook] + ([] if bias is None else [bias])
    out = np.full((case.m, case.n), np.nan, case.out_dtype)
    module = choice.KERNELS[choice.kernel_of(config)]
    threads = 32 * config.warps
    emulator.run(
        module.source(case, config, H200),
        [*operands, out],
        module.grid(case, config),
        threads,
        config.cluster,
    )
    return out


@pytest.mark.parametrize(("bits", "uniform"), DECODERS)
@pytest.mark.parametrize(
    ("m", "n", "k", "group_size", "books", "dtype", "config"),
    [
        (1, 33, 600, 64, 1, "bfloat16", matvec.Config(2, 4, 1, 1)),
        (1, 20, 1100, 128, 1, "bfloat16", matvec.Config(1, 4, 8, 1, 1, True)),
        (3, 48, 700, 32, 3, "float16", matvec.Config(1, 4, 2, 1)),
        (11, 40, 520, 64, 1, "float16", matvec.Config(1, 8, 1, 2, 2)),
        (2, 17, 1030, 1024, 1, "bfloat16", matvec.Config(2, 4, 1, 1)),
        (1, 16, 900, 192, 1, "bfloat16", matvec.Config(1, 8, 1, 1)),
        (5, 16, 300, 8, 1, "float16", matvec.Config(1, 4, 1, 1)),
        (35, 70, 700, 64, 1, "bfloat16", wgmma.Config(32, 1, 2, 2)),
        (9, 192, 300, 32, 3, "float16", wgmma.Config(16, 1, 1, 2)),
        (70, 130, 260, 128, 1, "bfloat16", wgmma.Config(128, 2, 1, 2)),
        (19, 70, 2100, 64, 1, "bfloat16", matvec.Config(2, 4, 1, 2, 2, cluster=2)),
        (3, 33, 1100, 32, 1, "float16", matvec.Config(1, 4, 1, 1, cluster=4)),
        (35, 70, 2100, 64, 1, "bfloat16", wgmma.Config(32, 1, 2, 2, cluster=2)),
        (1, 33, 2100, 64, 1, "bfloat16", matvec.Config(2, 4, 4, ring=True)),
        (3, 48, 700, 32, 3, "float16", matvec.Config(1, 4, 2, 1, ring=True)),
        (9, 20, 1100, 128, 1, "bfloat16", matvec.Config(1, 4, 3, 2, ring=True)),
        (1, 100, 600, 64, 1, "bfloat16", matvec.Config(1, 4, 1, 1, programs=3)),
        (1, 96, 1100, 64, 3, "float16", matvec.Config(1, 4, 3, 1, programs=5)),
        (1, 130, 1100, 32, 1, "bfloat16", matvec.Config(2, 4, 8, 1, 2, True, programs=2)),
        (1, 70, 300, 64, 1, "bfloat16", matvec.Config(1, 4, 1, 1, programs=64)),
        (35, 70, 2100, 64, 1, "bfloat16", wgmma.Config(32, 1, 2, 4, 2, ring=True)),
        (5, 64, 1100, 16, 1, "float16", wgmma.Config(16, 1, 1, 4, ring=True)),
        (70, 130, 1100, 64, 1, "float16", wgmma.Config(64, 2, 1, 2, cluster=4)),
        (130, 130, 300, 64, 1, "bfloat16", wgmma.Config(128, 2, 2, 2, cluster=2)),
        (35, 70, 1300, 64, 1, "bfloat16", mma.Config(32, 2, 2, 2, 2, 2)),
        (19, 96, 900, 32, 3, "float16", mma.Config(32, 1, 2, 3, 4, 4)),
        (9, 33, 600, 16, 1, "bfloat16", mma.Config(16, 1, 1, 4, 4, 4)),
        (70, 40, 520, 128, 1, "float16", mma.Config(64, 1, 2, 2, 2, 2)),
        (41, 40, 700, 64, 1, "bfloat16", mma.Config(48, 1, 2, 4, 2, 2)),
    ],
)
def test_ptx_values_and_bounds(rng, bits, uniform, m, n, k, group_size, books, dtype, config):
    arrays, _, wanted = planar.product(
        rng, m, n, k, bits, group_size, dtype, books, uniform=uniform
    )
    half, single = jnp.dtype(dtype), jnp.dtype(jnp.float32)
    case = Case(m, n, k, bits, group_size, books, half, half, single, single, uniform)
    assert choice.unsupported_reason(case, config, H200) is None
    bias = rng.normal(size=n).astype(np.float32)
    wanted.check(_run_ptx(case, config, arrays, bias), bias)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("wide_scales", [False, True])
@pytest.mark.parametrize(
    ("n", "k", "books", "config"),
    [
        (33, 600, 1, integer.Config(2, 2)),
        (64, 1100, 2, integer.Config(7, 3)),
        (70, 2100, 1, integer.Config(4, 132)),
        (20, 3000, 1, integer.Config(16, 1)),
        (1100, 12000, 1, integer.Config(8, 2)),  # more than the ring holds
        (16 * 150, 300, 150, integer.Config(3, 4)),
    ],
)
def test_integer_kernel(rng, n, k, books, config, dtype, wide_scales):
    (x, packed, scales, codebook), _, wanted = planar.product(rng, 1, n, k, 1, 64, dtype, books)
    half, single = jnp.dtype(dtype), jnp.dtype(jnp.float32)
    scale_dtype = single if wide_scales else half
    case = Case(1, n, k, 1, 64, books, half, scale_dtype, single, single)
    assert choice.unsupported_reason(case, config, H200) is None
    bias = rng.normal(size=n).astype(np.float32)
    arrays = (x, packed, scales.astype(scale_dtype), codebook)
    wanted.check(_run_ptx(case, config, arrays, bias), bias)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "codebook",
    # The last one's difference is rounded such that the sum lands beside the second value.
    [[-0.797, 0.801], [-3.1, 0.01], [70000.0, 71000.0], [2.0, 2.0], [0.0671, 0.2057]],
)
@pytest.mark.parametrize(
    ("m", "config"),
    [(1, matvec.Config(1, 8, 1, 1)), (1, integer.Config(4, 2)), (16, wgmma.Config(16, 1, 4, 2))],
    ids=str,
)
def test_values_of_one_bit_are_exact(rng, codebook, dtype, m, config):
    """An error of all weights alike would add up over x that are all positive."""
    half, single, n, k = jnp.dtype(dtype), jnp.dtype(jnp.float32), 32, 4096
    if dtype == "float16":
        codebook = [min(value, 60000.0) for value in codebook]
    (_, packed, scales, _), facts, _ = planar.product(rng, m, n, k, 1, 64, dtype)
    x = jnp.asarray(1 + 0.1 * rng.normal(size=(m, k)), half)
    interchange, plain = packing.from_planar(packed, scales, in_features=k, **facts)
    values = np.asarray(jnp.asarray(codebook, half), np.float64)
    weight = values[np.asarray(packing.unpack(interchange, 1, k))]
    weight *= np.repeat(np.asarray(plain, np.float64), 64, -1)
    case = Case(m, n, k, 1, 64, 1, half, half, None, single)
    y = _run_ptx(case, config, (x, packed, scales, jnp.asarray([codebook], jnp.float32)), None)
    planar.Wanted(np.asarray(x), [weight], 1).check(y)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("where", ["first", "last", "middle", "code", "between"])
@pytest.mark.parametrize("step", [1 / 7, 1e-39, 1e33])
@pytest.mark.parametrize("config", [matvec.Config(1, 4, 2), wgmma.Config(16, 1, 2, 2)], ids=str)
def test_evenly_spaced_values_are_exact(rng, bits, where, step, dtype, config):
    half, single, n, k, last = jnp.dtype(dtype), jnp.dtype(jnp.float32), 32, 2048, 2**bits - 1
    zero = {"first": 0, "last": last, "middle": last / 2, "code": 5, "between": 5.5}[where]
    codebook = ((np.arange(2**bits) - zero) * step).astype(np.float32)
    assert codebooks.is_uniform(codebook)
    (_, packed, _, _), facts, _ = planar.product(rng, 1, n, k, bits, 64, dtype)
    x = jnp.asarray(1 + 0.1 * rng.normal(size=(1, k)), half)  # errors of all weights alike add up
    scales = jnp.full((2, k // 256, 64), 0.5, half)
    interchange, _ = packing.from_planar(packed, scales, in_features=k, **facts)
    weight = 0.5 * codebook.astype(np.float64)[np.asarray(packing.unpack(interchange, bits, k))]
    case = Case(1, n, k, bits, 64, 1, half, half, None, single, True)
    y = _run_ptx(case, config, (x, packed, scales, jnp.asarray([codebook])), None)
    exact = np.asarray(x, np.float64)
    # The sums are in float32; the least numbers of float32 have fewer digits. 249.5 has more than a bfloat16.
    relative = 1e-3 if (where, bits, dtype) == ("between", 8, "bfloat16") else 2e-6
    bound = relative * (exact @ abs(weight).T).max() + 1e-41
    np.testing.assert_allclose(y, exact @ weight.T, rtol=0, atol=bound)


def test_a_value_of_zero_stays_zero(rng):
    (x, packed, scales, _), _, _ = planar.product(rng, 1, 16, 1024, 4, 64, "bfloat16")
    codebook = (np.arange(16, dtype=np.float32) - 8) / 7
    packed = jnp.full_like(packed, 0x8888)
    case = _case(1, 16, 1024, 4, uniform=True)
    y = _run_ptx(case, matvec.Config(1, 4, 1), (x, packed, scales, codebook), None)
    np.testing.assert_array_equal(y.astype(np.float32), 0)


def test_integer_kernel_is_exact_for_integers(rng):
    arrays, facts, _ = planar.product(rng, 1, 32, 1024, 1, 64, "bfloat16")
    _, packed, scales, _ = arrays
    x = rng.integers(-127, 128, (1, 1024)).astype(np.float32)
    x[:, ::64] = 127  # so that a unit of every plane is the same
    codebook = np.asarray([[-1.0, 3.0]], np.float32)
    interchange, plain = packing.from_planar(packed, scales, in_features=1024, **facts)
    weight = codebook[0][np.asarray(packing.unpack(interchange, 1, 1024))]
    weight = weight * np.repeat(np.asarray(plain, np.float64), 64, -1)
    case = _case(1, 32, 1024, 1, out=jnp.dtype(jnp.float32))
    y = _run_ptx(case, integer.Config(4, 1), (jnp.asarray(x, HALF), packed, scales, codebook), None)
    np.testing.assert_allclose(y, x @ weight.T, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    ("bits", "uniform", "n", "k", "books", "config"),
    [
        (1, False, 33, 600, 1, integer.Config(2, 2)),
        (1, False, 64, 2060, 2, integer.Config(3, 3)),
        (1, False, 20, 1024, 1, integer.Config(16, 132)),
        (1, False, 400, 600, 1, integer.Config(1, 2)),  # more outputs than threads
        (1, False, 70, 1100, 1, matvec.Config(1, 8, 1, 1, 1, True)),
        (2, False, 96, 520, 3, matvec.Config(1, 8, 2, 1, 2)),
        (4, False, 33, 600, 1, matvec.Config(2, 4, 1, 1)),
        (4, False, 40, 1100, 1, matvec.Config(1, 8, 4, 1, 1, True)),
        (4, True, 70, 700, 1, matvec.Config(4, 1, 1, 1)),  # more outputs than threads
        (8, False, 20, 300, 1, matvec.Config(1, 16, 1, 1, 2)),
        (8, True, 100, 300, 1, matvec.Config(2, 8, 1, 1)),
        (4, False, 96, 600, 2, matvec.Config(1, 4, 1, 1, programs=4)),
    ],
)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_sums_and_norms_around_a_product(rng, bits, uniform, n, k, books, config, normed, residual):
    before, behind, weight, _, wanted, inverse = planar.residual_product(
        rng, n, k, books, 70, bits, uniform
    )
    options = dict(norm_eps=planar.NORM_EPS, squares=70) if normed else {}
    case = Case(
        *(1, n, k, bits, 64, books, HALF, HALF, HALF, HALF, uniform), residual=residual, **options
    )
    assert choice.unsupported_reason(case, config, H200) is None
    bias = rng.normal(size=n).astype(HALF)
    _, x, squares = (np.asarray(a) for a in before)
    operands = [np.asarray(case.pad(x)), *map(np.asarray, weight), bias]
    operands += [squares] * normed + [np.asarray(a) for a in behind] * residual
    kernel = choice.KERNELS[choice.kernel_of(config)]
    row, outputs = np.full((1, n), np.nan, HALF), ()
    if residual:
        outputs = (row.copy(), np.full(kernel.squares(case, config, H200), np.nan, np.float32))
    outputs = (row, *outputs)
    emulator.run(
        kernel.source(case, config, H200),
        [*operands, *outputs],
        kernel.grid(case, config),
        32 * config.warps,
    )
    factor = inverse if normed else 1.0
    expectations = [
        e.then(factor=factor, add=bias.astype(np.float64)) for e in wanted.expectations()
    ]
    if residual:
        planar.check_residual(outputs, behind, expectations)
    else:
        oracle.check(row, expectations)


def test_a_product_with_sum_and_norm_is_one_launch(rng):
    before, behind, weight, facts, *_ = planar.residual_product(rng, 64, 1024)
    facts |= dict(uniform=False, eps=1e-5)

    def run(x, weight, residual, scale):
        return pallas_kernels.residual_matmul(
            x, *weight, residual=residual, norm_scale=scale, **facts
        )

    scaled = pallas_kernels.Scaled(*before)
    text = jax.jit(run).trace(scaled, weight, *behind).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call") == 1
    [(_, operands)] = _launches(text)
    assert operands == 7
    with pytest.raises(ValueError, match="norm_scale is None"):
        run(scaled, weight, behind[0], None)
    with pytest.raises(ValueError, match=r"residual is bfloat16\(1, 63\)"):
        run(scaled, weight, behind[0][:, 1:], behind[1])
    with pytest.raises(ValueError, match="squares is bfloat16"):
        run(scaled._replace(squares=scaled.squares.astype(HALF)), weight, *behind)
    for dtype in (jnp.float32, jnp.float16):
        with pytest.raises(NotImplementedError, match="do so apart"):
            run(before[0].astype(dtype), weight, *(a.astype(dtype) for a in behind))


@ONLY_WITH_A_GPU
@pytest.mark.parametrize("bits", [1, 4])
def test_a_decoding_step_has_four_products_a_layer_and_no_norms(bits):
    config = ModelConfig(512, 64, 128, 2, 4, 2, 32)
    cache = KVCache(
        *[(jnp.zeros((1, 2, 64, 32), jnp.bfloat16),) * 2] * 2, jnp.asarray([3], jnp.int32)
    )
    model = models.random_model(config, bits=bits, backend="pallas")
    step = jax.jit(lambda token, cache: model.decode(token, cache)[0])
    traced = step.trace(jnp.asarray([1]), cache)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "add_rms_norm" not in text
    assert "decode_attention" in text
    assert len(list(_launches(text))) == (8 if bits == 1 else 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_integer_kernel_propagates_like_a_dense_product(rng, value):
    arrays, facts, _ = planar.product(rng, 1, 32, 1024, 1, 64, "bfloat16")
    x, packed, scales, _ = arrays
    x = x.at[0, 700].set(value)
    codebook = np.asarray([[-0.5, 0.75]], np.float32)
    interchange, _ = packing.from_planar(packed, scales, in_features=1024, **facts)
    weight = codebook[0][np.asarray(packing.unpack(interchange, 1, 1024))]
    case = _case(1, 32, 1024, 1)
    y = _run_ptx(case, integer.Config(2, 3), (x, packed, scales, codebook), None)
    expected = np.asarray(x, np.float64) @ weight.T
    np.testing.assert_array_equal(y.astype(np.float64), expected)
    assert not np.isfinite(expected).any()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_ptx_propagates_like_a_dense_product(rng, value):
    arrays, _, _ = planar.product(rng, 1, 16, 1024, 1, 64, "bfloat16")
    x, *weight = arrays
    x = x.at[0, 700].set(value)
    case = _case(1, 16, 1024, 1)
    for diagonal in (False, True):
        y = _run_ptx(case, matvec.Config(1, 4, 1, 1, 1, diagonal), (x, *weight), None)
        assert np.isnan(y.astype(np.float32)).all() == np.isnan(value)
        assert not np.isfinite(y.astype(np.float32)).any()


@pytest.mark.parametrize("bits", packing.BITS)
@pytest.mark.parametrize(("group_size", "dtype"), [(64, "bfloat16"), (16, "float16")])
def test_ptx_decodes_whole_weights(rng, bits, group_size, dtype):
    n, k, half = 20, 700, jnp.dtype(dtype)
    arrays, _, _ = planar.product(rng, 1, n, k, bits, group_size, dtype)
    _, packed, scales, codebook = arrays
    case = _case(1, n, k, bits, group_size=group_size, dtype=half, scales=half)
    out = np.full((16 * case.tiles, case.blocks * case.span), np.nan, half)
    operands = [np.asarray(a) for a in (packed, scales, codebook)]
    emulator.run(dequantise.source(case, H200), [*operands, out], (case.tiles, 1), 256)
    interchange, plain = packing.from_planar(
        packed, scales, bits=bits, group_size=group_size, out_features=n, in_features=k
    )
    codes = np.asarray(packing.unpack(interchange, bits, k)).astype(int)
    values = np.asarray(codebook[0].astype(half)).astype(np.float64)[codes]
    values *= np.repeat(np.asarray(plain).astype(np.float64), group_size, -1)[:, :k]
    np.testing.assert_array_equal(out[:n, :k], values.astype(half))
