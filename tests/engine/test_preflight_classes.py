"""The classes of the data sets against each other, the head and the checkpoint."""

import pytest
from mmdet.datasets import XMLDataset
from mmengine.config import Config
from running import complaint

from mmdet_moe.engine.preflight import check_config, check_trained_classes
from mmdet_moe.errors import ConfigError


def folders(root, split, names):
    for name in names.split():
        (root / split / name).mkdir(parents=True)
    return dict(dataset=dict(type='CustomDataset', data_root=str(root), data_prefix=split))


def config(loaders, num_classes=3, scope='mmpretrain'):
    model = dict(type='ImageClassifier', head=dict(type='LinearClsHead', num_classes=num_classes))
    if scope == 'mmdet':
        model = dict(type='RetinaNet', bbox_head=dict(num_classes=num_classes))
    return Config(dict(default_scope=scope, model=model, **loaders))


def test_splits_with_the_same_folders_pass(tmp_path):
    loaders = {
        f'{name}_dataloader': folders(tmp_path, name, 'ant bee cow')
        for name in ('train', 'val', 'test')
    }
    check_config(config(loaders))
    check_config(config(loaders), 'test')


@pytest.mark.parametrize(
    ('other', 'difference'),
    [
        ('ant cow', "class 1 is 'cow', but 'bee' in train_dataloader.dataset"),
        ('ant bee', "class 2 is missing, but 'cow' in train_dataloader.dataset"),
        ('ant bee cow dog', "class 3 is 'dog', but missing in train_dataloader.dataset"),
    ],
)
@pytest.mark.parametrize('mode', ['train', 'test'])
def test_splits_with_other_folders(tmp_path, mode, other, difference):
    train = folders(tmp_path, 'train', 'ant bee cow')
    loader = folders(tmp_path, 'other', other)
    name = 'val_dataloader' if mode == 'train' else 'test_dataloader'
    message = complaint(config({'train_dataloader': train, name: loader}), mode)
    assert message.startswith(f'{name}.dataset: {difference}')
    assert f"give '{tmp_path}/other' exactly one folder for each class" in message


def test_members_of_a_concatenation_have_the_same_folders(tmp_path):
    members = [folders(tmp_path, name, classes)['dataset'] for name, classes in
               (('a', 'ant bee cow'), ('b', 'ant cow dog'))]  # fmt: skip
    loader = dict(dataset=dict(type='ConcatDataset', datasets=members))
    message = complaint(config(dict(train_dataloader=loader)))
    assert message.startswith("train_dataloader.dataset.datasets[1]: class 1 is 'cow', but 'bee'")


@pytest.mark.parametrize('outputs', [2, 5])
def test_as_many_folders_as_outputs(tmp_path, outputs):
    loaders = dict(train_dataloader=folders(tmp_path, 'train', 'ant bee cow'))
    assert complaint(config(loaders, outputs)) == (
        f'model.head.num_classes is {outputs}, but train_dataloader.dataset has 3 classes '
        "('ant', 'bee', 'cow'): set model.head.num_classes=3"
    )


def test_names_for_folders(tmp_path):
    loaders = dict(train_dataloader=folders(tmp_path, 'train', 'n01 n02 n03'))
    dataset = loaders['train_dataloader']['dataset']
    dataset['classes'] = ['tench', 'shark', 'ray']  # as ImageNet's, in other words
    check_config(config(loaders))
    dataset['classes'] = ['n03', 'n02', 'n01']
    message = complaint(config(loaders))
    assert "class 0 is 'n03', but 'n01' in the list of folders" in message
    dataset['classes'] = ['tench', 'shark']
    message = complaint(config(loaders))
    assert "has 2 classes ('tench', 'shark'), but 3 folders ('n01', 'n02', 'n03')" in message


def test_listed_files_and_unlabelled_ones_have_no_class_folders(tmp_path):
    loaders = dict(train_dataloader=folders(tmp_path, 'train', 'ant bee'))
    (tmp_path / 'list.txt').write_text('ant/1.png 2\n')
    for changes in (dict(ann_file='list.txt'), dict(with_label=False)):
        dataset = dict(loaders['train_dataloader']['dataset'], **changes)
        check_config(config(dict(train_dataloader=dict(dataset=dataset))))


@pytest.mark.parametrize('num_classes', [19, 20, 21])
def test_detectors_on_voc(tmp_path, num_classes):
    """One class too few would be trained as background."""
    loader = dict(dataset=dict(type='VOCDataset', data_root=str(tmp_path)))
    cfg = config(dict(train_dataloader=loader), num_classes, 'mmdet')
    if num_classes == 20:
        check_config(cfg)
    else:
        assert complaint(cfg).startswith(
            f'model.bbox_head.num_classes is {num_classes}, but train_dataloader.dataset has 20'
        )


