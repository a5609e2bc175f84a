"""Rows in, numbers out: moments, operators, alignment, credits."""
