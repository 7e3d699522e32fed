"""Trains the digit classifier that judges identity in evaluations (well under a minute).

  python -m launch.train_classifier [--output=FILE] [--steps=N] [--seed=S]

Writes float16 weights with the measured held-out accuracy; by default over the shipped ones.
"""

from absl import app, flags

_OUTPUT = flags.DEFINE_string('output', None, 'Where to write; default: the packaged weights.')
_STEPS = flags.DEFINE_integer('steps', None, 'Optimiser steps; default: the recipe\'s.',
                              lower_bound=1)
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of initialisation and augmentation.', lower_bound=0)


def main(argv):
  """Trains, saves and prints one line."""
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected arguments: {argv[1:]}; use the flags.')
  # Imported here: --help answers at once.
  from pf_jax.evals import classifier

  steps = _STEPS.value or classifier.TrainSpec().steps
  spec = classifier.TrainSpec(seed=_SEED.value, steps=steps)
  trained = classifier.train(spec=spec)
  output = _OUTPUT.value or classifier.WEIGHTS
  classifier.save(trained, output)
  print(f'{output}: held-out accuracy {trained.held_out_accuracy:.3f}, '
        f'{trained.seconds:.0f} s for {spec.steps} steps.')


if __name__ == '__main__':
  app.run(main)
