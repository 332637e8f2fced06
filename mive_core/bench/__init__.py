"""Benchmarks of speed and memory: ratios against other implementations, shares of the machine's peak, growth. Not needed for editing."""
