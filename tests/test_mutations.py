"""Tests that can fail: a kernel that is half a percent off, or one row by a percent, passes none of them.

The tests of kernels run here with the kernel's results spoilt, and have to fail by their comparison.
"""

import functools

import decode_attention
import emulator
import jax
import jax.numpy as jnp
import layered
import numpy as np
import pytest
import test_chain
import test_columns
import test_cpu
import test_cpu_decoding
import test_cpu_prompt_attention
import test_decode_attention
import test_grouped
import test_integer_sums
import test_layout
import test_matmul
import test_model_operations
import test_pallas
import test_ptx_values
from backends import BACKENDS, CPU_MISSING

import fdk_jax
import pallas_kernels
from fdk_jax.product import cpu_backend, reference
from pallas_kernels import (
    columns,
    dense,
    integer,
    integer_tokens,
    matvec,
    mma,
    norm,
    plain,
    ring,
    wgmma,
)

HALF_PERCENT = 1.005
needs_cpu = pytest.mark.skipif(CPU_MISSING is not None, reason=str(CPU_MISSING))


def too_large(y: np.ndarray) -> np.ndarray:
    """All results half a percent too large."""
    return y * HALF_PERCENT


def too_small(y: np.ndarray) -> np.ndarray:
    """All results half a percent too small."""
    return y / HALF_PERCENT


def one_row(y: np.ndarray) -> np.ndarray:
    """The outputs of one row of the weight a percent off: the row whose outputs are largest."""
    y = np.array(y)
    row = np.argmax(np.abs(y.reshape(-1, y.shape[-1])).sum(0))
    y[..., row] *= 1.01
    return y


MUTATIONS = pytest.mark.parametrize("spoil", [too_large, one_row])


def fails(test, spoil, monkeypatch, where, name, make) -> None:
    """Runs a test with a function replaced."""
    jax.clear_caches()  # programs that were traced with the right function
    with monkeypatch.context() as patch:
        patch.setattr(where, name, make(getattr(where, name), spoil))
        with pytest.raises(AssertionError, match="worst element"):
            test()
    jax.clear_caches()  # those with the wrong one


def _product(right, spoil):
    """A backend's product whose float32 results are spoilt before they are rounded."""

    @functools.wraps(right)
    def wrong(x, *args, out_dtype=None, **options):
        y = right(x, *args, out_dtype=jnp.float32, **options)
        # With jnp alone, so that it can be traced.
        if spoil is one_row:
            row = jnp.argmax(jnp.abs(y).sum(0))
            y = y * jnp.where(jnp.arange(y.shape[-1]) == row, 1.01, 1.0)[None].astype(y.dtype)
        else:
            y = y * jnp.float32(HALF_PERCENT if spoil is too_large else 1 / HALF_PERCENT)
        return y.astype(x.dtype if out_dtype is None else out_dtype)

    return wrong


ENTRY = {
    "xla": (reference, "matmul"),
    "pallas": (pallas_kernels, "matmul"),
    "cpu": (cpu_backend, "matmul"),
}


@pytest.mark.parametrize("spoil", [too_large, too_small, one_row])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_products(backend, dtype, spoil, rng, monkeypatch):
    def test():
        test_matmul.test_bits_codebooks_and_dtypes(backend, 4, "kmeans", dtype, rng)

    fails(test, spoil, monkeypatch, *ENTRY[backend], _product)


@MUTATIONS
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("lead", "n", "k", "group"), [((1,), 17, 65, 64)])
def test_odd_shapes(backend, lead, n, k, group, spoil, rng, monkeypatch):
    def test():
        test_matmul.test_odd_shapes(backend, 1, lead, n, k, group, rng)

    fails(test, spoil, monkeypatch, *ENTRY[backend], _product)


@MUTATIONS
@needs_cpu
@pytest.mark.parametrize("arithmetic", ["exact", "int16", "int8"])
@pytest.mark.parametrize(("m", "dtype"), [(1, "bfloat16"), (5, "float32")])
def test_arithmetics_of_the_cpu(arithmetic, m, dtype, spoil, rng, monkeypatch):
    def test():
        test_cpu.test_arithmetic(rng, 4, arithmetic, m, dtype)

    fails(test, spoil, monkeypatch, *ENTRY["cpu"], _product)


@MUTATIONS
@pytest.mark.parametrize("bits", [1, 8])
def test_interpreted(bits, spoil, rng, monkeypatch):
    def test():
        test_pallas.test_interpreted_values(rng, "bfloat16", bits, 3, 33, 130, 64, 1)

    fails(test, spoil, monkeypatch, *ENTRY["pallas"], _product)


