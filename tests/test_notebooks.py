"""The notebooks run from start to end, and what they leave behind is right.

``python tests/test_notebooks.py [NAME ...]`` runs them and stores their outputs in them.
"""

import json
import os
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from sklearn.metrics import mutual_info_score

NOTEBOOKS = sorted(Path(__file__).resolve().parents[1].glob('docs/notebooks/*.ipynb'))
MAX_BYTES = 250_000
#: What begins a path of somebody's machine.
ABSOLUTE = re.compile(r'(?<![\w.:/])/(?:tmp|home|root|usr|opt|var|work|Users|mnt|private)/')
#: What is written otherwise without --all.
SHORTER = {
    'max_iters=12': 'max_iters=2',
    'val_interval=12': 'val_interval=2',
    'iter_12': 'iter_2',
    '--out experts': '--no-interventions --out experts',
}
#: At its start, then: of the analysis's figures the one that the notebook shows.
ONE_FIGURE = """
from mmdet_moe.analysis import command
from mmdet_moe.analysis.report import figures

def write_figures(experts, folder):
    for layer, name, figure in figures.draw_figures(experts):
        if name == 'decisions_level':
            return figures.write_figure(figure, figures.folder_of(folder, layer), name)

command.write_figures = write_figures
"""
#: A last cell, which saves what the test looks at.
PROBES = {
    'routing_study': """
        every = [run for of_seeds in runs.values() for run in of_seeds]
        np.savez(
            'probe.npz', classes=labels[test], loads=[run['loads'] for run in every],
            chosen=[run['layer'].routing.expert_ids[:, 0].numpy() for run in every],
            information=[run['information'].mi for run in every],
            chance=[run['information'].chance for run in every],
        )""",
    'timm_classifier': """
        with torch.no_grad():
            torch.save(dict(
                images=images[test], scores=model(images[test]), restored=restored(images[test]),
                expert_ids=layer.routing.expert_ids, load=torch.tensor(after.load),
                before=torch.tensor(before.load), accuracy=accuracy, labels=labels[test],
            ), 'probe.pt')""",
}


