"""Where a training run's numbers go: a JSONL file and TensorBoard."""

import contextlib
import json
import math
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

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
    """Closes everything. A full disk has been told by `write`, or is told by a checkpoint."""
    with contextlib.suppress(OSError):
      self._file.close()
    with contextlib.suppress(OSError):
      if self._events is not None:
        self._events.close()
