"""Texts, tokens and folders as people have them: nothing is lost or changed."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, STORY, TINY, flags, script
from test_tokenizer import TEXTS, make_folder

import console
import prepare_text
import sample
import tokenizer
import train
from checkpoint import load_checkpoint
from console import UserError
from tokenizer import (
    CharTokenizer, GPT2Tokenizer, HuggingFaceTokenizer, TextStream, gives_same_ids, prompt_ids,
    tokenizer_from, tokenizer_of,
)
from train import TrainConfig


def ids_of(name, split):
    return np.fromfile(f'data/{name}/{split}.bin', '<u2').tolist()


def save(text, folder='hf', **files):
    os.makedirs(folder, exist_ok=True)
    with open(f'{folder}/tokenizer.json', 'w', encoding='utf-8') as file:
        file.write(text)
    for name, content in files.items():
        with open(f'{folder}/{name}.json', 'w', encoding='utf-8') as file:
            json.dump(content, file)
    return folder


# --- a tokenizer is recognized by all that decides ids


@pytest.fixture
def gpt2_json(gpt2):
    pytest.importorskip('tokenizers')
    import export_hf

    return json.loads(export_hf.hugging_face_tokenizer(gpt2).to_str())


def prefix_space(state):
    state['pre_tokenizer']['add_prefix_space'] = True


def normalizer(state):
    state['normalizer'] = {'type': 'Lowercase'}


def fewer_merges(state):
    state['model']['merges'] = state['model']['merges'][:-5]


def another_split(state):
    state['pre_tokenizer'] = {'type': 'Sequence', 'pretokenizers': [
        {'type': 'Digits', 'individual_digits': True}, state['pre_tokenizer']]}


def added_token(state):
    state['added_tokens'].append({'id': 50257, 'content': '<|im_start|>', 'single_word': False,
                                  'lstrip': False, 'rstrip': False, 'normalized': False,
                                  'special': True})


def stripping_end(state):
    state['added_tokens'][0]['lstrip'] = True


@pytest.mark.parametrize('change', [
    prefix_space, normalizer, fewer_merges, another_split, added_token, stripping_end,
], ids=lambda function: function.__name__)
def test_gpt2s_words_under_other_rules_are_another_tokenizer(folder, gpt2_json, change):
    assert isinstance(tokenizer_of(save(json.dumps(gpt2_json))), GPT2Tokenizer)
    change(gpt2_json)
    ours = tokenizer_of(save(json.dumps(gpt2_json)))
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_file('hf/tokenizer.json')
    for text in ('Hello World 2026', ' ABC<|im_start|>x <|endoftext|>', 'the quick brown'):
        assert ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize('change', [
    lambda state: state.update(normalizer={'type': 'Lowercase'}),
    lambda state: state.update(pre_tokenizer=None),
    lambda state: state['pre_tokenizer'].update(pattern={'Regex': r'\s+'}),
    lambda state: state['pre_tokenizer'].update(behavior='Removed'),
])
def test_single_characters_under_other_rules_are_no_alphabet(folder, change):
    pytest.importorskip('tokenizers')
    import export_hf

    state = json.loads(export_hf.hugging_face_tokenizer(CharTokenizer('abAB ')).to_str())
    assert isinstance(tokenizer_of(save(json.dumps(state))), CharTokenizer)
    change(state)
    assert isinstance(tokenizer_of(save(json.dumps(state))), HuggingFaceTokenizer)


def test_the_same_tokenizer_in_another_form_of_json_is_the_same(tiny):
    """Merges as pairs or as strings; defaults omitted."""
    make_folder('hf')
    with open('hf/tokenizer.json', encoding='utf-8') as file:
        state = json.load(file)
    state['model']['merges'] = [pair if isinstance(pair, str) else ' '.join(pair)
                                for pair in state['model']['merges']]
    for name in ('byte_fallback', 'ignore_merges', 'fuse_unk'):
        state['model'].pop(name, None)
    save(json.dumps(state, indent=3), 'older', tokenizer_config={'eos_token': '<|eot|>'})
    assert gives_same_ids(tokenizer_of('hf').state(), tokenizer_of('older').state())
    with open(STORY, encoding='utf-8') as file:
        text = file.read(20_000)
    cfg = TINY | dict(sample_tokens=0, dataset='a')
    prepare_text.prepare(text, 'a', 'hf')
    train.train(TrainConfig(**cfg))
    prepare_text.prepare(text, 'b', 'older')
    train.train(TrainConfig(**cfg | dict(dataset='b', init_from='resume', max_iters=8)))
    state['model']['vocab']['the'], state['model']['vocab']['d'] = 1, 2
    state['normalizer'] = {'type': 'Lowercase'}
    save(json.dumps(state), 'other')
    assert not gives_same_ids(tokenizer_of('hf').state(), tokenizer_of('other').state())


# --- prompts, ends, breaks


def test_the_end_of_text_in_a_prompt_is_the_token(gpt2):
    assert prompt_ids(gpt2, '<|endoftext|>') == [50256]
    assert prompt_ids(gpt2, 'a<|endoftext|>b<|endoftext|>') == [64, 50256, 65, 50256]
    assert 50256 not in gpt2.encode('a<|endoftext|>b')  # in a text it is text, as nanoGPT's


@pytest.fixture
def ending(folder, monkeypatch):
    """A model of GPT-2's tokens that always writes `a`, `b` and the end of text in turn."""
    import model

    class Three(model.GPT):
        def forward(self, idx, targets=None, cache=None, loss_only=False):
            logits, loss = super().forward(idx, targets, cache, loss_only)
            after = {64: 65, 65: 50256, 50256: 64}
            logits[:, -1, [after.get(i, 64) for i in idx[:, -1].tolist()]] = 1e4
            return logits, loss

    tokens = GPT2Tokenizer()
    config = model.GPTConfig(block_size=16, n_layer=1, n_head=1, n_embd=8)
    monkeypatch.setattr(sample, 'load_model', lambda *_, **__: (Three(config), tokens))


