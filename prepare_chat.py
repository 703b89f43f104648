"""Conversations to a dataset: as prepare_text.py, with a .mask beside each .bin.

    python prepare_chat.py my.jsonl --dataset=my_chat   # characters; or --tokenizer=gpt2, =FOLDER
    python prepare_chat.py --dataset=wizard_chat   # the questions about Oz that come with ozGPT

Each line of a .jsonl file, or each element of a .json list, is a conversation in one of these
forms (`input` may be missing; the first of the `messages` may have the role `system`):

    {"prompt": "2 + 2?", "response": "4"}        # or "completion"
    {"instruction": "Spell the word.", "input": "Toto", "output": "T-o-t-o"}
    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}

Repeated conversations, and those with an empty message, are left out. The others are sorted by a
hash, so that the order in the files doesn't matter; the last ones become the test and val splits.
"""

import hashlib
import json
import re
from pathlib import Path

import numpy as np

import console
from chat import TEMPLATE, compiled, encode_chat
from configurator import override
from console import Progress, UserError, user_errors
from prepare_text import TextConfig, check_name, fractions, make_tokenizer, read_text, write_dataset
from tokenizer import END, CharTokenizer

QUESTIONS = Path(__file__).with_name('data') / 'oz_questions.jsonl'


def messages_of(item):
    """The messages of a conversation in any form. Raises ValueError, KeyError or TypeError."""
    for ask, reply in ('prompt', 'response'), ('prompt', 'completion'), ('instruction', 'output'):
        if ask in item and reply in item:
            asked = [text for text in (item[ask], item.get('input')) if text]
            item = {'messages': [{'role': 'user', 'content': '\n\n'.join(asked)},
                                 {'role': 'assistant', 'content': item[reply]}]}
    messages = [{'role': m['role'], 'content': m['content'].strip()} for m in item['messages']]
    roles = ' '.join(message['role'] for message in messages)
    if not re.fullmatch('(system )?user assistant( user assistant)*', roles):
        raise ValueError(f'user and assistant must take turns, not "{roles}"')
    return messages


def read_conversations(paths, errors='strict'):
    """The conversations of files, lists of messages, each once, in the order of their hashes."""
    kinds = ValueError, LookupError, TypeError, AttributeError, RecursionError
    conversations, remedy = [], 'correct it; --help shows the forms'
    for path in paths:
        text = read_text(path, errors)
        is_list = text.lstrip().startswith('[')
        with user_errors(kinds, f'{path} is no list in JSON', remedy):
            items = json.loads(text) if is_list else text.split('\n')
        for number, item in enumerate(items, 1):
            if not is_list and not item.strip():
                continue
            where = f'{path}, {"element" if is_list else "line"} {number}'
            with user_errors(kinds, f'{where}: no conversation', remedy):
                conversations.append(messages_of(item if is_list else json.loads(item)))
    whole = [messages for messages in conversations if all(m['content'] for m in messages)]
    found = {hashlib.sha256(json.dumps(messages).encode()).digest(): messages for messages in whole}
    if len(found) < len(conversations):
        print(f'left out: {len(conversations) - len(whole)} with an empty message, '
              f'{len(whole) - len(found)} repeated')
    return [found[key] for key in sorted(found)]


def main(argv):
    inputs = [arg for arg in argv if not arg.startswith('-')] or [QUESTIONS]
    cfg = override(TextConfig(), [arg for arg in argv if arg.startswith('-')], usage=__doc__)
    check_name(cfg.dataset)
    chats = read_conversations(inputs, cfg.errors)
    texts = (compiled(TEMPLATE)(messages=messages, eos_token=END) for messages in chats)
    encoder = make_tokenizer(cfg.tokenizer, texts)
    if isinstance(encoder, CharTokenizer):
        encoder = CharTokenizer(encoder.chars + END)
    if encoder.eot is None:
        raise UserError(f'the tokenizer {cfg.tokenizer} has no token that ends a text: use another')
    encoder.chat_template = encoder.chat_template or TEMPLATE
    files, progress = {}, Progress()
    for split, (begin, end) in fractions(len(chats), cfg.val_fraction, cfg.test_fraction).items():
        files |= {f'{split}.bin': [], f'{split}.mask': []}
        for number, messages in enumerate(chats[begin:end], begin):
            progress.show_progress(number / len(chats), f'{number:,} conversations')
            ids, learned = encode_chat(encoder, messages)
            files[f'{split}.bin'].append(ids)
            files[f'{split}.mask'].append(np.append(2, learned[1:]))  # 2: a conversation begins
    write_dataset(cfg.dataset, files, encoder, ' '.join(Path(path).name for path in inputs),
                  hashlib.sha256(json.dumps(chats).encode()).hexdigest())


if __name__ == '__main__':
    console.run(main)
