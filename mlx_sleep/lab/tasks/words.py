"""Words the tasks are made of: lists of real ones and generators of made-up ones.

Every word and every composed value belongs to exactly one split, decided by a stable hash of its
text, so that train, valid and test share no name and no value. Knows nothing of conversations.
"""

from __future__ import annotations

import zlib
from functools import cache
from random import Random

SPLITS = ("train", "valid", "test")


def split_of(word: str) -> str:
    """The split that owns `word` (case is ignored): 80% train, 10% valid, 10% test."""
    bucket = zlib.crc32(word.lower().encode()) % 10
    return "test" if bucket == 0 else "valid" if bucket == 1 else "train"


WOMEN = """
Abigail Ada Adele Agnes Aisha Alice Alina Amara Amelia Amy Ana Angela Anika Anna Astrid Ayla
Barbara Beatrice Bianca Carla Carmen Caroline Cecilia Celine Charlotte Chloe Clara Claire Cora
Daisy Daria Diana Dora Edith Eileen Elena Elif Elisa Ella Ellen Elsa Emily Emma Erika Eva Faith
Farah Fatima Fiona Flora Frances Freya Gemma Gina Giulia Grace Greta Hana Hannah Hazel Heidi Helen
Ida Ines Ingrid Iris Irene Isabel Ivy Jade Jane Jasmine Jill Joan Josie Judith Julia June Karen
Kate Katya Keiko Kira Lana Lara Laura Layla Lea Lena Leila Lily Linda Lisa Lola Lucia Lucy Luna
Lydia Mabel Margaret Maria Marie Marta Mary Maya Mei Mia Mila Mira Miriam Molly Mona Monica Nadia
Naomi Natalie Nell Nia Nicole Nina Noor Nora Olga Olivia Paula Penny Petra Phoebe Pia Priya Rachel
Rania Rebecca Rita Rosa Rose Ruby Ruth Sadie Sally Samira Sandra Sara Selma Serena Sofia Sonia
Stella Susan Sylvia Tamar Tanya Tara Tess Tina Ulla Ursula Uma Vera Viola Vivian Wanda Wendy Yara
Yasmin Yuki Yvonne Zara Zelda Zoe
""".split()

MEN = """
Aaron Adam Ahmed Alan Albert Alex Amir Andrew Anton Arjun Arthur Ben Boris Bruno Carlos Chen Chris
Colin Dan Daniel David Dean Diego Dylan Edgar Eli Emil Eric Ethan Evan Felix Frank Gabriel Gavin
George Gustav Harold Harry Hassan Henry Hugo Ian Ibrahim Igor Isaac Ivan Jack Jacob James Jan
Jason Jean Jens Joel John Jonas Joseph Juan Julian Kai Karim Karl Keith Kemal Kenji Kevin Kim Kofi
Kurt Lars Leo Leon Liam Linus Louis Lucas Luis Magnus Malik Marco Mark Martin Mateo Max Michael
Milan Milo Mohammed Nathan Neil Nick Nils Noah Olaf Oliver Omar Oscar Otto Pablo Paul Pavel Pedro
Peter Philip Quentin Rafael Ravi Rex Robert Robin Rolf Rufus Sam Sasha Sean Simon Stefan Steve
Sunil Sven Tariq Theo Thomas Tim Tobias Toby Tom Tomas Tony Victor Walter Will Xavier Yusuf Zach
""".split()

