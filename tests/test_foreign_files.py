"""Checkpoints of other programs, against what those programs' own dequantisers make of them.

tests/data/make_foreign.py wrote the small files with the programs themselves. ModelOpt and MLX have none that
installs here: their files are written by a second implementation of the layout, below; so are those of GPTQ and
AWQ in tests/test_integer_files.py.
"""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from foreign import folder, values, words

from fdk_jax import files
from fdk_jax.files.bits import turn, turned, unpack
from fdk_jax.files.contents import check_finite

FOREIGN = sorted((Path(__file__).parent / "data" / "foreign").glob("*.safetensors"))


def copy_of(path: Path, target: Path) -> tuple[Path, np.ndarray, dict]:
    """(folder with the arrays of a golden file, expected values, its config) ."""
    with safetensors.safe_open(path, framework="numpy") as file:
        config = json.loads(file.metadata()["quantization_config"])
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    begin, end = header["expected"]["data_offsets"]
    expected = np.frombuffer(raw[8 + size + begin : 8 + size + end], np.float32)
    expected = expected.reshape(header["expected"]["shape"])
    target.mkdir(exist_ok=True)
    (target / "config.json").write_text(
        json.dumps({"model_type": "llama", "quantization_config": config})
    )
    # The bytes stay where they are; only the name goes, so that float8 needs no reader here.
    header["model.norm.weight"] = header.pop("expected")
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (target / "model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + raw[8 + size :]
    )
    return target, expected, config


@pytest.mark.parametrize("path", FOREIGN, ids=lambda p: p.stem)
def test_golden(path, tmp_path):
    where, expected, _ = copy_of(path, tmp_path / "model")
    checkpoint = files.read(where)
    (name,) = (n for n, one in checkpoint.tensors.items() if one.quantised)
    w = checkpoint.tensors[name].read()
    w.validate()
    assert checkpoint.tensors[name].shape == (*w.batch_shape, *w.shape)
    if path.stem == "gpt_oss":
        expected = expected.swapaxes(1, 2)
    assert np.array_equal(np.asarray(w.dequantise("float32")), expected)
    assert np.array_equal(values(w), expected)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [64, 7])
def test_bytes_turned_in_place(bits, size, rng):
    packed = rng.integers(0, 256, (3, size), dtype=np.uint8)
    codes = unpack(packed, bits, lowest_first=True)
    np.testing.assert_array_equal(unpack(turned(packed, bits), bits, lowest_first=False), codes)
    assert turn(packed, bits) is packed
    np.testing.assert_array_equal(unpack(packed, bits, lowest_first=False), codes)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("spoilt", [np.nan, np.inf, -np.inf, None])
def test_scales_that_are_not_finite_are_refused(dtype, spoilt):
    scales = np.asarray([[ml_dtypes.finfo(dtype).max, -ml_dtypes.finfo(dtype).max], [1, 0]], dtype)
    if spoilt is None:
        return check_finite(scales)
    scales[1, 1] = spoilt
    with pytest.raises(ValueError, match="NaN or infinity"):
        check_finite(scales)


def test_golden_files_are_there():
    assert len(FOREIGN) == 19


