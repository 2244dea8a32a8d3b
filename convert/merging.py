"""LoRA adapters (arXiv 2106.09685) of PEFT and of mlx-lm, merged into the weights that they change.

    W + scale B A        PEFT: lora_A [r, in], lora_B [out, r]; scale alpha / r, or alpha / sqrt(r)
                         mlx-lm: lora_a [in, r], lora_b [r, out], so B A is (lora_a lora_b)^T

Sums are taken in float32. What can't be merged exactly so is refused by its name.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..models.weights import nearest
from ..utils import schema
from ..utils.errors import UserError
from ..utils.files import expanded, read_json
from ..utils.safetensors import MLX_DTYPES, load, read_header
from ..utils.schema import Count
from .mapping import without_wrappers
from .sources import check_not_lfs

CONFIG = "adapter_config.json"
_PEFT, _MLX_LM = "adapter_model.safetensors", "adapters.safetensors"
_PART = re.compile(r"(.*)\.lora_(embedding_)?(A|B|a|b)(\.default)?(\.weight)?")
_EMBEDDING = re.compile(r"(.*\.)?(embed_tokens|embeddings|word_embeddings)")
# Fields of PEFT that change what an adapter computes, and the values at which they don't.
_PLAIN: dict[str, tuple] = {
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "layer_replication": (None,),
    "megatron_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, {}),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "arrow_config": (None,),
    # Others change the base model's weights before training: PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
# Fields of PEFT that say how it was trained, and those of PeftFields.
_OF_TRAINING = {
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "lora_dropout",
    "layers_to_transform",
    "layers_pattern",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "ensure_weight_tying",
    "runtime_config",
}


@dataclass
class PeftFields:
    """Of PEFT's adapter_config.json."""

    peft_type: str
    r: Count = 8
    lora_alpha: float = 8
    use_rslora: bool | None = False
    rank_pattern: dict | None = None
    alpha_pattern: dict | None = None


@dataclass
class MlxLmFields:
    """Of mlx-lm's adapter_config.json."""

    lora_parameters: dict
    fine_tune_type: str | None = "lora"


@dataclass
class Adapter:
    """An adapter, read.

    mlx_lm    whether its names are those of mlx-lm's models; else PyTorch's
    changes   layer -> (A [..., r, in], B [..., out, r], scale), by the names of the weights' layers
    replaced  name -> array of weights that are in the adapter whole
    """

    path: Path
    mlx_lm: bool = False
    changes: dict[str, tuple[mx.array, mx.array, float]] = field(default_factory=dict)
    replaced: dict[str, mx.array] = field(default_factory=dict)

    def merge(self, tensors: dict[str, mx.array]) -> dict[str, str]:
        """Change the (lazy) arrays of a model in place; name -> what was done.

        UserError where the adapter has a layer that the model hasn't, or one of another shape.
        """
        done: dict[str, str] = {}
        names = without_wrappers(tensors)
        for layer, (A, B, scale) in self.changes.items():
            name = self._find(f"{layer}.weight", names)
            w = tensors[name]
            if f"{name.removesuffix('.weight')}.scales" in tensors:
                raise UserError(
                    f"{name} is quantized; merge the adapter {self.path} into the model in full "
                    "precision"
                )
            if w.shape != (*B.shape[:-1], A.shape[-1]) or A.shape[-2] != B.shape[-1]:
                raise UserError(
                    f"{self.path} is an adapter of another model: {name} is {list(w.shape)}, its "
                    f"change {[*B.shape[:-1], A.shape[-1]]}"
                )
            change = scale * (B.astype(mx.float32) @ A.astype(mx.float32))
            tensors[name] = (w.astype(mx.float32) + change).astype(w.dtype)
            self._note(done, name, "adapter merged")
        for wanted, x in self.replaced.items():
            name = self._find(wanted, names)
            if tensors[name].shape != x.shape:
                raise UserError(
                    f"{self.path} is an adapter of another model: {name} is "
                    f"{list(tensors[name].shape)}, there {list(x.shape)}"
                )
            tensors[name] = x.astype(tensors[name].dtype)
            self._note(done, name, "replaced by the adapter's")
        return done

    def _note(self, done: dict[str, str], name: str, how: str) -> None:
        if name in done:
            raise UserError(f"{self.path} changes {name} twice")
        done[name] = how

    def _find(self, name: str, names: dict[str, str]) -> str:
        for prefix in ("", "model.", "language_model."):
            if prefix + name in names:
                return names[prefix + name]
        close = nearest(name, list(names))
        raise UserError(
            f"{self.path} changes {name}, which the model has not"
            + (f" (nearest: {close})" if close else "")
        )


