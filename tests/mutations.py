"""Seeded ways to break a JSON file: its values and its text."""

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

# Values of every wrong type, size and meaning; json.dumps writes NaN and infinities as literals.
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 4, 10**18, 10**400, -(10**400)),
    *(1.5, 1.0, 4.0, float("nan"), float("inf"), 1e308, 1e-320),
    *("", "1", "ant", "Ant", "bee", "a" * 10_000, "\u202e\U0001f642", "\ud800", "a\0b"),
    *("../../etc/passwd", "/etc/passwd", "../out.png", "sub/../../out.png", "..\\out.png"),
    *("im\0.png", ".", "..", "sub", "sub/", "1.png"),
    *([], {}, [[]], [None], [1, 2, 3], [1, 2, 3, 4, 5], ["1", "2", "3", "4"], {"a": 1}),
    *([0, 0, float("nan"), 5], [0, 0, float("inf"), 5], [0, 0, 1e308, 1e308], [1e30, 0, 9, 9]),
    *([0, 0, 10**400, 1], [-5, -5, 20, 20], [-9, -9, 9, 9], [40, 0, 5, 5], [True, True, 1, 1]),
    *([0, 0, -1, 5], [0, 0, 0, 5], [3, 3, 1e-9, 1e-9], [-1e30, -1e30, 2e30, 2e30]),
)
_INSERTED = (
    *(b"\xef\xbb\xbf", b"NaN", b"[", b"{", b'"', b"\x00", b"-Infinity", b"\\ud800", b"\xff"),
    *(b"9" * 5000, b"[" * 100_000, b'{"a":' * 50_000),
)
_ENCODINGS = ("utf-16", "utf-8-sig", "utf-32", "latin-1", "cp500")


def paths_in(content: Any, path: tuple = ()) -> Iterator[tuple]:
    """Keys and indices that lead to every value inside ``content``."""
    children = enumerate(content) if isinstance(content, list) else ()
    for key, value in content.items() if isinstance(content, dict) else children:
        yield (*path, key)
        yield from paths_in(value, (*path, key))


def break_json(content: Any, rng: random.Random) -> Any:
    """``content`` with one to three values replaced, removed, repeated or exchanged."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        paths = list(paths_in(content))
        if not paths:
            break
        *parents, key = rng.choice(paths)
        parent = _at(content, parents)
        kind = rng.choice(("set", "set", "set", "remove", "repeat", "exchange"))
        if kind == "set":
            parent[key] = copy.deepcopy(rng.choice(ODD_VALUES))
        elif kind == "remove":
            del parent[key]
        elif kind == "exchange":
            parent[key] = copy.deepcopy(_at(content, rng.choice(paths)))
        elif isinstance(parent, list):
            parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(parent[key]))
        else:
            parent[rng.choice(("x", "id", "captions", "area"))] = copy.deepcopy(parent[key])
    return content


def _at(content: Any, path: Any) -> Any:
    for key in path:
        content = content[key]
    return content


def break_text(data: bytes, rng: random.Random) -> bytes:
    """A text file cut off, with bytes changed, added or gone, or in another encoding."""
    broken = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not broken:
            break
        at, kind = rng.randrange(len(broken)), rng.randrange(5)
        if kind == 0:
            del broken[at:]
        elif kind == 1:
            broken[at] = rng.randrange(256)
        elif kind == 2:
            broken[at:at] = rng.choice(_INSERTED)
        elif kind == 3:
            del broken[at : at + rng.randrange(20)]
        else:
            text = bytes(broken).decode("utf-8", "replace")
            broken = bytearray(text.encode(rng.choice(_ENCODINGS), "replace"))
    return bytes(broken)


def broken_json_file(content: Any, seed: int) -> bytes:
    """The bytes of a JSON file that is broken in its text one time out of four, else in values."""
    rng = random.Random(seed)
    if seed % 4 == 0:
        return break_text(json.dumps(content).encode(), rng)
    return json.dumps(break_json(content, rng)).encode()
