"""Of very many experts only some can be looked at: those with the most weight."""

import numpy as np

from mmdet_moe.analysis.statistics.layer_statistics import MAX_PAIRED

#: Experts of a layer that pictures show; a table or a file has all.
MAX_SHOWN = MAX_PAIRED
#: Interventions with one expert zeroed that pictures show, those that cost most.
MAX_ZEROED = 16
#: Cells of heat maps with larger p-values are drawn as if nothing was there.
SIGNIFICANT_CELL = 0.05
_TABLES = (
    *('counts', 'bin_given_expert', 'expert_given_bin', 'cell_p'),
    *('bin_given_expert_interval', 'expert_given_bin_interval'),
)


def shown_layer(layer: dict) -> dict:
    """A layer's entry of ``experts.json`` with :data:`MAX_SHOWN` experts at most.

    ``experts`` are the numbers of those that are shown, ascending; ``load``, ``importance`` (and
    their intervals), ``dead_experts`` and the tables are theirs alone, at their places:
    ``experts[i]`` is the number of the i-th. Shares stay shares of all, and ``num_experts`` the
    number of all, as ``num_dead`` is that of the dead ones. ``left_out`` says how many are not
    shown. The tables have ``experts`` and ``left_out`` as well, and those of counts in ``totals``
    what each bin has of all experts. A layer whose experts can all be shown is returned as it is.
    """
    count = layer['num_experts']
    if count <= MAX_SHOWN:
        return layer
    experts = layer['coactivation_experts']
    share = sum(layer['importance'][e] for e in experts)
    said = {
        'experts': experts,
        'left_out': f'{len(experts)} of {count} experts, those with the most weight '
        f'({100 * share:.0f} % of all)',
    }

    def of_shown(table: dict) -> dict:
        given = [key for key in _TABLES if table.get(key)]
        kept = {key: np.asarray(table[key])[..., experts].tolist() for key in given}
        if table.get('counts'):
            kept['totals'] = np.sum(table['counts'], axis=-1).tolist()
        return {**table, **kept, **said}

    return {
        **layer,
        **said,
        **{
            name: [layer[name][e] for e in experts]
            for name in ('load', 'importance', 'load_interval', 'importance_interval')
            if layer.get(name)
        },
        'num_dead': len(layer['dead_experts']),
        'dead_experts': [i for i, e in enumerate(experts) if e in set(layer['dead_experts'])],
        'associations': {
            source: {name: of_shown(table) for name, table in attributes.items()}
            for source, attributes in layer['associations'].items()
        },
    }


def shown_interventions(entries: list[dict], metric: str) -> list[dict]:
    """Interventions on one layer, of those with one expert zeroed the ones that cost most."""
    zeroed = [entry for entry in entries if entry['kind'] == 'zeroed']
    if len(zeroed) <= MAX_ZEROED:
        return entries
    values = [(entry['metrics'] or {}).get(metric) for entry in zeroed]
    cost = np.array([np.inf if value is None else value for value in values])
    kept = np.argsort(cost, kind='stable')[:MAX_ZEROED]
    others = [entry for entry in entries if entry['kind'] != 'zeroed']
    return others + [zeroed[i] for i in kept]
