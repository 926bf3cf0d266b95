"""The numbers of ``experts.json`` in plain sentences, each with the numbers it rests on.

Nothing is judged without power. "Nothing", "can be pruned", "does not matter" are said where the
whole 95 % interval lies within what counts as nothing; where it reaches beyond, the verdict is that
it cannot be told, between what and what it lies, and how many images would do, as intervals shrink
with the square root of their number.
"""

import math
from collections.abc import Iterator, Sequence

from mmdet_moe.analysis.report.names import layer_names
from mmdet_moe.analysis.statistics.inference import MIN_IMAGES, RULE_OF_THREE
from mmdet_moe.moe.utilization import COLLAPSE_SHARE, DEAD_SHARE

#: Of a p-value that is corrected for all tests of the layer.
SIGNIFICANT = 0.01
#: Between the two it is a hint: worth more data, no proof.
HINT = 0.05
#: Information above chance, as a share of the possible, below which an association is too weak to
#: be called a specialisation. With enough data everything is significant.
MIN_SHARE = 0.02
#: The same, from which on words get stronger. With k = 2 of 4 experts that weigh alike, even a
#: perfect division reaches only one half.
CLEAR_SHARE, STRONG_SHARE = 0.1, 0.3
#: What the main metric may fall by and still count as unchanged: 0.005 AP, 0.5 points of accuracy.
#: Half a point on the usual scale of 100; less is seldom worth a larger model.
TOLERANCE = {'AP': 0.005, 'accuracy': 0.005}
#: And never more than this share of it.
MAX_LOSS = 0.1
#: A bootstrap of an effect knows how large it can be only if as many images show any.
MIN_CHANGED = 10
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
_NAMES = {
    'cluster': 'hidden cluster',
    'dataset': 'data set',
    'level': 'pyramid level',
    'size': 'object size',
    'size_coco': 'object size (small, medium, large)',
    'position': 'position in the image',
}
# Kind of intervention: what it is, what it means when it does no harm, when it does, and what is
# asked.
_CHANGES = {
    'random': (
        'random routing',
        'the routing does not matter',
        'it matters which experts are chosen',
        'whether the routing matters',
    ),
    'equal': (
        'weighing all experts equally',
        'they can be averaged',
        'it matters that decisions differ',
        'whether they can be averaged',
    ),
}
Entry = tuple[str, str, dict]  # source, attribute, association


def verdict(experts: dict, more: Sequence[str] = ()) -> list[dict]:
    """What the experts of each layer do, and what they do not.

    Args:
        experts: The content of ``experts.json``; ``verdict`` itself is not read.
        more: Sentences of others, which become details; those on a layer start with its path and a
            colon.

    Returns:
        For each layer, and at last for all of them together: ``layer``, its path, or None; ``name``
        in human words; ``lines``, at most three of a layer (its use, its speciality, what happens
        without it); ``details``, further sentences.
    """
    interventions = experts.get('interventions') or []
    entries = []
    names = layer_names(experts['layers'])
    for path, layer in experts['layers'].items():
        of_layer = [entry for entry in interventions if entry['layer'] == path]
        speciality, on_speciality = _speciality(layer, experts['run'])
        effect, on_effects = _effects(of_layer, experts)
        use, on_use = _use(layer, experts['run']['num_images'])
        lines = [line for line in (use, speciality, effect) if line]
        details = [*on_use, *on_speciality, *_together(layer), *on_effects]
        details += _polysemanticity(layer, experts)
        entries.append({'layer': path, 'name': names[path], 'lines': lines, 'details': details})
    of_all = [entry for entry in interventions if entry['layer'] == 'all']
    lines = [text for _, text in _routing_effects(of_all, experts)]
    details = list(_limits(experts, interventions))
    by_layer = {entry['layer']: entry['details'] for entry in entries}
    for sentence in more:
        path, _, rest = sentence.partition(': ')
        by_layer.get(path, details).append(rest if path in by_layer else sentence)
    if lines or details:
        entries.append({'layer': None, 'name': 'All layers', 'lines': lines, 'details': details})
    return entries


