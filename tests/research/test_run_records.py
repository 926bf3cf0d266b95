"""Records of finished runs: tables without the runs, and what is trained again all the same."""

import gzip
import json
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import pytest
import torch
from tables_by_hand import report

from mmdet_moe.analysis.files import write_file
from mmdet_moe.errors import ConfigError
from research.experiments import domains_detector, photographs, records
from research.experiments import experiment as experiment_module
from research.experiments import scenes as scenes_module
from research.experiments.budget import CIFAR10
from research.experiments.classification import TASKS, ClassificationExperiment
from research.experiments.domains_detector import PUBLISHED, DomainsDetectorExperiment
from research.experiments.photographs import PERSONS, PhotographsExperiment
from research.experiments.records import add_records, data_digest, pick, read_records
from research.experiments.robust import IMAGES, STEPS, RobustExperiment
from research.experiments.rotate import BUDGETS, RotateExperiment
from research.experiments.scenes import DIGIT_SCENES, FASHION_SCENES, ScenesExperiment
from research.experiments.sizes import SizesExperiment
from research.runs import COCO_METRICS, RunResult
from research.size_information import FILE


def test_pick():
    content = {
        'a': [{'x': 1, 'y': [2, 3], 'z': 4}, {'x': None}],
        'b': {'one.two': {'k': {'deep': 5}, 'l': 6}, 'three': {'l': 7}},
        'c': 8,
    }
    assert pick(content, ['a/x', 'a/y', 'b/*/l', 'b/one.two/k/deep']) == {
        'a': [{'x': 1, 'y': [2, 3]}, {'x': None}],
        'b': {'one.two': {'k': {'deep': 5}, 'l': 6}, 'three': {'l': 7}},
    }


def entry(value, settings='s', **files):
    return {'settings': settings, 'result': {'value': value}, 'files': files, 'trained_on': 'here'}


def test_at_the_same_time(tmp_path):
    path = tmp_path / 'records' / 'some.json'
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: add_records(path, {f'run{i:02}': entry(i / 7)}, {}), range(24)))
    runs = read_records(path)['runs']
    assert list(runs) == [f'run{i:02}' for i in range(24)]
    assert all(runs[f'run{i:02}']['result']['value'] == i / 7 for i in range(24))


def test_what_replaces_a_record(tmp_path):
    path = tmp_path / 'some.json'
    add_records(path, {'run': entry(1.0, a=[1, 2])}, {'objects': [1.5, 2.5]})
    later = {**entry(1.0, b=3), 'trained_on': 'elsewhere'}
    add_records(path, {'run': later}, {})
    assert read_records(path) == {
        'data': {'objects': [1.5, 2.5]}, 'runs': {'run': entry(1.0, a=[1, 2], b=3)}
    }  # fmt: skip
    assert '"objects": [ 1.5, 2.5 ]\n' in path.read_text()
    for other in (entry(2.0, b=3), entry(2.0, 't')):
        add_records(path, {'run': other}, {})
        assert read_records(path)['runs'] == {'run': other}
    path.write_text('<<<<<<< HEAD\n')
    with pytest.raises(ConfigError, match=r"some\.json' is no JSON .*git checkout"):
        read_records(path)


def number(folder):
    """Another one for each run."""
    return zlib.crc32('/'.join(folder.parts[-2:]).encode()) / 2**32


def result(folder, layers):
    """Of one run, with layers that are not in the order of their names."""
    x = number(folder)
    figures = report([x, 1 - x], load_cv2=x, mi_input=x / 2, mi_level=x / 3)
    metrics = dict.fromkeys((*COCO_METRICS.values(), 'accuracy', 'dispatch entropy'), x)
    metrics |= {f'AP {name}': x / (i + 1) for i, name in enumerate(PUBLISHED)}
    reports = {name: {**figures, 'mi_source': x / (i + 5)} for i, name in enumerate(layers)}
    is_dense = folder.parent.name in ('dense', 'single', 'start', 'pretraining')
    if 'moe' in layers and is_dense:
        reports['moe']['load'] = [1.0]
    elif is_dense:
        reports = {}
    return RunResult(metrics, 0.1 + x, 1000, 2_345_678, 8, reports)


