"""Words to numbers, for the bag-of-words model: the training split's words in a fixed order."""

from collections import Counter
from collections.abc import Iterable, Sequence

SPECIAL = ("[PAD]", "[UNK]")


class Vocabulary:
    """The words of some texts, the most frequent first and equally frequent ones in alphabetical order.

    Words are what spaces part, as in the released code. Number 0 pads and 1 stands for every other word.

    Args:
        texts: the training split's.
        min_count: how often a word must occur.
        max_size: how many numbers there are at most, the two special ones included.

    Example:
        >>> vocabulary = Vocabulary(["red bean soup", "bean soup"])
        >>> vocabulary.words
        ('[PAD]', '[UNK]', 'bean', 'soup', 'red')
        >>> vocabulary.encode("green soup")
        [1, 3]
    """

    def __init__(self, texts: Iterable[str], min_count: int = 1, max_size: int | None = None) -> None:
        if max_size is not None and max_size < len(SPECIAL):
            raise ValueError(f"max_size must be at least {len(SPECIAL)}, got {max_size}")
        counts = Counter(word for text in texts for word in text.split())
        frequent = sorted(
            (word for word, n in counts.items() if n >= min_count), key=lambda word: (-counts[word], word)
        )
        self.words: tuple[str, ...] = (*SPECIAL, *(word for word in frequent if word not in SPECIAL))[:max_size]
        self.numbers = {word: number for number, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """The numbers of a text's words."""
        return [self.numbers.get(word, 1) for word in text.split()]

    def decode(self, numbers: Sequence[int]) -> str:
        """The words of these numbers."""
        return " ".join(self.words[number] for number in numbers)
