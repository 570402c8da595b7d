"""Values as people read them: whole, aligned, and with nothing in them that a name from a file could do."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lorafold
from lorafold.text import Summary, Table
from models import edit_json, plain_adapter, plain_base

OURS = {"div", "p", "strong", "table", "thead", "tbody", "tr", "th", "td"}


class Page(HTMLParser):
    """Fails where a tag is not closed, is none of ours, or has an attribute that ours have not."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in OURS
        assert attrs in ([], [("style", "text-align:left")], [("style", "text-align:right")])
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def parsed(text: str) -> list[str]:
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    return page.texts


TEXT = st.text(alphabet=st.one_of(st.characters(), st.sampled_from("<>&\"'\x1b\n\r\u202e")), max_size=20)


@given(TEXT, st.lists(st.tuples(TEXT, TEXT), max_size=3), st.lists(st.tuples(TEXT, TEXT), max_size=3), st.lists(TEXT, max_size=2))
def test_any_text_is_one_line_and_only_text(title: str, facts: list, rows: list, warnings: list) -> None:
    summary = Summary(title, facts, Table(("a", "b"), rows, (1,)), facts, warnings)
    lines = str(summary).split("\n")
    assert len(lines) == 1 + 2 * len(facts) + 1 + len(rows) + len(warnings)
    assert all(line.isprintable() for line in lines)
    assert all(text.isprintable() for text in parsed(summary.to_html()))


def test_columns_are_aligned() -> None:
    lines = str(Summary("t", (), Table(("n", "name", "r"), [("10", "a", "4"), ("9", "longer", "16")], (0, 2)))).split("\n")
    assert lines == ["t", " n  name     r", "10  a        4", " 9  longer  16"]


@pytest.fixture
def values(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain_base(tmp_path / "base")
    evil = "<script>alert(1)</script>"
    plain_adapter(tmp_path / "<b>evil & co")
    edit_json(tmp_path / "<b>evil & co" / "adapter_config.json", base_model_name_or_path=evil)
    adapter = "<b>evil & co"
    report = lorafold.merge("base", [adapter], "<i>out")
    return {
        "report": report,
        "plan": report.plan,
        "proof": lorafold.verify("<i>out", "base", [adapter]),
        "failed proof": lorafold.verify("<i>out", "base", [(adapter, 0.5)]),
        "hashes": lorafold.verify("<i>out"),
        "adapter": lorafold.inspect(adapter),
        "checkpoint": lorafold.inspect("<i>out"),
        "conversion": lorafold.convert(adapter, "a.pt", "loralib"),
        "restored": lorafold.unmerge("<i>out", "restored", base="base"),
    }


def test_names_of_strangers_are_text_in_a_notebook(values) -> None:
    for name, value in values.items():
        texts = parsed(value._repr_html_())
        lines = str(value).split("\n")
        assert texts[0] == lines[0], name
        words = {word for line in lines for word in line.split()}
        assert words - {word for text in texts for word in text.split()} == set(), name
    assert any("<script>" in text for text in parsed(values["adapter"]._repr_html_()))
    assert not values["failed proof"]
    assert values["proof"]
    with pytest.raises(lorafold.errors.VerificationError):
        values["failed proof"].raise_for_failures()


def test_every_value_is_json(values) -> None:
    for value in values.values():
        found = value.to_json()
        assert json.loads(json.dumps(found, allow_nan=False)).keys() == found.keys() != set()
