# Everything runs in .venv, made from the pinned versions of constraints.txt.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: setup demo test test-spark java test-fetch lint types clean soak bench

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,hf,webdataset,dev]'
	touch .venv/.ready

demo: setup
	$(BIN)/openlvd demo

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Crawl tables on Spark: needs Java, and 500 MB more in .venv.
test-spark: java .venv/.spark
	$(BIN)/python -m pytest tests/spark

java:
	@command -v java >/dev/null || { echo "make test-spark needs Java 17 or newer, and finds none" >&2; exit 1; }

.venv/.spark: .venv/.ready
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[spark]'
	touch .venv/.spark

# Fetching with img2dataset, which has an environment of its own: it and our newer webdataset exclude each other.
test-fetch: setup .venv-crawl/.ready
	OPENLVD_FETCH_PYTHON=.venv-crawl/bin/python $(BIN)/python -m pytest tests/fetch

.venv-crawl/.ready: constraints-crawl.txt
	$(PYTHON) -m venv .venv-crawl
	.venv-crawl/bin/pip install --quiet --disable-pip-version-check -r constraints-crawl.txt
	touch .venv-crawl/.ready

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

soak: setup
	OPENLVD_KILLS=100 $(BIN)/python -m pytest tests/pipelines/test_contract.py -k killed --timeout 7200
	OPENLVD_FUZZ=20000 $(BIN)/python -m pytest tests/pipelines/test_fuzz.py -s
	OPENLVD_S3_KILLS=100 OPENLVD_S3_RAY_KILLS=20 $(BIN)/python -m pytest tests/pipelines/test_s3_kills.py --timeout 7200
	OPENLVD_S3_FAULTS=0.2 $(BIN)/python -m pytest tests/pipelines/test_s3_faults.py --timeout 7200
	OPENLVD_EMBED_KILLS=100 OPENLVD_EMBED_RAY_KILLS=20 OPENLVD_EMBED_WORKER_KILLS=100 \
		$(BIN)/python -m pytest tests/pipelines/test_embed_kills.py --timeout 7200

# Speed beside other tools, one table a subject; bench_gpu.py and bench_cifar.py (20 minutes) are run by hand.
bench: setup
	@failed=0; for file in $(filter-out %/bench_gpu.py %/bench_cifar.py,$(wildcard tests/bench/bench_*.py)); do \
		echo "$$file"; $(BIN)/python $$file || failed=1; done; exit $$failed

clean:
	rm -rf .venv .venv-crawl demo
