"""Checkpoints: one safetensors file whose header describes the tree and its quantised tensors.

Weights are written in the interchange layout whatever layout they are held in, unless `keep_layout` is asked
for: such a file needs no conversion where the same kernels run, and is for that machine's own use. The arrays
of a `QuantisedTensor` called `name` are `name.packed`, `name.scales` and `name.codebook`; the header's entry
"fdk_jax" is a JSON object {"version": 1, "tree": ...} with the static metadata.
"""

import collections
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.flax
from flax import nnx

from fdk_jax.files.atomic import atomic_path
from fdk_jax.files.safetensors_folder import READABLE, read_file
from fdk_jax.format.quantised_tensor import QuantisedTensor, is_quantised
from fdk_jax.layers.trees import prepare

VERSION = 1
_KEY = "fdk_jax"
_ARRAYS = ("packed", "scales", "codebook")
_THREADS = 8  # that read
_CODEBOOK_BYTES = 1 << 14  # at most


def save(path: str | os.PathLike, tree: Any, *, keep_layout: bool = False) -> None:
    """Writes a tree of arrays and quantised tensors, atomically: the old file or the new one.

    Args:
        path: file to write or replace; its folder must exist.
        tree: nested dicts, lists, tuples and None around arrays and `QuantisedTensor`s; an nnx.State; or an
            `nnx.Module`, of which the state is written.
        keep_layout: writes weights in the layout that they are held in.

    Raises:
        TypeError: a leaf is not an array, or a node is of a kind that would come back as another one.
        ValueError: values of 64 bits that 32 cannot hold, where JAX has no others.
        OSError: the file could not be written; an old one is as it was.
    """
    arrays: dict[str, Any] = {}
    structure = _describe(_plain(tree if keep_layout else prepare(tree, "xla")), "", arrays)
    header = {_KEY: json.dumps({"version": VERSION, "tree": structure})}
    with atomic_path(path) as temporary:
        try:
            safetensors.flax.save_file(arrays, temporary, metadata=header)
        except safetensors.SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error


