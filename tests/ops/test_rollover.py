import math

import pytest
import torch
from fake_device import DEVICE, FakeDevice

from flowfast.ops.rollover import reference

INF, NAN = math.inf, math.nan
STATE = ("quota", "threshold", "best_child")
RESULT = ("winner", "advance", "used")


def oracle(rewards, live, next_quota, carry, quota, threshold, best_child):
    """One chain in plain Python, from the definition."""
    winner, advance, used = -1, 0, 0
    for k, reward in enumerate(rewards):
        if not live[k] or quota <= 0 or advance:
            break
        used, quota = used + 1, quota - 1
        reward = -INF if math.isnan(reward) else reward
        if reward > best_child:
            best_child, winner = reward, k
        if reward > threshold:
            threshold, advance = reward, 1
        elif quota == 0:
            advance = 3 if best_child == -INF else 2
    if advance in (1, 2):
        quota, best_child = (quota if carry else 0) + next_quota, -INF
    return quota, threshold, best_child, winner, advance, used


def call(rewards, live, next_quota, carry, quota, threshold, best_child):
    """The op on copies; returns the six tensors it writes."""
    written = [quota.clone(), threshold.clone(), best_child.clone(), *torch.full((3, len(quota)), -5).unbind()]
    torch.ops.flowfast.rollover(rewards, live, next_quota, carry, *written)
    return written


def random_round(chains, lanes, seed):
    """Few distinct rewards, so that ties, NaN and infinities meet thresholds and best children often."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([NAN, -INF, INF, -1.0, 0.0, 0.5, 1.0, 2.0])

    def pick(choices, *shape):
        return choices[torch.randint(0, len(choices), shape, generator=generator)]

    live = torch.arange(lanes) < torch.randint(0, lanes + 1, (chains, 1), generator=generator)
    quota, next_quota = (torch.randint(low, 7, (chains,), generator=generator) for low in (-1, 0))
    threshold = pick(torch.tensor([-INF, 0.0, 0.5, 2.0, INF]), chains)
    return pick(values, chains, lanes), live, next_quota, quota, threshold, pick(values[1:], chains)


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("lanes", [0, 1, 2, 5, 8])
def test_against_plain_python(backend, lanes, carry):
    rewards, live, next_quota, *state = random_round(2000, lanes, lanes)
    got = torch.stack([tensor.double() for tensor in call(rewards, live, next_quota, carry, *state)], 1)
    columns = [tensor.tolist() for tensor in (rewards, live, next_quota, *state)]
    expected = [oracle(r, on, after, carry, *rest) for r, on, after, *rest in zip(*columns, strict=True)]
    assert torch.equal(got, torch.tensor(expected, dtype=torch.float64))
    if lanes >= 5:
        assert set(got[:, 4].tolist()) == {0, 1, 2, 3}  # every outcome was met


def one_chain(rewards, quota, threshold, best_child=-INF, next_quota=10, carry=True):
    live = torch.ones(1, len(rewards), dtype=torch.bool)
    tensors = [torch.tensor([value]) for value in (quota, threshold, best_child)]
    written = call(torch.tensor([rewards]), live, torch.tensor([next_quota]), carry, *tensors)
    return dict(zip(STATE + RESULT, (tensor.item() for tensor in written), strict=True))


def test_accepts_the_first_above_the_threshold_and_rolls_over(backend):
    after = one_chain([0.0, 2.0, 3.0], quota=5, threshold=1.0)
    assert after == dict(quota=13, threshold=2.0, best_child=-INF, winner=1, advance=1, used=2)
    assert one_chain([0.0, 2.0, 3.0], quota=5, threshold=1.0, carry=False)["quota"] == 10


def test_spends_the_quota_and_takes_the_best_of_all_rounds(backend):
    earlier = one_chain([0.25, 0.5], quota=4, threshold=1.0)
    assert earlier == dict(quota=2, threshold=1.0, best_child=0.5, winner=1, advance=0, used=2)
    spent = one_chain(
        [0.0, 0.25], quota=2, threshold=1.0, best_child=0.5
    )  # the best child stands from the round before
    assert spent == dict(quota=10, threshold=1.0, best_child=-INF, winner=-1, advance=2, used=2)


def test_a_tie_is_not_accepted_and_the_first_of_equals_stays(backend):
    after = one_chain([1.0, 1.0, 1.0], quota=5, threshold=1.0)
    assert (after["winner"], after["advance"], after["used"]) == (0, 0, 3)


def test_an_infinite_threshold_accepts_nothing(backend):
    assert one_chain([INF, 5.0], quota=2, threshold=INF)["advance"] == 2


def test_nothing_finite_is_dead(backend):
    after = one_chain([NAN, -INF], quota=2, threshold=-INF)
    assert after == dict(quota=0, threshold=-INF, best_child=-INF, winner=-1, advance=3, used=2)


def test_no_quota_counts_nothing(backend):
    after = one_chain([1.0], quota=0, threshold=0.0)
    assert after == dict(quota=0, threshold=0.0, best_child=-INF, winner=-1, advance=0, used=0)


@pytest.mark.parametrize("carry", [True, False])
def test_lanes_do_not_change_the_path(backend, carry):
    """K lanes at once, three at a time and one at a time agree up to and including the step's end."""
    rewards, _, next_quota, quota, threshold, best_child = random_round(2000, 8, 3)
    best_child.fill_(-INF)
    paths = []
    for lanes in (8, 3, 1):
        state = [quota.clone(), threshold.clone(), best_child.clone()]
        winner, advance, used = torch.full((2000,), -1), torch.zeros(2000).long(), torch.zeros(2000).long()
        for start in range(0, 8, lanes):
            now = rewards[:, start : start + lanes].contiguous()
            live = (advance == 0)[:, None].expand(now.shape).contiguous()
            *state, won, advanced, counted = call(now, live, next_quota, carry, *state)
            winner = torch.where(won >= 0, won + start, winner)
            advance, used = advance + advanced, used + counted
        paths.append([*state, winner, advance, used])
    for path in paths[1:]:
        assert all(torch.equal(a, b) for a, b in zip(paths[0], path, strict=True))


