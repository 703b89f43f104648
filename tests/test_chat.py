"""Conversations: prepare_chat.py, what the loss counts, chat.py, and the export."""

import glob
import io
import itertools
import json
import os
import pty
import re
import select
import sys
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, flags, gpt2_tokenizer, script, train_together

import chat
import console
import export_hf
import model
import prepare_chat
import prepare_text
import sample
import train
from checkpoint import load_checkpoint, load_model
from console import UserError
from dataset import Dataset, Split, evaluation_batches, training_batches
from prepare_chat import read_conversations
from runtime import Ranks
from tokenizer import CharTokenizer, gives_same_ids, tokenizer_from, tokenizer_of

CPU, ALONE = torch.device('cpu'), SimpleNamespace(rank=0, world_size=1)
CHAT = TINY | dict(dataset='qa', block_size=80)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' "
    "+ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def qa(count):
    return [{'prompt': f'What is {i} + {i}?', 'response': str(2 * i)} for i in range(count)]


def user(text):
    return {'role': 'user', 'content': text}


def assistant(text):
    return {'role': 'assistant', 'content': text}


def write(path, items):
    with open(path, 'w', encoding='utf-8') as file:
        file.writelines(json.dumps(item, ensure_ascii=False) + '\n' for item in items)


@pytest.fixture
def asked(folder):
    """A current folder with the dataset `qa`: 40 questions, in characters."""
    write('qa.jsonl', qa(40))
    prepare_chat.main(['qa.jsonl', '--dataset=qa', '--test_fraction=0.1'])
    return folder


def teach():
    """A short run on the dataset `qa`, in the folder out."""
    train.train(train.TrainConfig(**CHAT | dict(max_iters=30, eval_interval=30)))


@pytest.fixture
def taught(asked):
    """These questions, taught."""
    teach()
    return asked


def with_template(tokenizer, template=chat.TEMPLATE):
    tokenizer.chat_template = template
    return tokenizer


def rows(tokenizer, split, block_size, begins):
    """(inputs, targets) of windows as texts; targets that don't count are dots."""
    x, y = split.batch(np.array(begins), block_size, CPU)
    return [(tokenizer.decode(a), ''.join(tokenizer.decode([i]) if i >= 0 else '.' for i in b))
            for a, b in zip(x.tolist(), y.tolist())]


# --- the files


def test_a_dataset_contains_texts_by_the_template_and_which_of_them_count(asked):
    data = Dataset('qa', Ranks())
    for name, split in data.splits.items():
        ids = np.fromfile(f'data/qa/{name}.bin', '<u2')
        text = data.tokenizer.decode(ids)
        assert len(split.mask) == len(ids)
        assert re.fullmatch(r'(user\nWhat is (\d+) \+ \2\?␃assistant\n\d+␃)+', text)
        begins = [match.start() for match in re.finditer('user', text)]
        assert np.flatnonzero(split.mask == 2).tolist() == begins
        counted = data.tokenizer.decode(ids[split.mask == 1])
        assert counted == ''.join(re.findall(r'assistant\n(\d+␃)', text))
    meta = json.load(open('data/qa/meta.json', encoding='utf-8'))
    assert meta['tokenizer']['chat_template'] == chat.TEMPLATE and '␃' in meta['tokenizer']['chars']


def test_no_conversation_is_on_both_sides_whatever_the_order_of_lines(folder):
    write('a.jsonl', qa(30))
    write('b.jsonl', (qa(30) + qa(7))[::-1])
    assert read_conversations(['a.jsonl']) == read_conversations(['b.jsonl', 'a.jsonl'])
    prepare_chat.main(['b.jsonl', 'a.jsonl', '--dataset=qa', '--val_fraction=0.3'])
    data = Dataset('qa', Ranks())
    sides = [set(data.tokenizer.decode(np.fromfile(f'data/qa/{name}.bin', '<u2')).split('user'))
             for name in ('train', 'val')]
    assert sides[0] & sides[1] == {''} and len(sides[0] | sides[1]) == 31


@pytest.mark.parametrize('form', [
    lambda q, a: {'prompt': q, 'response': a},
    lambda q, a: {'prompt': q, 'completion': a, 'source': 'other keys'},
    lambda q, a: {'instruction': q, 'input': '', 'output': a},
    lambda q, a: {'messages': [user(q), assistant(f' {a}\n')]},
], ids=['response', 'completion', 'instruction', 'messages'])
def test_forms(folder, form):
    write('a.jsonl', [form(item['prompt'], item['response']) for item in qa(20)])
    (folder / 'b.json').write_text(json.dumps([form('What is 7?', '7')], indent=2), 'utf-8')
    (folder / 'c.jsonl').write_text('\n' + json.dumps(form('And\r\n8?', '8')) + '\r\n\r\n', 'utf-8')
    read = read_conversations(['a.jsonl', 'b.json', 'c.jsonl'])
    assert len(read) == 22
    assert [user('What is 7?'), assistant('7')] in read and [user('What is 3 + 3?'),
                                                             assistant('6')] in read


def test_forms_with_more_parts(folder):
    turns = [user('a'), assistant('b'), user('c'), assistant('d')]
    write('a.jsonl', [{'instruction': 'Spell.', 'input': 'Toto', 'output': 'T-o-t-o'},
                      {'messages': [{'role': 'system', 'content': 's'}, *turns]}])
    read = read_conversations(['a.jsonl'])
    assert [user('Spell.\n\nToto'), assistant('T-o-t-o')] in read
    assert [{'role': 'system', 'content': 's'}, *turns] in read


