"""Parameters of a model put in place: parts joined, cut over devices, in the kernels' layout.

Host arrays go straight to the device, or each slice straight to its own device; the pieces of one
projection at a time are all that exists twice.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from fdk_jax.files import widening
from fdk_jax.files.contents import Stored
from fdk_jax.format import packing
from fdk_jax.format.host_arrays import aligned
from fdk_jax.format.quantised_tensor import SPEC_FIELDS, QuantisedTensor
from fdk_jax.layers.linear import QuantisedLinear
from fdk_jax.models import host_matrices
from fdk_jax.models.host_matrices import Each
from fdk_jax.models.parallel import Parallel
from fdk_jax.product.choice import ARITHMETIC, LAYOUT_OF

HostArray = np.ndarray | Array

_RUN_BYTES = 2 << 20  # of codes that a thread reads and unpacks at a time: they stay in a cache


def join_rows(parts: Sequence[HostArray], shards: int) -> HostArray:
    """Parts [n_i, ...] along the outputs, so that each of `shards` equal runs has a share of all."""
    if len(parts) == 1:
        return parts[0]
    xp = np if all(isinstance(part, np.ndarray) for part in parts) else jnp
    runs = [
        part[s * len(part) // shards : (s + 1) * len(part) // shards]
        for s in range(shards)
        for part in parts
    ]
    return xp.concatenate(runs)


def join_codebooks(codebooks: Sequence[np.ndarray], rows: Sequence[int], shards: int) -> np.ndarray:
    """One codebook [2**bits] where all parts share it, else one a run of rows [C, 2**bits]."""
    if all(np.array_equal(codebooks[0], other) for other in codebooks[1:]):
        return codebooks[0]
    run = math.gcd(*rows) // shards
    order = [
        c
        for _ in range(shards)
        for c, n in zip(codebooks, rows, strict=True)
        for _ in range(n // shards // run)
    ]
    return np.stack(order)


class Placer:
    """Puts arrays on the default device, or cut over the devices of a `Parallel`.

    Args:
        parallel: None for one device.
        dtype: Of float parameters.
        backend: Whose kernels quantised weights are laid out for.
        device: Where arrays are put that are not cut; None for the default device.
    """

    def __init__(
        self,
        parallel: Parallel | None,
        dtype: str,
        backend: str,
        device: jax.Device | None = None,
    ):
        self.parallel, self.device = parallel, device
        self.shards = parallel.shards if parallel else 1
        self.dtype = jnp.dtype(dtype)
        self.layout = LAYOUT_OF[backend]

    def vector(self, value: HostArray, *, cut: bool = False) -> Array:
        """A norm or a bias [N]: on every device, or cut along N."""
        return self._put(value, P(self._axis) if cut else P()).astype(self.dtype)

    def rows(self, value: HostArray) -> Array:
        """Rows [E, N], one for each matrix of a stack, which they lie with."""
        return self._put(value, P(self._axis)).astype(self.dtype)

    def bias(self, value: HostArray, cut: str) -> Array:
        """A bias [N] of a projection: of one that is summed over devices the first one has all of it."""
        if cut == "k" and self.shards > 1:
            zeros = np.zeros((self.shards - 1) * len(value), np.asarray(value).dtype)
            return self.vector(np.concatenate([np.asarray(value), zeros]), cut=True)
        return self.vector(value, cut=cut == "n")

    def stack(self, weight: np.ndarray | QuantisedTensor) -> Array | QuantisedTensor:
        """Stacked matrices: float [E, N, K] as kernels [E, K, N], or quantised; cut along E."""
        if isinstance(weight, QuantisedTensor):
            if self.dtype == jnp.float32:  # a codebook is rounded to the dtype of its scales
                weight = dataclasses.replace(weight, scales=weight.scales.astype(jnp.float32))
            if self.parallel is None:
                return weight
            weight = jax.tree.map(np.asarray, weight)
        placed = jax.tree.map(lambda a: self._put(a, P(self._axis)), weight)
        return _as_stack(placed, self.dtype, self.parallel, self.layout)

    def embedding(self, pieces: Sequence[HostArray]) -> Array:
        """[V, D], cut along V; of pieces of its rows."""
        if len(pieces) == 1:
            return self._put(pieces[0], self._partition("n")).astype(self.dtype)
        return _as_table(list(pieces), self.dtype)

    def kernel(self, parts: Sequence[HostArray], cut: str) -> Array:
        """The kernel [K, N] of a Linear from matrices [n_i, K]."""
        partition = self._partition(cut)
        rows = [self._put(part, partition) for part in parts]
        return _as_kernel(rows, self.dtype, self.parallel, partition)

    def quantised(self, parts: Sequence[QuantisedTensor], cut: str) -> QuantisedTensor:
        """The weight of parts [n_i, K] joined along N, in the layout of the kernels.

        Parts of different widths, groups or dtypes of scales take a form that holds all of them exactly. Scales
        keep a dtype of their own, but are float32 in a float32 model. With several devices the `shape` of the
        result is that of a slice.
        """
        parts = widening.alike(parts)
        first, rows = parts[0], [part.out_features for part in parts]
        n, k = sum(rows), first.in_features
        self.check_cut(cut, k, first.group_size)
        if self.parallel is not None:
            parts = [jax.tree.map(np.asarray, part) for part in parts]
        if self.dtype == jnp.float32:  # a codebook is rounded to the dtype of its scales
            parts = [
                dataclasses.replace(part, scales=part.scales.astype(jnp.float32)) for part in parts
            ]
        shards = self.shards if cut else 1
        codebook = join_codebooks([np.asarray(p.codebook) for p in parts], rows, shards)
        local = (n // shards, k) if cut == "n" else (n, k // shards)
        spec = dict(
            bits=first.bits,
            group_size=first.group_size,
            out_features=local[0],
            in_features=local[1],
        )
        packed, scales = self._to_layout(parts, self._partition(cut), spec)
        return QuantisedTensor(
            packed,
            scales,
            self.codebook(codebook, cut),
            first.bits,
            first.group_size,
            local,
            "nk",
            self.layout,
            uniform=all(part.uniform for part in parts),
        )

    def streams(self, stored: Stored) -> bool:
        """Whether a matrix is read by runs of rows: by `streamed`, `pieces` or `host_kernel`."""
        return self.parallel is None and self.device is None and stored.rows is not None

    def pieces(self, stored: Stored, each: Each) -> list[Array]:
        """Float rows [n_i, ...] on the device, some at a time.

        A transfer's bytes lie in memory that the device can read, which takes a second for each GB to get and
        is used again: so few of them are under way, and none is long. On a CPU they are used where they lie.
        """
        if host_matrices.are_used():
            return [self._put(host_matrices.read(stored, each), P())]
        runs, found = stored.runs(), {}

        def put(index: int) -> None:
            found[index] = jax.block_until_ready(self._put(stored.some(*runs[index]), P()))

        each(put, range(len(runs)))
        return [found[index] for index in range(len(runs))]

    def host_kernel(self, parts: Sequence[Stored], each: Each) -> Array | None:
        """`kernel` of float matrices that are turned where they are read; None where that cannot be."""
        made = host_matrices.read_kernel(parts, self.dtype, each)
        return None if made is None else self._put(made, P())

    def streamed(self, parts: Sequence[Stored], each: Each) -> QuantisedTensor | None:
        """`quantised` of weights that are read by runs of rows: on a CPU nothing of them exists twice.

        Args:
            parts: [n_i, K] each, with `rows`.
            each: Calls a function with each of some items, in threads.

        Returns:
            The weight; None for parts of different widths, groups or dtypes of scales.
        """
        heads: list[Any] = [part.rows(0, 1, None) for part in parts if part.rows is not None]
        first = heads[0]
        if len({(h.bits, h.group_size, h.scales.dtype, h.shape[1]) for h in heads}) > 1:
            return None
        dtype = self.dtype if self.dtype == jnp.float32 else first.scales.dtype
        rows = [part.shape[0] for part in parts]

        def read(
            begin: int, end: int, out: np.ndarray | None = None
        ) -> tuple[np.ndarray, np.ndarray]:
            found: list[Any] = []
            for part, count in zip(parts, rows, strict=True):
                if part.rows is not None and begin < count and end > 0:
                    whole = begin >= 0 and end <= count  # the run lies in this part
                    run = max(begin, 0), min(end, count)
                    found.append(part.rows(*run, out if whole else None))
                begin, end = begin - count, end - count
            codes: Any = join_rows([one.packed for one in found], 1)
            factors: Any = join_rows([one.scales for one in found], 1)
            return codes, factors.astype(dtype, copy=False)

        spec = dict(
            bits=first.bits,
            group_size=first.group_size,
            out_features=sum(rows),
            in_features=first.shape[1],
        )
        convert = packing.STREAMED.get(self.layout, self._uploaded)
        packed, scales = convert(read, each, dtype, **spec)
        return QuantisedTensor(
            packed,
            scales,
            self.codebook(join_codebooks([np.asarray(h.codebook) for h in heads], rows, 1), ""),
            first.bits,
            first.group_size,
            (sum(rows), first.shape[1]),
            "nk",
            self.layout,
            uniform=all(head.uniform for head in heads),
        )

    def _uploaded(self, read: Callable, each: Each, dtype: Any, **spec) -> tuple[Array, Array]:
        """As `packing.STREAMED`: joined on the host, converted on the device. Waits, as `pieces` does."""
        n, k, bits = spec["out_features"], spec["in_features"], spec["bits"]
        dtype, width = np.dtype(dtype), -(-k * bits // 8)
        codes = aligned(n * width).reshape(n, width)
        scales = (
            aligned(n * -(-k // spec["group_size"]) * dtype.itemsize).view(dtype).reshape(n, -1)
        )
        step = max(_RUN_BYTES // width, 1)

        def fill(begin: int) -> None:
            run = slice(begin, min(begin + step, n))
            some, scales[run] = read(run.start, run.stop, codes[run])
            if not np.may_share_memory(some, codes[run]):
                codes[run] = some

        each(fill, range(0, n, step))
        parts = [self._put(codes, P())], [self._put(scales, P())]
        made = _converted(*parts, None, P(), target=self.layout, **spec)
        return jax.block_until_ready(made)

    @property
    def _axis(self) -> str | None:
        return self.parallel.axis if self.parallel else None

    def _partition(self, cut: str) -> P:
        """Of a matrix [N, K] (or its codes or scales) cut along "n", "k" or not at all."""
        return {"n": P(self._axis, None), "k": P(None, self._axis), "": P(None, None)}[cut]

    def _put(self, value: HostArray, partition: P) -> Array:
        if self.parallel is None:
            # It may share the memory: nobody writes to what was read.
            return jax.device_put(value, self.device)
        return self.parallel.put_parameter(value, partition)

    def codebook(self, values: np.ndarray, cut: str) -> Array:
        """A codebook, or one a run of rows, which lie with their rows."""
        return self._put(values, P(self._axis) if values.ndim == 2 and cut == "n" else P())

    def check_cut(self, cut: str, in_features: int, group_size: int) -> None:
        """Refuses a weight that is cut along its inputs within a group.

        Raises:
            ValueError: with the inputs, the group and the devices.
        """
        if cut == "k" and self.shards > 1 and in_features % (self.shards * group_size):
            raise ValueError(
                f"{in_features} inputs in groups of {group_size} cannot be cut over {self.shards}"
                " devices: a group would be split"
            )

    def _to_layout(
        self, parts: Sequence[QuantisedTensor], partition: P, spec: dict
    ) -> tuple[Array, Array]:
        """Joined codes and scales on the device in the kernels' layout, each device's slice by itself."""
        if self.parallel is None and self.layout in packing.NATIVE:
            # On the host, from where the arrays lie.
            codes: Any = join_rows([part.packed for part in parts], 1)
            factors: Any = join_rows([part.scales for part in parts], 1)
            return packing.convert(codes, factors, "interchange", self.layout, **spec)
        packed = [self._put(part.packed, partition) for part in parts]
        scales = [self._put(part.scales, partition) for part in parts]
        return _converted(packed, scales, self.parallel, partition, target=self.layout, **spec)


# Matrices of one shape share a compiled program.
@functools.partial(jax.jit, static_argnames=("parallel", "partition", "target", *SPEC_FIELDS))
def _converted(
    packed: list[Array],
    scales: list[Array],
    parallel: Parallel | None,
    partition: P,
    target: str,
    **spec: int,
) -> tuple[Array, Array]:
    """Joins and converts on the device, or each device's slices by themselves."""

    def convert(packed: Any, scales: Any) -> tuple[Array, Array]:
        codes: Any = join_rows(packed, 1)
        factors: Any = join_rows(scales, 1)
        return packing.convert(codes, factors, "interchange", target, **spec)

    if parallel is None:
        return convert(packed, scales)
    # Slices are laid end to end along the first axis, whatever another layout makes of it.
    laid = partition if target == "interchange" or not any(partition) else P(parallel.axis)
    local = jax.shard_map(
        convert,
        mesh=parallel.mesh,
        in_specs=(partition, partition),
        out_specs=laid,
        check_vma=False,
    )
    return local(packed, scales)


