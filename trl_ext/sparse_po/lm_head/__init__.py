"""Two models' language-model heads side by side: log-probabilities and divergence without holding the logits."""