def _emulated(right, spoil):
    """The emulator with spoilt results: of the arrays that were poisoned before the kernel ran."""

    def wrong(source, arrays, *args, **options):
        outputs = [
            a for a in arrays if a.dtype.kind not in "iub" and np.isnan(a.astype(float)).all()
        ]
        result = right(source, arrays, *args, **options)
        for a in outputs:
            a[...] = spoil(a.astype(np.float64)).astype(a.dtype)
        return result

    return wrong


PTX_KERNELS = [
    ((1, 33, 600, 64, 1, "bfloat16", matvec.Config(2, 4, 1, 1)), (4, False)),
    ((3, 48, 700, 32, 3, "float16", matvec.Config(1, 4, 2, 1)), (4, True)),
    ((9, 192, 300, 32, 3, "float16", wgmma.Config(16, 1, 1, 2)), (2, False)),
    ((5, 64, 1100, 16, 1, "float16", wgmma.Config(16, 1, 1, 4, ring=True)), (8, True)),
    ((9, 33, 600, 16, 1, "bfloat16", mma.Config(16, 1, 1, 4, 4, 4)), (4, False)),
]


@MUTATIONS
@pytest.mark.parametrize(("case", "decoder"), PTX_KERNELS, ids=str)
def test_ptx(case, decoder, spoil, rng, monkeypatch):
    def test():
        test_ptx_values.test_ptx_values_and_bounds(rng, *decoder, *case)

    fails(test, spoil, monkeypatch, emulator, "run", _emulated)


@MUTATIONS
@pytest.mark.parametrize("lane_copies", [False, True])
def test_ptx_of_integers(lane_copies, spoil, rng, monkeypatch):
    config = integer.Config(2, 2, lane_copies)

    def test():
        test_ptx_values.test_integer_kernel(rng, 33, 600, 1, config, "bfloat16", False)

    fails(test, spoil, monkeypatch, emulator, "run", _emulated)


@MUTATIONS
@pytest.mark.parametrize("bits", [2, 4])
def test_ptx_of_integers_of_more_bits(bits, spoil, rng, monkeypatch):
    case = 33, 512, 1, 64, "bfloat16", "bfloat16", integer.Config(2, 2)

    def test():
        test_integer_sums.test_integer_kernel_of_two_and_four_bits(rng, bits, *case)

    fails(test, spoil, monkeypatch, emulator, "run", _emulated)


@MUTATIONS
def test_ptx_of_integers_of_several_tokens(spoil, rng, monkeypatch):
    config = integer_tokens.Config(2, 2)

    def test():
        test_ptx_values.test_integer_kernel_of_several_tokens(
            rng, 3, 33, 600, 1, 64, "bfloat16", "bfloat16", config
        )

    fails(test, spoil, monkeypatch, emulator, "run", _emulated)


@MUTATIONS
def test_ptx_of_a_stream(spoil, rng, monkeypatch):
    config = test_chain.ring.Config(4, 2)

    def test():
        test_chain.test_a_streamed_product(rng, 4, False, 33, 512, 1, config, "bfloat16")

    fails(test, spoil, monkeypatch, emulator, "run", _emulated)


@MUTATIONS
def test_plain(spoil, rng, monkeypatch):
    def make(right, spoil):
        def wrong(*args, **options):
            y = np.asarray(right(*args, **options), np.float64)
            return spoil(y).astype(np.float32)

        return wrong

    def test():
        test_layout.test_the_plain_kernel_in_the_interpreter(rng, 2, 3, 48, 600, 24, "float32", 3)

    fails(test, spoil, monkeypatch, plain, "matmul", make)


@MUTATIONS
@needs_cpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_prompt_attention_of_the_cpu(dtype, spoil, rng, monkeypatch):
    def make(right, spoil):
        def wrong(*args, **options):
            y = right(*args, **options)
            heads = jnp.moveaxis(y, 2, 0).reshape(y.shape[2], -1).T  # a head's outputs for a row's
            spoilt = _product(lambda x, out_dtype: heads.astype(jnp.float32), spoil)(heads)
            return jnp.moveaxis(spoilt.T.reshape(y.shape[2], *y.shape[:2], y.shape[3]), 0, 2)

        return wrong

    def test():
        case = test_cpu_prompt_attention.CASES[1]
        test_cpu_prompt_attention.test_agrees_with_float64(rng, None, dtype, case)

    fails(test, spoil, monkeypatch, cpu_backend, "prompt_attention", make)


@MUTATIONS
@pytest.mark.parametrize("residual", [False, True])
def test_ptx_of_sums_and_norms(residual, spoil, rng, monkeypatch):
    config = matvec.Config(2, 4, 1, 1)

    def test():
        test_ptx_values.test_sums_and_norms_around_a_product(
            rng, 4, False, 33, 600, 1, config, True, residual
        )

    fails(test, spoil, monkeypatch, emulator, "run", _emulated)


