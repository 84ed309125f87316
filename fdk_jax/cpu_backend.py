"""The C++ library (placeholder until its bindings land)."""


def unavailable_reason() -> str | None:
    """Why `backend="cpu"` cannot be used here, or None."""
    return "the library is not built yet"


def describe() -> str:
    """One line about the kernels in use."""
    return "none"


def matmul(*_, **__):
    """Not there yet."""
    raise NotImplementedError(unavailable_reason())
