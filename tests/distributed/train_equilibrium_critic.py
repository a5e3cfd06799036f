"""Trains constrained PPO with equilibrium critics, one after the other, and resumes each; started by the tests."""

import argparse
from pathlib import Path

from tests.distributed.train_ppo import LOGGED, finish, make_trainer, train


CRITICS = {
    "shared": {
        "critic": "shared",
        "critic_feedback": "asymmetric",
        "critic_feedback_angle": 60.0,
        "critic_homeostasis_coef": 10.0,
    },
    "separate": {"critic": "separate"},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--batch_size", type=int, required=True)
    parser.add_argument("--resume", action="store_true", help="also resume from checkpoint 3, between two updates")
    options = parser.parse_args()
    found = {}
    for name, settings in CRITICS.items():
        settings = {**settings, "critic_head": "equilibrium", "critic_hidden_features": [8, 8], "dashboard": False}
        folder = Path(options.output) / name
        logged = (*LOGGED, "ep/homeostasis_loss", "ep/weight_angle") if name == "shared" else LOGGED
        trainer = make_trainer(options, str(folder), **settings)
        found[name] = train(trainer, logged=logged)
        if options.resume:
            # Another seed: all that the resumed critic is comes from the checkpoint
            resumed = make_trainer(options, str(folder / "resumed"), seed=5, data_seed=42, **settings)
            found[name]["resumed"] = train(resumed, str(folder / "checkpoint-3"), logged)
    finish(trainer, found, options.output)


if __name__ == "__main__":
    main()
