"""What a trained adapter has for a retrofit of another shape."""

from __future__ import annotations

import torch

from ...utils.errors import UserError
from .retrofit import AdapterConfig, Retrofit

SHAPE = "num_heads", "head_dim", "conv_size"


def carry_over(model: Retrofit, adapter: AdapterConfig, weights: dict[str, torch.Tensor]) -> None:
    """Loads into `model` what `adapter`, with these weights, has trained at the same blocks.

    Sleep layers that only `model` has stay as they began, and so do its low-rank changes if the
    adapter has none. UserError where the layers' own shapes differ, or none is at the same block.
    """
    new = model.adapter
    differ = [name for name in SHAPE if getattr(adapter, name) != getattr(new, name)]
    if adapter.lora_rank not in (0, new.lora_rank):
        differ.append("lora_rank")
    if differ:
        raise UserError(f"the adapter to begin with has another {', '.join(differ)}")
    places = {i: j for j, i in enumerate(new.before)}
    found = {}
    for name, x in weights.items():
        kind, _, rest = name.partition(".")
        if kind == "sleep_layers":
            number, _, rest = rest.partition(".")
            block = adapter.before[int(number)]
            if block not in places:
                continue
            name = f"sleep_layers.{places[block]}.{rest}"
        found[name] = x
    if not any(name.startswith("sleep_layers.") for name in found):
        raise UserError(
            f"the adapter to begin with has sleep layers before blocks {[*adapter.before]}, and "
            f"none before {[*new.before]}; give some of its blocks"
        )
    own = model.state_dict()
    model.load_state_dict({**own, **{name: x for name, x in found.items() if name in own}})
