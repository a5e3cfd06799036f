"""The search in the real trainer, on a tiny model."""

import json

import pytest
import torch

from tests import glossary
from tests.helpers.constrained_ppo import length, low_ids, make, prompts
from trl_ext.constrained_ppo.constrained_ppo_config import ConstrainedPPOConfig
from trl_ext.constrained_ppo.proxy_points.logged_runs import read_runs
from trl_ext.constrained_ppo.threshold_search.callback import SEARCH_FILE
from trl_ext.core.checkpoint import MANIFEST_FILE


SETTINGS = {
    "method": "xi",
    "constraints": [{"reward": "length", "threshold": 0.5}, {"reward": "low_ids", "threshold": 0.7}],
    "search": {"max_gold_evaluations": 7, "steps_per_threshold": 3, "rollout_window": 1, "initial_range": 0.3},
    "max_steps": 11,
    "save_strategy": "steps",
    "save_steps": 2,
    "calibration_samples": 0,
    "dashboard": False,
}
VALIDATION = ["poor dull book", "good fine meal"]
seen_by_gold = set()


def gold(prompts, completion_ids, **columns):
    """Highest where low ids are half of a response."""
    seen_by_gold.update(prompts)
    return [1 - (share - 0.5) ** 2 for share in low_ids(completion_ids)]


def trainer_with_search(folder, path, **settings):
    from datasets import Dataset

    arguments = {"eval_dataset": Dataset.from_list([{"prompt": text} for text in VALIDATION * 4]), "gold_reward": gold}
    return make(folder, path, rewards=(low_ids, length), trainer_arguments=arguments, **{**SETTINGS, **settings})


@pytest.fixture(scope="module")
def whole(tmp_path_factory, path):
    seen_by_gold.clear()
    trainer = trainer_with_search(tmp_path_factory.mktemp("search") / "a", path)
    trainer.train()
    return trainer


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def test_search_in_the_trainer(whole):
    search = whole.search_callback.search
    assert seen_by_gold == set(VALIDATION)
    assert search.num_gold_evaluations == len(logged(whole, "eval_gold")) == whole.num_gold_evaluations <= 7
    names = [(trial.source, len(trial.thresholds)) for trial in search.history]
    assert names[0] == ("initial", 2) and len(search.history) >= 4
    assert logged(whole, "search/threshold/low_ids") == [trial.thresholds[1] for trial in search.history]
    assert logged(whole, "search/gold") == [trial.gold for trial in search.history]
    initial = search.history[0]
    first = next(entry for entry in whole.state.log_history if "eval_gold" in entry)
    assert initial.means == [first["eval_rewards/length/mean"], first["eval_rewards/low_ids/mean"]]
    assert initial.gold == first["eval_gold"]


def test_best_policy_multipliers_and_critic_are_applied_at_the_end(whole):
    from safetensors.torch import load_file

    search, args = whole.search_callback.search, whole.args
    best = search.best
    golds = {entry["step"]: entry["eval_gold"] for entry in whole.state.log_history if "eval_gold" in entry}
    assert best.gold == max(value for step, value in golds.items() if step) == whole.state.best_metric
    checkpoint = f"{args.output_dir}/checkpoint-{best.step}"
    assert whole.state.best_model_checkpoint == checkpoint
    saved = load_file(f"{checkpoint}/model.safetensors")
    policy = dict(whole.model.named_parameters())
    assert all(torch.equal(policy[name], tensor) for name, tensor in saved.items() if name in policy)
    assert torch.equal(whole.critic.weight, load_file(f"{checkpoint}/critic.safetensors")["weight"])
    assert [constraint.threshold for constraint in whole.multipliers.constraints] == best.thresholds
    with open(f"{checkpoint}/multipliers.json") as file:
        assert whole.multipliers.state_dict()["values"] == json.load(file)["values"]


@pytest.mark.parametrize("step", [2, 4])
def test_resumed_in_mid_search_equals_uninterrupted(step, whole, tmp_path, path):
    checkpoint = f"{whole.args.output_dir}/checkpoint-{step}"
    with open(f"{checkpoint}/{SEARCH_FILE}") as file:
        assert step - 3 < json.load(file)["trial"]["start_step"] < step  # within a proposal
    resumed = trainer_with_search(tmp_path, path)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.search_callback.search.state_dict() == whole.search_callback.search.state_dict()
    assert logged(resumed, "search/gold") == logged(whole, "search/gold")
    assert resumed.multipliers.state_dict() == whole.multipliers.state_dict()
    for (name, p), (_, q) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(p, q), name


