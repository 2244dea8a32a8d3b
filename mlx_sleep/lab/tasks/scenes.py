"""Scenes: what a user can tell and ask, read from the text files in language/.

A scene lists wordings that tell its slots, and questions with their answers. The format is
described in language/README.md. Whatever is wrong in a file is a UserError with file and line.
Knows nothing of lives, people or tokens.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ...utils.errors import UserError
from . import templates
from .pools import Pool, Pools, built_in
from .templates import PRONOUNS, Field, Parts

ABOUT = ("me", "person", "pet", "thing", "word", "none")
FOLDER = Path(__file__).with_name("language")
_HEADER = re.compile(r"\[([\w.\-']+)\]")
_LINE = re.compile(r"(\w+)(?: (\w+))?:(?:\s+(.*))?")
_ONCE = ("about", "weight", "slots", "group", "subjects")


def split_of(text: str) -> str:
    """The split that owns a wording: 85% train, 5% valid, 10% test, by a stable hash."""
    bucket = zlib.crc32(text.lower().encode()) % 20
    return "test" if bucket < 2 else "valid" if bucket == 2 else "train"


@dataclass(frozen=True)
class Wording:
    """One way to say something. slots: the scene's slots that it mentions with their true value.

    split: train, valid or test."""

    text: str
    parts: Parts
    slots: frozenset[str]
    split: str

    def mentions(self, name: str) -> bool:
        return any(isinstance(p, Field) and p.name == name for p in self.parts)

    @cached_property
    def others(self) -> frozenset[str]:
        """Slots that it mentions with another value, {v~}."""
        return frozenset(p.name for p in self.parts if isinstance(p, Field) and p.case == "~")


@dataclass(frozen=True)
class Question:
    """kind: ask, yes, no or q. slot: what it asks for; "" for the whole scene (q). answer: fixed
    (yes, no, q); None where the scene's `say` gives it."""

    kind: str
    slot: str
    wording: Wording
    answer: Parts | None = None


@dataclass
class Scene:
    """Something that a user can tell. slots: name -> pool, the main slot first. A scene without
    slots is a trait; scenes of one group exclude one another."""

    id: str
    where: str
    about: str = ""
    weight: float = 1.0
    slots: dict[str, str] = field(default_factory=dict)
    group: str = ""
    subjects: tuple[str, ...] = ()
    tells: list[Wording] = field(default_factory=list)
    fixes: dict[str, list[Wording]] = field(default_factory=dict)
    questions: list[Question] = field(default_factory=list)
    says: dict[str, list[Parts]] = field(default_factory=dict)
    whats: dict[str, Parts] = field(default_factory=dict)

    @property
    def main(self) -> str:
        """The slot that the others hang on; "" for a trait."""
        return next(iter(self.slots), "")

    def own(self, split: str) -> tuple[list[Wording], list[Question]]:
        """The tells and questions of one split."""
        return (
            [t for t in self.tells if t.split == split],
            [q for q in self.questions if q.wording.split == split],
        )


class Faults:
    """Collects what is wrong in the files."""

    def __init__(self):
        self.found: list[str] = []

    def add(self, where: str, message: str) -> None:
        self.found.append(f"{where}: {message}")

    def check(self) -> None:
        if self.found:
            more = len(self.found) - 1
            rest = f" (and {more} more: python -m mlx_sleep.lab.tasks.scenes)" if more else ""
            raise UserError(self.found[0] + rest)