def spoken(entries: list[dict], verbose: bool = False) -> Iterator[str]:
    """A verdict line by line, as a terminal shows it.

    Args:
        entries: What :func:`verdict` returned.
        verbose: With the details.
    """
    for entry in entries:
        said = [*entry['lines'], *(entry['details'] if verbose else [])]
        if said:
            path = f' ({entry["layer"]})' if entry['layer'] not in (None, entry['name']) else ''
            yield f'{entry["name"][:1].upper()}{entry["name"][1:]}{path}'
            yield from (f'- {sentence}' for sentence in said)


# Use ---------------------------------------------------------------------------------------------


def _use(layer: dict, images: int) -> tuple[str, list[str]]:
    """Collapsed? Dead?"""
    num_experts, num_decisions = layer['num_experts'], layer['num_decisions']
    if num_experts < 2 or num_decisions < 2:
        return (
            f'{_number(num_decisions, "decision")} between {_number(num_experts, "expert")} cannot '
            'show any specialisation.'
        ), []
    possible = math.log(num_experts)
    numbers = (
        f'{layer["mi_input"]:.3f} of {possible:.2f} nats, {_percent(layer["mi_input"] / possible)}'
    )
    if layer['collapsed']:
        line = (
            f'COLLAPSED: the choice of experts hardly depends on the input ({numbers}; below '
            f'{_percent(COLLAPSE_SHARE)} counts as collapsed); the layer works as a dense one'
        )
    else:
        line = f'not collapsed: the input explains {numbers}, of the choice of experts'
    details = []
    limit = DEAD_SHARE / num_experts
    counts = f'below {_percent(DEAD_SHARE)} of the fair {_percent(1 / num_experts)} counts as dead'
    ends = layer['load_interval'] or [(0, 1)] * num_experts
    dead = [e for e in layer['dead_experts'] if ends[e][1] < limit]
    if dead:
        if len(dead) <= MAX_NAMED:
            loads = ', '.join(_percent(layer['load'][e]) for e in dead)
            details.append(
                f'dead, and so candidates for pruning: expert {_of(dead, num_experts)} (load '
                f'{loads}; {counts}).'
            )
        line += f'; dead experts: {_of(dead, num_experts)}'
    if idle := [e for e in layer['dead_experts'] if e not in dead]:
        most = max(ends[e][1] for e in idle)
        # Of those that nothing was seen of, it goes with the number of images, not with its root.
        more = _images(images * most / limit)
        line += f'; perhaps dead: {_of(idle, num_experts)}'
        details.append(
            f'whether expert {_of(idle, num_experts)} is dead cannot be told from '
            f'{_number(images, "image")} (load up to {_percent(most)}; {counts}); about {more} '
            'images would do.'
        )
    return f'{line}.', details


def _of(ids: list[int], count: int) -> str:
    return ', '.join(map(str, ids)) if len(ids) <= MAX_NAMED else f'{len(ids)} of {count}'


# Speciality --------------------------------------------------------------------------------------


