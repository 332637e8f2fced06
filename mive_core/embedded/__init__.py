"""How the embedded tiny models were made. Only the demo, the tests and the benchmarks use it."""
