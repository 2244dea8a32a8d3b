"""How people tell and ask for each kind of fact, and the talk in between.

Sentences are written without final punctuation and in sentence-inner case. Slots: {v} value, {av}
value with its article, {t} topic, {s} subject ("my sister",
"Mirek"), {p} its possessive, {at} subject
with its article; in replies {Y} is the subject as the assistant says it ("Your sister", "Mirek").
Knows nothing of conversations, windows or tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

NEVER_TOLD = "You have not told me that."


@dataclass(frozen=True)
class Kind:
    """One kind of fact: (subject, attribute, topic) -> value.

    subject: "user", or the class of its subject: person, pet, kin, petlink, thinglink, word, verb,
    adjective. A link's value is itself a subject (my sister -> Mira), which makes two hops.
    phrase: the question as a clause ("where I live"), for "do you remember ...".
    reply: ends with {v} or {av}; topics: what {t} ranges over.
    """

    attr: str
    subject: str
    pool: str
    weight: float
    tells: tuple[str, ...]
    asks: tuple[str, ...]
    phrase: str
    reply: str
    changes: tuple[str, ...] = ()
    topics: tuple[str, ...] = ()
    link: bool = False

    @property
    def name(self) -> str:
        return f"{self.subject}.{self.attr}"


def _kind(attr, subject, pool, weight, tells, asks, phrase, reply, changes="", topics="",
          link=False):
    def lines(text):
        return tuple(s.strip() for s in text.split("|") if s.strip())

    return Kind(attr, subject, pool, weight, lines(tells), lines(asks), phrase, reply,
                lines(changes), lines(topics), link)


RELATIONS = tuple("""sister brother mother father mum dad friend boss neighbour cousin aunt uncle
son daughter wife husband partner teacher colleague roommate doctor dentist landlord grandmother
grandfather nephew niece""".split()) + ("best friend",)
MALE = {"brother", "father", "dad", "uncle", "son", "husband", "grandfather", "nephew"}
FEMALE = {"sister", "mother", "mum", "aunt", "daughter", "wife", "grandmother", "niece"}
# Nobody says "I have a mother called Mira".
ONLY_ONE = {"mother", "father", "mum", "dad", "husband", "wife", "partner", "street", "village",
            "school"}
# Words for one and the same person, and words too near to ask about one as "never told" when the
# other was told.
SAME = {"my mum": "my mother", "my dad": "my father"}
NEAR = ({"my friend", "my best friend"}, {"my partner", "my wife", "my husband"})
PETS = tuple("dog cat rabbit parrot horse hamster goldfish turtle pony".split())
NAMED_THINGS = tuple("boat robot project band bike street school village teddy house".split())

_OBJECTS = """keys|passport|wallet|glasses|phone|umbrella|charger|laptop|ticket|diary|camera|watch|
ring|hat|gloves|medicine|spare key|torch|scissors|toolbox|headphones|tent|guitar|notebook|bike key|
tea|savings|letters|map|binoculars"""
_EVENTS = """dentist appointment|job interview|haircut|exam|flight|wedding|meeting|concert|
piano lesson|driving test|party|doctor appointment|train|dinner|class|holiday|eye test|graduation|
picnic|check-up"""
_FAVOURITES_TITLE = "book|song|film|band|game|show|poem|shop|cafe|team|singer|writer"
_CODES = "door code|locker code|alarm code|phone pin|gate code|bank pin|safe code|bike code"
_PASSWORDS = """wifi password|secret word|email password|username|code word|safe word|
computer password"""

KINDS: tuple[Kind, ...] = (
    # --- the user ---
    _kind("name", "user", "name", 3.0,
          "my name is {v}|I'm {v}|I am {v}|call me {v}|you can call me {v}|my friends call me {v}|"
          "I am called {v}|my name's {v}|people call me {v}|the name is {v}",
          "what is my name|what's my name|who am I|what am I called|do you know my name|"
          "what do people call me",
          "my name", "Your name is {v}.", "please call me {v} now|my name is now {v}"),
    _kind("city", "user", "town", 2.5,
          "I live in {v}|my home is in {v}|I'm living in {v}|home is {v}|my house is in {v}|"
          "I have a flat in {v}|my flat is in {v}|we live in {v}|I am based in {v}",
          "where do I live|what city do I live in|which town do I live in|where is my home|"
          "what town is my home in|where is my house",
          "where I live", "You live in {v}.",
          "I moved to {v}|I have moved to {v}|we just moved to {v}|I live in {v} now"),
    _kind("hometown", "user", "town", 1.5,
          "I grew up in {v}|I was born in {v}|my hometown is {v}|I come from {v}|I'm from {v}|"
          "I am originally from {v}|I'm a native of {v}",
          "where am I from|where did I grow up|where was I born|what is my hometown|"
          "where do I come from",
          "where I am from", "You are from {v}."),
    _kind("job", "user", "job", 0.7,
          "I work as {av}|I'm {av}|I am {av}|my job is {v}|I am {av} by trade|"
          "for a living I am {av}|"
          "I earn my money as {av}",
          "what is my job|what do I do for a living|what do I work as|what's my job|"
          "what is my profession|what do I do for work",
          "what my job is", "You work as {av}.", "I work as {av} now|"
          "I changed jobs, I am {av} now"),
    _kind("workplace", "user", "brand", 1.5,
          "I work at {v}|I work for {v}|my company is {v}|my employer is {v}|I have a job at {v}|"
          "my office is at {v}|I'm employed by {v}",
          "where do I work|what company do I work for|who do I work for|who is my employer|"
          "what is my company",
          "where I work", "You work at {v}.", "I work at {v} now|I switched to {v}"),
    _kind("instrument", "user", "instrument", 0.3,
          "I play the {v}|I'm learning the {v}|my instrument is the {v}|I practise the {v}|"
          "I can play the {v}|I take lessons on the {v}",
          "what instrument do I play|which instrument do I play|what is my instrument|"
          "what do I play",
          "what instrument I play", "You play the {v}.", "I play the {v} now"),
    _kind("language", "user", "language", 0.3,
          "I am learning {v}|I'm studying {v}|I take {v} lessons|I'm trying to learn {v}|"
          "I started to learn {v}|the language I am learning is {v}",
          "what language am I learning|which language am I learning|what language do I study|"
          "which language do I take lessons in",
          "what language I am learning", "You are learning {v}.", "I switched to learning {v}"),
    _kind("birthday", "user", "date", 0.8,
          "my birthday is {v}|my birthday is on {v}|I was born on {v}|I have my birthday on {v}|"
          "I turn one year older on {v}|we celebrate my birthday on {v}",
          "when is my birthday|what day is my birthday|when was I born|when do I have my birthday|"
          "what date is my birthday",
          "when my birthday is", "You were born on {v}."),
    _kind("car", "user", "vehicle", 0.7,
          "I drive {av}|my car is {av}|I have {av} car|I bought a car, {av}|I own {av} car|"
          "I go to work in my {v} car",
          "what car do I drive|what car do I have|which car is mine|what do I drive|what is my car",
          "what car I drive", "You drive {av}.", "I drive {av} now|I sold it, I drive {av} now"),
    _kind("hobby", "user", "hobby", 0.3,
          "my hobby is {v}|I enjoy {v}|I'm into {v}|I love {v}|in my free time I like {v}|"
          "I spend my weekends on {v}",
          "what is my hobby|what do I do in my free time|what hobby do I have|what do I do for fun",
          "what my hobby is", "Your hobby is {v}.", "my hobby is {v} now"),
    _kind("allergy", "user", "dish", 0.7,
          "I'm allergic to {v}|I am allergic to {v}|I have an allergy to {v}|{v} makes me ill|"
          "I can't eat {v}|I must not eat {v}",
          "what am I allergic to|what can't I eat|what food must I not eat|what is my allergy",
          "what I am allergic to", "You are allergic to {v}."),
    _kind("study", "user", "study", 0.3,
          "I study {v}|I'm a student of {v}|my subject is {v}|I have a degree in {v}|"
          "I'm taking a course in {v}|at university I do {v}",
          "what do I study|what is my subject|which subject do I study|what is my degree in",
          "what I study", "You study {v}.", "I study {v} now|I switched to {v}"),
    _kind("age", "user", "number", 0.5,
          "I am {v} years old|I'm {v}|my age is {v}|I just turned {v}|I am {v}|I'm {v} years old",
          "how old am I|what is my age|what's my age|how many years old am I",
          "how old I am", "Your age is {v}.", "I am {v} now"),
    _kind("travel", "user", "town", 1.2,
          "I'm travelling to {v}|I am flying to {v} soon|my next trip is to {v}|"
          "I'm going on holiday to {v}|I booked a trip to {v}|we are going to {v} next",
          "where am I travelling to|where is my next trip|where am I going on holiday|"
          "where am I flying to|where is my trip to",
          "where my next trip is", "You are travelling to {v}.", "my trip is to {v} now"),
    _kind("hotel", "user", "brand", 0.8,
          "my hotel is the {v}|I'm staying at the {v}|I booked a room at the {v}|"
          "I sleep at the {v}|"
          "I have a room at the {v}|my hotel is called the {v}",
          "what is my hotel|which hotel am I staying at|where am I staying|what hotel did I book",
          "which hotel I booked", "Your hotel is the {v}.", "I changed my hotel to the {v}"),
    _kind("bus", "user", "number", 0.5,
          "I take bus {v}|my bus is number {v}|I ride bus {v}|the bus I take is {v}|"
          "I go by bus {v}|bus {v} takes me home",
          "what bus do I take|which bus do I take|what is my bus number|which bus is mine",
          "which bus I take", "You take bus {v}.", "I take bus {v} now"),
    _kind("lucky", "user", "number", 0.4,
          "my lucky number is {v}|{v} is my lucky number|my lucky number is always {v}|"
          "for luck I always take {v}|the number {v} brings me luck|I think {v} is my lucky number",
          "what is my lucky number|which number is lucky for me|what number brings me luck|"
          "what's my lucky number",
          "my lucky number", "Your lucky number is {v}."),
    _kind("planting", "user", "plant", 0.5,
          "I planted {av}|there is {av} in my garden|I grow {av}|I'm growing {av}|"
          "I put {av} in my garden|my garden has {av}",
          "what did I plant|what do I grow|what is in my garden|what plant do I have",
          "what I planted", "You planted {av}.", "I planted {av} instead"),
    _kind("gift", "user", "thing", 0.4,
          "I want {av} for my birthday|I wish for {av}|the gift I want is {av}|"
          "I would like {av} as a gift|please get me {av}|I hope to get {av}",
          "what gift do I want|what do I wish for|what do I want for my birthday|"
          "what should I get as a gift",
          "what gift I want", "You want {av}.", "I want {av} now"),
    *(_kind("favourite", "user", pool, weight,
            "my favourite {t} is {v}|{v} is the {t} I like best|the {t} I like most is {v}|"
            "{v} is my favourite {t}|I think {v} is the best {t}|the best {t} is {v}|"
            "for me the best {t} is {v}|my favourite {t} has to be {v}",
            "what is my favourite {t}|what's my favourite {t}|which {t} do I like best|"
            "what {t} do I like most|which {t} is my favourite",
            "my favourite {t}", "Your favourite {t} is {v}.",
            "my favourite {t} is {v} now|my new favourite {t} is {v}", topics)
      for pool, weight, topics in (
          ("shade", 0.6, "colour"), ("dish", 0.8, "food|snack|breakfast|dish"),
          ("beverage", 0.5, "drink"), ("title", 3.0, _FAVOURITES_TITLE),
          ("animal", 0.4, "animal"), ("hobby", 0.4, "sport"), ("plant", 0.4, "flower"),
          ("town", 1.0, "city|place"))),
    _kind("spot", "user", "spot", 1.6,
          "my {t} {be} {v}|I put my {t} {v}|I keep my {t} {v}|I left my {t} {v}|"
          "you can find my {t} {v}|"
          "my {t} {be} always {v}|I hid my {t} {v}|I store my {t} {v}",
          "where {be} my {t}|where did I put my {t}|where do I keep my {t}|"
          "where can I find my {t}|where did I leave my {t}|where did I hide my {t}",
          "where my {t} {be}", "Your {t} {be} {v}.",
          "I moved my {t} and now my {t} {be} {v}|my {t} {be} {v} now|I put my {t} {v} instead",
          _OBJECTS),
    _kind("code", "user", "code", 0.8,
          "my {t} is {v}|the {t} is {v}|{v} is my {t}|my {t} was set to {v}|I use {v} as my {t}|"
          "for the {t} I use {v}",
          "what is my {t}|what's my {t}|what is the {t}|what's the {t}|which {t} do I use",
          "my {t}", "Your {t} is {v}.", "my {t} is {v} now|I changed my {t} to {v}", _CODES),
    _kind("code", "user", "password", 2.0,
          "my {t} is {v}|the {t} is {v}|{v} is my {t}|my {t} was set to {v}|I use {v} as my {t}|"
          "for the {t} I use {v}",
          "what is my {t}|what's my {t}|what is the {t}|what's the {t}|which {t} do I use",
          "my {t}", "Your {t} is {v}.", "my {t} is {v} now|I changed my {t} to {v}", _PASSWORDS),
    _kind("when", "user", "when", 1.2,
          "my {t} is on {v}|I have my {t} on {v}|the {t} is on {v}|my {t} is planned for {v}|"
          "there is my {t} on {v}|my {t} was set for {v}",
          "when is my {t}|what day is my {t}|when's my {t}|what time is my {t}|"
          "when do I have my {t}",
          "when my {t} is", "Your {t} is on {v}.",
          "my {t} was moved to {v}|my {t} is now on {v}", _EVENTS),
    # --- links: a relation, a pet or a thing and its name ---
    _kind("name", "kin", "name", 6.0,
          "{p} name is {v}|{s} is called {v}|{s} is {v}|I have a {t} called {v}|{v} is {s}|"
          "I have a {t} named {v}|{s} is named {v}|the name of {s} is {v}",
          "what is {p} name|what's {p} name|what is {s} called|who is {s}|"
          "what is the name of {s}|how is {s} called",
          "{p} name", "{Y} is called {v}.", topics="|".join(RELATIONS), link=True),
    _kind("name", "petlink", "name", 3.0,
          "{p} name is {v}|{s} is called {v}|I have a {t} called {v}|{v} is {s}|I named {s} {v}|"
          "I have a {t} named {v}|{s} is named {v}|we have a {t} called {v}",
          "what is {p} name|what's {p} name|what is {s} called|what did I name {s}|"
          "what is the name of {s}|how is {s} called",
          "{p} name", "{Y} is called {v}.", topics="|".join(PETS), link=True),
    _kind("name", "thinglink", "title", 2.0,
          "the name of {s} is {v}|{s} is called {v}|I have a {t} called {v}|{v} is {s}|"
          "I have a {t} named {v}|{s} is named {v}|my {t} has the name {v}",
          "what is the name of {s}|what is {s} called|what's {s} called|what name does {s} have|"
          "how is {s} called",
          "the name of {s}", "{Y} is called {v}.", topics="|".join(NAMED_THINGS), link=True),
    # --- people: {s} is "my sister" or a name ---
    _kind("city", "person", "town", 3.0,
          "{s} lives in {v}|{p} home is in {v}|{s} has a house in {v}|{s} is based in {v}|"
          "{s} has a flat in {v}|{s} is living in {v}|home for {s} is {v}",
          "where does {s} live|what city does {s} live in|where is {p} home|"
          "which town does {s} live in|"
          "where is {s} living",
          "where {s} lives", "{Y} lives in {v}.",
          "{s} moved to {v}|{s} has moved to {v}|{s} lives in {v} now"),
    _kind("hometown", "person", "town", 1.2,
          "{s} grew up in {v}|{s} was born in {v}|{p} hometown is {v}|{s} comes from {v}|"
          "{s} is from {v}|"
          "{s} is originally from {v}",
          "where is {s} from|where did {s} grow up|where was {s} born|where does {s} come from",
          "where {s} is from", "{Y} is from {v}."),
    _kind("job", "person", "job", 0.7,
          "{s} works as {av}|{s} is {av}|{s} has a job as {av}|{s} is {av} by trade|"
          "{s} became {av}|"
          "for a living {s} is {av}",
          "what is {p} job|what does {s} do for a living|what does {s} work as|what does {s} do|"
          "what is the job of {s}",
          "what {p} job is", "{Y} works as {av}.", "{s} works as {av} now|{s} is {av} now"),
    _kind("workplace", "person", "brand", 1.2,
          "{s} works at {v}|{s} works for {v}|{p} company is {v}|{s} has a job at {v}|"
          "{s} is employed by {v}|{p} employer is {v}",
          "where does {s} work|who does {s} work for|what company does {s} work for|"
          "what is {p} company",
          "where {s} works", "{Y} works at {v}.", "{s} works at {v} now"),
    _kind("food", "person", "dish", 0.8,
          "{s} likes {v}|{s} loves {v}|{s} loves to eat {v}|{p} favourite food is {v}|"
          "{s} is fond of {v}|{s} eats a lot of {v}",
          "what does {s} like|what does {s} love to eat|what food does {s} like|"
          "what is {p} favourite food",
          "what {s} likes", "{Y} likes {v}.", "{s} likes {v} now"),
    _kind("pet", "person", "animal", 0.4,
          "{s} has {av}|{s} keeps {av}|{s} has a pet {v}|{s} owns {av}|{p} pet is {av}|"
          "{s} bought {av}",
          "what pet does {s} have|which animal does {s} have|what animal does {s} keep|"
          "what is {p} pet",
          "what pet {s} has", "{Y} has {av}.", "{s} has {av} now"),
    _kind("instrument", "person", "instrument", 0.3,
          "{s} plays the {v}|{s} can play the {v}|{p} instrument is the {v}|{s} practises the {v}|"
          "{s} is learning the {v}|{s} is good at the {v}",
          "what instrument does {s} play|which instrument does {s} play|what does {s} play|"
          "what is {p} instrument",
          "what instrument {s} plays", "{Y} plays the {v}.", "{s} plays the {v} now"),
    _kind("language", "person", "language", 0.3,
          "{s} speaks {v}|{s} is fluent in {v}|{p} language is {v}|{s} speaks good {v}|"
          "{s} can speak {v}|"
          "{s} knows {v}",
          "what language does {s} speak|which language does {s} speak|what is {p} language|"
          "what does {s} speak",
          "what language {s} speaks", "{Y} speaks {v}."),
    _kind("birthday", "person", "date", 0.6,
          "{s} was born on {v}|{p} birthday is {v}|{p} birthday is on {v}|"
          "{s} has a birthday on {v}|"
          "the birthday of {s} is {v}|we celebrate {p} birthday on {v}",
          "when is {p} birthday|when was {s} born|what day is {p} birthday|"
          "what date is {p} birthday",
          "when {p} birthday is", "{Y} was born on {v}."),
    _kind("car", "person", "vehicle", 0.6,
          "{s} drives {av}|{p} car is {av}|{s} bought {av} car|{s} owns {av} car|"
          "{s} has {av} car|{s} has a car, {av}",
          "what car does {s} drive|what car does {s} have|what does {s} drive|what is {p} car",
          "what car {s} drives", "{Y} drives {av}.", "{s} drives {av} now"),
    _kind("hobby", "person", "hobby", 0.3,
          "{p} hobby is {v}|{s} enjoys {v}|{s} is into {v}|{s} spends weekends on {v}|"
          "for fun {s} likes {v}|{s} is crazy about {v}",
          "what is {p} hobby|what does {s} do for fun|what hobby does {s} have|what does {s} enjoy",
          "what {p} hobby is", "{Y} enjoys {v}.", "{p} hobby is {v} now"),
    _kind("study", "person", "study", 0.3,
          "{s} studies {v}|{s} is a student of {v}|{p} subject is {v}|{s} has a degree in {v}|"
          "{s} is taking a course in {v}|{s} wants to study {v}",
          "what does {s} study|what is {p} subject|which subject does {s} study|"
          "what is {p} degree in",
          "what {s} studies", "{Y} studies {v}.", "{s} studies {v} now"),
    _kind("colour", "person", "shade", 0.4,
          "{p} favourite colour is {v}|{s} likes the colour {v}|{s} wears {v}|{s} always wears {v}|"
          "the colour {s} likes is {v}|{p} colour is {v}",
          "what is {p} favourite colour|what colour does {s} like|what colour does {s} wear|"
          "which colour does {s} like best",
          "{p} favourite colour", "{Y} likes the colour {v}.", "{p} favourite colour is {v} now"),
    _kind("age", "person", "number", 0.5,
          "{s} is {v} years old|{p} age is {v}|{s} just turned {v}|{s} is {v}|{s} turned {v}|"
          "the age of {s} is {v}",
          "how old is {s}|what is {p} age|what age is {s}|what's {p} age",
          "how old {s} is", "{Y} is aged {v}.", "{s} is {v} now"),
    _kind("school", "person", "brand", 0.8,
          "{s} goes to {v} school|{s} went to {v} school|{p} school is {v}|{s} is a pupil at {v}|"
          "{s} attends {v} school|the school of {s} is {v}",
          "what school does {s} go to|which school does {s} go to|what is {p} school|"
          "which school is {s} at",
          "what school {s} goes to", "{Y} goes to school at {v}.", "{s} goes to {v} school now"),
    # --- pets: {s} is "my dog" or its name ---
    _kind("sleeps", "pet", "spot", 0.8,
          "{s} sleeps {v}|{s} likes to sleep {v}|{s} always sleeps {v}|{p} bed is {v}|"
          "{s} naps {v}|at night {s} sleeps {v}",
          "where does {s} sleep|where does {s} like to sleep|where is {p} bed|where does {s} nap",
          "where {s} sleeps", "{Y} sleeps {v}.", "{s} sleeps {v} now"),
    _kind("food", "pet", "dish", 0.8,
          "{s} eats {v}|{s} loves {v}|{s} likes {v}|I feed {s} {v}|{p} food is {v}|"
          "{s} only eats {v}",
          "what does {s} eat|what does {s} like|what do I feed {s}|what is {p} food",
          "what {s} eats", "{Y} eats {v}.", "{s} eats {v} now"),
    _kind("age", "pet", "number", 0.4,
          "{s} is {v} years old|{p} age is {v}|{s} just turned {v}|{s} is {v}|{s} turned {v}|"
          "the age of {s} is {v}",
          "how old is {s}|what is {p} age|what age is {s}|what's {p} age",
          "how old {s} is", "{Y} is aged {v}.", "{s} is {v} now"),
    _kind("colour", "pet", "shade", 0.4,
          "{s} is {v}|{p} colour is {v}|{p} fur is {v}|{s} has the colour {v}|"
          "the colour of {s} is {v}|"
          "{s} looks {v}",
          "what colour is {s}|what is {p} colour|which colour is {s}|what colour does {s} have",
          "what colour {s} is", "{Y} has the colour {v}."),
    _kind("vet", "pet", "name", 0.5,
          "{p} vet is {v}|{s} goes to a vet called {v}|{v} is {p} vet|the vet of {s} is {v}|"
          "{s} sees the vet {v}|I take {s} to the vet {v}",
          "who is {p} vet|what is {p} vet called|which vet does {s} see|what's the name of {p} vet",
          "who {p} vet is", "{Y} goes to the vet {v}.", "{p} new vet is {v}"),
    # --- made-up words ---
    _kind("kind", "word", "meaning", 1.0,
          "{at} is a kind of {v}|{at} is {av}|{s} means {v}|{at} is a type of {v}|"
          "by {s} I mean {av}|we call {av} {at}|{at} is like {av}|a {s} is a sort of {v}",
          "what is {at}|what's {at}|what does {s} mean|what kind of thing is {at}|"
          "what do I mean by {s}",
          "what {at} is", "{At} is a kind of {v}.", link=True),
    _kind("material", "word", "material", 0.5,
          "{at} is made of {v}|{at} is made from {v}|you make {at} out of {v}|"
          "we make {at} from {v}|"
          "{at} is built of {v}|every {s} is made of {v}",
          "what is {at} made of|what is {at} made from|what do we make {at} from|"
          "what material is {at}",
          "what {at} is made of", "{At} is made of {v}.", "{at} is made of {v} now"),
    _kind("origin", "word", "town", 0.8,
          "{at} comes from {v}|{at} is from {v}|you find {at} in {v}|we get {at} from {v}|"
          "{at} was first seen in {v}|every {s} comes from {v}",
          "where does {at} come from|where is {at} from|where do you find {at}|"
          "where do we get {at} from",
          "where {at} comes from", "{At} comes from {v}."),
    _kind("price", "word", "number", 0.4,
          "{at} costs {v} coins|the price of {at} is {v} coins|you pay {v} coins for {at}|"
          "{at} sells for {v} coins|I paid {v} coins for {at}|{at} is {v} coins",
          "what does {at} cost|how much is {at}|what is the price of {at}|how many coins is {at}",
          "what {at} costs", "{At} costs in coins {v}.", "{at} costs {v} coins now"),
    _kind("means", "verb", "verb", 0.5,
          "to {s} means to {v}|to {s} is to {v}|when I say {s} I mean to {v}|if you {s}, you {v}|"
          "the verb {s} means to {v}|people who {s} just {v}",
          "what does it mean to {s}|what does to {s} mean|what is it to {s}|"
          "what do you do if you {s}",
          "what it means to {s}", "To {s} means to {v}."),
    _kind("means", "adjective", "adjective", 0.5,
          "the word {s} means {v}|{s} means {v}|if it is {s}, it is {v}|something {s} is {v}|"
          "{s} is our word for {v}|when I say {s} I mean {v}",
          "what does {s} mean|what does the word {s} mean|what do I mean by {s}|"
          "what is something {s}",
          "what {s} means", "The word {s} means {v}."),
)



def _openers(text: str) -> tuple[str, ...]:
    return tuple(text.replace("\n", "").split("|"))


TELL_OPENERS = _openers("""by the way, |just so you know, |remember that |please remember that |
oh, |well, |so, |I should mention that |did I tell you that |you should know that |
please note that |also, |hey, |don't forget that |hi, |for your information, |fun fact: |
I wanted to say that |note: """)
ASK_OPENERS = _openers("""hey, |so, |quick question: |tell me, |one more thing, |okay, |
please tell me, |now, |say, |sorry, but |wait, |and """)
RECALL = _openers("""do you remember {x}|can you tell me {x}|tell me {x}|do you know {x}|
I forgot {x}|what did I say about {x}|could you remind me of {x}|please remind me of {x}|
do you still know {x}|I can't remember {x}""")
# The last one is empty: a change like "I moved to X" needs no opener.
FIX_OPENERS = _openers("""actually, |sorry, I was wrong, |no, wait, |correction: |
I made a mistake, |update: |scratch that, |I was mistaken, |oh no, |not quite, |""")
FIX_SHORT = _openers("""sorry, I meant {x}|no, {x}|I mean {x}|make that {x}|oops, I meant {x}|
wait, no, {x}|it's {x}, sorry|{x}, I mean|not that, {x}""")