def _speciality(layer: dict, run: dict) -> tuple[str, list[str]]:
    """Specialised by what, how strongly, what remains of the rest, and who does what?"""
    if layer['num_experts'] < 2 or layer['num_decisions'] < 2:
        return '', []
    found = _associations(layer)
    if not found:
        return 'nothing was measured that the experts could be specialised by.', []
    lead = _lead(found)
    if lead is None:
        return _no_evidence(layer, found, run), [*_compared(found, run)]
    (_, attribute, association), given = lead
    best = association if given is None else association['given'][given]
    within = '' if given is None else f' within the same {_name(given)}'
    name, numbers = f'{_name(attribute)}{within}', _numbers(best)
    source = _things_of(lead[0][0], run)
    if layer['collapsed']:
        line = f'the little that the choice depends on goes with {name} ({source}: {numbers}).'
        return line, [*_compared(found, run)]
    strength = _excess(best)
    words = ((STRONG_SHARE, 'strongly'), (CLEAR_SHARE, 'clearly'), (0, 'weakly'))
    how = next(word for share, word in words if strength >= share)
    line = f'{how} specialised by {name} ({source}: {numbers})'
    if rest := _beyond(lead, found):
        line += f'; {rest}'
    # Three words are easier to read than fourteen ranges.
    coco = [entry for entry in found if entry[:2] == (lead[0][0], 'size_coco')]
    shown = coco[0] if attribute == 'size' and coco else lead[0]
    examples = [] if given is not None else _examples(shown, run)
    return f'{line}.', [*examples, *_compared(found, run)]


def _lead(found: list[Entry]) -> tuple[Entry, str | None] | None:
    """What explains the most by itself, and given what; None if nothing qualifies.

    An attribute that says nothing beyond another one gives way to it: size to the level that it
    goes by, even if it tells as much of the choice.
    """
    qualified = [entry for entry in found if _qualifies(entry[2])]
    for entry in sorted(qualified, key=lambda entry: -_above_chance(entry[2])):
        others = [other[1] for other in qualified if other[1] not in _same(entry[1])]
        given = entry[2]['given']
        if all(_qualifies(given[name]) for name in others if name in given):
            return entry, None
    # Nothing by itself, but perhaps within the levels, whose effects can cancel each other.
    within = [
        (entry, name)
        for entry in found
        for name, one in entry[2]['given'].items()
        if _qualifies(one)
    ]
    if within and not qualified:
        return max(within, key=lambda pair: _above_chance(pair[0][2]['given'][pair[1]]))
    return (max(qualified, key=lambda e: _above_chance(e[2])), None) if qualified else None


def _beyond(lead: tuple[Entry, str | None], found: list[Entry]) -> str:
    """What remains of the other attributes beyond the first one."""
    (_, attribute, association), given = lead
    if given is not None:
        regardless = f'without regard to the {_name(given)}'
        if _is_there(association):
            return f'{regardless} it is not told from what random routers have'
        if association['interval'][1] <= MIN_SHARE * association['mi_max']:
            return f'nothing of it shows {regardless}'
        return f'whether it shows {regardless} cannot be told ({_numbers(association)})'
    parts, said = [], set(_same(attribute))
    # Size first, which is what detectors are said to divide their work by.
    for _, other, one in sorted(found, key=lambda e: (e[1] not in _SIZES, -_above_chance(e[2]))):
        rest = one['given'].get(attribute)
        # Also of what goes with the choice no more than with that of random routers: whoever knows
        # that it does wants to know what is left of it.
        if other in said or rest is None or not (_is_there(one) or _is_there(rest)):
            continue
        said |= set(_same(other))
        parts.append(_remainder(f'{_name(other)} beyond it', rest))
    if not parts and (own := association['given'].get('level')) is not None:
        parts.append(_remainder('', own))
    return '; '.join(parts[:2])


def _remainder(what: str, rest: dict) -> str:
    """Of something beyond the first attribute, or of the first one itself beyond the level."""
    numbers = _numbers(rest)
    by, of = (f'by {what}', f' of {what}') if what else 2 * (' beyond the pyramid level',)
    if _qualifies(rest):
        return f'also {by.strip()} ({numbers})'
    if _is_there(rest):
        control = f'up to {rest["control"]:.3f} nats'
        than = 'no more than' if rest['mi'] <= rest['control'] else 'not told from'
        return f'{by.strip()} {than} routers with random weights ({control}; {numbers})'
    if not rest['num_images']:
        return f'whether {by.strip()} cannot be told ({numbers})'
    low, high = rest['interval']
    enough = MIN_SHARE * rest['mi_max']
    if high <= enough:
        return f'nothing{of} ({numbers})'
    more = _images_needed(rest['num_images'], (high - low) / 2, enough)
    return f'whether {by.strip()} cannot be told ({numbers}; about {more} images would do)'


