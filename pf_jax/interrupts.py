"""Signals as events: what is at hand ends first."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Stop:
  """Whether a signal asked to stop, and which.

  Attributes:
    number: of the first signal, None before one arrives.
  """

  def __init__(self) -> None:
    self.number: int | None = None

  def __bool__(self) -> bool:
    return self.number is not None

  @property
  def name(self) -> str:
    """Of the signal, '' before one arrives."""
    return '' if self.number is None else signal.Signals(self.number).name


@contextlib.contextmanager
def stop_on_signal(notice: str, *, patient: bool = False) -> Iterator[Stop]:
  """Turns the first SIGTERM or SIGINT into an event.

  Outside the main thread (where Python cannot handle signals) nothing is installed.

  Args:
    notice: what happens now, printed beside the signal's name.
    patient: further signals only repeat the notice, so that they cannot damage what is being saved;
      otherwise they act as usual.

  Yields:
    Truthy once a signal has arrived.
  """
  stop = Stop()
  if threading.current_thread() is not threading.main_thread():
    yield stop
    return
  previous: dict[int, Any] = {}

  def restore() -> None:
    while previous:
      signal.signal(*previous.popitem())

  def handle(number: int, frame: Any) -> None:
    del frame
    if stop.number is None:
      stop.number = number
    if not patient:
      restore()
    # os.write, not print: a handler may interrupt a print that holds the stream's lock.
    os.write(2, f'\n{signal.Signals(number).name}: {notice}\n'.encode())

  for number in (signal.SIGTERM, signal.SIGINT):
    previous[number] = signal.signal(number, handle)
  try:
    yield stop
  finally:
    restore()