def _lines(path: Path, faults: Faults) -> Iterable[tuple[str, str]]:
    """(file:line, text) of the lines that say something; comments are cut off."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        faults.add(str(path), f"cannot be read as text: {error}")
        return
    for number, line in enumerate(text.splitlines(), 1):
        where = f"{path.name}:{number}"
        if not line.isascii() or any(ord(c) < 32 and c != "\t" for c in line):
            faults.add(where, "only printable ASCII is allowed here")
            continue
        line = re.sub(r"(^|\s+)#(\s.*|$)", "", line).strip()
        if line:
            yield where, line


def read_pools(paths: Iterable[Path], faults: Faults) -> Pools:
    pools: dict[str, Pool] = {}
    for path in paths:
        pool = None
        for where, line in _lines(path, faults):
            header = _HEADER.fullmatch(line)
            if header:
                pool = Pool(header[1], where)
                if pool.name in pools or built_in(pool.name):
                    faults.add(where, f"there is a pool {pool.name} already")
                pools[pool.name] = pool
            elif pool is None:
                faults.add(where, "a pool begins with its name in brackets: [fruit]")
            elif line.startswith("compose:"):
                patterns = (p.strip() for p in line[len("compose:") :].split(" | "))
                pool.compose += [p for p in patterns if p]
            else:
                pool.values += [v for v in (v.strip() for v in line.split("|")) if v]
    found = Pools(pools)
    for pool in pools.values():
        for part in sorted(pool.parts()):
            if part not in found:
                faults.add(pool.where, f"pool {pool.name} is composed of an unknown pool {part}")
        if not pool.values and not pool.compose:
            faults.add(pool.where, f"pool {pool.name} is empty")
        for value in pool.values:
            if re.search(r"[{}\[\]]|: ", value):
                faults.add(pool.where, f"pool {pool.name} has a strange value: {value}")
            elif re.search(r"\b(my|our)\b(?! (friend|lord|lady|stars))", value):
                # The assistant says values as they are, and "my desk" is not its own.
                faults.add(pool.where, f"pool {pool.name} has a value with my or our: {value}")
    return found


class _Reader:
    """Reads the lines of one scene."""

    def __init__(self, scene: Scene, faults: Faults):
        self.scene, self.faults = scene, faults
        self.seen: set[str] = set()
        self.waiting: list[tuple[str, str, str, str]] = []

    def line(self, where: str, text: str) -> None:
        match = _LINE.fullmatch(text)
        if not match:
            self.faults.add(where, f"not understood: {text[:60]}")
            return
        key, slot, rest = match[1], match[2] or "", (match[3] or "").strip()
        if not rest:
            self.faults.add(where, f"nothing after {key}:")
        elif key in _ONCE and not slot:
            if key in self.seen:
                self.faults.add(where, f"{key} is here for the second time")
            self.seen.add(key)
            self.header(where, key, rest)
        else:
            self.waiting.append((where, key, slot, rest))

    def header(self, where: str, key: str, rest: str) -> None:
        scene, add = self.scene, self.faults.add
        if key == "about":
            scene.about = rest
            if rest not in ABOUT:
                add(where, f"about is one of {', '.join(ABOUT)}")
        elif key == "weight":
            try:
                scene.weight = float(rest)
            except ValueError:
                scene.weight = -1.0
            if not 0 < scene.weight < 1000:
                add(where, "weight is a number above 0")
        elif key == "group":
            scene.group = rest
        elif key == "subjects":
            scene.subjects = tuple(s for s in (s.strip() for s in rest.split("|")) if s)
        else:
            for item in rest.split(","):
                name, _, pool = (s.strip() for s in item.partition("="))
                if not re.fullmatch(r"[a-z]\w*", name) or not pool:
                    add(where, f"slots are written name=pool, not {item.strip()}")
                elif name in ("s", "w", *PRONOUNS) or name in scene.slots:
                    add(where, f"{name} cannot be the name of a slot here")
                else:
                    scene.slots[name] = pool

    def parts(self, where: str, text: str) -> Parts | None:
        scene = self.scene
        names = set(scene.slots)
        if scene.about in ("person", "pet", "thing"):
            names |= {"s", *PRONOUNS}
        if scene.about == "word":
            names.add("w")
        try:
            return templates.parse(text, names)
        except ValueError as error:
            self.faults.add(where, str(error))
            return None

    def wording(self, where: str, text: str) -> Wording | None:
        parts = self.parts(where, text)
        if parts is None:
            return None
        fields = [p for p in parts if isinstance(p, Field)]
        slots = frozenset(f.name for f in fields if f.name in self.scene.slots and f.case != "~")
        subject = {"word": "w", "me": "", "none": ""}.get(self.scene.about, "s")
        named = {f.name for f in fields}
        if subject and subject not in named and not (subject == "w" and slots):
            self.faults.add(where, f"whom or what is it about? {{{subject}}} is missing")
        return Wording(text, parts, slots, split_of(text))

    def body(self, where: str, key: str, slot: str, rest: str) -> None:
        scene, add = self.scene, self.faults.add
        if slot and slot not in scene.slots:
            add(where, f"the scene has no slot {slot}")
            return
        if key in ("ask", "say", "fix", "yes", "no") and not slot:
            add(where, f"{key} needs the name of a slot: {key} v: ...")
            return
        if key in ("tell", "q") and slot:
            add(where, f"{key} takes no slot")
            return
        if key == "tell":
            wording = self.wording(where, rest)
            if wording:
                scene.tells.append(wording)
        elif key == "fix":
            wording = self.wording(where, rest)
            if wording and slot not in wording.slots:
                add(where, f"a fix of {slot} says its new value, {{{slot}}}")
            elif wording:
                scene.fixes.setdefault(slot, []).append(wording)
        elif key == "ask":
            wording = self.wording(where, rest)
            if wording and slot in wording.slots:
                add(where, f"the question gives its answer {{{slot}}} away")
            elif wording:
                scene.questions.append(Question("ask", slot, wording))
        elif key in ("yes", "no", "q"):
            self.pair(where, key, slot, rest)
        elif key == "say":
            parts = self.parts(where, rest)
            if parts and not any(isinstance(p, Field) and p.name == slot for p in parts):
                add(where, f"the answer does not hold {{{slot}}}")
            elif parts:
                scene.says.setdefault(slot, []).append(parts)
        elif key == "what":
            parts = self.parts(where, rest)
            if parts and any(isinstance(p, Field) and p.name in scene.slots for p in parts):
                add(where, "this clause stands for what is not known; it names no slot")
            elif parts:
                scene.whats[slot] = parts
        else:
            add(where, f"unknown key {key}")

    def pair(self, where: str, key: str, slot: str, rest: str) -> None:
        question, arrow, answer = (s.strip() for s in rest.partition("=>"))
        if not arrow or not question or not answer:
            self.faults.add(where, f"{key} is written QUESTION => ANSWER")
            return
        wording, parts = self.wording(where, question), self.parts(where, answer)
        if wording is None or parts is None:
            return
        if key == "no" and not wording.others:
            self.faults.add(where, f"a `no` question asks for another value: {{{slot}~}}")
        elif key == "yes" and slot not in wording.slots:
            self.faults.add(where, f"a `yes` question holds the true value: {{{slot}}}")
        else:
            self.scene.questions.append(Question(key, slot, wording, parts))

    def close(self, pools: Pools) -> None:
        scene, add = self.scene, self.faults.add
        if not scene.about:
            add(scene.where, f"[{scene.id}] has no `about`")
        for item in self.waiting:
            self.body(*item)
        if not scene.tells:
            add(scene.where, f"[{scene.id}] has no `tell`")
        if scene.about == "thing" and not scene.subjects:
            add(scene.where, f"[{scene.id}] is about a thing and needs `subjects`")
        for slot, pool in scene.slots.items():
            if pool not in pools:
                add(scene.where, f"[{scene.id}] slot {slot}: unknown pool {pool}")
            if not any(q.kind == "ask" and q.slot == slot for q in scene.questions):
                add(scene.where, f"[{scene.id}] has no `ask {slot}`")
            if slot not in scene.says:
                add(scene.where, f"[{scene.id}] has no `say {slot}`")
            if not any(slot in t.slots for t in scene.tells):
                add(scene.where, f"[{scene.id}] never tells {slot}")
        if not scene.slots and not scene.questions:
            add(scene.where, f"[{scene.id}] has neither slots nor questions")


def read_scenes(paths: Iterable[Path], pools: Pools, faults: Faults) -> dict[str, Scene]:
    scenes: dict[str, Scene] = {}
    for path in paths:
        reader = None
        for where, line in _lines(path, faults):
            header = _HEADER.fullmatch(line)
            if header:
                if reader:
                    reader.close(pools)
                reader = _Reader(Scene(header[1], where), faults)
                if header[1] in scenes:
                    faults.add(where, f"there is a scene {header[1]} already")
                scenes[header[1]] = reader.scene
            elif reader is None:
                faults.add(where, "a scene begins with its name in brackets: [me.lives_in]")
            else:
                reader.line(where, line)
        if reader:
            reader.close(pools)
    return scenes


def read(folder: Path, faults: Faults) -> tuple[dict[str, Scene], Pools]:
    """All scenes and pools of a folder: pools*.txt hold pools, other .txt files scenes."""
    paths = sorted(folder.glob("*.txt"))
    if not paths:
        faults.add(str(folder), "no .txt files here")
    pools = read_pools([p for p in paths if p.name.startswith("pools")], faults)
    return read_scenes([p for p in paths if not p.name.startswith("pools")], pools, faults), pools


def load(folder: Path = FOLDER) -> tuple[dict[str, Scene], Pools]:
    """Scenes by id, and the pools. UserError names the first fault by file and line."""
    faults = Faults()
    found = read(Path(folder), faults)
    faults.check()
    return found


if __name__ == "__main__":
    import sys

    all_faults = Faults()
    scenes, _ = read(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER, all_faults)
    print("\n".join(all_faults.found) or f"{len(scenes)} scenes, no fault")
    sys.exit(bool(all_faults.found))
