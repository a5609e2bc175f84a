"""The frozen result, and everything that shows or saves it."""
