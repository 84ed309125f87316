"""`read`: recognises a checkpoint, whatever it is."""

from pathlib import Path

from fdk_jax.files import folder, gguf_file
from fdk_jax.files.contents import Checkpoint


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
    path = Path(path)
    if requantise not in (None, 4, 8, 16):
        raise ValueError(f"{requantise=} is not one of 4, 8 and 16 bits, or None")
    if path.is_file():
        if not gguf_file.is_gguf(path):
            raise ValueError(
                f"{path} is not a GGUF file; give the folder of a Hugging Face checkpoint, not a file of it"
            )
        return gguf_file.read(path, requantise=requantise)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist")
    found = gguf_file.models_in(path)
    if ((path / "config.json").is_file() and any(path.glob("*.safetensors"))) or not found:
        return folder.read(path)
    if len(found) > 1:
        raise ValueError(
            f"{path} holds several GGUF models, give one of them: {[one.name for one in found]}"
        )
    return gguf_file.read(found[0], requantise=requantise)
