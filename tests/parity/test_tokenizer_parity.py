"""Our tokenizer and sentencepiece, the library that UMT5's vocabulary was made with.

The released vocabulary cannot be had here; a small one of the same kind is trained, written as a
tokenizer.json the way the released one is laid out, and read by both.
"""

import io
import random
import warnings

import pytest
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import models, normalizers, pre_tokenizers

from pf_jax.models.tokenizer import Tokenizer, clean_prompt

SENTENCES = [
    'a white seven drifts right on a teal background',
    'The quick brown fox jumps over the lazy dog, twice!',
    'Ünïcödé: naïve café, façade — and 1234567890 (or 3.14).',
    'zwei Katzen sitzen auf dem Dach; двa кота, 二匹の猫',
]
ROWS = 24


@pytest.fixture(scope='module')
def libraries(tmp_path_factory):
  """sentencepiece's processor and our tokenizer over the same vocabulary."""
  data = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(SENTENCES * 50), model_writer=data, vocab_size=200,
      hard_vocab_limit=False, model_type='unigram', character_coverage=0.995, pad_id=0, eos_id=1,
      bos_id=2, unk_id=3, pad_piece='<pad>', eos_piece='</s>', bos_piece='<s>', unk_piece='<unk>',
      minloglevel=2)
  processor = sentencepiece.SentencePieceProcessor(model_proto=data.getvalue())
  proto = sentencepiece_model_pb2.ModelProto.FromString(data.getvalue())
  backend = tokenizers.Tokenizer(models.Unigram([(p.piece, p.score) for p in proto.pieces],
                                                unk_id=3))
  backend.normalizer = normalizers.Sequence([
      normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap),
      normalizers.Replace(tokenizers.Regex(' {2,}'), ' ')])
  backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='always')
  backend.add_special_tokens(['<pad>', '</s>', '<s>', '<unk>'])
  path = tmp_path_factory.mktemp('tokenizer') / 'tokenizer.json'
  backend.save(str(path))
  return processor, Tokenizer.from_file(path, max_tokens=ROWS)


def prompts():
  rng = random.Random(0)
  words = ' '.join(SENTENCES).split()
  yield from SENTENCES
  yield from ('  two   spaces\tand\nlines ', '“curly” ‘quotes’', '&amp;amp; &lt;b&gt;', 'ﬁne ﬂow',
              'emoji 🙂 and ☃', 'FULLWIDTH ＡＢＣ', 'e\u0301 composed', 'x' * 100)
  for _ in range(200):
    yield ' '.join(rng.choices(words, k=rng.randint(1, 30)))


def test_ids_are_sentencepiece_s(libraries):
  processor, tokenizer = libraries
  cut = 0
  for prompt in prompts():
    wanted = [*processor.encode(clean_prompt(prompt))[:ROWS - 1], 1]
    with warnings.catch_warnings():
      warnings.simplefilter('ignore', UserWarning)  # too long: said, and cut as upstream does
      batch = tokenizer(prompt)
    assert batch.ids[0, :len(wanted)].tolist() == wanted, prompt
    assert not batch.ids[0, len(wanted):].any()
    assert batch.mask[0].sum() == len(wanted)
    cut += batch.truncated[0]
  assert cut > 10
  assert {3} <= set(tokenizer('emoji 🙂').ids[0].tolist())  # unknown is 3, as in mT5


def test_a_literal_end_of_text_is_read_as_the_token_upstream(libraries):
  """Where the two differ, upstream is with `tokenizers`."""
  processor, tokenizer = libraries
  ids = tokenizer('red</s>cat').ids[0].tolist()
  assert ids.count(1) == 2
  assert processor.encode('red</s>cat').count(1) == 0
