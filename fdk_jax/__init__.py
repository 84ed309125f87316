"""Fused dequantise-matmul for low-bit weights in JAX."""

from fdk_jax import checkpoint as checkpoint
from fdk_jax.format import packing as packing
from fdk_jax.format.quantised_tensor import QuantisedTensor as QuantisedTensor
from fdk_jax.format.quantised_tensor import is_quantised as is_quantised
from fdk_jax.layers.linear import QuantisedDense as QuantisedDense
from fdk_jax.layers.linear import QuantisedLinear as QuantisedLinear
from fdk_jax.layers.linear import QuantisedWeight as QuantisedWeight
from fdk_jax.layers.linear import quantised_apply as quantised_apply
from fdk_jax.layers.trees import dequantise as dequantise
from fdk_jax.layers.trees import prepare as prepare
from fdk_jax.layers.trees import quantise as quantise
from fdk_jax.layers.trees import summary as summary
from fdk_jax.learning import training as training
from fdk_jax.learning.calibration import calibrate as calibrate
from fdk_jax.learning.calibration import calibrate_array as calibrate_array
from fdk_jax.learning.evaluation import evaluate as evaluate
from fdk_jax.product import sharding as sharding
from fdk_jax.product.dispatch import interpret_pallas as interpret_pallas
from fdk_jax.product.dispatch import matmul as matmul
from fdk_jax.product.explain import explain as explain
from fdk_jax.product.grouped import grouped_matmul as grouped_matmul
