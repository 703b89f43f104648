"""Override files and flags."""

import glob
import os
from dataclasses import asdict

import pytest
from conftest import ROOT

import sample
import train
from configurator import override
from console import UsageError
from model import MODEL_SIZES
from sample import SampleConfig
from train import TrainConfig


def settings(*argv):
    return override(TrainConfig(), argv)


def test_files_and_flags_apply_from_left_to_right(folder):
    (folder / 'a.py').write_text('batch_size = 2\nlearning_rate = 1\nout_dir = "a"\n')
    (folder / 'b.py').write_text('import time\n_half = 8 // 2\nbatch_size = _half * 2\n')
    cfg = settings('a.py', 'b.py', '--out_dir=x=y', '--learning_rate=2', '--compile=false')
    assert cfg.batch_size == 8 and cfg.out_dir == 'x=y' and cfg.compile is False
    assert cfg.learning_rate == 2.0 and isinstance(cfg.learning_rate, float)
    assert settings('--batch_size=3', 'a.py').batch_size == 2
    assert TrainConfig().batch_size == 12


@pytest.mark.parametrize('text, value', [
    ('true', True), ('True', True), ('1', True), ('false', False), ('False', False), ('0', False),
])
def test_truth_has_many_spellings(text, value):
    assert settings(f'--wandb_log={text}').wandb_log is value
    assert settings(f'--compile={text}').compile is value


def test_bare_flags_dashes_and_none():
    assert settings('--wandb_log').wandb_log is True
    assert settings('--eval-interval=7').eval_interval == 7
    assert settings('--compile=none').compile is None
    assert settings('--lr_decay_iters=None').lr_decay_iters is None
    assert override(SampleConfig(), ['--top_k=None']).top_k is None


@pytest.mark.parametrize('argument, words', [
    ('--bach_size=3', "'batch_size'"), ('--qqqqqq=1', '--help'), ('--bs=3', "'batch_size'"),
    ('--lr=1', "'learning_rate'"), ('--wd=1', "'weight_decay'"),
    ('--prepare=x.py', "'prepare' is not"),
    ('--batch_size=big', 'whole number'), ('--batch_size=1.5', 'whole number'),
    ('--learning_rate=fast', 'a number'), ('--batch_size', '='),
    ('--compile=perhaps', 'true or false'), ('missing.py', 'missing.py'),
    ('--batch_size=', 'whole'),
])
def test_wrong_arguments_are_named(folder, argument, words):
    with pytest.raises(UsageError, match=words) as error:
        settings(argument)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('source, words', [
    ('bach_size = 3', "'batch_size'"), ('lr = 1', "'learning_rate'"),
    ('batch_size = 1.5', '1.5'), ('batch_size = True', 'True'), ('compile = "yes"', 'yes'),
    ('out_dir = 3', 'a text'), ('learning_rate = "1"', 'a number'),
    ('learning_rate = True', 'a number'), ('compile = 2', 'true or false'),
    ('x = = 3', 'SyntaxError'), ('1 / 0', 'ZeroDivisionError'), ('def f(): pass', "'f'"),
])
def test_wrong_override_files_are_named(folder, source, words):
    (folder / 'wrong.py').write_text(source)
    with pytest.raises(UsageError, match=words) as error:
        settings('wrong.py')
    assert 'wrong.py' in str(error.value)


def test_a_file_is_looked_for_beside_the_scripts_too(folder):
    path = os.path.join('config', 'train_wizard_bigram.py')
    assert settings(path).model == 'bigram'
    (folder / 'config').mkdir()
    (folder / path).write_text('model = "gpt"\n')
    assert settings(path).model == 'gpt'
    with pytest.raises(UsageError, match='config/none.py is no config file: see'):
        settings('config/none.py')


def test_nanogpts_override_files_run_unchanged(folder):
    """Every setting of nanoGPT's trainer, as its files assign them."""
    (folder / 'theirs.py').write_text('''
import time
out_dir = 'out-x'; eval_interval = 5; log_interval = 1; eval_iters = 40; eval_only = False
always_save_checkpoint = False; init_from = 'gpt2-xl'; wandb_log = False; wandb_project = 'owt'
wandb_run_name = 'ft-' + str(time.time()); dataset = 'shakespeare'
gradient_accumulation_steps = 5 * 8; batch_size = 1; block_size = 1024; n_layer = 12; n_head = 12
n_embd = 768; dropout = 0.0; bias = False; learning_rate = 3e-5; max_iters = 20
weight_decay = 1e-1; beta1 = 0.9; beta2 = 0.95; grad_clip = 1.0
decay_lr = False; warmup_iters = 0; min_lr = 0
lr_decay_iters = 20; backend = 'nccl'; device = 'cpu'; dtype = 'bfloat16'; compile = False
''')
    cfg = settings('theirs.py')
    assert cfg.gradient_accumulation_steps == 40 and cfg.compile is False and cfg.min_lr == 0.0


def test_nanogpts_sampling_flags_are_known():
    names = ('init_from out_dir start num_samples max_new_tokens temperature top_k seed device '
             'dtype compile').split()
    assert set(names) <= asdict(SampleConfig()).keys()


@pytest.mark.parametrize('path', sorted(glob.glob(os.path.join(ROOT, 'config', '*.py'))))
def test_every_config_is_valid(path):
    assert settings(path).out_dir != 'out' or 'eval' in path


def test_model_size_by_name():
    cfg = settings('--model_size=gpt2-medium')
    assert (cfg.n_layer, cfg.n_head, cfg.n_embd) == MODEL_SIZES['gpt2-medium']
    # What is given besides wins, as with nanoGPT, whose train_gpt2.py takes --n_layer.
    cfg = settings(os.path.join(ROOT, 'config', 'train_gpt2_medium.py'), '--n_layer=3')
    assert (cfg.n_layer, cfg.n_head, cfg.n_embd) == (3, 16, 1024)
    with pytest.raises(UsageError, match='gpt2-xl'):
        settings('--model_size=gpt5')


@pytest.mark.parametrize('main, config', [
    (train.main, TrainConfig()), (sample.main, SampleConfig()),
])
def test_help_shows_every_setting_with_its_reason(main, config, capsys):
    with pytest.raises(SystemExit) as ended:
        main(['--help'])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.split('\n')
    for setting in asdict(config):
        line = next(line for line in lines if f'--{setting}=' in line[:40])
        assert len(line.split('  ')[-1].split()) >= 3, line
