"""What a run is: frozen dataclasses, named presets, ablation rows and the command line that parses them."""
