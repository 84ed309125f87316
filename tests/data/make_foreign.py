"""Writes tests/data/foreign: small weights of other programs' formats, made and dequantised by those programs.

    pip install torch compressed-tensors bitsandbytes transformers
    python tests/data/make_foreign.py

Each file holds the arrays of one module "m" (or of experts) and, under "expected", what the program's own
dequantiser makes of them in float32. The metadata has the `quantization_config` and the versions.
"""

import importlib.metadata
import json
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import save_file
from transformers.integrations import bitnet, gemma_quant, mxfp4

FOLDER = Path(__file__).parent / "foreign"
N, K = 24, 128


def save(name: str, arrays: dict, expected: torch.Tensor, config: dict, *packages: str) -> None:
    versions = {p: importlib.metadata.version(p) for p in packages}
    metadata = {"quantization_config": json.dumps(config), "versions": json.dumps(versions)}
    arrays = {key: value.detach().contiguous() for key, value in arrays.items()}
    arrays["expected"] = expected.detach().to(torch.float32).contiguous()
    save_file(arrays, FOLDER / f"{name}.safetensors", metadata)


def compressed(name: str, format: str, dtype=torch.bfloat16, **arguments) -> None:
    args = QuantizationArgs(**arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=format)
    weight = torch.randn(N, K) * 0.05
    groups = weight.reshape(N, -1, args.group_size or K)
    low, high = groups.amin(-1), groups.amax(-1)
    state = {"weight": weight.to(dtype)}
    if format == "nvfp4-pack-quantized":
        state["weight_global_scale"] = generate_gparam(weight.min(), weight.max())
        scale, _ = calculate_qparams(low, high, args, global_scale=state["weight_global_scale"])
        state["weight_scale"] = scale.to(torch.float32)
    else:
        scale, zero = calculate_qparams(low, high, args)
        state["weight_scale"] = scale.to(dtype)
        if not args.symmetric:
            state["weight_zero_point"] = zero
    compressor = BaseCompressor.get_value_from_registry(format)
    packed = compressor.compress(state, scheme)
    wide = {
        k: v.float() if k == "weight_scale" and v.dtype == dtype else v for k, v in packed.items()
    }
    if format == "nvfp4-pack-quantized":
        from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

        codes = unpack_fp4_from_uint8(packed["weight_packed"], N, K, torch.float32)
        expected = dequantize(
            codes,
            packed["weight_scale"].float(),
            args=args,
            global_scale=packed["weight_global_scale"],
            dtype=torch.float32,
        )
    elif "weight" in wide and "weight_packed" not in wide:
        expected = dequantize(wide["weight"], wide["weight_scale"], args=args)
    else:
        expected = compressor.decompress(dict(wide), scheme)["weight"]
    group = {
        "targets": ["Linear"],
        "weights": arguments | {"symmetric": args.symmetric},
        "format": format,
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
    }
    arrays = {f"m.{key}": value for key, value in packed.items()}
    save(name, arrays, expected, config, "compressed-tensors", "torch")


def bits_and_bytes(name: str, kind: str, nested: bool, size: int) -> None:
    weight = torch.randn(N, K) * 0.05
    packed, state = bnb.quantize_4bit(
        weight, blocksize=size, quant_type=kind, compress_statistics=nested
    )
    arrays = {"m.weight": packed}
    arrays |= {f"m.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    expected = bnb.dequantize_4bit(packed, state)
    save(name, arrays, expected, config, "bitsandbytes", "torch")


def ternary(linear_class: str) -> None:
    codes = torch.randint(-1, 2, (N, K))
    scale = torch.tensor([0.37], dtype=torch.bfloat16)
    packed = bitnet.pack_weights(codes.clone())
    unpacked = bitnet.unpack_weights(packed, dtype=torch.float32)
    expected = unpacked / scale.float() if linear_class == "bitlinear" else unpacked * scale.float()
    config = {
        "quant_method": "bitnet",
        "linear_class": linear_class,
        "quantization_mode": "offline",
        "modules_to_not_convert": ["lm_head"],
    }
    save(f"bitnet_{linear_class}", {"m.weight": packed, "m.weight_scale": scale}, expected, config,
         "transformers", "torch")  # fmt: skip


def gemma(bits: int) -> None:
    layer = gemma_quant.QuantizedLinear(K, N, num_bits=bits)
    layer.weight_scale.data = torch.rand(N, 1) * 0.1
    kind = torch.int8 if bits == 8 else torch.uint8
    low, high = (-128, 128) if bits == 8 else (0, 256)
    layer.weight.data = torch.randint(low, high, layer.weight.shape).to(kind)
    config = {
        "quant_method": "gemma",
        "num_bits": 4,
        "module_quant_configs": {"^m$": {"num_bits": bits}},
    }
    arrays = {f"m.{key}": value for key, value in layer.state_dict().items()}
    save(f"gemma_int{bits}", arrays, layer._dequantize_weights(), config, "transformers", "torch")


def experts() -> None:
    blocks = torch.randint(0, 256, (2, N, K // 32, 16)).to(torch.uint8)
    scales = torch.randint(100, 140, (2, N, K // 32)).to(torch.uint8)
    expected = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    arrays = {"experts.gate_up_proj_blocks": blocks, "experts.gate_up_proj_scales": scales}
    save("gpt_oss", arrays, expected, {"quant_method": "mxfp4"}, "transformers", "torch")


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    torch.manual_seed(0)
    integers = dict(type="int", strategy="group", symmetric=True)
    compressed("ct_w4_g32", "pack-quantized", num_bits=4, group_size=32, **integers)
    compressed("ct_w4_f16", "pack-quantized", torch.float16, num_bits=4, group_size=128, **integers)
    compressed("ct_w2", "pack-quantized", num_bits=2, group_size=64, **integers)
    compressed("ct_w8", "pack-quantized", num_bits=8, group_size=64, **integers)
    channel = dict(type="int", strategy="channel", symmetric=True)
    compressed("ct_w4_channel", "pack-quantized", num_bits=4, **channel)
    compressed("ct_int8", "int-quantized", num_bits=8, **channel)
    uneven = integers | dict(symmetric=False)
    compressed("ct_w4_asym", "pack-quantized", num_bits=4, group_size=32, **uneven)
    floats = dict(num_bits=4, type="float", symmetric=True)
    compressed("ct_nvfp4", "nvfp4-pack-quantized", strategy="tensor_group", group_size=16,
               scale_dtype="torch.float8_e4m3fn", **floats)  # fmt: skip
    compressed("ct_mxfp4", "mxfp4-pack-quantized", strategy="group", group_size=32,
               scale_dtype="torch.uint8", **floats)  # fmt: skip
    for kind in ("nf4", "fp4"):
        bits_and_bytes(f"bnb_{kind}", kind, False, 64)
    bits_and_bytes("bnb_nf4_nested", "nf4", True, 64)
    bits_and_bytes("bnb_nf4_g128", "nf4", False, 128)
    for linear_class in ("bitlinear", "autobitlinear"):
        ternary(linear_class)
    for bits in (2, 4, 8):
        gemma(bits)
    experts()


if __name__ == "__main__":
    main()
