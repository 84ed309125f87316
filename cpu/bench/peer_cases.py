"""Products to time: this library's, PyTorch's and ONNX Runtime's, each on weights of its own.

A case is a function of (m, k, n, threads) that makes a Product by weights [n, k]. `copies` says how many
weights of a size in bytes the calls are to take turns with.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

GROUP = 64
ARITHMETIC = {"exact": 0, "int16": 1, "int8": 2}
LIBRARY = Path(__file__).parent.parent / "build" / "libfdk.so"


@dataclass
class Product:
    """A product that is ready to be timed."""

    call: Callable[[int], object]  # argument: a counter, which chooses the weights
    bytes_rw: int
    kernel: str | None = None
    keep: object = None  # memory that the calls point to
    error: float | None = None  # relative RMS, of this library's first and last row
    # A product in another process: takes a sample there, of a counter as peers.sample.
    sample: Callable[[list[int]], float] | None = None


# Relative RMS error of bfloat16 results, from activations of 0.5 to 2 and -2 to -0.5: more is a wrong kernel,
# not timed.
_ALLOWED = {"exact": 4e-3, "int16": 4e-3, "int8": 1e-2}


class Unavailable(Exception):
    """A peer that cannot run here; the message says why."""


class Weight(ctypes.Structure):
    """fdk_weight of cpu/include/fdk.h."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("uniform", ctypes.c_int32),
        ("group_size", ctypes.c_int64),
        ("packed", ctypes.c_void_p),
        ("packed_bytes", ctypes.c_size_t),
        ("scales", ctypes.c_void_p),
        ("scales_bytes", ctypes.c_size_t),
        ("scales_dtype", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("codebook", ctypes.c_void_p),
        ("codebook_bytes", ctypes.c_size_t),
        ("num_codebooks", ctypes.c_int64),
    )