@pytest.mark.parametrize('line, reason', [
    ('{"prompt": "x"}', "KeyError: 'messages'"), ('nonsense', 'JSONDecodeError'), ('7', 'int'),
    ('"a prompt and a response"', 'TypeError'), ('{"messages": []}', 'take turns'),
    ('{"prompt": 1, "response": "x"}', 'int'), ('{"messages": 5}', 'int'), ('null', 'NoneType'),
    ('{"messages": [{"role": "assistant", "content": "x"}]}', 'take turns'),
    ('{"messages": [{"role": "user", "content": "x"}]}', 'take turns'),
    ('{"messages": [{"role": "tool", "content": "x"}]}', 'tool'), ('{"prompt": "x', 'JSONDecode'),
    ('[' * 100_000, 'RecursionError'), ('{"prompt": "a", "response": null}', 'NoneType'),
    ('{"messages": [{"role": "user", "content": 5}]}', 'int'), ('{"messages": ["a"]}', 'str'),
    ('{"messages": [{"role": "user assistant", "content": "x"}]}', 'take turns'),
    ('{"messages": [{"role": "system", "content": "x"}]}', 'take turns'),
    ('{"prompt": "half an emoji: \\ud83d", "response": "x"}', 'surrogates'),
    ('{"instruction": "Double.", "input": 0, "output": "0"}', 'int'),
])
def test_a_broken_line_is_named_and_nothing_is_written(folder, line, reason):
    write('a.jsonl', qa(20))
    with open('a.jsonl', 'a') as file:
        file.write(line + '\n')
    with pytest.raises(UserError, match='a.jsonl, line 21') as caught:
        prepare_chat.main(['a.jsonl', '--dataset=qa'])
    assert reason in str(caught.value) and not os.path.exists('data')


def test_windows_line_ends_in_a_message_are_line_feeds(folder):
    write('a.jsonl', [{'prompt': 'a\r\nb', 'response': 'c\r\nd\r\n'}])
    assert read_conversations(['a.jsonl']) == [[user('a\nb'), assistant('c\nd')]]


def test_a_broken_element_of_a_list_is_named(folder):
    (folder / 'a.json').write_text(json.dumps([*qa(3), {'prompt': 'x'}]), 'utf-8')
    with pytest.raises(UserError, match='a.json, element 4'):
        read_conversations(['a.json'])


def test_empty_messages_are_left_out_and_counted(folder, capsys):
    items = [{'prompt': 'x', 'response': ' '}, {'prompt': None, 'response': 'y'}, *qa(2), *qa(1)]
    write('a.jsonl', items)
    assert len(read_conversations(['a.jsonl'])) == 2
    assert 'left out: 2 with an empty message, 1 repeated' in capsys.readouterr().out


def test_lines_end_at_line_feeds_alone(folder):
    # U+2028 ends a line for str.splitlines, but not in JSON
    write('a.jsonl', [{'prompt': 'ação \u2028 😀 \x85', 'response': 'ß'}])
    ((question, _),) = read_conversations(['a.jsonl'])
    assert question['content'] == 'ação \u2028 😀'


@pytest.mark.parametrize('make, end', [
    (lambda: CharTokenizer('asistn\nuer ␃'), '␃'), (gpt2_tokenizer, '<|endoftext|>')])
def test_the_end_inside_a_message_is_refused(make, end):
    tokenizer = make()
    with pytest.raises(UserError, match='aun.*leave it out'):  # so that it can be found
        chat.encode_chat(with_template(tokenizer), [user('r'), assistant(f'aun{end}n')])


@pytest.mark.parametrize('args, wrong', [
    ([], '--dataset'), (['none.jsonl', '--dataset=qa'], 'none.jsonl'),
    (['qa.jsonl', '--dataset=a/b'], 'a/b'), (['qa.jsonl', '--dataset=b', '--val_fraction=2'], '2'),
    (['qa.jsonl', '--dataset=b', '--tokenizer=none'], 'none'),
    (['few.jsonl', '--dataset=b'], 'two'), (['empty.jsonl', '--dataset=b'], 'two'),
])
def test_impossible_commands_are_one_line(asked, args, wrong):
    write('few.jsonl', qa(1))
    write('empty.jsonl', [])
    with pytest.raises(UserError, match=wrong):
        prepare_chat.main(args)
    assert os.listdir('data') == ['qa']


def test_another_datasets_alphabet_is_extended_by_the_end(asked):
    text = prepare_text.prepare('What is system user\nassistant 0123456789+? ' * 50, 'text')
    prepare_chat.main(['qa.jsonl', '--dataset=b', '--tokenizer=data/text'])
    chars = Dataset('b', Ranks()).tokenizer.chars
    assert chars == ''.join(sorted(text['tokenizer']['chars'] + '␃'))
    prepare_chat.main(['qa.jsonl', '--dataset=c', '--tokenizer=data/qa'])
    assert Dataset('c', Ranks()).tokenizer.state() == Dataset('qa', Ranks()).tokenizer.state()


def test_the_questions_about_oz_are_made_into_a_dataset_when_they_are_asked_for(folder):
    conversations = read_conversations([prepare_chat.QUESTIONS])
    assert len(conversations) == 2883  # none is repeated
    data = Dataset('wizard_chat', Ranks())
    assert data.tokenizer.chat_template == chat.TEMPLATE
    assert sum(len(split.borders) - 1 for split in data.splits.values()) == 2883
    assert np.diff(data.splits['train'].borders).max() <= 129


def test_an_edited_template_brings_its_own_letters(folder, monkeypatch):
    template = chat.TEMPLATE.replace("message.role + '\\n'", "'<' + message.role + '>'")
    assert template != chat.TEMPLATE
    template = template.replace("'assistant\\n'", "'<assistant>'")
    monkeypatch.setattr(prepare_chat, 'TEMPLATE', template)
    write('qa.jsonl', qa(20))
    prepare_chat.main(['qa.jsonl', '--dataset=qa'])
    data = Dataset('qa', Ranks())
    text = data.tokenizer.decode(np.fromfile('data/qa/train.bin', '<u2'))
    assert text.startswith('<user>What') and '␃<assistant>' in text
    assert data.splits['train'].mask[0] == 2


def test_a_template_that_does_not_end_answers_is_refused(folder, monkeypatch):
    monkeypatch.setattr(prepare_chat, 'TEMPLATE', chat.TEMPLATE.replace('eos_token', "'\n'"))
    write('qa.jsonl', qa(20))
    with pytest.raises(UserError, match="answers must end with '␃'"):
        prepare_chat.main(['qa.jsonl', '--dataset=qa'])
    assert not os.path.exists('data')


