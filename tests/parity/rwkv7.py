"""RWKV-7 against a model in plain PyTorch, its recurrence fla's own naive definition.

fla's models need Triton; its `naive.py` does not, and is loaded from the installed fla-core as a
file. Around it stands what fla's layer computes, written for this test.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_sleep.convert.architectures import for_source
from mlx_sleep.models.mlx_lm_model import Model, ModelArgs

from .cases import Pair
from .fla import WINDOW

CONFIG = {
    "model_type": "rwkv7",
    "vocab_size": 61,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "head_dim": 64,
    "hidden_act": "sqrelu",
    "hidden_ratio": 0.5,
    "norm_eps": 1e-5,
    "tie_word_embeddings": False,
    **{f"{name}_low_rank_dim": 5 for name in ("a", "v", "gate", "decay")},
}
SEED = 3


@cache
def naive() -> Any:
    """fla's dplr_recurrence; None where fla-core is not installed."""
    spec = importlib.util.find_spec("fla")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        file = Path(place) / "ops/generalized_delta_rule/dplr/naive.py"
        if file.is_file():
            found = importlib.util.spec_from_file_location("fla_dplr_naive", file)
            assert found and found.loader
            module = importlib.util.module_from_spec(found)
            found.loader.exec_module(module)
            return module.dplr_recurrence
    return None


ARCHITECTURES = ("rwkv7",) if naive() else ()


def pairs(architecture: str, rng: np.random.Generator) -> Iterator[Pair]:
    """The pair of CONFIG, with fresh weights in PyTorch's names and shapes."""
    kind = for_source("rwkv7")
    config = kind.config(dict(CONFIG))
    model = Model(ModelArgs.from_dict({**config, "sleep": {"window": WINDOW}}))
    assert kind.sanitize and kind.unsanitize
    ours = dict(tree_flatten(model.parameters()))
    weights = {}
    for name, x in kind.unsanitize(config, ours).items():
        fan_in = x[0].size if x.ndim == 2 and "r_k" not in name else 1
        noise = rng.normal(size=x.shape) * fan_in**-0.5
        if "norm" in name and name.endswith("weight"):
            noise = 1 + 0.3 * noise
        elif x.ndim != 2:
            noise = 0.3 * noise
        weights[name] = noise.astype(np.float32)
    model.load_weights(
        list(kind.sanitize(config, {n: mx.array(x) for n, x in weights.items()}).items())
    )
    model.eval()
    try:
        release = version("fla-core")
    except PackageNotFoundError:
        release = "?"
    reference = f"fla-core {release}'s naive recurrence, the rest in plain PyTorch"
    yield Pair(architecture, reference, model, Rwkv7(config, weights))


class Rwkv7:
    """See Pair. A state has for each layer the last inputs of its two shifts, and S [B, H, Dv, Dk].

    weights  by fla's names
    """

    def __init__(self, config: dict, weights: dict[str, np.ndarray]):
        import torch

        self.w = {name: torch.from_numpy(x) for name, x in weights.items()}
        self.D, self.eps = config["head_dim"], config["norm_eps"]
        self.layers = config["num_hidden_layers"]

    def fresh(self):
        return [{} for _ in range(self.layers)]

    def forward(self, tokens, state):
        from torch.nn import functional as F

        h, state = self._blocks(self.w["model.embeddings.weight"][tokens], state)
        return F.linear(self._norm("model.norm", h), self.w["lm_head.weight"]), state

    def consolidate(self, tokens, state, passes: int):
        h = self.w["model.embeddings.weight"][tokens]
        for _ in range(passes):
            h, state = self._blocks(h, self._only_S(state))
        return self._only_S(state)

    @staticmethod
    def _only_S(state):
        return [{name: x for name, x in layer.items() if name == "S"} for layer in state]

    def _blocks(self, h, state):
        state, first = list(state), None
        for i in range(self.layers):
            at = f"model.layers.{i}"
            if i == 0:
                h = self._norm(f"{at}.pre_norm", h)
            kept: dict = {}
            mixed, first = self._attend(i, self._norm(f"{at}.attn_norm", h), first, state[i], kept)
            h = h + mixed
            x = self._norm(f"{at}.ffn_norm", h)
            kept["ffn"] = x[:, -1:]
            x = x + self._shift(x, state[i].get("ffn")) * self.w[f"{at}.ffn.x_k"]
            x = self._linear(f"{at}.ffn.key", x).relu().square()
            h = h + self._linear(f"{at}.ffn.value", x)
            state[i] = kept
        return h, state

    def _attend(self, i: int, x, first, before: dict, kept: dict):
        import torch
        from torch.nn import functional as F

        at, w, D = f"model.layers.{i}.attn", self.w, self.D
        heads = lambda y: y.unflatten(-1, (-1, D))  # noqa: E731  [B, T, H, D]
        delta = self._shift(x, before.get("attn"))
        kept["attn"] = x[:, -1:]
        r, decay, k, v, a, g = (x + delta * w[f"{at}.x_{name}"] for name in "rwkvag")
        log_decay = -0.6065306597126334 * self._lora(f"{at}.w_lora", decay, torch.tanh).sigmoid()
        r, k = self._linear(f"{at}.r_proj", r), self._linear(f"{at}.k_proj", k)
        value = self._linear(f"{at}.v_proj", v)
        if i == 0:
            first = value
        else:
            mix = self._lora(f"{at}.v_lora", v, lambda y: y).sigmoid()
            value = value + mix * (first - value)
        a = self._lora(f"{at}.a_lora", a, lambda y: y).sigmoid()
        g = self._lora(f"{at}.g_lora", g, torch.sigmoid)
        kk = F.normalize(heads(k * w[f"{at}.k_k"]), dim=-1)
        k = k * (1 + (a - 1) * w[f"{at}.k_a"])
        r, k, value, a = map(heads, (r, k, value, a))
        S = before["S"].transpose(-1, -2) if "S" in before else None
        turned = (y.transpose(1, 2) for y in (r * D**0.5, k, value, -kk, kk * a, heads(log_decay)))
        out, S = naive()(*turned, initial_state=S)
        kept["S"] = S.transpose(-1, -2)
        out = out.transpose(1, 2)  # [B, T, H, D]
        flat = F.group_norm(
            out.reshape(-1, out.shape[2] * D),
            out.shape[2],
            w[f"{at}.g_norm.weight"],
            w[f"{at}.g_norm.bias"],
            D * self.eps,
        ).view(out.shape)
        bonus = (r * k * w[f"{at}.r_k"]).sum(-1, keepdim=True) * value
        return self._linear(f"{at}.o_proj", (flat + bonus).flatten(-2) * g), first

    @staticmethod
    def _shift(x, last):
        """The inputs before x [B, T, D] minus x."""
        import torch

        last = torch.zeros_like(x[:, :1]) if last is None else last
        return torch.cat([last, x[:, :-1]], 1) - x

    def _lora(self, name: str, x, activation):
        from torch.nn import functional as F

        down = activation(F.linear(x, self.w[f"{name}.lora.0.weight"]))
        return F.linear(down, self.w[f"{name}.lora.2.weight"], self.w.get(f"{name}.lora.2.bias"))

    def _linear(self, name: str, x):
        from torch.nn import functional as F

        return F.linear(x, self.w[f"{name}.weight"])

    def _norm(self, name: str, x):
        from torch.nn import functional as F

        w = self.w
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], self.eps)
