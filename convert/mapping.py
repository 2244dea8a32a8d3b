"""Which tensor of a checkpoint becomes which tensor of the model: all of them accounted for.

Nothing is evaluated but a tied head, which is compared with the embedding before it is dropped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import mlx.core as mx

from ..models.weights import abbreviate, nearest
from ..utils.errors import UserError
from ..utils.files import one_line
from .architectures.base import Architecture, Weights

# Parts that wrappers add to a name: DataParallel, torch.compile, FSDP, activation checkpointing.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_EMBEDDING = re.compile(r"(.*\.)?(embed_tokens|embeddings|embedding|wte|tok_embeddings)\.weight")
_HEAD = re.compile(r"(.*\.)?lm_head\.weight")
_LISTED = 200  # beyond that many, nearest names are not looked for


class TensorError(UserError):
    """Tensors that don't fit. `details` has a line for each; the message names the first."""

    def __init__(self, message: str, details: list[str]):
        super().__init__(message)
        self.details = details


@dataclass
class Target:
    """A tensor of the result: a lazy array, the names that it came from, and what was done."""

    name: str
    array: mx.array
    sources: tuple[str, ...]
    how: str


@dataclass
class Mapping:
    """targets in the order of the source's files; dropped: source name -> why."""

    targets: list[Target]
    dropped: dict[str, str]


def map_tensors(
    architecture: Architecture | None, config: dict, tensors: Weights, wanted: dict[str, mx.array]
) -> Mapping:
    """Map the tensors of a checkpoint to those of the model.

    architecture  None where the names are already the model's
    config        ours
    wanted        the model's parameters: name -> array of its shape and kind

    TensorError unless every wanted tensor is there in its shape, and every source is used or
    dropped for a reason. `tensors` is left as it is.
    """
    if architecture is None:
        targets = [Target(name, x, (name,), "as it is") for name, x in tensors.items()]
        _check(targets, wanted)
        return Mapping(targets, {})
    clean = without_wrappers(tensors)
    patterns = (*architecture.dropped, *architecture.dropped_for(config))
    dropped = {
        original: "holds no weights"
        for name, original in clean.items()
        if any(re.fullmatch(pattern, name) for pattern in patterns)
    }
    clean = {name: original for name, original in clean.items() if original not in dropped}
    renamed = _best_prefix(architecture, config, tensors, clean, wanted)
    if not any(_HEAD.fullmatch(name) for name in wanted):
        for name in [name for name in renamed if _HEAD.fullmatch(name)]:
            _check_tied(name, renamed, tensors)
            dropped[renamed.pop(name)] = "tied: equal to the embedding"
    try:
        targets = _map(architecture, config, renamed, tensors)
    except UserError:
        raise
    except Exception as error:  # mlx-lm takes its tensors to be there, and of the right shape
        raise UserError(
            f"the checkpoint's tensors don't fit its config: "
            f"{type(error).__name__}: {one_line(error)}"
        ) from error
    used = {source for target in targets for source in target.sources}
    unused = [original for original in renamed.values() if original not in used]
    _check(targets, wanted, unused)
    return Mapping(targets, dropped)


def without_wrappers(names: Iterable[str]) -> dict[str, str]:
    """Name without what wrappers added -> name in the file."""
    clean: dict[str, str] = {}
    for original in names:
        name = ".".join(part for part in original.split(".") if part not in _WRAPPERS)
        if name in clean:
            raise UserError(f"the checkpoint has one tensor twice: {clean[name]} and {original}")
        clean[name] = original
    return clean


def _best_prefix(
    architecture: Architecture,
    config: dict,
    tensors: Weights,
    clean: dict[str, str],
    wanted: dict[str, mx.array],
) -> dict[str, str]:
    """The names with or without a prefix of the trainer's, whichever fits the model best."""

    def hits(names: dict[str, str]) -> int:
        try:
            return sum(t.name in wanted for t in _map(architecture, config, names, tensors))
        except Exception:  # mlx-lm looks up names that a wrong prefix hides
            return -1

    first = {name.partition(".")[0] for name in clean}
    common = first.pop() + "." if len(first) == 1 else None
    changes: list[Callable[[str], str]] = [
        lambda name: name,
        lambda name: name.removeprefix("model."),
        lambda name: name.removeprefix("model.model."),
        lambda name: name if re.match(r"(lm_head|sleep_layers)\.", name) else f"model.{name}",
    ]
    if common is not None:
        changes.append(lambda name: name.removeprefix(common))
        changes.append(lambda name: name.removeprefix(common).removeprefix("model."))
    best, most = clean, -2
    for change in changes:
        names = {change(name): original for name, original in clean.items()}
        if len(names) < len(clean) or (found := hits(names)) <= most:
            continue
        best, most = names, found
        if most >= len(wanted):
            break
    return best


