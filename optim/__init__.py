"""Optimizers: steepest descent along averaged gradients, under a norm that is chosen for each role of parameters."""