def test_a_text_by_a_chat_datasets_tokenizer_is_no_conversation(asked, capsys):
    prepare_text.prepare('What is this? ' * 99, 'text', tokenizer='data/qa')
    data = Dataset('text', Ranks())
    assert data.splits['train'].mask is None
    assert data.tokenizer.state() == Dataset('qa', Ranks()).tokenizer.state()  # can still answer
    train.main(flags(**CHAT | dict(dataset='text', max_iters=2, sample_start='What')))
    shown = capsys.readouterr().out
    assert re.search(r'^  \| What', shown, re.M) and not re.search(r'\| What\n  \| ', shown)
    assert re.search(r'^now: .*sample\.py --out_dir=out$', shown, re.M)


def test_a_mask_of_ones_own_beside_a_text(folder, capsys):
    prepare_text.prepare('What is the lion? ' * 200, 'text')
    for name in 'train', 'val':
        mask = np.tile(np.array([2, *[0] * 11, *[1] * 6], np.uint8), 200)  # "lion? " counts
        mask[: Split(f'data/text/{name}.bin', 256).tokens].tofile(f'data/text/{name}.mask')
    train.main(flags(**CHAT | dict(dataset='text', max_iters=2, sample_start='What')))
    assert re.search(r'^  \| What', capsys.readouterr().out, re.M)


# --- files that belong together


def test_a_text_in_the_place_of_conversations_and_back(asked):
    prepare_text.prepare('the lion ' * 100, 'qa')
    assert sorted(os.listdir('data/qa')) == ['meta.json', 'train.bin', 'val.bin']
    data = Dataset('qa', Ranks())
    assert data.splits['train'].mask is None and data.tokenizer.chat_template is None
    prepare_chat.main(['qa.jsonl', '--dataset=qa'])
    assert sorted(os.listdir('data/qa')) == [
        'meta.json', 'train.bin', 'train.mask', 'val.bin', 'val.mask']
    assert Dataset('qa', Ranks()).splits['train'].mask is not None


def test_files_are_replaced_together_or_not_at_all(asked, monkeypatch):
    before = {name: (asked / 'data/qa' / name).read_bytes() for name in os.listdir('data/qa')}
    write('more.jsonl', qa(60))

    def full(file):
        if '.mask' in file.name:
            raise OSError(28, 'No space left on device')

    monkeypatch.setattr(prepare_text, 'flush_to_disk', full)
    with pytest.raises(UserError, match='No space left'):
        prepare_chat.main(['more.jsonl', '--dataset=qa'])
    after = {name: (asked / 'data/qa' / name).read_bytes() for name in os.listdir('data/qa')}
    assert before == after


def test_a_kill_while_files_are_replaced_leaves_no_dataset_that_could_be_used(asked, monkeypatch):
    write('more.jsonl', qa(60))
    replace = os.replace
    for count in range(1, 6):  # meta.json and four files
        calls = iter(range(count))

        def killed(*paths):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            replace(*paths)

        with monkeypatch.context() as patch:
            patch.setattr(os, 'replace', killed)
            try:
                prepare_chat.main(['more.jsonl', '--dataset=qa'])
            except KeyboardInterrupt:
                with pytest.raises(UserError, match='missing'):
                    Dataset('qa', Ranks())
        prepare_chat.main(['qa.jsonl', '--dataset=qa'])
        assert Dataset('qa', Ranks())


@pytest.mark.parametrize('content', [b'\2\1', b'\0' * 999, b''])
def test_a_mask_that_does_not_fit_is_refused(asked, content):
    (asked / 'data/qa/val.mask').write_bytes(content)
    with pytest.raises(UserError, match='prepare the dataset again'):
        Split('data/qa/val.bin', 256)


@pytest.mark.parametrize('split', ['train', 'val'])
def test_a_forgotten_mask_is_told(asked, split):
    os.remove(f'data/qa/{split}.mask')
    with pytest.raises(UserError, match=f'{split}.bin has no .mask'):
        Dataset('qa', Ranks())


def test_a_mask_without_a_beginning_or_an_answer_is_refused(asked):
    size = os.path.getsize('data/qa/val.mask')
    for content in (b'\1' * size, b'\2' + b'\0' * (size - 1), b'\0\2' + b'\1' * (size - 2)):
        (asked / 'data/qa/val.mask').write_bytes(content)
        with pytest.raises(UserError, match='prepare the dataset again'):
            Split('data/qa/val.bin', 256)


# --- windows, and what counts


def test_windows_hold_whole_conversations_and_count_answers(asked):
    data = Dataset('qa', Ranks())
    split = data.splits['train']
    for x, y in rows(data.tokenizer, split, 80, split.random_windows(1, 20, 80)):
        assert x.startswith('user\n') and y.rstrip('.').endswith('␃')
        texts = x[: len(y.rstrip('.'))].split('user\n')[1:]
        answers = [text.split('assistant\n')[1].rstrip('␃') for text in texts]
        assert len(answers) >= 2  # as many as fit
        assert y.replace('.', '') == ''.join(f'{answer}␃' for answer in answers)


@pytest.mark.parametrize('world_size', [1, 3])
@pytest.mark.parametrize('block_size', [1, 5, 30, 36, 80, 500, 5000])
def test_an_evaluation_counts_every_answer_once(asked, block_size, world_size):
    cfg = SimpleNamespace(batch_size=3, block_size=block_size, eval_iters=0, seed=1)
    split = Split('data/qa/train.bin', 256)
    targets = []
    for rank in range(world_size):
        ranks = SimpleNamespace(rank=rank, world_size=world_size)
        for _, y, _ in evaluation_batches(split, cfg, ranks, CPU):
            targets += y[y >= 0].tolist()
    ids = np.fromfile('data/qa/train.bin', '<u2')
    assert sorted(targets) == sorted(ids[split.mask == 1].tolist())


