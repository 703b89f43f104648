"""The documents name what exists: files, functions, settings, commands; both languages agree."""

import ast
import glob
import json
import os
import re
import shlex
import textwrap
from dataclasses import fields

import pytest
import torch
from conftest import ROOT

import bench
import chat
import export_hf
import plot_loss
import prepare_openwebtext
import prepare_text
import sample
import train

CONFIGS = {
    'train.py': train.TrainConfig, 'sample.py': sample.SampleConfig, 'bench.py': bench.BenchConfig,
    'prepare_text.py': prepare_text.TextConfig, 'plot_loss.py': plot_loss.PlotConfig,
    'prepare_wizard_char.py': prepare_text.FetchConfig,
    'prepare_shakespeare_char.py': prepare_text.FetchConfig,
    'prepare_openwebtext.py': prepare_openwebtext.OpenWebTextConfig,
    'prepare_chat.py': prepare_text.TextConfig, 'chat.py': chat.ChatConfig,
    'export_hf.py': export_hf.ExportConfig,
}
READMES, TUTORIALS = (sorted(glob.glob(os.path.join(ROOT, f'{name}*.md')))
                      for name in ('README', 'TUTORIAL'))
NOTES = os.path.join(ROOT, 'NOTES.md')
MADE = ('out', 'data/', 'ckpt.pt', 'best.pt', 'log.csv', 'loss.png', 'meta.', 'my.txt',
        'train.bin', 'val.bin', 'test.bin', 'prompt.txt', 'wizard-hf', 'config.json',
        'model.safetensors', 'try.py')
OZ = 'python train.py config/train_wizard_char.py '  # the TUTORIALs define `oz` as this
# Names that only nanoGPT has.
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


def each(*paths):
    """Parametrize a test with documents."""
    return pytest.mark.parametrize('path', paths, ids=os.path.basename)


def anchors_of(path):
    """The anchors that GitHub makes of a document's headings."""
    return {re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-')
            for heading in re.findall(r'^#+ (.*)', text_of(path), re.M)}


def links_of(path):
    """(file, anchor) of each link within the project."""
    targets = re.findall(r'\]\(([^)]+)\)', text_of(path))
    return [target.partition('#')[::2] for target in targets if '://' not in target]


@each(*READMES, *TUTORIALS, NOTES)
def test_links_lead_somewhere(path):
    for name, anchor in links_of(path):
        target = os.path.join(ROOT, name) if name else path
        assert os.path.exists(target), name
        assert not anchor or anchor in anchors_of(target), anchor


@each(*READMES, *TUTORIALS)
def test_documents_lead_to_each_other(path):
    """To the other language, to the other document of the same language, and to the notes."""
    name, language = re.fullmatch(r'([A-Z]+)(.*)', os.path.basename(path)).groups()
    other = {'README': 'TUTORIAL', 'TUTORIAL': 'README'}[name]
    other_language = {'.md': '.pt-BR.md', '.pt-BR.md': '.md'}[language]
    expected = {other + language, name + other_language, 'NOTES.md'}
    assert expected <= {file for file, _ in links_of(path)}


@each(*READMES, *TUTORIALS, NOTES)
def test_files_exist(path):
    pattern = r'(?<!\S)[\w/.-]+\.(?:py|txt|md|ini|csv|json|pt|bin)(?![\w.])'
    found = {name for code in code_of(text_of(path)) for name in re.findall(pattern, code)}
    assert found
    for name in found:
        if not any(made in name for made in MADE):
            assert os.path.exists(os.path.join(ROOT, name)), name


@each(*READMES, *TUTORIALS, NOTES)
def test_commands_have_the_flags_they_are_given(path):
    seen = 0
    for code in code_of(text_of(path)):
        for match in re.finditer(r'([\w/]+\.py)((?: +(?!&&|;|#)\S+)*)', code):
            script, rest = match.groups()
            if script not in CONFIGS:
                continue
            known = {field.name for field in fields(CONFIGS[script])} | {'help'}
            for flag in re.findall(r'(?<= )--([\w-]+)', rest):
                assert flag.replace('-', '_') in known, f'{script} --{flag}'
                seen += 1
    assert seen > 10


def test_the_notebook_is_short_and_its_commands_exist():
    notebook = json.loads(text_of(os.path.join(ROOT, 'colab.ipynb')))
    assert len(notebook['cells']) <= 10
    seen = 0
    for cell in notebook['cells']:
        assert not cell.get('outputs') and not cell.get('execution_count')
        for script, rest in re.findall(r'^!python (\S+)(.*)', ''.join(cell['source']), re.M):
            known = {field.name for field in fields(CONFIGS[script])}
            flags = re.findall(r'(?<= )--([\w-]+)', rest)
            assert {flag.replace('-', '_') for flag in flags} <= known, rest
            for path in re.findall(r'config/\w+\.py', rest):
                assert os.path.exists(os.path.join(ROOT, path))
            seen += 1
    assert seen == 6


@each(*READMES, *TUTORIALS, NOTES)
def test_flags_by_themselves_exist_somewhere(path):
    known = {field.name for config in CONFIGS.values() for field in fields(config)}
    torchrun = {'standalone', 'nproc_per_node', 'nnodes', 'node_rank', 'master_addr',
                'master_port', 'shutdown_timeout'}
    for code in code_of(text_of(path)):
        if code.startswith('--') and not code.startswith('--- '):  # a mark in the source
            for flag in re.findall(r'(?:^|(?<= ))--([\w-]+)', code):
                assert flag.replace('-', '_') in known | torchrun | {'help'}, flag


