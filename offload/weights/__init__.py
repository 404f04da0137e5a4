"""Models that are never whole in memory: where first values come from, and where last values go."""
