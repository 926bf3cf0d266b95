"""The numbers of ``experts.json`` in plain sentences, each with the numbers it rests on."""

import math
from collections.abc import Iterator

from mmdet_moe.analysis.statistics import counterfactual
from mmdet_moe.moe.utilization import COLLAPSE_SHARE, DEAD_SHARE

#: Strict, because about twenty associations are tested per layer: by chance alone one layer in five
#: would have a p-value below 0.01 somewhere; :data:`MIN_SHARE` has to be passed as well.
SIGNIFICANT = 0.01
#: Between the two it is a hint: worth more data, no proof.
HINT = 0.05
#: Information above chance, as a share of the possible, below which an association is too weak to
#: be called a specialisation. With enough data everything is significant.
MIN_SHARE = 0.02
#: The same, from which on words get stronger. With k = 2 of 4 experts that weigh alike, even a
#: perfect division reaches only one half.
CLEAR_SHARE, STRONG_SHARE = 0.1, 0.3
#: Fewer decisions than this give tables of a few objects per cell.
FEW_DECISIONS = 100
#: Fewer images than this leave differences of a few thousandths to chance.
FEW_IMAGES = 500
#: What the main metric may fall by and still count as unchanged: 0.005 AP, 0.5 points of accuracy.
#: Half a point on the usual scale of 100; less is seldom worth a larger model.
TOLERANCE = {'AP': 0.005, 'accuracy': 0.005}
#: Experts are always chosen together if this share of the decisions with either has both.
TOGETHER_SHARE = 0.95
#: A bin has to hold this share of all things, and as many things, to be an example.
MIN_EXAMPLE_SHARE, MIN_EXAMPLE_COUNT = 0.02, 10
#: An example has to lie this much above what holds for all bins together.
MIN_LIFT = 1.2
#: More experts than this are counted, not named.
MAX_NAMED = 16

# The first source that has an attribute tells about it: objects are what there is to see, whereas
# detections are only what the model has found.
_SOURCES = ('objects', 'detections', 'decisions')
_SIZES = ('size', 'size_coco')
# Whoever tells images apart tells nothing on what is in them.
_NOT_A_SPECIALITY = ('image',)
_NAMES = {
    'cluster': 'hidden cluster',
    'dataset': 'data set',
    'level': 'pyramid level',
    'size': 'object size',
    'size_coco': 'object size (small, medium, large)',
    'position': 'position in the image',
}
# Kind of intervention: how it is called, and what it means when it does no harm, and when it does.
_CHANGES = {
    'random': (
        'random routing',
        'the routing does not matter',
        'it matters which experts are chosen',
    ),
    'equal': (
        'weighing all experts equally',
        'they can be averaged',
        'it matters that decisions differ',
    ),
}
_STILL_DEPENDENT = ('patch', 'pixel', 'token')


def verdict(experts: dict) -> list[str]:
    """What the experts of each layer do, and what they do not.

    Args:
        experts: The content of ``experts.json``; ``verdict`` itself is not read.

    Returns:
        Sentences; those on a layer start with its name.
    """
    interventions = experts.get('interventions') or []
    sentences = []
    for name, layer in experts['layers'].items():
        of_layer = [entry for entry in interventions if entry['layer'] == name]
        sentences += [
            f'{name}: {sentence}'
            for sentence in (
                *_use(layer),
                *_speciality(layer, experts['run']),
                *_together(layer),
                *_effects(of_layer, experts),
                *_polysemanticity(layer, experts),
                *filter(None, [counterfactual.said(layer.get('counterfactual'))]),
            )
        ]
    of_all = [entry for entry in interventions if entry['layer'] == 'all']
    sentences += [f'All layers together: {s}' for s in _routing_effects(of_all, experts)]
    return [*sentences, *_limits(experts, interventions)]