@each(*READMES, *TUTORIALS, NOTES)
def test_functions_and_classes_exist(path):
    names = names_in_source()
    found = {code.removesuffix('()') for code in code_of(text_of(path)) if re.fullmatch(
        r'(?:[A-Z]\w*\.)?(?:[A-Z][A-Za-z]+|[a-z]+_[a-z_]+|[A-Z_]{4,})(?:\(\))?', code)}
    if path in TUTORIALS:
        assert {'CharTokenizer', 'sample_from', 'MODEL_SIZES'} <= found
    settings = {field.name for config in CONFIGS.values() for field in fields(config)}
    for name in found - NANOGPT:
        if name.startswith('F.'):
            assert hasattr(torch.nn.functional, name[2:]), name
        else:
            assert name.split('.')[-1] in names | settings, name


@each(*TUTORIALS)
def test_what_is_to_be_read_is_in_its_file(path):
    """As in: Read `one`, `two` and `three` in `file.py`."""
    text, seen = ' '.join(text_of(path).split()), 0
    for names, file in re.findall(r'((?:`[\w.]+`(?:, | and | e )?)+) (?:in|em) `(\w+\.py)`', text):
        source = text_of(os.path.join(ROOT, file))
        for name in re.findall(r'(\w+)`', names):
            assert re.search(rf'^ *(?:def|class) {name}\b|^{name} = ', source, re.M), (name, file)
            seen += 1
    assert seen >= 20


@each(*TUTORIALS)
def test_what_is_to_be_deleted_or_replaced_is_in_the_source(path):
    text = ' '.join(text_of(path).split())
    verbs = '(?i)(?:delete|replace|apague|troque)(?: the line| a linha)?'
    codes = re.findall(f'{verbs} `([^`]+)', text)
    sources = [text_of(file) for file in glob.glob(os.path.join(ROOT, '*.py'))]
    for code in codes:
        assert any(code.split('...')[0] in source for source in sources), code
    assert len(codes) == 5


@each(*TUTORIALS, NOTES)
def test_programs_are_python(path):
    programs = re.findall(r'^ *```python\n(.*?)^ *```', text_of(path), re.M | re.S)
    assert programs
    for program in programs:
        nodes = list(ast.walk(ast.parse(textwrap.dedent(program))))
        imported = {alias.name for node in nodes if isinstance(node, ast.Import)
                    for alias in node.names}
        for node in nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module = node.value.id
                if module in imported and os.path.exists(os.path.join(ROOT, f'{module}.py')):
                    assert node.attr in names_in_source(), node.attr


@each(*READMES)
def test_the_first_two_commands_stand_alone(path):
    blocks = re.findall(r'^```sh\n(.*?)^```', text_of(path), re.M | re.S)
    assert 'config/train_wizard_char.py' in blocks[0] and 'pytest' in blocks[1]
    for block in blocks[:2]:
        words = shlex.split(block)
        assert words[:4] == ['python3', '-m', 'venv', '.venv'] and 'requirements.txt' in words


@each(*READMES)
def test_a_readme_is_short_and_begins_with_the_picture(path):
    text = text_of(path)
    assert text.count('\n') <= 200
    assert text.index('](loss.svg)') < text.index('```sh') < text.index('\n## ')


@each(*READMES)
def test_line_counts_are_about_right(path):
    """Of every script, within 10 %."""
    listed = set()
    for row in re.findall(r'^\| (`\w+\.py`.*)', text_of(path), re.M):
        files, count = row.split(' | ')[:2]
        if count.replace('.', '').isdigit():
            names = re.findall(r'`([^`]+)`', files)
            lines = sum(text_of(os.path.join(ROOT, name)).count('\n') for name in names)
            assert lines == pytest.approx(int(count.replace('.', '')), rel=0.1), f'{files}: {lines}'
            listed |= set(names)
    assert listed == {os.path.basename(name) for name in glob.glob(os.path.join(ROOT, '*.py'))}


@each(*READMES)
def test_what_is_to_be_changed_is_where_the_table_says(path):
    table = re.search(r'^\| .*\n\|---\|---\|\n((?:\|.*\n){8})\n', text_of(path), re.M).group(1)
    for row in table.splitlines():
        codes = re.findall(r'`([^`]+)`', row)
        sources = [text_of(os.path.join(ROOT, code)) for code in codes if code.endswith('.py')]
        assert sources
        for code in codes:
            assert code.endswith('.py') or any(code in source for source in sources), code


@pytest.mark.parametrize('paths', [READMES, TUTORIALS], ids=['README', 'TUTORIAL'])
def test_both_languages_say_the_same(paths):
    """The same commands, figures and headings, in the same order."""
    pages = [text_of(path) for path in paths]
    assert len(pages) == 2
    blocks = [[re.sub('# .*', '', block) for block in re.findall(BLOCK, page, re.M | re.S)]
              for page in pages]
    assert blocks[0] == blocks[1]
    headings = [len(re.findall(r'^#+ ', page, re.M)) for page in pages]
    assert headings[0] == headings[1]
    figures = [sorted(re.findall(FIGURE, page.replace(',', '.'))) for page in pages]
    assert figures[0] == figures[1]
