"""Any JAX function on quantised weights: its program is traced, then run with fused products.

The function is traced with a float array in the place of every `QuantisedTensor`. Its operations are then run
one by one: a weight stays packed through casts, transpositions and slices of batch axes; a `dot_general` that
contracts it along its "k" axes becomes `matmul`; a lookup of rows unpacks those rows. Every other operation
gets the dequantised weight: a function cannot be computed wrongly, only slower, and that is reported.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.core import Literal

from fdk_jax.format.array_like import warn_unfused
from fdk_jax.format.quantised_tensor import is_quantised
from fdk_jax.product.views import Notes, Packed, Recorded, Unfused

UNFUSED = ("warn", "raise", "allow")
_CALLS = ("jit", "pjit", "closed_call", "core_call")
_REMAT = ("checkpoint", "remat", "remat2")
_SAME = ("copy", "copy_p", "optimization_barrier", "sharding_constraint", "pvary")
_VIEWS = (Packed, Recorded)


@dataclasses.dataclass(frozen=True)
class Options:
    """How products are computed, and what happens where a weight must be unpacked.

    Attributes:
        backend: see `fdk_jax.matmul`.
        arithmetic: see `fdk_jax.matmul`.
        unfused: "warn", "raise" or "allow".
    """

    backend: str | None = None
    arithmetic: str = "exact"
    unfused: str = "warn"

    def report(self, view: Packed | Recorded, primitive: str, why: str) -> None:
        """An operation takes the unpacked weight."""
        if isinstance(view, Recorded):
            view.notes.others.setdefault(view.name, set()).add(primitive)
            return
        text = f"{view.name or 'the weight'} {view.tensor} is unpacked for {primitive}: {why}"
        if self.unfused == "raise":
            raise ValueError(text)
        if self.unfused == "warn":
            warn_unfused(text)


def interpreted(function: Callable, options: Options) -> Callable:
    """`function` with `QuantisedTensor`s among the leaves of its arguments.

    Args:
        function: of pytrees; leaves that are not arrays are passed as they are.
        options: how to compute.

    Returns:
        A function of the same signature. A weight that it returns untouched comes back packed.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        flat, tree = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=is_quantised)
        names = [dotted(path[2:]) for path, _ in flat]
        leaves = [leaf for _, leaf in flat]
        if not any(map(is_quantised, leaves)):
            return function(*args, **kwargs)
        values = [
            Packed.whole(leaf, name) if is_quantised(leaf) else leaf
            for leaf, name in zip(leaves, names, strict=True)
        ]
        return run(function, tree, values, options)

    return call


def axes_in(function: Callable, args: tuple, kwargs: dict, tables: bool) -> dict[str, str]:
    """See `fdk_jax.infer_axes`; of trees without nnx modules."""
    notes = Notes()
    flat, tree = jax.tree_util.tree_flatten_with_path((args, kwargs))
    is_weight = [
        path[:2] == (jax.tree_util.SequenceKey(0), jax.tree_util.SequenceKey(0))
        and _is_array(leaf)
        and len(leaf.shape) >= 2
        and jnp.issubdtype(leaf.dtype, jnp.floating)
        for path, leaf in flat
    ]
    names = [dotted(path[2:]) for path, _ in flat]
    leaves = [leaf for _, leaf in flat]

    def abstract(arrays: list[Any]) -> Any:
        it = iter(arrays)
        values = [next(it) if _is_array(leaf) else leaf for leaf in leaves]
        values = [
            Recorded(value, tuple(range(value.ndim)), name, notes) if weight else value
            for value, name, weight in zip(values, names, is_weight, strict=True)
        ]
        run(function, tree, values, Options(unfused="allow"))
        return ()

    jax.eval_shape(abstract, [leaf for leaf in leaves if _is_array(leaf)])
    weights = {n: leaf for n, leaf, weight in zip(names, leaves, is_weight, strict=True) if weight}
    return _rules(notes, weights, tables)


def _rules(notes: Notes, leaves: dict[str, Any], tables: bool) -> dict[str, str]:
    found = {}
    for name in leaves:
        if name in notes.others or (name in notes.lookups and not tables):
            continue
        axes = notes.axes(name)
        if axes is None and name in notes.lookups and name not in notes.products:
            axes = "nk" if leaves[name].ndim == 2 else None
        if axes is not None and len(axes) == leaves[name].ndim:
            found[f"^{re.escape(name)}$"] = axes
    return found