def read_adapter(path: str | Path) -> Adapter:
    """A folder with adapter_config.json and weights. UserError for one that can't be merged."""
    path = expanded(path)
    if not (path / CONFIG).is_file():
        raise UserError(f"{path} has no {CONFIG}: it is not a folder of a LoRA adapter")
    config = read_json(path / CONFIG)
    for name, read in ((_PEFT, _of_peft), (_MLX_LM, _of_mlx_lm)):
        if (path / name).is_file():
            check_not_lfs(path / name)
            header = read_header(path / name)  # checked before MLX reads it
            for tensor, (dtype, _) in header.items():
                if not mx.issubdtype(MLX_DTYPES[dtype], mx.floating):
                    raise UserError(f"{path / name}: {tensor} is of type {dtype}")
            arrays, _ = load(path / name)
            with schema.naming(path / CONFIG):
                scale_of = read(config)
            with schema.naming(path):
                return _collect(Adapter(path, name == _MLX_LM), arrays, scale_of)
    if (path / "adapter_model.bin").is_file():
        raise UserError(f"{path} has adapter_model.bin; save the adapter as safetensors")
    raise UserError(f"{path} has neither {_PEFT} nor {_MLX_LM}")


Scale = Callable[[str, int], float]
"""(layer, its rank) -> scale"""


def _of_peft(config: dict) -> Scale:
    fields = schema.read(PeftFields, config)
    if fields.peft_type != "LORA":
        raise UserError(f"peft_type {fields.peft_type!r} can't be merged, only LORA")
    known = _OF_TRAINING | {field.name for field in dataclasses.fields(PeftFields)}
    for name, value in config.items():
        # Of a field that isn't known, null, false and empty say nothing.
        plain = value in _PLAIN[name] if name in _PLAIN else name in known or not value
        if not plain:
            said = f"{name} {schema.shown(value)}"
            raise UserError(f"{said} can't be merged; use PEFT's merge_and_unload")

    def scale(layer: str, rank: int) -> float:
        alpha: float = _matching(fields.alpha_pattern or {}, layer, fields.lora_alpha)
        expected = _matching(fields.rank_pattern or {}, layer, fields.r)
        if rank != expected:
            raise UserError(f"{layer} has rank {rank}, the config says {expected}")
        return alpha / (math.sqrt(rank) if fields.use_rslora else rank)

    return scale


def _matching(patterns: dict, layer: str, otherwise: Any) -> Any:
    """As PEFT: a pattern fits the end of a layer's name, after a dot."""
    for pattern, value in patterns.items():
        if re.search(r"[*+?{]", pattern):  # nothing from a file may run for ever
            raise UserError(f"the pattern {pattern!r} is not understood, only names are")
        schema.check(float, value, f"the pattern {pattern!r}")
        try:
            fits = re.match(rf"(.*\.)?({pattern})$", layer)
        except re.error as error:
            raise UserError(f"the pattern {pattern!r} is not understood: {error}") from error
        if fits:
            return value
    return otherwise


def _of_mlx_lm(config: dict) -> Scale:
    fields = schema.read(MlxLmFields, config)
    if fields.fine_tune_type not in ("lora", None):
        raise UserError(f"fine_tune_type {fields.fine_tune_type!r} can't be merged, only lora")
    factor = float(
        schema.check(float, fields.lora_parameters.get("scale"), "lora_parameters.scale")
    )
    return lambda layer, rank: factor


def _collect(adapter: Adapter, arrays: dict[str, mx.array], scale_of: Scale) -> Adapter:
    parts: dict[str, dict[str, mx.array]] = {}
    for name, x in arrays.items():
        clean = name.removeprefix("base_model.model.")
        match = _PART.fullmatch(clean)
        if match is None:
            if re.search(r"lora_|magnitude", clean) or clean.endswith(".m"):
                raise UserError(f"{name} can't be merged")
            adapter.replaced[clean] = x
            continue
        layer, embedding, part = match[1], match[2] or _EMBEDDING.fullmatch(match[1]), match[3]
        if embedding and part.isupper():  # E [vocab, dim] + (B A)^T
            part, x = {"A": "B", "B": "A"}[part], x.T
        elif embedding:  # E + A B
            part = {"a": "B", "b": "A"}[part]
        elif part.islower() and x.ndim == 2:  # experts, of three axes, are as PEFT has them
            x = x.T
        if part.upper() in parts.setdefault(layer, {}):
            raise UserError(f"{name} is there twice")
        parts[layer][part.upper()] = x
    for layer, pair in parts.items():
        if pair.keys() != {"A", "B"}:
            raise UserError(f"{layer} has only one half of its change")
        A, B = pair["A"], pair["B"]
        if A.ndim < 2 or A.ndim != B.ndim:
            raise UserError(f"{layer} has a change of shapes {list(A.shape)} and {list(B.shape)}")
        if not A.size or not B.size:
            raise UserError(f"{layer} has a change of rank 0")
        adapter.changes[layer] = A, B, scale_of(layer, A.shape[-2])
    if not adapter.changes and not adapter.replaced:
        raise UserError("it changes nothing")
    return adapter
