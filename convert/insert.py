"""Puts sleep layers into a model that has attention only, so that it can be trained to sleep.

The output projection of a new layer is zero, or its gain, so that the model computes what it did
before, to the bit; training moves it from there, as the paper did with Ouro (arXiv 2605.26099).
Layers of delta attention start as copies of the host's attention at their place. Here it is done
to a loaded model; `convert.pipeline` does the same to a checkpoint that streams by.
"""

from __future__ import annotations

import mlx.core as mx
from mlx.utils import tree_map_with_path

from ..models import inserted
from ..models.base import SleepModel
from ..models.delta_attention import from_attention, sizes_of
from ..models.inserted import SleepLayer
from ..utils.errors import UserError
from .heads import heads_of

# The decay of S stays float32 whatever the weights are.
_STAY_FLOAT32 = ("A_log", "dt_bias")


def insert_into(model: SleepModel, layers: list[dict], seed: int = 0) -> SleepModel:
    """`model` with new sleep layers: the same parameters, and the same logits to the bit.

    layers  `sleep_layers` of a config.json (`mlx_sleep.models.inserted`), as `plan` makes them
    """
    model_with = inserted.Inserted(model, layers)
    model_with.sleep_layers = new_layers(model, layers, seed)
    return model_with


def new_layers(
    host: SleepModel, layers: list[dict], seed: int = 0, copy: bool = True
) -> list[SleepLayer]:
    """The modules that `layers` describe, silent, in the dtype of the host's h.

    Their weights are random, but for those of delta attention, which copies the attention of the
    block after it (unless `copy` is False). Seeds MLX's random numbers. Nothing is evaluated.
    """
    h = host.embed(mx.zeros((1, 1), mx.int32))  # of a quantized model it has a floating dtype too
    mx.random.seed(seed)
    new = []
    for layer in layers:
        module = SleepLayer(h.shape[-1], layer)
        if copy and layer["kind"] == "delta_attention":
            module.load_weights(list(from_attention(*_attention(host, layer)).items()), False)
        module.silence()
        parameters = module.parameters()
        module.update(tree_map_with_path(lambda name, x: _cast(name, x, h.dtype), parameters))
        new.append(module)
    return new


def _attention(host: SleepModel, layer: dict):
    """(attention, the norm before it) of the block that follows the layer."""
    block = host.block_modules[min(layer["before"], host.num_layers - 1)]
    for attention, norm in (("self_attn", "input_layernorm"), ("mixer", "mixer_norm")):
        if attention in block and norm in block:
            return block[attention], block[norm]
    raise UserError(
        "delta_attention copies the attention of a block that has self_attn after "
        "input_layernorm, as Llama's; other layers can be inserted by "
        "mlx-sleep convert --insert N --insert-kind jet"
    )


def _cast(name: str, x, dtype):
    return x if name.endswith(_STAY_FLOAT32) else x.astype(dtype)


def plan(
    model: SleepModel,
    *,
    kind: str = "jet",
    count: int | None = None,
    before: list[int] | None = None,
    heads: int | None = None,
    head_dim: int | None = None,
    copy: bool = True,
) -> list[dict]:
    """`sleep_layers` for a model, to be edited or inserted as they are.

    kind    "jet", "gated_deltanet" or "delta_attention"
    count   how many, evenly spaced; None is 6, as in the paper, or the number of blocks if smaller
    before  where instead: the blocks that they come before; the number of blocks means after all
    heads, head_dim, copy  of delta_attention: see `heads_of`

    Heads have Dv = 128 and Dk = 64 and as many as the hidden size has room for, so that six of
    them are 8% of Ouro-1.4B; those of delta_attention are the host's. UserError for places that
    the model doesn't have, and for heads that can't start as the host's attention.
    """
    if isinstance(model, inserted.Inserted):
        raise UserError("the model has sleep layers already; start from the folder without them")
    width = model.embed(mx.zeros((1, 1), mx.int32)).shape[-1]
    layers = plan_for(width, model.num_layers, kind=kind, count=count, before=before)
    if kind == "delta_attention":
        for layer in layers:
            own = sizes_of(_attention(model, layer)[0])
            layer |= heads_of((own["num_heads"], own["head_dim"]), heads, head_dim, copy)
    return layers


def plan_for(
    hidden_size: int,
    blocks: int,
    *,
    kind: str = "jet",
    count: int | None = None,
    before: list[int] | None = None,
) -> list[dict]:
    """`plan` for a model of so many blocks that is not loaded."""
    if before is not None and count is not None:
        raise UserError("say how many sleep layers, or where; not both")
    if before is None:
        count = min(6, blocks) if count is None else count
        if not 1 <= count <= blocks:
            raise UserError(f"between 1 and {blocks} sleep layers can be inserted, not {count}")
        before = [(2 * j + 1) * blocks // (2 * count) for j in range(count)]
    if twice := sorted(at for at in set(before) if before.count(at) > 1):
        raise UserError(f"one sleep layer goes before block {twice[0]}; give each block once")
    value = min(128, hidden_size)
    sizes: dict = {
        "num_heads": hidden_size // value,
        "head_dim": max(1, value // 2),
        "expand_v": value / max(1, value // 2),
        "conv_size": 4,
        "norm_eps": 1e-5,
    }
    if kind == "delta_attention":
        head = min(64, hidden_size)
        sizes = {"num_heads": hidden_size // head, "head_dim": head}
        sizes |= {"conv_size": 4, "norm_eps": 1e-5}
    if kind == "jet":
        sizes["dconv_generator_reduction"] = min(8, value)
    layers = [{"before": at, "kind": kind, **sizes} for at in sorted(before)]
    return inserted.check(layers, blocks)
