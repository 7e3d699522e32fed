"""The metric file."""

import json

from pf_jax.train import metrics


def test_records_are_strict_json_and_each_step_appears_once(tmp_path):
  writer = metrics.MetricWriter(tmp_path, tensorboard=False)
  for step in (1, 2, 3):
    writer.write(step, {'loss': float('nan') if step == 2 else 1.0 / step})
  writer.write(3, {'psnr': 20.0}, kind='eval')
  writer.close()
  with open(tmp_path / metrics.METRICS_FILE, 'a') as stream:
    stream.write('{"step": 4, "lo')  # killed while writing
  writer = metrics.MetricWriter(tmp_path, start_step=2, tensorboard=False)
  writer.write(3, {'loss': 0.5})
  writer.close()
  lines = (tmp_path / metrics.METRICS_FILE).read_text().splitlines()
  records = [json.loads(line) for line in lines]
  assert [(r['step'], r['loss']) for r in records] == [(1, 1.0), (2, None), (3, 0.5)]
  assert metrics.read_metrics(tmp_path / metrics.METRICS_FILE) == records


def test_torn_last_line_is_left_out(tmp_path):
  path = tmp_path / 'm.jsonl'
  path.write_text('{"step": 1}\n{"step": 2')
  assert metrics.read_metrics(path) == [{'step': 1}]
  assert metrics.read_metrics(tmp_path / 'none.jsonl') == []


def test_tensorboard_files_appear(tmp_path):
  writer = metrics.MetricWriter(tmp_path)
  writer.write(1, {'loss': 1.0})
  writer.close()
  assert list((tmp_path / 'tensorboard').glob('events.*'))
