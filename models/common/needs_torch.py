"""Imported before all else by programs that learn: without PyTorch they end here, in words."""

from models.common.programs import require_extra

require_extra(("torch",))