@pytest.mark.parametrize('end, text', [(True, 'x'), (False, 'x')])
def test_a_sample_stops_at_the_end_of_a_text(gpt2, ending, capsys, end, text):
    sample.main([f'--start={text}', '--max_new_tokens=8', '--num_samples=2', f'--end={end}',
                 '--device=cpu', '--dtype=float32'])
    more = 'ab' if end else 'ab<|endoftext|>ab<|endoftext|>ab'
    assert capsys.readouterr().out == f'x{more}\n---------------\nx{more}\n'


def test_several_files_are_joined_by_the_end_of_text(folder, gpt2):
    for name, text in (('a', 'The Lion.'), ('b', 'The Scarecrow.\n'), ('c', 'Toto ' * 30)):
        (folder / f'{name}.txt').write_text(text)
    prepare_text.main(['a.txt', 'b.txt', 'c.txt', '--dataset=x', '--tokenizer=gpt2'])
    ids = ids_of('x', 'train') + ids_of('x', 'val')
    assert gpt2.decode(ids) == ('The Lion.<|endoftext|>The Scarecrow.\n<|endoftext|>'
                                + 'Toto ' * 30)
    assert ids.count(50256) == 2
    prepare_text.main(['a.txt', 'b.txt', 'c.txt', '--dataset=x', '--tokenizer=gpt2',
                       '--separate=false'])
    assert gpt2.decode(ids_of('x', 'train') + ids_of('x', 'val')) == (
        'The Lion.\nThe Scarecrow.\n' + 'Toto ' * 30)


@pytest.mark.parametrize('typed, start', [
    (r'\n', '\n'), (r'\n\n', '\n\n'), (r'$\nabla$', r'$\nabla$'), (r'C:\new', r'C:\new'), ('', ''),
])
def test_a_backslash_is_one_unless_line_breaks_are_all_there_is(typed, start):
    from configurator import override

    for config, name in ((sample.SampleConfig(), 'start'), (sample.SampleConfig(), 'stop'),
                         (TrainConfig(), 'sample_start')):
        assert getattr(override(config, [f'--{name}={typed}']), name) == start
    assert '\\n' in override.__doc__


def test_help_says_how_a_line_break_is_typed(capsys):
    with pytest.raises(SystemExit):
        sample.main(['--help'])
    assert r'\n alone is a line break' in capsys.readouterr().out


def test_an_incomplete_character_is_shown_at_the_end(gpt2):
    ids = gpt2.encode('ab🦁').tolist()
    text = TextStream('', [], gpt2)
    shown = ''.join(text.add(i) for i in [*ids[:-1]])
    assert shown == 'ab' and shown + text.finish() == gpt2.decode(ids[:-1]) == 'ab\ufffd'
    whole = TextStream('', [], gpt2)
    ids = gpt2.encode('né').tolist() + gpt2.encode('🦁').tolist()[:1] + gpt2.encode('x').tolist()
    assert ''.join(whole.add(i) for i in ids) + whole.finish() == gpt2.decode(ids)


