"""The arrays of a folder's safetensors files.

The library opens a file, which checks its header; the bytes are read here, since its readers hold the lock of
the interpreter: in 4 threads 0.7 GB/s as in one, where `readinto` gives 1.3 (two cores, memory disk).
"""

import functools
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors

from fdk_jax.files.contents import Stored
from fdk_jax.files.json_files import read_json
from fdk_jax.format.host_arrays import aligned

INDEX = "model.safetensors.index.json"
_NUMPY = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
}
READABLE = frozenset(_NUMPY.values())
FLOATS = ("BF16", "F16", "F32", "F64")


def read_stored(folder: str | Path, named: object = None) -> dict[str, Stored]:
    """Every array of a folder's weight files by name; `kind` is its dtype in the header.

    The files are those that transformers reads: `model.safetensors`, else what its index names, else every
    `*.safetensors`.

    Args:
        folder: That holds them.
        named: What `config.json` says of them as `transformers_weights`: a file or an index; None for nothing.

    Raises:
        FileNotFoundError: no weights in the folder, or a file that the index names is missing.
        ValueError: a damaged file, or a name that two files hold.
    """
    tensors: dict[str, Stored] = {}
    for path in weight_files(folder, named):
        for name, stored in read_file(path).items():
            if name in tensors:
                raise ValueError(
                    f"{path.parent} holds {name} in two files, one of them {path.name}"
                )
            tensors[name] = stored
    return tensors


def weight_files(folder: str | Path, named: object = None) -> list[Path]:
    """The safetensors files that make up a folder's checkpoint; see `read_stored`."""
    folder = Path(folder)
    source: Path | None = None  # the file itself, or an index of files
    if named is not None:
        name = str(named)
        if ".." in Path(name).parts or Path(name).is_absolute() or ".safetensors" not in name:
            raise ValueError(
                f"{folder}: transformers_weights={named!r} must be a file of the folder"
            )
        source = folder / name
    else:
        usual = folder / "model.safetensors", folder / INDEX
        source = next((path for path in usual if path.is_file()), None)
    if source is None:
        by, paths = folder, sorted(folder.glob("*.safetensors"))
    elif source.name.endswith(".json"):
        by, paths = source.name, [folder / name for name in _indexed(source)]
    else:
        by, paths = "config.json", [source]
    if not paths:
        other = [path.name for path in sorted(folder.glob("*.bin"))[:2]]
        hint = f"; {', '.join(other)} has to be saved as safetensors first" if other else ""
        raise FileNotFoundError(f"{folder} holds no *.safetensors files{hint}")
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{by} names files that do not exist: {missing}")
    return paths


def _indexed(index: Path) -> list[str]:
    """The files that an index names.

    Raises:
        ValueError: it has no map from names of arrays to names of files in its folder.
    """
    names = read_json(index).get("weight_map")
    names = sorted(set(map(str, names.values()))) if isinstance(names, dict) else []
    outside = any(Path(name).is_absolute() or ".." in Path(name).parts for name in names)
    if not names or outside:
        raise ValueError(
            f"{index} needs a weight_map from names of arrays to names of files in its folder"
        )
    return names


def read_file(path: Path) -> dict[str, Stored]:
    """The arrays of one safetensors file.

    Raises:
        ValueError: a damaged file, or a dtype that numpy does not have.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            headers = {
                name: (one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()
            }
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from None
    for name, (kind, _) in headers.items():
        if kind not in _NUMPY:
            raise ValueError(f"{path}: {name} has dtype {kind}, which is not supported")
    ranges = _byte_ranges(path)
    return {
        name: _stored(path, name, kind, shape, *ranges[name])
        for name, (kind, shape) in headers.items()
    }


def _stored(
    path: Path, name: str, kind: str, shape: tuple[int, ...], begin: int, end: int
) -> Stored:
    """The array whose bytes are in a range of a file."""

    def rows(first: int, last: int, out: np.ndarray | None) -> np.ndarray:
        size = (end - begin) // max(shape[0], 1)
        run = begin + first * size, begin + last * size
        return _read(path, name, kind, (last - first, *shape[1:]), *run, out)

    read = functools.partial(_read, path, name, kind, shape, begin, end)
    return Stored(shape, kind, read, rows=rows if shape else None)


def _byte_ranges(path: Path) -> dict[str, tuple[int, int]]:
    """Where in a file that the library has found whole the bytes of each array begin and end."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    start = 8 + length
    return {
        name: tuple(start + offset for offset in entry["data_offsets"])
        for name, entry in header.items()
    }


def _read(
    path: Path,
    name: str,
    kind: str,
    shape: tuple[int, ...],
    begin: int,
    end: int,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """The array whose bytes are in a range of a file, read to `out` if that has their size."""
    fits = out is not None and out.nbytes == end - begin and out.flags.c_contiguous
    array = out.reshape(-1) if out is not None and fits else aligned(end - begin)
    with path.open("rb", buffering=0) as file:
        file.seek(begin)
        done = 0
        while done < array.size:
            count = file.readinto(array.data[done:])
            if not count:
                raise ValueError(f"{path} is truncated or damaged: {name} ends early")
            done += count
    return array.view(_NUMPY[kind]).reshape(shape)
