"""For the pages: docstrings' ``Example:`` is a section of code to griffe, which knows ``Examples:`` alone.

Without it the doctests come out as quotations in quotations.
"""

from typing import Any

from griffe import Extension


class Examples(Extension):
    def on_object(self, *, obj: Any, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("Example:\n", "Examples:\n")
