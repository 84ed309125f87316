"""GGUF files as checkpoints: tensors in Hugging Face's names and orders of rows."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from fdk_jax.files import (
    gguf_config,
    gguf_experts,
    gguf_header,
    gguf_rope,
    gguf_tokenizer,
    gguf_types,
)
from fdk_jax.files.contents import Checkpoint, Stored, TokenizerFiles
from fdk_jax.files.requantised import relative_error, requantised
from fdk_jax.format.quantised_tensor import QuantisedTensor

NAME = "GGUF"
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_FLOATS = {
    0: np.dtype(np.float32),
    1: np.dtype(np.float16),
    28: np.dtype(np.float64),
    30: np.dtype(ml_dtypes.bfloat16),
}


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    with path.open("rb") as file:
        return file.read(4) == gguf_header.MAGIC


def models_in(folder: Path) -> list[Path]:
    """The GGUF models of a folder, of several files the first."""
    found = []
    for path in sorted(folder.glob("*.gguf")):
        match = _SHARD.search(path.name)
        if (match is None or int(match[1]) == 1) and not path.name.startswith("mmproj"):
            found.append(path)
    return found


def read(path: Path, *, requantise: int | None) -> Checkpoint:
    """Recognises a GGUF model; see `fdk_jax.files.read`."""
    try:
        return _read(path, requantise)
    except ValueError as error:
        text = str(error)
        raise ValueError(text if str(path.parent) in text else f"{path}: {text}") from None


def read_tokenizer(path: Path) -> TokenizerFiles | None:
    """The tokenizer of a GGUF model; None if it has none."""
    metadata = gguf_header.read(path).metadata
    return gguf_tokenizer.files(metadata) if "tokenizer.ggml.tokens" in metadata else None


def _read(path: Path, requantise: int | None) -> Checkpoint:
    headers = {one: gguf_header.read(one) for one in _shards(path)}
    metadata = headers[path].metadata
    arch = gguf_config.architecture(metadata)
    raw: dict[str, _Raw] = {}
    for file, header in headers.items():
        q2_0 = _q2_0(header)
        for name, info in header.tensors.items():
            if name in raw:
                raise ValueError(f"{name} is in two files")
            raw[name] = _Raw(file, name, info, header.size, q2_0)
    if "token_embd.weight" not in raw:
        raise ValueError("the GGUF file has no token_embd.weight: it is not a language model")
    factors = {
        name: raw.pop(name).floats().astype(np.float32) for name in gguf_rope.FACTORS if name in raw
    }
    config = gguf_config.config(metadata, raw, raw["token_embd.weight"].shape[0], factors)
    notes = _notes(metadata)
    errors: dict[str, float] = {}
    tensors = _tensors(arch, config, raw, requantise, errors)
    if requantise is not None:
        lossy = sorted(
            {one.name_of_type for one in raw.values() if one.number in gguf_types.OTHERS}
        )
        if lossy:
            how = "kept as floats" if requantise == 16 else f"requantised to {requantise} bits"
            notes.append(f"{', '.join(lossy)} are {how}")
    return Checkpoint(
        path,
        NAME,
        config,
        tensors,
        tuple(notes),
        errors,
    )


def _shards(path: Path) -> list[Path]:
    """All files of a model."""
    match = _SHARD.search(path.name)
    if match is None:
        return [path]
    if int(match[1]) != 1:
        raise ValueError(f"{path} is not the first file of the model")
    count, base = int(match[2]), path.name[: match.start()]
    paths = [path.with_name(f"{base}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    missing = [one.name for one in paths if not one.is_file()]
    if missing:
        raise FileNotFoundError(f"{path.parent} lacks {missing}")
    return paths


def _notes(metadata: Mapping[str, Any]) -> list[str]:
    others = gguf_config.other_metadata(metadata)
    return [f"metadata that is not understood was ignored: {', '.join(others)}"] if others else []


def _q2_0(header: gguf_header.Header) -> gguf_types.BlockType:
    """Which of the two formats that go by number 42 a file has, told by the space between its tensors.

    Raises:
        ValueError: the space fits neither or both.
    """
    kinds = (gguf_types.EXACT[42], gguf_types.OLDER_Q2_0)
    offsets = [*sorted(info.offset for info in header.tensors.values()), header.size]
    fits = set(kinds)
    for info in header.tensors.values():
        if info.type != 42:
            continue
        space = offsets[offsets.index(info.offset) + 1] - info.offset
        count = int(np.prod(info.shape))
        for kind in kinds:
            size = count * kind.size // kind.weights
            # Tensors begin at multiples of 32 bytes; so what lies between two is the last one's padding.
            if info.shape[-1] % kind.weights or not 0 <= space - size < 32:
                fits.discard(kind)
    if len(fits) == 1:
        return fits.pop()
    if any(info.type == 42 for info in header.tensors.values()):
        raise ValueError("tensor type 42 with blocks that are neither of 64 nor of 128 weights")
    return kinds[0]


class _Raw:
    """One tensor of a file as it lies there."""

    def __init__(
        self,
        path: Path,
        name: str,
        info: gguf_header.TensorInfo,
        size: int,
        q2_0: gguf_types.BlockType,
    ):
        self.path, self.name, self.info, self.number = path, name, info, info.type
        self.exact = q2_0 if info.type == 42 else gguf_types.EXACT.get(info.type)
        self.shape = info.shape
        if self.exact is not None:
            self.name_of_type = self.exact.name
            per_block, bytes_a_block = self.exact.weights, self.exact.size
        elif info.type in gguf_types.FLOATS:
            self.name_of_type, bytes_a_block = gguf_types.FLOATS[info.type]
            per_block = 1
        else:
            block = gguf_types.block_of(info.type)
            if block is None:
                raise ValueError(f"{name} has GGUF tensor type {info.type}, which is not supported")
            self.name_of_type, per_block, bytes_a_block = block
        k = self.shape[-1]
        if k % per_block:
            raise ValueError(
                f"{name}: {self.name_of_type} needs rows of {per_block}, not {k} weights"
            )
        self.row_bytes = k // per_block * bytes_a_block
        self.nbytes = int(np.prod(self.shape[:-1], dtype=np.int64)) * self.row_bytes
        if info.offset + self.nbytes > size:
            raise ValueError(f"{path} is truncated: {name} does not fit into {size} bytes")

    def rows(self, expert: int | None = None, run: tuple[int, int] | None = None) -> np.ndarray:
        """Bytes [..., N, bytes a row]; of one expert [N, bytes a row]; of a run of rows of a matrix."""
        shape, offset = (*self.shape[:-1], self.row_bytes), self.info.offset
        if expert is not None:
            shape = shape[1:]
            offset += expert * int(np.prod(shape))
        if run is not None:
            shape = (run[1] - run[0], self.row_bytes)
            offset += run[0] * self.row_bytes
        count = int(np.prod(shape, dtype=np.int64))
        data = np.fromfile(self.path, np.uint8, count, offset=offset)
        if data.size < count:
            raise ValueError(f"{self.path} is truncated: {self.name} is not complete")
        return data.reshape(shape)

    def floats(self, expert: int | None = None) -> np.ndarray:
        """A tensor of floats in its own dtype.

        Raises:
            ValueError: it is of another type.
        """
        if self.number not in _FLOATS:
            raise ValueError(f"{self.name} is {self.name_of_type}, not of floats")
        return self.rows(expert).view(_FLOATS[self.number])


def _tensors(
    arch: str,
    config: Mapping[str, Any],
    raw: Mapping[str, _Raw],
    requantise: int | None,
    errors: dict[str, float],
) -> dict[str, Stored]:
    tensors: dict[str, Stored] = {}
    for name, one in raw.items():
        base = name.rpartition(".")[0]
        if name.endswith(".input_scale"):
            continue  # of 4-bit activations, which are exact here
        if name.endswith(".scale") and f"{base}.weight" in raw and one.number == 0:
            continue  # read with its weight
        hugging = gguf_config.name_of(arch, name)
        if hugging is None:
            raise ValueError(f"tensor {name} is not known to {arch} models")
        factor = raw.get(f"{base}.scale") if name.endswith(".weight") else None
        rows = row_order(arch, config, name, one.shape[0])
        for i in range(one.shape[0]) if "{}" in hugging else (None,):
            tensors[hugging.format(i)] = _stored(one, factor, rows, arch, requantise, i, errors)
    return gguf_experts.joined(tensors) if arch == "gpt-oss" else tensors


def row_order(
    arch: str, config: Mapping[str, Any], name: str, count: int | None = None
) -> np.ndarray | None:
    """For each row of Hugging Face's matrix the row in the file; None where they are the same.

    Raises:
        ValueError: the tensor has another `count` of rows.
    """
    match = re.fullmatch(r"blk\.\d+\.attn_([qk])\.(weight|bias)", name)
    if match is None or arch not in gguf_config.INTERLEAVED:
        return None
    heads = config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"]
    d = config["head_dim"]
    if count not in (None, heads * d):
        raise ValueError(f"{name} has {count} rows, not {heads} heads of {d}")
    # A head's rows lie as pairs (j, j + d / 2).
    return np.arange(heads * d).reshape(heads, d // 2, 2).swapaxes(1, 2).ravel()


def _stored(
    one: _Raw,
    factor: _Raw | None,
    rows: np.ndarray | None,
    arch: str,
    requantise: int | None,
    expert: int | None,
    errors: dict[str, float],
) -> Stored:
    shape = one.shape if expert is None else one.shape[1:]
    if one.number in gguf_types.FLOATS:
        minus = 1 if arch in gguf_config.NORMS_PLUS_ONE and "norm" in one.name else 0
        return Stored(shape, one.name_of_type, lambda: _float(one, rows, minus, expert))
    if len(shape) < 2:
        raise ValueError(f"{one.name} is a vector of {one.name_of_type}, not of floats")
    exact = one.exact
    if exact is None and requantise == 8:
        exact = gguf_types.WIDENED.get(one.number)
    if exact is not None:
        read = _exact_reader(one, exact, factor, rows, expert)
        part = (lambda begin, end, _: read((begin, end))) if len(shape) == 2 else None
        return Stored(shape, f"{NAME} {one.name_of_type}", read, quantised=True, rows=part)
    if requantise is None:
        raise ValueError(
            f"{one.name} is {one.name_of_type}, which scale times codebook does not hold at its own"
            " width: load it with requantise=8 (or 4 bits), or requantise=16 for floats"
        )

    def values() -> QuantisedTensor | np.ndarray:
        w = gguf_types.dequantised(one.number, one.rows(expert))
        w = w if rows is None else w[rows]
        if requantise == 16:
            return w
        made = requantised(w, requantise)
        errors[one.name if expert is None else f"{one.name}[{expert}]"] = relative_error(w, made)
        return made

    kind = f"{NAME} {one.name_of_type}"
    return Stored(shape, kind, values, quantised=requantise != 16)


def _float(one: _Raw, rows: np.ndarray | None, minus: int, expert: int | None) -> np.ndarray:
    array = one.floats(expert)
    array = array if rows is None else array[rows]
    return array - array.dtype.type(minus) if minus else array


def _exact_reader(
    one: _Raw,
    kind: gguf_types.BlockType,
    factor: _Raw | None,
    rows: np.ndarray | None,
    expert: int | None,
) -> Callable[..., QuantisedTensor]:
    """What reads all of a tensor, or a run of the rows of a matrix."""

    def bytes_of(run: tuple[int, int] | None) -> np.ndarray:
        if rows is None or run is None:
            data = one.rows(expert, run)
            return data if rows is None else data[rows]
        wanted = rows[slice(*run)]  # all of a few heads, or of a part of one
        first = int(wanted.min())
        return one.rows(expert, (first, int(wanted.max()) + 1))[wanted - first]

    def read(run: tuple[int, int] | None = None) -> QuantisedTensor:
        times = None if factor is None else np.float32(factor.floats().ravel()[expert or 0])
        try:
            return kind.tensor(bytes_of(run), one.shape[-1], times)
        except ValueError as error:
            raise ValueError(f"{one.path}: {one.name}: {error}") from None

    return read
