"""The model's named pieces, one idea a file; `model.py` puts them together. They know the configuration and nothing else."""
