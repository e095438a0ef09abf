"""Four domains of text that exist on every Python installation, each split into training and held-out parts.

Code and prose come from the files of the interpreter and of the packages beside it; sums and Roman numerals
are enumerated. Nothing is downloaded. The same installation always gives the same text.
"""

import ast
import re
import sysconfig
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

PASSAGE_CHARACTERS = 360  # fills a context of 128 tokens with code, and most of it with prose
LINES_PER_PASSAGE = 6
DOCUMENT_CHARACTERS = 10_000
EVERY_TOKEN = r"(?s)."
ROMAN_VALUES = (1000, 900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1)
ROMAN_SYMBOLS = ("M", "CM", "D", "CD", "C", "XC", "L", "XL", "X", "IX", "V", "IV", "I")


@dataclass(frozen=True)
class Domain:
    """One ability: what to learn it from, what to test it on, and which part of a test passage counts.

    `scored` matches every stretch that must be predicted as a whole to be an exact match: each word of a
    text, or the answer on each line of exercises (with its line end, so that stopping in time counts).
    """

    name: str
    title: str
    train: str
    held_out: tuple[str, ...]
    scored: re.Pattern[str]


def load_domains(characters: int = 1_200_000, passages: int = 64) -> list[Domain]:
    """The four domains, with at most `characters` of training text and `passages` held-out passages each."""
    return [
        text_domain("code", "Python code", python_sources(), characters, passages),
        text_domain("prose", "English prose", prose_documents(), characters, passages),
        exercise_domain("roman", "Roman numerals", romans(), r"(?<=is) [A-Z]+\n", characters // 2, passages),
        text_domain("names", "Unicode names", character_names(), characters // 2, passages),
    ]


def text_domain(name: str, title: str, documents: Iterable[tuple[str, str]], characters: int, passages: int) -> Domain:
    """A domain of documents, of which one in eight is held out.

    No document gives more than DOCUMENT_CHARACTERS to learn from, or one passage in sixteen to be tested on:
    many authors teach more than one long file, and a test on one file would measure that file.
    """
    train: list[str] = []
    held_out: list[str] = []
    room = characters
    for origin, text in documents:
        if is_held_out(origin):
            held_out += cut(text, PASSAGE_CHARACTERS)[: passages // 16]
        elif room > 0:
            train.append(text[: min(room, DOCUMENT_CHARACTERS)])
            room -= len(train[-1])
    return Domain(name, title, "\n".join(train), spread(held_out, passages), re.compile(EVERY_TOKEN))


def exercise_domain(name: str, title: str, lines: Iterable[str], answer: str, characters: int, passages: int) -> Domain:
    """A domain of exercises, one to a line: one in eight is never trained on, whatever its order."""
    train: list[str] = []
    held_out: list[str] = []
    for line in lines:
        (held_out if is_held_out(line) else train).append(line + "\n")
    shuffle = Random(name).shuffle
    shuffle(train)
    shuffle(held_out)
    text = "".join(train)
    repeated = text * (characters // len(text) + 1)
    groups = (held_out[i : i + LINES_PER_PASSAGE] for i in range(0, len(held_out), LINES_PER_PASSAGE))
    tests = ["".join(group) for group in groups]
    return Domain(name, title, repeated[:characters], tuple(tests[:passages]), re.compile(answer))


def is_held_out(key: str) -> bool:
    """One key in eight, by its checksum, so that the split does not depend on order or on what else exists."""
    return zlib.crc32(key.encode()) % 8 == 0


def cut(text: str, size: int) -> list[str]:
    """Consecutive stretches of exactly `size` characters; the rest is left out."""
    return [text[start : start + size] for start in range(0, len(text) - size + 1, size)]


def spread(passages: list[str], wanted: int) -> tuple[str, ...]:
    """At most `wanted` passages, taken evenly over the whole list rather than from its first documents."""
    step = max(1, len(passages) / wanted)
    return tuple(passages[int(i * step)] for i in range(min(wanted, len(passages))))


def python_sources() -> Iterator[tuple[str, str]]:
    """(path, source without docstrings) of the standard library's modules, in a mixed but fixed order."""
    for name, source in standard_library():
        code = source.splitlines()
        for text in reversed(docstrings(source)):
            del code[text.lineno - 1 : text.end_lineno]
        yield name, "\n".join(code) + "\n"


def prose_documents() -> Iterator[tuple[str, str]]:
    """(origin, paragraphs) of the language reference, licences, package descriptions and docstrings."""
    seen: set[str] = set()
    for origin, text in raw_prose():
        fresh = [p for p in paragraphs(text) if p not in seen]
        seen.update(fresh)
        if fresh:
            yield origin, "\n".join(fresh) + "\n"


def raw_prose() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    yield from sorted(topics.items())
    packages = Path(sysconfig.get_path("purelib"))
    for path in sorted(packages.glob("*.dist-info/**/*")):
        if path.is_file() and path.name.startswith(("METADATA", "LICENSE", "COPYING", "NOTICE")):
            yield path.parent.name, path.read_text(encoding="utf-8", errors="replace")
    for name, source in standard_library():
        yield name, "\n\n".join(str(node.value) for node in docstrings(source))


def paragraphs(text: str) -> list[str]:
    """The paragraphs of running English, each on one line: tables, code, links and lists fall away."""
    joined = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text))
    return [block for block in joined if is_prose(block)]


def is_prose(block: str) -> bool:
    """Whether a paragraph reads as sentences: long enough, and nearly all letters, spaces and commas."""
    plain = len(re.findall(r"[A-Za-z ,.']", block))
    return 80 <= len(block) <= 2000 and plain / len(block) > 0.95 and ">>>" not in block


def standard_library() -> Iterator[tuple[str, str]]:
    """(name, source) of the standard library's modules outside its test suites, in a mixed but fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "pydoc_data"}
    names = (path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    modules = (name for name in names if skipped.isdisjoint(name.split("/")))
    for name in sorted(modules, key=lambda name: zlib.crc32(name.encode())):
        yield name, (root / name).read_text(encoding="utf-8", errors="replace")


def docstrings(source: str) -> list[ast.Constant]:
    """The docstrings of a module, its classes and functions, in the order of the file."""
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = (node.body[:1] for node in ast.walk(ast.parse(source)) if isinstance(node, holders))
    first = [statement.value for body in bodies for statement in body if isinstance(statement, ast.Expr)]
    found = [node for node in first if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return sorted(found, key=lambda node: node.lineno)


def character_names() -> Iterator[tuple[str, str]]:
    """(first name, names) of the characters of Unicode in runs of 64, without those that are only numbered."""
    names = (unicodedata.name(chr(code), "") for code in range(0x20000))
    spoken = [name for name in names if name and not re.search(r"\d|HANGUL SYLLABLE", name)]
    runs = [spoken[start : start + 64] for start in range(0, len(spoken), 64)]
    Random("names").shuffle(runs)
    for run in runs:
        yield run[0], "\n".join(run) + "\n"


def romans() -> Iterator[str]:
    """Every number that has a Roman numeral."""
    for number in range(1, 4000):
        yield f"{number} is {roman(number)}"


def roman(number: int) -> str:
    """A number from 1 to 3999 in Roman numerals: 1994 is MCMXCIV."""
    letters = ""
    for value, symbol in zip(ROMAN_VALUES, ROMAN_SYMBOLS, strict=True):
        letters += symbol * (number // value)
        number %= value
    return letters
