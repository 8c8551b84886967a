"""HematoVision agent: finds, names and counts the cells of a blood smear beside the microscope. Research use only."""

__version__ = "0.1.0"

RESEARCH_USE_ONLY = "Research use only. Not for diagnosis."
"""Stands in every output for people."""
