# What a contributor runs; `make help` lists it.
.PHONY: help check test slow coverage gpu docs figures pictures ci

help: ## Print this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 14

check: ## Lint, formatting and types, as pre-commit and CI run them
	ruff check .
	ruff format --check .
	mypy
	mypy --config-file benchmarks/mypy.ini

test: ## Quick tests and doctests
	pytest

slow: ## The long tests
	pytest -m slow

coverage: ## Quick tests, with the share of lines and branches they reach, 95 % at least
	pytest --cov --cov-report=term

gpu: ## The tests on a CUDA device
	pytest -m gpu tests/gpu

docs: ## The site, into site/
	mkdocs build --strict

figures: ## Draw the figure of the architecture page anew
	python docs/draw_architecture.py

pictures: ## Draw the pictures of README and documentation anew, by the tests that show them
	KEEP_SCREENSHOTS=docs/images pytest -m slow tests/integration/test_browser.py
	KEEP_SCREENSHOTS=docs/images pytest -m slow tests/integration/test_snippets.py -k README

ci: ## All of it, as CI does, in a fresh environment
	.ci/run
