"""Conversations to a dataset: as prepare_text.py, with a .mask beside each .bin.

    python prepare_chat.py my.jsonl --dataset=my_chat   # characters; or --tokenizer=gpt2, =FOLDER
    python prepare_chat.py --dataset=wizard_chat   # the questions about Oz that come with ozGPT

Each line of a .jsonl file, or each element of a .json list, is a conversation in one of these
forms (`input` may be missing; the first of the `messages` may have the role `system`):

    {"prompt": "2 + 2?", "response": "4"}        # or "completion"
    {"instruction": "Spell the word.", "input": "Toto", "output": "T-o-t-o"}
    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}

Repeated conversations, and those with an empty message, are left out. The others are sorted by a
hash, so that the order in the files doesn't matter. The last ones become val, or val and test.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

import console
from chat import TEMPLATE, compiled, encode_chat
from configurator import override
from console import UserError, user_errors
from prepare_text import TextConfig, check_name, fractions, make_tokenizer, read_text, write_dataset
from tokenizer import END, CharTokenizer

QUESTIONS = Path(__file__).with_name('data') / 'oz_questions.jsonl'


def messages_of(item):
    """The messages of a conversation in any form. Raises ValueError, KeyError or TypeError."""
    for ask, reply in ('prompt', 'response'), ('prompt', 'completion'), ('instruction', 'output'):
        if ask in item and reply in item:
            asked = [text for text in (item[ask], item.get('input')) if text not in (None, '')]
            item = {'messages': [{'role': 'user', 'content': '\n\n'.join(asked)},
                                 {'role': 'assistant', 'content': item[reply]}]}
    messages = [{'role': m['role'], 'content': m['content'].replace('\r\n', '\n').strip()}
                for m in item['messages']]
    ''.join(message['content'] for message in messages).encode()  # not half a surrogate pair
    roles = [message['role'] for message in messages]
    turns = roles[roles[:1] == ['system'] :]
    if not turns or turns != ['user', 'assistant'] * (len(turns) // 2):
        raise ValueError(f'user and assistant must take turns, not "{" ".join(roles)}"')
    return messages


def read_conversations(paths, errors='strict'):
    """The conversations of files, lists of messages, each once, in the order of their hashes."""
    mistakes = ValueError, LookupError, TypeError, AttributeError, RecursionError
    conversations, remedy = [], 'correct it; --help shows the forms'
    for path in paths:
        text = read_text(path, errors)
        what, lines = 'line', text.split('\n')
        if text.lstrip().startswith('['):
            with user_errors(mistakes, f'{path} is no list in JSON', remedy):
                what, lines = 'element', [json.dumps(item) for item in json.loads(text)]
        for number, line in enumerate(lines, 1):
            if line.strip():
                with user_errors(mistakes, f'{path}, {what} {number}: no conversation', remedy):
                    conversations.append(messages_of(json.loads(line)))
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
        encoder = CharTokenizer(encoder.chars + END + 'system')  # the role that --system adds
    if encoder.eot is None:
        raise UserError(f'the tokenizer {cfg.tokenizer} has no token that ends a text: use another')
    encoder.chat_template, files = encoder.chat_template or TEMPLATE, {}
    for split, (begin, end) in fractions(len(chats), cfg.val_fraction, cfg.test_fraction).items():
        pairs = [encode_chat(encoder, messages) for messages in chats[begin:end]]
        if not all(encoder.eot in ids[learned] for ids, learned in pairs):
            raise UserError(f'answers must end with {encoder.decode([encoder.eot])!r}: edit the '
                            'chat template, or eos_token in tokenizer_config.json')
        files[f'{split}.bin'] = [ids for ids, _ in pairs]
        files[f'{split}.mask'] = [np.append(2, learned[1:]) for _, learned in pairs]  # 2: the first
    write_dataset(cfg.dataset, files, encoder, ' '.join(Path(path).name for path in inputs),
                  hashlib.sha256(json.dumps(chats).encode()).hexdigest())


if __name__ == '__main__':
    console.run(main)
