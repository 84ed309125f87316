"""Packages for the integration tests whose own requirements are far larger than what the tests import.

`gemma` imports kauldron, and `tunix` imports its trainers, when the models alone are wanted: names that the
models use are put in the place of those.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

import flax.linen as nn
import pytest

_UNUSED = ("kauldron", "chex", "sentencepiece", "treescope", "grain", "tensorflow", "PIL", "cv2")


class _Name(type):
    """The metaclass of a name that stands for any type, decorator or namespace."""

    def __getitem__(cls, _: Any) -> Any:
        return Any

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything


class _Anything(metaclass=_Name):
    def __new__(cls, *args: Any, **_: Any) -> Any:
        return args[0] if args else cls


class _StandIn(types.ModuleType):
    """A module that has every name."""

    __path__: Any = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds packages that are not installed and that the models import but do not use."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        known = name.split(".")[0] in _UNUSED
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = _StandIn(spec.name)
        if spec.name == "kauldron":
            module.kd = types.SimpleNamespace(  # type: ignore[attr-defined]
                nn=types.SimpleNamespace(Identity=_Identity),
                sharding=types.SimpleNamespace(ShardingTree=Any),
            )
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _Identity(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return x


def tunix_model(family: str) -> Any:
    """The module tunix.models.<family>.model; skips where google-tunix is not installed."""
    pytest.importorskip("jaxtyping", reason="google-tunix's models need jaxtyping")
    if "tunix" not in sys.modules:
        spec = importlib.util.find_spec("tunix")
        if spec is None:
            pytest.skip("google-tunix is not installed: pip install --no-deps google-tunix")
        package = types.ModuleType("tunix")
        package.__path__ = list(spec.submodule_search_locations or [])
        sys.modules["tunix"] = package
    try:
        return importlib.import_module(f"tunix.models.{family}.model")
    except ImportError as error:
        pytest.skip(f"google-tunix cannot be imported here: {error}")


def gemma_nn() -> Any:
    """The modules (transformer, modules, config) of gemma's linen models; skips where it is not installed."""
    if importlib.util.find_spec("gemma") is None:
        pytest.skip("gemma is not installed: pip install --no-deps gemma")
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())  # the last one: what is installed is found before
    try:
        # It reads the batch axes from kauldron's annotations; here there is one batch axis.
        utils = importlib.import_module("gemma.gm.utils._jax_utils")
        utils.flatten_unflatten_batch_dim = lambda: lambda function: function
        return tuple(
            importlib.import_module(f"gemma.gm.nn.{name}")
            for name in ("_transformer", "_modules", "_config")
        )
    except (ImportError, AttributeError) as error:
        pytest.skip(f"gemma cannot be imported here: {error}")
