"""Everything on disk: tokens going in; run folders, checkpoints and logs coming out."""