def test_a_replacement_character_in_an_alphabet_is_a_character():
    chars = CharTokenizer('ab\ufffd')
    text = TextStream('', [], chars)
    assert [text.add(i) for i in chars.encode('a\ufffd\ufffdb')] == [*'a\ufffd\ufffdb']


def test_control_characters_of_a_model_do_not_reach_the_terminal(folder, capsys):
    prepare_text.prepare('a\x1b[2J\x07b\r' * 300, 'x')
    train.train(TrainConfig(**TINY | dict(dataset='x', max_iters=1)))
    capsys.readouterr()
    sample.main(['--start=a', '--device=cpu', '--num_samples=2', '--max_new_tokens=60'])
    out = capsys.readouterr().out
    assert '\ufffd' in out and not set(out) & set('\x1b\x07\r')


# --- special tokens, from import to export


SPECIAL = ['<s>', '</s>', '<pad>', '<|im_start|>', '<|im_end|>']
TEMPLATE = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"


@pytest.fixture
def hf(folder):
    """A Hugging Face folder like those of instruct models: <s> in front, </s>, a template."""
    transformers = pytest.importorskip('transformers')
    from tokenizers import processors

    fast = make_folder('hf', extra=0)
    fast.add_special_tokens(SPECIAL)
    fast.no_truncation()
    fast.no_padding()
    ids = {token: fast.token_to_id(token) for token in SPECIAL}
    fast.post_processor = processors.TemplateProcessing(
        single='<s> $A', special_tokens=[('<s>', ids['<s>'])])
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token='<s>', eos_token='</s>', pad_token='<pad>',
        additional_special_tokens=SPECIAL[3:], chat_template=TEMPLATE, model_max_length=8192)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(theirs), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=8192, bos_token_id=ids['<s>'],
        eos_token_id=ids['</s>'], pad_token_id=ids['<pad>']))
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=ids['<s>'], eos_token_id=[ids['</s>'], ids['<|im_end|>']],
        pad_token_id=ids['<pad>'], temperature=0.7, do_sample=True)
    theirs.save_pretrained('hf')
    model.save_pretrained('hf')
    return theirs


def test_all_of_an_instruct_model_comes_through_fine_tuning_and_export(hf, capsys):
    import transformers

    import export_hf

    with open(STORY, encoding='utf-8') as file:
        prepare_text.prepare(file.read(9_000), 'tuned', 'hf')
    settings = TINY | dict(dataset='tuned', init_from='hf', block_size=32, max_iters=2)
    train.train(TrainConfig(**settings))
    assert load_checkpoint('out')['model_args']['block_size'] == 8192
    export_hf.main(['--out_dir=out', '--to=back'])
    back = transformers.AutoTokenizer.from_pretrained('back')
    for name in ('bos_token', 'eos_token', 'pad_token', 'chat_template', 'model_max_length'):
        assert getattr(back, name) == getattr(hf, name), name
    assert set(SPECIAL[3:]) <= set(back.all_special_tokens)
    messages = [{'role': 'user', 'content': 'the lion'}]
    assert back.apply_chat_template(messages, tokenize=False) == 'the lion</s>'
    assert back('the lion').input_ids == hf('the lion').input_ids
    ours, theirs = (transformers.GenerationConfig.from_pretrained(path) for path in ('back', 'hf'))
    for name in ('bos_token_id', 'eos_token_id', 'pad_token_id', 'temperature', 'do_sample'):
        assert getattr(ours, name) == getattr(theirs, name), name
    config = transformers.AutoConfig.from_pretrained('back')
    assert config.max_position_embeddings == 8192
    for name in ('bos', 'eos', 'pad'):
        assert getattr(config, f'{name}_token_id') == getattr(hf, f'{name}_token_id')


def test_texts_and_prompts_begin_as_the_post_processor_says(hf):
    ours = tokenizer_of('hf')
    begin = hf.convert_tokens_to_ids('<s>')
    assert list(ours.front) == [begin] and ours.eot == hf.eos_token_id
    assert prompt_ids(ours, 'the lion') == hf('the lion').input_ids
    assert ours.encode('the lion').tolist() == hf('the lion', add_special_tokens=False).input_ids
    for name in 'ab':
        with open(f'{name}.txt', 'w') as file:
            file.write('the lion walked on ' * 9)
    prepare_text.main(['a.txt', 'b.txt', '--dataset=x', '--tokenizer=hf'])
    ids = ids_of('x', 'train') + ids_of('x', 'val')
    once = hf('the lion walked on ' * 9).input_ids
    assert ids == [*once, hf.eos_token_id, *once] or hf.decode(ids) == hf.decode(
        [*once, hf.eos_token_id, *once])
    again = tokenizer_from(json.loads(json.dumps(ours.state())))
    assert list(again.front) == [begin] and again.files == ours.files


