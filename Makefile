# Two commands for a newcomer: `make demo` and `make test`. Each makes .venv when it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Real photos, masks and weights, where they are at hand; CAMKIT_DATA=folder names another place.
CAMKIT_DATA ?= $(wildcard ../shared/data)
export CAMKIT_DATA

.NOTPARALLEL:
.PHONY: demo test long lowest processors sanitize check lint types layers docs package bench clean

# What a user installs is enough for this one.
demo: $(VENV)/.made
	$(BIN)/camkit demo --out out/demo

# Two processes with one thread each: on tiny models a second thread is waited for longer than it works.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# What takes a quarter of a minute and more each: clusters that lose processes, builds, compilers.
long: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --run-all -m long --numprocesses 2 --dist loadfile

# The same tests with the lowest versions that pyproject.toml allows (.ci/lowest.txt), on Python 3.11; optional packages are left out.
lowest:
	$(PYTHON) -m venv out/lowest
	out/lowest/bin/python -m pip --disable-pip-version-check install -q -c .ci/lowest.txt -e . \
		beartype einops hypothesis matplotlib open_clip_torch pyarrow pycocotools pytest pytest-xdist 'setuptools>=77' torchmetrics \
		transformers
	OMP_NUM_THREADS=1 out/lowest/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Tests in which rounding shows, as other processors and numbers of threads round.
TOUCHY := $(addprefix tests/test_,mean_field.py crf.py same_bits.py pipeline.py result.py reweight.py ops_attention.py views.py guided.py \
	fitting.py outputs.py)
processors: $(VENV)/.installed
	for capability in default avx2; do for threads in 1 2; do \
		echo "+ ATEN_CPU_CAPABILITY=$$capability, $$threads threads"; \
		ATEN_CPU_CAPABILITY=$$capability OMP_NUM_THREADS=$$threads CAMKIT_TEST_THREADS=$$threads \
			$(BIN)/python -m pytest -q $(TOUCHY) || exit 1; \
	done; done

# The compiled dense CRF under the address and undefined-behaviour sanitizers of g++.
SANITIZED := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g
sanitize: $(VENV)/.installed
	rm -rf out/sanitized
	CXX="g++ $(SANITIZED)" CAMKIT_CACHE=$(CURDIR)/out/sanitized ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 \
		LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
		$(BIN)/python -m pytest -q tests/test_mean_field.py

check: lint types layers

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.installed
	$(BIN)/mypy

layers: $(VENV)/.installed
	$(BIN)/lint-imports

# The documentation as a website in site/, every link checked; it asks nothing of any network.
docs: $(VENV)/.installed
	$(BIN)/codespell README.md docs examples camkit
	$(BIN)/python docs/make_site.py

# The sdist and the wheel of this platform in dist/, the pure wheel in dist/pure/, what is said of them, and the demo from the wheel in a
# fresh environment outside this folder, where no compiler is found.
package: $(VENV)/.installed
	rm -rf dist build out/from_wheel
	$(BIN)/python -m build
	CAMKIT_BUILD=pure $(BIN)/python -m build --wheel --outdir dist/pure
	$(BIN)/twine check --strict dist/*.* dist/pure/*
	$(PYTHON) -m venv out/from_wheel/venv
	out/from_wheel/venv/bin/python -m pip --disable-pip-version-check install -q dist/*.whl
	cd out/from_wheel && PATH= venv/bin/camkit demo --model demo --photos 1 --out demo
	cd out/from_wheel && PATH= venv/bin/camkit info
	rm -rf out/from_wheel

# Published tables; many hours on two cores. benchmarks/README.md says what each script measures, and which are not among these.
bench: $(VENV)/.installed
	$(BIN)/python benchmarks/preset.py --limit 200
	$(BIN)/python benchmarks/preset.py --limit 200 --voc
	$(BIN)/python benchmarks/gains.py
	$(BIN)/python benchmarks/gains.py --coco
	$(BIN)/python benchmarks/fitted.py
	$(BIN)/python benchmarks/fitted.py --coco
	$(BIN)/python benchmarks/fitted.py --voc --short
	$(BIN)/python benchmarks/fitted.py --side 512 --short
	$(BIN)/python benchmarks/fit_cost.py
	$(BIN)/python benchmarks/oracles.py
	$(BIN)/python benchmarks/seeds.py --limit 226
	$(BIN)/python benchmarks/seeds.py --limit 120 --voc
	$(BIN)/python benchmarks/pooled.py --limit 60
	$(BIN)/python benchmarks/views.py --limit 40
	$(BIN)/python benchmarks/layers.py
	$(BIN)/python benchmarks/seed_cost.py
	$(BIN)/python benchmarks/edges.py --tune-limit 120
	$(BIN)/python benchmarks/crf.py
	$(BIN)/python benchmarks/par.py
	$(BIN)/python benchmarks/hybrid_search.py
	$(BIN)/python benchmarks/hybrid_search.py --voc
	$(BIN)/python benchmarks/doei_gains.py
	$(BIN)/python benchmarks/doei_gains.py --voc
	$(BIN)/python benchmarks/doei_gains.py --every-seed --limit 60
	$(BIN)/python benchmarks/doei_scores.py
	$(BIN)/python benchmarks/doei_cost.py
	$(BIN)/python benchmarks/watching.py
	$(BIN)/python benchmarks/bulk.py kills memory rates
	$(BIN)/python benchmarks/bulk_ray.py --repeats 2
	$(BIN)/python benchmarks/bulk_sim.py
	$(BIN)/python benchmarks/bulk_scale.py journal files list --ray
	$(BIN)/python benchmarks/kills.py
	$(BIN)/python benchmarks/export.py
	$(BIN)/python benchmarks/hostile.py
	$(BIN)/python benchmarks/models.py

$(VENV)/.made: pyproject.toml
	@echo "camkit: making $(VENV) and installing into it; torch brings about 5 GB, a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --progress-bar on -e .
	@touch $@

$(VENV)/.installed: $(VENV)/.made
	@echo "camkit: installing what tests, checks and documentation take"
	$(PIP) install --progress-bar on -e '.[dev,docs]'
	$(PIP) install -q --no-deps grad-cam==1.5.7
	@echo "camkit: building pydensecrf for DenseCRF (optional; needs a C++ compiler)"
	@$(PIP) install -q -e '.[crf]' || echo "camkit: pydensecrf did not build; DenseCRF will say so and its tests skip"
	@touch $@

clean:
	rm -rf $(VENV) out site build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
