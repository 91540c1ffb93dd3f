"""An averaged gradient, turned into steepest descent under a norm chosen by the tensor's role."""
