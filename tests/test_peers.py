"""Which devices sum over each other's memory, and why others do not."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from fdk_jax import models
from fdk_jax.models import fused_products, peers


def _parallel(shape=(2,), names=("model",), **options):
    count = int(np.prod(shape))
    mesh = jax.make_mesh(shape, names, devices=jax.devices("cpu")[:count])
    return models.Parallel(mesh, **options)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("FDK_JAX_PEER_SUMS", "0", "FDK_JAX_PEER_SUMS=0"),
        ("FDK_JAX_PEER_SUMS", "1", "platform 'cpu', not GPUs"),
        ("XLA_PYTHON_CLIENT_ALLOCATOR", "cuda_async", "cuda_async"),
        ("XLA_PYTHON_CLIENT_ALLOCATOR", "platform", "platform 'cpu', not GPUs"),
    ],
)
def test_reasons(monkeypatch, name, value, reason):
    monkeypatch.setenv(name, value)
    assert reason in (peers.unsupported_reason(_parallel(), 256) or "")


@pytest.mark.parametrize("count", [3, 8])
def test_numbers_of_gpus_that_were_not_tried_are_asked_for(monkeypatch, count):
    parallel = _parallel((count,))
    assert f"{count} GPUs have not been tried" in (peers.unsupported_reason(parallel, 256) or "")
    monkeypatch.setenv("FDK_JAX_PEER_SUMS", "1")
    assert "not GPUs" in (peers.unsupported_reason(parallel, 256) or "")


def test_devices_of_a_row_of_the_mesh_sum_up():
    parallel = _parallel((2, 4), ("data", "model"), data="data")
    groups = peers._groups(parallel)
    assert groups.shape == (2, 4) and (groups == parallel.mesh.devices).all()
    assert peers.specs(parallel) == P(("data", "model"))
    turned = _parallel((4, 2), ("model", "data"), data="data")
    assert (peers._groups(turned) == turned.mesh.devices.T).all()
    assert peers.specs(_parallel()) == P(("model",))


def test_mailboxes_and_where_they_are():
    """On CPU devices, whose memory has addresses too."""
    parallel = _parallel((2, 2), ("data", "model"), data="data")
    made = peers.make(parallel, 64)
    rows = np.asarray(made.addresses).reshape(4, 6)
    for number, shard in enumerate(made.mailbox.addressable_shards):
        group, rank = divmod(number, 2)
        own = rows[number].view(np.uint64)
        assert shard.device == parallel.mesh.devices[group, rank] and own[0] == rank
        assert own[1 + rank] == shard.data.unsafe_buffer_pointer()
        assert not np.asarray(shard.data).any()
    assert (rows[0, 2:] == rows[1, 2:]).all() and (rows[2, 2:] == rows[3, 2:]).all()


def test_without_peers_several_devices_have_no_plan_of_their_own():
    config = models.ModelConfig(256, 128, 256, 2, 4, 2, 32)
    model = models.random_model(config, bits=4, parallel=_parallel())
    x = jax.ShapeDtypeStruct((1, 128), "bfloat16")
    assert fused_products.choose(model.layers, model.norm, x) is None  # type: ignore[arg-type]


def test_the_best_token_of_all_parts_of_the_vocabulary(rng):
    """Of logits that are alike the first, as on one device: a table of equal rows has no others."""
    config = models.ModelConfig(256, 128, 256, 2, 8, 4, 32, tie_embeddings=True)
    model = models.random_model(config, parallel=_parallel((4,)))
    prompts = rng.integers(0, 256, (3, 5)).tolist()
    table = model.embedding.get_value()
    model.embedding.set_value(jax.device_put(np.ones(table.shape, table.dtype), table.sharding))
    assert models.Generator(model).generate(prompts, max_tokens=3).tokens == [[0] * 3] * 3


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_several_devices_take_no_plan_that_knows_one_only(bits):
    """With a GPU that has every kernel: each plan adds what all devices have.

    Layers in one launch were taken for two GPUs once: each then had the sums of its own part.
    """
    from fdk_jax.models import fused_layers
    from fdk_jax.models.cache import KVCache
    from pallas_kernels import chain
    from pallas_kernels.target import H200, using

    config = models.ModelConfig(256, 1024, 2048, 2, 8, 4, 128, dtype="bfloat16")
    parallel = _parallel()
    local = parallel.local(config)
    with using(H200):
        for shared in (None, parallel):
            model = models.random_model(config, bits=bits, backend="pallas", parallel=shared)
            shape = (1, (local if shared else config).num_kv_heads, 128, 128)
            arrays = (jax.ShapeDtypeStruct(shape, "bfloat16"),) * 2
            cache = KVCache(arrays, arrays, jax.ShapeDtypeStruct((1,), "int32"))  # type: ignore[arg-type]
            x = jax.ShapeDtypeStruct((1, 1024), "bfloat16")
            layers = fused_layers.choose(model.layers, model.norm, _Rows(x), cache)  # type: ignore[arg-type]
            plan = fused_products.choose(model.layers, model.norm, x)  # type: ignore[arg-type]
            if shared is None:
                assert (layers is not None) == (bits == 1)
                assert isinstance(plan, fused_products.InChains)
            else:
                assert layers is None and plan is None
                through = peers.make(parallel, 1024)
                plan = fused_products.choose(model.layers, model.norm, x, through)  # type: ignore[arg-type]
                seen = bits in chain.OVER_DEVICES
                kind = fused_products.InChains if seen else fused_products.OverPeers
                assert isinstance(plan, kind) and plan.peers is through


class _Rows:
    """A shape that has a length."""

    def __init__(self, like):
        self.shape, self.dtype = like.shape, like.dtype

    def __len__(self):
        return self.shape[0]
