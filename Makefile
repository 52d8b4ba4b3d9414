# make install  the environment alone
# make demo   everything from nothing: environment, data, training, a table of results
# make test   the test suite
# make torture  the tests that repeat what is shared, for every stage; the counts go to docs/reliability.md
# make fuzz   20,000 damaged files of every kind that is read; the counts go to docs/reliability.md
# make golden  40 steps of each demo config, and what the models say: the same bits as before?
# make rooms   draw docs/rooms.svg from the imports
# make mutations  switch off what keeps each promise and see a test fail; the list goes to docs/mutations.md
# make smoke  every stage on a few steps, and one question: one to two minutes
# make lint   check the style; make format mends it
# make bench  speed, as ratios, also in checkpoints/bench.json and docs/speed.md
# make web    install what scripts/web_demo.py needs
# make judges  install what scripts/second_opinion.py needs: 320 MB of packages

# The first of these that is Python 3.11 or newer; or say: make PYTHON=/path/to/python3
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin

.PHONY: install demo smoke test torture fuzz golden rooms mutations lint format bench web judges clean
.DEFAULT_GOAL := demo

# A pip that was killed half-way leaves no stamp, so the next make goes on with it.
.venv/.installed: requirements.txt
	@test -n "$(PYTHON)" || { echo "error: expected Python 3.11 or newer with the venv module, found none"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/.installed-dev: .venv/.installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

# --no-deps: see requirements-web.txt
.venv/.installed-web: .venv/.installed requirements-web.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-web.txt
	@touch $@

# --no-deps: see requirements-judges.txt
.venv/.installed-judges: .venv/.installed requirements-judges.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-judges.txt
	@touch $@

install: .venv/.installed

demo: .venv/.installed
	$(BIN)/python scripts/demo.py

smoke: .venv/.installed
	$(BIN)/python scripts/demo.py --smoke

test: .venv/.installed-dev
	$(BIN)/python -m pytest -n 4 --dist worksteal -m "not torture"

torture: .venv/.installed-dev
	$(BIN)/python -m pytest -n 4 -m torture --timeout 900 --reliability=docs/reliability.md

fuzz: .venv/.installed-dev
	$(BIN)/python tests/fuzz.py --page docs/reliability.md

golden: .venv/.installed
	$(BIN)/python tests/golden.py $(ARGS)

rooms: .venv/.installed
	$(BIN)/python tests/rooms.py

mutations: .venv/.installed-dev
	$(BIN)/python tests/mutations.py --page docs/mutations.md

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --diff .

format: .venv/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.installed-dev
	$(BIN)/python benchmarks/bench.py --page docs/speed.md

web: .venv/.installed-web

judges: .venv/.installed-judges

clean:
	rm -rf .venv .pytest_cache .ruff_cache
