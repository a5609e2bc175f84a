"""From a tensor to one row per sample: which axes are samples and positions, and what a row holds."""
