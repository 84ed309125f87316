"""Text of a made-up language, endless, reproducible, and with a known entropy.

A seed makes the language: some two hundred words spelled from syllables, and for each word the words that
like to stand beside it. A second seed makes the text. Sentences have a grammar, the object of one is often
the subject of the next, and word frequencies fall like Zipf's law; so a model has spelling, grammar,
collocations and context to learn, and its weights have something to lose.
"""

import dataclasses
import math

import numpy as np

ALPHABET = " .abcdefghijklmnopqrstuvwxyz"
VOCABULARY = len(ALPHABET)

_ONSETS = ("", *"bdfgklmnprstvz", "br", "kr", "st", "sk", "pl", "tr", "sh", "th")
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ou")
_CODAS = ("", "", "n", "r", "s", "l", "m", "nd", "st", "rk")
_SIZES = {"noun": 96, "verb": 48, "adjective": 32, "place": 16}
_FAVOURITES = {
    ("noun", "verb"): 6,
    ("noun", "adjective"): 5,
    ("verb", "noun"): 8,
    ("verb", "place"): 3,
}
_LIKING = 0.92  # how often a word is followed by one of its favourites
_RETURN = 0.5  # how often the object of a sentence is the subject of the next
_ADJECTIVE = 0.4
_PLACE = 0.35


@dataclasses.dataclass(frozen=True)
class Language:
    """Words and their tastes.

    Attributes:
        words: spellings of each class.
        likes: for classes (a, b), cumulative probabilities [words of a, words of b] of b beside a.
    """

    words: dict[str, list[str]]
    likes: dict[tuple[str, str], np.ndarray]

    @classmethod
    def invent(cls, seed: int = 0) -> "Language":
        """A language of `seed`'s own."""
        rng = np.random.default_rng(seed)
        taken = {"the", "in"}
        words: dict[str, list[str]] = {}
        for kind, count in _SIZES.items():
            found = words.setdefault(kind, [])
            while len(found) < count:
                word = "".join(_syllable(rng) for _ in range(1 + int(rng.random() < 0.35)))
                if len(word) > 2 and word not in taken:
                    taken.add(word)
                    found.append(word)
        likes = {("", "noun"): np.cumsum(_zipf(_SIZES["noun"]))[None]}
        for (a, b), count in _FAVOURITES.items():
            table = np.tile(_zipf(_SIZES[b]) * (1 - _LIKING), (_SIZES[a], 1))
            for row in table:
                row[np.argsort(rng.random(_SIZES[b]))[:count]] += _LIKING * _zipf(count)
            likes[a, b] = np.cumsum(table, axis=1)
        return cls(words, likes)

    def write(self, characters: int, seed: int) -> tuple[np.ndarray, float]:
        """Text of this language.

        Args:
            characters: length.
            seed: of the text; different seeds give independent texts.

        Returns:
            tokens int32 [characters], indices into `ALPHABET`; and the entropy of the text in nats a
            character: no model can have a lower expected loss.
        """
        writer = _Writer(self, np.random.default_rng([seed, 1]))
        while writer.length < characters:
            writer.sentence()
        codes = np.frombuffer("".join(writer.parts)[:characters].encode(), np.uint8)
        table = np.zeros(256, np.int32)
        table[np.frombuffer(ALPHABET.encode(), np.uint8)] = np.arange(VOCABULARY)
        return table[codes], writer.surprise / writer.length


class _Writer:
    """Draws sentences and adds up how surprising each draw was."""

    def __init__(self, language: Language, rng: np.random.Generator):
        self.language = language
        self.draws = iter(())
        self.rng = rng
        self.parts: list[str] = []
        self.length = 0
        self.surprise = 0.0
        self.topic: int | None = None

    def sentence(self) -> None:
        subject = self.topic
        if subject is None or not self._yes(_RETURN):
            subject = self._draw("", 0, "noun")
        verb = self._noun(subject, "verb")
        obj = self._draw("verb", verb, "noun", put=False)
        self._noun(obj, None)
        if self._yes(_PLACE):
            self._put("in")
            self._draw("verb", verb, "place")
        self._put(".", space=False)
        self.topic = obj

    def _noun(self, noun: int, follower: str | None) -> int:
        """The noun with its article and perhaps an adjective; then a word of class `follower`."""
        self._put("the")
        if self._yes(_ADJECTIVE):
            self._draw("noun", noun, "adjective")
        self._put(self.language.words["noun"][noun])
        return self._draw("noun", noun, follower) if follower else 0

    def _uniform(self) -> float:
        value = next(self.draws, None)
        if value is None:
            self.draws = iter(self.rng.random(4096).tolist())
            value = next(self.draws)
        return value

    def _yes(self, probability: float) -> bool:
        yes = self._uniform() < probability
        self.surprise -= math.log(probability if yes else 1 - probability)
        return yes

    def _draw(self, given: str, index: int, kind: str, *, put: bool = True) -> int:
        cumulative = self.language.likes[given, kind][index]
        chosen = int(np.searchsorted(cumulative, self._uniform() * cumulative[-1], side="right"))
        chosen = min(chosen, len(cumulative) - 1)
        below = cumulative[chosen - 1] if chosen else 0.0
        self.surprise -= math.log((cumulative[chosen] - below) / cumulative[-1])
        if put and given:
            self._put(self.language.words[kind][chosen])
        return chosen

    def _put(self, word: str, *, space: bool = True) -> None:
        text = f" {word}" if space else word
        self.parts.append(text)
        self.length += len(text)


def _zipf(count: int) -> np.ndarray:
    weights = 1 / (np.arange(count) + 2.0)
    return weights / weights.sum()


def _syllable(rng: np.random.Generator) -> str:
    return "".join(part[int(rng.random() * len(part))] for part in (_ONSETS, _VOWELS, _CODAS))


def windows(tokens: np.ndarray, length: int) -> np.ndarray:
    """Tokens [T] cut into rows: [T // length, length]."""
    count = len(tokens) // length
    return tokens[: count * length].reshape(count, length)
