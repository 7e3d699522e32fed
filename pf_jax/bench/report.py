"""The record of a run: what machine, what model, every timing; and a table to read."""

import datetime
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from pf_jax import pipeline
from pf_jax.bench.ceilings import Ceilings
from pf_jax.bench.subject import Subject
from pf_jax.evals.tables import table
from pf_jax.sampling import meter

VERSION = 1
Record = Mapping[str, Any]
_UNITS = ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k'))
_HEADER = ('case', 'by', 'time [95%]', 'FLOP/s', 'of product', 'bytes/s', 'of copy', 'of limit',
           'ours / peer [95%]')


def machine() -> dict[str, Any]:
  """What the numbers are true of; a load above 0 means that others used the machine as well."""
  device = jax.devices()[0]
  return {'platform': device.platform, 'device_kind': device.device_kind,
          'devices': jax.device_count(), 'cores': len(os.sched_getaffinity(0)),
          'load_before': os.getloadavg()[0], 'versions': meter.versions()}


def described(subject: Subject) -> dict[str, Any]:
  """The model's sizes and choices."""
  cache, video = subject.spec.cache, subject.models.spec.video
  return {
      'weights': subject.weights, 'dtype': subject.dtype,
      'picture': [video.height, video.width, video.fps], 'block_frames': video.block_frames,
      'block_tokens': cache.block_tokens, 'mid_tokens': cache.mid_tokens,
      'attention_tokens': cache.attention_tokens, 'layers': cache.num_layers,
      'heads': [cache.num_heads, cache.head_dim], **pipeline.choices_of(subject.spec)}


def now() -> str:
  """UTC, to the second."""
  return datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')


def whole(config: str, subject: Subject, machine: Record, ceilings: Ceilings,
          suites: Mapping[str, Sequence[Record]]) -> dict[str, Any]:
  """Everything, JSON-able."""
  return {'version': VERSION, 'date': now(), 'config': config, 'machine': machine,
          'model': described(subject), 'ceilings': ceilings.to_json(), 'suites': suites}


def seconds_text(seconds: float) -> str:
  """A time with three digits, such as '12.3 ms'."""
  for unit, name in ((1, 's'), (1e-3, 'ms'), (1e-6, 'us')):
    if seconds >= unit:
      return f'{seconds / unit:.3g} {name}'
  return f'{seconds / 1e-9:.3g} ns'


def rate_text(rate: float, unit: str = '') -> str:
  """A rate with three digits and a prefix, such as '1.2 TFLOP/s'."""
  for size, prefix in _UNITS:
    if rate >= size:
      return f'{rate / size:.3g} {prefix}{unit}'
  return f'{rate:.3g} {unit}'


def _time(seconds: Record) -> str:
  return (f'{seconds_text(seconds["median"])} [{seconds_text(seconds["low"])}, '
          f'{seconds_text(seconds["high"])}]')


def _ratio(ratio: Record | None) -> str:
  if ratio is None:
    return ''
  return f'{ratio["median"]:.3f} [{ratio["low"]:.3f}, {ratio["high"]:.3f}]'


def rows(case: Record) -> list[list[str]]:
  """A case's lines in the table: ours, peers, and those that are absent."""
  found: list[list[str]] = []
  for name, call in case['calls'].items():
    work = ([rate_text(call['flops_per_second']), f'{call["of_product"]:.1%}'] if case['flops']
            else ['', ''])
    found.append([case['name'] if not found else '', name, _time(call['seconds']), *work,
                  rate_text(call['bytes_per_second']), f'{call["of_copy"]:.1%}',
                  f'{call["of_limit"]:.1%}', _ratio(case['ratios'].get(name))])
  return found + [['', name, why, *[''] * 6] for name, why in case['absent'].items()]


def _counts(case: Record) -> str:
  agree = case['flops'] == case['traced_flops']
  also = '' if agree else f', but {case["traced_flops"]:,} in the traced program'
  return f'- {case["name"]}: {case["flops"]:,} FLOP{also}; {case["bytes"]:,} bytes'


def _notes(case: Record) -> list[str]:
  notes = case['notes']
  if 'memory_constant' not in notes:
    return []
  (ratio,) = case['ratios'].values()
  low, high = notes['goal']
  verdict = 'within' if low <= ratio['median'] <= high else 'outside'
  early, late = notes['memory']['early'], notes['memory']['late']
  state = (f'- state: {early["state"]:,} bytes after block {early["block"]}, {late["state"]:,} '
           f'after block {late["block"]}; all arrays: {early["live"]:,} and {late["live"]:,}')
  compiled = notes['compilations']
  return [f'- late over early: {_ratio(ratio)}, {verdict} {low:.2f} to {high:.2f}', state,
          '- compilations after the second block: '
          + ('not noticed by this JAX' if compiled is None else str(compiled))]


def _ceilings(ceilings: Record) -> str:
  parts = []
  for name, ceiling in ceilings.items():
    copied = 'bytes' in ceiling
    rate = ceiling['bytes_per_second' if copied else 'flops_per_second']
    size = f'{ceiling["size"]:,} bytes' if copied else f'{ceiling["size"]:,} rows'
    parts.append(f'{name} {rate_text(rate, "B/s" if copied else "FLOP/s")} ({size})')
  return ', '.join(parts)


def markdown(record: Record) -> str:
  """The whole record as a document."""
  machine, model = record['machine'], record['model']
  versions = ', '.join(f'{name} {version}' for name, version in machine['versions'].items()
                       if name in ('pf_jax', 'jax', 'python'))
  where = (f'{machine["device_kind"]} ({machine["platform"]}), {machine["cores"]} cores, load '
           f'before {machine["load_before"]:.1f}; {versions}.')
  what = (f'{record["config"]}: {model["weights"]} weights, {model["dtype"]}, blocks of '
          f'{model["block_tokens"]:,} tokens that attend {model["attention_tokens"]:,}.')
  limits = (f'Ceilings, measured in the same run: {_ceilings(record["ceilings"])}. "of limit" is '
            'the time that they leave at best over the time it took.')
  lines = [f'# Benchmarks, {record["date"]}', '', where, '', what, '', limits]
  for name, cases in record['suites'].items():
    body = [row for case in cases for row in rows(case)]
    lines += ['', f'## {name}', '', table(_HEADER, body), '', *map(_counts, cases),
              *(line for case in cases for line in _notes(case))]
  return '\n'.join(lines) + '\n'