def test_modelopt_nvfp4(rng, tmp_path):
    n, k = 16, 64
    e2m1 = np.asarray([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    table = np.concatenate([e2m1, -e2m1])
    codes = rng.integers(0, 16, (n, k), dtype=np.uint8)
    scales = rng.integers(1, 0x7E, (n, k // 16), dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    factor = np.float32(0.0123)
    header_arrays = {
        "m.weight": codes[:, 0::2] | (codes[:, 1::2] << 4),
        "m.weight_scale": scales,
        "m.weight_scale_2": np.asarray(factor),
        "m.input_scale": np.ones((), np.float32),
    }
    where = tmp_path / "model"
    where.mkdir()
    (where / "config.json").write_text('{"model_type": "llama"}')
    settings = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
    (where / "hf_quant_config.json").write_text(json.dumps(settings))
    flat = {
        n_: np.ascontiguousarray(a).view(np.uint8) if a.shape else a
        for n_, a in header_arrays.items()
    }
    safetensors.numpy.save_file(flat, where / "model.safetensors")
    rename_dtype(where / "model.safetensors", "m.weight_scale", "F8_E4M3")
    w = files.read(where).tensors["m.weight"].read()
    expected = table[codes] * np.repeat(scales.astype(np.float32) * factor, 16, axis=1)
    assert w.scales.dtype == np.float32
    assert np.array_equal(values(w), expected)


CACHE_SCALES = {
    "compressed-tensors": ("self_attn.k_scale", "self_attn.v_scale", "self_attn.k_zero_point"),
    "modelopt": ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"),
}


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("method", CACHE_SCALES)
def test_scales_of_a_cache_are_left_out_where_the_file_names_them(method, said, tmp_path):
    """The cache is exact here, which is said; arrays that no setting explains stay, and are refused later."""
    names = [f"model.layers.0.{name}" for name in CACHE_SCALES[method]]
    arrays = {name: np.ones(1, np.float32) for name in names}
    scheme = {"weights": {"num_bits": 4, "type": "int"}}
    if method == "modelopt":
        arrays |= {"m.weight": np.ones((2, 8), np.uint8), "m.weight_scale_2": np.float32(1)[None]}
        arrays |= {"m.weight_scale": np.ones((2, 1), np.uint8)}
        settings = {"quant_algo": "NVFP4"} | ({"kv_cache_quant_algo": "FP8"} if said else {})
    else:
        arrays |= {"m.weight_packed": np.ones((2, 2), np.int32), "m.weight_scale": np.ones((2, 1))}
        arrays["m.weight_scale"] = arrays["m.weight_scale"].astype(np.float32)
        arrays["m.weight_shape"] = np.asarray([2, 16])
        settings = {"config_groups": {"a": scheme}, "format": "pack-quantized"}
        settings |= {"kv_cache_scheme": {"num_bits": 8, "type": "float"}} if said else {}
    settings["quant_method"] = method
    where = folder(tmp_path / "model", arrays, {"quantization_config": settings})
    if method == "modelopt":
        rename_dtype(where / "model.safetensors", "m.weight_scale", "F8_E4M3")
    checkpoint = files.read(where)
    assert [name in checkpoint.tensors for name in names] == [not said] * len(names)
    assert any("cache is exact" in note for note in checkpoint.notes) == said


def rename_dtype(path: Path, name: str, dtype: str) -> None:
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header[name]["dtype"] = dtype
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_mlx_where_every_bias_is_one_multiple_of_its_scale(bits, dtype, rng, tmp_path):
    n, k, g = 8, 256, 64
    codes = rng.integers(0, 2**bits, (n, k))
    scales = (rng.random((n, k // g)) * 0.1).astype(dtype)
    c = -0.5 if bits == 1 else -(2 ** (bits - 1))
    arrays = {
        "m.weight": words(codes, bits).view(np.uint32),
        "m.scales": scales,
        "m.biases": (scales.astype(np.float32) * c).astype(dtype),
    }
    settings = {"quantization": {"group_size": g, "bits": bits}}
    w = files.read(folder(tmp_path / "m", arrays, settings)).tensors["m.weight"].read()
    wide = [np.repeat(arrays[f"m.{a}"].astype(np.float32), g, 1) for a in ("scales", "biases")]
    assert np.array_equal(values(w), codes.astype(np.float32) * wide[0] + wide[1])
    arrays["m.biases"][3, 1] *= 2
    checkpoint = files.read(folder(tmp_path / "m", arrays, settings))
    with pytest.raises(ValueError, match="offset of its own"):
        checkpoint.tensors["m.weight"].read()


PLAIN = {"model.norm.weight": np.ones(4, np.float32)}
REFUSED = {
    "hqq": ({}, {"quant_method": "hqq"}, "quant_method='hqq' is not supported"),
    "torchao": ({}, {"quant_method": "torchao"}, "quant_method='torchao' is not supported"),
    "fp8": ({}, {"quant_method": "fp8"}, "quant_method='fp8' is not supported"),
    "no method": ({}, {"bits": 4}, "quant_method=None is not supported"),
    "a list": ({}, [4], "must be a JSON object"),
    "awq 3 bits": ({}, {"quant_method": "awq", "bits": 3}, "AWQ of 3 bits"),
    "awq gemv": ({}, {"quant_method": "awq", "bits": 4, "version": "gemv"}, "version='gemv'"),
    "int8 of bitsandbytes": (
        {"m.SCB": np.ones(3, np.float32)},
        {"quant_method": "bitsandbytes"},
        "LLM.int8",
    ),
    "modelopt fp8": ({}, {"quant_method": "modelopt", "quant_algo": "FP8"}, "quant_algo='FP8'"),
    "online bitnet": (
        {},
        {"quant_method": "bitnet", "quantization_mode": "online"},
        "quantization_mode=online",
    ),
    "hadamard": (
        {},
        {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"a": {}}}},
        "Hadamard",
    ),
    "hadamard of another method": (
        {},
        {"quant_method": "gptq", "bits": 4, "rotation_config": {"hidden_size": 4096}},
        "quantization_config has rotation_config=",
    ),
    "hadamard inside": (
        {},
        {"quant_method": "bitnet", "modules": {"online_hadamard": True}},
        "quantization_config has modules.online_hadamard=True",
    ),
    "gptq without an order": (
        {
            "m.qweight": np.zeros((8, 8), np.int32),
            "m.qzeros": np.zeros((1, 1), np.int32),
            "m.scales": np.ones((1, 8), np.float16),
        },
        {"quant_method": "gptq", "bits": 4, "desc_act": True},
        "desc_act=true, and m has no g_idx",
    ),
    "sparse": (
        {},
        {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24"}},
        "sparse-24",
    ),
    "another format": (
        {},
        {
            "quant_method": "compressed-tensors",
            "format": "marlin-24",
            "config_groups": {"a": {"weights": {"num_bits": 4}}},
        },
        "format='marlin-24'",
    ),
    "no zero points": (
        {
            "m.weight_packed": np.ones((2, 2), np.int32),
            "m.weight_scale": np.ones((2, 1), np.float32),
            "m.weight_shape": np.asarray([2, 16]),
        },
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"a": {"weights": {"num_bits": 4, "symmetric": False}}},
        },
        "m has symmetric=false and no weight_zero_point",
    ),
    "parts without a word": ({"m.qweight": np.ones((1, 2), np.int32)}, None, "does not say"),
    "integers without scales": ({"m.weight": np.ones((1, 2), np.int8)}, None, "without scales"),
    "a codebook without its scales": (
        {"m.weight_packed": np.ones((1, 2), np.uint8)},
        {"quant_method": "nonlinear", "bits": 4, "block_size": 64},
        "m lacks scales",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_its_name(name, tmp_path):
    arrays, settings, message = REFUSED[name]
    config = {} if settings is None else {"quantization_config": settings}
    where = folder(tmp_path / "model", PLAIN | arrays, config)
    with pytest.raises(ValueError) as caught:
        for one in files.read(where).tensors.values():
            one.read()
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_float8_without_scales_is_refused(tmp_path):
    where = folder(tmp_path / "model", {"m.weight": np.ones((2, 2), np.uint8)}, {})
    rename_dtype(where / "model.safetensors", "m.weight", "F8_E4M3")
    with pytest.raises(ValueError, match="F8_E4M3 without scales"):
        files.read(where)


def test_what_is_not_there_or_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        files.read(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        files.read(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="saved as safetensors"):
        files.read(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        files.read(tmp_path)
    with pytest.raises(ValueError, match="not a GGUF file"):
        files.read(tmp_path / "config.json")
    with pytest.raises(ValueError, match="requantise=5"):
        files.read(tmp_path, requantise=5)
