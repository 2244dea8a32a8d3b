"""Adapters compute the same in MLX and in the PyTorch definition that trains them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mlx_sleep.convert.torch.adapter import read_adapter  # noqa: E402
from mlx_sleep.convert.torch.base import BaseConfig, read_weights  # noqa: E402
from mlx_sleep.convert.torch.delta_rule import naive  # noqa: E402
from mlx_sleep.convert.torch.retrofit import Retrofit  # noqa: E402
from mlx_sleep.models.load import load_model  # noqa: E402
from mlx_sleep.sleep import consolidate  # noqa: E402
from mlx_sleep.training.lives import life_hidden  # noqa: E402
from tests.test_adapter import CONFIG, adapter_folder  # noqa: E402
from tests.test_retrofit import chat_folder  # noqa: E402


@pytest.mark.parametrize(
    ("passes", "loop_range", "layer"),
    [
        (1, None, {}),
        (1, None, {"read_eps": 0.3}),
        (1, None, {"num_heads": 2, "head_dim": 32}),
        (2, None, {}),
        (3, None, {}),
        (2, (1, 3), {"read_eps": 0.3}),
        (3, (0, 3), {}),
    ],
)
@pytest.mark.parametrize("lora", [(), ("q_proj", "k_proj", "v_proj", "o_proj")])
@pytest.mark.parametrize("fold", ["all", "user"])
def test_logits_of_three_windows(tmp_path, rng, passes, loop_range, layer, lora, fold):
    base = chat_folder(tmp_path / "base", "llama", config={**CONFIG, "num_hidden_layers": 4})
    looped = {"loop_range": list(loop_range)} if loop_range else {}
    options = {"lora": lora, "fold": fold, "layer": layer, **looped}
    path, _, _ = adapter_folder(tmp_path / "adapter", base, **options)
    ours, _ = load_model(base, adapter_path=path)
    config, weights, _ = read_adapter(path)
    assert config.read_eps == layer.get("read_eps") and config.loop_range == loop_range
    theirs = Retrofit(BaseConfig.from_folder(base), read_weights(base), config, rule=naive)
    own = set(theirs.state_dict())
    theirs.load_state_dict({n: x for n, x in weights.items() if n in own}, strict=False)
    assert set(weights) <= own
    tokens = rng.integers(3, 999, (2, 3, 9))
    writes = rng.random(tokens.shape) < (0.5 if fold == "user" else 2)
    x = torch.tensor(tokens)
    with torch.no_grad():
        if lora:  # the definition has them in all projections of the blocks that it changes
            for name, p in theirs.named_parameters():
                if "lora_b" in name and name not in weights:
                    p.zero_()
        h, _ = theirs.hidden(
            x, torch.ones(x.shape, dtype=torch.bool), writes=torch.tensor(writes), passes=passes
        )
        wanted = theirs.logits(h).numpy()
    found = ours.head(life_hidden(ours, mx.array(tokens), mx.array(writes), passes))
    np.testing.assert_allclose(found, wanted, atol=2e-4)
    state = ours.init_state(2)
    for w in range(2):
        write = mx.array(writes[:, w])
        state, _ = consolidate(ours, state, mx.array(tokens[:, w]), passes, write=write)
    last, _ = ours(mx.array(tokens[:, 2]), state, write=mx.array(writes[:, 2]))
    np.testing.assert_allclose(last, wanted[:, 2], atol=2e-4)
