"""Finished trainings."""
