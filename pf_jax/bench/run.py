"""Runs suites one after the other and writes what they found."""

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from pf_jax import outputs
from pf_jax import profile as profile_lib
from pf_jax.bench import block, kernels, long, report
from pf_jax.bench import tune as tune_lib
from pf_jax.bench.case import Bench, Case, Say, record
from pf_jax.bench.ceilings import Ceilings
from pf_jax.bench.config import SUITES, Effort
from pf_jax.bench.subject import Subject
from pf_jax.sampling.meter import CompileCounter

QUIET = 0.5  # load average
FUNCTIONS: dict[str, Callable[[Bench], list[Case]]] = dict(zip(SUITES, (
    kernels.attention, kernels.context, kernels.convolutions, kernels.vae, block.block,
    long.rollout), strict=True))


def run(subject: Subject, suites: Sequence[str], effort: Effort, output: str | os.PathLike, *,
        config: str, profile: str | os.PathLike | None = None, tune: bool = False,
        say: Say = print) -> dict[str, Any]:
  """Measures, and writes bench.json and bench.md after every suite.

  Args:
    subject: the model.
    suites: names of `SUITES`.
    effort: how much is measured.
    output: directory; created if needed.
    config: what the subject is called in the record.
    profile: directory for a trace of one turn of each suite, one folder each.
    tune: first times the tiles of our own kernels in these suites (`pf_jax.bench.tune`).
    say: receives lines to show.

  Returns:
    The record, as in bench.json.

  Raises:
    NotWritable, DirectoryInUse: the directory cannot be used.
    BadTable, NothingFits: see `pf_jax.kernels.tuning.tune`.
    OutputExists: the directory for traces holds something.
  """
  with outputs.claim_directory(output, say=say) as root, CompileCounter() as compilations:
    if profile is not None:
      profile_lib.new_directory(profile)
    machine, ceilings = report.machine(), Ceilings(effort)
    if machine['load_before'] > QUIET:
      say(f'note: others use this machine (load {machine["load_before"]:.1f}); timings and '
          'fractions will be worth little.')
    bench = Bench(subject, effort, ceilings, compilations, say)
    if tune:
      tune_lib.tune(bench, suites)
    found: dict[str, list[dict[str, Any]]] = {}
    whole: dict[str, Any] = {}
    for number, name in enumerate(suites, 1):
      say(f'{name}: suite {number} of {len(suites)} ...')
      found[name] = suite(bench, name, profile)
      whole = report.whole(config, subject, machine, ceilings, found)
      outputs.write_json(root / 'bench.json', whole)
      outputs.write_text(root / 'bench.md', report.markdown(whole))
    return whole


def suite(bench: Bench, name: str, profile: str | os.PathLike | None = None
          ) -> list[dict[str, Any]]:
  """Measures one suite.

  Args:
    bench: what to measure.
    name: of `SUITES`.
    profile: see `run`.
  """
  found, cases = [], FUNCTIONS[name](bench)
  for case in cases:
    found.append(record(case, case.measure(bench.effort), bench.ceilings))
    for row in report.rows(found[-1]):
      bench.say('  ' + '  '.join(filter(None, row)))
  if profile is not None:
    with profile_lib.trace(pathlib.Path(profile) / name):
      for case in cases:
        case.run_once()
  return found
