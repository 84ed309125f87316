"""No cache without a bound: every cache in the package states its size, and a new one must be named here."""

import ast
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from fdk_jax.layers.interpreted import interpreted_class
from fdk_jax.models.programs import Programs

ROOT = Path(__file__).resolve().parents[1]
# Containers that a module fills while it runs, and what bounds them.
CONTAINERS = {
    "fdk_jax/format/packing.py:NATIVE": "an entry a layout, written when fdk_jax is imported",
    "fdk_jax/format/packing.py:STREAMED": "an entry a layout, written when fdk_jax is imported",
    "fdk_jax/format/quantised_tensor.py:_checked": "weak: an entry lives as long as its codebook",
    "pallas_kernels/target.py:_used": "a stack: `using` takes off what it puts on",
    "fdk_jax/benchmark/models.py:_held": "one model: it is cleared before the next one is made",
}
EMPTY = ("dict", "list", "set", "OrderedDict", "defaultdict", "deque")
EMPTY += ("WeakKeyDictionary", "WeakValueDictionary", "WeakSet")


def modules() -> Iterator[tuple[str, ast.Module]]:
    for package in ("fdk_jax", "pallas_kernels"):
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def name_of(node: ast.expr) -> str:
    """The last name of a dotted expression, called or not."""
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def unbounded(tree: ast.Module) -> Iterator[str]:
    """Cached functions that take arguments and keep every result."""
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        for decorator in node.decorator_list:
            sizes = [
                keyword.value
                for keyword in getattr(decorator, "keywords", ())
                if keyword.arg == "maxsize"
            ]
            endless = any(isinstance(s, ast.Constant) and s.value is None for s in sizes)
            if name_of(decorator) == "cache" or (name_of(decorator) == "lru_cache" and endless):
                arguments = node.args
                if arguments.posonlyargs or arguments.args or arguments.kwonlyargs:
                    yield node.name


def containers(tree: ast.Module) -> Iterator[str]:
    """Empty containers that a module makes when it is imported."""
    for node in tree.body:
        if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None:
            continue
        value = node.value
        empty = isinstance(value, ast.Dict) and not value.keys
        empty |= isinstance(value, (ast.List, ast.Set)) and not value.elts
        empty |= isinstance(value, ast.Call) and name_of(value) in EMPTY
        empty &= not (isinstance(value, ast.Call) and (value.args or value.keywords))
        if empty:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (ast.unparse(target) for target in targets)


def test_every_cached_function_states_its_size():
    assert [f"{path}:{name}" for path, tree in modules() for name in unbounded(tree)] == []


def test_every_container_that_a_module_fills_is_known():
    found = {f"{path}:{name}" for path, tree in modules() for name in containers(tree)}
    assert found == set(CONTAINERS)


@pytest.mark.parametrize(
    ("source", "functions", "names"),
    [
        ("@functools.cache\ndef f(x): ...", ["f"], []),
        ("@cache\ndef f(*, x): ...", ["f"], []),
        ("class A:\n    @functools.lru_cache(maxsize=None)\n    def f(self): ...", ["f"], []),
        ("@functools.cache\ndef f(): ...", [], []),
        ("@functools.lru_cache(maxsize=8)\ndef f(x): ...", [], []),
        ("_kept: dict[int, int] = {}\nother = collections.OrderedDict()", [], ["_kept", "other"]),
        ("TABLE = {1: 2}\nNAMES = []", [], ["NAMES"]),
    ],
)
def test_the_search_finds_what_it_looks_for(source, functions, names):
    tree = ast.parse(source)
    assert list(unbounded(tree)) == functions and list(containers(tree)) == names


class _Model(nnx.Module):
    """As much of a model as `Programs` needs."""

    config = parallel = None

    def __init__(self):
        self.weight = nnx.Param(jnp.ones(2))


def test_a_generator_keeps_a_bounded_number_of_programs():
    programs = Programs(_Model(), max_programs=2)
    for name in ("first", "second", "first", "third"):
        program = programs.program(name, lambda m, x: x + m.weight[...].sum(), [jax.Array], 1.0)
        assert program(1.0) == 3
    assert list(programs) == ["first", "third"]  # the one used longest ago went


def test_a_made_class_lives_as_long_as_the_class_it_was_made_from():
    class Layer(nnx.Module):
        def __call__(self, x):
            return x

    made = interpreted_class(Layer)
    assert interpreted_class(Layer) is made and interpreted_class(made) is made
