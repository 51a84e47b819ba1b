"""Options of a config as values of the fields that they become."""

from collections.abc import Mapping
from types import UnionType
from typing import Any, get_args, get_origin

import numpy as np

_RULES: dict[Any, str] = {
  bool: "True or False (with --set: true or false)",
  int: "a whole number",
  float: "a number",
  str: "text",
  type(None): "None",
}


def typed(
  prefix: str, options: Mapping[str, Any], fields: Mapping[str, Any]
) -> dict[str, Any]:
  """Refuses what would be another thing than it says, the text "False" for one.

  Types that are not made of bool, int, float, str and None, such as those of a dtype,
  allow anything: whoever takes the option checks it.

  Args:
    prefix: of the keys, such as "memory.".
    options: by key.
    fields: the type of each, as it is annotated.

  Returns:
    The options; a whole number is a float, and a list a tuple, where the type says so.

  Raises:
    ValueError: naming key, value and rule.
  """
  found = {}
  for key, value in options.items():
    rule = _rule(fields[key])
    try:
      found[key] = _as(value, fields[key]) if rule else value
    except TypeError:
      raise ValueError(f"{prefix}{key} is {value!r}; it is {rule}") from None
  return found


def _rule(kind: Any) -> str:
  """What values of a type are, in words; "" where anything goes."""
  if isinstance(kind, UnionType):
    rules = [_rule(one) for one in get_args(kind)]
    return " or ".join(rules) if all(rules) else ""
  if get_origin(kind) is tuple:
    each = _rule(get_args(kind)[0])
    return each and f"a tuple, each entry {each}"
  return _RULES.get(kind, "")


def _as(value: Any, kind: Any) -> Any:
  """The value, of this type.

  Raises:
    TypeError: it is of another.
  """
  if isinstance(value, np.generic):
    value = value.item()
  if isinstance(kind, UnionType):
    for one in get_args(kind):
      try:
        return _as(value, one)
      except TypeError:
        continue
    raise TypeError
  if get_origin(kind) is tuple:
    if not isinstance(value, tuple | list):
      raise TypeError
    return tuple(_as(one, get_args(kind)[0]) for one in value)
  if kind is float and type(value) is int:
    return float(value)
  if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
    raise TypeError
  return value
