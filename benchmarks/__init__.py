"""What was measured: scripts that regenerate the files beside them."""