PLACES = """
Aberdeen Accra Adelaide Amsterdam Ankara Antwerp Athens Atlanta Auckland Austin Baghdad Baku
Bangkok Barcelona Basel Bath Beirut Belfast Belgrade Bergen Berlin Bern Bilbao Birmingham Bogota
Bologna Bonn Bordeaux Boston Bremen Brighton Bristol Bruges Brussels Budapest Cairo Calgary
Cambridge Canberra Cardiff Casablanca Chicago Cologne Copenhagen Cork Dakar Dallas Delhi Denver
Detroit Dhaka Dresden Dublin Dubai Dundee Durban Edinburgh Florence Frankfurt Geneva Genoa Ghent
Glasgow Gothenburg Granada Graz Hamburg Hanoi Havana Helsinki Houston Istanbul Izmir Jakarta
Kampala Karachi Kathmandu Kiev Kingston Krakow Kyoto Lagos Lahore Leeds Leipzig Leicester Lima
Lisbon Liverpool London Lucerne Lyon Madrid Malaga Malmo Manchester Manila Marseille Melbourne
Memphis Miami Milan Minsk Mombasa Montreal Moscow Mumbai Munich Nairobi Nantes Naples Nashville
Newcastle Nice Norwich Nottingham Odense Odessa Oslo Osaka Ottawa Oxford Palermo Paris Perth
Phoenix Pisa Plymouth Porto Portland Prague Quebec Quito Reading Reykjavik Riga Rome Rotterdam
Salem Salzburg Santiago Sapporo Sarajevo Seattle Seoul Seville Shanghai Sheffield Singapore Sofia
Stockholm Stuttgart Sydney Taipei Tallinn Tampere Tbilisi Tehran Tokyo Toledo Toronto Trieste
Tunis Turin Utrecht Valencia Vancouver Venice Verona Vienna Vilnius Warsaw Wellington Winnipeg
York Zagreb Zurich
""".split()

JOBS = """
accountant actor architect artist astronomer baker banker barber bartender beekeeper biologist
blacksmith bricklayer builder butcher carpenter cashier chef chemist cleaner clerk coach composer
cook courier dancer dentist designer detective diver doctor driver editor electrician engineer
farmer firefighter fisherman florist gardener geologist glazier goldsmith guard guide hairdresser
historian illustrator inspector interpreter janitor jeweller journalist judge juggler lawyer
lecturer librarian lifeguard locksmith manager mason mechanic midwife miner model musician nanny
nurse optician painter paramedic pharmacist photographer physicist pianist pilot plumber poet
potter printer professor programmer psychologist ranger receptionist reporter roofer sailor
scientist sculptor secretary shepherd singer soldier surgeon surveyor tailor teacher technician
therapist toymaker translator tutor vet waiter watchmaker weaver welder writer zookeeper
""".split()

FOODS = """
apples bacon bagels bananas beans beetroot biscuits bread broccoli burgers butter cabbage cake
carrots cauliflower celery cheese cherries chicken chili chips chocolate coconut cookies corn
couscous crab crackers cucumber curry custard dates dumplings eggs falafel figs fish fudge garlic
ginger grapes gravy haddock ham hazelnuts honey hummus jam jelly kebabs lasagna leeks lemons
lentils lobster mango melon meatballs mint muffins mushrooms mussels mustard noodles nuts oats
olives omelettes onions oranges oysters pancakes papaya pasta pastries peaches peanuts pears peas
pepper pickles pies pineapple pizza plums popcorn pork porridge potatoes prawns pretzels pumpkin
quiche radishes raisins ramen raspberries ravioli rice risotto salad salmon sandwiches sausages
scones shrimp soup spinach squid steak stew strawberries sushi tacos toast tofu tomatoes trout
tuna turkey turnips waffles walnuts yogurt
""".split()

DRINKS = """
ale beer brandy cider cocoa coffee cola cordial eggnog espresso gin juice kefir lemonade limeade
mead milk mocha punch rum sake seltzer sherry smoothies soda tea tonic vodka water whisky wine
""".split()

ANIMALS = """
alpaca ant antelope badger bat bear beaver bee beetle bison buffalo camel canary cat chameleon
cheetah chicken cobra cow crab crane crow deer dog dolphin donkey dove duck eagle eel elephant
falcon ferret finch flamingo fox frog gazelle gecko giraffe goat goldfish goose gorilla hamster
hare hawk hedgehog heron hippo horse hyena ibex iguana jackal jaguar kangaroo kitten koala lamb
lemur leopard lion lizard llama lobster lynx magpie mole monkey moose moth mouse newt octopus
ostrich otter owl ox panda panther parrot peacock pelican penguin pig pigeon pony puffin puma
puppy python rabbit raccoon rat raven robin salamander seal shark sheep skunk sloth snail snake
sparrow spider squirrel stork swan tiger toad tortoise toucan turkey turtle walrus wasp whale wolf
wombat zebra
""".split()

COLOURS = """
amber aqua beige black blue bronze brown copper coral cream crimson emerald gold green grey indigo
ivory lavender lilac lime magenta maroon mint mustard navy ochre olive orange peach pink plum
purple red rose ruby rust sand scarlet silver tan teal turquoise violet white yellow
""".split()

