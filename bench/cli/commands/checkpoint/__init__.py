"""`offload checkpoint`: look at and check what `engine.save` wrote."""

HELP = "inspect or verify checkpoints"
