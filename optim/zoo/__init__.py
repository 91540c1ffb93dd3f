"""Optimizers of the literature beyond muon, adam and normuon, one file each, imported when a role names it; also the
constraints on the weights, gradient clipping, grafting, and the Schatten norms."""