INSTRUMENTS = """
accordion banjo bagpipes bassoon bass bongos cello clarinet cornet drums dulcimer fiddle flute
guitar harmonica harp horn kazoo lute lyre mandolin marimba oboe organ piano piccolo recorder
saxophone sitar tambourine triangle trombone trumpet tuba ukulele viola violin xylophone zither
""".split()

LANGUAGES = """
Albanian Arabic Armenian Basque Bengali Breton Bulgarian Catalan Chinese Croatian Czech Danish
Dutch English Estonian Finnish French Frisian Gaelic Georgian German Greek Hausa Hebrew Hindi
Hungarian Icelandic Irish Italian Japanese Kazakh Khmer Korean Kurdish Latin Latvian Lithuanian
Malay Maltese Maori Mongolian Nepali Norwegian Pashto Persian Polish Portuguese Punjabi Quechua
Romanian Russian Samoan Serbian Slovak Slovene Somali Spanish Swahili Swedish Tagalog Tamil Tatar
Telugu Thai Tibetan Turkish Ukrainian Urdu Uzbek Vietnamese Welsh Yiddish Yoruba Zulu
""".split()

HOBBIES = """
archery baking birdwatching bowling boxing camping canoeing carving chess climbing cooking cricket
crochet curling cycling dancing darts diving drawing embroidery fencing fishing football gardening
golf gymnastics handball hiking hockey hunting jogging judo juggling karate kayaking knitting
lacrosse magic origami painting photography poker polo pottery puzzles quilting reading riding
rowing rugby running sailing sewing singing skating skiing sketching snooker soccer squash sudoku
surfing swimming tennis travel volleyball walking weaving weightlifting whittling woodwork
wrestling writing yoga
""".split()

SUBJECTS = """
algebra anatomy archaeology architecture art astronomy biology botany business chemistry dance
design drama ecology economics education engineering ethics fashion finance forestry genetics
geography geology geometry history journalism law linguistics literature logic marketing
mathematics mechanics medicine music nursing optics painting philosophy photography physics poetry
politics psychology robotics sculpture sociology statistics theology zoology
""".split()

PLANTS = """
aloe azalea bamboo basil begonia bluebell cactus camellia cedar chives clover daffodil dahlia
daisy fern ficus foxglove freesia fuchsia gardenia geranium heather hibiscus holly hyacinth
hydrangea iris ivy jasmine juniper lavender lilac lily lotus lupin magnolia maple marigold mint
mimosa moss myrtle nettle oak orchid oregano palm pansy parsley peony petunia pine poppy primrose
rosemary rose sage snowdrop sunflower thistle thyme tulip violet willow wisteria yarrow yucca
""".split()

CARS = """
Audi Bentley Chevrolet Citroen Dacia Ferrari Fiat Ford Honda Hyundai Jaguar Jeep Kia Lada Lexus
Mazda Mercedes Mini Nissan Opel Peugeot Porsche Renault Rover Saab Seat Skoda Subaru Suzuki Tesla
Toyota Trabant Vauxhall Volkswagen Volvo
""".split()

THINGS = """
anchor apron axe bag ball barrel basket bell belt bench blanket blade boat book boot bottle bowl
box bracelet brick bridge broom brush bucket button cage candle canoe cap card carpet cart castle
chain chair chest clock cloak coat coin comb compass cord cup curtain cushion dagger desk dish
door drum engine fan feather fence flag flask fork frame garden gate glove hammer hat helmet hook
horn house jacket jar jug kettle key kite knife ladder lamp lantern lid lock map mask mat medal
mirror mug nail necklace needle net oar oven paddle pan paper pen pencil pillow pin pipe plate
plough pot purse quilt raft rake ring rope rug saddle sail saw scarf shelf shield ship shirt shoe
shovel sieve skirt sledge soap sock spade spear spoon stick stool stove string sword table tent
thimble thread tool torch towel tower toy tray truck trumpet umbrella vase wagon wall watch wheel
whip whistle window wrench
""".split()

