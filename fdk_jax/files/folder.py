"""Hugging Face folders: plain safetensors, or the quantisation that they name.

A method's module has `weights(settings, stored, notes)`: what `quantization_config` says, every array of the
folder, and a list to which it adds what a user should know; it returns the weights by name, a quantised matrix
as one `Stored` called "....weight", and whatever it does not know as it is.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fdk_jax.files import (
    awq,
    bitnet,
    bitsandbytes,
    compressed_tensors,
    gemma,
    gpt_oss,
    gptq,
    mlx,
    modelopt,
    one_bit_wonder,
)
from fdk_jax.files.contents import Checkpoint, Stored
from fdk_jax.files.json_files import read_json
from fdk_jax.files.safetensors_folder import FLOATS, read_stored
from fdk_jax.files.transformed import check_untransformed

# quant_method: (name of the format, its `weights`)
METHODS: dict[str, tuple[str, Callable[..., dict[str, Stored]]]] = {
    "nonlinear": (one_bit_wonder.NAME, one_bit_wonder.weights),
    "compressed-tensors": (compressed_tensors.NAME, compressed_tensors.weights),
    "modelopt": (modelopt.NAME, modelopt.weights),
    "mxfp4": (gpt_oss.NAME, gpt_oss.weights),
    "gptq": (gptq.NAME, gptq.weights),
    "awq": (awq.NAME, awq.weights),
    "bitsandbytes": (bitsandbytes.NAME, bitsandbytes.weights),
    "bitnet": (bitnet.NAME, bitnet.weights),
    "gemma": (gemma.NAME, gemma.weights),
    "mlx": (mlx.NAME, mlx.weights),
}
# Files beside config.json that may say how weights are quantised, and the method of those that do not name it.
_FILES = {
    "quantization_config.json": None,
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
}
# Parts of a quantised weight: a folder that has them must say how they are to be read.
_MARKS = (
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    ".qweight",
    ".qzeros",
    ".weight.absmax",
    ".weight.quant_map",
    ".SCB",
    ".scales",
    "_blocks",
    ".embedding_quantized",
)


def read(folder: Path) -> Checkpoint:
    """Recognises a checkpoint folder.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a quantisation that is not supported, by its name; a damaged file.
    """
    config = read_config(folder)
    stored, notes = read_stored(folder, config.get("transformers_weights")), []
    settings = quantisation_settings(folder, config)
    if settings is None:
        _check_plain(folder, stored)
        return Checkpoint(folder, "safetensors", config, stored)
    method = settings.get("quant_method")
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(
            f"{folder}: quant_method={method!r} is not supported; one of {sorted(METHODS)} is"
        )
    check_untransformed(settings, f"{folder}: quantization_config has ")
    name, weights = METHODS[method]
    try:
        tensors = weights(settings, stored, notes)
        _check_plain(folder, {n: s for n, s in tensors.items() if not s.quantised})
        if not any(one.quantised for one in tensors.values()):
            raise ValueError(
                "config.json says that weights are quantised, and none is: without that entry they are"
                " read as floats"
            )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        text = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{folder}: {name}: {text}") from None
    return Checkpoint(folder, name, config, tensors, tuple(notes))


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not a JSON object.
    """
    path, adapter = folder / "config.json", folder / "adapter_config.json"
    if not path.exists() and adapter.is_file():
        base = read_json(adapter).get("base_model_name_or_path")
        raise FileNotFoundError(
            f"{folder} holds an adapter of {base}, not a model: merge it into the model first (peft's"
            " merge_and_unload) and save that"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; a Hugging Face checkpoint folder with config.json, *.safetensors and"
            " tokenizer.json is needed, or a .gguf file"
        )
    return read_json(path)


def quantisation_settings(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a folder says of its quantisation, with `quant_method`; None where it says nothing."""
    of_mlx = config.get("quantization")
    if isinstance(of_mlx, Mapping) and "group_size" in of_mlx and "bits" in of_mlx:
        return {"quant_method": "mlx", **of_mlx}
    settings = config.get("quantization_config") or config.get("compression_config")
    if settings is None:
        for name, method in _FILES.items():
            if (folder / name).is_file():
                settings = {"quant_method": method, **read_json(folder / name)}
                break
    if settings is None:
        return None
    if not isinstance(settings, Mapping):
        raise ValueError(f"{folder}: quantization_config must be a JSON object, got {settings!r}")
    return dict(settings)


def _check_plain(folder: Path, stored: Mapping[str, Stored]) -> None:
    """Refuses arrays that only mean something beside others, which are not there or not named."""
    marked = [name for name in stored if name.endswith(_MARKS)]
    if marked:
        raise ValueError(
            f"{folder} holds {marked[0]}, a part of a quantised weight, but its config.json does not say"
            " how it is to be read (quantization_config)"
        )
    for name, one in stored.items():
        if one.kind not in FLOATS and name.endswith((".weight", ".bias")):
            raise ValueError(
                f"{folder}: {name} is {one.kind} without scales; it cannot be read as a float weight"
            )
