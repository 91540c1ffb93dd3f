"""Files and prints of a run: its folder, plan, log, metrics, diagnostics, checkpoint, clock, environment and wandb run."""
