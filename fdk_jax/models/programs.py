"""Compiled programs of one model, on one device or several: as many as a bound allows."""

import collections
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fdk_jax.format.host_arrays import return_freed_memory
from fdk_jax.models import peers
from fdk_jax.models.cache import KVCache
from fdk_jax.models.config import ModelConfig
from fdk_jax.models.loops import Options, Progress
from fdk_jax.models.parallel import Parallel
from fdk_jax.models.peers import Peers
from fdk_jax.models.transformer import Transformer

_IN_ORDER = threading.Lock()
_MAX_PROGRAMS = 64  # that are kept: each holds device code and, on a GPU, a graph of its launches


class Programs(Mapping[Hashable, jax.stages.Compiled]):
    """The compiled programs of a model, by name; the one used longest ago makes room for a new one.

    Args:
        model: Whose arrays the programs read.
        max_programs: That are kept.
    """

    def __init__(self, model: Transformer, max_programs: int = _MAX_PROGRAMS):
        self.config: ModelConfig = model.config
        self.parallel = model.parallel
        self._graphdef, state = nnx.split(model)
        leaves, self._treedef = jax.tree.flatten(state)
        self.leaves: tuple[Array, ...] = tuple(leaves)
        self.peers: Peers | None = None
        if self.parallel is not None:
            features = self.config.hidden_size
            if peers.unsupported_reason(self.parallel, features) is None:
                self.peers = peers.make(self.parallel, features)
        self._max_programs = max_programs
        self._kept: collections.OrderedDict[Hashable, jax.stages.Compiled] = (
            collections.OrderedDict()
        )

    def __getitem__(self, name: Hashable) -> jax.stages.Compiled:
        return self._kept[name]

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def program(
        self, name: Hashable, run: Callable, results: Sequence[type], *args: Any
    ) -> Callable[..., Any]:
        """run(model, *args) as one device program, compiled once for a name.

        Args:
            name: Of the program; a name stands for one `run` with arguments of one kind.
            run: Called while it is traced.
            results: Types of what it returns, in order; `KVCache` for a cache.
            *args: Arguments, or their shapes, dtypes and shardings; a cache among them is donated.

        Returns:
            The program, to be called as program(*args).
        """
        if name not in self._kept:
            self._kept[name] = self._compile(run, results, args)
            while len(self._kept) > self._max_programs:
                self._kept.popitem(last=False)
        self._kept.move_to_end(name)
        compiled = self._kept[name]
        if self.peers is None:
            return lambda *args: compiled(self.leaves, None, *args)

        def in_order(*args: Any) -> Any:
            # Sums wait for the same sum on the other devices: all have to have programs in the same order.
            with _IN_ORDER:
                return compiled(self.leaves, self.peers, *args)

        return in_order

    def return_memory(self) -> None:
        """What earlier generations needed, caches above all, to the system: on a CPU malloc keeps it."""
        if self.parallel is None and jax.default_backend() == "cpu":
            return_freed_memory()

    def place(self, tree: Any) -> Any:
        """Arrays where the programs take them: a batch cut over the devices that share it, all else whole."""
        if self.parallel is None:
            return tree
        return jax.tree.map(self.parallel.put, tree, _specs(tree, self.parallel))

    def struct(self, tree: Any) -> Any:
        """Arrays' shapes and dtypes with the shardings of `place`."""
        if self.parallel is None:
            return tree
        return jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            tree,
            _shardings(tree, self.parallel),
        )

    def cache_struct(self, batch: int, capacity: int) -> KVCache:
        """Shapes, dtypes and shardings of a cache."""
        config = self.config
        shape = (batch, config.num_kv_heads, capacity, config.head_dim)
        shaped: Any = jax.ShapeDtypeStruct  # in the place of arrays
        arrays = (shaped(shape, config.dtype),) * config.num_layers
        lengths = shaped((batch,), jnp.int32)
        return self.struct(KVCache(arrays, arrays, lengths, lengths))

    @staticmethod
    def fetch(array: Array) -> np.ndarray:
        """An array on the host, put together from all processes where several share it."""
        if array.is_fully_addressable or array.is_fully_replicated:
            return np.asarray(array)
        return multihost_utils.process_allgather(array, tiled=True)

    @staticmethod
    def fetch_later(*arrays: Array) -> None:
        """Has arrays copied to the host as soon as they are there.

        A copy that only begins once somebody asks for an array takes 0.4 ms on a GPU, a token of a small model.
        """
        for array in arrays:
            array.copy_to_host_async()

    def peak_bytes(self) -> int:
        """Device memory that the hungriest of the programs needs, weights included."""
        peak = 0
        for program in self._kept.values():
            memory: Any = program.memory_analysis()
            peak = max(
                peak,
                memory.argument_size_in_bytes
                + memory.output_size_in_bytes
                + memory.temp_size_in_bytes
                - memory.alias_size_in_bytes,
            )
        return peak

    def _compile(self, run, results, args) -> jax.stages.Compiled:
        def with_leaves(leaves, of_peers, *args):
            model = nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, leaves))
            model.peers = nnx.data(of_peers)
            return run(model, *args)

        donated = tuple(i + 2 for i, arg in enumerate(args) if isinstance(arg, KVCache))
        if self.parallel is not None:
            parallel, layers = self.parallel, self.config.num_layers
            leaves: Any = self.leaves  # whose shardings have a spec: `Placer` made them
            with_leaves = jax.shard_map(
                with_leaves,
                mesh=parallel.mesh,
                in_specs=(
                    tuple(leaf.sharding.spec for leaf in leaves),
                    peers.specs(parallel),
                    *(_specs(arg, parallel) for arg in args),
                ),
                out_specs=tuple(_result_specs(kind, parallel, layers) for kind in results),
                check_vma=False,
            )
        lowered = jax.jit(with_leaves, donate_argnums=donated).lower(self.leaves, self.peers, *args)
        compiled = lowered.compile()
        return_freed_memory()
        return compiled


def _shardings(tree: Any, parallel: Parallel) -> Any:
    return jax.tree.map(lambda spec: NamedSharding(parallel.mesh, spec), _specs(tree, parallel))


def _specs(tree: Any, parallel: Parallel) -> Any:
    """Partition specs of arguments: caches by sequences and heads, other arrays by sequences.

    Scalars, and what all sequences share, are whole on every device.
    """
    if isinstance(tree, KVCache):
        return jax.tree.map(lambda a: parallel.cache if a.ndim == 4 else parallel.rows, tree)
    if isinstance(tree, Options):
        return jax.tree.map(lambda _: P(), tree)
    return jax.tree.map(lambda a: parallel.rows if a.ndim else P(), tree)


def _result_specs(kind: type, parallel: Parallel, layers: int) -> Any:
    """The same for what a program returns; an array has a first axis of sequences."""
    rows: Any = parallel.rows
    whole: Any = P()
    if kind is KVCache:
        arrays: Any = (parallel.cache,) * layers
        return KVCache(arrays, arrays, rows, rows)
    return Progress(rows, rows, whole) if kind is Progress else rows
