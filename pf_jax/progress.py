"""Progress on the terminal: a bar, or one line now and then."""

import math
import sys
import time
from collections.abc import Mapping
from typing import TextIO


class Progress:
  """A tqdm bar on a terminal; elsewhere a plain line every `every_s` seconds."""

  def __init__(self, total: int, start: int = 0, *, unit: str = 'step', every_s: float = 30.0,
               stream: TextIO | None = None):
    """Starts the display at `start` of `total` units."""
    self._stream = stream or sys.stderr
    self._total, self._done, self._unit, self._every_s = total, start, unit, every_s
    self._start, self._start_time = start, time.monotonic()
    self._last_line = -math.inf
    self._text = ''
    self._bar = None
    if self._stream.isatty():
      import tqdm  # imported late: `import pf_jax` stays fast
      self._bar = tqdm.tqdm(total=total, initial=start, unit=unit, file=self._stream,
                            dynamic_ncols=True)

  def update(self, count: int = 1) -> None:
    """Advances by `count` units."""
    self._done += count
    if self._bar is not None:
      self._bar.update(count)
    else:
      due = bool(self._text) and time.monotonic() - self._last_line >= self._every_s
      if due or self._done >= self._total:
        self._print_line()

  def show(self, values: Mapping[str, float]) -> None:
    """Sets the numbers displayed beside the count."""
    self._text = ' '.join(f'{name}={value:.4g}' for name, value in values.items())
    if self._bar is not None:
      self._bar.set_postfix_str(self._text, refresh=False)

  def say(self, message: str) -> None:
    """Prints a message without breaking the bar."""
    if self._bar is not None:
      self._bar.write(message, file=self._stream)
    else:
      print(message, file=self._stream, flush=True)

  def _print_line(self) -> None:
    now = time.monotonic()
    rate = (self._done - self._start) / max(now - self._start_time, 1e-9)
    self._last_line = now
    print(f'{self._unit} {self._done}/{self._total} ({rate:.3g} {self._unit}s/s) {self._text}',
          file=self._stream, flush=True)

  def close(self) -> None:
    """Ends the display."""
    if self._bar is not None:
      self._bar.close()
