"""Times the library beside other CPU kernels for low-bit weights, call by call in one process.

usage: peers.py [--k 4096] [--m 1] [--threads 1] [--rounds 15] [--output FILE.jsonl]

Peers are optional: PyTorch (dense bfloat16 and int4), ONNX Runtime (MatMulNBits). Those that are not
installed become rows with status "skipped". Weights rotate through copies that no cache holds; all
cases take turns, and the ratios compare neighbours in time. Needs build/libfdk.so (`ninja -C cpu`).
"""

import argparse
import ctypes
import datetime
import json
import platform
import statistics
import time
from pathlib import Path

import numpy as np

KEYS = (
    "suite", "name", "backend", "m", "k", "n", "bits", "group_size", "codebook", "dtype", "threads",
    "bytes_rw", "ops", "samples_us", "median_us", "p95_us", "mean_us", "stderr_us", "rel_rms_error",
    "copy_gb_s", "read_gb_s", "bound_us", "device", "driver", "versions", "commit", "dirty", "date",
    "status", "reason",
)  # fmt: skip
ROTATE_BYTES = 256 << 20
GROUP = 64


def processor() -> str:
    """The name that Linux gives the processor; elsewhere Python's."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


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


class Unavailable(Exception):
    """A peer that cannot run here; the message says why."""


def _copies(one: int) -> int:
    return ROTATE_BYTES // one + 2


def fdk_case(bits: int, arithmetic: int, m: int, k: int, threads: int):
    """A call of fdk_matmul on random bytes."""
    library = ctypes.CDLL(str(Path(__file__).parent.parent / "build" / "libfdk.so"))
    rng = np.random.default_rng()
    size = k * k * bits // 8
    packed = [rng.integers(0, 256, size, np.uint8) for _ in range(_copies(size))]
    scales = np.full(k * k // GROUP, 0x3C00, np.uint16)
    codebook = np.sort(rng.standard_normal(2**bits)).astype(np.float32)
    x = rng.integers(0x3F00, 0x3FFF, (m, k), np.uint16)
    y = np.empty((m, k), np.uint16)

    def call(i: int) -> None:
        data = packed[i % len(packed)]
        w = Weight(
            ctypes.sizeof(Weight), k, k, bits, 0, GROUP, data.ctypes.data, data.nbytes,
            scales.ctypes.data, scales.nbytes, 2, 0, codebook.ctypes.data, codebook.nbytes, 1,
        )  # fmt: skip
        a = Arguments(
            ctypes.sizeof(Arguments), m, x.ctypes.data, x.nbytes, 2, 2, y.ctypes.data, y.nbytes,
            None, 0, 0, arithmetic, threads, 0,
        )  # fmt: skip
        if library.fdk_matmul(ctypes.byref(w), ctypes.byref(a)):
            raise RuntimeError(ctypes.string_at(library.fdk_last_error()))

    return call, size + scales.nbytes + x.nbytes + y.nbytes


def torch_case(kind: str, m: int, k: int, threads: int):
    """PyTorch's dense bfloat16 product, or its int4 one with bfloat16 activations."""
    try:
        import torch
    except ImportError as error:
        raise Unavailable(str(error)) from error
    torch.set_num_threads(threads)
    x = torch.randn(m, k, dtype=torch.bfloat16)
    if kind == "dense":
        size = k * k * 2
        weights = [torch.randn(k, k).to(torch.bfloat16) for _ in range(_copies(size))]
        return lambda i: torch.nn.functional.linear(x, weights[i % len(weights)]), size + x.nbytes
    size = k * k // 2
    codes = torch.randint(0, 16, (k, k), dtype=torch.int32)
    pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
    weights = [pack(codes, 2).clone() for _ in range(_copies(size))]
    scales = torch.ones(k // GROUP, k, 2, dtype=torch.bfloat16)
    product = torch.ops.aten._weight_int4pack_mm_for_cpu
    return (
        lambda i: product(x, weights[i % len(weights)], GROUP, scales),
        size + scales.nbytes + x.nbytes,
    )


def onnxruntime_case(bits: int, level: int, m: int, k: int, threads: int):
    """ONNX Runtime's MatMulNBits; level 4 quantises activations to int8, 1 keeps float32."""
    try:
        import onnx
        import onnxruntime as ort
    except ImportError as error:
        raise Unavailable(str(error)) from error
    rng = np.random.default_rng()
    size = k * k * bits // 8
    count = min(_copies(size), 24)
    sessions = []
    for _ in range(count):
        packed = rng.integers(0, 256, (k, k // GROUP, GROUP * bits // 8), np.uint8)
        node = onnx.helper.make_node(
            "MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft", K=k, N=k, bits=bits,
            block_size=GROUP, accuracy_level=level,
        )  # fmt: skip
        tensor = onnx.TensorProto.FLOAT
        graph = onnx.helper.make_graph(
            [node],
            "product",
            [onnx.helper.make_tensor_value_info("x", tensor, [m, k])],
            [onnx.helper.make_tensor_value_info("y", tensor, [m, k])],
            [
                onnx.numpy_helper.from_array(packed, "b"),
                onnx.numpy_helper.from_array(np.full(k * k // GROUP, 0.01, np.float32), "s"),
            ],
        )
        opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        sessions.append(ort.InferenceSession(model.SerializeToString(), options))
    x = {"x": rng.standard_normal((m, k)).astype(np.float32)}
    return lambda i: sessions[i % count].run(None, x), size + k * k // GROUP * 4 + x["x"].nbytes


def sample(call, counter: list[int], seconds: float) -> float:
    """Mean microseconds of as many calls as fill the time."""
    calls, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds or calls == 0:
        call(counter[0])
        counter[0] += 1
        calls += 1
    return passed / calls * 1e6


def make_row(args, case: dict, samples: list[float], size: int, reason: str | None) -> dict:
    """A row of the schema in docs/benchmarks.md."""
    row = dict.fromkeys(KEYS)
    row |= {"schema": 1, "suite": "kernels", "m": args.m, "k": args.k, "n": args.k}
    row |= {"threads": args.threads, "group_size": GROUP, "device": processor()}
    row |= {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), **case}
    row |= {
        "ops": 2 * args.m * args.k**2,
        "status": "skipped" if reason else "ok",
        "reason": reason,
    }
    if samples:
        row |= {
            "samples_us": samples,
            "bytes_rw": size,
            "median_us": statistics.median(samples),
            "mean_us": statistics.mean(samples),
            "p95_us": float(np.quantile(samples, 0.95)),
            "stderr_us": statistics.stdev(samples) / len(samples) ** 0.5,
        }
    return row


def main() -> None:
    """Measures and prints; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("k", 4096), ("m", 1), ("threads", 1), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    shape = (args.m, args.k, args.threads)
    named = [
        *(("cpu", f"codebook_{a}", b, lambda b=b, i=i: fdk_case(b, i, *shape))
          for b in (8, 4, 2, 1) for a, i in (("int8", 2), ("exact", 0))),
        ("torch", "int4", 4, lambda: torch_case("int4", *shape)),
        ("torch", "dense", 16, lambda: torch_case("dense", *shape)),
        *(("onnxruntime", f"MatMulNBits_level{a}", b, lambda b=b, a=a: onnxruntime_case(b, a, *shape))
          for b, a in ((4, 4), (4, 1), (8, 4), (2, 4))),
    ]  # fmt: skip
    rows, running = [], []
    for backend, name, bits, make in named:
        case = {"backend": backend, "name": name, "bits": bits}
        try:
            call, size = make()
            call(0)
            running.append((case, call, size, []))
        except Exception as error:
            rows.append(make_row(args, case, [], 0, f"{type(error).__name__}: {error}"))
    counter = [0]
    for round_number in range(args.rounds + 1):
        for _, call, _, samples in running:
            value = sample(call, counter, 0.01)
            if round_number:
                samples.append(value)
    rows += [make_row(args, case, samples, size, None) for case, _, size, samples in running]
    ours = {c["bits"]: s for c, _, _, s in running if c["name"] == "codebook_int8"}
    print(f"m={args.m} k=n={args.k} threads={args.threads}")
    for row in rows:
        label = f"{row['backend']:12} {row['name']:20} {row['bits']:3} bits"
        if row["reason"]:
            print(f"{label} skipped: {row['reason'][:90]}")
            continue
        base = ours.get(row["bits"], ours[4])
        ratio = statistics.median(p / o for p, o in zip(row["samples_us"], base, strict=True))
        print(f"{label} {row['median_us']:9.1f} us   {ratio:5.2f} x the time of our int8")
    if args.output:
        with args.output.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
