import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.helpers.sparse_po import first_batch, make_trainer, perturb
from tests.helpers.tiny import tiny_model, tiny_tokenizer
from trl_ext.sparse_po import evaluation
from trl_ext.sparse_po.evaluation import mask_recovery, mask_weights, reward_and_divergence
from trl_ext.sparse_po.masks import restore_masks


PROMPTS = ["the film", "a very good book and", "i liked"]


def length_reward(completions, prompts, **columns):
    assert len(completions) == len(prompts)
    return [float(len(text.split())) for text in completions]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_divergence_equals_full_softmaxes(family, tokenizer, monkeypatch):
    policy, reference = tiny_model(family).eval(), tiny_model(family, seed=1).eval()
    sampled = []

    def keep(*arguments):
        sampled.append(sample(*arguments))
        return sampled[-1]

    sample = evaluation._sample
    monkeypatch.setattr(evaluation, "_sample", keep)
    measured = reward_and_divergence(
        policy, reference, tokenizer, PROMPTS, length_reward, max_new_tokens=7, batch_size=2, seed=3
    )
    assert len(sampled) == 2 and measured.rewards == length_reward(measured.completions, PROMPTS)
    rows = [(ids, labels) for batch in sampled for ids, labels in zip(*batch, strict=True)]
    for prompt, (ids, labels), divergence in zip(PROMPTS, rows, measured.divergences, strict=True):
        start = len(tokenizer(prompt)["input_ids"])
        end = start + int((labels != -100).sum())
        assert ids[:start].tolist() == tokenizer(prompt)["input_ids"] and (labels[:start] == -100).all()
        with torch.no_grad():
            p, q = (
                model(input_ids=ids[None, :end], attention_mask=torch.ones(1, end)).logits[0, start - 1 : -1]
                for model in (policy, reference)
            )
        p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        assert divergence == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-4)


def test_a_model_does_not_diverge_from_itself(tokenizer):
    model = tiny_model().eval()
    measured = reward_and_divergence(model, model, tokenizer, PROMPTS, length_reward, max_new_tokens=5)
    assert max(measured.divergences) < 1e-4
    assert measured.mean_reward == pytest.approx(np.mean(measured.rewards)) and len(measured.standard_errors) == 2


def test_adapter_against_its_base(tokenizer):
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_model(), config)
    with_base = reward_and_divergence(model, tiny_model().eval(), tokenizer, PROMPTS, length_reward, max_new_tokens=5)
    switched_off = reward_and_divergence(model, None, tokenizer, PROMPTS, length_reward, max_new_tokens=5)
    assert switched_off.completions == with_base.completions
    assert switched_off.divergences == pytest.approx(with_base.divergences, rel=1e-4)
    assert min(switched_off.divergences) > 0


def test_seed_and_random_state(tokenizer):
    model = tiny_model().train()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    runs = [
        reward_and_divergence(model, model, tokenizer, PROMPTS, length_reward, max_new_tokens=9, seed=seed).completions
        for seed in (1, 1, 2)
    ]
    assert torch.equal(torch.rand(1), expected) and model.training
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("adapter", [False, True])
def test_generation_settings_of_the_model_are_set_aside(adapter, tokenizer):
    model = tiny_model()
    policy = get_peft_model(model, LoraConfig(target_modules=["q_proj"])) if adapter else model
    arguments = (policy, tiny_model(seed=1).train(), tokenizer, PROMPTS, length_reward)
    plain = reward_and_divergence(*arguments, max_new_tokens=9)
    model.generation_config.repetition_penalty = 50.0
    assert reward_and_divergence(*arguments, max_new_tokens=9).completions == plain.completions
    assert model.generation_config.repetition_penalty == 50.0
    assert arguments[1].training


def test_several_samples_of_each_prompt(tokenizer):
    model = tiny_model().eval()
    asked = []

    def remember(completions, prompts):
        asked.extend(prompts)
        return length_reward(completions, prompts)

    measured = reward_and_divergence(
        model, tiny_model(seed=1).eval(), tokenizer, PROMPTS, remember, num_samples=3, max_new_tokens=9
    )
    assert asked == [prompt for prompt in PROMPTS for _ in range(3)]
    assert len(measured.completions) == len(measured.divergences) == 9
    assert len(set(measured.completions[:3])) > 1
    expected = [np.std(x, ddof=1) / 3 for x in (measured.rewards, measured.divergences)]
    assert measured.standard_errors == pytest.approx(expected)
    single = reward_and_divergence(model, model, tokenizer, PROMPTS[:1], length_reward, max_new_tokens=3)
    assert np.isnan(single.standard_errors).all()