def _use(layer: dict) -> Iterator[str]:
    """Collapsed? Dead?"""
    num_experts, num_decisions = layer['num_experts'], layer['num_decisions']
    if num_experts < 2 or num_decisions < 2:
        yield (
            f'{_number(num_decisions, "decision")} between {_number(num_experts, "expert")} cannot '
            'show any specialisation.'
        )
        return
    possible = math.log(num_experts)
    numbers = (
        f'{layer["mi_input"]:.3f} of {possible:.2f} nats, {_percent(layer["mi_input"] / possible)}'
    )
    if layer['collapsed']:
        yield (
            f'COLLAPSED: the choice of experts hardly depends on the input ({numbers}; below '
            f'{_percent(COLLAPSE_SHARE)} counts as collapsed); the layer works as a dense one.'
        )
    else:
        yield f'not collapsed: the input explains {numbers}, of the choice of experts.'
    if (dead := layer['dead_experts']) and len(dead) > MAX_NAMED:
        yield (
            f'{len(dead)} of {num_experts} experts are dead, and so candidates for pruning (load '
            f'below {_percent(DEAD_SHARE)} of the fair {_percent(1 / num_experts)}).'
        )
    elif dead:
        ids, loads = ', '.join(map(str, dead)), ', '.join(_percent(layer['load'][e]) for e in dead)
        yield (
            f'dead, and so candidates for pruning: expert {ids} (load {loads}; below '
            f'{_percent(DEAD_SHARE)} of the fair {_percent(1 / num_experts)} counts as dead).'
        )


def _speciality(layer: dict, run: dict) -> Iterator[str]:
    """Specialised by what, how strongly, and who does what?"""
    if layer['num_experts'] < 2 or layer['num_decisions'] < 2:
        return
    found = [entry for entry in _associations(layer) if entry[1] not in _NOT_A_SPECIALITY]
    if not found:
        yield 'nothing was measured that the experts could be specialised by.'
        return
    qualified = sorted((entry for entry in found if _qualifies(entry[2])), key=_rank)
    if not qualified:
        yield _no_evidence(layer, found)
        return
    if layer['collapsed']:
        name, numbers = _name(qualified[0][1]), _numbers(qualified[0])
        yield f'the little that the choice depends on goes with {name} ({numbers}).'
        return
    main = qualified[0]
    _, attribute, best = main
    strength = _excess(best)
    words = ((STRONG_SHARE, 'strongly'), (CLEAR_SHARE, 'clearly'), (0, 'weakly'))
    how = next(word for share, word in words if strength >= share)
    yield f'{how} specialised by {_name(attribute)} ({_numbers(main)}).'
    # Three words are easier to read than fourteen ranges.
    coco = [entry for entry in found if entry[:2] == (main[0], 'size_coco')]
    yield from _examples(coco[0] if attribute == 'size' and coco else main, run)
    # The two attributes of size say the same thing.
    said = _SIZES if attribute in _SIZES else (attribute,)
    others = [entry for entry in qualified if entry[1] not in said]
    if others:
        listed = '; '.join(f'{_name(entry[1])} ({_numbers(entry)})' for entry in others)
        yield f'also associated, not independently of the first: {listed}.'
    if best['num_units'] < FEW_DECISIONS:
        yield (
            f'only {_number(best["num_units"], "decision")} had something to compare with: the '
            'shares are rough.'
        )
    # A token can be all that there is of an image.
    several = layer['num_decisions'] > run.get('num_images', 0)
    if layer.get('granularity') in _STILL_DEPENDENT and several:
        yield (
            f'one decision per {layer["granularity"]}: those of one image resemble each other, so '
            'the p-values are too small; trust the nats.'
        )


def _no_evidence(layer: dict, found: list[tuple[str, str, dict]]) -> str:
    best = min(found, key=lambda entry: (entry[2]['p_value'], -_excess(entry[2])))
    _, attribute, association = best
    numbers = f'{_name(attribute)}: {_numbers(best)}'
    p, units = association['p_value'], association['num_units']
    smallest = 1 / (1 + association['permutations'])
    if units < 2:
        return f'no evidence of a specialisation: {_number(units, "decision")} cannot be compared.'
    if smallest >= SIGNIFICANT:
        return (
            f'{association["permutations"]} permutations cannot reach p < {SIGNIFICANT:g}, so no '
            f'specialisation can be shown; at most {numbers}.'
        )
    few = f'; {units} decisions are few' if units < FEW_DECISIONS else ''
    if p < SIGNIFICANT:
        real = (entry for entry in found if entry[2]['p_value'] < SIGNIFICANT)
        strongest = max(real, key=lambda entry: _excess(entry[2]))
        return (
            f'no specialisation worth the name: associations are there, but the strongest explains '
            f'little ({_name(strongest[1])}: {_numbers(strongest)}{few}).'
        )
    if p < HINT:
        return f'a hint of a specialisation, no proof ({numbers}{few}).'
    unexplained = (
        '' if layer['collapsed'] else '; what the choice depends on was not among what was compared'
    )
    return f'no evidence of a specialisation (closest to it, {numbers}{few}){unexplained}.'


