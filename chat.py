"""Talk to a model that was trained on conversations.

    python chat.py --out_dir=out-chat
    python chat.py --out_dir=out-chat --system="Answer in Portuguese." --temperature=0
    python chat.py --out_dir=out-chat < questions.txt > answers.txt

The model sees the exchanges before. An empty line, which has no answer, begins a new conversation.
"""

import re
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

import console
import runtime
from configurator import override
from console import UserError, user_errors
from sample import SamplingConfig, load_to_sample, write
from tokenizer import TextStream

# A chat template, in Jinja, for tokenizers that have none: each message under its role, with the
# end-of-text token after it. Each dataset stores its own: after an edit, run prepare_chat.py again.
TEMPLATE = (r"{% for message in messages %}"
            r"{{ message.role + '\n' + message.content | trim + eos_token }}"
            r"{% endfor %}{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}")


@dataclass
class ChatConfig(SamplingConfig):
    system: str = ''  # a message that begins each conversation, if the model was trained with one


@lru_cache
def compiled(template):
    """The function that renders a template; in a sandbox, since it may be a stranger's."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # it comes with torch

    def refuse(message):
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(  # as transformers', without its dates and tojson
        trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols'])
    environment.globals['raise_exception'] = refuse
    template = re.sub(r'{%(-?)\s*(end)?generation\s*(-?)%}', r'{#\1 \3#}', template)  # its own tags
    return environment.from_string(template).render


def render(tokenizer, messages):
    """A conversation as one text; if it ends with a question, the header of an answer follows.

    messages: dicts with `role` (system, user or assistant) and `content`. Raises UserError.
    """
    from jinja2 import TemplateError

    end = tokenizer.decode([tokenizer.eot])
    if marked := [message['content'] for message in messages if end in message['content']]:
        raise UserError(f'{marked[0][:80]!r} contains {end!r}, which ends messages: leave it out')
    with user_errors((TemplateError, ValueError, TypeError), 'the chat template refuses '
                     f'{str(messages)[:80]}', 'change the roles or their order'):
        return compiled(tokenizer.chat_template)(
            messages=messages, eos_token=end, tools=None, documents=None,
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
        if 'assistant' not in [neighbour['role'] for neighbour in messages[i - 1 : i + 1]]:
            continue  # no answer begins or ends here; many templates refuse a lone system message
        part = render(tokenizer, messages[:i])  # after a question, with the header of an answer
        if not text.startswith(part):
            raise UserError('the chat template changes messages when others follow: use another '
                            'tokenizer, or conversations of one question and one answer')
        part_ids = tokenizer.encode_special(part)[: len(ids)]
        # This message ends where the two encodings differ, or where the shorter one ends.
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
    print(end='\n' * in_terminal)  # the shell's prompt has a line of its own


@runtime.out_of_memory('use --quantize=int8')
def main(argv):
    """Answer each line of standard input, until it ends."""
    cfg = override(ChatConfig(), argv, usage=__doc__)
    runtime.set_speed_options()
    model, tokenizer, generator, amp = load_to_sample(cfg)
    if not tokenizer.chat_template or tokenizer.eot is None:
        raise UserError('this model never learned to answer: use sample.py, or see prepare_chat.py')
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
            kept = history
            while len(ids := question_ids(tokenizer, question, system + kept)) > longest and kept:
                kept = kept[2:]  # without the oldest question and its answer
            if len(ids) >= block_size:
                raise UserError(f'{len(ids)} tokens are too many for a context of {block_size}: '
                                'shorten the question, or --system')
            # An answer ends with the context, or else the question would slide out of it.
            limited = replace(cfg, max_new_tokens=min(cfg.max_new_tokens, block_size - len(ids)))
            answer = TextStream('', ids, tokenizer, eot=tokenizer.eot)
            with amp:
                for new in write(limited, model, tokenizer, ids, [answer], generator):
                    print(console.printable(new) * in_terminal, end='', flush=True)
        except UserError as error:  # also for a letter that the alphabet lacks
            print(f'({error})', file=sys.stderr)
            continue
        text = answer.text.strip()
        print('' if in_terminal else console.printable(text.replace('\n', ' ')), flush=True)
        history = kept + [dict(role='user', content=question), dict(role='assistant', content=text)]


if __name__ == '__main__':
    console.run(main)
