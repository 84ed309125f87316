"""Decoder-only language models with plain or quantised weights: load, generate, share over devices."""

from fdk_jax.models.cache import KVCache as KVCache
from fdk_jax.models.calibrating import load_calibrated as load_calibrated
from fdk_jax.models.calibrating import token_windows as token_windows
from fdk_jax.models.config import ModelConfig as ModelConfig
from fdk_jax.models.config import RopeScaling as RopeScaling
from fdk_jax.models.config import custom_llama as custom_llama
from fdk_jax.models.config import qwen3 as qwen3
from fdk_jax.models.generation import Generation as Generation
from fdk_jax.models.generation import Generator as Generator
from fdk_jax.models.generation import check_prompts as check_prompts
from fdk_jax.models.loading import Quantisation as Quantisation
from fdk_jax.models.loading import load as load
from fdk_jax.models.loading import read_config as read_config
from fdk_jax.models.loading import stored_bits as stored_bits
from fdk_jax.models.parallel import Parallel as Parallel
from fdk_jax.models.random_weights import random_model as random_model
from fdk_jax.models.request import cache_bucket as cache_bucket
from fdk_jax.models.rotating import rotated as rotated
from fdk_jax.models.sampling import Sampling as Sampling
from fdk_jax.models.transformer import Transformer as Transformer