@functools.partial(jax.jit, static_argnums=1)
def _as_table(pieces: list[Array], dtype: Any) -> Array:
    """Rows in one array."""
    return jnp.concatenate(pieces).astype(dtype)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _as_kernel(parts: list[Array], dtype: Any, parallel: Parallel | None, partition: P) -> Array:
    """The kernel [K, N] of rows [n_i, K] that are cut as `partition` says."""

    def transposed(parts: Any) -> Array:
        rows: Any = join_rows(parts, 1)
        return rows.astype(dtype).T

    if parallel is None:
        return transposed(parts)
    turned = P(*reversed(partition))
    local = jax.shard_map(
        transposed, mesh=parallel.mesh, in_specs=(partition,), out_specs=turned, check_vma=False
    )
    return local(parts)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _as_stack(weight: Any, dtype: Any, parallel: Parallel | None, layout: str) -> Any:
    """Stacked matrices as the layers have them, each device's by themselves."""

    def transposed(weight: Any) -> Any:
        if isinstance(weight, QuantisedTensor):
            return weight.to_layout(layout)
        return weight.astype(dtype).swapaxes(-1, -2)

    if parallel is None:
        return transposed(weight)
    cut = P(parallel.axis)
    local = jax.shard_map(
        transposed, mesh=parallel.mesh, in_specs=(cut,), out_specs=cut, check_vma=False
    )
    return local(weight)