def test_a_window_of_a_long_conversation_is_a_part_of_it(folder):
    write('qa.jsonl', qa(20) + [{'prompt': 'W' * 300, 'response': 'no'},
                                {'prompt': 'w', 'response': 'n' * 300}])
    prepare_chat.main(['qa.jsonl', '--dataset=qa', '--val_fraction=0.1'])
    data = Dataset('qa', Ranks())
    tokenizer, counts = data.tokenizer, 0
    for split in data.splits.values():
        for x, y in rows(tokenizer, split, 50, split.all_windows(50)):
            x = x[: len(y.rstrip('.'))]  # what follows the last target is not read
            conversations = len(re.findall('user\n', x))
            assert conversations <= 1 or not re.search('W{9}|n{9}', x)
            counts += len(y.replace('.', ''))
    assert counts == sum((split.mask == 1).sum() for split in data.splits.values())
    assert sum((np.diff(split.borders) > 51).sum() for split in data.splits.values()) == 2


def test_long_conversations_are_reported(folder, capsys):
    write('qa.jsonl', qa(20) + [{'prompt': f'W{i}' * 50, 'response': 'no'} for i in range(20)])
    prepare_chat.main(['qa.jsonl', '--dataset=qa'])
    longer = (np.diff(Dataset('qa', Ranks()).splits['train'].borders) > 81).sum()
    assert longer
    train.train(train.TrainConfig(**CHAT | dict(max_iters=1, sample_tokens=0)))
    assert f'{longer} conversations are longer than block_size=80' in capsys.readouterr().out


@pytest.mark.parametrize('eval_iters', [0, 2])
def test_no_answer_within_reach_is_an_error_and_no_division_by_zero(folder, eval_iters):
    write('qa.jsonl', [{'prompt': f'W{i}' * 50, 'response': 'no'} for i in range(20)])
    prepare_chat.main(['qa.jsonl', '--dataset=qa'])
    settings = CHAT | dict(block_size=8, eval_iters=eval_iters, max_iters=1)
    if eval_iters:
        with pytest.raises(UserError, match='block_size=8'):
            train.train(train.TrainConfig(**settings))
    else:
        assert train.train(train.TrainConfig(**settings)) > 0  # parts of conversations


def test_micro_batches_and_ranks_weigh_by_their_targets(asked):
    cfg = SimpleNamespace(seed=3, batch_size=2, block_size=80, gradient_accumulation_steps=4)
    split = Split('data/qa/train.bin', 256)
    total, sums = 0, 0
    for rank in range(2):
        ranks = SimpleNamespace(rank=rank, world_size=2)
        batches = training_batches(split, cfg, ranks, CPU, 0)
        for _ in range(2):
            x, y, divisor = next(batches)
            losses = torch.where(y >= 0, x.double(), 0).sum()  # any number for each target
            sums += losses / (y >= 0).sum() / divisor / 2  # ranks are averaged
            total += (y >= 0).sum()
    cfg.batch_size, cfg.gradient_accumulation_steps = 8, 1
    x, y, divisor = next(training_batches(split, cfg, ALONE, CPU, 0))
    assert divisor == 1 and (y >= 0).sum() == total
    assert sums.item() == pytest.approx((torch.where(y >= 0, x.double(), 0).sum() / total).item())


def test_micro_batches_without_targets_weigh_nothing(folder):
    write('qa.jsonl', [{'prompt': f'W{i}' * (40 * (i % 2) + 1), 'response': 'no'}
                       for i in range(40)])
    prepare_chat.main(['qa.jsonl', '--dataset=qa'])
    split = Split('data/qa/train.bin', 256)
    cfg = SimpleNamespace(seed=3, batch_size=1, block_size=40, gradient_accumulation_steps=8)
    batches = training_batches(split, cfg, ALONE, CPU, 0)
    parts = [((y >= 0).sum().item(), divisor)
             for _, y, divisor in itertools.islice(batches, 8)]
    counts = [count for count, _ in parts]
    assert 0 in counts and sum(counts) > 0
    for count, divisor in parts:
        assert count == 0 or count / sum(counts) == pytest.approx(1 / divisor)
    cfg.block_size = 4  # no window reaches an answer
    parts = [next(training_batches(split, cfg, ALONE, CPU, 0)) for _ in range(8)]
    assert all((y == -1).all() and 0 < divisor < np.inf for _, y, divisor in parts)


def test_accumulation_equals_one_large_batch(asked):
    settings = dict(max_iters=3, eval_interval=3, grad_clip=0.0)
    train.train(train.TrainConfig(**CHAT | settings | dict(
        gradient_accumulation_steps=1, batch_size=8, out_dir='a')))
    train.train(train.TrainConfig(**CHAT | settings | dict(
        gradient_accumulation_steps=4, batch_size=2, out_dir='b')))
    ours, theirs = (load_checkpoint(f'{name}/ckpt.pt')['model'] for name in 'ab')
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], atol=2e-5, rtol=1e-4)


def test_one_process_and_two_learn_the_same(asked):
    cfg = train.TrainConfig(**CHAT)
    train.train(cfg)
    train_together(train.TrainConfig(**CHAT | dict(out_dir='both')))
    ours, theirs = (load_checkpoint(f'{name}/ckpt.pt') for name in ('out', 'both'))
    for name, weight in ours['model'].items():
        torch.testing.assert_close(weight, theirs['model'][name], atol=2e-5, rtol=1e-4)
    assert ours['best_val_loss'] == pytest.approx(theirs['best_val_loss'], rel=1e-4)


def test_resume_is_exact(asked):
    train.main(flags(**CHAT))
    train.main(flags(**CHAT | dict(out_dir='b', max_iters=3, lr_decay_iters=6)))
    train.main(flags(**CHAT | dict(out_dir='b', init_from='resume')))
    ours, theirs = (load_checkpoint(f'{name}/ckpt.pt')['model'] for name in ('out', 'b'))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_loss_in_chunks_is_the_loss_where_few_targets_count(monkeypatch):
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 2048, 16), torch.nn.Linear(16, 999, bias=False)
    targets = torch.randint(999, (2, 2048))
    targets[torch.rand(2, 2048) < 0.9] = -1
    targets[0, :1500] = -1  # a chunk without any
    results = []
    for limit in (1e12, 0):
        monkeypatch.setattr(model, 'MAX_LOGITS', limit)
        x = hidden.clone().requires_grad_()
        _, loss = model.logits_and_loss(x, head, targets, loss_only=True)
        loss.backward()
        results.append((loss, x.grad))
    torch.testing.assert_close(results[0], results[1])


# --- the template