MATERIALS = """
amber ash bamboo bark bone brass brick bronze cardboard cement chalk clay cloth concrete copper
cork cotton crystal felt flint foam fur glass gold granite grass hair ice iron ivory jade lace
lead leather linen marble metal mud nylon oak paper pearl plastic porcelain rope rubber salt sand
satin shell silk silver slate snow steel stone straw string sugar tin twine velvet wax wicker wire
wood wool
""".split()

VERBS = """
argue bake bark bathe beg blink boil bounce bow breathe bury buy carve catch chase chew clap climb
cook cough count crawl cry cut dance dig dive draw dream drift drink drive eat fall fight fish
float fly fold freeze giggle grow guess hide hike hop hum hunt hurry jog jump kick kneel knit
knock laugh lean leave lie lift listen march melt mix mumble nap nod paint pause peel play plough
pray press pull push race read rest ride roar roll row run sail scream search shake share shiver
shout sing sink sit skate skip sleep slide smell smile snore sneeze spin splash stand stare steal
stir stretch swim swing talk tease throw tickle trade travel trip vanish wait wake walk wander
wash wave weave whisper whistle wink work worry wrestle write yawn yell
""".split()

ADJECTIVES = """
afraid angry bitter bored bossy brave bright broken busy calm careful cheap clean clever clumsy
cold cosy crazy cruel curious damp dark deep dirty dizzy dry dull eager early empty fair famous
fast fierce flat fragile free fresh friendly funny gentle glad grumpy happy hard heavy honest hot
huge hungry jolly kind late lazy light lonely loud lucky mad messy mild narrow neat nervous noisy
odd old pale patient plain polite poor pretty proud quick quiet rare rich ripe rough rude sad
salty scared shallow sharp shiny short shy sick silent silly simple sleepy slim slow smart smooth
soft sour spicy steep sticky stiff strange strong sweet tall tame tasty thick thin thirsty tidy
tiny tired tough ugly warm weak wet wide wild wise witty
""".split()

# Ordinary words: values of passwords, titles and the like.
PLAIN = """
afternoon air alarm album anchor angle apart april arch area arm arrow atlas august aunt autumn
baby balance band bank bar bark base basin bay beach beacon beam beat bed bird birth blank bloom
board body bonus border branch break breeze brook brother bubble build bundle burn business button
cabin camera camp candle canyon case castle cave centre chance charge charm cherry child chorus
circle city class cloud club coast code comet common copper corner cottage country course cousin
cover cradle create crew crowd crown crystal current curve cycle daily date dawn day death
december delta desert dial diamond dinner distance doctor dollar dome dragon dream dress drop dusk
dust earth east easy echo edge effect ember empire enemy evening event exam example eye fact
family farm father feather february fence field figure fill final finger fire flame flash flight
floor flower fog foot forest fork form fort fountain friday friend front frost future galaxy game
garden gather ghost giant gift girl glacier glass globe goal gold grain grand grass gravity green
ground group grow guard guess guest guide habit hall hammer hand harbour harvest hat head health
heart heaven hero hill holiday hollow hour house husband idea island january jewel job journey joy
july jump june jungle kettle kind king kitchen knight ladder lake land language lantern laugh
laundry leaf legend lemon lesson letter level library life limit line live locker lost lunch
machine magic map marble march market meadow member memory message metal midnight mile minute
mirror mist moment monday money month moon morning mother mountain much music name narrow nation
neck nest night north notice november number ocean october office orbit orchard orange order oven
owner page palace paper parent park part party pass path pattern people pepper person phone photo
picture piece pillar pilot place planet play pocket point pond port power present price prince
promise puzzle quarter queen quick quiet rain raven reason record red rest rhythm ribbon rich ride
right ring river road robin rock rocket room root rope round row rule run saddle safe sail sand
saturday save school science sea season seat secret seed september shadow shape share sharp shell
shelter shine ship shop shore shoulder side signal silver simple singer sister size sky sleep
small smile smoke snow song sound south space spark special spirit spring square stage stair star
start station steam step stone storm story stranger stream street strong student summer sun sunday
sunset table tail teach team temple theatre thunder thursday ticket tide tiger time tower town
track train treasure tree trip trouble true trust tuesday tunnel twin uncle valley view village
voice wall war watch water wave way weather wednesday week weekend well west wheel wide wife wild
wind window winter woman wonder word world yard year yellow almond badge banner barley bishop
blossom bridge bronze butter cactus canal carbon cedar circus clover cobalt compass cricket
dolphin domino eagle emerald falcon ferry fiddle fossil garnet ginger granite hazel helmet hermit
honey indigo ivory jasmine jigsaw kernel lagoon laser lizard lobster magnet mammoth mango maple
meteor mosaic nectar nickel nugget oasis olive onyx opal otter oyster panda parade pebble pickle
pirate plasma pretzel prism quartz rabbit radar ranger rhubarb saffron sapphire satin scooter
sequoia sparrow sprout squirrel summit syrup tango tempest thistle timber topaz tornado trumpet
tulip turbine turtle tunic vanilla velvet violet volcano walnut walrus willow wizard yonder zebra
zephyr zipper
""".split()

