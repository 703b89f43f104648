"""Edge cases: unusual input, files and events, and how a run handles them."""

import contextlib
import csv
import io
import json
import os
import re
import shlex
import signal
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, STORY, TINY, flags, piped, train_together
from torch.nn import functional as F

import bench
import checkpoint as checkpoints
import console
import model as gpt
import prepare_text
import runtime
import sample
import tokenizer as tokenizers_of_ours
import train
from checkpoint import load_checkpoint
from console import UserError
from model import GPT, GPTConfig
from quantize import Int8, quantize_int8
from train import TrainConfig

RUN = TINY | dict(sample_tokens=0)
SMALL = dict(n_layer=1, n_head=1, n_embd=8, block_size=8)


@pytest.fixture
def error_of(capsys, monkeypatch):
    """A function: run a script's `main` as its process does, and return its one line of error."""

    def run(main, *args):
        capsys.readouterr()
        monkeypatch.setattr(sys, 'argv', ['script.py', *args])
        with pytest.raises(SystemExit) as stopped:
            console.run(main)
        error = capsys.readouterr().err
        assert stopped.value.code in (1, 2) and error.startswith('error: '), error
        assert error.count('\n') == 1 and 'Traceback' not in error
        return error

    return run


def run(**settings):
    return train.train(TrainConfig(**RUN | settings), catch_signals=True)


def contents(folder):
    """{path: bytes} of all files in a folder."""
    found = {}
    for path, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(path, name), 'rb') as file:
                found[os.path.relpath(os.path.join(path, name), folder)] = file.read()
    return found


def log_rows(folder='out'):
    with open(f'{folder}/log.csv', newline='') as file:
        return list(csv.DictReader(file))


def same_weights(a, b):
    return all(torch.equal(a['model'][key], b['model'][key]) for key in a['model'])


# --- resuming


@pytest.mark.parametrize('more', ['', '☃☂'], ids=['as many characters', 'more characters'])
def test_a_run_is_not_resumed_with_another_alphabet(tiny, error_of, more):
    run()
    before = contents('out')
    with open(STORY, encoding='utf-8') as file:
        text = file.read(20_000)
    with open('data/tiny/meta.json', encoding='utf-8') as file:
        count = json.load(file)['vocab_size']
    meta = prepare_text.prepare(text.replace('w', 'ß') + more, 'tiny', test_fraction=0.1)
    assert meta['vocab_size'] == count + len(more)
    error = error_of(train.main, *flags(**RUN | dict(init_from='resume', max_iters=9)))
    assert '--init_from=out/ckpt.pt' in error and contents('out') == before
    run(init_from='out/ckpt.pt', out_dir='tuned')
    assert load_checkpoint('tuned/ckpt.pt')['iter_num'] == 6


def wrong_moments(checkpoint):
    checkpoint['optimizer']['state'][0]['exp_avg'] = torch.zeros(3, 5)


def moments_of_one_number(checkpoint):
    checkpoint['optimizer']['state'][0]['exp_avg'] = torch.tensor(0.0)


def no_count_of_steps(checkpoint):
    del checkpoint['optimizer']['state'][0]['step']


def wrong_square_of_the_same_size(checkpoint):
    state = checkpoint['optimizer']['state'][0]
    state['exp_avg_sq'] = state['exp_avg_sq'].T.contiguous()


def fewer_parameters(checkpoint):
    checkpoint['optimizer']['param_groups'].pop()


def groups_of_another_type(checkpoint):
    checkpoint['optimizer']['param_groups'] = 'none'


def no_groups(checkpoint):
    del checkpoint['optimizer']['param_groups']


def state_of_another_type(checkpoint):
    checkpoint['optimizer']['state'] = [1, 2]


def optimizer_of_another_type(checkpoint):
    checkpoint['optimizer'] = checkpoint['optimizers'] = 3


def config_of_another_type(checkpoint):
    checkpoint['config'] = 3


def iteration_of_another_type(checkpoint):
    checkpoint['iter_num'] = 'six'


def best_loss_of_another_type(checkpoint):
    checkpoint['best_val_loss'] = None


def negative_iteration(checkpoint):
    checkpoint['iter_num'] = -1


def log_of_another_type(checkpoint):
    checkpoint['log'] = 3


@pytest.mark.parametrize('spoil', [
    wrong_moments, moments_of_one_number, no_count_of_steps, wrong_square_of_the_same_size,
    fewer_parameters, groups_of_another_type, no_groups, state_of_another_type,
    optimizer_of_another_type, config_of_another_type, iteration_of_another_type,
    best_loss_of_another_type, log_of_another_type, negative_iteration,
], ids=lambda function: function.__name__)
def test_a_malformed_checkpoint_is_not_resumed(tiny, error_of, spoil):
    """With no update left to make; an update might write to wrong memory."""
    run(max_iters=2)
    checkpoint = torch.load('out/ckpt.pt', weights_only=True)
    spoil(checkpoint)
    torch.save(checkpoint, 'out/ckpt.pt')
    before = contents('out')
    error_of(train.main, *flags(**RUN | dict(init_from='resume', max_iters=2)))
    assert contents('out') == before


