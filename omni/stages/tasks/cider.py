"""CIDEr-D: how much a caption says of what several people said of the picture.

Vedantam et al. 2015, "CIDEr: Consensus-based Image Description Evaluation". N-grams of one to four words are weighted
by how often the caption has them and how rare they are among the references of all pictures (tf-idf); the similarity of
two captions is the cosine of these vectors. Departure: words are not stemmed, nor are they in the published code.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

N = 4  # the longest n-gram
SIGMA = 6.0  # of the penalty for captions of another length, in words


class DocumentFrequencies:
    """In how many documents each n-gram stands; a document is the references of one picture.

    Args:
        documents: for each picture, its references as lists of words.
    """

    def __init__(self, documents: Iterable[Sequence[Sequence[str]]]) -> None:
        self.count, self.containing = 0, Counter()
        for references in documents:
            self.count += 1
            self.containing.update({gram for words in references for n in range(1, N + 1) for gram in ngrams(words, n)})

    def rarity(self, gram: tuple[str, ...]) -> float:
        """log(documents / documents with the n-gram); of an n-gram that is in none, as if it were in one."""
        return math.log(max(1, self.count)) - math.log(max(1, self.containing[gram]))


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


def cider_d(words: Sequence[str], references: Sequence[Sequence[str]], frequencies: DocumentFrequencies) -> float:
    """CIDEr-D of a caption, from 0 to 10: the mean over references and lengths of n-grams."""
    total = 0.0
    for reference in references:
        length = math.exp(-((len(words) - len(reference)) ** 2) / (2 * SIGMA**2))
        total += length * sum(_similarity(words, reference, n, frequencies) for n in range(1, N + 1)) / N
    return 10 * total / max(1, len(references))


def _similarity(words: Sequence[str], reference: Sequence[str], n: int, frequencies: DocumentFrequencies) -> float:
    """The cosine of two tf-idf vectors; repeating a word of the reference earns nothing more, as counts are clipped."""
    ours, true = (_weights(ngrams(one, n), frequencies) for one in (words, reference))
    norms = math.hypot(*ours.values()) * math.hypot(*true.values())
    return sum(min(weight, true.get(gram, 0.0)) * true.get(gram, 0.0) for gram, weight in ours.items()) / (norms or 1.0)


def _weights(grams: list[tuple[str, ...]], frequencies: DocumentFrequencies) -> dict[tuple[str, ...], float]:
    return {gram: count * frequencies.rarity(gram) for gram, count in Counter(grams).items()}
