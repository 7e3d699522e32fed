"""What is measured and for how long. No JAX here."""

import dataclasses
import difflib
import math

SUITES = ('attention', 'context', 'conv3d', 'vae', 'block', 'rollout')


def parse_suites(text: str) -> tuple[str, ...]:
  """Reads 'attention,vae'; 'all' or nothing is all of them.

  Raises:
    ValueError: a suite that does not exist, or one twice.
  """
  names = tuple(filter(None, (name.strip() for name in text.split(','))))
  if names in ((), ('all',)):
    return SUITES
  for name in names:
    if name not in SUITES:
      close = difflib.get_close_matches(name, SUITES, n=1)
      hint = f' (did you mean {close[0]}?)' if close else ''
      raise ValueError(f'suite {name!r} is unknown{hint}; use some of {", ".join(SUITES)}, or all.')
  if len(set(names)) < len(names):
    raise ValueError(f'suites {",".join(names)} name one twice; name each once.')
  return names


@dataclasses.dataclass(frozen=True)
class Effort:
  """How much is measured.

  Attributes:
    seconds: of measuring each call of a case, roughly.
    least: rounds of a case, at least.
    most: rounds of a case, at most.
    early_block: where the rollout's early window begins, counted from 0.
    late_block: where its late window begins.
    window: blocks in each window.
    ceiling_seconds: what one call of a ceiling should take; its size is chosen for that.
    ceiling_bytes: largest array that is copied.
    ceiling_rows: largest square matrix that is multiplied.

  Raises:
    ValueError: a value out of range.
  """

  seconds: float = 1.0
  least: int = 6
  most: int = 200
  early_block: int = 20
  late_block: int = 1100
  window: int = 100
  ceiling_seconds: float = 0.05
  ceiling_bytes: int = 1 << 30
  ceiling_rows: int = 16384

  def __post_init__(self):
    for name in ('seconds', 'ceiling_seconds'):
      value = getattr(self, name)
      if not (math.isfinite(value) and value > 0):
        raise ValueError(f'{name}={value} must be a positive number of seconds.')
    for name in ('least', 'window'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 1.')
    if self.most < self.least:
      raise ValueError(f'most={self.most} rounds are fewer than least={self.least}; raise it.')
    for name, low in (('ceiling_bytes', 1 << 12), ('ceiling_rows', 16)):
      if getattr(self, name) < low:
        raise ValueError(f'{name}={getattr(self, name)} must be at least {low}.')
    if self.early_block < 2:
      raise ValueError(f'early_block={self.early_block} must be at least 2: the first two blocks '
                       'run programs for the first time.')
    if self.late_block < self.early_block + self.window:
      raise ValueError(f'late_block={self.late_block} lies within the early window '
                       f'{self.early_block}..{self.early_block + self.window - 1}; start it later.')