class Arguments(ctypes.Structure):
    """fdk_matmul_args of cpu/include/fdk.h."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("m", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("x_bytes", ctypes.c_size_t),
        ("x_dtype", ctypes.c_int32),
        ("y_dtype", ctypes.c_int32),
        ("y", ctypes.c_void_p),
        ("y_bytes", ctypes.c_size_t),
        ("bias", ctypes.c_void_p),
        ("bias_bytes", ctypes.c_size_t),
        ("bias_dtype", ctypes.c_int32),
        ("arithmetic", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


def fdk_case(bits: int, arithmetic: str, copies: Callable[[int], int]):
    """fdk_matmul by k-means codebooks, bfloat16 activations and results."""
    rng = np.random.default_rng()

    def activations(m: int, k: int) -> np.ndarray:
        """Of both signs: sums of one sign alone would hide what the codebook's mean cancels."""
        sign = rng.integers(0, 2, (m, k), np.uint16) << 15
        return rng.integers(0x3F00, 0x3FFF, (m, k), np.uint16) | sign

    @cache
    def problem(k: int, n: int) -> tuple:
        """Weights, their scales and codebook; two rows of x and their product by the first weight."""
        size = k * n * bits // 8
        first = rng.integers(0, 256, size, np.uint8)
        packed = [first.copy() for _ in range(copies(size))]
        scales = [np.full(k * n // GROUP, 0x3C00, np.uint16) for _ in packed]
        codebook = np.sort(rng.standard_normal(2**bits)).astype(np.float32)
        x = activations(2, k)
        return packed, scales, codebook, x, scalar_rows(packed[0], scales[0], x, codebook, k, n)

    def make(m: int, k: int, n: int, threads: int) -> Product:
        library = ctypes.CDLL(str(LIBRARY))
        library.fdk_last_error.restype = ctypes.c_char_p
        packed, scales, codebook, rows, wanted = problem(k, n)
        x = activations(m, k)
        checked = [0, m - 1][: min(m, 2)]
        x[checked] = rows[: len(checked)]
        y = np.empty((m, n), np.uint16)

        def arguments(data: np.ndarray, scale: np.ndarray) -> tuple:
            w = Weight(
                ctypes.sizeof(Weight), n, k, bits, 0, GROUP, data.ctypes.data, data.nbytes,
                scale.ctypes.data, scale.nbytes, 2, 0, codebook.ctypes.data, codebook.nbytes, 1,
            )  # fmt: skip
            a = Arguments(
                ctypes.sizeof(Arguments), m, x.ctypes.data, x.nbytes, 2, 2, y.ctypes.data, y.nbytes,
                None, 0, 0, ARITHMETIC[arithmetic], threads, 0,
            )  # fmt: skip
            return ctypes.byref(w), ctypes.byref(a)

        # Made beforehand: filling them takes as long as a small product.
        made = [arguments(*pair) for pair in zip(packed, scales, strict=True)]
        product = library.fdk_matmul

        def call(i: int) -> None:
            if product(*made[i % len(made)]):
                raise RuntimeError(library.fdk_last_error().decode())

        bytes_rw = packed[0].nbytes + scales[0].nbytes + x.nbytes + y.nbytes
        call(0)
        error = _error_of(_single(y[checked]), wanted[: len(checked)])
        if not error <= _ALLOWED[arithmetic]:
            raise RuntimeError(f"relative RMS error {error:.2e} of {bits} bits, {arithmetic}")
        return Product(call, bytes_rw, keep=(x, y, codebook), error=error)

    def scalar_rows(packed, scales, x, codebook, k: int, n: int) -> np.ndarray:
        """The same by the scalar twin, exact, from float32 activations: float32 [rows, n]."""
        library = ctypes.CDLL(str(LIBRARY))
        y, wide = np.empty((len(x), n), np.float32), _single(x)
        w = Weight(
            ctypes.sizeof(Weight), n, k, bits, 0, GROUP, packed.ctypes.data, packed.nbytes,
            scales.ctypes.data, scales.nbytes, 2, 0, codebook.ctypes.data, codebook.nbytes, 1,
        )  # fmt: skip
        a = Arguments(
            ctypes.sizeof(Arguments), len(x), wide.ctypes.data, wide.nbytes, 0, 0, y.ctypes.data,
            y.nbytes, None, 0, 0, ARITHMETIC["exact"], 0, 0,
        )  # fmt: skip
        library.fdk_isa.restype = ctypes.c_char_p
        before = library.fdk_isa()
        try:
            if library.fdk_set_isa(b"scalar") or library.fdk_matmul(
                ctypes.byref(w), ctypes.byref(a)
            ):
                raise RuntimeError("the scalar twin does not run")
        finally:
            library.fdk_set_isa(before)
        return y

    return make


def _single(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _error_of(found: np.ndarray, wanted: np.ndarray) -> float:
    exact = wanted.astype(np.float64)
    return float(np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2)))


def torch_case(kind: str, copies: Callable[[int], int]):
    """PyTorch's dense bfloat16 product, or its int4 one, with bfloat16 activations."""

    @cache
    def weights_of(k: int, n: int) -> list:
        import torch

        if kind == "dense":
            first = torch.randn(n, k).to(torch.bfloat16)
        else:
            codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
            first = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
        return [first.clone() for _ in range(copies(first.nbytes))]

    def make(m: int, k: int, n: int, threads: int) -> Product:
        try:
            import torch
        except ImportError as error:
            raise Unavailable(str(error)) from error
        torch.set_num_threads(threads)
        x = torch.randn(m, k, dtype=torch.bfloat16)
        weights = weights_of(k, n)
        size = weights[0].nbytes + x.nbytes + 2 * m * n
        if kind == "dense":
            linear = torch.nn.functional.linear
            return Product(lambda i: linear(x, weights[i % len(weights)]), size)
        scales = [torch.ones(k // GROUP, n, 2, dtype=torch.bfloat16) for _ in weights]
        product = torch.ops.aten._weight_int4pack_mm_for_cpu

        def call(i: int) -> object:
            return product(x, weights[i % len(weights)], GROUP, scales[i % len(weights)])

        return Product(call, size + scales[0].nbytes)

    return make


@cache
def _share_onnxruntime_threads(threads: int) -> None:
    """One pool for all sessions, once a process: pools of the others would spin beside it."""
    import onnxruntime as ort

    ort.set_global_thread_pool_sizes(threads, 1)


def onnxruntime_case(bits: int, level: int, copies: Callable[[int], int]):
    """ONNX Runtime's MatMulNBits; level 4 quantises activations to int8, 1 keeps float32."""

    @cache
    def sessions_of(k: int, n: int) -> list:
        import onnx
        import onnxruntime as ort

        rng = np.random.default_rng()
        node = onnx.helper.make_node(
            "MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft", K=k, N=n, bits=bits,
            block_size=GROUP, accuracy_level=level,
        )  # fmt: skip
        packed = rng.integers(0, 256, (n, k // GROUP, GROUP * bits // 8), np.uint8)
        scales = np.full(k * n // GROUP, 0.01, np.float32)
        tensor = onnx.TensorProto.FLOAT
        graph = onnx.helper.make_graph(
            [node],
            "product",
            [onnx.helper.make_tensor_value_info("x", tensor, ["m", k])],
            [onnx.helper.make_tensor_value_info("y", tensor, ["m", n])],
            [onnx.numpy_helper.from_array(packed, "b"), onnx.numpy_helper.from_array(scales, "s")],
        )
        opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)
        options = ort.SessionOptions()
        options.use_per_session_threads = False
        data = model.SerializeToString()
        return [ort.InferenceSession(data, options) for _ in range(copies(packed.nbytes))]

    def make(m: int, k: int, n: int, threads: int) -> Product:
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
        except ImportError as error:
            raise Unavailable(str(error)) from error
        _share_onnxruntime_threads(threads)
        sessions = sessions_of(k, n)
        x = {"x": np.random.default_rng().standard_normal((m, k)).astype(np.float32)}
        bytes_rw = k * n * bits // 8 + k * n // GROUP * 4 + 4 * m * (k + n)
        return Product(lambda i: sessions[i % len(sessions)].run(None, x), bytes_rw)

    return make
