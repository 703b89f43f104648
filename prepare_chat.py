"""Conversations to a dataset: as prepare_text.py, with a .mask beside each .bin.

    python prepare_chat.py my.jsonl --dataset=my_chat                      # characters
    python prepare_chat.py my.jsonl --dataset=my_chat --tokenizer=gpt2
    python prepare_chat.py my.jsonl --dataset=my_chat --tokenizer=FOLDER   # a Hugging Face folder's
    python prepare_chat.py --dataset=wizard_chat   # the questions about Oz that come with ozGPT

Each line of a .jsonl file, or each element of a .json list, is a conversation in one of these
forms. An `instruction` may have an `input`; `messages` may begin with one of the role `system`:

    {"prompt": "2 + 2?", "response": "4"}
    {"prompt": "2 + 2?", "completion": "4"}
    {"instruction": "Spell the word.", "input": "Toto", "output": "T-o-t-o"}
    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}

Repeated conversations, and those with an empty message, are left out. The others are sorted by a
hash, so that the order in the files doesn't matter; the last ones become the test and val splits.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

import console
from chat import TEMPLATE, encode_chat
from configurator import override
from console import Progress, UsageError, UserError
from prepare_text import (
    TextConfig, check_name, fractions, make_tokenizer, read_text, write_dataset,
)
from tokenizer import END, CharTokenizer

QUESTIONS = Path(__file__).with_name('data') / 'oz_questions.jsonl'
# What questions and answers are called, by the form of a conversation.
FORMS = ('prompt', 'response'), ('prompt', 'completion'), ('instruction', 'output')


def messages_of(item):
    """The messages of a conversation in any form. Raises ValueError, KeyError or TypeError."""
    for question, answer in FORMS:
        if question in item and answer in item:
            asked = [text for text in (item[question], item.get('input')) if text]
            item = {'messages': [{'role': 'user', 'content': '\n\n'.join(asked)},
                                 {'role': 'assistant', 'content': item[answer]}]}
    messages = [{'role': m['role'], 'content': m['content'].strip()} for m in item['messages']]
    roles = [message['role'] for message in messages]
    turns = roles[roles[:1] == ['system'] :]
    if not turns or turns != ['user', 'assistant'] * (len(turns) // 2):
        raise ValueError(f'user and assistant must take turns, in {roles}')
    return messages


def read_conversations(paths, errors='strict'):
    """The conversations of files, lists of messages, each once, in the order of their hashes."""
    found, empty, total = {}, 0, 0
    for path in paths:
        text = read_text(path, errors)
        is_list = text.lstrip().startswith('[')
        for number, part in enumerate([text] if is_list else text.split('\n'), 1):
            where = f'{path}, line {number}'
            try:
                items = json.loads(part.strip() or '[]')
                for index, item in enumerate(items if isinstance(items, list) else [items], 1):
                    where = f'{path}, element {index}' if is_list else where
                    messages, total = messages_of(item), total + 1
                    if all(message['content'] for message in messages):
                        found[hashlib.sha256(json.dumps(messages).encode()).digest()] = messages
                    else:
                        empty += 1
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise UserError(f'{where}: no conversation ({type(error).__name__}: {error}): '
                                'correct it; --help shows the forms') from None
    if total > len(found):
        print(f'left out: {empty} with an empty message, {total - empty - len(found)} repeated')
    return [found[key] for key in sorted(found)]


def prepare(conversations, dataset, tokenizer='char', val_fraction=0.1, test_fraction=0.0,
            source=''):
    """Write data/<dataset>, made of lists of messages; returns what meta.json says."""
    contents = [message['content'] for messages in conversations for message in messages]
    encoder = make_tokenizer(tokenizer, [f'system user assistant\n{END}', *contents])
    if isinstance(encoder, CharTokenizer):  # another dataset's may have no END
        encoder = CharTokenizer(encoder.chars + END)
    if encoder.eot is None:
        raise UserError(f'the tokenizer {tokenizer} has no token that ends a text: use another')
    encoder.chat_template = encoder.chat_template or TEMPLATE
    files, progress = {}, Progress()
    for split, (begin, end) in fractions(len(conversations), val_fraction, test_fraction).items():
        files |= {f'{split}.bin': [], f'{split}.mask': []}
        for number, messages in enumerate(conversations[begin:end], begin):
            progress.show_progress(number / len(conversations), f'{number:,} conversations')
            ids, learned = encode_chat(encoder, messages)
            files[f'{split}.bin'].append(ids)
            files[f'{split}.mask'].append(np.append(2, learned[1:]))  # 2: a conversation begins
    text = json.dumps(conversations)
    return write_dataset(dataset, files, encoder, source, hashlib.sha256(text.encode()).hexdigest())


def main(argv):
    inputs = [arg for arg in argv if not arg.startswith('-')] or [QUESTIONS]
    cfg = override(TextConfig(), [arg for arg in argv if arg.startswith('-')], usage=__doc__)
    if not cfg.dataset:
        raise UsageError('--dataset is needed: for example --dataset=my_chat')
    check_name(cfg.dataset)
    prepare(read_conversations(inputs, cfg.errors), cfg.dataset, cfg.tokenizer, cfg.val_fraction,
            cfg.test_fraction, source=' '.join(Path(path).name for path in inputs))


if __name__ == '__main__':
    console.run(main)
