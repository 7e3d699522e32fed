"""Where a run's numbers go: a JSONL file, TensorBoard, and one line or bar on the terminal."""

import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from pf_jax import outputs

METRICS_FILE = 'metrics.jsonl'


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Reads a JSONL file; a torn last line (the run was killed while writing) is left out."""
  return list(_records(pathlib.Path(path)))


def _records(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  if not path.exists():
    return
  with open(path, encoding='utf-8') as stream:
    for line in stream:
      try:
        record = json.loads(line)
      except ValueError:
        continue
      if isinstance(record, dict):
        yield record


class MetricWriter:
  """Appends records to `metrics.jsonl` and to TensorBoard event files.

  A resumed run first drops the records of steps it is about to redo, so that each step appears
  once.
  """

  def __init__(self, workdir: str | os.PathLike, *, start_step: int = 0, tensorboard: bool = True):
    """Opens the files.

    Args:
      workdir: the run's directory.
      start_step: first step this process will write; later records in the file are dropped.
      tensorboard: also write event files.
    """
    path = pathlib.Path(workdir) / METRICS_FILE
    kept = [r for r in _records(path) if r.get('step', 0) <= start_step]
    outputs.write_text(path, ''.join(json.dumps(record) + '\n' for record in kept))
    self._file = open(path, 'a', encoding='utf-8')  # noqa: SIM115 (closed by `close`)
    self._events = None
    if tensorboard:
      import tensorboardX  # imported late: `import pf_jax` stays fast
      self._events = tensorboardX.SummaryWriter(str(pathlib.Path(workdir) / 'tensorboard'),
                                                purge_step=start_step + 1 if kept else None)

  def write(self, step: int, values: Mapping[str, float], *, kind: str = 'train') -> None:
    """Writes one record; not-finite numbers become null in JSON, as strict readers require."""
    clean = {name: value if math.isfinite(value) else None for name, value in values.items()}
    record = {'step': step, 'kind': kind, 'time': round(time.time(), 3), **clean}
    self._file.write(json.dumps(record, allow_nan=False) + '\n')
    self._file.flush()
    if self._events is not None:
      for name, value in clean.items():
        if value is not None:
          self._events.add_scalar(f'{kind}/{name}', value, step)

  def close(self) -> None:
    """Flushes and closes everything."""
    self._file.close()
    if self._events is not None:
      self._events.close()


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
