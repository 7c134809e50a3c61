"""The phrases that carry a text, by rapid automatic keyword extraction (RAKE), and texts without some.

References:
    Rose, Engel, Cramer, Cowley 2010, "Automatic Keyword Extraction from Individual Documents".
"""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

# The words that English sentences are held together by; a phrase ends where one stands.
_STOP_WORDS = frozenset(
    """
    a about above after again against all also am an and any are aren't as at be because been before
    being below between both but by can can't cannot could couldn't did didn't do does doesn't doing
    don't down during each either else etc few for from further had has have having he her here hers
    herself him himself his how however i if in into is isn't it its itself just let may me might more
    most must my myself neither no nor not of off on once only or other ought our ours ourselves out
    over own per same shall she should so some such than that the their theirs them themselves then
    there these they this those through to too under until up upon us very was we were what when where
    which while who whom whose why will with within without would you your yours yourself yourselves
    """.split()  # noqa: SIM905 - a list, a line each, would be three pages
)
_PARTS = re.compile(r"[^\W_]+(?:['’_-][^\W_]+)*|\S")


@dataclass(frozen=True)
class KeyPhrase:
    """A phrase of a text.

    Attributes:
        text: In lower case, its words joined by single spaces.
        score: The sum over its words of how many words stand in all phrases that hold the word, over how
            many phrases those are.
        places: Where it stands: start and end of each appearance, in characters.
    """

    text: str
    score: float
    places: tuple[tuple[int, int], ...]


def key_phrases(text: str) -> list[KeyPhrase]:
    """Return the phrases of a text, those of the largest score first, ties by where they first stand."""
    places: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for run in _runs(text):
        phrase = " ".join(part.group().lower() for part in run)
        places[phrase].append((run[0].start(), run[-1].end()))
    appearances, lengths = defaultdict[str, int](int), defaultdict[str, int](int)
    for phrase, found in places.items():
        words = phrase.split()
        for word in words:
            appearances[word] += len(found)
            lengths[word] += len(words) * len(found)
    ranked = [
        KeyPhrase(phrase, sum(lengths[word] / appearances[word] for word in phrase.split()), tuple(found))
        for phrase, found in places.items()
    ]
    return sorted(ranked, key=lambda phrase: (-phrase.score, phrase.places[0]))


def degraded(text: str, phrases: Sequence[KeyPhrase], degree: int, degrees: int) -> str:
    """Return a text without its first ⌈m·j/K⌉ phrases.

    Args:
        text: Of which they are.
        phrases: All m of them, ranked.
        degree: j in [0, K); 0 deletes none.
        degrees: K.
    """
    gone = phrases[: math.ceil(len(phrases) * degree / degrees)]
    for start, end in sorted((place for phrase in gone for place in phrase.places), reverse=True):
        # With the space before it, so that none stands there twice.
        text = text[:start].removesuffix(" ") + text[end:]
    return text


def _runs(text: str) -> list[list[re.Match[str]]]:
    """Return runs of words that neither a stop word nor a mark interrupts."""
    runs: list[list[re.Match[str]]] = [[]]
    for part in _PARTS.finditer(text):
        word = part.group().lower()
        if not word[0].isalnum() or word in _STOP_WORDS:
            runs.append([])
        else:
            runs[-1].append(part)
    return [run for run in runs if run]
