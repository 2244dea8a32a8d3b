"""PyTorch models that can run a checkpoint, for `verify`: transformers', or those in torch/.

torch and transformers are imported where they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

from ..models.compat import causal_lm_class
from ..models.mlx_lm_model import untagged
from ..utils.files import one_line
from .mapping import without_wrappers
from .sources import Source

Run = Callable[[Any], Any]
"""tokens [1, T] (torch, int64) -> logits [1, T, vocab]"""


def reference_model(source: Source) -> tuple[str, Run]:
    """(whose code, how to run it) for a checkpoint, in float32.

    LookupError when no installed code can run it.
    """
    kind = source.config.get("model_type")
    if source.origins:
        return _from_gguf(source)
    if source.ours and kind != "sleep_hybrid":
        raise LookupError("the source is a folder for MLX; no PyTorch code reads it")
    names = without_wrappers(source.tensors)
    state = {name: source.tensors[original] for name, original in names.items()}
    if kind in _OWN and (kind != "mamba2" or "norm_eps" in source.config):
        model, run = _OWN[kind](source.config)
        tensors = dict(_to_torch(state))
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise LookupError(f"its tensors are not named as PyTorch's: {[*missing, *unexpected]}")
        return f"PyTorch definition of {kind} in mlx_sleep.convert.torch", run
    return _from_transformers(source.config, state, "the checkpoint")


def _sleep_hybrid(config: dict):
    from .torch.sleep_hybrid import SleepHybrid

    model = SleepHybrid(config)
    return model, lambda tokens: model(tokens, model.fresh())[0]


def _fla(config: dict):
    from .torch.fla import Reference

    model = Reference({"tie_word_embeddings": False, **config}, {"window": 2, "eviction": "hard"})
    return model, lambda tokens: model(tokens, model.fresh())[0]


def _jet_nemotron(config: dict):
    from .torch.jet_nemotron import JetNemotron

    model = JetNemotron({"tie_word_embeddings": False, **config})
    return model, lambda tokens: model(tokens)[0]


def _ouro(config: dict):
    from .torch.ouro import Ouro

    model = Ouro({"tie_word_embeddings": False, **config}, {"window": 2, "eviction": "hard"})
    return model, lambda tokens: model(tokens[0], {})[0][None]


_OWN: dict[Any, Callable[[dict], tuple[Any, Run]]] = {
    "sleep_hybrid": _sleep_hybrid,
    "gated_deltanet": _fla,
    "mamba2": _fla,
    "jet_nemotron": _jet_nemotron,
    "ouro": _ouro,
}


def _from_transformers(config: dict, state: dict[str, mx.array], what: str) -> tuple[str, Run]:
    from transformers import AutoConfig

    config = untagged(config)
    kind = config.get("model_type")
    try:
        theirs = AutoConfig.for_model(
            kind, **{n: x for n, x in config.items() if n != "model_type"}
        )
        name, model = _load(theirs, dict(_to_torch(state)))
    except (KeyError, ValueError) as error:
        raise LookupError(f"transformers has no model for {kind!r}") from error
    except LookupError:
        raise
    except Exception as error:  # transformers raises all kinds for configs that it doesn't take
        raise LookupError(f"transformers cannot build it: {one_line(error)}") from error
    return f"transformers {name}, {what}", lambda tokens: model(tokens).logits


def _from_gguf(source: Source) -> tuple[str, Run]:
    """transformers' reading of the metadata, and the weights as the package gguf decodes them."""
    import torch
    from transformers import AutoConfig

    from .gguf_reference import Reference

    file = source.files[0]
    theirs = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    reference = Reference(source.files)
    names = [name for name in source.origins if name.endswith((".weight", ".bias"))]
    state = {name: torch.from_numpy(reference.values(name)) for name in names}
    theirs.vocab_size = len(state["model.embed_tokens.weight"])
    theirs.tie_word_embeddings = not reference.has("lm_head.weight")
    theirs.attention_bias = any(name.endswith("q_proj.bias") for name in names)
    name, model = _load(theirs, state)
    rotary = model.model.rotary_emb  # transformers ignores what GGUF says of its scaling
    rotary.inv_freq.copy_(torch.from_numpy(reference.inv_freq(2 * len(rotary.inv_freq))))
    what = f"transformers {name}, weights decoded by the package gguf"
    return what, lambda tokens: model(tokens).logits


def _load(config: Any, state: dict[str, Any]) -> tuple[str, Any]:
    """(name of the class, model) of transformers, in float32."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model_class = causal_lm_class(config)
    model, info = model_class.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=torch.float32,
        attn_implementation="eager",  # others leave out Gemma 2's softcapping
        output_loading_info=True,
    )
    if missing := set(info["missing_keys"]) - {"lm_head.weight"}:
        raise LookupError(f"transformers misses tensors of it: {sorted(missing)[:3]}")
    return model_class.__name__, model.eval()


def _to_torch(state: dict[str, mx.array]) -> Iterator[tuple[str, Any]]:
    import numpy as np
    import torch

    for name, x in state.items():
        if mx.issubdtype(x.dtype, mx.floating):
            x = x.astype(mx.float32)
        yield name, torch.from_numpy(np.array(x))
