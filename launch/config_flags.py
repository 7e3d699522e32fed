"""Command lines of the launchers: `--config=FILE.py[:variant]` and `--config.key=value`.

Everything that can be checked without JAX is checked before a launcher imports it, and a mistake
ends in one message and exit status 2, never in a traceback. A config file is Python and is
executed: run only those you would run as a script.
"""

import difflib
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from launch.build import ConfigError, nearest

# Flags defined here belong to the launcher that asked for them, and show in its --help.
flags.disclaim_key_flags()

NAME = 'config'
USAGE_ERROR = 2


class UsageError(Exception):
  """A command line that cannot be used; the message is all the user sees."""


def define_config() -> None:
  """Defines `--config`."""
  config_flags.DEFINE_config_file(
      NAME, None, 'Experiment file, FILE.py or FILE.py:variant; override its values with '
      '--config.section.key=value.', lock_config=True)


def leaves(config: ConfigDict, path: str = NAME) -> Iterator[str]:
  """Full names of all values of a config, such as 'config.train.steps'."""
  for key in config:
    value = config[key]
    if isinstance(value, ConfigDict):
      yield from leaves(value, f'{path}.{key}')
    else:
      yield f'{path}.{key}'


def _overrides(argv: Sequence[str]) -> Iterator[str]:
  """Names of the `--config.x.y` arguments, without values."""
  for argument in argv:
    if argument == '--':
      return
    name = argument.lstrip('-').split('=', 1)[0]
    if argument.startswith('-') and name.startswith(f'{NAME}.'):
      yield name


def _load(location: str) -> Any:
  """Runs a config file with the same machinery absl will use."""
  path = location.split(':', 1)[0]
  if not os.path.isfile(path):
    folder = pathlib.Path(path).parent
    there = [str(p) for p in folder.glob('*.py')] if folder.is_dir() else []
    raise UsageError(f'--{NAME}={location}: there is no file {path!r}{nearest(path, there)}.')
  values = flags.FlagValues()
  config_flags.DEFINE_config_file(NAME, flag_values=values, sys_argv=[])
  try:
    values(['', f'--{NAME}={location}'])
  except Exception as error:  # a config file is arbitrary code
    raise UsageError(f'--{NAME}={location}: {_last_line(error)}') from error
  return values[NAME].value


def _last_line(error: BaseException) -> str:
  """The message proper: config_flags puts a whole traceback into its own."""
  lines = str(error).strip().splitlines()
  return lines[-1] if lines else type(error).__name__


def _check_names(argv: Sequence[str]) -> None:
  """Names every override that the config file does not have."""
  location = next((a.split('=', 1)[1] for a in argv if a.lstrip('-').startswith(f'{NAME}=')), None)
  if location is None:
    position = [i for i, a in enumerate(argv) if a in (f'--{NAME}', f'-{NAME}')]
    location = argv[position[0] + 1] if position and position[0] + 1 < len(argv) else None
  overrides = list(_overrides(argv))
  if location is None:
    if overrides:
      raise UsageError(f'--{overrides[0]} needs --{NAME}=FILE.py.')
    return
  config = _load(location)
  known = set(leaves(config))
  sections = {name.rsplit('.', i)[0] for name in known for i in range(1, name.count('.') + 1)}
  problems = [f'--{name} is unknown{nearest(name, sorted(known))}.'
              for name in overrides if name not in known | sections]
  if problems:
    raise UsageError('\n'.join(problems))


def _flag_names() -> list[str]:
  return [name for name in flags.FLAGS if not name.startswith('test_')]


def _parse(argv: Sequence[str]) -> list[str]:
  argv = list(argv)
  try:
    if not {'--help', '-help', '--helpfull', '--helpshort', '-h', '-?'} & set(argv):
      _check_names(argv)
    rest = list(flags.FLAGS(argv))
  except UsageError as error:
    _fail(str(error))
  except flags.UnrecognizedFlagError as error:
    close = difflib.get_close_matches(error.flagname, _flag_names(), n=1)
    _fail(f'--{error.flagname} is unknown' + (f' (did you mean --{close[0]}?).' if close else '.'))
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
    _fail(_last_line(error) if 'Traceback' in str(error) else str(error))
  if len(rest) > 1:
    _fail(f'unexpected argument {rest[1]!r}; every option is written --name=value.')
  return rest


def _fail(message: str) -> None:
  for line in message.splitlines():
    print(f'error: {line}', file=sys.stderr)
  sys.exit(USAGE_ERROR)


def run(main: Callable[[], int | None], *, required: Sequence[str] = ()) -> None:
  """Parses the command line strictly, then runs `main`; its result is the exit status.

  Args:
    main: imports JAX itself, so that a wrong command line is refused in a fraction of a second.
    required: names of flags that must be given.
  """

  def checked(argv: Sequence[str]) -> int | None:
    del argv
    if not flags.FLAGS['verbosity'].present:
      # Orbax reports every step of a save, and a failure once per thread before it raises it.
      logging.set_verbosity(logging.FATAL)
    missing = [name for name in required if flags.FLAGS[name].value in (None, '')]
    if missing:
      _fail('\n'.join(f'--{name}=... is missing; see --help.' for name in missing))
    try:
      return main()
    except ConfigError as error:
      _fail(str(error))
    return None

  app.run(checked, flags_parser=_parse)