def test_moments_are_the_same_in_any_layout(tiny):
    """The fused optimizer expects weights and moments in the same memory layout."""
    run(max_iters=3, lr_decay_iters=6)
    checkpoint = torch.load('out/ckpt.pt', weights_only=True)
    run(init_from='resume', max_iters=6)
    expected = load_checkpoint('out/ckpt.pt')
    for state in checkpoint['optimizer']['state'].values():
        for name in ('exp_avg', 'exp_avg_sq'):
            if state[name].dim() == 2:
                state[name] = state[name].T.contiguous().T
    torch.save(checkpoint, 'out/ckpt.pt')
    run(init_from='resume', max_iters=6)
    assert same_weights(load_checkpoint('out/ckpt.pt'), expected)


def test_a_finetuning_run_is_resumed_with_the_shape_of_its_checkpoint(tiny, capsys):
    """The command names no shape, and the defaults are different."""
    run(out_dir='first', n_layer=1, n_embd=16, bias=True)
    run(init_from='first', out_dir='tuned', max_iters=4)
    capsys.readouterr()
    run(init_from='resume', out_dir='tuned', max_iters=6)
    (note,) = re.findall('from the checkpoint: .*', capsys.readouterr().out)
    for setting in ('n_layer=1', 'n_embd=16', 'bias=True'):
        assert setting in note
    assert 'block_size' not in note and 'n_head' not in note  # these agree
    checkpoint = load_checkpoint('tuned/ckpt.pt')
    assert checkpoint['iter_num'] == 6 and checkpoint['model_args']['n_embd'] == 16


def test_a_kill_between_the_two_saves_loses_no_best(tiny, monkeypatch):
    run(out_dir='whole', max_iters=6)
    with monkeypatch.context() as patch:
        save = torch.save

        def killed(checkpoint, file):
            if 'optimizer' not in checkpoint and checkpoint['iter_num'] == 6:  # it is best.pt
                raise KeyboardInterrupt
            save(checkpoint, file)

        patch.setattr(torch, 'save', killed)
        with pytest.raises(KeyboardInterrupt):
            run(max_iters=6)
    assert load_checkpoint('out/best.pt')['iter_num'] < 6
    run(max_iters=6, init_from='resume')
    best, expected = load_checkpoint('out/best.pt'), load_checkpoint('whole/best.pt')
    assert best['iter_num'] == expected['iter_num'] == 6 and same_weights(best, expected)


def test_a_longer_run_keeps_the_last_evaluation_of_the_shorter_one(tiny):
    run(max_iters=6, eval_interval=4)
    losses = {row['iteration']: row['val_loss'] for row in log_rows()}
    run(max_iters=9, eval_interval=4, init_from='resume')
    rows = log_rows()
    assert [int(row['iteration']) for row in rows] == list(range(10))
    assert [row['iteration'] for row in rows if row['val_loss']] == ['0', '4', '6', '8', '9']
    assert float(rows[6]['val_loss']) == pytest.approx(float(losses['6']), rel=1e-6)


# --- the files in out_dir


def test_the_same_command_again_keeps_the_previous_run(tiny, capsys):
    run()
    previous = contents('out')
    assert {'ckpt.pt', 'best.pt', 'log.csv'} <= previous.keys()
    capsys.readouterr()
    run(seed=1)
    out = capsys.readouterr().out
    assert len(re.findall(r'^the previous run in out .*out/previous$', out, re.M)) == 1
    assert contents('out/previous') == previous
    assert [int(row['iteration']) for row in log_rows()] == list(range(7))
    second = {name: data for name, data in contents('out').items() if '/' not in name}
    assert second['ckpt.pt'] != previous['ckpt.pt']
    run(seed=2)
    assert contents('out/previous-1') == previous and contents('out/previous') == second
    third = contents('out')['ckpt.pt']
    run(seed=3)
    assert contents('out/previous-1') == previous and contents('out/previous-2') == second
    assert contents('out/previous')['ckpt.pt'] == third


def test_a_kill_or_an_error_while_a_previous_run_is_moved_loses_nothing(tiny, monkeypatch):
    run()
    previous, rename = contents('out'), os.rename

    def failing(source, target):
        if str(source).endswith('ckpt.pt'):
            raise PermissionError(13, 'Permission denied')
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, 'rename', failing)
        words = 'cannot move the previous run in out away .Permission.*out_d'
        with pytest.raises(UserError, match=words):
            run(seed=1)
    run(seed=2)
    run(seed=3)
    kept = contents('out/previous-1') | contents('out/previous-2')
    assert {name: kept[name] for name in previous} == previous


def test_a_log_without_its_checkpoints_is_moved_as_well(tiny):
    run()
    previous = contents('out')
    os.remove('out/ckpt.pt')
    os.remove('out/best.pt')
    run(seed=1)
    assert contents('out/previous')['log.csv'] == previous['log.csv']


