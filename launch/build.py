"""Turns ConfigDicts into the frozen dataclasses the library works with, and says what is wrong.

All mistakes of a section are reported at once, each with its full key, what was found, what is
wanted, and the nearest existing name.
"""

import collections.abc
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar('T')


class ConfigError(ValueError):
  """A configuration that cannot be used; the message is meant for the person who wrote it."""


def nearest(name: str, names: Iterable[str]) -> str:
  """' (did you mean ...?)' for the closest of `names`, or '' when none is close."""
  names = list(names)
  leaf = name.rsplit('.', 1)[-1]
  # The right leaf under the wrong parent says more than a similar spelling.
  close = [other for other in names if other.rsplit('.', 1)[-1] == leaf]
  close = difflib.get_close_matches(name, close or names, n=1, cutoff=0.0 if close else 0.5)
  return f' (did you mean {close[0]}?)' if close else ''


def build(cls: type[T], config: Mapping[str, Any], path: str = 'config') -> T:
  """Builds a dataclass, and the dataclasses inside it, from a ConfigDict or a plain dict.

  Args:
    cls: a dataclass type.
    config: its fields; those with defaults may be left out.
    path: where the section stands, for messages.

  Returns:
    An instance of `cls`.

  Raises:
    ConfigError: unknown, missing or wrongly typed keys (all of them), or a value that the
      dataclass itself refuses.
  """
  problems: list[str] = []
  result = _dataclass(cls, config, path, problems)
  if problems:
    raise ConfigError('\n'.join(problems))
  return typing.cast(T, result)


def _dataclass(cls: Any, config: Any, path: str, problems: list[str]) -> Any:
  if not isinstance(config, collections.abc.Mapping) and not hasattr(config, 'keys'):
    problems.append(f'{path}={config!r} is {_name(type(config))}; '
                    f'wanted a section with the fields of {cls.__name__}.')
    return None
  before = len(problems)
  hints = typing.get_type_hints(cls)
  fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
  for key in config:
    if key not in fields:
      shown = key if str(key).isidentifier() else repr(key)
      problems.append(f'{path}.{shown} is unknown{nearest(key, fields)}; '
                      f'{cls.__name__} has {", ".join(fields)}.')
  values = {}
  for name, field in fields.items():
    if name in config:
      values[name] = _value(hints[name], config[name], f'{path}.{name}', problems)
    elif (field.default is dataclasses.MISSING
          and field.default_factory is dataclasses.MISSING):
      problems.append(f'{path}.{name} is missing; wanted {_name(hints[name])}.')
  if len(problems) > before:
    return None
  try:
    return cls(**values)
  except (ValueError, TypeError) as error:
    problems.append(f'{path}: {error}')
    return None


def _value(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
  """Checks one value against a type hint; int is accepted for float, list for tuple."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if hint is Any:
    return value
  if dataclasses.is_dataclass(hint):
    is_built = isinstance(hint, type) and isinstance(value, hint)
    return value if is_built else _dataclass(hint, value, path, problems)
  if origin in (typing.Union, types.UnionType):
    return _union(hint, args, value, path, problems)
  if origin is typing.Literal:
    if value not in args:
      problems.append(f'{path}={value!r} is not one of {", ".join(map(repr, args))}.')
    return value
  if origin is tuple and isinstance(value, (tuple, list)):
    return _tuple(hint, args, value, path, problems)
  if origin in (dict, collections.abc.Mapping) and hasattr(value, 'keys'):
    return {str(key): _value(args[1], value[key], f'{path}.{key}', problems)
            for key in value}
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  expected = origin or hint
  wrong_bool = isinstance(value, bool) and expected is not bool
  if not isinstance(expected, type) or wrong_bool or not isinstance(value, expected):
    problems.append(f'{path}={value!r} is {_name(type(value))}; wanted {_name(hint)}.')
  return value


def _union(hint: Any, args: tuple[Any, ...], value: Any, path: str, problems: list[str]) -> Any:
  if value is None and type(None) in args:
    return None
  for option in args:
    if option is not type(None):
      attempt: list[str] = []
      result = _value(option, value, path, attempt)
      if not attempt:
        return result
  options = [option for option in args if option is not type(None)]
  if len(options) == 1:  # then the detailed message is the useful one
    return _value(options[0], value, path, problems)
  problems.append(f'{path}={value!r} is {_name(type(value))}; wanted {_name(hint)}.')
  return value


def _tuple(hint: Any, args: tuple[Any, ...], value: Any, path: str, problems: list[str]) -> Any:
  if len(args) == 2 and args[1] is Ellipsis:
    item_hints = [args[0]] * len(value)
  else:
    item_hints = list(args)
  if len(item_hints) != len(value):
    problems.append(f'{path}={tuple(value)!r} has {len(value)} entries; wanted {_name(hint)}.')
    return value
  return tuple(_value(item_hint, item, f'{path}[{i}]', problems)
               for i, (item_hint, item) in enumerate(zip(item_hints, value, strict=True)))


def _name(hint: Any) -> str:
  return getattr(hint, '__name__', str(hint)) if not typing.get_args(hint) else str(hint)
