"""Wrong input of any kind ends with one line: the value and the remedy. No files are left behind.

Each row: a script, its arguments, words that the message must contain, and a function that prepares
the mistake. Rows marked `real` run in their own process; the others run in this one.
"""

import contextlib
import importlib
import io
import json
import os
import sys

import numpy as np
import pytest
import torch
from conftest import STORY, TINY, flags, script

import console
import prepare_text
import train

REAL = 'real'


def write(path, data):
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    with open(path, 'wb') as file:
        file.write(data if isinstance(data, bytes) else data.encode())


def put(path, data):
    return lambda: write(path, data)


def remove(path):
    return lambda: os.remove(path)


def poke_ids(path, position, value):
    def spoil():
        ids = np.fromfile(path, '<u2')
        ids[position] = value
        ids.tofile(path)
    return spoil


def edit_meta(**changes):
    def spoil():
        with open('data/tiny/meta.json') as file:
            meta = json.load(file)
        with open('data/tiny/meta.json', 'w') as file:
            json.dump(meta | changes, file)
    return spoil


def trained(**settings):
    """A small run in the folder out."""
    return lambda: train.train(train.TrainConfig(**TINY | dict(max_iters=1) | settings))


def both(*spoils):
    return lambda: [spoil() for spoil in spoils]