def test_classes_in_another_order_than_those_of_the_training(tmp_path, capsys):
    def loader(*classes):
        dataset = dict(type='XMLDataset', data_root=str(tmp_path), metainfo=dict(classes=classes))
        return dict(dataset=dataset)

    train = loader('cat', 'dog')
    loaders = dict(train_dataloader=train, val_dataloader=loader('dog', 'cat'))
    message = complaint(config(loaders, 2, 'mmdet'))
    assert message == (
        "val_dataloader.dataset: class 0 is 'dog', but 'cat' in train_dataloader.dataset, and a "
        'model tells classes by their numbers: give both the same classes in the same order'
    )
    loaders['val_dataloader'] = loader('Felis', 'Canis')  # another vocabulary
    check_config(config(loaders, 2, 'mmdet'))
    assert "note: val_dataloader.dataset: class 0 is 'Felis', but 'cat'" in capsys.readouterr().out


def test_heads_that_do_not_count_classes(tmp_path):
    kinds = ('CocoPanopticDataset', {}), ('MOTChallengeDataset', {})
    for type_, more in (*kinds, ('VOCDataset', dict(return_classes=True))):
        loader = dict(dataset=dict(type=type_, data_root=str(tmp_path), **more))
        check_config(config(dict(train_dataloader=loader), 256, 'mmdet'))


def test_classes_of_a_checkpoint():
    meta = dict(dataset_meta=dict(classes=('ant', 'bee', 'cow')))
    check_trained_classes(meta, dict(classes=['ant', 'bee', 'cow']), 'data')
    for silent in ({}, dict(dataset_meta=None)):  # as of other programs
        check_trained_classes(silent, dict(classes=['cow']), 'data')
    check_trained_classes(meta, None, 'data')
    with pytest.raises(ConfigError, match=r"^data: class 1 is 'cow', but 'bee' in the training of"):
        check_trained_classes(meta, dict(classes=('ant', 'cow', 'bee')), 'data')


# What the files hold ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('lines', 'classes', 'message'),
    [
        ('ant/1.png 0\nbee/1.png 2\n', None, None),
        ('ant/1.png 0\nbee/1.png 3\n', None, 'model.head.num_classes is 3, but '),
        ('ant/1.png 3\n', ['ant', 'bee', 'cow'], 'has the label 3, but 3 classes '),
        ('ant/1.png 0\nbee/1.png\n', None, "line 2 of '"),
        ('', None, 'lists no images'),
    ],
)
def test_labels_of_listed_images(tmp_path, lines, classes, message):
    (tmp_path / 'list.txt').write_text(lines)
    dataset = dict(type='CustomDataset', data_root=str(tmp_path), ann_file='list.txt')
    if classes is not None:
        dataset['classes'] = classes
    cfg = config(dict(train_dataloader=dict(dataset=dataset)))
    if message is None:
        check_config(cfg)
    else:
        assert message in complaint(cfg)


def test_files_that_are_not_read_are_counted(tmp_path, capsys):
    loaders = dict(train_dataloader=folders(tmp_path, 'train', 'ant bee cow'))
    for name in ('ant/1.JPG', 'bee/2.webp', 'bee/more/3.png', 'list.png'):
        path = tmp_path / 'train' / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    check_config(config(loaders))
    said = capsys.readouterr().out
    assert f"2 of the 4 files in '{tmp_path}/train' are not read" in said
    loaders['train_dataloader']['dataset']['extensions'] = ('.jpg', '.png', '.webp')
    check_config(config(loaders))
    assert '1 of the 4 files' in capsys.readouterr().out


def voc(root, **objects):
    """A data set of one image for each keyword, with objects of the names in its value."""
    (root / 'Annotations').mkdir(parents=True)
    (root / 'list.txt').write_text('\n'.join(objects))
    for id_, names in objects.items():
        box = '<bndbox><xmin>2</xmin><ymin>2</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>'
        nodes = ''.join(f'<object><name>{name}</name>{box}</object>' for name in names.split())
        size = '<size><width>20</width><height>20</height></size>'
        content = f'<annotation>{size}{nodes}</annotation>'
        (root / 'Annotations' / f'{id_}.xml').write_text(content)
    cfg = dict(data_root=str(root), ann_file='list.txt', data_prefix=dict(sub_data_root=''))
    return dict(type='XMLDataset', metainfo=dict(classes=('cat', 'dog')), **cfg)


def test_objects_of_unknown_classes_are_counted(tmp_path, capsys):
    dataset = voc(tmp_path / 'voc', a='cat zebra', b='zebra', c='dog cat Cat')
    check_config(config(dict(train_dataloader=dict(dataset=dataset)), 2, 'mmdet'))
    assert capsys.readouterr().out == (
        'note: train_dataloader.dataset: of the 6 objects of '
        f"'{tmp_path}/voc/list.txt', 3 are used: 'Cat', 'zebra' are not among the classes\n"
    )
    dataset.pop('type')
    data = XMLDataset(**dataset, img_subdir='')
    assert sum(len(data.get_data_info(i)['instances']) for i in range(3)) == 3


@pytest.mark.parametrize(
    ('content', 'message'), [(None, 'there is no annotation file'), ('<a>', 'is no XML')]
)
def test_broken_xml(tmp_path, content, message):
    dataset = voc(tmp_path / 'voc', a='cat', b='dog')
    path = tmp_path / 'voc' / 'Annotations' / 'b.xml'
    path.unlink() if content is None else path.write_text(content)
    found = complaint(config(dict(train_dataloader=dict(dataset=dataset)), 2, 'mmdet'))
    assert f"{message} '{path}'" in found or f"'{path}' {message}" in found