MESSAGES = [user('What is 2?'), assistant('4'), user(' is 2? '), assistant('4 + 0'),
            user('What is 3?')]


def test_a_question_ends_where_the_answer_begins(asked):
    tokenizer = Dataset('qa', Ranks()).tokenizer
    ids, learned = chat.encode_chat(tokenizer, MESSAGES)
    text = tokenizer.decode(ids)
    assert text == ('user\nWhat is 2?␃assistant\n4␃user\nis 2?␃assistant\n4 + 0␃'
                    'user\nWhat is 3?␃assistant\n')
    assert tokenizer.decode(ids[learned]) == '4␃4 + 0␃'
    assert chat.question_ids(tokenizer, ' What is 3?\n', MESSAGES[:-1]) == ids.tolist()


def test_a_template_is_in_a_sandbox(asked):
    tokenizer = with_template(CharTokenizer('user ␃'), (
        "{{ messages.__class__.__mro__[1].__subclasses__() }}"))
    with pytest.raises(UserError, match='refuses'):
        chat.encode_chat(tokenizer, [user('us')])
    for broken in ('{% for %}', "{{ raise_exception('only users') }}", '{{ messages[7].role }}'):
        with pytest.raises(UserError, match='chat template'):
            chat.encode_chat(with_template(tokenizer, broken), [user('us')])


def test_a_template_that_changes_earlier_turns_is_refused():
    template = '{{ messages | length }}' + chat.TEMPLATE
    with pytest.raises(UserError, match='when others follow'):
        chat.encode_chat(with_template(gpt2_tokenizer(), template), MESSAGES)


def test_a_role_between_question_and_answer(asked):
    tokenizer = Dataset('qa', Ranks()).tokenizer
    tool = {'role': 'tias', 'content': '2'}  # of letters that the alphabet has
    ids, learned = chat.encode_chat(tokenizer, [user('is 2?'), tool, assistant('4')])
    assert tokenizer.decode(ids) == 'user\nis 2?␃tias\n2␃assistant\n4␃'
    assert tokenizer.decode(ids[learned]) == '4␃'


def test_such_a_template_can_still_ask():
    tokenizer = with_template(CharTokenizer('What is sytem user\nassistant 0123456789+?␃'),
                              '{{ messages | length }}' + chat.TEMPLATE)
    ids = chat.question_ids(tokenizer, 'What is 3?', MESSAGES[:2])
    assert tokenizer.decode(ids) == (
        '3user\nWhat is 2?␃assistant\n4␃user\nWhat is 3?␃assistant\n')


def test_a_template_belongs_to_the_state_but_decides_no_ids():
    plain, taught = (CharTokenizer('user ␃') for _ in range(2))
    with_template(taught)
    assert tokenizer_from(taught.state()).chat_template == chat.TEMPLATE
    assert gives_same_ids(plain.state(), taught.state()) and plain.state() != taught.state()
    older = {name: value for name, value in plain.state().items() if name != 'chat_template'}
    assert gives_same_ids(older, taught.state()) and tokenizer_from(older).chat_template is None


def theirs_of(tokenizer, **settings):
    transformers = pytest.importorskip('transformers')
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=export_hf.hugging_face_tokenizer(tokenizer), **settings)


def same_ids(ours, theirs, messages, header):
    ids, learned = chat.encode_chat(ours, messages)
    assert ids.tolist() == theirs.apply_chat_template(
        messages, add_generation_prompt=header, return_dict=True)['input_ids']
    return ours.decode(ids[learned])


@pytest.mark.parametrize('make', [
    lambda: CharTokenizer('What is sytem user\nassistant 0123456789+?␃'), gpt2_tokenizer],
    ids=['characters', 'gpt2'])
def test_ids_are_those_of_transformers(make):
    tokenizer = make()
    end = tokenizer.decode([tokenizer.eot])
    theirs = theirs_of(tokenizer, eos_token=end, chat_template=chat.TEMPLATE)
    with_template(tokenizer)
    system = [{'role': 'system', 'content': 'are'}]
    assert same_ids(tokenizer, theirs, MESSAGES, True) == f'4{end}4 + 0{end}'
    assert same_ids(tokenizer, theirs, system + MESSAGES[:-1], False) == f'4{end}4 + 0{end}'


def test_a_tokenizer_keeps_its_own_template(folder):
    theirs = theirs_of(gpt2_tokenizer(), eos_token='<|im_end|>', chat_template=CHATML,
                       additional_special_tokens=['<|im_start|>'])
    theirs.save_pretrained('chatml')
    ours = tokenizer_of('chatml')
    messages = [user('a  b'), assistant(' c'), user('\nd'), assistant('e')]
    assert same_ids(ours, theirs, messages, False) == ' c<|im_end|>\ne<|im_end|>\n'
    write('qa.jsonl', qa(30))
    prepare_chat.main(['qa.jsonl', '--dataset=qa', '--tokenizer=chatml'])
    assert Dataset('qa', Ranks()).tokenizer.chat_template == CHATML


def test_a_template_may_name_the_first_token(folder):
    template = '{{ bos_token }}' + CHATML
    theirs = theirs_of(gpt2_tokenizer(), eos_token='<|im_end|>', bos_token='<|begin|>',
                       chat_template=template, additional_special_tokens=['<|im_start|>'])
    theirs.save_pretrained('chatml')
    ours = tokenizer_of('chatml')
    messages = [user('a'), assistant('b'), user('c')]
    assert same_ids(ours, theirs, messages, True) == 'b<|im_end|>\n'
    again = tokenizer_from(json.loads(json.dumps(ours.state())))
    assert same_ids(again, theirs, messages, True) == 'b<|im_end|>\n'


GENERATION = (
    "{% for m in messages %}\n{{ '<|im_start|>' + m.role }}\n{% if m.role == 'assistant' %}\n"
    "{% generation %}\n{{ m.content + '<|im_end|>' }}\n{%- endgeneration %}\n{% else %}\n"
    "{{ m.content + '<|im_end|>' }}\n{% endif %}\n{% endfor %}\n"
    "{% if add_generation_prompt %}\n{{ '<|im_start|>assistant' }}\n{% endif %}")


