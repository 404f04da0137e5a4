"""`offload store`: look at, check and clean what an engine keeps on drives."""

HELP = "inspect, verify or clean what an engine keeps on drives"