def _examples(entry: tuple[str, str, dict], run: dict) -> Iterator[str]:
    """One thing that somebody carries, and what somebody else sees: the largest parts of the MI."""
    source, attribute, association = entry
    counts = association['counts']
    total = sum(map(sum, counts))
    if total <= 0:
        return
    of_bin = [sum(row) for row in counts]
    of_expert = [sum(column) for column in zip(*counts, strict=True)]
    parts = sorted(
        (
            (count / total * math.log(count * total / (of_bin[b] * of_expert[e])), b, e)
            for b, row in enumerate(counts)
            for e, count in enumerate(row)
            if of_bin[b] >= max(MIN_EXAMPLE_SHARE * total, MIN_EXAMPLE_COUNT)
            and of_expert[e] >= MIN_EXAMPLE_COUNT
            and count * total >= MIN_LIFT * of_bin[b] * of_expert[e] > 0
        ),
        reverse=True,
    )
    if not parts:
        return
    _, b, e = parts[0]
    things = _things(source, attribute, association['bins'][b], run)
    sentence = (
        f'expert {e} carries {_percent(association["expert_given_bin"][b][e])} of {things} (of '
        f'everything: {_percent(of_expert[e] / total)})'
    )
    if other := next(((c, f) for _, c, f in parts if f != e and c != b), None):
        c, f = other
        things = _things(source, attribute, association['bins'][c], run)
        sentence += (
            f'; {_percent(association["bin_given_expert"][c][f])} of what expert {f} sees are '
            f'{things} (of everything: {_percent(of_bin[c] / total)})'
        )
    yield f'{sentence}.'


def _together(layer: dict) -> Iterator[str]:
    """Pairs that are never told apart."""
    num_experts, together = layer['num_experts'], layer['coactivation']
    if num_experts < 2 or layer['num_decisions'] < 2:
        return
    if layer.get('kind') == 'factorised':
        yield (
            f'on average {sum(layer["active_share"]):.1f} of the {num_experts} experts have a '
            'coefficient above 0.'
        )
        return
    if layer.get('top_k') == num_experts:
        yield f'every decision uses all {num_experts} experts, so only their weights can differ.'
        return
    experts = layer.get('coactivation_experts') or range(num_experts)
    alive = [i for i, e in enumerate(experts) if e not in layer['dead_experts']]
    for i, a in enumerate(alive):
        for b in alive[i + 1 :]:
            either = together[a][a] + together[b][b] - together[a][b]
            if either > 0 and together[a][b] >= TOGETHER_SHARE * either:
                yield (
                    f'experts {experts[a]} and {experts[b]} are redundant as a choice: of the '
                    f'decisions with either, {_percent(together[a][b] / either)} use both; they '
                    'act as one expert.'
                )


def _effects(interventions: list[dict], experts: dict) -> Iterator[str]:
    """What removing experts does to the main metric, and what other changes do."""
    metric, before = _main_metric(experts)
    if before is not None:
        without = sorted(
            (value - before, expert)
            for kind, expert, value in _values(interventions, metric)
            if kind == 'without'
        )
        free = sorted((e, c) for c, e in without if c >= -TOLERANCE[metric])
        if free:
            listed = ', '.join(f'{e} ({change:+.3f})' for e, change in free)
            yield (
                f'can be pruned, each on its own (not tried together): expert {listed}; {metric} '
                f'falls from {before:.3f} by no more than {TOLERANCE[metric]:g}.'
            )
        elif without:
            yield (
                f'no expert can be pruned: each removal costs more than {TOLERANCE[metric]:g} '
                f'{metric}.'
            )
        if without and without[0][0] < -TOLERANCE[metric]:
            change, expert = without[0]
            yield (
                f'expert {expert} is needed most: without it {metric} changes by {change:+.3f} '
                f'from {before:.3f}.'
            )
    yield from _routing_effects(interventions, experts)


def _polysemanticity(layer: dict, experts: dict) -> Iterator[str]:
    """How many classes hang on one expert?"""
    found = layer.get('polysemanticity')
    if not found:
        return
    metric, count = _main_metric(experts)[0], found['num_zeroed']
    if not found['num_mattering']:
        yield f'zeroing any single one of {count} experts lowers the {metric} of no class.'
        return
    most = max(range(count), key=lambda i: found['drops'][i])
    worst = math.sqrt(len(experts['run']['classes']) - 1)
    yield (
        f'class-level polysemanticity {found["mean"]:.2f} (0: one class alone hangs on each '
        f'expert; at most {worst:.2f}), mean of the {found["num_mattering"]} of {count} experts '
        f'whose zeroing lowers some class; expert {found["experts"][most]} costs most, '
        f'{100 * found["drops"][most]:.1f} points of {metric} of class {found["classes"][most]}.'
    )


