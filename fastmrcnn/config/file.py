"""Reading and writing the configuration: YAML, `key=value`, and every mistake in one message."""

from __future__ import annotations

import copy
import difflib
import functools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import yaml
from pydantic import BaseModel, ValidationError

from fastmrcnn.config.schema import RENAMED, Config
from fastmrcnn.config.text import holds_text, keep_text, text_or_none, type_of
from fastmrcnn.errors import UserError


def load_config(
    path: str | Path | None = None, overrides: Sequence[str] = (), *, base: dict[str, Any] | None = None
) -> Config:
    """Defaults, then the YAML file or the `base` tree, then `key=value` overrides.

    The value of an override is YAML, but text is taken as it is: a path may hold ` #`, `: ` or quotes.

    Keys of earlier versions are taken for the new ones; a line on stderr says so, but not of `base`, which
    is a checkpoint's.

    Raises:
        UserError: with every mistake at once, each with its place and the nearest known key.
    """
    problems: list[str] = []
    old_keys: list[str] = []
    if path is not None:
        path = Path(os.path.expanduser(path))
        tree = _read_yaml(path)
        old_keys += rename_keys(tree, problems)
    else:
        tree = copy.deepcopy(base) if base is not None else {}
        rename_keys(tree, problems)
    for item in overrides:
        key, equals, text = item.partition("=")
        if key != key.rstrip():  # as in "key = value"
            text = text.strip()
        key = key.strip()
        if not equals or not key:
            problems.append(f"'{item}' is not key=value")
            continue
        if key in RENAMED:
            old_keys.append(key)
            key = RENAMED[key]
        declared = type_of(key, Config)
        value: Any
        if holds_text(declared):
            value = text_or_none(text, declared)
            if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
                print(f"note: {key}: the quotes are taken for part of the text {text}", file=sys.stderr)
        else:
            try:
                value = _parse_yaml(text, declared)
            except (yaml.YAMLError, RecursionError):
                problems.append(f"{key}: '{text}' is not a YAML value (quote it?)")
                continue
        if not _put(tree, key.split("."), value):
            problems.append(f"{key}: '{key.rsplit('.', 1)[0]}' is a value, not a section")
    for key in dict.fromkeys(old_keys):
        print(f"note: {key} is now {RENAMED[key]}", file=sys.stderr)
    sources = [str(path)] if path else []
    sources += ["the command line"] if overrides or not path else []
    return parse_config(tree, source=" and ".join(sources), problems=problems)


def parse_config(tree: dict[str, Any], source: str, problems: Sequence[str] = ()) -> Config:
    """Validate a nested dictionary, also of an earlier version; UserError names `source` and all mistakes."""
    found = list(problems)
    tree = copy.deepcopy(tree)
    rename_keys(tree, found)
    config = None
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        found += [_explain(entry) for entry in error.errors()]
    if found or config is None:
        unique = list(dict.fromkeys(found))
        raise UserError(f"configuration from {source}: " + "; ".join(unique))
    return config


def rename_keys(tree: dict[str, Any], problems: list[str]) -> list[str]:
    """Give the keys of earlier versions their new names, in place; returns those that were there."""
    found = []
    for old, new in RENAMED.items():
        (section, key), (new_section, new_key) = old.split("."), new.split(".")
        inner, other = tree.get(section), tree.get(new_section)
        if not isinstance(inner, dict) or key not in inner:
            continue
        if isinstance(other, dict) and new_key in other:
            problems.append(f"{old} is now {new}, and both are given; leave out {old}")
        else:
            _put(tree, [new_section, new_key], inner[key])
        del inner[key]
        found.append(old)
    return found


def dump_config(config: Config) -> str:
    """YAML text that `load_config` reads back to an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def differing_keys(one: Config, other: Config) -> list[str]:
    """Dotted keys that have another value."""

    def value(config: Config, key: str) -> Any:
        return functools.reduce(getattr, key.split("."), config)

    return [key for key in known_keys() if value(one, key) != value(other, key)]


def known_keys(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key that holds a value."""
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from known_keys(inner, f"{prefix}{name}.")
        else:
            yield prefix + name


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as text; people mean a number. Duplicate keys are mistakes, not overrides."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) != len(node.value):
            keys = [self.construct_object(key) for key, _ in node.value]
            twice = sorted({str(key) for key in keys if keys.count(key) > 1})
            line = node.start_mark.line + 1
            raise yaml.YAMLError(f"duplicate key {', '.join(twice)} in the section at line {line}")
        return mapping


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
# It also reads on and off as true and false; they are values of train.compile. Where a true or false is
# asked for, pydantic takes yes, no, on and off for it.
for _letter in "yYnNoO":
    _Loader.yaml_implicit_resolvers[_letter] = [
        (tag, pattern)
        for tag, pattern in _Loader.yaml_implicit_resolvers[_letter]
        if tag != "tag:yaml.org,2002:bool"
    ]


def _parse_yaml(stream: str | TextIO, declared: Any) -> Any:
    """A YAML document, whose text is what is written there wherever the type asks for text."""
    loader = _Loader(stream)
    try:
        node = loader.get_single_node()
        return None if node is None else loader.construct_document(keep_text(node, declared))
    finally:
        loader.dispose()


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as stream:
            tree = _parse_yaml(stream, Config)
    except FileNotFoundError:
        there = [str(other) for other in path.parent.glob("*.yaml")]
        near = difflib.get_close_matches(str(path), there, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"{path}: no such configuration file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections such as 'train:', got a {type(tree).__name__}")
    return tree


def _put(tree: dict[str, Any], keys: list[str], value: Any) -> bool:
    for key in keys[:-1]:
        inner = tree.setdefault(key, {})
        if not isinstance(inner, dict):
            return False
        tree = inner
    tree[keys[-1]] = value
    return True


# In place of pydantic's words, by its type of error.
_EXPECTED = {
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "expected a whole number"),
    **dict.fromkeys(("float_parsing", "float_type", "finite_number"), "expected a number"),
    **dict.fromkeys(("bool_parsing", "bool_type"), "expected true or false"),
    **dict.fromkeys(("list_type", "tuple_type"), "expected a list"),
    **dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "expected a section"),
    "string_type": "expected text",
}


def _explain(entry: Any) -> str:
    place = ".".join(str(part) for part in entry["loc"])
    if entry["type"] == "extra_forbidden":
        near = nearest_key(place)
        return f"unknown key '{place}'" + (f" (did you mean '{near}'?)" if near else "")
    message = _EXPECTED.get(entry["type"]) or entry["msg"].removeprefix("Value error, ")
    if not place or (entry["type"] == "value_error" and isinstance(entry["input"], dict)):
        return message  # about several keys, which it names
    return f"{place}: {message[0].lower()}{message[1:]}, got {entry['input']!r}"


def nearest_key(place: str) -> str | None:
    """The known key, or section, that looks most like `place`."""
    leaves = list(known_keys())
    sections = {key.rsplit(".", n)[0] for key in leaves for n in range(1, key.count(".") + 1)}
    candidates = [*leaves, *sorted(sections)]
    same_leaf = [key for key in leaves if key.rsplit(".", 1)[-1] == place.rsplit(".", 1)[-1]]
    if len(same_leaf) == 1:
        return same_leaf[0]
    close = difflib.get_close_matches(place, candidates, n=1, cutoff=0.6)
    return close[0] if close else None
