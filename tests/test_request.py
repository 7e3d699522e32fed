"""What may be asked for: prompts with switches, files of prompts, lengths, seeds."""

import pytest

from pf_jax import request
from pf_jax.request import Request, RequestError, parse_prompt, plan_batches, read_prompts


def test_a_plain_prompt_holds_for_ever():
  schedule = parse_prompt('a white seven')
  assert schedule == ('a white seven', (0,), ('a white seven',))
  assert [schedule.of_block(block) for block in (0, 5, 10**9)] == [0, 0, 0]


def test_switches():
  schedule = parse_prompt('a three |3: a seven|  5 :an: eight')
  assert schedule.starts == (0, 3, 5)
  assert schedule.texts == ('a three ', ' a seven', 'an: eight')
  assert [schedule.of_block(block) for block in range(7)] == [0, 0, 0, 1, 1, 2, 2]
  schedule.check_length(6)
  with pytest.raises(RequestError, match=r'block 5 is never reached, the video has blocks 0..4'):
    schedule.check_length(5)


@pytest.mark.parametrize(('prompt', 'message'), [
    ('', 'from block 0 on is empty'), ('  \n\t ', 'is empty'), ('\0\0', 'is empty'),
    ('&nbsp;', 'is empty'), (' | 3: a seven', 'from block 0 on is empty'),
    ('a three | 3:', 'from block 3 on is empty'), ('a three | a seven', 'wanted "| BLOCK: new'),
    ('a three |', 'wanted "| BLOCK'), ('a three | -3: a seven', 'wanted "| BLOCK'),
    ('a three | 1.5: a seven', 'wanted'), ('a three | ٣: a seven', 'wanted'),
    ('a three | 99999999999: a seven', 'wanted'), ('a three | 0: a seven', 'increase from 1'),
    ('a | 5: b | 5: c', 'block 5 comes after block 5'), ('a | 5: b | 4: c', 'increase')])
def test_unusable_prompts(prompt, message):
  with pytest.raises(RequestError, match=message) as caught:
    parse_prompt(prompt)
  assert len(str(caught.value)) < 300


@pytest.mark.parametrize('prompt', ['🎬🎬', 'a\0b', 'a\nb\tc', 'x' * 10_000, '-rf /', 'שלום'])
def test_unusual_prompts_are_accepted_as_they_are(prompt):
  assert parse_prompt(prompt).texts == (prompt,)


def test_a_prompt_is_text():
  with pytest.raises(TypeError, match='a prompt is a string, got bytes'):
    parse_prompt(b'a seven')


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-16-le-with-mark'])
@pytest.mark.parametrize('newline', ['\n', '\r\n', '\r'])
def test_prompt_files(tmp_path, encoding, newline):
  # A form feed or a Unicode line separator belongs to its prompt.
  lines = ['a white seven', '', '  naïve 🎬  ', '\t', 'two\u2028lines\x0cone prompt']
  text = newline.join(lines) + newline
  data = (b'\xff\xfe' + text.encode('utf-16-le') if encoding.endswith('mark')
          else text.encode(encoding))
  (tmp_path / 'prompts.txt').write_bytes(data)
  assert read_prompts(tmp_path / 'prompts.txt') == (
      'a white seven', 'naïve 🎬', 'two\u2028lines\x0cone prompt')


def test_unusable_prompt_files(tmp_path):
  path = tmp_path / 'prompts.txt'
  for data, message in ((b'', 'holds no prompt'), (b'\n \r\n', 'holds no prompt'),
                        (b'\xef\xbb\xbf', 'holds no prompt'),
                        (b'ok\n\xe9t\xe9', r'not utf-8 text \(.* at byte 3\)')):
    path.write_bytes(data)
    with pytest.raises(RequestError, match=message):
      read_prompts(path)
  for bad in (tmp_path / 'none.txt', tmp_path, 'nul\0byte'):
    with pytest.raises(RequestError, match='cannot read prompts'):
      read_prompts(bad)


@pytest.mark.parametrize('seconds', [0.0, -1.0, float('nan'), float('inf'), float('-inf')])
def test_lengths_are_positive(seconds):
  with pytest.raises(RequestError, match='must be a positive number of seconds'):
    Request(('a seven',), seconds)


@pytest.mark.parametrize('seed', [-1, 2**32, True, 1.0])
def test_seeds_are_those_jax_can_tell_apart(seed):
  with pytest.raises(RequestError, match=r'within 0\.\.4294967295'):
    Request(('a seven',), 1.0, seed)


def test_seeds_count_up():
  assert Request(('a', 'b', 'c'), 1.0, 7).seeds == (7, 8, 9)
  assert Request(('a',), 1.0, request.MAX_SEED).seeds == (request.MAX_SEED,)
  with pytest.raises(RequestError, match='seed=4294967296'):
    Request(('a', 'b'), 1.0, request.MAX_SEED)


def test_every_prompt_is_checked():
  with pytest.raises(RequestError, match='there is no prompt'):
    Request(())
  with pytest.raises(RequestError, match='is empty'):
    Request(('a seven', ' '))


def test_batches_are_even_and_switch_together():
  def plan(prompts, size):
    return plan_batches([parse_prompt(prompt) for prompt in prompts], size)

  assert plan(['a'], 4) == [(0,)]
  assert plan(['a'] * 5, 4) == [(0, 1, 2), (3, 4)]
  assert plan(['a'] * 4, 4) == [(0, 1, 2, 3)]
  assert plan(['a'] * 3, 1) == [(0,), (1,), (2,)]
  assert plan(['a', 'a | 3: b', 'b', 'c | 3: d', 'e | 4: f'], 2) == [(0, 2), (1, 3), (4,)]
