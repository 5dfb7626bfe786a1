"""Owns the embedded corpus: parallel German and English number words, made by code and never downloaded.

Numbers, ordinals, years, clock times and prices sit in short sentences, so that a model has to reorder (German says
"one and twenty"), to split long compounds and to agree on units: a task that a small transformer learns in minutes
and a dictionary does not. The same seed gives the same files on every machine.

This module must never touch a file outside the folder it is given, and must never import torch or fairseq.
"""

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

LANGUAGES = ("de", "en")
SPLITS = ("train", "valid", "test")
MAX_ATTEMPTS_PER_PAIR = 50

Pair = tuple[str, str]  # (German, English)

# Slots: n number, s small number, o ordinal, y year, t clock time, p price.
TEMPLATES: tuple[Pair, ...] = (
    ("{n}", "{n}"),
    ("Das sind {n}.", "That makes {n}."),
    ("Das Haus hat {s} Fenster.", "The house has {s} windows."),
    ("In der Stadt wohnen {n} Menschen.", "{n} people live in the town."),
    ("Das Brot kostet {p}.", "The bread costs {p}."),
    ("Im Jahr {y} kostete die Reise {p}.", "The journey cost {p} in the year {y}."),
    ("Der Zug fährt um {t} von Gleis {s} ab.", "The train leaves from platform {s} at {t}."),
    ("Am {o} Tag kamen {n} Gäste.", "{n} guests came on the {o} day."),
    ("Um {t} zahlte sie {p}.", "She paid {p} at {t}."),
    ("Er hat {s} Äpfel und {s} Birnen gekauft.", "He bought {s} apples and {s} pears."),
    ("Seit {y} steht sie auf dem {o} Platz.", "She has been in {o} place since {y}."),
)


def num2words(value: int, lang: str, to: str = "cardinal") -> str:
    """``value`` in words, by the library of that name, which is an extra and so is not loaded before it is needed."""
    import num2words as library

    return str(library.num2words(value, lang=lang, to=to))


def _number(rng: random.Random) -> Pair:
    """A number below a million; every count of digits is equally likely, or nearly all would have six."""
    value = rng.randint(2, 10 ** rng.randint(1, 6) - 1)  # from two on: the nouns around it are plural
    return num2words(value, lang="de"), num2words(value, lang="en").replace(",", "")


def _small_number(rng: random.Random) -> Pair:
    value = rng.randint(2, 99)
    return num2words(value, lang="de"), num2words(value, lang="en")


def _ordinal(rng: random.Random) -> Pair:
    value = rng.randint(1, 199)
    german = num2words(value, lang="de", to="ordinal") + "n"  # dative: "am ersten Tag", "auf dem ersten Platz"
    return german, num2words(value, lang="en", to="ordinal")


def _year(rng: random.Random) -> Pair:
    value = rng.randint(1100, 2099)
    return num2words(value, lang="de", to="year"), num2words(value, lang="en", to="year")


def _clock_time(rng: random.Random) -> Pair:
    """Twelve-hour clock, as it is spoken: German counts "half" towards the coming hour, English from the past one."""
    hour = rng.randint(1, 12)
    next_hour = hour % 12 + 1
    german, german_next = (num2words(h, lang="de") for h in (hour, next_hour))
    english, english_next = (num2words(h, lang="en") for h in (hour, next_hour))
    minutes = rng.randint(1, 29)
    german_minutes, english_minutes = num2words(minutes, lang="de"), num2words(minutes, lang="en")
    spoken = [
        (f"Viertel nach {german}", f"a quarter past {english}"),
        (f"halb {german_next}", f"half past {english}"),
        (f"Viertel vor {german_next}", f"a quarter to {english_next}"),
    ]
    if minutes not in (1, 15):  # "eins nach" and "fünfzehn nach" are not said
        spoken.append((f"{german_minutes} nach {german}", f"{english_minutes} past {english}"))
        spoken.append((f"{german_minutes} vor {german_next}", f"{english_minutes} to {english_next}"))
    return rng.choice(spoken)


