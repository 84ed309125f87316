"""`read`: recognises a checkpoint, whatever it is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fdk_jax.files import folder, gguf_file
from fdk_jax.files.contents import Checkpoint, TokenizerFiles


def read(path: str | Path, *, requantise: int | None = None) -> Checkpoint:
    """Recognises a checkpoint by its marks; nothing is guessed.

    Args:
        path: a Hugging Face folder; a `.gguf` file, the first of several, or a folder with one.
        requantise: bits (4 or 8) for what scale times codebook cannot hold, such as K-quants of GGUF; 16 keeps
            their values as floats. None refuses them.

    Returns:
        The checkpoint, of which only headers have been read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a format that is not supported, by its name; a damaged file.
    """
    if requantise not in (None, 4, 8, 16):
        raise ValueError(f"{requantise=} is not one of 4, 8 and 16 bits, or None")
    path = _resolved(path)
    if path.is_dir():
        return folder.read(path)
    return gguf_file.read(path, requantise=requantise)


def read_config(path: str | Path) -> Mapping[str, Any]:
    """What Hugging Face's `config.json` says of a checkpoint, without a look at its weights.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a damaged file, or an architecture of GGUF that is not supported.
    """
    path = _resolved(path)
    if path.is_dir():
        return folder.read_config(path)
    return gguf_file.read(path, requantise=16).config


def read_tokenizer(path: str | Path) -> TokenizerFiles | None:
    """The tokenizer that a GGUF file holds; None for one without, and a folder with files of its own.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a damaged file, or a kind of tokenizer that is not supported.
    """
    path = _resolved(path)
    return None if path.is_dir() else gguf_file.read_tokenizer(path)


def _resolved(path: str | Path) -> Path:
    """A Hugging Face folder, or a GGUF file."""
    path = Path(path)
    if path.is_file():
        if not gguf_file.is_gguf(path):
            raise ValueError(
                f"{path} is not a GGUF file; give the folder of a Hugging Face checkpoint, not a file of it"
            )
        return path
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path} does not exist; a Hugging Face folder with config.json and *.safetensors, or a .gguf"
            " file, is needed"
        )
    found = gguf_file.models_in(path)
    if ((path / "config.json").is_file() and any(path.glob("*.safetensors"))) or not found:
        return path
    if len(found) > 1:
        raise ValueError(
            f"{path} holds several GGUF models, give one of them: {[one.name for one in found]}"
        )
    return found[0]