def test_saved_beside_the_policy(whole, tmp_path):
    whole.save_model(str(tmp_path))
    assert json.loads((tmp_path / SEARCH_FILE).read_text()) == whole.search_callback.search.state_dict()


def test_its_log_is_read_by_proxy_points(whole):
    measured = read_runs([whole.args.output_dir])
    logged_by_step = {e["step"]: e for e in whole.state.log_history if "eval_gold" in e}
    assert set(measured.names) == {"low_ids", "length"} and len(measured.gold) >= 4
    assert glossary.unknown(whole.state.log_history) == set()
    for index, step in enumerate(measured.step.tolist()):
        entry = logged_by_step[step]
        assert measured.gold[index] == entry["eval_gold"] and measured.kl[index] == entry["eval_kl/per_response"]
        expected = [entry[f"eval_rewards/{name}/mean"] for name in measured.names]
        assert measured.rewards[index].tolist() == expected


def test_checkpoint_without_a_search(whole, tmp_path, path):
    import shutil

    folder = tmp_path / "checkpoint-2"
    shutil.copytree(f"{whole.args.output_dir}/checkpoint-2", folder)
    (folder / SEARCH_FILE).unlink()
    (folder / MANIFEST_FILE).unlink()
    with pytest.raises(ValueError, match=f"has no {SEARCH_FILE}.*with `search`"):
        trainer_with_search(tmp_path / "b", path).train(resume_from_checkpoint=str(folder))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"search": {"tolerence": 1}}, "did you mean `tolerance`"),
        ({"search": "steps"}, "`search` must be a mapping of settings or JSON, got 'steps'"),
        ({"search": {"lower": {"low": 0.1}}}, r"names \['low'\].*\['length', 'low_ids'\]"),
        ({"search": {"max_gold_evaluations": 2}}, "Give at least 4"),
        ({"method": "ppo", "constraints": []}, "`method='ppo'` has none"),
        ({"method": "sat"}, "`method='sat'` has none"),
        ({"save_strategy": "no"}, "`save_strategy='no'` keeps none"),
        ({"metric_for_best_model": "eval_rewards/length/mean"}, "`metric_for_best_model=.*Leave it out"),
    ],
)
def test_wrong_settings(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ConstrainedPPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **{**SETTINGS, **settings})


def test_without_gold_metric_or_data(tmp_path, path):
    with pytest.raises(ValueError, match="gold_reward"):
        make(tmp_path, path, trainer_arguments={"eval_dataset": prompts(8)}, **SETTINGS)
    config = ConstrainedPPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, **{**SETTINGS, "search": '{"seed": 3}'}
    )
    assert config.search_config.seed == 3 and config.load_best_model_at_end and config.greater_is_better


RECIPE = """
reward_funcs: [trl_ext.playground.count_positive_words, trl_ext.playground.grammaticality]
gold_reward: trl_ext.playground.sentiment_reward
method: xi
constraints: [{reward: count_positive_words, threshold: 2.0}, {reward: grammaticality, threshold: 0.9}]
search:
  initial_range: {count_positive_words: 0.8, grammaticality: 0.05}
save_strategy: best
use_cpu: true
bf16: false
"""


def test_search_in_a_recipe(tmp_path):
    from trl_ext.scripts.constrained_ppo import make_parser

    (tmp_path / "recipe.yaml").write_text(f"{RECIPE}output_dir: {tmp_path}\n")
    arguments = ["--config", str(tmp_path / "recipe.yaml")]
    parser = make_parser()
    _, config, _, _, rewards = parser.parse_args_and_config(arguments)
    assert config.search_config.initial_range["grammaticality"] == 0.05 and config.vf_coef == 0.5
    assert rewards.gold_reward == "trl_ext.playground.sentiment_reward"
    assert parser.parse_args_and_config([*arguments, "--search", '{"seed": 5}'])[1].search_config.seed == 5
    assert parser.parse_args_and_config([*arguments, "--vf_coef", "0.5", "0.1"])[1].vf_coefs(2) == [0.5, 0.1]
    with pytest.raises(ValueError, match="no setting `seeed`; did you mean `seed`"):
        parser.parse_args_and_config([*arguments, "--search", '{"seeed": 5}'])
