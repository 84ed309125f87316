"""The C++ library from Python: layout, arithmetic, ISAs, jit and scan, threads, fork, the wheel's hooks."""

import concurrent.futures
import functools
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fdk_jax
from fdk_jax.format import packing
from fdk_jax.product import cpu_backend
from tests import oracle

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    cpu_backend.unavailable_reason() is not None, reason=str(cpu_backend.unavailable_reason())
)


@pytest.fixture
def isa():
    """The module, on its best ISA again afterwards."""
    module = cpu_backend.library()
    yield module
    module.set_isa(None)


def _problem(rng, m, n, k, bits, group_size=64, dtype="bfloat16", codebooks=None):
    """(x, weight in the interchange layout) with random codes, scales and codebooks."""
    dtype = oracle.DTYPES[dtype]
    shape = (2**bits,) if codebooks is None else (codebooks, 2**bits)
    w = fdk_jax.QuantisedTensor(
        packed=packing.pack(rng.integers(0, 2**bits, (n, k)).astype(np.uint8), bits),
        scales=jnp.asarray(rng.uniform(0.5, 2.0, (n, -(-k // group_size))).astype(dtype)),
        codebook=jnp.asarray(np.sort(rng.standard_normal(shape), -1).astype(np.float32)),
        bits=bits,
        group_size=group_size,
        shape=(n, k),
        axes="nk",
        layout="interchange",
        uniform=False,
    )
    return jnp.asarray(rng.standard_normal((m, k)).astype(dtype)), w


def _codes_of_tiled(tiled: np.ndarray, bits: int, n: int, k: int) -> np.ndarray:
    """Codes [n, k], read one by one as the layout's description says."""
    codes = np.zeros((n, k), np.uint8)
    columns = 32 // bits
    for row in range(n):
        for column in range(k):
            step, i = divmod(column, columns)
            if bits == 1:
                byte, shift = (i // 8) * 16 + row % 16, i % 8
            else:
                byte, shift = (row % 16) * 4 + i % 4, bits * (i // 4)
            codes[row, column] = (int(tiled[row // 16, step, byte]) >> shift) % 2**bits
    return codes


@pytest.mark.parametrize("bits", cpu_backend.BITS)
@pytest.mark.parametrize(("n", "k", "group_size"), [(16, 64, 64), (37, 101, 24), (1, 7, 8)])
@pytest.mark.parametrize("traced", [False, True])
def test_tiled_layout(rng, bits, n, k, group_size, traced):
    _, w = _problem(rng, 1, n, k, bits, group_size)
    spec = dict(bits=bits, group_size=group_size, out_features=n, in_features=k)
    to_tiled = functools.partial(packing.convert, source="interchange", target="tiled", **spec)
    from_tiled = functools.partial(packing.convert, source="tiled", target="interchange", **spec)
    if traced:
        to_tiled, from_tiled = jax.jit(to_tiled), jax.jit(from_tiled)
    tiled, scales = to_tiled(w.packed, w.scales)
    np.testing.assert_array_equal(
        _codes_of_tiled(np.asarray(tiled), bits, n, k), oracle.unpack(np.asarray(w.packed), bits, k)
    )
    for row in range(n):
        np.testing.assert_array_equal(scales[row // 16, :, row % 16], w.scales[row])
    packed, back = from_tiled(tiled, scales)
    np.testing.assert_array_equal(packed, w.packed)
    np.testing.assert_array_equal(back, w.scales)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_library_has_the_widths_that_this_package_says(bits):
    source, scales = np.zeros(4 * bits, np.uint8), np.zeros(64, np.uint8)
    targets = np.empty(64 * bits, np.uint8), np.empty(64, np.uint8)
    spec = dict(bits=bits, group_size=32, out_features=1, in_features=32, scale_size=4)
    convert = functools.partial(
        cpu_backend.library().to_tiled, source, scales[:4], *targets, **spec
    )
    if bits in cpu_backend.BITS:
        convert()
        return
    with pytest.raises(ValueError, match=f"must be 1, 2, 4 or 8, not {bits}"):
        convert()


def test_a_width_that_only_the_format_has_is_left_to_xla(rng, monkeypatch):
    w = fdk_jax.quantise(rng.normal(size=(16, 64)).astype(np.float32), 4)
    x = rng.normal(size=(2, 64)).astype(np.float32)
    monkeypatch.setattr(cpu_backend, "BITS", (1, 2, 8))
    prepared = fdk_jax.prepare(w, "cpu")
    assert "codes of (1, 2, 8) bits, not of 4" in str(fdk_jax.explain(x, prepared))
    oracle.check_product(fdk_jax.matmul(x, prepared), x, w)
    with pytest.raises(NotImplementedError, match="not of 4"):
        fdk_jax.matmul(x, prepared, backend="cpu")


def test_tiled_layout_of_stacks(rng):
    spec = dict(bits=4, group_size=32, out_features=19, in_features=70)
    packed = jnp.asarray(rng.integers(0, 256, (2, 3, 19, 35)).astype(np.uint8))
    scales = jnp.asarray(rng.standard_normal((2, 3, 19, 3)).astype(np.float32))
    to_tiled = functools.partial(packing.convert, source="interchange", target="tiled", **spec)
    from_tiled = functools.partial(packing.convert, source="tiled", target="interchange", **spec)
    tiled = to_tiled(packed, scales)
    for i in range(2):
        for j in range(3):
            one = to_tiled(packed[i, j], scales[i, j])
            jax.tree.map(np.testing.assert_array_equal, one, jax.tree.map(lambda a: a[i, j], tiled))  # noqa: B023
    jax.tree.map(np.testing.assert_array_equal, from_tiled(*tiled), (packed, scales))


@pytest.mark.parametrize("arithmetic", ["exact", "int16", "int8"])
@pytest.mark.parametrize("bits", cpu_backend.BITS)
@pytest.mark.parametrize(("m", "dtype"), [(1, "bfloat16"), (5, "float32"), (40, "float16")])
def test_arithmetic(rng, bits, arithmetic, m, dtype):
    x, w = _problem(rng, m, 75, 456, bits, dtype=dtype)
    y = fdk_jax.matmul(x, w, backend="cpu", arithmetic=arithmetic, out_dtype=jnp.float32)
    oracle.check_product(y, x, w, arithmetic=arithmetic)


@pytest.mark.parametrize(("bits", "group_size"), [(1, 64), (2, 96), (4, 64), (4, 40), (8, 128)])
def test_activations_beyond_the_l2_cache(rng, isa, bits, group_size):
    """Parts of 256 tokens by 32 tiles, whose activations AMX asks for ahead."""
    x, w = _problem(rng, 1030, 600, 1032, bits, group_size)
    product = functools.partial(fdk_jax.matmul, w=w, backend="cpu", out_dtype=jnp.float32)
    oracle.check_product(product(x), x, w)
    # So many roundings of x have more ties than the oracle of integers allows for; the scalar twin has
    # the same.
    whole = np.asarray(product(x, arithmetic="int8"))
    rows = np.r_[0, 1029, rng.choice(1030, 30)]
    isa.set_isa("scalar")
    expected = np.asarray(product(x[rows], arithmetic="int8"))
    np.testing.assert_allclose(whole[rows], expected, rtol=0, atol=2e-5 * expected.std())


@pytest.mark.parametrize("arithmetic", ["exact", "int8"])
def test_every_isa(rng, isa, arithmetic):
    x, w = _problem(rng, 3, 50, 328, 4, group_size=40)
    assert isa.isas()[-1] == "scalar"
    for name in isa.isas():
        isa.set_isa(name)
        assert isa.isa() == name
        y = fdk_jax.matmul(x, w, backend="cpu", arithmetic=arithmetic, out_dtype=jnp.float32)
        oracle.check_product(y, x, w, arithmetic=arithmetic)


def test_unknown_isa_is_refused(isa):
    with pytest.raises(ValueError, match="no such ISA: mmx"):
        isa.set_isa("mmx")


@pytest.mark.parametrize("codebooks", [1, 3, 10])
def test_codebooks_of_row_ranges(rng, codebooks):
    x, w = _problem(rng, 4, 30, 130, 2, codebooks=codebooks)
    y = fdk_jax.matmul(x, w, backend="cpu", out_dtype=jnp.float32)
    oracle.check_product(y, x, w)


def test_inside_jit_and_scan_weights_are_not_copied(rng):
    layers = [_problem(rng, 2, 96, 96, 4, dtype="float32") for _ in range(5)]
    x = layers[0][0]
    prepared = [fdk_jax.prepare(w, backend="cpu") for _, w in layers]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *prepared)
    step = lambda h, w: (fdk_jax.matmul(h, w, backend="cpu"), None)  # noqa: E731
    y, _ = jax.jit(lambda h, ws: jax.lax.scan(step, h, ws))(x, stacked)
    expected = np.asarray(x, np.float64)
    for _, w in layers:
        expected = oracle.product(expected, w)
    oracle.check_values(y, expected, slack=1e-5)

    text = jax.jit(lambda h, w: step(h, w)[0]).lower(x, prepared[0]).compile().as_text()
    assert "fdk_matmul" in text
    big = [line for line in text.splitlines() if "copy(" in line and "u8[" in line]
    assert not big, big


def test_vmap(rng):
    x, w = _problem(rng, 6, 40, 72, 4, dtype="float32")
    y = jax.vmap(lambda row: fdk_jax.matmul(row, w, backend="cpu"))(x)
    oracle.check_product(y, x, w)


def test_calls_from_several_python_threads(rng):
    problems = [_problem(rng, m, 200, 256, 4, dtype="float32") for m in (1, 2, 9, 17)]

    def call(problem):
        x, w = problem
        w = fdk_jax.prepare(w, backend="cpu")
        return [np.asarray(fdk_jax.matmul(x, w, backend="cpu")) for _ in range(10)]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for problem, ys in zip(problems, pool.map(call, problems), strict=True):
            for y in ys:
                oracle.check_product(y, *problem)


def _run(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_environment_chooses_threads_and_isa():
    program = """
        from fdk_jax.product import cpu_backend
        print(cpu_backend.describe())
    """
    text = _run(program, FDK_NUM_THREADS="1", FDK_CPU_ISA="scalar")
    assert text.strip() == "C++ library, scalar, 1 threads"


def test_reduce_sum(rng):
    """The probe of bandwidth reads everything, and takes nothing else than int32."""
    library = cpu_backend.library()
    for size in (0, 1, 7, 4099):
        values = rng.integers(-(2**31), 2**31, size).astype(np.int32)
        assert library.reduce_sum(values) == values.sum(dtype=np.int64)
    with pytest.raises(TypeError):
        library.reduce_sum(np.zeros(4, np.int64))
    with pytest.raises(TypeError):
        library.reduce_sum(np.zeros(8, np.int32)[::2])


def test_conversion_after_fork():
    # Only the library: JAX itself does not support fork.
    program = """
        import os, warnings
        import numpy as np
        from fdk_jax.product import cpu_backend
        library = cpu_backend.library()
        rng = np.random.default_rng()
        packed, scales = rng.integers(0, 256, 512 * 256, np.uint8), np.zeros(512 * 8 * 2, np.uint8)
        spec = dict(bits=4, group_size=64, out_features=512, in_features=512, scale_size=2)

        def converted():
            tiled, out = np.zeros_like(packed), np.zeros_like(scales)
            library.to_tiled(packed, scales, tiled, out, **spec)
            return tiled

        before = converted()
        warnings.simplefilter("ignore")
        child = os.fork()
        if child == 0:
            os._exit(0 if np.array_equal(converted(), before) else 1)
        assert os.waitpid(child, 0)[1] == 0
    """
    _run(program)


def test_group_size_that_is_no_multiple_of_eight(rng):
    x, w = _problem(rng, 1, 16, 60, 4, group_size=12)
    with pytest.raises(NotImplementedError, match="multiple of 8, not 12"):
        fdk_jax.matmul(x, w, backend="cpu")


def test_one_of_several_threads_imports_the_library(monkeypatch):
    imports = []

    @functools.cache
    def slowly():
        imports.append(1)
        time.sleep(0.05)
        return "a reason"

    monkeypatch.setattr(cpu_backend, "_load_once", slowly)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: cpu_backend.unavailable_reason(), range(4)))
    assert found == {"a reason"} and imports == [1]


def test_missing_library_says_what_to_do(monkeypatch):
    monkeypatch.setattr(cpu_backend, "_load", lambda: "the C++ library is not built: reason")
    assert cpu_backend.unavailable_reason() == "the C++ library is not built: reason"
    assert cpu_backend.describe() == cpu_backend.unavailable_reason()
    with pytest.raises(
        NotImplementedError, match="not available: the C\\+\\+ library is not built"
    ):
        cpu_backend.library()


def test_build_without_a_compiler_says_so():
    pytest.importorskip("setuptools")
    program = """
        import sys
        sys.path.insert(0, "cpu")
        import build_backend
        assert build_backend._compile() is None
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "FDK_BUILD_CPU")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=environment | {"PATH": "/nonexistent"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler was found" in done.stderr
    assert "install g++" in done.stderr


def test_the_kernel_of_a_product_is_named(rng, isa):
    """`kernel_name` is what the library would run: of the ISA in use, for the dtype, bits and tokens."""
    x, w = _problem(rng, 3, 40, 128, 4)
    name = cpu_backend.kernel_name(x, w)
    assert name is not None
    assert name.split(".")[0] in isa.isas()
    isa.set_isa("scalar")
    for arithmetic in cpu_backend.ARITHMETIC:
        assert cpu_backend.kernel_name(x, w, arithmetic).startswith("scalar.")
    assert "scalar." in fdk_jax.explain(x, fdk_jax.prepare(w, "cpu"), backend="cpu").kernel
