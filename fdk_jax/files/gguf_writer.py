"""Weights written back as GGUF: the tensors of a file replaced, its metadata kept.

The `gguf` package writes the file; its types hold `scale * codebook[code]` where the codebook is one of theirs.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fdk_jax.files import gguf_config, gguf_file, gguf_header, gguf_types, small_floats
from fdk_jax.files.atomic import atomic_path
from fdk_jax.files.bits import unpack
from fdk_jax.format.quantised_tensor import QuantisedTensor

Weight = QuantisedTensor | np.ndarray
_FLOATS = {"F32": 0, "F16": 1}


def _halves(codes: np.ndarray) -> np.ndarray:
    return codes[..., :16] | (codes[..., 16:] << np.uint8(4))


def _tq2_0(codes: np.ndarray) -> np.ndarray:
    runs = codes.reshape(*codes.shape[:-1], 2, 4, 32) << np.asarray([0, 2, 4, 6], np.uint8)[:, None]
    return np.bitwise_or.reduce(runs, axis=-2).reshape(*codes.shape[:-1], 64)


def _one_bit(codes: np.ndarray) -> np.ndarray:
    return np.packbits(codes, axis=-1, bitorder="little")


def _e2m1(codes: np.ndarray) -> np.ndarray:
    return _halves(np.where(codes >= 8, codes - np.uint8(8), np.uint8(15) - codes))


@dataclasses.dataclass(frozen=True)
class _Target:
    """A type to write: its number, the bytes of codes of a block, and whether the scale comes after them."""

    number: int
    pack: Callable[[np.ndarray], np.ndarray]
    scale_last: bool = False

    @property
    def kind(self) -> gguf_types.BlockType:
        return gguf_types.EXACT[self.number]


# The fewest bits first.
_TARGETS = (
    _Target(41, _one_bit),
    _Target(35, _tq2_0, scale_last=True),
    _Target(39, _e2m1),
    _Target(2, _halves),
    _Target(20, _halves),
    _Target(8, lambda codes: codes ^ np.uint8(0x80)),
)


def encode(w: QuantisedTensor) -> tuple[int, np.ndarray] | None:
    """(number of a type, rows of bytes [N, bytes]) of a matrix [N, K]; None if no type has its codebook.

    The codebook may be any multiple of the type's, to float32 accuracy; what that and a float16 scale change is
    for the caller to measure.
    """
    codes = unpack(np.asarray(w.packed), w.bits, lowest_first=False)[:, : w.in_features]
    codebook = np.asarray(w.codebook).reshape(-1, 2**w.bits)
    if (codebook != codebook[0]).any():
        return None
    used = np.unique(codes)
    for target in _TARGETS:
        kind = target.kind
        if w.in_features % kind.weights or (
            w.group_size % kind.group_size and w.group_size < w.in_features
        ):
            continue
        found = _matched(codebook[0], used, np.asarray(kind.values, np.float32))
        if found is None:
            continue
        factor, table = found
        repeats = max(1, w.group_size // kind.group_size)
        groups = w.in_features // kind.group_size
        scales = np.repeat(np.asarray(w.scales).astype(np.float32), repeats, axis=-1)[:, :groups]
        bytes_ = _scale_bytes(target.number, scales * factor)
        if bytes_ is None:
            continue
        blocks = target.pack(table[codes].reshape(len(codes), groups, kind.weights))
        parts = (blocks, bytes_) if target.scale_last else (bytes_, blocks)
        return target.number, np.concatenate(parts, axis=-1).reshape(len(codes), -1)
    return None


def _matched(
    codebook: np.ndarray, used: np.ndarray, values: np.ndarray
) -> tuple[np.float32, np.ndarray] | None:
    """(factor, new code of each old one) with codebook[used] = factor * values[new codes]."""
    wanted = codebook[used]
    largest = wanted[np.abs(wanted).argmax()]
    table = np.zeros(len(codebook), np.uint8)
    if largest == 0:
        table[:] = np.abs(values).argmin()
        return (np.float32(1), table) if (values == 0).any() else None
    for value in sorted(values[values != 0], key=abs, reverse=True):
        factor = np.float32(largest / value)
        nearest = np.abs(wanted[:, None] / factor - values).argmin(-1)
        if np.allclose(values[nearest] * factor, wanted, rtol=2e-6, atol=0):
            table[used] = nearest
            return factor, table
    return None


def _scale_bytes(number: int, scales: np.ndarray) -> np.ndarray | None:
    """[N, blocks, bytes of the scale]; None where the type's scales cannot be these."""
    if number == 39:
        exponents = np.frexp(scales)[1] - 1 + 127
        exponents = np.where(scales == 0, 0, exponents)
        good = (exponents >= 0) & (exponents < 255)
        if not good.all() or not (small_floats.e8m0(exponents.astype(np.uint8)) == scales).all():
            return None
        return exponents.astype(np.uint8)[..., None]
    half = scales.astype(np.float16)
    if not np.isfinite(half).all():
        return None
    return half[..., None].view(np.uint8)


