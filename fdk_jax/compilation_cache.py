"""Compiled programs kept on the disk, so that a command's second start does not compile anew."""

import os
import sys
from pathlib import Path
from typing import Any

import jax

MAX_BYTES = 2 << 30


def folder() -> Path:
    """Where a user's programs keep what they can make again: `fdk_jax/programs` in there."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "fdk_jax" / "programs"
    home = Path.home()
    base = home / "Library" / "Caches" if sys.platform == "darwin" else home / ".cache"
    return base / "fdk_jax" / "programs"


def keep() -> None:
    """Lets JAX keep compiled programs in `folder`, of 2 GiB at most; the longest unused ones go first.

    Where JAX has a folder already (JAX_COMPILATION_CACHE_DIR), or none can be made, nothing changes.
    """
    options: Any = jax.config  # has no types
    if options.jax_compilation_cache_dir or os.environ.get("JAX_ENABLE_COMPILATION_CACHE") == "0":
        return
    try:
        folder().mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder()))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
