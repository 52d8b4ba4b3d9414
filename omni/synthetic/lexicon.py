"""The words of the small world and their grammar."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NUMBERS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
SHAPES = _words("circle square triangle star heart cross ring diamond moon arrow")
COLOURS = _words("red orange yellow green blue purple pink brown black grey")
SIZES = ("small", "big")
MAX_COUNT = 4  # shapes in one group

SHE = _words("Anna Clara Emma Grace Julia Mia Nora Olga Rosa Sara")
HE = _words("Ben David Felix Henry Leo Noah Oscar Paul Simon Tom")
PEOPLE = tuple(sorted(SHE + HE))
SHOPS = _words("market bakery shop cafe farm")
AT = {place: "at" for place in _words("market bakery station school zoo harbour theatre lake hotel")} | {
    "farm": "on", "beach": "on"
} | {place: "in" for place in _words("shop cafe library park garden kitchen museum forest office")}  # fmt: skip
PLACES = tuple(AT)
GROCERIES = _words("apple pear lemon carrot onion banana tomato potato cake cookie egg peach")
THINGS = _words("book pencil cup candle hat umbrella lamp coat clock brush key bag spoon ball box letter")
ACTIVITIES = _words("reading singing waiting sleeping working playing talking eating drawing writing dancing")
PETS = _words("dog cat rabbit horse parrot mouse hamster turtle goat duck")
PET_NAMES = _words("Max Luna Coco Teddy Lucky Bella Rocky Daisy")
TREATS = _words("cheese bread rice apples carrots bananas nuts cake soup honey")
BEDS = tuple(f"{where} the {thing}" for where in ("under", "behind") for thing in _words("table bed chair tree sofa"))

DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words("January February March April May June July August September October November December")
SEASONS = _words("spring summer autumn winter")


def table(text: str) -> dict[str, str]:
    """'key: value; key: value' as a dict."""
    return dict(tuple(part.strip() for part in entry.split(":")) for entry in text.split(";"))


# --- grammar ----------------------------------------------------------------------------------------------------------


def plural(noun: str) -> str:
    irregular = {"mouse": "mice", "sheep": "sheep", "fish": "fish"}
    if noun in irregular:
        return irregular[noun]
    return noun + ("es" if noun.endswith(("s", "sh", "ch", "x", "to")) else "s")


def a(phrase: str) -> str:
    """`phrase` with its indefinite article; no word of this world starts with a silent h or a spoken "you"."""
    return ("an " if phrase[0].lower() in "aeiou" else "a ") + phrase


def several(count: int, noun: str) -> str:
    """'an egg', 'three eggs'."""
    return a(noun) if count == 1 else f"{NUMBERS[count]} {plural(noun)}"


def sentence(text: str, end: str = ".") -> str:
    return text[0].upper() + text[1:] + end


def listing(items: list[str]) -> str:
    """'a, b and c'."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