def set_linear(
    module: nnx.Module,
    path: Sequence[str],
    weight: Array | QuantisedTensor,
    bias: Array | None,
    dtype: Any,
    arithmetic: str = "exact",
) -> None:
    """Gives the linear layer at `path` its weight, quantised or not; `dtype` is that of activations."""
    *above, name = path
    owner = functools.reduce(getattr, above, module)
    layer = getattr(owner, name)
    if isinstance(weight, QuantisedTensor):
        # Only one backend has other arithmetic; left open, exact layers run wherever they are lowered.
        backend = None if arithmetic == "exact" else "cpu"
        layer = QuantisedLinear.from_weight(
            weight, bias, dtype=dtype, backend=backend, arithmetic=arithmetic
        )
        setattr(owner, name, nnx.data(layer))  # where a tied model has None
        return
    layer.kernel = nnx.Param(weight)
    if bias is not None:
        layer.bias = nnx.Param(bias)


def check_arithmetic(arithmetic: str, backend: str) -> None:
    """Refuses an arithmetic of activations that the kernels of `backend` do not have.

    Raises:
        ValueError: with what there is.
    """
    if arithmetic not in ARITHMETIC:
        raise ValueError(f"{arithmetic=} is not one of {ARITHMETIC}")
    if arithmetic != "exact" and backend != "cpu":
        raise ValueError(f'{arithmetic=} needs backend="cpu", not {backend!r}')


def share_table(model: Any) -> None:
    """Makes the embedding of a model the array of its quantised head."""
    model.embedding = model.lm_head.weight


def set_vector(module: nnx.Module, path: Sequence[str], value: Array) -> None:
    """Gives the parameter at `path`, the scale of a norm say, its value."""
    *above, name = path
    setattr(functools.reduce(getattr, above, module), name, nnx.Param(value))