def _no_evidence(layer: dict, found: list[Entry], run: dict) -> str:
    source, attribute, best = min(found, key=lambda e: (e[2]['p_adjusted'], -_excess(e[2])))
    p, images = best['p_adjusted'], best['num_images']
    numbers = f'{_name(attribute)}, {_things_of(source, run)}: {_numbers(best)}'
    smallest = 1 / (1 + best['permutations'])
    if images < 2:
        return f'no evidence of a specialisation: {_number(images, "image")} cannot be compared.'
    if smallest >= SIGNIFICANT:
        return (
            f'{best["permutations"]} flips cannot reach p < {SIGNIFICANT:g}, so no '
            f'specialisation can be shown; at most {numbers}.'
        )
    real = [entry for entry in found if entry[2]['p_adjusted'] < SIGNIFICANT]
    if real:
        source, attribute, best = max(real, key=lambda entry: _excess(entry[2]))
        numbers = f'{_name(attribute)}, {_things_of(source, run)}: {_numbers(best)}'
        if (control := best['control']) is not None and _excess(best) >= MIN_SHARE:
            told = 'beyond' if best['mi'] <= control else 'that is told from'
            return (
                f'no specialisation {told} what routers with random weights give (up to '
                f'{control:.3f} nats; {numbers}).'
            )
        return (
            'no specialisation worth the name: associations are there, but the strongest explains '
            f'little ({numbers}).'
        )
    if p < HINT:
        return f'a hint of a specialisation, no proof ({numbers}).'
    open_ = max(found, key=lambda e: e[2]['interval'][1] - MIN_SHARE * e[2]['mi_max'])[2]
    high, enough = open_['interval'][1], MIN_SHARE * open_['mi_max']
    if high > enough:
        more = _images_needed(open_['num_images'], high, enough)
        return (
            f'whether there is a specialisation cannot be told from {_number(images, "image")} '
            f'(closest to it: {numbers}; about {more} images would do).'
        )
    unexplained = (
        '' if layer['collapsed'] else '; what the choice depends on was not among what was compared'
    )
    return f'no specialisation by anything compared (closest to it: {numbers}){unexplained}.'


def _compared(found: list[Entry], run: dict) -> Iterator[str]:
    """All numbers, by themselves and given others."""
    for source, attribute, association in sorted(found, key=lambda e: -_above_chance(e[2])):
        what = f'{_name(attribute)} ({_things_of(source, run)})'
        if association['mi_max'] == 0:
            yield f'{what}: nothing to tell, for all have the same, or all go to one expert.'
            continue
        text = f'{what}: {_numbers(association, full=True)}'
        for name, one in association['given'].items():
            text += f'; given the {_name(name)}: {_numbers(one)}'
        if (control := association['control']) is not None:
            text += f'; routers with random weights: up to {control:.3f} nats'
        yield f'{text}.'


def _associations(layer: dict) -> list[Entry]:
    """Each attribute once; informations know their ``control``, the most that any of the routers
    with random weights has.
    """
    found = {}
    for source in reversed(_SOURCES):
        for attribute, association in layer['associations'].get(source, {}).items():
            if association['num_units'] or attribute not in found:
                control = (association.get('controls') or {}).get('random') or {}
                draws = control.get('draws_given') or {}
                given = {
                    name: {**one, 'control': max(draws.get(name) or [], default=None)}
                    for name, one in (association.get('given') or {}).items()
                }
                most = max(control.get('draws') or [], default=None)
                known = {**association, 'control': most, 'given': given}
                found[attribute] = (source, attribute, known)
    return list(found.values())


def _qualifies(one: dict) -> bool:
    """Significant, not negligible, and more than all routers with random weights have.

    Those divide their input, too, by whatever the features are full of. Where nothing is known of
    them, every information is more.
    """
    return _is_there(one) and (one['control'] is None or one['interval'][0] > one['control'])