@pytest.mark.parametrize('template', [
    '\n{{ bos_token }}' + CHATML, GENERATION, '{% if tools is not none %}TOOLS{% endif %}' + CHATML,
], ids=['a line break first', 'generation', 'tools'])
def test_details_of_templates(folder, template):
    theirs = theirs_of(gpt2_tokenizer(), eos_token='<|im_end|>', bos_token='<|begin|>',
                       chat_template=template, additional_special_tokens=['<|im_start|>'])
    theirs.save_pretrained('hf')
    for messages in MESSAGES[:2], MESSAGES:
        same_ids(tokenizer_of('hf'), theirs, messages, messages is MESSAGES)


def test_of_several_ends_the_one_that_the_template_writes(folder):
    theirs = theirs_of(gpt2_tokenizer(), eos_token='<|endoftext|>', chat_template=CHATML,
                       additional_special_tokens=['<|im_start|>', '<|im_end|>'])
    theirs.save_pretrained('hf')
    end = theirs.convert_tokens_to_ids('<|im_end|>')
    assert tokenizer_of('hf').eot == theirs.eos_token_id != end
    (folder / 'hf/generation_config.json').write_text(
        json.dumps({'eos_token_id': [theirs.eos_token_id, end]}), 'utf-8')
    assert tokenizer_of('hf').eot == end
    # A template of `eos_token` means the tokenizer's own, whatever else it names.
    theirs.chat_template = CHATML.replace("'<|im_end|>'", 'eos_token') + '{# not <|im_end|> #}'
    theirs.save_pretrained('hf')
    (folder / 'hf/generation_config.json').write_text(
        json.dumps({'eos_token_id': [theirs.eos_token_id, end]}), 'utf-8')
    assert tokenizer_of('hf').eot == theirs.eos_token_id
    same_ids(tokenizer_of('hf'), theirs, MESSAGES, True)


# --- talking


QUESTIONS = ('What is 2 + 2?\nWhat is ß?\n' + 'What is 3 + 3?\n' * 5 + '\n  \n'
             + '9' * 90 + '\nWhat is 1 + 1?')


def test_a_pipe_has_a_line_for_each_answer(taught):
    result = script('chat.py', '--out_dir=out', '--max_new_tokens=9', '--device=cpu',
                    input=QUESTIONS)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count('\n') == 7 and '␃' not in result.stdout
    assert result.stderr.count('\n') == 2  # two that have no answer
    assert "'ß'" in result.stderr and 'too many' in result.stderr


def test_answers_follow_from_the_seed(taught):
    def answers(*flags):
        return script('chat.py', '--out_dir=out', '--max_new_tokens=9', '--device=cpu',
                      '--dtype=float32', *flags, input=QUESTIONS).stdout

    assert answers() == answers() != answers('--seed=7')
    assert answers('--temperature=0') == answers('--top_k=1', '--seed=7')
    assert answers('--quantize=int8') and answers('--top_p=0.5')
    assert answers('--system=What is') != answers()


def in_terminal(*args, typed, end):
    """Type a line at each prompt of chat.py in a terminal: (its output, its exit code)."""
    pid, terminal = pty.fork()
    if not pid:
        os.execv(sys.executable, [sys.executable, os.path.join(ROOT, 'chat.py'), *args])
    shown, keys = b'', [*(line.encode() + b'\n' for line in typed), end]
    with open(terminal, 'r+b', buffering=0) as terminal, suppress(OSError):  # closed at the end
        for _ in range(300):
            if select.select([terminal], [], [], 5)[0]:
                if not (new := terminal.read(4096)):
                    break
                shown += new
            elif not keys:  # a Ctrl-C may come just before the prompt waits, and get lost
                keys = [end]
            while keys and shown.count(b'> ') > len(typed) + 1 - len(keys):
                terminal.write(keys.pop(0))
    return shown.decode(), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize('end', [b'\x03', b'\x04'], ids=['Ctrl-C', 'Ctrl-D'])
def test_a_terminal(taught, end):
    shown, code = in_terminal('--out_dir=out', '--max_new_tokens=9', '--device=cpu', '--top_k=1',
                              typed=['What is 2 + 2?', 'What is ß?', '', 'What is 2 + 2?'],
                              end=end)
    assert code == 0 and 'Traceback' not in shown and "'ß'" in shown
    answers = re.findall(r'2 \+ 2\?\r\n(.*?)\r\n', shown)
    assert len(answers) == 2 and answers[0] == answers[1] and '␃' not in answers[0]


def test_the_oldest_exchanges_are_dropped_never_the_question(folder, monkeypatch, capsys):
    write('qa.jsonl', [{'messages': [{'role': 'system', 'content': 'What'}, user(item['prompt']),
                                     assistant(item['response'])]} for item in qa(40)])
    prepare_chat.main(['qa.jsonl', '--dataset=qa'])
    teach()
    asked, encode = [], chat.question_ids

    def watched(tokenizer, question, history=()):
        ids = encode(tokenizer, question, history)
        asked.append((len(ids), tokenizer.decode(ids)))
        return ids

    monkeypatch.setattr(chat, 'question_ids', watched)
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(
        ''.join(f'What is {i}?\n' for i in range(9)).encode())))
    seen, stream = [], sample.stream

    def read(model, idx, *args):
        seen.append(idx.size(1))
        return stream(model, idx, *args)

    monkeypatch.setattr(sample, 'stream', read)
    chat.main(['--out_dir=out', '--max_new_tokens=9', '--device=cpu', '--system=What'])
    assert max(seen) <= 80 and len(seen) == 9
    final = {text.count('\n'): text for _, text in asked}
    assert all(text.startswith('system\nWhat␃user\n') for text in final.values())
    assert any('What is 7?␃assistant' in text and 'What is 8?' in text for _, text in asked)
    assert seen[-1] > seen[0]


def test_a_question_that_cannot_be_answered_is_not_the_last_one(taught, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(b'What is 1?\nWhat is 2?\n')))
    calls, stream = [], sample.stream

    def failing(*args):
        calls.append(args)
        if len(calls) == 1:
            raise UserError('too many')
        return stream(*args)

    monkeypatch.setattr(sample, 'stream', failing)
    chat.main(['--out_dir=out', '--max_new_tokens=9', '--device=cpu'])
    out, err = capsys.readouterr()
    assert err == '(too many)\n' and out.count('\n') == 1 and len(calls) == 2


