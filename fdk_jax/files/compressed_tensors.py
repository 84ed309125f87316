"""Folders of compressed-tensors (llm-compressor, vLLM).

Formats: pack-quantized (int32 words), int-quantized (int8), nvfp4- and mxfp4-pack-quantized. Layouts are those
of the package's compressors (https://github.com/vllm-project/compressed-tensors, Apache 2.0).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fdk_jax.files import small_floats
from fdk_jax.files.bits import WIDTHS, turn, turned, unpack
from fdk_jax.files.contents import Stored, quantised_tensor
from fdk_jax.files.groups import Group, size_of, split, without_cache_scales
from fdk_jax.files.zero_points import with_zeros

NAME = "compressed-tensors"
_PARTS = (
    "weight_scale",
    "weight_global_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
    "input_global_scale",
    "input_scale",
    "input_zero_point",
)
# None, where a file does not say: its arrays are of one of the others.
_FORMATS = (
    *(None, "pack-quantized", "int-quantized", "naive-quantized", "nvfp4-pack-quantized"),
    *("mxfp4-pack-quantized", "mixed-precision", "dense"),
)


def weights(
    settings: Mapping[str, Any], stored: Mapping[str, Stored], notes: list[str]
) -> dict[str, Stored]:
    """The weights of a checkpoint by name; see `fdk_jax.files.folder`.

    Raises:
        ValueError: a format that is not supported, by its name.
    """
    sparsity = (settings.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise ValueError(f"compressed-tensors with sparsity {sparsity!r} is not supported")
    if settings.get("quantization_status", "compressed") not in ("compressed", "frozen"):
        raise ValueError(
            f"compressed-tensors with quantization_status={settings['quantization_status']!r} is not"
            " supported, only compressed"
        )
    if settings.get("kv_cache_scheme"):
        stored = without_cache_scales(stored, notes)
    groups, rest = split(stored, "weight_packed", _PARTS)
    whole, rest = split(rest, "weight_scale", ("weight", *_PARTS))
    schemes = [_scheme(name, settings) for name in settings.get("config_groups") or {}]
    if not schemes:
        raise ValueError("compressed-tensors without config_groups is not supported")
    made = {}
    for group in (*groups, *whole):
        made[f"{group.module}.weight"] = _weight(group, schemes)
    activations = {scheme["activations"] for scheme in schemes} - {None}
    if activations:
        notes.append(
            f"activations are exact here; the checkpoint was made for {', '.join(sorted(activations))}"
        )
    return made | rest


def _scheme(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What one entry of `config_groups` says of its weights."""
    entry = settings["config_groups"][name]
    if not isinstance(entry, Mapping) or not entry.get("weights"):
        raise ValueError(f"compressed-tensors: config group {name!r} has no weights")
    args, inputs = (
        entry["weights"],
        entry.get("input_activations") or entry.get("output_activations"),
    )
    if args.get("actorder") in ("group", "dynamic", True):
        raise ValueError(f"compressed-tensors with actorder={args['actorder']!r} is not supported")
    if (form := entry.get("format") or settings.get("format")) not in _FORMATS:
        raise ValueError(f"compressed-tensors with format={form!r} is not supported")
    activations = (
        f"{inputs.get('num_bits')}-bit {inputs.get('type')} activations" if inputs else None
    )
    return dict(
        format=form,
        bits=args.get("num_bits"),
        type=args.get("type", "int"),
        strategy=args.get("strategy"),
        group_size=args.get("group_size"),
        symmetric=args.get("symmetric", True),
        activations=activations,
    )


def _weight(group: Group, schemes: list[dict[str, Any]]) -> Stored:
    if "weight_g_idx" in group:
        raise ValueError(f"{group.module}: compressed-tensors with act-order is not supported")
    if "weight_packed" not in group:
        return _whole(group, schemes)
    if group["weight_packed"].kind == "I32":
        return _integers(group, schemes)
    group.dtype("weight_packed", "U8")
    kinds = {s["format"] for s in schemes if s["type"] == "float"}
    if "weight_global_scale" in group:
        return nvfp4(group, "weight_packed", "weight_global_scale", NAME, divide=True)
    if "mxfp4-pack-quantized" in kinds:
        return mxfp4(group, "weight_packed", "weight_scale", f"{NAME} MXFP4")
    raise ValueError(
        f"{group.module}: compressed-tensors {sorted(map(str, kinds))} is not supported"
    )


def _whole(group: Group, schemes: list[dict[str, Any]]) -> Stored:
    """Integers of 8 bits, a byte each, with a scale a group, row or tensor."""
    weight = group["weight"]
    if weight.kind != "I8" or len(weight.shape) != 2:
        raise ValueError(
            f"{group.module}: compressed-tensors weights of {weight.kind} are not supported, only I8"
        )
    if "weight_zero_point" in group:
        raise ValueError(f"{group.module}: int-quantized with zero points is not supported")
    (n, k), scale = weight.shape, group.dtype("weight_scale", "BF16", "F16", "F32")
    g = _group_size(group, scale.shape, n, k, [s for s in schemes if s["bits"] == 8])

    def read():
        packed = weight.array().view(np.uint8) ^ np.uint8(0x80)
        scales = _rows(scale.array(), n)
        return quantised_tensor(
            packed, scales, np.arange(-128, 128), bits=8, group_size=g, in_features=k
        )

    return group.weight((n, k), f"{NAME} 8 bits, group {g}", read)


