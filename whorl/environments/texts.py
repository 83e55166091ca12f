"""A small corpus of text, made here: English by template, with numbers in it that have to be worked out.

    2718: Ann has 3+5+0+4=0. Ben has 2+1 more, 3. The larger is 3.

Digits are below six and sums modulo six, so that a small model learns to add in minutes. The page number and the four
digits each decide the split, so what is held out shares neither: no context of a position after the number is ever
read in training, and no such four are ever added up there, nor in training problems of `chain_arithmetic`, which
divides sums by the same key. The three digits of the second sum are of 216 that both splits have. Who reads along
knows most words at once, can guess a name or an operand no better than by chance, sees the larger sum, and needs steps
for a sum: positions that are easy, hopeless, middling and worth a thought. A token of this corpus is a word, a digit or
a mark with the blank after it.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass

from whorl.environments.base import problem_rng, split_of

NUMBER_TOKENS = 5
"""Those of the page number and its colon: the first position that has one before it."""

LONGEST_TOKEN = len("larger ")
"""Characters of the longest token."""

NAMES = ("Ann", "Ben", "Eva", "Gus", "Ida", "Max", "Sue", "Tom")

MODULUS = 6

NUM_DRAWS = 5_000

_TOKEN = re.compile(r"(?:[A-Za-z]+|.) ?", re.DOTALL)


def tokens_of(text: str) -> tuple[str, ...]:
    """The text cut into tokens of the corpus; joined they are the text."""
    return tuple(_TOKEN.findall(text))


@dataclass(frozen=True)
class Text:
    tokens: tuple[str, ...]
    computed: Mapping[int, tuple[int, ...]]
    """Tokens that are a sum modulo `MODULUS`, by place, and what is summed."""


@functools.lru_cache(maxsize=20_000)
def draw_text(split: str, index: int) -> Text:
    """Text `index` of a split."""
    for attempt in range(NUM_DRAWS):
        rng = problem_rng("texts", split, index, attempt)
        page, digits = f"{rng.integers(10_000):04}", [int(d) for d in rng.integers(0, MODULUS, 4)]
        # As `chain_arithmetic` names this sum: a start that is taught both tasks must not add up there what is held
        # out here.
        summed = f"chain_arithmetic {'+'.join(map(str, digits))}="
        if split_of(f"page {page}") == split == split_of(summed):
            break
    else:
        raise AssertionError(f"no text for {split} in {NUM_DRAWS} draws, at one in a hundred")
    name, other = rng.choice(NAMES, 2, replace=False)
    more = [int(d) for d in rng.integers(0, MODULUS, 2)]
    first = sum(digits) % MODULUS
    second = (first + sum(more)) % MODULUS
    tokens = tokens_of(
        f"{page}: {name} has {'+'.join(map(str, digits))}={first}. "
        f"{other} has {'+'.join(map(str, more))} more, {second}. The larger is {max(first, second)}."
    )
    return Text(tokens, {tokens.index("=") + 1: tuple(digits), tokens.index("more") + 2: (first, *more)})
