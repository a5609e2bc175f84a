"""Turns the roles of docstrings, such as ``:func:`~pkg.name```, into links of the site."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|data|attr|mod):`(~?)([\w.]+)`")


def _link(match: re.Match[str]) -> str:
    short, target = match.groups()
    return f"`{target.rpartition('.')[2] if short else target}`"


class Roles(griffe.Extension):
    """Rewrites each docstring once it was read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Replace the roles of one object.

        Args:
            obj: Module, class, function or attribute.
        """
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(_link, obj.docstring.value)