def experts_of(folder, layers):
    """More than tables and pictures read."""
    x = number(folder)
    told = {
        'mi': x, 'p_adjusted': x / 2, 'p_value': 0.0, 'bins': ['a', 'b'], 'edges': [1.0, 2.0, 4.0],
        'expert_given_bin': [[x, 1 - x], [1 - x, x]], 'permuted': [0.0] * 50,
        'given': {'level': {'mi': x / 9, 'interval': [0.0, x], 'p_adjusted': x / 3}},
    }  # fmt: skip
    attributes = dict.fromkeys(('size', 'size_coco', 'class', 'superclass'), told)
    metrics = {'AP': x, 'accuracy': x, 'AP75': 0.1}
    return {
        'metrics': metrics,
        'layers': {
            name: {'associations': {'objects': attributes, 'detections': attributes}, 'huge': 1}
            for name in layers
        },
        'interventions': [
            {'layer': layer, 'kind': kind, 'expert': 0, 'metrics': metrics}
            for layer in (*layers, 'all')
            for kind in ('only', 'without', 'equal', 'random')
        ],
    }


def sizes_of(folder, layers):
    x = number(folder)
    figures = {'given_level': x, 'chance': x / 9, 'p_value': x / 8, 'mi': x / 7, 'by_level': [x]}
    trained = {'size': figures, 'class': figures, 'position': figures, 'level': x / 6}
    trained |= {'by_level_and_size': [[[5, 5], [0, 10]]] * 2, 'importance': [x]}
    return {'layers': {name: {'trained': trained, 'random': [trained, trained]} for name in layers}}


def attack_of(folder):
    column = {'mean': number(folder), 'interval': [0, 1]}
    columns = {'clean': column, 'noise': column, 'attacked': column}
    kinds = ('model', 'alone', 'changed', 'clean_routing', 'clean_image', 'held')
    rows = [{'what': what, 'expert': 0, **columns, 'seen': None} for what in kinds]
    return {'steps': STEPS, 'images': IMAGES, 'rows': rows}


@pytest.fixture
def disk(monkeypatch):
    """Trainings and analyses that take no time; the folders of the trained runs in their order."""
    trained = []

    def collect(folder):
        path = folder / 'result.json'
        return RunResult(**json.loads(path.read_text())) if path.exists() else None

    def train(config, work_dir, options, threads, output):
        trained.append('/'.join(work_dir.parts[-2:]))
        write_run(work_dir, ('reg', 'cls'))

    def analyse(work_dir, threads, output, options):
        assert (work_dir / 'last_checkpoint').exists()
        write(work_dir / 'experts' / 'experts.json', experts_of(work_dir, ('reg', 'cls')))

    monkeypatch.setattr(experiment_module, 'collect', collect)
    monkeypatch.setattr(experiment_module, 'train', train)
    monkeypatch.setattr(experiment_module, 'analyse', analyse)
    monkeypatch.setattr(
        scenes_module, 'positives_per_level', lambda cfg: torch.tensor([len(cfg.data_root) + 0.1])
    )
    monkeypatch.setattr(
        scenes_module.digit_scenes, 'generate', lambda out, **_: out.mkdir(exist_ok=True)
    )
    return trained


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(content).encode())  # read at the same time


def write_run(folder, layers):
    write(folder / 'result.json', asdict(result(folder, layers)))
    (folder / 'last_checkpoint').write_text('/elsewhere/iter_4.pth')


CIFAR = replace(TASKS['cifar100'], methods=TASKS['cifar100'].methods[:2])
SCENES = replace(
    DIGIT_SCENES,
    methods=DIGIT_SCENES.methods[:2],
    pictured=DIGIT_SCENES.methods[1:2],
    decision_weights=DIGIT_SCENES.decision_weights[1:],
)
ONE_CLASS = replace(PERSONS, methods=PERSONS.methods[:2], pictured=PERSONS.methods[1:2])
MADE = {
    'cifar100-cpu': (
        lambda *where: ClassificationExperiment(CIFAR, CIFAR.budgets['cpu'], *where), ['layer4']
    ),
    'robust-cifar100-cpu': (
        lambda *where: RobustExperiment(CIFAR, CIFAR.budgets['cpu'], *where), ['layer4']
    ),
    'rotate-cifar10-cpu': (
        lambda *where: RotateExperiment(CIFAR10, BUDGETS[CIFAR10]['cpu'], *where), ['moe']
    ),
    'digit-scenes': (lambda *where: ScenesExperiment(SCENES, *where), ['reg', 'cls']),
    'size-beyond-level': (
        lambda *where: SizesExperiment(*where, methods=['dense', 'image']), ['reg', 'cls']
    ),
    'persons': (lambda *where: PhotographsExperiment(ONE_CLASS, *where), ['reg', 'cls']),
    'domains-detector': (DomainsDetectorExperiment, ['reg', 'cls']),
}  # fmt: skip


