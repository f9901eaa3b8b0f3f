"""Settings that hold text: which they are, and YAML whose scalars stay the text that was written there."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

_PREFIX = "tag:yaml.org,2002:"
_NULL, _MERGE, _TEXT = f"{_PREFIX}null", f"{_PREFIX}merge", f"{_PREFIX}str"


def type_of(key: str, section: type[BaseModel]) -> Any:
    """The declared type of a dotted key, a section or a value; None if there is no such key."""
    found: Any = section
    for name in key.split("."):
        if not _is_section(found) or name not in found.model_fields:
            return None
        found = found.model_fields[name].annotation
    return found


def holds_text(declared: Any) -> bool:
    """Whether a type is text, or text or nothing."""
    return str in _members(declared)


def text_or_none(text: str, declared: Any) -> str | None:
    """A setting of text as it came from the command line: what it says, letter for letter.

    Nothing at all is no value, and so is `null` where there may be none.
    """
    return None if not text or (text == "null" and type(None) in _members(declared)) else text


def keep_text(node: yaml.Node, declared: Any) -> yaml.Node:
    """A YAML node in which a number, a date or a truth value where text is declared is its own text.

    The nodes are left as they are, since an alias may stand for them in another place.
    """
    members = _members(declared)
    if isinstance(node, yaml.ScalarNode):
        if str in members and node.tag.startswith(_PREFIX) and node.tag != _NULL:
            return yaml.ScalarNode(_TEXT, node.value, node.start_mark, node.end_mark, node.style)
    elif isinstance(node, yaml.MappingNode):
        for section in filter(_is_section, members):
            pairs = [(key, keep_text(value, _inner(key, section))) for key, value in node.value]
            return yaml.MappingNode(node.tag, pairs, node.start_mark, node.end_mark, node.flow_style)
    elif isinstance(node, yaml.SequenceNode):
        for member in members:
            if get_origin(member) in (list, tuple):
                inner = get_args(member)
                kinds = inner if get_origin(member) is tuple else inner * len(node.value)
                rest = node.value[len(kinds) :]
                items = [keep_text(item, kind) for item, kind in zip(node.value, kinds, strict=False)]
                return yaml.SequenceNode(
                    node.tag, items + rest, node.start_mark, node.end_mark, node.flow_style
                )
            if _is_section(member):  # of a merge key, which may take several
                items = [keep_text(item, member) for item in node.value]
                return yaml.SequenceNode(node.tag, items, node.start_mark, node.end_mark, node.flow_style)
    return node


def _inner(key: yaml.Node, section: Any) -> Any:
    if key.tag == _MERGE:
        return section
    field = section.model_fields.get(key.value) if isinstance(key, yaml.ScalarNode) else None
    return None if field is None else field.annotation


def _members(declared: Any) -> list[Any]:
    return list(_flat(declared))


def _flat(declared: Any) -> Iterator[Any]:
    """The types that a type joins, without what is noted beside them."""
    origin = get_origin(declared)
    if origin is Annotated:
        yield from _flat(get_args(declared)[0])
    elif origin in (Union, types.UnionType):
        for member in get_args(declared):
            yield from _flat(member)
    else:
        yield declared


def _is_section(declared: Any) -> bool:
    return isinstance(declared, type) and issubclass(declared, BaseModel)
