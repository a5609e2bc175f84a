# The checks that a contributor and CI run. Tests and doctests: `pytest`; the long ones: `pytest -m slow`.
.PHONY: check
check:
	ruff check .
	ruff format --check .
	mypy
