# Every target prepares .venv first; `make` alone lists them.
VENV   := .venv
STAMP  := $(VENV)/.installed
RUN    := $(VENV)/bin/python
MODEL  ?= miniworld-gpt2
# the first Python that is new enough, python3 if it can be; `make test PYTHON=...` takes another
PYTHON ?= $(or $(shell for p in python3 python3.13 python3.12 python3.11; do \
            $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done),python3)

# what JupyterLab adds to a notebook's metadata, besides outputs
OF_LAB := metadata.widgets metadata.papermill cell.metadata.papermill cell.metadata.execution \
          $(foreach key,codemirror_mode file_extension mimetype nbconvert_exporter pygments_lexer version,metadata.language_info.$(key))

.DEFAULT_GOAL := help
.PHONY: help figures figures-full test test-lab lab filter miniworld clean
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

figures: $(STAMP) ## run every notebook on the embedded models, in a small size; writes figures/ and runs/
	$(RUN) -m nbkit figures

figures-full: $(STAMP) ## the same in full size, as the figures that git has; hours, and goes on where it stopped
	$(RUN) -m nbkit figures --full

test: $(STAMP) ## lint, then run the tests
	$(RUN) -m ruff check .
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 4

test-lab: $(STAMP) ## run every notebook in JupyterLab in a browser (Chromium), and look at it; best after figures
	$(RUN) -m pytest tests/lab

# notebooks/.settings holds defaults of Lab for this project, which a user's own settings override: long lines wrap
lab: $(STAMP) filter ## open the notebooks in JupyterLab, at the explorer
	$(RUN) -m jupyterlab --LabApp.app_settings_dir=$(CURDIR)/notebooks/.settings --LabApp.default_url=/lab/tree/notebooks/00_explore_one_edit.ipynb

# What JupyterLab writes into a notebook that is opened, run and saved is no change of it for git.
filter:
	@if attributes=$$(git rev-parse --git-path info/attributes 2>/dev/null); then \
	  git config filter.nbstripout.clean '"$(abspath $(RUN))" -m nbstripout --keep-id --extra-keys "$(strip $(OF_LAB))"'; \
	  git config filter.nbstripout.smudge cat; \
	  mkdir -p "$$(dirname "$$attributes")"; \
	  grep -qs 'filter=nbstripout' "$$attributes" || echo '*.ipynb filter=nbstripout' >> "$$attributes"; fi

# glibc gives the large tensors of each step back to the system and asks for them anew, unless told to keep them
miniworld: $(STAMP) ## train an embedded model anew (resumes); MODEL=miniworld-llama takes another
	MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 $(RUN) data/miniworld train $(MODEL)

clean: ## remove .venv and caches; keeps runs/, figures/ and data/
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache
	find nbkit tests data -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is younger than what it was made from exactly when there is nothing to do.
$(STAMP): pyproject.toml .ci/install.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "nbkit needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another one: make $(or $(MAKECMDGOALS),test) PYTHON=/path/to/python3.11"; exit 1; } >&2
	@$(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || { \
	  echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu the package python3-venv holds it."; exit 1; } >&2
	@$(RUN) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(VENV) holds an older Python: run 'make clean' first."; exit 1; } >&2
	$(RUN) -I .ci/install.py dev
	@touch $@
