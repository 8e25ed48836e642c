"""YAML 1.2 as text: read with duplicate keys refused, and written. The only import of ruamel.yaml."""

from __future__ import annotations

import io
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import BaseConstructor, ConstructorError, DuplicateKeyError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode

MAX_DIGITS = 100
"""Longest whole number, in characters; every key that holds one is satisfied with twenty."""


class _Texts(BaseConstructor):
    """Constructor of texts, in which the two halves of a character that JSON escapes are one character."""

    def construct_scalar(self, node: ScalarNode) -> Any:
        """Return the text of a scalar.

        Raises:
            ConstructorError: the text has half of a surrogate pair.
        """
        text = super().construct_scalar(node)
        try:
            return text.encode("utf-16", "surrogatepass").decode("utf-16") if _has_surrogates(text) else text
        except UnicodeDecodeError:
            problem = "an escape such as \\ud83d is half of a surrogate pair, and no character"
            raise ConstructorError(None, None, problem, node.start_mark) from None


def _has_surrogates(text: Any) -> bool:
    return isinstance(text, str) and any("\ud800" <= each <= "\udfff" for each in text)


class _Constructor(_Texts, SafeConstructor):
    """Constructor of plain Python values whose errors name the line, and both lines of a duplicate key."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """Return the value of a node, with the signature of the base class.

        Raises:
            ConstructorError: a scalar looks like a date or a number, and is none.
        """
        kind = str(node.tag).rpartition(":")[2] if isinstance(node, ScalarNode) else ""
        if kind == "int" and len(node.value) > MAX_DIGITS:
            problem = f"a whole number of {len(node.value)} digits, and at most {MAX_DIGITS} are read"
            raise ConstructorError(None, None, problem, node.start_mark)
        try:
            return super().construct_object(node, deep)
        except (ValueError, ArithmeticError, LookupError) as err:
            problem = f"{node.value[:MAX_DIGITS]!r} is no valid {kind} ({err}), and not in quotes"
            raise ConstructorError(None, None, problem, node.start_mark) from None

    def check_mapping_key(self, node: MappingNode, key_node: ScalarNode, mapping: Any, key: Any, value: Any) -> bool:
        """Return True for a new key, with the signature of the base class.

        Raises:
            DuplicateKeyError: the mapping has the key already.
        """
        if key in mapping:
            first = next(each for each, _ in node.value if getattr(each, "value", None) == key_node.value)
            problem = f"the key {key_node.value!r} is in line {first.start_mark.line + 1} already"
            raise DuplicateKeyError(None, None, problem, key_node.start_mark)
        return bool(super().check_mapping_key(node, key_node, mapping, key, value))


def parse(text: str) -> Any:  # any value that YAML can hold
    """Return the value of a YAML document; None for an empty one.

    Raises:
        ValueError: not YAML, or a duplicate key. The message has line and column where they are known.
    """
    reader = YAML(typ="safe", pure=True)
    reader.Constructor = _Constructor
    return _load(reader, text)


def parse_texts(text: str) -> Any:  # lists and mappings of texts
    """Return the value of a YAML document with every scalar as the text that was written, without its quotes.

    Raises:
        ValueError: not YAML, or a duplicate key. The message has line and column where they are known.
    """
    reader = YAML(typ="base", pure=True)
    reader.Constructor = _Texts
    return _load(reader, text)


def _load(reader: YAML, text: str) -> Any:  # any value that YAML can hold
    try:
        value = reader.load(text)
        _refuse_cycles(value, set(), set())
    except MarkedYAMLError as err:
        mark = err.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        expected = f"{err.context}, " if (err.context or "").startswith("expected") else ""
        raise ValueError(f"{where}{expected}{err.problem or err.context or ''}") from None
    except YAMLError as err:
        raise ValueError(str(err)) from None
    except RecursionError:
        msg = "lists or mappings are nested too deeply"
        raise ValueError(msg) from None
    return value


def _refuse_cycles(value: Any, above: set[int], checked: set[int]) -> None:  # any value that YAML can hold
    """Refuse an alias inside of what it stands for.

    Args:
        value: Value as YAML has read it.
        above: Identities of the lists and mappings that contain the value.
        checked: Identities of the lists and mappings that contain no cycle; extended here.
    """
    if id(value) in above:
        msg = "an alias is inside of what it stands for; write the value itself"
        raise ValueError(msg)
    if not isinstance(value, list | dict) or id(value) in checked:
        return
    for each in value.values() if isinstance(value, dict) else value:
        _refuse_cycles(each, above | {id(value)}, checked)
    checked.add(id(value))


def dump(tree: Any, *, ascii_only: bool = False) -> str:  # any value that YAML can hold
    """Return a value as YAML in block style, keys in their order, each scalar on one line.

    Args:
        tree: Plain Python values.
        ascii_only: True: escape characters outside ASCII.
    """
    writer: Any = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False
    writer.allow_unicode = not ascii_only
    writer.width = 10**6
    text = io.StringIO()
    writer.dump(tree, text)
    return text.getvalue()
