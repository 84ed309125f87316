"""ggml's products through its C interface, from the libraries that llama-cpp-python installs.

Weights lie in the buffer type that repacks them for this processor where ggml has one for their
type, otherwise in the plain one: what ggml itself does when it loads a model.
"""

import ctypes
import importlib.util
import multiprocessing
import signal
import subprocess
import sys
from collections.abc import Callable
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
from peer_cases import Product, Unavailable

# ggml's number of a type, and the bits of its codes.
TYPES = {
    "q8_0": (8, 8),
    "q4_0": (2, 4),
    "iq4_nl": (20, 4),
    "q2_K": (10, 2),
    "tq2_0": (35, 2),
    "q1_0": (41, 1),
    "bf16": (30, 16),
    "f16": (1, 16),
}
_F32 = 0
_Log = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
_silent = _Log(lambda level, text, data: None)
_SIGNATURES = {
    "ggml_log_set": (None, _Log, c_void_p),
    "ggml_init": (c_void_p, "Params"),
    "ggml_new_tensor_2d": (c_void_p, c_void_p, c_int, c_int64, c_int64),
    "ggml_mul_mat": (c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_new_graph": (c_void_p, c_void_p),
    "ggml_build_forward_expand": (None, c_void_p, c_void_p),
    "ggml_tensor_overhead": (c_size_t,),
    "ggml_graph_overhead": (c_size_t,),
    "ggml_nbytes": (c_size_t, c_void_p),
    "ggml_type_name": (c_char_p, c_int),
    "ggml_quantize_chunk": (
        c_size_t, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p,
    ),
    "ggml_backend_buft_get_alloc_size": (c_size_t, c_void_p, c_void_p),
    "ggml_backend_buft_alloc_buffer": (c_void_p, c_void_p, c_size_t),
    "ggml_backend_buffer_get_base": (c_void_p, c_void_p),
    "ggml_backend_buffer_free": (None, c_void_p),
    "ggml_backend_tensor_alloc": (c_int, c_void_p, c_void_p, c_void_p),
    "ggml_backend_tensor_set": (None, c_void_p, c_void_p, c_size_t, c_size_t),
    "ggml_backend_graph_compute": (c_int, c_void_p, c_void_p),
    "ggml_backend_dev_supports_op": (c_bool, c_void_p, c_void_p),
    "ggml_backend_reg_dev_get": (c_void_p, c_void_p, c_size_t),
    "ggml_backend_reg_get_proc_address": (c_void_p, c_void_p, c_char_p),
    "ggml_backend_cpu_reg": (c_void_p,),
    "ggml_backend_cpu_init": (c_void_p,),
    "ggml_backend_cpu_buffer_type": (c_void_p,),
    "ggml_backend_cpu_set_n_threads": (None, c_void_p, c_int),
}  # fmt: skip


class Params(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class Ggml:
    """The functions of ggml that are needed, and its CPU backend."""

    def __init__(self):
        """Loads the libraries.

        Raises:
            Unavailable: llama-cpp-python is not installed, or its ggml has another interface.
        """
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or spec.origin is None:
            raise Unavailable("No module named 'llama_cpp' (pip install llama-cpp-python)")
        folder = Path(spec.origin).parent / "lib"
        try:
            libraries = [
                ctypes.CDLL(str(folder / f"libggml-{part}.so"), ctypes.RTLD_GLOBAL)
                for part in ("base", "cpu")
            ]
            for name, (result, *arguments) in _SIGNATURES.items():
                library = next((x for x in libraries if hasattr(x, name)), None)
                if library is None:
                    raise Unavailable(f"{folder} has no {name}")
                function = getattr(library, name)
                function.restype = result
                function.argtypes = [Params if a == "Params" else a for a in arguments]
                setattr(self, name.removeprefix("ggml_"), function)
        except OSError as error:
            raise Unavailable(str(error)) from error
        self.log_set(_silent, None)
        register = self.backend_cpu_reg()
        self.device = self.backend_reg_dev_get(register, 0)
        self.backend = self.backend_cpu_init()
        self.plain = self.backend_cpu_buffer_type()
        address = self.backend_reg_get_proc_address(register, b"ggml_backend_dev_get_extra_bufts")
        self.repacking = []
        if address:
            extra = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)(self.device)
            while extra and (kind := extra[len(self.repacking)]):
                self.repacking.append(kind)

    def context(self) -> int:
        """A context for a handful of tensors and one graph."""
        size = 8 * self.tensor_overhead() + self.graph_overhead()
        return self.init(Params(size, None, True))

    def place(self, tensor: int, kind: int) -> int:
        """Gives a tensor memory of a buffer type; returns the buffer."""
        size = self.backend_buft_get_alloc_size(kind, tensor)
        buffer = self.backend_buft_alloc_buffer(kind, size)
        if not buffer or self.backend_tensor_alloc(
            buffer, tensor, self.backend_buffer_get_base(buffer)
        ):
            raise MemoryError(f"ggml has no buffer of {size} bytes")
        return buffer

    def weight(self, number: int, k: int, packed: np.ndarray, n: int) -> tuple[int, bool]:
        """A weight [n, k] of a type, and whether ggml has repacked it."""
        for kind in [*self.repacking, self.plain]:
            context = self.context()
            weight = self.new_tensor_2d(context, number, k, n)
            y = self.mul_mat(context, weight, self.new_tensor_2d(context, _F32, k, 1))
            buffer = self.place(weight, kind)
            if kind == self.plain or self.backend_dev_supports_op(self.device, y):
                break
            self.backend_buffer_free(buffer)
        self.backend_tensor_set(weight, packed.ctypes.data, 0, packed.nbytes)
        return weight, kind != self.plain

    def product(self, weight: int, m: int, k: int) -> tuple[int, list[int]]:
        """A graph of the product of m random tokens by a weight, and its buffers."""
        context = self.context()
        x = self.new_tensor_2d(context, _F32, k, m)
        y = self.mul_mat(context, weight, x)
        buffers = [self.place(tensor, self.plain) for tensor in (x, y)]
        values = np.random.default_rng().standard_normal((m, k)).astype(np.float32)
        self.backend_tensor_set(x, values.ctypes.data, 0, values.nbytes)
        graph = self.new_graph(context)
        self.build_forward_expand(graph, y)
        return graph, buffers


@cache
def _check() -> None:
    """Whether the libraries' instructions run here, as another process finds out.

    Raises:
        Unavailable: they are not there, or they kill the process that uses them.
    """
    trial = "import ggml_case; ggml_case._trial()"
    folder = Path(__file__).parent
    run = subprocess.run([sys.executable, "-c", trial], cwd=folder, capture_output=True)
    if run.returncode < 0:
        name = signal.Signals(-run.returncode).name
        raise Unavailable(
            f"llama-cpp-python's ggml ends with {name} on this processor: build it for it, `pip install"
            " --no-binary llama-cpp-python llama-cpp-python`, with clang (GCC 12 drops stores that AMX reads)"
        )


def _trial() -> None:
    """Small products of one and of many tokens by every type."""
    ggml = Ggml()
    for name, (number, _) in TYPES.items():
        if ggml.type_name(number) != name.encode():
            continue
        weight, _ = ggml.weight(number, 256, _quantised(ggml, number, 256, 256), 256)
        for m in (1, 16):
            graph, _ = ggml.product(weight, m, 256)
            ggml.backend_graph_compute(ggml.backend, graph)


def _quantised(ggml: Ggml, number: int, k: int, n: int) -> np.ndarray:
    """A matrix [n, k] of ggml's type: 64 random rows, over and over."""
    rows = np.random.default_rng().standard_normal((64, k)).astype(np.float32)
    packed = np.empty(rows.nbytes, np.uint8)
    size = ggml.quantize_chunk(number, rows.ctypes.data, packed.ctypes.data, 0, 64, k, None)
    return np.tile(packed[:size], n // 64)


class _Weights:
    """Weights [n, k] of a type of TYPES in this process; products of float32 activations by them."""

    def __init__(self, name: str, copies: Callable[[int], int], k: int, n: int, threads: int):
        self.ggml, self.k = Ggml(), k
        number, _ = TYPES[name]
        if self.ggml.type_name(number) != name.encode():
            raise Unavailable(f"this ggml has no type {name}")
        self.ggml.backend_cpu_set_n_threads(self.ggml.backend, threads)
        packed = _quantised(self.ggml, number, k, n)
        self.bytes = packed.nbytes
        made = [self.ggml.weight(number, k, packed, n) for _ in range(copies(packed.nbytes))]
        self.weights = [weight for weight, _ in made]
        self.kernel = "repacked" if made[0][1] else None
        self.buffers: list[int] = []

    def product(self, m: int) -> Product:
        """A product of m tokens in place of the last one."""
        for buffer in self.buffers:
            self.ggml.backend_buffer_free(buffer)
        made = [self.ggml.product(weight, m, self.k) for weight in self.weights]
        graphs = [graph for graph, _ in made]
        self.buffers = [buffer for _, buffers in made for buffer in buffers]

        def call(i: int) -> None:
            if self.ggml.backend_graph_compute(self.ggml.backend, graphs[i % len(graphs)]):
                raise RuntimeError("ggml did not compute the product")

        return Product(call, self.bytes, self.kernel)


def _serve(pipe: Connection, *arguments: object) -> None:
    """A process with weights: says why there are none, or what they are, then samples products."""
    from peers import sample

    try:
        weights = _Weights(*arguments)
    except Unavailable as error:
        pipe.send(str(error))
        return
    pipe.send((weights.bytes, weights.kernel))
    while (wanted := pipe.recv()) is not None:
        tokens, counter = wanted
        if tokens:
            product = weights.product(tokens)
            product.call(0)
            pipe.send(None)
        else:
            pipe.send(sample(product, [counter]))


_started: list[tuple[BaseProcess, Connection]] = []


def stop() -> None:
    """Ends the processes that hold ggml's weights; cases that were used start new ones no more."""
    while _started:
        process, pipe = _started.pop()
        pipe.send(None)
        process.join()


def ggml_case(name: str, copies: Callable[[int], int]):
    """A product of ggml by weights of a type of TYPES, in a process of its own until `stop`.

    ggml gives the registers of AMX their shape once a thread and believes that nobody else does; this
    library and PyTorch do.
    """

    @cache
    def server(k: int, n: int, threads: int) -> tuple[Connection, tuple | str]:
        context = multiprocessing.get_context("spawn")
        pipe, other = context.Pipe()
        arguments = (other, name, copies, k, n, threads)
        process = context.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        other.close()
        answer = pipe.recv()
        if not isinstance(answer, str):
            _started.append((process, pipe))
        return pipe, answer

    def make(m: int, k: int, n: int, threads: int) -> Product:
        _check()
        pipe, answer = server(k, n, threads)
        if isinstance(answer, str):
            raise Unavailable(answer)
        size, kernel = answer
        pipe.send((m, 0))
        pipe.recv()

        def sample(counter: list[int]) -> float:
            pipe.send((0, counter[0]))
            return pipe.recv()

        return Product(lambda i: None, size + 4 * m * (k + n), kernel, sample=sample)

    return make
