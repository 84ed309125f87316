"""The weight files of a checkpoint folder as memory-mapped arrays."""

import dataclasses
import json
import math
import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np

_DTYPES = {
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one array lies: a file, its dtype and shape, and the offset of its first byte."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def read(self) -> np.ndarray:
        """The array, memory-mapped: pages come in when they are touched."""
        if not math.prod(self.shape):
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)


def read_entries(folder: str | Path) -> dict[str, Entry]:
    """Names and places of every array in a folder's safetensors files.

    With a `model.safetensors.index.json` the files it names are read, otherwise every
    `*.safetensors`.

    Raises:
        FileNotFoundError: no weights in the folder, or a file that the index names is missing.
        ValueError: a damaged file.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        paths = [folder / name for name in names]
    else:
        paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no *.safetensors files")
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{index.name} names files that do not exist: {missing}")
    entries: dict[str, Entry] = {}
    for path in paths:
        entries |= _read_header(path)
    return entries


def _read_header(path: Path) -> dict[str, Entry]:
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > size - 8:
            raise ValueError(f"{path} is truncated: its header does not fit into {size} bytes")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path} has a damaged header: {error}") from None
    entries = {}
    for name, facts in header.items():
        if name == "__metadata__":
            continue
        if facts["dtype"] not in _DTYPES:
            raise ValueError(f"{path}: {name} has dtype {facts['dtype']}, which is not supported")
        begin, end = facts["data_offsets"]
        entry = Entry(path, _DTYPES[facts["dtype"]], tuple(facts["shape"]), 8 + length + begin)
        expected = math.prod(entry.shape) * entry.dtype.itemsize
        if begin < 0 or end - begin != expected or 8 + length + end > size:
            raise ValueError(
                f"{path} is truncated or damaged: {name} {entry.shape} {facts['dtype']} does not fit"
                f" into bytes {begin} to {end} of {size}"
            )
        entries[name] = entry
    return entries
