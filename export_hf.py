"""A checkpoint as a Hugging Face folder, tokenizer included: pip install transformers

    python export_hf.py --out_dir=out-wizard-char --to=wizard-hf
    python sample.py --init_from=wizard-hf --start="Dorothy"

Whatever runs GPT-2 from such a folder runs this one: transformers and its server, vLLM and others.
"""

import os
import shutil
from dataclasses import dataclass

import console
from configurator import override
from console import UsageError, UserError
from model import GPT
from sample import SampleConfig, load


@dataclass
class ExportConfig:
    out_dir: str = 'out'  # the folder that train.py wrote, or a checkpoint
    to: str = ''  # the folder to make


def main(argv):
    cfg = override(ExportConfig(), argv, usage=__doc__)
    if not cfg.to or os.path.exists(cfg.to):
        raise UsageError(f'--to={cfg.to} must name a folder that is not there yet')
    model, tokenizer = load(SampleConfig(out_dir=cfg.out_dir))
    if not isinstance(model, GPT):
        raise UserError(f'a {type(model).__name__} has no Hugging Face form: export a GPT')
    unfinished = f'{cfg.to}.tmp'
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        with console.blame_user():
            model.save_pretrained(unfinished, tokenizer)
            os.rename(unfinished, cfg.to)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f'{cfg.to}: {", ".join(sorted(os.listdir(cfg.to)))}')


if __name__ == '__main__':
    console.run(main)
