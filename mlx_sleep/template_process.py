"""The process that renders chat templates, a script that `templates.py` starts: JSON lines in and
out.

A template is a program by whoever made the model. jinja2's sandbox keeps it from the machine, but
not from running for ever or filling the memory; here the system bounds both. The environment is the
one that transformers documents for chat templates. Nothing of mlx-sleep is imported.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import resource
import select
import sys

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

IDLE = 10  # seconds after which the process ends by itself
SECONDS = 5  # of the processor for a rendering
BYTES = 1 << 30
CHARACTERS = 1 << 20  # of what comes out, and of what `*` and `%` may make


class Environment(ImmutableSandboxedEnvironment):
    """A sandbox whose operators and methods can't make a text of gigabytes in one step.

    The limit on memory sees to the rest, but macOS doesn't keep it.
    """

    intercepted_binops = frozenset(("*", "**", "%"))

    def call_binop(self, context, operator, left, right):
        if operator == "**" and _is_large(right, 64):
            raise jinja2.TemplateError("a power that is too large")
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, str | list | tuple) and _is_large(times, CHARACTERS):
                    raise jinja2.TemplateError("a text that is too long")
                if isinstance(many, str | list | tuple) and isinstance(times, int):
                    if len(many) * times > CHARACTERS:
                        raise jinja2.TemplateError("a text that is too long")
        if operator == "%" and isinstance(left, str) and len(left) > 1000:
            raise jinja2.TemplateError("a format that is too long")
        return super().call_binop(context, operator, left, right)

    def call(self, context, function, /, *args, **kwargs):
        if any(_is_large(x, CHARACTERS) for x in (*args, *kwargs.values())):
            raise jinja2.TemplateError("a number that is too large")
        return super().call(context, function, *args, **kwargs)


def _is_large(value, most: int) -> bool:
    return isinstance(value, int) and abs(value) > most


class Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, which marks replies in training: its body."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> Environment:
    """As transformers makes it."""
    made = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # Unlike jinja2's, without HTML's escapes.
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return made


def answer(request: dict, made: Environment) -> dict:
    """{"text": ...}, or {"error": ...} in one line."""
    try:
        parts, size = [], 0
        for part in made.from_string(request["template"]).generate(request["variables"]):
            parts.append(part)
            size += len(part)
            if size > CHARACTERS:
                raise jinja2.TemplateError(f"more than {CHARACTERS:,} characters come out")
        return {"text": "".join(parts)}
    except Exception as error:  # whatever a template sets off
        return {"error": " ".join(str(error).split())[:200] or type(error).__name__}


def main() -> None:
    for limit, value in (
        (resource.RLIMIT_AS, BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(OSError, ValueError):  # a system that has no such limit
            resource.setrlimit(limit, (value, value))
    made = environment()
    print("ready", flush=True)
    while select.select([sys.stdin], [], [], IDLE)[0] and (line := sys.stdin.readline()):
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime) + SECONDS + 1
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
        print(json.dumps(answer(json.loads(line), made)), flush=True)


if __name__ == "__main__":
    main()