@pytest.mark.parametrize('files, eos', [
    (dict(tokenizer_config={}, special_tokens_map={'eos_token': '</s>'}), '</s>'),
    (dict(special_tokens_map={'eos_token': {'content': '</s>', 'lstrip': False}}), '</s>'),
    (dict(generation_config={'eos_token_id': [1, 2]}), 1),
    (dict(generation_config={'eos_token_id': 2}, tokenizer_config={'eos_token': None}), 2),
    (dict(), None),
])
def test_the_end_is_found_wherever_it_is_said(folder, files, eos):
    theirs = make_folder('hf', eos=None)
    theirs.add_special_tokens(['</s>'])
    theirs.no_truncation()
    theirs.no_padding()
    save(theirs.to_str(), **files)
    expected = theirs.token_to_id(eos) if isinstance(eos, str) else eos
    assert tokenizer_of('hf').eot == expected


def test_a_token_without_a_row_of_weights_is_one_line(hf):
    """A [PAD] added to the tokenizer, without resizing the model."""
    hf.add_tokens(['[PAD]'])
    hf.save_pretrained('hf')
    sample.main(['--init_from=hf', '--start=the lion', '--max_new_tokens=3', '--device=cpu'])
    with pytest.raises(UserError, match=r"the id 335 of '\[PAD\]' is beyond the model's 335 rows"):
        sample.main(['--init_from=hf', '--start=[PAD]', '--device=cpu'])
    prepare_text.prepare('the lion ' * 200, 'x', 'hf')
    with pytest.raises(UserError, match='rows of weights for the'):
        train.train(TrainConfig(**TINY | dict(dataset='x', init_from='hf')))


# --- memory


@pytest.mark.parametrize('kind', ['bytes', 'pieces', 'unigram'])
def test_long_texts_are_encoded_in_pieces_that_give_the_same_ids(folder, monkeypatch, kind):
    """Cut at difficult places: in runs of spaces or of a letter, in emoji, between accents."""
    library = pytest.importorskip('tokenizers')
    if kind == 'unigram':
        theirs = library.Tokenizer(library.models.Unigram())
        theirs.normalizer = library.normalizers.NFKC()
        theirs.pre_tokenizer = library.pre_tokenizers.Metaspace()
        theirs.train_from_iterator(TEXTS * 20 + ['the lion and the tin man'] * 50,
                                   library.trainers.UnigramTrainer(
            vocab_size=120, show_progress=False, unk_token='<unk>', special_tokens=['<unk>']))
        os.mkdir('hf')
        theirs.save('hf/tokenizer.json')
    else:
        theirs = make_folder('hf', kind)
        theirs.no_truncation()
        theirs.no_padding()
    ours = tokenizer_of('hf')
    monkeypatch.setattr(tokenizer, 'PIECE', 300)
    draw = np.random.default_rng(0)
    words = [*TEXTS, 'the lion walked on', 'a' * 40, ' ' * 30, '\n\n\n', '🦁' * 9, 'é' * 20,
             'e\u0301' * 9, '<|eot|>', ' ,,, ', 'x']
    for _ in range(15):
        text = ''.join(draw.choice(words, 150))
        expected = theirs.encode(text, add_special_tokens=False).ids
        pieces = list(ours.encode_pieces(text, margin=64))
        assert [i for ids, _ in pieces for i in ids.tolist()] == expected
        assert len(pieces) > 3 and pieces[-1][1] == len(text)
    for text in ('', 'x', ' ' * 5000, 'é' * 5000):
        assert ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False).ids