def run(function: Callable, tree: Any, values: Sequence[Any], options: Options) -> Any:
    """Traces `function` and runs its program on values among which are views of weights.

    Args:
        function: what to run.
        tree: pytree definition of its (args, kwargs).
        values: its leaves: views, arrays, and others, which are static.
        options: how to compute.
    """
    dynamic = [i for i, value in enumerate(values) if _is_array(value) or isinstance(value, _VIEWS)]
    out_tree, static = None, {}

    def flat(arrays: list[Array]) -> list[Array]:
        nonlocal out_tree
        leaves = list(values)
        for i, array in zip(dynamic, arrays, strict=True):
            leaves[i] = array
        args, kwargs = jax.tree_util.tree_unflatten(tree, leaves)
        out, out_tree = jax.tree_util.tree_flatten(function(*args, **kwargs))
        static.update({i: leaf for i, leaf in enumerate(out) if not _is_jax_type(leaf)})
        return [leaf for i, leaf in enumerate(out) if i not in static]

    structs = [
        jax.ShapeDtypeStruct(v.shape, _dtype(v)) if isinstance(v, _VIEWS) else v
        for v in (values[i] for i in dynamic)
    ]
    closed = jax.make_jaxpr(flat)(structs)
    results = iter(evaluate(closed, [values[i] for i in dynamic], options))
    assert out_tree is not None
    outputs = [
        static[i] if i in static else _value(next(results)) for i in range(out_tree.num_leaves)
    ]
    return jax.tree_util.tree_unflatten(out_tree, outputs)


def evaluate(program: Any, args: Sequence[Any], options: Options) -> list[Any]:
    """Runs a jaxpr, closed or without constants, on arrays and views; its results are arrays and views."""
    jaxpr, consts = getattr(program, "jaxpr", program), getattr(program, "consts", ())
    env: dict[Any, Any] = {}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else env[atom]

    env.update(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        with eqn.ctx.manager:
            if any(isinstance(value, _VIEWS) for value in inputs):
                outputs = _apply(eqn, inputs, options)
            else:
                outputs = _bind(eqn, inputs)
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _bind(eqn: Any, inputs: Sequence[Any]) -> Sequence[Any]:
    outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
    return outputs if eqn.primitive.multiple_results else [outputs]


def _apply(eqn: Any, inputs: list[Any], options: Options) -> Sequence[Any]:
    """One operation that takes at least one view."""
    name = eqn.primitive.name
    handler = _HANDLERS.get(name)
    why = "this operation has no fused form"
    if handler is not None:
        try:
            return handler(eqn, inputs, options)
        except Unfused as reason:
            why = str(reason)
    for value in inputs:
        if isinstance(value, _VIEWS):
            options.report(value, name, why)
    return _bind(eqn, [_array(value) for value in inputs])


def _array(value: Any) -> Any:
    return value.unpack() if isinstance(value, _VIEWS) else value


def _value(value: Any) -> Any:
    return value.value() if isinstance(value, _VIEWS) else value


def _dtype(view: Packed | Recorded) -> Any:
    return view.dtype if isinstance(view, Packed) else view.array.dtype


def _is_array(value: Any) -> bool:
    return isinstance(value, (Array, np.ndarray, jax.ShapeDtypeStruct))


def _is_jax_type(value: Any) -> bool:
    return _is_array(value) or isinstance(value, (bool, int, float, complex, np.generic))


def dotted(path: tuple) -> str:
    """The dotted name of a leaf: names with slashes and tuples of names, as flat dictionaries have, too."""
    keys = [getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))) for k in path]
    parts = [p for key in keys for p in (key if isinstance(key, tuple) else (key,))]
    return ".".join(str(p).replace("/", ".") for p in parts)


# ---- operations that keep a weight packed


def _same(eqn, inputs, options):
    return inputs


def _cast(eqn, inputs, options):
    return [inputs[0].cast(eqn.params["new_dtype"])]


def _transpose(eqn, inputs, options):
    return [inputs[0].transpose(eqn.params["permutation"])]


def _squeeze(eqn, inputs, options):
    (view,) = inputs
    for axis in sorted(eqn.params["dimensions"], reverse=True):
        view = view.drop(axis)
    return [view]


def _slice(eqn, inputs, options):
    (view,), params = inputs, eqn.params
    strides = params["strides"] or (1,) * len(view.shape)
    for axis, bounds in enumerate(
        zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    ):
        if bounds != (0, view.shape[axis], 1):
            view = view.along(
                axis, lambda a, at, b=bounds: jax.lax.slice_in_dim(a, b[0], b[1], b[2], axis=at)
            )
    return [view]


def _dynamic_slice(eqn, inputs, options):
    view, *starts = inputs
    if not isinstance(view, _VIEWS):
        raise Unfused("it is an index")
    for axis, (start, size) in enumerate(zip(starts, eqn.params["slice_sizes"], strict=True)):
        if size != view.shape[axis]:
            view = view.along(
                axis,
                lambda a, at, s=start, n=size: jax.lax.dynamic_slice_in_dim(a, s, n, axis=at),
            )
    return [view]


def _gather(eqn, inputs, options):
    view, indices = inputs
    dims, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    if not isinstance(view, _VIEWS) or len(view.shape) != 2:
        raise Unfused("only rows of a table [N, K] are looked up")
    of_rows = (
        dims.collapsed_slice_dims == (0,)
        and dims.start_index_map == (0,)
        and not dims.operand_batching_dims
        and tuple(sizes) == (1, view.shape[1])
        and indices.shape[-1] == 1
    )
    if not of_rows:
        raise Unfused("only rows of a table [N, K] are looked up")
    fill = "FILL" in str(eqn.params["mode"])
    if fill and not np.isnan(np.asarray(eqn.params["fill_value"], np.float64)):
        fill_value = eqn.params["fill_value"]
        if fill_value is not None:
            raise Unfused(f"rows out of range are {fill_value}")
    rows = view.rows(indices[..., 0], fill)
    return [jnp.moveaxis(rows, -1, dims.offset_dims[0])]


