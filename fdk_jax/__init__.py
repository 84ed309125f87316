"""Fused dequantise-matmul for low-bit weights in JAX."""

from fdk_jax import checkpoint as checkpoint
from fdk_jax import packing as packing
from fdk_jax import sharding as sharding
from fdk_jax import training as training
from fdk_jax.calibration import calibrate as calibrate
from fdk_jax.calibration import calibrate_array as calibrate_array
from fdk_jax.dispatch import interpret_pallas as interpret_pallas
from fdk_jax.dispatch import matmul as matmul
from fdk_jax.evaluation import evaluate as evaluate
from fdk_jax.explain import explain as explain
from fdk_jax.linear import QuantisedDense as QuantisedDense
from fdk_jax.linear import QuantisedLinear as QuantisedLinear
from fdk_jax.linear import QuantisedWeight as QuantisedWeight
from fdk_jax.linear import quantised_apply as quantised_apply
from fdk_jax.quantised_tensor import QuantisedTensor as QuantisedTensor
from fdk_jax.quantised_tensor import is_quantised as is_quantised
from fdk_jax.trees import dequantise as dequantise
from fdk_jax.trees import prepare as prepare
from fdk_jax.trees import quantise as quantise
from fdk_jax.trees import summary as summary