def operands(chains=4, lanes=3):
    rewards, live, next_quota, *state = random_round(chains, lanes, 0)
    return [rewards, live, next_quota, True, *state, *torch.zeros(3, chains).long().unbind()]


@pytest.mark.parametrize(
    "position, value, message",
    [
        (0, torch.zeros(4), r"rewards must have shape \(chains, lanes\), got \(4,\)"),
        (0, torch.zeros(4, 3).double(), "rewards must have dtype"),
        (1, torch.zeros(4, 3), "live must have dtype"),
        (1, torch.zeros(4, 2).bool(), r"live must have shape \(4, 3\), got \(4, 2\)"),
        (2, torch.zeros(4), "next_quota must have dtype"),
        (5, torch.zeros(5), r"threshold must have shape \(4,\), got \(5,\)"),
        (9, torch.zeros(8).long()[::2], "used must be contiguous"),
    ],
)
def test_wrong_operands(backend, position, value, message):
    arguments = operands()
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.flowfast.rollover(*arguments)


def test_reference_never_waits_for_the_device():
    with FakeDevice(fused=False) as device:
        arguments = [value.to(DEVICE) if isinstance(value, torch.Tensor) else value for value in operands()]
        device.clear()
        torch.ops.flowfast.rollover(*arguments)
    assert not device.waits and not device.copies and device.launches


def test_opcheck_and_script(backend):
    torch.library.opcheck(torch.ops.flowfast.rollover.default, tuple(operands()))

    @torch.jit.script
    def scripted(
        rewards: torch.Tensor, live: torch.Tensor, after: torch.Tensor, carry: bool, written: list[torch.Tensor]
    ):
        torch.ops.flowfast.rollover(
            rewards, live, after, carry, written[0], written[1], written[2], written[3], written[4], written[5]
        )

    arguments, expected = operands(), operands()
    scripted(*arguments[:4], arguments[4:])
    reference(*expected)
    assert all(torch.equal(a, b) for a, b in zip(arguments[4:], expected[4:], strict=True))
