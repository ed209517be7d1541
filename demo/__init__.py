"""The whole way without a download: `make demo` and experiments, on the synthetic world that demo/world makes."""