# Everyday words that are nobody's password: for the tokenizer alone.
FUNCTION = """
able about above across act add again age ago agree all almost alone along already also always
among answer any around arrive ask away back bad because become before begin behind believe belong
below beside better between beyond big bold both bottom bring broad call care carry cause change
check clear close come cross danger deal decide depend direct double down each early eight either
end enjoy enough enter equal even ever every expect face fall far feel few find fine finish first
five follow forget forward four fresh full give glad go good great half happen have hear hello
help her here hidden high hold home hope how human hundred inside join just keep know large last
lead learn leave left light like listen little long look love low main make marry matter maybe
mean meet middle mind move must near need never new next nine nothing now off offer often old once
one only open other out outside over pay perhaps plan please pull question reach read ready real
remember return same say second see seem sell send seven she short should show since six some soon
sorry speak spell stay still stop such sudden sure surprise take talk tell ten than thank that
their them then there these they thing think third this thought thousand three today together
tomorrow tonight too top total touch travel try turn twelve twenty two under until up use usual
very visit wait walk want wear what when where which while white who whole why wish with work
worry worth would write wrong yes yesterday yet you young your zero
""".split()

LISTS = {
    "woman": WOMEN,
    "man": MEN,
    "place": PLACES,
    "job": JOBS,
    "food": FOODS,
    "drink": DRINKS,
    "animal": ANIMALS,
    "colour": COLOURS,
    "instrument": INSTRUMENTS,
    "language": LANGUAGES,
    "hobby": HOBBIES,
    "study": SUBJECTS,
    "plant": PLANTS,
    "car": CARS,
    "thing": THINGS,
    "material": MATERIALS,
    "verb": VERBS,
    "adjective": ADJECTIVES,
    "plain": PLAIN,
    "function": FUNCTION,
}

MONTHS = """
January February March April May June July August September October November December
""".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
ROOMS = """
kitchen garage hall attic cellar garden office bathroom bedroom car shed porch cabin library
workshop barn
""".split()
CONTAINERS = """
drawer cupboard box bag wardrobe basket fridge suitcase desk chest safe closet jar tin backpack
coat
""".split()
SURFACES = "table bed shelf sofa desk chair bench counter stove piano mat lamp stairs".split()

_ONSETS = """
b br bl c ch d dr f fl g gr gl h j k kr l m n p pl pr qu r s sh sk sl st t th tr v w y z zh
""".split()
_ONSETS += "b d f g h j k l m n p r s t v w z m l t".split()  # single consonants are commoner
_VOWELS = "a e i o u a e i o u ai ee ei ia oo ou".split()
_CODAS = ["", "", "", "", *"n r l k s m t n r l nd rn x sk p rk ck b g".split()]
_ENDINGS = "a o en el is us in ar ek ia et or ix une ol an um ela ora ine".split()


@cache
def words(kind: str, split: str) -> tuple[str, ...]:
    """The words of one list that belong to `split`."""
    return tuple(w for w in dict.fromkeys(LISTS[kind]) if split_of(w) == split)


def _syllables(rng: Random) -> str:
    choice = rng.choice
    count = rng.choices((1, 2, 3), (12, 76, 12))[0]
    if count == 1:
        return choice(_ONSETS) + choice(_VOWELS[:10]) + choice(_CODAS[4:])
    word = ""
    for _ in range(count - 1):
        word += choice(_ONSETS) + choice(_VOWELS[:10] if rng.random() < 0.9 else _VOWELS)
        if rng.random() < 0.2:
            word += choice(_CODAS)
    if rng.random() < 0.5:
        if word[-1] in "aeiou":
            word += choice("bdfgklmnprstvz")
        return word + choice(_ENDINGS)
    return word + choice(_ONSETS) + choice(_VOWELS[:10]) + choice(_CODAS)