def _is_there(one: dict) -> bool:
    """Significant and not negligible."""
    return one['p_adjusted'] < SIGNIFICANT and _excess(one) >= MIN_SHARE


def _same(attribute: str) -> tuple[str, ...]:
    """The attributes that say the same thing."""
    return _SIZES if attribute in _SIZES else (attribute,)


def _above_chance(one: dict) -> float:
    return one['mi'] - one['chance']


def _excess(one: dict) -> float:
    """Information above chance as a share of the possible; many bins have more of it by chance."""
    return _above_chance(one) / one['mi_max'] if one['mi_max'] > 0 else 0.0


def _numbers(one: dict, full: bool = False) -> str:
    if (left_out := one.get('left_out', 0)) == 1:
        return 'not tested, as each value is on too few images'
    low, high = one['interval']
    digits = 3 if max(one['mi'], high) >= 0.01 else 4
    text = f'{one["mi"]:.{digits}f} nats'
    if full:
        text += f', {_percent(one["mi"] / one["mi_max"])} of the possible {one["mi_max"]:.2f}'
    text += f', {low:.{digits}f} to {high:.{digits}f}'
    # The interval is without the bias of the estimate, which may so lie above it.
    if full or one['mi'] > high:
        text += f', by chance {one["chance"]:.{digits}f}'
    text += f', p = {one["p_adjusted"]:.2g}'
    if left_out:
        text += f', {_percent(left_out)} left out, of values on too few images'
    return f'{text}, {_number(one["num_images"], "image")}' if full else text


def _examples(entry: Entry, run: dict) -> Iterator[str]:
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


def _things(source: str, attribute: str, name: str, run: dict) -> str:
    thing = _things_of(source, run)
    if attribute == 'size_coco':
        return f'{name} {thing}'
    return {
        'size': f'{thing} of {name} px',
        'level': f'{thing} on level {name}',
        'position': f'{thing} at the {name}',
    }.get(attribute, f'{thing} of {attribute} {name}')


def _things_of(source: str, run: dict) -> str:
    return 'images' if source == 'objects' and run['task'] == 'classification' else source


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


# Effects -----------------------------------------------------------------------------------------


def _effects(interventions: list[dict], experts: dict) -> tuple[str, list[str]]:
    """What removing experts does to the main metric, and what other changes do."""
    metric, before = _main_metric(experts)
    if before is None or not interventions:
        return '', []
    routing = _routing_effects(interventions, experts)
    lines, details = [text for kind, text in routing if kind == 'random'], []
    details += [text for kind, text in routing if kind != 'random']
    tolerance, images = _tolerance(metric, before), experts['run']['num_images']
    judged = {'harmless': [], 'harmful': [], None: []}
    for entry in interventions:
        if entry['kind'] == 'without' and (effect := _effect(entry, metric)) is not None:
            judged[_judgement(effect, tolerance, images)].append((entry['expert'], effect))
    free, needed, unknown = judged.values()
    short = []
    if free:
        short.append(f'prunable, each on its own: expert {_listed(free)}')
        details.append(
            f'can be pruned, each on its own (not tried together): expert '
            f'{_with_effects(free)}; {metric} falls from {before:.3f} by no more than '
            f'{tolerance:.2g}.'
        )
    if needed:
        short.append(f'needed: expert {_listed(needed)}')
        expert, effect = min(needed, key=lambda pair: pair[1]['value'])
        details.append(
            f'expert {expert} is needed most: without it {metric} changes by '
            f'{_change(effect)} from {before:.3f}.'
        )
        if not free and not unknown:
            details.append(
                f'no expert can be pruned: each removal costs more than {tolerance:.2g} {metric}.'
            )
    if unknown:
        short.append(f'open: expert {_listed(unknown)}')
        more = max(_more_images(effect, tolerance, images) for _, effect in unknown)
        details.append(
            f'whether it can be pruned cannot be told of expert {_with_effects(unknown)} from '
            f'{_number(images, "image")}; about {_images(more)} images would do.'
        )
    if short:
        lines.append(f'{"; ".join(short)}.')
    return ' '.join(lines), details