def lengths_read(monkeypatch, typed, *flags):
    """Talk in a pipe: for each answer, (how many tokens are read first, how many may follow)."""
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(typed.encode())))
    seen, stream = [], sample.stream

    def read(model, idx, max_new_tokens, *args):
        seen.append((idx.size(1), max_new_tokens))
        return stream(model, idx, max_new_tokens, *args)

    monkeypatch.setattr(sample, 'stream', read)
    chat.main(['--out_dir=out', '--device=cpu', *flags])
    return seen


def test_a_question_that_is_too_long_ends_no_conversation(taught, monkeypatch, capsys):
    typed = 'What is 1?\n' + '9' * 90 + '\nWhat is 2?\n'
    (first, _), (second, _) = lengths_read(monkeypatch, typed, '--max_new_tokens=9')
    assert second > first + len('What is 1?') and 'too many' in capsys.readouterr().err


def test_an_answer_ends_with_the_context(taught, monkeypatch):
    for typed in 'What is 1?', 'What is ' + '9' * 40:
        ((read, most),) = lengths_read(monkeypatch, typed, '--max_new_tokens=500')
        assert read + most == 80  # or else it would slide, and the question would be forgotten


def test_closed_input_is_its_end(taught, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'stdin', None)
    with pytest.raises(SystemExit) as end:
        console.run(lambda argv: chat.main(['--out_dir=out', '--device=cpu']))
    assert end.value.code == 0 and capsys.readouterr() == ('', '')


@pytest.mark.parametrize('args, wrong', [
    (['--out_dir=none'], 'none'), (['--temperature=-1'], 'temperature'), (['--top_p=2'], 'top_p'),
    (['--max_new_tokens=0'], 'max_new_tokens'), (['--quantize=4'], 'int8'), (['--stop=a'], 'stop'),
])
def test_wrong_flags_are_one_line(taught, args, wrong):
    with pytest.raises(UserError, match=wrong):
        chat.main(args)


def test_a_model_of_plain_text_is_refused(tiny):
    train.train(train.TrainConfig(**TINY))
    with pytest.raises(UserError, match='prepare_chat.py'):
        chat.main(['--out_dir=out', '--device=cpu'])


def test_training_shows_an_answer_and_names_chat(asked, capsys):
    train.main(flags(**CHAT | dict(sample_start='What is 2 + 2?', sample_tokens=9, max_iters=3)))
    shown = capsys.readouterr().out
    assert re.search(r'^  \| What is 2 \+ 2\?\n  \| ?[^\n]*', shown, re.M)
    assert 'assistant' not in shown and '␃' not in shown
    assert re.search(r'^now: .*chat\.py --out_dir=out$', shown, re.M)


def test_a_model_of_text_learns_to_answer(asked):
    prepare_text.prepare('What is the lion? ' * 200, 'text')
    train.train(train.TrainConfig(**CHAT | dict(dataset='text', out_dir='text')))
    train.train(train.TrainConfig(**CHAT | dict(init_from='text')))
    model, tokenizer = load_model('out')
    assert tokenizer.chat_template == chat.TEMPLATE and tokenizer.decode([tokenizer.eot]) == '␃'
    assert model.config.vocab_size == tokenizer.vocab_size


# --- out to transformers


@pytest.mark.parametrize('kind', [
    dict(model='gpt'), dict(model='llama'), dict(model='llama', qk_norm=False)],
    ids=['gpt', 'qwen3', 'llama'])
def test_an_exported_model_chats_as_chat_does(asked, kind):
    transformers = pytest.importorskip('transformers')
    train.train(train.TrainConfig(**CHAT | kind | dict(max_iters=40, eval_interval=40)))
    export_hf.main(['--out_dir=out', '--to=hf'])
    theirs = transformers.AutoModelForCausalLM.from_pretrained('hf')
    tokenizer = transformers.AutoTokenizer.from_pretrained('hf')
    model, ours = load_model('out')
    assert tokenizer.chat_template == chat.TEMPLATE == tokenizer_of('hf').chat_template
    assert theirs.generation_config.eos_token_id == ours.eot == tokenizer.eos_token_id
    for messages in MESSAGES[:1], MESSAGES[:3]:
        assert same_ids(ours, tokenizer, messages, True) in ('', '4␃')
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors='pt', return_dict=True)
        new = theirs.generate(**prompt, max_new_tokens=9, do_sample=False)[0]
        ids = chat.question_ids(ours, messages[-1]['content'], messages[:-1])
        expected = model.generate(torch.tensor([ids]), 9, temperature=0)[0].tolist()
        answer, _, _ = ours.decode(expected[len(ids) :]).partition('␃')
        assert tokenizer.decode(new[len(ids) :]).partition('␃')[0] == answer
        if hasattr(tokenizer, 'parse_response'):  # as transformers' server does
            assert tokenizer.parse_response(
                new[len(ids) :], prefix=new[: len(ids)]) == assistant(answer)


def exported(*args):
    """transformers' tokenizer of an exported run, on a dataset that prepare_chat.py made so."""
    from transformers import AutoTokenizer

    write('qa.jsonl', qa(20))
    prepare_chat.main(['qa.jsonl', '--dataset=qa', *args])
    train.train(train.TrainConfig(**CHAT | dict(max_iters=1, sample_tokens=0)))
    export_hf.main(['--out_dir=out', '--to=new'])
    return AutoTokenizer.from_pretrained('new')


def test_a_tokenizer_without_a_template_exports_ours(folder):
    transformers = pytest.importorskip('transformers')
    theirs_of(gpt2_tokenizer(), eos_token='<|end|>', pad_token='<|pad|>', bos_token='<|begin|>',
              padding_side='left').save_pretrained('hf')
    (folder / 'hf/generation_config.json').write_text('{"eos_token_id": 2}', 'utf-8')
    tokenizer = exported('--tokenizer=hf')
    assert tokenizer.chat_template == chat.TEMPLATE and tokenizer.eos_token == '<|end|>'
    assert tokenizer.response_template['start_anchor'] == 'assistant\n'
    assert tokenizer.pad_token == '<|pad|>' and tokenizer.bos_token == '<|begin|>'  # as they were
    assert tokenizer.padding_side == 'left'
    generation = transformers.GenerationConfig.from_pretrained('new')
    assert generation.eos_token_id == tokenizer.eos_token_id == load_model('out')[1].eot


