"""``--cfg-options`` of all tools."""

import argparse

import pytest
from mmengine.config import DictAction

from mmdet_moe.engine.options import add_cfg_options

GIVEN = ['a.b=1', 'c=x=y', 'd=[1,(2,z)]', 'a.b=None']


def test_fields_are_those_of_mmengine():
    parser, theirs = argparse.ArgumentParser(), argparse.ArgumentParser()
    add_cfg_options(parser)
    theirs.add_argument('--cfg-options', nargs='+', action=DictAction)
    for argv in ([], ['--cfg-options', *GIVEN], ['--cfg-options', 'e=1', '--cfg-options', *GIVEN]):
        assert parser.parse_args(argv) == theirs.parse_args(argv)


@pytest.mark.parametrize('text', ['model', 'a=[1,(2'])
def test_mistakes_are_one_sentence(text, capsys):
    parser = argparse.ArgumentParser()
    add_cfg_options(parser)
    with pytest.raises(SystemExit) as exit_:
        parser.parse_args(['--cfg-options', 'a=1', text])
    assert exit_.value.code == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert f"error: argument --cfg-options: '{text}' is no KEY=VALUE; write for example" in line
