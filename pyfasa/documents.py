"""Long documents with facts hidden in them, and questions about the facts.

The text is the source of Python's standard library, read from this machine at run time, so nothing
of it is shipped. The forms of facts and questions are those that the bundled model was trained on
(models/README.md); they are plain enough for any chat model.
"""

from __future__ import annotations

import random
import re
import sysconfig
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

from pyfasa.errors import HostError

Tokenize = Callable[[str], Sequence[int]]

ADJECTIVES = re.findall(
    r"\w+",
    """
    amber ancient azure bitter bold brave bright calm clever cosmic crimson curious daring distant
    dizzy dusty eager electric faint fancy fierce floral foggy frosty gentle giant golden happy
    hollow honest humble hungry icy jolly keen lazy lively lonely lucky lunar mellow misty modest
    noble northern pale patient polar proud quaint quiet rapid rustic rusty scarlet sharp shiny
    silver simple sleepy smooth snowy solar stormy sturdy sunny swift tender tidy velvet violet
    vivid warm western wise young zesty
    """,
)

NOUNS = re.findall(
    r"\w+",
    """
    almond anchor arrow badger banjo basket beetle blanket bottle bridge cactus candle canoe
    canyon castle cedar cello cherry chisel clover cobalt comet compass cricket daisy desert
    diamond dolphin dragon drum emerald engine falcon flute forest galaxy garden ginger glacier
    glider granite hammer harbor helmet hornet island ladder lagoon lantern lemon lobster lotus
    mango maple meadow meteor mirror mountain nebula opal orchid otter panda papaya pepper piano
    pillow piston planet prairie quartz raven river rocket ruby saddle saffron salmon shield
    sparrow spear spider tiger topaz trumpet tulip tundra turbine turtle valley violin wagon
    walnut whale willow wizard
    """,
)

# Not prose: tables, tests of odd encodings, generated text, other people's packages.
_NOT_SOURCE = re.compile(
    r"(_sysconfigdata.*|config-.*|dist-packages|encodings|ensurepip|idlelib|lib-dynload|lib2to3|pydoc_data"
    r"|site-packages|test|turtledemo)(/|$)"
)


@dataclass(frozen=True)
class _Form:
    sentence: str
    question: str
    answer: str


FORMS = {
    "code": _Form(
        "The secret code for {name} is {value}.",
        "What is the secret code for {name}?",
        "The secret code for {name} is {value}.",
    ),
    "address": _Form(
        "Remember that {name} lives at {value} Main Street.",
        "Where does {name} live?",
        "{name} lives at {value} Main Street.",
    ),
    "key": _Form("key {name}: {value}", "What is the value of key {name}?", "{value}"),
    "phone": _Form(
        "The phone number of {name} is {value}.",
        "What is the phone number of {name}?",
        "{value}",
    ),
    "ticket": _Form(
        "Ticket {name} was closed with reference {value}.",
        "Which reference closed ticket {name}?",
        "{value}",
    ),
}

MAX_FACTS = len(ADJECTIVES) * len(NOUNS)
"""Facts of one document: there are no more names."""


@dataclass(frozen=True)
class Fact:
    """One sentence to be found again.

    `position` is the token of the document at which `sentence` starts. It is counted piece by
    piece between the facts: a tokenizer that adds or merges tokens at the start of a text is off
    by that much per fact before it.
    """

    form: str  # "code", "address", "key", "phone" or "ticket"
    name: str
    value: str  # digits, the first not 0
    sentence: str
    question: str
    answer: str
    position: int


@dataclass(frozen=True)
class Document:
    """Text with `facts` in it, in the order in which they stand; `n_tokens` is its length."""

    text: str
    facts: tuple[Fact, ...]
    n_tokens: int


def make_document(
    tokenize: Tokenize,
    n_tokens: int,
    n_facts: int,
    seed: int,
    *,
    digits: tuple[int, int] = (7, 7),
    sources: Path | None = None,
) -> Document:
    """Hide `n_facts` facts in source text, spread evenly over a document of `n_tokens` tokens.

    tokenize  text to tokens, without BOS: `lambda t: llm.tokenize(t.encode(), add_bos=False)`
    n_tokens  the document has at most as many, and at most 1% (or 4 tokens, if that is more) fewer
    n_facts   1 to MAX_FACTS; each on a line of its own, no name or value twice in a document
    seed      equal arguments give an equal document on equal sources, so on one version of Python
    digits    least and most digits of a value. The bundled model was trained on 4 to 7; it finds
              all of them, but the fewer there are, the more often its answer runs on.
    sources   folder of .py files; None: the standard library

    Raises ValueError if the facts need more tokens or the document needs more text than there are,
    HostError if there are no sources.
    """
    rng = random.Random(seed)
    facts = invent_facts(rng, n_facts, digits)
    depths = [(i + rng.random()) / n_facts for i in range(n_facts)]
    return hide(tokenize, n_tokens, facts, depths, rng, sources=sources)


