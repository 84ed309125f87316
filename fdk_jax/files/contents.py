"""What a checkpoint holds, whatever its format: the seam between files and models."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fdk_jax.format import codebooks, packing
from fdk_jax.format.quantised_tensor import QuantisedTensor

HostArray = np.ndarray
_RUN_BYTES = 32 << 20


@dataclasses.dataclass(frozen=True)
class Stored:
    """One array of a checkpoint that has not been read yet.

    Attributes:
        shape: Of the array, or of the weight that its codes stand for: [N, K] of a matrix, [E, N, K] of the
            stacked matrices of experts.
        kind: How it is stored, for messages and tables: "BF16", "Q4_0", "GPTQ 4 bits".
        read: Reads it from the disk: a numpy array, or a `QuantisedTensor` of numpy arrays in the interchange
            layout. May be called from several threads at a time.
        quantised: Whether `read` returns a `QuantisedTensor`.
        rows: Reads rows [begin, end) of a matrix alone, in the form of `read`; None where only all of it can be
            read. A third argument, bytes uint8 or None, is where those of the array, or of the codes, may lie.
    """

    shape: tuple[int, ...]
    kind: str
    read: Callable[[], HostArray | QuantisedTensor]
    quantised: bool = False
    rows: Callable[[int, int, HostArray | None], HostArray | QuantisedTensor] | None = None

    def array(self) -> HostArray:
        """`read` of one that is not quantised.

        Raises:
            ValueError: it is quantised.
        """
        return self._plain(self.read())

    def some(self, begin: int, end: int, out: HostArray | None = None) -> HostArray:
        """Rows [begin, end) of one that is not quantised; see `rows`.

        Raises:
            ValueError: it is quantised.
        """
        found = self.read()[begin:end] if self.rows is None else self.rows(begin, end, out)
        return self._plain(found)

    def runs(self, most_bytes: int | None = None) -> list[tuple[int, int]]:
        """Runs of rows [begin, end), of so many bytes at most if a row has no more; one of all, without `rows`.

        By default each is small enough to be sent to a device as one of several that are under way.
        """
        if self.rows is None:  # each run would read all of it
            return [(0, self.shape[0])]
        width = 2 * math.prod(self.shape[1:])  # bytes, as if it were of 16 bits
        step = max((most_bytes or _RUN_BYTES) // max(width, 1), 1)
        return [(i, min(i + step, self.shape[0])) for i in range(0, self.shape[0], step)]

    def _plain(self, found: HostArray | QuantisedTensor) -> HostArray:
        if isinstance(found, QuantisedTensor):
            raise ValueError(f"a plain array is needed here, not weights stored as {self.kind}")
        return found


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer as the files of a Hugging Face folder.

    Attributes:
        tokenizer: The text of `tokenizer.json`.
        config: What `tokenizer_config.json` says: special tokens, `chat_template`.
        stop_tokens: Token numbers that end a text.
    """

    tokenizer: str
    config: Mapping[str, Any]
    stop_tokens: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been recognised and not been read yet.

    Attributes:
        path: The file or folder.
        format: Its name: "GGUF", "GPTQ", "safetensors".
        config: What Hugging Face's `config.json` says of the model.
        tensors: The weights by their Hugging Face names; a matrix is "....weight" however it is stored.
        notes: What a user should know: widened codes, quantised activations that are exact here.
        errors: Of weights that were requantised, as they are read: name to relative error.
    """

    path: Path
    format: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    notes: tuple[str, ...] = ()
    errors: dict[str, float] = dataclasses.field(default_factory=dict)

    def all_notes(self) -> list[str]:
        """`notes`, and the largest error of what was requantised."""
        if not self.errors:
            return list(self.notes)
        name, worst = max(self.errors.items(), key=lambda item: item[1])
        error = (
            f"{len(self.errors)} requantised weights, relative error at most {worst:.2e} ({name})"
        )
        return [*self.notes, error]


def quantised_tensor(
    packed: HostArray,
    scales: HostArray,
    values: Any,
    *,
    bits: int,
    group_size: int,
    in_features: int,
) -> QuantisedTensor:
    """A `QuantisedTensor` of numpy arrays in the interchange layout.

    Args:
        packed: uint8 [..., N, ceil(K / E)], first code in the highest bits.
        scales: [..., N, ceil(K / G)] bfloat16, float16 or float32.
        values: at most 2**bits ascending values; the last one is repeated.
        bits: 1, 2, 4 or 8.
        group_size: G.
        in_features: K.

    Raises:
        ValueError: scales that are not finite; arrays that do not fit.
    """
    codebook = codebooks.check(values, bits)
    check_finite(scales)
    lead = packed.shape[:-2]
    # A pytree may hold host arrays where its class says device arrays.
    arrays: Any = (
        np.ascontiguousarray(packed),
        np.ascontiguousarray(scales),
        np.broadcast_to(codebook, (*lead, *codebook.shape)),
    )
    w = QuantisedTensor(
        *arrays,
        bits=bits,
        group_size=group_size,
        shape=(packed.shape[-2], in_features),
        uniform=bits == 1 or codebooks.is_uniform(codebook),
    )
    rows, groups = packed.shape[:-1], -(-in_features // group_size)
    wanted = (*rows, packing.row_bytes(bits, in_features))
    if packed.shape != wanted or scales.shape != (*rows, groups):
        raise ValueError(
            f"codes {packed.shape} and scales {scales.shape} do not make rows of {in_features} weights"
            f" of {bits} bits in groups of {group_size}: {wanted} and {(*rows, groups)} would"
        )
    return w


def check_finite(scales: HostArray) -> None:
    """Refuses scales that hold NaN or infinity."""
    if scales.itemsize == 2:  # of a known dtype: by its bits, which takes a third of the time
        infinity = np.asarray(np.inf, scales.dtype).view(np.uint16)
        finite = not scales.size or (scales.view(np.uint16) & np.uint16(0x7FFF)).max() < infinity
    else:
        finite = np.isfinite(scales.astype(np.float32, copy=False)).all()
    if not finite:
        raise ValueError("the scales hold NaN or infinity: the file is damaged")
