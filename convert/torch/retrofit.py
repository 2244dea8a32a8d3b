"""A retrofit: a frozen Llama-like model with trained sleep layers before some of its blocks.

    h = h + gain * delta_attention(norm(h)),  then the block as it was

A sleep layer starts as a copy of the attention of its block, reads and writes fast weights S, and
is all that survives the end of a window (arXiv 2605.26099, hard eviction). This file is the
definition that the MLX model is compared to.

A batch of lives is [B, W, T]: B rows of W windows of T tokens, padded on the right. In each window
attention sees that window alone, positions start at 0, and the short convolution has zeros to its
left. So at one pass a sleep (N = 1) nothing but S crosses a boundary, layer by layer, and the
windows need no loop: blocks run on [B * W, T], the delta rule runs on [B, W * T].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from ...utils.errors import UserError
from .base import BaseConfig
from .delta_rule import Rule, chunked

HALF_LIVES = 700.0, 40_000.0  # tokens: of the first and the last head at the start


@dataclass(frozen=True)
class AdapterConfig:
    """What is added to a base. before: the blocks that have a sleep layer before them, ascending.

    passes (N), window (most tokens): how the model sleeps. loop_range: the blocks [lo, hi) that the
    passes run, sleep layers among them; None is from the first sleep layer on. fold: which tokens
    write into S, "all" or "user" (those that the assistant didn't say). lora_rank: 0 for none.
    read_eps: of the RMSNorm of what is read from S. A small one (None: norm_eps) makes a faint read
    as loud as any; one near the mean square of a read leaves it faint, which is how the model can
    tell that it never was told.
    """

    before: tuple[int, ...] = (6, 10, 14, 18, 22, 26)
    num_heads: int = 9
    head_dim: int = 64
    conv_size: int = 4
    norm_eps: float = 1e-5
    passes: int = 1
    window: int = 512
    fold: str = "all"
    lora_rank: int = 0
    loop_range: tuple[int, int] | None = None
    read_eps: float | None = None


class DeltaAttention(nn.Module):
    """Linear attention with the gated delta rule: the mixer of a sleep layer.

    D is the model's width; q, k and v have H heads of d each.
    """

    def __init__(self, D: int, c: AdapterConfig):
        super().__init__()
        H, d = c.num_heads, c.head_dim
        self.H, self.d = H, d
        self.q_proj = nn.Linear(D, H * d, bias=False)
        self.k_proj = nn.Linear(D, H * d, bias=False)
        self.v_proj = nn.Linear(D, H * d, bias=False)
        self.g_proj = nn.Linear(D, H * d, bias=False)
        self.o_proj = nn.Linear(H * d, D, bias=False)
        self.a_proj = nn.Linear(D, H, bias=False)
        self.b_proj = nn.Linear(D, H)
        self.dt_bias = nn.Parameter(torch.empty(H))
        self.conv_weight = nn.Parameter(torch.empty(3 * H * d, c.conv_size))  # of q, k, v
        self.eps = c.norm_eps if c.read_eps is None else c.read_eps
        self.o_norm = nn.RMSNorm(d, eps=self.eps)

        self.inputs, self.output = mixer_inputs, mixer_output

    def forward(self, x, S, writes, rule: Rule):
        """x [B, W, T, D], S [B, H, d, d], writes [B, W, T] bool: (out like x, S)."""
        B, W, T, _ = x.shape
        projections = (self.q_proj, self.k_proj, self.v_proj, self.g_proj)
        weight = torch.cat([p.weight for p in projections]).to(x.dtype)
        rates = self.a_proj.weight, self.dt_bias, self.b_proj.weight, self.b_proj.bias
        *qkvgb, gate = self.inputs(x, weight, self.conv_weight, *rates, writes)
        o, S = rule(*(y.flatten(1, 2) for y in qkvgb), S)
        o = o.view(B, W, T, self.H, self.d)
        return self.output(o, gate, self.o_norm.weight, self.o_proj.weight, self.eps), S


def mixer_inputs(x, qkvg, conv, a_proj, dt_bias, b_proj, b_bias, writes):
    """q, k, v [B, W, T, H, d], log decay and beta [B, W, T, H], gate [B, W, T, H * d] of x."""
    H = dt_bias.shape[0]
    y = F.linear(x, qkvg)
    qkv, gate = y.split([conv.shape[0], y.shape[-1] - conv.shape[0]], -1)
    q, k, v = short_conv(qkv, conv.to(x.dtype)).unflatten(-1, (3, H, -1)).unbind(-3)
    a = F.linear(x, a_proj.to(x.dtype)).to(dt_bias.dtype) + dt_bias
    b = F.linear(x, b_proj.to(x.dtype)).to(dt_bias.dtype) + b_bias
    on = writes[..., None]
    return unit(q), unit(k), v, -F.softplus(a) * on, b.sigmoid() * on, gate


def mixer_output(o, gate, norm, o_proj, eps: float):
    """W_o(RMSNorm of each head of o [B, W, T, H, d], times 2 sigmoid(gate))."""
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + eps) * norm
    o = o.flatten(-2) * 2 * gate.to(o.dtype).sigmoid()
    return F.linear(o.to(gate.dtype), o_proj.to(gate.dtype))


def short_conv(x, weight):
    """Causal depthwise convolution of each window of x [B, W, T, C] by weight [C, K]."""
    K, T = weight.shape[1], x.shape[2]
    x = F.pad(x, (0, 0, K - 1, 0))
    return sum(x[:, :, i : i + T] * weight[:, i] for i in range(K))


def unit(x, eps: float = 1e-6):
    """x over its L2 norm on the last axis, the norm in float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


class SleepLayer(nn.Module):
    """h + gain * mixer(norm(h))"""

    def __init__(self, D: int, c: AdapterConfig):
        super().__init__()
        self.norm = nn.RMSNorm(D, eps=c.norm_eps)
        self.mixer = DeltaAttention(D, c)
        self.gain = nn.Parameter(torch.empty(D))

    def forward(self, h, S, writes, rule: Rule):
        x = F.rms_norm(h, h.shape[-1:], self.norm.weight.to(h.dtype), self.norm.eps)
        out, S = self.mixer(x, S, writes, rule)
        return h + self.gain.to(h.dtype) * out, S

    @torch.no_grad()
    def start(self, block: Block, heads: int, gain: float, make: torch.Generator, copy=True):
        """Copies the attention of `block` (`heads` KV heads); the rest small, or no change at all.
        Without `copy` the projections are random, as those of a new `nn.Linear`.

        S is forgotten by half in 700 to 40,000 tokens, head by head: a memory for a conversation
        of many windows. make: a generator on the CPU.
        """
        mixer = self.mixer
        H = mixer.H
        projections = mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.o_proj
        for projection, x in zip(projections, block.attention(heads), strict=True):
            weight = projection.weight
            if not copy:
                x = (2 * torch.rand(weight.shape, generator=make) - 1) * weight.shape[1] ** -0.5
            weight.copy_(x)
        self.norm.weight.copy_(block.norm if copy else torch.ones_like(block.norm))
        mixer.g_proj.weight.zero_()
        for projection in (mixer.a_proj, mixer.b_proj):
            projection.weight.copy_(0.02 * torch.randn(projection.weight.shape, generator=make))
        mixer.b_proj.bias.zero_()
        shortest, longest = (math.log10(x) for x in HALF_LIVES)
        rate = math.log(2) / torch.logspace(shortest, longest, H)
        mixer.dt_bias.copy_(torch.log(torch.expm1(rate)))  # softplus(dt_bias) = rate
        mixer.conv_weight.copy_(0.02 * torch.randn(mixer.conv_weight.shape, generator=make))
        mixer.conv_weight[:, -1] += 1
        mixer.o_norm.weight.fill_(1)
        self.gain.fill_(gain)


class LoRA(nn.Module):
    """A trained change of low rank beside a frozen matrix [out, in]; none at the start."""

    def __init__(self, out: int, width: int, rank: int):
        super().__init__()
        self.lora_a = nn.Parameter(torch.randn(rank, width) * width**-0.5)
        self.lora_b = nn.Parameter(torch.zeros(out, rank))

    def forward(self, x):
        return F.linear(F.linear(x, self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype))


@dataclass
class Block:
    """The frozen tensors of a block. qkv: q, k and v in one matrix; gate_up: gate and up."""

    norm: torch.Tensor
    qkv: torch.Tensor
    o: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    lora: nn.ModuleDict | None = field(default=None)

    def attention(self, heads: int) -> tuple[torch.Tensor, ...]:
        """q, k, v and o, float32 on the CPU; the `heads` of k and v repeated to as many as q's."""
        wide = self.o.shape[1]
        q, k, v = self.qkv.float().cpu().tensor_split([wide, (wide + len(self.qkv)) // 2])
        repeats = wide // len(k)
        k, v = (x.unflatten(0, (heads, -1)).repeat_interleave(repeats, 0) for x in (k, v))
        return q, k.flatten(0, 1), v.flatten(0, 1), self.o


def project(h, norm, qkv, cos, sin, eps: float, heads: tuple[int, int], lora=None):
    """q [n, Hq, T, d], k and v [n, Hkv, T, d] of h [n, T, D], q and k rotated."""
    n, T, _ = h.shape
    d, (Hq, Hkv) = cos.shape[-1], heads
    x = F.rms_norm(h, h.shape[-1:], norm, eps)
    q, k, v = F.linear(x, qkv).split([Hq * d, Hkv * d, Hkv * d], -1)
    if lora is not None:
        q, k, v = (y + lora[f"{name}_proj"](x) for name, y in zip("qkv", (q, k, v), strict=True))
    q, k, v = (y.view(n, T, -1, d).transpose(1, 2) for y in (q, k, v))
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def rotate(x, cos, sin):
    """Rotary embedding of x [n, H, T, d]: pairs (i, i + d/2); cos, sin [T, d]."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def attention(q, k, v):
    """Causal attention of q [n, Hq, T, d] over k and v [n, Hkv, T, d]."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    # PyTorch's kernel for CPUs takes three times as long at these lengths.
    n, H, T, d = q.shape
    groups = H // k.shape[1]
    q, k, v = q.reshape(-1, groups * T, d), k.flatten(0, 1), v.flatten(0, 1)
    mask = q.new_full((T, T), -math.inf).triu(1).repeat(groups, 1)
    p = torch.baddbmm(mask, q, k.mT, alpha=d**-0.5).softmax(-1)
    return (p @ v).view(n, H, T, d)


def finish(h, o, o_proj, norm, gate_up, down, eps: float, lora=None):
    """The rest of a block, after attention: h and o [n, T, ...] to h."""
    h = h + F.linear(o, o_proj)
    if lora is not None:
        h = h + lora["o_proj"](o)
    gate, up = F.linear(F.rms_norm(h, h.shape[-1:], norm, eps), gate_up).chunk(2, -1)
    return h + F.linear(F.silu(gate) * up, down)


class Retrofit(nn.Module):
    """The model. Its parameters are those that are trained: `state_dict()` is the adapter.

    weights: the base's, by Hugging Face's names (`base.read_weights`). dtype: of the base and the
    activations; what is trained is float32, or dtype if that is wider. copy: whether a sleep layer
    starts as the attention of its block. rule: how S is computed.
    """

    def __init__(
        self,
        config: BaseConfig,
        weights: dict[str, torch.Tensor],
        adapter: AdapterConfig | None = None,
        *,
        gain: float = 0.05,
        copy: bool = True,
        seed: int = 0,
        device="cpu",
        dtype=torch.float32,
        rule: Rule = chunked,
    ):
        super().__init__()
        self.config, self.adapter, self.rule = config, adapter or AdapterConfig(), rule
        c, a = config, self.adapter
        if not a.before or sorted({*a.before} & {*range(c.num_hidden_layers)}) != [*a.before]:
            raise UserError(
                f"there cannot be sleep layers before blocks {[*a.before]}: give numbers from 0 to "
                f"{c.num_hidden_layers - 1}, ascending"
            )
        self.loop_range = a.loop_range or (a.before[0], c.num_hidden_layers)
        lo, hi = self.loop_range
        if not (0 <= lo <= a.before[0] and a.before[-1] < hi <= c.num_hidden_layers):
            raise UserError(
                f"passes over blocks {lo} to {hi - 1} leave out sleep layers; give a range from "
                f"{a.before[0]} or less, to {a.before[-1] + 1} or more of {c.num_hidden_layers}"
            )
        weights = {name: x.to(device, dtype) for name, x in weights.items()}
        self.embedding = weights["model.embed_tokens.weight"]
        self.norm = weights["model.norm.weight"]
        self.blocks = [_block(weights, f"model.layers.{i}.") for i in range(c.num_hidden_layers)]
        layers = [SleepLayer(c.hidden_size, a) for _ in a.before]
        self.sleep_layers = nn.ModuleList(layers)
        self.mixers = [layer.mixer for layer in layers]
        make = torch.Generator().manual_seed(seed)
        for layer, i in zip(layers, a.before, strict=True):
            layer.start(self.blocks[i], c.num_key_value_heads, gain, make, copy)
        self.layers = nn.ModuleDict()
        if a.lora_rank:
            for i in range(a.before[0], c.num_hidden_layers):
                loras = _loras(c, a.lora_rank)
                self.layers[str(i)] = nn.ModuleDict({"self_attn": loras})
                self.blocks[i].lora = loras
        self.to(device, torch.promote_types(dtype, torch.float32))
        self.project, self.finish = project, finish

    def compile(self) -> None:
        """Compiles all but attention and the delta rule, which have kernels already."""
        # Some shapes still need code of their own (a single row); the usual limit is 8.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        self.project = _compiled(project, {0: 2, 3: 1, 4: 1})
        self.finish = _compiled(finish, {0: 2, 1: 2})
        inputs = _compiled(mixer_inputs, {0: 3, 7: 3})
        output = _compiled(mixer_output, {0: 3, 1: 3})
        for mixer in self.mixers:
            mixer.inputs, mixer.output = inputs, output

    def fresh(self, B: int) -> list[torch.Tensor]:
        """The fast weights of a model that has seen nothing: S [B, H, d, d] for each layer."""
        a, like = self.adapter, self.mixers[0].dt_bias
        return [like.new_zeros(B, a.num_heads, a.head_dim, a.head_dim) for _ in a.before]

    def hidden(self, tokens, mask, state=None, writes=None, passes: int | None = None):
        """(h [B, W, T, D] before the last norm, state) of lives with a sleep after each window.

        tokens [B, W, T]; mask [B, W, T] bool, True for a real token. writes [B, W, T] bool: tokens
        that change S (all when None); the others only read it. state: a list of S, or None.

        What is said of a window is the wake pass over it, from the S that the windows before left.
        With N > 1 passes the blocks of `loop_range` run N times over each window, h and S carried
        along, and S of the last pass is what stays (Algorithm 1). The first of these passes is
        the wake pass, so it's computed once.
        """
        passes = passes or self.adapter.passes
        state = self.fresh(tokens.shape[0]) if state is None else state
        writes = mask if writes is None else mask & writes
        h, blocks = self._embed(tokens), len(self.blocks)
        if passes == 1:
            return self._run(h, state, writes, 0, blocks)
        (lo, hi), outputs = self.loop_range, []
        starts = self._frozen(h, 0, lo)
        for w in range(tokens.shape[1]):
            now = slice(w, w + 1)
            h = starts[:, now]
            for i in range(passes):
                h, state = self._run(h, state, writes[:, now], lo, hi)
                if i == 0:
                    outputs.append(h)
        return self._frozen(torch.cat(outputs, 1), hi, blocks), state

    def base_hidden(self, tokens):
        """h [n, T, D] of the base itself over windows [n, T], without sleep layers and LoRA."""
        return self._frozen(F.embedding(tokens, self.embedding), 0, len(self.blocks), lora=False)

    def logits(self, h):
        """Logits of any h [..., D]."""
        h = F.rms_norm(h, h.shape[-1:], self.norm, self.config.rms_norm_eps)
        return F.linear(h, self.embedding)

    def _embed(self, tokens):
        return F.embedding(tokens, self.embedding)

    def _run(self, h, state, writes, first: int, last: int):
        """Blocks first to last - 1 with all the sleep layers before them; h [B, W, T, D]."""
        shape, state = h.shape, list(state)
        for j, i in enumerate(self.adapter.before):
            h = self._frozen(h.view(-1, *shape[2:]), first, i).view(shape)
            h, state[j] = self.sleep_layers[j](h, state[j], writes, self.rule)
            first = i
        return self._frozen(h.view(-1, *shape[2:]), first, last).view(shape), state

    def _frozen(self, h, first: int, last: int, lora: bool = True):
        """Blocks first to last - 1 over each window of h [..., T, D]."""
        c, shape = self.config, h.shape
        h = h.reshape(-1, *shape[-2:])
        cos, sin = _angles(c, h.shape[1], h.device, h.dtype)
        heads = c.num_attention_heads, c.num_key_value_heads
        for block in self.blocks[first:last]:
            change = block.lora if lora else None
            q, k, v = self.project(
                h, block.norm, block.qkv, cos, sin, c.rms_norm_eps, heads, change
            )
            o = attention(q, k, v)
            o = o.transpose(1, 2).reshape(*h.shape[:2], -1)
            rest = block.o, block.mlp_norm, block.gate_up, block.down
            h = self.finish(h, o, *rest, c.rms_norm_eps, change)
        return h.view(shape)


def _compiled(part, varying: dict[int, int]):
    """part compiled. varying: of which arguments the first how many dimensions differ from batch
    to batch, so that they are compiled once and not for every shape."""
    fast = torch.compile(part)

    def run(*arguments):
        for i, dims in varying.items():
            torch._dynamo.maybe_mark_dynamic(arguments[i], list(range(dims)))
        return fast(*arguments)

    return run


def _angles(c: BaseConfig, T: int, device, dtype):
    rates = c.rope_theta ** (-torch.arange(0, c.head_dim, 2, device=device).double() / c.head_dim)
    angle = torch.arange(T, device=device).double()[:, None] * rates
    angle = torch.cat([angle, angle], -1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _block(weights: dict, prefix: str) -> Block:
    def joined(*names):
        return torch.cat([weights[f"{prefix}{name}.weight"] for name in names])

    return Block(
        weights[prefix + "input_layernorm.weight"],
        joined("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        joined("self_attn.o_proj"),
        weights[prefix + "post_attention_layernorm.weight"],
        joined("mlp.gate_proj", "mlp.up_proj"),
        joined("mlp.down_proj"),
    )


def _loras(c: BaseConfig, rank: int) -> nn.ModuleDict:
    D, q = c.hidden_size, c.num_attention_heads * c.head_dim
    kv = c.num_key_value_heads * c.head_dim
    shapes = {"q_proj": (q, D), "k_proj": (kv, D), "v_proj": (kv, D), "o_proj": (D, q)}
    return nn.ModuleDict({name: LoRA(*shape, rank) for name, shape in shapes.items()})
