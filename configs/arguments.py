"""Reads what follows the colon in `--config=FILE.py:tiny,frames=21`."""

import difflib
from typing import Any


def parse(argument: str | None, **defaults: bool | int | float | str) -> dict[str, Any]:
  """Parses comma-separated words and name=value pairs.

  Args:
    argument: the text after the colon, or None.
    **defaults: the allowed names with their default values, which also fix the types; a word
      without a value sets a bool.

  Returns:
    All names with their values.

  Raises:
    ValueError: an unknown name or a value of the wrong type.
  """
  values: dict[str, Any] = dict(defaults)
  for part in filter(None, (argument or '').split(',')):
    name, given, text = part.partition('=')
    if name not in defaults:
      close = difflib.get_close_matches(name, defaults, n=1)
      hint = f' (did you mean {close[0]}?)' if close else f'; use {", ".join(defaults)}'
      raise ValueError(f'variant {name!r} is unknown{hint if defaults else "; there are none"}.')
    kind = type(defaults[name])
    if kind is bool:
      if given:
        raise ValueError(f'variant {name!r} is a plain word and takes no value; got {text!r}.')
      values[name] = True
      continue
    try:
      values[name] = kind(text)
    except ValueError as error:
      raise ValueError(f'variant {name}={text!r} is not {kind.__name__}.') from error
  return values
