"""The trainer's multipliers and mixture on drawn bandits with known saddle points."""

from recipes.experiments.constraint_bandits.run import NUM_REWARDS, draw, misses, play


def test_constraints_settle_at_the_saddle_and_infeasible_ones_are_named():
    bandits = draw(40, seed=3)
    found, saddle = play(bandits), bandits.saddle()
    distances, swings = misses(bandits, found, saddle)
    assert len(distances) > 50 and bandits.is_feasible.sum() == 35
    assert distances.max() < 2 and swings.max() < 2
    infeasible = set(range(0, 40, 8))
    assert {NUM_REWARDS * problem for problem in infeasible} <= found.named
    assert {index // NUM_REWARDS for index in found.named} == infeasible
