"""What the attention kernels in PTX share: their case, norms and RoPE of a token, a softmax in parts."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp

from pallas_kernels import decoding
from pallas_kernels.ptx import LOG2_E, Ptx, Writer, over_lanes
from pallas_kernels.registers import Register, at
from pallas_kernels.target import Target

NEVER = -1e30  # a score whose power is zero


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """What is static about one token's attention; see `attention` for the letters.

    Attributes:
        heads, kv_heads: H and KV.
        dim: D.
        capacity: S.
        dtype: bfloat16 or float16.
        norm_eps: of the norms of queries and keys, None without norms.
    """

    heads: int
    kv_heads: int
    dim: int
    capacity: int
    dtype: jnp.dtype
    norm_eps: float | None

    @property
    def group(self) -> int:
        """Query heads that share a key-value head."""
        return self.heads // self.kv_heads

    def unsupported_shape(self, dims: Sequence[int], slots: int) -> str | None:
        """Why kernels in PTX of these head sizes and multiples of slots do not take it, or None."""
        if self.dim not in dims:
            return f"heads of {self.dim} are not of {', '.join(map(str, dims))}"
        if self.capacity % slots:
            return f"{self.capacity} slots are no multiple of {slots}"
        if self.dtype not in (jnp.bfloat16, jnp.float16):
            return f"{self.dtype} is not bfloat16 or float16"
        return None

    @property
    def row_bytes(self) -> int:
        """Bytes of a head of a token."""
        return 2 * self.dim

    @property
    def score_scale(self) -> float:
        """What queries are multiplied by: scores are in units of log 2."""
        return self.dim**-0.5 * LOG2_E

    def operands(self, *results: str) -> list[str]:
        """Names of a kernel's operands and results, in order."""
        norms = ["q_norm", "k_norm"] * (self.norm_eps is not None)
        return ["qkv", "cos", "sin", "lengths", "keys", "values", *norms, *results]


class AttentionWriter(Writer):
    """Writes what the attention kernels share. A head's elements are lists of float32 registers of a lane.

    Attributes:
        sequence: register with the program's sequence.
        length: register with the number of tokens in its cache, the slot of the new one.
    """

    sequence: Register
    length: Register

    def __init__(
        self,
        case: AttentionCase,
        target: Target,
        *results: str,
        ptx: Ptx | None = None,
        operands: dict[str, Register] | None = None,
    ) -> None:
        self.case, self.ptx, self.row_bytes = case, ptx or Ptx(target), case.row_bytes
        self.operands = operands or self.ptx.operands(*case.operands(*results))

    def load_length(self) -> None:
        """Loads the number of tokens in the cache. A full cache loses its last token."""
        length = self.ptx.op("ld.global.nc.b32", at(self.operands["lengths"] + self.sequence * 4))
        self.length = self.ptx.op("min.u32", length, self.case.capacity - 1)

    def unpack(self, words: list[Register]) -> list[Register]:
        """The elements of words, float32."""
        return [f for word in words for f in decoding.unpack(self.ptx, word, self.case.dtype)]

    def pack(self, values: list[Register]) -> list[Register]:
        """Words of neighbours."""
        pairs = zip(values[::2], values[1::2], strict=True)
        return [decoding.pack(self.ptx, *pair, self.case.dtype) for pair in pairs]

    def dot(self, x: list[Register], y: list[Register]) -> Register:
        """The lane's part of a dot product."""
        total = x[0] * y[0]
        for pair in zip(x[1:], y[1:], strict=True):
            total = self.ptx.op("fma.rn.f32", *pair, total)
        return total

    def inverse_norm(self, head: list[Register], lanes: tuple[int, ...]) -> Register:
        """One over the root of a head's mean square, of which lanes at these distances have parts."""
        square = over_lanes(self.ptx, "add.f32", self.dot(head, head), lanes)
        constants = 1 / self.case.dim, self.case.norm_eps or 0.0
        mean = self.ptx.op("fma.rn.f32", square, *constants)
        return self.ptx.op("rsqrt.approx.f32", mean)

    def rotate(self, x: Register, other: Register, cos: Register, sin: Register) -> Register:
        """An element of a RoPE pair, x cos + other sin: of the pair's first the sine is negated."""
        rotated = x * cos
        return self.ptx.op("fma.rn.f32", other, sin, rotated)

    def power(self, score: Register, peak: Register) -> Register:
        """The weight of a score next to the highest one."""
        return self.ptx.op("ex2.approx.f32", score - peak)

    def shares(self, peaks: list[Register]) -> tuple[Register, list[Register]]:
        """Of parts of a softmax with their own peaks the highest one, and what each part is multiplied by."""
        highest = peaks[0]
        for peak in peaks[1:]:
            highest = self.ptx.op("max.f32", highest, peak)
        return highest, [self.power(peak, highest) for peak in peaks]
