"""Checkpoints that other programs wrote, read without loss; docs/files.md has the table of formats."""

from fdk_jax.files.contents import Checkpoint as Checkpoint
from fdk_jax.files.contents import Stored as Stored
from fdk_jax.files.reading import read as read
from fdk_jax.files.reading import read_config as read_config
from fdk_jax.files.reading import read_tokenizer as read_tokenizer