def write(
    path: str | os.PathLike,
    weights: Mapping[str, Callable[[], Weight]],
    *,
    like: str | os.PathLike,
    otherwise: str | None = None,
) -> dict[str, float]:
    """Writes a GGUF file with other weights, in the types that hold their codes and scales.

    Args:
        path: the file to write; replaced when it is complete.
        weights: Hugging Face's name to a function that gives the array, for every tensor of `like`.
        like: a GGUF file of the same model (F16, for example), whose metadata is kept: tokenizer, shapes.
        otherwise: "Q8_0", "F16" or "F32" for quantised weights that no type holds, such as those of a k-means
            codebook; None refuses them.

    Returns:
        For each quantised weight that changed its relative error in the 2-norm: of codebooks that are a type's
        to float32 accuracy, of scales rounded to float16, of what `otherwise` requantised.

    Raises:
        ValueError: names that do not fit `like`, or weights that no type holds.
        ImportError: the `gguf` package is missing.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "writing GGUF needs the gguf package: pip install fdk-jax[models]"
        ) from error
    if otherwise not in (None, "Q8_0", "F16", "F32"):
        raise ValueError(f"{otherwise=} is not one of Q8_0, F16, F32 or None")
    source = Path(like)
    header = gguf_header.read(source)
    arch = gguf_config.architecture(header.metadata)
    checkpoint = gguf_file.read(source, requantise=16)
    names = {name: gguf_config.name_of(arch, name) for name in header.tensors}
    missing = [n for n in names.values() if n and "{}" not in n and n not in weights]
    more = [name for name in weights if name not in names.values()]
    if missing or more or any(n and "{}" in n for n in names.values()):
        raise ValueError(f"{like} does not fit the weights: missing {missing}, unexpected {more}")
    errors: dict[str, float] = {}
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, arch)
        _write_metadata(gguf, writer, header.metadata)
        for name, hugging in names.items():
            if hugging is None:  # RoPE's factors
                info = header.tensors[name]
                data = np.fromfile(source, np.float32, int(np.prod(info.shape)), offset=info.offset)
                writer.add_tensor(name, data)
                continue
            w = weights[hugging]()
            if isinstance(w, np.ndarray):
                data = _as_in_file(w.astype(np.float32), arch, checkpoint.config, name)
                narrow = w.dtype.itemsize == 2 and data.ndim > 1
                writer.add_tensor(name, data.astype(np.float16) if narrow else data)
                continue
            kind, rows, made = _encoded(gguf, w, otherwise, hugging)
            exact = np.asarray(w.dequantise(np.float32))
            error = np.linalg.norm((made - exact).astype(np.float64))
            if error:
                errors[hugging] = float(error / np.linalg.norm(exact.astype(np.float64)))
            order = gguf_file.row_order(arch, checkpoint.config, name)
            rows = rows if order is None else rows[np.argsort(order)]
            writer.add_tensor(name, rows, raw_dtype=None if rows.dtype.kind == "f" else kind)
        with contextlib.closing(writer):
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
    return errors


def _as_in_file(array: np.ndarray, arch: str, config: Mapping[str, Any], name: str) -> np.ndarray:
    order = gguf_file.row_order(arch, config, name)
    array = array if order is None else array[np.argsort(order)]
    if arch in gguf_config.NORMS_PLUS_ONE and "norm" in name:
        array = array + np.float32(1)
    return array


def _encoded(gguf, w: QuantisedTensor, otherwise: str | None, name: str) -> tuple[Any, Any, Any]:
    """(gguf's type, rows, float32 values of them)."""
    found = encode(w)
    if found is not None:
        kind = gguf.GGMLQuantizationType(found[0])
        block = gguf_types.EXACT[found[0]]
        made = block.tensor(found[1], w.in_features).dequantise(np.float32)
        return kind, found[1], np.asarray(made)
    if otherwise is None:
        raise ValueError(
            f"{name}: no type of GGUF holds {w.bits}-bit codes of this codebook in groups of"
            f' {w.group_size}; write it with otherwise="Q8_0", "F16" or "F32"'
        )
    values = np.asarray(w.dequantise(np.float32))
    if otherwise in _FLOATS:
        data = values.astype(np.float16 if otherwise == "F16" else np.float32)
        return None, data, data.astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    rows = gguf.quants.quantize(values, kind)
    return kind, rows, gguf.quants.dequantize(rows, kind)


def _write_metadata(gguf, writer, metadata: Mapping[str, Any]) -> None:
    """All metadata but what the writer adds itself and what tells of the old tensors' types."""
    for key, value in metadata.items():
        if key in ("general.architecture", "general.file_type", "general.alignment"):
            continue
        if key.startswith("split."):
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
            continue
        kind = gguf.GGUFValueType
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            number = kind.UINT32 if 0 <= value < 2**32 else kind.INT64
            writer.add_key_value(key, value, number)