def _price(rng: random.Random) -> Pair:
    euros, cents = rng.randint(2, 999), rng.choice((0, 0, *range(2, 100)))
    german, english = f"{num2words(euros, lang='de')} Euro", f"{num2words(euros, lang='en')} euros"
    if cents:
        german += f" {num2words(cents, lang='de')}"
        english += f" and {num2words(cents, lang='en')} cents"
    return german, english


SLOTS = {"n": _number, "s": _small_number, "o": _ordinal, "y": _year, "t": _clock_time, "p": _price}


def _capitalise(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _fill(template: Pair, rng: random.Random) -> Pair:
    """Fill the slots of both sides from left to right of the German side; English repeats of a slot keep that order."""
    german, english = template
    while "{" in german:
        slot = german[german.index("{") + 1]
        german_words, english_words = SLOTS[slot](rng)
        german = german.replace("{" + slot + "}", german_words, 1)
        english = english.replace("{" + slot + "}", english_words, 1)
    return _capitalise(german), _capitalise(english)


def generate_pairs(seed: int) -> Iterator[Pair]:
    """Endless stream of (German, English) sentence pairs; the same seed gives the same stream."""
    rng = random.Random(seed)
    while True:
        yield _fill(rng.choice(TEMPLATES), rng)


def make_splits(seed: int, sizes: Sequence[int]) -> list[list[Pair]]:
    """Splits that share no sentence in either language, and repeat none.

    Args:
        seed: of the generator.
        sizes: wanted pairs of each split, in order.

    Returns:
        One list of (German, English) pairs per entry of ``sizes``, of exactly that length.

    Raises:
        ValueError: a size is below 1, or the generator cannot make that many different sentences.
    """
    if min(sizes) < 1:
        raise ValueError(f"sizes of the splits are {list(sizes)}; each must be at least 1")
    seen: set[str] = set()
    pairs: list[Pair] = []
    stream = generate_pairs(seed)
    wanted = sum(sizes)
    for _ in range(MAX_ATTEMPTS_PER_PAIR * wanted):
        pair = next(stream)
        if seen.isdisjoint(pair):
            seen.update(pair)
            pairs.append(pair)
        if len(pairs) == wanted:
            break
    else:
        raise ValueError(f"only {len(pairs)} different pairs found where {wanted} are wanted; ask for fewer")
    splits = []
    for size in sizes:
        splits.append(pairs[:size])
        pairs = pairs[size:]
    return splits


def write_corpus(out: Path, seed: int, num_train: int, num_valid: int, num_test: int) -> None:
    """Write ``{train,valid,test}.{de,en}`` to ``out``, made when missing: UTF-8, line i translates line i."""
    out.mkdir(parents=True, exist_ok=True)
    for split, pairs in zip(SPLITS, make_splits(seed, (num_train, num_valid, num_test)), strict=True):
        for side, language in enumerate(LANGUAGES):
            text = "".join(pair[side] + "\n" for pair in pairs)
            (out / f"{split}.{language}").write_text(text, encoding="utf-8", newline="\n")


def main() -> None:
    """Command line: ``python -m fairseq_codistill.demo.corpus --out DIR``."""
    parser = argparse.ArgumentParser(description="Write the embedded German/English corpus of number words.")
    parser.add_argument("--out", type=Path, required=True, help="folder for {train,valid,test}.{de,en}")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--num-train", type=int, default=6000, help="training pairs")
    parser.add_argument("--num-valid", type=int, default=300, help="validation pairs")
    parser.add_argument("--num-test", type=int, default=300, help="test pairs")
    args = parser.parse_args()
    try:
        write_corpus(args.out, args.seed, args.num_train, args.num_valid, args.num_test)
    except ValueError as error:
        parser.error(str(error))
    except ImportError as error:
        sys.exit(f'corpus.py: {error}; run: pip install "fairseq-codistill[demo]"')
    print(f"{args.num_train} + {args.num_valid} + {args.num_test} pairs written to {args.out}")


if __name__ == "__main__":
    main()
