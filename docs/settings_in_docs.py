"""For the site: a field that is declared by `setting(default, "what it is")` has that default and that description."""

from __future__ import annotations

import ast
from typing import Any

import griffe


class Settings(griffe.Extension):
    """Reads what `setting` is given as griffe meets a field."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Replace the call by its default, and its description by a docstring."""
        call = attr.value
        if isinstance(call, griffe.ExprCall) and str(call.function) == "setting":
            default, description = call.arguments[:2]
            attr.docstring = griffe.Docstring(ast.literal_eval(str(description)).replace("[", "\\["), parent=attr)
            attr.value = default
