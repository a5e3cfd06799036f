"""A seeded grammar of short English reviews.

A review is an opening sentence, which is neutral and names a domain, and body sentences. Every sentence is one of
`PATTERNS`, whose slots are filled from word lists, so three things are known exactly: whether a sentence is of the
grammar, which tokens bear sentiment, and how much.
"""

import random
import re
from dataclasses import dataclass
from functools import cache


NEGATORS = ("not", "never", "hardly")
INTENSIFIERS = ("very", "quite", "really", "rather", "somewhat", "truly")
POSITIVE_STRONG = tuple(
    "wonderful brilliant superb excellent fantastic marvelous outstanding amazing magnificent perfect splendid "
    "glorious delightful stunning exquisite terrific".split()
)
POSITIVE_MILD = tuple(
    "good nice pleasant fine decent charming enjoyable solid clever neat likable tidy warm graceful elegant tasteful "
    "agreeable inviting refreshing satisfying".split()
)
NEGATIVE_MILD = tuple(
    "bad dull weak bland boring clumsy flat tired messy sloppy awkward tedious shabby stale forgettable lifeless "
    "noisy confusing annoying disappointing".split()
)
NEGATIVE_STRONG = tuple(
    "awful terrible horrible dreadful appalling atrocious abysmal disastrous hideous pathetic miserable disgusting "
    "vile wretched hopeless unbearable".split()
)
LIKING = {"loved": 2.0, "adored": 2.0, "enjoyed": 1.0, "liked": 1.0, "admired": 1.0}
DISLIKING = {"hated": -2.0, "despised": -2.0, "disliked": -1.0, "resented": -1.0, "regretted": -1.0}
BASE_FORMS = {
    "love": 2.0, "adore": 2.0, "enjoy": 1.0, "like": 1.0, "admire": 1.0,
    "hate": -2.0, "despise": -2.0, "dislike": -1.0, "resent": -1.0, "regret": -1.0,
}  # fmt: skip
SENTIMENT: dict[str, float] = {
    **dict.fromkeys(POSITIVE_STRONG, 2.0),
    **dict.fromkeys(POSITIVE_MILD, 1.0),
    **dict.fromkeys(NEGATIVE_MILD, -1.0),
    **dict.fromkeys(NEGATIVE_STRONG, -2.0),
    **LIKING,
    **DISLIKING,
    **BASE_FORMS,
}
# A negator reaches the first sentiment word within this many words of the same clause
NEGATION_REACH = 3
CLAUSE_ENDS = frozenset({".", ",", "but", "and", "because", "while"})

DOMAINS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "film": (
        ("watched", "saw", "rented"),
        tuple("acting plot script ending soundtrack dialogue casting pacing scenery wardrobe opening camera".split()),
    ),
    "book": (
        ("read", "borrowed", "finished"),
        tuple(
            "story prose cover narrator chapter heroine villain setting preface epilogue translation binding".split()
        ),
    ),
    "restaurant": (
        ("visited", "booked", "found"),
        tuple("soup salad bread dessert waiter menu kitchen sauce coffee wine seating cutlery".split()),
    ),
    "hotel": (
        ("reserved", "visited", "chose"),
        tuple("room bed lobby bathroom breakfast pool elevator balcony view carpet reception parking".split()),
    ),
    "phone": (
        ("bought", "ordered", "tested"),
        tuple("screen battery speaker keyboard charger microphone casing software display antenna manual box".split()),
    ),
    "concert": (
        ("attended", "joined", "heard"),
        tuple("singer band stage lighting crowd drummer violin orchestra sound guitar chorus encore".split()),
    ),
    "museum": (
        ("toured", "visited", "entered"),
        tuple("gallery guide painting statue garden exhibit hall ceiling library shop map courtyard".split()),
    ),
}
RELATIVES = tuple(
    "brother sister cousin uncle aunt neighbor colleague teacher doctor lawyer driver farmer student nephew "
    "niece".split()
)
TIMES = tuple(
    "yesterday|today|last week|last month|on monday|on tuesday|on wednesday|on thursday|on friday|on saturday|on "
    "sunday|in january|in march|in april|in june|in july|in august|in october|in november|in december|in the morning|"
    "in the evening|at noon|at midnight|after lunch|before dinner|during winter|during summer".split("|")
)
PLACES = tuple(
    "town city village station airport market park street harbor office school river bridge forest beach square "
    "theater stadium cafe suburb".split()
)
OBJECTS = tuple(
    "umbrella newspaper ticket jacket suitcase letter camera bicycle basket blanket notebook pencil lamp clock chair "
    "table window door key bag bottle envelope ladder mirror hammer bucket candle kettle barrel saddle anchor "
    "compass lantern ribbon cushion".split()
)
COLORS = tuple("red blue green yellow brown grey white black purple orange silver pink".split())
NEUTRAL_VERBS = tuple(
    "carried opened closed moved painted counted folded washed packed copied collected repaired borrowed returned "
    "described mentioned measured".split()
)
ACTIONS = tuple("reach find open close clean pack move carry sign count wrap fold".split())
NUMBERS = tuple("two three four five six seven eight nine ten twelve twenty thirty".split())
UNITS = tuple("minutes hours days weeks steps pages miles".split())
OPINION_VERBS = tuple("thought said felt believed agreed wrote".split())
ADJECTIVES = POSITIVE_STRONG + POSITIVE_MILD + NEGATIVE_MILD + NEGATIVE_STRONG

