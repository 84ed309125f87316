"""Checkpoints of any format of `fdk_jax.files` as a `Transformer`."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from fdk_jax import files
from fdk_jax.files.contents import Stored
from fdk_jax.format.host_arrays import return_freed_memory
from fdk_jax.format.quantisation import quantise_array
from fdk_jax.format.quantised_tensor import QuantisedTensor
from fdk_jax.layers.linear import QuantisedWeight
from fdk_jax.learning.fitting import calibrate_array
from fdk_jax.models import names, prepared
from fdk_jax.models.config import ModelConfig
from fdk_jax.models.expert_weights import read_bias, read_stack, set_stack
from fdk_jax.models.hub import find_checkpoint
from fdk_jax.models.parallel import Parallel
from fdk_jax.models.pipeline import MAKERS, Finish, Pipeline, Take, run
from fdk_jax.models.stages import check_names, stages, with_own_head
from fdk_jax.models.transformer import Transformer, shapes
from fdk_jax.models.weights import (
    Placer,
    check_arithmetic,
    join_rows,
    set_linear,
    set_vector,
    share_table,
)
from fdk_jax.product.choice import default_backend

_SHOWN = 20  # names of each kind that an error lists


@dataclasses.dataclass(frozen=True)
class Quantisation:
    """How weights are quantised while they are read.

    Attributes:
        bits: 1, 2, 4 or 8.
        group_size: Weights that share a scale.
        codebook: "auto", "uniform", "nf4", "kmeans" or the values; see `fdk_jax.quantise`.
        scale: See `fdk_jax.quantise`; or "search", for the scale of each group with the least error, where
            codebook "auto" stands for "kmeans": less is lost at 4 bits, and it takes many times as long.
        head_bits: Bits of the final projection (codebook "auto", groups of `group_size`), or None to keep it.
            A head that is tied to the embedding becomes a quantised copy of it.
    """

    bits: int
    group_size: int = 64
    codebook: Any = "auto"
    scale: str = "auto"
    head_bits: int | None = None


def load(
    path: str | Path,
    *,
    quantisation: Quantisation | None = None,
    requantise: int | None = None,
    dtype: str | None = None,
    parallel: Parallel | None = None,
    backend: str | None = None,
    arithmetic: str = "exact",
    progress: Callable[[int, int], None] | None = None,
    device: jax.Device | None = None,
) -> Transformer:
    """Loads a model from a checkpoint of another program, layer by layer.

    Several threads read and unpack one layer while the one before is put on the device (or, with
    `parallel`, each slice on its own). A checkpoint that is quantised is read as it is, to the bit: see
    docs/files.md for the formats.

    Args:
        path: A Hugging Face folder with `config.json` and `*.safetensors`, a `.gguf` file, the name of a
            model in the hub's cache, or a folder of `exporting.export(..., format="prepared")`.
        quantisation: Quantises the linear layers while reading, all but the final one; None keeps them.
        requantise: Bits (4 or 8) for weights of a kind that scale times codebook cannot hold, as K-quants of
            GGUF, or 16 to keep them as floats; None refuses them. With `quantisation` 16 makes floats of all
            quantised weights first.
        dtype: Compute dtype; None takes that of the checkpoint.
        parallel: Several devices that share every matrix; None uses the default device.
        backend: Whose kernels quantised weights are laid out for; None for the default platform's.
        arithmetic: Of the activations that quantised weights multiply: "exact"; "int16" or "int8" with
            backend "cpu" (see `fdk_jax.matmul`).
        progress: Called as progress(layers read, layers).
        device: Where a model of floats is put, such as a CPU beside a GPU that is too small; None for the
            default device.

    Returns:
        The model, ready for `fdk_jax.models.Generator`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a format or an architecture that is not implemented, by its name; a damaged file; or
            arrays that do not fit: every missing, unexpected or mis-shaped name at once.

    Warns:
        UserWarning: what is not as it is in the file: requantised weights, with their largest error; and what
            the checkpoint was made for and is not done here, such as activations of 8 bits.
    """
    backend = backend or default_backend()
    check_arithmetic(arithmetic, backend)
    path = find_checkpoint(path)
    if prepared.is_prepared(path):
        if quantisation is not None or parallel is not None:
            raise ValueError(f"{path} is prepared: load it on one device, without quantisation")
        return prepared.read(path, dtype=dtype, backend=backend, arithmetic=arithmetic)
    checkpoint = files.read(path, requantise=requantise)
    config = ModelConfig.from_hf(checkpoint.config, dtype=dtype)
    if "text_config" in checkpoint.config:
        kept = names.text_part(checkpoint.tensors)
        tensors = {new: checkpoint.tensors[old] for old, new in kept.items()}
        note = f"of {checkpoint.config.get('model_type')!r} only the text part is read"
        checkpoint = dataclasses.replace(
            checkpoint, tensors=tensors, notes=(*checkpoint.notes, note)
        )
    if quantisation is not None and any(one.quantised for one in checkpoint.tensors.values()):
        if requantise != 16:
            raise ValueError(
                f"{path} is quantised already ({checkpoint.format}); load it without quantisation, or with"
                " requantise=16, which quantises the values that its weights have"
            )
        tensors = {name: _as_floats(one) for name, one in checkpoint.tensors.items()}
        checkpoint = dataclasses.replace(checkpoint, tensors=tensors)
    if (own := with_own_head(config, checkpoint.tensors)) != config:
        note = f"tie_word_embeddings is true, and {names.HEAD} has values of its own: they are used"
        config, checkpoint = own, dataclasses.replace(checkpoint, notes=(*checkpoint.notes, note))
    check_names(config, checkpoint.tensors)
    if parallel is not None:
        names.check_cut(config)
    model = shapes(config, parallel)
    placer = Placer(parallel, config.dtype, backend, device)
    # Devices of several processes must be given their work in the same order; quantising takes memory.
    in_order = quantisation is not None or (parallel is not None and not parallel.in_one_process)
    makers = 1 if in_order else MAKERS

    def finished(stage: int) -> None:
        return_freed_memory()
        if progress is not None and 0 < stage <= config.num_layers:
            progress(stage, config.num_layers)

    with Pipeline(checkpoint.tensors, makers) as pipeline:
        reader = _Reader(config, pipeline, quantisation, placer, arithmetic)
        run(reader.stages(model), finished)
    reader.check_finite()
    for note in checkpoint.all_notes():
        warnings.warn(f"{path}: {note}", stacklevel=2)
    return model


def read_config(path: str | Path, *, dtype: str | None = None) -> ModelConfig:
    """The configuration of a checkpoint, of which only headers are read.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: see `ModelConfig.from_hf`.
    """
    return ModelConfig.from_hf(files.read_config(find_checkpoint(path)), dtype=dtype)


def stored_bits(path: str | Path) -> int | None:
    """Bits of a code of the first linear layer of a checkpoint; None where its weights are floats."""
    for one in files.read(path).tensors.values():
        if one.quantised and isinstance(weight := one.read(), QuantisedTensor):
            return weight.bits
    return None


class _Reader:
    """Fills a model from a checkpoint: each method begins a stage, and gives what finishes it."""

    def __init__(self, config, pipeline, quantisation, placer, arithmetic):
        self.config: ModelConfig = config
        self.pipeline: Pipeline = pipeline
        self.quantisation: Quantisation | None = quantisation
        self.placer: Placer = placer
        self.arithmetic: str = arithmetic
        self.table: np.ndarray | Array | QuantisedTensor | None = None  # which a tied head shares
        self._embedded: Future
        self._flags: list[tuple[list[str], Array]] = []  # whether floats are finite

    def stages(self, model: Transformer) -> Iterator[Callable[[], Finish]]:
        """What begins each stage: the embedding, each layer, the head."""
        wanted = stages(self.config)
        yield lambda: self._embedding(model, self._read(wanted[0]))
        for index, layer in enumerate(model.layers):
            parts = [p for one in names.layer_projections(self.config, index) for p in one.parts]
            take = functools.partial(self._read, wanted[1 + index], parts)
            yield functools.partial(self._layer, layer, index, take)
        yield lambda: self._head(model, self._read(wanted[-1], names.head(self.config).parts))

    def _read(self, wanted: Iterable[str], parts: Iterable[Any] = ()) -> Take:
        """Begins to read a stage, but for matrices of projections that are streamed to the device."""
        matrices = {names.EMBEDDING, *(f"{part.name}.weight" for part in parts)}

        def left(name: str, one: Stored) -> bool:
            return self.quantisation is None and name in matrices and self.placer.streams(one)

        return self.pipeline.read(wanted, left)

    def check_finite(self) -> None:
        """Refuses a model whose floats are not all finite, once it is read.

        Raises:
            ValueError: with the names.
        """
        flags = jax.device_get([flags for _, flags in self._flags])
        bad = [
            name
            for (names, _), finite in zip(self._flags, flags, strict=True)
            for name, right in zip(names, finite, strict=True)
            if not right
        ]
        if bad:
            raise ValueError(
                f"{', '.join(bad[:_SHOWN])} hold NaN or infinity in {self.placer.dtype}: the file is"
                " damaged, or needs another dtype"
            )

    def _watch(self, made: Mapping[str, Any]) -> None:
        """Looks later at whether these are finite; scales of quantised weights were looked at before."""
        floats = {name: one for name, one in made.items() if isinstance(one, Array)}
        if floats:
            self._flags.append(([*floats], _finite(list(floats.values()))))

    def _embedding(self, model: Transformer, take: Take) -> Finish:
        def make() -> QuantisedTensor | Array:
            table = take(names.EMBEDDING)
            if isinstance(table, Stored) and not table.quantised:
                made = self.placer.embedding(self.placer.pieces(table, self.pipeline.each))
            elif isinstance(table, np.ndarray):
                made = self.placer.embedding([table])
            else:
                made = table = self._weight([table], "n")
            if self.config.tie_embeddings:
                self.table = made if isinstance(table, Stored) else table
            return made

        self._embedded = made = self.pipeline.make(make)

        def finish() -> None:
            table = made.result()
            self._watch({names.EMBEDDING: table})
            quantised = isinstance(table, QuantisedTensor)
            model.embedding = QuantisedWeight(table) if quantised else nnx.Param(table)

        return finish

    def _layer(self, layer: nnx.Module, index: int, read: Callable[[], Take]) -> Finish:
        take, make, placer = read(), self.pipeline.make, self.placer
        stacks = [
            (stack, make(self._stack, stack, index, take))
            for stack in names.layer_stacks(self.config, index)
        ]
        linears = []
        for projection in names.layer_projections(self.config, index):
            quantisation = None if projection.plain else self.quantisation
            linears.append((projection, make(self._linear, projection, quantisation, take)))
        vectors = [
            (
                name,
                path,
                make(
                    lambda name=name, path=path: placer.vector(
                        _float(take(name)), cut=path[-1] == "sinks"
                    )
                ),
            )
            for name, (path, _) in names.layer_vectors(self.config, index).items()
        ]

        def finish() -> None:
            floats: dict[str, Any] = {}
            for name, path, vector in vectors:
                floats[name] = vector.result()
                set_vector(layer, path, floats[name])
            for projection, linear in linears:
                weight, bias = linear.result()
                first = projection.parts[0].name
                floats |= {f"{first}.weight": weight, f"{first}.bias": bias}
                self._place(layer, projection, weight, bias)
            for stack, made in stacks:
                mlp, name = getattr(layer, stack.path[0]), stack.path[1]
                weight, bias = made.result()
                floats |= {f"layer {index}: experts' {name}": weight}
                floats |= {f"layer {index}: experts' {name} bias": bias}
                set_stack(mlp, name, weight, bias)
            self._watch(floats)

        return finish

    def _stack(self, stack, index: int, take: Take) -> tuple[Any, Any]:
        read: Any = lambda name: _whole(take(name))  # noqa: E731
        weight, q = read_stack(stack, read), self.quantisation
        if q is not None and not isinstance(weight, QuantisedTensor):
            weight = self._quantised(f"layer {index}: experts' {stack.path[-1]}", weight, q)
        bias = read_bias(stack, read)
        return self.placer.stack(weight), None if bias is None else self.placer.rows(bias)

    def _head(self, model: Transformer, take: Take) -> Finish:
        """The final norm and the head."""
        q, projection = self.quantisation, names.head(self.config)
        quantisation = Quantisation(q.head_bits, q.group_size) if q and q.head_bits else None
        make, placer = self.pipeline.make, self.placer
        norm = make(lambda: placer.vector(_float(take(names.FINAL_NORM))))

        def head() -> tuple[Any, Any] | None:
            if not self.config.tie_embeddings:
                return self._linear(projection, quantisation, take)
            self._embedded.result()
            if isinstance(self.table, QuantisedTensor):
                return self.table, None
            if quantisation is None:
                return None
            return self._joined(projection, [self.table], quantisation), None

        made = make(head)

        def finish() -> None:
            set_vector(model, ("norm", "scale"), norm.result())
            floats: dict[str, Any] = {names.FINAL_NORM: norm.result()}
            if (found := made.result()) is not None:
                floats[f"{projection.parts[0].name}.weight"] = found[0]
                self._place(model, projection, *found)
                if self.config.tie_embeddings and isinstance(self.table, QuantisedTensor):
                    share_table(model)
            self._watch(floats)

        return finish

    def _linear(self, projection, quantisation: Quantisation | None, take: Take) -> tuple[Any, Any]:
        """The weight of a linear layer and its bias or None."""
        parts, bias = projection.parts, None
        weights = [take(f"{part.name}.weight") for part in parts]
        if parts[0].bias:
            rows = [_float(take(f"{part.name}.bias")) for part in parts]
            joined = join_rows(rows, self.placer.shards if projection.cut == "n" else 1)
            bias = self.placer.bias(joined, projection.cut)
        return self._joined(projection, weights, quantisation), bias

    def _joined(self, projection, weights: list, quantisation: Quantisation | None) -> Any:
        if quantisation is not None:
            weights = [
                self._quantised(part.name, weight, quantisation)
                for part, weight in zip(projection.parts, weights, strict=True)
            ]
        return self._weight(weights, projection.cut)

    def _weight(self, parts: list, cut: str) -> Any:
        """A weight of parts that were read, or that are read now by runs of rows."""
        each = self.pipeline.each
        if all(isinstance(part, Stored) for part in parts):
            if not any(part.quantised for part in parts):
                if (made := self.placer.host_kernel(parts, each)) is not None:
                    return made
                pieces = [piece for part in parts for piece in self.placer.pieces(part, each)]
                return self.placer.kernel(pieces, cut)
            if all(part.quantised for part in parts):
                made = self.placer.streamed(parts, each)
                if made is not None:
                    return made
        parts = [_whole(part) for part in parts]
        if all(isinstance(part, QuantisedTensor) for part in parts):
            return self.placer.quantised(parts, cut)
        return self.placer.kernel([_float(part) for part in parts], cut)

    def _place(self, owner, projection, weight, bias) -> None:
        dtype = self.placer.dtype
        set_linear(owner, projection.path, weight, bias, dtype, self.arithmetic)

    def _quantised(self, name: str, weight: Any, q: Quantisation) -> QuantisedTensor:
        make = calibrate_array if q.scale == "search" else quantise_array
        try:
            return make(
                jnp.asarray(weight).astype(self.placer.dtype),
                q.bits,
                group_size=q.group_size,
                codebook=q.codebook,
                scale=q.scale,
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


@jax.jit
def _finite(arrays: list[Array]) -> Array:
    """For each array whether all of it is finite: NaN goes through a maximum, and no array of flags is made."""
    return jnp.stack([jnp.abs(array).max(initial=0.0) < jnp.inf for array in arrays])


def _as_floats(stored: Stored) -> Stored:
    """The values of a quantised weight, [K, N] the last axes of a stack as float stacks have them."""
    if not stored.quantised:
        return stored

    def read() -> np.ndarray:
        values = _float(stored.read())
        return values if values.ndim < 3 else values.swapaxes(-1, -2)

    *lead, n, k = stored.shape
    shape = (*lead, k, n) if lead else (n, k)
    return Stored(shape, f"{stored.kind} as floats", read)


def _whole(weight: Any) -> np.ndarray | QuantisedTensor:
    """What is still in the file, read."""
    return weight.read() if isinstance(weight, Stored) else weight


def _float(weight: np.ndarray | QuantisedTensor | Stored) -> np.ndarray:
    """A float array; of a quantised one its values in float32."""
    weight = _whole(weight)
    return (
        np.asarray(weight.dequantise(jnp.float32))
        if isinstance(weight, QuantisedTensor)
        else weight
    )
