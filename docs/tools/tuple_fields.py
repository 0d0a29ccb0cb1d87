"""Tells the API pages that the fields of a NamedTuple are its parameters."""

from typing import Any

import griffe


class TupleFields(griffe.Extension):
    """Gives every NamedTuple the constructor that Python gives it."""

    def on_class_members(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Adds `__init__` where a class is a NamedTuple."""
        if not any(str(base) == "NamedTuple" for base in cls.bases):
            return
        fields = [
            griffe.Parameter(
                name,
                annotation=attribute.annotation,
                default=attribute.value,
                kind=griffe.ParameterKind.positional_or_keyword,
            )
            for name, attribute in cls.members.items()
            if attribute.is_attribute and attribute.annotation is not None
        ]
        own = griffe.Parameter("self", kind=griffe.ParameterKind.positional_only)
        cls.set_member(
            "__init__",
            griffe.Function(
                "__init__", parameters=griffe.Parameters(own, *fields), returns="None"
            ),
        )