def test_more_tokens_than_rows_are_refused(tiny):
    """Otherwise the run would fail at the first batch that contains one of them."""
    run(max_iters=1)
    checkpoint = torch.load('out/ckpt.pt', weights_only=True)
    state = checkpoint['tokenizer']
    state['chars'] += '\u2260'
    state['vocab_size'] += 1
    torch.save(checkpoint, 'out/ckpt.pt')
    with open('data/tiny/meta.json') as file:
        meta = json.load(file)
    with open('data/tiny/meta.json', 'w') as file:
        json.dump(meta | {'tokenizer': state}, file)
    with pytest.raises(UserError, match='64 rows of weights for the 65 tokens of tiny'):
        run(init_from='out/ckpt.pt', out_dir='new')


def test_only_one_run_at_a_time_and_no_harm_before_its_first_save(tiny, error_of):
    run(max_iters=3)
    before = contents('out')
    long = flags(**RUN | dict(max_iters=10**6, eval_interval=10**6))
    process, output, errors = piped('train.py', *long)
    try:
        assert any(line.startswith('iter 1:') for line in output), errors.read()
        for more in ({}, {'init_from': 'resume', 'max_iters': 9}):
            error = error_of(train.main, *flags(**RUN | more))
            assert 'another process' in error and 'out' in error
        run(out_dir='elsewhere', max_iters=1)
    finally:
        process.kill()
        process.join()
    assert contents('out') == before
    run(max_iters=1)  # the lock is gone with its process
    assert contents('out/previous') == before


def test_nothing_is_saved_at_iteration_0(tiny, monkeypatch):
    def interrupted(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        return learning_rate(*_)

    learning_rate = train.learning_rate
    saved_at = []
    monkeypatch.setattr(train, 'learning_rate', interrupted)
    monkeypatch.setattr(train, 'sample_text', lambda *_: saved_at.append(os.listdir('out')) or '')
    with pytest.raises(SystemExit):
        run(sample_tokens=1)
    assert saved_at == [[]]  # after the evaluation
    assert load_checkpoint('out/ckpt.pt')['iter_num'] == 1


@pytest.mark.parametrize('always, kept', [(True, 9), (False, 6)])
def test_always_save_checkpoint(tiny, always, kept):
    """If false, ckpt.pt stays at the best evaluation; the run ends later, with a worse one."""
    run(max_iters=6, eval_interval=6)
    run(max_iters=9, eval_interval=9, init_from='resume', learning_rate=3.0, decay_lr=False,
        always_save_checkpoint=always)
    losses = [float(row['val_loss']) for row in log_rows() if row['val_loss']]
    assert losses[-1] > losses[-2]  # it did get worse
    assert load_checkpoint('out/ckpt.pt')['iter_num'] == kept
    assert load_checkpoint('out/best.pt')['iter_num'] == 6


def test_all_ranks_wait_for_the_save_at_a_stop(tiny, monkeypatch):
    save, learning_rate, training_run = torch.save, train.learning_rate, train.training_run

    def slow_save(state, file):
        time.sleep(1.5)
        save(state, file)

    def rate(cfg, it):
        if it == 2 and os.environ['RANK'] == '0':
            os.kill(os.getpid(), signal.SIGTERM)
        return learning_rate(cfg, it)

    def run(*args):
        best = training_run(*args)
        (tiny / os.environ['RANK']).write_text(str(load_checkpoint('out/ckpt.pt')['iter_num']))
        return best

    for module, name, function in ((checkpoints.torch, 'save', slow_save),
                                   (train, 'learning_rate', rate), (train, 'training_run', run)):
        monkeypatch.setattr(module, name, function)
    train_together(TrainConfig(**RUN | dict(eval_interval=100, max_iters=100)),
                   exit_codes=[128 + signal.SIGTERM] * 2)
    assert [(tiny / rank).read_text() for rank in '01'] == ['3', '3']


# --- datasets


def test_a_mistyped_dataset_touches_no_other(tiny, error_of):
    with open(STORY, encoding='utf-8') as file:
        prepare_text.prepare(file.read(5_000), 'wizard_char', source='mine')
    before = contents('data')
    config = os.path.join(ROOT, 'config', 'train_wizard_char.py')
    error = error_of(train.main, config, '--dataset=my_txt', *flags(device='cpu'))
    assert contents('data') == before
    for name in ('data/my_txt', 'tiny', 'wizard_char', 'prepare_text.py'):
        assert name in error


def test_openwebtext_is_not_downloaded_unasked(folder, error_of):
    assert 'prepare_openwebtext.py' in error_of(train.main, '--device=cpu')
    assert not os.path.exists('data') and not os.path.exists('out')


@pytest.mark.parametrize('name', ['wizard_char', 'shakespeare_char', 'shakespeare'])
def test_a_dataset_that_we_can_make_is_made(folder, monkeypatch, request, name):
    if name == 'shakespeare':
        request.getfixturevalue('gpt2')
    os.makedirs(f'data/{name}')
    with open(STORY, encoding='utf-8') as story, open(f'data/{name}/input.txt', 'w') as file:
        file.write(story.read(5_000))  # as if downloaded before
    run(dataset=name, max_iters=1, eval_iters=1, n_layer=1, n_embd=8)
    with open(f'data/{name}/meta.json', encoding='utf-8') as file:
        kind = json.load(file)['tokenizer']['type']
    assert kind == ('gpt2' if name == 'shakespeare' else 'char')


# --- eight bits


@pytest.mark.parametrize('width', [1, 7, 16, 24, 40, 48, 64])
@torch.no_grad()
def test_int8_equals_the_product_of_its_own_rows(width):
    """A separate kernel for few tokens reads the rows in blocks."""
    torch.manual_seed(0)
    layer = Int8(torch.randn(48, width).bfloat16())
    for tokens in (1, 2, 3, 4, 16, 17, 33):
        for _ in range(5):
            x = torch.randn(1, tokens, width).bfloat16()
            expected = x.float() @ (layer.rows.float() * layer.scale.float()[:, None]).T
            assert (layer(x).float() - expected).norm() < 0.02 * expected.norm()


@torch.no_grad()
def test_an_int8_model_of_odd_width_keeps_its_logits():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=65, block_size=16, n_layer=2, n_head=2, n_embd=24)).bfloat16()
    idx = torch.randint(65, (2, 1))
    plain, _ = model(idx)
    quantized, _ = quantize_int8(model)(idx)
    assert (plain - quantized).norm() < 0.05 * plain.norm()