def methods_of(made):
    if isinstance(made, DomainsDetectorExperiment):
        return [made.start, *(m for name in domains_detector.HEADS for m in made.methods(name))]
    if isinstance(made, ScenesExperiment):
        return [*made.task.methods, *made.task.decision_weights]
    return made.methods if hasattr(made, 'methods') else made.task.methods


def texts(folder):
    return {path.name: path.read_text() for path in folder.glob('*.md')}


@pytest.mark.parametrize('name', MADE)
def test_tables_without_runs_and_data(name, tmp_path, disk, records_folder, monkeypatch):
    """As in a fresh clone."""
    heads = {head: domains_detector.HEADS[head] for head in ('dense', '4 experts: Switch')}
    monkeypatch.setattr(domains_detector, 'HEADS', heads)
    monkeypatch.setattr(photographs, 'check_config', None)
    make, layers = MADE[name]
    data = tmp_path / 'data'
    for i, of_set in enumerate(PUBLISHED):
        annotations = [{'image_id': image} for image in range(i + 1)]
        content = {'categories': [{'name': f'{of_set} {i}'}], 'annotations': annotations}
        write(data / of_set / 'train.json', content)
    made = make(data, tmp_path / 'runs', [0, 2], 1)
    if name == 'persons':
        made.prepare(check=False)
    for method in methods_of(made):
        for seed in (0, 2):
            folder = made.run_dir(method, seed)
            write_run(folder, layers)
            write(folder / 'experts' / 'experts.json', experts_of(folder, layers))
            write(folder / FILE, sizes_of(folder, layers))
            for file in RobustExperiment.files:
                write(folder / file, attack_of(folder))
    # The others would look at the data.
    made.run(table_only=True) if name.startswith(('robust', 'domains')) else made.write()
    before = texts(made.written)
    pictures = {path.name for path in made.written.glob('*.png')}
    assert '| 2 |' in before[f'{name}.md']
    recorded = records_folder / f'{name.removeprefix("robust-")}.json'
    text = recorded.read_text()
    assert not {'"huge":', '"permuted":', '"AP75":', '"seen":'} & set(text.split())
    assert str(tmp_path) not in text

    shutil.rmtree(tmp_path / 'runs')
    shutil.rmtree(data)
    again = make(tmp_path / 'no data', tmp_path / 'elsewhere', [0, 2], 1)
    again.run(table_only=True)
    assert texts(again.written) == before
    assert {path.name for path in again.written.glob('*.png')} == pictures
    assert recorded.read_text() == text
    assert disk == []


TASK = replace(
    FASHION_SCENES, methods=FASHION_SCENES.methods[:2], pictured=FASHION_SCENES.methods[1:2]
)
DENSE, SOFT = TASK.methods


@pytest.fixture
def make(tmp_path, disk, monkeypatch):
    """What makes an experiment on scenes with a work directory of its own."""
    monkeypatch.setattr(experiment_module, 'RESULTS', tmp_path / 'no page')
    monkeypatch.setattr(scenes_module, 'plot_specialisation', lambda runs, path: None)
    (tmp_path / 'data').mkdir()

    def make(work_dir, seeds, task=TASK):
        disk.clear()
        return ScenesExperiment(task, tmp_path / 'data', tmp_path / work_dir, seeds, 1)

    return make


def test_trained_are_the_missing_seeds_alone(make, disk, capsys, records_folder):
    make('one', [0]).run()
    assert disk == ['pretraining/seed0', 'dense/seed0', 'soft_importance/seed0']
    recorded = read_records(records_folder / 'fashion-scenes.json')['runs']
    assert list(recorded) == sorted(disk)
    on = recorded['dense/seed0']['trained_on']
    assert (on['threads'], on['jobs']) == (1, 1)
    assert 'torch' in on['versions']
    capsys.readouterr()
    made = make('two', [0, 1])
    made.run()
    # That of seed 0 has no checkpoint here, and needs none.
    assert disk == ['pretraining/seed1', 'dense/seed1', 'soft_importance/seed1']
    assert '2 of 4 runs are finished, 2 of them by the records in' in capsys.readouterr().out
    assert [run.metrics['AP'] for run in made.results(SOFT)] == [
        number(made.run_dir(SOFT, seed)) for seed in (0, 1)
    ]