@MUTATIONS
@pytest.mark.parametrize(("bits", "uniform"), [(1, False), (2, True), (4, False)])
def test_ptx_of_chains(bits, uniform, spoil, rng, monkeypatch):
    config = test_chain.ring.Config(2, 3)

    def test():
        test_chain.test_values_of_a_chain(rng, bits, uniform, (1, 1, 1, 1), config, 4, False)

    fails(test, spoil, monkeypatch, emulator, "run", _emulated)


def test_ptx_of_layers(rng):
    """Each part of a layer, spoilt in each way, after one run."""
    made = layered.make(rng, ring.Config(4, 4))
    plan, arrays, _, x = made
    found, *caches = layered.run(plan, arrays, x)
    layered.check(*made, (found, *caches))
    for part in ("qkv", "mixed", "sum_scaled", "inner", "scaled", "total"):
        for spoil in (too_large, too_small, one_row):
            wrong = spoil(found[part].astype(np.float64)).astype(found[part].dtype)
            with pytest.raises(AssertionError, match="worst element"):
                layered.check(*made, (found | {part: wrong}, *caches))


@MUTATIONS
def test_dense(spoil, rng, monkeypatch):
    def test():
        test_model_operations.test_dense_kernel(rng, 3, 256, 256, "bfloat16")

    fails(test, spoil, monkeypatch, dense, "matmul", _product)


@MUTATIONS
@pytest.mark.parametrize("which", [0, 1])
def test_sums_and_norms(which, spoil, rng, monkeypatch):
    def make(right, spoil):
        def wrong(*args, **options):
            both = list(right(*args, **options))
            both[which] = spoil(np.asarray(both[which], np.float64)).astype(both[which].dtype)
            return tuple(both)

        return wrong

    def test():
        test_model_operations.test_add_rms_norm_kernel(rng, 128, "bfloat16")

    fails(test, spoil, monkeypatch, norm, "add_rms_norm", make)
    if cpu_backend.unavailable_reason() is None:
        fails(test, spoil, monkeypatch, cpu_backend, "add_rms_norm", make)


@MUTATIONS
def test_a_block_of_columns(spoil, rng, monkeypatch):
    def make(right, spoil):
        def wrong(*args, **options):
            out, codes = right(*args, **options)
            return spoil(np.asarray(out, np.float64)).astype(np.float32), codes

        return wrong

    def test():
        test_columns.test_a_block_of_columns(2, 40, False, True, rng)

    fails(test, spoil, monkeypatch, columns, "rounded", make)


@MUTATIONS
@needs_cpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("rows", [True, False])
def test_dense_of_the_cpu(dtype, rows, spoil, rng, monkeypatch):
    def make(right, spoil):
        def wrong(x, w, *, rows, out_dtype):
            y = right(x, w, rows=rows, out_dtype=jnp.float32)
            return _product(lambda x, out_dtype: y, spoil)(x, out_dtype=jnp.dtype(out_dtype))

        return wrong

    def test():
        test_cpu_decoding.test_dense(rng, None, 3, 64, 256, rows, dtype)

    fails(test, spoil, monkeypatch, cpu_backend, "dense", make)


@MUTATIONS
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kernel", ["pallas", pytest.param("cpu", marks=needs_cpu), "ptx", "split"])
def test_attention(kernel, dtype, spoil, rng, monkeypatch):
    def make(right, spoil):
        def wrong(*args, **options):
            mixed, keys, values = right(*args, **options)
            heads = np.asarray(mixed, np.float64).reshape(-1, 64).T  # a head's outputs for a row's
            return jnp.asarray(spoil(heads).T.reshape(mixed.shape), mixed.dtype), keys, values

        return wrong

    def test():
        arguments, norms = decode_attention.inputs(rng, 2, 2, 3, 64, 128, dtype, False)
        found = test_decode_attention.run_attention(kernel, *arguments, norms=norms, splits=1)
        decode_attention.check(found, arguments, norms)

    fails(test, spoil, monkeypatch, test_decode_attention, "run_attention", make)


@MUTATIONS
@pytest.mark.parametrize("backend", BACKENDS)
def test_groups(backend, spoil, rng, monkeypatch):
    def make(right, spoil):
        def wrong(x, *args, out_dtype=None, **options):
            y = right(x, *args, out_dtype=jnp.float32, **options)
            return _product(lambda x, out_dtype: y, spoil)(x, out_dtype=out_dtype)

        return wrong

    def test():
        test_grouped.test_bits_and_dtypes(backend, 8, rng)

    fails(test, spoil, monkeypatch, fdk_jax, "grouped_matmul", make)
