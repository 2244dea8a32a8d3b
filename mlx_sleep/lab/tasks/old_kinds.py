"""The kinds of facts of phrases.py as scenes, so that what the task `memory` tells is in the lives
too. The names of beings are scenes of their own (language/names.txt)."""

from __future__ import annotations

import re
from collections.abc import Iterator

from . import templates
from .facts import _PLURALS
from .phrases import KINDS, Kind
from .scenes import Question, Scene, Wording, split_of
from .templates import Field

_OBJECT = re.compile(r"\b(of|for|feed|take) \{s\}")
_ABOUT = {"user": "me", "thinglink": "me", "verb": "word", "adjective": "word"}


def _wording(scene: Scene, template: str, text: str) -> Wording:
    """Filled with its topic, but split by its template: in one split for all topics."""
    names = {*scene.slots, "s", "w", *templates.PRONOUNS}
    parts = templates.parse(text, names)
    slots = frozenset(p.name for p in parts if isinstance(p, Field) and p.name in scene.slots)
    return Wording(text, parts, slots, split_of(template))


def _translate(text: str, kind: Kind, topic: str) -> str:
    thing = "my " + topic
    if kind.subject == "thinglink":
        text = (
            text.replace("{s}", thing).replace("{p}", thing + "'s").replace("{Y}", "Your " + topic)
        )
    be = "are" if topic in _PLURALS else "is"
    text = text.replace("{be}", be).replace("{t}", topic).replace("{av}", "{a v}")
    if kind.subject in ("word", "verb", "adjective"):
        return text.replace("{at}", "{a w}").replace("{At}", "{A w}").replace("{s}", "{w}")
    text = _OBJECT.sub(r"\1 {s.o}", text)  # "what do I feed her?"
    return text.replace("{p}", "{s's}").replace("{Y}", "{S}")


def old_kinds() -> dict[str, Scene]:
    """Scenes by id; a kind with topics makes one scene for each."""
    return {scene.id: scene for kind in KINDS for scene in _scenes(kind)}


def _scenes(kind: Kind) -> Iterator[Scene]:
    if kind.subject in ("kin", "petlink"):
        return
    for topic in kind.topics or ("",):
        name = re.sub(r"\W+", "_", f"{kind.attr}_{topic}" if topic else kind.attr)
        if kind.link and kind.subject == "word":
            name = "meaning"
        scene = Scene(f"old.{kind.subject}.{kind.pool}.{name}", "phrases.py")
        scene.about = _ABOUT.get(kind.subject, kind.subject)
        scene.weight = 0.5 * kind.weight / len(kind.topics or ("",))
        scene.slots = {"v": kind.pool}
        scene.tells = [_wording(scene, t, _translate(t, kind, topic)) for t in kind.tells]
        scene.fixes = {"v": [_wording(scene, t, _translate(t, kind, topic)) for t in kind.changes]}
        asks = [_wording(scene, t, _translate(t, kind, topic)) for t in kind.asks]
        scene.questions = [Question("ask", "v", wording) for wording in asks]
        scene.says = {"v": [_wording(scene, kind.reply, _translate(kind.reply, kind, topic)).parts]}
        what = _translate(kind.phrase, kind, topic)
        what = re.sub(r"\bmy\b", "your", re.sub(r"\bI am\b", "you are", what))
        what = re.sub(r"\bI\b", "you", what)
        scene.whats = {"v": templates.parse(what, {"s", "w"})}
        yield scene
