"""Conversations of the task `memory`: questions, and what is said in which window.

Keeps the truth, so that every question is answered from what has been told before it. Knows how
many tokens a turn takes, and no model.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from . import phrases, words
from .dialogue import Conversation, Example, Level, Question, Turn, TurnEncoder
from .facts import (
    BY_SUBJECT,
    LINKS,
    PERSON_LIKE,
    WEIGHTS,
    Fact,
    World,
    canonical,
    fill,
    reply_parts,
    upper_first,
)
from .messages import Draft, Teller, noisy
from .phrases import KINDS, NEVER_TOLD, Kind

MID_TURN = 0.1  # share of window boundaries that fall inside a turn, as in a live session
ASKING = 0.15  # share of conversations with questions in their consolidation windows
LATE = 0.2  # share of conversations whose last fact or correction is told in the final window


class Writer:
    """Writes one conversation: call `conversation` or `example`, once."""

    def __init__(self, encoder: TurnEncoder, split: str, level: Level, rng: Random):
        self.encoder, self.split, self.level, self.rng = encoder, split, level, rng
        self.teller = Teller(split, level, rng)
        self.world = World()  # what has been placed so far

    # --- what is told ---

    def drafts(self) -> list[Draft]:
        """The messages that tell this conversation's facts and corrections, in order."""
        return [self.measure(draft) for draft in self.teller.drafts()]

    def talk(self) -> Draft:
        return self.measure(self.teller.talk())

    def measure(self, draft: Draft) -> Draft:
        draft.tokens = [self.encoder.turn_tokens(t) for t in draft.turns]
        return draft

    # --- questions ---

    def question(self, kind: Kind, subject: str, topic: str) -> Question:
        """The question in some phrasing, answered from the world as it is now."""
        rng = self.rng
        found = self.world.resolve(subject, kind, topic)
        if rng.random() < 0.15:
            template = rng.choice(phrases.RECALL)
            text = template.format(x=fill(kind.phrase, subject, topic))
            # "I forgot where I live" and "tell me my name" end with a full stop.
            mark = "?" if template.split()[0] in ("do", "can", "what", "could") else "."
        else:
            text, mark = fill(rng.choice(kind.asks), subject, topic), "?"
            if rng.random() < 0.12:
                text = rng.choice(phrases.ASK_OPENERS) + text
        names = [] if subject == "user" or subject.startswith("my ") else [subject]
        text, lowered = noisy(rng, self.level.noise, upper_first(text) + mark, names)
        if found is None:
            return Question("never_told", text, NEVER_TOLD, "", 0, False)
        fact, hops = found
        head, value = reply_parts(kind, subject.lower() if lowered else subject, topic, fact.value)
        known = "corrected" if fact.key in self.world.corrected else "known"
        case = "two_hop" if hops == 2 else known
        return Question(case, text, f"{head} {value}.", value, hops, True)

    def about(self, fact: Fact) -> tuple[Kind, str, str]:
        """What to ask for `fact`; by the relation of its subject, which takes two hops, if any."""
        owner = self.world.owners.get(canonical(fact.subject))
        if owner and self.level.two_hop and self.rng.random() < 0.65:
            return fact.kind, owner, fact.topic
        return fact.kind, fact.subject, fact.topic

    def unknown(self) -> tuple[Kind, str, str] | None:
        """Something never told: near to what was told in 4 of 5 cases."""
        rng = self.rng
        facts = list(self.world.facts.values())
        for _ in range(20):
            r = rng.random()
            if facts and r < 0.5:  # the same attribute of another subject
                kind = rng.choice(facts).kind
                if rng.random() < 0.2:
                    twins = [k for k in KINDS if k.attr == kind.attr and k.subject != kind.subject]
                    kind = rng.choice(twins) if twins else kind
                topic = rng.choice(kind.topics) if kind.topics else ""
                subject = self.other_subject(kind, topic)
            elif facts and r < 0.8:  # another attribute of the same subject
                fact = rng.choice(facts)
                subject, topic = fact.subject, ""
                group = self.teller.people.get(subject, fact.kind.subject)
                options = [k for k in BY_SUBJECT.get(group, ()) if not k.topics]
                if not options:
                    continue
                kind = rng.choice(options)
                if kind.subject in ("verb", "adjective"):
                    continue
            else:
                kind = rng.choices(KINDS, WEIGHTS)[0]
                topic = rng.choice(kind.topics) if kind.topics else ""
                subject = self.other_subject(kind, topic)
            near = set().union(*(n for n in phrases.NEAR if subject in n)) - {subject}
            if near & {f.subject for f in facts}:
                continue
            if self.world.resolve(subject, kind, topic) is None:
                return kind, subject, topic
        return None

    def other_subject(self, kind: Kind, topic: str) -> str:
        rng = self.rng
        if kind.subject == "user":
            return "user"
        if kind.subject in ("kin", "petlink", "thinglink"):
            return "my " + topic
        if kind.subject in ("verb", "adjective"):
            return words.made_up(rng, self.split)
        known = [
            f.subject
            for f in self.world.facts.values()
            if self.teller.people.get(f.subject) == kind.subject
        ]
        if known and rng.random() < 0.6:
            return rng.choice(known)
        if kind.subject == "word":
            return words.made_up(rng, self.split)
        if rng.random() < 0.7:
            return "my " + rng.choice(LINKS[PERSON_LIKE[kind.subject]].topics)
        return words.value(rng, "name", self.split)

    def ask(self, kind: Kind, subject: str, topic: str) -> Draft:
        question = self.question(kind, subject, topic)
        turn = Turn(question.text, question.reply, "ask", question)
        return self.measure(Draft([turn], [()]))

    # --- windows ---

    def place(self, draft: Draft, turns: list[Turn], tokens: list[list[int]]) -> int:
        """Adds the draft to a window, tells the world, and returns its tokens' number."""
        turns += draft.turns
        tokens += draft.tokens
        for facts in draft.facts:
            for fact in facts:
                self.world.tell(fact)
        return draft.size

    def conversation(self) -> Conversation:
        rng, level = self.rng, self.level
        drafts = self.drafts()
        late = []
        if not level.windows:
            drafts, late = [], drafts
        elif len(drafts) > 1 and rng.random() < LATE:
            late = [drafts.pop()]
        windows, chunks = self.told(drafts)
        turns, tokens = self.final_window(late)
        windows.append(turns)
        final, weights, values = [], [], []
        for turn, ids in zip(turns, tokens, strict=True):
            w, v = self.encoder.marks(turn, ids)
            final += ids
            weights += w
            values += v
        return Conversation(windows, chunks, final, weights, values)

    def told(self, drafts: list[Draft]) -> tuple[list[list[Turn]], list[list[int]]]:
        """The consolidation windows: their turns and their token ids."""
        windows, chunks = [], []
        for turns, tokens in self.consolidation_windows(drafts):
            windows.append(turns)
            chunks.append([i for ids in tokens for i in ids])
        self.cut_turns(windows, chunks)
        return windows, chunks

    def asks_only(self, number: int) -> bool:
        chance = self.level.asking
        return number > 0 and chance > 0 and self.rng.random() < chance

    def asking_window(self) -> tuple[list[Turn], list[list[int]]]:
        """A window of questions on what was told, in random order, as many as fit; some on what was
        never told, and small talk. Returns its turns and their tokens."""
        rng, level = self.rng, self.level
        turns: list[Turn] = []
        tokens: list[list[int]] = []
        used = 0
        facts = list(self.world.facts.values())
        for fact in rng.sample(facts, len(facts)):
            drafts = [self.ask(*self.about(fact))]
            if rng.random() < level.unknown and (choice := self.unknown()):
                drafts.insert(0, self.ask(*choice))
            if rng.random() < level.small_talk:
                drafts.insert(0, self.talk())
            if used + sum(d.size for d in drafts) > level.window_tokens:
                break
            for draft in drafts:
                used += self.place(draft, turns, tokens)
        if not turns:
            self.place(self.talk(), turns, tokens)
        return turns, tokens

    def consolidation_windows(
        self, drafts: list[Draft]
    ) -> Iterator[tuple[list[Turn], list[list[int]]]]:
        """Spreads the drafts over the windows that tell by their capacities and yields each
        window's (turns, their tokens). What does not fit in the end stays untold."""
        rng, level = self.rng, self.level
        total = sum(d.size for d in drafts)
        telling = [w for w in range(level.windows) if not self.asks_only(w)]
        caps = {w: int(level.window_tokens * rng.uniform(0.4, 1.0)) for w in telling}
        room = sum(caps.values())
        if total > 0.9 * room:
            caps = dict.fromkeys(telling, level.window_tokens)
            room = sum(caps.values())
        asking = rng.random() < ASKING
        queue: list[Draft] = []
        ahead, seen, end = list(drafts), 0, 0
        for number in range(level.windows):
            if number not in caps:
                yield self.asking_window()
                continue
            cap = caps[number]
            end += cap
            last = number == telling[-1]
            while ahead and (last or seen + ahead[0].size / 2 <= total * end / room):
                seen += ahead[0].size
                queue.append(ahead.pop(0))
            turns: list[Turn] = []
            tokens: list[list[int]] = []
            used = 0
            waiting: list[Draft] = []
            for draft in queue:
                limit = level.window_tokens if last or not turns else cap
                if draft.size > level.window_tokens or self.orphan(draft):
                    continue
                if waiting or used + draft.size > limit:
                    waiting.append(draft)  # and all after it: their order matters
                    continue
                extra = None
                if rng.random() < level.small_talk:
                    extra = self.talk()
                elif asking and self.world.facts and rng.random() < 0.3:
                    extra = self.ask(*self.about(rng.choice(list(self.world.facts.values()))))
                if extra and used + extra.size + draft.size <= cap and total < 0.8 * room:
                    used += self.place(extra, turns, tokens)
                used += self.place(draft, turns, tokens)
            queue = waiting
            while not turns or rng.random() < level.small_talk:
                extra = self.talk()
                if turns and used + extra.size > cap:
                    break
                used += self.place(extra, turns, tokens)
            yield turns, tokens

    def orphan(self, draft: Draft) -> bool:
        """Whether `draft` corrects a fact that was never placed."""
        return draft.needs is not None and draft.needs not in self.world.facts

    def cut_turns(self, windows: list[list[Turn]], chunks: list[list[int]]) -> None:
        """Moves the head of a window's first turn to the end of the window before, now and then."""
        level, rng = self.level, self.rng
        for i in range(len(chunks) - 1):
            if rng.random() >= MID_TURN or len(windows[i + 1]) < 2:
                continue
            length = chunks[i + 1].index(self.encoder.end)  # of the first turn, less its <|end|>
            room = min(length, level.window_tokens - len(chunks[i]))
            if room > 0:
                cut = rng.randint(1, room)
                chunks[i] += chunks[i + 1][:cut]
                chunks[i + 1] = chunks[i + 1][cut:]
                windows[i].append(windows[i + 1].pop(0))

    def final_window(self, pending: list[Draft]) -> tuple[list[Turn], list[list[int]]]:
        """Fills the final window with questions, one for each fact, between them those of the
        pending drafts that fit. Returns its turns and their tokens."""
        rng, level = self.rng, self.level
        turns: list[Turn] = []
        tokens: list[list[int]] = []
        asked: set[tuple[str, str, str]] = set()
        used, unknowns, misses = 0, 0, 0
        tell_rate = 0.4 if level.windows else 0.75
        while misses < 3:
            left = [f for key, f in self.world.facts.items() if key not in asked]
            if pending and (not self.world.facts or rng.random() < tell_rate):
                draft = pending.pop(0)
                if self.orphan(draft) or used + draft.size > 0.6 * level.final_tokens:
                    continue
                asked -= {fact.key for facts in draft.facts for fact in facts}
                used += self.place(draft, turns, tokens)
                continue
            fact = None
            # Their share stays level.unknown even where few facts are left to ask for.
            enough = unknowns * (1 - level.unknown) > level.unknown * len(asked)
            if rng.random() < 0.25 * level.small_talk:
                draft = self.talk()
            elif left and (enough or rng.random() >= level.unknown):
                fact = rng.choice(left)
                draft = self.ask(*self.about(fact))
            elif level.unknown and not enough and (choice := self.unknown()):
                draft = self.ask(*choice)
            elif pending:
                continue
            else:
                break
            if used + draft.size > level.final_tokens:
                misses += 1
                continue
            used += self.place(draft, turns, tokens)
            if fact:
                asked.add(fact.key)
            elif draft.turns[0].asks:
                unknowns += 1
        return turns, tokens

    def example(self, case: str) -> Example | None:
        """The evaluation item of this conversation; None where a fact found no room, or where it
        holds nothing that `case` could ask for."""
        rng = self.rng
        turns, chunks = self.told(self.drafts())
        if self.world.facts.keys() != self.teller.planned.keys():
            return None
        if case == "never_told":
            choice = self.unknown()
            if choice is None:
                return None
            question = self.question(*choice)
        else:
            together = {frozenset(f[:3] for f in t.facts) for window in turns for t in window}
            queries = []
            for key, fact in self.world.facts.items():
                if case == "corrected" and key not in self.world.corrected:
                    continue
                subject = fact.subject
                if case == "two_hop":
                    owner = self.world.owners.get(canonical(subject))
                    # Both facts in one sentence would be one hop.
                    if owner is None or any(
                        {key, (canonical(owner), "name", "")} <= both for both in together
                    ):
                        continue
                    subject = owner
                queries.append((fact.kind, subject, fact.topic))
            if not queries:
                return None
            question = self.question(*rng.choice(queries))
        prompt = self.encoder.prompt_tokens(question.text)
        if case != "same_window":
            return Example(case, chunks, [], prompt, question)
        if len(chunks[0]) + len(prompt) > self.level.window_tokens:
            return None
        return Example(case, [], chunks[0], prompt, question)
