"""Altered components: what altering them does, predicted and measured, and linear networks."""