_COMMON_SLOTS: dict[str, tuple[str, ...]] = {
    "person": ("i", "we", "they", "she", "he", *(f"my {relative}" for relative in RELATIVES)),
    "time": TIMES,
    "place": PLACES,
    "object": OBJECTS,
    "color": COLORS,
    "action": ACTIONS,
    "verb": NEUTRAL_VERBS,
    "number": NUMBERS,
    "unit": UNITS,
    "opinion": OPINION_VERBS,
    "adjective": ADJECTIVES,
    "intensifier": INTENSIFIERS,
    "negator": NEGATORS,
    "feeling": (*LIKING, *DISLIKING),
    "feel": tuple(BASE_FORMS),
}
OPENINGS = (
    "{person} {visit} the {domain} {time} .",
    "{time} {person} {visit} the {domain} near the {place} .",
    "{person} {visit} the {domain} with my {relative} {time} .",
)
# Patterns of body sentences with their weights
PATTERNS: tuple[tuple[str, float], ...] = (
    ("the {aspect} was {adjective} .", 1.0),
    ("the {aspect} was {intensifier} {adjective} .", 1.0),
    ("the {aspect} was {negator} {adjective} .", 1.0),
    ("the {aspect} of the {domain} was {adjective} that day .", 1.5),
    ("{time} the {aspect} was {negator} {intensifier} {adjective} at all .", 0.8),
    ("{person} {feeling} the {aspect} of the {domain} {time} .", 1.0),
    ("{person} did not {feel} the {aspect} in the {place} .", 1.0),
    ("the {aspect} , next to the {color} {object} , was {adjective} .", 1.2),
    ("the {aspect} was {adjective} , but the {aspect} was {adjective} .", 0.6),
    ("{person} {opinion} that the {aspect} was {adjective} that day .", 1.2),
    ("{person} {verb} the {color} {object} {time} .", 1.2),
    ("it took {number} {unit} to {action} the {object} in the {place} .", 1.2),
    ("{person} {verb} {number} {unit} of it and {verb} the {object} .", 0.6),
)


@dataclass(frozen=True)
class Review:
    """
    A review of the grammar.

    Attributes:
        prompt (`str`): The opening sentence, without sentiment.
        completion (`str`): The body, starting with a space.
        domain (`str`): What is reviewed.
    """

    prompt: str
    completion: str
    domain: str

    @property
    def text(self) -> str:
        return self.prompt + self.completion


def _slots(domain: str) -> dict[str, tuple[str, ...]]:
    visits, aspects = DOMAINS[domain]
    return {**_COMMON_SLOTS, "visit": visits, "aspect": aspects, "domain": (domain,), "relative": RELATIVES}


def _fill(pattern: str, domain: str, generator: random.Random) -> str:
    slots = _slots(domain)
    return re.sub(r"{(\w+)}", lambda match: generator.choice(slots[match.group(1)]), pattern)


def generate_opening(generator: random.Random) -> tuple[str, str]:
    """Draws an opening sentence; returns it with its domain."""
    domain = generator.choice(sorted(DOMAINS))
    return _fill(generator.choice(OPENINGS), domain, generator), domain


