"""Training of the embedded tiny models. Used only by the demo, the tests and the benchmarks."""
