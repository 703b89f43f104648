"""sample.py as a user runs it."""

import copy

import pytest
import torch
from conftest import TINY, script

import export_hf
import sample
import train
from checkpoint import load_model
from console import UserError
from model import GPT, GPTConfig
from quantize import PackedLinear, prepare_for_sampling
from tokenizer import GPT2Tokenizer, TextStream


@pytest.fixture
def trained(tiny):
    train.train(train.TrainConfig(**TINY | dict(max_iters=20, eval_interval=20)))
    return tiny


def test_the_same_seed_gives_the_same_text(trained, capsys):
    def text(*more):
        sample.main(['--out_dir=out', '--start=Oz', '--max_new_tokens=40', '--device=cpu', *more])
        return capsys.readouterr().out

    assert text() == text() != text('--seed=2')
    assert text('--temperature=0').split('---------------\n')[0].strip('\n') == (
        text('--temperature=0', '--num_samples=1').strip('\n'))


def test_prompts_from_a_file_and_from_standard_input(trained, capsys):
    (trained / 'p.txt').write_text('“The Lion', encoding='utf-8')
    few = ['--max_new_tokens=3', '--num_samples=1']
    sample.main(['--start=FILE:p.txt', *few])
    from_file = capsys.readouterr().out
    assert from_file.startswith('“The Lion') and len(from_file) == 9 + 3 + 1
    typed = script('sample.py', '--start=-', *few, input='“The Lion\n')  # as echo writes it
    assert typed.stdout == from_file, typed.stderr


def test_output_is_utf8_everywhere(trained):
    result = script('sample.py', '--start=“', '--max_new_tokens=5',
                    env={'LANG': 'C', 'LC_ALL': 'C', 'PYTHONIOENCODING': 'ascii'})
    assert result.returncode == 0 and result.stdout.startswith('“'), result.stderr


def test_a_long_prompt_keeps_its_end_and_says_so(trained, capsys):
    sample.main(['--start=' + 'Dorothy ' * 5 + 'Toto', '--max_new_tokens=5', '--device=cpu'])
    output = capsys.readouterr()
    assert '44 tokens' in output.err and 'last 16' in output.err
    assert output.out.startswith('Dorothy D')


class Letters:
    """A tokenizer whose ids are positions in a text."""

    def __init__(self, text):
        self.text = text

    def decode(self, ids):
        return ''.join(self.text[i] for i in ids)


@pytest.mark.parametrize('prompt, start', [('>', 0), ('', 0), ('', 3)])
def test_text_stops_before_the_stop_string(prompt, start):
    """Also at the very beginning; no part of it is shown."""
    text = TextStream(prompt, [], Letters('abcSTOPdef'), 'STOP')
    shown = ''
    for i in range(start, 10):
        shown += text.add(i)
        assert 'S' not in shown
    assert shown == text.text == prompt + 'abc'[start:] and text.done


def test_what_only_looks_like_a_stop_string_is_shown():
    text = sample.TextStream('', [], Letters('abSTabSTO'), 'STOP')
    shown = ''
    for i in range(9):
        shown += text.add(i)
    assert shown == 'abSTab' and shown + text.text[text.shown:] == 'abSTabSTO'


def test_stop_in_a_real_run(trained, capsys):
    sample.main(['--start=T', '--max_new_tokens=200', '--num_samples=2', '--stop= ',
                 '--device=cpu'])
    for text in capsys.readouterr().out.split('---------------\n'):
        assert ' ' not in text.strip('\n') and len(text) < 200


def test_a_line_break_can_be_typed_as_the_stop_string(trained, capsys):
    sample.main(['--start=The', '--stop=\\n', '--num_samples=1', '--max_new_tokens=300'])
    out = capsys.readouterr().out
    assert len(out) < 300 and out.count('\n') == 1


def test_samples_side_by_side_equal_samples_alone(trained):
    model, tokenizer = load_model('out')
    prompt = torch.tensor([tokenizer.encode('The ').tolist(), tokenizer.encode('Toto').tolist()])
    together = model.generate(prompt, 40, temperature=0)
    for row in (0, 1):
        assert torch.equal(model.generate(prompt[[row]], 40, temperature=0), together[[row]])


@pytest.mark.parametrize('T', [1, 2, 20])
@pytest.mark.parametrize('nonlinearity', [
    torch.nn.GELU(), torch.nn.GELU(approximate='tanh'), torch.nn.ReLU(),  # as a reader may edit it
], ids=str)
@torch.no_grad()
def test_packed_matrices_give_the_same_logits(T, nonlinearity):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=65, block_size=32, n_layer=2, n_head=2, n_embd=64))
    model.transformer.h[0].mlp.c_fc.bias.data.normal_()
    for block in model.transformer.h:
        block.mlp.gelu = nonlinearity
        block.mlp.c_proj.weight.data *= 20  # so that it is seen in the logits
    packed = copy.deepcopy(model)
    prepare_for_sampling(packed, torch.device('cpu'), torch.bfloat16)
    if not any(isinstance(module, PackedLinear) for module in packed.modules()):
        pytest.skip('this processor has nothing to pack for')
    idx = torch.randint(65, (3, T))
    plain, fast = model(idx, idx)[0], packed(idx, idx)[0]
    assert (plain - fast).norm() < 0.01 * plain.norm()


@torch.no_grad()
def test_without_bf16_few_tokens_read_bf16_and_many_are_exact():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=65, block_size=32, n_layer=2, n_head=2, n_embd=64))
    model.transformer.h[0].mlp.c_fc.bias.data.normal_()
    fast, exact = copy.deepcopy(model), copy.deepcopy(model)
    prepare_for_sampling(fast, torch.device('cpu'), torch.float32)
    prepare_for_sampling(exact, torch.device('cpu'), torch.float32, exact=True)
    for shape in ((1, 1), (1, 4), (2, 2), (1, 5), (5, 1)):
        idx = torch.randint(65, shape)
        plain, logits = model(idx, idx)[0], fast(idx, idx)[0]
        assert torch.equal(plain, logits) == (idx.numel() > 4)
        assert (plain - logits).norm() < 0.01 * plain.norm() and logits.dtype == torch.float32
        assert torch.equal(plain, exact(idx, idx)[0])


def test_the_flag_dtype_decides(trained, monkeypatch):
    seen = []
    monkeypatch.setattr('sample.stream', lambda model, *args: seen.append(model) or [])
    monkeypatch.setattr(torch.cpu, 'get_capabilities', dict, raising=False)  # as without bf16
    for flags in ([], ['--dtype=float32']):
        sample.main(['--device=cpu', *flags])
    kinds = [{type(module).__name__ for module in model.modules()} for model in seen]
    assert 'FewTokensInBf16' in kinds[0] and 'FewTokensInBf16' not in kinds[1]


def test_a_prompt_that_is_not_utf8(trained):
    (trained / 'p.txt').write_bytes(b'abc\xff')
    with pytest.raises(UserError, match='^cannot read p.txt: 1 of its bytes are not UTF-8, '
                                        'the first at position 3'):
        sample.main(['--start=FILE:p.txt'])


def test_gpt2_state_needs_no_download():
    assert GPT2Tokenizer().state() == {
        'type': 'gpt2', 'vocab_size': 50257, 'chat_template': None}


def test_a_missing_folder_is_not_looked_for_on_the_hub(folder):
    for out_dir in ('runs/typo', 'gpt2'):
        for module, *more in ((sample, '--device=cpu'), (export_hf, '--to=hf')):
            with pytest.raises(UserError, match=f'no checkpoint {out_dir} '):
                module.main([f'--out_dir={out_dir}', *more])
