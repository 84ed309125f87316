"""GPTQ, AWQ and groups of compressed-tensors: folders written by a second implementation of their layouts."""

import re

import numpy as np
import pytest
from foreign import folder, values, words

from fdk_jax import files


def gptq(
    rng, bits: int, g: int, zeros: np.ndarray | int, n=32, k=128, offset=1
) -> tuple[dict, np.ndarray]:
    codes = rng.integers(0, 2**bits, (k, n))
    scales = (rng.random((-(-k // g), n)) * 0.1).astype(np.float16)
    zeros = np.broadcast_to(zeros, (-(-k // g), n))
    arrays = {
        "m.qweight": words(codes.T, bits).T.copy(),
        "m.qzeros": words(zeros - offset, bits),
        "m.scales": scales,
        "m.g_idx": (np.arange(k) // g).astype(np.int32),
    }
    spread = [np.repeat(a, g, axis=0)[:k] for a in (zeros, scales.astype(np.float32))]
    return arrays, ((codes - spread[0]).astype(np.float32) * spread[1]).T


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("g", [32, 128])
def test_gptq(bits, g, rng, tmp_path):
    arrays, expected = gptq(rng, bits, g, 2 ** (bits - 1))
    settings = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": g,
        "desc_act": False,
        "sym": True,
    }
    where = folder(tmp_path / "model", arrays, {"quantization_config": settings})
    stored = files.read(where).tensors["m.weight"]
    w = stored.read()
    assert (w.bits, w.group_size, stored.shape) == (bits, g, expected.shape)
    assert np.array_equal(values(w), expected)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq_with_several_zero_points_is_exact_and_wider(bits, version, rng, tmp_path):
    offset = version == "gptq"
    zeros = rng.integers(1, 2**bits, (4, 32))
    arrays, expected = gptq(rng, bits, 32, zeros, offset=int(offset))
    settings = {"quant_method": "gptq", "bits": bits, "checkpoint_format": version}
    w = files.read(folder(tmp_path / "m", arrays, {"quantization_config": settings}))
    w = w.tensors["m.weight"].read()
    assert w.bits == {2: 4, 4: 8}[bits]
    assert np.array_equal(values(w), expected)


def test_gptq_variants_that_would_be_misread_are_refused(rng, tmp_path):
    settings = {"quant_method": "gptq", "bits": 4}
    arrays, _ = gptq(rng, 4, 32, 8)
    shuffled = arrays | {"m.g_idx": arrays["m.g_idx"][::-1].copy()}
    where = folder(tmp_path / "a", shuffled, {"quantization_config": settings})
    with pytest.raises(ValueError, match="act-order"):
        files.read(where).tensors["m.weight"].read()
    arrays, _ = gptq(rng, 4, 32, 16)
    where = folder(tmp_path / "b", arrays, {"quantization_config": settings})
    with pytest.raises(ValueError, match="zero point of 15"):
        files.read(where).tensors["m.weight"].read()
    where = folder(tmp_path / "c", arrays, {"quantization_config": settings | {"bits": 3}})
    with pytest.raises(ValueError, match="GPTQ of 3 bits"):
        files.read(where)


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_a_group_that_is_shorter_at_the_end_of_a_row(method, rng, tmp_path):
    """Two scales for 192 weights are of 128 and 64, not of 96 each, where the settings say 128."""
    n, k, g = 32, 192, 128
    codes = rng.integers(0, 16, (n, k))
    scales = (rng.random((n, 2)) * 0.1).astype(np.float16)
    settings = {"quant_method": method, "bits": 4, "group_size": g}
    if method == "compressed-tensors":
        arrays = {"m.weight_packed": words(codes, 4), "m.weight_scale": scales}
        arrays["m.weight_shape"] = np.asarray([n, k])
        scheme = {"num_bits": 4, "group_size": g, "strategy": "group"}
        settings |= {"format": "pack-quantized", "config_groups": {"a": {"weights": scheme}}}
    elif method == "gptq":
        zeros = words(np.full((2, n), 7), 4)
        arrays = {"m.qweight": words(codes, 4).T.copy(), "m.qzeros": zeros, "m.scales": scales.T}
    else:
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        pack = lambda a: words(a.reshape(len(a), -1, 8)[..., order].reshape(a.shape), 4)  # noqa: E731
        arrays = {"m.qweight": pack(codes.T), "m.qzeros": pack(np.full((2, n), 8))}
        arrays["m.scales"] = scales.T
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    where = folder(tmp_path / "m", arrays, {"quantization_config": settings})
    spread = np.repeat(scales.astype(np.float32), g, axis=1)[:, :k]
    expected = (codes - 8).astype(np.float32) * spread
    assert np.array_equal(values(files.read(where).tensors["m.weight"].read()), expected)
    scheme = settings["config_groups"]["a"]["weights"] if "config_groups" in settings else settings
    scheme["group_size"] = 64
    where = folder(tmp_path / "m", arrays, {"quantization_config": settings})
    with pytest.raises(ValueError, match=r"m: 2 scales for rows of 192 weights .* every 64"):
        files.read(where)


def test_gptq_with_settings_of_some_modules(rng, tmp_path):
    """GPTQModel's `dynamic`: the first pattern that fits counts, and its width is not that of the others."""
    wide, expected_wide = gptq(rng, 8, 32, 128)
    narrow, expected = gptq(rng, 4, 64, 8)
    arrays = {f"model.layers.0.{name}": array for name, array in wide.items()}
    arrays |= {f"model.layers.1.{name}": array for name, array in narrow.items()}
    arrays["model.layers.2.m.weight"] = np.ones((4, 4), np.float32)
    dynamic = {r"+:.*\.0\..*": {"bits": 8, "group_size": 32}, r"-:.*\.2\..*": {}, r".*\.0\.": {}}
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 64, "dynamic": dynamic}
    tensors = files.read(folder(tmp_path / "m", arrays, {"quantization_config": settings})).tensors
    assert np.array_equal(values(tensors["model.layers.0.m.weight"].read()), expected_wide)
    assert np.array_equal(values(tensors["model.layers.1.m.weight"].read()), expected)
    assert not tensors["model.layers.2.m.weight"].quantised
    for other, words_ in (
        ({r"-:.*\.1\.": {}}, "model.layers.1.m is quantised, and dynamic leaves it out"),
        ({r".*\.1\.": {"adapter": {"rank": 8}}}, "dynamic adapter={'rank': 8}"),
        ({".*": {"bits": 3}}, "GPTQ of 3 bits"),
        ({"(": {}}, "'(' is no pattern"),
        ({".*": [4]}, "must be an object"),
        ([4], "dynamic=[4] is not supported"),
    ):
        changed = {"quantization_config": settings | {"dynamic": other}}
        with pytest.raises(ValueError, match=re.escape(words_)):
            files.read(folder(tmp_path / "m", arrays, changed))


@pytest.mark.parametrize("even", [True, False])
def test_awq(even, rng, tmp_path):
    n, k, g = 64, 256, 128
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    pack = lambda a: words(a.reshape(len(a), -1, 8)[..., order].reshape(a.shape), 4)  # noqa: E731
    codes = rng.integers(0, 16, (k, n))
    zeros = np.full((k // g, n), 8) if even else rng.integers(0, 16, (k // g, n))
    scales = (rng.random((k // g, n)) * 0.1).astype(np.float16)
    arrays = {"m.qweight": pack(codes), "m.qzeros": pack(zeros), "m.scales": scales}
    settings = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": g,
        "version": "gemm",
        "zero_point": True,
    }
    checkpoint = files.read(folder(tmp_path / "m", arrays, {"quantization_config": settings}))
    w = checkpoint.tensors["m.weight"].read()
    expected = (codes - np.repeat(zeros, g, 0)) * np.repeat(scales.astype(np.float32), g, 0)
    assert w.bits == (4 if even else 8)
    assert np.array_equal(values(w), expected.astype(np.float32).T)
    assert "8 bits" in checkpoint.notes[0]
