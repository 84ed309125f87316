"""Compiled programs of one model, on one device or several: as many as a bound allows."""

import collections
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fdk_jax.models.cache import KVCache
from fdk_jax.models.config import ModelConfig
from fdk_jax.models.transformer import Transformer

_MOST = 64  # programs that are kept: each holds device code and, on a GPU, a graph of its launches


class Programs(Mapping[Hashable, jax.stages.Compiled]):
    """The compiled programs of a model, by name; the one used longest ago makes room for a new one.

    Args:
        model: Whose arrays the programs read.
        most: Programs that are kept.
    """

    def __init__(self, model: Transformer, most: int = _MOST):
        self.config: ModelConfig = model.config
        self.parallel = model.parallel
        self._graphdef, state = nnx.split(model)
        leaves, self._treedef = jax.tree.flatten(state)
        self.leaves: tuple[Array, ...] = tuple(leaves)
        self._most = most
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
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        self._kept.move_to_end(name)
        compiled = self._kept[name]
        return lambda *args: compiled(self.leaves, *args)

    def everywhere(self, tree: Any) -> Any:
        """Arrays that every device needs whole."""
        if self.parallel is None:
            return tree
        return jax.device_put(tree, NamedSharding(self.parallel.mesh, P()))

    def cache_struct(self, batch: int, capacity: int) -> KVCache:
        """Shapes, dtypes and shardings of a cache."""
        config, by_heads = self.config, P(None, self.parallel.axis) if self.parallel else P()
        shape = (batch, config.num_kv_heads, capacity, config.head_dim)
        arrays = (self.struct(shape, config.dtype, by_heads),) * config.num_layers
        lengths = self.struct((batch,), jnp.int32)
        return KVCache(arrays, arrays, lengths, lengths)

    def struct(
        self, shape: tuple[int, ...], dtype: Any, spec: P | None = None
    ) -> jax.ShapeDtypeStruct:
        """Shape, dtype and sharding of an array; without a spec every device has it whole."""
        sharding = NamedSharding(self.parallel.mesh, spec or P()) if self.parallel else None
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    def peak_bytes(self) -> int:
        """Device memory that the hungriest of the programs needs, weights included."""
        peak = 0
        for program in self._kept.values():
            facts: Any = program.memory_analysis()
            peak = max(
                peak,
                facts.argument_size_in_bytes
                + facts.output_size_in_bytes
                + facts.temp_size_in_bytes
                - facts.alias_size_in_bytes,
            )
        return peak

    def _compile(self, run, results, args) -> jax.stages.Compiled:
        def with_leaves(leaves, *args):
            return run(nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, leaves)), *args)

        donated = tuple(i + 1 for i, arg in enumerate(args) if isinstance(arg, KVCache))
        if self.parallel is not None:
            with_leaves = jax.shard_map(
                with_leaves,
                mesh=self.parallel.mesh,
                in_specs=(
                    tuple(leaf.sharding.spec for leaf in self.leaves),
                    *(self._spec(type(arg)) for arg in args),
                ),
                out_specs=tuple(self._spec(kind) for kind in results),
                check_vma=False,
            )
        return jax.jit(with_leaves, donate_argnums=donated).lower(self.leaves, *args).compile()

    def _spec(self, kind: type) -> Any:
        """Partition specs of a cache: by heads; all else is on every device."""
        if kind is not KVCache:
            return P()
        by_heads = (P(None, self.parallel.axis),) * self.config.num_layers
        return KVCache(by_heads, by_heads, P(), P())
