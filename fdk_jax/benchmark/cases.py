"""Cases of the kernel suite: what is measured, and under which name."""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from fdk_jax.product.choice import INEXACT

BACKENDS = ("pallas", "cpu", "xla")
DENSE_BITS = (16, 32)
DTYPES = ("bfloat16", "float16", "float32")
CODEBOOKS = ("uniform", "nf4", "kmeans")
ARITHMETICS = ("exact", "int16", "int8")

_NAME = re.compile(
    rf"(?P<backend>{'|'.join(BACKENDS)})-b(?P<bits>1|2|4|8|16|32)"
    r"-m(?P<m>[1-9]\d*)-k(?P<k>[1-9]\d*)-n(?P<n>[1-9]\d*)"
    rf"(?:-g(?P<group_size>[1-9]\d*)-(?P<codebook>{'|'.join(CODEBOOKS)}))?"
    rf"-(?P<dtype>{'|'.join(DTYPES)})(?:-(?P<arithmetic>{'|'.join(ARITHMETICS)}))?"
)


@dataclasses.dataclass(frozen=True)
class KernelCase:
    """y[m, n] = x[m, k] @ W[n, k].T on one backend.

    Attributes:
        backend: "pallas", "cpu" or "xla"; an unquantised product is always XLA's own.
        m, k, n: tokens, input features, output features.
        bits: 1, 2, 4, 8, or 16 and 32 for a weight that is not quantised.
        group_size, codebook: None when the weight is not quantised.
        dtype: of the activations, the scales and an unquantised weight.
        arithmetic: of the activations inside the CPU library.
    """

    backend: str
    m: int
    k: int
    n: int
    bits: int
    group_size: int | None = None
    codebook: str | None = None
    dtype: str = "bfloat16"
    arithmetic: str = "exact"

    @property
    def dense(self) -> bool:
        """Whether the weight is not quantised."""
        return self.bits in DENSE_BITS

    @property
    def name(self) -> str:
        """Unique, safe as a file name: "pallas-b4-m1-k4096-n4096-g64-uniform-bfloat16"."""
        parts = [self.backend, f"b{self.bits}", f"m{self.m}", f"k{self.k}", f"n{self.n}"]
        if not self.dense:
            parts += [f"g{self.group_size}", str(self.codebook)]
        parts.append(self.dtype)
        if self.arithmetic != "exact":
            parts.append(self.arithmetic)
        return "-".join(parts)

    @classmethod
    def parse(cls, name: str) -> "KernelCase":
        """The case of a name.

        Raises:
            ValueError: no case has this name.
        """
        match = _NAME.fullmatch(name)
        if not match:
            raise ValueError(f"{name!r} is not the name of a kernel case; --list shows names")
        values = {k: int(v) if v.isdigit() else v for k, v in match.groupdict().items() if v}
        case = cls(**values)  # type: ignore[arg-type]
        if case.dense == (case.group_size is not None):
            raise ValueError(f"{name!r}: a quantised case has a group and a codebook, others none")
        return case

    def fields(self) -> dict[str, Any]:
        """The keys of a row that say what is measured."""
        return {"suite": "kernels", "name": self.name, **dataclasses.asdict(self)}


def make_cases(
    *,
    backends: Sequence[str],
    m: Sequence[int],
    k: Sequence[int],
    n: Sequence[int | str],
    bits: Sequence[int],
    group_sizes: Sequence[int] = (64,),
    codebooks: Sequence[str] = ("uniform",),
    dtypes: Sequence[str] = ("bfloat16",),
    arithmetics: Sequence[str] = ("exact",),
) -> list[KernelCase]:
    """Every combination once, the cases to be compared next to each other.

    Args:
        backends: of the quantised cases. Unquantised ones (bits 16 or 32) appear once, as "xla".
        m: tokens.
        k: input features.
        n: output features; "k" stands for the k of the case.
        bits: widths; 16 in float32 is the same case as 32.
        group_sizes: of the quantised cases.
        codebooks: of the quantised cases.
        dtypes: of the activations.
        arithmetics: of the activations; those that a backend lacks are left out, but for "exact".
    """
    cases = []
    for k_, n_, m_, b, dtype in itertools.product(k, n, m, bits, dtypes):
        n_ = k_ if n_ == "k" else int(n_)
        if b in DENSE_BITS:
            dtype = "float32" if b == 32 else dtype
            width = 32 if dtype == "float32" else 16
            cases.append(KernelCase("xla", m_, k_, n_, width, dtype=dtype))
            continue
        for g, codebook, backend in itertools.product(group_sizes, codebooks, backends):
            known = ("exact", *INEXACT.get(backend, ()))
            for arithmetic in [a for a in arithmetics if a in known] or ("exact",):
                cases.append(KernelCase(backend, m_, k_, n_, b, g, codebook, dtype, arithmetic))
    return list(dict.fromkeys(cases))


Case = TypeVar("Case")


def select(cases: Iterable[Case], include: str = "", exclude: str = "") -> list[Case]:
    """The cases whose name `include` finds and `exclude` does not; empty expressions select all."""
    wanted, unwanted = re.compile(include), re.compile(exclude) if exclude else None
    return [
        c
        for c in cases
        if wanted.search(c.name) and not (unwanted and unwanted.search(c.name))  # type: ignore[attr-defined]
    ]
