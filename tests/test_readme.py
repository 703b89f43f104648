"""What the READMEs name is there: files, functions, settings and commands."""

import ast
import glob
import os
import re
import shlex
import textwrap
from dataclasses import fields

import pytest
import torch
from conftest import ROOT

import bench
import export_hf
import plot_loss
import prepare_openwebtext
import prepare_shakespeare_char
import prepare_text
import prepare_wizard_char
import sample
import train

CONFIGS = {
    'train.py': train.TrainConfig, 'sample.py': sample.SampleConfig, 'bench.py': bench.BenchConfig,
    'prepare_text.py': prepare_text.TextConfig, 'plot_loss.py': plot_loss.PlotConfig,
    'prepare_wizard_char.py': prepare_wizard_char.WizardConfig,
    'prepare_shakespeare_char.py': prepare_shakespeare_char.ShakespeareConfig,
    'prepare_openwebtext.py': prepare_openwebtext.OpenWebTextConfig,
    'export_hf.py': export_hf.ExportConfig,
}
READMES = sorted(glob.glob(os.path.join(ROOT, 'README*.md')))
MADE = ('out', 'data/', 'ckpt.pt', 'best.pt', 'log.csv', 'loss.png', 'meta.', 'my.txt',
        'train.bin', 'val.bin', 'test.bin', 'prompt.txt', 'wizard-hf', 'config.json',
        'model.safetensors')
OZ = 'python train.py config/train_wizard_char.py '  # what the READMEs define `oz` as
# What ours doesn't have.
NANOGPT = {'configure_optimizers', 'crop_block_size', 'estimate_mfu', 'get_num_params'}
BLOCK = r'^ *```\w*\n(.*?)^ *```'  # of code; some stand within a list
FIGURE = r'\d+[.,]\d+|\{\{\w+\}\}'  # or the key of one that is still to be measured


def text_of(path):
    with open(path, encoding='utf-8') as file:
        return file.read()


def code_of(text):
    """Every line of the code blocks, and everything between backquotes."""
    blocks = ''.join(re.findall(BLOCK, text, re.M | re.S))
    lines = re.sub(r'\\\n|&&\n', ' ', blocks).split('\n')
    inline = re.findall(r'`([^`]+)`', re.sub(BLOCK, '', text, flags=re.M | re.S))
    pieces = [' '.join(piece.split()) for piece in lines + inline]
    return [re.sub(r'^oz (?=--)', OZ, piece).replace(' oz --', f' {OZ}--') for piece in pieces]


def names_in_source():
    """Every function, class, method and upper-case name of the scripts."""
    names = set()
    for path in glob.glob(os.path.join(ROOT, '*.py')):
        for node in ast.walk(ast.parse(text_of(path))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Assign):
                names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


@pytest.fixture(params=READMES, ids=os.path.basename)
def readme(request):
    return text_of(request.param)


def test_links_lead_somewhere(readme):
    anchors = {'#' + re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-')
               for heading in re.findall(r'^#+ (.*)', readme, re.M)}
    for target in re.findall(r'\]\(([^)]+)\)', readme):
        is_there = os.path.exists(os.path.join(ROOT, target))
        assert is_there or target in anchors or target.startswith('https://'), target


def test_files_exist(readme):
    pattern = r'(?<!\S)[\w/.-]+\.(?:py|txt|md|ini|csv|json|pt|bin)(?![\w.])'
    found = {name for code in code_of(readme) for name in re.findall(pattern, code)}
    assert 'config/train_wizard_char.py' in found
    for name in found:
        if not any(made in name for made in MADE):
            assert os.path.exists(os.path.join(ROOT, name)), name


def test_commands_have_the_flags_they_are_given(readme):
    seen = 0
    for code in code_of(readme):
        for match in re.finditer(r'([\w/]+\.py)((?: +(?!&&|;|#)\S+)*)', code):
            script, rest = match.groups()
            if script not in CONFIGS:
                continue
            known = {field.name for field in fields(CONFIGS[script])} | {'help'}
            for flag in re.findall(r'(?<= )--([\w-]+)', rest):
                assert flag.replace('-', '_') in known, f'{script} --{flag}'
                seen += 1
    assert seen > 20


def test_flags_by_themselves_exist_somewhere(readme):
    known = {field.name for config in CONFIGS.values() for field in fields(config)}
    torchrun = {'standalone', 'nproc_per_node', 'nnodes', 'node_rank', 'master_addr',
                'master_port'}
    for code in code_of(readme):
        if code.startswith('--'):
            for flag in re.findall(r'(?:^|(?<= ))--([\w-]+)', code):
                assert flag.replace('-', '_') in known | torchrun | {'help'}, flag


def test_functions_and_classes_exist(readme):
    names = names_in_source()
    found = {code.removesuffix('()') for code in code_of(readme) if re.fullmatch(
        r'(?:[A-Z]\w*\.)?(?:[A-Z][A-Za-z]+|[a-z]+_[a-z_]+|[A-Z_]{4,})(?:\(\))?', code)}
    assert {'CharTokenizer', 'sample_from', 'MODEL_SIZES'} <= found
    settings = {field.name for config in CONFIGS.values() for field in fields(config)}
    for name in found - NANOGPT - {'TRAINING'}:
        if name.startswith('F.'):
            assert hasattr(torch.nn.functional, name[2:]), name
        else:
            assert name.split('.')[-1] in names | settings, name


def test_programs_are_python(readme):
    programs = re.findall(r'^ *```python\n(.*?)^ *```', readme, re.M | re.S)
    assert programs
    for program in programs:
        for node in ast.walk(ast.parse(textwrap.dedent(program))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if os.path.exists(os.path.join(ROOT, f'{node.value.id}.py')):
                    assert node.attr in names_in_source(), node.attr


def test_the_first_two_commands_stand_alone(readme):
    blocks = re.findall(r'^```sh\n(.*?)^```', readme, re.M | re.S)
    assert 'config/train_wizard_char.py' in blocks[0] and 'pytest' in blocks[1]
    for block in blocks[:2]:
        words = shlex.split(block)
        assert words[:4] == ['python3', '-m', 'venv', '.venv'] and 'requirements.txt' in words


def test_both_languages_say_the_same():
    """The same commands, figures and steps in the same order."""
    pages = [text_of(path) for path in READMES]
    assert len(pages) == 2
    blocks = [[re.sub('# .*', '', block) for block in re.findall(BLOCK, page, re.M | re.S)]
              for page in pages]
    assert blocks[0] == blocks[1]
    headings = [len(re.findall(r'^#+ ', page, re.M)) for page in pages]
    assert headings[0] == headings[1]
    figures = [sorted(re.findall(FIGURE, page.replace(',', '.'))) for page in pages]
    assert figures[0] == figures[1]