def _routing_effects(interventions: list[dict], experts: dict) -> list[tuple[str, str]]:
    """Does the choice matter? Random, equal, and one expert alone: kind and sentence."""
    metric, before = _main_metric(experts)
    if before is None:
        return []
    tolerance, images = _tolerance(metric, before), experts['run']['num_images']
    found, alone = [], []
    for entry in interventions:
        kind, effect = entry['kind'], _effect(entry, metric)
        if effect is None:
            continue
        if kind == 'only':
            alone.append((entry['metrics'][metric], entry['expert'], effect))
        if kind not in _CHANGES:
            continue
        what, harmless, harmful, asked = _CHANGES[kind]
        text = f'{what} changes {metric} by {_change(effect)} from {before:.3f}'
        judgement = _judgement(effect, tolerance, images)
        if judgement == 'harmless':
            # A loss is ruled out, a gain is not: it may matter, but the router is not needed.
            gains = kind == 'random' and _ends(effect, images)[1] > tolerance
            text += f': {"the router is no better than chance" if gains else harmless}.'
        elif judgement == 'harmful':
            text += f': {harmful}.'
        else:
            text = f'{asked} {_cannot_be_told(effect, metric, tolerance, images)}.'
        found.append((kind, text))
    if alone:
        value, expert, effect = max(alone, key=lambda x: (x[0], -x[1]))
        numbers = f'{metric} {value:.3f}, {_change(effect)}'
        judgement = _judgement(effect, tolerance, images)
        if judgement == 'harmless':
            text = f'expert {expert} alone does as well as all together ({numbers}).'
        elif judgement == 'harmful':
            text = f'the best single expert, {expert}, does not replace the others ({numbers}).'
        else:
            text = (
                f'whether expert {expert} alone does as well as all together '
                f'{_cannot_be_told(effect, metric, tolerance, images)}.'
            )
        found.append(('only', text))
    return found


def _tolerance(metric: str, before: float) -> float:
    """What the main metric may fall by: a model that finds nothing has nothing to lose."""
    return min(TOLERANCE[metric], MAX_LOSS * before)


def _effect(entry: dict, metric: str) -> dict | None:
    """Its difference to the unchanged model; None where nothing can be measured."""
    effect = (entry.get('difference') or {}).get(metric)
    return effect if effect and effect['interval'] else None


def _ends(effect: dict, images: int) -> tuple[float, float]:
    """The interval; where a bootstrap cannot know, with what that many images can exclude."""
    low, high = effect['interval']
    if _is_blind(effect, images):
        unseen = RULE_OF_THREE / max(images, 1)
        return low - unseen, high + unseen
    return low, high


def _is_blind(effect: dict, images: int) -> bool:
    """Whether a bootstrap cannot know: (nearly) all images say the same, or there are few."""
    low, high = effect['interval']
    few = images < MIN_IMAGES or effect.get('num_changed', MIN_CHANGED) < MIN_CHANGED
    return few or high - low < 1e-12


def _judgement(effect: dict, tolerance: float, images: int) -> str | None:
    """``'harmless'`` or ``'harmful'``, or None: it cannot be told."""
    low, high = _ends(effect, images)
    return 'harmless' if low >= -tolerance else 'harmful' if high < -tolerance else None


def _more_images(effect: dict, tolerance: float, images: int) -> float:
    """So many that the interval would lie on one side of the tolerance."""
    low, high = _ends(effect, images)
    value = effect['value']
    distance = abs(value + tolerance)
    half = value - low if value >= -tolerance else high - value
    if _is_blind(effect, images):
        return RULE_OF_THREE / max(distance, 1e-9)  # not of the square root
    return images * (half / max(distance, 1e-9)) ** 2