def test_tokenizer_without_padding_token():
    tokenizer, without = tiny_tokenizer(), tiny_tokenizer()
    without.pad_token = None
    model, reference = tiny_model().eval(), tiny_model(seed=1).eval()
    expected, measured = (
        reward_and_divergence(model, reference, each, PROMPTS, length_reward, max_new_tokens=6)
        for each in (tokenizer, without)
    )
    assert measured.completions == expected.completions
    assert measured.divergences == pytest.approx(expected.divergences, rel=1e-4)


def test_mask_recovery_by_hand():
    # Pairs (matters, other): weights 3 > 1, 3 > 2, 1 = 1 (half), 1 < 2 -> AUC (1 + 1 + 0.5 + 0) / 4
    found = mask_recovery([np.array([3.0, 1.0]), np.array([1.0, 2.0])], [np.array([2, 0]), np.array([-1, 0])])
    assert found.auc == pytest.approx(2.5 / 4)
    # Weight 3 first: precision 1 for one of two; then 2; then both of weight 1: precision 2 / 4 for the other
    assert found.average_precision == pytest.approx((1 + 2 / 4) / 2)
    assert (found.weight_share, found.token_share) == pytest.approx((4 / 7, 1 / 2))
    assert found.lift == pytest.approx(2.0 / 1.75)
    constant = mask_recovery([np.zeros(4)], [np.array([1, 0, 0, 1])])
    assert constant.auc == constant.average_precision == 0.5 and constant.lift == 0.0
    assert mask_recovery([np.full(4, 0.3)], [np.array([1, 0, 0, 0])]).lift == pytest.approx(1.0)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"independent_masks": True},
        {"mask_reward": False},
        {"independent_masks": True, "divergence_coef": 0.0},
    ],
)
def test_saved_masks_give_the_trainers_weights(settings, tmp_path, tiny_path, tokenizer):
    trainer = make_trainer(tmp_path, tiny_path, tokenizer, max_steps=2, mask_learning_rate=0.1, **settings)
    perturb(trainer.model)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    batch = first_batch(trainer)
    reward_mask, divergence_mask = mask_weights(restore_masks(tmp_path / "saved"), trainer.ref_model, batch)
    expected = trainer.token_masks(batch)
    torch.testing.assert_close(reward_mask, expected["reward"])
    torch.testing.assert_close(divergence_mask, expected["divergence"])


def test_wrong_arguments(tmp_path, tokenizer):
    model = tiny_model()
    with pytest.raises(ValueError, match="`prompts` is empty"):
        reward_and_divergence(model, model, tokenizer, [], length_reward)
    with pytest.raises(ValueError, match="`ref_model` is None.*PEFT"):
        reward_and_divergence(model, None, tokenizer, PROMPTS, length_reward)
    with pytest.raises(ValueError, match="`num_samples`.*0"):
        reward_and_divergence(model, model, tokenizer, PROMPTS, length_reward, num_samples=0)
    with pytest.raises(ValueError, match="has no tokens"):
        reward_and_divergence(model, model, tokenizer, ["the", ""], length_reward)
    endless = tiny_tokenizer()
    endless.eos_token = None
    with pytest.raises(ValueError, match="no `eos_token`"):
        reward_and_divergence(model, model, endless, PROMPTS, length_reward)
    with pytest.raises(ValueError, match="finite and not negative"):
        mask_recovery([np.array([1.0, np.nan])], [np.array([1, 0])])
    with pytest.raises(ValueError, match="same sequences"):
        mask_recovery([np.ones(2)], [np.ones(3)])
    with pytest.raises(ValueError, match="nothing to find"):
        mask_recovery([np.ones(2)], [np.ones(2)])
    with pytest.raises(FileNotFoundError, match="token_masks.safetensors"):
        restore_masks(tmp_path)