def load(path: str | os.PathLike, *, like: Any = None) -> Any:
    """Reads what `save` wrote.

    Args:
        path: the file.
        like: None; or a tree of the same structure, shapes, dtypes and static metadata, against which the
            file is checked; or an `nnx.Module`, whose copy with the file's state is returned.

    Returns:
        The tree, with dicts for every mapping, in the layout of the file (`fdk_jax.prepare` it); or a new
        module.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, foreign, newer than this version, inconsistent, or unlike `like`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            _check_names(path)
            structure = _structure(path, file.metadata())
            names = set(file.keys())
        with _Reading(path) as tensor:
            tree = _rebuild(structure, tensor, names)
    except (safetensors.SafetensorError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is not a complete checkpoint: {error}") from error
    if names:
        raise ValueError(f"{path} holds arrays that its header does not name: {sorted(names)}")
    if like is None:
        return tree
    leaves = jax.tree.leaves(tree, is_leaf=is_quantised)
    kept = any(is_quantised(leaf) and leaf.layout != "interchange" for leaf in leaves)
    _compare(path, tree, _plain(like if kept else prepare(like, "xla")))
    if not isinstance(like, nnx.Module):
        return tree
    graph, state = nnx.split(like)
    nnx.replace_by_pure_dict(state, tree)
    return nnx.merge(graph, state)


class _Reading:
    """Reads the arrays of a file in threads, and gives each on the device by its name."""

    def __init__(self, path: Path):
        options: Any = jax.config  # has no types
        # Contexts of this thread alone.
        self._device, self._wide = options.jax_default_device, options.jax_enable_x64
        self._stored = read_file(path)
        self._pool = ThreadPoolExecutor(_THREADS)

    def __enter__(self) -> Callable[[str], jax.Array]:
        found = {name: self._pool.submit(self._read, name) for name in self._stored}
        return lambda name: found[name].result()

    def __exit__(self, *_) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _read(self, name: str) -> jax.Array:
        stored = self._stored[name]
        with jax.default_device(self._device), jax.enable_x64(self._wide):
            if jax.default_backend() == "cpu" or not stored.shape:
                # It may stay where it is.
                return jax.device_put(_narrowed(name, stored.array()))
            # A transfer's bytes lie in memory that the device can read, which takes a second for each GB to get
            # and is used again: so each thread waits for its own, and none is long.
            pieces = [
                jax.block_until_ready(jax.device_put(_narrowed(name, stored.some(*run))))
                for run in stored.runs()
            ]
            if pieces[0].nbytes <= _CODEBOOK_BYTES:
                np.asarray(
                    pieces[0]
                )  # a copy that stays with it: a codebook's values are looked at
            return pieces[0] if len(pieces) == 1 else _joined(pieces)


@jax.jit
def _joined(pieces: list[jax.Array]) -> jax.Array:
    return jax.numpy.concatenate(pieces)


def _plain(tree: Any) -> Any:
    if isinstance(tree, nnx.Module):
        tree = nnx.state(tree)
    return nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree


def _describe(node: Any, name: str, arrays: dict[str, Any]) -> Any:
    """The header's description of a tree, whose arrays are put into `arrays` by name."""

    def child(key: Any) -> str:
        return f"{name}.{key}" if name else str(key)

    if node is None:
        return {"kind": "none"}
    if is_quantised(node):
        node.validate()
        for part in _ARRAYS:
            _add(arrays, f"{name}.{part}", getattr(node, part))
        return {
            "kind": "quantised",
            "name": name,
            "bits": node.bits,
            "group_size": node.group_size,
            "shape": list(node.shape),
            "axes": node.axes,
            "layout": node.layout,
            "uniform": node.uniform,
        }
    if isinstance(node, Mapping):
        if not all(isinstance(key, (str, int)) for key in node):
            raise TypeError(
                f"keys must be strings or integers at {name or 'the root'}: {list(node)}"
            )
        items = [[key, _describe(value, child(key), arrays)] for key, value in node.items()]
        return {"kind": "dict", "items": items}
    if type(node) in (list, tuple):
        items = [_describe(value, child(i), arrays) for i, value in enumerate(node)]
        return {"kind": type(node).__name__, "items": items}
    if hasattr(node, "_asdict"):
        raise TypeError(
            f"{name or 'the root'} is a named tuple, {type(node).__name__}, and would come back as another kind"
            " of node: save its _asdict()"
        )
    if not isinstance(node, (jax.Array, np.ndarray)):
        raise TypeError(f"{name or 'the root'} is a {type(node).__name__}, not an array")
    if jax.dtypes.issubdtype(node.dtype, jax.dtypes.prng_key):
        _add(arrays, name, jax.random.key_data(node))
        return {"kind": "key", "name": name, "impl": str(jax.random.key_impl(node))}
    _add(arrays, name, node)
    return {"kind": "array", "name": name}


def _add(arrays: dict[str, Any], name: str, array: Any) -> None:
    if name in arrays:
        raise ValueError(f"two arrays would be called {name!r}; rename one of them")
    if name == "__metadata__" or array.dtype not in READABLE:
        what = "has a name of the format's own" if array.dtype in READABLE else f"is {array.dtype}"
        raise TypeError(f"{name} {what}, which a checkpoint does not hold: cast or rename it")
    arrays[name] = jax.numpy.asarray(_narrowed(name, array))