def test_other_data(make, disk, capsys, tmp_path, records_folder):
    """Neither are recorded figures told of them, nor does a run go on with them, wherever it is."""
    annotations = tmp_path / 'data/annotations/instances_train2017.json'
    write(annotations, {'images': [1]})
    make('one', [0]).run()
    path = records_folder / 'fashion-scenes.json'
    recorded = path.read_text()
    records._digest.cache_clear()
    write(annotations, {'images': [2]})
    with pytest.raises(ConfigError, match=r'one/.*seed0 holds a run on other data than those in'):
        make('one', [0]).run()
    make('two', [0]).run()
    assert disk == ['pretraining/seed0', 'dense/seed0', 'soft_importance/seed0']
    assert 'is of other data than those in' in capsys.readouterr().out
    assert path.read_text() == recorded
    # Of records that do not tell it nothing is claimed.
    content = json.loads(recorded)
    del content['data'][records.DIGEST]
    content['runs']['dense/seed7'] = content['runs']['dense/seed0']
    path.write_text(json.dumps(content))
    make('four', [0]).run()
    assert 'these do not tell their data' in capsys.readouterr().out
    assert records.DIGEST not in json.loads(path.read_text())['data']
    path.write_text(recorded)
    shutil.rmtree(tmp_path / 'data')
    assert len(make('three', [0]).results(SOFT)) == 1  # no data: nothing that they could not be of


@pytest.mark.parametrize('archive', ['cifar.tar.gz', 'cifar/dataset.json', 'cifar/0.png'])
def test_digest_of_data(tmp_path, archive):
    """Of what is in the files, compressed or not; not of archives, notes and images."""
    found = []
    for name, content in (('here', b'one'), ('there', b'one'), ('elsewhere', b'two')):
        folder = tmp_path / name / 'cifar'
        folder.mkdir(parents=True)
        if name == 'there':
            (folder / 'train.gz').write_bytes(gzip.compress(content))
            (tmp_path / name / archive).write_bytes(b'more')
        else:
            (folder / 'train').write_bytes(content)
        found.append(data_digest(tmp_path / name))
    assert found[0] == found[1] != found[2]
    (tmp_path / 'elsewhere/cifar/made_from_class_folders.json').write_text('{}')
    records._digest.cache_clear()
    assert data_digest(tmp_path / 'elsewhere') is None
    assert data_digest(tmp_path / 'nowhere') is None
    (tmp_path / 'nothing').mkdir()
    assert data_digest(tmp_path / 'nothing') is None


def test_other_settings(make, disk, capsys, tmp_path):
    make('one', [0, 1]).run()
    slow = replace(SOFT, options=('optim_wrapper.optimizer.lr=1e-5',))
    task = replace(TASK, methods=(DENSE, slow))
    capsys.readouterr()
    made = make('two', [1], task)
    made.run(table_only=True)
    out = capsys.readouterr().out
    assert [len(made.results(method)) for method in task.methods] == [1, 0]
    assert out.count('soft_importance/seed1 in ') == out.count(' is not used') == 1
    assert 'other settings' in out
    made = make('two', [1], task)
    made.run()
    assert disk == ['pretraining/seed1', 'soft_importance/seed1']
    # The new ones replace the record.
    make('three', [1], task).run()
    assert disk == []


def test_another_start_makes_other_runs(make, disk):
    make('one', [0]).run()
    longer = replace(TASK.pretraining, options=('train_cfg.max_iters=700',))
    make('two', [0], replace(TASK, pretraining=longer)).run()
    assert disk == ['pretraining/seed0', 'dense/seed0', 'soft_importance/seed0']


def test_a_record_without_the_analysis(make, disk, records_folder):
    made = make('one', [0])
    made.train(TASK.methods)
    made = make('two', [0])
    made.run()
    assert disk == ['pretraining/seed0', 'soft_importance/seed0']
    recorded = read_records(records_folder / 'fashion-scenes.json')['runs']
    assert recorded['soft_importance/seed0']['files'].keys() == {'experts/experts.json'}


def test_a_run_on_the_disk_wins(make, disk, records_folder):
    made = make('one', [0])
    made.run()
    path = records_folder / 'fashion-scenes.json'
    content = json.loads(path.read_text())
    content['runs']['dense/seed0']['result']['metrics']['AP'] = 7.0
    path.write_text(json.dumps(content))
    (elsewhere,) = make('two', [0]).results(DENSE)
    (here,) = make('one', [0]).results(DENSE)
    assert (elsewhere.metrics['AP'], here.metrics['AP']) == (7.0, number(made.run_dir(DENSE, 0)))
    make('one', [0]).run(table_only=True)
    recorded = read_records(path)['runs']['dense/seed0']
    assert recorded['result']['metrics']['AP'] == here.metrics['AP']
    assert 'recorded_on' in recorded