def _dot_general(eqn, inputs, options):
    lhs, rhs = inputs
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    if isinstance(lhs, _VIEWS) and isinstance(rhs, _VIEWS):
        options.report(lhs, "dot_general", "both operands are weights")
        lhs = lhs.unpack()
    first = isinstance(lhs, _VIEWS)
    x: Any
    view, x = (lhs, rhs) if first else (rhs, lhs)
    contract, batch = ((rc, lc), (rb, lb)) if first else ((lc, rc), (lb, rb))
    out_dtype = eqn.params["preferred_element_type"]
    y = view.dot(
        x,
        (tuple(contract[0]), tuple(contract[1])),
        (tuple(batch[0]), tuple(batch[1])),
        weight_first=first,
        out_dtype=jnp.dtype(eqn.outvars[0].aval.dtype if out_dtype is None else out_dtype),
        backend=options.backend,
        arithmetic=options.arithmetic,
    )
    return [y]


# ---- programs inside of programs


def _call(eqn, inputs, options):
    return evaluate(eqn.params.get("jaxpr", eqn.params.get("call_jaxpr")), inputs, options)


def _split(values: Sequence[Any]) -> tuple[list[Any], Callable[[Sequence[Any]], list[Any]]]:
    """Values as JAX takes them (views as tensors), and the way back."""
    attribute = {Packed: "tensor", Recorded: "array"}
    operands = [getattr(v, attribute[type(v)]) if isinstance(v, _VIEWS) else v for v in values]

    def join(operands: Sequence[Any]) -> list[Any]:
        return [
            dataclasses.replace(v, **{attribute[type(v)]: o}) if isinstance(v, _VIEWS) else o
            for v, o in zip(values, operands, strict=True)
        ]

    return operands, join


def _remat(eqn, inputs, options):
    operands, join = _split(inputs)
    jaxpr = eqn.params["jaxpr"]

    @functools.partial(
        jax.checkpoint, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"]
    )
    def inner(*operands):
        return [_array(v) for v in evaluate(jaxpr, join(operands), options)]

    return inner(*operands)


def _scan(eqn, inputs, options):
    p = eqn.params
    num_consts, num_carry = _scan_counts(p)
    consts, rest = inputs[:num_consts], inputs[num_consts:]
    carry, xs = rest[:num_carry], rest[num_carry:]
    for value in carry:
        if isinstance(value, _VIEWS):
            options.report(value, "scan", "it is carried from one step to the next")
    slices, rejoin = [], []
    for value in xs:
        try:
            sliced, one = value.unstack(0) if isinstance(value, _VIEWS) else (value, None)
        except Unfused as why:
            options.report(value, "scan", str(why))
            sliced, one = value.unpack(), None
        slices.append(sliced)
        rejoin.append(one)
    const_operands, join = _split(consts)

    def body(carry, slices):
        slices = [s if one is None else one(s) for s, one in zip(slices, rejoin, strict=True)]
        inner = [*join(const_operands), *carry, *slices]
        out = [_array(v) for v in evaluate(p["jaxpr"], inner, options)]
        return out[:num_carry], out[num_carry:]

    carry, ys = jax.lax.scan(
        body,
        [_array(v) for v in carry],
        slices,
        length=p["length"],
        reverse=p["reverse"],
        unroll=p["unroll"],
    )
    return [*carry, *ys]


def _scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """How many of a scan's inputs are constants, and how many are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # JAX 0.11
    return len(consts), len(carry)


def _while(eqn, inputs, options):
    p = eqn.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    cond_consts, body_consts = inputs[:n_cond], inputs[n_cond : n_cond + n_body]
    carry = inputs[n_cond + n_body :]
    for value in carry:
        if isinstance(value, _VIEWS):
            options.report(value, "while", "it is carried from one step to the next")

    def run(program, consts, carry):
        return [_array(v) for v in evaluate(program, [*consts, *carry], options)]

    return jax.lax.while_loop(
        lambda carry: run(p["cond_jaxpr"], cond_consts, carry)[0],
        lambda carry: run(p["body_jaxpr"], body_consts, carry),
        [_array(v) for v in carry],
    )


def _cond(eqn, inputs, options):
    index, *operands = inputs
    operands, join = _split(operands)

    def branch(program):
        return lambda *operands: [_array(v) for v in evaluate(program, join(operands), options)]

    return jax.lax.switch(index, [branch(b) for b in eqn.params["branches"]], *operands)


_HANDLERS: dict[str, Callable[[Any, list[Any], Options], Sequence[Any]]] = {
    **dict.fromkeys(_SAME, _same),
    **dict.fromkeys(_CALLS, _call),
    **dict.fromkeys(_REMAT, _remat),
    "convert_element_type": _cast,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "dot_general": _dot_general,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