def hide(
    tokenize: Tokenize,
    n_tokens: int,
    facts: Sequence[Fact],
    depths: Sequence[float],
    rng: random.Random,
    *,
    sources: Path | None = None,
) -> Document:
    """Source text of `n_tokens` tokens with each fact at its depth: 0 the beginning, 1 the end.

    facts   in the order of `depths`, which ascend; none at all give plain source text
    rng     decides which sources come in which order

    For the rest, and for errors, see `make_document`.
    """
    paths = _source_files(sources)
    rng.shuffle(paths)

    n_chars = 4 * n_tokens
    while True:
        source = _read(paths, n_chars)
        layout = _Layout(source, tuple(fact.sentence for fact in facts), tuple(depths))
        if len(tokenize("".join(layout.pieces(len(source))))) >= n_tokens:
            break
        if len(source) < n_chars:
            raise ValueError(
                f"a document of {n_tokens} tokens was asked for, but all sources together have "
                f"about {len(tokenize(source))}: ask for a shorter one"
            )
        n_chars *= 2

    length = _fit(lambda n: len(tokenize("".join(layout.pieces(n)))), len(source), n_tokens)
    pieces = layout.pieces(length)
    text = "".join(pieces)
    # The letter stands for the next sentence: without it, blank lines may be merged at the end.
    positions = accumulate(len(tokenize(piece + "A")) - 1 for piece in pieces[:-1])
    placed = (replace(fact, position=p) for fact, p in zip(facts, positions, strict=True))
    return Document(text, tuple(placed), len(tokenize(text)))


def ask(question: str, document_text: str) -> list[dict[str, str]]:
    """Chat messages about a document: one user message of document, blank line and question.

    The document stands first, so that all questions about it share it as the prefix of a prompt.
    """
    return [{"role": "user", "content": f"{document_text}\n\n{question}"}]


def is_right(answer_text: str, fact: Fact) -> bool:
    """Whether the value of `fact` stands in the answer as a number, not inside a longer one."""
    return re.search(rf"(?<!\d){fact.value}(?!\d)", answer_text) is not None


def invent_facts(rng: random.Random, n: int, digits: tuple[int, int] = (4, 7)) -> list[Fact]:
    """n facts with unique names and values, the forms in equal shares, `position` still 0.

    Raises ValueError if there are not so many names, or values of so few digits.
    """
    least, most = digits
    n_values = 10**most - 10 ** (least - 1) if 1 <= least <= most else 0
    if not 1 <= n <= min(MAX_FACTS, n_values // 2):
        raise ValueError(
            f"n_facts is {n}, but there can be 1 to {min(MAX_FACTS, n_values // 2)} facts with "
            f"values of {least} to {most} digits: choose a number in that range, or more digits"
        )
    pairs = rng.sample(range(MAX_FACTS), n)
    names = [f"{ADJECTIVES[p // len(NOUNS)]} {NOUNS[p % len(NOUNS)]}" for p in pairs]
    kinds = [list(FORMS)[i % len(FORMS)] for i in range(n)]
    rng.shuffle(kinds)
    values: dict[str, None] = {}
    while len(values) < n:
        length = rng.randint(least, most)
        values[str(rng.randrange(10 ** (length - 1), 10**length))] = None
    return [make_fact(*known) for known in zip(kinds, names, values, strict=True)]


def make_fact(form: str, name: str, value: str) -> Fact:
    """A fact of one of the `FORMS`, `position` still 0."""
    parts = FORMS[form]
    sentence, question, answer = (
        part.format(name=name, value=value)
        for part in (parts.sentence, parts.question, parts.answer)
    )
    return Fact(form, name, value, sentence, question, answer, position=0)


def _source_files(folder: Path | None) -> list[Path]:
    """Source files in an order that does not depend on the file system."""
    root = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    found = {path.relative_to(root).as_posix(): path for path in root.glob("*.py")}
    found |= {path.relative_to(root).as_posix(): path for path in root.glob("*/*.py")}
    names = sorted(name for name in found if not _NOT_SOURCE.match(name))
    if not names:
        raise HostError(
            f"{root} has no .py files, and documents are made of their text: use a Python that "
            "keeps the sources of its standard library, or name a folder of .py files"
        )
    return [found[name] for name in names]


def _read(paths: Sequence[Path], n_chars: int) -> str:
    """Text of the first files, n_chars long or all there is; files beyond ASCII are passed over."""
    texts: list[str] = []
    size = 0
    for path in paths:
        if size >= n_chars:
            break
        try:
            text = path.read_text(encoding="ascii")
        except UnicodeDecodeError:
            continue
        texts.append(text)
        size += len(text)
    return "".join(texts)[:n_chars]


class _Layout:
    """Puts sentences into a source text of any length: each at its depth, on a line of its own."""

    def __init__(self, source: str, sentences: Sequence[str], depths: Sequence[float]) -> None:
        self._source = source
        self._sentences = sentences
        self._depths = depths
        self._lines = [0, *(match.end() for match in re.finditer("\n", source))]

    def pieces(self, length: int) -> list[str]:
        """The first `length` characters, cut before each sentence: one piece more than those."""
        pieces = []
        piece = ""
        done = 0
        for sentence, depth in zip(self._sentences, self._depths, strict=True):
            start = self._lines[bisect_right(self._lines, int(depth * length)) - 1]
            pieces.append(piece + self._source[done:start])
            piece = sentence + "\n"
            done = start
        return [*pieces, piece + self._source[done:length]]


def _fit(measure: Callable[[int], int], longest: int, target: int) -> int:
    """A length with target * 0.995 <= measure(length) <= target, or as near as characters allow.

    requires: measure grows nearly in proportion; measure(longest) >= target.
    """
    low, high = 0, longest
    n_low, n_high = measure(low), measure(high)
    if n_low > target:
        raise ValueError(
            f"the facts alone take {n_low} tokens, but the document may have {target}: ask for "
            "fewer facts or more tokens"
        )
    slack = target // 200
    step = 0
    while high - low > 1 and target - n_low > slack:
        step += 1
        # Proportion converges in a few steps; a bisection now and then bounds them.
        share = 0.5 if step % 4 == 0 else (target - slack / 2 - n_low) / max(n_high - n_low, 1)
        middle = min(max(low + int((high - low) * share), low + 1), high - 1)
        n_middle = measure(middle)
        if n_middle <= target:
            low, n_low = middle, n_middle
        else:
            high, n_high = middle, n_middle
    return low
