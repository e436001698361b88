"""A calibration: where does a reward begin to see, and what does method auto make of it?

    python examples/calibration.py calibration.json

It is small, so that it takes seconds: `flowfast calibrate` has 24 prompts with 24 chains each, several paths, a picture
and workers, and goes on where it was stopped.
"""

import sys
from pathlib import Path

import flowfast
from flowfast import calibrate
from flowfast.models.scenes.prompts import hard_prompts

MODEL, REWARD = "scenes", "sharpness"


def main(out, prompts=3, chains=8, budget=200):
    flow = flowfast.load(MODEL)
    plan = calibrate.Calibration(
        model=MODEL, reward=REWARD, chains=chains,
        prompts=hard_prompts("tuning")[:prompts],  # like those of the search to come, and none by which it is judged
        paths=({"guidance": 3.0, "steps": 10},),
    )  # fmt: skip
    bank = calibrate.run(plan, flow, Path(out))
    print(f"{bank.reward} on {bank.model}, {len(bank.prompts)} prompts with {chains} trajectories each")
    print("linear t   rank correlation with the final reward")
    for t, rho in zip(bank.paths[0].linear_times, bank.paths[0].rho, strict=True):
        print(f"{t:8.2f}   {rho:5.2f}  {'#' * round(30 * max(0.0, rho))}")
    result = flowfast.search(
        flow, ["two red circles"], reward=REWARD, budget=budget, seed=0, calibration=str(out), guidance=3.0, steps=10
    )
    picked = result.config.picked
    print(f"auto at {budget} NFE: {picked.method} {picked.method_options}, because {picked.why}")
    print(f"reward {result.samples[0].reward:.4f} at {result.samples[0].nfe} NFE")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "calibration.json")
