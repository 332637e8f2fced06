"""Pairs to train on: found in published sets, composed, rated; and one piece of code that works through many of them."""
