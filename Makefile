# make demo: set everything up and run the main job, no download of weights. make browser: captions in the browser.
# make test: the tests. make bench: the benchmarks.
PYTHON ?= python3
VENV ?= .venv
BASE := $(VENV)/.installed
STAMP := $(VENV)/.installed-test
EXPORT := $(VENV)/.installed-export

.PHONY: demo demo-full browser test bench lint demo-weights clean

$(BASE): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --editable .
	touch $@

# what the tests need besides: pages, notebooks, peers to compare with
$(STAMP): $(BASE)
	$(VENV)/bin/python -m pip install --quiet --editable ".[test]"
	touch $@

demo: $(BASE)
	$(VENV)/bin/python -m demo.run $(DEMO_FLAGS)

# two captioners on more scenes: the figures of the README
demo-full: $(BASE)
	$(VENV)/bin/python -m demo.run --full --out demo/out/full

# captions in the browser: exports the demo's captioner, fetches onnxruntime-web by npm, serves the page
$(EXPORT): $(BASE)
	$(VENV)/bin/python -m pip install --quiet --editable ".[export]"
	touch $@

browser: $(EXPORT)
	$(VENV)/bin/python docs/browser/serve.py $(BROWSER_FLAGS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(TEST_FLAGS)

# the figures of benchmarks/ and where the time goes, on a machine without other work; BENCH_OUT keeps another machine's
BENCH_OUT ?= benchmarks
bench: $(STAMP)
	$(VENV)/bin/python benchmarks/run.py --out $(BENCH_OUT) $(BENCH_FLAGS)
	$(VENV)/bin/python benchmarks/profiling.py --out $(BENCH_OUT)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# retrains what demo/weights/ holds; takes about an hour on 2 cores
demo-weights: $(BASE)
	$(VENV)/bin/python -m demo.world.clip_cache
	$(VENV)/bin/python -m demo.world.train_clip
	$(VENV)/bin/python -m demo.world.train_gpt2
	$(VENV)/bin/python -m demo.run --full --out demo/out/full --save_weights

clean:
	rm -rf $(VENV) demo/out docs/browser/captioner docs/browser/vendor