def _narrowed(name: str, array: Any) -> Any:
    """An array in the dtype that JAX gives it: of 32 bits for 64, unless those are switched on.

    Raises:
        ValueError: integers or infinities would come of it that were not there.
    """
    dtype = jax.dtypes.canonicalize_dtype(array.dtype) if isinstance(array, np.ndarray) else None
    if dtype is None or dtype == array.dtype:
        return array
    with np.errstate(over="ignore"):  # a value that is too large is another one
        narrow = array.astype(dtype)
    rounded = array.dtype.kind in "fc"
    if (np.isfinite(array) & ~np.isfinite(narrow) if rounded else narrow != array).any():
        raise ValueError(
            f"{name} holds {array.dtype} values too large for {dtype}: cast it on purpose, or switch 64 bits on"
            ' (jax.config.update("jax_enable_x64", True))'
        )
    return narrow


def _check_names(path: Path) -> None:
    """Refuses a safetensors header in which a name occurs twice: readers disagree on which one counts."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")  # checked by safetensors
        json.loads(file.read(size), object_pairs_hook=_unique)


def _structure(path: Path, metadata: Mapping[str, str] | None) -> Any:
    if not metadata or _KEY not in metadata:
        raise ValueError(f"{path} was not written by fdk_jax.checkpoint.save")
    try:
        header = json.loads(metadata[_KEY], object_pairs_hook=_unique)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} has a damaged header: {error}") from error
    version = header["version"]
    if version != VERSION:
        raise ValueError(
            f"{path} has format version {version}, this fdk_jax reads {VERSION}; update fdk_jax"
        )
    return header["tree"]


def _rebuild(node: Any, tensor: Any, names: set[str]) -> Any:
    """The tree of a description; the arrays that it takes are removed from `names`."""
    kind = node["kind"]
    if kind == "none":
        return None
    if kind == "array":
        return _take(node["name"], tensor, names)
    if kind == "key":
        return jax.random.wrap_key_data(_take(node["name"], tensor, names), impl=node["impl"])
    if kind == "dict":
        return _unique([(key, _rebuild(value, tensor, names)) for key, value in node["items"]])
    if kind in ("list", "tuple"):
        items = [_rebuild(value, tensor, names) for value in node["items"]]
        return items if kind == "list" else tuple(items)
    if kind != "quantised":
        raise ValueError(f"the header holds a node of unknown kind {kind!r}")
    arrays = [_take(f"{node['name']}.{part}", tensor, names) for part in _ARRAYS]
    w = QuantisedTensor(
        *arrays,
        bits=node["bits"],
        group_size=node["group_size"],
        shape=tuple(node["shape"]),
        axes=node["axes"],
        layout=node["layout"],
        uniform=node["uniform"],
    )
    try:
        w.validate()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{node['name']}: {error}") from error
    return w


def _take(name: str, tensor: Any, names: set[str]) -> Any:
    """An array of the file, which is then used up."""
    if name not in names:
        raise ValueError(f"the header names {name!r} twice, or it is missing")
    names.remove(name)
    return tensor(name)


def _unique(items: list[tuple[Any, Any]]) -> dict:
    """A dict of items whose keys must differ."""
    result = dict(items)
    if len(result) != len(items):
        name, count = collections.Counter(key for key, _ in items).most_common(1)[0]
        raise ValueError(f"the name {name!r} occurs {count} times")
    return result


def _compare(path: Path, tree: Any, like: Any) -> None:
    """Raises a ValueError that lists every difference between two trees."""

    def described(tree: Any) -> dict[str, str]:
        out = {}
        flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_quantised)[0]
        for key, leaf in flat:
            text = f"{getattr(leaf, 'dtype', type(leaf))}{getattr(leaf, 'shape', ())}"
            out[jax.tree_util.keystr(key)] = repr(leaf) if is_quantised(leaf) else text
        return out

    found, wanted = described(tree), described(like)
    problems = [f"missing {k}" for k in wanted if k not in found]
    problems += [f"unexpected {k}" for k in found if k not in wanted]
    problems += [
        f"{k} is {found[k]}, not {wanted[k]}"
        for k in wanted
        if found.get(k, wanted[k]) != wanted[k]
    ]
    if problems:
        raise ValueError(f"{path} does not fit: " + "; ".join(problems))
