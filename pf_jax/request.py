"""What is asked for: prompts, a length, a seed. No JAX here: wrong input is refused at once.

A prompt may change while the video runs: `a white three ... | 40: a white seven ...` starts with
the first text and goes on with the second from block 40. Hence '|' is not part of any text.
"""

import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

from pf_jax.models.tokenizer import clean_prompt

_SWITCH = re.compile(r'\s*([0-9]{1,9})\s*:(.*)', re.DOTALL)
MAX_SEED = 2**32 - 1
_BYTE_ORDER_MARKS = {b'\xef\xbb\xbf': 'utf-8-sig', b'\xff\xfe': 'utf-16', b'\xfe\xff': 'utf-16'}


class RequestError(ValueError):
  """Something asked for that cannot be done; the message says what to ask instead."""


class PromptSchedule(NamedTuple):
  """Which text holds from which block on.

  Attributes:
    source: as it was typed.
    starts: first block of each text, increasing from 0.
    texts: the texts, none of them empty.
  """

  source: str
  starts: tuple[int, ...]
  texts: tuple[str, ...]

  def of_block(self, block: int) -> int:
    """Index of the text that holds at a block."""
    return sum(start <= block for start in self.starts) - 1

  def check_length(self, blocks: int) -> None:
    """Refuses a switch that a video of `blocks` blocks never reaches.

    Raises:
      RequestError: naming the first such switch.
    """
    for start in self.starts:
      if start >= blocks:
        raise RequestError(f'{_shown(self.source)}: the switch at block {start} is never reached, '
                          f'the video has blocks 0..{blocks - 1}; ask for more seconds or switch '
                          'earlier.')


def parse_prompt(source: str) -> PromptSchedule:
  """Reads a prompt with its switches.

  Args:
    source: 'text', or 'text | BLOCK: text | ...'. Newlines and tabs count as spaces, NUL and other
      control characters vanish; characters outside the vocabulary become <unk> later on.

  Raises:
    RequestError: an empty text, a switch without its block, or blocks that do not increase.
    TypeError: not a string.
  """
  if not isinstance(source, str):
    raise TypeError(f'a prompt is a string, got {type(source).__name__}: {source!r:.60}.')
  first, *rest = source.split('|')
  starts, texts = [0], [first]
  for part in rest:
    match = _SWITCH.fullmatch(part)
    if match is None:
      raise RequestError(f'{_shown(source)}: "|" is followed by {part[:40]!r}; wanted '
                        '"| BLOCK: new text", as in "a three | 40: a seven".')
    start = int(match[1])
    if start <= starts[-1]:
      raise RequestError(f'{_shown(source)}: the switch at block {start} comes after block '
                        f'{starts[-1]}; switches must increase from 1.')
    starts.append(start)
    texts.append(match[2])
  for start, text in zip(starts, texts, strict=True):
    if not clean_prompt(text):
      raise RequestError(f'{_shown(source)}: the text from block {start} on is empty; say what the '
                        'video shows, as in "a white seven drifts right on a teal background".')
  return PromptSchedule(source, tuple(starts), tuple(texts))


def read_prompts(path: str | os.PathLike) -> tuple[str, ...]:
  """Reads prompts, one a line; blank lines do not count.

  UTF-8 with or without a byte order mark, UTF-16 with one; lines end in LF, CRLF or CR.

  Raises:
    RequestError: unreadable, another encoding, or no prompt in it.
  """
  try:
    data = pathlib.Path(path).read_bytes()
  except (OSError, ValueError) as error:  # ValueError: NUL in the path
    reason = getattr(error, 'strerror', None) or error
    raise RequestError(f'cannot read prompts from {str(path)!r} ({reason}).') from error
  encoding = next((e for mark, e in _BYTE_ORDER_MARKS.items() if data.startswith(mark)), 'utf-8')
  try:
    text = data.decode(encoding)
  except UnicodeDecodeError as error:
    raise RequestError(f'{path} is not {encoding} text ({error.reason} at byte {error.start}); '
                       'save it as UTF-8.') from error
  # Not splitlines(): form feeds and Unicode separators do not end a prompt.
  prompts = tuple(line.strip() for line in re.split(r'\r\n|\n|\r', text) if line.strip())
  if not prompts:
    raise RequestError(f'{path} holds no prompt; write one a line.')
  return prompts


def check_seed(seed: int) -> None:
  """Refuses seeds that JAX would silently wrap.

  Raises:
    RequestError: not an integer within 0..2**32 - 1.
  """
  if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
    raise RequestError(f'{seed=} must be an integer within 0..{MAX_SEED}.')


@dataclasses.dataclass(frozen=True)
class Request:
  """Videos to sample.

  Attributes:
    prompts: one per video, with their switches.
    seconds: length of each.
    seed: of the first video; the next ones count up from it, so that each can be sampled again
      alone.

  Raises:
    RequestError: no or unusable prompts, a length that is not positive, seeds out of range.
  """

  prompts: tuple[str, ...]
  seconds: float = 120.0
  seed: int = 0

  def __post_init__(self):
    if not self.prompts:
      raise RequestError('there is no prompt; say what the video shows.')
    if not (math.isfinite(self.seconds) and self.seconds > 0):
      raise RequestError(f'seconds={self.seconds} must be a positive number of seconds.')
    check_seed(self.seed)
    check_seed(self.seed + len(self.prompts) - 1)
    _ = self.schedules  # parsing checks

  @property
  def schedules(self) -> tuple[PromptSchedule, ...]:
    """The prompts, parsed."""
    return tuple(map(parse_prompt, self.prompts))

  @property
  def seeds(self) -> tuple[int, ...]:
    """One per video."""
    return tuple(range(self.seed, self.seed + len(self.prompts)))


def plan_batches(schedules: Sequence[PromptSchedule], batch_size: int) -> list[tuple[int, ...]]:
  """Groups videos into batches of equal switches, at most `batch_size` and about equally full.

  Args:
    schedules: of all videos.
    batch_size: largest batch, at least 1.

  Returns:
    Indices of the videos of each batch; together every video once.
  """
  groups: dict[tuple[int, ...], list[int]] = {}
  for index, schedule in enumerate(schedules):
    groups.setdefault(schedule.starts, []).append(index)
  batches = []
  for group in groups.values():
    count = math.ceil(len(group) / batch_size)
    size = math.ceil(len(group) / count)
    batches += [tuple(group[i:i + size]) for i in range(0, len(group), size)]
  return batches


def _shown(source: str) -> str:
  return f'prompt {source[:40]!r}' + ('...' if len(source) > 40 else '')
