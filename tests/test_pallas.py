"""The Pallas kernels without a GPU: the plain one in the interpreter, lowering to CUDA, plans and errors."""

import dataclasses
import re
import subprocess

import assemble
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import planar
import pytest
from backends import ONLY_WITH_A_GPU, for_a_gpu
from golden import DECODERS
from planar import HALF

import pallas_kernels
from fdk_jax import models
from fdk_jax.format import packing
from fdk_jax.models.cache import KVCache
from fdk_jax.models.config import ModelConfig
from pallas_kernels import choice, dequantise, matvec, tuning, wgmma, xla_call
from pallas_kernels.case import Arrays
from pallas_kernels.ptx import shared_bytes
from pallas_kernels.target import H200, Target

ASSEMBLERS = list(assemble.assemblers().values())


@pytest.mark.parametrize("dtype", sorted(oracle.DTYPES))
@pytest.mark.parametrize("bits", packing.BITS)
@pytest.mark.parametrize(
    ("m", "n", "k", "group_size", "codebooks"),
    [(1, 1, 7, 4, 1), (3, 33, 130, 64, 1), (17, 48, 96, 32, 3), (2, 5, 600, 24, 1)],
)
def test_interpreted_values(rng, dtype, bits, m, n, k, group_size, codebooks):
    arrays, spec, wanted = planar.product(rng, m, n, k, bits, group_size, dtype, codebooks)
    bias = rng.normal(size=n).astype(np.float32)
    y = pallas_kernels.matmul(
        *arrays,
        **spec,
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
        shape((case.tiles, case.scale_fours, 64), case.scale_dtype),
        shape((case.codebooks, 2**case.bits), jnp.float32),
        None if case.bias_dtype is None else shape((case.n,), case.bias_dtype),
    )
    with for_a_gpu():
        return jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def _tuned_rows():
    """A row of the table for each configuration and decoder in it."""
    rows = {}
    for r in choice.table():
        rows[r["bits"], choice.is_uniform(r), r["m"], r["kernel"], *r["config"].values()] = r
    return list(rows.values())


def test_a_tuned_row_has_a_time_or_says_nothing_of_it():
    assert all(row.get("us", 1.0) > 0 for row in choice.table())


@pytest.mark.parametrize("row", _tuned_rows(), ids=lambda r: "{bits}-{m}-{n}-{k}".format(**r))
def test_tuned_rows_lower(row):
    case = planar.case(row["m"], row["n"], row["k"], row["bits"], uniform=choice.is_uniform(row))
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
    case = planar.case(
        m, 33, 2000, bits, group_size=group_size, bias=jnp.dtype(jnp.float32), dtype=half
    )
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
    case = planar.case(m, 8192, 1024, 4, bias=HALF)
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


def _candidates(case):
    """Those in PTX; Mosaic GPU writes its own, see `test_mosaic`."""
    return [found for found in tuning.candidates(case, H200) if found[0] != "mosaic"]


@pytest.mark.parametrize(("bits", "uniform"), DECODERS)
def test_candidates_are_written(bits, uniform):
    for m in (1, 8, 16, 32, 64, 256):
        case = planar.case(m, 200, 1000, bits, uniform=uniform)
        for kernel, config in _candidates(case):
            if config is None:
                source = dequantise.source(case, H200)
            elif choice.unsupported_reason(case, config, H200) is None:
                source = choice.KERNELS[kernel].source(case, config, H200)
            else:
                continue
            assert source.startswith("{") and source.endswith("}")


