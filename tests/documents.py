"""What stands in README and the documents: their shell commands, word by word, and their Python."""

import contextlib
import re
import shlex

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "RESULTS.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))


def lines_of(text):
    """The lines of the code blocks of a page, indented or fenced, and its `code` in a paragraph."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    blocks = [block for language, block in fences if language in ("", "bash")]
    rest = re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    blocks += re.findall(r"(?:^ {4}.*\n)+", rest, re.MULTILINE)
    inline = re.findall(r"`([^`]+)`", re.sub(r"^ {4}.*\n", "", rest, flags=re.MULTILINE))
    blocks += [" ".join(code.split()) for code in inline]
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def calls(line):
    """The words of each call of a shell's line. Raises ValueError for what is no such line."""
    words = shlex.shlex(line, posix=True, punctuation_chars="&;|")
    words.whitespace_split = True
    call = []
    for word in words:
        if set(word) <= set("&;|"):
            yield call
            call = []
        else:
            call.append(word)
    yield call


def commands_of(path):
    """Words of every call of a module or script of ours on a page, of pip, and of launchers."""
    for line in lines_of(path.read_text(encoding="utf-8")):
        with contextlib.suppress(ValueError):  # prose
            for words in calls(line):
                start = next((i for i in range(len(words)) if is_program(words[i:])), None)
                if start is not None and "..." not in words:
                    yield words[start:]


def has_arguments(words):
    """Whether a call is more than the name of a program."""
    return len(words) > (1 if words[0] != "python" else 3 if words[1] == "-m" else 2)


def is_program(words):
    program, *rest = words
    return (
        (program == "python" and bool(rest) and rest[0].startswith(("scripts/", "tests/")))
        or (program == "python" and rest[:1] == ["-m"] and len(rest) > 1)
        or (program == "pip" and rest[:1] == ["install"])
        or program.startswith("scripts/launch_")
    )


def blocks_of(path):
    """(language, text) of the fenced blocks of a page, in their order."""
    text = path.read_text(encoding="utf-8")
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
