"""A comparison for terminals and pipelines: a table, sentences, JSON, JUnit's XML, markdown."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from rich.table import Table
from rich.text import Text

from skillfast.markdown import escaped, escaped_table
from skillfast.report.comparison import words
from skillfast.results.records import to_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from skillfast.results.comparison import Check, Comparison

STYLES = {"lost": "red", "merged": "red", "weakened": "red", "moved": "yellow", "gained": "green",
          "strengthened": "green", "undecided": "dim"}  # fmt: skip
CHECKED = ("skill", "check", "limit", "measured", "outcome")


def tables(found: Comparison) -> list[Table]:
    """See `skillfast.report.audit_tables`."""
    made = [_verdicts(found)]
    if rows := words.exchanged(found):
        sets = Table(title="Each run's skills, removed from the other run's model: points lost, 95 % intervals",
                     title_justify="left")  # fmt: skip
        for heading in words.EXCHANGED:
            sets.add_column(heading, overflow="fold")
        for cells in rows:
            sets.add_row(*map(Text, cells))
        made.append(sets)
    return made


def _verdicts(found: Comparison) -> Table:
    caption = "95 % intervals of paired changes, points; q after Benjamini-Hochberg's correction over the skills"
    made = Table(title=Text(words.title(found)), title_justify="left", caption=caption, caption_justify="left")
    for heading in words.COLUMNS:
        made.add_column(heading, overflow="fold")  # nothing is cut off where the terminal is narrow
    for cells, skill in zip(words.rows(found), found.skills.values(), strict=True):
        made.add_row(*map(Text, cells), style=STYLES.get(skill.verdicts[0], ""))
    return made


def text(found: Comparison) -> str:
    """Sentences, and the gate's checks that did not pass."""
    lines = words.sentences(found)
    if found.gate is not None:
        lines.append(words.gate_says(found))
        lines += ["  " + ": ".join(words.check_row(check)) for check in found.gate.checks if check.outcome != "passed"]
    return "\n".join(lines)


def as_json(found: Comparison) -> str:
    """What `compare.json` holds."""
    return json.dumps(to_json(found), indent=1, ensure_ascii=False, allow_nan=False)


def markdown(found: Comparison) -> str:
    """Headings, sentences and tables, for a step summary or a merge request."""
    lines = [f"## {escaped(words.title(found))}", ""]
    if found.gate is not None:
        lines += [f"**{escaped(words.gate_says(found))}**", ""]
    lines += [f"- {escaped(sentence)}" for sentence in words.sentences(found)]
    if found.skills:
        lines += ["", escaped_table(words.COLUMNS, words.rows(found))]
    if rows := words.exchanged(found):
        lines += ["", "### Skills removed from the other run's model", "", escaped_table(words.EXCHANGED, rows)]
    if found.gate is not None:
        lines += ["", "### Checks", "", escaped_table(CHECKED, [words.check_row(check) for check in found.gate.checks])]
    return "\n".join(lines)


def junit(found: Comparison) -> str:
    """JUnit's XML: a test case for each skill and check of the gate; without one a case for each skill."""
    cases = [_case(check, found) for check in found.gate.checks] if found.gate is not None else [
        _passed(name, "verdict", words.verdict(skill)) for name, skill in found.skills.items()
    ]  # fmt: skip
    if found.gate is not None or not found.skills:
        cases.insert(0, _comparable(found))
    suite = ElementTree.Element(
        "testsuite",
        name="skillfast compare",
        tests=str(len(cases)),
        failures=str(sum(case.find("failure") is not None for case in cases)),
        errors="0",
        skipped="0",
    )
    suite.extend(cases)
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True)


def _named(skill: str, name: str) -> ElementTree.Element:
    return ElementTree.Element("testcase", classname=f"skillfast.{_xml(skill)}", name=name)


def _passed(skill: str, name: str, said: str) -> ElementTree.Element:
    case = _named(skill, name)
    ElementTree.SubElement(case, "system-out").text = _xml(said)
    return case


def _case(check: Check, found: Comparison) -> ElementTree.Element:
    said = _xml(": ".join(words.check_row(check)))
    case = _named(check.skill or "overall", check.check)
    if check.outcome != "passed" or not found.comparable:
        kind = check.outcome if found.comparable else "not comparable"
        ElementTree.SubElement(case, "failure", type=kind, message=said)
    return case


def _comparable(found: Comparison) -> ElementTree.Element:
    case = _named("runs", "comparable")
    if not found.comparable or not found.skills:
        said = _xml("; ".join(found.reasons) or "no common example")
        ElementTree.SubElement(case, "failure", type="not comparable", message=said)
    return case


def _xml(value: str) -> str:
    """Text without the control characters that XML cannot hold."""
    return "".join(
        c for c in value if c in "\t\n\r" or (ord(c) >= 0x20 and not 0xD800 <= ord(c) < 0xE000 and ord(c) < 0xFFFE)
    )


FORMATS: dict[str, Callable[[Comparison], str]] = {"text": text, "json": as_json, "junit": junit, "markdown": markdown}