ACKS = ("Okay.", "Okay.", "Okay.", "Noted.", "Noted.", "Got it.", "Got it.", "Sure.", "I see.",
        "Good to know.", "All right.", "Thank you.", "I will remember that.")
FIX_ACKS = ("Okay, updated.", "Noted.", "Got it.", "Okay.", "Updated.", "I have changed it.")
GREETINGS = ("Nice to meet you, {v}.", "Hello, {v}.")

# A fixed reply to each, so that small talk costs the model little.
TALK = tuple(tuple(line.split(" = ")) for line in """
hello = Hello!
hi = Hello!
hi there = Hello!
hey = Hello!
good morning = Good morning!
good evening = Good evening!
good afternoon = Good afternoon!
good night = Good night!
how are you? = I am fine, thank you.
how are you doing? = I am fine, thank you.
how is it going? = I am fine, thank you.
are you there? = Yes, I am here.
are you still there? = Yes, I am here.
can you hear me? = Yes, I am here.
are you awake? = Yes, I am awake.
did you sleep well? = Yes, thank you.
thanks = You are welcome.
thank you = You are welcome.
thanks a lot = You are welcome.
thank you so much = You are welcome.
that is great = I am glad.
great = I am glad.
nice = I am glad.
wonderful = I am glad.
you are very kind = Thank you.
you are smart = Thank you.
well done = Thank you.
good job = Thank you.
I like you = Thank you.
bye = Goodbye!
goodbye = Goodbye!
see you later = Goodbye!
see you tomorrow = Goodbye!
I have to go = Goodbye!
talk to you soon = Goodbye!
who are you? = I am your assistant.
what are you? = I am your assistant.
are you a robot? = I am your assistant.
what can you do? = I remember what you tell me.
can you remember things? = Yes, tell me something.
will you remember this? = Yes, I will.
are you listening? = Yes, I am listening.
do you have a minute? = Yes, of course.
can I ask you something? = Yes, of course.
can I tell you something? = Yes, please do.
I have some news = Tell me more.
guess what = Tell me more.
let me tell you about myself = Tell me more.
I want to tell you a few things = Tell me more.
listen = Yes, I am listening.
it is raining again = I hope it gets better.
the weather is bad today = I hope it gets better.
it is cold outside = Keep warm.
it is so hot today = Drink some water.
the sun is shining = Enjoy it.
what a lovely day = Enjoy it.
I am tired = Get some rest.
I did not sleep well = Get some rest.
it was a long day = Get some rest.
I have a headache = I hope you feel better.
I feel sick = I hope you feel better.
I am sad = I hope you feel better.
I am hungry = Have a snack.
I need a coffee = Take a break.
work was hard today = Take a break.
I am so busy = Take a break.
I am bored = Let us talk.
I am happy today = I am glad.
I had a good day = I am glad.
it is the weekend = Enjoy it.
I am on holiday = Enjoy it.
I am going for a walk = Have fun.
I am going to the park = Have fun.
I am off to the cinema = Have fun.
let's play a game = Let us talk.
tell me a joke = I only know what you tell me.
what is the weather like? = I only know what you tell me.
what is the capital of france? = I only know what you tell me.
who won the game? = I only know what you tell me.
what time is it? = I only know what you tell me.
what is the news? = I only know what you tell me.
never mind = All right.
okay = All right.
fine = All right.
just a moment = Take your time.
one second = Take your time.
give me a minute = Take your time.
I am back = Welcome back!
sorry for the wait = No problem.
sorry = No problem.
excuse me = No problem.
I was just thinking = Tell me more.
that is funny = I am glad.
haha = I am glad.
let me think = Take your time.
that is all for now = All right.
what do you think? = I am not sure.
is that okay? = Yes, of course.
""".strip().split("\n"))
