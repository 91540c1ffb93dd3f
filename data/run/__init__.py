"""What a run leaves behind: its folder, checkpoint, log and measurements."""