def _integers(group: Group, schemes: list[dict[str, Any]]) -> Stored:
    """Integers in words of 32 bits, lowest bits first, along K."""
    packed, scale = group["weight_packed"], group.dtype("weight_scale", "BF16", "F16", "F32")
    n, k = (int(d) for d in np.asarray(group["weight_shape"].array()).ravel())
    widths = {s["bits"] for s in schemes if s["type"] == "int"}
    fits = [b for b in widths if -(-k * b // 32) == packed.shape[1] and b <= 8]
    if len(fits) != 1 or packed.shape[0] != n:
        raise ValueError(
            f"{group.module}: {packed.shape} words do not hold [{n}, {k}] codes of {sorted(widths)} bits"
        )
    (bits,) = fits
    if bits not in WIDTHS:
        raise ValueError(
            f"{group.module}: compressed-tensors of {bits} bits is not supported, only of {WIDTHS}"
        )
    g = _group_size(group, scale.shape, n, k, [s for s in schemes if s["bits"] == bits])
    zero = group.parts.get("weight_zero_point")
    if zero is None and not any(s["symmetric"] for s in schemes if s["bits"] == bits):
        raise ValueError(f"{group.module} has symmetric=false and no weight_zero_point")

    def symmetric(words: np.ndarray, scales: np.ndarray):
        values = np.arange(2**bits, dtype=np.float32) - 2 ** (bits - 1)
        codes, width = words.view(np.uint8).reshape(len(words), -1), -(-k * bits // 8)
        return quantised_tensor(
            # The words were read for this alone.
            turn(codes, bits) if codes.shape[1] == width else turned(codes[:, :width], bits),
            _rows(scales, len(words)),
            values,
            bits=bits,
            group_size=g,
            in_features=k,
        )

    def some(begin: int, end: int, out: np.ndarray | None):
        return symmetric(packed.some(begin, end, out), scale.some(begin, end))

    def read():
        if zero is None:
            return symmetric(packed.array(), scale.array())
        words = packed.array().view(np.uint8).reshape(n, -1)
        scales = _rows(scale.array(), n)
        # Zero points [N, groups] are packed along N.
        turned_words = np.ascontiguousarray(zero.array().T).view(np.uint8)
        zeros = unpack(turned_words, bits)[:, :n].T
        return with_zeros(unpack(words, bits)[:, :k], zeros, scales, bits=bits, group_size=g)

    by_rows = zero is None and len(scale.shape) == 2 and scale.shape[0] == n
    kind = f"{NAME} {bits} bits, group {g}"
    return group.weight((n, k), kind, read, rows=some if by_rows else None)


def _group_size(
    group: Group, scales: tuple[int, ...], n: int, k: int, schemes: list[dict[str, Any]]
) -> int:
    """G from the shape of the scales: [N, groups], [N, 1], or one for the tensor.

    Raises:
        ValueError: no such shape, or not that of a group size that one of the schemes names, if they do.
    """
    if int(np.prod(scales)) == 1:
        return k
    if len(scales) != 2 or scales[0] != n:
        raise ValueError(f"{group.module}: scales {scales} do not fit a weight [{n}, {k}]")
    said = sorted(s["group_size"] for s in schemes if s["group_size"] not in (None, -1))
    fitting = {size for size in said if size > 0 and -(-k // size) == scales[1]}
    if scales[1] == 1:
        return k
    if len(fitting) > 1:
        raise ValueError(
            f"{group.module}: groups of {sorted(fitting)} weights fit its scales alike"
        )
    return size_of(group.module, k, scales[1], next(iter(fitting or said), None))


def _rows(scales: np.ndarray, n: int) -> np.ndarray:
    """[N, groups]; one scale for the tensor is repeated."""
    return np.broadcast_to(scales.reshape(1, 1), (n, 1)) if scales.size == 1 else scales


def nvfp4(group: Group, codes: str, factor: str, name: str, *, divide: bool) -> Stored:
    """E2M1 codes, lowest first, with E4M3 scales of 16 weights and one factor a tensor.

    Args:
        group: the module's arrays, `weight_scale` among them.
        codes: name of the codes uint8 [N, K / 2].
        factor: name of the float32 factor.
        name: of the format.
        divide: whether the scales are divided by the factor, as compressed-tensors does, or multiplied.
    """
    packed, scale = group.dtype(codes, "U8"), group.dtype("weight_scale", "F8_E4M3")
    other = group.dtype(factor, "F32")
    n, k = packed.shape[0], 2 * packed.shape[1]

    def read():
        scales, f = small_floats.e4m3(scale.array()), np.float32(other.array().reshape(()))
        return quantised_tensor(
            small_floats.ascending_e2m1(turned(packed.array(), 4)),
            scales / f if divide else scales * f,
            small_floats.E2M1,
            bits=4,
            group_size=16,
            in_features=k,
        )

    return group.weight((n, k), f"{name} NVFP4", read)


def mxfp4(group: Group, codes: str, scales: str, name: str) -> Stored:
    """E2M1 codes, lowest first, with E8M0 scales of 32 weights; any leading axes."""
    packed, scale = group.dtype(codes, "U8"), group.dtype(scales, "U8", "F8_E8M0")
    # gpt-oss has an axis for the bytes of a group, [E, N, K / 32, 16].
    rows = packed.shape[:-2] if len(packed.shape) == len(scale.shape) + 1 else packed.shape[:-1]
    k = 2 * int(np.prod(packed.shape[len(rows) :]))

    def read():
        return quantised_tensor(
            small_floats.ascending_e2m1(turned(packed.array().reshape(*rows, k // 2), 4)),
            small_floats.e8m0(scale.array().view(np.uint8)),
            small_floats.E2M1,
            bits=4,
            group_size=32,
            in_features=k,
        )

    return group.weight((*rows, k), name, read)
