"""What the pages say: their fenced blocks, the commands in them, their links and headings."""

import ast
import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "datasets" / "README.md",
    ROOT / "projects" / "HierKD" / "README.md",
]
# Scripts that say in their first lines how they are used.
SCRIPTS = [
    *(ROOT / name for name in ("train_net.py", "demo.py")),
    *sorted((ROOT / "tools").glob("*.py")),
    *sorted((ROOT / "datasets").glob("*.py")),
]
SHELL = ("sh", "bash")
LANGUAGES = (*SHELL, "python", "yaml", "json", "bibtex", "nginx", "text")
# What separates commands; "()" and the like are words, if quoted ones.
_SEPARATORS = {"|", "||", "&&", ";", "&"}
_REDIRECTIONS = {">", ">>", "<"}
_KEYWORDS = {"if", "then", "else", "while", "do", "!"}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language ("" if none is said) and its text without the fences."""

    language: str
    text: str
    line: int


@dataclass(frozen=True)
class Command:
    """A simple command, with what it reads from a heredoc and the file that it is redirected to."""

    words: tuple[str, ...]
    line: int  # of the page
    environment: tuple[str, ...] = ()  # NAME=VALUE before it
    heredoc: str | None = None
    writes: str | None = None
    source: str = field(default="", compare=False)  # the whole of the shell's command, as written

    def __str__(self) -> str:
        return f"line {self.line}: {shlex.join(self.words)}"


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def fenced_blocks(page: str) -> list[Block]:
    """All fenced blocks of a page, those in list items too."""
    blocks, fence, start, language, lines = [], "", 0, "", []
    for number, line in enumerate(page.splitlines(), start=1):
        match = re.match(r"\s*(`{3,}|~{3,})\s*(\w*)", line)
        if not fence and match:
            fence, language, start, lines = match[1], match[2], number, []
        elif fence and line.strip() == fence:
            text = textwrap.dedent("\n".join(lines))
            blocks.append(Block(language, text, start + 1))
            fence = ""
        elif fence:
            lines.append(line)
    if fence:
        raise ValueError(f"line {start}: a fence that is not closed")
    return blocks


def without_blocks(page: str) -> str:
    """A page with its fenced blocks blanked, so that line numbers stay."""
    lines = page.splitlines()
    for block in fenced_blocks(page):
        for i in range(block.line - 2, block.line + block.text.count("\n") + 1):
            lines[i] = ""
    return "\n".join(lines)


def inline_code(page: str) -> list[tuple[int, str]]:
    """Line and text of each code span, line breaks inside it as spaces."""
    text = without_blocks(page)
    return [
        (text.count("\n", 0, match.start()) + 1, " ".join(match[2].split()))
        for match in re.finditer(r"(?<!`)(`+)(?!`)((?:(?!\n\n).)+?)(?<!`)\1(?!`)", text, re.DOTALL)
    ]


def links(page: str) -> list[tuple[int, str]]:
    """Line and target of each link and picture."""
    text = re.sub(r"`[^`\n]*`", lambda code: "x" * len(code[0]), without_blocks(page))
    return [
        (text.count("\n", 0, match.start()) + 1, match[1])
        for match in re.finditer(r"\]\(\s*<?([^\s)>]+)>?[^)]*\)", text)
    ]


def anchors(page: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    found: dict[str, int] = {}
    names = set()
    for line in without_blocks(page).splitlines():
        match = re.match(r"#{1,6}\s+(.*?)\s*#*$", line)
        if match:
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", match[1]).lower()
            slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
            count = found.get(slug, 0)
            found[slug] = count + 1
            names.add(f"{slug}-{count}" if count else slug)
    return names


def read_shell(text: str, first_line: int = 1) -> Iterator[Command]:
    """Every simple command of a shell script, those in ``$(...)`` first.

    Raises:
        ValueError: a heredoc or a quotation does not end.
    """
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        number, line = first_line + at, lines[at]
        at += 1
        while True:
            if line.endswith("\\"):
                line = line[:-1]
            elif _is_closed(line):
                break
            else:
                line += "\n"
            if at == len(lines):
                raise ValueError(f"line {number}: the command does not end")
            line += lines[at]
            at += 1
        written, heredoc = line, None
        match = re.search(r"<<-?\s*(['\"]?)(\w+)\1", line)
        if match:
            line = line[: match.start()] + line[match.end() :]
            end = next((i for i in range(at, len(lines)) if lines[i].strip() == match[2]), None)
            if end is None:
                raise ValueError(f"line {number}: the heredoc has no {match[2]}")
            heredoc = "\n".join(lines[at:end]) + "\n"
            written += "\n" + "\n".join(lines[at : end + 1])
            at = end + 1
        yield from _split(line, number, heredoc, written)


def _is_closed(line: str) -> bool:
    try:
        shlex.split(line, comments=True)
    except ValueError:
        return False
    return True


def _split(line: str, number: int, heredoc: str | None, written: str) -> Iterator[Command]:
    while match := re.search(r"\$\(([^()]*)\)", line):
        yield from _split(match[1], number, None, match[1])
        line = f"{line[: match.start()]}SUBSTITUTED{line[match.end() :]}"
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word in _SEPARATORS:
            command = _command(words, number, heredoc, written)
            if command is not None:
                yield command
            words = []
        else:
            words.append(word)


def _command(words: list[str], line: int, heredoc: str | None, source: str) -> Command | None:
    rest, environment, writes = list(words), [], None
    while rest and rest[0] in _KEYWORDS:
        rest.pop(0)
    while rest and re.match(r"\w+=", rest[0]):
        environment.append(rest.pop(0))
    for i in reversed(range(len(rest))):
        if rest[i] in _REDIRECTIONS:
            if rest[i] != "<":
                writes = rest[i + 1]
            del rest[i : i + 2]
    if not rest or rest in (["fi"], ["done"]):
        return None
    return Command(tuple(rest), line, tuple(environment), heredoc, writes, source)


def usage_lines(script: str) -> str:
    """The commands in a script's docstring, blank lines elsewhere."""
    docstring = ast.get_docstring(ast.parse(script), clean=False) or ""
    lines, keep = [], False
    for line in docstring.splitlines():
        keep = keep or bool(re.match(r"\s*(python|torchrun|echo|make|pip) ", line))
        lines.append(line.strip() if keep else "")
        keep = keep and line.endswith("\\")
    return "\n".join(lines)


def commands_of(path: Path) -> list[Command]:
    """The commands of a page's shell blocks, or of a script's docstring."""
    text = path.read_text()
    if path.suffix == ".py":
        return list(read_shell(usage_lines(text)))
    return [
        command
        for block in fenced_blocks(text)
        if block.language in SHELL
        for command in read_shell(block.text, block.line)
    ]