@torch.no_grad()
def test_int8_does_not_overflow_in_float16():
    y = Int8(torch.ones(64, 64).half())(torch.full((1, 9, 64), 100.0, dtype=torch.float16))
    torch.testing.assert_close(y.float(), torch.full((1, 9, 64), 6400.0), rtol=0.01, atol=0)


# --- Hugging Face folders


def save_gpt2(folder, **settings):
    transformers = pytest.importorskip('transformers')
    settings = dict(vocab_size=300, n_positions=16, n_embd=8, n_layer=1, n_head=1,
                    bos_token_id=0, eos_token_id=0) | settings
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)).save_pretrained(folder)


def byte_pairs(vocab, merges):
    """A tokenizer with these byte pairs; vocab=None: the letters of the bytes, then the pairs."""
    library = pytest.importorskip('tokenizers')
    if vocab is None:
        letters = sorted(library.pre_tokenizers.ByteLevel.alphabet())
        vocab = {word: i for i, word in enumerate([*letters, *map(''.join, merges)])}
    fast = library.Tokenizer(library.models.BPE(vocab, merges))
    fast.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = library.decoders.ByteLevel()
    return fast


def test_code_that_comes_with_a_folder_is_never_run(tiny, error_of, monkeypatch):
    pytest.importorskip('transformers')
    os.mkdir('hf')
    with open('hf/config.json', 'w') as file:
        json.dump({'model_type': 'strange', 'vocab_size': 50257, 'auto_map': {
            'AutoConfig': 'code.Config', 'AutoModelForCausalLM': 'code.Model'}}, file)
    with open('hf/code.py', 'w') as file:
        file.write(f'open({str(tiny / "ran")!r}, "w")\nfrom transformers import GPT2Config as '
                   'Config, GPT2LMHeadModel as Model\n')
    answers = io.StringIO('y\n' * 9)
    monkeypatch.setattr(sys, 'stdin', answers)
    os.mkdir('data/raw')
    for name in ('train', 'val'):  # raw GPT-2 ids, so that the tokens are not what is refused
        np.zeros(99, '<u2').tofile(f'data/raw/{name}.bin')
    for main, args in ((sample.main, ['--device=cpu']),
                       (train.main, flags(**RUN | dict(dataset='raw')))):
        assert "'strange'" in error_of(main, '--init_from=hf', *args)
    assert answers.tell() == 0 and not os.path.exists('ran')


def test_other_byte_pairs_are_not_taken_for_gpt2s(folder, error_of):
    """The model has the other vocabulary, the dataset GPT-2's."""
    save_gpt2('hf')
    fast = byte_pairs(None, [('h', 'i'), ('Ġ', 'hi')])
    fast.save('hf/tokenizer.json')
    ours = tokenizers_of_ours.tokenizer_of('hf')
    assert ours.encode('hi hi').tolist() == fast.encode('hi hi').ids == [256, 257]
    os.makedirs('data/raw')
    for name in ('train', 'val'):
        np.zeros(99, '<u2').tofile(f'data/raw/{name}.bin')
    error = error_of(train.main, *flags(**RUN | dict(dataset='raw', init_from='hf')))
    assert 'gpt2' in error and '--tokenizer=' in error


def test_as_many_byte_pairs_with_other_ids_are_not_gpt2s(folder, gpt2):
    pytest.importorskip('tokenizers')
    import export_hf

    library_form = json.loads(export_hf.hugging_face_tokenizer(gpt2).to_str())
    os.mkdir('same')
    with open('same/tokenizer.json', 'w', encoding='utf-8') as file:
        json.dump(library_form, file)
    assert tokenizers_of_ours.tokenizer_of('same').state() == gpt2.state()
    vocab = library_form['model']['vocab']
    vocab['Ġlion'], vocab['Ġthe'] = vocab['Ġthe'], vocab['Ġlion']
    os.mkdir('other')
    with open('other/tokenizer.json', 'w', encoding='utf-8') as file:
        json.dump(library_form, file)
    other = tokenizers_of_ours.tokenizer_of('other')
    assert other.encode(' lion the').tolist() == gpt2.encode(' the lion').tolist()


