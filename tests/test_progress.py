"""The progress display."""

import io

from pf_jax.progress import Progress


def test_plain_lines_without_a_terminal():
  stream = io.StringIO()
  progress = Progress(4, unit='block', every_s=0.0, stream=stream)
  progress.update()  # nothing to show yet
  progress.show({'loss': 0.25})
  progress.update()
  progress.say('notice')
  progress.update(2)
  progress.close()
  lines = stream.getvalue().splitlines()
  assert [line.split(' ')[1] for line in lines if line.startswith('block')] == ['2/4', '4/4']
  assert 'loss=0.25' in lines[0]
  assert 'notice' in lines


def test_bar_on_a_terminal():
  stream = io.StringIO()
  stream.isatty = lambda: True
  progress = Progress(4, stream=stream)
  progress.show({'loss': 0.25})
  progress.update(4)
  progress.say('notice')
  progress.close()
  assert '4/4' in stream.getvalue()
  assert 'notice' in stream.getvalue()