def test_an_end_that_only_the_generation_config_names_is_exported(folder):
    pytest.importorskip('transformers')
    theirs_of(gpt2_tokenizer()).save_pretrained('hf')
    (folder / 'hf/generation_config.json').write_text('{"eos_token_id": 50256}', 'utf-8')
    (folder / 'hf/config.json').write_text('{"vocab_size": 1}', 'utf-8')
    tokenizer = exported('--tokenizer=hf')
    ids = tokenizer.apply_chat_template(MESSAGES[:1], add_generation_prompt=True, return_dict=True)
    assert ids['input_ids'] == chat.question_ids(load_model('out')[1], MESSAGES[0]['content'])


def test_a_model_without_an_end_cannot_chat(asked, monkeypatch):
    train.train(train.TrainConfig(**CHAT | dict(max_iters=1, sample_tokens=0)))
    model, tokenizer = load_model('out')
    tokenizer.eot = None  # as of some Hugging Face folders
    monkeypatch.setattr(sample, 'load_model', lambda *_, **__: (model, tokenizer))
    with pytest.raises(UserError, match='never learned to answer'):
        chat.main(['--out_dir=out', '--device=cpu'])


def test_the_role_of_system_is_in_every_alphabet(folder):
    write('qa.jsonl', [{'prompt': f'soma {i}', 'response': str(i)} for i in range(20)])
    prepare_chat.main(['qa.jsonl', '--dataset=qa'])
    assert set('system') <= set(Dataset('qa', Ranks()).tokenizer.chars)


def test_an_edited_template_is_exported(folder, monkeypatch):
    pytest.importorskip('transformers')
    template = "{{ 'you answer ' + messages[0].role + '\n' }}" + chat.TEMPLATE
    for module in prepare_chat, export_hf:
        monkeypatch.setattr(module, 'TEMPLATE', template)
    tokenizer = exported()
    assert tokenizer.chat_template == template
    assert tokenizer.response_template['start_anchor'] == 'assistant\n'


def test_chat_reads_an_exported_folder(taught):
    pytest.importorskip('transformers')
    export_hf.main(['--out_dir=out', '--to=hf'])
    results = [script('chat.py', where, '--max_new_tokens=9', '--device=cpu', '--temperature=0',
                      '--dtype=float32', input=QUESTIONS).stdout
               for where in ('--out_dir=out', '--init_from=hf')]
    assert results[0] == results[1] and results[0].count('\n') == 7


def test_chat_with_an_instruct_folder(folder):
    """A Llama of another vocabulary, with a template and an end of its own."""
    transformers = pytest.importorskip('transformers')
    tokenizer = theirs_of(gpt2_tokenizer(), eos_token='<|im_end|>', bos_token='<s>',
                          chat_template='{{ bos_token }}' + CHATML,
                          additional_special_tokens=['<|im_start|>'])
    tokenizer.save_pretrained('instruct')
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64))
    theirs.save_pretrained('instruct')
    result = script('chat.py', '--init_from=instruct', '--max_new_tokens=5', '--device=cpu',
                    '--temperature=0', '--dtype=float32', input='Hello there\nAnd now?\n')
    assert result.returncode == 0, result.stderr
    prompt = tokenizer.apply_chat_template([user('Hello there')], add_generation_prompt=True,
                                           return_tensors='pt', return_dict=True)
    new = theirs.generate(prompt['input_ids'], max_new_tokens=5, do_sample=False)
    answer = tokenizer.decode(new[0, prompt['input_ids'].size(1) :]).split('<|im_end|>')[0]
    assert result.stdout.count('\n') == 2
    assert result.stdout.split('\n')[0] == console.printable(answer.strip().replace('\n', ' '))


# --- what the mask is for


def answers_right(out_dir, conversations, history=()):
    """The fraction of conversations whose answer the model gives, exactly."""
    model, tokenizer = load_model(out_dir)
    right = 0
    for question, answer in conversations:
        ids = chat.question_ids(tokenizer, question['content'], history)
        new = model.generate(torch.tensor([ids]), 20, temperature=0)[0, len(ids) :].tolist()
        right += tokenizer.decode(new).partition('␃')[0] == answer['content']
    return right / len(conversations)


def trained_to_answer(name, updates):
    """A small Llama in out-<name>, trained on the dataset `name`."""
    train.train(train.TrainConfig(
        dataset=name, out_dir=f'out-{name}', model='llama', n_layer=2, n_head=4, n_embd=96,
        tied=False, optimizer='muon', muon_lr=0.04, learning_rate=6e-3, min_lr=0.0, beta2=0.99,
        warmup_iters=20, batch_size=32, block_size=128, gradient_accumulation_steps=1,
        max_iters=updates, eval_interval=updates, eval_iters=20, log_interval=updates,
        sample_tokens=0, device='cpu', seed=1))


@pytest.mark.slow
def test_the_mask_teaches_to_answer_and_a_second_turn_is_as_good(folder):
    conversations = read_conversations([prepare_chat.QUESTIONS])
    unseen = conversations[int(0.9 * len(conversations)) :]
    for name in ('masked', 'whole'):
        prepare_chat.main([f'--dataset={name}'])
    for path in glob.glob('data/whole/*.mask'):
        mask = np.fromfile(path, np.uint8)
        np.where(mask == 2, 2, 1).astype(np.uint8).tofile(path)  # each token counts
    for name in ('masked', 'whole'):
        trained_to_answer(name, 900)
    masked, whole = answers_right('out-masked', unseen), answers_right('out-whole', unseen)
    second = np.mean([answers_right('out-masked', unseen, history) for history in unseen[:3]])
    print(f'exact match: {masked:.3f}, as a second turn {second:.3f}, without the mask {whole:.3f}')
    assert masked > whole + 0.1 and second > masked - 0.1