def _routing_effects(interventions: list[dict], experts: dict) -> Iterator[str]:
    """Does the choice matter? Random, equal, and one expert alone."""
    metric, before = _main_metric(experts)
    if before is None:
        return
    values = _values(interventions, metric)
    for kind, _, value in values:
        if kind not in _CHANGES:
            continue
        what, harmless, harmful = _CHANGES[kind]
        numbers = f'{metric} {value:.3f} instead of {before:.3f}'
        if value >= before - TOLERANCE[metric]:
            yield f'{what} does not hurt ({numbers}): {harmless}.'
        else:
            yield f'{what} costs {before - value:.3f} ({numbers}): {harmful}.'
    alone = [(value, expert) for kind, expert, value in values if kind == 'only']
    if alone:
        value, expert = max(alone, key=lambda x: (x[0], -x[1]))
        numbers = f'{metric} {value:.3f} instead of {before:.3f}'
        if value >= before - TOLERANCE[metric]:
            yield f'expert {expert} alone does as well as all together ({numbers}).'
        else:
            yield f'the best single expert, {expert}, does not replace the others ({numbers}).'


def _limits(experts: dict, interventions: list[dict]) -> Iterator[str]:
    if not experts['layers']:
        return
    if not interventions:
        yield (
            'No interventions were run: what experts are used for is known, but not what they are '
            'needed for.'
        )
        return
    metric, before = _main_metric(experts)
    if before is None:
        yield f'{metric} is undefined here, so the effects of the interventions cannot be judged.'
    elif (images := experts['run']['num_images']) < FEW_IMAGES:
        yield (
            f'The effects were measured on {_number(images, "image")}: differences near the '
            f'tolerance of {TOLERANCE[metric]:g} {metric} can be chance.'
        )


def _associations(layer: dict) -> list[tuple[str, str, dict]]:
    """(source, attribute, association), each attribute once."""
    found = {}
    for source in reversed(_SOURCES):
        for attribute, association in layer['associations'].get(source, {}).items():
            if association['num_units'] or attribute not in found:
                found[attribute] = (source, attribute, association)
    return list(found.values())


def _qualifies(association: dict) -> bool:
    return association['p_value'] < SIGNIFICANT and _excess(association) >= MIN_SHARE


def _rank(entry: tuple[str, str, dict]) -> tuple[bool, float]:
    """Size first, which is what detectors divide their work by; then by strength."""
    return entry[1] not in _SIZES, -_excess(entry[2])


def _excess(association: dict) -> float:
    """Information above chance as a share of the possible; many bins have more of it by chance."""
    above = association['mi'] - association['chance']
    return above / association['mi_max'] if association['mi_max'] > 0 else 0.0


def _numbers(entry: tuple[str, str, dict]) -> str:
    source, _, association = entry
    mi, most = association['mi'], association['mi_max']
    share = f', {_percent(mi / most)} of the possible {most:.2f}' if most > 0 else ''
    return (
        f'{source}, {mi:.3f} nats{share}, by chance {association["chance"]:.3f}, '
        f'p = {association["p_value"]:.3g}, {_number(association["num_units"], "decision")}'
    )


def _things(source: str, attribute: str, name: str, run: dict) -> str:
    thing = 'images' if source == 'objects' and run['task'] == 'classification' else source
    if attribute == 'size_coco':
        return f'{name} {thing}'
    return {
        'size': f'{thing} of {name} px',
        'level': f'{thing} on level {name}',
        'position': f'{thing} at the {name}',
    }.get(attribute, f'{thing} of {attribute} {name}')


def _values(interventions: list[dict], metric: str) -> list[tuple[str, int | None, float]]:
    """(kind, expert, main metric), where it is defined."""
    found = [(e['kind'], e['expert'], (e['metrics'] or {}).get(metric)) for e in interventions]
    return [entry for entry in found if entry[2] is not None]


def _main_metric(experts: dict) -> tuple[str, float | None]:
    metric = 'accuracy' if experts['run']['task'] == 'classification' else 'AP'
    return metric, (experts['metrics'] or {}).get(metric)


def _name(attribute: str) -> str:
    return _NAMES.get(attribute, attribute)


def _percent(share: float) -> str:
    return f'{100 * share:.0f} %' if share >= 0.1 else f'{100 * share:.2g} %'


def _number(n: int, what: str) -> str:
    return f'{n} {what}' if n == 1 else f'{n} {what}s'
