"""How the API pages read the library: what they must be told beside its docstrings."""

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^(?P<indent> *)>>> .*(?:\n(?P=indent)\S.*)*", re.M)


class Reading(griffe.Extension):
    """Gives NamedTuples the constructor that Python gives them, doctests a fence."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Puts fences around the doctests of a docstring, which stand in no section.

        Args:
          obj: What has the docstring.
          **kwargs: More that Griffe tells.
        """
        if obj.docstring:
            obj.docstring.value = _EXAMPLE.sub(_fenced, obj.docstring.value)

    def on_class_members(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Adds `__init__` where a class is a NamedTuple.

        Args:
          cls: Any class.
          **kwargs: More that Griffe tells.
        """
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


def _fenced(example: re.Match[str]) -> str:
    indent = example["indent"]
    return f"{indent}```pycon\n{example[0]}\n{indent}```"
