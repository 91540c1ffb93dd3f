"""Settings of a run: frozen dataclasses, presets, ablation rows, and the command line that parses them."""