def truncated():
    trained()()
    data = open('out/best.pt', 'rb').read()
    write('out/best.pt', data[: len(data) // 2])


def raw_gpt2_ids():
    for name in ('train', 'val'):
        write(f'data/theirs/{name}.bin', np.full(500, 50256, '<u2').tobytes())


def another_checkpoint(**changes):
    def spoil():
        trained()()
        checkpoint = torch.load('out/best.pt', weights_only=True)
        torch.save(checkpoint | changes, 'out/best.pt')
    return spoil


def preparing(command):
    """The script that makes the dataset wizard_char; undone by the fixture."""
    return lambda: prepare_text.PREPARE.update(wizard_char=command)


def many_characters():
    write('many.txt', ''.join(map(chr, range(0x20000, 0x30001))))


def hide(*packages):
    def spoil():
        for name in packages:
            sys.modules[name] = None  # so that importing it fails; undone by the fixture
    return spoil


def environment(**variables):
    return lambda: os.environ.update(variables)


def tiny(**settings):
    return ['train.py', *flags(**TINY | settings)]


RESUME = dict(init_from='resume')
SAMPLE = ['sample.py', '--max_new_tokens=2', '--num_samples=1', '--device=cpu']
nothing = lambda: None  # noqa: E731

TABLE = {
    # settings
    'misspelt flag': (['train.py', '--learning_rat=1'], ['learning_rat', 'learning_rate'],
                      nothing, REAL),
    'misspelt in a file': (['train.py', 'c.py'], ['bach_size', 'batch_size', 'c.py'],
                           put('c.py', 'bach_size = 1')),
    'missing file': (['train.py', 'config/none.py'], ['config/none.py', '--key=value'],
                     nothing),
    'file with an error': (['train.py', 'c.py'], ['c.py', 'NameError'],
                           put('c.py', 'x = y')),
    'file that is not text': (['train.py', 'c.py'], ['c.py', 'utf-8'], put('c.py', b'\xff\xfe')),
    'file that exits': (['train.py', 'c.py'], ['c.py', 'SystemExit'],
                        put('c.py', 'raise SystemExit')),
    'folder as a file': (['train.py', 'data'], ['data', '--key=value'], nothing),
    'wrong type': (['train.py', '--max_iters=many'], ['many', 'whole number'], nothing),
    'float for an int': (['train.py', '--batch_size=1.5'], ['1.5', 'whole number'], nothing),
    'no value': (['train.py', '--batch_size'], ['--batch_size=VALUE'], nothing),
    'not a truth': (['train.py', '--compile=maybe'], ['maybe', 'true or false'], nothing),
    'zero batch': (tiny(batch_size=0), ['batch_size is 0', 'at least 1'], nothing),
    'negative layers': (tiny(n_layer=-1), ['n_layer is -1'], nothing),
    'zero heads': (tiny(n_head=0), ['n_head is 0'], nothing),
    'zero width': (tiny(n_embd=0), ['n_embd is 0'], nothing),
    'zero context': (tiny(block_size=0), ['block_size is 0'], nothing),
    'zero accumulation': (tiny(gradient_accumulation_steps=0), ['steps is 0'], nothing),
    'negative iterations': (tiny(max_iters=-5), ['max_iters is -5'], nothing),
    'no iterations': (tiny(max_iters=0), ['max_iters is 0', 'at least 1'], nothing),
    'evaluating nothing': (tiny(eval_only=True), ['eval_only', '--init_from'], nothing),
    'zero eval_interval': (tiny(eval_interval=0), ['eval_interval is 0'], nothing),
    'zero log_interval': (tiny(log_interval=0), ['log_interval is 0'], nothing),
    'negative eval_iters': (tiny(eval_iters=-1), ['eval_iters is -1'], nothing),
    'negative rate': (tiny(learning_rate=-0.1), ['learning_rate is -0.1'], nothing),
    'rate that is no number': (tiny(learning_rate='nan'), ['learning_rate is nan'], nothing),
    'negative decay': (tiny(weight_decay=-1), ['weight_decay is -1'], nothing),
    'beta of one': (tiny(beta2=1.0), ['beta2 is 1.0', 'below 1'], nothing),
    'dropout of one': (tiny(dropout=1.0), ['dropout is 1.0', 'below 1'], nothing),
    'negative clip': (tiny(grad_clip=-1), ['grad_clip is -1'], nothing),
    'heads do not divide': (tiny(n_embd=30, n_head=4), ['n_embd=30', 'n_head=4', 'multiple'],
                            nothing),
    'zero heads of keys': (tiny(model='llama', n_kv_head=0), ['n_kv_head is 0'], nothing),
    'unknown model': (tiny(model='rnn'), ["'rnn'", 'bigram'], nothing),
    'unknown size': (tiny(model_size='gpt9'), ["'gpt9'", 'gpt2-xl'], nothing),
    'unknown activation': (tiny(gelu='relu'), ["'relu'", 'tanh'], nothing),
    'no cuda': (tiny(device='cuda:7'), ['cuda:7', '--device=cpu'], nothing, REAL),
    'device without numbers': (tiny(device='meta'), ['meta', '--device=cpu'], nothing),
    'unknown backend': (tiny(backend='tcp'), ["'tcp'", 'gloo'], nothing),
    'no such device': (tiny(device='gpu'), ['gpu', 'cuda'], nothing),
    'unknown dtype': (tiny(dtype='int4'), ['int4', 'bfloat16'], nothing),
    'float16 on cpu': (tiny(dtype='float16'), ['float16', 'bfloat16'], nothing),
    'accumulation cannot be shared': (
        tiny(gradient_accumulation_steps=5),
        ['gradient_accumulation_steps=5', '3 processes: try 6'],
        environment(WORLD_SIZE='3', RANK='0', LOCAL_RANK='0', MASTER_ADDR='x', MASTER_PORT='1')),
    'more processes than micro-batches': (
        tiny(gradient_accumulation_steps=1), ['steps=1', '4 processes: try 4'],
        environment(WORLD_SIZE='4', RANK='1', LOCAL_RANK='1', MASTER_ADDR='x', MASTER_PORT='1')),
    'out_dir is a file': (tiny(out_dir='f'), ['into f ', 'choose another'], put('f', 'x'), REAL),
    'out_dir below a file': (
        tiny(out_dir='f/out'), ['into f/out ', 'choose another'], put('f', 'x')),
    # datasets
    'no dataset': (tiny(dataset='none'), ['data/none', 'prepare_text.py'], nothing),
    'prepare fails': (
        tiny(dataset='wizard_char'), ['prepare_wizard_char.py', 'see its message above'],
        preparing('prepare_wizard_char.py --input=none.txt')),
    'no val.bin': (tiny(), ['data/tiny/val.bin', 'prepare'], remove('data/tiny/val.bin')),
    'odd bytes': (tiny(), ['data/tiny/val.bin', '3 bytes', 'prepare'],
                  put('data/tiny/val.bin', b'abc')),
    'empty split': (tiny(), ['data/tiny/val.bin', '0 bytes'], put('data/tiny/val.bin', b'')),
    'split shorter than the context': (tiny(block_size=3000),
                                       ['val.bin', '2000', 'block_size=3000'], nothing),
    'text shorter than the context': (tiny(block_size=20000),
                                      ['val.bin', '2000', '20000'], nothing),
    'id beyond the vocabulary': (tiny(), ['train.bin', '999', 'position 1234', '63'],
                                 poke_ids('data/tiny/train.bin', 1234, 999)),
    'id beyond it in the test split': (tiny(), ['test.bin', '64', 'position 7'],
                                       poke_ids('data/tiny/test.bin', 7, 64)),
    'broken meta.json': (tiny(), ['data/tiny/meta.json', 'prepare'],
                         put('data/tiny/meta.json', '{"tokenizer": {"ty')),
    'empty meta.json': (tiny(), ['data/tiny/meta.json'], put('data/tiny/meta.json', '')),
    'meta.json that is a list': (tiny(), ['meta.json'], put('data/tiny/meta.json', '[]')),
    'meta.json without a tokenizer': (tiny(), ['meta.json'], put('data/tiny/meta.json', '{}')),
    'meta.json without its size': (
        tiny(), ['meta.json', 'vocab_size'], edit_meta(tokenizer={'type': 'gpt2'})),
    'meta.json with an unknown one': (
        tiny(), ["'bpe'"], edit_meta(tokenizer={'type': 'bpe', 'vocab_size': 9})),
    'meta.json with broken characters': (
        tiny(), ['char'], edit_meta(tokenizer={'type': 'char', 'chars': 'ba', 'vocab_size': 2})),
    'meta.pkl': (tiny(), ['meta.pkl', 'prepare_text.py'], both(
        remove('data/tiny/meta.json'), put('data/tiny/meta.pkl', b'x'))),
    # checkpoints
    'resume from nothing': (tiny(**RESUME), ['out/ckpt.pt', 'train'], nothing),
    'resume from an empty folder': (tiny(**RESUME), ['out/ckpt.pt'], lambda: os.mkdir('out')),
    'empty checkpoint': (tiny(**RESUME), ['out/ckpt.pt', 'damaged'], put('out/ckpt.pt', b'')),
    'foreign checkpoint': (tiny(**RESUME), ['out/ckpt.pt', 'train.py'],
                           put('out/ckpt.pt', 'PNG' * 50)),
    'folder as a checkpoint': (tiny(**RESUME), ['out/ckpt.pt'],
                               lambda: os.makedirs('out/ckpt.pt')),
    'fine-tuning from nowhere': (tiny(init_from='nowhere'), ['nowhere'], nothing),
    'fine-tuning with a longer context': (tiny(init_from='out', out_dir='o2', block_size=32),
                                          ['block_size=32', '16'], trained()),
    'gpt2 ids for a char model': (
        tiny(init_from='out', out_dir='o2', dataset='theirs'), ['char', 'gpt2', 'prepare'],
        both(trained(), raw_gpt2_ids)),
    'char ids for a gpt2 model': (
        tiny(init_from='out', out_dir='o2'), ['gpt2', 'char', 'prepare'],
        both(raw_gpt2_ids, trained(dataset='theirs', sample_tokens=0))),
    'no transformers': (tiny(init_from='gpt2', dataset='theirs'), ['transformers', 'pip install'],
                        both(raw_gpt2_ids, hide('transformers'))),
    'no wandb': (tiny(wandb_log=True), ['wandb', 'pip install'], hide('wandb')),
    # sample.py
    'nothing to sample': (SAMPLE, ['out', 'train'], nothing),
    'truncated checkpoint': (SAMPLE, ['out/best.pt', 'damaged'], truncated, REAL),
    'checkpoint of something else': (
        SAMPLE, ['out/best.pt', 'no checkpoint of a GPT'],
        lambda: (os.mkdir('out'), torch.save([1, 2], 'out/best.pt'))),
    'weights that do not fit': (SAMPLE, ['do not fit'], another_checkpoint(model_args=dict(
        n_layer=1, n_head=2, n_embd=32, block_size=16, bias=False, vocab_size=64, dropout=0.0))),
    'shape that cannot be': (SAMPLE, ['n_head'], another_checkpoint(model_args=dict(
        n_layer=1, n_head=0, n_embd=32, block_size=16, bias=False, vocab_size=64, dropout=0.0))),
    'settings of another model': (SAMPLE, ['out/best.pt fits no model', "'width'"],
                                  another_checkpoint(model_args={'width': 3})),
    'no tokenizer anywhere': (SAMPLE, ['tokenizer', 'prepare'], another_checkpoint(
        tokenizer=None, config={'dataset': 'gone'})),
    'unknown character': (
        [*SAMPLE, '--start=Doë'], ["'ë' at position 2 of 'Doë'"], trained(), REAL),
    'empty prompt': ([*SAMPLE, '--start='], ['prompt is empty', '--start'], trained()),
    'no prompt file': ([*SAMPLE, '--start=FILE:none.txt'], ['none.txt'], trained()),
    'negative temperature': ([*SAMPLE, '--temperature=-1'],
                             ['temperature is -1.0', 'at least 0'], trained()),
    'top_p of zero': ([*SAMPLE, '--top_p=0'], ['top_p=0.0', 'at most 1'], trained()),
    'top_p above one': ([*SAMPLE, '--top_p=1.1'], ['top_p=1.1', 'at most 1'], trained()),
    'top_k of zero': ([*SAMPLE, '--top_k=0'], ['top_k=0', 'at least 1'], trained()),
    'no samples': ([*SAMPLE, '--num_samples=0'], ['num_samples is 0'], nothing),
    'no tokens': ([*SAMPLE, '--max_new_tokens=-3'], ['max_new_tokens is -3'], nothing),
    'unknown quantization': ([*SAMPLE, '--quantize=int2'], ['int2', 'int8'], trained()),
    'no gpt2': ([*SAMPLE, '--init_from=gpt2'], ['transformers', 'pip install'],
                hide('transformers')),
    # prepare_*
    'no text': (['prepare_text.py', '--dataset=x'], ['a text and'], nothing, REAL),
    'no name': (['prepare_text.py', 't.txt'], ['--dataset'], put('t.txt', 'text'), REAL),
    'no such text': (['prepare_text.py', 'none.txt', '--dataset=x'], ['none.txt'], nothing, REAL),
    'empty text': (['prepare_text.py', 't.txt', '--dataset=x'],
                   ['0 train, 0 val tokens', 'take a longer file'], put('t.txt', ''), REAL),
    'text too short to split': (['prepare_text.py', 't.txt', '--dataset=x'],
                                ['1 val tokens', 'train'], put('t.txt', 'a'), REAL),
    'split of one character': (['prepare_text.py', 't.txt', '--dataset=x'],
                               ['5 train, 1 val'], put('t.txt', 'abcdef')),
    'text that is not UTF-8': (
        ['prepare_text.py', 't.txt', '--dataset=x'],
        ['t.txt', '1 of its bytes', 'position 3', 'iconv'], put('t.txt', b'caf\xe9'), REAL),
    'folder': (['prepare_text.py', 'd', '--dataset=x'], ["no text files 'd'", '.txt'],
               lambda: os.mkdir('d'), REAL),
    'too many characters': (['prepare_text.py', 'many.txt', '--dataset=x'], ['65,537', 'gpt2'],
                            many_characters),
    'unknown tokenizer': (['prepare_text.py', STORY, '--dataset=x', '--tokenizer=bert'],
                          ["'bert'", 'gpt2'], nothing),
    'no room for training': (['prepare_text.py', STORY, '--dataset=x', '--val_fraction=1'],
                             ['val_fraction is 1.0', 'below 1'], nothing),
    'negative split': (['prepare_text.py', STORY, '--dataset=x', '--test_fraction=-0.1'],
                       ['test_fraction is -0.1'], nothing),
    'name with a path': (['prepare_text.py', STORY, '--dataset=../x'],
                         ['../x', '--dataset'], nothing),
    'misspelt prepare flag': (['prepare_wizard_char.py', '--inputs=x'],
                              ['inputs', "'input'"], nothing, REAL),
    'no wizard there': (['prepare_wizard_char.py', '--input=none.txt'], ['none.txt'],
                        nothing, REAL),
    'no shakespeare there': (['prepare_shakespeare_char.py', '--input=none.txt'],
                             ['none.txt'], nothing, REAL),
}


@pytest.fixture
def place(tiny, monkeypatch):
    """The folder with the dataset `tiny`; undoes afterwards all that a row changes."""
    modules, variables = dict(sys.modules), dict(os.environ)
    monkeypatch.setattr(prepare_text, 'PREPARE', dict(prepare_text.PREPARE))
    yield tiny
    sys.modules.update(modules)
    for name in set(sys.modules) - set(modules):
        if sys.modules[name] is None:
            del sys.modules[name]
    os.environ.clear()
    os.environ.update(variables)


def run_here(name, *args):
    """Call a script's entry point in this process; returns (exit code, standard error)."""
    error = io.TextIOWrapper(io.BytesIO(), encoding='utf-8')
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(error):
        patch.setattr(sys, 'argv', [name, *args])
        patch.setattr(sys, 'stdout', io.TextIOWrapper(io.BytesIO(), encoding='utf-8'))
        with pytest.raises(SystemExit) as ended:
            console.run(importlib.import_module(name.removesuffix('.py')).main)
    error.seek(0)
    return ended.value.code, error.read()


def everything_in(folder):
    return sorted(
        (os.path.join(base, name), name in names and os.path.getmtime(os.path.join(base, name)))
        for base, folders, names in os.walk(folder) for name in folders + names
    )


@pytest.mark.parametrize('row', TABLE)
def test_bad_input(place, row, capfd):
    command, words, spoil, *real = TABLE[row]
    spoil()
    before = everything_in('.')
    if real:
        result = script(*command)
        code, error = result.returncode, result.stderr
    else:
        code, error = run_here(*command)
    assert code in (1, 2), error
    assert error.startswith('error: ') and error.count('\n') == 1 and len(error) < 400, error
    assert 'Traceback' not in error
    for word in words:
        assert word in error, error
    assert everything_in('.') == before


def test_the_table_is_long_enough():
    assert len(TABLE) >= 60 and sum(REAL in row for row in TABLE.values()) >= 15


def test_a_missing_meta_json_means_gpt2_ids(place):
    """nanoGPT writes none for GPT-2 ids. Models of other tokens cannot be trained on them."""
    raw_gpt2_ids()
    trained(dataset='theirs', sample_tokens=0)()
    prepare_text.prepare('abc' * 1000, 'abc')
    code, error = run_here(*tiny(dataset='abc', init_from='out', out_dir='o2'))
    assert code == 1 and 'gpt2' in error
