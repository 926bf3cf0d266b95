"""The use of the experts over a training, from the logs that the training wrote."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

# Written by ExpertUtilizationHook. The name of a layer may contain dots and slashes.
_SCALAR = re.compile(r'train/moe/(.*)/(load|importance|inference_load|masked|bias)_(\d+)')
_ALWAYS = ('load', 'importance')


def read_history(work_dir: Path) -> dict[str, dict[str, list]] | None:
    """Load, importance and what else there is of every expert over the training iterations.

    Args:
        work_dir: Work directory of a run. A later start, which resumes an earlier one or begins
            anew, takes the place of all that was logged from its first iteration on.

    Returns:
        By MoE layer ``{'step': S iterations, ascending, 'load': (S, E), 'importance': (S, E)}``,
        shares that sum to 1, and likewise ``inference_load``, ``masked`` and ``bias`` if all of its
        entries have them (:class:`~mmdet_moe.moe.UtilizationReport`); None where nothing of the
        kind was logged. Entries for another number of experts than the latest entry has are left
        out.
    """
    layers: dict[str, dict[int, dict[str, list[float]]]] = {}
    for entries in _starts(work_dir):
        found = [(entry['step'], *shares) for entry in entries for shares in _shares(entry)]
        if found:
            first = found[0][0]
            layers = {
                layer: {step: shares for step, shares in by_step.items() if step < first}
                for layer, by_step in layers.items()
            }
        for step, layer, shares in found:
            layers.setdefault(layer, {})[step] = shares
    history = {}
    for layer, by_step in layers.items():
        if not by_step:
            continue
        experts = len(list(by_step.values())[-1]['load'])
        steps = sorted(step for step, shares in by_step.items() if len(shares['load']) == experts)
        known = set.intersection(*(set(by_step[step]) for step in steps))
        history[layer] = {'step': steps} | {
            key: [by_step[step][key] for step in steps]
            for key in by_step[steps[-1]]
            if key in known
        }
    return history or None


def logged_scalars(work_dir: Path) -> list[dict]:
    """The scalars that MMEngine's local backend logged, in the order of writing.

    Args:
        work_dir: Work directory of a run. Each start of the run has a folder in it.

    Returns:
        One dict per logged line. What is no complete line is left out: of a killed run the last
        one can be cut off.
    """
    return [entry for entries in _starts(work_dir) for entry in entries]


def _starts(work_dir: Path) -> Iterator[list[dict]]:
    """What each start of the run has logged."""
    # The folders are named by the time of the start.
    for file in sorted(Path(work_dir).glob('*/vis_data/scalars.json')):
        entries = []
        for line in file.read_text(encoding='utf-8', errors='replace').split('\n'):
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict):
                entries.append(entry)
        yield entries


def _shares(entry: dict) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """Each layer of one logged entry with its shares by expert."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for key, value in entry.items():
        if match := _SCALAR.fullmatch(key):
            layer, kind, expert = match.groups()
            found.setdefault(layer, {}).setdefault(kind, {})[int(expert)] = float(value)
    for layer, kinds in found.items():
        numbers = range(len(kinds.get('load', ())))
        shares = {
            kind: [values[e] for e in numbers]
            for kind, values in kinds.items()
            if set(values) == set(numbers)
        }
        if 'step' in entry and numbers and set(_ALWAYS) <= set(shares):
            yield layer, shares