def test_another_epsilon_is_refused(folder):
    save_gpt2('hf', layer_norm_epsilon=1e-6)
    byte_pairs(None, [('h', 'i')]).save('hf/tokenizer.json')
    with pytest.raises(UserError, match='layer_norm_epsilon=1e-06'):
        sample.main(['--init_from=hf', '--device=cpu', '--start=hi'])


def test_an_exported_alphabet_refuses_unknown_characters(tiny):
    pytest.importorskip('transformers')
    import export_hf
    from transformers import AutoTokenizer

    run(max_iters=1)
    export_hf.main(['--out_dir=out', '--to=hf'])
    fast = AutoTokenizer.from_pretrained('hf')
    assert fast.decode(fast('the lion').input_ids) == 'the lion'
    with pytest.raises(Exception, match='(?i)unk'):
        fast('the ☃')


def test_openai_weights_stay_unpadded(folder, gpt2):
    save_gpt2('hf', vocab_size=50257)
    os.makedirs('data/raw')
    for name in ('train', 'val'):
        np.zeros(99, '<u2').tofile(f'data/raw/{name}.bin')
    run(dataset='raw', init_from='hf', max_iters=1, eval_iters=1)
    checkpoint = load_checkpoint('out/ckpt.pt')
    assert checkpoint['model_args']['vocab_size'] == 50257
    assert len(checkpoint['model']['lm_head.weight']) == 50257


# --- the model


@pytest.mark.parametrize('decay_lr, first', [(False, 1e-2), (True, 1e-2 / 101)])
def test_a_constant_rate_has_no_warmup(tiny, decay_lr, first):
    run(max_iters=2, decay_lr=decay_lr, warmup_iters=100)
    rates = [float(row['learning_rate']) for row in log_rows() if row['learning_rate']]
    assert rates[0] == pytest.approx(first)
    assert decay_lr or rates == [1e-2] * 2


def test_a_rate_of_zero_moves_nothing(tiny):
    run(max_iters=3)
    before = load_checkpoint('out/ckpt.pt')
    run(init_from='resume', max_iters=4, learning_rate=0.0, min_lr=0.0)
    after = load_checkpoint('out/ckpt.pt')
    assert after['iter_num'] == 4 and same_weights(before, after)


