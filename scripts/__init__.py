"""Programs beside the training run, each started as `python -m scripts.NAME`."""
