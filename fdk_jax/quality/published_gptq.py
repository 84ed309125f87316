"""The GPTQ that others published, for the table on real networks: the class of auto-gptq 0.7.1 (PyPI, MIT).

Needs torch, transformers and that package. Its class is used as it is, with its own quantiser of integers and
the settings that its checkpoints have (damping .01, `sym`, `actorder`).
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array


def quantised(
    matrix: Array, second: Array | None, *, bits: int, group_size: int, search: bool
) -> Array:
    """The matrix that auto-gptq makes of one.

    Args:
        matrix: float [N, K].
        second: float32 [K, K], the second moments of its inputs.
        bits: of its integers.
        group_size: weights along K that share a scale.
        search: its `mse`, which searches scales; otherwise the largest magnitude decides.

    Returns:
        float32 [N, K], on scales of float32.

    Raises:
        ImportError: torch or auto-gptq is not installed.
        ValueError: no second moments.
    """
    if second is None:
        raise ValueError("GPTQ needs second moments")
    try:
        import torch  # type: ignore[import-not-found]
        from auto_gptq.quantization.gptq import GPTQ  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImportError("this needs packages: pip install torch auto-gptq==0.7.1") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n, k = matrix.shape
    layer = torch.nn.Linear(k, n, bias=False, device=device)

    def given(array: Array) -> Any:
        return torch.from_dlpack(np.array(array, np.float32)).to(device)

    layer.weight.data = given(matrix)
    solver: Any = GPTQ(layer)
    solver.quantizer.configure(bits, perchannel=True, sym=True, mse=search)
    # What `add_batch` makes of inputs: twice the mean of x x^T.
    solver.H = 2 * given(second)
    solver.nsamples = 1
    if device == "cpu":
        torch.cuda.synchronize = lambda *_: None  # which it calls to tell the time
    solver.fasterquant(percdamp=0.01, group_size=group_size, actorder=True, static_groups=True)
    return jnp.asarray(np.from_dlpack(layer.weight.data.float().cpu()))
