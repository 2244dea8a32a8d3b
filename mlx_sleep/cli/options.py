"""Options that several commands share, each defined once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer

from ..thoughts import Thinking
from ..utils.errors import UserError
from .model_names import Chosen, choose

if TYPE_CHECKING:  # it imports MLX
    from ..session import Session


class Numbers(tuple[int, ...]):
    """Whole numbers of an option, typed as 1,2,4."""


def numbers(
    option: str, *, least: int = 1, example: str = "1,2,4"
) -> Callable[[str | Numbers], Numbers]:
    """A parser of "1,2,4" for typer. Its UserError names the option."""

    def parse(value: str | Numbers) -> Numbers:
        if isinstance(value, Numbers):  # the default
            return value
        try:
            found = Numbers(int(part) for part in value.split(","))
        except ValueError:
            found = Numbers()
        if not found or min(found) < least:
            bound = f" >= {least}" if least > 0 else ""
            raise UserError(
                f"{option} takes whole numbers{bound} with commas, as in {example}; not {value!r}"
            )
        return found

    return parse


def folder_for(option: str) -> Callable[[str | Path], Path]:
    """A parser of a path for typer. Its UserError, for an empty one, names the option: a Path of ""
    is the current folder."""

    def parse(value: str | Path) -> Path:
        if not str(value).strip():
            raise UserError(f"{option} is empty; give the path of a folder")
        return Path(value)

    return parse


def names(text: str | None) -> list[str] | None:
    """ "a,b" as a list; None for an option that was not given."""
    return text.split(",") if text else None


Model = Annotated[
    str | None,
    typer.Option(
        help="A model's folder, its id on Hugging Face, smollm2 or embedded. "
        "(default: smollm2 if fetched, else embedded)",
        envvar="MLX_SLEEP_MODEL",
        show_envvar=False,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(help="Of an id on Hugging Face: a branch, a tag or a commit. (default: newest)"),
]
LocalFilesOnly = Annotated[
    bool,
    typer.Option("--local-files-only", help="Of an id: take what is in the cache, ask nobody."),
]
AdapterPath = Annotated[
    str | None, typer.Option(help="The folder of an adapter: sleep layers trained in the model.")
]
MemoryName = Annotated[
    str | None,
    typer.Option(
        "--memory",
        help="The memory's name. (default: the model's short name; default for embedded)",
        envvar="MLX_SLEEP_MEMORY",
        show_envvar=False,
    ),
]
Home = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the memories. (default: $MLX_SLEEP_HOME, else the user's data folder)"
    ),
]
Passes = Annotated[int | None, typer.Option(help="Passes of a sleep. (default: the model's)")]
Window = Annotated[
    int | None, typer.Option(help="Tokens that fit before it must sleep. (default: the model's)")
]
SleepOnBattery = Annotated[
    bool, typer.Option("--sleep-on-battery", help="Sleep when idle on battery too.")
]
PassesToTry = Annotated[
    Numbers,
    typer.Option(
        "--passes", parser=numbers("--passes"), metavar="N,...", help="Passes to try, with commas."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object and nothing else.")]


@dataclass
class SessionOptions:
    """What `chat` and `generate` open a session with. A field is an option."""

    model: Model = None
    adapter_path: AdapterPath = None
    revision: Revision = None
    local_files_only: LocalFilesOnly = False
    home: Home = None
    passes: Passes = None
    window: Window = None
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-m", help="Longest reply, in tokens.")
    ] = 256
    temp: Annotated[
        float | None,
        typer.Option(
            help="Sampling temperature; 0 takes the likeliest token. (default: the model's)"
        ),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(help="Sample from the likeliest tokens of this mass. (default: the model's)"),
    ] = None
    top_k: Annotated[
        int | None,
        typer.Option(help="Sample from so many of the likeliest; 0 is all. (default: the model's)"),
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(help="Least probability, relative to the likeliest. (default: the model's)"),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        typer.Option(help="Of the last 20 tokens; 1 is none. (default: the model's)"),
    ] = None
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None
    system_prompt: Annotated[
        str | None,
        typer.Option(
            help="What each window begins with, by the model's chat template; the memory keeps it, "
            'and "" takes it away. A new one holds after the next sleep.'
        ),
    ] = None
    thinking: Annotated[
        str,
        typer.Option(
            help="on, off, or auto: as in its training to sleep, else as its template has it."
        ),
    ] = "auto"
    keep_thoughts: Annotated[
        bool,
        typer.Option("--keep-thoughts", help="Remember what the model thinks before a reply, too."),
    ] = False
    no_transcript: Annotated[
        bool,
        typer.Option(
            "--no-transcript",
            help="Don't keep what is said as text beside the memory. It then can't be rebuilt.",
        ),
    ] = False

    @cached_property
    def chosen(self) -> Chosen:
        """The model that they mean."""
        return choose(self.model, self.adapter_path, self.revision, self.local_files_only)

    def open(self, memory: str | None) -> Session:
        """A session on a memory by its name; None remembers nothing."""
        from ..session import Session

        if self.thinking not in get_args(Thinking):
            raise UserError(f"--thinking takes on, off or auto, not {self.thinking!r}")
        others = asdict(self)
        for name in ("model", "adapter_path", "revision", "local_files_only"):
            del others[name]
        others["transcript"] = not others.pop("no_transcript")
        opened = self.chosen.open()
        return Session.open(opened, memory, adapter=self.chosen.adapter, **others)


def with_session_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command for typer: its parameter `options` becomes an option for each field."""
    names = [field.name for field in fields(SessionOptions)]

    def run(**values: Any) -> None:
        options = SessionOptions(**{name: values.pop(name) for name in names})
        command(options=options, **values)

    # Not get_type_hints: in Python 3.10 it wraps what defaults to None in an Optional, where typer
    # does not find an Annotated's Option.
    signature = inspect.signature(command, eval_str=True)
    own = [parameter for name, parameter in signature.parameters.items() if name != "options"]
    hints = get_type_hints(SessionOptions, include_extras=True)
    shared = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=hints[field.name],
        )
        for field in fields(SessionOptions)
    ]
    run.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]  # a function may have one
    run.__annotations__ = {p.name: p.annotation for p in (*own, *shared)}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run
