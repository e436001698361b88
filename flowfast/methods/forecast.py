"""What the host knows of a search without asking the device: lanes of each round, also after cuts.

It scripts: Python's engine and archives in C++ forecast by the same code.
"""

from typing import NamedTuple


class Planned(NamedTuple):
    """What a forecast reads of a plan; all lists are whole."""

    lanes: int
    quota: list[list[int]]
    """(chains, transitions)."""
    left: list[int]
    """(chains,)."""
    start: list[bool]
    """(chains,)."""
    early: bool
    """Are better children taken at once anywhere?"""
    regroup: list[bool]
    """(transitions,)."""
    scored: list[bool]
    """(transitions,)."""
    passes: list[int]
    """(transitions,)."""
    keep: list[int]
    """All chains, in the order in which they are kept."""


class Forecast(NamedTuple):
    """Live lanes of each round, at most, those of them whose score is read, and those that need the null condition;
    the quota (chains, transitions) and left (chains,) after the last cut."""

    widths: list[int]
    scored: list[int]
    null: list[int]
    quota: list[list[int]]
    left: list[int]


def forecast(plan: Planned, cut_rounds: list[int], cut_nfe: list[int]) -> Forecast:
    """Cut i: from round cut_rounds[i] on all chains together spend at most cut_nfe[i] NFE, or what one of them needs to
    finish; in the order of rounds."""
    if plan.early:
        return greedy(plan, cut_rounds, cut_nfe)
    return in_step(plan, cut_rounds, cut_nfe)


def to_end(passes: list[int]) -> list[int]:
    """(T + 1,): NFE from each transition to the end of a trajectory, its own included; 0 behind the last."""
    found = [0 for _ in range(len(passes) + 1)]
    for k in range(len(passes) - 1, -1, -1):
        found[k] = found[k + 1] + passes[k]
    return found


def in_step(plan: Planned, cut_rounds: list[int], cut_nfe: list[int]) -> Forecast:
    """Without early acceptance: every round is known."""
    C, T = len(plan.left), len(plan.scored)
    widths: list[int] = []
    scored: list[int] = []
    null: list[int] = []
    table, left, allowed = plan.quota, plan.left.copy(), plan.left.copy()
    passes, ends = plan.passes, to_end(plan.passes)
    at = [0 if on else T for on in plan.start]  # the transition of each chain
    quota = [of_chain[0] for of_chain in table]
    stopped, running = [False for _ in plan.left], True
    while running:
        for i in range(len(cut_rounds)):
            if cut_rounds[i] == len(widths):
                need = [min(left[c], ends[at[c]] if at[c] < T else left[c]) for c in range(C)]
                table, left = cut(plan, table, left, need, cut_nfe[i])
                stopped, allowed = [amount == 0 for amount in left], left.copy()
        width, width_scored, width_null, furthest = 0, 0, 0, 0
        for c in range(C):
            if at[c] >= T or stopped[c]:
                continue
            each = passes[at[c]]
            quota[c] = min(quota[c], max(0, left[c] - ends[at[c] + 1]) // each)  # as the loop does
            lanes = min(plan.lanes, quota[c])
            width += lanes
            width_scored += lanes if plan.scored[at[c]] else 0
            width_null += lanes if each == 2 else 0
            quota[c] -= lanes
            left[c] -= lanes * each
            if quota[c] == 0:
                at[c] += 1
                quota[c] = table[c][at[c]] if at[c] < T else 0
            furthest = max(furthest, at[c] if at[c] < T else 0)
        running = width > 0
        if running:
            widths.append(width)
            scored.append(width_scored)
            null.append(width_null)
        if furthest > 0 and plan.regroup[furthest - 1]:  # chains of such a method go in step: late starters join here
            at = [furthest for _ in plan.left]
            quota = [of_chain[furthest] for of_chain in table]
    return Forecast(widths, scored, null, table, allowed)


def greedy(plan: Planned, cut_rounds: list[int], cut_nfe: list[int]) -> Forecast:
    """Early acceptance: a live chain spends at least one evaluation a round."""
    least = to_end(plan.passes)[0]
    table, left = plan.quota, plan.left
    widths: list[int] = []
    for i in range(len(cut_rounds)):
        rounds = cut_rounds[i] - len(widths)
        widths += rounds_within(plan, left, len(widths) == 0)[:rounds]
        left = [max(0, amount - rounds * min(plan.passes)) for amount in left]
        table, left = cut(plan, table, left, [min(amount, least) for amount in left], cut_nfe[i])
    widths += rounds_within(plan, left, len(widths) == 0)
    # Where only some transitions need the null condition nobody knows how many lanes stand there.
    null = widths if max(plan.passes) == 2 else [0 for _ in widths]
    return Forecast(widths, widths, null, table, left)


def rounds_within(plan: Planned, left: list[int], first: bool) -> list[int]:
    """Widths of all rounds in which chains may spend `left`: fewer than `lanes` once a transition at most. first: they
    stand at the beginning."""
    T, K, each = len(plan.scored), plan.lanes, min(plan.passes)
    width, begin, rounds, least = 0, 0, 0, to_end(plan.passes)[0]
    for c in range(len(left)):
        evaluations = T + (left[c] - least) // each if first and left[c] >= least else left[c] // each
        width += min(K, evaluations)
        begin += min(K, plan.quota[c][0])
        rounds = max(rounds, evaluations if K == 1 else T + evaluations // K)
    if width == 0:
        rounds = 0
    widths = [width for _ in range(rounds)]
    return [begin] + widths[1:] if first else widths


def cut(
    plan: Planned, table: list[list[int]], left: list[int], need: list[int], nfe: int
) -> tuple[list[list[int]], list[int]]:
    """Quota and left of the chains within `nfe`: smaller quotas, or fewer chains where quotas are 1."""
    total = sum(left)
    if total == 0:
        return table, left
    if max([max(of_chain) for of_chain in table]) > 1:
        shares = [max(need[c], left[c] * nfe // total) for c in range(len(left))]
        scaled: list[list[int]] = []
        for of_chain in table:
            scaled.append([0 if q == 0 else max(1, q * nfe // total) for q in of_chain])
        return scaled, [min(left[c], shares[c]) for c in range(len(left))]
    kept, spent = [0 for _ in left], 0
    for c in plan.keep:
        if left[c] > 0 and (spent == 0 or spent + need[c] <= nfe):
            kept[c] = left[c]
            spent += need[c]
    return table, kept