def _cannot_be_told(effect: dict, metric: str, tolerance: float, images: int) -> str:
    low, high = _ends(effect, images)
    more = _more_images(effect, tolerance, images)
    return (
        f'cannot be told from {_number(images, "image")} (effect on {metric} between {low:+.3f} '
        f'and {high:+.3f}); about {_images(more)} images would do'
    )


def _images_needed(images: int, width: float, enough: float) -> str:
    """For an interval of that width, whose width goes with the square root, to be small enough."""
    return _images(images * (width / max(enough, 1e-9)) ** 2)


def _images(count: float) -> str:
    """Two digits, rounded up; nobody has more than a hundred million."""
    if count > 1e8:
        return 'more than 100,000,000'
    step = 10 ** max(0, math.floor(math.log10(max(count, 1))) - 1)
    return f'{math.ceil(count / step) * step:,}'


def _change(effect: dict) -> str:
    low, high = effect['interval']
    return f'{effect["value"]:+.3f} ({low:+.3f} to {high:+.3f})'


def _listed(judged: list[tuple[int, dict]]) -> str:
    ids = sorted(expert for expert, _ in judged)
    return ', '.join(map(str, ids)) if len(ids) <= MAX_NAMED else f'{len(ids)} of them'


def _with_effects(judged: list[tuple[int, dict]]) -> str:
    return ', '.join(
        f'{expert} {_change(effect)}' for expert, effect in sorted(judged, key=lambda x: x[0])
    )


def _polysemanticity(layer: dict, experts: dict) -> Iterator[str]:
    """How many classes hang on one expert?"""
    found = layer.get('polysemanticity')
    if not found:
        return
    metric, count = _main_metric(experts)[0], found['num_zeroed']
    if not found['num_mattering']:
        yield f'zeroing any single one of {count} experts lowers the {metric} of no class.'
        return
    worst = math.sqrt(len(experts['run']['classes']) - 1)
    named = 'which expert costs which class most cannot be told'
    if largest := found.get('largest'):
        named = (
            f'expert {largest["expert"]} costs most, {100 * largest["drop"]:.1f} points of '
            f'{metric} of class {largest["class"]} (p = {largest["p_adjusted"]:.2g})'
        )
    yield (
        f'class-level polysemanticity {found["mean"]:.2f} (0: one class alone hangs on each '
        f'expert; at most {worst:.2f}), mean of the {found["num_mattering"]} of {count} experts '
        f'whose zeroing lowers some class; {named}.'
    )


def _limits(experts: dict, interventions: list[dict]) -> Iterator[str]:
    if not experts['layers']:
        return
    yield (
        'p-values are of tests that flip whole images, corrected for all tests of a layer '
        '(Westfall and Young); intervals hold 95 %, by a bootstrap over images.'
    )
    if not interventions:
        yield (
            'No interventions were run: what experts are used for is known, but not what they are '
            'needed for.'
        )
        return
    metric, before = _main_metric(experts)
    if 0 < (images := experts['run']['num_images']) < MIN_IMAGES:
        yield (
            f'{_number(images, "image")} are too few for intervals, and for a judgement of the '
            f'interventions; {MIN_IMAGES} are the least.'
        )
    if before is None:
        yield f'{metric} is undefined here, so the effects of the interventions cannot be judged.'


def _main_metric(experts: dict) -> tuple[str, float | None]:
    metric = 'accuracy' if experts['run']['task'] == 'classification' else 'AP'
    return metric, (experts['metrics'] or {}).get(metric)


def _name(attribute: str) -> str:
    return _NAMES.get(attribute, attribute)


def _percent(share: float) -> str:
    return f'{100 * share:.0f} %' if share >= 0.1 else f'{100 * share:.2g} %'


def _number(n: int, what: str) -> str:
    return f'{n} {what}' if n == 1 else f'{n} {what}s'