def _blend(rng: Random) -> str:
    """The head of one ordinary word and the tail of another: unusual pieces."""
    head, tail = rng.choice(PLAIN), rng.choice(PLAIN)
    return head[: rng.randint(2, 3)] + tail[-rng.randint(2, 4) :]


def made_up(rng: Random, split: str) -> str:
    """A made-up lower-case word that belongs to `split`."""
    while True:
        word = _syllables(rng) if rng.random() < 0.8 else _blend(rng)
        if 3 <= len(word) <= 8 and split_of(word) == split:
            return word


def _pick(rng: Random, split: str, compose) -> str:
    """Calls `compose` until the composed value belongs to `split`."""
    while True:
        value = compose()
        if split_of(value) == split:
            return value


def value(rng: Random, kind: str, split: str) -> str:
    """A value of `kind` (a list's name or one of the mixtures below) that belongs to `split`."""
    r = rng.random()
    if kind == "name":
        return value(rng, rng.choice(("woman", "man")), split)
    if kind in ("woman", "man"):
        return rng.choice(words(kind, split)) if r < 0.25 else made_up(rng, split).title()
    if kind == "town":
        if r < 0.2:
            return rng.choice(words("place", split))
        word = made_up(rng, split).title()
        if r < 0.3:
            return _pick(
                rng,
                split,
                lambda: (
                    made_up(rng, split)[:5].title()
                    + rng.choice(("ton", "burg", "ville", "ford", "by", "stad", "mouth"))
                ),
            )
        return word
    if kind == "title":
        word = rng.choice(words("plain", split)) if r < 0.2 else made_up(rng, split)
        return "The " + word.title() if rng.random() < 0.2 else word.title()
    if kind == "brand":
        return (rng.choice(words("plain", split)) if r < 0.1 else made_up(rng, split)).title()
    if kind == "password":
        if r < 0.6:
            return made_up(rng, split)
        if r < 0.85:
            return rng.choice(words("plain", split))
        chars = "abcdefghijkmnpqrstuvwxyz23456789"
        return _pick(rng, split, lambda: "".join(rng.choices(chars, k=rng.randint(3, 5))))
    if kind == "dish":
        return rng.choice(words("food", split)) if r < 0.4 else made_up(rng, split)
    if kind == "beverage":
        return rng.choice(words("drink", split)) if r < 0.3 else made_up(rng, split)
    if kind == "vehicle":
        return rng.choice(words("car", split)) if r < 0.25 else made_up(rng, split).title()
    if kind == "meaning":
        return rng.choice(words("thing", split)) if r < 0.7 else rng.choice(words("animal", split))
    if kind == "shade":
        if r < 0.5:
            return rng.choice(words("colour", split))
        shades = ("dark", "light", "pale", "bright")
        return _pick(rng, split, lambda: f"{rng.choice(shades)} {rng.choice(COLOURS)}")
    if kind == "code":
        return _pick(rng, split, lambda: "".join(rng.choices("0123456789", k=4)))
    if kind == "number":
        return _pick(rng, split, lambda: str(rng.randint(2, 99)))
    if kind == "date":
        return _pick(rng, split, lambda: f"{rng.choice(MONTHS)} {rng.randint(1, 28)}")
    if kind == "when":
        if r < 0.3:
            return value(rng, "date", split)
        return _pick(rng, split, lambda: f"{rng.choice(DAYS)} at {rng.randint(1, 12)}")
    if kind == "spot":
        return _pick(rng, split, lambda: _spot(rng))
    return rng.choice(words(kind, split))


def _spot(rng: Random) -> str:
    r = rng.random()
    if r < 0.35:
        return f"in the {rng.choice(ROOMS)}"
    if r < 0.65:
        return f"in the {rng.choice(CONTAINERS)}"
    return f"{rng.choice(('on', 'under', 'behind', 'near'))} the {rng.choice(SURFACES)}"