def execute(notebook, folder):
    """Run a notebook in a folder, in a process of its own; its outputs are stored in it."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])
    client = NotebookClient(
        notebook,
        timeout=1800,
        record_timing=False,
        coalesce_streams=True,
        resources={'metadata': {'path': str(folder)}},
    )
    client.execute(env={**os.environ, 'PATH': path, 'OMP_NUM_THREADS': '1'})


@pytest.fixture
def run(request, tmp_path):
    """``run(name)`` executes a notebook and its probe, and gives the folder that it worked in."""

    def run(name):
        (path,) = (path for path in NOTEBOOKS if path.stem == name)
        notebook = nbformat.read(path, as_version=4)
        if name in PROBES:
            code = f'if True:{PROBES[name]}'
            notebook.cells.append(nbformat.v4.new_code_cell(code))
        if name == 'detector_on_own_data' and not request.config.getoption('--all'):
            text = nbformat.writes(notebook)
            for words, shorter in SHORTER.items():
                assert words in text
                text = text.replace(words, shorter)
            notebook = nbformat.reads(text, as_version=4)
            # After the cell that turns progress bars off, which tqdm reads when it is imported.
            first = next(i for i, c in enumerate(notebook.cells) if c.cell_type == 'code')
            notebook.cells.insert(first + 1, nbformat.v4.new_code_cell(ONE_FIGURE))
        execute(notebook, tmp_path)
        check_outputs(notebook)
        return tmp_path

    return run


def check_outputs(notebook):
    """No errors and warnings, and nothing of the machine on which it ran."""
    for cell in notebook.cells:
        for output in cell.get('outputs', []):
            assert output.output_type != 'error'
            assert output.get('name') != 'stderr', output.text
            texts = [output.get('text', ''), *output.get('data', {}).values()]
            for text in texts:
                if not re.fullmatch(r'[A-Za-z0-9+/=\s]{1000,}', str(text)):  # a picture
                    assert not ABSOLUTE.search(str(text)), text
                    assert 'Warning' not in str(text)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_complete_small_and_of_no_machine(path):
    assert path.stat().st_size < MAX_BYTES
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    check_outputs(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == 'code']
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any('image/png' in o.get('data', {}) for cell in code for o in cell.outputs)
    titles = [
        line
        for cell in notebook.cells
        if cell.cell_type == 'markdown'
        for line in cell.source.splitlines()
        if line.startswith('# ')
    ]
    assert len(titles) == 1
    for cell in notebook.cells:
        for target in re.findall(r'\]\(([^)#]+)\)', cell.source):
            if cell.cell_type == 'markdown' and not target.startswith('http'):
                assert (path.parent / target).exists(), target


@pytest.mark.sweep(keep=0)  # takes long
def test_routing_study(run):
    probe = np.load(run('routing_study') / 'probe.npz')
    classes, chosen = probe['classes'], probe['chosen']
    assert len(chosen) == 12
    # Every image has one expert, before and after each epoch.
    assert (probe['loads'].sum(-1) == len(classes)).all()
    for ids, loads in zip(chosen, probe['loads'], strict=True):
        assert (np.bincount(ids, minlength=4) == loads[-1]).all()
    expected = [mutual_info_score(classes, ids) for ids in chosen]
    np.testing.assert_allclose(probe['information'], expected, atol=1e-6)
    assert (probe['chance'] < 0.05).all()
    # What the text says of the soft constraint.
    soft = slice(3, 6)
    assert (probe['loads'][soft, -1] > 0).all()
    assert (probe['information'][soft] > 0.2).all()


@pytest.mark.sweep(keep=0)  # takes long
def test_timm_classifier(run):
    folder = run('timm_classifier')
    probe = torch.load(folder / 'probe.pt', weights_only=True)
    assert torch.equal(probe['restored'], probe['scores'])
    counts = probe['expert_ids'].flatten().bincount(minlength=4)
    assert counts.sum() == 2 * len(probe['images'])
    for load in (probe['load'], probe['before']):
        torch.testing.assert_close(load.sum(), torch.tensor(1.0))
    # In batches of another size a tie may go to another expert.
    torch.testing.assert_close(probe['load'], counts / counts.sum(), rtol=0, atol=0.01)
    right = probe['scores'].argmax(1) == probe['labels']
    assert right.float().mean().item() == pytest.approx(probe['accuracy'], abs=0.01)
    assert probe['accuracy'] > 0.8
    program = torch.export.load(folder / 'model.pt2').module()
    torch.testing.assert_close(program(probe['images']), probe['scores'], rtol=1e-4, atol=1e-4)


def test_detector_on_own_data(run):
    folder = run('detector_on_own_data')
    experts = json.loads((folder / 'experts' / 'experts.json').read_text())
    objects = json.loads((folder / 'data/annotations/instances_val2017.json').read_text())
    assert experts['run']['num_images'] == len(objects['images']) == 16
    for name in ('bbox_head.cls_moe', 'bbox_head.reg_moe'):
        layer = experts['layers'][name]
        assert sum(layer['load']) == pytest.approx(1)
        assert layer['num_decisions'] == 16 * 5  # images × levels
        counts = np.array(layer['associations']['objects']['class']['counts'])
        assert 0 < counts.sum() <= len(objects['annotations']) + 1e-6
    assert experts['metrics']['AP'] > 0.2
    report = (folder / 'experts' / 'report.html').read_text()
    (payload,) = re.findall(r'<script[^>]* id="payload-\d+">(.*?)</script>', report, re.DOTALL)
    assert 'bbox_head.cls_moe' in json.loads(payload)['layers']


def main(names):
    """Run all notebooks, or those of these names, and write their outputs into them."""
    for path in NOTEBOOKS:
        if not names or path.stem in names:
            notebook = nbformat.read(path, as_version=4)
            with TemporaryDirectory() as folder:
                execute(notebook, folder)
            nbformat.write(notebook, path)


if __name__ == '__main__':
    main(sys.argv[1:])