def _map(
    architecture: Architecture, config: dict, names: dict[str, str], tensors: Weights
) -> list[Target]:
    if architecture.sanitize is not None:
        return _map_all(architecture, config, names, tensors)
    targets: dict[str, Target] = {}
    for name, original in names.items():
        x = tensors[original]
        new, y = architecture.to_ours(name, x)
        if new in targets:
            twice = f"{targets[new].sources[0]} and {original}"
            raise UserError(f"two tensors of the checkpoint would become {new}: {twice}")
        targets[new] = Target(new, y, (original,), "as it is" if y is x else "reshaped")
    return list(targets.values())


def _map_all(
    architecture: Architecture, config: dict, names: dict[str, str], tensors: Weights
) -> list[Target]:
    """With a function of the whole dict, which is traced to see what depends on what."""
    sanitize = architecture.sanitize
    assert sanitize is not None
    made: dict[str, tuple[set[str], bool]] = {}
    known: dict[str, set[str]] = {}
    outputs: list[str] = []

    def traced(*arrays):
        result = sanitize(config, dict(zip(names, arrays, strict=True)))
        outputs[:] = list(result)
        return list(result.values())

    def listen(event: dict):
        kind = event["type"]
        if kind == "inputs":
            for (array, *_), original in zip(event["inputs"], names.values(), strict=True):
                known[array] = {original}
        elif kind == "outputs":
            ends[:] = [array for array, *_ in event["outputs"]]
        elif kind == "primitive":
            found = set().union(*(known.get(array, set()) for array, *_ in event["inputs"]))
            for array, *_ in event["outputs"]:
                known[array] = found
                computed.add(array)

    ends: list[str] = []
    computed: set[str] = set()
    mx.export_function(listen, traced, *(tensors[original] for original in names.values()))
    for name, array in zip(outputs, ends, strict=True):
        made[name] = known.get(array, set()), array in computed
    result = sanitize(config, {name: tensors[original] for name, original in names.items()})
    return [
        Target(name, x, tuple(sorted(made[name][0])), "computed" if made[name][1] else "as it is")
        for name, x in result.items()
    ]


def _check_tied(head: str, names: dict[str, str], tensors: Weights) -> None:
    x = tensors[names[head]]
    for name, original in names.items():
        y = tensors[original]
        if _EMBEDDING.fullmatch(name) and y.shape == x.shape:
            if not mx.array_equal(x, y).item():
                raise UserError(
                    f"{names[head]} differs from {original}, but the config ties them; set "
                    "tie_word_embeddings to false in its config.json"
                )
            return
    raise UserError(f"{names[head]} has no embedding of its shape to be tied to")


def _check(targets: list[Target], wanted: dict[str, mx.array], unused: Iterable[str] = ()) -> None:
    """TensorError that lists every tensor that is missing, unexpected or misshapen."""
    found = {target.name: target for target in targets}
    missing = [name for name in wanted if name not in found]
    spare = [name for name in found if name not in wanted]
    spare += [name for name in unused if name not in found]
    wrong = {}
    for name, x in wanted.items():
        y = found[name].array if name in found else x
        floats = mx.issubdtype(x.dtype, mx.floating), mx.issubdtype(y.dtype, mx.floating)
        if x.shape != y.shape:
            wrong[name] = f"{name} is {list(y.shape)}, not {list(x.shape)}"
        elif floats[0] != floats[1]:
            wrong[name] = f"{name} is of type {str(y.dtype).removeprefix('mlx.core.')}"
    if not (missing or spare or wrong):
        return
    details = [f"missing: {name}{_near(name, spare)}" for name in missing[:_LISTED]]
    details += [f"missing: {name}" for name in missing[_LISTED:]]
    details += [f"unexpected: {name}{_near(name, missing)}" for name in spare[:_LISTED]]
    details += [f"unexpected: {name}" for name in spare[_LISTED:]]
    details += [f"misshapen: {line}" for line in wrong.values()]
    counts = f"{len(missing)} missing, {len(spare)} unexpected, {len(wrong)} misshapen"
    raise TensorError(
        f"the checkpoint's tensors don't fit its config ({counts}): {abbreviate(details)}", details
    )


def _near(name: str, names: list[str]) -> str:
    close = nearest(name, names)
    return f" (nearest: {close})" if close else ""
