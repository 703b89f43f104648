"""GPT-2 weights in and out, compared with the package transformers on small random models."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY, script, steps
from test_tokenizer import TEXTS

import export_hf
import model
import sample
import train
from checkpoint import load_checkpoint, load_model
from console import UsageError, UserError
from model import GPT, GPTConfig
from pretrained import read_pretrained
from tokenizer import CharTokenizer, tokenizer_of
from train import TrainConfig

transformers = pytest.importorskip('transformers')


@pytest.fixture
def theirs(folder):
    """A small GPT-2 with random weights, as transformers makes and saves it, in the folder hf."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=50257, n_positions=32, n_embd=32, n_layer=2, n_head=2)).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    model.save_pretrained('hf')
    return model


@torch.no_grad()
def test_logits_equal_transformers(theirs):
    ours = read_pretrained('hf').eval()
    idx = torch.randint(50257, (2, 32))
    expected = theirs(idx, labels=idx)
    logits, _ = ours(idx, idx)
    assert logits.shape == expected.logits.shape
    assert (logits - expected.logits).abs().max() < 1e-4
    _, loss = ours(idx[:, :-1], idx[:, 1:])
    assert abs(loss - expected.loss) < 1e-4
    assert ours.config.gelu == 'tanh' and ours.generate(idx[:, :3], 5).max() < 50257


@torch.no_grad()
def test_openais_weights_by_their_name(theirs, monkeypatch):
    """With a smaller model under that name."""
    torch.manual_seed(0)
    small = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2))
    monkeypatch.setitem(model.MODEL_SIZES, 'gpt2', (2, 2, 32))
    monkeypatch.setattr(transformers.GPT2LMHeadModel, 'from_pretrained', lambda name: small.eval())
    idx = torch.randint(50257, (2, 32))
    ours = GPT.from_pretrained('gpt2', dropout=0.1).eval()
    assert (ours(idx, idx)[0] - small(idx).logits).abs().max() < 1e-4
    assert ours.config.block_size == 1024 and ours.config.vocab_size == 50257


def test_a_name_is_read_from_the_downloaded_files(theirs, gpt2, folder):
    """Without a network, as if they had been downloaded before."""
    cache = folder / 'home/hub/models--gpt2'
    shutil.copytree('hf', cache / 'snapshots/1')
    (cache / 'refs').mkdir()
    (cache / 'refs/main').write_text('1')
    by_folder, by_name = (script(
        'sample.py', f'--init_from={name}', '--start=The', '--max_new_tokens=8', '--device=cpu',
        '--temperature=0', '--num_samples=1',
        env={'HF_HUB_OFFLINE': '1', 'HF_HOME': str(folder / 'home')}) for name in ('hf', 'gpt2'))
    assert by_name.returncode == 0, by_name.stderr
    assert by_name.stdout == by_folder.stdout and len(by_name.stdout) > 9


@pytest.mark.parametrize('change', [
    dict(model_type='gpt_neo'), dict(activation_function='relu'), dict(n_inner=64),
    dict(scale_attn_by_inverse_layer_idx=True), dict(layer_norm_epsilon=1e-6),
    dict(model_type='mine', auto_map={'AutoModelForCausalLM': 'mine.Model'}),
])
def test_another_architecture_is_refused(theirs, change):
    with open('hf/config.json') as file:
        config = json.load(file)
    with open('hf/config.json', 'w') as file:
        json.dump(config | change, file)
    with pytest.raises(UserError):
        read_pretrained('hf')


def test_a_folder_that_lacks_weights_is_refused(theirs):
    weights, gone = theirs.state_dict(), 'transformer.h.1.mlp.c_fc.weight'
    del weights[gone]
    theirs.save_pretrained('hf', state_dict=weights)
    with pytest.raises(UserError, match=f'hf has no {gone}: get it again'):
        read_pretrained('hf')


def test_cut_weights_are_refused(theirs):
    os.truncate('hf/model.safetensors', 5000)
    with pytest.raises(UserError, match='the weights of hf are damaged or do not fit'):
        read_pretrained('hf')


def test_a_full_disk_is_one_line_and_leaves_nothing(tiny, monkeypatch):
    def full(model, folder):
        raise pytest.importorskip('safetensors').SafetensorError('No space left on device')

    train.train(TrainConfig(**TINY | dict(max_iters=1)))
    monkeypatch.setattr(transformers.PreTrainedModel, 'save_pretrained', full)
    with pytest.raises(UserError, match='No space left on device.: free some space'):
        export_hf.main(['--to=a/b'])
    assert not os.path.exists('a')


