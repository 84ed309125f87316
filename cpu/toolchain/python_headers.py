"""Prints the include options for pybind11 and XLA's FFI headers, which fit every machine."""

import importlib.util
import sys
from pathlib import Path


def main() -> None:
    """Finds the packages without importing them."""
    specs = {name: importlib.util.find_spec(name) for name in ("pybind11", "jaxlib")}
    missing = [name for name, spec in specs.items() if spec is None or spec.origin is None]
    if missing:
        sys.exit(f"{sys.executable} has no {' and '.join(missing)}")
    folders = (Path(str(spec.origin)).parent for spec in specs.values() if spec is not None)
    print(" ".join(f"-isystem {folder / 'include'}" for folder in folders))


if __name__ == "__main__":
    main()
