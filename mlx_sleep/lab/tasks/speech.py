"""What is said around facts: openers, links between clauses, acknowledgements, small talk.

Said in every split alike; the wordings that tell and ask are in language/.
"""

from __future__ import annotations

import re


def _lines(text: str) -> tuple[str, ...]:
    """Items separated by "|"; "_" at an end stands for a space."""
    items = (item.strip() for item in text.replace("\n", " ").split("|"))
    return tuple(re.sub("^_|_$", " ", item) for item in items if item)


# Before what is told. The clause goes on in lower case.
TELL_OPENERS = _lines("""by the way,_|btw,_|just so you know,_|remember that_|please remember:_|
oh,_|well,_|so,_|I should mention that_|you should know that_|please note:_|also,_|hey,_|
don't forget:_|hi,_|fyi,_|fun fact:_|one thing about me:_|note to self:_|for the record,_|
okay so_|hello!_|good morning!_|hi again,_|anyway,_|before I forget,_|something else:_|
I guess I never said it, but_|quick update:_|keep this in mind:_|can you remember this:_|
a bit of background:_|you may want to know that_|to be honest,_|turns out_|listen,_|
it's maybe not important, but_|I meant to tell you,_|while I think of it,_|right,_|
good evening,_|ok,_|for what it's worth,_|here's something:_|save this please:_""")
TELL_CLOSERS = _lines(""", remember that|, just so you know|, in case it matters|, by the way|
, haha|, lol|. Please remember that|. Just saying|. Anyway|. Keep that in mind|. Don't forget|
, if that helps|, ok?|. That's all for now|, you know|. So now you know|, for your notes|
. Thanks|. Cheers|. Remember it please|, I think I never mentioned it|. Long story""")
# Between two clauses of one message; the second part goes on in lower case.
JOINTS = _lines("""_and_|_and_|_and_|, and_|, and_|,_|;_|_and also_|, plus_|, oh and_|_- and_|
, and by the way_|, then_""")
# Between two sentences of one message.
BREAKS = _lines("""._|._|._|._|._|. Also,_|. Oh, and_|. And_|. Also_|. Besides,_|. Another thing:_|
. Then there's this:_|. By the way,_|..._|!_|. Plus,_|. And yes,_|. Btw_""")
# What may follow an opener such as "you should know that": a clause with a subject.
SUBJECTS = re.compile(
    r"(?i)(I|I'm|I've|I'd|I'll|my|our|we|we've|we're|the|it's|it|there's|there|he|she)\b"
)
# A clause that begins so stands without an opener.
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

FIX_OPENERS = _lines("""actually,_|sorry, I was wrong,_|no, wait,_|correction:_|I made a mistake,_|
update:_|scratch that,_|I was mistaken,_|oh no,_|not quite,_|sorry,_|hang on,_|my mistake,_|
I need to correct myself:_|that's changed:_|ah, I told you something wrong,_|wait,_|hmm, no,_|
it's different now:_|I should correct that:_|forget what I said before,_|oops,_|small change:_|
news:_|change of plan:_|well, actually,_""")
# After a wrong answer of the assistant.
INSIST_OPENERS = _lines("""no,_|no, I told you,_|that's wrong,_|wrong,_|no, that's not right,_|
nope,_|I don't think so,_|not at all,_|no no,_|that's not what I said,_|hmm, no,_|
you got that wrong,_|come on,_|that can't be,_|I told you already,_|you forgot:_""")
# A correction in the same breath; {x} is the new value.
FIX_SHORT = _lines("""sorry, I meant {x}|no, {x}|I mean {x}|make that {x}|oops, I meant {x}|
wait, no, {x}|no wait, {x}|sorry, {x}|not that, {x}|scratch that, {x}|correction, {x}|
or rather {x}|I should say {x}""")

ASK_OPENERS = _lines("""hey,_|so,_|quick question:_|quick one:_|tell me,_|one more thing,_|okay,_|
please tell me,_|now,_|sorry, but_|wait,_|and_|hi,_|hello,_|just checking:_|um,_|
I forgot,_|silly question, but_|before I go,_|help me out here:_|good morning,_|ok so_|
another question:_|hmm,_|let me test you:_|do you still know,_|oh and_|by the way,_|btw,_|
I can't remember,_|my memory is terrible,_|you may remember this:_|can you tell me,_|please,_""")
ASK_CLOSERS = _lines(""", please|, do you remember|, again|, by the way|, do you know|,
I forgot|, can you tell me|, any idea""")
# {x}: a clause such as "where I live". The mark that follows is the last character.
RECALL = _lines("""do you remember {x}?|can you tell me {x}?|tell me {x}.|do you know {x}?|
I forgot {x}.|could you remind me {x}?|please remind me {x}.|remind me {x}|do you still know {x}?|
I can't remember {x}.|what did I say about {x}?|what did I tell you about {x}?|
did I ever tell you {x}?|I don't remember {x}, do you?|I need to know {x}.|
could you look up {x} for me?|let's see if you know {x}.|please say {x}.|
someone just asked me {x}.|I wonder if you still know {x}.""")