def test_the_loss_runs_over_all_rows():
    """As in nanoGPT: training makes the padding unlikely, and any row may be a target."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL))
    idx, targets = torch.randint(50304, (2, 2, 8))
    targets[0, 0], targets[1, 3] = 50303, -1
    logits, loss = model(idx, targets)
    expected = F.cross_entropy(logits.view(-1, 50304), targets.view(-1), ignore_index=-1)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert (model.lm_head.weight.grad[50257:].abs().sum(dim=1) > 0).all()


def test_training_on_gpt2_ids_pushes_the_padding_down(folder):
    os.makedirs('data/raw')
    for name in ('train', 'val'):
        np.tile(np.arange(40, dtype='<u2') * 7, 20).tofile(f'data/raw/{name}.bin')
    run(dataset='raw', max_iters=80, eval_interval=80, eval_iters=1, n_layer=1, n_embd=8,
        learning_rate=3e-2, gradient_accumulation_steps=1, batch_size=1)
    checkpoint = load_checkpoint('out/ckpt.pt')
    assert checkpoint['model_args']['vocab_size'] == 50304
    model = GPT(GPTConfig(**checkpoint['model_args'])).eval()
    model.load_state_dict(checkpoint['model'])
    with torch.no_grad():
        logits, _ = model(torch.arange(0, 56, 7)[None])
    fraction = F.softmax(logits, dim=-1)[..., 50257:].sum().item()
    untrained = 47 / 50304
    assert fraction < 0.3 * untrained


def test_sampling_never_gives_padding():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL | dict(vocab_size=64)))
    model.transformer.ln_f.bias.data.fill_(1)
    model.transformer.wte.weight.data[60:] = 9.0  # by far the likeliest
    idx = torch.zeros(4, 1, dtype=torch.int64)
    assert model.generate(idx, 20)[:, 1:].min() >= 60
    for options in ({}, {'top_k': 5}, {'top_p': 0.9}, {'temperature': 0.0}):
        assert model.generate(idx, 20, vocab_size=60, **options).max() < 60


def test_generated_ids_can_be_trained_on():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL | dict(vocab_size=20)))
    idx = model.generate(torch.zeros(2, 1, dtype=torch.int64), 8)
    assert not idx.is_inference()
    _, loss = model(idx[:, :-1], idx[:, 1:])
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize('most_logits', [gpt.MAX_LOGITS, 0], ids=['plain', 'chunked'])
def test_no_targets_at_all_have_no_gradient(monkeypatch, most_logits):
    monkeypatch.setattr(gpt, 'MAX_LOGITS', most_logits)
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL | dict(vocab_size=20)))
    idx = torch.randint(20, (2, 8))
    _, loss = model(idx, torch.full_like(idx, -1), loss_only=True)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


# --- the training loop


def test_an_infinite_loss_moves_nothing_under_a_scaler(tiny, monkeypatch):
    """The gradients are finite, so the scaler alone would not skip the update."""
    scaler, forward = torch.amp.GradScaler, GPT.forward
    monkeypatch.setattr(torch.amp, 'GradScaler', lambda device, enabled: scaler(device))
    schedule = dict(eval_interval=100, lr_decay_iters=6)
    run(max_iters=4, **schedule)
    before = load_checkpoint('out/ckpt.pt')
    with monkeypatch.context() as patch:
        def spoilt(self, idx, targets=None, *args, **kwargs):
            logits, loss = forward(self, idx, targets, *args, **kwargs)
            return logits, loss + torch.inf if self.training and targets is not None else loss

        patch.setattr(GPT, 'forward', spoilt)
        run(max_iters=5, init_from='resume', **schedule)
    after = load_checkpoint('out/ckpt.pt')
    assert after['iter_num'] == 5 and same_weights(before, after)
    for key, state in before['optimizer']['state'].items():
        assert all(torch.equal(v, after['optimizer']['state'][key][k]) for k, v in state.items())
    run(max_iters=6, init_from='resume', **schedule)
    resumed = load_checkpoint('out/ckpt.pt')
    assert resumed['iter_num'] == 6 and not same_weights(after, resumed)
    assert resumed['scaler']['scale'] == before['scaler']['scale'] == 65536


@contextlib.contextmanager
def memory(megabytes):
    """Context manager: this process can allocate only so many more megabytes."""
    resource = pytest.importorskip('resource')
    if not os.path.exists('/proc/self/statm'):
        pytest.skip('there is no /proc to ask how much memory is in use')
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open('/proc/self/statm') as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_too_large_a_batch_is_one_line(tiny, error_of):
    with memory(500):
        error = error_of(train.main, *flags(**RUN | dict(
            batch_size=15_000, block_size=256, eval_iters=1)))
    for word in ('memory', '--batch_size=15000', '--block_size=256', '--gradient_accumulation'):
        assert word in error
    assert not os.path.exists('out')


def test_too_many_samples_are_one_line(tiny, error_of):
    run(max_iters=1, block_size=256)
    with memory(300):
        error = error_of(sample.main, '--num_samples=15000', '--max_new_tokens=250',
                         '--device=cpu', '--dtype=float32')
    assert 'memory' in error and '--num_samples=15000' in error


def test_a_gpus_out_of_memory_message_becomes_one_line():
    message = ('CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of '
               '79.11 GiB of which 1.00 GiB is free.\nSee documentation')
    with pytest.raises(UserError) as error:
        with runtime.out_of_memory('lower --batch_size=12'):
            raise torch.OutOfMemoryError(message)
    assert '2.50 GiB' in str(error.value) and '--batch_size=12' in str(error.value)
    assert '\n' not in str(error.value)
    other = 'CUDA error: an illegal memory access was encountered'
    with pytest.raises(RuntimeError, match='illegal memory access'):
        with runtime.out_of_memory('lower --batch_size=12'):
            raise RuntimeError(other)


def test_ctrl_c_is_answered_at_once_and_ends_the_evaluation(tiny, monkeypatch, capfd):
    batches, evaluations, after = train.evaluation_batches, [], []

    def interrupted(*args):
        evaluations.append(0)
        for number, batch in enumerate(batches(*args)):
            evaluations[-1] += 1
            if len(evaluations) == 3 and number == 2:  # the first evaluation after iteration 0
                capfd.readouterr()
                os.kill(os.getpid(), signal.SIGINT)
                after.append(capfd.readouterr().out)
            yield batch

    monkeypatch.setattr(train, 'evaluation_batches', interrupted)
    with pytest.raises(SystemExit) as stopped:
        run(eval_iters=50)
    assert stopped.value.code == 128 + signal.SIGINT
    assert 'finishing' in after[0] and 'saving' in after[0] and 'again' in after[0]
    assert evaluations[:2] == [50, 50] and len(evaluations) in (3, 4)
    assert sum(evaluations[2:]) <= 5
    out = capfd.readouterr().out
    assert 'stopped at iteration 3' in out and 'step 3' not in out
    assert load_checkpoint('out/ckpt.pt')['iter_num'] == 3
    run(init_from='resume')
    assert [int(row['iteration']) for row in log_rows()] == list(range(7))


def test_an_untrained_model_is_not_evaluated(tiny, error_of, monkeypatch):
    error = error_of(train.main, *flags(**RUN), '--eval_only')
    assert 'eval_only' in error and '--init_from' in error
    run(max_iters=1)
    monkeypatch.setattr(torch, 'compile', None)  # there is nothing to compile for
    assert run(init_from='out', eval_only=True, compile=True) is None


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tiny, monkeypatch, error_of):
    def refused(dir):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr('tempfile.TemporaryFile', refused)
    monkeypatch.setattr(train, 'training_run', None)
    assert 'cannot write into out (Permission denied)' in error_of(train.main, *flags(**RUN))


H100 = 989e12


@pytest.mark.parametrize('name, peak', [
    ('NVIDIA H100 80GB HBM3', H100), ('NVIDIA H100 NVL', 835e12), ('NVIDIA H200 NVL', 0),
    ('NVIDIA H100 80GB HBM3 MIG 1g.10gb', 0), ('NVIDIA H100 PCIe', 756e12),
    ('NVIDIA GeForce RTX 4090', 165e12), ('NVIDIA GeForce RTX 4090 Laptop GPU', 0),
    ('NVIDIA GeForce RTX 4090 D', 0), ('NVIDIA GeForce RTX 3090 Ti', 0),
])
def test_the_peak_is_the_full_cards_own(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: name)
    model = GPT(GPTConfig(**SMALL, vocab_size=20))
    speed = runtime.peak_speed(model, TrainConfig(block_size=8), runtime.Ranks(),
                               torch.device('cuda'), torch.bfloat16)
    assert speed * runtime.flops_per_token(model, 8) == pytest.approx(peak)


# --- commands and messages


@pytest.fixture
def one_line(folder):
    """The dataset `plain`: a text without a line break."""
    with open(STORY, encoding='utf-8') as file:
        prepare_text.prepare(file.read(20_000).replace('\n', ' '), 'plain')
    return folder


def written(capsys, *args):
    """The output of sample.py for three new characters."""
    capsys.readouterr()
    sample.main([*args, '--num_samples=1', '--max_new_tokens=3', '--device=cpu'])
    return capsys.readouterr().out


@pytest.mark.parametrize('dataset', ['tiny', 'plain'])
def test_the_closing_hint_can_be_typed(tiny, one_line, monkeypatch, capsys, dataset):
    monkeypatch.setattr(sys, 'orig_argv', ['.venv/bin/python', f'{ROOT}/train.py'])
    monkeypatch.setattr(sys, 'argv', [f'{ROOT}/train.py'])
    run(dataset=dataset, out_dir='my out', max_iters=1, sample_tokens=5)
    out = capsys.readouterr().out
    assert 'no sample' not in out
    hint = shlex.split(out.strip().split('\nnow: ')[1])
    assert hint[0] == '.venv/bin/python' and os.path.samefile(hint[1], f'{ROOT}/sample.py')
    assert len(written(capsys, *hint[2:])) >= 4


def test_a_text_without_line_breaks_can_be_sampled(one_line, capsys):
    run(dataset='plain', max_iters=1)
    assert len(written(capsys)) == 5  # a character to begin with, three, and the line's end


def test_a_prompt_can_have_line_breaks(tiny, capsys):
    run(max_iters=1)
    assert written(capsys, '--start=the\nlion').startswith('the\nlion')
    assert written(capsys, r'--start=\n') == written(capsys)
    assert written(capsys, r'--start=\n\n').startswith('\n\n')
    with pytest.raises(UserError, match=r"'\\\\' at position 3 of 'the"):  # as it was typed
        written(capsys, r'--start=the\nlion')


@pytest.mark.parametrize('typed', [b'the lion\n', b'the lion\r\n', b'the lion'])
def test_the_line_end_of_echo_is_no_part_of_the_prompt(tiny, monkeypatch, capsys, typed):
    run(max_iters=1)
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(typed)))
    assert written(capsys, '--start=-') == written(capsys, '--start=the lion')


def test_errors_are_not_cut_within_a_word(tiny, error_of):
    """Here more weights are missing than one line can name."""
    run(max_iters=1)
    checkpoint = torch.load('out/best.pt', weights_only=True)
    names = {*checkpoint['model']}
    torch.save(checkpoint | {'model': {}}, 'out/best.pt')
    error = error_of(sample.main, '--device=cpu')
    named = re.findall(r'"(\S+)"[,.]', error)
    assert 150 < len(error) < 300 and 1 < len(named) < len(names) and {*named} < names


def test_bench_names_its_rows(error_of):
    error = error_of(bench.main, '--only=nope', '--device=cpu')
    assert "'nope'" in error and 'baby' in error


def test_bench_says_what_needs_a_gpu(error_of):
    assert 'need an NVIDIA GPU' in error_of(bench.main, '--only=CUDA')


def test_bench_trains_where_the_peak_is_not_known(folder, monkeypatch, capsys):
    small = dict(updates=20, batch_size=2, block_size=8, n_layer=1, n_head=2, n_embd=16)
    monkeypatch.setitem(bench.ROWS, 'small', (bench.bench_training, small))
    bench.main(['--row=small', '--device=cpu'])
    assert re.search(r'^\| small \| [\d,]+ tok/s \| n/a \| [\d.]+ GiB \|$',
                     capsys.readouterr().out, re.M)


def test_bench_on_a_gpu_measures_every_row_of_gpt2(monkeypatch, capsys):
    device = torch.device('cuda'), torch.bfloat16
    monkeypatch.setattr(bench.runtime, 'device_and_dtype', lambda cfg: device)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'a GPU')
    monkeypatch.setattr(bench.subprocess, 'run', lambda command, **_: SimpleNamespace(
        stdout=command[-1].replace('--row=', '| ')))
    bench.main(['--only=gpt2'])
    rows = [line[2:] for line in capsys.readouterr().out.split('\n') if 'gpt2' in line]
    assert rows == [name for name in bench.ROWS if 'gpt2' in name] and len(rows) == 7


def test_bench_compares_training_with_and_without_recomputation():
    rows = {name: row for name, row in bench.ROWS.items() if 'recompute' in name}
    assert len(rows) == 2
    for name, (function, arguments) in rows.items():
        plain, settings = bench.ROWS[name.replace(', recompute', '')]
        assert function is plain and arguments == settings | {'recompute': True}


def test_bench_fails_if_a_row_does(monkeypatch, error_of, capsys):
    monkeypatch.setattr(bench.subprocess, 'run', lambda *_, **__: SimpleNamespace(stdout=''))
    error = error_of(bench.main, '--only=batch 16', '--device=cpu')
    assert 'no figures of sample baby 6x384, batch 16, sample gpt2 124M, batch 16' in error


def test_weights_that_do_not_fit_are_not_resumed(tiny, error_of):
    run(max_iters=2)
    checkpoint = torch.load('out/ckpt.pt', weights_only=True)
    checkpoint['model']['transformer.ln_f.weight'] = torch.ones(3)
    torch.save(checkpoint, 'out/ckpt.pt')
    error = error_of(train.main, *flags(**RUN | dict(init_from='resume', max_iters=3)))
    assert 'the weights do not fit' in error and error.count('\n') == 1


def test_a_shape_that_the_checkpoint_overrides_is_reported(tiny, capsys):
    run(max_iters=1)
    capsys.readouterr()
    run(init_from='out', out_dir='tuned', max_iters=1, n_layer=5)
    assert 'from the checkpoint: n_layer=2\n' in capsys.readouterr().out
    run(init_from='out', out_dir='again', max_iters=1)
    assert 'from the checkpoint' not in capsys.readouterr().out


def test_a_nanogpt_checkpoint_is_not_resumed_on_another_alphabet(tiny, error_of):
    run(max_iters=1)
    state = torch.load('out/ckpt.pt', weights_only=True)
    del state['tokenizer']
    torch.save(state, 'out/ckpt.pt')
    prepare_text.prepare('fewer letters than before, but others: ß\n' * 50, 'other')
    error = error_of(train.main, *flags(**RUN | dict(dataset='other', init_from='resume')))
    assert 'other tokens' in error and '--init_from=out/ckpt.pt' in error
    run(init_from='resume', max_iters=2)


@pytest.mark.parametrize('text', ['a few letters', ''.join(map(chr, range(32, 300)))])
def test_a_nanogpt_checkpoint_whose_dataset_has_changed_is_refused(tiny, error_of, text):
    """Only meta.json contains its alphabet: with another one, samples would be nonsense."""
    run(max_iters=1)
    state = torch.load('out/ckpt.pt', weights_only=True)
    rows = state['model_args']['vocab_size']
    del state['tokenizer']
    torch.save(state, 'out/ckpt.pt')
    os.remove('out/best.pt')
    prepare_text.prepare(text * 50, 'tiny')
    resume = train.main, *flags(**RUN | dict(init_from='resume', max_iters=2, block_size=4))
    for command in (resume, (sample.main, '--out_dir=out')):
        error = error_of(*command)
        assert f'not {rows}: prepare there' in error


def test_a_run_is_resumed_by_its_own_optimizer(tiny, capsys):
    run(max_iters=2, optimizer='muon')
    run(max_iters=3, init_from='resume')
    assert 'from the checkpoint: optimizer=muon\n' in capsys.readouterr().out
    assert load_checkpoint('out/ckpt.pt')['config']['optimizer'] == 'muon'
    run(init_from='resume', eval_only=True, max_iters=1)  # needs no optimizer and no update
    assert 'val: loss ' in capsys.readouterr().out


def test_a_huge_loss_can_be_evaluated(tiny, monkeypatch, capsys):
    run(max_iters=1)
    monkeypatch.setattr(train, 'evaluate', lambda *_, **__: {'val': 1000.0})
    run(init_from='out', eval_only=True)
    assert re.search('^val: loss 1000.0000, .* perplexity inf', capsys.readouterr().out, re.M)


def test_tokens_are_counted_when_the_batch_changes(tiny):
    run(max_iters=3)
    run(max_iters=5, init_from='resume', batch_size=8)
    update = RUN['gradient_accumulation_steps'] * RUN['batch_size'] * RUN['block_size']
    assert [int(row['tokens']) for row in log_rows()] == [update * n for n in (0, 1, 2, 3, 5, 7)]


def test_ctrl_c_while_a_dataset_is_made_ends_quietly(tiny, monkeypatch, capfd):
    monkeypatch.setattr(
        prepare_text.subprocess, 'run', lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run(dataset='wizard_char')
    assert capfd.readouterr().out == ''
