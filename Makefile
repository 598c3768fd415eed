# Everything runs in .venv, made from the pinned versions of constraints.txt.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: setup demo test lint types clean soak

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,hf,webdataset,dev]'
	touch .venv/.ready

demo: setup
	$(BIN)/openlvd demo

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

soak: setup
	OPENLVD_KILLS=100 $(BIN)/python -m pytest tests/pipelines/test_contract.py -k killed --timeout 7200
	OPENLVD_FUZZ=20000 $(BIN)/python -m pytest tests/pipelines/test_fuzz.py -s
	OPENLVD_S3_KILLS=100 OPENLVD_S3_RAY_KILLS=20 $(BIN)/python -m pytest tests/pipelines/test_s3_kills.py --timeout 7200

clean:
	rm -rf .venv demo
