"""The words of the field are used: in docstrings, comments, help texts and errors of the package, and in the documents."""

import ast
import dataclasses
import io
import re
import tokenize
from pathlib import Path

import pytest

from lorafold.adapters.read_options import ReadOptions
from lorafold.options import ConvertOptions, MatchOptions, RunOptions, SumOptions

ROOT = Path(__file__).parent.parent

INSTEAD = (
    (r"\bremarks?\b", "metadata"),
    (r"\bcompanions?\b", "sidecar"),
    (r"\blone\b", "single file"),
    (r"\bturned round\b", "transposed"),
    (r"\blive models?\b|\blive road\b", "a model in memory"),
    (r"\broads?\b", "say what is called: the reader, the plan"),
    (r"\bone a processor\b", "one per CPU"),
    (r"\b(file|files|weights|shard|GGUF)'s heads?\b|\bheads? of (a|the) (safetensors |GGUF )?files?\b", "header"),
    (r"\bfoundation model\b", "base model"),
)
"""What is not said, as a regular expression, and what is said instead."""

PROSE = ("README.md", "CONTRIBUTING.md")


def words_of(path: Path) -> list[tuple[int, str]]:
    """The text of `path` that is prose, with its lines: of Python its strings and comments, with names in backquotes taken out."""
    text = path.read_text()
    if path.suffix != ".py":
        return [(i, re.sub(r"`[^`]*`", "", line)) for i, line in enumerate(text.splitlines(), 1)]
    kinds = {tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    tokens = [each for each in tokenize.generate_tokens(io.StringIO(text).readline) if each.type in kinds]
    return [(each.start[0] + i, re.sub(r"`[^`]*`", "", line)) for each in tokens for i, line in enumerate(each.string.split("\n"))]


@pytest.mark.parametrize(("word", "instead"), INSTEAD)
def test_the_word_is_not_used(word, instead):
    paths = [*(ROOT / "src" / "lorafold").rglob("*.py"), *(ROOT / name for name in PROSE)]
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text.strip()}"
        for path in paths
        for line, text in words_of(path)
        if re.search(word, text)
    ]
    assert found == [], f"say instead: {instead}"


@pytest.mark.parametrize(("text", "count"), [('x = "its remarks"\n', 1), ("# a remark\n", 1), ("remarks = 3\n", 0)])
def test_the_test_can_fail(tmp_path, text, count):
    (tmp_path / "a.py").write_text(text)
    assert sum(bool(re.search(INSTEAD[0][0], words)) for _, words in words_of(tmp_path / "a.py")) == count


@pytest.mark.parametrize("options", [SumOptions, MatchOptions, RunOptions, ConvertOptions, ReadOptions])
def test_help_texts_are_sentences(options):
    """They begin with a capital, or with the value that they explain and a colon; and end with a full stop."""
    for field in dataclasses.fields(options):
        said = field.metadata["said"]
        for text in filter(None, (said.doc, said.off)):
            assert re.match(r"[A-Z]|[a-z_0-9]+[: ]", text), (field.name, text)
            assert text.endswith("."), (field.name, text)


def test_public_functions_say_what_comes_back():
    """The first paragraph of a docstring ends with a full stop, a colon or a question that it answers."""
    for path in (ROOT / "src" / "lorafold").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
                first = text.split("\n\n")[0].strip()
                assert first[-1] in ".:;`?…" or first.endswith(")") or "\n- " in first, f"{path.name}: {node.name}: {first}"