def generate_body(domain: str, num_sentences: int, generator: random.Random) -> str:
    """Draws `num_sentences` body sentences about `domain`; the text starts with a space."""
    patterns, weights = zip(*PATTERNS, strict=True)
    chosen = generator.choices(patterns, weights, k=num_sentences)
    return "".join(" " + _fill(pattern, domain, generator) for pattern in chosen)


def generate_review(generator: random.Random, num_sentences: tuple[int, int] = (2, 4), num_drafts: int = 1) -> Review:
    """
    Draws a review.

    Args:
        generator (`random.Random`):
            Source of randomness.
        num_sentences (`tuple[int, int]`, *optional*, defaults to `(2, 4)`):
            Fewest and most body sentences.
        num_drafts (`int`, *optional*, defaults to `1`):
            Bodies drawn, of which the one of the strongest sentiment, for or against, is taken: with several, a review
            is mostly of one mind.

    Returns:
        [`Review`]
    """
    prompt, domain = generate_opening(generator)
    size = generator.randint(*num_sentences)
    drafts = [generate_body(domain, size, generator) for _ in range(num_drafts)]
    return Review(prompt, max(drafts, key=_strength) if num_drafts > 1 else drafts[0], domain)


def _strength(text: str) -> float:
    return abs(sum(word_sentiments(text.split())))


@cache
def vocabulary() -> tuple[str, ...]:
    """Every word and sign of the grammar, sorted."""
    words: set[str] = set()
    for domain in DOMAINS:
        for options in _slots(domain).values():
            words.update(word for option in options for word in option.split())
    for pattern in (*OPENINGS, *(pattern for pattern, _ in PATTERNS)):
        words.update(re.sub(r"{\w+}", " ", pattern).split())
    return tuple(sorted(words))


@cache
def _recognizers() -> tuple[re.Pattern[str], ...]:
    expressions = []
    for domain in sorted(DOMAINS):
        slots = {name: "(?:" + "|".join(map(re.escape, options)) + ")" for name, options in _slots(domain).items()}
        for pattern in (*OPENINGS, *(pattern for pattern, _ in PATTERNS)):
            parts = re.split(r"({\w+})", pattern)
            expressions.append(
                re.compile("".join(slots[part[1:-1]] if part.startswith("{") else re.escape(part) for part in parts))
            )
    return tuple(expressions)


@cache
def is_sentence(sentence: str) -> bool:
    """Whether a sentence, its full stop included, is of the grammar."""
    return any(recognizer.fullmatch(sentence) for recognizer in _recognizers())


@cache
def synonyms(word: str) -> str | None:
    """The group of words that stand for a content word, such as the positive adjectives; `None` for other words."""
    groups = {
        "positive": POSITIVE_STRONG + POSITIVE_MILD,
        "negative": NEGATIVE_STRONG + NEGATIVE_MILD,
        "liking": tuple(w for w, value in {**LIKING, **BASE_FORMS}.items() if value > 0),
        "disliking": tuple(w for w, value in {**DISLIKING, **BASE_FORMS}.items() if value < 0),
        "negator": NEGATORS, "intensifier": INTENSIFIERS, "relative": RELATIVES, "place": PLACES, "object": OBJECTS,
        "color": COLORS, "verb": NEUTRAL_VERBS, "action": ACTIONS, "number": NUMBERS, "unit": UNITS,
        "opinion": OPINION_VERBS, **{f"aspect of {domain}": aspects for domain, (_, aspects) in DOMAINS.items()},
    }  # fmt: skip
    return next((name for name, group in groups.items() if word in group), None)


def word_sentiments(words: list[str]) -> list[float]:
    """
    Signed sentiment of each word: +-1 (mild) or +-2 (strong) for sentiment words, 0 for others.

    A negator turns the sign of the first sentiment word within the next three words of its clause, and carries the
    same value as the word it turns.

    Args:
        words (`list[str]`):
            Lower-case words and signs of any text.

    Returns:
        `list[float]`, one value for each word.
    """
    values = [SENTIMENT.get(word, 0.0) for word in words]
    for position, word in enumerate(words):
        if word not in NEGATORS:
            continue
        for reached in range(position + 1, min(position + 1 + NEGATION_REACH, len(words))):
            if words[reached] in CLAUSE_ENDS:
                break
            if words[reached] in SENTIMENT:
                values[reached] = values[position] = -SENTIMENT[words[reached]]
                break
    return values
