"""Where a checkpoint lies on this disk: a path, or a name in the cache of the Hugging Face hub."""

from pathlib import Path


def find_checkpoint(name: str | Path) -> Path:
    """The folder or file of a checkpoint; nothing is downloaded.

    Args:
        name: A path; a folder of the hub's cache (`models--OWNER--NAME`); or the hub's name of a model,
            OWNER/NAME, that was downloaded before.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(name).expanduser()
    if (path / "snapshots").is_dir() and not (path / "config.json").exists():
        return _snapshot(path)
    if path.exists():
        return path
    owner, _, model = str(name).partition("/")
    if not owner.strip(". ") or not model or "/" in model:
        raise FileNotFoundError(f"{name} does not exist; a checkpoint's folder or file is needed")
    try:
        import huggingface_hub.constants
    except ImportError:
        raise FileNotFoundError(
            f"{name} does not exist here; to find a model of the hub by its name: pip install"
            " fdk-jax[models]"
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(str(name), local_files_only=True))
    except Exception as error:
        if not isinstance(error, (OSError, ValueError)):
            raise
        cache = huggingface_hub.constants.HF_HUB_CACHE
        raise FileNotFoundError(
            f"{name} is neither a path here nor a model in {cache}; to download it: hf download {name}"
        ) from error


def _snapshot(repository: Path) -> Path:
    """The files of one repository in the cache: of its main branch, or the only ones there are."""
    main = repository / "refs" / "main"
    snapshots = sorted(path for path in (repository / "snapshots").iterdir() if path.is_dir())
    if main.is_file():
        snapshots = [repository / "snapshots" / main.read_text().strip()]
    if len(snapshots) != 1 or not snapshots[0].is_dir():
        raise FileNotFoundError(
            f"{repository} has no complete download of its main branch; name one of"
            f" {repository}/snapshots"
        )
    return snapshots[0]
