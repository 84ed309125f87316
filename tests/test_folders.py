"""Imports go one way, files are short, and nobody reaches into another's private parts."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What each folder of fdk_jax imports beside itself, the lowest first; other modules are commands or public.
BELOW: dict[str, set[str]] = {"format": set()}
BELOW["product"] = BELOW["format"] | {"format", "pallas_kernels"}
BELOW["layers"] = BELOW["product"] | {"product"}
BELOW["learning"] = BELOW["layers"] | {"layers"}
BELOW["files"] = {"format"}
BELOW["models"] = BELOW["learning"] | {"learning", "files", "checkpoint"}
BELOW["benchmark"] = BELOW["models"] | {"models", "compilation_cache", "fdk_jax"}
BELOW["quality"] = BELOW["benchmark"] | {"benchmark"}
BELOW["report"] = BELOW["quality"] | {"quality"}
MOST_LINES = 450
# Private by their form alone: fields of named tuples, and what Python offers under no other name.
NO_SECRETS = {"_replace", "_asdict", "_make", "_fields", "_getframe"}


def modules(package: str) -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted((ROOT / package).rglob("*.py")):
        yield path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.Module) -> Iterator[str]:
    """Dotted names of what a module imports, inside of functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_folders_import_from_those_below_only():
    wrong = []
    for path, tree in modules("fdk_jax"):
        folder = (
            "report" if path.name == "report.py" and "benchmark" in path.parts else path.parts[1]
        )
        for name in imported(tree) if folder in BELOW else ():
            package, *inner = name.split(".")
            other = inner[0] if package == "fdk_jax" and inner else package
            ours = package in ("fdk_jax", "pallas_kernels")
            if ours and other not in BELOW[folder] | {folder, "arguments", "usage"}:
                wrong.append(f"{path} imports {name}")
    assert not wrong


def test_kernels_know_nothing_of_the_library():
    for path, tree in modules("pallas_kernels"):
        names = [n for n in imported(tree) if n.split(".")[0] in ("fdk_jax", "flax")]
        assert not names, f"{path} imports {names}"


def test_models_modules_know_no_gpu():
    for name in ("modules", "transformer", "family_layers", "experts"):
        text = (ROOT / f"fdk_jax/models/{name}.py").read_text(encoding="utf-8")
        assert "pallas" not in text.lower() and "gpu" not in text.lower(), name


def test_nobody_reaches_into_anothers_private_parts():
    wrong = []
    for package in ("fdk_jax", "pallas_kernels"):
        for path, tree in modules(package):
            own = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
            for node in ast.walk(tree):
                if not isinstance(node, ast.Attribute) or not node.attr.startswith("_"):
                    continue
                if node.attr.startswith("__") or node.attr in NO_SECRETS:
                    continue
                of = ast.unparse(node.value)
                if of not in {"self", "cls", "super()", "type(self)", "jax", *own}:
                    wrong.append(f"{path}:{node.lineno}: {of}.{node.attr}")
    assert not wrong


def test_files_are_short():
    long = []
    for package in ("fdk_jax", "pallas_kernels", "tests", "examples"):
        for path, _ in modules(package):
            count = len((ROOT / path).read_text(encoding="utf-8").splitlines())
            long += [f"{path} has {count} lines"] * (count > MOST_LINES)
    assert not long
