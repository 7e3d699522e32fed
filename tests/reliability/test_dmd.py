"""A real distillation, stopped after its first step and resumed, ends in the same bits."""

import os
import signal

import pytest

from pf_jax.rollout.block import SamplerSpec
from pf_jax.train import dmd_stage
from pf_jax.train.config import OptimizerConfig, TrainConfig
from pf_jax.train.dmd import DmdSpec
from pf_jax.train.dmd_stage import DmdStage
from pf_jax.train.self_forcing import SelfForcingSpec
from pf_jax.weights import package
from tests.evals import micro
from tests.reliability.kills import fingerprint, records


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_distillation_resumes_bit_for_bit(tmp_path, monkeypatch):
  start = package.save_model(tmp_path / 'start', micro.models(), choices=micro.CHOICES)
  stage = DmdStage(start=str(start), teacher=str(start), videos=2, cache=micro.CHOICES['cache'],
                   sampler=SamplerSpec('renoise', (1000.0, 500.0)), world=micro.WORLD,
                   self_forcing=SelfForcingSpec(window_blocks=3, warmup_blocks=1),
                   objective=DmdSpec(generator_every=2), critic_learning_rate=1e-3,
                   eval_blocks=(2,))
  config = TrainConfig(steps=3, log_every=1, save_every=100, eval_every=0, ema_decay=0.9,
                       optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=0, b1=0.0),
                       mfu=False)
  straight = dmd_stage.train_dmd(stage, config, tmp_path / 'straight')
  batches, drawn = dmd_stage.prompt_batches, []

  def stopping(*arguments, **named):
    def stream(step):
      for batch in batches(*arguments, **named)(step):
        drawn.append(step)
        if drawn == [0]:
          os.kill(os.getpid(), signal.SIGTERM)
        yield batch

    return stream

  monkeypatch.setattr(dmd_stage, 'prompt_batches', stopping)
  first = dmd_stage.train_dmd(stage, config, tmp_path / 'stopped')
  assert (first.step, first.interrupted) == (1, True)
  second = dmd_stage.train_dmd(stage, config, tmp_path / 'stopped')
  assert drawn == [0, 1, 1]  # two steps of a run that starts at step 1
  assert fingerprint(second.state) == fingerprint(straight.state)
  assert fingerprint(second.state) != fingerprint(first.state)
  assert records(tmp_path / 'stopped') == records(tmp_path / 'straight')
