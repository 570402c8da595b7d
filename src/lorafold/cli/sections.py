"""``--help`` in sections, as the option classes call them: plain text that reads at 80 columns."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

from ..adapters.options import ReadOptions
from ..declared import declared
from .arguments import SPOKEN, values_of
from .flags import ALLOW, allowed


class SectionedCommand(TyperCommand):
    """A command whose options stand under the heading of their class."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                argument = parameter.param_type_name == "argument"
                usual = "Arguments" if argument else "Options"
                record = (record[0].partition(" <")[0], record[1]) if argument else record
                name = getattr(parameter, "rich_help_panel", None) or usual
                sections.setdefault(name, []).extend(self._rows(parameter.name or "", record))
        for name, rows in sections.items():
            with formatter.section(name):
                formatter.write_dl(rows)

    def _rows(self, name: str, record: tuple[str, str]) -> list[tuple[str, str]]:
        """The lines for the option `name`: one, but for options of which each value is explained."""
        if name == "allow":
            words = allowed(getattr(self.callback, "option_classes", ()))
            return [(f"{ALLOW} {word}", entry.said.doc) for word, entry in words.items()]
        if name == "adapter_option":
            entries = [(spoken, declared(ReadOptions)[field]) for spoken, field in SPOKEN.items()]
            return [record, *((f"  {spoken}={values_of(entry)}", entry.said.doc) for spoken, entry in entries)]
        return [record]
