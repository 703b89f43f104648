"""Talk to a model that was trained on conversations.

    python chat.py --out_dir=out-chat
    python chat.py --out_dir=out-chat --system="Answer in Portuguese." --temperature=0
    python chat.py --out_dir=out-chat < questions.txt > answers.txt

An empty line begins a new conversation; it has no answer, and nor has a question that fails.
"""

import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

import console
import runtime
from configurator import override
from console import UserError, user_errors
from sample import SamplingConfig, load_to_sample, write
from tokenizer import TextStream

# A chat template, in Jinja, for tokenizers that have none: each message under its role, with the
# end-of-text token after it. A dataset keeps it: after an edit, run prepare_chat.py again.
TEMPLATE = (
    r"{% for message in messages %}"
    r"{{ message.role + '\n' + message.content | trim + eos_token }}"
    r"{% endfor %}{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)


@dataclass
class ChatConfig(SamplingConfig):
    system: str = ''  # a message that begins each conversation, if the model was trained with one


@lru_cache
def compiled(template):
    """The function that renders a template; in a sandbox, since it may be a stranger's."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # it comes with torch

    def refuse(message):
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(  # as transformers sets it up
        trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols'])
    environment.globals['raise_exception'] = refuse
    template = re.sub(r'{%-?\s*(end)?generation\s*-?%}', '', template)  # transformers' own tags
    return environment.from_string(template).render


def render(tokenizer, messages):
    """One text of a conversation; after a question, with the header of an answer. Raises UserError.

    messages: dicts with `role` (system, user or assistant) and `content`.
    """
    from jinja2 import TemplateError

    end = tokenizer.decode([tokenizer.eot])
    if any(end in message['content'] for message in messages):
        raise UserError(f'a message contains {end!r}, which ends messages: leave it out')
    with user_errors((TemplateError, ValueError, TypeError), 'the chat template refuses '
                     f'{str(messages)[:80]}', 'change the roles or their order'):
        return compiled(tokenizer.chat_template)(
            messages=messages, eos_token=end,
            add_generation_prompt=messages[-1]['role'] != 'assistant')


def encode_chat(tokenizer, messages):
    """(ids, learned) of a conversation: arrays (T,), int64 and bool.

    ids: as by transformers' `apply_chat_template`. learned: whether the assistant writes an id:
    true for its answers and their ends, not for headers. Raises UserError.
    """
    text = render(tokenizer, messages)
    ids = np.array(tokenizer.encode_special(text), int)
    learned, end = np.zeros(len(ids), bool), 0
    for i, message in enumerate(messages, 1):
        if message['role'] == 'system':  # many templates refuse it alone
            continue
        part = render(tokenizer, messages[:i])  # after a question, with the header of an answer
        if not text.startswith(part):
            raise UserError("the tokenizer's chat template changes earlier messages when others "
                            'follow: use conversations of one question and one answer')
        part_ids = tokenizer.encode_special(part)[: len(ids)]
        # This message ends where the encodings differ.
        begin, end = end, np.append(ids[: len(part_ids)] == part_ids, False).argmin()
        learned[begin:end] = message['role'] == 'assistant'
    return ids, learned


def question_ids(tokenizer, question, history=()):
    """A list of ids, to be continued by the answer. history: earlier messages."""
    messages = [*history, {'role': 'user', 'content': question.strip()}]
    return tokenizer.encode_special(render(tokenizer, messages)).tolist()


def questions(in_terminal):
    """Yield the lines that the user types, or those of a pipe, without spaces around them."""
    sys.stdin.reconfigure(encoding='utf-8-sig', errors='replace')
    if in_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401, with it, input() understands the arrow keys
        print('An empty line begins a new conversation; Ctrl-C ends.')
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            yield input('> ' if in_terminal else '').strip()
    if in_terminal:
        print()  # the shell's prompt has a line of its own


@runtime.out_of_memory('use --quantize=int8')
def main(argv):
    """Answer each line of standard input, until it ends."""
    cfg = override(ChatConfig(), argv, usage=__doc__)
    runtime.set_speed_options()
    model, tokenizer, generator, amp = load_to_sample(cfg)
    if not tokenizer.chat_template:
        raise UserError(f'this {type(model).__name__} was not trained on conversations: use '
                        'sample.py, or train it on what prepare_chat.py made')
    system = [{'role': 'system', 'content': cfg.system}] if cfg.system else []
    in_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    block_size = model.config.block_size
    longest = block_size - min(cfg.max_new_tokens, block_size // 4)  # leaves room for an answer
    history = []  # messages: a question, its answer, the next question ...
    for question in questions(in_terminal):
        if not question:
            history = []
            continue
        try:
            while (len(ids := question_ids(tokenizer, question, system + history)) > longest
                   and history):
                history = history[2:]  # forget the oldest question and its answer
            if len(ids) >= block_size:
                raise UserError(f'{len(ids)} tokens are too many for a context of {block_size}: '
                                'ask less at once')
            answer = TextStream('', ids, tokenizer, eot=tokenizer.eot)
            with amp:
                for new in write(cfg, model, tokenizer, ids, [answer], generator):
                    if in_terminal:
                        print(console.printable(new), end='', flush=True)
        except UserError as error:  # also for a letter that the alphabet lacks
            print(f'({error})', file=sys.stderr)
            continue
        text = answer.text.strip()
        print('' if in_terminal else console.printable(text.replace('\n', ' ')), flush=True)
        history += [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': text}]


if __name__ == '__main__':
    console.run(main)