def test_gpt2s_pieces_are_cut_where_no_token_reaches_over(gpt2, monkeypatch):
    monkeypatch.setattr(tokenizer, 'PIECE', 50)
    draw = np.random.default_rng(0)
    words = ['a\n', 'b\nc', '\n\n', ' \n', '\n ', "'s\n'll", 'x\r\n', '\x1c\n', '\n\x1f', '7\n7',
             ' y']
    for _ in range(200):
        text = ''.join(draw.choice(words, 100))
        pieces = list(gpt2.encode_pieces(text))
        assert [i for ids, _ in pieces for i in ids.tolist()] == gpt2.encode(text).tolist()
        assert len(pieces) > 1


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_a_large_text_takes_memory_for_its_characters_alone(folder, tmp_path):
    """20 MB of text. Earlier versions kept its ids as Python objects, or all splits as arrays."""
    with open('big.txt', 'w') as file:
        file.writelines('the lion and the tin man walked on\n' for _ in range(600_000))
    code = f'''
import resource, sys
sys.path.insert(0, {ROOT!r})
import prepare_text
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
prepare_text.main(['big.txt', '--dataset=big'])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
'''
    result = subprocess.run([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    assert int(result.stdout.split('\n')[-2]) < 120_000  # KB, for 21 MB of text


def test_preparing_shows_its_progress(folder, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(console.Progress, 'show_progress',
                        lambda self, fraction, text: shown.append((fraction, text)))
    monkeypatch.setattr(tokenizer, 'PIECE', 1000)
    prepare_text.prepare('the lion\nwalked on\n' * 1000, 'x')
    assert len(shown) > 10 and all(0 < fraction <= 1 for fraction, _ in shown)
    assert 'characters' in shown[0][1]


def test_no_memory_for_a_text_is_one_line(folder, monkeypatch):
    (folder / 'a.txt').write_text('some text ' * 99)

    def fails(*_, **__):
        raise MemoryError

    monkeypatch.setattr(prepare_text, 'prepare', fails)
    with pytest.raises(UserError, match='not enough memory for all of the text'):
        prepare_text.main(['a.txt', '--dataset=x'])


# --- messages


def test_a_text_that_the_library_cannot_encode_is_one_line(folder):
    library = pytest.importorskip('tokenizers')
    words = library.Tokenizer(library.models.WordLevel({'the': 0, 'lion': 1}, unk_token='<unk>'))
    words.pre_tokenizer = library.pre_tokenizers.Whitespace()
    save(words.to_str())
    with pytest.raises(UserError, match='cannot encode this text .*UNK'):
        prepare_text.prepare('the tiger ' * 99, 'x', 'hf')
    assert tokenizer_of('hf').encode('the lion').tolist() == [0, 1]


def test_half_surrogates_are_replaced(folder):
    make_folder('hf')
    ours = tokenizer_of('hf')
    assert ours.encode('a\ud800b').tolist() == ours.encode('a?b').tolist()


@pytest.mark.parametrize('name, text', [
    ('config', '{"model_type"'), ('config', '[1, 2]'), ('tokenizer_config', '7'),
    ('tokenizer_config', '{"eos_token"'), ('config', ''),
])
def test_malformed_settings_of_a_folder_are_one_line(folder, name, text):
    pytest.importorskip('transformers')
    make_folder('hf')
    with open('hf/config.json', 'w') as file:
        json.dump({'model_type': 'llama', 'vocab_size': 330, 'hidden_size': 8,
                   'num_hidden_layers': 1, 'num_attention_heads': 1}, file)
    with open(f'hf/{name}.json', 'w') as file:
        file.write(text)
    result = script('sample.py', '--init_from=hf', '--device=cpu', '--start=the')
    assert result.returncode == 1 and result.stderr.count('\n') == 1, result.stderr
    assert result.stderr.startswith('error: ')


@pytest.mark.parametrize('change', [
    dict(num_attention_heads=0), dict(num_key_value_heads=0), dict(hidden_size=-1),
    dict(vocab_size='many'), dict(rope_parameters=7), dict(torch_dtype='float7'),
])
def test_impossible_shapes_of_a_folder_are_one_line(folder, change):
    transformers = pytest.importorskip('transformers')
    make_folder('hf')
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=330, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=32)).save_pretrained('hf')
    with open('hf/config.json') as file:
        config = json.load(file) | change
    with open('hf/config.json', 'w') as file:
        json.dump(config, file)
    result = script('sample.py', '--init_from=hf', '--device=cpu', '--start=the',
                    '--max_new_tokens=2')
    if result.returncode:  # transformers repairs some by itself
        assert result.stderr.count('\n') == 1 and result.stderr.startswith('error: '), result.stderr


def test_weights_with_code_in_them_are_refused_without_bad_advice(folder):
    """torch's own message says how to run the code."""
    pytest.importorskip('transformers')
    make_folder('hf')
    with open('hf/config.json', 'w') as file:
        json.dump({'model_type': 'gpt2', 'vocab_size': 330, 'n_embd': 8, 'n_layer': 1, 'n_head': 1},
                  file)

    class Bad:
        def __reduce__(self):
            return (exec, ("open('ran', 'w')",))

    torch.save({'transformer.wte.weight': Bad()}, 'hf/pytorch_model.bin')
    result = script('sample.py', '--init_from=hf', '--device=cpu', '--start=the')
    assert result.returncode == 1 and result.stderr.count('\n') == 1, result.stderr
    assert 'weights_only' not in result.stderr and not os.path.exists('ran')


def test_logits_that_are_not_numbers_are_one_line(tiny):
    train.train(TrainConfig(**TINY | dict(max_iters=1)))
    checkpoint = torch.load('out/best.pt', weights_only=True)
    checkpoint['model']['transformer.ln_f.weight'].fill_(float('nan'))
    torch.save(checkpoint, 'out/best.pt')
    result = script('sample.py', '--device=cpu')
    assert result.returncode == 1 and result.stderr.count('\n') == 1, result.stderr
    assert 'not finite' in result.stderr


def test_a_closed_input_is_one_line(tiny, monkeypatch, capsys):
    train.train(TrainConfig(**TINY | dict(max_iters=1)))
    capsys.readouterr()
    monkeypatch.setattr(sys, 'stdin', None)
    with pytest.raises(SystemExit) as end:
        console.run(lambda argv: sample.main(['--start=-', '--device=cpu']))
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith('error: the prompt is empty: give at least one')


def test_compiling_without_a_compiler_still_samples(tiny, monkeypatch, capfd):
    train.train(TrainConfig(**TINY | dict(max_iters=1)))

    def fails(self, **options):
        def forward(*_, **__):
            raise torch._inductor.exc.InvalidCxxCompiler()

        self._call_impl = forward

    monkeypatch.setattr(torch.nn.Module, 'compile', fails)
    result = script('sample.py', '--compile', '--device=cpu')
    assert result.returncode == 1 and result.stderr.count('\n') == 1, result.stderr
    assert '--compile=false' in result.stderr


# --- other environments


def test_scripts_run_where_the_output_is_a_notebooks(tiny, monkeypatch):
    class Output(io.StringIO):
        """Like IPython's: it is not a file, and cannot be reconfigured."""

        encoding = 'UTF-8'
        reconfigure = property(lambda self: (_ for _ in ()).throw(AttributeError))

    out = Output()
    monkeypatch.setattr(sys, 'stdout', out)
    monkeypatch.setattr(sys, 'stderr', Output())
    monkeypatch.setattr(sys, 'argv', ['train.py', *flags(**TINY | dict(max_iters=1))])
    with pytest.raises(SystemExit) as ended:
        console.run(train.main)
    assert ended.value.code == 0 and 'step 1:' in out.getvalue()


@pytest.mark.parametrize('name', ['sample.py', 'prepare_text.py'])
def test_help_works_without_docstrings(name):
    result = subprocess.run([sys.executable, '-OO', os.path.join(ROOT, name), '--help'],
                            stdout=subprocess.PIPE, text=True)
    assert result.returncode == 0 and ('--dataset=' in result.stdout or '--start=' in result.stdout)


def test_exported_files_can_be_read_as_the_umask_says(tiny):
    pytest.importorskip('transformers')
    import export_hf

    train.train(TrainConfig(**TINY | dict(max_iters=1)))
    before = os.umask(0o022)
    try:
        export_hf.main(['--to=a/hf'])
    finally:
        os.umask(before)
    for path in ('a/hf', *(f'a/hf/{name}' for name in os.listdir('a/hf'))):
        mode = os.stat(path).st_mode & 0o777
        assert mode == (0o755 if path == 'a/hf' else 0o644), path


def test_a_killed_export_leaves_nothing_for_good(tiny):
    pytest.importorskip('transformers')
    import export_hf

    train.train(TrainConfig(**TINY | dict(max_iters=1)))
    process = subprocess.Popen(
        [sys.executable, '-c', f'import sys, os; sys.path.insert(0, {ROOT!r}); import export_hf\n'
         'export_hf.hugging_face_tokenizer = lambda *_: os._exit(9)\n'
         "export_hf.main(['--to=killed'])"])
    assert process.wait() == 9
    left = {name for name in os.listdir() if 'killed' in name or 'tmp' in name}
    assert left and 'killed' not in left
    export_hf.main(['--to=killed'])
    assert {name for name in os.listdir() if 'killed' in name or 'tmp' in name} == {'killed'}
