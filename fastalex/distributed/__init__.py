"""Training on several processes: their collectives, and the strategies that share the work."""