def greedy(folder, prompt, new):
    """The text that transformers generates from a folder."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors='pt').input_ids
    out = model.generate(ids, max_new_tokens=new, do_sample=False, use_cache=True,
                         attention_mask=torch.ones_like(ids), pad_token_id=0)
    return tokenizer.decode(out[0])


@pytest.mark.parametrize('bias', [True, False])
def test_an_exported_char_model_writes_the_same(tiny, capsys, bias):
    train.train(TrainConfig(**TINY | dict(max_iters=60, block_size=64, bias=bias)))
    capsys.readouterr()
    export_hf.main(['--out_dir=out', '--to=hf'])
    assert 'tokenizer.json' in capsys.readouterr().out
    settings = ['--start=“Oh,” said', '--max_new_tokens=40', '--num_samples=1', '--temperature=0',
                '--dtype=float32']
    sample.main(['--out_dir=out', *settings])
    ours = capsys.readouterr().out
    assert greedy('hf', '“Oh,” said', 40) == ours.removesuffix('\n')
    sample.main(['--init_from=hf', *settings])
    assert capsys.readouterr().out == ours
    with pytest.raises(UsageError, match='--to=hf'):
        export_hf.main(['--out_dir=out', '--to=hf'])


def test_an_exported_gpt2_model_writes_the_same(folder, gpt2):
    torch.manual_seed(0)
    ours = GPT(GPTConfig(block_size=64, n_layer=2, n_head=2, n_embd=32)).eval()
    for p in ours.parameters():
        p.data += 0.1 * torch.randn_like(p)
    export_hf.export(ours, gpt2, 'hf')
    idx = torch.from_numpy(gpt2.encode('The Lion’s tail').astype(np.int64))[None]
    ids = ours.generate(idx, 30, temperature=0, vocab_size=50257)[0].tolist()
    if gpt2.eot in ids:
        ids = ids[: ids.index(gpt2.eot) + 1]
    assert greedy('hf', 'The Lion’s tail', 30) == gpt2.decode(ids)


def test_tokenizers_agree(folder, gpt2):
    for tokenizer in (gpt2, CharTokenizer(''.join(TEXTS))):
        theirs = export_hf.hugging_face_tokenizer(tokenizer)
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=theirs)
        fast.save_pretrained('t')
        fast = transformers.AutoTokenizer.from_pretrained('t')
        for text in (''.join(TEXTS), "don't  stop\n\n 1234 x" if tokenizer is gpt2 else 'hello'):
            assert fast(text).input_ids == tokenizer.encode(text).tolist()
            assert fast.decode(tokenizer.encode(text).tolist()) == text
        assert tokenizer_of('t').state() == tokenizer.state()


def test_finetuning_a_local_model_lowers_the_loss(theirs, capsys):
    """The README's commands, with a small local model instead of gpt2."""
    os.makedirs('data/words')
    ids = np.tile(np.arange(40, dtype='<u2') * 7, 100)
    for name in ('train', 'val'):
        ids.tofile(f'data/words/{name}.bin')
    train.train(TrainConfig(**TINY | dict(
        dataset='words', init_from='hf', max_iters=20, eval_interval=10, sample_tokens=0)))
    seen = steps(capsys.readouterr().out)
    assert seen[-1][2] < seen[0][2] - 0.5
    checkpoint = load_checkpoint('out')
    assert checkpoint['config']['gelu'] == 'tanh' and checkpoint['model_args']['n_layer'] == 2
    model, _ = load_model('out')
    assert model.config.gelu == 'tanh' and model.config.vocab_size == 50257


def test_a_char_dataset_is_refused(tiny, theirs):
    with pytest.raises(UserError, match='hf was trained on gpt2 tokens, .* other .char. ones'):
        train.train(TrainConfig(**TINY | dict(init_from='hf')))


def test_without_a_network_the_error_is_one_line(folder):
    result = script('sample.py', '--init_from=gpt2-large', env={'HF_HUB_OFFLINE': '1',
                                                                'HF_HOME': str(folder)})
    assert result.returncode == 1 and result.stderr.count('\n') == 1
    assert 'connect' in result.stderr
