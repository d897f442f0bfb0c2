from __future__ import annotations

from skillfast.markdown import code, escaped, escaped_table, table


def test_text_is_shown_letter_by_letter_in_one_line():
    assert escaped("a_b *c* [d](e) `f`\n# g") == r"a\_b \*c\* \[d\](e) \`f\` \# g"
    assert escaped(r"<b>&amp;</b> x|y \ !z ~~ {q}") == r"&lt;b&gt;&amp;amp;&lt;/b&gt; x\|y \\ \!z \~\~ \{q\}"
    assert code("a `b`\n|c") == "`a 'b' /c`"


def test_a_table_has_one_line_per_row():
    rows = [["a|b", "`c`"], ["1\n2", "d"]]
    assert escaped_table(["x", "y_z"], rows).splitlines() == [
        r"| x | y\_z |", "| --- | --- |", r"| a\|b | \`c\` |", "| 1 2 | d |",
    ]  # fmt: skip
    assert table(["x"], [["`c`"]]) == "| x |\n| --- |\n| `c` |"
