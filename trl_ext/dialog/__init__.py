"""Dialogue: DailyDialog as prompts, references and intents, rewards for replies, and the paper's evaluation score."""