@pytest.mark.skipif(not ASSEMBLERS, reason="no ptxas: neither on PATH nor of nvidia-cuda-nvcc")
@pytest.mark.parametrize(("bits", "uniform"), DECODERS)
@pytest.mark.parametrize("m", [1, 16, 64, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_candidates_assemble(tmp_path, bits, uniform, m, dtype):
    """NVIDIA's assembler takes the PTX, which the emulator in these tests knows less well."""
    half = jnp.dtype(dtype)
    case = planar.case(m, 200, 1000, bits, dtype=half, scales=half, out=half, uniform=uniform)
    files = []
    for i, (kernel, config) in enumerate(_candidates(case)):
        if config is None or choice.unsupported_reason(case, config, H200) is not None:
            continue
        source = choice.KERNELS[kernel].source(case, config, H200)
        text = xla_call.entry(source, "kernel", H200, operands=5, threads=32 * config.warps)
        files.append(tmp_path / f"{i}.ptx")
        files[-1].write_text(text)
    for file in files:
        command = [ASSEMBLERS[-1], "-arch=sm_90a", "-O1", file, "-o", file.with_suffix(".cubin")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_plans_say_why():
    spec = dict(bits=4, group_size=64, out_features=6144, in_features=4096, uniform=False)
    assert pallas_kernels.plan(1, dtype=HALF, **spec).kernel == "matvec"
    assert pallas_kernels.plan(64, dtype=HALF, **spec).kernel == "mosaic"
    assert pallas_kernels.plan(100_000, dtype=HALF, **spec).kernel == "mosaic"
    older = Target.parse("sm_80")
    many = pallas_kernels.plan(100_000, dtype=HALF, target=older, **spec)
    assert many.kernel == "dequantise"
    exact = pallas_kernels.plan(1, dtype=jnp.float32, **spec)
    assert exact.kernel == "plain" and "float32" in str(exact)
    odd = pallas_kernels.plan(1, dtype=HALF, **(spec | {"group_size": 10}))
    assert odd.kernel == "plain" and "group_size=10" in odd.reason
    unknown = pallas_kernels.plan(
        1, dtype=HALF, target=dataclasses.replace(H200, kind="another"), **spec
    )
    assert "NVIDIA H" in unknown.reason


def test_codebooks_that_change_within_a_program_take_smaller_programs():
    case = planar.case(1, 96, 4096, 4, codebooks=6)
    plan = choice.choose(case, H200)
    assert plan.kernel == "matvec" and plan.config.rows == 16
    assert choice.choose(planar.case(1, 96, 4096, 4, codebooks=12), H200).kernel == "plain"


def test_errors_name_the_remedy(rng):
    arrays, spec, _ = planar.product(rng, 2, 16, 64, 4, 64, "bfloat16")
    x, packed, scales, codebook = arrays
    with pytest.raises(ValueError, match=r"fdk_jax\.prepare"):
        pallas_kernels.matmul(x, packed[:, :0], scales, codebook, **spec, uniform=False)
    with pytest.raises(ValueError, match=r"scales\.shape"):
        pallas_kernels.matmul(x, packed, scales[:0], codebook, **spec, uniform=False)
    with pytest.raises(ValueError, match=r"codebook\.shape"):
        pallas_kernels.matmul(x, packed, scales, codebook[:, :3], **spec, uniform=False)
    with pytest.raises(NotImplementedError, match="diagonal"):
        pallas_kernels.matmul(*arrays, **spec, uniform=False, config=matvec.Config(diagonal=True))
    with pytest.raises(NotImplementedError, match="cannot be persistent"):
        config = matvec.Config(programs=4, ring=True)
        pallas_kernels.matmul(*arrays, **spec, uniform=False, config=config)


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
            choice.choose(
                planar.case(1, 64, 64, 4), dataclasses.replace(H200, kind="here")
            ).config.warps
            == 4
        )
        assert sum(r["device"] == "here" for r in choice.table()) == 1
    finally:
        choice.table.cache_clear()


def test_a_product_with_sum_and_norm_is_one_launch(rng):
    before, after, weight, spec, *_ = planar.residual_product(rng, 64, 1024)
    spec |= dict(uniform=False, eps=1e-5)

    def run(x, weight, residual, scale):
        return pallas_kernels.residual_matmul(
            x, *weight, residual=residual, norm_scale=scale, **spec
        )

    scaled = pallas_kernels.Scaled(*before)
    text = jax.jit(run).trace(scaled, weight, *after).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call") == 1
    [(_, operands)] = _launches(text)
    assert operands == 7
    with pytest.raises(ValueError, match="norm_scale is None"):
        run(scaled, weight, after[0], None)
    with pytest.raises(ValueError, match=r"residual is bfloat16\(1, 63\)"):
        run(scaled, weight, after[0][:, 1:], after[1])
    with pytest.raises(ValueError, match="squares is bfloat16"):
        run(scaled._replace(squares=scaled.squares.astype(HALF)), weight, *after)
    for dtype in (jnp.float32, jnp.float16):
        with pytest.raises(NotImplementedError, match="do so apart"):
            run(before[0].astype(dtype), weight, *(a.astype(dtype) for a in after))


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