def test_trials_leave_no_record(make, disk, records_folder, tmp_path):
    make('one', [7]).run()
    assert len(disk) == 3
    assert not records_folder.exists()
    data = tmp_path / 'data'
    made = PhotographsExperiment(PERSONS, data, tmp_path / 'voc', [0], 1, epochs=2)
    assert not made.is_default
    assert not SizesExperiment(data, tmp_path / 'sizes', [0], 1, quick=True).is_default


def test_a_start_without_its_checkpoint(make, disk):
    made = make('one', [0])
    made.run()
    (made.run_dir(TASK.pretraining, 0) / 'last_checkpoint').unlink()
    shutil.rmtree(made.run_dir(SOFT, 0))
    (made._records_file).unlink()
    with pytest.raises(ConfigError, match=r'seed0 holds no checkpoint for soft.*move it away'):
        make('one', [0]).run()


def of_photographs(folder, lr=0.001):
    task = replace(PERSONS, methods=(replace(PERSONS.methods[1], options=(f'{LR}={lr}',)),))
    made = PhotographsExperiment(task, folder / 'data', folder / 'runs', [0], 1)
    made.prepare(check=False)
    return made, made.methods[0]


def of_domains(folder, lr=0.001):
    for of_set in PUBLISHED:
        content = {'categories': [{'name': of_set}], 'annotations': [{'image_id': 0}]}
        write(folder / 'data' / of_set / 'train.json', content)
    made = DomainsDetectorExperiment(folder / 'data', folder / 'runs', [0], 1)
    made._write_config('dense', made.start)
    (method,) = made.methods('dense')
    made._write_config('dense', method)
    return made, replace(method, options=(f'{LR}={lr}',))


def of_scenes(folder, lr=0.001):
    made = ScenesExperiment(DIGIT_SCENES, folder / 'data', folder / 'runs', [0], 1)
    return made, replace(DIGIT_SCENES.methods[1], options=(f'{LR}={lr}',))


LR = 'optim_wrapper.optimizer.lr'


@pytest.mark.parametrize('of', [of_photographs, of_domains, of_scenes])
def test_fingerprint(of, tmp_path, monkeypatch):
    """Equal wherever data, runs, cache and weights lie; another one for another learning rate."""
    monkeypatch.setattr(photographs, 'neck_and_head_flops', lambda cfg: 0)
    found = []
    for place, lr in (('here', 0.001), ('there', 0.001), ('there', 0.002)):
        monkeypatch.setenv('EFFICIENTNET_LITE0', str(tmp_path / place / 'efficientnet-lite0.pth'))
        made, method = of(tmp_path / place, lr)
        found.append(made._fingerprint(method, 0))
    assert found[0] == found[1] != found[2]
    assert made._fingerprint(method, 1) != found[2]


def test_tables_say_that_machines_differ(make, disk, records_folder):
    """Their times, and a processor without bfloat16, are of some seeds alone."""
    made = make('one', [0, 1])
    made.run()
    assert 'unlike machines' not in ''.join(texts(made.written).values())
    path = records_folder / 'fashion-scenes.json'
    content = json.loads(path.read_text())
    for name, record in content['runs'].items():
        if name.endswith('seed1'):
            record['trained_on'] |= {'device': 'Some Processor', 'bfloat16': False}
    path.write_text(json.dumps(content))
    made = make('one', [0, 1])
    made.run(table_only=True)
    here = content['runs']['dense/seed0']['trained_on']['device']
    for text in texts(made.written).values():
        assert text.endswith('; 1 on Some Processor (without bfloat16).\n')
        assert f'unlike machines: 0 on {here}' in text


def test_what_was_finished_before_an_interruption_is_whole(
    make, disk, records_folder, tmp_path, monkeypatch
):
    train = experiment_module.train

    def until_the_second_seed(config, work_dir, *args, **kwargs):
        if work_dir == tmp_path / 'one' / 'dense' / 'seed1':
            raise ConfigError('no more')
        train(config, work_dir, *args, **kwargs)

    monkeypatch.setattr(experiment_module, 'train', until_the_second_seed)
    with pytest.raises(ConfigError, match='no more'):
        make('one', [0, 1]).run()
    recorded = read_records(records_folder / 'fashion-scenes.json')['runs']
    assert recorded['soft_importance/seed0']['files'].keys() == {'experts/experts.json'}
    del disk[:]
    make('two', [0]).run()
    assert disk == []


def test_every_table_of_a_classifier_has_its_place():
    page = experiment_module.RESULTS.read_text()
    for name in TASKS:
        for budget in TASKS[name].budgets:
            for marker in (f'{name}-{budget}', f'robust-{name}-{budget}'):
                assert f'<!-- {marker}:begin -->' in page
                assert f'<!-- {marker}:end -->' in page
