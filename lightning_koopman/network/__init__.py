"""The user's network: its parts, weights and tensors."""
