"""Turns roles of docstrings, such as ``:func:`~pkg.name```, into links and examples into code."""

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
        """Replace the roles of one object, and add the file of a class or function.

        Args:
            obj: Module, class, function or attribute.
        """
        if obj.docstring is not None:
            text = _ROLE.sub(_link, obj.docstring.value)
            # Of the two names that Google's style knows, griffe shows the code of this one as code.
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
            if (obj.is_class or obj.is_function) and obj.parent and obj.parent.is_module:
                home = obj.parent.path.replace(".", "/")
                obj.docstring.value += f"\n\n*Lives in `{home}.py`.*\n"
