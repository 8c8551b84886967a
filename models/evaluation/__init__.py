"""What `models.evaluate` measures, through the agent's own inference: boxes, names, and what the agent counts."""
