"""What is said around facts: openers, links between clauses, acknowledgements, small talk.

The texts are in glue.txt; the wordings that tell and ask are in language/.
"""

from __future__ import annotations

import re
from importlib.resources import files


def sections(file: str) -> dict[str, list[str]]:
    """A text file of this package as name -> entries: "[name]", then an entry a line."""
    found: dict[str, list[str]] = {}
    entries: list[str] = []
    for line in (files(__package__) / file).read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            entries = found[line.strip("[]")] = []
        elif line and not line.startswith("#"):
            entries.append(line)
    return found


_GLUE = sections("glue.txt")


def _before(name: str) -> tuple[str, ...]:
    """Entries that a clause follows."""
    return tuple(entry + " " for entry in _GLUE[name])


TELL_OPENERS = _before("openers.tell")
TELL_CLOSERS = tuple(_GLUE["closers.tell"])
# Plain ones are the commonest.
JOINTS = (" and ",) * 3 + tuple(
    entry + " " if entry[0] in ",;" else f" {entry} " for entry in _GLUE["joiners"]
)
BREAKS = (". ",) * 8 + _before("breaks")
# What may follow an opener such as "you should know that": a clause with a subject.
SUBJECTS = re.compile(
    r"(?i)(I|I'm|I've|I'd|I'll|my|our|we|we've|we're|the|it's|it|there's|there|he|she)\b"
)
# A clause that begins so needs no opener.
SELF_OPENED = re.compile(
    r"(?i)(btw|by the way|oh\b|so\b|did\b|do\b|hey|hi\b|guess|well\b|fun fact|fyi|just\b|also|"
    r"remember|please|can you|could you|note|actually|ok|okay|turns out|you know|never|no\b|yes|"
    r"update|listen|honestly|tbh|have I|is it|isn't|for the record|anyway|what|why|how|who|where|"
    r"when|if you|in case|quick|sorry|believe|funny|today|yesterday|right\b|still\b|finally)"
)
# Words that open a sentence in upper case and go on in lower case inside one.
STARTERS = frozenset(
    """My The We Our It It's Its This That There A An In On At For You Your Did Do Does Has Have
Had Was Were Is Are Guess Just Got So Oh Well And But If When Since After Before From To
Every Not No Been Turns Home Work New Last Next One Two Both All Some Most Nothing Everyone
Everybody Someone People Still Never Always Finally Today Yesterday Tomorrow She He They
Her His Their Would Could Should Can Will Actually Remember Please What Where Who How Why
Also""".split()
)

FIX_OPENERS = _before("openers.fix")
INSIST_OPENERS = _before("openers.insist")
FIX_SHORT = tuple(_GLUE["fix.short"])
ASK_OPENERS = _before("openers.ask")
ASK_CLOSERS = tuple(_GLUE["closers.ask"])
RECALL = tuple(_GLUE["recall"])

ACKS = ("Okay.", "Noted.", "Got it.") * 3 + tuple(_GLUE["acks"])
ECHO_ACKS = tuple(_GLUE["acks.echo"])
FIX_ACKS = tuple(_GLUE["acks.fix"])
FORGET = tuple(_GLUE["forget"])
FORGET_THAT = tuple(_GLUE["forget.that"])
FORGET_ACKS = tuple(_GLUE["acks.forget"])

NEVER_TOLD = "You have not told me that."
NEVER_TOLD_WHAT = "You have not told me {x}."

SMALL_TALK = tuple(tuple(line.split(" => ")) for line in _GLUE["smalltalk"])
