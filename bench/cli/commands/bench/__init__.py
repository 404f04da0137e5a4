"""`offload bench`: measurements, one module each."""

HELP = "measure this machine and the engine on it"
