"""The user's module, left as found: its components, recorded states, where each came from."""
