"""The laboratory: what scripts share to run, read and compare experiments. It reads run folders; nothing calls it."""
