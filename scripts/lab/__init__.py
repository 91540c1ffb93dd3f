"""Library of the scripts that run, read and compare experiments. It reads run folders; training never imports it."""
