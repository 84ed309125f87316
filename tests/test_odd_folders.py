"""Folders and files that are not as they should be: one line names what is wrong, nothing computes with it."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from model_data import rewrite
from safetensors.numpy import load_file, save_file
from test_command import CHATTY, configure, run
from test_gguf import write

from fdk_jax import files, models
from fdk_jax.files.json_files import read_json
from fdk_jax.models.tokenizer import Tokenizer


@pytest.fixture
def folder(writable):
    return writable(CHATTY)


def index(folder: Path, text: str) -> None:
    """Leaves the folder an index alone."""
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(text)


def link(path: Path) -> None:
    """Makes a file a link to what is not there."""
    path.unlink(missing_ok=True)
    path.symlink_to("nowhere")


def spoil(name: str, value: float):
    """Puts a number into the last place of an array."""

    def change(folder: Path) -> None:
        def put(arrays) -> None:
            arrays[name].reshape(-1)[-1] = value

        rewrite(folder, put)

    return change


LAST = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: configure(f, num_hidden_layers="2"), "num_hidden_layers='2', which must be an integer"),
        (lambda f: configure(f, num_hidden_layers=10**6), "integer from 1 to 10000"),
        (lambda f: configure(f, num_hidden_layers=True), "num_hidden_layers=True"),
        (lambda f: configure(f, num_key_value_heads=0), "num_key_value_heads=0"),
        (lambda f: configure(f, hidden_size=1.5), "hidden_size=1.5"),
        (lambda f: configure(f, vocab_size=[320]), "vocab_size=[320]"),
        (lambda f: configure(f, max_position_embeddings="many"), "max_position_embeddings='many'"),
        (lambda f: configure(f, rms_norm_eps=-1), "rms_norm_eps=-1, which must be a number"),
        (lambda f: configure(f, rms_norm_eps=float("nan")), "rms_norm_eps=nan"),
        (lambda f: configure(f, rope_theta=0), "rope_theta=0, which must be a number above 0"),
        (lambda f: configure(f, tie_word_embeddings="no"), "tie_word_embeddings='no'"),
        (lambda f: configure(f, model_type=["llama"]), "model_type=['llama']"),
        (lambda f: configure(f, hidden_act=["silu"]), "hidden_act=['silu']"),
        (lambda f: configure(f, dtype=["x"]), "dtype=['x']"),
        (lambda f: configure(f, text_config=3), "text_config=3, which must be a JSON object"),
        (lambda f: configure(f, rope_scaling="linear"), "rope_scaling='linear'"),
        (lambda f: configure(f, rope_scaling={"type": "linear", "factor": "2"}), "rope_scaling.factor='2'"),
        (lambda f: configure(f, rope_parameters=7), "rope_parameters=7"),
        (lambda f: configure(f, layer_types="full"), "layer_types='full', which must be a list"),
        (lambda f: configure(f, eos_token_id="end"), "config.json has eos_token_id=['end']"),
        (lambda f: configure(f, quantization_config={"quant_method": ["gptq"]}), "quant_method=['gptq']"),
        (
            lambda f: configure(f, quantization_config={"quant_method": "awq", "bits": 4}),
            "says that weights are quantised, and none is",
        ),
        (
            lambda f: configure(f, quantization={"bits": 4, "group_size": 64}),
            "says that weights are quantised, and none is",
        ),
        (lambda f: (f / "config.json").write_text('{"a":' * 5000), "config.json is not valid JSON"),
        (lambda f: index(f, "{}"), "needs a weight_map"),
        (lambda f: index(f, '{"weight_map": 3}'), "weight_map"),
        (lambda f: index(f, '{"weight_map": {"a": "../b"}}'), "files in its folder"),
        (lambda f: index(f, '{"weight_map": {"a": "b.safetensors"}}'), "names files that do not exist"),
        (lambda f: configure(f, transformers_weights="../m.safetensors"), "must be a file of the folder"),
        (lambda f: configure(f, transformers_weights="other.safetensors"), "names files that do not exist"),
        (lambda f: link(f / "generation_config.json"), "generation_config.json is not a file"),
        (lambda f: link(f / "model.safetensors"), "model.safetensors"),
        (spoil("model.norm.weight", np.nan), "model.norm.weight hold NaN or infinity"),
        (spoil(LAST, np.inf), f"{LAST} hold NaN"),
        (spoil("model.embed_tokens.weight", np.nan), "model.embed_tokens.weight"),
    ],
)  # fmt: skip
def test_what_a_folder_says_wrongly_is_named(capsys, folder, change, words):
    change(folder)
    status, out, err = run(capsys, str(folder), "--prompt", "fox", "--max_tokens", "2", "--quiet")
    assert status == 2 and not out
    assert err.startswith("error: ") and words in err and err.count("\n") == 1
    assert "--debug" not in err  # which is said of what nobody foresaw


def test_of_several_weights_those_that_transformers_reads(folder):
    """`model.safetensors` goes before an index of older files, and what config.json names before both."""
    arrays = load_file(folder / "model.safetensors")
    for number, name in enumerate(("old", "named"), 1):
        save_file(
            {key: value + number for key, value in arrays.items()}, folder / f"{name}.safetensors"
        )
    norm = "model.norm.weight"
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {key: "old.safetensors" for key in arrays}})
    )
    np.testing.assert_array_equal(files.read(folder).tensors[norm].read(), arrays[norm])
    configure(folder, transformers_weights="named.safetensors")
    np.testing.assert_array_equal(files.read(folder).tensors[norm].read(), arrays[norm] + 2)
    configure(folder, transformers_weights="model.safetensors.index.json")
    np.testing.assert_array_equal(files.read(folder).tensors[norm].read(), arrays[norm] + 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [("eos_token", ["x"]), ("bos_token", {"content": 3}), ("unk_token", 7)],
)
def test_special_tokens_that_are_no_text(capsys, folder, name, value):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(read_json(path) | {name: value}))
    status, _, err = run(capsys, str(folder), "--prompt", "fox", "--quiet")
    assert status == 2 and f"{name}={value!r}" in err and "--debug" not in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", "fox", "--seed", str(2**70)], "must be an integer of 64 bits"),
        (["--chat", "--template_option", "messages=3"], "messages is not a variable"),
        (["--chat", "--chat_template", "/bin/sh"], "is not UTF-8 text"),
    ],
)
def test_arguments_that_say_nothing(capsys, folder, arguments, words):
    status, _, err = run(capsys, str(folder), "--quiet", *arguments)
    assert status == 2 and words in err and "--debug" not in err


def test_infinity_of_a_narrow_dtype_is_named(folder):
    spoil(LAST, 1e30)(folder)
    models.load(folder, dtype="float32")
    with pytest.raises(ValueError, match=r"down_proj\.weight hold NaN or infinity in float16"):
        models.load(folder, dtype="float16")


def changed(raw: bytes, key: str, kind: int, value: bytes) -> bytes:
    """A GGUF file whose metadata has another value, of another kind, for a key of 4 bytes."""
    name = struct.pack("<Q", len(key)) + key.encode()
    at = raw.index(name) + len(name)
    return raw[:at] + struct.pack("<I", kind) + value + raw[at + 8 :]


@pytest.mark.parametrize("key", ["block_count", "attention.head_count", "embedding_length"])
@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (4, struct.pack("<I", 0)),
        (5, struct.pack("<i", -1)),
        (6, struct.pack("<f", 2.5)),
        (8, struct.pack("<Q", 1) + b"x"),
        (9, struct.pack("<IQ", 4, 0)),
    ],
    ids=["zero", "negative", "float", "text", "empty"],
)
def test_counts_of_gguf_that_are_none(tmp_path, key, kind, value):
    path = write(tmp_path / "m.gguf", {"token_embd.weight": (np.zeros((8, 256), np.float32), None)})
    path.write_bytes(changed(path.read_bytes(), f"llama.{key}", kind, value))
    with pytest.raises(ValueError, match=rf"llama\.{key}"):
        files.read(path)


def tokenizer_file(path: Path, **changes) -> Path:
    """A GGUF file with a small vocabulary; `changes` are other values of its metadata, or None for none."""
    gguf = pytest.importorskip("gguf", reason="needs the gguf package")
    config: dict = dict(
        model="gpt2",
        pre="llama-bpe",
        tokens=["<s>", "</s>", *"abcĠ", "ab", "Ġab"],
        token_type=[3, 3] + [1] * 6,
        merges=["a b", "Ġ ab"],
        bos_token_id=0,
        eos_token_id=1,
    )
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in (config | changes).items():
        add = {str: writer.add_string, int: writer.add_uint32, list: writer.add_array}
        if value is not None:
            add[type(value)](f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("changes", [dict(eos_token_id=None), dict(eos_token_id=999)])
def test_a_gguf_tokenizer_without_an_end(tmp_path, changes):
    tokenizer = Tokenizer(tokenizer_file(tmp_path / "m.gguf", **changes))
    assert tokenizer.encode("ab") == [0, 6] and tokenizer.stop_tokens == ()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(merges=["a b", "q r"]), "tokenizer is damaged.*out of vocabulary"),
        (dict(merges=["ab"]), "tokenizer is damaged"),
        (dict(tokens=[1, 2]), "has no tokens"),
        (dict(model=3), "tokenizer.ggml.model=3"),
        (dict(model="llama"), "no scores"),
    ],
)
def test_a_gguf_tokenizer_that_is_damaged(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        Tokenizer(tokenizer_file(tmp_path / "m.gguf", **changes))


def test_rows_that_are_not_those_of_the_heads(tmp_path):
    floats = {"token_embd.weight": (np.zeros((8, 256), np.float32), None)}
    path = write(
        tmp_path / "m.gguf",
        floats | {"blk.0.attn_q.weight": (np.zeros((8, 256), np.float32), None)},
    )
    with pytest.raises(ValueError, match=r"attn_q\.weight has 8 rows, not 4 heads of 64"):
        files.read(path)


def test_a_quantised_vector_of_gguf_is_refused(tmp_path):
    floats = {"token_embd.weight": (np.zeros((8, 256), np.float32), None)}
    path = write(tmp_path / "m.gguf", floats | {"output_norm.weight": (np.zeros(18, np.uint8), 2)})
    with pytest.raises(ValueError, match=r"output_norm\.weight is a vector of Q4_0"):
        files.read(path)


def test_a_folder_with_nothing_but_an_adapter(tmp_path, folder):
    shutil.copy(folder / "model.safetensors", tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}')
    with pytest.raises(FileNotFoundError, match="holds an adapter of a/b"):
        models.load(tmp_path)