ACKS = _lines("""Okay.|Okay.|Noted.|Noted.|Got it.|Got it.|Sure.|I see.|Good to know.|All right.|
Thank you for telling me.|I will remember that.|Thanks, noted.|Understood.|Thanks for letting me
know.|I have noted that.|That is good to know.|I will keep that in mind.|Alright, noted.|Of course.|
Okay, got it.|Great, thanks.|Nice.|How nice.|Interesting.|Oh, I see.|Thank you, I will remember.""")
# {x}: the answer that repeats the fact, without its full stop, in lower case.
ECHO_ACKS = _lines("""Got it, {x}.|Noted: {x}.|Okay, {x}.|I see, {x}.|Understood, {x}.|So {x}.|
All right, {x}.|Good to know that {x}.|I will remember that {x}.|Thanks, {x}.""")
FIX_ACKS = _lines("""Okay, updated.|Noted.|Got it.|Okay.|Updated.|I have changed it.|
Thanks for the correction.|Thanks, I have corrected that.|No problem, I have updated it.|
All right, changed.|Understood.|I will remember it that way.""")
# {x}: a clause such as "where I live".
FORGET = _lines("""please forget {x}.|forget {x}.|forget what I said about {x}.|
please forget what I told you about {x}.|you can forget {x} now.|delete {x} from your memory.|
I'd rather you forgot {x}.|don't remember {x} any more.|please erase {x}.|
could you forget {x}?|I don't want you to remember {x}.|never mind {x}, forget it.""")
FORGET_THAT = _lines("""forget that.|please forget that.|forget what I just said.|
scratch that, forget it.|forget I said anything.|actually, forget that.|
please don't remember that.|delete that please.|on second thought, forget that again.|
no, that was private, please forget it.""")
FORGET_ACKS = _lines("""Okay, forgotten.|Done, I have forgotten it.|All right, forgotten.|
I have forgotten it.|Okay, I will not remember that.|Forgotten.""")

NEVER_TOLD = "You have not told me that."
NEVER_TOLD_WHAT = "You have not told me {x}."

SMALL_TALK = tuple(
    tuple(part.strip() for part in line.split(" = "))
    for line in """
hello = Hello! How can I help you today?
hi = Hi! How can I help you today?
hi there = Hello! How can I help you today?
hey = Hey! What can I do for you?
good morning = Good morning! How can I help you today?
good evening = Good evening! How can I help you?
good afternoon = Good afternoon! How can I help you?
good night = Good night! Sleep well.
how are you? = I'm doing well, thank you. How can I help you?
how's it going? = I'm doing well, thank you. How about you?
are you there? = Yes, I'm here.
still there? = Yes, I'm here.
thanks = You're welcome!
thank you = You're welcome!
thanks a lot = You're welcome! Happy to help.
thank you so much, that helps = You're welcome! Happy to help.
cheers = You're welcome!
great, thanks = You're welcome!
bye = Goodbye! Have a nice day.
see you later = See you later!
see you tomorrow = See you tomorrow!
talk to you soon = Talk to you soon!
I have to go now = All right, see you soon!
gotta run, bye = Goodbye!
that's great = I'm glad to hear that.
well done = Thank you!
you're funny = Thank you!
ok = All right.
okay, never mind = No problem.
one second = Take your time.
I'm back = Welcome back!
sorry for the wait = No problem at all.
sorry, the doorbell rang = No problem at all.
it's raining again = I hope the weather gets better soon.
it's so hot today = Make sure to drink enough water.
it's freezing outside = Keep warm!
what a lovely day = I'm glad you are enjoying it.
I'm so tired today = I hope you can get some rest.
I slept badly = I'm sorry to hear that. I hope you can rest today.
I have a headache = I'm sorry to hear that. I hope you feel better soon.
it was a long day = I hope you can relax now.
I'm bored = Shall we talk about something you like?
I'm hungry = Maybe it is time for a snack.
I need a coffee = A short break sounds good.
work was exhausting = I hope you can relax now.
happy friday! = Happy Friday to you too!
haha = I'm glad that made you laugh.
lol = I'm glad that made you laugh.
can I tell you something? = Of course, please do.
can I ask you something? = Of course, go ahead.
guess what = What is it?
let me tell you a few things = Please do, I'm listening.
are you listening? = Yes, I'm listening.
will you remember this? = Yes, I will.
let's see how good your memory is = Okay, go ahead.
just checking in = Hello! How can I help you today?
""".strip().splitlines()
)
