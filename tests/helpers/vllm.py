"""A server of vLLM's, as trainers see it, that has a model of its own and no GPU."""

import torch
from transformers import AutoModelForCausalLM


class FakeServer:
    """
    Samples from the weights that were sent last, and takes those of its own model, each once, and no others.

    Attributes:
        num_updates (`int`): How often weights were sent.
    """

    def __init__(self, path):
        self.model = AutoModelForCausalLM.from_pretrained(path).eval()
        self.num_updates = 0

    def get_server_info(self):
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def reset_prefix_cache(self):
        pass

    def update_named_params(self, metadata, parameters):
        received = {}
        for (name, dtype, shape), (sent, tensor) in zip(metadata, parameters, strict=True):
            assert (
                sent == name
                and name not in received
                and (str(tensor.dtype), [*tensor.shape]) == (f"torch.{dtype}", shape)
            )
            received[name] = tensor.clone()
        own = dict(self.model.named_parameters())
        assert received.keys() == own.keys()
        with torch.no_grad():
            for name, tensor in received.items():
                own[name].copy_(tensor)
        self.num_updates += 1

    @torch.no_grad()
    def generate(self, prompts, n, max_tokens, temperature, **_sampling):
        eos = self.model.config.eos_token_id
        completions, log_probs = [], []
        for prompt in prompts:
            for _ in range(n):
                ids, found = list(prompt), []
                while len(found) < max_tokens and ids[-1] != eos:
                    logits = self.model(torch.tensor([ids])).logits[0, -1] / temperature
                    ids.append(int(torch.multinomial(logits.softmax(-1), 1)))
                    found.append(logits.log_softmax(-1)[ids[-1]].item())
                completions.append(ids[len(prompt) :])
                log_probs.append([[value] for value in found])
        return {"prompt_ids": prompts, "completion_ids": completions, "logprobs": log_probs}
